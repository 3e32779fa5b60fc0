"""Several runs of one experiment: what they say together, and what two experiments differ by.

groups = group(runs)                                       # runs whose arguments differ by the seed only
groups[0].figure("test")                                   # Figure(mean, std, n)
difference(groups[0].tests, groups[1].tests).verdict
"""

import math
import os
import re
import statistics
from typing import NamedTuple

from common.errors import UserError

# Arguments that say where and when a run was made, not what it is.
PLACE = {
    "seed",
    "output_dir",
    "resume",
    "resume_previous",
    "config",
    "list_models",
    "tag",
    "data_url",
    "device",
}
# Student's t: 97.5 % lie below, for 1 to 30 degrees of freedom; beyond them the next smaller number's value is taken.
T975 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
    2.086,
    2.080,
    2.074,
    2.069,
    2.064,
    2.060,
    2.056,
    2.052,
    2.048,
    2.045,
    2.042,
)
T975_BEYOND = ((120, 1.980), (60, 2.000), (40, 2.021))


class Figure(NamedTuple):
    """Mean and sample standard deviation of n runs; std is None for one."""

    mean: float
    std: float | None
    n: int


def summarize(values):
    """Figure of numbers, of which some may be None; None where all are."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    return Figure(
        statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)
    )


class Group:
    """Runs of one experiment as one row and one curve; a single run is a group, too.

    Figures and curves are those of its finished runs, where there are any: others have not come as far. Of runs that are
    the same but for their place, seed and all, the last one counts: they would pass for seeds that were never drawn.
    """

    def __init__(self, name, runs):
        self.name, self.runs, self._bands = name, runs, {}
        counted = (
            [run for run in runs if run.status == "finished"]
            or [run for run in runs if run.epochs]
            or runs
        )
        self.counted = list({_identity(run): run for run in counted}.values())
        self.repeats = len(counted) - len(self.counted)

    @property
    def label(self):
        """For a legend: the name, with n where it is a mean, and what became of a run that isn't whole."""
        if len(self.counted) > 1:
            return f"{self.name} (n = {len(self.counted)})"
        status = self.counted[0].status.split(":")[0]
        return self.name if status in ("finished", "") else f"{self.name} ({status})"

    @property
    def status(self):
        """The runs' status; several: how many are of which."""
        kinds = [run.status for run in self.runs]
        if len(set(kinds)) == 1:
            return kinds[0]
        kinds = [(kind or "no summary").split(":")[0] for kind in kinds]
        return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))

    @property
    def measured_on(self):
        return ", ".join(dict.fromkeys(run.measured_on for run in self.counted if run.measured_on))

    @property
    def reported(self):
        """What the test accuracy is of: the last epoch, or the best on held-out images."""
        return ", ".join(
            dict.fromkeys(
                str(run.summary["reported"]) for run in self.counted if run.summary.get("reported")
            )
        )

    @property
    def tests(self):
        """{seed: test accuracy} of the runs that have one; where several are of one seed, {run: accuracy}: nothing pairs."""
        found = {run.path: run.accuracy for run in self.counted if run.accuracy is not None}
        seeds = {run.seed: run.accuracy for run in self.counted if run.accuracy is not None}
        return seeds if len(seeds) == len(found) else found

    @property
    def accuracy(self):
        """Figure of the runs' test accuracies, or None."""
        return summarize(list(self.tests.values()))

    @property
    def whole(self):
        """Whether its runs are finished, as far as they say."""
        return all(run.status in ("finished", "") for run in self.counted)

    @property
    def test_images(self):
        """What says which test pictures its accuracy is of, as far as the runs' arguments do; None where none has any."""
        if not any(run.arguments for run in self.runs):
            return None
        return tuple(str(self.argument(name)) for name in ("dataset", "limit_test")) + (
            (str(self.argument("data_dir")),) if self.argument("dataset") == "folder" else ()
        )

    def argument(self, name):
        """The value that the runs share, as JSON holds it; "several" where they don't, None where none has it."""
        values = [run.arguments[name] for run in self.runs if name in run.arguments]
        return (
            None
            if not values
            else values[0]
            if all(value == values[0] for value in values)
            else "several"
        )

    def figure(self, name):
        return summarize([run.figure(name) for run in self.counted])

    def band(self, name, x="epoch"):
        """(positions, means, sample standard deviations) at the epochs that all runs have; the last is empty for one run."""
        if (name, x) not in self._bands:
            self._bands[name, x] = self._band(name, x)
        return self._bands[name, x]

    def _band(self, name, x):
        curves = [dict(zip(*run.curve(name))) for run in self.counted]
        places = [run.position(x) for run in self.counted]
        epochs = sorted(set.intersection(*map(set, curves), *map(set, places)))
        at = tuple(math.fsum(place[e] for place in places) / len(places) for e in epochs)
        if len(curves) == 1:
            return at, tuple(curves[0][e] for e in epochs), ()
        values = [[curve[e] for curve in curves] for e in epochs]
        means = [math.fsum(v) / len(v) for v in values]
        stds = [
            math.sqrt(math.fsum((a - m) ** 2 for a in v) / (len(v) - 1))
            for v, m in zip(values, means)
        ]
        return at, tuple(means), tuple(stds)

    def curve(self, name):
        return self.band(name)[:2]


def group(runs, by=("arguments",)):
    """Groups in the order of their first runs.

    by: "run" (each alone), "arguments" (all but the seed and the place), or names of arguments. Runs without a config.json
    are each alone. Raises UserError for an argument that no run has.
    """
    if not {"run", "arguments"} & set(by):
        known = sorted({name for run in runs for name in run.arguments})
        for name in by:
            if name not in known:
                raise UserError(
                    f"--group-by {name}: it takes run, arguments, or any of {', '.join(known)}",
                    status=2,
                )
    found = {}
    for run in runs:
        found.setdefault(_key(run, by), []).append(run)
    groups = [Group(_common_name(members), members) for members in found.values()]
    for twin in [g for g in groups if [other.name for other in groups].count(g.name) > 1]:
        twin.name = twin.runs[0].name
    return groups


def _identity(run):
    """Equal for runs that differ by their place only."""
    return _key(run, ("arguments",)), run.seed


def _key(run, by):
    if "run" in by or not run.arguments:
        return run.path
    arguments = run.arguments
    if "arguments" in by:
        left_out = (
            PLACE
            | ({"data_dir"} if arguments.get("dataset") != "folder" else set())
            | _as_memory_allowed(run)
        )
        return str(
            sorted((key, str(value)) for key, value in arguments.items() if key not in left_out)
        )
    return tuple(str(arguments.get(name)) for name in by)


def _as_memory_allowed(run):
    """Arguments that the machine chose, and might choose otherwise for another seed."""
    origin = run.config.get("from")
    origin = origin if isinstance(origin, dict) else {}
    return {
        name
        for name in ("micro_batch", "accumulate")
        if origin.get(name) in ("auto", "--micro-batch")
    }


def _common_name(runs):
    """What the runs' names share, without the seed and the time."""
    names = [re.sub(r"-s\d+(-\d{8}-\d{6})?(-\d+)?$", "", run.name) for run in runs]
    if len(runs) == 1:
        return runs[0].name
    shared = (
        names[0]
        if len(set(names)) == 1
        else os.path.commonprefix([run.name for run in runs]).rstrip("-_ .")
    )
    return shared or names[0]


def arguments(groups):
    """(names of the arguments that differ between groups, {name: value} of those that are the same in all)."""
    having = [g for g in groups if any(run.arguments for run in g.runs)]
    names = dict.fromkeys(
        name
        for g in having
        for run in g.runs
        for name in run.arguments
        if name not in PLACE | _as_memory_allowed(run)
    )
    values = {name: [g.argument(name) for g in having] for name in names}
    if "dataset" in values and any(value != values["dataset"][0] for value in values["dataset"]):
        values.pop("data_dir", None)  # other data lies elsewhere: that is no difference of its own
    names = list(values)
    same = {name for name, each in values.items() if all(value == each[0] for value in each)}
    common = {name: values[name][0] for name in names if name in same}
    return [name for name in names if name not in same], common


def noteworthy(groups, common):
    """The common arguments that some run was given, or that its recipe brought: the rest are defaults."""
    origins = [run.config.get("from") for g in groups for run in g.runs if run.arguments]
    chosen = {
        key
        for origin in origins
        if isinstance(origin, dict)
        for key, source in origin.items()
        if source != "default"
    }
    return {key: value for key, value in common.items() if key in chosen or not any(origins)}


# ---- two experiments --------------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """Of two experiments' means; error (a standard error), low and high (a 95 % interval) are None where nothing tells them."""

    value: float
    error: float | None
    low: float | None
    high: float | None
    n: str

    @property
    def verdict(self):
        if self.error is None:
            return "one seed: no error known"
        if self.error == 0 and self.value != 0:
            return "not resolved (no spread to judge by)"
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "not resolved"


def difference(ours, theirs):
    """Difference of {seed: figure} and {seed: figure}, or None where one is empty.

    Over the seeds that both have, where there are two or more: the error is that of the mean of the pairs' differences.
    Otherwise over all of them, with Welch's error and degrees of freedom, if both have two or more.
    """
    if not ours or not theirs:
        return None
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if len(pairs) > 1:
        value, error, freedom, n = (
            statistics.fmean(pairs),
            _standard_error(pairs),
            len(pairs) - 1,
            f"{len(pairs)} paired",
        )
    elif len(ours) > 1 and len(theirs) > 1:
        a, b = (_standard_error(list(figures.values())) for figures in (ours, theirs))
        value, error = (
            statistics.fmean(ours.values()) - statistics.fmean(theirs.values()),
            math.hypot(a, b),
        )
        freedom = error**4 / (a**4 / (len(ours) - 1) + b**4 / (len(theirs) - 1)) if error else 1
        n = f"{len(ours)}, {len(theirs)}"
    else:
        value = (
            pairs[0]
            if pairs
            else statistics.fmean(ours.values()) - statistics.fmean(theirs.values())
        )
        return Difference(value, None, None, None, "1" if pairs else f"{len(ours)}, {len(theirs)}")
    if error < 1e-9:  # rounding
        error = 0.0
    half = t975(freedom) * error
    return Difference(value, error, value - half, value + half, n)


def _standard_error(values):
    return statistics.stdev(values) / math.sqrt(len(values))


def t975(freedom):
    """Student's t below which 97.5 % lie; between the tabled degrees of freedom that of the next smaller number."""
    whole = max(1, int(freedom + 1e-9))
    if whole <= len(T975):
        return T975[whole - 1]
    return next((t for least, t in T975_BEYOND if whole >= least), T975[-1])
