"""The README and the files say the same."""

import ast
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

README = (ROOT / "README.md").read_text()
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
MODULES = [*ROOT.glob("*.py"), *(path for name in PACKAGES for path in (ROOT / name).glob("*.py"))]


def tracked():
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    return done.stdout.split() if done.returncode == 0 else []


def test_the_tree_in_the_readme_is_the_tree():
    tree = re.search(r"```text\n(.*?)```", README, re.S).group(1)
    named = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.strip()}
    hidden = {".gitignore", "pyproject.toml", "LICENSE", "README.md", "requirements.txt"}
    there = {Path(name).parts[0] for name in tracked()} - hidden
    there |= {name for name in tracked() if Path(name).parts[0] in PACKAGES}
    there = {".ci/run" if name == ".ci" else name for name in there} - {*PACKAGES}
    there -= {
        f"{name}/__init__.py" for name in PACKAGES if name != "models"
    }  # they only say what the package is
    assert named == there


def test_ci_runs_the_command_of_the_readme():
    ci = (ROOT / ".ci" / "run").read_text()
    (command,) = re.findall(r"^python3 -m venv .*pytest -n auto$", README, re.M)
    assert command in ci.splitlines() and ".venv/bin/ruff check ." in ci.splitlines()


def test_scripts_that_the_readme_calls_exist_and_take_its_arguments():
    calls = re.findall(r"python3? (\w+\.py)([^`\n]*)", README)  # in blocks and in the table
    assert {"train.py", "compare_runs.py", "show_example.py", "benchmark.py", "sweep.py"} <= {
        name for name, _ in calls
    }
    for name, rest in calls:
        source = (ROOT / name).read_text() + (ROOT / "cli.py").read_text()
        for option in re.findall(r"(?<= )--[a-z-]+", rest.split("#")[0]):
            assert option == "--help" or f'"{option}"' in source, f"{name} has no {option}"


def test_the_tests_that_the_readme_names_exist():
    named, file = 0, None
    for path, name in re.findall(r"`(test_\w+\.py)?(?:::(test_\w+))?`", README):
        file = path or file
        if name:
            assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), f"{file}::{name}"
            named += 1
    assert named > 20


def test_modules_do_nothing_when_they_are_imported():
    """No module parses, prints or sets a seed outside a function or `if __name__`."""
    effects = re.compile(
        r"(print|torch\.manual_seed|torch\.set_\w+|random\.seed|np\.random|open)\b"
    )
    for path in MODULES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not effects.match(line), f"{path}:{number}"


def test_requirements_name_what_the_code_imports():
    named = {
        re.split("[>=]", line)[0]
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line[0] != "#"
    }
    own = {path.stem for path in ROOT.glob("*.py")} | {*PACKAGES}
    nodes = [n for path in MODULES for n in ast.walk(ast.parse(path.read_text()))]
    imported = {
        alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    imported = {name.split(".")[0] for name in imported} - own
    outside = {name for name in imported if name not in sys.stdlib_module_names}
    outside -= {
        "peft",
        "PIL",
        "filelock",
        "safetensors",
        "huggingface_hub",
    }  # they come with others
    outside -= {
        "submitit",
        "plotly",
        "gradio",
        "onnxscript",
        "onnxruntime",
    }  # asked for where they are needed
    assert outside | {"tensorboard"} == named
