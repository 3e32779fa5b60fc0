"""A campaign: the experiments of experiments.py, the cheapest first, within a budget of time.

    Campaign(EXPERIMENTS, options).run(seconds)        # exit status

Runs are processes of the training scripts in <root>/<experiment>/<run>, as many at a time as asked.
Finished runs are kept, interrupted ones resume, and published ones are not repeated. A run starts
only if its estimated time fits into what is left of the budget; one that takes longer is
interrupted at the end, and resumes in the next campaign. A seed is published when all trainings of
its experiment have finished it and those before it. Seeds of trainings that need weights are
published together.
"""

import argparse
import importlib
import math
import re
import shlex
import statistics
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

import models
from common import command_line, files
from common.errors import UserError
from datasets.archives import ARCHIVES
from sweeps import estimate, launch, plans, reference, seeds
from sweeps.experiments import EXPERIMENTS, repeat_command
from sweeps.publish import about, commits_of, publish, refuse_unknown_code, script_of
from training import environment

TRAIN_IMAGES, TEST_IMAGES, _ = estimate.SIZES["cifar10"]
START_SECONDS = 20  # of a process until its first step, and after its last one


class Options(NamedTuple):
    """root, results: directories; folders: {dataset: folder of its images}; given: arguments.

    jobs: how many runs at a time.
    """

    root: Path
    results: Path
    folders: dict
    given: dict
    jobs: int = 1


def seconds_of(text):
    """Seconds of a budget such as 90m, 3h or 1h30m. Raises ValueError."""
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?", text)
    hours, minutes = (float(number or 0) for number in match.groups()) if match else (0, 0)
    seconds = 3600 * hours + 60 * minutes
    if not 0 < seconds < math.inf:
        raise ValueError(f"must be a time such as 90m, 3h or 1h30m, not {text!r}")
    return seconds


def plan(name, options):
    """The runs of an experiment, seed after seed. Raises UserError."""
    experiment = EXPERIMENTS[name]
    parser = importlib.import_module(experiment.script).build_parser()
    weights = str(options.root / experiment.source / "last.pt")
    runs = []
    for run_name in experiment.run_names:
        label, _, seed = run_name.rpartition("-s")
        words = shlex.split(f"{experiment.shared} {experiment.trainings[label]}")
        words = [weights if word == "SOURCE_WEIGHTS" else word for word in words]
        given = command_line.explicit(parser, words) | options.given | {"seed": int(seed)}
        dataset = given.get("dataset", "cifar10")
        if dataset in options.folders:
            given |= {"dataset": "folder", "data_dir": options.folders[dataset]}
        path = options.root / name / run_name
        runs.append(plans.make_run(label, path, experiment.script, given, parser))
    return runs


@lru_cache
def _macs(model, options):
    settings = models.parse_options(list(options), model)
    return models.describe(model, 10, 32, settings)[1]


def work(run):
    """(multiply-accumulates of training, and of evaluation) of a whole run."""
    args = run.args
    macs = _macs(args.model, tuple(args.model_arg))
    passes = math.ceil(args.epochs / args.eval_every)
    training = 3 * args.epochs * (args.limit_train or TRAIN_IMAGES)  # backward: twice the forward
    return macs * training, macs * passes * (args.limit_test or TEST_IMAGES)


def measured_speed(run, slot):
    """Multiply-accumulates per second of a run, by a few timed steps; infinite if they fail.

    A run that can't start here is to say so itself. Frozen backbones are timed as trained ones.
    slot: of launch.find_slots; it may limit the run's threads.
    """
    args = argparse.Namespace(**vars(run.args) | {"freeze_backbone": False})
    try:
        with launch.threads_of(slot):
            return sum(work(run)) / estimate.cost(args)[0]
    except UserError as error:
        print(f"{run.path}: no estimate ({error})", file=sys.stderr)
        return math.inf
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # for the runs


class Campaign:
    """The runs of the experiments that results/ lacks, in whole or in part.

    Raises UserError if none can run.
    """

    def __init__(self, names, options):
        self.options, self.failed = options, {}
        # By the name of the experiment; settled: how many runs are published, math.inf after a
        # publication that was refused.
        self.runs, self.sources, self.refused, self.settled = {}, {}, {}, {}
        for name in names:
            self._unless_refused(name, self._add_runs)
        for name in [name for name in self.runs if EXPERIMENTS[name].source]:
            self._unless_refused(name, self._add_source)
        self._refuse_if_none_is_left()
        self.slots = launch.find_slots(options.given.get("device", "auto"), options.jobs)
        self.timed_speeds = {}  # multiply-accumulates per second of a few steps, see _kind
        self._update_speeds()

    def _refuse_if_none_is_left(self):
        if self.refused and not self.runs:
            raise next(iter(self.refused.values()))

    def _unless_refused(self, name, check):
        """Calls check(name). An experiment whose directories hold something else is left out."""
        try:
            check(name)
        except UserError as error:
            self.refused[name] = error
            self.runs.pop(name, None)
            self.sources.pop(name, None)

    def _add_runs(self, name):
        results = self.options.results
        in_results = seeds.published_runs(name, results)
        if set(EXPERIMENTS[name].run_names) <= set(in_results):
            return
        runs = plan(name, self.options)
        for i, run in enumerate(runs):
            config = in_results.get(run.path.name)
            if config:
                runs[i] = seeds.published_run(run, config, results)
            if runs[i].state != "new":
                seeds.check_conditions(runs[i], config or seeds.config_of(run))
        self.runs[name], self.settled[name] = runs, len(in_results)

    def _add_source(self, name):
        """Finds the run whose weights an experiment needs."""
        source = EXPERIMENTS[name].source
        other = source.split("/")[0]
        runs = [*self.runs.get(other, []), *plan(other, self.options)]  # published: no weights
        run = next(run for run in runs if run.path == self.options.root / source)
        if run.state != "new":
            seeds.check_conditions(run, seeds.config_of(run))
        self.sources[name] = run

    def _kind(self, run):
        """Runs of the same kind have the same speed: those that are timed have all threads."""
        args, timed = run.args, self._is_timed(run)
        model = (args.model, tuple(args.model_arg))
        return *model, args.optimizer, args.progressive, args.freeze_backbone, args.amp, timed

    def _update_speeds(self):
        """Multiply-accumulates per second of the runs that were finished on this machine."""
        self.speeds = {}
        for run in [run for runs in self.runs.values() for run in runs]:
            path = self.options.root / run.path.parent.name / run.path.name
            summary = files.read_json(path / "summary.json") if run.finished else {}
            seconds = summary.get("train_seconds", 0) + summary.get("eval_seconds", 0)
            # A run that is published may have begun here, too.
            if seconds and summary.get("status") == "finished":
                self.speeds.setdefault(self._kind(run), []).append(sum(work(run)) / seconds)

    def missing(self, name):
        """The runs that an experiment still needs, in their order; none if its source failed."""
        source = self.sources.get(name)
        if source in self.failed:
            return []
        runs = [run for run in [source, *self.runs[name]] if run and not run.finished]
        return [run for run in runs if run not in self.failed]

    def seconds(self, run):
        """Estimated time of a run: at the speed of the finished ones of its kind, or as timed."""
        kind, done = self._kind(run), 0.0
        if kind not in self.speeds and kind not in self.timed_speeds:
            self.timed_speeds[kind] = measured_speed(run, self._slot_for(run, self.slots[0]))
        speed = statistics.median(self.speeds.get(kind) or [self.timed_speeds[kind]])
        if run.state == "interrupted":
            done = min(1.0, run.summary.get("epochs", 0) / run.args.epochs)
        return START_SECONDS + (1 - done) * sum(work(run)) / speed

    def by_cost(self):
        """[(seconds, experiment)] of those that lack runs, the cheapest first."""
        costs = []
        for name in self.runs:
            times = [self.seconds(run) for run in self.missing(name)]
            if times:
                jobs = 1 if EXPERIMENTS[name].timed else self.options.jobs
                costs.append((max(sum(times) / jobs, *times), name))
        return sorted(costs)

    def next_run(self, seconds, active=()):
        """The run to start with so many seconds left; None if there is none.

        active: the runs that have started already.
        """
        if any(self._is_timed(run) for run in active):
            return None
        for _, name in self.by_cost():
            for run in self.missing(name):
                if run not in active and self.seconds(run) <= seconds:
                    return None if active and self._is_timed(run) else run
                if run is self.sources.get(name):
                    break  # the others need its weights
        return None

    def _is_timed(self, run):
        return EXPERIMENTS[run.path.parent.name].timed

    def _slot_for(self, run, slot):
        """The environment of a run: one whose time matters has all threads."""
        if not self._is_timed(run):
            return slot
        return {key: value for key, value in slot.items() if key != "OMP_NUM_THREADS"}

    def run(self, budget):
        """Runs and publishes what fits into so many seconds; returns the exit status."""
        self._check_data()
        for name in list(self.runs):
            self._unless_refused(name, self._check_code)
        self._refuse_if_none_is_left()
        for name in self.runs:
            self._publish(name)
        self.by_cost()  # times the models, while Ctrl-C still ends this process
        end = time.monotonic() + budget
        runs = [*self.sources.values(), *(run for runs in self.runs.values() for run in runs)]
        todo = [run for run in dict.fromkeys(runs) if not run.finished]
        progress = launch.Progress(todo, len(set(runs)), 1, estimate=False)
        started = []

        def choose(active):
            return self.next_run(end - time.monotonic(), active)

        def start(run, slot):
            started.append(run)
            run.path.parent.mkdir(parents=True, exist_ok=True)
            plans.remove_leftovers(run)
            expected = launch.clock(self.seconds(run))
            print(f"{run.path.parent.name}: {run.path.name}, about {expected}", flush=True)
            return launch.start_here(run, self._slot_for(run, slot))

        def run_ended(run, seconds, failure):
            progress.report(run, seconds, failure)
            if failure:
                self.failed[run] = failure
            self._update_speeds()
            self._publish(run.path.parent.name, with_reference=False)

        _, number = launch.execute(choose, start, self.slots, run_ended, end)
        for run in started:
            if not run.finished and run not in self.failed:
                reason = "interrupted" if number else "the budget is used up"
                print(f"{reason}; the same command resumes {run.path}")
        if number:
            return 128 + number
        for name in self.runs:
            self._publish(name)
        self.report()
        return 1 if self.failed or self.refused else 0

    def _check_data(self):
        missing = [run for name in self.runs for run in self.missing(name)]
        for run in {(run.args.dataset, run.args.data_dir): run for run in missing}.values():
            split = plans.check_data(run.args)
            for name, folder in self.options.folders.items():
                classes = ARCHIVES[name].num_classes
                if run.args.data_dir == folder and split.num_classes != classes:
                    reason = f"has {split.num_classes} classes, {name} has {classes}"
                    raise UserError(f"--{name}-dir {folder} {reason}", 2)

    def _check_code(self, name):
        """Raises UserError if what has begun can't be published with what this code will add."""
        git = environment.git_state()
        begun = [run.path for run in self.runs[name] if run.state != "new"]
        if not begun or not self.missing(name) or not git or git["dirty"]:
            return
        short_runs = set()
        for path in begun:
            config = files.read_json(path / "config.json")
            refuse_unknown_code(path, config)
            short_runs.add(reference.short_run(script_of(config), config))
        earlier = commits_of(begun) - {git["commit"]}
        reference.agree([git["commit"], *sorted(earlier)], short_runs)

    def _publish(self, name, with_reference=True):
        """Publishes the finished seeds of an experiment, and prints where to, or why not.

        with_reference: also runs of different code, if short runs agree.
        """
        runs = self.runs.get(name, [])  # none if a run of it is a source only
        finished, experiment = seeds.finished_seeds(runs), EXPERIMENTS[name]
        is_ready = len(finished) == len(runs) or not experiment.source
        if not is_ready or len(finished) <= self.settled.get(name, 0):
            return
        target, directories = self.options.results / name, [run.path for run in finished]
        names = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
        folders = {Path(path).name: names[key] for key, path in self.options.folders.items()}
        more = {"data": names | folders}
        if experiment.timed:
            more["timed"] = True
        if experiment.selected_on_test:
            more["selected_on_test"] = experiment.selected_on_test
        command = repeat_command(name, self._folders_of(name))
        text = about(experiment.title, experiment.comparisons, command, **more)
        count = f"{len({run.args.seed for run in finished})} of {experiment.n} seeds"
        try:
            if not with_reference and not reference.same_code(commits_of(directories)):
                return
            publish(directories, target, text, with_reference)
            self.settled[name] = len(finished)
            print(f"{name}: {count} published in {target}", flush=True)
        except (UserError, OSError) as error:
            self.settled[name] = math.inf
            print(f"{name}: {count} finished, but left unpublished: {error}", flush=True)

    def _folders_of(self, name):
        """{dataset: folder of its images} that an experiment, or its source, takes."""
        runs = [*self.runs[name], *filter(None, [self.sources.get(name)])]
        used = {run.args.data_dir for run in runs}
        return {key: path for key, path in self.options.folders.items() if path in used}

    def report(self):
        """Prints what is left, and what failed."""
        if not self.runs and not self.refused:
            print("nothing to run: all of it is published; see docs/usage.md to repeat it")
        for cost, name in self.by_cost():
            count = len(self.missing(name))
            print(f"{name}: {count} to run, about {launch.clock(cost)}")
        for name, source in self.sources.items():
            if source in self.failed:
                print(f"{name}: left out, because its weights, {source.path}, failed")
        for run, reason in self.failed.items():
            print(f"{run.path} failed: {reason}")
        for name, error in self.refused.items():
            print(f"{name}: left out: {error}")
