"""Runs over seeds: which belong together, their means, and the differences of means."""

import json
import math
import os

import pytest
import torch
from helpers.samples import groups_in, write, write_seeds

from analysis import differences, metrics, replicates
from common.errors import UserError


def test_runs_that_differ_by_their_seed_only_are_one_group(tmp_path):
    write_seeds(tmp_path, "wide", [90.0, 92.0, 94.0])
    write_seeds(tmp_path, "deep", [80.0, 80.0], lr=0.1)
    write(tmp_path / "other")
    groups = {group.name: group for group in groups_in(tmp_path)}
    assert set(groups) == {"wide", "deep", "other"}
    assert groups["wide"].scalar("test") == (92.0, 2.0, 3)
    assert groups["wide"].label == "wide (n = 3)"
    assert groups["wide"].band("eval_acc") == ((1, 2), (30.0, 92.0), (0.0, 2.0))
    assert groups["deep"].tests == {0: 80.0, 1: 80.0}
    assert groups["other"].scalar("last") == (66.5, None, 1)
    assert len(groups_in(tmp_path, "run")) == 6
    assert len(groups_in(tmp_path, "epochs")) == 2
    with pytest.raises(UserError, match="--group-by depth: .*arguments, epochs, lr, model"):
        groups_in(tmp_path, "depth")


def test_groups_of_one_name_are_told_apart_by_their_arguments(tmp_path):
    for folder, lr in (("x", 0.1), ("y", 0.2)):
        write_seeds(tmp_path / folder, "cifar10-resnet20", [90.0, 92.0], lr=lr)
    runs = metrics.load_runs([str(tmp_path / "*/*")])
    for run in runs:
        run.name = run.path.parent.name
    names = [group.name for group in replicates.group(runs)]
    assert names == ["cifar10-resnet20 (lr 0.1)", "cifar10-resnet20 (lr 0.2)"]


def test_a_legend_names_the_status_of_unfinished_runs(tmp_path):
    for seed in range(2):
        path = write(tmp_path / f"a-s{seed}", arguments={"model": "a", "seed": seed})
        os.utime(path / "metrics.csv", (1, 1))
    (group,) = groups_in(tmp_path)
    assert group.label == "a (n = 2, unfinished)"


def test_a_published_run_has_the_same_folder_as_its_repetition(tmp_path):
    folders = ("png", "data/png", "data\\png", "./data/png/", "other/png")
    for seed, folder in enumerate(folders):
        arguments = {"dataset": "folder", "data_dir": folder, "seed": seed}
        write(tmp_path / f"a-s{seed}", arguments=arguments)
    assert sorted(len(group.runs) for group in groups_in(tmp_path)) == [1, 4]


def test_a_resumed_seed_is_of_the_same_experiment(tmp_path):
    write_seeds(tmp_path, "a", [90.0], resume=None, resume_previous=False)
    resumed = {"model": "a", "seed": 1, "epochs": 2, "resume": "x", "resume_previous": True}
    write(tmp_path / "a-s1", arguments=resumed)
    assert len(groups_in(tmp_path)) == 1


def test_a_repeated_seed_counts_once(tmp_path):
    write_seeds(tmp_path, "a", [90.0, 92.0], micro_batch=8)
    again = {"model": "a", "seed": 0, "epochs": 2, "micro_batch": 8, "output_dir": "elsewhere"}
    write(tmp_path / "b", arguments=again, status="finished", test_acc=91.0)
    (group,) = groups_in(tmp_path)
    assert group.accuracy == (91.5, pytest.approx(0.7071, abs=1e-4), 2)
    assert group.repeats == 1 and len(group.runs) == 3
    (group,) = groups_in(tmp_path, "epochs")
    assert group.repeats == 1 and len(group.counted) == 2


def test_of_runs_that_repeat_a_seed_the_one_that_started_last_counts(tmp_path):
    for name, started, accuracy in (("b", "2026-01-01", 80.0), ("a", "2026-02-01", 90.0)):
        arguments = {"model": "resnet20", "seed": 0}
        path = write(tmp_path / name, arguments=arguments, status="finished", test_acc=accuracy)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"started": started}))
    (group,) = groups_in(tmp_path)
    assert group.accuracy.mean == 90 and group.repeats == 1
    before = [{"at_epoch": 1, "before": {"started": "2025-12-01"}}]
    resumed = json.loads((tmp_path / "a/config.json").read_text()) | {"resumed": before}
    (tmp_path / "a/config.json").write_text(json.dumps(resumed))
    (group,) = groups_in(tmp_path)
    assert group.accuracy.mean == 80


def test_different_runs_of_one_seed_all_count_and_pair_with_nothing(tmp_path):
    write_seeds(tmp_path, "a", [90.0])
    write_seeds(tmp_path, "b", [80.0])
    (group,) = groups_in(tmp_path, "epochs")
    assert group.accuracy.mean == 85 and group.accuracy.n == 2 and 0 not in group.tests


def test_batches_split_to_fit_the_memory_are_the_same_experiment(tmp_path):
    for seed, parts in enumerate((2, 3)):
        arguments = {"model": "a", "seed": seed, "accumulate": parts, "micro_batch": 60 // parts}
        path = write(tmp_path / f"a-s{seed}", arguments=arguments) / "config.json"
        config = json.loads(path.read_text())
        config["from"] |= {"accumulate": "--micro-batch", "micro_batch": "auto"}
        path.write_text(json.dumps(config))
    assert len(groups_in(tmp_path)) == 1


def test_a_run_from_before_an_option_existed_has_its_default(tmp_path):
    write_seeds(tmp_path, "a", [90.0])
    for seed, origin in ((1, "default"), (2, "command line")):
        arguments = {"model": "a", "seed": seed, "epochs": 2, "new": "x" * seed}
        path = write(tmp_path / f"a-s{seed}", arguments=arguments) / "config.json"
        config = json.loads(path.read_text())
        config["from"]["new"] = origin
        path.write_text(json.dumps(config))
    groups = groups_in(tmp_path)
    assert [[run.seed for run in group.runs] for group in groups] == [[0, 1], [2]]


def test_without_a_test_there_is_no_accuracy_of_held_out_images(tmp_path):
    held_out = ("epoch,train_loss,val_acc", ["1,2,70"])
    write(tmp_path / "a", *held_out, arguments={"model": "a", "seed": 0})
    write(tmp_path / "b", arguments={"model": "b", "seed": 0})
    a, b = groups_in(tmp_path)
    assert a.accuracy is None and b.accuracy.mean == 66.5 and not b.is_finished


def test_accuracies_of_another_program_are_of_test_images_where_it_has_any(tmp_path):
    write(tmp_path / "a", "epoch,train_loss,val_acc,test_acc", ["1,1,70,65"])
    write(tmp_path / "b", "epoch,train_loss,test_acc", ["1,1,66"])
    write(tmp_path / "c", "epoch,train_loss,val_acc", ["1,1,70"])
    groups = {group.name: group for group in groups_in(tmp_path)}
    assert replicates.test_images([groups["a"], groups["b"]]) == []
    assert replicates.test_images([groups["a"], groups["c"]]) == ["test images", "held-out images"]


def test_means_are_of_finished_runs_at_epochs_that_all_have(tmp_path):
    write_seeds(tmp_path, "a", [90.0, 92.0])
    arguments = {"model": "a", "seed": 2, "epochs": 2}
    short = write(tmp_path / "a-s2", rows=["1,10,0.1,2,20,1,34,5,9"], arguments=arguments)
    (group,) = groups_in(tmp_path)
    assert group.status == "2 finished, 1 running"
    assert group.scalar("test").n == 2 and group.scalar("last").mean == 91
    assert group.band("eval_acc", "seconds")[0] == (5, 10)
    runs = [metrics.Run(path / "metrics.csv") for path in (short, write(tmp_path / "other"))]
    both = replicates.Group("both", runs)
    assert both.band("eval_acc")[:2] == ((1,), (32.0,)) and both.band("eval_top5") == ((), (), ())


def test_arguments_are_common_or_differ_between_or_within_groups(tmp_path):
    images = {"dataset": "folder", "data_dir": "x"}
    write_seeds(tmp_path, "a", [1.0, 2.0], lr=0.1, **images)
    write_seeds(tmp_path, "b", [1.0], lr=0.2, dropout=0.5, **images)
    differing, common = replicates.compare_arguments(groups_in(tmp_path))
    assert differing == ["model", "lr", "dropout"] and common == {"epochs": 2, **images}
    (together,) = groups_in(tmp_path, "epochs")
    assert together.argument("lr") == "several" and together.argument("nothing") is None
    assert together.name == "epochs 2" and together.varying == ["model", "lr"]
    assert replicates.compare_arguments([together])[1] == {"epochs": 2, "dropout": 0.5, **images}


# ---- differences ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "n", "value", "error", "t", "verdict"),
    [
        # Differences 1, 2, 3: standard deviation 1, two degrees of freedom.
        ((61, 73, 55), (60, 71, 52), "3 paired", 2, 3**-0.5, 4.303, "not resolved"),
        ((1, 2.1), (51, 52), "2 paired", -49.95, 0.05, 12.706, "lower"),
        ((51, 52), (1, 2.1), "2 paired", 49.95, 0.05, 12.706, "higher"),
        # The third seed has no partner.
        ((1, 3, 99), (0, 1), "2 paired", 1.5, 0.5, 12.706, "not resolved"),
        # Equal results, and differences that don't vary.
        ((61.2, 60.1), (61.2, 60.1), "2 paired", 0, 0, 0, "not resolved"),
        ((61.3, 60.4), (60.2, 59.3), "2 paired", 1.1, 0, 0, "not resolved (no spread to judge by)"),
        # Welch: variances 1 (n = 3) and 8 (n = 2); 18.78 / (1/18 + 16) = 1.17 degrees of freedom.
        ((1, 2, 3), {3: 4, 4: 8}, "3, 2", -4, math.sqrt(13 / 3), 9.083, "not resolved"),
    ],
)
def test_differences_computed_by_hand(ours, theirs, n, value, error, t, verdict):
    theirs = theirs if isinstance(theirs, dict) else dict(enumerate(theirs))
    found = differences.difference(dict(enumerate(ours)), theirs)
    assert (found.n, found.verdict) == (n, verdict)
    interval = [value, error, value - t * error, value + t * error]
    assert found[:4] == pytest.approx(interval, abs=1e-3)


@pytest.mark.parametrize("theirs", [{0: 60}, {1: 60}, {1: 60, 2: 60}])
def test_one_seed_has_no_standard_error(theirs):
    found = differences.difference({0: 61.5}, theirs)
    assert (found.value, found.error, found.low) == (1.5, None, None)
    assert found.verdict == "one seed: no error known"


@pytest.mark.parametrize("freedom", [1, 1.5, 2, 2.9, 5, 30, 200])
def test_97_5_percent_lie_below_the_quantile(freedom):
    """Student's density, integrated from 0 to the quantile by Simpson's rule, gives 47.5 %."""
    gammas = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    steps, t = 2000, differences.t975(freedom)
    x = torch.linspace(0, t, steps + 1, dtype=torch.float64)
    density = gammas / math.sqrt(freedom * math.pi) * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    weights = torch.tensor([1, *[4, 2] * (steps // 2 - 1), 4, 1])
    area = t / steps / 3 * float((weights * density).sum())
    assert area == pytest.approx(0.475, abs=1e-6)


def test_quantiles_are_the_published_ones():
    published = {1: 12.706, 2: 4.303, 4: 2.776, 30: 2.042, 120: 1.980, 10**6: 1.960}
    for freedom, quantile in published.items():
        assert differences.t975(freedom) == pytest.approx(quantile, abs=5.1e-4)


def test_a_directory_before_one_name_is_no_part_of_the_common_name(tmp_path):
    write_seeds(tmp_path / "old", "resnet20", [90.0], lr=1)
    write_seeds(tmp_path / "runs", "resnet20", [91.0, 92.0, 93.0])
    runs = metrics.load_runs([str(tmp_path / "*/*")])
    names = {len(group.runs): group.name for group in replicates.group(runs, ("arguments",))}
    assert names[3].startswith("resnet20") and names[1] != names[3]
