"""Runs are read: ours, other programs', and damaged ones."""

import os

import pytest
from helpers.samples import HEADER, write

from analysis import metrics
from analysis.metrics import NO_EPOCH_YET
from common.errors import UserError


def read(directory):
    return metrics.Run(directory / "metrics.csv")


def test_patterns_are_expanded_and_a_run_counts_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write(tmp_path / name)
    (tmp_path / "README.md").write_text("runs/* matches this file, too")
    found = [str(p) for p in metrics.find_metrics(["*/metrics.csv", "a", "*", "README.md"])]
    assert found == ["a/metrics.csv", "b/metrics.csv"]


def test_a_directory_stands_for_the_runs_in_it_in_its_sweeps_and_campaigns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["runs/a", "runs/campaign/x/c-s0", "runs/sweep/b-s0", "runs/sweep/b-s1"]
    for name in (*names, "runs/sweep/b-s1/of/a/run", "runs/x/much/too/deep"):
        write(tmp_path / name)
    for patterns in (["runs"], ["runs/*"], ["runs/sweep", "runs/a", "runs"]):
        found = {str(path.parent) for path in metrics.find_metrics(patterns)}
        assert found - {"runs/x/much/too/deep"} == set(names)
        assert ("runs/x/much/too/deep" in found) == (patterns == ["runs/*"])
    assert [str(path.parent) for path in metrics.find_metrics(["runs/sweep"])] == names[2:]


def test_the_table_of_a_sweep_is_no_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "sweep/a-s0")
    (tmp_path / "sweep/results.csv").write_text("experiment,n\n")
    (tmp_path / "results.csv").write_text("epoch,loss\n1,2\n")  # of another program
    (tmp_path / "sweep/results.json").write_text("{}")
    found = [str(p) for p in metrics.find_metrics(["sweep/*", "results.csv"])]
    assert found == ["sweep/a-s0/metrics.csv", "results.csv"]


@pytest.mark.parametrize("pattern", ["nothing", "no*thing", "a/nothing.csv", "README.md"])
def test_a_path_without_metrics_is_named(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a")
    (tmp_path / "README.md").write_text("no metrics")
    with pytest.raises(UserError) as error:
        metrics.find_metrics([pattern])
    assert f"no metrics at {pattern}" in str(error.value) and error.value.status == 2


def test_averaged_weights_and_held_out_images_are_preferred(tmp_path):
    header = "epoch,test_acc,val_acc,ema_val_acc,ema_val_loss"
    run = read(write(tmp_path / "a", header, ["1,40,50,55,1.0"]))
    assert run.curve("eval_acc") == ((1,), (55.0,)) and run.measured_on == "held-out (ema)"
    assert run.curve("eval_error") == ((1,), (45.0,))


def test_a_config_of_another_program_makes_no_run_of_ours(tmp_path):
    run = read(write(tmp_path / "a", "epoch,train_loss,val_acc", ["1,0.5,0.93"]))
    (tmp_path / "a/config.json").write_text('{"lr": 0.1}')
    assert not run.is_ours and read(tmp_path / "a").scalars["last"] == pytest.approx(93)
    (tmp_path / "a/config.json").write_text("{")  # ours, damaged
    assert read(tmp_path / "a").is_ours


def test_the_accuracy_is_of_the_test_images_where_there_are_any(tmp_path):
    run = read(write(tmp_path / "a", "epoch,train_loss,val_acc,test_acc", ["1,1,70,65"]))
    assert (run.accuracy, run.scalars["last"], run.measured_on) == (65, 70, "held-out")
    assert read(write(tmp_path / "b", "epoch,train_loss,val_acc", ["1,1,70"])).accuracy == 70


def test_epochs_are_counted_also_from_zero(tmp_path):
    rows = [f"{epoch},1,50" for epoch in range(10)]
    assert read(write(tmp_path / "a", "epoch,loss,acc", rows)).scalars["epochs"] == 10


def test_equal_names_get_as_many_directories_as_needed(tmp_path):
    for place in ("old/runs/a", "new/runs/a", "new/runs/b"):
        write(tmp_path / place)
    runs = metrics.load_runs([str(tmp_path / "*/runs/*")])
    assert sorted(run.name for run in runs) == ["b", "new/runs/a", "old/runs/a"]


# fmt: off
OTHER_PROGRAMS = {
    "Keras": (
        "epoch,accuracy,loss,val_accuracy,val_loss", ("0,0.5,1.5,0.25,2", "1,0.75,1,0.5,1"),
        {"train_acc": ((0, 1), (50, 75)), "eval_acc": ((0, 1), (25, 50)),
         "eval_loss": ((0, 1), (2, 1))},
    ),
    "a row for each split": (
        "epoch,step,train/loss,val/acc", ("0,9,1.5,", "0,9,,0.3", "1,19,1.25,", "1,19,,0.4"),
        {"train_loss": ((0, 1), (1.5, 1.25)), "eval_acc": ((0, 1), (30, 40))},
    ),
    "timm": (
        "epoch,train_loss,eval_loss,eval_top1,eval_top5,lr", ("0,2,1.9,31.5,80,0.1",),
        {"train_loss": ((0,), (2,)), "eval_acc": ((0,), (31.5,)), "eval_top5": ((0,), (80,))},
    ),
    "semicolons": ("Epoch;Valid Acc", ("1.0;44", "1.5;45"), {"eval_acc": ((1, 1.5), (44, 45))}),
    "epoch last": ("test_acc,epoch", ("44.25,3",), {"eval_acc": ((3,), (44.25,))}),
    "first of two": ("epoch,test_acc,test_top1", ("1,40,50",), {"eval_acc": ((1,), (40,))}),
    "byte-order mark, NaN": (
        "\ufeffepoch,loss,x", ("1,nan,y", "2,1.5,"), {"train_loss": ((2,), (1.5,))},
    ),
}
# fmt: on


@pytest.mark.parametrize("program", OTHER_PROGRAMS)
def test_files_of_other_programs_are_read(tmp_path, program):
    header, rows, curves = OTHER_PROGRAMS[program]
    run = read(write(tmp_path / "a", header, rows))
    assert {name: run.curve(name) for name in curves} == curves
    assert run.status == run.problem == ""


def test_only_shares_of_other_programs_become_percent(tmp_path):
    """In a run of ours 0.9 is 0.9 %: CIFAR-100 begins there."""
    ours = write(tmp_path / "a", arguments={"seed": 0}, rows=["1,1,0.1,5,0.9,5,1,5,5"])
    assert read(ours).curve("train_acc")[1] == (0.9,)


@pytest.mark.parametrize(
    ("line", "arguments", "epochs"),
    [
        ("3,30,0.1,0.", None, [1, 2]),
        ("3,30,0.1,1,1,1,6", {"seed": 0}, [1, 2]),
        ("3,30,0.1,1,1,1,67,5,1", {"seed": 0}, [1, 2]),
        ("3,30,0.1,1,1,1,67,5,1", None, [1, 2, 3]),
    ],
)
def test_a_last_line_without_line_break_is_torn_if_ours(tmp_path, line, arguments, epochs):
    run = write(tmp_path / "a", arguments=arguments)
    with open(run / "metrics.csv", "a") as file:
        file.write(line)
    assert read(run).epochs == epochs


@pytest.mark.parametrize(
    ("status", "summary"),
    [
        ("finished", {"status": "finished"}),
        ("interrupted", {"status": "interrupted"}),
        ("failed: the loss is nan", {"status": "failed", "reason": "the loss is nan"}),
        ("running", {}),
    ],
)
def test_status_of_a_run(tmp_path, status, summary):
    assert read(write(tmp_path / "a", arguments={"seed": 0}, **summary)).status == status


def test_status_of_a_run_that_is_not_whole(tmp_path):
    run = write(tmp_path / "a", arguments={"seed": 0})
    os.utime(run / "metrics.csv", (1, 1))
    assert read(run).status == "unfinished"
    (run / "metrics.csv").unlink()
    assert read(run).status == "unfinished"
    (run / "metrics.csv").write_bytes(bytes(range(256)))
    broken = read(run)
    assert broken.status.startswith("broken: ")
    assert broken.curve("eval_acc") == ((), ()) and broken.scalars["last"] is None


def test_a_run_in_its_first_epoch_is_running(tmp_path):
    run = write(tmp_path / "a", arguments={"seed": 0})
    header = (run / "metrics.csv").read_text().split("\n")[0]
    for contents in ("", f"{header}\n"):
        (run / "metrics.csv").write_text(contents)
        assert read(run).status == "running" and read(run).problem == NO_EPOCH_YET


def test_a_run_of_ours_has_no_final_accuracy_before_its_end(tmp_path):
    assert read(write(tmp_path / "a", arguments={"seed": 0})).scalars["to90"] is None
    assert read(write(tmp_path / "b")).scalars["to90"] is not None


def test_scalars_by_hand(tmp_path):
    rows = ("1,10,0.1,2,20,1,60,5,100", "2,20,0.1,1,60,1,80,6,110", "3,30,0.1,1,62,1,75,7,120")
    run = read(write(tmp_path / "a", rows=rows))
    expected = dict(epochs=3, last=75, best=80, best_epoch=2, test=None, train=62)
    expected |= dict(seconds=18, speed=110, to90=11)
    assert {name: run.scalars[name] for name in expected} == expected
    assert run.position("seconds") == {1: 5, 2: 11, 3: 18}
    assert run.position("step") == {1: 10, 2: 20, 3: 30}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([(HEADER, ())], "no finished epoch"),
        ([("", ())], "no finished epoch"),
        ([("epoch,x", ("1,2",))], "no column of a loss or an accuracy: it has epoch, x"),
        ([("x,train_loss", ("1,2",))], "no column named epoch"),
        ([("epoch;train_loss", ("1;2,5",))], "no number in its columns of losses and accuracies"),
        (
            [("epoch,train_loss", ("1,2",)), ("epoch,val_acc", ("1,2",))],
            "no curve in common: 0 has train_loss; 1 has",
        ),
    ],
)
def test_runs_that_can_not_be_compared_are_named(tmp_path, files, message):
    for i, (header, rows) in enumerate(files):
        write(tmp_path / str(i), header, rows)
    with pytest.raises(UserError, match=message) as error:
        metrics.load_runs([str(tmp_path / str(i)) for i in range(len(files))])
    assert "\n" not in str(error.value)


def test_an_unreadable_run_is_named_and_kept_among_others(tmp_path, capsys):
    write(tmp_path / "a")
    write(tmp_path / "b", "epoch,x", ["1,2"])
    runs = metrics.load_runs([str(tmp_path / "*")])
    assert [bool(run.epochs) for run in runs] == [True, False]
    assert "b/metrics.csv has no column" in capsys.readouterr().err


def test_names_differ_and_have_no_control_characters(tmp_path):
    for name in ("x/run", "y/run", "x/\x1b[31mred\n"):
        write(tmp_path / name)
    names = sorted(run.name for run in metrics.load_runs([str(tmp_path / "*/*")]))
    assert names == ["?[31mred?", "x/run", "y/run"]


def test_damaged_files_are_named_or_ignored(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"epoch\n\xff\n")
    with pytest.raises(UserError, match="can't be read as a table"):
        metrics.read_table(path)
    path.write_text(f"epoch,train_loss\n1,2\n{'9' * 5000},2\n")
    assert metrics.Run(path).epochs == [1]
    (tmp_path / "summary.json").write_text("[" * 100_000)
    assert metrics.read_json(tmp_path / "summary.json") == {}


def test_values_that_are_not_usable_are_ignored(tmp_path):
    summary = dict(test_acc=50.0, parameters=10**400, gmacs=True, peak_memory_mb=float("inf"))
    run = read(write(tmp_path / "a", arguments={"seed": [1]}, **summary))
    assert run.scalars["test"] == 50 and run.seed == "a"
    assert [run.scalars[name] for name in ("parameters", "gmacs", "memory")] == [None] * 3
    (tmp_path / "a" / "config.json").write_text('{"arguments": [1]}')
    assert metrics.read_arguments(tmp_path / "a") == metrics.read_arguments(tmp_path) == {}
    run = read(write(tmp_path / "b", "epoch,train_loss,test_loss", ["1,1e300,1", "2,1e38,2"]))
    assert run.curve("train_loss") == ((2,), (1e38,))
