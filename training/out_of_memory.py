"""Running out of memory: recognized among other errors, and explained."""

import contextlib
import math

import torch

import data
from common.errors import UserError, first_line

MESSAGES = (  # in lower case
    "can't allocate memory",
    "out of memory",
    "cublas_status_alloc_failed",
    "cublascreate",
    "cudnn_status_alloc_failed",
    "failed to cuda calloc",
)
# cuDNN's message where the workspace of a convolution doesn't fit, or where it has no kernel.
NO_ENGINE = "unable to find an engine"
NEARLY_FULL = 0.1  # share of a GPU's memory that is free


def is_out_of_memory(error):
    """Whether CUDA, one of its libraries, the CPU allocator or Python ran out of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return any(message in text for message in MESSAGES) or (NO_ENGINE in text and _is_nearly_full())


def _is_nearly_full():
    free, total = torch.cuda.mem_get_info()
    return free < NEARLY_FULL * total


@contextlib.contextmanager
def named(advice):
    """Turns running out of memory in the block into a UserError with some advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory: {advice} ({first_line(error)[:120]})") from error


@contextlib.contextmanager
def explained(args, ranks, accumulate=None):
    """Turns running out of memory in the block into a UserError that says what to try.

    accumulate: parts of a batch, where they differ from args.accumulate.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        parts = accumulate or args.accumulate or 1
        images = math.ceil(max(data.rank_shares(args.batch_size, ranks.world_size)) / parts)
        if images == 1:
            advice = "--grad-checkpointing, or --ema-device cpu or --lora-rank 16 of train_sota.py"
        elif hasattr(args, "micro_batch"):
            advice = f"--micro-batch {images // 2}"
        else:  # train_sota.py resumes the runs of the other scripts
            resumed = args.resume or "<run>"
            smaller = f"python train_sota.py --resume {resumed} --micro-batch {images // 2}"
            advice = smaller if args.resume else f"--accumulate {2 * parts}, or {smaller}"
        if ranks.device.type == "cuda" and args.resident != "host":
            advice += ", or --resident host"
        raise UserError(
            f"out of memory with {images} images of {args.image_size} px at once: try {advice}; "
            f"saved files are complete ({first_line(error)[:120]})"
        ) from error
