"""Whether a run may go on, and from what: with its own arguments, data and steps, or not at all.

    args, origin, state = arguments(parser, {"resume": "runs/x"})      # state: the contents of its last.pt
    check_data(facts, state), check_epochs(args, origin, state, len(batches))
    directory = open_directory(args, config, state, training, curve)

A run that goes on ends as the uninterrupted one would have ended. What would have it end otherwise is refused before its
directory is touched.
"""

import argparse
import functools
import sys
from pathlib import Path

import models
from analysis import metrics
from common import checkpoint, errors, files
from common.errors import UserError
from training import memory, run_directory, schedules

# What may differ when a run goes on; --epochs where the schedule allows it (see check_epochs).
FREE = {
    "resume",
    "resume_previous",
    "epochs",
    "device",
    "data_dir",
    "data_url",
    "resident",
    "compile",
    "grad_checkpointing",
    "fsdp",
    "amp",
    "deterministic",
    "tag",
    "micro_batch",
    "ema_device",
}


def arguments(parser, given):
    """(arguments, {argument: where its value came from}, contents of last.pt) of --resume and what else is `given`.

    Raises UserError; what contradicts the run is named.
    """
    if "config" in given or "output_dir" in given:
        raise UserError(
            "--resume takes its arguments and its directory from the run: leave --config and --output-dir out",
            2,
        )
    path = run_directory.resolve_run(given["resume"])
    state, given["resume_previous"] = run_directory.load_last(
        path, given.get("resume_previous", False)
    )
    source = path / _source(given)
    try:
        saved, origin, _ = (
            state["training"]["arguments"],
            state["training"]["origin"],
            state["training"]["progress"]["epoch"],
        )
        saved.items(), origin.items()
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{source} is not a run's last.pt") from error
    if "model" in given:
        given["model"] = models.canonical(given["model"])
    given = {
        key: value for key, value in given.items() if value is not None or origin.get(key) != "auto"
    }  # auto as before
    wrong = [
        key for key, value in given.items() if key not in FREE and value != saved.get(key, value)
    ]
    if wrong:
        says = "; ".join(
            f"--{key.replace('_', '-')} is {_or(saved[key], 'not given')} there, not {_or(given[key], 'auto')}"
            for key in wrong
        )
        raise UserError(f"can't go on with {path}: {says}", status=2)
    defaults = {action.dest: action.default for action in parser._actions if action.dest != "help"}
    changed = {
        key
        for key, value in given.items()
        if value != saved.get(key) and not key.startswith("resume")
    }
    origin = origin | dict.fromkeys(changed, "command line")
    if "micro_batch" in changed:
        origin["accumulate"] = "--micro-batch"  # it follows: how a batch is cut is of the machine
    args = argparse.Namespace(**(defaults | saved | given))
    args.output_dir = str(path)
    return args, origin, state


def _or(value, instead):
    return instead if value is None else value


def _source(given):
    """The file that a run goes on from: previous.pt only where last.pt was damaged and the user said so."""
    return "previous.pt" if given["resume_previous"] else "last.pt"


def refusing_misfits(load):
    """Decorates what reads a last.pt: contents that don't fit are a UserError; running out of memory stays what it is."""

    @functools.wraps(load)
    def wrapped(*args):
        try:
            return load(*args)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _is_misfit(error):
                raise
            raise UserError(
                f"can't go on: last.pt doesn't fit this run ({errors.first_line(error)})"
            ) from error

    return wrapped


def _is_misfit(error):
    """Whether a RuntimeError is that of Module.load_state_dict for other names or shapes; it also reports failed copies so."""
    return str(error).startswith("Error(s) in loading state_dict") and not memory.is_out_of_memory(
        error
    )


def finished(args, state):
    """The summary of a run that has nothing left to do; None for others, also for one that was killed before its test."""
    summary = metrics.read_json(Path(args.output_dir) / "summary.json")
    done = state["training"]["progress"]["epoch"] == args.epochs == summary.get("epochs")
    whole = isinstance(summary.get("test_acc"), float) and "reported" in summary
    return summary if done and whole and summary.get("status") == "finished" else None


@refusing_misfits
def check_data(facts, state):
    """Raises UserError where the data is not what it was at the start of the run, before its weights are found not to fit."""
    saved = state["training"]["facts"]
    other = [name for name, value in facts.items() if saved[name] != value]
    if other:
        says = "; ".join(
            f"{name.replace('_', ' ')}: {_short(saved[name])} there, {_short(facts[name])} here"
            for name in other
        )
        raise UserError(
            f"can't go on: the data is not that of the start of the run ({says})", status=2
        )


def _short(value):
    return (
        f"{len(value)} ({', '.join(map(str, value[:12]))}{', …' * (len(value) > 12)})"
        if isinstance(value, list)
        else value
    )


def check_epochs(args, origin, state, batches_per_epoch):
    """Refuses another --epochs where the run would have taken other steps had it been asked at the start."""
    saved, done = state["training"]["arguments"], state["training"]["progress"]
    if args.epochs == saved["epochs"]:
        return
    begun = done["epoch"] + (done["batch"] > 0)
    if begun > args.epochs:
        raise UserError(f"--epochs {args.epochs}: the run has {begun} epochs already", status=2)
    for epochs in (saved["epochs"], args.epochs):
        if done["epoch"] >= epochs and epochs % args.eval_every:
            raise UserError(
                f"--epochs {args.epochs}: with --eval-every {args.eval_every} epoch {epochs} would have been "
                f"evaluated otherwise from the start: start a new run",
                status=2,
            )
    steps = {epochs: epochs * batches_per_epoch for epochs in (saved["epochs"], args.epochs)}
    for name, value in schedules.auto_values(
        args.schedule, args.epochs, steps[args.epochs]
    ).items():
        if origin.get(name) == "auto" and value != saved[name]:
            raise UserError(
                f"--epochs {args.epochs} would have given another --{name.replace('_', '-')} from the start "
                f"({value:.6g}, not {saved[name]:.6g}): start a new run",
                status=2,
            )
    warmup = round(saved["warmup_epochs"] * batches_per_epoch)
    before, now = (
        schedules.learning_rate(args.schedule, args.lr, count, warmup) for count in steps.values()
    )
    if any(before(step) != now(step) for step in range(done["step"])):
        raise UserError(
            f"--epochs {args.epochs}: with the {args.schedule} schedule the learning rates so far would have been "
            f"others than over {saved['epochs']} epochs: start a new run (a constant schedule can be "
            f"extended)",
            status=2,
        )


def open_directory(args, config, state, training, curve):
    """The directory of a run that goes on: rows, best.pt and config.json made to fit `state`. Raises UserError.

    config: what is to stand in config.json; what stood there before stays in "resumed".
    """
    directory = run_directory.RunDir.open(args.output_dir)
    progress = state["training"]["progress"]
    try:
        if (
            checkpoint.load(directory.path / _source(vars(args)))["training"]["progress"]
            != progress
        ):
            raise UserError(
                f"{directory.path} was written to by another process just now: start again"
            )
        _mend_best(directory, training, curve, state, args.epochs)
        rows = directory.keep_rows(progress["epoch"])
        if "history" not in state["training"]:
            training.history = _history(
                rows, training.best_contents(curve)(state)["metric"]["name"]
            )
        if args.resume_previous:
            directory.restore_previous()
            print(
                f"{directory.path}/last.pt is damaged: going on from previous.pt, the save before it",
                file=sys.stderr,
            )
        directory.note_resumed(config, epoch=progress["epoch"] + 1)
        files.remove(directory.path / "summary.json")  # what it says is over
    except BaseException:
        directory.close()
        raise
    return directory


def _mend_best(directory, training, curve, state, epochs):
    """Makes best.pt anew from last.pt, where that is the best epoch's: the run may have been killed between the two.

    Where it is an earlier epoch's, and will be tested, raises UserError now rather than after the training.
    """
    best, progress = training.best["epoch"], training.progress
    if best and (progress.epoch, progress.batch) == (best, 0):
        directory.save_best(training.best_contents(curve)(state))
    elif best and curve == "val":
        read_best(directory, (best, *range(progress.epoch + 1, epochs + 1)))


def _history(rows, headline):
    """Training.history of a run that an older version began, whose last.pt lacks it: from the rows of its metrics.csv."""
    seconds, history = 0.0, []
    for row in rows:
        try:
            seconds += float(row["epoch_seconds"])
            history.append(
                [seconds, float(row[headline]), float(row[headline.replace("acc", "top5")])]
            )
        except (KeyError, ValueError):  # an epoch without an evaluation, or other columns
            continue
    return history


def read_best(directory, epochs):
    """Contents of best.pt. Raises UserError where it is not of one of these epochs; of one to come it will be made anew."""
    contents = checkpoint.load(directory.path / "best.pt")
    metric = contents.get("metric")
    if not isinstance(metric, dict) or metric.get("epoch") not in epochs:
        raise UserError(
            f"{directory.path}/best.pt is not that of the run's best epoch, {epochs[0]}, which is to be tested"
        )
    return contents
