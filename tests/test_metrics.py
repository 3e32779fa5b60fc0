"""Runs are read back: ours, and other programs' with an epoch and one loss or accuracy; what is broken is said to be."""

import os

import pytest
from samples import HEADER, write

from analysis import metrics
from common.errors import UserError


def run_of(directory):
    return metrics.Run(directory / "metrics.csv")


def test_patterns_are_expanded_and_a_run_counts_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write(tmp_path / name)
    (tmp_path / "README.md").write_text("as runs/* finds it")
    found = [str(p) for p in metrics.find_metrics(["*/metrics.csv", "a", "*", "README.md"])]
    assert found == ["a/metrics.csv", "b/metrics.csv"]


@pytest.mark.parametrize("patterns", [["nothing"], ["no*thing"], ["a/nothing.csv"]])
def test_a_path_that_does_not_exist_is_named(tmp_path, monkeypatch, patterns):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a")
    with pytest.raises(
        UserError, match=f"no metrics at {patterns[0]}".replace("*", r"\*")
    ) as refused:
        metrics.find_metrics(patterns)
    assert refused.value.status == 2


def test_the_average_is_shown_where_there_is_one_and_held_out_before_test(tmp_path):
    found = run_of(
        write(tmp_path / "a", "epoch,test_acc,val_acc,ema_val_acc,ema_val_loss", ["1,40,50,55,1.0"])
    )
    assert found.curve("eval_acc") == ((1,), (55.0,)) and found.measured_on == "held-out (ema)"
    assert found.curve("eval_error") == ((1,), (45.0,))


@pytest.mark.parametrize(
    ("header", "rows", "curves"),
    [
        (
            "epoch,accuracy,loss,val_accuracy,val_loss",
            ("0,0.5,1.5,0.25,2", "1,0.75,1,0.5,1"),  # Keras
            {
                "train_acc": ((0, 1), (50, 75)),
                "eval_acc": ((0, 1), (25, 50)),
                "eval_loss": ((0, 1), (2, 1)),
            },
        ),
        (
            "epoch,step,train/loss,val/acc",
            ("0,9,1.5,", "0,9,,0.3", "1,19,1.25,", "1,19,,0.4"),  # a row for each part
            {"train_loss": ((0, 1), (1.5, 1.25)), "eval_acc": ((0, 1), (30, 40))},
        ),
        (
            "epoch,train_loss,eval_loss,eval_top1,eval_top5,lr",
            ("0,2,1.9,31.5,80,0.1",),  # timm
            {"train_loss": ((0,), (2,)), "eval_acc": ((0,), (31.5,)), "eval_top5": ((0,), (80,))},
        ),
        ("Epoch;Valid Acc", ("1.0;44", "1.5;45"), {"eval_acc": ((1, 1.5), (44, 45))}),
        ("test_acc,epoch", ("44.25,3",), {"eval_acc": ((3,), (44.25,))}),
        ("\ufeffepoch,train_loss,x", ("1,nan,y", "2,1.5,"), {"train_loss": ((2,), (1.5,))}),
    ],
)
def test_other_programs_files_are_read(tmp_path, header, rows, curves):
    found = run_of(write(tmp_path / "a", header, rows))
    assert (
        {name: found.curve(name) for name in curves} == curves
        and found.status == ""
        and not found.problem
    )


def test_only_other_programs_shares_become_percent(tmp_path):
    """Of a run of ours 0.9 is 0.9 %: CIFAR-100 begins there."""
    assert run_of(
        write(tmp_path / "a", arguments={"seed": 0}, rows=["1,1,0.1,5,0.9,5,1,5,5"])
    ).curve("train_acc")[1] == (0.9,)


def test_a_torn_last_line_is_left_out_of_ours_and_a_whole_one_of_others_kept(tmp_path):
    for name, text, arguments, epochs in (
        ("cut", "3,30,0.1,0.", None, [1, 2]),
        ("ours", "3,30,0.1,1,1,1,6", {"seed": 0}, [1, 2]),
        ("other", "3,30,0.1,1,1,1,67,5,1", None, [1, 2, 3]),
    ):
        run = write(tmp_path / name, arguments=arguments)
        with open(run / "metrics.csv", "a") as file:
            file.write(text)
        assert run_of(run).epochs == epochs, name
        assert len(metrics.read_metrics(run / "metrics.csv")) == 2


def test_a_run_stands_where_its_files_say(tmp_path):
    states = {
        "finished": {"status": "finished"},
        "interrupted": {"status": "interrupted"},
        "running": {},
        "failed: the loss is nan": {"status": "failed", "reason": "the loss is nan"},
    }
    for number, (wanted, summary) in enumerate(states.items()):
        assert (
            run_of(write(tmp_path / str(number), arguments={"seed": 0}, **summary)).status == wanted
        )
    old = write(tmp_path / "old", arguments={"seed": 0})
    os.utime(old / "metrics.csv", (1, 1))
    assert run_of(old).status == "unfinished"
    (tmp_path / "2" / "metrics.csv").unlink()
    assert run_of(tmp_path / "2").status == "no finished epoch yet"
    (tmp_path / "0" / "metrics.csv").write_bytes(bytes(range(256)))
    broken = run_of(tmp_path / "0")
    assert (
        broken.status.startswith("broken: ")
        and broken.curve("eval_acc") == ((), ())
        and broken.figure("last") is None
    )


def test_figures_by_hand(tmp_path):
    rows = ("1,10,0.1,2,20,1,60,5,100", "2,20,0.1,1,60,1,80,6,110", "3,30,0.1,1,60,1,75,7,120")
    run = run_of(write(tmp_path / "a", rows=rows))
    wanted = {
        "epochs": 3,
        "last": 75,
        "best": 80,
        "best_epoch": 2,
        "test": None,
        "seconds": 18,
        "speed": 110,
        "to90": 11,
    }
    assert {name: run.figure(name) for name in wanted} == wanted
    assert run.position("seconds") == {1: 5, 2: 11, 3: 18} and run.position("step") == {
        1: 10,
        2: 20,
        3: 30,
    }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": (HEADER, ())}, "no finished epoch"),
        ({"a": ("epoch,x", ("1,2",))}, "no column of a loss or an accuracy: it has epoch, x"),
        ({"a": ("x,train_loss", ("1,2",))}, "no column named epoch"),
        ({"a": ("", ())}, "no finished epoch"),
        (
            {"a": ("epoch,train_loss", ("1,2",)), "b": ("epoch,val_acc", ("1,2",))},
            "no curve in common: a has train_loss; b has",
        ),
    ],
)
def test_what_can_not_be_compared_is_named(tmp_path, files, message):
    for name, (header, rows) in files.items():
        write(tmp_path / name, header, rows)
    with pytest.raises(UserError, match=message) as refused:
        metrics.load_runs([str(tmp_path / name) for name in files])
    assert "\n" not in str(refused.value)


def test_a_broken_run_beside_a_good_one_is_kept_and_named(tmp_path, capsys):
    write(tmp_path / "a")
    write(tmp_path / "b", "epoch,x", ["1,2"])
    runs = metrics.load_runs([str(tmp_path / "*")])
    assert [bool(run.epochs) for run in runs] == [
        True,
        False,
    ] and "b/metrics.csv has no column" in capsys.readouterr().err


def test_runs_of_one_name_are_told_apart_and_names_hold_no_control_characters(tmp_path):
    for name in ("x/run", "y/run", "x/\x1b[31mred\n"):
        write(tmp_path / name)
    assert sorted(run.name for run in metrics.load_runs([str(tmp_path / "*/*")])) == [
        "?[31mred?",
        "x/run",
        "y/run",
    ]


def test_what_is_no_table_is_named_and_numbers_beyond_reason_are_no_epochs(tmp_path):
    (tmp_path / "metrics.csv").write_bytes(b"epoch\n\xff\n")
    with pytest.raises(UserError, match="can't be read as a table"):
        metrics.read_metrics(tmp_path / "metrics.csv")
    (tmp_path / "metrics.csv").write_text(f"epoch,train_loss\n1,2\n{'9' * 5000},2\n")
    assert metrics.read_metrics(tmp_path / "metrics.csv") == [{"epoch": "1", "train_loss": "2"}]
    assert metrics.Run(tmp_path / "metrics.csv").epochs == [1]
    (tmp_path / "summary.json").write_text("[" * 100_000)
    assert metrics.read_json(tmp_path / "summary.json") == {}


def test_what_is_no_figure_or_seed_is_left_out(tmp_path):
    write(
        tmp_path / "a",
        arguments={"seed": [1]},
        test_acc=50.0,
        parameters=10**400,
        gmacs=True,
        peak_memory_mb=float("inf"),
    )
    found = metrics.Run(tmp_path / "a" / "metrics.csv")
    assert found.figure("test") == 50 and found.seed == "a"
    assert found.figure("parameters") is found.figure("gmacs") is found.figure("memory") is None
    (tmp_path / "a" / "config.json").write_text('{"arguments": [1]}')
    write(tmp_path / "b", "epoch,train_loss,test_loss", ["1,1e300,1", "2,1e38,2"])
    assert metrics.Run(tmp_path / "b" / "metrics.csv").curve("train_loss") == ((2,), (1e38,))
    assert metrics.read_arguments(tmp_path / "a") == metrics.read_arguments(tmp_path) == {}
