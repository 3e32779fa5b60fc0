"""Learning rates as functions of the step."""

import math

from common.errors import UserError

SCHEDULES = ("cosine", "linear", "one_cycle", "multi_step", "constant")


def learning_rate(schedule, lr, steps, warmup_steps=0, final=0.0):
    """The learning rate as a function of the global step, 0 … steps - 1.

    Linear warmup to `lr` over warmup_steps, then: cosine, linear or one_cycle (linear too: with a long warmup, a triangle:
    arXiv 1708.07120) down to `final` (a part of lr); multi_step (a tenth after half, a hundredth after three quarters of
    the steps: arXiv 1512.03385 §4.2); constant.
    """
    if schedule not in SCHEDULES:
        raise UserError(
            f"unknown schedule {schedule!r}: the names are {', '.join(SCHEDULES)}", status=2
        )

    def lr_at(step):
        if step < warmup_steps:
            return lr * (step + 1) / (warmup_steps + 1)
        part = (step - warmup_steps) / max(
            1, steps - warmup_steps
        )  # 0 at the end of the warmup, 1 after the last step
        if schedule == "cosine":
            return lr * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(part, 1.0))))
        if schedule in ("linear", "one_cycle"):
            return lr * (final + (1 - final) * max(0.0, 1 - part))
        if schedule == "multi_step":
            return lr * 0.1 ** ((step >= steps // 2) + (step >= steps * 3 // 4))
        return lr

    return lr_at


def default_warmup(schedule, epochs):
    """Epochs of warmup: a quarter of the run for one_cycle, else a tenth, five at most."""
    return epochs / 4 if schedule == "one_cycle" else min(5.0, epochs / 10)


def default_ema_decay(steps):
    """A decay whose horizon, 1 / (1 - decay) steps, is a twentieth of the run, 10,000 steps at most.

    A fixed decay fits one length only: 0.9999 remembers the random initialisation of a run of 5 epochs.
    """
    return 1 - 1 / min(10_000, max(1.0, steps / 20))


def auto_values(schedule, epochs, steps):
    """What "auto" stands for in a run of so many epochs and steps, by argument."""
    return {
        "warmup_epochs": default_warmup(schedule, epochs),
        "ema_decay": default_ema_decay(steps),
    }
