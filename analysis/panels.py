"""What can be drawn of runs: panels, x axes and sizes. Importing it imports no other library."""

from typing import NamedTuple

# For each panel: the columns or scalars of a run that it shows, and the title of each axis.
PANELS = {
    "curves": {
        "train_loss": "training loss (nats)",
        "eval_loss": "evaluation loss (nats)",
        "train_acc": "training accuracy (%)",
        "eval_acc": "evaluation accuracy (%)",
    },
    "error": {"train_error": "training error (%)", "eval_error": "evaluation error (%)"},
    "efficiency": {
        "parameters": "parameters (millions)",
        "gmacs": "GMACs of one image",
        "seconds": "training time (s)",
    },
    "bars": {"test": "test accuracy (%)"},
    "family": {"test": "test accuracy (%)"},
}
X_TITLES = {"epoch": "epoch", "step": "step", "seconds": "seconds of training"}


class Size(NamedTuple):
    """Width and height of an axis (inches), axes in a row, font size (points), dots per inch."""

    width: float
    height: float
    columns: int
    font: float
    dpi: int


SIZES = {
    "screen": Size(5.6, 3.7, 2, 10, 150),
    "page": Size(3.5, 2.4, 2, 8, 300),
    "column": Size(3.4, 1.9, 1, 7, 300),
}
