"""Command lines: a parser with short errors, types of arguments, and how a script ends."""

import argparse
import contextlib
import difflib
import io
import math
import os
import signal
import sys
import time

from common.errors import UserError
from common.text import printable


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of an option, unless it is None, False or an empty list."""

    def _get_help_string(self, action):
        default = getattr(action, "shown_default", action.default)
        hidden = (argparse.SUPPRESS, None, False)
        if any(default is value for value in hidden) or default == []:
            return action.help or ""
        if default != action.default:
            return f"{action.help} (default: {default})"
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations. Its errors have one line and name the nearest option."""

    def __init__(self, description, **options):
        super().__init__(
            description=description, formatter_class=Formatter, allow_abbrev=False, **options
        )

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options = [
                option for action in self._all_actions(parsed) for option in action.option_strings
            ]
            near = difflib.get_close_matches(unknown[0].split("=")[0], options, n=1)
            hint = f"; did you mean {near[0]}?" if near else " (--help shows all)"
            self.error(f"unknown argument {unknown[0]}{hint}")
        return parsed

    def _all_actions(self, parsed):
        """The options of this parser, and of the sub-command that was chosen."""
        for action in self._actions:
            yield action
            if isinstance(action, argparse._SubParsersAction):
                yield from action.choices[getattr(parsed, action.dest)]._actions


def number(kind=float, low=None, high=None, above=None):
    """An argparse type: a finite number with low <= number <= high and number > above."""
    bounds = ((low, "at least"), (above, "above"), (high, "at most"))
    limits = " and ".join(f"{words} {bound}" for bound, words in bounds if bound is not None)
    wanted = ", ".join(filter(None, ["an integer" if kind is int else "a number", limits]))
    largest = 2**63 if kind is int else math.inf  # torch holds sizes and seeds as int64

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        inside = (
            abs(value) < largest
            and (low is None or value >= low)
            and (high is None or value <= high)
            and (above is None or value > above)
        )
        if not inside:
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text!r}")
        return value

    return convert


def number_or_auto(**bounds):
    """An argparse type: a number, or None for "auto"."""
    convert = number(**bounds)
    return lambda text: None if text in ("auto", None) else convert(text)


def explicit(parser, argv=None):
    """The arguments that are given on the command line, by name, without any default."""
    unset = object()
    values = argparse.Namespace()
    repeatable = set()
    for action in parser._actions:
        if action.default == []:  # argparse appends to a copy of what it finds
            repeatable.add(action.dest)
            setattr(values, action.dest, None)
        elif action.dest != "help":
            setattr(values, action.dest, unset)
    parser.parse_args(argv, values)
    return {
        name: value
        for name, value in vars(values).items()
        if value is not unset and not (name in repeatable and value is None)
    }


def run(main):
    """Ends the process with the status that main() returns, or with one line for its error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # its encoding may lack characters of a name
            stream.reconfigure(errors="backslashreplace")
    status = _exit_status(main)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # A gloo thread that frees a tensor during the interpreter's shutdown aborts the process
        # (github.com/pytorch/pytorch/issues/190489), and torchrun would then stop the other ranks.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _exit_status(main):
    try:
        try:
            return main() or 0
        finally:
            sys.stdout.flush()  # at interpreter exit it would be too late to handle an error
    except UserError as error:
        status, message = error.status, str(error)
        if status == 2 and os.environ.get("RANK", "0") != "0":
            time.sleep(30)  # rank 0 prints the same message, and then torchrun stops all ranks
    except KeyboardInterrupt:
        status, message = 128 + signal.SIGINT, "interrupted"
    except BrokenPipeError:  # the reader of the output has ended
        _discard(sys.stdout, sys.stderr)
        return 1
    except OSError as error:
        _discard(sys.stdout)
        status, message = 1, str(error)
    print(f"{sys.argv[0]}: error: {printable(message)}", file=sys.stderr)
    return status


def _discard(*streams):
    """Drops unwritten output, which Python would try to write again at exit."""
    for stream in streams:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
