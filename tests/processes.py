"""Processes of their own for tests, and the faults that are injected into them from inside.

    forks = Forks()
    run = forks.start("--epochs", 3, "--output-dir", path, faults=[kill_in_save(2, "half written")])
    run.wait().returncode

One process imports everything and forks the others, so that each begins as a fresh interpreter would, but at once. A fault
is a function of this module, called there before the script: what it patches is gone with the process.
"""

import functools
import io
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = (
    300  # seconds; far more than anything takes, also on a machine that stands still for a while
)


class Forks:
    """The process that forks others, which take two cores at most by being started one after the other."""

    def __init__(self):
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        }
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

        self.directory, self.numbers = tempfile.TemporaryDirectory(), itertools.count()

    def ask(self, **request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, *arguments, faults=(), script="train", environment=None):
        """A Process that runs a script of the repository after the faults, with additions to the environment."""
        outputs = [Path(self.directory.name) / f"{next(self.numbers)}" for _ in range(2)]
        pid = self.ask(
            start=[script, *map(str, arguments)],
            faults=list(faults),
            outputs=list(map(str, outputs)),
            environment=environment or {},
        )
        return Process(self, pid, outputs)

    def start_ranks(self, world, *arguments, **options):
        """`world` Processes that train together, without torchrun around them."""
        if world == 1:
            return [self.start(*arguments, **options)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = dict(
            WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
        return [
            self.start(
                *arguments,
                **options,
                environment={k: str(v) for k, v in (common | dict(RANK=i, LOCAL_RANK=i)).items()},
            )
            for i in range(world)
        ]

    def run(self, *arguments, **options):
        return self.start(*arguments, **options).wait()

    def close(self):
        self.server.stdin.close()
        self.server.wait()
        self.directory.cleanup()


class Process:
    def __init__(self, forks, pid, outputs):
        self.forks, self.pid, self.outputs, self.returncode = forks, pid, outputs, None

    def poll(self):
        """The exit status, minus the number of the signal that ended it, or None while it runs."""
        if self.returncode is None:
            self.returncode = self.forks.ask(poll=self.pid)
        return self.returncode

    def kill(self, number=signal.SIGKILL):
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self):
        """(returncode, out, err), when it has ended."""
        end = time.monotonic() + TIMEOUT
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(self.outputs[1].read_text())
            time.sleep(0.01)
        out, err = (path.read_text() for path in self.outputs)
        assert "Traceback" not in err, err
        return SimpleNamespace(returncode=self.returncode, out=out, err=err)


# ---- faults: called in the test, they are only named; called in the process, they happen -----------------------------

FAULTS, AT_THE_END = {}, []  # the latter: functions that a fault asks for, without arguments
NOT_ALLOWED = 77  # exit status of a process where this machine doesn't let a fault happen


def fault(function):
    """Makes a call in the test a pair of name and arguments, and keeps the function for the process."""
    FAULTS[function.__name__] = function
    return functools.wraps(function)(
        lambda *arguments: [function.__name__, list(map(_plain, arguments))]
    )


def _plain(value):
    return str(value) if isinstance(value, Path) else value


def patch(owner, name, wrapper):
    """Puts wrapper(real) in the place of owner.name."""
    setattr(owner, name, wrapper(getattr(owner, name)))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def nth_save(number):
    """A function that says whether last.pt is being saved for the time `number` (1 is the save before the first step)."""
    from common import checkpoint

    saves = []

    def counting(real):
        def save(state, path, previous=None):
            last = Path(path).name == "last.pt"
            saves.extend([1] * last)
            real(state, path, previous)
            saves.extend([0] * last)

        return save

    patch(checkpoint, "save", counting)
    return lambda: saves[-1:] == [1] and sum(saves) == number


STAGES = ("opened", "half written", "written", "verified", "synced", "kept", "renamed")


@fault
def kill_in_save(number, stage):
    """SIGKILL in the save of last.pt of that number, at one of STAGES."""
    import torch

    from common import checkpoint

    now = nth_save(number)

    def saving(real):
        def save(state, file):
            if now() and stage == "opened":
                die()
            if now() and stage == "half written":
                buffer = io.BytesIO()
                real(state, buffer)
                file.write(buffer.getvalue()[: buffer.tell() // 2])
                file.flush()
                die()
            real(state, file)

        return save

    def verifying(real):
        def verify(path, expected):
            if now() and stage == "written":
                die()
            real(path, expected)
            if now() and stage == "verified":
                die()

        return verify

    def renaming(real):
        def replace(source, target):
            if now() and Path(target).name == {"synced": "previous.pt", "kept": "last.pt"}.get(
                stage
            ):
                die()
            real(source, target)
            if now() and stage == "renamed" and Path(target).name == "last.pt":
                die()

        return replace

    patch(torch, "save", saving)
    patch(checkpoint, "verify", verifying)
    patch(os, "replace", renaming)


PHASES = ("first batch", "training", "evaluation", "saving", "test")


@fault
def signal_in(phase, *numbers):
    """Signals to this process, one after the other, in one of PHASES."""

    def send():
        """Each signal when the main thread has handled the one before it."""
        for number, following in zip(numbers, (*numbers[1:], None)):
            os.kill(os.getpid(), number)
            while following and signal.getsignal(following) not in (
                signal.SIG_DFL,
                signal.default_int_handler,
            ):
                time.sleep(0.001)

    once_in(phase, send)


@fault
def terminate_job_in(phases, rank, sign):
    """SIGTERM to torchrun and to all of its ranks, as SLURM sends it, from that rank, once in each of these PHASES.

    The file `sign` holds the number of the training step in which the first ones were sent.
    """
    import torch

    if os.environ["RANK"] != str(rank):
        return
    steps = []

    def send():
        if not Path(sign).exists():
            Path(sign).write_text(str(len(steps)))
        agent = os.getppid()
        for pid in (agent, *Path(f"/proc/{agent}/task/{agent}/children").read_text().split()):
            os.kill(int(pid), signal.SIGTERM)

    for phase in phases:
        once_in(phase, send)

    def counting(real):
        def cross_entropy(*arguments, **options):
            steps.append(1)
            return real(*arguments, **options)

        return cross_entropy

    patch(torch.nn.functional, "cross_entropy", counting)


def once_in(phase, act):
    """Calls act() once, in one of PHASES."""
    import torch

    from training import experiment, loop

    done, steps = [], []

    def act_once():
        if not done:
            done.append(1)
            act()

    def loss(real):
        def cross_entropy(*arguments, **options):
            steps.append(1)
            if len(steps) == {"first batch": 1, "training": 5}.get(phase):
                act_once()
            return real(*arguments, **options)

        return cross_entropy

    def evaluating(real):
        def evaluate(model, batches, **options):
            if phase == ("test" if len(batches.labels) == 50 else "evaluation"):
                act_once()
            return real(model, batches, **options)

        return evaluate

    now = nth_save(2)

    def saving(real):
        def save(state, file, **options):  # options: of broadcast_object_list
            if phase == "saving" and now():
                act_once()
            real(state, file, **options)

        return save

    patch(experiment.F, "cross_entropy", loss)
    patch(loop, "evaluate", evaluating)
    patch(torch, "save", saving)


@fault
def spoil_batches(value, first):
    """The inputs of training batches from number `first` on (from 1) are NaN, or the logits infinite."""
    import models

    def creating(real):
        def create_model(*arguments, **options):
            model, calls = real(*arguments, **options), []

            def before(module, inputs):
                calls.extend([1] * module.training)
                return (
                    (inputs[0] * float("nan"),)
                    if value == "nan" and module.training and len(calls) >= first
                    else None
                )

            def after(module, inputs, logits):
                return (
                    logits * float("inf")
                    if value == "inf" and module.training and len(calls) >= first
                    else None
                )

            model.register_forward_pre_hook(before)
            model.register_forward_hook(after)
            return model

        return create_model

    patch(models, "create_model", creating)


@fault
def file_size_limit(limit):
    """No file may grow larger than so many bytes."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@fault
def memory_limit(megabytes):
    """No more memory than so many MB beyond what the process has; pages of files that are mapped for reading don't count."""
    import resource

    lines = Path("/proc/self/status").read_text().splitlines()
    has = next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (has + 2**20 * megabytes,) * 2)


@fault
def small_disk(path, megabytes, copy):
    """Mounts a file system of that size at `path`, for this process alone; what it holds in the end is copied to `copy`."""
    import ctypes
    import shutil

    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_user, private = 0x20000, 0x10000000, 1 << 18 | 1 << 14
    alone = libc.unshare(new_mounts) == 0 or libc.unshare(new_mounts | new_user) == 0
    size = f"size={megabytes}m".encode()
    if not (
        alone
        and libc.mount(b"none", b"/", None, private, None) == 0
        and libc.mount(b"none", path.encode(), b"tmpfs", 0, size) == 0
    ):
        sys.exit(NOT_ALLOWED)
    AT_THE_END.append(lambda: shutil.copytree(path, copy))


@fault
def as_nobody():
    """An unprivileged user, whom permissions hold back."""
    os.setgid(65534)
    os.setuid(65534)


@fault
def wait_in_step(number, sign, until):
    """Makes the file `sign` in that training step (from 1), and goes on when the file `until` is there."""
    from training import experiment

    steps = []

    def loss(real):
        def cross_entropy(*arguments, **options):
            steps.append(1)
            if len(steps) == number:
                Path(sign).touch()
                wait_for(until)
            return real(*arguments, **options)

        return cross_entropy

    patch(experiment.F, "cross_entropy", loss)


@fault
def tell_of(moment, sign):
    """Makes the file `sign` when the run's directory is opened (moment 0), or in that training step (from 1)."""
    from training import experiment, run_directory

    steps = []

    def opening(real):
        def init(self, path):
            real(self, path)
            Path(sign).touch()

        return init

    def loss(real):
        def cross_entropy(*arguments, **options):
            steps.append(1)
            if len(steps) == moment:
                Path(sign).touch()
            return real(*arguments, **options)

        return cross_entropy

    if moment:
        patch(experiment.F, "cross_entropy", loss)
    else:
        patch(run_directory.RunDir, "__init__", opening)


@fault
def train_as(kind):
    """Trains a model that is compiled, or wrapped by DistributedDataParallel as in one of several processes."""
    import torch

    from training import distributed

    if (
        kind == "compiled"
    ):  # without a C++ compiler: what is tested is what wrapping does to checkpoints
        patch(torch.nn.Module, "compile", lambda real: lambda self: real(self, backend="aot_eager"))
    else:  # also where the run was compiled when it began
        torch.nn.Module.compile = lambda self: None
    if kind == "DDP":
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        distributed.Ranks.parallel = lambda self, model: torch.nn.parallel.DistributedDataParallel(
            model
        )


@fault
def note_loaded(path):
    """Writes the digest of the weights that a run goes on from, as they are in the model, to a file."""
    from common import checkpoint
    from training import experiment

    def loading(real):
        def load_state_dict(self, state):
            real(self, state)
            everything = {
                "weights": self.model.state_dict(),
                "average": self.ema.model.state_dict(),
            }
            Path(path).write_text(checkpoint.digest(everything))

        return load_state_dict

    patch(experiment.Training, "load_state_dict", loading)


@fault
def load_data(name, directory, url, published, until, notes):
    """Loads a data set when the file `until` is there, instead of running a script, and prints a digest of it.

    published: size and md5 of an archive; notes: a file that gets a line each time that a folder's pictures are decoded.
    """
    import data
    from common import checkpoint
    from datasets import archives, folder

    if published:
        archives.ARCHIVES[name] = archives.ARCHIVES[name]._replace(**published)

    def noting(real):
        def decode_all(*arguments):
            with open(notes, "a") as file:
                file.write("decoded\n")
            return real(*arguments)

        return decode_all

    patch(folder, "_decode_all", noting)
    wait_for(until)
    split = data.load(name, directory, data_url=url)
    print(
        checkpoint.digest(
            [split.train.images, split.train.labels, split.test.images, split.test.labels]
        )
    )
    sys.exit(0)


@fault
def train_linear(directory, image_size):
    """Trains a linear model on a folder for an epoch and evaluates it, instead of running a script; prints a digest of it."""
    import torch

    import data
    from common import checkpoint
    from datasets.pipeline import Pipeline
    from training import loop

    split = data.load("folder", directory, image_size=image_size, val_size=40)
    model = torch.nn.Sequential(
        torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, split.num_classes)
    )
    torch.nn.init.zeros_(model[-1].weight), torch.nn.init.zeros_(model[-1].bias)
    train = data.Batches(
        split.train, 4, Pipeline(split.mean, split.std, image_size, ("crop", "flip"))
    )
    test = data.Batches(split.test, 4, Pipeline(split.mean, split.std, image_size), shuffle=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    progress = loop.fit(model, train, optimizer=optimizer, lr_at=lambda step: 0.1, epochs=1)
    assert progress.step == len(train)
    print(split.train.nbytes, checkpoint.digest([model.state_dict(), loop.evaluate(model, test)]))
    sys.exit(0)


def wait_for(path):
    end = time.monotonic() + TIMEOUT
    while not Path(path).exists():
        if time.monotonic() > end:
            raise TimeoutError(path)
        time.sleep(0.01)


# ---- the process that forks ------------------------------------------------------------------------------------------


def serve():
    import importlib

    import processes
    import timm.optim  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import torchvision.transforms.v2  # noqa: F401

    from common import command_line
    from datasets import shapes

    shapes = shapes.load_shapes(train=400, test=100)
    shapes.load_shapes = lambda: shapes
    scripts = {name: importlib.import_module(name) for name in ("train", "experiment", "models")}

    def child(request):
        for number, path in enumerate(request["outputs"], 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ.update(request["environment"])
        name, *sys.argv[1:] = request["start"]
        sys.argv[0] = f"{name}.py"
        status = 1
        try:

            def main():
                for fault_name, arguments in request["faults"]:
                    processes.FAULTS[fault_name](*arguments)
                return scripts[name].main()

            command_line.run(main)
        except SystemExit as stopped:
            status = stopped.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            for function in processes.AT_THE_END:
                function()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer = os.fork() or child(request)
        else:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
