"""Tables in each format; names that others chose have no effect in any of them."""

import csv
import io
import json
import shutil
import subprocess

import pytest
from helpers.samples import groups_in, write, write_seeds

from analysis import formats, metrics, replicates, tables
from common.errors import UserError


@pytest.fixture
def groups(tmp_path):
    write_seeds(tmp_path, "alpha", [90.0, 92.0], lr=0.1)
    write_seeds(tmp_path, "be", [95.0, 96.0], lr=0.2)
    return groups_in(tmp_path)


def test_a_row_holds_the_values_of_its_runs(groups):
    table = tables.compare(groups)
    first, second = table.cells()
    expected = {
        "run": "alpha",
        "n": "2",
        "test %": "91.00 ± 1.41",
        "parameters": "5,000",
        "GMACs": "0.500",
        "images/s": "105",
        "training time (s)": "10",
        "time per epoch (s)": "5.0",
        "test % per million parameters": "18200.00 ± 282.84",
        "to 90 % of final (s)": "5",
        "test % is of": "last epoch",
        "curve on": "test",
        "lr": "0.1",
    }
    assert {title: first[title] for title in expected} == expected and second["lr"] == "0.2"
    text = table.render("text")
    assert "\nThe same in all: epochs 2.\n\nThe best % is the highest of the curve on test" in text
    assert text.count("epochs 2") == 1


def test_columns_sorting_and_the_baseline(groups):
    table = tables.compare(groups, ["run", "test", "*"], baseline=groups[0])
    assert list(table.columns)[:4] == ["run", "test", "model", "lr"]
    assert list(table.columns)[4:] == ["difference", "error", "interval", "verdict"]
    for key, reverse in (("test", False), ("run", True)):
        table.sort(key, reverse)
        assert [row["run"] for row in table.rows] == ["be", "alpha"]
    first, second = table.cells()
    assert (first["difference"], first["std error"], second["difference"]) == ("+4.50", "0.50", "-")
    assert first["95 % interval"] == "-1.85 to +10.85" and first["verdict"] == "not resolved"
    for call in (lambda: tables.compare(groups, ["color"]), lambda: table.sort("color")):
        with pytest.raises(UserError, match="color: .*run"):
            call()


def test_verdicts_and_sentences_warn_of_accuracies_that_do_not_compare(tmp_path):
    cifar10 = {"epochs": 2, "dataset": "cifar10", "limit_test": 0}
    write_seeds(tmp_path, "a", [90.0, 91.0], **cifar10)
    write_seeds(tmp_path, "b", [50.0, 51.0], **cifar10 | {"dataset": "cifar100"})
    write_seeds(tmp_path, "c", [92.0], **cifar10)
    write(tmp_path / "c-s1", arguments=cifar10 | {"model": "c", "seed": 1, "limit_test": 100})
    write(tmp_path / "d", arguments=cifar10 | {"model": "d", "seed": 0})
    groups = groups_in(tmp_path)
    table = tables.compare(groups, ["run", "difference", "verdict"], baseline=groups[0])
    rows = {row["run"]: row for row in table.rows}
    assert rows["b"]["difference"] is None and rows["c-s0"]["difference"] == 2.0
    assert rows["b"]["verdict"] == rows["c-s1"]["verdict"] == "other test images"
    assert rows["d"]["verdict"] == "not finished"
    for kind in ("text", "markdown", "latex"):
        text = table.render(kind)
        assert "different test images (cifar10; cifar100; cifar10, 100 images)" in text
        assert "Differences are from a, in points" in text
    assert "Differences" not in table.render("csv")


def test_runs_that_differ_in_more_than_the_seed_have_no_interval(tmp_path):
    write_seeds(tmp_path / "low", "a", [90.0, 91.0], lr=0.1)
    write_seeds(tmp_path / "high", "a", [80.0, 81.0], lr=0.2)
    write_seeds(tmp_path, "b", [70.0, 71.0], lr=0.1)
    write(tmp_path / "other")
    runs = metrics.load_runs([str(tmp_path)])
    groups = {group.name: group for group in replicates.group(runs, ["model"])}
    assert set(groups) == {"model a", "model b", "other"}
    columns = ["difference", "error", "interval", "verdict"]
    table = tables.compare(list(groups.values()), ["run", *columns], baseline=groups["model b"])
    (row,) = [row for row in table.rows if row["run"] == "model a"]
    assert [row[key] for key in columns] == [15.0, None, None, "not only seeds differ"]
    assert "model a: its runs differ not only in the seed (lr)." in table.sentences
    assert "The same in all with a config.json: epochs 2." in table.sentences


def test_held_out_images_of_other_programs_are_other_images(tmp_path):
    for name, column in (("a", "test_acc"), ("b", "val_acc"), ("c", "val_acc")):
        write(tmp_path / name, f"epoch,{column}", ["1,0.5"])
    groups = groups_in(tmp_path)
    a, b, c = tables.compare(groups, ["run", "verdict"], baseline=groups[1]).rows
    assert (a["verdict"], b["verdict"]) == ("other test images", None)
    assert c["verdict"] == "one seed: no error known"
    (sentence,) = [s for s in tables.compare(groups).sentences if "can't be compared" in s]
    assert "(test images; held-out images)" in sentence


@pytest.mark.parametrize("reverse", [False, True])
def test_rows_without_a_value_come_last(groups, tmp_path, reverse):
    old = write(tmp_path / "old", "epoch,train_loss", ["1,2"])
    groups.insert(0, replicates.Group("old", [metrics.Run(old / "metrics.csv")]))
    table = tables.compare(groups)
    table.sort("test", reverse)
    assert table.rows[-1]["run"] == "old"


def test_equal_runs_have_no_columns_of_arguments_that_differ(groups):
    with pytest.raises(UserError, match="^--columns \\*: no argument differs between these runs$"):
        tables.compare(groups[:1], ["*"])


def test_csv_has_means_and_deviations_in_columns_of_their_own(groups):
    text = tables.compare(groups, ["run", "test", "seconds", "lr"]).render("csv")
    expected = "run,test,test_std,seconds,seconds_std,lr\nalpha,91,1.414213562,10,0,0.1\n"
    assert text.startswith(expected)


def test_special_characters_are_escaped_in_each_format(tmp_path):
    name = r"=1|<b>&_\x{$[*"
    group = replicates.Group(name, [metrics.Run(write(tmp_path / "a") / "metrics.csv")])
    table = tables.compare([group], ["run", "last"])
    row = "| =1\\|&lt;b&gt;&amp;\\_\\\\x{$\\[\\* | 66.50 |"
    assert table.render("markdown") == f"| run | last % |\n| :-- | --: |\n{row}\n"
    row = r"=1\textbar{}\textless{}b\textgreater{}\&\_\textbackslash{}x\{\${[}{*} & 66.50 \\"
    assert table.render("latex").splitlines()[4] == row
    assert list(csv.reader(io.StringIO(table.render("csv"))))[1][0] == f"'{name}"
    table = formats.markdown_table([{"a|b": "resnet20_no_eca"}])
    assert table.startswith("| a\\|b |\n") and "resnet20_no_eca" in table


def test_control_characters_do_not_reach_the_terminal(tmp_path):
    for name in "ab":
        arguments = {"model": "x\33[2J", "new\nline": name, "lr": 1}
        write(tmp_path / name, arguments=arguments, status="finished", reported="\33[2J")
    groups = groups_in(tmp_path)
    for kind in tables.SUFFIXES:
        text = tables.compare(groups, columns=["run", "of", "model", "*"]).render(kind)
        text += tables.compare(groups[:1]).render(kind)
        assert "x?" in text and all(line.isprintable() for line in text.splitlines())


def test_a_table_wider_than_the_terminal_continues_below():
    ones, twos = "1" * 10, "2" * 10
    rows = [{"run": "first", "a": ones, "b": twos, "c": "3"}]
    below = f"run             a\nfirst  {ones}\n\nrun             b  c\nfirst  {twos}  3\n"
    assert formats.text_table(rows, width=24) == below
    one_line = f"run             a           b  c\nfirst  {ones}  {twos}  3\n"
    assert formats.text_table(rows) == one_line


def test_a_value_that_a_run_lacks_is_a_dash_but_not_in_csv(tmp_path):
    write(tmp_path / "a", status="finished", train_clean_acc=99.5, test_tta_acc=67.0)
    write(tmp_path / "b", status="finished")
    table = tables.compare(groups_in(tmp_path))
    cells = [(row["train % (clean)"], row["test % with TTA"]) for row in table.cells()]
    assert cells == [("99.50", "67.00"), ("-", "-")]
    table = tables.compare(groups_in(tmp_path), ["run", "train_clean"])
    assert table.render("csv") == "run,train_clean\na,99.5\nb,\n"
    assert "| --: |" in table.render("markdown")


def test_a_mean_over_precisions_or_devices_says_so(tmp_path):
    write_seeds(tmp_path, "a", [90.0, 92.0])
    for seed, precision in enumerate(("float32", "bfloat16")):
        path = tmp_path / f"a-s{seed}" / "config.json"
        config = json.loads(path.read_text()) | {"precision": precision, "device": "cpu"}
        path.write_text(json.dumps(config))
    sentences = tables.compare(groups_in(tmp_path)).sentences
    assert "a: its runs differ in precision (float32, bfloat16)." in sentences
    assert not any("in device" in sentence for sentence in sentences)


def test_times_of_different_machines_are_pointed_out(tmp_path):
    for name, facts in (
        ("a", {"device": "cpu (one)", "threads": 2}),
        ("b", {"device": "cpu (one)", "threads": 1}),
        ("c", {"device": "cuda (two)", "threads": 8}),
    ):
        write(tmp_path / name, arguments={"model": name})
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    a, b, c = groups_in(tmp_path)
    threads = "The runs differ in threads (2, 1); times depend on it."
    devices = "The runs differ in device (cpu (one), cuda (two)); times depend on it."
    assert threads in tables.compare([a, b], ["run", "speed"]).sentences
    assert threads not in tables.compare([a, b], ["run", "test"]).sentences
    assert devices in tables.compare([a, c]).sentences
    assert threads not in tables.compare([a, c]).sentences  # of a CPU only


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no pdflatex")
def test_latex_is_typeset(groups, tmp_path):
    body = tables.compare(groups, baseline=groups[0]).render("latex")
    head = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}"
    (tmp_path / "x.tex").write_text(head + body + "\\end{document}")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "x.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stdout[-500:]
