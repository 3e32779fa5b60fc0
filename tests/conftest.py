import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # each worker has a core; more threads would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # read once in a process, and tests of --deterministic come late
sys.path.insert(0, str(ROOT))

from helpers.extras import pytest_runtest_makereport  # noqa: E402, F401

from common.errors import UserError  # noqa: E402


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def no_leftovers():
    """Settings of the process that a script changes are put back after each test."""
    deterministic, benchmark = (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
    )
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = benchmark


@pytest.fixture
def script():
    """Runs a script of the repository as a user does: script("train.py", "--epochs", 1) -> CompletedProcess."""

    def run(name, *arguments, cwd=None, timeout=300, **environment):
        return subprocess.run(
            [sys.executable, str(ROOT / name), *map(str, arguments)],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )

    return run


TINY = (
    "--dataset",
    "shapes",
    "--limit-train",
    96,
    "--limit-test",
    50,
    "--batch-size",
    32,
    "--model",
    "resnet20",
)
# For runs in processes of their own: three steps an epoch, a moving average, and a final test that is a phase of its own.
OPTIONS = (
    *TINY,
    "--device",
    "cpu",
    "--epochs",
    3,
    "--ema-decay",
    0.8,
    "--val-size",
    10,
    "--batch-size",
    28,
)


@pytest.fixture(scope="session")
def forks():
    """Starts processes of their own, see processes.py; its shapes are few_shapes."""
    if not hasattr(os, "fork"):
        pytest.skip("this system can't fork")
    from processes import Forks

    server = Forks()
    yield server
    server.close()


@pytest.fixture(scope="session")
def whole(forks, tmp_path_factory):
    """A run that nothing happened to; not to be changed."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    done = forks.run(*OPTIONS, "--output-dir", directory)
    assert (done.returncode, done.err) == (0, "")
    return directory


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.fixture(scope="session")
def few_shapes():
    from datasets import shapes

    return shapes.load_shapes(train=400, test=100)


@pytest.fixture
def train(tmp_path, monkeypatch, few_shapes):
    """Trains a tiny run in this process: train("--epochs", 2, output="a") -> its directory."""
    import train
    from datasets import shapes

    def run(*arguments, output="run", status=0, script=train):
        place = [] if "--resume" in arguments else [*TINY, "--output-dir", tmp_path / output]
        assert script.main([str(a) for a in (*place, "--device", "cpu", *arguments)]) == status
        return tmp_path / output

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "load_shapes", lambda: few_shapes)
    return run


def refused(*parts):
    """A UserError of one line that says all of these."""
    return pytest.raises(
        UserError, match=rf"\A{'.*'.join(re.escape(str(part)) for part in parts)}[^\n]*\Z"
    )
