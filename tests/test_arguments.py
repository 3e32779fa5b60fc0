"""Where the value of an argument comes from, and how a wrong one is refused."""

import pytest

import data
import models
import train
from common import command_line
from common.errors import UserError
from datasets.pipeline import TRANSFORMS
from training import arguments, experiment, optimizers


def resolve(*argv, config=None):
    parser = train.build_parser()
    given = command_line.explicit(parser, [str(a) for a in argv])
    return arguments.resolve(parser, given, config or {}, experiment.recipe, optimizers.OPTIMIZERS)


def test_the_default_recipe_is_the_published_one():
    args, origin = resolve("--model", "resnet34", "--epochs", 500)
    assert (args.optimizer, args.lr, args.momentum, args.weight_decay, args.batch_size) == (
        "sgd",
        0.1,
        0.9,
        5e-4,
        128,
    )
    assert (args.schedule, args.augment, args.mix_prob, args.label_smoothing) == (
        "cosine",
        "crop,flip",
        0.5,
        0.1,
    )
    assert (
        args.mixup > 0 and args.cutmix > 0 and args.ema_decay is None and args.warmup_epochs is None
    )
    assert origin["model"] == "command line" and origin["batch_size"] == "default"


def test_batch_size_auto_keeps_the_batch_and_sets_micro_batch_auto():
    args, origin = resolve("--model", "convnext_tiny", "--batch-size", "auto")
    assert (
        args.batch_size == resolve("--model", "convnext_tiny")[0].batch_size
        and origin["batch_size"] != "command line"
    )
    assert args.micro_batch is None and origin["micro_batch"] == "command line"
    assert resolve("--batch-size", "auto", "--micro-batch", 8)[0].micro_batch == 8


@pytest.mark.parametrize("model", models.MODELS)
def test_the_naive_baseline_has_no_regularization(model):
    args, _ = resolve("--model", model, "--augment", "none", "--optimizer", "adam")
    assert args.clip_grad == 0
    assert (args.lr, args.weight_decay, args.schedule, args.warmup_epochs) == (
        1e-3,
        0,
        "constant",
        0,
    )
    assert (args.mixup, args.cutmix, args.cutout, args.label_smoothing, args.ema_decay) == (
        0,
        0,
        0,
        0,
        0,
    )


def test_the_command_line_wins_over_config_over_recipe_over_default():
    config = {"lr": 0.3, "label_smoothing": 0.2, "batch_size": 64}
    args, origin = resolve("--model", "resnet20", "--lr", 0.5, config=config)
    assert (args.lr, origin["lr"]) == (0.5, "command line")
    assert (args.label_smoothing, origin["label_smoothing"]) == (0.2, "config")
    assert (args.cutmix, origin["cutmix"]) == (0.0, "recipe")
    assert (args.eval_every, origin["eval_every"]) == (1, "default")


def test_another_optimizer_has_its_own_learning_rate():
    args, origin = resolve("--model", "resnet20", "--optimizer", "adamw")
    assert (args.lr, args.weight_decay, origin["lr"]) == (1e-3, 0.05, "optimizer")
    assert (args.cutmix, origin["cutmix"]) == (0.0, "recipe")  # not an argument of the optimizer


def test_another_choice_overrides_the_recipe_in_a_config():
    config = dict(
        model="resnet20",
        optimizer="sgd",
        lr=0.1,
        schedule="cosine",
        mixup=0.2,
        cutmix=1.0,
        augment="crop",
        epochs=7,
    )
    origin = dict(lr="optimizer", mixup="recipe", epochs="command line")
    parser = train.build_parser()

    def args(*argv):
        given = command_line.explicit(parser, list(argv))
        return arguments.resolve(
            parser, given, config, experiment.recipe, optimizers.OPTIMIZERS, origin
        )[0]

    assert (args().lr, args().mixup, args().epochs) == (0.1, 0.2, 7)
    adam = args("--optimizer", "adam")
    assert (adam.lr, adam.schedule, adam.mixup, adam.epochs) == (1e-3, "constant", 0.2, 7)
    assert (args("--augment", "none").mixup, args("--augment", "none", "--cutmix", "1").cutmix) == (
        0.0,
        1.0,
    )
    assert (args("--model", "resnet18").mixup, args("--model", "resnet18").epochs) == (0.2, 7)


def test_starting_from_weights_has_its_own_recipe():
    args, origin = resolve("--weights", "x.pt", "--model", "vit_custom")
    assert (args.optimizer, args.lr, args.layer_decay, args.epochs, args.image_size) == (
        "adamw",
        3e-4,
        0.75,
        10,
        32,
    )
    assert resolve("--pretrained", "--model", "vit_tiny")[0].image_size == 224
    probe, _ = resolve("--weights", "x.pt", "--freeze-backbone")
    assert (probe.augment, probe.mixup, probe.cutmix, probe.layer_decay) == ("none", 0.0, 0.0, 1.0)
    # The recipe in the config of a run from scratch is replaced; what was given there stays.
    scratch, given = resolve("--model", "vit_custom", "--epochs", 50)
    parser = train.build_parser()
    again, _ = arguments.resolve(
        parser, {"weights": "x.pt"}, vars(scratch), experiment.recipe, optimizers.OPTIMIZERS, given
    )
    assert (again.model, again.epochs, again.lr, again.layer_decay) == (
        "vit_custom",
        50,
        3e-4,
        0.75,
    )


def test_a_config_may_hold_strings_as_on_the_command_line():
    args, _ = resolve(config={"lr": "0.25", "epochs": "3", "ema_decay": "auto"})
    assert (args.lr, args.epochs, args.ema_decay) == (0.25, 3, None)


def test_arguments_of_one_call_are_not_taken_from_a_config():
    args, _ = resolve(config={"output_dir": "x", "resume": "y", "tag": "z", "model": "resnet20"})
    assert (args.output_dir, args.resume, args.tag, args.model) == (None, None, "z", "resnet20")


def test_names_for_the_parser_are_those_of_the_code():
    assert arguments.DATASETS == data.DATASETS and set(arguments.AUGMENTATIONS) == set(
        TRANSFORMS
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lrr": 1}, "unknown argument 'lrr'; did you mean lr"),
        ({"lr": -1}, "at least 0"),
        ({"dataset": "mnist"}, "none of"),
        ({"compile": "yes"}, "neither true nor false"),
        ({"epochs": 1.5}, "an integer"),
        ({"epochs": None}, "epochs"),
        ({"model": 3}, "model"),
        ({"model_arg": [1]}, "list of texts"),
        ({"augment": None}, "augment"),
        ({"lr": True}, "lr"),
    ],
)
def test_a_config_is_checked_like_a_command_line(config, message):
    with pytest.raises(UserError, match=message):
        resolve(config=config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epoch", 3], "did you mean --epochs?"),
        (["--lr", -0.1], "--lr: must be a number, at least 0, not '-0.1'"),
        (["--lr", "nan"], "--lr"),
        (["--epochs", 0], "an integer, at least 1"),
        (["--epochs", "ten"], "an integer, at least 1"),
        (["--batch-size", 0], "at least 1"),
        (["--label-smoothing", 1.5], "at most 0.99"),
        (["--augment", "crop,flop"], "none or names from crop, flip"),
        (["--dataset", "mnist"], "choose from"),
        (["--optimizer", "sdg"], "choose from"),
        (["--image-size", 4], "at least 8"),
        (["--ema-decay", 1], "at most"),
        (["--mix-prob", 2], "at most 1"),
        (["--momentum", 1], "at most"),
        (["--epochs"], "expected one argument"),
    ],
)
def test_a_wrong_value_is_one_line_and_exit_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main([str(a) for a in arguments])
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and message in lines[0]


def test_help_shows_every_argument_and_its_default(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    common = """
        model model-arg dataset data-dir data-url image-size epochs batch-size optimizer lr momentum
        weight-decay schedule warmup-epochs label-smoothing augment mixup cutmix cutout ema-decay
        clip-grad accumulate amp compile deterministic device seed val-size eval-every output-dir
        tag resume config limit-train limit-test list-models
    """
    assert all(f"--{option} " in text for option in common.split())
    assert "(without a recipe: 128)" in text and "default: None" not in text
