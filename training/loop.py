"""The one loop: `fit` trains, `evaluate` measures. Neither knows a recipe; what varies is passed in as functions.

    progress = Progress()
    fit(model, batches, optimizer=optimizer, lr_at=lr_at, epochs=10, progress=progress, after_step=ema.update,
        measure=lambda epoch: evaluate(model, test_batches), after_epoch=print)

The state between two steps is the weights, the optimizer and `Progress`: batches and dropout are drawn from functions of
(seed, epoch, batch), the learning rate is a function of the step. So a run can stop and go on after any step.
"""

import math
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

try:
    import resource
except ImportError:  # Windows
    resource = None

from common.errors import UserError
from training.devices import seed_model, synchronize
from training.distributed import Ranks
from training.mixed_precision import _fp32_classifier, autocast


class Interrupted(Exception):
    """Training stopped after a whole step because it was asked to."""


class NonFiniteLoss(UserError):
    """Training stopped before the update because the loss was not a finite number."""


@dataclass
class Progress:
    """Where a run stands: whole epochs done, steps done, and the sums of the epoch that is under way."""

    epoch: int = 0
    step: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    seconds: float = 0.0
    total_seconds: float = 0.0  # of all training so far, without evaluation

    def state_dict(self):
        return asdict(self)

    def load_state_dict(self, state):
        for name, value in state.items():
            setattr(self, name, value)

    def finish_epoch(self):
        self.total_seconds += self.seconds
        self.epoch += 1
        self.batch = self.seen = self.correct = 0
        self.loss_sum = self.seconds = 0.0


class _Readback:
    """Numbers from the device without making it wait.

    On CUDA the copy to the host is queued behind the forward pass, and read while the device is busy with the backward
    pass that was queued behind it.
    """

    def __init__(self, values):
        self.event = None
        if values.is_cuda:
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(values.device))
        else:
            self.values = values

    def tolist(self):
        if self.event is not None:
            self.event.synchronize()
        return self.values.tolist()


class _Snapshot:
    """Copies of tensors in memory that is allocated once: one kernel for all tensors of a type, each way."""

    def __init__(self, tensors):
        kinds = {}
        for tensor in tensors:
            kinds.setdefault(tensor.dtype, []).append(tensor)
        self.pairs = [(kind, [torch.empty_like(t) for t in kind]) for kind in kinds.values()]

    @torch.no_grad()
    def take(self):
        for tensors, copies in self.pairs:
            torch._foreach_copy_(copies, tensors)

    @torch.no_grad()
    def restore(self):
        for tensors, copies in self.pairs:
            torch._foreach_copy_(tensors, copies)


def _running_statistics(model):
    """The buffers that a norm updates in its forward pass, as torch calls them."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    return [buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] in names]


def _recomputes(model):
    """Whether the model runs parts of its forward pass again during the backward pass (timm's name for it)."""
    return any(getattr(module, "grad_checkpointing", False) for module in model.modules())


@contextmanager
def _statistics_unchanged(snapshot):
    """For a backward pass that recomputes activations: batch norm would count these images a second time."""
    snapshot.take()
    yield
    snapshot.restore()


def _settle_gradient_order(model, inputs, targets, loss_fn, dtype):
    """A forward and a backward pass that change nothing but where DistributedDataParallel keeps gradients.

    It moves them to other places in its buffers after the first pass, and three or more ranks sum each place in an order of its
    own. A resumed run would begin with the first places at a later step, and round differently.
    """
    statistics = _Snapshot(list(model.buffers()))
    with _statistics_unchanged(statistics):
        with autocast(inputs.device, dtype):
            logits = model(inputs)
        loss_fn(logits.float(), targets).backward()
    model.zero_grad(set_to_none=True)


def _step(scaler, optimizer):
    """Updates the weights; returns False where the scaler skipped the update because a gradient overflowed.

    The optimizer's hook says so without reading the scale, for which the host would wait. Not for fused optimizers: the
    scaler always calls their step, and the kernel decides.
    """
    if not scaler.is_enabled():
        optimizer.step()
        return True
    taken = []
    hook = optimizer.register_step_post_hook(lambda *_: taken.append(True))
    try:
        scaler.step(optimizer)
    finally:
        hook.remove()
    scaler.update()
    return bool(taken)


def fit(
    model,
    batches,
    *,
    optimizer,
    lr_at,
    epochs,
    loss_fn=F.cross_entropy,
    progress=None,
    dtype=None,
    scaler=None,
    accumulate=1,
    clip_grad=0.0,
    seed=0,
    after_step=None,
    measure=None,
    after_epoch=None,
    stop=None,
    show=None,
    ranks=None,
):
    """Trains `model` in place until progress.epoch is `epochs`, and returns the progress.

    model: float (B, 3, H, W) -> logits (B, K); batches: data.Batches; lr_at: step -> learning rate, times a group's
    "lr_scale" if it has one; loss_fn: (logits float32, targets) -> mean loss; dtype: autocast's, None for fp32; scaler:
    torch.amp.GradScaler, for fp16; accumulate: parts that a batch is cut into, with one update for all; clip_grad: largest
    norm of the gradient (0: any).

    ranks: the processes that train together, where `model` averages gradients over them and `batches` gives this one its rows
    of each batch; their figures are those of all images.

    after_step() is called after each update; measure(epoch) after each epoch's training, for figures to add; then
    after_epoch(figures), when `progress` stands at the next epoch, to write and save. stop() is asked after each step.
    Figures: epoch (from 1), step, lr, train_loss (mean), train_acc (%), epoch_seconds, images_per_second.

    Raises Interrupted between two steps when stop() says so, and NonFiniteLoss before an update that would spoil the weights.
    """
    progress = progress or Progress()
    device = next(model.parameters()).device
    ranks = ranks or Ranks(device)
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    # fp16: statistics before a step that may be skipped. Gradient checkpointing: those after the forward pass.
    skipped, before = (
        0,
        _Snapshot(
            [b for b in model.buffers() if b.is_floating_point()] if scaler.is_enabled() else []
        ),
    )
    after_forward = _Snapshot(_running_statistics(model) if _recomputes(model) else [])
    settled = ranks.world <= 2 or ranks.sharded  # the sum of two has one order
    while progress.epoch < epochs:
        model.train()
        begin = time.perf_counter() - progress.seconds
        for inputs, targets in batches.epoch(progress.epoch, start=progress.batch):
            rate = lr_at(progress.step)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            if not settled:
                _settle_gradient_order(model, inputs[:2], targets[:2], loss_fn, dtype)
                settled = True
            seed_model(
                seed,
                device,
                progress.epoch,
                "model" + f" {ranks.rank}" * (not ranks.first),
                progress.batch,
            )

            before.take()
            # In company, a rank that was asked to stop says so with its figures, and all stop after this step.
            company, asked = ranks.world > 1, ranks.world > 1 and bool(stop and stop())
            total = batches.batch_size if company else len(targets)
            parts = list(zip(inputs.tensor_split(accumulate), targets.tensor_split(accumulate)))
            reads = []
            for i, (x, y) in enumerate(parts):
                with _gradients_stay_local(model, i < len(parts) - 1):
                    with autocast(device, dtype):
                        logits = model(x)
                    loss = loss_fn(logits.float(), y)
                    figures = [loss.detach() * len(y), _count_correct(logits.detach(), y)]
                    figures += [torch.full_like(loss, asked)] * company
                    reads.append(_Readback(ranks.sum(torch.stack(figures))))
                    with _statistics_unchanged(after_forward):
                        scaler.scale(loss * (len(y) * ranks.world / total)).backward()
            loss_sum, correct, *askers = map(sum, zip(*(read.tolist() for read in reads)))

            finite = math.isfinite(loss_sum)
            if not finite and not scaler.is_enabled():  # the scaler skips such a step by itself
                raise NonFiniteLoss(_advice(f"the loss is {loss_sum / total}", progress, rate))
            if clip_grad:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
            skipped = 0 if _step(scaler, optimizer) else skipped + 1
            if skipped:
                before.restore()  # batch norm has seen the overflow, too
            if skipped >= MOST_SKIPS:
                raise NonFiniteLoss(
                    _advice(f"{skipped} steps in a row overflowed fp16", progress, rate)
                )
            optimizer.zero_grad(set_to_none=True)
            if after_step and not skipped:
                after_step()

            progress.step += 1
            progress.batch += 1
            if finite:
                progress.seen += total
                progress.loss_sum += loss_sum
                progress.correct += round(correct)
            if show:
                show(progress, loss_sum / total)
            if any(askers) or (not company and stop and stop()):
                _check_state(
                    model, optimizer, progress, rate, ranks
                )  # what is saved now must be good
                progress.seconds = time.perf_counter() - begin
                raise Interrupted
        synchronize(device)
        progress.seconds = time.perf_counter() - begin
        _check_state(model, optimizer, progress, lr_at(progress.step - 1), ranks)

        figures = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "lr": lr_at(progress.step - 1),
            "train_loss": progress.loss_sum / max(1, progress.seen),
            "train_acc": 100 * progress.correct / max(1, progress.seen),
            **(measure(progress.epoch + 1) if measure else {}),
            "epoch_seconds": progress.seconds,
            "images_per_second": progress.seen / progress.seconds,
        }
        progress.finish_epoch()
        if after_epoch:
            after_epoch(figures)
    return progress


MOST_SKIPS = 20  # the scale halves at each: from 65536 to less than 0.1


# Batches of an evaluation after which several ranks ask each other whether to stop: each time, they wait for the slowest.
POLL_EVERY = 4


@torch.no_grad()
def evaluate(
    model, batches, *, loss_fn=F.cross_entropy, dtype=None, stop=None, ranks=None, see=None
):
    """{"loss": mean, "acc": top-1 %, "top5": %} over every image once; sums over examples, kept on the device.

    ranks: the processes that share the batches; each gets the figures of all images. see(answers, labels) is shown each batch,
    of several ranks this one's part. Raises Interrupted when stop() says so: between two batches, or, on all ranks together,
    after POLL_EVERY batches or the last one.
    """
    model.eval()
    device = next(model.parameters()).device
    ranks = ranks or Ranks(device)
    counts, losses = torch.zeros(3, dtype=torch.int64, device=device), []
    for number, (inputs, labels) in enumerate(batches, 1):
        if not len(labels) and ranks.sharded:
            model(
                inputs.new_zeros(1, *inputs.shape[1:])
            )  # the others need this rank's part of the model
        if len(labels):  # else a rank's part of a small last batch
            with autocast(device, dtype), _fp32_classifier(model, dtype):
                logits = model(inputs)
            logits = logits.float()
            losses.append(loss_fn(logits, labels) * len(labels))
            answers = logits.topk(min(5, logits.shape[1]), dim=1).indices
            top = answers == labels[:, None]
            counts += torch.stack(
                [top[:, 0].sum(), top.sum(), top.new_full((), len(labels), dtype=torch.int64)]
            )
            if see:
                see(answers[:, 0], labels)
        if (ranks.world == 1 or number % POLL_EVERY == 0) and ranks.any(stop and stop()):
            raise Interrupted
    figures = [*counts.tolist(), sum(torch.stack(losses).tolist()) if losses else 0.0]
    if ranks.world > 1:
        asked = bool(stop and stop())
        *figures, askers = ranks.sum(
            torch.tensor([*figures, asked], dtype=torch.float64, device=device)
        ).tolist()
        if askers:
            raise Interrupted
    top1, top5, count, loss = figures
    return {"loss": loss / count, "acc": 100 * top1 / count, "top5": 100 * top5 / count}


def _count_correct(logits, targets):
    """Correct predictions, as a float; of a mixed picture the label of larger weight counts."""
    labels = targets if targets.ndim == 1 else targets.argmax(1)
    return (logits.argmax(1) == labels).sum().float()


def _gradients_stay_local(model, local):
    """DistributedDataParallel's no_sync, around forward and backward, for all but the last part of a batch.

    Nothing for a plain model, and for a sharded one: there, gradients kept for later would be those of the whole model.
    """
    return model.no_sync() if local and hasattr(model, "no_sync") else nullcontext()


def _check_state(model, optimizer, progress, rate, ranks):
    """Raises NonFiniteLoss unless weights, statistics and the optimizer's averages, which can overflow alone, are finite.

    Of a sharded model, each rank sees a part: all of them raise, or none.
    """
    named = [*model.state_dict().items()]
    named += [
        (f"the optimizer's {name}", value)
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.ndim
    ]  # but its counts, which lie on the CPU at times
    floats = [(name, value) for name, value in named if value.is_floating_point()]
    own = [
        value.to_local() if hasattr(value, "to_local") else value for _, value in floats
    ]  # of a sharded model, a part
    finite = torch.stack([value.isfinite().all() for value in own])
    finite = (ranks.sum((~finite).float()) == 0 if ranks.sharded else finite).tolist()
    if not all(finite):
        name = next(name for (name, _), good in zip(floats, finite) if not good)
        raise NonFiniteLoss(_advice(f"{name} is not finite", progress, rate, done="stopped"))


def _advice(what, progress, rate, done="stopped before the update"):
    return (
        f"{what} at step {progress.step + (done != 'stopped')} (epoch {progress.epoch + 1}) with learning rate {rate:.4g}: "
        f"{done}, and last.pt is the last good one; try a smaller --lr, a longer --warmup-epochs or --clip-grad 1"
    )
