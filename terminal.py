"""What a run hears from the terminal, and what it says there."""

import signal

from tqdm import tqdm


class StopSignal:
    """Asks for an end at the first SIGINT or SIGTERM; the second one ends the process at once, as it does by default.

    in_company: torchrun passes a Ctrl-C on as a SIGTERM, so only a second one of the same kind ends at once.
    """

    def __init__(self, in_company=False):
        self.number, self.in_company = 0, in_company

    def __call__(self):
        return self.number != 0

    def __enter__(self):
        self.before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _handle(self, number, frame):
        self.number = number
        for each in [number] if self.in_company else self.before:
            signal.signal(each, signal.SIG_DFL)

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Reporter:
    """A bar on a terminal, and a line an epoch everywhere."""

    def __init__(self, args, batches):
        self.model, self.epochs, self.steps, self.bar = args.model, args.epochs, len(batches), None

    def start(self, split, parameters, precision, company, progress, directory):
        others = f"{len(split.val):,} held out" if split.val else f"{len(split.test):,} test"
        print(f"{split.name}: {len(split.train):,} training images, {others}; {self.model}, "
              f"{parameters:,} parameters; {precision} on {company}; {directory.path}"
              f"{f'; from epoch {progress.epoch + 1}, step {progress.step + 1}' if progress.step else ''}")  # fmt: skip

    def step(self, progress, loss):
        if self.bar is None:
            description = f"epoch {progress.epoch + 1}/{self.epochs}"
            self.bar = tqdm(total=self.steps, initial=progress.batch - 1, desc=description, leave=False, disable=None)
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
