"""Tables of runs, as each kind is read by what it is for; what runs are called does nothing in any of them."""

import csv
import io

import pytest
from samples import write, write_seeds

from analysis import metrics, replicates, tables
from common.errors import UserError


@pytest.fixture
def groups(tmp_path):
    write_seeds(tmp_path, "alpha", [90.0, 92.0], lr=0.1)
    write_seeds(tmp_path, "be", [95.0, 96.0], lr=0.2)
    return replicates.group(metrics.load_runs([str(tmp_path / "*")]))


def test_a_row_holds_what_its_runs_say(groups):
    first, second = tables.compare(groups).cells()
    assert (
        first["run"] == "alpha"
        and first["n"] == "2"
        and first["test %"] == "91.00 ± 1.41"
        and second["lr"] == "0.2"
    )
    assert (
        first["parameters"] == "5,000" and first["GMACs"] == "0.500" and first["images/s"] == "105"
    )
    assert first["time (s)"] == "10" and first["to 90 % of final (s)"] == "5"
    assert first["test % is of"] == "last epoch" and first["curve on"] == "test"
    text = tables.compare(groups).render("text")
    assert text.endswith("\nThe same in all: epochs 2.\n") and text.count("epochs 2") == 1


def test_columns_sorting_and_the_baseline(groups):
    table = tables.compare(groups, ["run", "test", "*"], baseline=groups[0])
    assert list(table.columns) == [
        "run",
        "test",
        "model",
        "lr",
        "difference",
        "error",
        "interval",
        "verdict",
    ]
    table.sort("test")
    assert [row["run"] for row in table.rows] == ["be", "alpha"]
    first, second = table.cells()
    assert (first["difference"], first["std error"], second["difference"]) == ("+4.50", "0.50", "")
    assert first["95 % interval"] == "-1.85 to +10.85" and first["verdict"] == "not resolved"
    table.sort("parameters" if "parameters" in table.columns else "run", reverse=True)
    assert [row["run"] for row in table.rows] == ["be", "alpha"]
    for call in (lambda: tables.compare(groups, ["colour"]), lambda: table.sort("colour")):
        with pytest.raises(UserError, match="colour: .*run"):
            call()


def test_what_a_reader_must_know_stands_below(tmp_path):
    write_seeds(tmp_path, "a", [90.0, 91.0], dataset="cifar10", limit_test=0)
    write_seeds(tmp_path, "b", [50.0, 51.0], dataset="cifar100", limit_test=0)
    write_seeds(tmp_path, "c", [92.0], dataset="cifar10", limit_test=0)
    write(
        tmp_path / "c-s1",
        arguments={"model": "c", "seed": 1, "epochs": 2, "dataset": "cifar10", "limit_test": 100},
    )
    write(
        tmp_path / "d",
        arguments={"model": "d", "seed": 0, "epochs": 2, "dataset": "cifar10", "limit_test": 0},
    )
    groups = replicates.group(metrics.load_runs([str(tmp_path / "*")]))
    table = tables.compare(groups, ["run", "difference", "verdict"], baseline=groups[0])
    rows = {row["run"]: row for row in table.rows}
    assert rows["b"]["difference"] is None and rows["b"]["verdict"] == "other test pictures"
    assert rows["c-s1"]["verdict"] == "other test pictures" and rows["c-s0"]["difference"] == 2.0
    assert rows["d"]["verdict"] == "not finished"
    for kind in ("text", "markdown", "latex"):
        text = table.render(kind)
        assert (
            "several data sets (cifar10, cifar100)" in text
            and "Differences are from a, in points" in text
        )
    assert "Differences" not in table.render("csv")


def test_rows_without_a_value_come_last_whichever_way(groups, tmp_path):
    write(tmp_path / "old", "epoch,train_loss", ["1,2"])
    groups.append(replicates.Group("old", [metrics.Run(tmp_path / "old/metrics.csv")]))
    table = tables.compare(groups)
    for reverse in (False, True):
        table.sort("test", reverse)
        assert table.rows[-1]["run"] == "old"


def test_csv_holds_the_numbers_in_columns_of_their_own(groups):
    rows = list(
        csv.DictReader(
            io.StringIO(tables.compare(groups, ["run", "test", "seconds", "lr"]).render("csv"))
        )
    )
    assert rows[0] == {
        "run": "alpha",
        "test": "91",
        "test_std": "1.41421",
        "seconds": "10",
        "seconds_std": "0",
        "lr": "0.1",
    }


def test_names_do_nothing_in_any_table(tmp_path):
    hostile = r"=1|<b>&_\x{$"
    group = replicates.Group(hostile, [metrics.Run(write(tmp_path / "a") / "metrics.csv")])
    table = tables.compare([group], ["run", "last"])
    assert (
        table.render("markdown")
        == "| run | last % |\n| :-- | --: |\n| =1\\|&lt;b&gt;&amp;\\_\\\\x{$ | 66.50 |\n"
    )
    row = table.render("latex").splitlines()[4]
    assert row == r"=1\textbar{}\textless{}b\textgreater{}\&\_\textbackslash{}x\{\$ & 66.50 \\"
    assert list(csv.reader(io.StringIO(table.render("csv"))))[1][0] == f"'{hostile}"
    assert "resnet20_no_eca" in tables.markdown_table(
        [{"run": "resnet20_no_eca"}]
    )  # reads as it is
    assert tables.markdown_table([{"a|b": "1"}]).startswith("| a\\|b |\n")


def test_a_config_or_summary_of_others_has_no_hold_on_the_terminal(tmp_path):
    for name in "ab":
        write(
            tmp_path / name,
            arguments={"model": "x\33[2J", "new\nline": name, "lr": 1},
            status="finished",
            reported="\33[2J",
        )
    groups = replicates.group(metrics.load_runs([str(tmp_path / "*")]))
    for kind in tables.KINDS:
        text = tables.compare(groups, columns=["run", "of", "model", "*"]).render(kind)
        text += tables.compare(groups[:1]).render(kind)
        assert "x?" in text and all(line.isprintable() for line in text.splitlines())


def test_a_table_wider_than_the_terminal_goes_on_below():
    rows = [{"run": "first", "a": "1" * 10, "b": "2" * 10, "c": "3"}]
    text = tables.text_table(rows, width=24)
    assert (
        text
        == f"run             a\nfirst  {'1' * 10}\n\nrun             b  c\nfirst  {'2' * 10}  3\n"
    )
    assert (
        tables.text_table(rows)
        == f"run             a           b  c\nfirst  {'1' * 10}  {'2' * 10}  3\n"
    )


def test_latex_is_typeset(groups, tmp_path):
    import shutil
    import subprocess

    if not shutil.which("pdflatex"):
        pytest.skip("no pdflatex")
    body = tables.compare(groups, baseline=groups[0]).render("latex")
    head = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}"
    (tmp_path / "x.tex").write_text(head + body + "\\end{document}")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "x.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stdout[-500:]
