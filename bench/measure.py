"""Measuring speed: things in turn, after a warm-up, with the device waited for; what a device can do at best.

seconds = in_turn(device, 5, ours=step, theirs=other_step)         # {name: [seconds of each round]}
print(spread(seconds["ours"]), flop_ceiling(device, torch.bfloat16))
"""

import platform
import statistics
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F

import models
from training import devices, environment, mixed_precision, optimizers

ROUND = 0.1  # seconds that a round lasts at least: a step is repeated until it does
SIDES = {
    "cuda": (4096, 8192, 12288),
    "cpu": (1024, 2048),
    "mps": (2048, 4096),
}  # of the matrices for the ceiling


def in_turn(device, rounds, **measured):
    """{name: seconds of each round}: each function once in every round, in turn, after a round that doesn't count."""
    seconds = {name: [] for name in measured}
    for i in range(rounds + 1):
        for name, function in measured.items():
            elapsed = timed(device, function)
            if i:
                seconds[name].append(elapsed)
    return seconds


def timed(device, function):
    """Seconds that a call takes until the device is done."""
    devices.synchronize(device)
    start = time.perf_counter()
    function()
    devices.synchronize(device)
    return time.perf_counter() - start


def repeated(device, rounds, function):
    """Seconds of one call, in each of `rounds` rounds; a quick one is called many times in a round, and so not waited for."""
    timed(device, function)  # the first call chooses kernels and takes memory
    calls = max(1, min(100, round(ROUND / max(timed(device, function), 1e-6))))

    def calling():
        for _ in range(calls):
            function()

    return [timed(device, calling) / calls for _ in range(rounds)]


def spread(values, style=".2f"):
    """The median, with the least and the most; style: a format, or a function."""
    show = style if callable(style) else f"{{:{style}}}".format
    return f"{show(statistics.median(values))} ({show(min(values))} to {show(max(values))})"


def rate(value):
    """A number a second in three significant digits, or whole: 0.266, 12.3, 4,567."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def machine(device):
    """The device and the versions, in a line."""
    cpu = f"{environment.processor()}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    cuda = (
        f", CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        if device.type == "cuda"
        else ""
    )
    return f"{name}; torch {torch.__version__}{cuda}, Python {platform.python_version()}"


def flop_ceiling(device, dtype, rounds=5):
    """FLOP/s of the quickest product of two square matrices of a type (None: fp32 as it is set up), the best of all rounds."""
    best = 0.0
    for side in SIDES[device.type]:
        a, b = (
            torch.randn(side, side, device=device, dtype=dtype or torch.float32) for _ in range(2)
        )
        seconds = repeated(device, rounds, lambda a=a, b=b: a @ b)
        best = max(best, 2 * side**3 / min(seconds))
    return best


def step_flops(name, classes, image_size, options=None):
    """FLOPs of a training step for one image: products of the forward and the backward pass, counted on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = models.create_model(name, classes, **(options or {})).train()
        with FlopCounterMode(
            display=False
        ) as counter:  # of two images, since batch norm takes no single value
            model(torch.empty(2, 3, image_size, image_size)).sum().backward()
    return counter.get_total_flops() / 2


def ready_batch(size, image_size, classes, device):
    """Normalised noise (B, 3, H, W) in channels_last, and labels."""
    inputs = torch.randn(size, 3, image_size, image_size, device=device).contiguous(
        memory_format=torch.channels_last
    )
    return inputs, torch.randint(0, classes, (size,), device=device)


def training_step(model, inputs, targets, device, optimizer="sgd"):
    """A function of the autocast type that makes a step of an optimizer on tensors that lie ready."""
    optimizer = optimizers.create_optimizer(optimizer, optimizers.param_groups(model, 5e-4), 1e-4)

    def step(dtype):
        with mixed_precision.autocast(device, dtype):
            logits = model(inputs)
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def reset_peak(device):
    """Lets `peak` begin anew, where the system can (GPUs; a process on Linux)."""
    devices.reset_peak_memory(device)
    if device.type == "cpu":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak(device):
    """Largest memory in bytes since reset_peak: of tensors on a GPU, of the whole process on Linux; None elsewhere."""
    if device.type == "cuda" or (device.type == "cpu" and sys.platform == "linux"):
        return 2**20 * devices.peak_memory_mb(device)
    return None
