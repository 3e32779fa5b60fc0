"""Runs a list of experiments over several seeds and compares them.

    python sweep.py eca --seeds 0 1 2                              # three runs of each experiment
    python sweep.py degradation --only plain20 plain56 resnet20 resnet56 --epochs 30
    python sweep.py augmentation --model resnet20 --dry-run        # the commands and their cost
    python sweep.py zoo --jobs 4                                   # four runs at once, a GPU each
    python sweep.py zoo --launcher submitit --slurm-partition gpu  # a SLURM job array

    python sweep.py eca --publish results/sweep-eca                # a copy without weights
    python sweep.py publish RUN... --to results/x                  # the same for any runs
    python sweep.py report                                         # tables of results/
    python sweep.py campaign --budget 3h                           # what is missing in results/

sweeps/suites.py lists the suites. Other arguments are passed to the training script; they override
those of the suite, except for what it compares. Each run has a directory
runs/sweep-<suite>-<dataset>/<experiment>-s<seed> and a .log file next to it. The same command again
keeps finished runs, resumes interrupted ones and starts the others. A failed run doesn't stop the
others. At the end, results.md, .csv, .json and curves.png in the sweep's directory hold the means
over the seeds, and the differences that answer the questions of the suite.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from common import command_line
from common.errors import UserError
from common.scopes import words
from sweeps import commands, estimate, findings, launch, plans, publish
from sweeps.commands import COMMANDS
from sweeps.suites import DECIDED, SUITES
from training import arguments, environment, options


class Formatter(command_line.Formatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the list of suites."""


def training_parser():
    """The arguments of all training scripts, without defaults of a script."""
    parser = arguments.training_parser(__doc__, recipe={})
    arguments.add_options(parser, "suites of train_sota.py only", options.FITTING)
    return parser


def build_parser():
    """The arguments of a sweep, and those of the training scripts."""
    parser = training_parser()
    for action in parser._actions:
        if action.dest in DECIDED:
            action.help = argparse.SUPPRESS
        elif action.dest == "output_dir":
            action.help = "instead of runs/sweep-<suite>-<dataset>"
    add = parser.add_argument_group("sweep").add_argument
    count = dict(type=command_line.number(int, low=0), metavar="N")
    positive = dict(type=command_line.number(int, low=1), metavar="N")
    others = f"; {', '.join(COMMANDS)} have a --help of their own"
    add("suite", metavar="SUITE", choices=SUITES, help=f"one of the list below{others}")
    add("--seeds", **count, nargs="+", help="default: those of the suite, mostly 0 1 2")
    add("--only", nargs="+", default=[], metavar="NAME", help="run only these experiments")
    own = "each model's recipe instead of the suite's settings; same data and epochs"
    add("--own-recipes", action="store_true", help=own)
    jobs = "concurrent runs (default: 1; SLURM: all), each on a GPU or with a share of the CPU"
    add("--jobs", **positive, help=jobs)
    plan = "print the commands and their estimated cost, and exit"
    add("--dry-run", action="store_true", help=plan)
    add("--no-estimate", action="store_true", help="with --dry-run: don't time any steps")
    add("--publish", metavar="DIR", help="copy the finished runs to DIR, such as results/sweep-eca")
    add("--reference", **commands.REFERENCE)
    launchers = ("local", "submitit")
    add("--launcher", default="local", choices=launchers, help="submitit: a SLURM job array")
    add("--slurm-partition", metavar="NAME", help="the partition to submit to")
    add("--slurm-minutes", **positive, default=240, help="time limit of a run")
    gpus = dict(type=command_line.number(int, low=0, high=1), metavar="N")
    add("--slurm-gpus", **gpus, default=1, help="GPUs of a run: 1, or 0 on machines without")
    add("--slurm-cpus", **positive, default=4, help="CPU cores of a run")
    other = dict(action="append", default=[], metavar="KEY=VALUE")
    add("--slurm-arg", **other, help="another option of sbatch; repeatable")
    parser.formatter_class = Formatter
    lines = [f"  {name:<20}{suite.question}" for name, suite in SUITES.items()]
    parser.epilog = "\n".join(["suites and their questions:", *lines])
    return parser


def slurm_parameters(args, name, count):
    """The parameters of submitit.AutoExecutor for `count` runs. Raises UserError."""
    for pair in args.slurm_arg:
        if "=" not in pair:
            raise UserError(f"--slurm-arg must be KEY=VALUE, not {pair!r}", status=2)
    return dict(
        name=name,
        timeout_min=args.slurm_minutes,
        cpus_per_task=args.slurm_cpus,
        gpus_per_node=args.slurm_gpus or None,
        slurm_partition=args.slurm_partition,
        slurm_array_parallelism=args.jobs or count,
        slurm_additional_parameters=dict(pair.split("=", 1) for pair in args.slurm_arg),
    )


def execute(args, runs, todo, slots, parameters):
    """Executes the runs `todo`. Returns ({failed run: reason}, signal number or 0)."""
    if todo:
        plans.prepare(todo)
    start, estimate = launch.start_here, True
    if args.launcher == "submitit" and todo:
        jobs = launch.submit(todo, runs[0].path.parent / "submitit", parameters)
        start, estimate = (lambda run, slot: jobs[run]), False
    progress = launch.Progress(todo, len(runs), len(slots), estimate)
    return launch.execute(launch.in_order(todo), start, slots, progress.report)


def check_publication(args, runs, todo):
    """Raises UserError before runs start that could not be published."""
    target, seeds = Path(args.publish), " ".join(map(str, args.seeds))
    if sorted(args.seeds) != list(range(len(args.seeds))):
        raise UserError(f"--publish needs --seeds 0 to n-1, not {seeds}", 2)
    publish.refuse_other_contents(target, {run.path.name: {} for run in runs})
    for run in todo:
        if (target / run.path.name).exists():
            raise UserError(f"{target} holds another run {run.path.name}: remove it first", 2)
    git = environment.git_state()
    if not git or git["dirty"]:
        raise UserError("--publish needs an unmodified working tree: commit the changes first", 2)


def publish_runs(args, given, runs):
    """Copies the runs to --publish. Raises UserError."""
    suite = SUITES[args.suite]
    of_sweep = {"own_recipes": True} if args.own_recipes else {}
    public = {key: value for key, value in given.items() if key != "data_url"}
    chosen = words(publish.public_arguments(public) | of_sweep)
    for option, values in (("--seeds", args.seeds), ("--only", args.only)):
        chosen += [option, *map(str, values)] if values else []
    command = shlex.join(["python", "sweep.py", args.suite, *chosen])
    labels = {run.label for run in runs}
    comparisons = [row for row in suite.comparisons() if labels.issuperset(row[1:])]
    about = publish.about(suite.question, comparisons, command)
    publish.publish([run.path for run in runs], args.publish, about, args.reference)
    print(f"published in {args.publish}")


def follow(commands, here):
    """Executes the commands that follow the runs, or names them; returns whether all succeeded."""
    if commands and not here:
        print("then, on a machine like those of the runs:")
    succeeded = True
    for command in commands:
        print(shlex.join(command), flush=True)
        if here:
            succeeded &= subprocess.run(command, check=False).returncode == 0
    return succeeded


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return commands.main(argv[0], argv[1:])
    parser = build_parser()
    args = parser.parse_args(argv)
    args.seeds = args.seeds or list(SUITES[args.suite].seeds)
    repeated = {seed for seed in args.seeds if args.seeds.count(seed) > 1}
    if repeated:
        raise UserError(f"--seeds holds {min(repeated)} more than once", status=2)
    of_training = {action.dest for action in training_parser()._actions} - {"output_dir"}
    given = arguments.parse(parser, argv)
    given = {key: value for key, value in given.items() if key in of_training}
    directory = Path(args.output_dir) if args.output_dir else None
    runs = plans.plan(args.suite, given, args.seeds, directory, args.only, args.own_recipes)
    root = runs[0].path.parent
    todo = [run for run in runs if run.state != "finished"]
    if args.launcher == "local":
        slots = launch.find_slots(runs[0].args.device, args.jobs or 1)
    else:  # all are submitted at once; SLURM starts --jobs of them at a time
        slots = [None] * len(todo)
    parameters = slurm_parameters(args, root.name, len(todo))
    states = [run.state for run in runs]
    finished, interrupted, new = map(states.count, ("finished", "interrupted", "new"))
    text = f"{finished} finished, {interrupted} to resume, {new} to start"
    print(f"{root}: {len(runs)} runs, {text}", file=sys.stderr)
    afterwards = list(plans.afterwards(args.suite, root))
    if args.dry_run:
        for run in todo:
            print(shlex.join(run.command))
        for command in afterwards:
            print(shlex.join(command))
        jobs = min(args.jobs or len(slots), len(slots))
        with launch.threads_of(slots[0] if slots else None):
            estimate.print_plan(todo, jobs, timed=not args.no_estimate)
        return 0

    if args.publish and todo:
        check_publication(args, runs, todo)
    with plans.lock(root):
        failed, stopped = execute(args, runs, todo, slots, parameters)
        if stopped:
            done = sum(run.finished for run in runs)
            print(f"interrupted with {done} of {len(runs)} runs finished; the same command resumes")
            return 128 + stopped
        findings.report(args.suite, runs, root, shlex.join(["python", "sweep.py", *argv]))
        followed = not failed and follow(afterwards, args.launcher == "local")
    if failed:
        names = ", ".join(run.path.name for run in failed)
        counts = f"{len(failed)} of {len(runs)}"
        print(f"{counts} runs failed: {names} (see {root}/*.log)", file=sys.stderr)
    elif args.publish:
        publish_runs(args, given, runs)
    return 0 if followed else 1


if __name__ == "__main__":
    command_line.run(main)
