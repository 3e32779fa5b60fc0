"""A run in progress: its directory, its signals, its display, and how it ends.

with open_run(args, split, state, curve, step, train_batches, saved) as run:
    while state.epoch < args.epochs:
        row = train_epoch(…, run.stop, run.show)
        run.end_epoch(row)
    run.finish()
return run.exit_status
"""

import contextlib
import signal

import models
from common.errors import UserError
from models import lora
from training import (
    devices,
    distributed,
    environment,
    loop,
    mixed_precision,
    out_of_memory,
    resume,
    run_directory,
    tensorboard,
)
from training.terminal import ProgressDisplay, StopSignal


@contextlib.contextmanager
def open_run(args, split, state, curve, step, train_batches, saved):
    """A block in which a run trains. Ctrl-C and SIGTERM end it after the step, with its state
    saved.

    curve: loop.Curve; step: loop.Step; saved: the contents of last.pt of a run that resumes.
    """
    explained = out_of_memory.explained(args, step.ranks, step.accumulate)
    with explained, StopSignal(launched=distributed.is_launched()) as stop:
        run = Run(args, split, state, curve, step, stop, ProgressDisplay(args, len(train_batches)))
        run.open_directory(saved)
        try:
            run.start(train_batches, saved)
            yield run
        except loop.Interrupted:
            run.interrupted()
        except BaseException as error:
            run.failed(error)
            raise
        else:  # the run is finished: an error of its last images doesn't make it a failed one
            run.finished()
        finally:
            run.display.close()
            run.directory.close()
        if run.exit_status == 0 and step.ranks.first:
            accuracy, epoch = run.figures["test_acc"], run.figures["reported"]
            print(f"test accuracy {accuracy:.2f} % ({epoch})  {run.directory.path}")


class Run:
    """Made by open_run. stop(): whether the run was asked to stop; show(progress, loss): a step."""

    def __init__(self, args, split, state, curve, step, stop, display):
        self.args, self.split, self.state, self.curve, self.step = args, split, state, curve, step
        self.ranks, self.stop, self.display = step.ranks, stop, display
        self.show = display.step if self.ranks.first else None
        self.directory = run_directory.NullRunDir()
        self.figures, self.exit_status = {}, None

    def open_directory(self, saved):
        if not self.ranks.first:
            return
        args, precision = self.args, mixed_precision.name(self.step.dtype)
        values, origin = self.state.record
        config = {"arguments": values, "from": origin, "precision": precision}
        config |= environment.environment(self.ranks.device)
        if saved:
            self.directory = resume.open_directory(args, config, self.state, saved, self.curve)
            return
        path = args.output_dir or run_directory.new_path(
            "runs", self.split.name, args.model, args.tag, args.seed
        )
        self.directory = run_directory.RunDir.create(path, config)

    def start(self, train_batches, saved):
        card = self.state.card
        self.parameters, self.macs = models.describe(
            card["model"], card["num_classes"], card["image_size"], card["options"]
        )
        devices.reset_peak_memory(self.ranks.device)
        precision = mixed_precision.name(self.step.dtype)
        where = f"{precision} on {self.ranks}; {self.directory.path}"
        self.display.start(self.split, self.parameters, where, self.state.progress)
        if saved:
            return
        self.directory.save_last(self.state.contents())  # from now on the run can be resumed
        if self.ranks.first and not self.args.freeze_backbone:
            tensorboard.write_images(self.directory.events, train_batches, card)

    def end_epoch(self, row):
        """Completes the row, saves last.pt and, for the best epoch so far, best.pt; prints a
        line.
        """
        state, progress = self.state, self.state.progress
        row["epoch_seconds"] = progress.seconds
        row["images_per_second"] = progress.seen / progress.seconds
        progress.finish_epoch()
        row["peak_memory_mb"] = devices.peak_memory_mb(self.ranks.device)
        accuracy, best = row[state.headline(self.curve.name)], None
        if accuracy is not None:
            top5 = row[state.headline(self.curve.name).replace("acc", "top5")]
            state.history.append([progress.total_seconds, accuracy, top5])
            if accuracy > state.best["value"]:
                state.best = {"epoch": progress.epoch, "value": accuracy}
                best = state.best_contents(self.curve.name)
        self.directory.end_epoch(row, state.contents(), best)
        self.display.epoch(row, self.curve.name)

    def test_best(self, batches):
        """The metrics of best.pt on the test set, which is read here only."""
        self.directory.wait()
        state, ranks = self.state, self.ranks
        with state.reported_on_device() as model:
            own = {name: value.clone() for name, value in model.state_dict().items()}
            best = None
            if ranks.first:
                best = resume.read_best(self.directory, (state.best["epoch"],))["state_dict"]
            best = lora.adapted(ranks.broadcast_object(best), own)
            try:
                model.load_state_dict(distributed.shard_like(best, own))
                return loop.evaluate(
                    model,
                    batches,
                    dtype=self.step.dtype,
                    stop=self.stop,
                    ranks=ranks,
                    confusion=state.confusion,
                )
            finally:  # the trained weights stay as they are, should this be interrupted
                model.load_state_dict(own)

    def finish(self, tested=None):
        """Writes the summary. tested: the metrics of `test_best`; else the last epoch's are
        reported.
        """
        self.directory.wait()
        self.ranks.sum(self.state.confusion.counts)
        self.exit_status = 0
        if not self.ranks.first:
            return
        if not self.state.history:  # of an old run whose metrics.csv has other columns
            raise UserError("metrics.csv doesn't have the accuracy of the last epoch")
        _, top1, top5 = self.state.history[-1]
        self.figures = {
            "test_acc": tested["acc"] if tested else top1,
            "test_top5": tested["top5"] if tested else top5,
            "reported": "best epoch on held-out images" if tested else "last epoch",
            "weights": "moving average" if self.state.average else "as trained",
        }
        self.directory.write_summary(
            "finished",
            **self.figures,
            **self._standing(),
            parameters=self.parameters,
            gmacs=self.macs / 1e9,
            **_seconds_to(self.state.history),
            peak_memory_mb=devices.peak_memory_mb(self.ranks.device),
        )

    def finished(self):
        if self.ranks.first:
            values, _ = self.state.record
            tensorboard.write_end(
                self.directory, values, self.figures, self.split.classes, self.state
            )

    def interrupted(self):
        self.directory.save_last(self.state.contents())
        self.directory.write_summary("interrupted", signal=self.stop.number, **self._standing())
        self.ranks.wait()  # torchrun ends all ranks, also the one that saves, when one has ended
        self.display.close()
        epoch = min(self.state.epoch + 1, self.args.epochs)
        print(f"interrupted in epoch {epoch}; continue with --resume {self.directory.path}")
        # The number is 0 where another rank was asked to stop.
        self.exit_status = 128 + (self.stop.number or signal.SIGTERM)

    def failed(self, error):
        with contextlib.suppress(OSError, UserError):  # `error` is the one to report
            self.directory.wait()
        with contextlib.suppress(OSError):
            reason = str(error) or type(error).__name__
            self.directory.write_summary("failed", reason=reason, **self._standing())

    def _standing(self):
        progress, best, name = self.state.progress, self.state.best, self.curve.name
        return {
            "epochs": progress.epoch,
            "steps": progress.step,
            "best_epoch": best["epoch"] or None,
            f"best_{name}_acc": best["value"] if best["epoch"] else None,
            "best_selected_on": name,
            "train_seconds": progress.total_seconds + progress.seconds,
        }


def _seconds_to(history):
    """Training seconds to 90 and 95 % of the final accuracy."""
    final = history[-1][1]
    return {
        f"seconds_to_{percent}": next(s for s, top1, _ in history if top1 >= percent / 100 * final)
        for percent in (90, 95)
    }
