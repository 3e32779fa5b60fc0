"""Seeds of an experiment: those that are published, and those that may stand beside them.

names = published_runs("eca", results)              # {name: config.json}
runs = [published_run(run, config, results), …]     # in the place of runs that would repeat them
finished_seeds(runs)                                # what can be published
"""

import argparse
import dataclasses
import importlib
import itertools
from functools import lru_cache

from analysis import published
from common import files
from common.errors import UserError
from sweeps import plans
from sweeps.experiments import EXPERIMENTS
from sweeps.publish import public_arguments, refuse_other_contents, restore
from training import arguments, devices, environment, mixed_precision


def published_runs(name, results):
    """{name: config.json} of an experiment's runs in results/. Raises UserError.

    {} if it isn't published. A directory that lacks runs and can't get them is refused.
    """
    directory, planned = results / name, EXPERIMENTS[name].run_names
    restore(directory)
    if not (directory / published.ABOUT).exists():
        refuse_other_contents(directory, {})
        return {}
    experiment = published.load(directory)
    runs = dict(zip(experiment.about["runs"], experiment.configs))
    missing, others = set(planned) - set(runs), set(runs) - set(planned)
    if missing and others:
        raise _other_results(directory, f"holds {min(others)}, which {name} doesn't have")
    if missing and EXPERIMENTS[name].source:
        reason = f"lacks {min(missing)}, which needs weights that aren't published"
        raise _other_results(directory, reason)
    return runs


def _other_results(directory, reason):
    return UserError(f"{directory} {reason}: choose another --results", 2)


def published_run(run, config, results):
    """A run as it is in results/. Raises UserError if it isn't the planned one."""
    path = results / run.path.parent.name / run.path.name
    parser = importlib.import_module(run.script).build_parser()
    args = argparse.Namespace(**public_arguments(vars(run.args)))
    messages = plans.differences(args, config, arguments.defaults(parser))
    if messages:
        reason = f"{path} is another run: {'; '.join(messages)}"
        raise UserError(f"{reason} (choose another --results)", 2)
    return dataclasses.replace(run, path=path, state="finished")


def check_conditions(run, config):
    """Raises UserError if a run that has begun computes otherwise than this machine would.

    config: its config.json. The seeds of an experiment have one precision and, where times matter,
    one name of the device and one number of threads.
    """
    args, timed = run.args, EXPERIMENTS[run.path.parent.name].timed
    device, threads = _machine(args.device)
    dtype = mixed_precision.amp_dtype_for(args.model, args.amp, devices.select_device(args.device))
    expected = {"precision": mixed_precision.name(dtype)}
    if timed:
        expected |= {"device": device, "threads": threads}
    for name, value in expected.items():
        if config.get(name) != value:
            reason = f"{name} is {config.get(name)} there and would be {value} here"
            hint = "continue on a machine like that one, or choose other directories"
            raise UserError(f"{run.path}: {reason}: {hint}", 2)


@lru_cache
def _machine(device):
    facts = environment.environment(devices.select_device(device))
    return facts["device"], facts["threads"]


def finished_seeds(runs):
    """The runs of the first seeds, up to the one that not all trainings have finished.

    runs: of an experiment, seed after seed.
    """
    by_seed = [list(group) for _, group in itertools.groupby(runs, lambda run: run.args.seed)]
    done = itertools.takewhile(lambda members: all(run.finished for run in members), by_seed)
    return [run for members in done for run in members]


def config_of(run):
    return files.read_json(run.path / "config.json")
