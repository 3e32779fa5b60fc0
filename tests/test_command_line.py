"""The parser, its types, and how a script ends: with a status and, for an error, one line."""

import os
import subprocess
import sys

import pytest
from helpers.paths import ROOT

from common import command_line
from common.errors import UserError


@pytest.mark.parametrize(
    ("bounds", "accepted", "refused", "message"),
    [
        ({}, ["0", "-1.5", "1e9"], ["nan", "inf", "x", ""], "must be a number, not"),
        ({"low": 0, "high": 1}, ["0", "1"], ["-0.1", "1.1"], "a number, at least 0 and at most 1"),
        ({"above": 0}, ["0.1"], ["0", "-1"], "must be a number, above 0, not"),
        ({"kind": int, "low": 1}, ["1", "7"], ["0", "1.5", "ten"], "an integer, at least 1, not"),
        ({"kind": int}, ["-3", str(2**63 - 1)], [str(2**63), "9" * 5000], "an integer, not"),
    ],
)
def test_a_number_within_its_bounds_is_accepted(bounds, accepted, refused, message, capsys):
    parser = command_line.Parser("")
    parser.add_argument("--x", type=command_line.number(**bounds))
    for text in accepted:
        assert parser.parse_args([f"--x={text}"]).x == bounds.get("kind", float)(text)
    for text in refused:
        with pytest.raises(SystemExit):
            parser.parse_args([f"--x={text}"])
        assert message in capsys.readouterr().err


def test_explicit_arguments_are_those_without_defaults():
    parser = command_line.Parser("")
    parser.add_argument("--rate", type=command_line.number_or_auto(low=0), default=1.0)
    parser.add_argument("--tag", default="x")
    assert command_line.explicit(parser, ["--rate", "auto"]) == {"rate": None}
    assert command_line.explicit(parser, ["--rate", "1"]) == {"rate": 1.0}
    assert parser.parse_args([]).tag == "x"


def test_help_shows_defaults_of_zero_but_not_none(capsys):
    parser = command_line.Parser("")
    for name, default in {"zero": 0, "none": None, "off": False, "empty": []}.items():
        parser.add_argument(f"--{name}", default=default, help=f"help of {name}")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    assert "help of zero (default: 0)" in text and text.count("default: ") == 1


@pytest.mark.parametrize("script", ["compare_runs", "benchmark"])
def test_help_of_a_script_without_training_arguments_imports_no_torch(script):
    slow = ("torch", "timm", "torchvision", "matplotlib", "pandas", "tensorboard")
    code = (
        f"import sys, {script}\ntry: {script}.main(['--help'])\nexcept SystemExit: pass\n"
        f"print([m for m in {slow} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("wrong", status=2), 2, "wrong"),
        (UserError("broken"), 1, "broken"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
    ],
)
def test_a_script_ends_with_one_line_and_a_status(error, status, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        command_line.run(main)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == status and len(lines) == 1 and lines[0].endswith(line)


def start_help(stdout):
    """compare_runs.py --help. It writes at its end, because PYTHONUNBUFFERED is not set."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    command = [sys.executable, ROOT / "compare_runs.py", "--help"]
    return subprocess.Popen(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_output_to_a_full_disk_is_an_error_of_one_line():
    with open("/dev/full", "w") as full:
        process = start_help(full)
    err = process.communicate()[1]
    assert process.returncode == 1 and len(err.splitlines()) == 1 and "No space left" in err


def test_a_reader_that_has_ended_is_no_error_message():
    reading, writing = os.pipe()
    os.close(reading)
    process = start_help(writing)
    os.close(writing)
    assert process.communicate()[1] == "" and process.returncode == 1


def test_a_wrong_number_of_processes_is_no_traceback():
    """torchrun's WORLD_SIZE, set by hand."""
    command = [sys.executable, ROOT / "train.py", "--dataset", "shapes"]
    variables = {"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | variables | place
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "two" in done.stderr
