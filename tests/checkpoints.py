"""Checkpoints as a run leaves them, with fresh weights, for the tests of what uses them."""

import json

import torch

import checkpoint
import sources
from models import create_model


def write_checkpoint(directory, model="resnet20", seed=0, classes=sources.SHAPES, test_acc=50.0, **options):
    """best.pt, config.json and summary.json; returns the path of best.pt."""
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    net = create_model(model, len(classes), **options)
    card = {
        "model": model, "options": options, "num_classes": len(classes), "classes": list(classes), "image_size": 32,
        "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "dataset": "shapes", "source": "shapes", "seed": seed,
    }  # fmt: skip
    checkpoint.save({"card": card, "state_dict": net.state_dict()}, directory / "best.pt")
    arguments = {"dataset": "shapes", "limit_test": 50, "data_dir": "data"}
    (directory / "config.json").write_text(json.dumps({"arguments": arguments}))
    (directory / "summary.json").write_text(json.dumps({"test_acc": test_acc, "reported": "last epoch"}))
    return directory / "best.pt"
