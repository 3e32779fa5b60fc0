"""Progress display and signal handling."""

import signal

from tqdm import tqdm

from common.text import printable


class StopSignal:
    """Becomes true at the first SIGINT or SIGTERM; the second one ends the process at once.

    launched: torchrun started the process. It passes on the signals that SLURM sends to every
    process anyway, and sends others when a rank ends. Then further SIGTERMs are ignored until the
    process ends, so that the state can be saved; only a second SIGINT ends it at once.
    """

    def __init__(self, launched=False):
        self.number, self.launched = 0, launched

    def __call__(self):
        return self.number != 0

    def __enter__(self):
        signals = (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, self._handle) for number in signals}
        return self

    def _handle(self, number, frame):
        self.number = self.number or number
        if not self.launched:
            for handled in self.before:
                signal.signal(handled, signal.SIG_DFL)
        elif number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            if not (self.launched and self.number and number == signal.SIGTERM):
                signal.signal(number, handler)


class ProgressDisplay:
    """A progress bar on a terminal, and a line per epoch everywhere.

    log: a function that also gets each line; none until the run has a directory.
    """

    def __init__(self, args, steps_per_epoch):
        from_weights = args.pretrained or args.weights
        self.model = args.model if from_weights else f"{args.model} from scratch"
        self.epochs, self.steps = args.epochs, steps_per_epoch
        self.bar, self.log = None, None

    def say(self, line):
        """Prints a line, also into log.txt."""
        print(line, flush=True)
        if self.log is not None:
            self.log(line)

    def start(self, split, parameters, where, progress):
        other = f"{len(split.val):,} held out" if split.val else f"{len(split.test):,} test"
        line = f"{split.name}: {len(split.train):,} training images, {other}; {self.model}, "
        line += f"{parameters:,} parameters; {where}"
        if progress.step:
            line += f"; from epoch {progress.epoch + 1}, step {progress.step + 1}"
        self.say(line)
        for note in split.notes:
            self.say(printable(f"note: {note}"))

    def step(self, progress, loss):
        if self.bar is None:
            self.bar = tqdm(
                total=self.steps,
                initial=progress.batch - 1,
                desc=f"epoch {progress.epoch + 1}/{self.epochs}",
                leave=False,
                disable=None,
            )
        self.bar.update()
        self.bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)

    def epoch(self, row, curve):
        self.close()
        parts = [
            f"epoch {row['epoch']}/{self.epochs}  lr {row['lr']:.4g}",
            f"train {row['train_loss']:.4f} {row['train_acc']:.2f} %",
        ]
        for prefix, name in (("", curve), ("ema_", f"{curve} (ema)")):
            accuracy = row.get(f"{prefix}{curve}_acc")
            if accuracy is not None:
                parts.append(f"{name} {row[f'{prefix}{curve}_loss']:.4f} {accuracy:.2f} %")
        self.say("  ".join([*parts, f"{row['images_per_second']:.0f} images/s"]))

    def close(self):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def final_line(summary, tta):
    """The test accuracy of a finished run; then those of --tta and --eval-train."""
    line = f"test accuracy {summary['test_acc']:.2f} % ({summary['reported']})"
    if tta != "none":
        line += f", {summary['test_tta_acc']:.2f} % with --tta {tta}"
    if "train_clean_acc" in summary:
        line += f", {summary['train_clean_acc']:.2f} % of the training images"
    return line
