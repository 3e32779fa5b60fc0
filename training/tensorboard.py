"""What TensorBoard shows of a finished run beside its curves: the hyper-parameters' table and the confusion matrix.

    write_end(directory, args, split.classes, counts, step)          # at the end of experiment.run

The matrix is a picture (rows: true classes, blue: the share of the row) and, of up to 20 classes, a table with their names.
"""

import sys

import torch

from analysis import metrics, replicates, tables
from common.text import printable

MOST_NAMES = 20
CELL = 24  # pixels
BLUE = (0.0, 0.27, 0.53)


class Confusion:
    """How often a picture of class i was taken for class j: `counts` (K, K), int64. (answers (B,), labels (B,)) -> nothing"""

    def __init__(self, classes, device):
        self.counts = torch.zeros(classes, classes, dtype=torch.int64, device=device)

    def __call__(self, answers, labels):
        classes = len(self.counts)
        self.counts += torch.bincount(labels * classes + answers, minlength=classes**2).view(
            classes, classes
        )


def write_end(directory, args, classes, counts, step):
    """Writes both into the run's events: classes: their names; counts: a Confusion's, of the pass that was the test.

    The run is finished by then: where the disk has no room for them, that is said, and nothing is raised.
    """
    try:
        _write_end(directory, args, classes, counts.cpu(), step)
    except OSError as error:
        print(
            f"{directory.path}: TensorBoard's last figures could not be written ({error.strerror})",
            file=sys.stderr,
        )


def _write_end(directory, args, classes, counts, step):
    summary = metrics.read_json(directory.path / "summary.json")
    write_hparams(
        directory.events,
        vars(args),
        {key: summary[key] for key in ("test_acc", "test_top5") if key in summary},
    )
    if counts.any():  # else the run was killed between its last evaluation and its end, and this process made none
        directory.events.add_image("confusion", picture(counts), step)
        if len(classes) <= MOST_NAMES:
            directory.events.add_text("confusion", as_table(counts, classes), step)
    directory.events.flush()


def write_hparams(events, arguments, figures):
    """The arguments that say what the run is, and its final figures, for the plugin hparams, in the run's own events."""
    from torch.utils.tensorboard.summary import hparams

    kept = {
        key: value if isinstance(value, (bool, int, float, str)) else str(value)
        for key, value in arguments.items()
        if key not in replicates.PLACE - {"seed"}
    }
    final = {f"final/{key}": value for key, value in figures.items()}
    for part in hparams(kept, final):
        events.file_writer.add_summary(part)
    for key, value in final.items():
        events.add_scalar(key, value)


def picture(counts):
    """float (3, S, S) in [0, 1]: white where a row has nothing, blue where it has all."""
    shares = counts.float() / counts.sum(1, keepdim=True).clamp(min=1)
    cell = max(2, min(CELL, 1000 // len(counts)))
    shares = shares.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    return 1 - shares * (1 - torch.tensor(BLUE).view(3, 1, 1))


def as_table(counts, classes):
    """The counts as Markdown."""
    names = [printable(name) for name in classes]
    rows = zip(names, counts.tolist())
    return tables.markdown_table(
        [{"true \\ answer": name} | dict(zip(names, map(str, row))) for name, row in rows]
    )
