"""train_vit.py from end to end, on tiny data: from scratch, from weights, frozen; what is refused."""

import functools
import json

import pytest
import torch
from conftest import refused
from test_train import same_state, stop_after, untimed

import data
import models
import train_vit
from common import checkpoint
from datasets.pipeline import Pipeline
from models.weights import load_checkpoint, load_weights
from training import experiment, linear_probe, loop

SMALL = (
    "--model",
    "vit_custom",
    "--model-arg",
    "width=24",
    "--model-arg",
    "depth=2",
    "--model-arg",
    "heads=2",
)
PLAIN = Pipeline((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 32)
OPTIONS = dict(width=24, depth=2, heads=2)


@pytest.fixture
def train_small(train):
    return functools.partial(train, *SMALL, script=train_vit)


@pytest.fixture
def weights(tmp_path):
    """A file of weights of the small transformer with seven classes."""
    torch.manual_seed(5)
    path = tmp_path / "weights.pt"
    torch.save(models.create_model("vit_custom", 7, **OPTIONS).state_dict(), path)
    return path


def config(directory):
    return json.loads((directory / "config.json").read_text())


def test_from_scratch_with_everything_that_small_data_needs(train_small):
    directory = train_small(
        "--epochs", 1, "--repeated-augment", 2, "--model-arg", "spt=True", "--model-arg", "lsa=True"
    )
    found = config(directory)
    wanted = dict(
        optimizer="adamw",
        lr=1e-3,
        weight_decay=0.05,
        random_erasing=0.25,
        augment="crop,flip,rand_augment",
    )
    for key, value in wanted.items():
        assert (found["arguments"][key], found["from"][key]) == (value, "recipe")
    model, card = load_checkpoint(directory / "best.pt")
    assert card["options"] == OPTIONS | dict(spt=True, lsa=True, image_size=32)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_defaults_depend_on_where_weights_come_from():
    parser = train_vit.build_parser
    scratch, _, _ = experiment.resolve_arguments(parser(), [], published="vit_tiny")
    assert (scratch.model, scratch.epochs, scratch.image_size) == ("vit_small_data", 100, 32)
    transfer, origin, _ = experiment.resolve_arguments(
        parser(), ["--pretrained"], published="vit_tiny"
    )
    assert (transfer.model, transfer.epochs, transfer.image_size, transfer.layer_decay) == (
        "vit_tiny",
        10,
        224,
        0.75,
    )
    assert origin["model"] == "default" and origin["layer_decay"] == "recipe"


def test_an_interrupted_fine_tuning_goes_on_to_the_same_bits(
    train_small, train, weights, monkeypatch
):
    options = (
        "--epochs",
        2,
        "--weights",
        weights,
        "--drop-path",
        0.2,
        "--image-size",
        48,
        "--random-erasing",
        0.5,
        "--repeated-augment",
        4,
    )
    whole = train_small(*options, output="whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        cut = train_small(*options, output="cut", status=143)
    train("--resume", cut, script=train_vit)
    assert untimed(whole) == untimed(cut) and same_state(whole, cut)


def test_fine_tuning_from_a_file_is_fine_tuning_from_the_same_weights_in_memory(
    train_small, weights, monkeypatch
):
    """The classifier, too, starts alike: it is drawn with the model, before the file is read."""
    from_file = train_small(
        "--epochs", 1, "--weights", weights, "--layer-decay", 0.7, output="file"
    )
    held = torch.load(weights)
    real = models.create_model

    def create_with_weights(name, num_classes=10, **options):
        model = real(name, num_classes, **options)
        if model.head.weight.device.type != "meta":
            own = model.state_dict()
            model.load_state_dict(
                own | {key: value for key, value in held.items() if not key.startswith("head")}
            )
        return model

    monkeypatch.setattr(models, "create_model", create_with_weights)
    recipe = [
        f"--{key.replace('_', '-')}={value}"
        for key, value in models.TRANSFER.items()
        if key != "layer_decay"
    ]
    recipe += ["--layer-decay=0.7", "--random-erasing=0", "--epochs=1", "--batch-size=32"]
    in_memory = train_small(*recipe, output="memory")
    a, b = (checkpoint.load(directory / "last.pt") for directory in (from_file, in_memory))
    assert a["state_dict"].keys() == b["state_dict"].keys()
    assert all(torch.equal(a["state_dict"][key], b["state_dict"][key]) for key in a["state_dict"])
    assert untimed(from_file) == untimed(in_memory)


def test_layer_decay_leaves_the_classifier_its_full_rate(train_small, weights):
    directory = train_small("--epochs", 1, "--weights", weights, "--layer-decay", 0.5)
    groups = checkpoint.load(directory / "last.pt")["training"]["optimizer"]["param_groups"]
    assert {group["lr_scale"] for group in groups} == {1, 0.5, 0.25, 0.125}


def test_weights_of_a_run_bring_the_statistics_they_were_made_with(train_small, train):
    first = train_small("--epochs", 1, output="first")
    contents = checkpoint.load(first / "best.pt")
    contents["card"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    checkpoint.save(contents, first / "best.pt")
    second = train_small("--epochs", 1, "--weights", first / "best.pt", output="second")
    assert load_checkpoint(second / "last.pt")[1]["mean"] == [0.1, 0.2, 0.3]
    train("--resume", second, script=train_vit)
    assert load_checkpoint(second / "last.pt")[1]["std"] == [0.4, 0.5, 0.6]


# ---- frozen ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["vit_custom", "vit_tiny", "tinyvit_5m", "nfnet_f0", "timm/resnet18", "convnext_tiny"]
)
def test_a_classifier_on_cached_features_is_the_frozen_forward_pass(name, few_shapes):
    torch.manual_seed(0)
    model = models.create_model(name, 10, **models.parse_options([], name, 32))
    frozen = linear_probe.Probe(model).eval()
    batches = data.Batches(few_shapes.test.take(torch.arange(12)), 5, PLAIN, shuffle=False)
    cached = linear_probe.features(frozen, batches)
    with torch.no_grad():
        for start, (inputs, labels) in zip(range(0, 12, 5), batches):
            assert torch.equal(cached.labels[start : start + 5], labels)
            assert torch.equal(frozen(cached.images[start : start + 5]), model(inputs))
    trainable = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trainable == {
        key
        for key in dict(model.named_parameters())
        if model.get_classifier() in _owners(model, key)
    }


def _owners(model, key):
    return {model.get_submodule(key.rpartition(".")[0])}


def test_probing_trains_the_classifier_and_nothing_else(
    train_small, train, weights, monkeypatch, tmp_path
):
    passes = []
    real = linear_probe.features
    monkeypatch.setattr(linear_probe, "features", lambda *args: passes.append(1) or real(*args))
    options = ("--epochs", 3, "--weights", weights, "--freeze-backbone")
    whole = train_small(*options, output="whole")
    assert len(passes) == 2  # once for the training pictures, once for the test pictures
    source = models.create_model("vit_custom", 10, **OPTIONS)
    load_weights(source, weights)
    trained = load_checkpoint(whole / "best.pt")[0].state_dict()
    for key, value in source.state_dict().items():
        assert torch.equal(value, trained[key]) != key.startswith("head."), key
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        cut = train_small(*options, output="cut", status=143)
    weights.unlink()
    train("--resume", cut, script=train_vit)
    assert untimed(whole) == untimed(cut) and same_state(whole, cut)


def test_probing_with_held_out_images_reads_the_test_images_once_at_the_end(
    train_small, weights, monkeypatch
):
    seen = []
    real = loop.evaluate

    def spy(model, batches, **options):
        seen.append((len(batches.labels), next(iter(batches))[0].ndim))
        return real(model, batches, **options)

    monkeypatch.setattr(loop, "evaluate", spy)
    train_small(
        "--epochs", 2, "--weights", weights, "--freeze-backbone", "--val-size", 20, "--ema-decay", 0
    )
    assert seen == [
        (20, 2),
        (20, 2),
        (50, 4),
    ]  # features of held-out pictures, then the test pictures themselves


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (("--image-size", 30), "vit_custom: image_size 30 is not a multiple of patch_size 4", 2),
        (("--freeze-backbone",), "--freeze-backbone needs weights", 2),
        (("--repeated-augment", 3), "--batch-size 32 is not a multiple of --repeated-augment 3", 2),
        (("--pretrained",), "vit_custom has no published weights: take vit_tiny", 2),
        (("--model-arg", "head=2"), "vit_custom has no option 'head'", 2),
        (("--weights", "none.pt"), "there is no weights file none.pt", 2),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    train_small, tmp_path, arguments, message, status
):
    with refused(message) as error:
        train_small(*arguments)
    assert error.value.status == status and not (tmp_path / "run").exists()


def test_more_bad_input(train, train_small, weights, tmp_path):
    with refused("--freeze-backbone", "give --augment none"):
        train_small("--weights", weights, "--freeze-backbone", "--augment", "flip")
    with refused(weights, "holds weights of another model", "30 of 32 don't fit"):
        train_small("--weights", weights, "--model-arg", "width=48")
    (tmp_path / "cut.pt").write_bytes(weights.read_bytes()[:5000])
    with refused(tmp_path / "cut.pt"):
        train_small("--weights", tmp_path / "cut.pt")
    with refused("resnet20 has no gradient checkpointing"):
        train("--grad-checkpointing")
    with refused("resnet20 takes no --drop-path"):
        train("--drop-path", 0.1)
    assert not (tmp_path / "run").exists()
