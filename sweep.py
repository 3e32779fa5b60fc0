"""Runs a list of experiments over seeds, and says what their differences are worth.

    python sweep.py eca --seeds 0 1 2                                 # each experiment three times, then the tables
    python sweep.py ghost --epochs 30 --batch-size 256 --dry-run      # the commands; other arguments are the script's
    python sweep.py zoo --jobs 4                                      # four runs at once, each on a GPU of its own
    python sweep.py zoo --launcher submitit --slurm-partition gpu     # a SLURM job array (needs pip install submitit)

The suites stand in sweeps/suites.py. A run lies in runs/sweep-<suite>-<dataset>/<experiment>-s<seed>, and what it printed
beside it, in a .log. The same command given again leaves finished runs alone, goes on with those that were cut off and makes
the others. A run that fails stops none of the rest. At the end results.md and curves.png, in the same directory, hold the
means over the seeds, and for each question of the suite the difference that answers it, with its standard error and a 95 %
interval.
"""

import argparse
import difflib
import shlex
import sys
from pathlib import Path

from common import command_line
from common.errors import UserError
from training import arguments


def suite(name):
    """An argparse type: a name of SUITES."""
    from sweeps.suites import SUITES

    if name not in SUITES:
        near = difflib.get_close_matches(name, SUITES, n=3, cutoff=0.4)
        hint = (
            f"did you mean {' or '.join(near)}?" if near else f"the suites are {', '.join(SUITES)}"
        )
        raise argparse.ArgumentTypeError(f"unknown suite {name!r}: {hint}")
    return name


def build_parser():
    """A sweep's own arguments, and a training script's, which hold for all runs, but for those that a suite decides."""
    from sweeps.suites import DECIDED, SUITES

    parser = arguments.training_parser(__doc__.split("\n")[0], model=None, epochs=None)
    for action in parser._actions:
        if action.dest in DECIDED:
            action.help = argparse.SUPPRESS
        elif action.dest == "output_dir":
            action.help = "instead of runs/sweep-<suite>-<dataset>"
    group = parser.add_argument_group("sweep")
    group.add_argument("suite", metavar="SUITE", type=suite, help=f"one of {', '.join(SUITES)}")
    group.add_argument(
        "--seeds",
        type=command_line.number(int, low=0),
        nargs="+",
        default=[0, 1, 2],
        metavar="N",
        help="a run for each",
    )
    group.add_argument(
        "--jobs",
        type=command_line.number(int, low=1),
        metavar="N",
        help="runs at once (1; of SLURM, all): a GPU each, or shares of the CPU's threads",
    )
    group.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    group.add_argument(
        "--launcher",
        default="local",
        choices=("local", "submitit"),
        help="submitit: a SLURM job array",
    )
    group.add_argument("--slurm-partition", metavar="NAME", help="where to queue")
    group.add_argument(
        "--slurm-minutes",
        type=command_line.number(int, low=1),
        default=240,
        metavar="N",
        help="time limit of a run",
    )
    group.add_argument(
        "--slurm-gpus",
        type=command_line.number(int, low=0),
        default=1,
        metavar="N",
        help="of a run",
    )
    group.add_argument(
        "--slurm-cpus",
        type=command_line.number(int, low=1),
        default=4,
        metavar="N",
        help="of a run",
    )
    group.add_argument(
        "--slurm-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another of sbatch's; repeatable",
    )
    return parser


def slurm_parameters(args, name, count):
    """What submitit.AutoExecutor takes. Raises UserError."""
    for pair in args.slurm_arg:
        if "=" not in pair:
            raise UserError(f"--slurm-arg takes key=value, not {pair!r}", 2)
    return dict(
        name=name,
        timeout_min=args.slurm_minutes,
        cpus_per_task=args.slurm_cpus,
        gpus_per_node=args.slurm_gpus or None,
        slurm_partition=args.slurm_partition,
        slurm_array_parallelism=args.jobs or count,
        slurm_additional_parameters=dict(pair.split("=", 1) for pair in args.slurm_arg),
    )


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args = parser.parse_args(argv)
    twice = {seed for seed in args.seeds if args.seeds.count(seed) > 1}
    if twice:
        raise UserError(f"--seeds names {min(twice)} twice", 2)
    from sweeps import (
        findings,  # here, where Ctrl-C ends with a line while torch is being imported, too
        launch,
        plans,
    )

    of_runs = {
        action.dest for action in arguments.training_parser("", model=None, epochs=None)._actions
    } - {"output_dir"}
    given = {
        key: value for key, value in command_line.explicit(parser, argv).items() if key in of_runs
    }
    runs = plans.plan(
        args.suite, given, args.seeds, Path(args.output_dir) if args.output_dir else None
    )
    root, todo = runs[0].path.parent, [run for run in runs if run.state != "finished"]
    here = args.launcher == "local"
    places = launch.places(runs[0].args.device, args.jobs or 1) if here else todo
    parameters = slurm_parameters(args, root.name, len(todo))
    states = [run.state for run in runs]
    print(
        f"{root}: {len(runs)} runs, {states.count('finished')} finished, {states.count('cut off')} to go on with, "
        f"{states.count('new')} to start",
        file=sys.stderr,
    )
    if args.dry_run:
        for run in todo:
            print(shlex.join(run.command))
        return 0

    with plans.occupy(root):
        if todo:
            plans.check_data(todo[0].args)
        for run in todo:
            if run.state == "new":  # killed before its first checkpoint, perhaps
                for leftover in ("config.json", "summary.json"):
                    (run.path / leftover).unlink(missing_ok=True)
        jobs = launch.submit(todo, root / "submitit", parameters) if todo and not here else {}
        start = launch.start_here if here else lambda run, place: jobs[run]
        progress = launch.Progress(runs, len(places), estimate=here)
        failed, stopped = launch.execute(todo, start, places, progress)
        if stopped:
            done = sum(run.finished for run in runs)
            print(f"interrupted with {done} of {len(runs)} runs finished; the same command goes on")
            return 128 + stopped
        findings.report(args.suite, runs, root, shlex.join(["python", "sweep.py", *argv]))
    if failed:
        names = ", ".join(run.path.name for run in failed)
        print(
            f"{len(failed)} of {len(runs)} runs failed: {names} (see {root}/*.log)", file=sys.stderr
        )
    return 1 if failed else 0


if __name__ == "__main__":
    command_line.run(main)
