"""Documented accuracies are shown beside runs with the same settings, and beside no others."""

import pytest
from helpers.samples import write_seeds

import train
from analysis import documents, metrics, replicates, tables
from models import MODELS
from training import arguments


def of(*words):
    """The arguments of a run of train.py by name, as a function."""
    values = arguments.as_dict(arguments.resolve(train.build_parser(), " ".join(words).split())[0])
    return values.get


ADAM = "--model resnet34 --optimizer adam --augment none"
LADDER = "--model resnet34 --augment crop,flip,color_jitter"
NFNET = "--dataset cifar100 --model nfnet_f0 --pretrained --image-size 32"
MATCHES = {
    ADAM: (85.16, 200),
    f"{ADAM} --optimizer sgd": (85.0, 500),
    f"{LADDER} --mixup 0 --cutmix 0": (93.65, 500),
    f"{LADDER} --mixup 1 --cutmix 1 --mix-prob 1": (96.47, 500),
    "--model vit_tiny --pretrained": (97.32, 150),
    "--model vit_tiny --image-size 224": (75.61, 150),
    "--model vit_custom": (68.97, 150),
    "--dataset cifar100 --model resnet56": (72.50, 300),
    "--dataset cifar100 --model hornet_tiny": (60.00, 300),
    f"{NFNET} --optimizer adamw": (74.23, 25),
    f"{NFNET} --optimizer sgd": (58.47, 25),
    f"{NFNET} --optimizer adamw --schedule linear": (73.36, 25),
}


@pytest.mark.parametrize("words", MATCHES)
def test_a_run_with_the_settings_of_a_document_is_compared_with_it(words):
    found = documents.find(of(words))
    assert (found.accuracy, found.epochs) == MATCHES[words]


@pytest.mark.parametrize(
    "words",
    [
        f"{ADAM} --dataset cifar100",
        f"{ADAM} --image-size 64",
        f"{ADAM} --limit-train 1000",
        f"{ADAM} --limit-test 1000",
        f"{ADAM} --cutout 8",
        f"{LADDER} --mixup 0 --cutmix 0 --optimizer adam",
        "--model resnet34 --augment crop --mixup 0 --cutmix 0",
        f"{ADAM} --model plain34",
        f"{ADAM} --weights x.pt",
        f"{ADAM} --dataset folder",
        "--dataset cifar100 --model resnet56 --augment none",
        "--dataset cifar100 --model resnet56 --model-arg shortcut=pad",
        f"{NFNET} --optimizer muon",
    ],
)
def test_a_run_with_other_settings_is_compared_with_nothing(words):
    assert documents.find(of(words)) is None


def test_documented_models_exist():
    assert {each.model for each in documents.DOCUMENTED} <= set(MODELS)


def test_the_table_has_the_difference_and_how_many_epochs(tmp_path):
    own = {name: of(ADAM)(name) for name in ("dataset", "augment", "mixup", "cutmix", "mix_prob")}
    own |= {name: of(ADAM)(name) for name in ("cutout", "random_erasing", "image_size")}
    own |= {"pretrained": False, "optimizer": "adam"}
    write_seeds(tmp_path, "resnet34", [86.0, 87.0], **own)
    write_seeds(tmp_path, "plain34", [80.0], **own)
    groups = replicates.group(metrics.load_runs([str(tmp_path / "*")]))
    table = tables.compare(groups, against="documents")
    keys = ("documented %", "documented epochs", "ours - documented", "in epochs")
    rows = {row["model"]: [row[key] for key in keys] for row in table.cells()}
    assert rows["resnet34"] == ["85.16", "200", "+1.34", "2 of 200"]
    assert rows["plain34"] == ["-"] * 4
    assert "no such experiment" in table.render("text")
    assert "documented %" not in tables.compare(groups).cells()[0]
