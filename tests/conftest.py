import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has a core; more threads would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read once in a process, and tests of --deterministic come late.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from helpers.archives import make_archive  # noqa: F401
from helpers.extras import find_chromium, pytest_runtest_makereport  # noqa: F401
from helpers.paths import ROOT
from helpers.pets import make_pets
from helpers.processes import Forks
from helpers.published import runs  # noqa: F401
from helpers.runs import OPTIONS, TINY, stopped_after

from analysis import figures
from datasets import image_folder, shapes


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def restored_settings():
    """Each test starts with the same random numbers and with the settings of the process as they
    were: a script may change them.
    """
    torch.manual_seed(0)
    deterministic = torch.are_deterministic_algorithms_enabled()
    benchmark, allow_tf32 = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = benchmark
    torch.backends.cudnn.allow_tf32 = allow_tf32


@pytest.fixture(scope="module")
def one_thread():
    """Limits PyTorch to one thread during the tests of a module."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def few_shapes():
    return shapes.load_shapes(train=400, test=100)


@pytest.fixture
def train(tmp_path, monkeypatch, few_shapes):
    """Trains a tiny model in this process and returns the run's directory.

    train("--epochs", 2, output="a"); stop_after: the step after which the run gets a SIGTERM;
    script: the module whose main is called.
    """
    import train

    def run(*arguments, output="run", status=0, stop_after=None, script=train):
        directory = tmp_path / output
        options = [] if "--resume" in arguments else [*TINY, "--output-dir", directory]
        words = [str(word) for word in (*options, "--device", "cpu", *arguments)]
        if stop_after is None:
            assert script.main(words) == status
        else:
            with stopped_after(stop_after):
                assert script.main(words) == 143
        return directory

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "load_shapes", lambda: few_shapes)
    return run


@pytest.fixture
def script():
    """Runs a script as a user does: script("train.py", "--epochs", 1) -> CompletedProcess."""

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


@pytest.fixture(scope="session")
def forks():
    """Starts processes that train, see helpers/processes.py."""
    if not hasattr(os, "fork"):
        pytest.skip("this system can't fork")
    server = Forks()
    yield server
    server.close()


@pytest.fixture(scope="session")
def uninterrupted(forks, tmp_path_factory):
    """The directory of a run of OPTIONS without any fault; not to be changed."""
    directory = tmp_path_factory.mktemp("runs") / "uninterrupted"
    done = forks.run(*OPTIONS, "--output-dir", directory)
    assert (done.returncode, done.err) == (0, "")
    return directory


@pytest.fixture
def copy(uninterrupted, tmp_path):
    return Path(shutil.copytree(uninterrupted, tmp_path / "copy"))


@pytest.fixture
def stand_in_runs(tmp_path, monkeypatch, few_shapes):
    """sweep.py starts helpers/stand_in_train.py, in an empty directory and on two cores."""
    from sweeps import launch, plans

    stand_in = [sys.executable, str(ROOT / "tests/helpers/stand_in_train.py")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plans, "python", lambda script: stand_in)
    monkeypatch.setattr(shapes, "load_shapes", lambda: few_shapes)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(launch, "END_WITH_PARENT", [])
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.01)


@pytest.fixture
def drawn(monkeypatch):
    """Keeps the figures that would be saved; saving them takes longer than the tests."""
    kept = []
    monkeypatch.setattr(figures, "save", lambda figure, path, dpi: kept.append(figure))
    yield kept
    figures.pyplot().close("all")


@pytest.fixture
def browser():
    """Chromium without a window."""
    api = pytest.importorskip("playwright.sync_api", reason="no playwright")
    chromium = find_chromium()
    if not chromium:
        pytest.skip("no Chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox"], timeout=180_000
        )
        with contextlib.closing(browser):
            yield browser


@pytest.fixture
def folder(tmp_path):
    """Cats and dogs: three training and two test images each, of several sizes and two formats."""
    return make_pets(tmp_path / "pets")


@pytest.fixture
def decoded(monkeypatch):
    """The names of the images that are decoded, in this order."""
    names, decode = [], image_folder.decode

    def recording(path, size):
        names.append(Path(path).name)
        return decode(path, size)

    monkeypatch.setattr(image_folder, "decode", recording)
    return names
