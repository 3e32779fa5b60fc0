"""Runs of one experiment over several seeds.

groups = group(runs)                                       # runs that differ by their seed only
groups[0].scalar("test")                                   # MeanStd(mean, std, n)
"""

import math
import os
import re
import statistics
from typing import NamedTuple

from common.errors import UserError
from common.scopes import with_scope
from common.text import printable

# Arguments that don't tell experiments apart. --data-dir does where it is the folder of images.
NOT_COMPARED = (with_scope("location", "call") | {"seed"}) - {"data_dir"}
# Arguments that the machine may have chosen, and may choose otherwise for another seed.
FITTED_TO_MEMORY = ("micro_batch", "accumulate")

MACHINE = ("device", "threads")  # what times depend on besides the run itself
HELD_OUT, TEST = "held-out images", "test images"  # of other programs' files
SEVERAL = "several"  # the value of an argument that differs between the runs of a group


class MeanStd(NamedTuple):
    """Mean and sample standard deviation of n values; std is None for one."""

    mean: float
    std: float | None
    n: int


def summarize(values):
    """MeanStd of the values that are not None; None if all are."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else None
    return MeanStd(statistics.fmean(values), std, len(values))


class Group:
    """Runs of one experiment, shown as one row and one curve. A single run is a group, too.

    Only finished runs count, if there are any. Of runs with equal seed and arguments only the one
    that was started last counts: they are not independent.
    """

    def __init__(self, name, runs):
        self.name, self.runs = name, runs
        self._bands = {}  # results of band
        finished = [run for run in runs if run.status == "finished"]
        candidates = finished or [run for run in runs if run.epochs] or runs
        latest, defaults = {}, _defaults(runs)
        for run in sorted(candidates, key=lambda run: run.started):
            latest[_key(run, ("arguments",), defaults), run.seed] = run
        self.counted = [run for run in candidates if run in latest.values()]
        self.repeats = len(candidates) - len(self.counted)

    @property
    def label(self):
        """The name in a legend, with n and with the status of unfinished runs."""
        notes = [f"n = {len(self.counted)}"] if len(self.counted) > 1 else []
        if not self.is_finished:
            notes.append(self.status.split(":")[0])
        return f"{self.name} ({', '.join(notes)})" if notes else self.name

    @property
    def status(self):
        """The status of the runs; if they differ, how many have which."""
        status = [run.status for run in self.runs]
        if len(set(status)) == 1:
            return status[0]
        words = [(text or "no summary").split(":")[0] for text in status]
        return ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))

    @property
    def is_finished(self):
        """Whether all counted runs are finished, as far as it is known."""
        return all(run.status in ("finished", "") for run in self.counted)

    @property
    def family(self):
        """The family of the model, such as resnet; "" if it isn't known."""
        return _unique(run.family for run in self.runs)

    @property
    def measured_on(self):
        return _unique(run.measured_on for run in self.counted)

    @property
    def reported(self):
        """Which epoch the test accuracy is of: the last, or the best on held-out images."""
        return _unique(run.summary.get("reported") for run in self.counted)

    @property
    def tests(self):
        """{seed: test accuracy} of the runs that have one; {path: …} if a seed occurs twice."""
        return self._by_seed(lambda run: run.accuracy)

    def by_seed(self, scalar):
        """{seed: value of one of the runs' scalars}, as in `tests`."""
        return self._by_seed(lambda run: run.scalars[scalar])

    def _by_seed(self, value_of):
        known = [run for run in self.counted if value_of(run) is not None]
        seeds_differ = len({run.seed for run in known}) == len(known)
        return {run.seed if seeds_differ else run.path: value_of(run) for run in known}

    @property
    def accuracy(self):
        """MeanStd of the test accuracies, or None."""
        return summarize(self.tests.values())

    def argument(self, name):
        """The value that all runs share, "several" if they differ, None if none has it."""
        values = [run.arguments[name] for run in self.runs if name in run.arguments]
        if not values:
            return None
        return values[0] if _all_equal(values) else SEVERAL

    @property
    def varying(self):
        """The arguments besides the seed that differ between the runs."""
        names = _compared_names(self.runs)
        return [name for name in names if self.argument(name) == SEVERAL]

    def scalar(self, name):
        """MeanStd of one of the runs' scalars, or None."""
        return summarize(run.scalars.get(name) for run in self.counted)

    def band(self, name, x="epoch"):
        """(positions, means, sample standard deviations) at the epochs that all counted runs have.

        There are no deviations of a single run.
        """
        if (name, x) not in self._bands:
            self._bands[name, x] = self._compute_band(name, x)
        return self._bands[name, x]

    def _compute_band(self, name, x):
        curves = [dict(zip(*run.curve(name))) for run in self.counted]
        positions = [run.position(x) for run in self.counted]
        epochs = sorted(set.intersection(*map(set, curves), *map(set, positions)))
        at = tuple(statistics.fmean(position[e] for position in positions) for e in epochs)
        values = [[curve[e] for curve in curves] for e in epochs]
        means = tuple(map(statistics.fmean, values))
        if len(curves) == 1:
            return at, means, ()
        return at, means, tuple(_fast_std(*pair) for pair in zip(values, means))


def conditions(groups, name):
    """The values of the counted runs' "precision", "device" or "threads" (of a CPU), each once."""
    values = [run.conditions[name] for group in groups for run in group.counted]
    return list(dict.fromkeys(str(value) for value in values if value))


def _fast_std(values, mean):
    """The sample standard deviation; statistics.stdev computes with fractions and is slow."""
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _unique(texts):
    return ", ".join(dict.fromkeys(str(text) for text in texts if text))


def _all_equal(values):
    return all(value == values[0] for value in values)


def group(runs, by=("arguments",)):
    """Groups, in the order of their first runs.

    by: "run" (each alone), "arguments" (they differ by seed and NOT_COMPARED only), or names of
    arguments. Runs without a config.json are alone. Raises UserError for an argument that no run
    has.
    """
    known = {name for run in runs for name in run.arguments} | {"run", "arguments"}
    for name in by:
        if name not in known:
            names = ", ".join(sorted(known))
            raise UserError(f"--group-by {name}: must be one of {names}", status=2)
    members_by_key, defaults = {}, _defaults(runs)
    for run in runs:
        members_by_key.setdefault(_key(run, by, defaults), []).append(run)
    groups = [Group(_name(members, by), members) for members in members_by_key.values()]
    _make_names_differ(groups)
    return groups


def _make_names_differ(groups):
    """Adds what distinguishes groups of one name: the arguments, else a number."""
    by_name = {}
    for group in groups:
        by_name.setdefault(group.name, []).append(group)
    for name, same in by_name.items():
        if len(same) == 1:
            continue
        differing, _ = compare_arguments(same)
        texts = [
            ", ".join(f"{key} {group.argument(key)}" for key in differing[:3]) for group in same
        ]
        for number, (group, text) in enumerate(zip(same, texts), start=1):
            if len(group.runs) == 1:
                group.name = group.runs[0].name
            elif text and texts.count(text) == 1:
                group.name = printable(f"{name} ({text})")
            else:
                group.name = f"{name} #{number}"


def _key(run, by, defaults):
    """Equal for runs of one group.

    defaults: {name: value} of the options that a run may lack because they are newer.
    """
    if "run" in by or not run.arguments:
        return run.path
    arguments = defaults | run.arguments
    if "arguments" not in by:
        return tuple(str(arguments.get(name)) for name in by)
    ignored = _ignored(run)
    return str(sorted((k, str(value)) for k, value in arguments.items() if k not in ignored))


def _defaults(runs):
    """{name: default} of arguments, as far as the runs tell it and agree."""
    values = {}
    for run in runs:
        for name, value in run.arguments.items():
            if run.origins.get(name) == "default":
                values.setdefault(name, []).append(value)
    return {name: column[0] for name, column in values.items() if _all_equal(column)}


def _ignored(run):
    """The arguments that don't identify the run's experiment."""
    chosen = {n for n in FITTED_TO_MEMORY if run.origins.get(n) in ("auto", "--micro-batch")}
    is_folder = run.arguments.get("dataset") == "folder"
    return NOT_COMPARED | chosen | (set() if is_folder else {"data_dir"})


def _compared_names(runs):
    return dict.fromkeys(n for run in runs for n in run.arguments if n not in _ignored(run))


def label_of(name):
    """The name of a run without its seed and the time when it started."""
    return re.sub(r"-s\d+(-\d{8}-\d{6})?(-\d+)?$", "", name)


def _name(runs, by):
    if {"run", "arguments"} & set(by) or not runs[0].arguments:
        return _common_name(runs)
    return printable(", ".join(f"{name} {runs[0].arguments.get(name)}" for name in by))


def _common_name(runs):
    """What the runs' names share, without the seed and the time."""
    if len(runs) == 1:
        return runs[0].name
    names = [label_of(run.name) for run in runs]
    if not _all_equal(names):  # one may have its directory in front
        names = [label_of(run.name.rpartition("/")[2]) for run in runs]
    if _all_equal(names):
        return names[0]
    return os.path.commonprefix([run.name for run in runs]).rstrip("-_ .") or names[0]


def test_images(groups):
    """The images that the accuracies of groups are of, such as ["cifar10, 500 images"].

    More than one can't be compared. Files of other programs don't tell their dataset.
    """
    names = dict.fromkeys(_test_images(run) for group in groups for run in group.runs if run.epochs)
    if HELD_OUT not in names:
        names.pop(TEST, None)
    return [name for name in names if name]


def _test_images(run):
    if not run.is_ours:
        has_test = (
            run.curve("ema_test_acc")[1] or run.curve("test_acc")[1]
        )  # Run.accuracy is theirs
        return HELD_OUT if run.measured_on.startswith("held-out") and not has_test else TEST
    if not run.arguments:
        return ""
    name, limit = str(run.arguments.get("dataset")), run.arguments.get("limit_test")
    if name == "folder":
        name += f" {run.arguments.get('data_dir')}"
    return f"{name}, {limit} images" if limit else name


def compare_arguments(groups):
    """(names of the arguments that differ between groups, {name: value} of the others)."""
    groups = [group for group in groups if any(run.arguments for run in group.runs)]
    runs = [run for group in groups for run in group.runs]
    names = _compared_names(runs)
    values = {name: [group.argument(name) for group in groups] for name in names}
    if not _all_equal(values.get("dataset", [])):
        values.pop("data_dir", None)  # of course other data lies elsewhere
    common = {
        name: column[0]
        for name, column in values.items()
        if _all_equal(column) and column[0] != SEVERAL
    }
    return [name for name in values if name not in common], common


def without_defaults(arguments, groups):
    """The arguments that are not a default in all runs, as far as config.json tells."""
    origins = [run.origins for group in groups for run in group.runs if run.arguments]
    chosen = {name for origin in origins for name in origin if origin[name] != "default"}
    return {name: value for name, value in arguments.items() if name in chosen or not any(origins)}
