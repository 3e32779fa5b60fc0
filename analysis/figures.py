"""Drawing: matplotlib's settings, colors, windows, and files that are complete or absent.

matplotlib is imported when something is drawn.
"""

import io
import os
import sys
import warnings
from pathlib import Path

from common import files
from common.errors import UserError, first_line

# Okabe and Ito's colors, which color-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# RIGHT and WRONG also differ in lightness.
RIGHT, WRONG, OTHER, QUIET = "#0072B2", "#D55E00", "#999999", "#BBBBBB"
SUFFIXES = (".png", ".svg", ".pdf")


def has_display():
    """Whether matplotlib can open windows here. It then also draws files with that backend."""
    try:
        import matplotlib.pyplot
        from matplotlib.backends import BackendFilter, backend_registry

        backend = matplotlib.get_backend()  # chosen by $MPLBACKEND or by what can open a window
    except (ImportError, ValueError):  # a backend that can't be loaded, or is unknown
        return False
    return backend.lower() in backend_registry.list_builtin(BackendFilter.INTERACTIVE)


def show(paths):
    """Opens windows with the figures that were drawn for them; without a display, names the files.

    Returns when the windows are closed.
    """
    if has_display():
        import matplotlib.pyplot as plt

        plt.show()
    else:
        files = " ".join(map(str, paths))
        print(f"--show: there is no display; the figure is in {files}", file=sys.stderr)


def pyplot(font=10, windows=False):
    """matplotlib.pyplot for files or, with `windows`, also for windows. font: size in points."""
    try:
        import matplotlib
    except ValueError as error:
        raise UserError(f"$MPLBACKEND: {first_line(error)}", status=2) from error
    if not windows:
        matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Names of runs and classes may be in any script.
    warnings.filterwarnings("ignore", message="Glyph .* missing from font")
    relative_sizes = {
        "font.size": 1,
        "axes.titlesize": 1.1,
        "axes.labelsize": 1,
        "xtick.labelsize": 0.9,
        "ytick.labelsize": 0.9,
        "legend.fontsize": 0.95,
    }
    plt.rcParams.update({name: font * size for name, size in relative_sizes.items()})
    plt.rcParams.update({"axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6})
    plt.rcParams["pdf.fonttype"] = 42  # TrueType: text in a PDF stays text
    return plt


def check_places(paths, option="--output"):
    """Raises UserError if a figure can't be written to one of the paths."""
    for path in map(Path, paths):
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{option} {path}: must end in {', '.join(SUFFIXES)}", status=2)
        if not path.parent.is_dir():
            raise UserError(f"{option} {path}: there is no directory {path.parent}", status=2)
        if path.is_dir():
            raise UserError(f"{option} {path} is a directory", status=2)
        if not os.access(path.parent, os.W_OK):
            raise UserError(f"{path} can't be written: give a place for it with {option}", status=2)


def save(figure, path, dpi=150):
    """Writes and closes a figure. Raises UserError if the file can't be written."""
    import matplotlib.pyplot as plt

    path, buffer = Path(path), io.BytesIO()
    try:
        figure.savefig(buffer, dpi=dpi, format=path.suffix[1:].lower())
    except ValueError as error:
        raise UserError(f"{path} can't be drawn: {first_line(error)}") from error
    finally:
        plt.close(figure)
    write(path, buffer.getvalue())


def write(path, contents):
    """Replaces a file by these bytes. Raises UserError if it can't be written."""
    try:
        with files.replacing(path) as file:
            file.write(contents)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}") from error


def plain(text, length=60):
    """Text without mathematics for matplotlib, shortened in its middle to a length."""
    if len(text) > length:
        text = f"{text[: length // 2]}…{text[-(length - length // 2 - 1) :]}"
    if text.startswith("_"):  # matplotlib hides such entries of a legend
        text = f" {text}"
    return text.replace("$", r"\$")


def tidy(axis):
    """Two spines and a faint grid."""
    axis.grid(alpha=0.25, linewidth=0.5)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def plain_numbers(axis):
    """0.2, 0.5, 1 instead of powers of ten, on a logarithmic XAxis or YAxis of matplotlib."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_data_interval()
    subs = (1, 2, 5) if high < 100 * low else (1,)  # more numbers would touch
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
