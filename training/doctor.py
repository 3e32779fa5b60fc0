"""--doctor: what this machine has, how fast it multiplies matrices, and what it can reach.

report(args)        # prints a few lines, within seconds, also without a network
"""

import http.client
import shutil
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import torch

from common.free_memory import available
from datasets import image_folder
from datasets.archives import ARCHIVES, MIRRORS
from training import devices, distributed, environment, mixed_precision
from training.memory import GB
from training.out_of_memory import is_out_of_memory

TIMEOUT = 3  # seconds for all addresses together
SIDES = {"cuda": 8192, "cpu": 1024, "mps": 4096}  # of the matrices
SECONDS = 0.3  # of products of each type


def report(args):
    """Prints what --doctor shows; returns the exit status."""
    if not distributed.is_main_process():
        return 0
    device = devices.select_device(args.device)
    waiting = start_requests(_addresses(args.data_url))  # they are answered meanwhile
    facts = environment.environment(device)
    versions = [f"{name} {facts[name] or 'missing'}" for name in environment.PACKAGES]
    print(f"versions: Python {facts['python']}, {', '.join(versions)}; {facts['platform']}")
    for line in _devices(facts["threads"]):
        print(line)
    chosen = mixed_precision.amp_dtype("auto", device)
    name = mixed_precision.name(chosen)
    print(f"{device}: --amp auto computes in {name}")
    speeds = [
        f"{_measured(_gigaflops, device, dtype)} in {mixed_precision.name(dtype)}"
        for dtype in (torch.float32, torch.bfloat16)
    ]
    print(f"matrix products, GFLOP/s: {', '.join(speeds)} (side {SIDES[device.type]})")
    disks = [f"{path}/ {_free_disk(path) / GB:.1f}" for path in ("runs", args.data_dir)]
    print(f"free disk space, GB: {', '.join(disks)}")
    print(f"data in {args.data_dir}/: {', '.join(_data(Path(args.data_dir)))}")
    for line in waiting():
        print(line)
    return 0


def _devices(threads):
    """A line for the CPU and one for each GPU."""
    cpu = available(torch.device("cpu")) / GB
    yield f"cpu: {environment.processor()}, {threads} threads, {cpu:.1f} GB of memory free"
    for number in range(torch.cuda.device_count()):
        versions = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        memory = _measured(_gpu_memory, number)
        yield f"cuda:{number}: {torch.cuda.get_device_name(number)}, {memory}; {versions}"
    if torch.backends.mps.is_available():
        yield f"mps: {available(torch.device('mps')) / GB:.1f} GB of memory free"


def _gpu_memory(number):
    free, total = torch.cuda.mem_get_info(number)
    return f"{free / GB:.1f} of {total / GB:.1f} GB of memory free"


def _gigaflops(device, dtype):
    return f"{matrix_speed(device, dtype) / 1e9:,.0f}"


def _measured(measure, *arguments):
    """What measure returns, or that there is no memory for it: others may use all of a GPU."""
    try:
        return measure(*arguments)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return "not measured (out of memory)"


def matrix_speed(device, dtype):
    """FLOP/s of the fastest product of two square matrices within SECONDS."""
    side = SIDES[device.type]
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    a @ b  # the first product chooses a kernel
    best, end = float("inf"), time.perf_counter() + SECONDS
    while best == float("inf") or time.perf_counter() < end:
        devices.synchronize(device)
        start = time.perf_counter()
        a @ b
        devices.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def _free_disk(path):
    """Bytes that are free where a directory is or would be made."""
    path = Path(path).resolve()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _data(directory):
    """What there is of each dataset. Digests are not checked: that is done before a run."""
    for name, archive in ARCHIVES.items():
        path = directory / archive.file
        if not path.is_file():
            yield f"no archive of {name}"
        elif path.stat().st_size == archive.size:
            yield name
        else:
            yield f"{path.name} of {path.stat().st_size} bytes, not {archive.size}"
    train = directory / "train"
    classes = image_folder.class_names(train) if train.is_dir() else []
    yield f"a folder of {len(classes)} classes" if classes else "no folder of images"


# ---- network -------------------------------------------------------------------------------------


def _addresses(data_url):
    """{what: address} of the archives' mirrors and of the hub with published weights."""
    from huggingface_hub import constants

    urls = [data_url] if data_url else [url + ARCHIVES["cifar10"].file for url in MIRRORS]
    return {f"data from {url}": url for url in urls} | {
        f"published weights from {constants.ENDPOINT}": constants.ENDPOINT
    }


def start_requests(addresses):
    """Asks all addresses at once; returns a function that returns a line for each."""
    answers, end = {}, time.monotonic() + TIMEOUT

    def ask(url):
        answers[url] = _answer(url)

    # The look-up of a name has no time limit: daemon threads don't keep the process from ending.
    threads = [threading.Thread(target=ask, args=[url], daemon=True) for url in addresses.values()]
    for thread in threads:
        thread.start()

    def lines():
        for thread in threads:
            thread.join(max(0, end - time.monotonic()))
        return [f"{what}: {answers.get(url, 'not reachable')}" for what, url in addresses.items()]

    return lines


def _answer(url):
    try:
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request, timeout=TIMEOUT):
            return "reachable"
    except urllib.error.HTTPError as error:
        return f"answers with status {error.code}"
    except (OSError, http.client.HTTPException, ValueError):
        return "not reachable"
