"""The commands of sweep.py that are not suites: publish, report and campaign.

python sweep.py publish runs/a-s0 runs/a-s1 --to results/a     # copies runs without weights
python sweep.py report                                        # tables of results/
python sweep.py campaign --budget 3h                          # what is missing in results/
"""

import argparse
import math
import os
import sys
from pathlib import Path

from analysis import published
from analysis.replicates import label_of
from common import command_line, files
from common.errors import UserError
from sweeps import campaign, launch, plans, results
from sweeps.experiments import EXPERIMENTS
from sweeps.publish import about, publish, run_directories
from training import environment

REFERENCE = {
    "action": "store_true",
    "help": "publish runs of different commits where short runs of each agree",
}


def budget(text):
    try:
        return campaign.seconds_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def publish_parser():
    parser = command_line.Parser(
        "Copies finished runs into results/, without weights: all or none."
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run directories, or directories of runs")
    add("--to", required=True, metavar="DIR", help="where to publish, such as results/eca")
    add("--title", help="what is compared (default: as published before, or the name of DIR)")
    add("--baseline", metavar="LABEL", help="differences are taken from the runs LABEL-s0, ...")
    add("--reference", **REFERENCE)
    return parser


def report_parser():
    parser = command_line.Parser(
        "Makes results/README.md, each curves.svg, docs/results.html and the table in README.md."
    )
    parser.add_argument("--results", default="results", metavar="DIR", help="published experiments")
    return parser


def campaign_parser():
    parser = command_line.Parser("Runs and publishes experiments, the cheapest first.")
    add = parser.add_argument
    time = dict(type=budget, default=math.inf, metavar="TIME")
    limit = "time for the runs, such as 90m, 3h or 1h30m"
    add("--budget", **time, help=limit).shown_default = "no limit"
    names = ", ".join(EXPERIMENTS)
    only = dict(nargs="+", choices=EXPERIMENTS, metavar="NAME")
    add("--only", **only, help=f"from {names}")
    add("--output-dir", default="runs/campaign", metavar="DIR", help="directory of the runs")
    add("--results", default="results", metavar="DIR", help="where published runs are")
    add("--data-dir", default="data", metavar="DIR", help="directory of the archives")
    for name in ("cifar10", "cifar100"):
        text = f"take {name} from a folder of images, as --dataset folder does"
        add(f"--{name}-dir", metavar="DIR", help=text)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    jobs = dict(type=command_line.number(int, low=1), default=1, metavar="N")
    add("--jobs", **jobs, help="concurrent runs, each on a GPU or with a share of the CPU")
    add("--dry-run", action="store_true", help="print the missing runs with estimated times")
    return parser


def publish_runs(args):
    directories = run_directories(args.runs)
    labels = dict.fromkeys(label_of(path.resolve().name) for path in directories)
    target = Path(args.to)
    text = about(target.name, [], command=None)
    before = files.read_json(target / published.ABOUT)
    text |= {key: value for key, value in before.items() if key != "reference"}  # of these runs
    if args.title:
        text["title"] = args.title
    if args.baseline:
        if args.baseline not in labels:
            raise UserError(f"--baseline {args.baseline}: the labels are {', '.join(labels)}", 2)
        others = [label for label in labels if label != args.baseline]
        questions = [[f"against {args.baseline}?", label, args.baseline] for label in others]
        text["comparisons"] = questions
    publish(directories, target, text, args.reference)
    print(f"{len(directories)} runs published in {target}")
    return 0


def report(args):
    if not Path(args.results).is_dir():
        raise UserError(f"--results {args.results}: there is no such directory", status=2)
    directory = Path(args.results).resolve()
    if not published.find(directory):
        raise UserError(f"--results {args.results} holds no published experiment", status=2)
    for path in results.write(directory.parent, directory):
        print(os.path.relpath(path))
    return 0


def run_campaign(args):
    folders = {"cifar10": args.cifar10_dir, "cifar100": args.cifar100_dir}
    folders = {name: folder for name, folder in folders.items() if folder}
    for name, folder in folders.items():
        if not Path(folder).is_dir():
            raise UserError(f"--{name}-dir {folder}: there is no such folder", status=2)
    if len({Path(folder).name for folder in folders.values()}) < len(folders):
        # Published runs have only the names of their folders.
        raise UserError("--cifar10-dir and --cifar100-dir must have different names", status=2)
    root = Path(args.output_dir)
    if Path(args.results).exists() and not Path(args.results).is_dir():
        raise UserError(f"--results {args.results} is not a directory", status=2)
    given = {"data_dir": args.data_dir, "device": args.device}
    options = campaign.Options(root, Path(args.results), folders, given, args.jobs)
    names = args.only or list(EXPERIMENTS)
    if args.dry_run:
        planned = campaign.Campaign(names, options)
        for _, name in planned.by_cost():
            for run in planned.missing(name):
                print(f"{run.path}: {run.state}, about {launch.clock(planned.seconds(run))}")
        planned.report()
        return 0
    warn_of_changes()
    with plans.lock(root):
        return campaign.Campaign(names, options).run(args.budget)


def warn_of_changes():
    git = environment.git_state()
    if not git or git["dirty"]:
        reason = "is modified" if git else "is not in git"
        print(f"the working tree {reason}: nothing will be published", file=sys.stderr)


COMMANDS = {
    "publish": (publish_parser, publish_runs),
    "report": (report_parser, report),
    "campaign": (campaign_parser, run_campaign),
}


def main(name, argv):
    build_parser, run = COMMANDS[name]
    parser = build_parser()
    parser.prog += f" {name}"
    return run(parser.parse_args(argv))
