"""The length of a run and what follows from it: the learning rate as a function of the step,
the warmup, and the decay of the moving average."""

import math
from dataclasses import dataclass

from common.errors import UserError

SCHEDULES = ("cosine", "linear", "one_cycle", "multi_step", "constant")
WITH_FINAL_RATE = ("cosine", "linear", "one_cycle")  # schedules that --final-lr applies to


def lr_schedule(schedule, lr, steps, warmup_steps=0, final=0.0):
    """The learning rate as a function of the global step, 0 … steps - 1.

    Linear warmup to `lr` over warmup_steps, then to lr * final at the end of the run: cosine,
    linear or one_cycle (linear as well; with a long warmup it is a triangle, arXiv 1708.07120).
    Or multi_step (a tenth after half of the steps, a hundredth after three quarters, arXiv
    1512.03385 §4.2) or constant, without `final`.

    The function has a second argument, `end`: parameters that are trained only in the first share
    `end` of the run go through the whole schedule in this time. Afterwards their rate is zero.
    """
    if schedule not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise UserError(f"unknown schedule {schedule!r}: must be one of {known}", 2)

    def lr_at(step, end=1.0):
        if end < 1:
            if step >= end * steps:
                return 0.0
            step = step / end
        if step < warmup_steps:
            return lr * (step + 1) / (warmup_steps + 1)
        # 0 at the end of the warmup, 1 after the last step
        done = (step - warmup_steps) / max(1, steps - warmup_steps)
        if schedule == "cosine":
            return lr * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
        if schedule in ("linear", "one_cycle"):
            return lr * (final + (1 - final) * max(0.0, 1 - done))
        if schedule == "multi_step":
            if step < steps // 2:
                return lr
            return lr * 0.1 if step < steps * 3 // 4 else lr * 0.1**2
        if schedule == "constant":
            return lr
        raise NotImplementedError(schedule)

    return lr_at


def default_warmup(schedule, epochs):
    """Epochs of warmup: a quarter of the run for one_cycle, else a tenth, at most five."""
    return epochs / 4 if schedule == "one_cycle" else min(5.0, epochs / 10)


def default_ema_decay(steps):
    """A decay whose horizon, 1 / (1 - decay) steps, is a twentieth of the run, at most 10,000
    steps.

    A fixed decay fits one length only: 0.9999 is for 200,000 steps. Runs of up to 20 steps get 0:
    no average.
    """
    return 1 - 1 / min(10_000, max(1.0, steps / 20))


@dataclass(frozen=True)
class Plan:
    """How long a run is, and its learning rate at each step.

    automatic: {argument: value} of what was not given and follows from the length.
    """

    schedule: str
    lr: float
    epochs: int
    steps_per_epoch: int
    warmup_epochs: float
    ema_decay: float
    automatic: dict
    final_lr: float = 0.0  # share of lr

    @classmethod
    def of(cls, args, steps_per_epoch):
        """The plan of a run's arguments, where None stands for "auto"."""
        automatic = {}
        if args.warmup_epochs is None:
            automatic["warmup_epochs"] = default_warmup(args.schedule, args.epochs)
        if args.ema_decay is None:
            automatic["ema_decay"] = default_ema_decay(args.epochs * steps_per_epoch)
        return cls(
            schedule=args.schedule,
            lr=args.lr,
            epochs=args.epochs,
            steps_per_epoch=steps_per_epoch,
            warmup_epochs=automatic.get("warmup_epochs", args.warmup_epochs),
            ema_decay=automatic.get("ema_decay", args.ema_decay),
            automatic=automatic,
            final_lr=args.final_lr,
        )

    @property
    def steps(self):
        return self.epochs * self.steps_per_epoch

    @property
    def lr_at(self):
        """step -> learning rate, see `lr_schedule`"""
        warmup_steps = round(self.warmup_epochs * self.steps_per_epoch)
        return lr_schedule(self.schedule, self.lr, self.steps, warmup_steps, self.final_lr)
