"""A small network, its batches and its state, trained without a script."""

from collections import Counter

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

import data
import train
from datasets.examples import Examples
from datasets.pipeline import Pipeline
from models.weights import load_checkpoint
from training import arguments, evaluation, loop, optimizers
from training.moving_average import MovingAverage
from training.state import State

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def network(dropout=0.0, norm=False, seed=0):
    """(B, 3, 8, 8) -> (B, 10)"""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(dropout), nn.Linear(72, 10))


def same_weights(model, other):
    """Whether two models have the same weights and buffers."""
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def random_images(count):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 8, 8, 3), dtype=torch.uint8, generator=generator)
    return Examples(images.permute(0, 3, 1, 2), torch.randint(0, 10, (count,), generator=generator))


def batches(count=100, device="cpu", **options):
    """Augmented training batches of 32 images: three in an epoch of 100 images."""
    pipeline = Pipeline(MEAN, STD, 8, ("crop", "flip"), num_classes=10, **options)
    return data.Batches(random_images(count), 32, pipeline, device=device)


def ordered(examples, size=500, **ranks):
    """Batches without augmentation, in order."""
    return data.Batches(examples, size, Pipeline(MEAN, STD, 8), shuffle=False, **ranks)


def start(model, optimizer="sgd", lr=0.05, ema_decay=0.0, fp16=False):
    """The State of a run that starts with this model."""
    groups = optimizers.param_groups(model, 1e-3)
    if optimizer == "muon":
        groups = optimizers.muon_groups(groups, model)
    elif optimizer == "muon_sgd":
        groups = optimizers.muon_sgd_groups(groups, model, lr)
    return State(
        model=model,
        optimizer=optimizers.build_optimizer(optimizer, groups, lr, fused=not fp16),
        scaler=torch.amp.GradScaler("cpu", enabled=fp16),
        average=MovingAverage(model, ema_decay) if ema_decay else None,
    )


def fit(state, epochs=1, source=None, stop=loop.never, show=None, **options):
    """Trains until so many epochs are done and returns their rows. options: of StepSettings."""
    settings, rows = loop.StepSettings(**{"lr_at": lambda step: 0.05} | options), []
    source = source or batches()
    while state.epoch < epochs:
        rows.append(loop.train_epoch(state, source, settings, stop, show))
        state.progress.finish_epoch()
    return rows


def fix_accuracies(monkeypatch, accuracies):
    """train.py measures these accuracies on held-out images, one for each epoch."""
    evaluate_epoch = train.evaluate_epoch

    def with_fixed_accuracy(state, *arguments):
        row, column = evaluate_epoch(state, *arguments), "ema_val_acc"
        return row | {column: accuracies[state.epoch]} if column in row else row

    monkeypatch.setattr(train, "evaluate_epoch", with_fixed_accuracy)


def evaluate_checkpoint(path, examples, **options):
    """The metrics of a checkpoint's weights on examples, without augmentation."""
    model, card = load_checkpoint(path)
    pipeline = Pipeline(card["mean"], card["std"], card["image_size"])
    source = data.Batches(examples, 50, pipeline, shuffle=False)
    return evaluation.evaluate(model.eval(), source, **options)


class CallCounter(TorchDispatchMode):
    """A block whose calls of torch are counted: {function: number}."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function] += 1
        return function(*args, **(kwargs or {}))


def resolve(script, *argv):
    """The arguments of a training script, from words or values of its command line."""
    return arguments.resolve(script.build_parser(), [str(word) for word in argv])[0]
