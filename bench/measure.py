"""Timing, and the training step that is timed.

seconds = in_turn(device, 5, ours=step, theirs=other_step)     # {name: [seconds of a call]}
print(spread(seconds["ours"]), ratio(seconds, "ours", "theirs"))
"""

import platform
import statistics
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import models
from training import devices, environment, mixed_precision, optimizers

MIN_ROUND = 0.1  # seconds: a quick function is repeated until it has taken as long
SIDES = {"cuda": (4096, 8192, 12288), "cpu": (1024, 2048), "mps": (2048, 4096)}  # of matrices


def in_turn(device, rounds, min_round=0.0, **functions):
    """{name: seconds of a call, in each round}. A round calls all functions, one after another.

    The first round doesn't count. min_round: seconds; quick functions are called repeatedly.
    """
    seconds, calls = {name: [] for name in functions}, {}
    for name, function in functions.items():
        timed(device, function)  # the first call chooses kernels and allocates memory
        calls[name] = _calls(device, function, min_round) if min_round else 1
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(timed(device, function, calls[name]))
    return seconds


def timed(device, function, calls=1):
    """Seconds that a call takes until the device has finished, the mean of several."""
    devices.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    devices.synchronize(device)
    return (time.perf_counter() - start) / calls


def _calls(device, function, min_round):
    """How many calls take min_round seconds, at most 100."""
    return max(1, min(100, round(min_round / max(timed(device, function), 1e-6))))


def repeated(device, rounds, function):
    """Seconds of one call, in each round; a quick function is called up to 100 times in a round."""
    return in_turn(device, rounds, MIN_ROUND, function=function)["function"]


def spread(values, style=".2f"):
    """The median with minimum and maximum; style: a format, or a function."""
    show = style if callable(style) else f"{{:{style}}}".format
    return f"{show(statistics.median(values))} ({show(min(values))} to {show(max(values))})"


def ratio(seconds, name, other, style=".2f"):
    """The spread of the ratio of two functions' seconds, round by round."""
    return spread([a / b for a, b in zip(seconds[name], seconds[other])], style)


def print_headings(title, name, other):
    print(f"{title}{name + ' ms':>9}{other + ' ms':>9}  {name} / {other}")


def print_steps(title, steps, args, device):
    """Prints milliseconds of two training steps, on 32x32 images of 100 classes, and the ratio."""
    batch = ready_batch(args.batch_size, 32, 100, device)
    first, second = (partial(step, *batch) for step in steps)
    seconds = in_turn(device, args.rounds, MIN_ROUND, first=first, second=second)
    ms = [1000 * statistics.median(values) for values in seconds.values()]
    result = ratio(seconds, "first", "second")
    print(f"{title}{ms[0]:>9.1f}{ms[1]:>9.1f}  {result}", flush=True)


def rate(value):
    """A number per second with three significant digits: 0.266, 12.3, 4,567."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def machine(device):
    """The device and the versions, in one line."""
    name, cuda = f"{environment.processor()}, {torch.get_num_threads()} threads", ""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        cuda = f", CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return f"{name}; torch {torch.__version__}{cuda}, Python {platform.python_version()}"


def flop_ceiling(device, dtype, rounds=5):
    """FLOP/s of the fastest product of two square matrices; dtype: None is fp32."""
    best = 0.0
    for side in SIDES[device.type]:
        shape, kind = (2, side, side), dtype or torch.float32
        a, b = torch.randn(shape, device=device, dtype=kind)
        seconds = repeated(device, rounds, lambda a=a, b=b: a @ b)
        best = max(best, 2 * side**3 / min(seconds))
    return best


def ready_batch(size, image_size, classes, device):
    """Noise as normalized inputs (B, 3, H, W) in channels_last, and random labels."""
    inputs = torch.randn(size, 3, image_size, image_size, device=device)
    labels = torch.randint(0, classes, (size,), device=device)
    return inputs.contiguous(memory_format=torch.channels_last), labels


def to_device(model, device, dtype=None, memory_format=torch.channels_last):
    """The model, ready to train on a device under autocast to a type (None: fp32)."""
    model = models.choose_attention(model, device, dtype)
    return model.to(device, memory_format=memory_format).train()


def create_optimizer(model, name="sgd", lr=1e-4):
    groups = optimizers.param_groups(model, 5e-4, optimizer=name)
    if name == "muon_sgd":
        groups = optimizers.muon_sgd_groups(groups, model, lr)
    return optimizers.build_optimizer(name, groups, lr)


def training_step(model, optimizer, device, dtype=None):
    """A function that makes one step on (inputs, targets) and returns the loss and the logits."""

    def step(inputs, targets):
        with mixed_precision.autocast(device, dtype):
            logits = model(inputs)
        loss = F.cross_entropy(logits.float(), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach(), logits.detach()

    return step


def inference_step(model, device, dtype=None):
    """A function that computes the logits of inputs, without gradients."""
    model.eval()

    @torch.inference_mode()
    def infer(inputs):
        with mixed_precision.autocast(device, dtype):
            return model(inputs)

    return infer


def reset_peak(device):
    """Resets `peak`; returns whether the system can (GPUs; a process on Linux, as a rule)."""
    devices.reset_peak_memory(device)
    if device.type == "cpu":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            return True
    return device.type == "cuda"


def peak(device):
    """Bytes of tensors on a GPU, or of the process on Linux, at most since reset_peak; or None."""
    if device.type == "cuda" or (device.type == "cpu" and sys.platform == "linux"):
        return 2**20 * devices.peak_memory_mb(device)
    return None
