"""Checkpoints at work: the pictures that are shown, and what models make of them.

model = Predictor("runs/x/best.pt", torch.device("cpu"))
logits = model.logits(images)                            # uint8 (N, 3, h, w), any size -> float (N, K)
examples = test_split([model]).test
"""

import math
from pathlib import Path

import numpy as np
import torch

import data
from analysis import metrics
from common.errors import UserError
from common.text import printable
from datasets import image_folder
from datasets.pipeline import Pipeline
from models.weights import load_checkpoint

BATCH = 250
EXPLAINED = 16  # images at a time: gradients, or a matrix of attention for each head
MAX_SIDE = 4096  # pixels: what claims more is damaged or hostile


class Predictor:
    """A checkpoint's model with its preprocessing, its card and a name for pictures of several."""

    def __init__(self, path, device):
        self.path = Path(path) / "best.pt" if Path(path).is_dir() else Path(path)
        self.model, self.card = load_checkpoint(self.path)
        _check_card(self.card, self.path)
        others = {value.dtype for value in self.model.parameters()} - {torch.float32}
        if others:
            raise UserError(f"{self.path} was refused: it has weights of type {others.pop()}")
        self.model.to(device, memory_format=torch.channels_last)
        self.device, self.classes = device, list(self.card["classes"])
        self.pipeline = Pipeline(self.card["mean"], self.card["std"], self.card["image_size"])
        self.name = printable(self.path.resolve().parent.name)

    def standing(self):
        """(test accuracy in percent as its run measured it for these weights or None, in words which weights they are)."""
        metric, epoch = self.card["metric"], self.card["epoch"]
        summary = metrics.read_json(self.path.parent / "summary.json")
        if metric and metric["selected_on"] == "test":
            return metric["value"], f"epoch {epoch}, the best on these test pictures"
        if metric:
            return summary.get("test_acc"), f"epoch {epoch}, the best on held-out pictures"
        if (
            epoch is not None
            and epoch == summary.get("epochs")
            and summary.get("reported") == "last epoch"
        ):
            return summary.get("test_acc"), f"epoch {epoch}, the last"
        return None, "the middle of an epoch" if epoch is None else f"epoch {epoch}"

    def inputs(self, images):
        """Normalised float (N, 3, S, S) on the model's device."""
        return self.pipeline(images.to(self.device), None)[0]

    @torch.no_grad()
    def logits(self, images):
        """float32 (N, K) on the CPU."""
        return torch.cat(
            [self.model(self.inputs(part)).float().cpu() for part in images.split(BATCH)]
        )

    def explain(self, images, classes):
        """(heat (N, S, S) in [0, 1], the method's name); see explain.py."""
        from show import explain

        found = [
            explain.explain(self.model, self.inputs(part), picked)
            for part, picked in zip(images.split(EXPLAINED), classes.split(EXPLAINED))
        ]
        return torch.cat([heat for heat, _ in found]), found[0][1]


def _check_card(card, path):
    """Raises UserError for a card whose values can't be used: a checkpoint may be anybody's."""
    valid = {
        "mean": _are_numbers(card["mean"]),
        "std": _are_numbers(card["std"]) and min(card["std"]) > 0,
        "image_size": type(card["image_size"]) is int and 1 <= card["image_size"] <= MAX_SIDE,
        "classes": isinstance(card["classes"], (list, tuple))
        and len(card["classes"]) == card["num_classes"]
        and all(isinstance(name, str) for name in card["classes"]),
        "dataset": isinstance(card.get("dataset"), str),
        "source": isinstance(card["source"], str),
    }
    wrong = [key for key, right in valid.items() if not right]
    if wrong:
        raise UserError(f"{path} was refused: its card has no valid {' and '.join(wrong)}")


def _are_numbers(values):
    """Whether these are the three finite numbers of a mean or a standard deviation."""
    return (
        isinstance(values, (list, tuple))
        and len(values) == 3
        and all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
    )


def load_all(paths, device):
    """A Predictor for each path, with names that differ. Raises UserError where their classes are not the same."""
    found = [Predictor(path, device) for path in paths]
    for other in found[1:]:
        if other.classes != found[0].classes:
            raise UserError(
                f"{found[0].path} and {other.path} know other classes: they can't be compared"
            )
    names = [each.name for each in found]
    for number, each in enumerate(found):
        if names.count(each.name) > 1:
            each.name += f"/{each.path.stem} {number + 1}"
    return found


def load_pictures(files, size):
    """(uint8 (N, 3, size, size), their names) of picture files, cut to squares. Raises UserError for an unreadable one."""
    pictures = []
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"there is no picture file {file}", status=2)
        picture = image_folder.decode(file, size)
        if isinstance(picture, str):
            raise UserError(f"{file} can't be read as a picture ({picture})")
        pictures.append(torch.from_numpy(np.array(picture)))
    return torch.stack(pictures).permute(0, 3, 1, 2), [printable(Path(file).name) for file in files]


def test_split(predictors, dataset=None, data_dir=None):
    """The dataset that the first checkpoint's run was made on (or another with the same classes). Raises UserError."""
    first = predictors[0]
    saved = metrics.read_arguments(first.path.parent)
    split = data.load(
        dataset or saved.get("dataset", first.card["source"]),
        data_dir or saved.get("data_dir", "data"),
        image_size=max(each.card["image_size"] for each in predictors),
        limit_test=saved.get("limit_test", 0),
        skip_bad_images=saved.get("skip_bad_images", False),
    )
    if list(split.classes) != first.classes:
        raise UserError(
            f"the checkpoint knows {len(first.classes)} classes ({', '.join(first.classes[:3])}, …), "
            f"{split.name} has {len(split.classes)} ({', '.join(split.classes[:3])}, …)"
        )
    return split


def choose(count, index, seed, number):
    """Numbers of test pictures: those of `index`, in which -1 is a random one, else `number` random ones. Raises UserError."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    if not index:
        return order[:number]
    outside = [i for i in index if not -1 <= i < count]
    if outside:
        raise UserError(
            f"--index {outside[0]}: the test split has pictures 0 to {count - 1} (-1: a random one)",
            status=2,
        )
    return [order[-1 - k % count] if i == -1 else i for k, i in enumerate(index)]


def mistakes(logits, labels, number):
    """Numbers of the pictures that are answered wrongly with the highest probability, the surest first."""
    top = logits.softmax(1).max(1)
    wrong = (top.indices != labels).nonzero()[:, 0]
    return wrong[top.values[wrong].argsort(descending=True, stable=True)][:number].tolist()


def disagreements(logits, number):
    """Numbers of the pictures that models (logits of each) answer differently, those first where each is surest of its own."""
    top = torch.stack([each.softmax(1).max(1).values for each in logits])
    answers = torch.stack([each.argmax(1) for each in logits])
    differ = (answers != answers[0]).any(0).nonzero()[:, 0]
    return differ[top.min(0).values[differ].argsort(descending=True, stable=True)][:number].tolist()
