"""Drawing without a screen, and saving what was drawn. matplotlib is imported by those who draw."""

import io
import os
import warnings
from pathlib import Path

from common.errors import UserError

# Okabe and Ito's colours, which colour-blind readers can tell apart; RIGHT and WRONG differ in lightness, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
RIGHT, WRONG, OTHER, QUIET = "#0072B2", "#D55E00", "#999999", "#BBBBBB"
KINDS = (".png", ".svg", ".pdf")


def pyplot(font=10):
    """matplotlib.pyplot that needs no screen, with its font's size in points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    warnings.filterwarnings(
        "ignore", message="Glyph .* missing from font"
    )  # names are in whatever script people write
    matplotlib.pyplot.rcParams.update(
        {
            "font.size": font,
            "axes.titlesize": font * 1.1,
            "axes.labelsize": font,
            "xtick.labelsize": font * 0.9,
            "ytick.labelsize": font * 0.9,
            "legend.fontsize": font * 0.95,
            "pdf.fonttype": 42,
            "axes.linewidth": 0.6,
            "xtick.major.width": 0.6,
            "ytick.major.width": 0.6,
        }
    )
    return matplotlib.pyplot


def check_places(paths, option="--output"):
    """Raises UserError for a picture that could not be written, before any work is done."""
    for path in map(Path, paths):
        if path.suffix.lower() not in KINDS:
            raise UserError(
                f"{option} {path}: it takes a name that ends in {', '.join(KINDS)}", status=2
            )
        if not path.parent.is_dir():
            raise UserError(f"{option} {path}: there is no directory {path.parent}", status=2)
        if path.is_dir():
            raise UserError(f"{option} {path} is a directory", status=2)


def save(figure, path, dpi=150):
    """Writes the figure, whole or not at all, and closes it. Raises UserError for a place that can't be written."""
    path, buffer = Path(path), io.BytesIO()
    try:
        figure.savefig(buffer, dpi=dpi, format=path.suffix[1:].lower())
    except ValueError as error:
        raise UserError(f"--output {path}: {error}", status=2) from error
    finally:
        pyplot().close(figure)
    write(path, buffer.getvalue())


def write(path, contents):
    """Bytes to a file that is whole or not there. Raises UserError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(contents)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} can't be written: {error.strerror}") from error


def plain(text, length=60):
    """Text as matplotlib draws it word for word (no mathematics, no hidden legend entries), shortened in its middle."""
    if len(text) > length:
        text = f"{text[: length // 2]}…{text[-(length - length // 2 - 1) :]}"
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def tidy(axis):
    """Two spines and a faint grid."""
    axis.grid(alpha=0.25, linewidth=0.5)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def plain_numbers(axis):
    """0.2, 0.5, 1 instead of powers of ten, on a logarithmic axis (matplotlib's XAxis or YAxis)."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_data_interval()
    axis.set_major_locator(
        LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,))
    )  # of more, the numbers would touch
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
