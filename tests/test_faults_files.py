"""Files from elsewhere: of other kinds of training and other versions, hostile ones, those that several processes want."""

import json
import os
import pickle
import shutil
import signal
import socket

import pytest
import torch
from conftest import OPTIONS, TINY
from processes import note_loaded, signal_in, train_as
from test_checkpoint import Hostile
from test_faults import files, go_on, one_error
from test_train import rows, summary, untimed, write_folder

import train
from common import checkpoint
from common.errors import UserError
from models.weights import load_checkpoint

# ---- checkpoints of one kind of training in another -------------------------------------------------------------------

KINDS = ("plain", "compiled", "DDP")
SMALL = (
    *TINY,
    "--device",
    "cpu",
    "--model",
    "vit_custom",
    "--model-arg",
    "width=24",
    "--model-arg",
    "depth=1",
    "--model-arg",
    "heads=2",
    "--amp",
    "off",
    "--schedule",
    "constant",
    "--warmup-epochs",
    0,
    "--lr",
    1e-3,
    "--ema-decay",
    0.8,
)


@pytest.mark.slow
@pytest.mark.parametrize("writer", KINDS)
def test_a_checkpoint_of_each_kind_goes_on_as_each(forks, tmp_path, writer):
    whole, written = tmp_path / "whole", tmp_path / "written"
    assert forks.run(*SMALL, "--epochs", 2, "--output-dir", whole).returncode == 0
    compiling = ["--compile"] * (writer == "compiled")
    done = forks.run(
        *SMALL, *compiling, "--epochs", 1, "--output-dir", written, faults=[train_as(writer)]
    )
    assert done.returncode == 0, done.err
    state = checkpoint.load(written / "last.pt")
    expected = checkpoint.digest(
        {"weights": state["state_dict"], "average": state["ema"]["average"]}
    )
    assert not any(part in key for key in state["state_dict"] for part in ("module.", "_orig_mod"))
    for reader in KINDS:
        copy, note = shutil.copytree(written, tmp_path / reader), tmp_path / f"{reader}.txt"
        compiling = ["--compile"] * (reader == "compiled")
        go_on(forks, copy, "--epochs", 2, *compiling, faults=[train_as(reader), note_loaded(note)])
        assert note.read_text() == expected
        ours, theirs = (checkpoint.load(directory / "last.pt") for directory in (copy, whole))
        assert list(ours["state_dict"]) == list(theirs["state_dict"])
        for kind in (lambda state: state["state_dict"], lambda state: state["ema"]["average"]):
            for key, value in kind(theirs).items():
                torch.testing.assert_close(kind(ours)[key], value, rtol=1e-4, atol=1e-5, msg=key)
        assert [row["epoch"] for row in rows(copy)] == ["1", "2"]


# ---- a metrics.csv of another version ----------------------------------------------------------------------------------


def change_columns(path, how):
    lines = [line.split(",") for line in path.read_text().splitlines()]
    header = lines[0]
    if how == "reordered":
        order = range(len(header) - 1, -1, -1)
    elif how == "older":  # without some of today's columns
        order = [
            i for i, name in enumerate(header) if name not in ("epoch_seconds", "val_top5", "lr")
        ]
    else:
        order = range(len(header))
    lines = [
        [line[i] for i in order] + [["later", "7"][number > 0]] * (how == "newer")
        for number, line in enumerate(lines)
    ]
    path.write_text("".join(",".join(line) + "\n" for line in lines) + "3,9,0.0" * (how == "torn"))


@pytest.mark.parametrize("how", ["reordered", "older", "newer", "torn"])
def test_a_run_goes_on_with_the_columns_of_another_version(forks, whole, tmp_path, how):
    cut = tmp_path / "cut"
    forks.run(*OPTIONS, "--output-dir", cut, faults=[signal_in("training", signal.SIGTERM)])
    change_columns(cut / "metrics.csv", how)
    before = list(rows(cut)[0])
    go_on(forks, cut)
    ours, theirs = untimed(cut), untimed(whole)
    names = set(theirs[0])
    assert list(rows(cut)[0])[: len(before)] == before and set(ours[0]) - names == (
        {"later"} if how == "newer" else set()
    )
    known = names - {"val_top5", "lr"} if how == "older" else names
    assert [ours[0][name] for name in known] == [theirs[0][name] for name in known]
    assert [{name: row[name] for name in names} for row in ours[1:]] == theirs[1:]
    assert summary(cut)["status"] == "finished" and summary(cut)["seconds_to_95"] is not None


def test_a_table_that_lacks_epochs_or_is_none_is_refused(forks, copy):
    (copy / "summary.json").unlink()
    text = (copy / "metrics.csv").read_text()
    for damaged, says in (
        (text.replace("\n2,", "\nx,"), "doesn't hold the 3 epochs"),
        ("\xff\x00", "can't be read as a table"),
        (text.replace("\n3,", "\n2,"), "doesn't hold the 3 epochs"),
        (None, "is missing"),
    ):
        (copy / "metrics.csv").unlink(missing_ok=True)
        if damaged is not None:
            (copy / "metrics.csv").write_text(damaged, encoding="latin1")
        before = files(copy)
        one_error(forks.run("--resume", copy, "--device", "cpu"), "metrics.csv", says)
        assert files(copy) == before


# ---- hostile and foreign files -----------------------------------------------------------------------------------------


def write_foreign(path, kind, sentinel, run):
    bad = Hostile(sentinel)
    if kind == "pickle":
        path.write_bytes(pickle.dumps(bad))
    elif kind == "torch.save":
        torch.save(bad, path)
    elif kind == "legacy torch.save":
        torch.save({"state_dict": bad}, path, _use_new_zipfile_serialization=False)
    elif kind == "among weights":
        torch.save({"state_dict": {"fc.weight": torch.zeros(10, 64), "fc.bias": bad}}, path)
    elif kind == "behind a digest":
        torch.save({"format": 1, "digest": "", "contents": {"card": bad}}, path)
    else:
        path.write_bytes(next(run.glob(kind)).read_bytes())


FOREIGN = (
    "pickle",
    "torch.save",
    "legacy torch.save",
    "among weights",
    "behind a digest",
    "events.out*",
    "metrics.csv",
    "config.json",
)


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_hostile_or_foreign_file_is_refused_as_weights_and_as_a_checkpoint(
    forks, whole, copy, tmp_path, kind
):
    sentinel, bad = tmp_path / "sentinel", tmp_path / "bad.pt"
    write_foreign(bad, kind, sentinel, whole)
    one_error(forks.run(*OPTIONS, "--output-dir", tmp_path / "new", "--weights", bad), "bad.pt")
    shutil.copy(bad, copy / "last.pt")
    one_error(forks.run("--resume", copy), "last.pt", "--resume-previous")
    with pytest.raises(UserError, match="bad.pt"):
        load_checkpoint(bad)
    assert not sentinel.exists() and sorted(os.listdir(tmp_path)) == ["bad.pt", "copy"]


# ---- hostile options and names of models --------------------------------------------------------------------------------

# Tried with timm/test_resnet, which takes them on. PICKLE and FOLDER stand for paths of the test.
HOSTILE_OPTIONS = {
    "an address": {
        "pretrained": True,
        "pretrained_cfg": {"url": "http://127.0.0.1:9/chosen.pth"},
        "cache_dir": "FOLDER",
    },
    "an overlay": {"pretrained": True, "pretrained_cfg_overlay": {"file": "PICKLE"}},
    "a tag": {"pretrained_cfg": "r160_in1k"},
    "published weights": {"pretrained": True},
    "no pretrained weights": {"pretrained": False},
    "weights of its own": {"pretrained_strict": False},
    "a pickle": {"checkpoint_path": "PICKLE"},
    "a folder": {"cache_dir": "FOLDER"},
    "a script": {"scriptable": True},
    "an export": {"exportable": True},
    "no script": {"no_jit": True},
    "features": {"features_only": True},
    "features of a class": {"feature_cls": "fx"},
    "a pruned network": {"pruned": True},
    "a device": {"device": "meta"},
    "another name": {"name": "resnet18"},
    "other classes": {"num_classes": 3},
    "a path": {"global_pool": "../secret"},
    "a file": {"global_pool": "weights.pth"},
    "a drive": {"global_pool": "c:weights"},
    "a URL": {"act_layer": "https://example.org"},
    "a long word": {"act_layer": "a" * 65},
    "a path in a list": {"channels": [8, ["/etc/passwd"]]},
    "a dict": {"block_args": {"attn_layer": "se"}},
    "a dict in a list": {"channels": ({"a": 1},)},
    "bytes": {"act_layer": b"relu"},
    "a complex number": {"drop_rate": 1j},
    "infinity": {"drop_rate": float("inf")},
    "a huge number": {"stem_width": 2**63},
    "deep lists": {"channels": [[[[[[8]]]]]]},
    "long lists": {"channels": [8] * 10_000},
    "no word": {"drop rate": 0.1},
}
HOSTILE_NAMES = (
    "timm/hf_hub:timm/test_resnet",
    "timm/hf-hub:timm/test_resnet",
    "timm/local-dir:.",
    "timm/LOCAL-DIR:.",
    "timm//etc/passwd",
    "timm/./test_resnet",
    "timm/test_resnet./test_vit",
    "timm/test_resnet\n",
    "timm/",
    "hf_hub:timm/test_resnet",
    "timm/" + "a" * 10_000,
)


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """refuses(function, *arguments): it ends in a UserError of one line that was decided without network, files or pickle."""
    from huggingface_hub import constants

    attempts, sentinel = [], tmp_path / "sentinel"
    torch.save({"state_dict": Hostile(sentinel)}, tmp_path / "hostile.pth")
    (tmp_path / "config.json").write_text('{"architecture": "test_resnet", "pretrained_cfg": {}}')

    def attempt(*arguments, **options):
        attempts.append(arguments)
        raise OSError("the network was used")

    monkeypatch.setattr(socket, "getaddrinfo", attempt)
    monkeypatch.setattr(socket.socket, "connect", attempt)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)

    def refuses(function, *arguments):
        before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
        with pytest.raises(UserError) as refusal:
            function(*arguments)
        message = str(refusal.value)
        assert message and len(message.splitlines()) == 1 and len(message) < 3000
        assert attempts == [] and not sentinel.exists()
        assert {
            path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")
        } == before
        return message

    return refuses


def located(value, tmp_path):
    """The value with paths of the test in place of the words PICKLE and FOLDER."""
    if isinstance(value, dict):
        return {key: located(item, tmp_path) for key, item in value.items()}
    places = {"PICKLE": tmp_path / "hostile.pth", "FOLDER": tmp_path / "chosen"}
    return str(places[value]) if isinstance(value, str) and value in places else value


def changed_checkpoint(path, model, options, model_args=None):
    """Puts a model and options into a run's checkpoint, with a digest that fits."""
    contents = checkpoint.load(path)
    contents["card"] |= {"model": model, "options": options}
    if model_args is not None:
        contents["training"]["arguments"] |= {"model": model, "model_arg": model_args}
    torch.save({"format": 1, "digest": checkpoint.digest(contents), "contents": contents}, path)


@pytest.mark.parametrize("kind", HOSTILE_OPTIONS)
def test_hostile_options_of_a_model_are_refused_wherever_they_come_from(
    copy, watched, tmp_path, kind
):
    options = located(HOSTILE_OPTIONS[kind], tmp_path)
    pairs = [
        f"{key}={'1e999' if kind == 'infinity' else repr(value)}" for key, value in options.items()
    ]
    new = ["--dataset", "shapes", "--device", "cpu", "--output-dir", str(tmp_path / "new")]
    words = [word for pair in pairs for word in ("--model-arg", pair)]
    watched(train.main, [*new, "--model", "timm/test_resnet", *words])
    config = copy / "config.json"
    config.write_text(json.dumps({"arguments": {"model": "timm/test_resnet", "model_arg": pairs}}))
    watched(train.main, [*new, "--config", str(config)])
    changed_checkpoint(copy / "last.pt", "timm/test_resnet", options, pairs)
    watched(train.main, ["--resume", str(copy), "--epochs", "4", "--device", "cpu"])
    assert "last.pt" in watched(load_checkpoint, copy / "last.pt")
    for name in ("timm/test_resnet", "resnet20"):
        changed_checkpoint(copy / "best.pt", name, options)
        assert "best.pt" in watched(load_checkpoint, copy / "best.pt")


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_names_of_models_are_refused_wherever_they_come_from(copy, watched, tmp_path, name):
    new = ["--dataset", "shapes", "--device", "cpu", "--output-dir", str(tmp_path / "new")]
    watched(train.main, [*new, "--model", name])
    config = copy / "config.json"
    config.write_text(json.dumps({"arguments": {"model": name}}))
    watched(train.main, [*new, "--config", str(config)])
    changed_checkpoint(copy / "last.pt", name, {}, [])
    watched(train.main, ["--resume", str(copy), "--epochs", "4", "--device", "cpu"])
    assert "last.pt" in watched(load_checkpoint, copy / "last.pt")


@pytest.mark.parametrize(
    "card",
    [
        {"options": None},
        {"options": [["pretrained", True]]},
        {"options": {1: 2}},
        {"options": {("a",): 2}},
        {"model": None},
        {"model": 5},
        {"num_classes": "10"},
        {"num_classes": 0},
        {"num_classes": 2**40},
        {"num_classes": True},
        {"num_classes": torch.tensor(10)},
        {"options": {"shortcut": torch.ones(2)}},
        {"options": {"shortcut": 5}},
    ],
)
def test_a_card_with_values_of_other_types_is_refused(copy, watched, card):
    contents = checkpoint.load(copy / "best.pt")
    contents["card"] |= card
    checkpoint.save(contents, copy / "best.pt")
    assert "best.pt" in watched(load_checkpoint, copy / "best.pt")


@pytest.mark.parametrize("model_args", [[5], [None], ["a"], [["a=1"]], "global_pool=avg", 5])
def test_a_last_pt_with_model_args_of_other_types_is_refused(copy, watched, model_args):
    changed_checkpoint(copy / "last.pt", "timm/test_resnet", {}, model_args)
    watched(train.main, ["--resume", str(copy), "--epochs", "4", "--device", "cpu"])


# ---- other data than at the start ---------------------------------------------------------------------------------------


def test_other_data_than_at_the_start_is_refused_by_name(forks, tmp_path):
    pets, run = write_folder(tmp_path / "pets"), tmp_path / "run"
    options = (
        "--dataset",
        "folder",
        "--data-dir",
        pets,
        "--model",
        "resnet20",
        "--batch-size",
        4,
        "--device",
        "cpu",
    )
    stopped = forks.run(
        *options, "--epochs", 3, "--output-dir", run, faults=[signal_in("training", signal.SIGTERM)]
    )
    assert stopped.returncode == 143
    before = files(run)
    shutil.copy(pets / "train" / "cat" / "0.png", pets / "train" / "cat" / "more.png")
    one_error(
        forks.run("--resume", run),
        "the data is not that of the start",
        "train images: 8 there, 9 here",
        status=2,
    )
    for part in ("train", "test"):
        shutil.copytree(pets / part / "dog", pets / part / "fox")
    one_error(
        forks.run("--resume", run),
        "train images: 8 there, 13 here",
        "classes: 2 (cat, dog) there, 3 (cat, dog, fox) here",
        status=2,
    )
    assert files(run) == before
    for part in ("train", "test"):
        shutil.rmtree(pets / part / "fox")
    (pets / "train" / "cat" / "more.png").unlink()
    go_on(forks, run)
