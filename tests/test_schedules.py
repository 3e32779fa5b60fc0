"""The learning rate as a function of the step, and what follows from the length of a run."""

from types import SimpleNamespace

import pytest
from helpers.errors import refused

from training.schedules import (
    SCHEDULES,
    WITH_FINAL_RATE,
    Plan,
    default_ema_decay,
    default_warmup,
    lr_schedule,
)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_rises_linearly_to_the_learning_rate(schedule):
    lr_at = lr_schedule(schedule, 0.8, 100, warmup_steps=10)
    rises = [lr_at(step + 1) - lr_at(step) for step in range(9)]
    assert lr_at(0) > 0 and lr_at(10) == pytest.approx(0.8)
    assert rises == [pytest.approx(rises[0])] * 9


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "expected"),
    [
        ("cosine", 0, {0: 1.0, 50: 0.5, 100: 0.0}),
        ("linear", 0, {0: 1.0, 25: 0.75, 50: 0.5, 100: 0.0}),
        ("one_cycle", 20, {20: 1.0, 60: 0.5, 100: 0.0}),
        ("multi_step", 0, {0: 1.0, 49: 1.0, 50: 0.1, 74: 0.1, 75: 0.01, 99: 0.01}),
        ("constant", 0, {0: 1.0, 99: 1.0}),
    ],
)
def test_schedules_at_their_corners(schedule, warmup_steps, expected):
    lr_at = lr_schedule(schedule, 1.0, 100, warmup_steps)
    assert {step: lr_at(step) for step in expected} == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_learning_rate_is_positive_and_at_most_the_given_one(schedule):
    lr_at = lr_schedule(schedule, 0.3, 37, warmup_steps=5)
    assert all(0 < lr_at(step) <= 0.3 + 1e-12 for step in range(37))


@pytest.mark.parametrize("schedule", WITH_FINAL_RATE)
def test_a_schedule_can_end_at_a_share_of_the_rate(schedule):
    lr_at, to_zero = (lr_schedule(schedule, 0.5, 100, 10, final) for final in (0.2, 0.0))
    assert [lr_at(step) for step in range(11)] == [to_zero(step) for step in range(11)]
    assert lr_at(100) == pytest.approx(0.1)
    falls = [(lr_at(step) - 0.1, 0.8 * to_zero(step)) for step in range(10, 100)]
    assert all(ours == pytest.approx(expected) for ours, expected in falls)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_group_that_ends_early_goes_through_the_whole_schedule(schedule):
    """Twice as fast with an end at half of the run. Then its rate is zero."""
    lr_at = lr_schedule(schedule, 0.5, 100, 10, 0.2)
    assert [lr_at(step, 0.5) for step in range(50)] == [lr_at(2 * step) for step in range(50)]
    assert [lr_at(step, 0.5) for step in range(50, 100)] == [0.0] * 50
    assert all(lr_at(step, 1.0) == lr_at(step) for step in range(100))


def test_an_unknown_schedule_is_refused():
    with refused("unknown schedule 'cos'", "cosine"):
        lr_schedule("cos", 0.1, 10)


def test_defaults_depend_on_the_length_of_a_run():
    assert default_warmup("cosine", 200) == 5 and default_warmup("cosine", 5) == 0.5
    assert default_warmup("one_cycle", 8) == 2
    assert 1 / (1 - default_ema_decay(2000)) == pytest.approx(100)
    assert default_ema_decay(10**7) == 1 - 1e-4
    assert 0 <= default_ema_decay(3) < 1


def test_a_plan_takes_defaults_only_for_what_was_not_given():
    args = SimpleNamespace(schedule="cosine", lr=0.4, epochs=20, warmup_epochs=None, ema_decay=None)
    args.final_lr = 0.1
    plan = Plan.of(args, steps_per_epoch=10)
    assert (plan.steps, plan.warmup_epochs, plan.ema_decay) == (200, 2.0, pytest.approx(0.9))
    assert plan.automatic == {"warmup_epochs": 2.0, "ema_decay": plan.ema_decay}
    same = lr_schedule("cosine", 0.4, 200, warmup_steps=20, final=0.1)
    assert [plan.lr_at(step) for step in range(200)] == [same(step) for step in range(200)]
    args.warmup_epochs, args.ema_decay = 0.0, 0.0
    plan = Plan.of(args, steps_per_epoch=10)
    assert (plan.warmup_epochs, plan.ema_decay, plan.automatic) == (0.0, 0.0, {})
    assert plan.lr_at(0) == 0.4
