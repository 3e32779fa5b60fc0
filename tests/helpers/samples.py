"""Writes what runs leave: metrics, summaries and checkpoints with fresh weights."""

import json

import torch

from analysis import metrics, replicates
from common import checkpoint
from datasets import shapes
from models import create_model

HEADER = "epoch,step,lr,train_loss,train_acc,test_loss,test_acc,epoch_seconds,images_per_second"
ROWS = ("1,10,0.1,2.0,20,1.8,30,5,100", "2,20,0.1,1.0,60,0.9,66.5,5,110")


def write(directory, header=HEADER, rows=ROWS, arguments=None, **summary):
    """metrics.csv, and config.json and summary.json if there is anything to put into them."""
    directory.mkdir(exist_ok=True, parents=True)
    (directory / "metrics.csv").write_text("\n".join([header, *rows, ""]))
    if summary:
        (directory / "summary.json").write_text(json.dumps(summary))
    if arguments is not None:
        config = {"arguments": arguments, "from": dict.fromkeys(arguments, "recipe")}
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_seeds(root, name, accuracies, **arguments):
    """A finished run for each accuracy; they differ by their seeds."""
    for seed, accuracy in enumerate(accuracies):
        write(
            root / f"{name}-s{seed}",
            rows=(ROWS[0], f"2,20,0.1,1.0,60,0.9,{accuracy},5,110"),
            arguments={"model": name, "seed": seed, "epochs": 2} | arguments,
            status="finished",
            test_acc=accuracy,
            test_top5=99.0,
            reported="last epoch",
            seconds_to_90=5.0,
            seconds_to_95=10.0,
            parameters=1000 * len(name),
            gmacs=0.1 * len(name),
        )


def groups_in(directory, *by):
    """The groups of all runs in a directory; by: arguments (by default all but the seed)."""
    return replicates.group(metrics.load_runs([str(directory / "*")]), by or ("arguments",))


def write_checkpoint(
    directory,
    model="resnet20",
    seed=0,
    classes=shapes.SHAPES,
    test_acc=50.0,
    metric=None,
    **options,
):
    """best.pt, config.json and summary.json; returns the path of best.pt.

    metric: what best.pt was chosen by; without it, it is of the last of three epochs.
    """
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    card = {
        "model": model,
        "options": options,
        "num_classes": len(classes),
        "classes": list(classes),
        "image_size": 32,
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.25, 0.3],
        "dataset": "shapes",
        "source": "shapes",
        "seed": seed,
    }
    weights = create_model(model, len(classes), **options).state_dict()
    epoch = {"metric": metric} if metric else {"training": {"progress": {"epoch": 3, "batch": 0}}}
    checkpoint.save({"card": card, "state_dict": weights} | epoch, directory / "best.pt")
    arguments = {"dataset": "shapes", "limit_test": 50, "data_dir": "data"}
    (directory / "config.json").write_text(json.dumps({"arguments": arguments}))
    summary = {"test_acc": test_acc, "reported": "last epoch", "epochs": 3}
    (directory / "summary.json").write_text(json.dumps(summary))
    return directory / "best.pt"
