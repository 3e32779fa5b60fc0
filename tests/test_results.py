"""results/: the pages that are made of published runs."""

import json
from html.parser import HTMLParser
from pathlib import Path

from helpers.errors import refused
from helpers.paths import ROOT
from helpers.published import A, change, put

import sweep
from analysis import published
from sweeps import results
from sweeps.experiments import Experiment, repeat_command


def test_accuracies_on_training_images_are_compared_where_they_were_measured(runs):
    for run, accuracy in zip(runs, [80.0, 90.0, 95.0, 99.0]):
        change(run / "summary.json", train_clean_acc=accuracy)
    put(runs)
    experiment = published.load("results/x")
    found = [(row["accuracy on"], row["difference"]) for row in experiment.differences]
    assert found == [("test images", "+4.62"), ("training images", "+12.00")]
    assert "+12.00" not in results._summary([experiment], {})


class Balance(HTMLParser):
    """Counts elements that are opened and not closed, and collects ids and links."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links = [], [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes[name] for name in ("href", "src") if name in attributes]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_pages_show_the_tables_and_what_is_missing(runs):
    put(runs)
    Path("results/x/notes.md").write_text("The interval\nis +3.0 <wide>.\n\nOne `machine`.\n")
    Path("README.md").write_text("before\n{}\nold\n{}\nafter\n".format(*results.MARKERS))
    with refused("results/x/notes.md: 3.0 is not in the tables"):
        results.write(Path(), Path("results"))
    Path("results/x/notes.md").write_text(
        "The difference\nis +4.62 <wide>.\n\nOne `machine`, [x](#x).\n"
    )
    assert len(results.write(Path(), Path("results"))) == 4
    overview, page, readme = (
        Path(name).read_text() for name in ("results/README.md", "docs/results.html", "README.md")
    )
    assert "| be | 2 | 95.62 ± 0.88 |" in overview and "![a title" in overview
    assert "| be | alpha | test images | +4.62 | -0.14 to +9.39 | 2 paired |" in overview
    assert f"Commit: {A[:12]}." in overview and "The difference is +4.62 <wide>." in overview
    assert "be against alpha: +4.62 (-0.14 to +9.39)" in readme and "old" not in readme
    assert readme.startswith("before\n") and readme.endswith("after\n")
    for text in (overview, page):
        assert "python sweep.py campaign --only eca" in text
    parsed = Balance()
    parsed.feed(page)
    assert parsed.open == [] and len(set(parsed.ids)) == len(parsed.ids)
    assert {link[1:] for link in parsed.links if link.startswith("#")} <= set(parsed.ids)
    assert "&lt;wide&gt;" in page and "<code>machine</code>" in page
    assert "../results/x/curves.svg" in parsed.links
    assert page.count('<a href="#x">x</a>') == 2
    assert results.write(Path(), Path("results")) == []


def test_pages_are_written_beside_published_experiments_only(runs, monkeypatch):
    put(runs)
    Path("README.md").write_text("\n".join(results.MARKERS))
    monkeypatch.chdir("results")
    assert sweep.main(["report", "--results", "."]) == 0
    assert "alpha" in Path("../README.md").read_text() and not Path("docs").exists()
    monkeypatch.chdir("..")
    before = Path("README.md").read_text()
    with refused("--results . holds no published experiment"):
        sweep.main(["report", "--results", "."])
    assert Path("README.md").read_text() == before


def test_a_figure_is_drawn_again_when_its_runs_change(runs):
    put([run for run in runs if run.name.endswith("-s0")])
    results.write(Path(), Path("results"))
    figure = Path("results/x/curves.svg")
    drawn = figure.read_text()
    assert len(drawn) < 100_000 and "<dc:date>" not in drawn
    figure.unlink()
    results.write(Path(), Path("results"))
    assert figure.read_text() == drawn
    put(runs)
    assert results.write(Path(), Path("results")) and figure.read_text() != drawn


def test_the_pages_of_the_repository_are_made_from_its_results():
    for experiment in published.find(ROOT / "results"):
        assert results.is_current(experiment), "python sweep.py report"
    for path, text in results.pages(ROOT, ROOT / "results").items():
        assert path.read_text() == text, f"{path}: python sweep.py report"
        assert len(text) < 300_000


def test_the_pages_say_how_many_seeds_are_measured(runs, monkeypatch):
    """One of several seeds is not shown in README.md."""
    planned = Experiment("a title", {"alpha": "", "be": ""}, (), n=3)
    monkeypatch.setattr(results, "EXPERIMENTS", {"x": planned})
    Path("README.md").write_text("\n".join(results.MARKERS))
    for count, members in ((1, [run for run in runs if run.name.endswith("-s0")]), (2, runs)):
        put(members)
        pages = results.pages(Path(), Path("results"))
        overview, page, readme = (
            pages[Path(name)] for name in ("results/README.md", "docs/results.html", "README.md")
        )
        assert f"\nA title ({count} of 3 seeds).\n" in overview
        assert "| x | a title (the other seeds) | `python sweep.py campaign --only x` |" in overview
        assert f"a title ({count} of 3 seeds)" in page
        assert "Not measured: x (the other seeds)." in readme
        assert ("[x](results/README.md#x), 2 of 3 seeds, " in readme) == (count == 2)
        assert ("alpha" in readme) == (count == 2)


def test_missing_seeds_take_the_images_of_the_published_ones(runs, monkeypatch):
    planned = Experiment("a title", {"alpha": "", "be": ""}, (), n=3)
    monkeypatch.setattr(results, "EXPERIMENTS", {"x": planned})
    put(runs)
    command = repeat_command("x", {"cifar10": "/somewhere/png"})
    change(Path("results/x/experiment.json"), command=command)
    overview = results.pages(Path(), Path("results"))[Path("results/README.md")]
    assert f"\n    {command}\n" in overview
    assert "| `python sweep.py campaign --only x --cifar10-dir data/png` |" in overview


def test_what_was_selected_on_the_test_set_is_said_with_the_result(runs):
    put(runs)
    about = json.loads(Path("results/x/experiment.json").read_text())
    change(Path("results/x/experiment.json"), selected_on_test="the number of epochs")
    sentence = "he number of epochs was selected on the test set"
    assert f"T{sentence}." in published.load("results/x").facts[0]
    Path("README.md").write_text("\n".join(results.MARKERS))
    pages = results.pages(Path(), Path("results"))
    assert f"<br>t{sentence} |" in pages[Path("README.md")]
    Path("results/x/experiment.json").write_text(json.dumps(about))
    assert sentence not in "".join(results.pages(Path(), Path("results")).values())
