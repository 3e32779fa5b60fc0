"""sweep.py campaign: the order of the runs, the budget, what is resumed and what is published.

helpers/stand_in_train.py takes the place of train.py.
"""

import json
import math
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.errors import refused
from helpers.published import change
from helpers.runs import arguments, summary
from helpers.sweeps import kill_at
from PIL import Image

import sweep
from analysis import published
from sweeps import campaign, commands, launch, plans, reference, seeds
from sweeps.experiments import EXPERIMENTS, Experiment, repeat_command
from training import environment
from training.arguments import record
from training.checks import check_arguments
from training.distributed import Ranks


@pytest.mark.parametrize(("text", "seconds"), [("3h", 10800), ("1h30m", 5400), ("0.5m", 30)])
def test_a_budget_has_hours_and_minutes(text, seconds):
    assert campaign.seconds_of(text) == seconds


@pytest.mark.parametrize(
    "text", ["3 hours", "-1h", "0", "0h", "", "h", "3", "1m1h", "9" * 400 + "h"]
)
def test_other_budgets_are_refused(text):
    with pytest.raises(ValueError, match="must be a time such as 90m, 3h or 1h30m"):
        campaign.seconds_of(text)


def test_every_experiment_of_the_table_can_be_planned(tmp_path):
    options = campaign.Options(tmp_path, tmp_path / "results", {"cifar10": "c10"}, {})
    names = {""}
    for name, experiment in EXPERIMENTS.items():
        runs = campaign.plan(name, options)
        assert {run.label for run in runs} == set(experiment.trainings)
        assert {run.args.dataset for run in runs} <= {"folder", "cifar100"}
        assert all(value > 0 for run in runs for value in campaign.work(run))
        if not experiment.source:
            for run in {run.label: run for run in runs}.values():
                check_arguments(run.args, None, Ranks(torch.device("cpu")))
        for _, *labels in experiment.comparisons:
            assert set(labels) <= set(experiment.trainings)
        names |= {f"{name}/{run.path.name}" for run in runs}
    assert {experiment.source for experiment in EXPERIMENTS.values()} <= names


def test_the_command_that_repeats_an_experiment_takes_the_same_images(tmp_path):
    folders, given = {"cifar10": "/x/c10"}, {"device": "cpu"}
    options = campaign.Options(tmp_path, tmp_path / "results", folders, given)
    planned = campaign.Campaign(["eca", "progressive"], options)
    assert planned._folders_of("eca") == {}
    folders = planned._folders_of("progressive")
    command = repeat_command("progressive", folders)
    assert "campaign --only progressive --cifar10-dir data/c10 --output-dir runs/" in command


ONE = "--model resnet20 --dataset shapes --amp off"
LONG = Experiment("a long one", {"long": f"{ONE} --epochs 9"}, (), n=2)
WAITING = LONG._replace(trainings={"long": f"{ONE} --epochs 1 --lr 5"}, n=1)
FAILING = LONG._replace(trainings={"long": f"{ONE} --epochs 1 --lr 9"}, n=1)
QUICK = LONG._replace(
    trainings={"a": f"{ONE} --epochs 1", "b": f"{ONE} --epochs 1 --model-arg shortcut=pad"},
    comparisons=[("does it help?", "b", "a")],
)
NEEDY = LONG._replace(
    trainings={"c": f"{ONE} --weights SOURCE_WEIGHTS"}, n=1, source="long/long-s0"
)
STAND_IN = "c0ffee" * 6  # the commit of stand-in runs
QUICK_RUNS = [f"quick: {label}-s{seed}" for seed in (0, 1) for label in "ab"]


@pytest.fixture
def run(monkeypatch, stand_in_runs):
    """run("--budget", "1h", long=LONG) -> exit status of a campaign with stand-in runs."""
    monkeypatch.setattr(campaign, "measured_speed", lambda run, slot: 1e11)
    monkeypatch.setattr(environment, "git_state", lambda: {"commit": STAND_IN, "dirty": False})

    def run(*arguments, **table):
        for module in (campaign, commands, seeds):
            monkeypatch.setattr(module, "EXPERIMENTS", table)
        return sweep.main(["campaign", "--output-dir", "out", "--device", "cpu", *arguments])

    return run


def test_an_estimate_follows_from_finished_runs_of_the_same_kind(tmp_path, monkeypatch):
    """Not from runs of another optimizer; what an interrupted run has done is not counted."""
    both = {"a": f"{ONE} --epochs 4", "b": f"{ONE} --epochs 4 --optimizer adamw"}
    table = {"two": LONG._replace(trainings=both)}
    for module in (campaign, commands, seeds):
        monkeypatch.setattr(module, "EXPERIMENTS", table)
    monkeypatch.setattr(campaign, "measured_speed", lambda run, slot: math.inf)
    options = campaign.Options(tmp_path, tmp_path / "results", {}, {"device": "cpu"})
    by_name = {run.path.name: run for run in campaign.plan("two", options)}
    for name, left in (
        ("a-s0", {"status": "finished", "epochs": 4, "train_seconds": 30, "eval_seconds": 10}),
        ("a-s1", {"status": "interrupted", "epochs": 2}),
    ):
        path, recorded = by_name[name].path, record(by_name[name].args, {})[0]
        path.mkdir(parents=True)
        config = {"arguments": recorded, "precision": "float32"}
        (path / "config.json").write_text(json.dumps(config))
        (path / "last.pt").touch()
        (path / "summary.json").write_text(json.dumps(left))
    planned = campaign.Campaign(["two"], options)
    times = {
        run.path.name: planned.seconds(run) - campaign.START_SECONDS for run in planned.runs["two"]
    }
    assert times["a-s1"] == pytest.approx(20)
    assert times["b-s0"] == times["b-s1"] == 0  # timed: at infinite speed


def started(out):
    return re.findall(r"^(\w+: [\w-]+), about", out, re.M)


def test_a_campaign_runs_the_cheapest_first_and_publishes(run, capsys):
    assert run(long=LONG, quick=QUICK) == 0
    out = capsys.readouterr().out
    assert started(out) == [*QUICK_RUNS, "long: long-s0", "long: long-s1"]
    assert out.index("quick: 2 of 2 seeds published in results/quick") < out.index("long: long-s0")
    (row,) = published.load("results/quick").differences
    assert (row["question"], row["difference"]) == ("does it help?", "+1.50")
    assert run(long=LONG, quick=QUICK) == 0 and started(capsys.readouterr().out) == []
    shutil.rmtree("out/quick")
    Path("results/quick").rename("results/.quick.old")  # as a power cut may leave it
    for table in (QUICK, QUICK._replace(n=1)):
        assert run("--only", "quick", quick=table) == 0
        assert "nothing to run: all of it is published" in capsys.readouterr().out
    elsewhere = ("--output-dir", "other", "--results", "repeated")
    assert run("--only", "quick", *elsewhere, quick=QUICK) == 0
    assert started(capsys.readouterr().out) == QUICK_RUNS
    assert published.load("repeated/quick").rows == published.load("results/quick").rows


def test_seeds_are_added_to_those_that_are_published(run, monkeypatch, capsys):
    """Of another commit with the same code, and with nothing but results/."""
    assert run(quick=QUICK) == 0
    for path in Path("results/quick").glob("*/config.json"):
        path.write_text(path.read_text().replace("c0ffee", "decade"))
    before = {path: path.read_text() for path in Path("results/quick").glob("*-s1/*")}
    shutil.rmtree("out")
    monkeypatch.setattr(reference, "same_code", lambda commits: True)
    capsys.readouterr()
    assert run(quick=QUICK._replace(n=3), long=LONG) == 0
    out = capsys.readouterr().out
    assert started(out)[:3] == ["quick: a-s2", "quick: b-s2", "long: long-s0"]
    assert out.index("quick: 3 of 3 seeds published in results/quick") < out.index("long-s0")
    assert all(path.read_text() == text for path, text in before.items())
    assert len(published.load("results/quick").about["runs"]) == 6


def test_seeds_of_code_that_computes_otherwise_are_refused_before_any_run(run, monkeypatch, capsys):
    assert run(quick=QUICK) == 0
    capsys.readouterr()
    monkeypatch.setattr(environment, "git_state", lambda: {"commit": "d" * 40, "dirty": False})
    monkeypatch.setattr(reference, "same_code", lambda commits: len(set(commits)) == 1)
    monkeypatch.setattr(reference, "digest", lambda commit, training: commit)
    three = QUICK._replace(n=3)
    assert run(quick=three, long=LONG) == 1
    out = capsys.readouterr().out
    assert started(out) == ["long: long-s0", "long: long-s1"]
    assert "quick: left out: dddddddddddd, c0ffeec0ffee have different results with" in out
    with refused("dddddddddddd, c0ffeec0ffee have different results with"):
        run(quick=three)
    monkeypatch.setattr(reference, "digest", lambda commit, training: training)
    assert run(quick=three) == 0
    assert started(capsys.readouterr().out) == ["quick: a-s2", "quick: b-s2"]


def test_seeds_are_not_added_to_those_of_a_modified_tree(run):
    assert run(quick=QUICK) == 0
    shutil.rmtree("results")
    git = {"commit": STAND_IN, "dirty": True}
    change(Path("out/quick/b-s0/config.json"), git=git)
    with refused("out/quick/b-s0 was made with a modified working tree"):
        run(quick=QUICK._replace(n=3))


def test_folders_must_hold_the_data_set_that_they_stand_for(run, tmp_path):
    for place in ("one/images", "other/images", "three"):
        for part in ("train/cat", "train/dog", "test/cat", "test/dog"):
            (tmp_path / place / part).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / place / part / "0.png")
    with refused("--cifar10-dir and --cifar100-dir must have different names"):
        run("--cifar10-dir", "one/images", "--cifar100-dir", "other/images", quick=QUICK)
    real = QUICK._replace(trainings={"a": "--model resnet20 --epochs 1"}, comparisons=())
    with refused("--cifar10-dir three has 2 classes, cifar10 has 10"):
        run("--cifar10-dir", "three", "--cifar100-dir", "one/images", quick=real)


def test_one_campaign_at_a_time(run, capsys):
    with plans.lock(Path("out")), refused("out is being written by another"):
        run(quick=QUICK)
    assert started(capsys.readouterr().out) == []


def test_a_seed_is_published_before_the_next_one_starts(run, capsys):
    assert run(quick=QUICK) == 0
    out = capsys.readouterr().out
    assert out.index("quick: b-s0") < out.index("quick: 1 of 2 seeds published in results/quick")
    assert out.index("quick: 1 of 2 seeds published") < out.index("quick: a-s1")


def test_seeds_that_share_weights_are_published_together(run, capsys):
    """The weights are not published, so that none can be added."""
    table = {"long": LONG, "needy": NEEDY._replace(n=2)}
    assert run("--only", "needy", **table) == 0
    out = capsys.readouterr().out
    assert "needy: 2 of 2 seeds published" in out and "needy: 1 of 2" not in out
    with refused("results/needy lacks c-s2, which needs weights that aren't published"):
        run("--only", "needy", **table | {"needy": NEEDY._replace(n=3)})


def test_seeds_must_be_alike(run, monkeypatch):
    assert run(quick=QUICK) == 0
    three = QUICK._replace(n=3)
    Path("out").rename("elsewhere")
    longer = {label: f"{text} --lr 2" for label, text in three.trainings.items()}
    for table, reason in (
        (three._replace(trainings=longer), "/a-s0 is another run: --lr is 0.1 there, not 2.0"),
        (three._replace(trainings={"d": ONE}), " holds a-s0, which quick doesn't have"),
        (three._replace(timed=True), "/a-s0: device is none there and would be cpu"),
    ):
        with refused(f"results/quick{reason}"):
            run(quick=table)
    monkeypatch.setattr(seeds, "_machine", lambda device: ("none", 1000))
    with refused("results/quick/a-s0: threads is ", " there and would be 1000 here"):
        run(quick=three._replace(timed=True))
    monkeypatch.setattr(seeds.mixed_precision, "name", lambda dtype: "bfloat16")
    reason = "precision is float32 there and would be bfloat16 here: continue on a machine like"
    with refused(f"results/quick/a-s0: {reason}"):
        run(quick=three)
    shutil.rmtree("results")
    shutil.rmtree("out")
    Path("elsewhere").rename("out")
    with refused(f"out/quick/a-s0: {reason}"):
        run(quick=three)
    Path("results/quick").mkdir(parents=True)
    Path("results/quick/mine.txt").touch()
    with refused("results/quick holds something else (mine.txt)"):
        run(quick=three)


def test_finished_runs_of_this_machine_give_its_speed(run):
    options = campaign.Options(Path("out"), Path("results"), {}, {"device": "cpu"})
    assert run(quick=QUICK) == 0
    for path in Path().glob("*/quick/*/summary.json"):
        change(path, train_seconds=10)
    assert run("--dry-run", quick=QUICK._replace(n=3)) == 0
    assert len(campaign.Campaign(["quick"], options).speeds) == 2
    for path in Path("out").glob("quick/*/summary.json"):
        change(path, status="interrupted")  # what is published comes from another machine
    assert campaign.Campaign(["quick"], options).speeds == {}
    shutil.rmtree("out")
    assert campaign.Campaign(["quick"], options).speeds == {}


def test_a_campaign_starts_what_fits_and_names_the_rest(run, capsys):
    # Nine epochs of 50,000 images take 9 minutes at this speed.
    assert run("--budget", "8m", long=LONG, quick=QUICK) == 0
    out = capsys.readouterr().out
    assert started(out) == QUICK_RUNS and "long: 2 to run, about 0:" in out
    assert Path("results/quick").is_dir() and not Path("results/long").exists()
    assert run("--dry-run", long=LONG, quick=QUICK) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines[:2]] == [
        f"out/long/long-s{i}: new" for i in (0, 1)
    ]


def test_an_interrupted_campaign_resumes(run, capsys):
    kill_at(Path("out/long/long-s0/waiting"), signal.SIGTERM)
    assert run(long=WAITING) == 128 + signal.SIGTERM
    assert "interrupted; the same command resumes out/long/long-s0" in capsys.readouterr().out
    assert run(long=WAITING) == 0
    assert Path("out/long/long-s0/starts").read_text() == "start\nresume\n"
    assert "long: 1 of 1 seeds published in results/long" in capsys.readouterr().out


def test_a_run_that_takes_too_long_is_interrupted_at_the_end(run, capsys, monkeypatch):
    def monotonic():
        return 1e6 if Path("out/long/long-s0/waiting").exists() else 0.0

    for module in (campaign, launch):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=monotonic, sleep=time.sleep))
    assert run("--budget", "1h", long=WAITING) == 0
    out = capsys.readouterr().out
    assert "the budget is used up; the same command resumes out/long/long-s0" in out
    assert summary(Path("out/long/long-s0"))["status"] == "interrupted"
    assert "long: 1 to run" in out and not Path("results").exists()


def test_two_runs_at_a_time_wait_for_the_weights_that_one_of_them_makes(run, monkeypatch, capsys):
    def start(run, slot):
        if run.label == "c":
            assert summary(Path("out/long/long-s0"))["status"] == "finished"
        return begin(run, slot)

    begin = launch.start_here
    monkeypatch.setattr(launch, "start_here", start)
    slots = [{"OMP_NUM_THREADS": "3"}] * 2
    monkeypatch.setattr(launch, "find_slots", lambda device, jobs: slots[:jobs])
    needy = NEEDY._replace(shared="--epochs 1")
    assert run("--jobs", "2", needy=needy, long=LONG, quick=QUICK) == 0
    out = capsys.readouterr().out
    assert sorted(started(out)) == sorted(
        [*QUICK_RUNS, "long: long-s0", "long: long-s1", "needy: c-s0"]
    )
    names = ("quick", "long", "needy")
    assert all(f"seeds published in results/{name}" in out for name in names)
    config = json.loads(Path("out/quick/a-s0/config.json").read_text())
    assert config["threads"] == 3


def test_nothing_else_runs_beside_an_experiment_whose_times_matter(run, monkeypatch):
    started, processes = [], []

    def start(run, slot):
        active = sum(process.poll() is None for process in processes)
        started.append((run.label, active, slot))
        processes.append(begin(run, slot))
        return processes[-1]

    begin = launch.start_here
    monkeypatch.setattr(launch, "start_here", start)
    assert run("--jobs", "2", long=LONG._replace(timed=True), quick=QUICK) == 0
    share = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // 2))}
    assert [(label, slot) for label, _, slot in started] == [
        *[(label, share) for label in "abab"],
        *[("long", {})] * 2,
    ]
    assert all(active == 0 for label, active, _ in started if label == "long")


def test_weights_come_from_their_run_before_the_others_need_them(run, capsys):
    assert run("--only", "needy", needy=NEEDY, long=LONG) == 0
    assert started(capsys.readouterr().out) == ["long: long-s0", "needy: c-s0"]
    given = arguments(Path("out/needy/c-s0"))
    assert given["weights"] == "out/long/long-s0/last.pt"


def test_a_failed_run_does_not_stop_the_others(run, capsys):
    assert run(needy=NEEDY, long=FAILING, quick=QUICK) == 1
    out = capsys.readouterr().out
    assert started(out) == ["long: long-s0", *QUICK_RUNS]
    assert "needy: left out, because its weights, out/long/long-s0, failed" in out
    assert "out/long/long-s0 failed: exit status 1" in out
    assert [path.name for path in Path("results").iterdir()] == ["quick"]


def test_an_experiment_whose_directory_holds_another_run_is_left_out(run, capsys):
    assert run(long=FAILING) == 1
    other = WAITING._replace(trainings={"long": f"{ONE} --epochs 2"})
    assert run(long=other, quick=QUICK) == 1
    out = capsys.readouterr().out
    assert "long: left out: out/long/long-s0 holds another run: --epochs is 1 there" in out
    assert "quick: 2 of 2 seeds published in results/quick" in out
    with refused("out/long/long-s0 holds another run"):
        run(long=other)


def test_a_complete_experiment_of_a_modified_tree_stays_unpublished(run, capsys):
    assert run(quick=QUICK) == 0
    shutil.rmtree("results")
    path = Path("out/quick/b-s0/config.json")
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"git": config["git"] | {"dirty": True}}))
    capsys.readouterr()
    assert run(quick=QUICK) == 0
    reason = "out/quick/b-s0 was made with a modified working tree"
    assert f"2 of 2 seeds finished, but left unpublished: {reason}" in capsys.readouterr().out
