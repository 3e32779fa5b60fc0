"""What TensorBoard shows besides the curves: images, hyperparameters, confusion matrix."""

import sys

import torch
import torchvision
from torch.utils.tensorboard.summary import hparams

from common.scopes import with_scope
from common.text import printable

MAX_NAMES = 20  # classes whose confusion matrix is also written as a table with names
MAX_DRAWN = 1000  # classes whose confusion matrix is drawn, with two pixels each at least
CELL = 24  # pixels
FINAL = ("test_acc", "test_top5", "test_tta_acc", "test_tta_top5", "train_clean_acc")
BLUE = (0.0, 0.27, 0.53)


def write_images(events, batches, card):
    """Writes a square grid of the first augmented training images."""
    inputs, _ = next(batches.epoch(0))
    std, mean = (
        torch.tensor(card[key], device=inputs.device).view(3, 1, 1) for key in ("std", "mean")
    )
    images = (inputs[:64] * std + mean).clamp(0, 1).cpu()
    side = int(len(images) ** 0.5)
    grid = torchvision.utils.make_grid(images[: side**2], nrow=side, padding=0)
    events.add_image("augmented training images", grid)


def write_end(directory, arguments, figures, classes, state):
    """Writes hyperparameters and confusion matrix. The run is finished: a full disk is only
    reported.

    figures: the final accuracies; classes: names; state.confusion.counts: all zero where the run
    was killed between its last evaluation and its end, and this process made no evaluation.
    """
    counts, step = state.confusion.counts.cpu(), state.progress.step
    try:
        final = {key: value for key, value in figures.items() if key in FINAL}
        write_hparams(directory.events, arguments, final)
        if counts.any():
            if len(classes) <= MAX_DRAWN:
                directory.events.add_image("confusion", confusion_image(counts), step)
            if len(classes) <= MAX_NAMES:
                directory.events.add_text("confusion", confusion_table(counts, classes), step)
        directory.events.flush()
    except OSError as error:
        message = f"{directory.path}: the end of the TensorBoard events can't be written"
        message = f"{message} ({error.strerror})"
        print(message, file=sys.stderr)
        directory.append_log(message)


def write_hparams(events, arguments, figures):
    """For the plugin "hparams", in the events of the run: what identifies it, and its figures."""
    shown = {
        key: value if isinstance(value, (bool, int, float, str)) else str(value)
        for key, value in arguments.items()
        if key in with_scope("identity")
    }
    final = {f"final/{key}": value for key, value in figures.items()}
    for part in hparams(shown, final):
        events.file_writer.add_summary(part)
    for key, value in final.items():
        events.add_scalar(key, value)


def confusion_image(counts):
    """Counts (K, K) -> float (3, S, S) in [0, 1]. Rows: true class; blue: share of the row."""
    shares = counts.float() / counts.sum(1, keepdim=True).clamp(min=1)
    cell = max(2, min(CELL, 1000 // len(counts)))
    shares = shares.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    return 1 - shares * (1 - torch.tensor(BLUE).view(3, 1, 1))


def confusion_table(counts, classes):
    """The counts as a Markdown table."""
    header = ["true \\ predicted", *(printable(name).replace("|", "\\|") for name in classes)]
    lines = [header, ["---"] * len(header)]
    lines += [[name, *map(str, row)] for name, row in zip(header[1:], counts.tolist())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
