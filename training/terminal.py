"""What a run hears from the terminal, and what it says there."""

import signal

from tqdm import tqdm


class StopSignal:
    """Asks for an end at the first SIGINT or SIGTERM; by default, the second one ends the process at once.

    launched: the process was started by torchrun, which passes on the signals that SLURM sends to every process anyway, and
    sends others of its own when a rank ends. Then further SIGTERMs are ignored until the process ends, so that the state can
    be saved; only a second SIGINT ends it at once.
    """

    def __init__(self, launched=False):
        self.number, self.launched = 0, launched

    def __call__(self):
        return self.number != 0

    def __enter__(self):
        self.before = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def _handle(self, number, frame):
        self.number = self.number or number
        if not self.launched:
            for each in self.before:
                signal.signal(each, signal.SIG_DFL)
        elif number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            if not (self.launched and self.number and number == signal.SIGTERM):
                signal.signal(number, handler)


class Reporter:
    """A bar on a terminal, and a line an epoch everywhere."""

    def __init__(self, args, batches):
        self.model, self.epochs, self.steps, self.bar = args.model, args.epochs, len(batches), None

    def start(self, split, parameters, precision, company, progress, directory):
        others = f"{len(split.val):,} held out" if split.val else f"{len(split.test):,} test"
        print(
            f"{split.name}: {len(split.train):,} training images, {others}; {self.model}, "
            f"{parameters:,} parameters; {precision} on {company}; {directory.path}"
            f"{f'; from epoch {progress.epoch + 1}, step {progress.step + 1}' if progress.step else ''}"
        )

    def step(self, progress, loss):
        if self.bar is None:
            description = f"epoch {progress.epoch + 1}/{self.epochs}"
            self.bar = tqdm(
                total=self.steps,
                initial=progress.batch - 1,
                desc=description,
                leave=False,
                disable=None,
            )
        self.bar.update()
        self.bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)

    def epoch(self, figures, curve):
        self.close()
        line = f"epoch {figures['epoch']}/{self.epochs}  lr {figures['lr']:.4g}  train {figures['train_loss']:.4f} "
        line += f"{figures['train_acc']:.2f} %"
        for prefix, name in (("", curve), ("ema_", f"{curve} (ema)")):
            if figures.get(f"{prefix}{curve}_acc") is not None:
                line += f"  {name} {figures[f'{prefix}{curve}_loss']:.4f} {figures[f'{prefix}{curve}_acc']:.2f} %"
        print(f"{line}  {figures['images_per_second']:.0f} images/s", flush=True)

    def close(self):
        if self.bar is not None:
            self.bar.close()
            self.bar = None
