"""train.py from end to end, on tiny data: what a run leaves behind, going on to the same bits, and what is refused."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY

import data
import train as script_module
from common import checkpoint
from common.errors import UserError
from datasets import shapes
from training import loop

TIMINGS = ("epoch_seconds", "images_per_second", "peak_memory_mb")


def rows(directory):
    with open(directory / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def untimed(directory):
    return [
        {key: value for key, value in row.items() if key not in TIMINGS} for row in rows(directory)
    ]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_state(one, other):
    """All state of training in two last.pt, but for clocks and the directory's name."""
    a, b = (checkpoint.load(directory / "last.pt") for directory in (one, other))
    for state in (a, b):
        for key in ("seconds", "total_seconds"):
            state["training"]["progress"].pop(key)
        state["training"]["history"] = [
            accuracies for _, *accuracies in state["training"]["history"]
        ]
        for key in ("output_dir", "resume", "resume_previous", "epochs", "device", "tag"):
            state["training"]["arguments"].pop(key)
    return same(a, b)


def summary(directory):
    return json.loads((directory / "summary.json").read_text())


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_the_contract_names(train, capsys):
    directory = train("--epochs", 2, "--ema-decay", 0.5)
    printed = capsys.readouterr().out.splitlines()
    assert (
        len(printed) == 4
        and "96 training images" in printed[0]
        and "272,474 parameters" in printed[0]
    )
    assert printed[1].startswith("epoch 1/2") and str(directory) in printed[-1]
    assert {"config.json", "metrics.csv", "best.pt", "last.pt", "summary.json"} <= set(
        os.listdir(directory)
    )
    assert any(name.startswith("events.out.tfevents") for name in os.listdir(directory))
    assert not list(directory.glob(".*.tmp"))

    columns = list(rows(directory)[0])
    assert columns[:5] == ["epoch", "step", "lr", "train_loss", "train_acc"]
    assert {
        "test_loss",
        "test_acc",
        "ema_test_acc",
        "epoch_seconds",
        "images_per_second",
        "peak_memory_mb",
    } <= set(columns)
    assert [(row["epoch"], row["step"]) for row in rows(directory)] == [("1", "3"), ("2", "6")]

    config = json.loads((directory / "config.json").read_text())
    assert config["arguments"]["epochs"] == 2 and config["from"]["epochs"] == "command line"
    assert config["arguments"]["warmup_epochs"] == 0.2 and config["from"]["warmup_epochs"] == "auto"
    assert {"torch", "git", "command", "device", "precision"} <= set(config)

    found = summary(directory)
    last = rows(directory)[-1]
    assert found["status"] == "finished" and found["test_acc"] == float(last["ema_test_acc"])
    assert (found["parameters"], found["epochs"], found["best_selected_on"]) == (272_474, 2, "test")
    assert (
        found["gmacs"] == pytest.approx(0.0408, abs=1e-4)
        and found["seconds_to_95"] <= found["train_seconds"] + 1e-3
    )
    assert re.search(rf"test accuracy {found['test_acc']:.2f} %", printed[-1])

    best = checkpoint.load(directory / "best.pt")
    assert best["metric"]["selected_on"] == "test" and best["metric"]["name"] == "ema_test_acc"
    assert best["metric"]["value"] == max(float(row["ema_test_acc"]) for row in rows(directory))
    assert best["card"]["classes"] == list(shapes.SHAPES) and best["card"]["image_size"] == 32
    assert not any(key.startswith(("module.", "_orig_mod.")) for key in best["state_dict"])


def test_the_same_seed_gives_the_same_bits_and_another_does_not(train):
    a, b, c = (
        train("--epochs", 1, "--seed", seed, output=name)
        for seed, name in ((1, "a"), (1, "b"), (2, "c"))
    )
    assert untimed(a) == untimed(b) != untimed(c)
    assert same_state(a, b)


def test_the_default_directory_says_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [*map(str, TINY), "--epochs", "1", "--tag", "try", "--seed", "4", "--device", "cpu"]
    assert script_module.main(arguments) == 0
    (name,) = os.listdir(tmp_path / "runs")
    assert re.fullmatch(r"shapes-resnet20-try-s4-\d{8}-\d{6}", name)


def test_pictures_on_the_host_make_the_same_run(train):
    device, host = (
        train("--epochs", 1, "--cutmix", 1, "--resident", where, output=where)
        for where in ("device", "host")
    )
    assert untimed(device) == untimed(host)
    a, b = (checkpoint.load(directory / "last.pt")["state_dict"] for directory in (device, host))
    assert same(a, b)


def test_a_held_out_split_chooses_and_the_test_set_is_read_once_at_the_end(train, monkeypatch):
    calls = []
    real = loop.evaluate

    def spy(model, batches, **options):
        calls.append(len(batches.labels))
        return real(model, batches, **options)

    monkeypatch.setattr(loop, "evaluate", spy)
    directory = train("--epochs", 2, "--val-size", 20, "--batch-size", 16, "--ema-decay", 0)
    assert calls == [20, 20, 50]
    assert "val_acc" in rows(directory)[0] and "test_acc" not in rows(directory)[0]
    found = summary(directory)
    best = checkpoint.load(directory / "best.pt")
    assert best["metric"]["selected_on"] == "val" and found["best_epoch"] == best["metric"]["epoch"]
    assert "held-out" in found["reported"]


def test_training_with_a_held_out_split_never_touches_the_test_images(train, monkeypatch):
    real = data.load

    class Raising:
        def __getattr__(self, name):
            raise AssertionError("the test split was read")

    def load(*args, **options):
        split = real(*args, **options)
        object.__setattr__(split, "test", Raising())
        return split

    monkeypatch.setattr(data, "load", load)
    with pytest.raises(AssertionError, match="test split was read"):
        train("--epochs", 2, "--val-size", 20, "--batch-size", 16)
    assert len(rows(Path("run"))) == 2  # all epochs were done


def test_evaluating_now_and_then_leaves_cells_empty_and_the_training_alone(train):
    often, seldom = (
        train("--epochs", 3, output="a"),
        train("--epochs", 3, "--eval-every", 2, output="b"),
    )
    assert [row["test_acc"] != "" for row in rows(seldom)] == [False, True, True]
    a, b = (checkpoint.load(directory / "last.pt") for directory in (often, seldom))
    assert same(a["state_dict"], b["state_dict"]) and same(
        a["training"]["optimizer"], b["training"]["optimizer"]
    )


def test_a_run_is_repeated_from_its_config(train):
    first = train("--epochs", 1, "--lr", 0.03, "--augment", "flip", output="a")
    assert script_module.main(["--config", str(first / "config.json"), "--output-dir", "b"]) == 0
    assert untimed(first) == untimed(Path("b"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--optimizer", "adam", "--augment", "none"),
        ("--optimizer", "muon", "--mixup", 0.2, "--cutmix", 1, "--label-smoothing", 0.1),
        (
            "--optimizer",
            "adamw",
            "--augment",
            "crop,flip,color_jitter,rand_augment",
            "--cutout",
            8,
            "--crop-padding",
            "zero",
        ),
        (
            "--augment",
            "trivial_augment",
            "--schedule",
            "one_cycle",
            "--clip-grad",
            1,
            "--accumulate",
            3,
        ),
        (
            "--augment",
            "random_resized_crop",
            "--image-size",
            40,
            "--amp",
            "off",
            "--schedule",
            "multi_step",
        ),
        ("--model-arg", "shortcut=pad", "--deterministic", "--schedule", "linear", "--amp", "bf16"),
        ("--model", "timm/resnet10t", "--ema-decay", 0.9),
    ],
)
def test_options_train(train, arguments):
    directory = train("--epochs", 1, *arguments)
    assert summary(directory)["status"] == "finished" and np.isfinite(
        float(rows(directory)[0]["train_loss"])
    )


def test_it_learns(train):
    """Chance is 10 %; 75 steps on 96 pictures fit them far above it."""
    directory = train(
        "--epochs", 25, "--augment", "none", "--ema-decay", 0, "--lr", 0.05, "--eval-every", 25
    )
    assert float(rows(directory)[-1]["train_acc"]) > 60


# ---- going on --------------------------------------------------------------------------------------------------------


def test_the_accuracy_in_the_summary_is_exact(train, monkeypatch):
    """Of 49 images, whose accuracies have more digits than metrics.csv; also where only the test was left to do."""
    options = ("--epochs", 1, "--limit-test", 49, "--seed", 1)
    whole = train(*options, output="whole")
    best = checkpoint.load(whole / "best.pt")["metric"]["value"]
    assert summary(whole)["test_acc"] == best == summary(whole)["best_test_acc"]
    assert (best * 49 / 100) == pytest.approx(round(best * 49 / 100), abs=1e-9)
    before = summary(whole)
    (whole / "summary.json").unlink()  # as after a kill between the last save and the end
    (whole / "metrics.csv").write_text(
        (whole / "metrics.csv").read_text().replace(f"{best:.6g}", "99")
    )
    train("--resume", whole)
    assert {k: v for k, v in summary(whole).items() if "memory" not in k} == {
        k: v for k, v in before.items() if "memory" not in k
    }


def stop_after(monkeypatch, steps):
    """Sends this process a real SIGTERM after so many steps."""
    real = loop.Progress.__setattr__

    def setattr_(self, name, value):
        real(self, name, value)
        if name == "step" and value == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Progress, "__setattr__", setattr_)


@pytest.mark.parametrize(
    ("steps", "more"),
    [
        (1, ()),
        (3, ("--eval-every", 2)),
        (5, ("--val-size", 10, "--batch-size", 28)),
        (4, ("--optimizer", "muon")),
        (5, ("--amp", "fp16", "--clip-grad", 1)),
        (
            9,
            ("--optimizer", "adamw", "--val-size", 10, "--batch-size", 28),
        ),  # before the last evaluation
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(train, monkeypatch, capsys, steps, more):
    options = (
        "--epochs",
        3,
        "--mixup",
        0.2,
        "--cutmix",
        1,
        "--accumulate",
        2,
        "--ema-decay",
        0.8,
        *more,
    )
    whole = train(*options, output="whole")
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        cut = train(*options, output="cut", status=143)
    found = summary(cut)
    assert found["status"] == "interrupted" and found["steps"] == steps
    assert "--resume" in capsys.readouterr().out.splitlines()[-1]
    train("--resume", cut)
    assert untimed(whole) == untimed(cut) and same_state(whole, cut)
    assert same(checkpoint.load(whole / "best.pt"), checkpoint.load(cut / "best.pt"))
    assert summary(cut)["test_acc"] == summary(whole)["test_acc"]


def test_an_interrupt_in_the_final_test_leaves_the_training_as_it_was(train, monkeypatch):
    options = ("--epochs", 2, "--val-size", 10, "--batch-size", 28, "--ema-decay", 0.8)
    whole = train(*options, output="whole")
    real = loop.evaluate

    def stop_in_the_test(model, batches, **arguments):
        if len(batches.labels) == 50:
            raise loop.Interrupted
        return real(model, batches, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", stop_in_the_test)
        cut = train(*options, output="cut", status=143)
    train("--resume", cut)
    assert untimed(whole) == untimed(cut) and same_state(whole, cut)
    assert summary(cut)["test_acc"] == summary(whole)["test_acc"]


def test_config_says_what_the_run_is_now_and_was_before(train):
    directory = train(
        "--schedule", "constant", "--warmup-epochs", 0, "--ema-decay", 0, "--epochs", 1
    )
    train("--resume", directory, "--epochs", 2, "--amp", "off")
    config = json.loads((directory / "config.json").read_text())
    assert (config["arguments"]["epochs"], config["precision"]) == (2, "float32")
    (before,) = config["resumed"]
    assert before["at_epoch"] == 2 and before["before"]["arguments"]["epochs"] == 1


def test_a_second_signal_ends_at_once():
    code = (
        "import os, signal, terminal\n"
        "with terminal.StopSignal() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT); assert stop() and stop.number == signal.SIGINT\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM and done.stdout == ""


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, -signal.SIGINT)]
)
def test_where_torchrun_repeats_signals_only_a_second_ctrl_c_ends_at_once(number, status):
    code = (
        "import os, signal, terminal\n"
        "with terminal.StopSignal(launched=True) as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM); assert stop() and stop.number == signal.SIGTERM\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        f"    for _ in range(3): os.kill(os.getpid(), {int(number)})\n"
        f"os.kill(os.getpid(), {int(number)})\n"
        "assert stop.number == signal.SIGTERM"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stderr


def test_a_run_that_lost_its_last_checkpoint_write_writes_each_epoch_once(train):
    """Killed between the csv row and the checkpoint of an epoch: the row is written again, not twice."""
    whole = train("--epochs", 3, output="whole")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 6)
        cut = train("--epochs", 3, output="cut", status=143)
    with open(cut / "metrics.csv", "a") as file:
        file.write(rows_text := (whole / "metrics.csv").read_text().splitlines(keepends=True)[2])
        file.write(rows_text[:20])
    train("--resume", cut)
    assert untimed(whole) == untimed(cut)


def test_a_killed_process_goes_on(tmp_path, script):
    """SIGKILL at any moment after the first checkpoint, then --resume, in processes of their own."""
    arguments = [*map(str, TINY), "--epochs", "3", "--device", "cpu"]
    done = script("train.py", *arguments, "--output-dir", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *arguments, "--output-dir", tmp_path / "cut"],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not (tmp_path / "cut" / "metrics.csv").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.05 * (time.time_ns() % 10))  # at another moment each time
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = script("train.py", "--resume", tmp_path / "cut", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "cut") and same_state(
        tmp_path / "whole", tmp_path / "cut"
    )


def test_a_finished_run_stays_as_it_is(train, capsys):
    directory = train("--epochs", 1)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    train("--resume", directory)
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .startswith(f"{directory} is finished already: test accuracy")
    )
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--model", "resnet32"), "--model is resnet20 there, not resnet32"),
        (("--batch-size", 8), "--batch-size is 32 there"),
        (("--dataset", "cifar10"), "--dataset is shapes there"),
        (
            ("--schedule", "linear", "--lr", 0.5),
            "--schedule is cosine there, not linear; --lr is 0.1 there, not 0.5",
        ),
        (("--limit-train", 64), "--limit-train is 96 there"),
        (("--epochs", 5), "start a new run"),
        (("--epochs", 1), "has 2 epochs already"),
        (("--output-dir", "x"), "--output-dir"),
    ],
)
def test_going_on_as_another_run_is_refused_by_name(train, arguments, named):
    directory = train("--epochs", 2, "--ema-decay", 0.5, "--warmup-epochs", 0)
    before = (directory / "last.pt").read_bytes()
    with pytest.raises(UserError, match=re.escape(named)) as refused:
        train("--resume", directory, *arguments)
    assert refused.value.status == 2 and (directory / "last.pt").read_bytes() == before


def test_a_constant_schedule_can_be_extended_as_if_it_had_been_asked_at_the_start(train):
    options = ("--schedule", "constant", "--warmup-epochs", 1, "--ema-decay", 0.8)
    whole = train(*options, "--epochs", 3, output="whole")
    short = train(*options, "--epochs", 1, output="short")
    train("--resume", short, "--epochs", 3)
    assert untimed(whole) == untimed(short) and same_state(whole, short)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state["training"].pop("progress"),
        lambda state: state["training"].update(arguments=3),
        lambda state: state["training"]["optimizer"].update(param_groups=[]),
        lambda state: state["state_dict"].update({"fc.bias": torch.zeros(3)}),
    ],
)
def test_a_state_of_another_form_is_refused(train, damage):
    directory = train("--epochs", 1)
    state = checkpoint.load(directory / "last.pt")
    damage(state)
    checkpoint.save(state, directory / "last.pt")
    (directory / "summary.json").unlink()  # which says that there is nothing left to do
    with pytest.raises(UserError, match="last.pt"):
        train("--resume", directory)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "hostile", "missing"])
def test_a_damaged_last_checkpoint_is_refused_and_nothing_starts_from_zero(train, tmp_path, damage):
    directory = train("--epochs", 1)
    last = directory / "last.pt"
    whole = bytearray(last.read_bytes())
    if damage == "truncated":
        last.write_bytes(whole[: len(whole) // 2])
    elif damage == "flipped":
        whole[len(whole) // 2] ^= 4
        last.write_bytes(whole)
    elif damage == "missing":
        last.unlink()
    else:
        from test_checkpoint import Hostile

        torch.save(Hostile(tmp_path / "sentinel"), last)
    before = (directory / "metrics.csv").read_text()
    with pytest.raises(UserError, match="last.pt"):
        train("--resume", directory)
    assert (directory / "metrics.csv").read_text() == before and not (
        tmp_path / "sentinel"
    ).exists()


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_learning_rate_that_blows_up_ends_with_the_last_good_checkpoint(train):
    with pytest.raises(loop.NonFiniteLoss, match="learning rate"):
        train(
            "--optimizer",
            "sgd",
            "--lr",
            1e30,
            "--epochs",
            2,
            "--warmup-epochs",
            0,
            "--ema-decay",
            0,
        )
    directory = Path("run")
    assert (
        summary(directory)["status"] == "failed" and "learning rate" in summary(directory)["reason"]
    )
    state = checkpoint.load(directory / "last.pt")
    assert all(
        value.isfinite().all()
        for value in state["state_dict"].values()
        if value.is_floating_point()
    )


def write_folder(root, classes=("cat", "dog"), count=4):
    from PIL import Image

    for part in ("train", "test"):
        for i, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for k in range(count):
                Image.new("RGB", (32, 32), (40 * k, 90 * i, 100)).save(
                    root / part / name / f"{k}.png"
                )
    return root


def test_a_folder_of_pictures_trains(train, tmp_path):
    folder = write_folder(tmp_path / "pets")
    directory = train(
        "--dataset",
        "folder",
        "--data-dir",
        folder,
        "--limit-train",
        0,
        "--limit-test",
        0,
        "--batch-size",
        4,
        "--epochs",
        1,
    )
    assert checkpoint.load(directory / "best.pt")["card"]["classes"] == ["cat", "dog"]


BAD = [
    (("--model", "resnet81"), "did you mean resnet18"),
    (("--model", "timm/resnet81"), "timm has no model"),
    (("--model-arg", "depth=3"), "no option 'depth'.*shortcut=project"),
    (("--model-arg", "shortcut=conv"), "shortcut must be project or pad"),
    (("--model-arg", "shortcut"), "key=value"),
    (
        ("--model", "timm/vit_tiny_patch16_224", "--image-size", 30),
        "image size 30 is not a multiple of the patch, 16 px",
    ),
    (("--batch-size", 97), "--batch-size 97 is larger than the training set .96"),
    (("--limit-train", 10**6), "--limit-train 1000000"),
    (("--val-size", 96), "--val-size 96"),
    (("--accumulate", 33), "--accumulate 33"),
    (("--cutout", 32), "--cutout 32 leaves nothing"),
    (("--warmup-epochs", 1), "--warmup-epochs 1 is as long as the run"),
    (("--device", "meta"), "--device meta"),
    (("--pretrained",), "no published weights"),
    (("--weights", "nothing.pt"), "no weights file nothing.pt"),
    (("--weights", "."), "no weights file best.pt"),
    (("--drop-path", 0.1), "resnet20 takes no --drop-path"),
    (("--device", "cuda:77"), "--device cuda:77"),
    (("--dataset", "folder", "--data-dir", "nowhere"), "no folder nowhere"),
    (
        ("--dataset", "cifar10", "--data-dir", "empty", "--data-url", "http://127.0.0.1:9/x"),
        "--dataset shapes",
    ),
    (("--config", "nothing.json"), "nothing.json"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(map(str, a)) for a, _ in BAD])
def test_bad_input_is_refused_and_leaves_no_directory(train, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message) as refused:
        train("--epochs", 1, *arguments)
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


def test_the_same_refusals_reach_the_terminal_as_one_line(script, tmp_path):
    done = script("train.py", *TINY, "--model", "resnet81", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stdout == ""
    done = script(
        "train.py",
        "--dataset",
        "folder",
        "--data-dir",
        "nowhere",
        "--output-dir",
        "x",
        cwd=tmp_path,
    )
    assert (
        done.returncode == 1
        and len(done.stderr.splitlines()) == 1
        and not (tmp_path / "x").exists()
    )


def test_a_directory_that_holds_a_run_is_not_written_over(train):
    directory = train("--epochs", 1)
    before = {
        name: (directory / name).read_bytes() for name in ("config.json", "metrics.csv", "last.pt")
    }
    with pytest.raises(UserError, match="holds a run already"):
        train("--epochs", 2)
    assert before == {name: (directory / name).read_bytes() for name in before}


def test_ctrl_c_ends_within_a_step_with_one_line(tmp_path):
    process = subprocess.Popen(
        [
            sys.executable,
            ROOT / "train.py",
            *map(str, TINY),
            "--epochs",
            "500",
            "--output-dir",
            tmp_path / "run",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not (tmp_path / "run" / "metrics.csv").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert (
        process.returncode == 130
        and err == ""
        and out.splitlines()[-1].startswith("interrupted in epoch")
    )
    assert summary(tmp_path / "run")["status"] == "interrupted"
    checkpoint.load(tmp_path / "run" / "last.pt")


# ---- weights from files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["best.pt", "plain.pt", "wrapped.pt", "file.safetensors"])
def test_weights_from_a_file(train, tmp_path, capsys, kind):
    import models
    from models.weights import load_weights

    source = models.create_model("resnet20", 7)
    path = tmp_path / kind
    if kind == "best.pt":
        path = train("--epochs", 1, output="source") / kind
    elif kind == "file.safetensors":
        from safetensors.torch import save_file

        save_file(source.state_dict(), path)
    else:
        wrapped = {f"module._orig_mod.{key}": value for key, value in source.state_dict().items()}
        torch.save(
            source.state_dict() if kind == "plain.pt" else {"state_dict": wrapped, "epoch": 3}, path
        )
    model = models.create_model("resnet20", 10)
    fresh = model.fc.weight.clone()
    line, card = load_weights(model, path)
    assert (card is not None) == (kind == "best.pt")
    assert kind != "best.pt" or load_weights(model, path.parent) == (line, card)  # its run
    assert "\n" not in line
    if kind == "best.pt":
        assert "new" not in line
    else:
        assert "new: fc.weight, fc.bias" in line and torch.equal(model.fc.weight, fresh)
        assert torch.equal(model.stem[0].weight, source.stem[0].weight)
    train("--epochs", 1, "--weights", path)
    assert "weights:" in capsys.readouterr().out


def test_a_run_goes_on_without_the_weights_it_began_with(train, tmp_path, monkeypatch):
    import models

    start = tmp_path / "start.pt"
    torch.save(models.create_model("resnet20", 10).state_dict(), start)
    arguments = ("--epochs", 2, "--weights", start)
    whole = train(*arguments, output="whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        cut = train(*arguments, output="cut", status=143)
    start.unlink()
    train("--resume", cut)
    assert untimed(cut) == untimed(whole) and same_state(cut, whole)


def test_weights_of_another_model_are_refused(tmp_path):
    import models
    from models.weights import load_weights

    torch.save(models.create_model("resnet32", 10).state_dict(), tmp_path / "a.pt")
    torch.save({"x": torch.zeros(1)}, tmp_path / "b.pt")
    torch.save({"epoch": 1}, tmp_path / "c.pt")
    (tmp_path / "d.safetensors").write_bytes(b"nothing")
    said = {
        "a.pt": "another model",
        "b.pt": "another model",
        "c.pt": "no weights",
        "d.safetensors": "damaged",
    }
    for name, message in said.items():
        with pytest.raises(UserError, match=message):
            load_weights(models.create_model("resnet20", 10), tmp_path / name)


def test_pretrained_without_network_says_how_to_bring_the_file(monkeypatch):
    import models

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(
        "timm.create_model", lambda *a, **k: (_ for _ in ()).throw(OSError("no network"))
    )
    with pytest.raises(UserError, match=r"without network.*model.safetensors.*--weights"):
        models.create_model("timm/resnet18", 10, pretrained=True)


@pytest.mark.gpu
def test_on_a_gpu_a_deterministic_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    arguments = [*map(str, TINY), "--epochs", "3", "--device", "cuda", "--deterministic"]
    assert script_module.main([*arguments, "--output-dir", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert script_module.main([*arguments, "--output-dir", str(tmp_path / "cut")]) == 143
    assert script_module.main(["--resume", str(tmp_path / "cut")]) == 0
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "cut")
    assert same_state(tmp_path / "whole", tmp_path / "cut")
