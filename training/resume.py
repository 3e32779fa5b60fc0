"""Whether a run may resume, and from what: with its own arguments, data and steps, or not at all.

A run that resumes ends as the uninterrupted run would have ended. What would make it end otherwise
is refused before its directory is touched.
"""

import argparse
import contextlib
import sys
from pathlib import Path

from common import checkpoint, files
from common.errors import UserError, first_line
from common.files import read_json
from common.scopes import flag, with_scope
from common.text import printable
from training import distributed, environment, out_of_memory, run_directory, schedules
from training.progressive import size_schedule
from training.terminal import final_line


def resolve(defaults, given):
    """(args, saved) of --resume: the run's arguments with the machine's changed as `given`.

    defaults: {argument: default}; given: what is on the command line. Raises UserError, which names
    what contradicts the run.
    """
    if "config" in given or "output_dir" in given:
        raise UserError(
            "--resume takes its arguments and directory from the run: leave --config and "
            "--output-dir out",
            2,
        )
    if given["resume"] is True:
        given = given | {"resume": str(newest_unfinished())}
    path = run_directory.resolve_path(given["resume"])
    saved, used_previous = run_directory.load_last(path, given.get("resume_previous", False))
    given = given | {"resume_previous": used_previous, "output_dir": str(path)}
    try:
        training = saved["training"]
        arguments = dict(training["arguments"])
        origin = dict.fromkeys(defaults, "default") | dict(training["origin"])
        # Batches are split by --accumulate in the other scripts, and in runs of them.
        if "micro_batch" in defaults:
            arguments.setdefault("micro_batch", 0)
        else:
            for values in (arguments, origin):
                values.pop("micro_batch", None)
        values = defaults | arguments
        training["progress"]["epoch"]  # or KeyError
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{_source(path, used_previous)} is not the last.pt of a run") from error

    if values.get("lora_rank") and "lora_rank" not in defaults:
        raise UserError(f"can't resume {path}: --lora-rank needs train_sota.py", 2)
    # "auto" on the command line is what the run was started with.
    given = {k: v for k, v in given.items() if v is not None or origin.get(k) != "auto"}
    # For --epochs see check_epochs.
    may_change = with_scope("execution", "location", "call") | {"epochs"}
    wrong = [k for k, v in given.items() if k not in may_change and v != values.get(k, v)]
    if wrong:
        differences = "; ".join(
            f"{flag(key)} is {_or(values[key], 'not given')} there, not {_or(given[key], 'auto')}"
            for key in wrong
        )
        raise UserError(f"can't resume {path}: {differences}", 2)
    for key, value in given.items():
        if value != values.get(key) and key not in ("resume", "resume_previous"):
            origin[key] = "command line"
            if key == "micro_batch":
                origin["accumulate"] = "--micro-batch"  # which follows from it
    return argparse.Namespace(**(defaults | values | given), origin=origin), saved


def newest_unfinished(root="runs"):
    """The run in root, or one level deeper, that this script began, that isn't finished and that no
    process is writing; of several, that of the last save. Prints it. Raises UserError.
    """
    saves = [*Path(root).glob("*/last.pt"), *Path(root).glob("*/*/last.pt")]
    for path in sorted(saves, key=lambda save: save.stat().st_mtime, reverse=True):
        run, script = path.parent, environment.script_name()
        command = str(read_json(run / "config.json").get("command", script)).split()
        status = read_json(run / "summary.json").get("status", "not finished")
        if command[:1] == [script] and status != "finished" and not run_directory.is_locked(run):
            if distributed.is_main_process():
                print(f"resuming {run} ({printable(str(status))})")
            return run
    raise UserError(f"--resume: {root}/ holds no unfinished run of this script: name one", 2)


def _or(value, instead):
    return instead if value is None else value


def _source(path, used_previous):
    return Path(path) / ("previous.pt" if used_previous else "last.pt")


@contextlib.contextmanager
def refuse_misfits():
    """A block or function that reads a last.pt: contents that don't fit become a UserError.

    Running out of memory is a RuntimeError as well and stays what it is.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_misfit(error):
            raise
        reason = first_line(error)
        raise UserError(f"can't resume: last.pt doesn't fit this run ({reason})") from error


def _is_misfit(error):
    """Whether load_state_dict reports other names or shapes; it reports failed copies, too."""
    if out_of_memory.is_out_of_memory(error):
        return False
    return str(error).startswith("Error(s) in loading state_dict")


def is_finished(args, saved):
    """Whether a run has nothing left to do, not even its final test; prints its accuracy if so."""
    if saved is None:
        return False
    summary = read_json(Path(args.output_dir) / "summary.json")
    epoch = saved["training"]["progress"]["epoch"]
    complete = isinstance(summary.get("test_acc"), float) and "reported" in summary
    if args.tta != "none":
        complete = complete and isinstance(summary.get("test_tta_acc"), float)
    if args.eval_train:
        complete = complete and isinstance(summary.get("train_clean_acc"), float)
    same_length = args.epochs == saved["training"]["arguments"]["epochs"]
    stopped_early = summary.get("stopped_early") is True and same_length
    nothing_left = epoch == args.epochs or stopped_early
    is_current = epoch == summary.get("epochs") and summary.get("status") == "finished"
    if not (nothing_left and is_current and complete):
        return False
    print(f"{args.output_dir} is already finished: {final_line(summary, args.tta)}")
    return True


def data_facts(split):
    """What must be the same when a run resumes."""
    facts = {
        "train_images": len(split.train),
        "test_images": len(split.test),
        "classes": list(split.classes),
    }
    return facts | ({"digest_of_decoded_images_and_labels": split.digest} if split.digest else {})


@refuse_misfits()
def check_data(split, saved, ranks):
    """Raises UserError where the data is not that of the start of the run.

    Or where the ranks differ in it, or in their last.pt: those of several machines read their own.
    """
    position = saved["training"]["progress"] if saved else None
    for value, reason in (
        (
            data_facts(split),
            "data: --data-dir must hold the same files on all machines, read by the same Pillow",
        ),
        (position, "last.pt: the run's directory must be shared by all machines; try again"),
    ):
        if ranks.any(ranks.broadcast_object(value) != value):
            raise UserError(f"the processes have read different {reason}")
    if saved is None:
        return
    facts, before = data_facts(split), saved["training"]["facts"]
    differences = "; ".join(
        f"{name.replace('_', ' ')}: {_shorten(before[name])} there, {_shorten(value)} here"
        for name, value in facts.items()
        if before.get(name, value) != value  # runs of earlier versions lack some
    )
    if differences:
        raise UserError(f"can't resume: the data has changed since the start ({differences})", 2)


def _shorten(value):
    if not isinstance(value, list):
        return value
    dots = ", …" if len(value) > 12 else ""
    return f"{len(value)} ({', '.join(map(str, value[:12]))}{dots})"


def check_epochs(args, saved, steps_per_epoch):
    """Refuses another --epochs with which the run would have taken other steps from the start."""
    if saved is None or args.epochs == saved["training"]["arguments"]["epochs"]:
        return
    conflict = _epoch_conflict(args, saved["training"], steps_per_epoch)
    if conflict:
        raise UserError(f"--epochs {args.epochs}{conflict}", 2)


def _epoch_conflict(args, training, steps_per_epoch):
    """What speaks against another --epochs, or None. training: of the contents of last.pt."""
    # A run of an older version lacks arguments that are newer: they have their defaults.
    before = vars(args) | training["arguments"]
    progress, old_epochs = training["progress"], before["epochs"]
    steps = range(progress["step"])
    begun = progress["epoch"] + (progress["batch"] > 0)
    if begun > args.epochs:
        return f": the run has {begun} epochs already"
    for epochs in (old_epochs, args.epochs):
        if progress["epoch"] >= epochs and epochs % args.eval_every:
            return (
                f": with --eval-every {args.eval_every}, epoch {epochs} would have been evaluated "
                f"differently from the start: start a new run"
            )
    automatic = {k: None for k in ("warmup_epochs", "ema_decay") if args.origin.get(k) == "auto"}
    with_auto = argparse.Namespace(**(vars(args) | automatic))
    for name, value in schedules.Plan.of(with_auto, steps_per_epoch).automatic.items():
        if value != before[name]:
            return (
                f" would have given another {flag(name)} from the start ({value:.6g}, not "
                f"{before[name]:.6g}): start a new run"
            )
    old_lr = schedules.Plan.of(argparse.Namespace(**before), steps_per_epoch).lr_at
    new_lr = schedules.Plan.of(args, steps_per_epoch).lr_at
    ends = {1.0, *(group.get("lr_end", 1.0) for group in training["optimizer"]["param_groups"])}
    if any(old_lr(step, end) != new_lr(step, end) for end in ends for step in steps):
        return (
            f": with the {args.schedule} schedule, the learning rates so far would be different "
            f"from those over {old_epochs} epochs: start a new run (a constant schedule can be "
            f"extended)"
        )
    old_size, new_size = (
        size_schedule(args.progressive, epochs * steps_per_epoch)
        for epochs in (old_epochs, args.epochs)
    )
    if any(old_size(step) != new_size(step) for step in steps):
        return (
            f": with --progressive {args.progressive}, the input sizes so far would be different "
            f"from those over {old_epochs} epochs: start a new run"
        )
    if args.lookahead and progress["step"] >= args.lookahead:
        return (
            f": with --lookahead {args.lookahead}, the averages so far would be different from "
            f"those over {old_epochs} epochs: start a new run"
        )
    return None


def open_directory(args, config, state, saved, curve):
    """The directory of a run that resumes, with rows and best.pt made to fit `saved`.

    config: the new contents of config.json; the old ones are kept in "resumed". Raises UserError.
    """
    directory = run_directory.RunDir.open(args.output_dir)
    progress = saved["training"]["progress"]
    try:
        source = _source(directory.path, args.resume_previous)
        current = checkpoint.load_untrusted(source, mmap=True)["contents"]  # was checked before
        if current["training"]["progress"] != progress:
            raise UserError(f"{directory.path} was written by another process just now: try again")
        _restore_best(directory, state, saved, curve)
        kept = run_directory.kept_file(progress["epoch"], args.save_every)
        if kept and progress["batch"] == 0:  # a kill may come between last.pt and this file
            directory.keep(kept, state.epoch_contents(saved))
        rows = directory.keep_rows(progress["epoch"])
        if "history" not in saved["training"]:
            state.history = _history(rows, state.reported_columns(curve.name))
        if args.resume_previous:
            directory.restore_previous()
            _note(
                directory,
                f"{directory.path}/last.pt is damaged: resuming from previous.pt, one save before",
            )
        before, now = directory.config.get("precision"), config["precision"]
        if before not in (None, now):
            _note(directory, f"resuming in {now}: until here the run computed in {before} (--amp)")
        directory.note_resumed(config, epoch=progress["epoch"] + 1)
        files.remove(directory.path / "summary.json")  # it is out of date
    except BaseException:
        directory.close()
        raise
    return directory


def _note(directory, text):
    print(text, file=sys.stderr)
    directory.append_log(text)


def _restore_best(directory, state, saved, curve):
    """Writes best.pt again where last.pt is of the best epoch: a kill may come in between.

    A best.pt of another epoch that will be tested is checked now. After --resume-previous it may be
    of an epoch that is still to come, and nothing has the weights of the best one before. It stays
    the best until another is better.
    """
    best, progress = state.best["epoch"], state.progress
    if best and (progress.epoch, progress.batch) == (best, 0):
        directory.save_best(state.best_contents(curve.name)(saved))
    elif best and curve.name == "val":
        later = range(progress.epoch + 1, curve.epochs + 1)
        metric = read_best(directory, (best, *later))["metric"]
        if metric["epoch"] != best:
            state.best = {"epoch": metric["epoch"], "value": metric["value"]}


def _history(rows, reported):
    """State.history of an older version, whose last.pt lacks it: from the rows of metrics.csv."""
    seconds, history = 0.0, []
    for row in rows:
        try:
            seconds += float(row["epoch_seconds"])
            top1, top5 = float(row[f"{reported}_acc"]), float(row[f"{reported}_top5"])
        except (KeyError, ValueError):  # an epoch without an evaluation, or other columns
            continue
        history.append([seconds, top1, top5])
    return history


def read_best(directory, epochs):
    """The contents of best.pt. Raises UserError where it is of none of these epochs."""
    contents = checkpoint.load(directory.path / "best.pt")
    metric = contents.get("metric")
    if not isinstance(metric, dict) or metric.get("epoch") not in epochs:
        raise UserError(
            f"{directory.path}/best.pt is not that of the best epoch, {epochs[0]}, which is to be "
            f"tested"
        )
    return contents
