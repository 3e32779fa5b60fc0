"""sweep.py publish: what is published, what is refused, and what is compared before."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.errors import refused
from helpers.published import COMPARISON, A, B, change, put, snapshot
from helpers.runs import arguments

import sweep
import train
from analysis import published
from common.scopes import words
from sweeps import publish, reference
from training.arguments import record, resolve
from training.checks import check_arguments
from training.distributed import Ranks


def test_published_runs_hold_no_weights_and_no_place(runs):
    (runs[0] / "best.pt").touch()
    change(
        runs[0] / "config.json", **{"from": {"lr": "command line", "output_dir": "command line"}}
    )
    put(runs)
    assert {path.name for path in Path("results/x/be-s0").iterdir()} == {
        "config.json",
        "metrics.csv",
        "summary.json",
    }
    text = "".join(path.read_text() for path in Path("results").rglob("*.json"))
    assert not re.search(r"/my|\bme\b|http|host", text)
    config = json.loads(Path("results/x/alpha-s0/config.json").read_text())
    assert config["command"] == "train.py --lr 0.2"
    assert config["arguments"]["data_dir"] == "cifar10-png"
    assert config["arguments"]["weights"] == "best.pt"
    assert sorted(Path("results").iterdir()) == [Path("results/x")]


def test_a_run_that_had_a_config_is_published_with_a_command_that_repeats_it(tmp_path):
    first = "--model resnet20 --no-nesterov --mixup 0 --tta flip --seed 3"
    parser, path = train.build_parser(), tmp_path / "config.json"

    def recorded(*argv):
        values, origin = record(resolve(parser, argv)[0], {})
        return {"arguments": values, "from": origin, "command": "train.py"}

    path.write_text(json.dumps(recorded(*first.split())))
    config = recorded("--config", str(path), "--seed", "4")
    script, given = publish.given_arguments(config)
    assert script == "train.py" and given["seed"] == 4 and "lr" not in given
    repeated, _ = resolve(parser, words(given))
    check_arguments(repeated, None, Ranks(torch.device("cpu")))
    assert record(repeated, {})[0] | {"config": str(path)} == config["arguments"]


def test_publishing_again_adds_seeds_and_keeps_the_notes(runs):
    put([run for run in runs if run.name.endswith("-s0")])
    for name in ("notes.md", published.FIGURE, "comparison-error.pdf"):
        Path("results/x", name).write_text("Prose.\n")
    put(runs)
    before = snapshot(Path("results"))
    put(runs)
    assert snapshot(Path("results")) == before and len(before) == 16
    with refused("results/x holds something else (alpha-s1)"):
        put([run for run in runs if run.name.endswith("-s0")])
    change(runs[0] / "summary.json", train_seconds=1)
    with refused("results/x holds another run alpha-s0"):
        put(runs)
    assert snapshot(Path("results")) == before


def unfinish(run):
    (run / "summary.json").unlink()


def other_commit(run):
    change(run / "config.json", git={"commit": B, "dirty": False})


def resumed_when_modified(run):
    earlier = {"git": {"commit": A, "dirty": True}}
    change(run / "config.json", resumed=[{"at_epoch": 1, "before": earlier}])


def resumed_in_another_precision(run):
    earlier = {"git": {"commit": A, "dirty": False}, "precision": "bfloat16"}
    change(run / "config.json", resumed=[{"at_epoch": 1, "before": earlier}])


def with_a_path_as_seed(run):
    change(run / "config.json", arguments=arguments(run) | {"seed": "0/../../../elsewhere"})


def of_other_arguments(run):
    change(run / "config.json", arguments=arguments(run) | {"dataset": "cifar100", "lr": 9})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (unfinish, "be-s0 is unfinished"),
        (lambda run: change(run / "summary.json", status="interrupted"), "be-s0 is interrupted"),
        (lambda run: change(run / "summary.json", status="failed"), "be-s0 is failed"),
        (lambda run: (run / "config.json").unlink(), "be-s0 holds no run"),
        (lambda run: (run / "config.json").write_text("{}"), "be-s0 holds no run"),
        (lambda run: (run / "metrics.csv").write_text("x\n"), "be-s0: metrics.csv has no"),
        (lambda run: change(run / "summary.json", epochs=3), "be-s0: metrics.csv doesn't hold"),
        (lambda run: change(run / "summary.json", epochs="2"), "be-s0: metrics.csv doesn't hold"),
        (with_a_path_as_seed, "be-s0 holds no run"),
        (lambda run: change(run / "config.json", git="x"), "be-s0 doesn't say its commit"),
        (
            lambda run: change(run / "config.json", git={"commit": A}),
            "be-s0 was made with a modified working tree",
        ),
        (lambda run: change(run / "summary.json", test_acc=99), "reports 99.00 % in summary.json"),
        (lambda run: change(run / "config.json", git=None), "be-s0 doesn't say its commit"),
        (resumed_when_modified, "be-s0 was made with a modified working tree"),
        (resumed_in_another_precision, "be-s0 was computed in bfloat16 and in float32"),
        (
            lambda run: change(run / "config.json", precision="bfloat16"),
            "in bfloat16 and in float32",
        ),
        (of_other_arguments, "results/x has runs of be that differ in"),
        (lambda run: run.rename(run.with_name("ce-s0")), "results/x lacks be-s0: it has the seeds"),
        (lambda run: run.rename(run.with_name("alpha-s0-2")), "another run is alpha-s0, too"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(runs, damage, message):
    damage(Path("runs/be-s0"))
    directories = publish.run_directories(sorted(Path("runs").iterdir()))
    before = snapshot()
    with refused() as error:
        put(directories)
    assert message in str(error.value) and error.value.status == 2
    assert snapshot() == before and not list(Path("results").glob("*"))


def test_a_failure_while_copying_leaves_the_old_or_the_new(runs):
    put([run for run in runs if run.name.endswith("-s0")])
    before, rename = snapshot(), Path.rename

    def fail(path, target):
        if path.name == ".x.new":
            raise OSError("disk full")
        return rename(path, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(Path, "rename", fail)
        put(runs)
    assert snapshot() == before
    Path("results/x").rename("results/.x.old")  # as a power cut may leave it
    put(runs)
    assert sorted(Path("results").iterdir()) == [Path("results/x")]
    assert len(published.load("results/x").groups[0].runs) == 2


def test_runs_of_different_commits_need_equal_reference_runs(runs, monkeypatch):
    other_commit(Path("runs/be-s1"))
    monkeypatch.setattr(reference, "same_code", lambda commits: False)
    with refused("the runs are of different commits", "--reference"):
        put(runs)
    monkeypatch.setattr(reference, "digest", lambda commit, short_run: commit)
    with refused(f"{A[:12]}, {B[:12]} have different results with train.py", '"dataset": "shapes"'):
        put(runs, with_reference=True)
    assert not Path("results/x").exists()
    monkeypatch.setattr(reference, "digest", lambda commit, short_run: short_run)
    put(runs, with_reference=True)
    agreement = "short runs of each on generated images give equal results"
    assert agreement in published.load("results/x").facts[1]
    change(Path("results/x/experiment.json"), reference={})
    with refused("results/x has runs of different commits"):
        published.load("results/x")


def test_the_commit_and_machine_that_a_resumed_run_began_with_are_named(runs, monkeypatch):
    earlier = {"git": {"commit": B, "dirty": False}, "precision": "float32", "host": "me"}
    earlier |= {"device": "cpu (other)", "threads": 1, "torch": "2"}
    change(Path("runs/be-s1/config.json"), resumed=[{"at_epoch": 1, "before": earlier}])
    monkeypatch.setattr(reference, "same_code", lambda commits: True)
    put(runs)
    experiment = published.load("results/x")
    assert f"Commit: {A[:12]}, {B[:12]} (the same code)." in experiment.facts[1]
    assert "Machine: cpu, cpu (other), threads: 2, 1, float32; torch 2." in experiment.facts[1]
    assert experiment.threads == "2, 1 threads"
    before = snapshot(Path("results"))
    put(sorted(Path("results/x").glob("*-s?")))  # published once more, from results/
    assert snapshot(Path("results")) == before


@pytest.mark.parametrize(
    "values",
    [
        dict(title=5), dict(command=None), dict(comparisons=5), dict(comparisons=[["a", "b"]]),
        dict(runs=[1]), dict(runs=[]), dict(data=[]), dict(reference="x"),
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_experiment_is_refused(runs, values):
    put(runs)
    change(Path("results/x/experiment.json"), **values)
    with refused("results/x holds no published experiment"):
        published.load("results/x")


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("config.json", dict(git={"commit": A})),
        ("config.json", dict(git="x")),
        ("config.json", dict(device=None)),
        ("config.json", dict(resumed=5)),
        ("config.json", dict(resumed=[5])),
        ("config.json", dict(resumed=[{"at_epoch": 1}])),
        ("config.json", dict(arguments={"seed": 1})),
        ("summary.json", dict(status="interrupted")),
        ("summary.json", dict(epochs="2")),
    ],
    ids=str,
)
def test_a_damaged_run_of_an_experiment_is_refused(runs, file, values):
    put(runs)
    change(Path("results/x/be-s0") / file, **values)
    with refused("results/x/be-s0 "):
        published.load("results/x")


def test_comparisons_without_runs_or_on_other_images_are_refused(runs):
    put(runs)
    change(Path("results/x/experiment.json"), comparisons=[["is it?", "be", "gone"]])
    with refused("results/x compares gone, which has no runs"):
        published.load("results/x")
    change(Path("results/x/experiment.json"), comparisons=[["is it?", "be", "alpha"]])
    for path in Path("results/x").glob("be-s?/config.json"):
        change(path, arguments=json.loads(path.read_text())["arguments"] | {"limit_test": 50})
    with refused("results/x compares be and alpha, which have other test images"):
        published.load("results/x")


def test_directories_of_runs_that_the_experiment_does_not_name_are_refused(runs):
    put(runs)
    shutil.copytree("results/x/be-s1", "results/x/be-s2")
    with refused("results/x holds be-s2, which experiment.json doesn't name"):
        published.load("results/x")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("publish nowhere --to results/y", "nowhere holds no run"),
        ("publish runs", "--to"),
        (
            "publish runs --to results/x --baseline resnet",
            "--baseline resnet: the labels are alpha, be",
        ),
        ("publish runs --to runs", "runs holds something else"),
        ("publish runs --to .", "name a directory to publish in, such as results/eca, not ."),
        ("report --results nowhere", "there is no such directory"),
        ("campaign --budget 0", "such as 90m, 3h or 1h30m, not '0'"),
        ("campaign --budget -1h", "argument --budget"),
        ("campaign --only ecaa", "invalid choice: 'ecaa'"),
        ("campaign --cifar10-dir nowhere", "there is no such folder"),
    ],
)
def test_bad_commands_are_refused_in_one_line(runs, capsys, command, message):
    before = snapshot()
    try:
        with refused() as error:
            sweep.main(command.split())
        assert error.value.status == 2 and message in str(error.value)
    except SystemExit as stopped:  # by argparse
        err = capsys.readouterr().err
        assert stopped.code == 2 and message in err and len(err.splitlines()) == 1
    assert snapshot() == before


def test_a_directory_of_runs_is_published_with_one_command(runs, capsys):
    assert sweep.main(["publish", "runs", "--to", "results/x", "--baseline", "be"]) == 0
    assert capsys.readouterr().out == "4 runs published in results/x\n"
    (row,) = published.load("results/x").differences
    assert (row["experiment"], row["against"], row["difference"]) == ("alpha", "be", "-4.62")


def test_what_is_published_again_keeps_what_was_said_of_it(runs):
    about = publish.about("a title", COMPARISON, "a command", selected_on_test="the seed")
    publish.publish(runs, "results/x", about | {"timed": True})
    before = snapshot(Path("results"))
    assert sweep.main(["publish", "results/x", "--to", "results/x"]) == 0
    assert snapshot(Path("results")) == before
    assert sweep.main(["publish", "results/x", "--to", "results/x", "--title", "another"]) == 0
    experiment = published.load("results/x")
    assert experiment.title == "another" and experiment.selection.startswith("the seed was")


def test_a_part_of_a_suite_is_published_with_its_comparisons(stand_in_runs, monkeypatch):
    tree = {"commit": A, "dirty": True}
    monkeypatch.setattr(sweep.environment, "git_state", lambda: tree)
    place = "--dataset shapes --device cpu --output-dir out --publish results/eca"
    words = [
        "eca",
        "--seeds",
        "0",
        "--only",
        "resnet20_no_eca",
        "ecanet20_fixed_k3",
        *place.split(),
    ]
    with refused("--publish needs an unmodified working tree"):
        sweep.main(words)
    assert not Path("out").exists()
    tree["dirty"] = False
    with refused("--publish needs --seeds 0 to n-1, not 3407"):
        sweep.main(["eca", "--seeds", "3407", *words[3:]])
    for path in ("mine.txt", "resnet20_no_eca-s0"):
        Path("results/eca", path).mkdir(parents=True)
        with refused("results/eca holds"):
            sweep.main(words)
        shutil.rmtree("results")
    assert not Path("out").exists()
    assert sweep.main(words) == 0
    experiment = published.load("results/eca")
    pairs = [(row["experiment"], row["against"]) for row in experiment.differences]
    assert pairs == [("ecanet20_fixed_k3", "resnet20_no_eca")]
    only = "--seeds 0 --only resnet20_no_eca ecanet20_fixed_k3"
    assert (
        experiment.about["command"] == f"python sweep.py eca --dataset shapes --device cpu {only}"
    )
