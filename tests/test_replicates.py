"""Runs over seeds: which belong together, and what they say. (What two differ by is tested with the sweeps.)"""

import json

import pytest
from samples import write, write_seeds

from analysis import metrics, replicates
from common.errors import UserError


def load(tmp_path):
    return metrics.load_runs([str(tmp_path / "*")])


def test_runs_that_differ_by_their_seed_only_are_one_group(tmp_path):
    write_seeds(tmp_path, "wide", [90.0, 92.0, 94.0])
    write_seeds(tmp_path, "deep", [80.0, 80.0], lr=0.1)
    write(tmp_path / "other")
    groups = {group.name: group for group in replicates.group(load(tmp_path))}
    assert set(groups) == {"wide", "deep", "other"}
    assert (
        groups["wide"].figure("test") == (92.0, 2.0, 3) and groups["wide"].label == "wide (n = 3)"
    )
    assert groups["deep"].tests == {0: 80.0, 1: 80.0} and groups["other"].figure("last") == (
        66.5,
        None,
        1,
    )
    assert groups["wide"].band("eval_acc") == ((1, 2), (30.0, 92.0), (0.0, 2.0))
    assert len(replicates.group(load(tmp_path), ["run"])) == 6
    assert len(replicates.group(load(tmp_path), ["epochs"])) == 2
    with pytest.raises(
        UserError,
        match="--group-by depth: it takes run, arguments, or any of epochs, lr, model, seed",
    ):
        replicates.group(load(tmp_path), ["depth"])


def test_a_seed_that_went_on_from_the_save_before_is_of_the_same_experiment(tmp_path):
    write_seeds(tmp_path, "a", [90.0], resume=None, resume_previous=False)
    write(
        tmp_path / "a-s1",
        arguments={"model": "a", "seed": 1, "epochs": 2, "resume": "x", "resume_previous": True},
    )
    assert len(replicates.group(load(tmp_path))) == 1


def test_a_repeated_seed_is_no_other_seed(tmp_path):
    write_seeds(tmp_path, "a", [90.0, 92.0], micro_batch=8)
    again = {"model": "a", "seed": 0, "epochs": 2, "micro_batch": 8, "output_dir": "elsewhere"}
    write(tmp_path / "b", arguments=again, status="finished", test_acc=91.0, test_top5=99.0)
    (group,) = replicates.group(load(tmp_path))
    assert (
        group.accuracy == (91.5, pytest.approx(0.7071, abs=1e-4), 2)
        and group.repeats == 1
        and len(group.runs) == 3
    )
    (mixed,) = replicates.group(load(tmp_path), ["epochs"])
    assert mixed.repeats == 1 and len(mixed.counted) == 2


def test_runs_of_one_seed_and_other_arguments_all_count_and_pair_with_nothing(tmp_path):
    write_seeds(tmp_path, "a", [90.0])
    write_seeds(tmp_path, "b", [80.0])
    (group,) = replicates.group(load(tmp_path), ["epochs"])
    assert group.accuracy.mean == 85 and group.accuracy.n == 2 and 0 not in group.tests


def test_how_memory_had_a_batch_cut_is_no_other_experiment(tmp_path):
    for seed, parts in enumerate((2, 3)):
        given = {"model": "a", "seed": seed, "accumulate": parts, "micro_batch": 60 // parts}
        path = write(tmp_path / f"a-s{seed}", arguments=given)
        config = json.loads((path / "config.json").read_text())
        config["from"] |= {"accumulate": "--micro-batch", "micro_batch": "auto"}
        (path / "config.json").write_text(json.dumps(config))
    assert len(replicates.group(load(tmp_path))) == 1


def test_a_run_with_held_out_images_has_no_test_accuracy_before_the_test(tmp_path):
    write(
        tmp_path / "a", "epoch,train_loss,val_acc", ["1,2,70"], arguments={"model": "a", "seed": 0}
    )
    write(tmp_path / "b", arguments={"model": "b", "seed": 0})
    a, b = replicates.group(load(tmp_path))
    assert a.accuracy is None and b.accuracy.mean == 66.5 and not b.whole


def test_a_mean_is_of_finished_runs_at_epochs_that_all_have(tmp_path):
    write_seeds(tmp_path, "a", [90.0, 92.0])
    write(
        tmp_path / "a-s2",
        rows=["1,10,0.1,2,20,1,34,5,9"],
        arguments={"model": "a", "seed": 2, "epochs": 2},
    )
    (group,) = replicates.group(load(tmp_path))
    assert (
        group.status == "2 finished, 1 running"
        and group.figure("test").n == 2
        and group.figure("last").mean == 91
    )
    both = replicates.Group(
        "both", [metrics.Run(tmp_path / name / "metrics.csv") for name in ("a-s2",)] * 2
    )
    assert both.curve("eval_acc") == ((1,), (34.0,)) and both.curve("eval_top5") == ((), ())
    assert group.band("eval_acc", "seconds")[0] == (5, 10)


def test_arguments_are_common_or_differ_or_vary_within_a_group(tmp_path):
    write_seeds(tmp_path, "a", [1.0, 2.0], lr=0.1, data_dir="x")
    write_seeds(tmp_path, "b", [1.0], lr=0.2, data_dir="x", dropout=0.5)
    groups = replicates.group(load(tmp_path))
    differing, common = replicates.arguments(groups)
    assert differing == ["model", "lr", "dropout"] and common == {"epochs": 2, "data_dir": "x"}
    together = replicates.group(load(tmp_path), ["epochs"])
    assert together[0].argument("lr") == "several" and together[0].argument("nothing") is None
