"""Command lines: the arguments that scripts share, where their values come from, and how a script ends.

A value comes from the command line, else from --config FILE, else from the model's recipe, else from what goes with the
optimizer, else from the default. `resolve` says for each which it was.
"""

import argparse
import contextlib
import copy
import difflib
import os
import signal
import sys
import time

from common.errors import UserError
from common.text import printable


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there is one to show."""

    def _get_help_string(self, action):
        if (
            action.default is argparse.SUPPRESS
            or action.default is None
            or action.default is False
            or action.default == []
        ):
            return action.help or ""
        if getattr(action, "of_recipe", False):
            return f"{action.help} (without a recipe: %(default)s)"
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, which name the nearest option, and no abbreviations."""

    def __init__(self, description, **options):
        super().__init__(
            description=description, formatter_class=Formatter, allow_abbrev=False, **options
        )

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")

    def parse_args(self, args=None, namespace=None):
        found, extra = self.parse_known_args(args, namespace)
        if extra:
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(extra[0].split("=")[0], known, n=1)
            self.error(
                f"unknown argument {extra[0]}"
                + (f"; did you mean {near[0]}?" if near else " (--help shows all)")
            )
        return found


def number(kind=float, low=None, high=None, above=None):
    """An argparse type: a finite number within bounds, refused with a message that names them."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        words = "a whole number" if kind is int else "a number"
        bounds = [f"at least {low}"] * (low is not None) + [f"above {above}"] * (above is not None)
        wanted = " ".join(
            [words, " and ".join(bounds + [f"at most {high}"] * (high is not None))]
        ).strip()
        inside = (
            value is not None
            and value == value
            and abs(value)
            < (2**63 if kind is int else float("inf"))  # what seeds and sizes have room for
            and (low is None or value >= low)
            and (high is None or value <= high)
            and (above is None or value > above)
        )
        if not inside:
            raise argparse.ArgumentTypeError(f"it takes {wanted}, not {text!r}")
        return value

    return convert


def number_or_auto(**bounds):
    """A number, or None for "auto"."""
    convert = number(**bounds)
    return lambda text: None if text in ("auto", None) else convert(text)


def explicit(parser, argv):
    """What stands on the command line, without any default."""
    parser.parse_args(argv)  # for --help and for errors
    bare = copy.deepcopy(parser)
    for action in bare._actions:
        action.default = argparse.SUPPRESS
    return vars(bare.parse_args(argv))


def run(main):
    """Ends a script: its return value is the exit status; what the user can put right is one line, without a traceback."""
    status = _status(main)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # At once, all files being closed: a thread of gloo that frees a tensor while the interpreter is taken down would
        # abort the process (github.com/pytorch/pytorch/issues/190489), and torchrun would end the others for it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _status(main):
    """The exit status of a script's main, after the line for the user where there is one to say."""
    try:
        try:
            return main() or 0
        finally:
            sys.stdout.flush()  # what was printed is out, or is told of: at the exit it would be too late
    except UserError as error:
        status, message = error.status, str(error)
        if status == 2 and os.environ.get("RANK", "0") != "0":
            time.sleep(
                30
            )  # every rank finds the same fault in the command line: the first says it, and torchrun ends all
    except KeyboardInterrupt:
        status, message = 128 + signal.SIGINT, "interrupted"
    except BrokenPipeError:  # nobody reads on
        _discard(sys.stdout, sys.stderr)
        return 1
    except OSError as error:
        _discard(sys.stdout)
        status, message = 1, str(error)
    print(f"{sys.argv[0]}: error: {printable(message)}", file=sys.stderr)
    return status


def _discard(*streams):
    """Lets what could not be written go, which Python would try again at the exit, and complain."""
    for stream in streams:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
