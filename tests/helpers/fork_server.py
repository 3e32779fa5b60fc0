"""Forks a process for each line of its input, a JSON object, and prints its process id.

{"poll": id} prints the exit status of a process instead, or null while it runs.
"""

import importlib
import json
import os
import sys
import traceback

import timm.optim  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import torchvision.transforms.v2  # noqa: F401

from common import command_line
from datasets import shapes
from helpers import faults

SCRIPTS = ("train", "train_vit", "train_sota")


def run(script, request):
    """Runs a script in this process, which is a new one, and ends it."""
    for number, path in enumerate(request["outputs"], 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(request["environment"])
    sys.argv = [f"{request['script']}.py", *request["arguments"]]

    def main():
        faults.inject(request["faults"])
        return script.main()

    status = 1
    try:
        command_line.run(main)
    except SystemExit as stopped:
        status = stopped.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        faults.at_exit()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve():
    few_shapes = shapes.load_shapes(train=400, test=100)
    shapes.load_shapes = lambda: few_shapes
    scripts = {name: importlib.import_module(name) for name in SCRIPTS}
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork() or run(scripts[request["script"]], request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
