"""Evaluations: every image counts once, on all ranks, and the weights stay as they are."""

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers.training import CPU, batches, fit, network, ordered, same_weights, start
from helpers.training import random_images as images

import models
from training import evaluation, loop
from training.distributed import Ranks
from training.state import Confusion


@pytest.mark.parametrize("classes", [10, 3])
def test_evaluation_counts_every_image_once(classes):
    examples = images(10_001)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, classes))
    examples.labels.remainder_(classes)
    metrics = evaluation.evaluate(model, ordered(examples))
    ((x, y),) = ordered(examples, 10_001)
    logits = model(x).detach()
    top5 = (logits.topk(min(5, classes)).indices == y[:, None]).any(1)
    expected = {"acc": (logits.argmax(1) == y).sum(), "top5": top5.sum()}
    expected = {name: 100 * count.item() / 10_001 for name, count in expected.items()}
    assert metrics == pytest.approx({"loss": F.cross_entropy(logits, y).item()} | expected)


def test_evaluation_can_be_interrupted_and_keeps_the_weights():
    model = network(norm=True)
    before = copy.deepcopy(model)
    with pytest.raises(loop.Interrupted):
        evaluation.evaluate(model, batches(), stop=lambda: True)
    evaluation.evaluate(model, batches())
    assert same_weights(model, before)


def test_an_evaluation_during_training_does_not_change_the_training():
    """In bf16 the classifier computes in fp32, in evaluation only."""
    trained = []
    for evaluates in (False, True):
        torch.manual_seed(0)
        model = models.create_model("resnet20", 10)
        state = start(model)
        for epochs in (1, 2):
            fit(state, epochs, dtype=torch.bfloat16)
            if evaluates:
                evaluation.evaluate(model, batches(), dtype=torch.bfloat16)
        trained.append(model)
    assert same_weights(*trained)


@pytest.mark.parametrize(("name", "ema_decay"), [("test", 0.0), ("test", 0.5), ("val", 0.5)])
def test_the_columns_of_the_accuracy_curve_and_the_confusion_matrix(name, ema_decay):
    """The matrix is that of the reported weights on the test images in the last epoch."""
    state = start(network(), ema_decay=ema_decay)
    settings = loop.StepSettings(lambda step: 0.1)
    state.confusion, source = Confusion(10, CPU), ordered(images(100))
    curve, rows = evaluation.Curve(name, every=2, epochs=3), []
    for epoch in (1, 2, 3):
        loop.train_epoch(state, batches(), settings)
        rows.append(evaluation.evaluate_epoch(state, source, curve, settings))
        state.progress.finish_epoch()
        assert state.confusion.counts.sum() == (100 if epoch == 3 and name == "test" else 0)
    assert [row[f"{name}_acc"] is None for row in rows] == [True, False, False]
    assert rows[0] == dict.fromkeys(rows[1]) and len(rows[1]) == (6 if ema_decay else 3)
    if name == "test":
        reported = rows[2][state.reported_columns("test") + "_acc"]
        assert state.confusion.counts.trace() == pytest.approx(reported)


class ThreadRanks:
    """Two ranks that are threads; they evaluate in `run`."""

    def __init__(self):
        self.barrier, self.values = threading.Barrier(2, timeout=300), [None, None]
        self.reductions, self.batches, self.labels = 0, [0, 0], []
        self.models = network(), network()

    def sum(self, rank, values):
        self.values[rank] = values.clone()
        self.barrier.wait()
        total = self.values[0] + self.values[1]
        self.barrier.wait()
        self.reductions += rank == 0
        return values.copy_(total)

    def run(self, examples, stop_in=math.inf):
        """The metrics of each rank. stop_in: the second rank is asked to stop during this batch."""
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda rank: self.evaluate(rank, examples, stop_in), range(2)))

    def evaluate(self, rank, examples, stop_in):
        class Rank(Ranks):
            def sum(_, values):
                return self.sum(rank, values)

        def record(predictions, labels):
            self.labels += labels.tolist()

        def batches():
            for batch in ordered(examples, 1000, rank=rank, world_size=2):
                self.batches[rank] += 1
                yield batch

        def stop():
            return rank == 1 and self.batches[rank] >= stop_in

        model, ranks = self.models[rank], Rank(CPU, rank, 2)
        try:
            return evaluation.evaluate(model, batches(), ranks=ranks, stop=stop, confusion=record)
        except loop.Interrupted:
            return "interrupted"


def test_ranks_evaluate_every_image_once_with_few_reductions():
    examples, ranks = images(10_001), ThreadRanks()
    alone = evaluation.evaluate(network().eval(), ordered(examples))
    first, second = ranks.run(examples)
    assert first == second and sorted(ranks.labels) == sorted(examples.labels.tolist())
    assert (first["acc"], first["top5"]) == (alone["acc"], alone["top5"])
    assert first["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert ranks.reductions <= 3


@pytest.mark.parametrize(("stop_in", "most"), [(2, 4), (4, 4), (5, 8), (9, 11), (11, 11)])
def test_ranks_stop_an_evaluation_together(stop_in, most):
    ranks = ThreadRanks()
    assert ranks.run(images(11_000), stop_in) == ["interrupted"] * 2
    assert ranks.batches[0] == ranks.batches[1] <= most
