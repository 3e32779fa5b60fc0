"""The step loop: `train_epoch` trains, `evaluate` measures. Neither knows a recipe.

    step = Step(lr_at=lambda step: 0.1, dtype=torch.bfloat16)
    state, curve = State(model, optimizer), Curve("test", every=1, epochs=10)
    row = train_epoch(state, train_batches, step) | evaluate_epoch(state, test_batches, curve, step)

The state between two steps is the weights, the optimizer and `Progress`: batches and dropout are
drawn from functions of (seed, epoch, batch), the learning rate is a function of the step. So a run
can stop and resume after any step.
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
from training.distributed import Ranks
from training.mixed_precision import autocast, fp32_classifier

METRICS = ("loss", "acc", "top5")  # of an evaluation
MAX_SKIPS = 20  # the scale is halved at each: from 65536 to less than 0.1
# Batches of an evaluation after which several ranks ask each other whether to stop: each time they
# wait for the slowest.
POLL_EVERY = 4


class Interrupted(Exception):
    """Training stopped between two steps because it was asked to."""


class NonFiniteLoss(UserError):
    """Training stopped before the update because the loss was not a finite number."""


@dataclass(frozen=True)
class Step:
    """How a step is taken.

    lr_at(step): learning rate; a parameter group with "lr_scale" gets it times that, one with
    "lr_end" gets lr_at(step, lr_end); loss_fn(logits float32 (B, K), targets): mean loss; dtype:
    autocast's, None for fp32; accumulate: parts that a batch is split into, with one update for
    all; clip_grad: largest norm of the gradient (0: no limit); ranks: the processes that train
    together; size_at(step): side of the inputs in pixels (0: as they are).
    """

    lr_at: Callable
    loss_fn: Callable = F.cross_entropy
    dtype: torch.dtype | None = None
    accumulate: int = 1
    clip_grad: float = 0.0
    seed: int = 0
    ranks: Ranks = field(default_factory=lambda: Ranks(torch.device("cpu")))
    size_at: Callable = progressive.full_size


@dataclass(frozen=True)
class Curve:
    """What is measured during training: the images ("test" or "val"), every how many epochs."""

    name: str
    every: int
    epochs: int

    def is_due(self, epoch):
        return epoch % self.every == 0 or epoch == self.epochs


def never():
    return False


def single_view(model, inputs):
    return model(inputs)


def train_epoch(state, batches, step, stop=never, show=None):
    """Trains what is left of the current epoch; returns its row of metrics.csv so far.

    state: training.state.State, changed in place; batches: data.Batches; stop(): asked after each
    step; show(progress, loss): called after each step. The row: epoch (from 1), step, lr,
    train_loss (mean), train_acc (%), over the images of all ranks.

    Raises Interrupted between two steps when stop() is true. Raises NonFiniteLoss before the update
    where the loss is not finite, and before anything is saved where only the weights are not.
    """
    optimizer, scaler, progress, ranks = state.optimizer, state.scaler, state.progress, step.ranks
    model = state.parallel_model(ranks)
    device = next(model.parameters()).device
    several = ranks.world > 1
    purpose = "model" if ranks.first else f"model {ranks.rank}"
    # fp16 may skip a step: then the statistics are those before it. With gradient checkpointing,
    # they are those after the forward pass.
    before_step = _Snapshot(_float_buffers(model) if scaler.is_enabled() else [])
    after_forward = _Snapshot(_running_statistics(model) if _recomputes(model) else [])
    model.train()
    start = time.perf_counter() - progress.seconds

    for inputs, targets in batches.epoch(progress.epoch, start=progress.batch):
        lr = set_learning_rates(optimizer, step.lr_at, progress.step)
        # DistributedDataParallel waits for all gradients; a compiled model would compile again.
        if not several and not state.compiled:
            skip_gradients_at_rate_zero(optimizer)
        inputs = progressive.resize(inputs, step.size_at(progress.step))
        if not state.gradient_order_settled:
            _settle_gradient_order(model, inputs[:2], targets[:2], step)
            state.gradient_order_settled = True
        devices.seed_model(step.seed, device, progress.epoch, purpose, progress.batch)
        before_step.take()
        # A rank that was asked to stop says so with its metrics, and all stop after this step.
        asked = several and stop()
        images = batches.batch_size if several else len(targets)  # of all ranks

        chunks = (tensor.tensor_split(step.accumulate) for tensor in (inputs, targets))
        parts, readbacks = list(zip(*chunks)), []
        for number, (x, y) in enumerate(parts, 1):
            with _without_synchronisation(model, number < len(parts)):
                with autocast(device, step.dtype):
                    logits = model(x)
                loss = step.loss_fn(logits.float(), y)
                sums = [loss.detach() * len(y), _count_correct(logits.detach(), y)]
                if several:
                    sums.append(torch.full_like(loss, asked))
                readbacks.append(_Readback(ranks.sum(torch.stack(sums))))
                with _statistics_unchanged(after_forward):
                    # Ranks average their gradients: each part counts by its images.
                    scaler.scale(loss * (len(y) * ranks.world / images)).backward()
        sums = [sum(values) for values in zip(*(readback.tolist() for readback in readbacks))]
        loss_sum, correct = sums[:2]

        finite = math.isfinite(loss_sum)
        if not finite and not scaler.is_enabled():  # the scaler skips such a step
            raise _not_finite(f"the loss is {loss_sum / images}", progress, lr)
        drop_gradients_at_rate_zero(optimizer)
        if step.clip_grad:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), step.clip_grad)
        updated = _update(scaler, optimizer)
        if not updated:
            before_step.restore()  # batch norm has seen the overflow, too
        if state.lookahead:
            state.lookahead.update(progress.step + 1)
        if updated:
            state.skipped_steps = 0
            if state.average:
                state.average.update()
        else:
            state.skipped_steps += 1
            if state.skipped_steps >= MAX_SKIPS:
                raise _not_finite(f"{MAX_SKIPS} steps in a row overflowed fp16", progress, lr)
        optimizer.zero_grad(set_to_none=True)

        progress.count_step(images, loss_sum, correct, finite)
        if show:
            show(progress, loss_sum / images)
        stop_now = sums[2] > 0 if several else stop()
        if stop_now:
            _check_state(model, optimizer, progress, lr, ranks)  # what is saved now must be good
            progress.seconds = time.perf_counter() - start
            raise Interrupted

    devices.synchronize(device)
    progress.seconds = time.perf_counter() - start
    lr = step.lr_at(progress.step - 1)
    _check_state(model, optimizer, progress, lr, ranks)
    return {
        "epoch": progress.epoch + 1,
        "step": progress.step,
        "lr": lr,
        "train_loss": progress.loss_sum / max(1, progress.seen),
        "train_acc": 100 * progress.correct / max(1, progress.seen),
    }


def evaluate_epoch(state, batches, curve, step, stop=never):
    """The columns of metrics.csv for the model, and with "ema_" for the moving average.

    None in each column where the curve leaves the epoch out. Raises NonFiniteLoss, Interrupted.
    """
    epoch = state.progress.epoch + 1
    prefixes = ("", "ema_") if state.average else ("",)
    if not curve.is_due(epoch):
        return {f"{prefix}{curve.name}_{metric}": None for prefix in prefixes for metric in METRICS}

    def measure(model, prefix, confusion):
        step.ranks.broadcast(model.buffers())  # each rank has its own statistics of batch norm
        start = time.perf_counter()
        metrics = evaluate(
            model, batches, dtype=step.dtype, stop=stop, ranks=step.ranks, confusion=confusion
        )
        state.progress.eval_seconds += time.perf_counter() - start
        if not math.isfinite(metrics["loss"]):
            number = state.progress.step
            raise NonFiniteLoss(
                f"the {curve.name} loss after step {number} (epoch {epoch}) is {metrics['loss']}, "
                f"with learning rate {step.lr_at(number - 1):.4g}: stopped; last.pt is the last "
                f"good state; try a smaller --lr"
            )
        return {f"{prefix}{curve.name}_{metric}": metrics[metric] for metric in METRICS}

    # The confusion matrix is that of the weights and images that the test accuracy is of.
    final = epoch == curve.epochs and curve.name == "test"
    confusion = state.confusion if final else None
    if not state.average:
        return measure(state.model, "", confusion)
    row = measure(state.model, "", None)
    with state.average.on_device() as model:
        return row | measure(model, "ema_", confusion)


@torch.no_grad()
def evaluate(
    model,
    batches,
    *,
    predict=single_view,
    loss_fn=F.cross_entropy,
    dtype=None,
    stop=never,
    ranks=None,
    confusion=None,
):
    """{"loss": mean, "acc": top-1 %, "top5": %} over every image once, summed on the device.

    predict(model, inputs): the logits; ranks: the processes that share the batches; each gets the
    metrics of all images. confusion(predictions, labels): called for each batch, with this rank's
    part. Raises Interrupted when stop() is true: between two batches, or on all ranks together
    after POLL_EVERY batches.
    """
    model.eval()
    device = next(model.parameters()).device
    ranks = ranks or Ranks(device)
    counts, losses = torch.zeros(3, dtype=torch.int64, device=device), []
    for number, (inputs, labels) in enumerate(batches, 1):
        if len(labels) == 0 and ranks.sharded:
            # The other ranks need this rank's shard of the model.
            predict(model, inputs.new_zeros(1, *inputs.shape[1:]))
        if len(labels):  # a rank's part of a small last batch may be empty
            with autocast(device, dtype), fp32_classifier(model, dtype):
                logits = predict(model, inputs)
            logits = logits.float()
            losses.append(loss_fn(logits, labels) * len(labels))
            predictions = logits.topk(min(5, logits.shape[1]), dim=1).indices
            hits = predictions == labels[:, None]
            count = hits.new_full((), len(labels), dtype=torch.int64)
            counts += torch.stack([hits[:, 0].sum(), hits.sum(), count])
            if confusion:
                confusion(predictions[:, 0], labels)
        if (ranks.world == 1 or number % POLL_EVERY == 0) and ranks.any(stop()):
            raise Interrupted
    sums = [*counts.tolist(), sum(torch.stack(losses).tolist()) if losses else 0.0]
    if ranks.world > 1:
        sums.append(stop())
        sums = ranks.sum(torch.tensor(sums, dtype=torch.float64, device=device)).tolist()
        if sums.pop():
            raise Interrupted
    top1, top5, count, loss = sums
    return {"loss": loss / count, "acc": 100 * top1 / count, "top5": 100 * top5 / count}


# ---- parts of a step -----------------------------------------------------------------------------


def set_learning_rates(optimizer, lr_at, step):
    """Sets each group's rate; returns the rate of a group without "lr_scale" and "lr_end"."""
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
    """Of groups with "lr_end", where they were computed: they don't count for clipping either."""
    for group in optimizer.param_groups:
        if "lr_end" in group and group["lr"] == 0:
            for parameter in group["params"]:
                parameter.grad = None


def _count_correct(logits, targets):
    """Correct predictions as a float; of a mixed image the label of larger weight counts."""
    labels = targets if targets.ndim == 1 else targets.argmax(1)
    return (logits.argmax(1) == labels).sum().float()


def _update(scaler, optimizer):
    """Updates the weights; False where the scaler skipped it because a gradient overflowed.

    A hook of the optimizer tells, without reading the scale, for which the host would wait. Not for
    fused optimizers: the scaler always calls their step, and the kernel decides.
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


def _without_synchronisation(model, wanted):
    """DistributedDataParallel's no_sync, for all parts of a batch but the last one.

    Not for a sharded model: gradients kept for later would be those of the whole model.
    """
    return model.no_sync() if wanted and hasattr(model, "no_sync") else nullcontext()


def _settle_gradient_order(model, inputs, targets, step):
    """A forward and backward pass that only fixes where DistributedDataParallel keeps gradients.

    It moves them within its buffers after the first pass, and three or more ranks sum each place in
    an order of its own. A resumed run would have the first places at a later step, and round
    differently.
    """
    with _statistics_unchanged(_Snapshot(list(model.buffers()))):
        with autocast(inputs.device, step.dtype):
            logits = model(inputs)
        step.loss_fn(logits.float(), targets).backward()
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
    """Copies of tensors in memory that is allocated once; one kernel per type, each way."""

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
    """Raises NonFiniteLoss unless weights, statistics and the optimizer's averages are finite.

    The averages can overflow alone. Each rank sees a shard of a sharded model: all raise, or none.
    """
    tensors = list(model.state_dict().items())
    for values in optimizer.state.values():
        # Not the scalars: they are counts, which may be on the CPU.
        averages = [(k, v) for k, v in values.items() if torch.is_tensor(v) and v.ndim]
        tensors += [(f"the optimizer's {name}", value) for name, value in averages]
    tensors = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for _, tensor in tensors]
    finite = torch.stack([tensor.isfinite().all() for tensor in local])
    if ranks.sharded:
        finite = ranks.sum((~finite).float()) == 0
    finite = finite.tolist()
    if not all(finite):
        name = tensors[finite.index(False)][0]
        raise _not_finite(f"{name} is not finite", progress, lr, after_update=True)


def _not_finite(what, progress, lr, after_update=False):
    step = progress.step if after_update else progress.step + 1
    stopped = "stopped" if after_update else "stopped before the update"
    return NonFiniteLoss(
        f"{what} at step {step} (epoch {progress.epoch + 1}) with learning rate {lr:.4g}: {stopped}"
        f"; last.pt is the last good state; try a smaller --lr, a longer --warmup-epochs or "
        f"--clip-grad 1"
    )
