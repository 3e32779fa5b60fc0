"""Evaluation: loss and accuracy over every image once, during training and at its end.

metrics = evaluate(model, batches)      # {"loss": 0.5, "acc": 91.3, "top5": 99.7}
row |= evaluate_epoch(state, batches, Curve("test", every=1, epochs=10), settings)
"""

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from training.distributed import Ranks
from training.loop import Interrupted, NonFiniteError, never
from training.mixed_precision import autocast, fp32_classifier

METRICS = ("loss", "acc", "top5")
# Several ranks ask each other whether to stop after this many batches of an evaluation, and at its
# end: each time they wait for the slowest.
POLL_EVERY = 4


@dataclass(frozen=True)
class Curve:
    """Of which images the accuracy curve is, and at which epochs it has points."""

    name: str  # of the images: "test" or "val"
    every: int  # epochs between evaluations
    epochs: int  # of the whole run

    def is_due(self, epoch):
        return epoch % self.every == 0 or epoch == self.epochs


def single_view(model, inputs):
    return model(inputs)


def evaluate_epoch(state, batches, curve, settings, stop=never):
    """The columns of metrics.csv for the model, and with "ema_" for the moving average.

    All columns are None if no evaluation is due. Raises NonFiniteError, Interrupted.
    """
    epoch = state.progress.epoch + 1
    prefixes = ("", "ema_") if state.average else ("",)
    if not curve.is_due(epoch):
        return {f"{prefix}{curve.name}_{metric}": None for prefix in prefixes for metric in METRICS}

    def measure(model, prefix, confusion):
        # In training, each rank has updated the statistics of batch norm with its own images.
        settings.ranks.broadcast(model.buffers())
        start = time.perf_counter()
        metrics = evaluate(
            model,
            batches,
            dtype=settings.dtype,
            stop=stop,
            ranks=settings.ranks,
            confusion=confusion,
        )
        state.progress.eval_seconds += time.perf_counter() - start
        if not math.isfinite(metrics["loss"]):
            step = state.progress.step
            raise NonFiniteError(
                f"the {curve.name} loss after step {step} (epoch {epoch}) is {metrics['loss']}, "
                f"with learning rate {settings.lr_at(step - 1):.4g}: stopped; last.pt is the last "
                f"good state; try a smaller --lr"
            )
        return {f"{prefix}{curve.name}_{metric}": metrics[metric] for metric in METRICS}

    # The confusion matrix is of the model and the images of the reported test accuracy.
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
    """{"loss": mean, "acc": top-1 %, "top5": %} over every image once.

    Hits are counted on the device; losses stay there, and are summed in float64 at the end.
    predict(model, inputs): the logits; ranks: the processes that share the batches; each gets the
    metrics of all images. confusion(predictions, labels): called for each batch, with this rank's
    part. Raises Interrupted when stop() is true: between two batches; with several ranks, on all of
    them together, every POLL_EVERY batches and at the end.
    """
    model.eval()
    device = next(model.parameters()).device
    ranks = ranks or Ranks(device)
    correct = torch.zeros(2, dtype=torch.int64, device=device)
    losses, seen = [], 0
    for number, (inputs, labels) in enumerate(batches, 1):
        if len(labels):  # a rank's part of a small last batch may be empty
            with autocast(device, dtype), fp32_classifier(model, dtype):
                logits = predict(model, inputs)
            logits = logits.float()
            losses.append(loss_fn(logits, labels) * len(labels))
            predictions = logits.topk(min(5, logits.shape[1]), dim=1).indices
            hits = predictions == labels[:, None]
            correct += torch.stack([hits[:, 0].sum(), hits.sum()])
            seen += len(labels)
            if confusion:
                confusion(predictions[:, 0], labels)
        elif ranks.sharded:  # the other ranks need this rank's shard of the model
            predict(model, inputs.new_zeros(1, *inputs.shape[1:]))
        if (ranks.world_size == 1 or number % POLL_EVERY == 0) and ranks.any(stop()):
            raise Interrupted
    loss_sum = sum(torch.stack(losses).tolist()) if losses else 0.0
    totals = [*correct.tolist(), seen, loss_sum]
    if ranks.world_size > 1:
        values = torch.tensor([*totals, stop()], dtype=torch.float64, device=device)
        *totals, stop_requests = ranks.sum(values).tolist()
        if stop_requests:
            raise Interrupted
    top1, top5, seen, loss_sum = totals
    return {"loss": loss_sum / seen, "acc": 100 * top1 / seen, "top5": 100 * top5 / seen}
