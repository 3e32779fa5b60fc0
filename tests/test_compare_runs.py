"""compare_runs.py: a table first, figures beside the runs, and errors of one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.samples import write, write_seeds

import compare_runs
from common.errors import UserError


def test_a_table_and_a_figure_beside_the_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "runs/a", status="finished", test_acc=66.5, parameters=272474, gmacs=0.0408)
    last_not_evaluated = ("1,10,0.1,2.1,19,1.9,71,5,90", "2,20,0.1,1.1,58,1.0,,5,95")
    write(tmp_path / "runs/b", rows=last_not_evaluated)
    columns = ["--columns", "run", "epochs", "last", "parameters"]
    assert compare_runs.main(["runs/a", "runs/b/metrics.csv", *columns]) == 0
    cells = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert cells[1:3] == [["a", "2", "66.50", "272,474"], ["b", "2", "71.00", "-"]]
    image = (tmp_path / "runs/comparison.png").read_bytes()
    assert image.startswith(b"\x89PNG") and len(image) > 20_000 and os.listdir(tmp_path) == ["runs"]


def test_all_outputs_in_one_call(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_seeds(tmp_path, "one", [90.0, 91.0])
    write_seeds(tmp_path, "three", [93.0, 94.5])
    arguments = (
        "*/metrics.csv --labels small large --baseline small --sort test --format markdown "
        "--panel error bars --output x.png x.pdf --table t.csv t.tex"
    )
    assert compare_runs.main(arguments.split()) == 0
    row = capsys.readouterr().out.splitlines()[2]
    assert row.startswith("| large | finished | 2 | 93.75 ± 1.06 |")
    assert "| +3.25 | 0.25 | +0.07 to +6.43 | higher |" in row
    written = {"x-error.png", "x-error.pdf", "x-bars.png", "x-bars.pdf", "t.csv", "t.tex"}
    assert written <= set(os.listdir(tmp_path)) and "small" in Path("t.tex").read_text()


@pytest.mark.extras("plotly")
def test_html_page_with_plotly(tmp_path):
    pytest.importorskip("plotly", reason="no plotly")
    write_seeds(tmp_path, "one", [90.0, 91.0])
    page = tmp_path / "p.html"
    assert compare_runs.main([str(tmp_path / "*"), "--no-figures", "--html", str(page)]) == 0
    assert page.read_text().count("one") > 1


def test_watch_compares_again_when_a_run_has_changed(tmp_path, monkeypatch, capsys):
    run = write(tmp_path / "a")
    outputs = []

    def sleep(seconds):
        outputs.append(capsys.readouterr().out)
        if len(outputs) == 2:
            with open(run / "metrics.csv", "a") as file:
                file.write("3,30,0.1,1,1,1,77.25,5,9\n")
            os.utime(run / "metrics.csv", (1, 1))
        if len(outputs) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(compare_runs.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        compare_runs.main([str(run), "--watch", "0.5", "--no-figures"])
    assert "66.50" in outputs[0] and outputs[1] == "" and "77.25" in outputs[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nothing", "no metrics at nothing"),
        ("empty", "no finished epoch"),
        ("binary", "can't be read|no column|no table"),
        ("a --labels x y", "2 names for 1 rows"),
        ("a b --labels x x", "--labels must differ"),
        ("a --output no/where.png", "--output no/where.png"),
        ("a --output x.mp3", "--output x.mp3: must"),
        ("a --table x.doc", "--table x.doc"),
        ("a --table .md", "--table .md"),
        ("a --table x.csv b/metrics.csv", "--table b/metrics.csv: would replace the metrics of"),
        ("a other.csv --table other.csv", "--table other.csv: would replace the metrics of a run"),
        ("a --no-figures --output x.png", "--output names a figure and can't be used with"),
        ("a --columns run difference", "--columns: differences need --baseline RUN"),
        ("a --html x.pdf", "--html x.pdf"),
        ("a --baseline c", "--baseline c: the rows are a"),
        ("a --sort beauty", "--sort beauty"),
        ("a --columns beauty", "--columns beauty"),
        ("a --reverse", "--reverse needs --sort COLUMN"),
        ("a b --panel family", "--panel family: the test images differ .cifar10; cifar100"),
        ("a --show --no-figures", "--show can't be used with --no-figures"),
        ("a --show --watch", "--show can't be used with --watch"),
    ],
)
def test_errors_name_the_value_and_leave_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name, dataset in (("a", "cifar10"), ("b", "cifar100")):
        write(tmp_path / name, arguments={"dataset": dataset, "seed": 0, "limit_test": 0})
    write(tmp_path / "empty", rows=())
    (tmp_path / "other.csv").write_text("epoch,test_acc\n1,50\n")
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "metrics.csv").write_bytes(bytes(range(256)))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as error:
        compare_runs.main(arguments.split())
    assert "\n" not in str(error.value) and set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "value", "status", "stream", "text"),
    [
        ("PYTHONIOENCODING", "cp1252", 0, "stdout", r"\u5b9f"),
        ("MPLBACKEND", "nothing", 2, "stderr", "error: $MPLBACKEND: "),
    ],
)
def test_settings_of_the_environment_leave_no_traceback(
    tmp_path, name, value, status, stream, text
):
    write(tmp_path / "実")
    command = [sys.executable, compare_runs.__file__, str(tmp_path / "実")]
    environment = os.environ | {name: value}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == status and text in getattr(done, stream)
    assert "Traceback" not in done.stderr


def test_watch_waits_for_the_first_epoch(tmp_path, monkeypatch, capsys):
    run = write(tmp_path / "a", arguments={"seed": 0})
    (run / "metrics.csv").unlink()

    def sleep(seconds):
        write(run)
        monkeypatch.setattr(compare_runs.time, "sleep", interrupt)

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_runs.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        compare_runs.main([str(run), "--watch", "--no-figures"])
    waiting, table = capsys.readouterr().out.split("\n", 1)
    assert waiting.endswith("has no finished epoch yet") and "66.50" in table


def test_the_baseline_is_the_run_at_a_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_seeds(tmp_path, "a", [90.0])
    write_seeds(tmp_path, "b", [80.0])
    for baseline in ("./a-s0", str(tmp_path / "a-s0/metrics.csv")):
        assert compare_runs.main(["a-s0", "b-s0", "--no-figures", "--baseline", baseline]) == 0
        assert "-10.00" in capsys.readouterr().out


def test_runs_of_sweeps_are_compared_below_the_directory_of_all(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "runs/a", arguments={"model": "eca_resnet20", "seed": 0})
    write(tmp_path / "runs/sweep/b", arguments={"model": "plain18", "seed": 0})
    assert compare_runs.main(["runs", "--columns", "run", "family", "--panel", "family"]) == 0
    cells = [line.split() for line in capsys.readouterr().out.splitlines()[1:3]]
    assert cells == [["a", "eca"], ["b", "plain"]]  # of runs that didn't record it
    assert (tmp_path / "runs/comparison.png").is_file()


def test_without_a_display_show_names_the_file(tmp_path, capsys, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND"):
        monkeypatch.delenv(name, raising=False)
    assert compare_runs.main([str(write(tmp_path / "a")), "--show"]) == 0
    file = tmp_path / "a/comparison.png"
    assert f"there is no display; the figure is in {file}" in capsys.readouterr().err
    assert file.is_file()


def test_with_a_display_each_figure_gets_a_window(tmp_path, monkeypatch):
    from analysis import figures

    plt, windows = figures.pyplot(), []
    monkeypatch.setattr(figures, "has_display", lambda: True)
    monkeypatch.setattr(plt, "show", lambda: windows.extend(plt.get_fignums()))
    files = ["--output", str(tmp_path / "x.png"), str(tmp_path / "x.pdf")]
    compare_runs.main([str(write(tmp_path / "a")), "--show", "--panel", "curves", "bars", *files])
    plt.close("all")
    assert len(windows) == 2 and len(list(tmp_path.glob("x-*"))) == 4


def test_the_table_needs_neither_torch_nor_matplotlib(tmp_path):
    write(tmp_path / "a")
    code = (
        f"import sys, compare_runs; compare_runs.main([{str(tmp_path / 'a')!r}, '--no-figures']); "
        "assert not {'torch', 'matplotlib', 'pandas', 'numpy'} & set(sys.modules)"
    )
    root, command = Path(compare_runs.__file__).parent, [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and "66.50" in done.stdout, done.stderr
