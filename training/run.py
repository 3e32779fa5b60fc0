"""A run in progress: its directory, its signals, its display, and how it ends.

with open_run(args, split, state, curve, settings, train_batches, saved) as run:
    while not run.done:
        row = train_epoch(…, run.stop, run.show)
        row |= evaluate_epoch(…, run.stop)
        run.end_epoch(row)
    run.finish(run.final_test(inputs, train_batches, eval_batches))
return run.exit_status
"""

import contextlib
import signal
import time

import torch

import models
from common.errors import UserError, first_line
from models import lora
from training import (
    devices,
    distributed,
    environment,
    evaluation,
    loop,
    mixed_precision,
    out_of_memory,
    resume,
    run_directory,
    tensorboard,
)
from training.terminal import ProgressDisplay, StopSignal, final_line
from training.tta import VIEWS

NOT_DETERMINISTIC = "does not have a deterministic implementation"  # in torch's message


@contextlib.contextmanager
def open_run(args, split, state, curve, settings, train_batches, saved):
    """A block in which a run trains. Ctrl-C and SIGTERM end it after a step and save its state.

    curve: evaluation.Curve; settings: loop.StepSettings; saved: the contents of last.pt of a run
    that resumes, removed from memory when they have been used.
    """
    explained = out_of_memory.explained(args, settings.ranks, settings.accumulate)
    with explained, StopSignal(launched=distributed.is_launched()) as stop:
        display = ProgressDisplay(args, len(train_batches))
        run = Run(
            args,
            split=split,
            state=state,
            curve=curve,
            settings=settings,
            stop=stop,
            display=display,
        )
        run.open_directory(saved)
        try:
            run.start(train_batches, saved)
            if saved:
                saved.clear()
            yield run
        except loop.Interrupted:
            try:
                run.end_interrupted()
            except BaseException as error:
                run.end_failed(error)
                raise
        except BaseException as error:
            run.end_failed(error)
            of_compiler = args.compile and isinstance(error, torch._dynamo.exc.TorchDynamoException)
            if of_compiler and not out_of_memory.is_out_of_memory(error):
                reason = f"--compile failed: {first_line(error)}"
                raise UserError(f"{reason} (resume with --no-compile)") from error
            if isinstance(error, RuntimeError) and NOT_DETERMINISTIC in str(error):
                reason = f"--deterministic failed: {first_line(error)}"
                raise UserError(f"{reason} (resume with --no-deterministic)") from error
            raise
        else:  # finished, also if TensorBoard's last images can't be written
            run.end_finished()
        finally:
            run.display.close()
            run.directory.close()
        if run.exit_status == 0 and settings.ranks.is_main:
            run.display.say(f"{final_line(run.results, args.tta)}  {run.directory.path}")


class Run:
    """Made by open_run. stop(): whether to stop; show(progress, loss): displays a step, or None."""

    def __init__(self, args, *, split, state, curve, settings, stop, display):
        self.args, self.split, self.state, self.curve = args, split, state, curve
        self.settings = settings
        self.ranks, self.stop, self.display = settings.ranks, stop, display
        self.show = display.step if self.ranks.is_main else None
        self.directory = run_directory.NullRunDir()
        self.results, self.exit_status = {}, None
        card = state.card
        self.parameters, self.macs = models.describe(
            card["model"], card["num_classes"], card["image_size"], card["options"]
        )
        self.seconds_before = state.progress.wall_seconds  # of the processes before this one

    @property
    def done(self):
        """Whether there is nothing left to train."""
        return self.state.epoch >= self.args.epochs or self.stopped_early

    @property
    def stopped_early(self):
        """Whether --patience ends the run before its last epoch."""
        waited = self.state.evaluations_since_best
        return 0 < self.args.patience <= waited and self.state.epoch < self.args.epochs

    def open_directory(self, saved):
        if not self.ranks.is_main:
            return
        args, precision = self.args, mixed_precision.name(self.settings.dtype)
        values, origin = self.state.record
        config = {"arguments": values, "from": origin, "precision": precision}
        config |= environment.environment(self.ranks.device)
        config["family"] = models.family(args.model)
        if saved:
            self.directory = resume.open_directory(args, config, self.state, saved, self.curve)
        else:
            path = args.output_dir or run_directory.new_path(
                "runs", self.split.name, args.model, args.tag, args.seed
            )
            self.directory = run_directory.RunDir.create(path, config)
        self.display.log = self.directory.append_log

    def start(self, train_batches, saved):
        devices.reset_peak_memory(self.ranks.device)
        precision = mixed_precision.name(self.settings.dtype)
        where = f"{precision} on {self.ranks}; {self.directory.path}"
        self.display.start(self.split, self.parameters, where, self.state.progress)
        if saved:
            return
        self.count_time()
        self.directory.save_last(self.state.contents())  # from now on the run can be resumed
        if self.ranks.is_main and not self.args.freeze_backbone:
            tensorboard.write_images(self.directory.events, train_batches, self.state.card)

    def count_time(self):
        """Adds up the wall time of the run's processes, each from its start to its last save."""
        self.state.progress.wall_seconds = self.seconds_before + environment.process_seconds()

    def end_epoch(self, row):
        """Completes the row, prints it, and saves last.pt and, for the best epoch, best.pt."""
        state, progress = self.state, self.state.progress
        self.count_time()
        row["epoch_seconds"] = progress.seconds
        row["eval_seconds"], row["total_seconds"] = progress.eval_seconds, progress.wall_seconds
        row["images_per_second"] = progress.seen / progress.seconds
        progress.finish_epoch()
        row["peak_memory_mb"] = devices.peak_memory_mb(self.ranks.device)
        reported = state.reported_columns(self.curve.name)
        accuracy = row[f"{reported}_acc"]
        to_best = None
        if accuracy is not None:
            top5 = row[f"{reported}_top5"]
            state.history.append([progress.total_seconds, accuracy, top5])
            if accuracy > state.best["value"]:
                state.best = {"epoch": progress.epoch, "value": accuracy}
                to_best = state.best_contents(self.curve.name)
        name = run_directory.kept_file(progress.epoch, self.args.save_every)
        kept = (name, state.epoch_contents) if name else None
        self.directory.end_epoch(row, state.contents(), to_best, kept)
        self.display.epoch(row, self.curve.name)

    def final_test(self, inputs, train_batches, eval_batches):
        """Measures the reported weights on the test set: {column of summary.json: value}.

        With held-out images these are the weights of best.pt, and the test set is read only here.
        Without them the test accuracy is that of the last epoch, and only --tta and --eval-train
        are left to do.
        inputs: training.inputs.Inputs.
        """
        uses_tta = self.args.tta != "none"
        if not (self.split.val or uses_tta or self.args.eval_train):
            return {}
        batches = inputs.test_batches() if self.split.val else eval_batches
        columns = {}
        with self._tested_weights() as model:
            if self.split.val:
                metrics = self._evaluate(model, batches, confusion=self.state.confusion)
                columns = {"test_acc": metrics["acc"], "test_top5": metrics["top5"]}
            if uses_tta:
                columns |= self._test_time_augmentation(model, batches)
            if self.args.eval_train:
                metrics = self._evaluate(model, inputs.without_augmentation(train_batches))
                columns |= {f"train_clean_{name}": metrics[name] for name in evaluation.METRICS}
        return columns

    def _evaluate(self, model, batches, **options):
        start = time.perf_counter()
        metrics = evaluation.evaluate(
            model, batches, dtype=self.settings.dtype, stop=self.stop, ranks=self.ranks, **options
        )
        seconds = time.perf_counter() - start
        self.state.progress.eval_seconds += seconds
        return metrics | {"seconds": seconds}

    def _test_time_augmentation(self, model, batches):
        metrics = self._evaluate(model, batches, predict=VIEWS[self.args.tta])
        return {f"test_tta_{name}": metrics[name] for name in ("acc", "top5", "seconds")}

    @contextlib.contextmanager
    def _tested_weights(self):
        """A block in which the yielded model has the weights of best.pt, or of the last epoch."""
        self.directory.wait()
        state, ranks = self.state, self.ranks
        with state.reported_on_device() as model:
            if not self.split.val:
                ranks.broadcast(model.buffers())
                yield model
                return
            # On the host: the device may have no room for the weights twice.
            own = {
                name: value.clone() if ranks.sharded else value.to("cpu", copy=True)
                for name, value in model.state_dict().items()
            }
            weights = {}
            if ranks.is_main:
                weights = resume.read_best(self.directory, (state.best["epoch"],))["state_dict"]
            weights = lora.adapted(ranks.broadcast_tensors(weights), own)
            try:
                model.load_state_dict(distributed.shard_like(weights, own))
                yield model
            finally:  # an interrupted test saves last.pt, which needs the trained weights
                model.load_state_dict(own)

    def finish(self, tested):
        """Writes the summary. tested: the result of `final_test`."""
        self.directory.wait()
        self.ranks.sum(self.state.confusion.counts)
        self.exit_status = 0
        if not self.ranks.is_main:
            return
        if not self.state.history:  # of an old run whose metrics.csv has other columns
            raise UserError("metrics.csv doesn't have the accuracy of the last epoch")
        _, top1, top5 = self.state.history[-1]
        self.results = {
            "test_acc": top1,
            "test_top5": top5,
            "reported": "best epoch on held-out images" if self.split.val else "last epoch",
            "weights": "moving average" if self.state.average else "as trained",
        } | tested
        if self.args.patience:
            self.results["stopped_early"] = self.stopped_early
        if self.stopped_early:
            epoch, best_epoch = self.state.epoch, self.state.best["epoch"]
            self.display.say(f"stopped early after epoch {epoch}: epoch {best_epoch} was the best")
        self.directory.write_summary(
            "finished",
            **self.results,
            **self._progress_so_far(),
            parameters=self.parameters,
            gmacs=self.macs / 1e9,
            **_seconds_to(self.state.history),
            peak_memory_mb=devices.peak_memory_mb(self.ranks.device),
        )

    def end_finished(self):
        if self.ranks.is_main:
            values, _ = self.state.record
            tensorboard.write_end(
                self.directory, values, self.results, self.split.classes, self.state
            )

    def end_interrupted(self):
        self.count_time()
        self.directory.save_last(self.state.contents())
        self.directory.write_summary(
            "interrupted", signal=self.stop.number, **self._progress_so_far()
        )
        self.ranks.wait()  # torchrun ends all ranks, also the one that saves, when one has ended
        self.display.close()
        epoch = self.state.epoch if self.done else self.state.epoch + 1
        self.display.say(
            f"interrupted in epoch {epoch}; continue with --resume {self.directory.path}"
        )
        # The number is 0 where another rank was asked to stop.
        self.exit_status = 128 + (self.stop.number or signal.SIGTERM)

    def end_failed(self, error):
        with contextlib.suppress(OSError, UserError):  # `error` is the one to report
            self.directory.wait()
        with contextlib.suppress(OSError):
            reason = str(error) or type(error).__name__
            self.directory.append_log(f"failed: {reason}")
            self.directory.write_summary("failed", reason=reason, **self._progress_so_far())

    def _progress_so_far(self):
        progress, best, name = self.state.progress, self.state.best, self.curve.name
        self.count_time()
        return {
            "epochs": progress.epoch,
            "steps": progress.step,
            "best_epoch": best["epoch"] or None,
            f"best_{name}_acc": best["value"] if best["epoch"] else None,
            "best_selected_on": name,
            "train_seconds": progress.total_seconds + progress.seconds,
            "eval_seconds": progress.eval_seconds,
            "total_seconds": progress.wall_seconds,
        }


def _seconds_to(history):
    """Training seconds to 90 and 95 % of the final accuracy."""
    final = history[-1][1]
    return {
        f"seconds_to_{percent}": next(s for s, top1, _ in history if top1 >= percent / 100 * final)
        for percent in (90, 95)
    }
