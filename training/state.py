"""Everything that changes while a run trains, and the contents of last.pt and best.pt."""

from contextlib import nullcontext
from dataclasses import asdict, dataclass, field

import torch

from models import lora
from training import distributed, optimizers
from training.lookahead import Lookahead
from training.moving_average import MovingAverage
from training.resume import refuse_misfits


@dataclass
class Progress:
    """Where a run stands: epochs and steps done, and the sums of the current epoch."""

    epoch: int = 0
    step: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    seconds: float = 0.0  # of training in this epoch (column epoch_seconds)
    total_seconds: float = 0.0  # of training so far (summary.json: train_seconds)
    eval_seconds: float = 0.0  # of evaluations so far (column eval_seconds)
    wall_seconds: float = 0.0  # of processes so far (column total_seconds), see Run.count_time
    skipped_steps: int = 0  # in a row, by the scaler

    def count_step(self, images, loss_sum, correct, finite):
        """finite: whether the loss was; images of other steps are not counted."""
        self.step += 1
        self.batch += 1
        if finite:
            self.seen += images
            self.loss_sum += loss_sum
            self.correct += round(correct)

    def finish_epoch(self):
        self.total_seconds += self.seconds
        self.epoch += 1
        self.batch = self.seen = self.correct = 0
        self.loss_sum = self.seconds = 0.0


class Confusion:
    """How often an image of class i was predicted as class j: `counts` (K, K), int64."""

    def __init__(self, num_classes, device):
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def __call__(self, predictions, labels):
        """predictions, labels: int64 (B,)"""
        classes = len(self.counts)
        cells = torch.bincount(labels * classes + predictions, minlength=classes**2)
        self.counts += cells.view(classes, classes)


@dataclass
class State:
    """All that changes while a run trains, and what its checkpoints hold besides.

    card: what is needed to use the weights, see weights.load_checkpoint; facts: what the data is,
    see resume.data_facts; record: (arguments, origin), see arguments.record; history: [seconds of
    training, top-1 %, top-5 %] of `reported` at each evaluation.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler = field(
        default_factory=lambda: torch.amp.GradScaler(enabled=False)
    )
    average: MovingAverage | None = None
    lookahead: Lookahead | None = None
    confusion: Confusion | None = None
    card: dict = field(default_factory=dict)
    facts: dict = field(default_factory=dict)
    record: tuple = ({}, {})
    progress: Progress = field(default_factory=Progress)
    best: dict = field(default_factory=lambda: {"epoch": 0, "value": -1.0})  # epoch 0: none yet
    history: list = field(default_factory=list)
    gradient_order_settled: bool = False
    compiled: bool = False
    _parallel_model: torch.nn.Module | None = None

    @property
    def epoch(self):
        """Epochs done."""
        return self.progress.epoch

    @property
    def reported(self):
        """The model whose accuracy is the run's: the moving average where there is one."""
        return self.average.model if self.average else self.model

    def reported_on_device(self):
        """A block in which `reported` is on the device, to be evaluated."""
        return self.average.on_device() if self.average else nullcontext(self.model)

    @property
    def evaluations_since_best(self):
        accuracies = [top1 for _, top1, _ in self.history]
        return len(accuracies) - 1 - accuracies.index(max(accuracies)) if accuracies else 0

    def reported_columns(self, curve_name):
        """The prefix of the columns of metrics.csv that are reported, "test" or "ema_test".

        With "_acc", the one that best.pt is selected by.
        """
        return f"ema_{curve_name}" if self.average else curve_name

    def parallel_model(self, ranks):
        """What to call in a training step, so that gradients are averaged over the ranks."""
        if self._parallel_model is None:
            self._parallel_model = ranks.parallel(self.model)
        return self._parallel_model

    def compile(self):
        """In place: the keys of the state dict stay as they are.

        Each shape of the inputs (of a part of a batch, of --progressive, of an evaluation) gets a
        graph of its own: one for all is slower, and which steps use it would depend on where a run
        resumed.
        """
        self.compiled = True
        # Above its limit, 8, torch computes further shapes without compiling them, and warns once.
        torch._dynamo.config.recompile_limit = 64
        self.model.compile(dynamic=False)
        if self.average:
            self.average.model.compile(dynamic=False)

    def contents(self):
        """The contents of last.pt. All ranks have to call it together if the model is sharded."""
        arguments, origin = self.record
        training = {
            "arguments": arguments,
            "origin": origin,
            "facts": self.facts,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.progress),
            "best": dict(self.best),
            "history": list(self.history),
            "lookahead": self.lookahead.state_dict() if self.lookahead else None,
        }
        average = self.average.state_dict() if self.average else None
        weights = self.model.state_dict()
        return distributed.gather(
            {"card": self.card, "state_dict": weights, "ema": average, "training": training}
        )

    def best_contents(self, curve_name):
        """A function that turns the contents of last.pt of the best epoch into those of best.pt.

        The metric is taken now: when the function runs, in another thread, `best` may have changed.
        """
        name = f"{self.reported_columns(curve_name)}_acc"
        metric = {"name": name, "selected_on": curve_name, **self.best}

        def contents(last):
            return {"card": last["card"], "metric": metric, "state_dict": _reported_weights(last)}

        return contents

    @staticmethod
    def epoch_contents(last):
        """The contents of epoch-N.pt, from those of last.pt after this epoch."""
        progress = {"epoch": last["training"]["progress"]["epoch"], "batch": 0}
        weights = _reported_weights(last)
        return {"card": last["card"], "training": {"progress": progress}, "state_dict": weights}

    @refuse_misfits()
    def restore(self, saved):
        """Takes over the contents of last.pt. Raises UserError where they don't fit."""
        training = saved["training"]
        weights = distributed.shard_like(saved["state_dict"], self.model.state_dict())
        self.model.load_state_dict(weights)
        optimizer_state = distributed.shard_optimizer(training["optimizer"], self.optimizer)
        optimizers.load_optimizer(self.optimizer, optimizer_state)
        if training["scaler"]:
            self.scaler.load_state_dict(training["scaler"])
        if self.average:
            average = saved["ema"]["average"]
            average = distributed.shard_like(average, self.average.model.state_dict())
            self.average.load_state_dict(saved["ema"] | {"average": average})
        if self.lookahead:
            self.lookahead.load_state_dict(training["lookahead"])
        self.progress = Progress(**training["progress"])
        self.best = dict(training["best"])
        # Older versions didn't save the history, see resume.open_directory.
        self.history = list(training.get("history", []))


def _reported_weights(last):
    """The weights of State.reported, from the contents of last.pt."""
    return lora.merged(last["ema"]["average"] if last["ema"] else last["state_dict"])
