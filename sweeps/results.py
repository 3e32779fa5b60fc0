"""Tables and pages of the published experiments, made from their files only.

    for path, text in pages(Path("."), Path("results")).items(): ...

results/README.md and docs/results.html show everything. In README.md the lines between MARKERS are
replaced, where they are.
"""

import re

from analysis import curves, differences, figures, formats, published, results_page, tables
from analysis.published import FIGURE
from sweeps.experiments import EXPERIMENTS, missing_command

MARKERS = ("<!-- results -->", "<!-- end of results -->")
OTHER_SEEDS = " (the other seeds)"
COMMANDS = "[results/README.md](results/README.md#not-measured) says what these are."
HEAD = """\
# Results

`python sweep.py report` makes this page from the files beside it. Each run has its `config.json`
(arguments, versions, machine, commit), `metrics.csv` and `summary.json`, but no weights.
`python compare_runs.py results/<experiment>/*` compares the runs of an experiment. Intervals are
95 %, by Student's t: they cover the variation between seeds, not between test sets, and are not
corrected for multiple comparisons. "last train %" is counted during the last epoch, on augmented
images; "train % (clean)" is measured at the end, without augmentation. "3 paired" means that
differences are between runs of the same seed. GMACs are billions of multiply-accumulate operations
for one image. Tables with a training time are of runs that ran one at a time; others have the
median time of an epoch. AMX is a set of bf16 matrix instructions of some Intel CPUs.

## Repeat a run

The images are those of the official archives, as PNG files in a folder for each class (commits
a828d74f and b105b30e of these repositories):

    git clone https://github.com/cyizhuo/CIFAR-10-dataset data/cifar10-png
    git clone https://github.com/cyizhuo/CIFAR-100-dataset data/cifar100-png

A run is repeated with its own arguments:

    python train.py --config results/augmentation/none-s0/config.json --data-dir data/cifar10-png

Where `amp` in `config.json` is `auto`, add `--amp off` (float32) or `--amp bf16`: that of the run.
On the same kind of machine, with the same versions and number of threads (`threads` in
`config.json`; here, set `OMP_NUM_THREADS=1`), its `metrics.csv` is the same, except for the columns
of time and memory. For transformers, use `train_vit.py`. With the official archive (`--dataset
cifar10 --data-dir data`), the images come in another order, and results differ as between seeds.

The commands under "Repeat it" repeat all seeds, in the precision that `--amp auto` chooses on your
machine. Where the line above them says "threads: 1", add `--jobs 2` on two cores: each run then has
one thread. The runs `fine-tuned` and `linear-probe` of transfer also need the weights that they
start from. The command under their table trains these first; for a single run, add
`--weights runs/repeated/ghost/resnet20-s0/last.pt` afterwards.
"""


def pages(root, results):
    """{path: text} of all generated pages. Raises UserError."""
    experiments = published.find(results)
    for experiment in experiments:
        experiment.check_notes()
        if experiment.name in EXPERIMENTS:
            experiment.planned = EXPERIMENTS[experiment.name].n
    abouts = {experiment.name: experiment.about for experiment in experiments}
    missing = {}  # {name: (what, command)}
    for name, planned in EXPERIMENTS.items():
        about = abouts.get(name)
        if not about:
            missing[name] = (planned.title, missing_command(name))
        elif set(planned.run_names) - set(about["runs"]):
            command = _on_the_same_images(missing_command(name), about["command"])
            missing[name] = (planned.title + OTHER_SEEDS, command)
    page = results_page.page(experiments, missing.values(), results.resolve().name)
    texts = {results / "README.md": _overview(experiments, missing)}
    texts[root / "docs/results.html"] = page
    readme = root / "README.md"
    before = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if all(marker in before for marker in MARKERS):
        start, end = map(before.index, MARKERS)
        table = f"{MARKERS[0]}\n{_summary(experiments, missing)}\n"
        texts[readme] = before[:start] + table + before[end:]
    return texts


def write(root, results):
    """Draws figures that are missing or old, and writes the pages. Returns the paths written."""
    texts = pages(root, results)
    written = [path for path in map(draw, published.find(results)) if path]
    for path, text in texts.items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            figures.write(path, text.encode())
            written.append(path)
    return written


def draw(experiment):
    """Draws an experiment's figure, unless it shows these runs already; returns its path."""
    path = experiment.directory / FIGURE
    if is_current(experiment):
        return None
    plt = figures.pyplot()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": experiment.name}):
        curves.draw(experiment.groups, path, size="page")
    text = re.sub(r"\s*<dc:date>.*?</dc:date>", "", path.read_text(encoding="utf-8"))
    figures.write(path, f"{text.rstrip()}\n<!-- {experiment.digest} -->\n".encode())
    return path


def is_current(experiment):
    """Whether the figure was drawn from the experiment's runs."""
    path = experiment.directory / FIGURE
    drawn_from = f"<!-- {experiment.digest} -->\n"
    return path.is_file() and path.read_text(encoding="utf-8").endswith(drawn_from)


def _overview(experiments, missing):
    """results/README.md."""
    parts = [HEAD]
    for experiment in experiments:
        heading = formats.markdown_text(experiment.heading)
        parts.append(f"## {experiment.name}\n\n{heading}.\n")
        parts += [formats.markdown_table(rows) for rows in _tables(experiment)]
        parts += [f"{note}\n" for note in experiment.notes]
        parts.append(f"![{experiment.title}: mean and deviation]({experiment.name}/{FIGURE})\n")
        parts += [f"{formats.markdown_text(fact)}\n" for fact in experiment.facts]
        parts.append(f"Repeat it:\n\n    {experiment.about['command']}\n")
    if missing:
        rows = [
            {"experiment": name, "about": title, "command": f"`{command}`"}
            for name, (title, command) in missing.items()
        ]
        parts.append(f"## Not measured\n\n{_as_written(formats.markdown_table(rows), '`')}")
    return "\n".join(parts)


def _on_the_same_images(command, of_published):
    """The command for missing seeds, with the image folders of the command of published ones."""
    with_folders = of_published.partition(" --output-dir")[0]
    return with_folders if with_folders.startswith(command) else command


def _tables(experiment):
    return [rows for rows in (experiment.rows, experiment.differences) if rows]


def _as_written(table, *marks):
    """A Markdown table in which these marks have their meaning."""
    for mark in marks:
        table = table.replace(formats.markdown_text(mark), mark)
    return table


def _accuracy(row):
    """Accuracy, with and without test-time augmentation, and the training time of a table's row."""
    augmented = row.get(tables.COLUMNS["tta"].title)
    text = row["test %"]
    if augmented not in (None, formats.MISSING):
        text += f", {augmented} with TTA"
    # The title of a column of times names the unit, too.
    title = next((key for key in row if key.startswith(tables.COLUMNS["seconds"].title)), None)
    unit = title.partition("(")[2].rstrip(")") if title else ""
    return f"{text} ({row[title]} {unit})" if title else text


def _summary(experiments, missing):
    """The table of README.md: a row for each experiment.

    An experiment with one of several planned seeds has no row: one seed gives no interval.
    """
    rows, published = [], {one.name for one in experiments}
    experiments = [one for one in experiments if not one.progress or one.seeds > 1]
    for experiment in experiments:
        link = f"[{experiment.name}](results/README.md#{experiment.name})"
        seeds = ", ".join(dict.fromkeys(f"n = {row['n']}" for row in experiment.rows))
        link = ", ".join(filter(None, (link, experiment.progress or seeds, experiment.threads)))
        accuracies = [f"{row['experiment']} {_accuracy(row)}" for row in experiment.rows]
        accuracies += [experiment.selection] if experiment.selection else []
        against = [
            f"{row['experiment']} against {row['against']}: {row['difference']}"
            + (f" ({row['95 % interval']})" if row["95 % interval"] else "")
            for row in experiment.differences
            if row["accuracy on"] == differences.MEASURES["test"]
        ]
        rows.append(
            {
                "experiment": link,
                "data": experiment.data,
                "test accuracy, % (training time)": "<br>".join(accuracies),
                "difference in points (95 % interval)": "<br>".join(against),
            }
        )
    text = _as_written(formats.markdown_table(rows), "[", "]", "<br>") if rows else ""
    if missing:
        names = [name + (OTHER_SEEDS if name in published else "") for name in missing]
        text += f"\nNot measured: {', '.join(names)}. {COMMANDS}\n"
    return text
