"""The documentation agrees with the code, and the code keeps the rules of the repository."""

import ast
import importlib
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT

from analysis import published

README = (ROOT / "README.md").read_text()
DOCUMENTS = {path.name: path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
PACKAGES = ["analysis", "bench", "common", "datasets", "models", "show", "sweeps", "training"]
SCRIPTS = ["train", "train_vit", "train_sota", "compare_runs", "show_example", "benchmark", "sweep"]
MODULES = [*ROOT.glob("*.py"), *(path for name in PACKAGES for path in ROOT.glob(f"{name}/*.py"))]
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in MODULES}
OTHER_FILES = {
    *("README.md", "LICENSE", "requirements.txt", "requirements-extras.txt", "pyproject.toml"),
    *(".gitignore", "data.py", "runs", "results", "tests", "docs", ".ci"),
}


def tracked():
    if not shutil.which("git"):
        pytest.skip("no git")
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git repository")
    return [Path(line) for line in done.stdout.splitlines() if (ROOT / line).is_file()]


# ---- documentation -------------------------------------------------------------------------------


def test_the_tree_in_the_readme_names_every_script_and_module():
    tree = re.search(r"```text\n(.*?)```", README, re.S).group(1)
    named = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.strip()}
    modules = {path for path in TREES if not path.endswith("/__init__.py")}
    directories = {"runs", "results", "docs", "tests", ".ci/run"}
    assert named - {"models/__init__.py"} == modules | directories


def test_ci_runs_the_command_of_the_readme():
    (command,) = re.findall(r"^python3 -m venv .*pytest -n auto$", README, re.M)
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert {command, ".venv/bin/ruff check .", ".venv/bin/ruff format --check ."} <= set(lines)


def commands(text):
    """(script, arguments) of each command in the code blocks and code spans of a document."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.S)
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += [span.replace("\n", " ") for span in spans]
    for line in lines:
        for part in re.split(r"&&|\|", line):
            match = re.search(r"(?:python3?|torchrun) .*?\b(\w+)\.py\b(.*)", part)
            if match and match.group(1) in SCRIPTS:
                yield match.group(1), shlex.split(match.group(2), comments=True)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documented_commands_are_accepted_by_their_script(document, capsys):
    for script, arguments in commands(DOCUMENTS[document]):
        module = importlib.import_module(script)
        parser = module.build_parser()
        if script == "sweep" and arguments[:1] and arguments[0] in module.COMMANDS:
            parser = module.COMMANDS[arguments.pop(0)][0]()
        try:
            parser.parse_args(arguments)
        except SystemExit as stopped:
            message = f"{script}.py {shlex.join(arguments)}: {capsys.readouterr().err}"
            assert stopped.code == 0, message


def test_the_readme_has_a_command_of_every_script():
    assert {script for script, _ in commands(README)} == set(SCRIPTS)


def test_documented_tests_exist():
    count = 0
    for text in DOCUMENTS.values():
        file = None
        for path, name in re.findall(r"`(test_\w+\.py)?(?:::(test_\w+))?`", text):
            file = path or file
            if name:
                assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), f"{file}::{name}"
                count += 1
    assert count > 20


# ---- files ---------------------------------------------------------------------------------------


def test_the_table_of_times_has_the_published_accuracies():
    """It is written by hand, for it also has runs that are not published."""
    text = (ROOT / "docs/results.md").read_text()
    table = text.split("\n## Time to accuracy\n")[1].split("\n### ")[0]
    names = sorted(path.name for path in (ROOT / "results").glob("airbench*"))
    assert {"airbench94", "airbench95", "airbench_c100"} <= set(names)
    rows = [row for name in names for row in published.load(ROOT / "results" / name).rows]
    cells = [f"n = {row['n']} | {row['test %']} | {row['test % with TTA']} |" for row in rows]
    places = [table.index(text) for text in cells]
    assert places == sorted(places)  # the rows of one network follow each other
    for row in published.load(ROOT / "results/resnet20-epochs").rows:
        epochs = row["experiment"].removesuffix("-epochs")
        assert f"{epochs} epochs, in fp32 without AMX; n = {row['n']} | {row['test %']} |" in table


def test_the_top_level_holds_only_scripts_and_packages():
    scripts = {f"{name}.py" for name in SCRIPTS}
    assert {path.parts[0] for path in tracked()} == {*OTHER_FILES, *PACKAGES, *scripts}


def test_no_file_names_a_directory_of_a_developer():
    private = re.compile(r"/(?:work|root|home|Users)/\w")
    for path in tracked():
        if path.suffix not in (".png", ".npz", ".pt"):
            for number, line in enumerate((ROOT / path).read_text().splitlines(), 1):
                assert not private.search(line), f"{path}:{number}: {line}"


def required_packages(name):
    lines = (ROOT / name).read_text().splitlines()
    return {re.split("[>=]", line)[0] for line in lines if not line.startswith("#")}


def test_requirements_are_the_imported_packages():
    nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
    imported = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    imported = {name.split(".")[0] for name in imported} - {*PACKAGES, *SCRIPTS, "data"}
    imported -= sys.stdlib_module_names
    # They come with packages of requirements.txt.
    imported -= {"PIL", "filelock", "safetensors", "huggingface_hub", "yaml"}
    required, extras = map(required_packages, ("requirements.txt", "requirements-extras.txt"))
    assert imported - extras == required - {"tensorboard"}
    # tensorboard is imported by torch.utils.tensorboard, and onnx by torch.onnx.
    assert extras - imported == {"onnx", "playwright"}


# ---- modules -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_has_a_main_that_takes_its_arguments(name):
    script = importlib.import_module(name)
    (parameter,) = inspect.signature(script.main).parameters.values()
    assert parameter.name == "argv" and parameter.default is None
    assert script.__doc__ and script.build_parser()


def test_modules_do_nothing_when_they_are_imported():
    """They only import and define; the exceptions are `if __name__` and imports that may fail."""
    definitions = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    assignments = (ast.Assign, ast.AnnAssign)
    for path, tree in TREES.items():
        assert ast.get_docstring(tree), f"{path} has no docstring"
        for node in tree.body[1:]:
            fallback = isinstance(node, ast.Try) and isinstance(node.body[0], ast.Import)
            main = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
            allowed = isinstance(node, (*definitions, *assignments)) or fallback or main
            assert allowed, f"{path}:{node.lineno}: {ast.unparse(node)}"


# The step loop; and a constructor whose parameters are the options of --model-arg.
LARGE = {"training/loop.py::train_epoch", "models/vit.py::__init__"}


def test_functions_have_at_most_60_lines_and_8_parameters():
    large = {}
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                parameters = len([one for one in named if one.arg not in ("self", "cls")])
                if lines > 60 or parameters > 8:
                    large[f"{path}::{node.name}"] = (lines, parameters)
    assert set(large) == LARGE


USES = {
    "common": set(),
    "datasets": {"common"},
    "models": {"common"},
    "analysis": {"common"},
    "training": {"common", "datasets", "models", "data"},
}


@pytest.mark.parametrize("package", USES)
def test_dependencies_of_packages_point_downwards(package):
    for path, tree in TREES.items():
        if path.startswith(f"{package}/"):
            for node in ast.walk(tree):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [node.module]
                used = {name.split(".")[0] for name in names} & {*PACKAGES, *SCRIPTS, "data"}
                assert used <= USES[package] | {package}, f"{path}:{node.lineno}"


# ---- tests ---------------------------------------------------------------------------------------

SKIPPED = """
import pytest

@pytest.mark.extras("pytest")
def test_installed():
    pytest.skip("why")

@pytest.mark.extras("a_package_that_is_missing")
def test_missing():
    pytest.skip("why")
"""


@pytest.mark.parametrize(("required", "result"), [("1", "1 failed, 1 skipped"), ("0", "2 skipped")])
def test_a_skipped_test_of_an_installed_extra_fails_if_required(tmp_path, required, result):
    (tmp_path / "test_skipped.py").write_text(SKIPPED)
    options = ["-p", "helpers.extras", "-p", "no:cacheprovider", "-c", "/dev/null"]
    changes = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT / "tests")}
    environment = os.environ | changes | {"REQUIRE_EXTRAS": required}
    command = [sys.executable, "-m", "pytest", "--rootdir", tmp_path, *options, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result in done.stdout, done.stdout
