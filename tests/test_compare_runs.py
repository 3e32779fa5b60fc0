"""The script: a table first, figures beside the runs, and one line for what can't be compared."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from samples import write, write_seeds

import compare_runs
from common.errors import UserError


def cells(capsys):
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_a_table_and_a_picture_beside_the_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "runs/a", status="finished", test_acc=66.5, parameters=272474, gmacs=0.0408)
    write(tmp_path / "runs/b", rows=("1,10,0.1,2.1,19,1.9,71,5,90", "2,20,0.1,1.1,58,1.0,,5,95"))
    assert (
        compare_runs.main(
            ["runs/a", "runs/b/metrics.csv", "--columns", "run", "epochs", "last", "parameters"]
        )
        == 0
    )
    assert cells(capsys)[1:3] == [
        ["a", "2", "66.50", "272,474"],
        ["b", "2", "71.00"],
    ]  # the last epoch was not evaluated
    picture = (tmp_path / "runs/comparison.png").read_bytes()
    assert (
        picture.startswith(b"\x89PNG")
        and len(picture) > 20_000
        and sorted(os.listdir(tmp_path)) == ["runs"]
    )


@pytest.mark.extras("plotly")
def test_every_kind_of_output_in_one_go(tmp_path, capsys, monkeypatch):
    pytest.importorskip("plotly", reason="no plotly")
    monkeypatch.chdir(tmp_path)
    write_seeds(tmp_path, "one", [90.0, 91.0])
    write_seeds(tmp_path, "three", [93.0, 94.5])
    arguments = [
        "*/metrics.csv",
        "--labels",
        "small",
        "large",
        "--baseline",
        "small",
        "--sort",
        "test",
        "--format",
        "markdown",
    ]
    arguments += [
        "--panel",
        "error",
        "bars",
        "--output",
        "x.png",
        "x.pdf",
        "--table",
        "t.csv",
        "t.tex",
        "--html",
        "p.html",
    ]
    assert compare_runs.main(arguments) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[2].startswith("| large | finished | 2 | 93.75 ± 1.06 |")
    assert "| +3.25 | 0.25 | +0.07 to +6.43 | higher |" in out[2]
    assert {"x-error.png", "x-bars.pdf", "t.csv", "t.tex", "p.html"} <= set(os.listdir(tmp_path))
    assert (
        "small" in (tmp_path / "t.tex").read_text()
        and (tmp_path / "p.html").read_text().count("large") > 1
    )


def test_watching_compares_again_when_a_run_has_gone_on(tmp_path, monkeypatch, capsys):
    run = write(tmp_path / "a")
    shown = []

    def sleep(seconds):
        shown.append(capsys.readouterr().out)
        if len(shown) == 2:
            with open(run / "metrics.csv", "a") as file:
                file.write("3,30,0.1,1,1,1,77.25,5,9\n")
            os.utime(run / "metrics.csv", (1, 1))
        if len(shown) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(compare_runs.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        compare_runs.main([str(run), "--watch", "0.5", "--no-figures"])
    assert "66.50" in shown[0] and shown[1] == "" and "77.25" in shown[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no metrics at nothing"),
        (["empty"], "no finished epoch"),
        (["binary"], "can't be read|no column|no table"),
        (["a", "--labels", "x", "y"], "2 names for 1 rows"),
        (["a", "--output", "no/where.png"], "--output no/where.png"),
        (["a", "--output", "x.mp3"], "--output x.mp3: it takes"),
        (["a", "--table", "x.doc"], "--table x.doc"),
        (["a", "--html", "x.pdf"], "--html x.pdf"),
        (["a", "--baseline", "b"], "--baseline b: the rows are a"),
        (["a", "--sort", "beauty"], "--sort beauty"),
        (["a", "--columns", "beauty"], "--columns beauty"),
    ],
)
def test_what_can_not_be_done_is_named_and_leaves_nothing(
    tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a")
    write(tmp_path / "empty", rows=())
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "metrics.csv").write_bytes(bytes(range(256)))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as refused:
        compare_runs.main(arguments)
    assert "\n" not in str(refused.value) and set(tmp_path.rglob("*")) == before


def test_neither_torch_nor_matplotlib_is_imported_before_the_table(tmp_path):
    write(tmp_path / "a")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import compare_runs; "
        f"compare_runs.main([{str(tmp_path / 'a')!r}, '--no-figures']); "
        "assert not {'torch', 'matplotlib', 'pandas', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "66.50" in done.stdout, done.stderr
