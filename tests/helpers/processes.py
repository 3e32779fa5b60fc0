"""Processes that train, and their faults.

    forks = Forks()
    done = forks.run("--epochs", 3, "--output-dir", path, faults=[(kill_in_save, 2, "written")])
    done.returncode, done.out, done.err

One process imports everything and forks the others, so that each starts in milliseconds. A fault
is a function of helpers/faults.py with its arguments, called in the process before the script.
"""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from helpers.paths import ROOT

TIMEOUT = 600  # seconds; much more than any process takes


class Forks:
    """The server (helpers/fork_server.py) and the processes that it forks."""

    def __init__(self):
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        self.server = subprocess.Popen(
            [sys.executable, "-m", "helpers.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )
        self.directory, self.numbers = tempfile.TemporaryDirectory(), itertools.count()

    def ask(self, **request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, *arguments, faults=(), script="train", **environment):
        """A Process that runs the faults and then a script."""
        number = next(self.numbers)
        outputs = [Path(self.directory.name) / f"{number}-{name}" for name in ("out", "err")]
        pid = self.ask(
            script=script,
            arguments=[str(word) for word in arguments],
            faults=encode(faults),
            outputs=[str(path) for path in outputs],
            environment={name: str(value) for name, value in environment.items()},
        )
        return Process(self, pid, outputs)

    def start_ranks(self, world, *arguments, faults=(), faulty=None, **options):
        """`world` Processes that train together. faulty: the only rank with faults (None: all)."""
        if world == 1:
            return [self.start(*arguments, faults=faults, **options)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            options |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
        options |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        return [
            self.start(
                *arguments,
                faults=faults if faulty in (None, rank) else (),
                RANK=rank,
                LOCAL_RANK=rank,
                **options,
            )
            for rank in range(world)
        ]

    def run(self, *arguments, **options):
        return self.start(*arguments, **options).wait()

    def run_ranks(self, world, *arguments, status=0, **options):
        """Ranks that must all end with this exit status; returns the first one's output."""
        processes = self.start_ranks(world, *arguments, **options)
        ends = [process.wait() for process in processes]
        assert [done.returncode for done in ends] == [status] * world, [done.err for done in ends]
        return ends[0].out

    def resume(self, directory, *arguments, **options):
        """Resumes a run, which must finish."""
        done = self.run("--resume", directory, "--device", "cpu", *arguments, **options)
        assert done.returncode == 0, done.err
        return done

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
        """(returncode, out, err) when the process has ended."""
        wait_until(lambda: self.poll() is not None)
        out, err = (path.read_text() for path in self.outputs)
        assert "Traceback" not in err, err
        return SimpleNamespace(returncode=self.returncode, out=out, err=err)


def torchrun(world, *arguments, script=(ROOT / "train_vit.py",), **environment):
    """A subprocess.Popen of torchrun with a script."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}"]
    return subprocess.Popen(
        [*command, "--standalone", *map(str, (*script, *arguments))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def output(process):
    """(stdout, stderr) of a subprocess.Popen when it has ended."""
    try:
        return process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        raise


def encode(faults):
    return json.dumps([[fault.__name__, *arguments] for fault, *arguments in faults], default=str)


def assert_one_error(done, *parts, status=1):
    """The process ended with this status and one line that contains the parts."""
    assert done.returncode == status and len(done.err.splitlines()) == 1, done.err
    assert all(str(part) in done.err for part in parts), done.err


def wait_until(condition):
    end = time.monotonic() + TIMEOUT
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.005)
