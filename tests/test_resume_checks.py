"""What may change when a run resumes, and what is refused before its directory is touched."""

import argparse
import contextlib
import copy
import json
import os
import shutil
import sys

import pytest
import torch
from helpers.errors import refused
from helpers.pets import load
from helpers.training import resolve
from PIL import Image, ImageOps

import train
import train_sota
from common import checkpoint
from common.scopes import flag, with_scope
from datasets.examples import Examples, Split
from training import arguments, out_of_memory, resume
from training.distributed import Ranks
from training.evaluation import Curve
from training.run_directory import RunDir
from training.schedules import Plan

CPU = torch.device("cpu")


def saved_run(path, *argv, batch=0, lr_ends=False):
    """The contents of path/last.pt of a run of train_sota.py after two epochs of three steps.

    lr_ends: some parameters are trained in the first three quarters of the run only.
    """
    args = resolve(train_sota, "--model", "resnet20", *argv)
    values, origin = arguments.record(args, Plan.of(args, steps_per_epoch=3).automatic)
    progress = {"epoch": 2, "step": 6, "batch": batch}
    training = {"arguments": values, "origin": origin, "progress": progress}
    training["optimizer"] = {"param_groups": [{}, {"lr_end": 0.75}][: 1 + lr_ends]}
    saved = {"training": training}
    checkpoint.save(saved, path / "last.pt")
    return saved


def test_a_run_resumes_with_its_arguments_but_may_change_the_machine(tmp_path):
    saved_run(tmp_path, "--lr", 0.3, "--tag", "a", "--accumulate", 2, "--epochs", 5)
    args = resolve(train_sota, "--resume", tmp_path / "last.pt", "--lr", 0.3)
    assert (args.lr, args.tag, args.epochs, args.output_dir) == (0.3, "a", 5, str(tmp_path))
    changes = ("--tag", "b", "--compile", "--epochs", 9, "--micro-batch", 16)
    args = resolve(train_sota, "--resume", tmp_path, *changes)
    assert (args.tag, args.compile, args.epochs, args.micro_batch) == ("b", True, 9, 16)
    assert args.origin["tag"] == args.origin["epochs"] == "command line"
    assert args.origin["accumulate"] == "--micro-batch"  # which decides about it again
    args = resolve(train, "--resume", tmp_path)  # which splits batches by --accumulate
    assert args.accumulate == 2 and not hasattr(args, "micro_batch")
    for option in ("--config", "--output-dir"):
        with refused("--resume takes", "leave --config and --output-dir out"):
            resolve(train_sota, "--resume", tmp_path, option, tmp_path)


def unfinished(path, age, status="interrupted", script="train.py"):
    """A run of this script whose last save is `age` seconds old."""
    path.mkdir(parents=True)
    saved_run(path)
    os.utime(path / "last.pt", (1e9 - age, 1e9 - age))
    (path / "summary.json").write_text(json.dumps({"status": status}))
    (path / "config.json").write_text(json.dumps({"command": f"{script} --epochs 9"}))


def test_resume_alone_takes_the_newest_unfinished_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["somewhere/train.py"])
    unfinished(tmp_path / "runs/older", 50)
    unfinished(tmp_path / "runs/sweep-x/a-s0", 40)
    unfinished(tmp_path / "runs/finished", 30, status="finished")
    unfinished(tmp_path / "runs/vit", 20, script="train_vit.py")
    unfinished(tmp_path / "runs/sweep-x/running", 10)
    with contextlib.closing(RunDir.open("runs/sweep-x/running")):
        args = resolve(train, "--resume", "--batch-size", 128)
        assert args.resume == args.output_dir == "runs/sweep-x/a-s0"
        assert capsys.readouterr().out == "resuming runs/sweep-x/a-s0 (interrupted)\n"
        assert resolve(train, "--resume", "runs/older").resume == "runs/older"
    shutil.rmtree("runs/sweep-x"), shutil.rmtree("runs/older")
    with refused("--resume: runs/ holds no unfinished run of this script"):
        resolve(train, "--resume")
    (tmp_path / "runs/vit/summary.json").write_text("{")  # killed, or not readable
    (tmp_path / "runs/vit/config.json").unlink()
    assert resolve(train, "--seed", 0, "--resume").resume == "runs/vit"


def test_every_argument_that_identifies_a_run_is_refused_by_name(tmp_path):
    saved_run(tmp_path)
    defaults = arguments.defaults(train_sota.build_parser())
    for name in with_scope("identity") - {"epochs"}:
        with refused(f"can't resume {tmp_path}: {flag(name)} is"):
            resume.resolve(defaults, {"resume": str(tmp_path), name: "something else"})


def test_auto_on_the_command_line_is_what_the_run_started_with(tmp_path):
    saved = saved_run(tmp_path, "--epochs", 50)["training"]["arguments"]
    args = resolve(train_sota, "--resume", tmp_path, "--ema-decay", "auto")
    assert args.ema_decay == saved["ema_decay"] > 0
    saved_run(tmp_path, "--ema-decay", 0.8)
    with refused("can't resume", "--ema-decay is 0.8 there, not auto"):
        resolve(train_sota, "--resume", tmp_path, "--ema-decay", "auto")


def check_epochs(path, epochs, *argv, **options):
    """Resumes a run of 4 epochs after its second one with another number of epochs."""
    saved = saved_run(path, "--epochs", 4, *argv, **options)
    args = resolve(train, "--resume", path, "--epochs", epochs)
    resume.check_epochs(args, saved, steps_per_epoch=3)


CONSTANT = ("--schedule", "constant", "--warmup-epochs", 0, "--ema-decay", 0)


def test_a_constant_schedule_can_be_extended_or_cut_short_between_epochs(tmp_path):
    check_epochs(tmp_path, 2, *CONSTANT)
    check_epochs(tmp_path, 9, *CONSTANT, batch=1)
    check_epochs(tmp_path, 4)  # any schedule, with the same number
    with refused("--epochs 2: the run has 3 epochs already"):
        check_epochs(tmp_path, 2, *CONSTANT, batch=1)


def test_a_run_with_parameters_that_stop_early_keeps_its_length(tmp_path):
    check_epochs(tmp_path, 3, *CONSTANT, lr_ends=True)  # they would have stopped after 2.25 epochs
    with refused("--epochs 2: with the constant schedule, the learning rates so far"):
        check_epochs(tmp_path, 2, *CONSTANT, lr_ends=True)


@pytest.mark.parametrize(
    ("epochs", "argv", "message"),
    [
        (1, CONSTANT, ": the run has 2 epochs already"),
        (9, CONSTANT[:4], "another --ema-decay from the start"),
        (
            9,
            (*CONSTANT[:2], *CONSTANT[4:]),
            "another --warmup-epochs from the start (0.9, not 0.4)",
        ),
        (9, CONSTANT[2:], "with the cosine schedule"),
        (2, (*CONSTANT, "--eval-every", 3), "with --eval-every 3, epoch 2"),
    ],
)
def test_epochs_with_other_steps_from_the_start_are_refused(tmp_path, epochs, argv, message):
    with refused(f"--epochs {epochs}", message):
        check_epochs(tmp_path, epochs, *argv)


def split(count=20, tested=20, classes=("a", "b")):
    train, test = (
        Examples(torch.zeros(n, 3, 8, 8, dtype=torch.uint8), torch.zeros(n))
        for n in (count, tested)
    )
    return Split("name", train, None, test, classes, (), ())


def test_other_data_is_refused():
    saved = {"training": {"facts": resume.data_facts(split()), "progress": {"epoch": 1}}}

    def check(split):
        resume.check_data(split, saved, Ranks(CPU))

    check(split())
    with refused("can't resume: the data has changed", "train images: 20 there, 30 here"):
        check(split(30))
    with refused("can't resume", "test images: 20 there, 30 here"):
        check(split(tested=30))
    del saved["training"]["facts"]["test_images"]  # as in runs of earlier versions
    check(split(tested=30))
    with refused("can't resume", "classes: 2 (a, b) there, 2 (a, c) here"):
        check(split(classes=("a", "c")))


def test_a_run_that_another_process_has_continued_meanwhile_is_refused(tmp_path):
    saved = saved_run(tmp_path)
    before = copy.deepcopy(saved)
    before["training"]["progress"]["step"] -= 3
    args = argparse.Namespace(output_dir=tmp_path, resume_previous=False, save_every=0)
    config = {"precision": "float32"}
    with refused(tmp_path, "was written by another process just now: try again"):
        resume.open_directory(args, config, None, before, Curve("test", 1, 3))
    RunDir.open(tmp_path).close()  # it isn't locked
    assert checkpoint.load(tmp_path / "last.pt") == saved


def test_a_folder_with_other_images_or_labels_is_refused(folder):
    saved = {"training": {"facts": resume.data_facts(load(folder)), "progress": {"epoch": 1}}}

    def check():
        resume.check_data(load(folder), saved, Ranks(CPU))

    cat = sorted((folder / "test/cat").iterdir())[0]
    os.utime(cat, (1, 1))  # the folder is decoded again
    check()
    original = cat.read_bytes()
    with Image.open(cat) as image:
        ImageOps.invert(image.convert("RGB")).save(cat)
    with refused("can't resume: the data has changed", "digest of decoded images and labels: "):
        check()
    del saved["training"]["facts"]["digest_of_decoded_images_and_labels"]  # as in earlier versions
    check()
    cat.write_bytes(original)
    saved["training"]["facts"] = resume.data_facts(load(folder))
    (folder / "train/cat/2.png").rename(folder / "train/dog/!.png")  # the first of the dogs
    with refused("can't resume", "digest of decoded images and labels: "):
        check()


def test_a_training_image_that_became_a_test_image_is_noticed(folder):
    """The subsets that a run has may be as large as before."""
    shutil.rmtree(folder / "test/cat")
    limits = {"limit_train": 4, "limit_test": 2}
    saved = resume.data_facts(load(folder, **limits))
    (folder / "train/dog/2.png").rename(folder / "test/dog/!.png")  # the next one in the order
    facts = resume.data_facts(load(folder, **limits))
    different = [name for name in facts if facts[name] != saved[name]]
    assert different == ["digest_of_decoded_images_and_labels"]


def test_ranks_with_other_files_are_refused():
    class Second(Ranks):
        first = ()  # what the first rank has read

        def broadcast_object(self, value):
            return next(other for other in self.first if other.keys() == value.keys())

        def any(self, flag):
            return flag

    ranks, position = Second(CPU, rank=1, world_size=2), {"epoch": 1, "seconds": 2.0}
    saved = {"training": {"facts": resume.data_facts(split()), "progress": position}}
    Second.first = (resume.data_facts(split()), dict(position))
    resume.check_data(split(), saved, ranks)
    with refused("the processes have read different data: --data-dir must hold the same files"):
        resume.check_data(split(30), saved, ranks)
    Second.first = (resume.data_facts(split()), position | {"epoch": 2})
    with refused("the processes have read different last.pt: the run's directory must be shared"):
        resume.check_data(split(), saved, ranks)


def raises(error):
    @resume.refuse_misfits()
    def load():
        raise error

    return load


def test_contents_that_do_not_fit_are_refused_unlike_errors_of_the_device():
    misfit = "can't resume: last.pt doesn't fit this run"
    for error in (KeyError("x"), IndexError("x"), ValueError("x\ny"), AttributeError("x")):
        with refused(misfit, "x"):
            raises(error)()
    with refused(misfit, "Linear"), resume.refuse_misfits():
        torch.nn.Linear(2, 2).load_state_dict(torch.nn.Linear(2, 3).state_dict())
    copying = "Error(s) in loading state_dict for Linear: while copying: "
    for text in (*(copying + text for text in out_of_memory.MESSAGES), "device-side assert"):
        with pytest.raises(RuntimeError, match=text.replace("(s)", ".s.")):
            raises(RuntimeError(text))()
