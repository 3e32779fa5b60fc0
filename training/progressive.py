"""--progressive: smaller inputs early in training, when a step teaches as much for less work.

    size_at = size_schedule("24:0,28:0.33,32:0.67", steps)      # step -> side of the inputs
    inputs = resize(inputs, size_at(step))

The idea is that of arXiv 2104.00298 §4. Augmented images of the full size are made smaller on the
device. The size is a function of the global step, so a run can resume at any step. Evaluations use
the full size.
"""

import torch
import torch.nn.functional as F

SMALLEST = 8  # pixels, as for --image-size


def parse_stages(text):
    """[(size in pixels, share of the run after which it begins)] of --progressive; [] of "none".

    Raises ValueError unless sizes and shares increase.
    """
    if text == "none":
        return []
    stages = [stage.split(":") for stage in text.split(",")]
    if len({len(stage) for stage in stages}) > 1:
        raise ValueError(f"must give a share of the run for all sizes or for none, not {text}")
    if len(stages[0]) == 1:
        stages = [(size, number / len(stages)) for number, (size,) in enumerate(stages)]
    try:
        stages = [(int(size), float(share)) for size, share in stages]
    except ValueError as error:
        raise ValueError(f"must be none, sizes or size:share pairs, not {text!r}") from error
    sizes, shares = zip(*stages)
    if sizes[0] < SMALLEST or not _increase(sizes):
        raise ValueError(f"sizes must increase and be at least {SMALLEST}, not {text}")
    if shares[0] != 0 or not _increase(shares) or not shares[-1] < 1:
        raise ValueError(f"shares must begin at 0 and increase to less than 1, not {text}")
    return stages


def _increase(values):
    return all(a < b for a, b in zip(values, values[1:]))


def full_size(step):
    """The size schedule of inputs that stay as they are."""
    return 0


def size_schedule(text, steps):
    """The side of the inputs in pixels as a function of the global step, 0 … steps - 1.

    It returns 0 if the inputs stay as they are. text: --progressive. The last step has full size.
    """
    stages = parse_stages(text)
    starts = [(size, min(round(share * steps), steps - 1)) for size, share in stages]
    if not starts:
        return full_size

    def size_at(step):
        return max(size for size, start in starts if start <= step)

    return size_at


def resize(inputs, size):
    """(B, C, H, W) -> (B, C, size, size), bilinear and antialiased; size 0: unchanged."""
    if size in (0, inputs.shape[-1]):
        return inputs
    inputs = F.interpolate(inputs, (size, size), mode="bilinear", antialias=True)
    return inputs.contiguous(memory_format=torch.channels_last)
