"""Runs a list of experiments over seeds, and says what their differences are worth.

    python sweep.py eca --seeds 0 1 2                                 # each experiment three times, then the tables
    python sweep.py ghost --epochs 30 --batch-size 256 --dry-run      # the commands; other arguments are the script's
    python sweep.py zoo --jobs 4                                      # four runs at once, each on a GPU of its own
    python sweep.py zoo --launcher submitit --slurm-partition gpu     # a SLURM job array (needs pip install submitit)

The suites stand in suites.py. A run lies in runs/sweep-<suite>-<dataset>/<experiment>-s<seed>, and what it printed beside it,
in a .log. The same command given again leaves finished runs alone, goes on with those that were cut off and makes the others.
A run that fails stops none of the rest. At the end results.md and curves.png, in the same directory, hold the means over the
seeds, and for each question of the suite the difference that answers it, with its standard error and a 95 % interval.
"""

import argparse
import contextlib
import difflib
import importlib
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import checkpoint
import cli
import curves
import data
import experiment
import launch
import metrics
import models
import replicates
import rundir
import tables
from errors import UserError
from suites import SUITES

HERE = Path(__file__).resolve().parent
# Arguments of a training script that a suite decides, and those that say where a run is made or lies, not what it is.
DECIDED = {"model", "model_arg", "pretrained", "list_models", "seed", "tag", "resume", "resume_previous", "config"}
PLACE = {"device", "data_dir", "data_url", "output_dir", "resume", "resume_previous", "config"}
NOTE = """\
Differences are of final test accuracy, in points, experiment minus baseline. Standard errors are over seeds: of the mean of
the pairs' differences where the seeds pair, else Welch's. Intervals are 95 %, by Student's t. They speak of other seeds, not
of other pictures, and each for itself: of twenty rows without any difference, one is expected to look resolved.
"""


def suite(name):
    """An argparse type: a name of SUITES."""
    if name not in SUITES:
        near = difflib.get_close_matches(name, SUITES, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the suites are {', '.join(SUITES)}"
        raise argparse.ArgumentTypeError(f"unknown suite {name!r}: {hint}")
    return name


def build_parser():
    """A sweep's own arguments, and a training script's, which hold for all runs, but for those that a suite decides."""
    parser = cli.training_parser(__doc__.split("\n")[0], model=None, epochs=None)
    for action in parser._actions:
        if action.dest in DECIDED:
            action.help = argparse.SUPPRESS
        elif action.dest == "output_dir":
            action.help = "instead of runs/sweep-<suite>-<dataset>"
    group = parser.add_argument_group("sweep")
    group.add_argument("suite", metavar="SUITE", type=suite, help=f"one of {', '.join(SUITES)}")
    group.add_argument("--seeds", type=cli.number(int, low=0), nargs="+", default=[0, 1, 2], metavar="N", help="a run for each")
    group.add_argument("--jobs", type=cli.number(int, low=1), metavar="N",
                       help="runs at once (1; of SLURM, all): a GPU each, or shares of the CPU's threads")  # fmt: skip
    group.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    group.add_argument("--launcher", default="local", choices=("local", "submitit"), help="submitit: a SLURM job array")
    group.add_argument("--slurm-partition", metavar="NAME", help="where to queue")
    group.add_argument("--slurm-minutes", type=cli.number(int, low=1), default=240, metavar="N", help="time limit of a run")
    group.add_argument("--slurm-gpus", type=cli.number(int, low=0), default=1, metavar="N", help="of a run")
    group.add_argument("--slurm-cpus", type=cli.number(int, low=1), default=4, metavar="N", help="of a run")
    group.add_argument("--slurm-arg", action="append", default=[], metavar="KEY=VALUE", help="another of sbatch's; repeatable")
    return parser


# ---- which runs ------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Run:
    """One training: its experiment and place, its script, arguments given and resolved, and how far it was at the start."""

    label: str
    path: Path
    script: str
    given: dict
    args: argparse.Namespace
    state: str = "new"  # or "cut off", or "finished"

    @property
    def start(self):
        return [*python(self.script), *words(self.given), "--output-dir", str(self.path)]

    @property
    def go_on(self):
        place = {key: self.given[key] for key in PLACE if key in self.given}
        return [*python(self.script), "--resume", str(self.path), *words(place)]

    @property
    def command(self):
        return self.go_on if self.state == "cut off" else self.start

    @property
    def log(self):
        return self.path.with_name(f"{self.path.name}.log")

    @property
    def summary(self):
        return metrics.read_json(self.path / "summary.json")

    @property
    def finished(self):
        return self.summary.get("status") == "finished"


def python(script):
    """The beginning of a command line that runs a script of this repository."""
    return [sys.executable, str(HERE / f"{script}.py")]


def flag(name):
    return f"--{name.replace('_', '-')}"


def words(values):
    """Arguments by name as words of a command line."""
    out = []
    for name, value in values.items():
        for item in value if isinstance(value, list) else [value]:
            out += [flag(name)] if item is True else [flag(name), "auto" if item is None else str(item)]
    return out


def plan(name, given, seeds, root):
    """The suite's runs, seed after seed, so that the first of them compare all experiments already. Raises UserError."""
    chosen = SUITES[name]
    parser = importlib.import_module(chosen.script).build_parser()
    common = cli.explicit(parser, shlex.split(chosen.common))
    own = {label: cli.explicit(parser, shlex.split(text)) for label, text in chosen.experiments.items()}
    given = _weights_for_published(name, given, common, own)
    needed = {(common | values)["model"] for values in own.values()}
    missing = sorted(model for model in needed - set(models.MODELS) if not model.startswith("timm/"))
    if missing or not own:
        lacks = f"needs models that are not there: {', '.join(missing)}" if own else "has no experiments: no model is for it"
        raise UserError(f"the suite {name} {lacks} (train.py --list-models shows what there is)", 2)
    decided = sorted(set(given) & DECIDED.union(*own.values()))
    if decided:
        raise UserError(f"{', '.join(map(flag, decided))}: the suite decides that{' (see --seeds)' * ('seed' in decided)}", 2)
    runs = []
    for seed in seeds:
        for label, values in own.items():
            asked = common | given | values | {"seed": seed}
            args, _, _ = experiment.arguments(parser, words(asked))
            models.parse_options(args.model_arg, args.model)
            place = root or Path("runs") / f"sweep-{name}-{args.dataset}"
            runs.append(Run(label, place / f"{label}-s{seed}", chosen.script, asked, args))
            runs[-1].state = standing(runs[-1])
    return runs


def _weights_for_published(name, given, common, own):
    """The arguments without --weights FILE, which takes the place of --pretrained in the experiments. Raises UserError."""
    if "weights" not in given:
        return given
    held = [each for each in (common, *own.values()) if each.get("pretrained")]
    if len({(common | values)["model"] for values in own.values() if (common | values).get("pretrained")}) != 1:
        raise UserError(f"--weights: the suite {name} has not one model that starts from published weights", 2)
    for each in held:
        del each["pretrained"]
        each["weights"] = given["weights"]
    return {key: value for key, value in given.items() if key != "weights"}


def standing(run):
    """How far a run is. Raises UserError where its directory holds another run, or is being written."""
    held = [name for name in rundir.FILES if (run.path / name).exists()]
    if not held:
        rundir.refuse_if_taken(run.path)
        return "new"
    config = metrics.read_json(run.path / "config.json")
    if not isinstance(config.get("arguments"), dict):
        raise UserError(f"{run.path} holds {', '.join(held)}, but no config.json that can be read: remove it", 2)
    wrong = []
    for key, value in vars(run.args).items():
        there = config["arguments"].get(key, value)
        automatic = value is None and config.get("from", {}).get(key) == "auto"
        placed = key in PLACE and not (key == "data_dir" and run.args.dataset == "folder")
        if there != value and not automatic and not placed:
            wrong.append(f"{flag(key)} is {there} there, not {'auto' if value is None else value}")
    if wrong:
        raise UserError(f"{run.path} holds another run: {'; '.join(wrong)} (another --output-dir leaves it alone)", 2)
    if not run.finished:
        wait_until_free(run.path)
    return "finished" if run.finished else "cut off" if (run.path / "last.pt").is_file() else "new"


def wait_until_free(path, seconds=10):
    """Gives a run whose sweep was killed the time to save. Raises UserError where a process stays at it."""
    end = time.monotonic() + seconds
    while True:
        try:
            return rundir.RunDir(path).close()
        except UserError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


# ---- what came out ---------------------------------------------------------------------------------------------------


def report(name, runs, root, command):
    """Prints the tables of the finished runs, and writes results.md and curves.png."""
    finished, chosen = [run for run in runs if run.finished], SUITES[name]
    if not finished:
        return
    groups = {label: [run for run in finished if run.label == label] for label in chosen.experiments}
    groups = {label: [metrics.Run(run.path / "metrics.csv") for run in group] for label, group in groups.items() if group}
    means, answers = [replicates.Group(*each) for each in groups.items()], list(differences(chosen.questions, finished))
    experiments = tables.compare(means, ("experiment", "n", "test", "train", "parameters", "gmacs")).cells()
    curves.draw(means, root / "curves.png")

    text = f"# {name}: {chosen.title}\n\n    {command}\n\n{origin(finished)}\n\n"
    text += f"{tables.markdown_table(experiments)}\n![means over seeds](curves.png)\n"
    tables.print_table(experiments)
    if answers:
        text += f"\n{tables.markdown_table(answers)}\n{NOTE}"
        print()
        tables.print_table(answers)
    absent = [run.path.name for run in runs if run not in finished]
    text += f"\nNot finished: {', '.join(absent)}.\n" if absent else ""
    with checkpoint.replacing(root / "results.md", "w") as file:
        file.write(text)
    print(f"\ntables: {root / 'results.md'}  curves: {root / 'curves.png'}")


def differences(questions, finished):
    """A row of the table for each pair of experiments that a question names and that has runs."""
    summaries = {}
    for run in finished:
        summaries.setdefault(run.label, {})[run.args.seed] = run.summary
    for question, ours, theirs in questions:
        if ours not in summaries or theirs not in summaries:
            continue
        a, b = ({seed: found["test_acc"] for seed, found in summaries[label].items()} for label in (ours, theirs))
        found = replicates.difference(a, b)
        size, base = (next(iter(summaries[label].values()))["parameters"] for label in (ours, theirs))
        yield {
            "experiment": ours,
            "baseline": theirs,
            "difference": f"{found.value:+.2f}",
            "std error": "" if found.error is None else f"{found.error:.2f}",
            "95 % interval": "" if found.error is None else f"{found.low:+.2f} to {found.high:+.2f}",
            "n": found.n,
            "verdict": found.verdict,
            "parameters": f"{100 * (size / base - 1):+.1f} %",
            "question": question,
        }


def origin(finished):
    """What the runs were made from and on, as their config.json says."""
    configs = [metrics.read_json(run.path / "config.json") for run in finished]
    commits = [config.get("git") or {"commit": "unknown", "dirty": False} for config in configs]
    facts = {
        "dataset": [run.args.dataset for run in finished],
        "epochs": [run.args.epochs for run in finished],
        "seeds": [run.args.seed for run in finished],
        "accuracy of the": [run.summary.get("reported") for run in finished],
        "device": [config.get("device") for config in configs],
        "torch": [config.get("torch") for config in configs],
        "commit": [each["commit"][:12] + " (changed since)" * each["dirty"] for each in commits],
    }
    return "; ".join(f"{fact} {', '.join(map(str, dict.fromkeys(values)))}" for fact, values in facts.items()) + "."


# ---- the sweep -------------------------------------------------------------------------------------------------------


def check_data(args):
    """Loads the data once: what is missing is missing for every run, and is said, or downloaded, before the first."""
    try:
        split = data.load(
            args.dataset, args.data_dir, data_url=args.data_url, image_size=args.image_size, val_size=args.val_size,
            limit_train=args.limit_train, limit_test=args.limit_test, skip_bad_images=args.skip_bad_images,
        )  # fmt: skip
    except UserError as error:
        raise UserError(str(error), status=2) from error
    for note in split.notes:
        print(f"{split.name}: {note}", file=sys.stderr)


def occupy(root):
    """Makes the sweep's directory and takes its lock: one sweep at a time. Raises UserError."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        return contextlib.closing(rundir.RunDir(root))
    except OSError as error:
        raise UserError(f"--output-dir {root} can't be written: {error.strerror}", 2) from error


def slurm_parameters(args, name, count):
    """What submitit.AutoExecutor takes. Raises UserError."""
    for pair in args.slurm_arg:
        if "=" not in pair:
            raise UserError(f"--slurm-arg takes key=value, not {pair!r}", 2)
    return dict(
        name=name, timeout_min=args.slurm_minutes, cpus_per_task=args.slurm_cpus, gpus_per_node=args.slurm_gpus or None,
        slurm_partition=args.slurm_partition, slurm_array_parallelism=args.jobs or count,
        slurm_additional_parameters=dict(pair.split("=", 1) for pair in args.slurm_arg),
    )  # fmt: skip


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args = parser.parse_args(argv)
    twice = {seed for seed in args.seeds if args.seeds.count(seed) > 1}
    if twice:
        raise UserError(f"--seeds names {min(twice)} twice", 2)
    of_runs = {action.dest for action in cli.training_parser("", model=None, epochs=None)._actions} - {"output_dir"}
    given = {key: value for key, value in cli.explicit(parser, argv).items() if key in of_runs}
    runs = plan(args.suite, given, args.seeds, Path(args.output_dir) if args.output_dir else None)
    root, todo = runs[0].path.parent, [run for run in runs if run.state != "finished"]
    here = args.launcher == "local"
    places = launch.places(runs[0].args.device, args.jobs or 1) if here else todo
    parameters = slurm_parameters(args, root.name, len(todo))
    states = [run.state for run in runs]
    print(f"{root}: {len(runs)} runs, {states.count('finished')} finished, {states.count('cut off')} to go on with, "
          f"{states.count('new')} to start", file=sys.stderr)  # fmt: skip
    if args.dry_run:
        for run in todo:
            print(shlex.join(run.command))
        return 0

    with occupy(root):
        if todo:
            check_data(todo[0].args)
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
        report(args.suite, runs, root, shlex.join(["python", "sweep.py", *argv]))
    if failed:
        names = ", ".join(run.path.name for run in failed)
        print(f"{len(failed)} of {len(runs)} runs failed: {names} (see {root}/*.log)", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main)
