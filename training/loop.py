"""The step loop, which knows no recipe.

    settings = StepSettings(lr_at=lambda step: 0.1, dtype=torch.bfloat16)
    row = train_epoch(State(model, optimizer), train_batches, settings)

All that changes from step to step is in `State`: batches and dropout are drawn from functions of
(seed, epoch, batch), the learning rate is a function of the step. So a run can stop and resume
after any step.
"""

import math
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from common.errors import UserError
from training import devices, progressive
from training.distributed import Ranks, local_tensor
from training.mixed_precision import autocast

MAX_SKIPS = 20  # the scale is halved at each: from 65536 to less than 0.1


class Interrupted(Exception):
    """Training stopped between two steps because it was asked to."""


class NonFiniteError(UserError):
    """Training stopped: a loss, a weight or a state of the optimizer isn't finite, nor saved."""


@dataclass(frozen=True)
class StepSettings:
    """How a run takes its steps."""

    lr_at: Callable  # (step, end=1.0) -> learning rate, see schedules.lr_schedule
    loss_fn: Callable = F.cross_entropy  # (logits float32 (B, K), targets) -> mean loss
    dtype: torch.dtype | None = None  # autocast's; None: fp32
    accumulate: int = 1  # parts that a batch is split into, with one update for all
    clip_grad: float = 0.0  # largest norm of the gradient; 0: no limit
    seed: int = 0  # of dropout and stochastic depth
    # The processes that train together.
    ranks: Ranks = field(default_factory=lambda: Ranks(torch.device("cpu")))
    size_at: Callable = progressive.full_size  # step -> side of the inputs in px; 0: as they are


def never():
    return False


def train_epoch(state, batches, settings, stop=never, show=None):
    """Trains what is left of the current epoch; returns its row of metrics.csv so far.

    state: training.state.State, changed in place; batches: data.Batches; stop(): asked in each
    step; show(progress, loss): called after each step. The row: epoch (from 1), step, lr,
    train_loss (mean), train_acc (%), over the images of all ranks.

    Raises Interrupted between two steps when stop() is true. Raises NonFiniteError before the
    update where the loss is not finite, and before a save where only the weights are not.
    """
    optimizer, scaler, progress = state.optimizer, state.scaler, state.progress
    ranks, model = settings.ranks, state.parallel_model(settings.ranks)
    device = next(model.parameters()).device
    is_distributed = ranks.world_size > 1
    seed_purpose = "model" if ranks.is_main else f"model {ranks.rank}"
    # Buffers to restore: before_step, where fp16 skips the step; after_forward, where gradient
    # checkpointing repeats the forward pass, and with it batch norm's update, in the backward pass.
    before_step = _Snapshot(_float_buffers(model) if scaler.is_enabled() else [])
    after_forward = _Snapshot(_running_statistics(model) if _recomputes(model) else [])
    model.train()
    start = time.perf_counter() - progress.seconds

    for inputs, targets in batches.epoch(progress.epoch, start=progress.batch):
        lr = set_learning_rates(optimizer, settings.lr_at, progress.step)
        # DistributedDataParallel waits for all gradients; a compiled model would compile again.
        if not is_distributed and not state.compiled:
            skip_gradients_at_rate_zero(optimizer)
        inputs = progressive.resize(inputs, settings.size_at(progress.step))
        if ranks.world_size > 2 and not ranks.sharded and not state.gradient_order_settled:
            _settle_gradient_order(model, inputs[:2], targets[:2], settings)
            state.gradient_order_settled = True
        devices.seed_model(settings.seed, device, progress.epoch, seed_purpose, progress.batch)
        before_step.take()
        num_images = batches.batch_size if is_distributed else len(targets)  # of all ranks
        # Ranks stop at the same step: each sends its request with its metrics. A single process
        # asks after the step, and so notices a signal that came during it.
        stop_requested = is_distributed and stop()
        loss_sum, correct, any_stop_requested = _forward_backward(
            model,
            inputs,
            targets,
            settings=settings,
            scaler=scaler,
            num_images=num_images,
            stop_requested=stop_requested,
            after_forward=after_forward,
        )
        finite = math.isfinite(loss_sum)
        if not finite and not scaler.is_enabled():  # the scaler skips such a step
            raise _not_finite(f"the loss is {loss_sum / num_images}", progress, lr)
        updated = _update_weights(model, optimizer, scaler, settings.clip_grad)
        progress.skipped_steps = 0 if updated else progress.skipped_steps + 1
        if progress.skipped_steps >= MAX_SKIPS:
            raise _not_finite(f"{MAX_SKIPS} steps in a row overflowed fp16", progress, lr)
        if not updated:
            before_step.restore()  # batch norm has seen the overflow, too
        if state.lookahead:
            state.lookahead.update(progress.step + 1)
        if state.average and updated:
            state.average.update()

        progress.count_step(num_images, loss_sum, correct, finite)
        if show:
            show(progress, loss_sum / num_images)
        stop_now = any_stop_requested if is_distributed else stop()
        if stop_now:
            _check_state(model, optimizer, progress, lr, ranks)  # what is saved now must be good
            progress.seconds = time.perf_counter() - start
            raise Interrupted

    devices.synchronize(device)
    progress.seconds = time.perf_counter() - start
    lr = settings.lr_at(progress.step - 1)
    _check_state(model, optimizer, progress, lr, ranks)
    return {
        "epoch": progress.epoch + 1,
        "step": progress.step,
        "lr": lr,
        "train_loss": progress.loss_sum / max(1, progress.seen),
        "train_acc": 100 * progress.correct / max(1, progress.seen),
    }


def _forward_backward(
    model, inputs, targets, *, settings, scaler, num_images, stop_requested, after_forward
):
    """Forward and backward pass of a batch, in parts, whose gradients add up.

    num_images: of all ranks; stop_requested: of this rank, which tells the others with its metrics;
    after_forward: a _Snapshot of statistics that the backward pass must not change.
    Returns, over all ranks, the sum of the losses, the number of correct predictions and whether
    any rank was asked to stop.
    """
    device, accumulate = inputs.device, settings.accumulate
    is_distributed = settings.ranks.world_size > 1
    parts = list(zip(inputs.tensor_split(accumulate), targets.tensor_split(accumulate)))
    sums = []
    for number, (x, y) in enumerate(parts, 1):
        is_last = number == len(parts)
        with _synchronization(model, is_last):
            with autocast(device, settings.dtype):
                logits = model(x)
            loss = settings.loss_fn(logits.float(), y)
            terms = [loss.detach() * len(y), _count_correct(logits.detach(), y)]
            sums = [a + b for a, b in zip(sums, terms)] if sums else terms
            if is_last:
                flag = [torch.full_like(loss, stop_requested)] if is_distributed else []
                readback = _Readback(settings.ranks.sum(torch.stack(sums + flag)))
            with _statistics_unchanged(after_forward):
                # The average over ranks is then the gradient of the mean over num_images.
                scaler.scale(loss * (len(y) * settings.ranks.world_size / num_images)).backward()
    loss_sum, correct, *stop_requests = readback.tolist()
    return loss_sum, correct, any(stop_requests)


def _update_weights(model, optimizer, scaler, clip_grad):
    """Takes the optimizer's step and drops the gradients; False where fp16 skipped the step."""
    drop_gradients_at_rate_zero(optimizer)
    if clip_grad:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    updated = _optimizer_step(scaler, optimizer)
    optimizer.zero_grad(set_to_none=True)
    return updated


# ---- parts of a step -----------------------------------------------------------------------------


def set_learning_rates(optimizer, lr_at, step):
    """Sets each group's rate; returns the rate of a group without "lr_scale" and "lr_end".

    lr_scale: a factor of the group's rate; lr_end: the share of the run after which it is zero.
    """
    lr = lr_at(step)
    for group in optimizer.param_groups:
        group_lr = lr_at(step, group["lr_end"]) if "lr_end" in group else lr
        group["lr"] = group_lr * group.get("lr_scale", 1.0)
    return lr


def skip_gradients_at_rate_zero(optimizer):
    """Computes no gradients for groups with "lr_end" while their rate is zero.

    Such a group is often that of a first layer. Then the backward pass ends before it.
    """
    for group in optimizer.param_groups:
        if "lr_end" in group:
            for parameter in group["params"]:
                parameter.requires_grad_(group["lr"] != 0)


def drop_gradients_at_rate_zero(optimizer):
    """Removes gradients of groups whose rate is zero after "lr_end": clipping would count them."""
    for group in optimizer.param_groups:
        if "lr_end" in group and group["lr"] == 0:
            for parameter in group["params"]:
                parameter.grad = None


def _count_correct(logits, targets):
    """Correct predictions as a float; of a mixed image the label of larger weight counts."""
    labels = targets if targets.ndim == 1 else targets.argmax(1)
    return (logits.argmax(1) == labels).sum().float()


def _optimizer_step(scaler, optimizer):
    """Updates the weights; False where the scaler skipped it because a gradient overflowed.

    A hook tells whether the scaler called the optimizer's step: to compare the scale before and
    after, the host would have to wait. A fused optimizer would not tell: its step is always called,
    and the kernel decides.
    """
    if not scaler.is_enabled():
        optimizer.step()
        return True
    updates = []
    hook = optimizer.register_step_post_hook(lambda *_: updates.append(True))
    try:
        scaler.step(optimizer)
    finally:
        hook.remove()
    scaler.update()
    return bool(updates)


def _synchronization(model, is_last):
    """A context in which the last part of a batch synchronizes gradients, the others don't.

    A sharded model has no no_sync: gradients kept for later would be those of the whole model.
    """
    if is_last or not hasattr(model, "no_sync"):
        return nullcontext()
    return model.no_sync()


def _settle_gradient_order(model, inputs, targets, settings):
    """A forward and backward pass that only fixes the places of gradients.

    DistributedDataParallel rearranges gradients in its buffers after its first pass, and the place
    of a gradient decides the order in which three or more ranks sum it. A resumed run would make
    the first pass at a later step, and round differently.
    """
    with _statistics_unchanged(_Snapshot(list(model.buffers()))):
        with autocast(inputs.device, settings.dtype):
            logits = model(inputs)
        settings.loss_fn(logits.float(), targets).backward()
    model.zero_grad(set_to_none=True)


class _Readback:
    """Numbers from the device, without making it wait.

    On CUDA the copy to the host is queued behind the forward pass, and read while the device
    works on the backward pass that was queued behind it.
    """

    def __init__(self, values):
        self.event, self.values = None, values
        if values.is_cuda:
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(values.device))

    def tolist(self):
        if self.event is not None:
            self.event.synchronize()
        return self.values.tolist()


class _Snapshot:
    """Copies of tensors, allocated once; on a GPU, take and restore launch one kernel per dtype."""

    def __init__(self, tensors):
        by_dtype = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        self.pairs = [(same, [torch.empty_like(t) for t in same]) for same in by_dtype.values()]

    @torch.no_grad()
    def take(self):
        for tensors, copies in self.pairs:
            torch._foreach_copy_(copies, tensors)

    @torch.no_grad()
    def restore(self):
        for tensors, copies in self.pairs:
            torch._foreach_copy_(tensors, copies)


@contextmanager
def _statistics_unchanged(snapshot):
    """A block after which the tensors of the snapshot are as before it.

    A backward pass that recomputes activations would count its images a second time in batch norm.
    """
    snapshot.take()
    yield
    snapshot.restore()


def _float_buffers(model):
    return [buffer for buffer in model.buffers() if buffer.is_floating_point()]


def _running_statistics(model):
    """The buffers that a norm updates in its forward pass."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    return [buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] in names]


def _recomputes(model):
    """Whether parts of the forward pass run again during the backward pass (timm's attribute)."""
    return any(getattr(module, "grad_checkpointing", False) for module in model.modules())


def _check_state(model, optimizer, progress, lr, ranks):
    """Raises NonFiniteError unless weights, statistics and the optimizer's state are finite.

    The optimizer's state can overflow while the weights are finite. Ranks have different
    statistics, and different shards of a sharded model: if one finds a problem, all raise.
    """
    tensors = list(model.state_dict().items())
    for values in optimizer.state.values():
        # Not the scalars: they are counts, which may be on the CPU.
        state = [(k, v) for k, v in values.items() if torch.is_tensor(v) and v.ndim]
        tensors += [(f"the optimizer's {name}", value) for name, value in state]
    tensors = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]
    finite = torch.stack([local_tensor(tensor).isfinite().all() for _, tensor in tensors])
    if ranks.world_size > 1:
        finite = ranks.sum((~finite).float()) == 0
    finite = finite.tolist()
    if not all(finite):
        name = tensors[finite.index(False)][0]
        raise _not_finite(f"{name} is not finite", progress, lr, after_update=True)


def _not_finite(what, progress, lr, after_update=False):
    step = progress.step if after_update else progress.step + 1
    stopped = "stopped" if after_update else "stopped before the update"
    return NonFiniteError(
        f"{what} at step {step} (epoch {progress.epoch + 1}) with learning rate {lr:.4g}: {stopped}"
        f"; last.pt is the last good state; try a smaller --lr, a longer --warmup-epochs or "
        f"--clip-grad 1"
    )
