"""The difference between two experiments over seeds, with its 95 % interval.

difference(groups[0].tests, groups[1].tests).verdict       # groups: of replicates.group
"""

import bisect
import itertools
import math
import statistics
from functools import lru_cache
from typing import NamedTuple

# What differences are taken of: scalars of a run, and the images that they are the accuracy on.
MEASURES = {"test": "test images", "train_clean": "training images"}


class Difference(NamedTuple):
    """Of two means; standard error and 95 % interval are None if there is only one value."""

    value: float
    error: float | None
    low: float | None
    high: float | None
    n: str

    @property
    def interval(self):
        return "" if self.error is None else f"{self.low:+.2f} to {self.high:+.2f}"

    @property
    def verdict(self):
        if self.error is None:
            return "one seed: no error known"
        if self.error == 0 and self.value != 0:
            return "not resolved (no spread to judge by)"
        if self.low > 0:
            return "higher"
        return "lower" if self.high < 0 else "not resolved"


def difference(ours, theirs):
    """Difference between {seed: value} and {seed: value}; None if one is empty.

    Paired if they share two or more seeds: the error is that of the mean of the pairs' differences.
    Else, if both have two or more values, between the means, with Welch's error and degrees of
    freedom. Else without an error: of the seed that both have, or of the means.
    """
    if not ours or not theirs:
        return None
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    value = statistics.fmean(ours.values()) - statistics.fmean(theirs.values())
    n = f"{len(ours)}, {len(theirs)}"
    if len(pairs) > 1:
        value, n = statistics.fmean(pairs), f"{len(pairs)} paired"
        error, freedom = _standard_error(pairs), len(pairs) - 1
    elif len(ours) > 1 and len(theirs) > 1:
        a, b = _standard_error(ours.values()), _standard_error(theirs.values())
        error = math.hypot(a, b)
        freedom = error**4 / (a**4 / (len(ours) - 1) + b**4 / (len(theirs) - 1)) if error else 1
    elif pairs:
        return Difference(pairs[0], None, None, None, "1")
    else:
        return Difference(value, None, None, None, n)
    if error < 1e-9:  # rounding
        error = 0.0
    half = t975(freedom) * error
    return Difference(value, error, value - half, value + half, n)


def compare(groups, comparisons):
    """Yields (question, Group, Group of the baseline, measure, Difference).

    comparisons: (question, name of a group, name of the baseline); those without values of both
    are left out.
    """
    by_name = {group.name: group for group in groups}
    for question, *pair in comparisons:
        if not by_name.keys() >= set(pair):
            continue
        ours, theirs = (by_name[name] for name in pair)
        for measure in MEASURES:
            result = difference(ours.by_seed(measure), theirs.by_seed(measure))
            if result is not None:
                yield question, ours, theirs, measure, result


def _standard_error(values):
    return statistics.stdev(values) / math.sqrt(len(values))


@lru_cache
def t975(freedom, steps=20_000):
    """Student's t below which 97.5 % lie, for any degrees of freedom from 1 on."""
    # With t = sqrt(freedom) tan(x), 0 <= x < pi / 2, the density is in proportion to
    # cos(x) ** (freedom - 1). Half of its mass is at t < 0, so x is where 95 % of the other half
    # lie below.
    width = math.pi / 2 / steps
    density = [math.cos((i + 0.5) * width) ** (freedom - 1) for i in range(steps)]
    below = list(itertools.accumulate(density))
    wanted = 0.95 * below[-1]
    i = bisect.bisect(below, wanted)
    x = (i + 1 - (below[i] - wanted) / density[i]) * width
    return math.sqrt(freedom) * math.tan(x)
