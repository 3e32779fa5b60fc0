"""Drawing without a screen, and saving what was drawn. matplotlib is imported by those who draw."""

from errors import UserError


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def save(figure, path, dpi):
    """Writes the figure and closes it. Raises UserError for a place or a kind of file that can't be written."""
    try:
        figure.savefig(path, dpi=dpi)
    except (OSError, ValueError) as error:
        raise UserError(f"--output {path}: {error}", status=2) from error
    finally:
        pyplot().close(figure)
