"""Files, options and names that could harm are refused in one line, before they can do anything."""

import json
import os
import pickle
import shutil
import socket
from math import inf

import pytest
import torch
from helpers.errors import refused
from helpers.hostile import Hostile
from helpers.runs import OPTIONS, last

import train as train_script
from common import checkpoint
from common.errors import UserError
from models.weights import load_checkpoint

pytestmark = pytest.mark.slow


# ---- files ---------------------------------------------------------------------------------------

HOSTILE_FILES = {
    "pickle": lambda bad, path: path.write_bytes(pickle.dumps(bad)),
    "torch.save": torch.save,
    "among weights": lambda bad, path: torch.save(
        {"state_dict": {"fc.weight": torch.zeros(10, 64), "fc.bias": bad}}, path
    ),
    "in a checkpoint": lambda bad, path: torch.save(
        {"format": 1, "digest": "", "contents": {"card": bad}}, path
    ),
}


@pytest.mark.parametrize("kind", [*HOSTILE_FILES, "events.out*", "metrics.csv", "config.json"])
def test_a_hostile_or_foreign_file_is_refused_everywhere(train, copy, tmp_path, kind):
    """As weights to start from, as last.pt and as a checkpoint to show."""
    sentinel, path = tmp_path / "sentinel", tmp_path / "bad.pt"
    if kind in HOSTILE_FILES:
        HOSTILE_FILES[kind](Hostile(sentinel), path)
    else:
        shutil.copy(next(copy.glob(kind)), path)
    with refused("", "bad.pt"):
        train(*OPTIONS, "--weights", path)
    shutil.copy(path, copy / "last.pt")
    with refused("", "last.pt", "--resume-previous"):
        train("--resume", copy)
    with refused("", "bad.pt"):
        load_checkpoint(path)
    assert sorted(os.listdir(tmp_path)) == ["bad.pt", "copy"]


# ---- options and names of models -----------------------------------------------------------------

# For timm/test_resnet, which accepts them. PICKLE and FOLDER stand for paths.
# fmt: off
HOSTILE_OPTIONS = [
    {"pretrained": True, "pretrained_cfg": {"url": "http://127.0.0.1:9/chosen.pth"},
     "cache_dir": "FOLDER"},
    {"pretrained": True, "pretrained_cfg_overlay": {"file": "PICKLE"}},
    {"pretrained_cfg": "r160_in1k"}, {"pretrained": True}, {"pretrained": False},
    {"pretrained_strict": False}, {"checkpoint_path": "PICKLE"}, {"cache_dir": "FOLDER"},
    {"scriptable": True}, {"exportable": True}, {"no_jit": True}, {"features_only": True},
    {"feature_cls": "fx"}, {"pruned": True}, {"device": "meta"}, {"name": "resnet18"},
    {"num_classes": 3}, {"global_pool": "../secret"}, {"global_pool": "weights.pth"},
    {"global_pool": "c:weights"}, {"act_layer": "https://example.org"}, {"act_layer": "a" * 65},
    {"channels": [8, ["/etc/passwd"]]}, {"block_args": {"attn_layer": "se"}},
    {"channels": ({"a": 1},)}, {"act_layer": b"relu"}, {"drop_rate": 1j},
    {"drop_rate": inf}, {"stem_width": 2**63}, {"channels": [[[[[[8]]]]]]},
    {"channels": [8] * 10_000}, {"drop rate": 0.1},
]
# fmt: on
HOSTILE_NAMES = (
    *("timm/hf_hub:timm/test_resnet", "timm/hf-hub:timm/test_resnet", "hf_hub:timm/test_resnet"),
    *("timm/local-dir:.", "timm/LOCAL-DIR:.", "timm//etc/passwd", "timm/./test_resnet"),
    *("timm/test_resnet./test_vit", "timm/test_resnet\n", "timm/", "timm/" + "a" * 10_000),
)


@pytest.fixture
def refuses(tmp_path, monkeypatch):
    """refuses(function, *arguments) -> the message of its UserError, which has one line.

    The function must not use the network, unpickle anything, or write files.
    """
    attempts, sentinel = [], tmp_path / "sentinel"
    torch.save({"state_dict": Hostile(sentinel)}, tmp_path / "hostile.pth")
    (tmp_path / "config.json").write_text('{"architecture": "test_resnet", "pretrained_cfg": {}}')

    def attempt(*arguments, **options):
        attempts.append(arguments)
        raise OSError("the network was used")

    monkeypatch.setattr(socket, "getaddrinfo", attempt)
    monkeypatch.setattr(socket.socket, "connect", attempt)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)

    def contents():
        return {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    def check(function, *arguments):
        before = contents()
        with pytest.raises(UserError) as error:
            function(*arguments)
        message = str(error.value)
        assert message and len(message.splitlines()) == 1 and len(message) < 3000
        assert attempts == [] and not sentinel.exists() and contents() == before
        return message

    return check


def located(value, tmp_path):
    """The value with paths instead of the words PICKLE and FOLDER."""
    if isinstance(value, dict):
        return {key: located(item, tmp_path) for key, item in value.items()}
    places = {"PICKLE": tmp_path / "hostile.pth", "FOLDER": tmp_path / "chosen"}
    return str(places[value]) if isinstance(value, str) and value in places else value


def change_model(path, model, options, model_args=None):
    """Puts a model and options into a run's checkpoint, with a digest that fits."""
    contents = checkpoint.load(path)
    contents["card"] |= {"model": model, "options": options}
    if model_args is not None:
        contents["training"]["arguments"] |= {"model": model, "model_arg": model_args}
    torch.save({"format": 1, "digest": checkpoint.digest(contents), "contents": contents}, path)


def assert_refused_everywhere(refuses, copy, tmp_path, model, options, pairs):
    """On the command line, in a config.json, a last.pt and a best.pt."""
    new = ["--dataset", "shapes", "--device", "cpu", "--output-dir", str(tmp_path / "new")]
    model_args = [word for pair in pairs for word in ("--model-arg", pair)]
    refuses(train_script.main, [*new, "--model", model, *model_args])
    config = copy / "config.json"
    config.write_text(json.dumps({"arguments": {"model": model, "model_arg": pairs}}))
    refuses(train_script.main, [*new, "--config", str(config)])
    change_model(copy / "last.pt", model, options, pairs)
    refuses(train_script.main, ["--resume", str(copy), "--epochs", "4", "--device", "cpu"])
    assert "last.pt" in refuses(load_checkpoint, copy / "last.pt")
    change_model(copy / "best.pt", model, options)
    assert "best.pt" in refuses(load_checkpoint, copy / "best.pt")


@pytest.mark.parametrize("options", HOSTILE_OPTIONS, ids=lambda options: str(options)[:40])
def test_hostile_options_of_a_model_are_refused_everywhere(copy, refuses, tmp_path, options):
    options = located(options, tmp_path)
    pairs = [f"{key}={'1e999' if value == inf else repr(value)}" for key, value in options.items()]
    assert_refused_everywhere(refuses, copy, tmp_path, "timm/test_resnet", options, pairs)
    change_model(copy / "best.pt", "resnet20", options)
    assert "best.pt" in refuses(load_checkpoint, copy / "best.pt")


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_names_of_models_are_refused_everywhere(copy, refuses, tmp_path, name):
    assert_refused_everywhere(refuses, copy, tmp_path, name, {}, [])


CARDS = [
    *({"options": None}, {"options": [["pretrained", True]]}, {"options": {1: 2}}),
    *({"options": {("a",): 2}}, {"model": None}, {"model": 5}, {"num_classes": "10"}),
    *({"num_classes": 0}, {"num_classes": 2**40}, {"num_classes": True}),
    *({"num_classes": torch.tensor(10)}, {"options": {"drop_rate": torch.ones(2)}}),
]


@pytest.mark.parametrize("card", CARDS)
def test_a_card_with_values_of_other_types_is_refused(copy, refuses, card):
    contents = checkpoint.load(copy / "best.pt")
    contents["card"] |= card
    checkpoint.save(contents, copy / "best.pt")
    assert "best.pt" in refuses(load_checkpoint, copy / "best.pt")


@pytest.mark.parametrize("model_args", [[5], [None], ["a"], [["a=1"]], "global_pool=avg", 5])
def test_model_args_of_other_types_are_refused(copy, refuses, model_args):
    assert last(copy)["card"]["model"] == "timm/test_resnet"
    change_model(copy / "last.pt", "timm/test_resnet", {}, model_args)
    refuses(train_script.main, ["--resume", str(copy), "--epochs", "4", "--device", "cpu"])
