"""Loads checkpoints and chooses the images that are shown.

predictor = Predictor("runs/x/best.pt", torch.device("cpu"))
logits = predictor.logits(images)             # uint8 (N, 3, h, w), any size -> float (N, K)
test = test_split([predictor]).test
"""

from pathlib import Path

import numpy as np
import torch

import data
import models
from analysis import metrics
from common.errors import UserError
from common.files import read_json
from common.text import printable
from datasets import image_folder
from datasets.pipeline import Pipeline
from models.weights import are_statistics, load_checkpoint
from training.out_of_memory import is_out_of_memory

BATCH = 250  # images at a time; fewer where they don't fit into memory
EXPLAINED = 16  # images at a time: gradients, or an attention matrix for each head
MAX_SIDE = 4096  # pixels: a larger image size is damaged or hostile


class Predictor:
    """A checkpoint's model with its preprocessing, its card and a display name."""

    def __init__(self, path, device):
        self.path = Path(path) / "best.pt" if Path(path).is_dir() else Path(path)
        self.model, self.card = load_checkpoint(self.path)
        _check_card(self.card, self.path)
        card = self.card
        # Raises UserError where the model doesn't take the image size.
        models.describe(card["model"], card["num_classes"], card["image_size"], card["options"])
        tensors = [*self.model.parameters(), *self.model.buffers()]
        other_types = {t.dtype for t in tensors if t.is_floating_point() or t.is_complex()}
        other_types -= {torch.float32}
        if other_types:
            raise UserError(f"{self.path} was refused: it has weights of type {other_types.pop()}")
        self.model.to(device, memory_format=torch.channels_last)
        self.device, self.classes = device, list(self.card["classes"])
        self.image_size = self.card["image_size"]
        self.pipeline = Pipeline(self.card["mean"], self.card["std"], self.image_size)
        self.name = printable(self.path.resolve().parent.name)
        self.batch_size = BATCH

    def standing(self):
        """(test accuracy of these weights in percent, from their run, or None; which weights)."""
        metric, epoch = self.card["metric"], self.card["epoch"]
        summary = read_json(self.path.parent / "summary.json")
        if metric and metric["selected_on"] == "test":
            return metric["value"], f"epoch {epoch}, the best on the run's test images"
        if metric:
            return summary.get("test_acc"), f"epoch {epoch}, the best on held-out images"
        if epoch is None:
            return None, "the middle of an epoch"
        if epoch == summary.get("epochs") and summary.get("reported") == "last epoch":
            return summary.get("test_acc"), f"epoch {epoch}, the last"
        return None, f"epoch {epoch}"

    def inputs(self, images):
        """Normalized float (N, 3, S, S) on the model's device."""
        return self.pipeline(images.to(self.device), None)[0]

    def logits(self, images):
        """float32 (N, K) on the CPU. Raises UserError if even one image needs too much memory."""
        while True:
            try:
                return self._logits(images.split(self.batch_size))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.batch_size == 1:
                    raise UserError(f"{self.path}: {self.device} has too little memory") from error
            self.batch_size //= 2  # here, where the failed batch is no longer held

    @torch.no_grad()
    def _logits(self, batches):
        return torch.cat([self.model(self.inputs(batch)).float().cpu() for batch in batches])

    def explain(self, images, classes):
        """(heat (N, S, S) in [0, 1], the method's name); see explain.py."""
        from show import explain

        batches = zip(images.split(EXPLAINED), classes.split(EXPLAINED))
        results = [explain.explain(self.model, self.inputs(x), picked) for x, picked in batches]
        return torch.cat([heat for heat, _ in results]), results[0][1]


def _check_card(card, path):
    """Raises UserError for a card with unusable values: a checkpoint may come from anybody."""
    classes = card["classes"]
    valid = {
        "mean and std": are_statistics(card["mean"], card["std"]),
        "image_size": type(card["image_size"]) is int and 1 <= card["image_size"] <= MAX_SIDE,
        "classes": isinstance(classes, (list, tuple))
        and len(classes) == card["num_classes"]
        and all(isinstance(name, str) for name in classes),
        "dataset": isinstance(card.get("dataset"), str),
        "source": isinstance(card["source"], str),
    }
    invalid = [key for key, is_valid in valid.items() if not is_valid]
    if invalid:
        raise UserError(f"{path} was refused: its card has no valid {' and '.join(invalid)}")


def load_all(paths, device):
    """A Predictor for each path, with distinct names. Raises UserError if their classes differ."""
    predictors = [Predictor(path, device) for path in paths]
    first = predictors[0]
    for other in predictors:
        if other.classes != first.classes:
            both = f"{first.path} and {other.path}"
            raise UserError(f"{both} can't be compared: their classes differ")
    names = [predictor.name for predictor in predictors]
    for number, predictor in enumerate(predictors, 1):
        if names.count(predictor.name) > 1:
            predictor.name += f"/{predictor.path.stem} {number}"
    return predictors


def load_images(files, size):
    """(uint8 (N, 3, size, size), their names) of image files, cut to squares. Raises UserError."""
    images = []
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"there is no image file {file}", status=2)
        image = image_folder.decode(file, size)
        if isinstance(image, str):
            raise UserError(f"{file} can't be read as an image ({image})")
        images.append(torch.from_numpy(np.array(image)))
    return torch.stack(images).permute(0, 3, 1, 2), [printable(Path(file).name) for file in files]


def test_split(predictors, dataset=None, data_dir=None):
    """The dataset of the first checkpoint's run, or another one with the same classes."""
    first = predictors[0]
    saved = metrics.read_arguments(first.path.parent)
    name, saved_dir, limit = (saved.get(key) for key in ("dataset", "data_dir", "limit_test"))
    name = name if isinstance(name, str) else first.card["source"]
    saved_dir = saved_dir if isinstance(saved_dir, str) else "data"
    are_others = dataset not in (None, name) or (name == "folder" and data_dir)
    split = data.load(
        dataset or name,
        data_dir or saved_dir,
        image_size=max(predictor.image_size for predictor in predictors),
        limit_test=limit if type(limit) is int and limit > 0 and not are_others else 0,
        skip_bad_images=saved.get("skip_bad_images", False),
    )
    if list(split.classes) != first.classes:
        raise UserError(
            f"the checkpoint has {len(first.classes)} classes ({', '.join(first.classes[:3])}, …), "
            f"but {split.name} has {len(split.classes)} ({', '.join(split.classes[:3])}, …)"
        )
    return split


def choose(total, index, seed, count):
    """Indices of test images: those of `index`, where -1 is random, or `count` random ones."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    if not index:
        return order[:count]
    outside = [i for i in index if not -1 <= i < total]
    if outside:
        allowed = f"the test split has images 0 to {total - 1} (-1: a random one)"
        raise UserError(f"--index {outside[0]}: {allowed}", status=2)
    return [order[-1 - k % total] if i == -1 else i for k, i in enumerate(index)]


def mistakes(logits, labels, count):
    """Indices of the wrongly classified images, the most confident first."""
    confidence, predicted = logits.softmax(1).max(1)
    return _most_confident(predicted != labels, confidence, count)


def disagreements(logits, count):
    """Indices of the images that models classify differently; first those where all are confident.

    logits: (N, K) of each model.
    """
    confidence, predicted = torch.stack([one.softmax(1) for one in logits]).max(2)
    return _most_confident((predicted != predicted[0]).any(0), confidence.amin(0), count)


def _most_confident(chosen, confidence, count):
    indices = chosen.nonzero()[:, 0]
    order = confidence[indices].argsort(descending=True, stable=True)
    return indices[order][:count].tolist()
