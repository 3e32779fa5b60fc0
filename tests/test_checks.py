"""Arguments that contradict each other are refused before any work."""

import pytest
from helpers.errors import refused
from helpers.training import CPU, resolve

import train
import train_sota
from training.checks import check_arguments, check_fitting
from training.distributed import Ranks

UNMIXED = ("--mixup", 0, "--cutmix", 0)
FROZEN = ("--freeze-backbone", "--weights", __file__)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--batch-size", 4, "--accumulate", 5), "--accumulate 5 is more than the 4 images"),
        (("--repeated-augment", 3), "--batch-size 128 is not a multiple of --repeated-augment 3"),
        (("--cutout", 32), "--cutout 32 must be less than the image size, 32 px"),
        (
            ("--model", "resnest50d", "--batch-size", 2, "--accumulate", 2),
            "resnest50d can't train on one image at a time (Expected more than 1 value",
        ),
        (("--grad-checkpointing",), "resnet18 has no gradient checkpointing"),
        (("--layer-decay", 0.8), "--layer-decay: this model doesn't define its layers"),
        (("--model", "timm/resnet18", "--pretrained", "--weights", __file__), "exclude each other"),
        (("--data-url", "http://x", "--dataset", "shapes"), "--data-url has no effect with"),
        (("--skip-bad-images",), "--skip-bad-images has no effect with --dataset cifar10"),
        (("--warmup-epochs", 5, "--epochs", 5), "--warmup-epochs 5 is as long as the run"),
        (("--final-lr", 0.1, "--schedule", "constant"), "--final-lr needs --schedule cosine"),
        (("--weights", "missing.pt"), "missing.pt"),
        (("--pretrained",), "resnet18"),
        (("--freeze-backbone",), "--freeze-backbone needs trained weights"),
        ((*FROZEN, "--augment", "crop"), "--freeze-backbone computes features once"),
        ((*FROZEN, "--mixup", 0.2), "add --augment none"),
        ((*FROZEN, "--repeated-augment", 2), "--repeated-augment can't be used with"),
        ((*FROZEN, "--layer-decay", 0.9), "--layer-decay can't be used with --freeze-backbone"),
        (FROZEN, "--freeze-backbone: this model doesn't separate features and head"),
        (
            ("--repeated-augment", 2, "--augment", "alternating_flip"),
            "--repeated-augment 2 can't be used with alternating_flip",
        ),
        (
            (*UNMIXED, "--repeated-augment", 2, "--augment", "none"),
            "--repeated-augment 2 would repeat equal images",
        ),
        (("--output-dir", __file__), "is a file"),
        (("--model-arg", "widht=3"), "resnet18 has no option 'widht'"),
        (("--drop-path", 0.1), "--drop-path"),
        (("--jitter", 0.4), "--jitter 0.4 has no effect without color_jitter in --augment"),
        (("--augment", "flip", "--crop-pixels", 2), "has no effect without crop in --augment"),
        (
            (*UNMIXED, "--mix-per", "batch"),
            "--mix-per batch has no effect without --mixup or --cutmix above",
        ),
        (
            (*UNMIXED, "--mix-prob", 0.5),
            "--mix-prob 0.5 has no effect without --mixup or --cutmix above 0",
        ),
        (("--patience", 3), "--patience 3 needs held-out images: add --val-size"),
        (("--optimizer", "adam", "--nesterov"), "--nesterov can't be chosen with --optimizer adam"),
        (("--optimizer", "timm/adadelta", "--momentum", 0.8), "--momentum can't be chosen"),
        (("--optimizer", "muon_sgd", "--no-nesterov"), "--no-nesterov can't be chosen"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(argv, message):
    with refused("", message):
        check_arguments(resolve(train, *argv), None, Ranks(CPU))


def test_arguments_that_go_together_are_accepted():
    constant = ("--warmup-epochs", 5, "--epochs", 5, "--schedule", "constant")
    parts, adadelta = ("--batch-size", 8, "--accumulate", 8), ("--optimizer", "timm/adadelta")
    jitter = ("--augment", "color_jitter", "--jitter", 0.4, "--mixup", 0.2, "--mix-per", "batch")
    recipe = ("--model", "airbench95", "--schedule", "constant")  # its recipe has a final_lr
    probe = (*FROZEN, "--model", "resnet20")
    one = (*FROZEN, "--model", "timm/resnet18", "--image-size", 32, "--batch-size", 1)
    for argv in ((), parts, constant, ("--cutout", 31), probe, one, adadelta, jitter, recipe):
        check_arguments(resolve(train, *argv), None, Ranks(CPU))


def test_each_rank_needs_an_image_for_each_part_of_a_batch():
    with refused("--batch-size 6 is too small for 4 processes: each needs two images"):
        check_arguments(resolve(train, "--batch-size", 6), None, Ranks(CPU, world_size=4))
    with refused("--accumulate 3 is more than the 2 images", "that a process has"):
        argv = ("--batch-size", 8, "--accumulate", 3)
        check_arguments(resolve(train, *argv), None, Ranks(CPU, world_size=4))


def test_a_run_may_resume_on_more_processes_than_its_micro_batch_was_for():
    """The --accumulate that it recorded was for one process."""
    given = ("--model", "vit_custom", "--image-size", 32, "--batch-size", 16)
    for micro_batch, source in ((2, "command line"), (2, "auto"), (None, "default")):
        args = resolve(train_sota, *given)
        args.micro_batch, args.accumulate = micro_batch, 8
        args.origin |= {"micro_batch": source, "accumulate": "--micro-batch"}
        check_arguments(args, {"training": {}}, Ranks(CPU, world_size=4))


def test_an_augmentation_setting_without_effect_does_not_keep_an_older_run_from_resuming():
    args = resolve(train, "--mixup", 0, "--cutmix", 0, "--mix-prob", 0.7)
    with refused("--mix-prob 0.7 has no effect"):
        check_arguments(args, None, Ranks(CPU))
    check_arguments(args, {"training": {}}, Ranks(CPU))


def test_batch_norm_over_all_ranks_may_have_one_image_of_each():
    argv = ("--model", "resnest50d", "--image-size", 32, "--batch-size", 4, "--accumulate", 2)
    two = Ranks(CPU, world_size=2)
    check_arguments(resolve(train, *argv, "--sync-bn"), None, two)
    with refused("resnest50d can't train on one image at a time"):
        check_arguments(resolve(train, *argv), None, two)


@pytest.mark.parametrize("argv", [("--micro-batch", 1), ("--batch-size", 5, "--micro-batch", 2)])
def test_a_part_of_one_image_is_refused_where_batch_norm_needs_two(argv):
    with refused("resnest50d can't train on one image at a time", "--micro-batch"):
        args = resolve(train_sota, "--model", "resnest50d", "--image-size", 32, *argv)
        check_arguments(args, None, Ranks(CPU))


def test_the_recipe_of_train_sota_suits_models_without_layers():
    assert resolve(train_sota, "--model", "resnet18").layer_decay == 1
    assert resolve(train_sota, "--model", "eva02_large").layer_decay == 0.85


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--accumulate", 2, "--micro-batch", 8), "--accumulate and --micro-batch both split"),
        (("--lora-rank", 4, *FROZEN), "--lora-rank and --freeze-backbone exclude each other"),
        (("--fsdp", "--optimizer", "muon"), "--fsdp can't be used with --optimizer muon"),
        (("--fsdp", "--optimizer", "muon_sgd"), "--fsdp can't be used with --optimizer muon_sgd"),
        (("--fsdp", "--optimizer", "timm/lion"), "--fsdp can't be used with --optimizer timm/lion"),
        (("--fsdp", "--ema-device", "cpu"), "--fsdp can't be used with --lora-rank or"),
        (("--fsdp",), "--fsdp needs several processes: use torchrun"),
    ],
)
def test_options_of_train_sota_that_contradict_each_other_are_refused(argv, message, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with refused(message):
        check_fitting(resolve(train_sota, *argv), None)
    check_fitting(resolve(train_sota, "--accumulate", 2, "--micro-batch", 0), None)
    check_fitting(resolve(train_sota, "--fsdp"), {"training": {}})  # it may resume in one process
