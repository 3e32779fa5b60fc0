"""Runs over seeds: which belong together, and what they say. (What two differ by is tested with the sweeps.)"""

import pytest
from samples import write, write_seeds

from analysis import metrics, replicates
from errors import UserError


def load(tmp_path):
    return metrics.load_runs([str(tmp_path / "*")])


def test_runs_that_differ_by_their_seed_only_are_one_group(tmp_path):
    write_seeds(tmp_path, "wide", [90.0, 92.0, 94.0])
    write_seeds(tmp_path, "deep", [80.0, 80.0], lr=0.1)
    write(tmp_path / "other")
    groups = {group.name: group for group in replicates.group(load(tmp_path))}
    assert set(groups) == {"wide", "deep", "other"}
    assert groups["wide"].figure("test") == (92.0, 2.0, 3) and groups["wide"].label == "wide (n = 3)"
    assert groups["deep"].tests == {0: 80.0, 1: 80.0} and groups["other"].figure("last") == (66.5, None, 1)
    assert groups["wide"].band("eval_acc") == ((1, 2), (30.0, 92.0), (0.0, 2.0))
    assert len(replicates.group(load(tmp_path), ["run"])) == 6
    assert len(replicates.group(load(tmp_path), ["epochs"])) == 2
    with pytest.raises(UserError, match="--group-by depth: it takes run, arguments, or any of epochs, lr, model, seed"):
        replicates.group(load(tmp_path), ["depth"])


def test_a_seed_that_went_on_from_the_save_before_is_of_the_same_experiment(tmp_path):
    write_seeds(tmp_path, "a", [90.0], resume=None, resume_previous=False)
    write(tmp_path / "a-s1", arguments={"model": "a", "seed": 1, "epochs": 2, "resume": "x", "resume_previous": True})
    assert len(replicates.group(load(tmp_path))) == 1


def test_a_mean_is_of_finished_runs_at_epochs_that_all_have(tmp_path):
    write_seeds(tmp_path, "a", [90.0, 92.0])
    write(tmp_path / "a-s2", rows=["1,10,0.1,2,20,1,34,5,9"], arguments={"model": "a", "seed": 2, "epochs": 2})
    (group,) = replicates.group(load(tmp_path))
    assert group.status == "2 finished, 1 running" and group.figure("test").n == 2 and group.figure("last").mean == 91
    both = replicates.Group("both", [metrics.Run(tmp_path / name / "metrics.csv") for name in ("a-s2",)] * 2)
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
