"""train.py from start to end on tiny data: what a run leaves behind and what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.errors import refused
from helpers.runs import CNN, VIT, arguments, assert_same_weights, read_json, rows, summary, words
from helpers.samples import write

import data
import models
import train as train_script
import train_sota
import train_vit
from analysis import curves
from common import checkpoint
from datasets import shapes
from models.weights import load_checkpoint, load_weights
from training import run_directory

# ---- fast ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "model"), [(train_script, CNN), (train_vit, VIT), (train_sota, VIT)]
)
def test_each_script_trains_stops_resumes_and_finishes(train, capsys, script, model):
    options = (*model, *words("--epochs 2 --ema-decay 0.5 --val-size 20"))
    directory = train(*options, script=script, stop_after=3)
    train("--resume", directory, script=script)
    assert "test accuracy" in capsys.readouterr().out.splitlines()[-1]
    assert len(rows(directory)) == 2 and summary(directory)["status"] == "finished"
    network, card = load_checkpoint(directory / "best.pt")
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert card["classes"] == list(shapes.SHAPES)


def test_a_model_that_cannot_be_compiled_is_one_line(train, monkeypatch):
    def fail(*arguments):
        raise torch._dynamo.exc.TorchDynamoException("no C++ compiler\nand more")

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    monkeypatch.setattr(train_script, "train_epoch", fail)
    with refused("--compile failed: no C++ compiler (resume with --no-compile)"):
        train(*CNN, "--epochs", 1, "--compile")


def test_an_operation_that_is_not_deterministic_is_one_line(train, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("pool does not have a deterministic implementation, but\nyou asked")

    monkeypatch.setattr(train_script, "train_epoch", fail)
    message = "--deterministic failed: pool does not have a deterministic implementation, but"
    with refused(f"{message} (resume with --no-deterministic)"):
        train(*CNN, "--epochs", 1, "--deterministic")


BAD = [
    ("--model resnet81", "did you mean resnet18", 2),
    ("--model timm/resnet81", "timm has no model", 2),
    ("--model timm/resnet18.typo", "timm/resnet18.typo: Invalid pretrained tag", 2),
    ("--model timm/seresnet18 --pretrained", "timm has no weights of seresnet18", 2),
    ("--model vit_custom --model-arg width=1200000000000", "its options make it too large", 2),
    ("--model-arg depth=3", "no option 'depth'; its options (and defaults) are: shortcut", 2),
    ("--model-arg shortcut=conv", "shortcut must be project or pad", 2),
    ("--model timm/vit_tiny_patch16_224 --image-size 30", "30 is not a multiple of the patch", 2),
    ("--batch-size 97", "--batch-size 97 is larger than the training set (96", 2),
    ("--limit-train 1000000", "--limit-train 1000000", 2),
    ("--val-size 96", "--val-size 96", 2),
    ("--device cuda:77", "--device cuda:77 can't be used", 2),
    ("--pretrained", "resnet20 has no published weights", 2),
    ("--grad-checkpointing", "resnet20 has no gradient checkpointing", 2),
    ("--weights .", "best.pt", 2),
    ("--dataset folder --data-dir nowhere", "nowhere", 1),
    ("--dataset cifar10 --data-dir x --data-url http://127.0.0.1:9/x", "--dataset shapes", 1),
    ("--config nothing.json", "nothing.json", 2),
    ("--batch-size auto", "--batch-size auto is an option of train_sota.py", 2),
]


@pytest.mark.parametrize(("options", "message", "status"), BAD, ids=[bad[0] for bad in BAD])
def test_bad_input_is_refused_and_leaves_no_directory(train, tmp_path, options, message, status):
    with refused("", message) as error:
        train("--epochs", 1, *words(options))
    assert error.value.status == status and not (tmp_path / "run").exists()


# ---- what a run leaves behind --------------------------------------------------------------------


@pytest.mark.slow
def test_a_resumed_run_ends_with_curves_and_one_log(train, capsys):
    directory = train("--epochs", 2, "--curves", stop_after=4, status=143)
    assert not (directory / "curves.png").exists()
    train("--resume", directory, "--curves")
    assert (directory / "curves.png").read_bytes().startswith(b"\x89PNG")
    log = (directory / "log.txt").read_text()
    assert log == capsys.readouterr().out
    starts = ["shapes", "epoch 1/2", "interrupted in epoch 2", "shapes", "epoch 2/2", "test acc"]
    assert [line.startswith(start) for line, start in zip(log.splitlines(), starts)] == [True] * 6


def test_curves_that_can_not_be_drawn_are_a_warning(tmp_path, capsys, monkeypatch):
    directory_of_run = write(tmp_path / "a")

    def run(exit_status=0, curves=True, path=directory_of_run):
        directory, args = SimpleNamespace(path=path), SimpleNamespace(curves=curves)
        return SimpleNamespace(exit_status=exit_status, args=args, directory=directory)

    def fail(*arguments, **options):
        raise RuntimeError("no font\nfound")

    monkeypatch.setattr(curves, "draw", fail)
    curves.draw_finished(run())
    message = f"warning: {tmp_path}/a/curves.png could not be drawn: no font\n"
    assert capsys.readouterr().err == message
    for left_out in (run(exit_status=143), run(curves=False), run(path=None)):
        curves.draw_finished(left_out)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_run_writes_what_the_documentation_names(train, capsys):
    directory = train("--epochs", 2, "--ema-decay", 0.5)
    printed = capsys.readouterr().out
    first, epoch, _, final = printed.splitlines()
    assert (directory / "log.txt").read_text() == printed
    assert "96 training images" in first and "resnet20 from scratch, 272,474 parameters" in first
    assert epoch.startswith("epoch 1/2") and str(directory) in final
    written = {path.name for path in directory.iterdir()}
    assert set(run_directory.FILES) <= written and not list(directory.glob(".*.tmp"))
    assert any(name.startswith("events.out.tfevents") for name in written)
    assert "curves.png" not in written  # the options of the tests leave it out

    columns = (directory / "metrics.csv").read_text().splitlines()[0].split(",")
    assert columns[:5] == ["epoch", "step", "lr", "train_loss", "train_acc"]
    assert {"test_loss", "test_acc", "ema_test_acc", "peak_memory_mb"} <= {*columns}
    assert {"epoch_seconds", "eval_seconds", "total_seconds"} <= {*columns}
    assert [(row["epoch"], row["step"]) for row in rows(directory)] == [("1", "3"), ("2", "6")]

    config = read_json(directory / "config.json")
    values, origin = config["arguments"], config["from"]
    assert (values["epochs"], origin["epochs"]) == (2, "command line")
    assert (values["warmup_epochs"], origin["warmup_epochs"]) == (0.2, "auto")
    assert {"torch", "git", "command", "device", "precision"} <= set(config)

    ended, accuracies = summary(directory), [float(row["ema_test_acc"]) for row in rows(directory)]
    assert (ended["status"], ended["test_acc"]) == ("finished", accuracies[-1])
    assert (ended["reported"], ended["weights"]) == ("last epoch", "moving average")
    assert f"test accuracy {accuracies[-1]:.2f} %" in final
    assert (ended["parameters"], ended["epochs"], ended["best_selected_on"]) == (272_474, 2, "test")
    assert ended["gmacs"] == pytest.approx(0.0408, abs=1e-4)
    assert ended["seconds_to_95"] <= ended["train_seconds"] + 1e-3
    assert ended["train_seconds"] + ended["eval_seconds"] < ended["total_seconds"]

    best = checkpoint.load(directory / "best.pt")
    assert (best["metric"]["selected_on"], best["metric"]["name"]) == ("test", "ema_test_acc")
    assert best["metric"]["value"] == max(accuracies)


@pytest.mark.slow
def test_images_that_are_left_out_are_named(train, folder, capsys):
    (folder / "train/dog/0.png").write_text("not an image")
    data = ("--dataset", "folder", "--data-dir", folder, "--skip-bad-images", "--batch-size", 4)
    data += ("--limit-train", 0, "--limit-test", 0)
    directory = train(*data, "--epochs", 1)
    note = "note: unreadable images that were left out: 1, the first is"
    assert note in capsys.readouterr().out and note in (directory / "log.txt").read_text()


@pytest.mark.slow
def test_a_run_is_repeated_from_its_config(train):
    first = train(*CNN, *words("--epochs 1 --lr 0.03 --augment flip"), output="first")
    repeat = ["--config", str(first / "config.json"), "--output-dir"]
    assert train_script.main([*repeat, "repeated"]) == 0
    assert rows(first.parent / "repeated") == rows(first)
    assert_same_weights(first.parent / "repeated", first)
    assert train_script.main([*repeat, "other", "--seed", "1"]) == 0
    assert rows(first.parent / "other") != rows(first)


@pytest.mark.slow
def test_evaluations_do_not_change_the_training(train):
    options = (*CNN, *words("--epochs 2 --ema-decay 0.5 --eval-every"))
    seldom, often = (train(*options, every, output=f"every-{every}") for every in (2, 1))
    assert rows(seldom)[0]["test_acc"] == "" and rows(often)[0]["test_acc"] != ""
    assert_same_weights(seldom, often)


@pytest.mark.slow
def test_held_out_images_select_and_the_test_set_is_read_at_the_end(train, tmp_path, monkeypatch):
    load = data.load

    class Raising:
        def __init__(self, examples):
            self.count = len(examples)

        def __len__(self):
            return self.count

        def __getattr__(self, name):
            raise AssertionError("the test set was read")

    def load_without_test(*args, **options):
        split = load(*args, **options)
        object.__setattr__(split, "test", Raising(split.test))
        return split

    with monkeypatch.context() as patch:
        patch.setattr(data, "load", load_without_test)
        with pytest.raises(AssertionError, match="test set was read"):
            train(*CNN, *words("--epochs 2 --val-size 20"))
    directory = tmp_path / "run"
    assert len(rows(directory)) == 2  # all epochs are done
    assert "val_acc" in rows(directory)[0] and "test_acc" not in rows(directory)[0]
    train("--resume", directory)
    metric, ended = checkpoint.load(directory / "best.pt")["metric"], summary(directory)
    assert (metric["selected_on"], metric["epoch"]) == ("val", ended["best_epoch"])
    assert "held-out" in ended["reported"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "--optimizer adam --augment none",
        "--optimizer muon --mixup 0.2 --cutmix 1 --label-smoothing 0.1",
        "--optimizer adamw --augment crop,flip,color_jitter,rand_augment --crop-padding zero",
        "--augment trivial_augment --cutout 8 --schedule one_cycle --clip-grad 1 --accumulate 3",
        "--augment random_resized_crop --image-size 40 --amp off --schedule multi_step",
        "--model-arg shortcut=pad --deterministic --schedule linear --amp bf16",
        "--model timm/resnet10t --ema-decay 0.9",
    ],
)
def test_all_kinds_of_options_train(train, options):
    directory = train("--epochs", 1, *words(options))
    assert summary(directory)["status"] == "finished"
    assert np.isfinite(float(rows(directory)[0]["train_loss"]))


@pytest.mark.slow
def test_a_model_learns(train):
    """Chance is 10 %. 75 steps on 96 images fit them much better."""
    model = "--model timm/test_resnet --model-arg channels=(16,16,32,32) --model-arg stem_width=8"
    options = "--epochs 25 --augment none --ema-decay 0 --eval-every 25"
    directory = train(*words(f"{model} {options}"))
    assert float(rows(directory)[-1]["train_acc"]) > 60
    assert summary(directory)["weights"] == "as trained"


# ---- weights from files --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["best.pt", "plain.pt", "wrapped.pt", "file.safetensors"])
def test_a_run_starts_with_weights_of_a_file(train, tmp_path, capsys, kind):
    source, path = models.create_model("resnet20", 7), tmp_path / kind
    if kind == "best.pt":
        path = train("--epochs", 1, output="source") / kind
    elif kind == "file.safetensors":
        from safetensors.torch import save_file

        save_file(source.state_dict(), path)
    else:
        state = source.state_dict()
        wrapped = {f"module._orig_mod.{key}": value for key, value in state.items()}
        torch.save(state if kind == "plain.pt" else {"state_dict": wrapped, "epoch": 3}, path)
    model = models.create_model("resnet20", 10)
    fresh = model.fc.weight.clone()
    line, card = load_weights(model, path)
    assert "\n" not in line
    if kind == "best.pt":
        assert "new" not in line and load_weights(model, path.parent) == (line, card)  # its run
    else:
        assert card is None and "new: fc.weight, fc.bias" in line
        assert torch.equal(model.fc.weight, fresh)
        assert torch.equal(model.stem[0].weight, source.stem[0].weight)
    directory = train("--epochs", 1, "--weights", path)
    assert "weights:" in capsys.readouterr().out
    assert arguments(directory)["weights"] == str(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.pt", "another model"),
        ("b.pt", "another model"),
        ("c.pt", "no weights"),
        ("d.safetensors", "damaged"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, name, message):
    torch.save(models.create_model("resnet32", 10).state_dict(), tmp_path / "a.pt")
    torch.save({"x": torch.zeros(1)}, tmp_path / "b.pt")
    torch.save({"epoch": 1}, tmp_path / "c.pt")
    (tmp_path / "d.safetensors").write_bytes(b"nothing")
    with refused("", message):
        load_weights(models.create_model("resnet20", 10), tmp_path / name)


def test_pretrained_weights_without_network_name_the_way_out(monkeypatch):
    def offline(*args, **options):
        raise OSError("no network")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("timm.create_model", offline)
    with refused("", "model.safetensors", "--weights"):
        models.create_model("timm/resnet18", 10, pretrained=True)
