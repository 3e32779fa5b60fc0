"""Where the value of an argument comes from, and how a wrong one is refused."""

import json

import pytest
from helpers.errors import refused
from helpers.training import resolve

import models
import train
import train_sota
import train_vit
from common.scopes import SCOPES, flag, with_scope, words
from training import arguments, optimizers, options

SCRIPTS = {"train": train, "train_vit": train_vit, "train_sota": train_sota}


def values(args, *keys):
    return tuple(getattr(args, key) for key in keys)


@pytest.fixture
def configured(tmp_path):
    """Arguments of train.py with --config: configured({"lr": 0.1}, "--epochs", 3).

    origin: of the values in the config, as a run's config.json has it.
    """

    def resolved(config, *argv, origin=None):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"arguments": config, "from": origin} if origin else config))
        return resolve(train, "--config", path, *argv)

    return resolved


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_the_recipe_of_a_script_is_what_its_default_model_trains_with(script):
    args, expected = resolve(script), dict(script.RECIPE)
    if script is train_sota:
        expected["image_size"] = 448  # of EVA-02 large; the recipe's is for other models
    assert {key: getattr(args, key) for key in expected} == expected


def test_a_recipe_has_every_argument_that_has_no_default_of_its_own():
    listed = options.TRAINING + options.AUGMENTATION
    required = {option.flag for option in listed if option.default is None}
    required &= {flag(name) for name in train.RECIPE}
    for name, entry in models.MODELS.items():
        recipes = [models.recipe(name, transfer=True, frozen=frozen) for frozen in (False, True)]
        for recipe in [*recipes, entry.recipe]:
            assert not recipe or required <= {flag(key) for key in recipe}, name


@pytest.mark.parametrize("name", ["resnet20", "convnext_tiny", "vit_small_data", "eva_giant"])
def test_a_model_with_its_own_recipe_trains_alike_with_every_script(name):
    resolved = [vars(resolve(script, "--model", name)) for script in SCRIPTS.values()]
    for key in resolved[0].keys() - {"origin"}:
        assert resolved[0][key] == resolved[1][key] == resolved[2][key], key


@pytest.mark.parametrize("model", models.MODELS)
def test_the_naive_baseline_has_no_regularization(model):
    args = resolve(train, "--model", model, "--augment", "none", "--optimizer", "adam")
    assert values(args, "lr", "schedule") == (1e-3, "constant")
    off = ("weight_decay", "warmup_epochs", "mixup", "cutmix", "cutout", "random_erasing")
    assert not any(values(args, *off, "label_smoothing", "ema_decay", "clip_grad"))


def test_another_optimizer_has_its_own_rates():
    args = resolve(train, "--model", "resnet20", "--optimizer", "adamw")
    assert values(args, "lr", "weight_decay", "cutmix") == (1e-3, 0.05, 0.0)
    assert args.origin["lr"] == "optimizer" and args.origin["cutmix"] == "recipe"
    muon = resolve(train_vit, "--optimizer", "muon")
    assert values(muon, "lr", "momentum", "epochs") == (0.01, 0.95, 100)


def test_an_optimizer_of_timm_has_the_rates_of_timm():
    args = resolve(train, "--optimizer", "timm/lion")
    assert values(args, "lr", "momentum", "weight_decay") == (1e-4, 0.9, 0.0)
    args = resolve(train, "--optimizer", "timm/adan", "--momentum", 0.97)
    assert values(args, "lr", "momentum") == (1e-3, 0.97)
    with refused("--optimizer timm/adafactor has no default learning rate: add --lr"):
        resolve(train, "--optimizer", "timm/adafactor")
    assert resolve(train, "--optimizer", "timm/adafactor", "--lr", 0.01).lr == 0.01


def test_starting_from_weights_has_its_own_recipe():
    keys = ("optimizer", "lr", "layer_decay", "epochs", "image_size")
    args = resolve(train, "--weights", "x.pt", "--model", "vit_custom")
    assert values(args, *keys) == ("adamw", 3e-4, 0.75, 10, 32)
    assert resolve(train, "--pretrained", "--model", "vit_tiny").image_size == 224
    assert resolve(train_vit, "--pretrained").model == "vit_tiny"
    probe = resolve(train, "--weights", "x.pt", "--freeze-backbone")
    assert values(probe, "augment", "mixup", "cutmix", "layer_decay") == ("none", 0, 0, 1)


def test_the_layers_in_order_and_where_each_value_came_from(configured):
    config = {"lr": 0.3, "label_smoothing": 0.2, "batch_size": 64}
    args = configured(config, "--model", "resnet20", "--lr", 0.5, "--augment", "none")
    expected = {
        "lr": (0.5, "command line"),
        "label_smoothing": (0.2, "config"),
        "cutmix": (0.0, "--augment none"),
        "schedule": ("cosine", "recipe"),
        "momentum": (0.9, "optimizer"),
        "eval_every": (1, "default"),
    }
    assert {key: (getattr(args, key), args.origin[key]) for key in expected} == expected


def test_another_choice_replaces_what_came_with_the_choice_of_a_config(configured):
    config = dict(model="resnet20", optimizer="sgd", lr=0.1, schedule="cosine", mixup=0.2)
    config |= dict(cutmix=1.0, augment="crop", epochs=7)
    origin = dict.fromkeys(config, "config") | {"lr": "optimizer", "mixup": "recipe"}

    def args(*argv):
        return configured(config, *argv, origin=origin)

    assert values(args(), "lr", "mixup", "epochs") == (0.1, 0.2, 7)
    adam = args("--optimizer", "adam")
    assert values(adam, "lr", "schedule", "mixup", "epochs") == (1e-3, "constant", 0.2, 7)
    assert args("--augment", "none").mixup == 0
    assert args("--augment", "none", "--cutmix", 1).cutmix == 1
    # The recipe of the other model, but what was asked for.
    assert values(args("--model", "vit_custom"), "mixup", "epochs") == (0.8, 7)


def test_another_augmentation_has_the_mixing_that_none_turned_off(configured):
    config = dict(model="vit_custom", augment="none", mixup=0.0, cutmix=0.0)
    origin = dict(augment="command line", mixup="--augment none", cutmix="command line")

    def mixing(*argv):
        return values(configured(config, *argv, origin=origin), "mixup", "cutmix")

    assert mixing() == (0, 0)
    assert mixing("--augment", "crop") == (0.8, 0)


def test_a_config_of_a_run_that_had_a_config_is_as_the_first_one(configured):
    """Values of the first run's recipe are not taken for values that were asked for."""
    recorded = arguments.record(resolve(train, "--model", "airbench94", "--epochs", 7), {})
    again = configured(recorded[0], "--seed", 1, origin=recorded[1])
    assert values(again, "lr", "epochs") == (0.24, 7)
    assert (again.origin["lr"], again.origin["epochs"]) == ("recipe", "config")
    recorded = arguments.record(again, {})
    other = configured(recorded[0], "--model", "resnet18", origin=recorded[1])
    assert values(other, "optimizer", "lr", "batch_size", "progressive", "epochs") == (
        *("sgd", 0.1, 128, "none"),
        7,
    )


def test_a_value_that_only_the_config_has_comes_from_the_config(configured):
    """Such as that of a recipe of another script or version, of "auto", or of a damaged file."""
    origin = {"lr": "recipe", "accumulate": "auto", "batch_size": ["x"], "momentum": "recipe"}
    config = {"lr": 0.3, "accumulate": 4, "batch_size": 64, "momentum": 0.9}
    args = configured(config, origin=origin)
    assert values(args, "lr", "accumulate", "batch_size") == (0.3, None, 64)
    sources = {name: args.origin[name] for name in config}
    assert sources == dict.fromkeys(config, "config") | {"momentum": "recipe"}


def test_what_followed_from_another_option_is_not_taken_from_a_config(configured):
    origin = {"accumulate": "--micro-batch", "batch_size": "command line"}
    args = configured({"accumulate": 16, "batch_size": 8}, origin=origin)
    assert (args.accumulate, args.batch_size) == (1, 8)


def test_weights_replace_the_recipe_in_a_config_of_a_run_from_scratch(configured):
    scratch = resolve(train, "--model", "vit_custom", "--epochs", 50)
    record = arguments.record(scratch, {})
    args = configured(record[0], "--weights", "x.pt", origin=record[1])
    assert values(args, "model", "epochs", "lr", "layer_decay") == ("vit_custom", 50, 3e-4, 0.75)


def test_no_pretrained_turns_off_what_a_config_turned_on(configured):
    """The model stays, though it was a default, with the recipe that it has from scratch."""
    config, origin = arguments.record(resolve(train_vit, "--pretrained", "--tag", "a"), {})
    args = configured(config, "--no-pretrained", origin=origin)
    scratch = resolve(train, "--model", "vit_tiny", "--tag", "a")
    assert (args.model, args.pretrained, args.tag) == ("vit_tiny", False, "a")
    assert arguments.as_dict(args) | {"config": None} == arguments.as_dict(scratch)


def test_what_a_config_may_hold(configured, tmp_path):
    strings = configured({"lr": "0.25", "epochs": "3", "ema_decay": "auto"})
    assert values(strings, "lr", "epochs", "ema_decay") == (0.25, 3, None)
    # Not what concerns one call of the script.
    args = configured({"output_dir": "x", "resume": "y", "tag": "z"}, origin={"tag": "config"})
    assert values(args, "output_dir", "resume", "tag") == (None, None, "z")
    assert resolve(train, "--config", tmp_path).tag == "z"  # a run's directory
    # Options of train_sota.py only with their defaults.
    config = arguments.as_dict(resolve(train_sota, "--model", "resnet20", "--micro-batch", 0))
    assert configured(config).model == "resnet20"


def test_batch_size_auto_keeps_the_batch_and_fits_its_parts():
    args = resolve(train_sota, "--model", "convnext_tiny", "--batch-size", "auto")
    assert args.batch_size == resolve(train_sota, "--model", "convnext_tiny").batch_size
    assert args.micro_batch is None and args.origin["micro_batch"] == "command line"
    given = ("--batch-size", "auto", "--micro-batch", 8)
    assert resolve(train_sota, *given).micro_batch == 8
    with refused("--batch-size auto is an option of train_sota.py: give a number"):
        resolve(train, "--batch-size", "auto")


def test_arguments_as_words_are_the_same_arguments():
    """Also where a value looks like an option."""
    given = {"tag": "-x", "lr": 0.3, "accumulate": None, "model_arg": ["a=1", "-b=2"]}
    given |= {"compile": True, "nesterov": False}
    assert arguments.parse(train.build_parser(), words(given)) == given


def test_arguments_of_the_scripts_and_scopes_are_the_same():
    defaults = [arguments.defaults(script.build_parser()) for script in SCRIPTS.values()]
    assert set().union(*defaults) == set(SCOPES)
    execution = "amp compile grad_checkpointing deterministic micro_batch ema_device fsdp"
    location = "device resident data_dir data_url tag curves save_every"
    assert with_scope("execution", "location") == {*execution.split(), *location.split()}
    call = "output_dir resume resume_previous config list_models doctor dry_run gpu_memory smoke"
    assert with_scope("call") == set(call.split())  # all others identify a run
    assert set(optimizers.OPTIMIZERS["adam"]) <= with_scope("identity")


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_help_shows_every_argument_and_its_default(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    parser = script.build_parser()
    assert all(f"{flag(name)} " in text for name in arguments.defaults(parser))
    assert "default: 128)" in text and "default: None" not in text
    assert all(action.help for action in parser._actions)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lrr": 1}, "unknown argument 'lrr'; did you mean lr"),
        ({"lr": -1}, "lr: must be a number, at least 0"),
        ({"lr": True}, "lr: has a value of the wrong type"),
        ({"dataset": "mnist"}, "dataset: must be one of cifar10, "),
        ({"compile": "yes"}, "compile: must be true or false"),
        ({"epochs": 1.5}, "epochs: must be an integer"),
        ({"epochs": None}, "epochs: must be an integer"),
        ({"batch_size": None}, "batch_size: must be a number"),
        ({"batch_size": "auto"}, "batch_size: must be a number"),
        ({"model": 3}, "model: has a value of the wrong type"),
        ({"model_arg": [1]}, "model_arg: must be a list of strings"),
        ({"augment": None}, "augment"),
        ({"data_dir": None}, "data_dir: has a value of the wrong type, None"),
        ({"lora_rank": 8}, "--lora-rank needs train_sota.py"),
    ],
)
def test_a_config_is_checked_like_a_command_line(configured, config, message):
    with refused("--config", message):
        configured(config)


YAML = """
model: resnet20
amp: off            # YAML reads this as false
lr: 1e-3            # and this as text
augment: none
model_arg: [shortcut=pad]
"""


@pytest.mark.parametrize("text", [YAML, "arguments:" + YAML.replace("\n", "\n  ")])
def test_a_config_may_be_yaml(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    args = resolve(train, "--config", path, "--epochs", 3)
    expected = ("resnet20", "off", 1e-3, "none", ["shortcut=pad"], 3)
    assert values(args, "model", "amp", "lr", "augment", "model_arg", "epochs") == expected


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: [", "is not valid YAML (line 1: "),
        ("lr: !!python/object/apply:os.system [exit]", "python/object/apply:os.system"),
        ("!!python/object/new:os.system [exit]", "is not valid YAML"),
        ("lr: !!timestamp x", "is not valid YAML"),
        (BOMB, "has an alias (*name): write its value instead"),
        ("lr: " + "x" * 60_000, "has 60004 characters, more than 50000"),
        ("[" * 30_000, "has more than 10 nested levels"),
        ("- lr", "holds no arguments"),
        ("1: 2", "holds no arguments"),
        ("lr: -1", "lr: must be a number, at least 0"),
        ("lrr: 1", "unknown argument 'lrr'; did you mean lr"),
        ("epochs: 2\n---\nepochs: 3", "is not valid YAML"),
    ],
)
def test_a_wrong_yaml_file_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "a.yml"
    path.write_text(text)
    with refused("--config", message) as error:
        resolve(train, "--config", path)
    assert error.value.status == 2


def test_a_config_without_arguments_is_refused(tmp_path):
    path = tmp_path / "a.json"
    with refused(f"--config {path}: No such file"):
        resolve(train, "--config", path)
    for text in ("", "{", "[1]", '{"arguments": 3}', "\xff", "[" * 10**5):
        path.write_text(text, encoding="latin1")
        with refused(f"--config {path}"):
            resolve(train, "--config", path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epoch", 3], "did you mean --epochs?"),
        (["--epochs"], "expected one argument"),
        (["--epochs", 0], "--epochs: must be an integer, at least 1, not '0'"),
        (["--lr", -0.1], "--lr: must be a number, at least 0, not '-0.1'"),
        (["--augment", "crop,flop"], "none or names from crop, flip"),
        (["--optimizer", "sdg"], "must be one of sgd, adam"),
        (["--optimizer", "timm/lamv"], "timm has no optimizer 'lamv'; the nearest names are lamb"),
        (["--momentum", 1], "at most"),
        (["--lora-rank", 8], "unknown argument --lora-rank"),
        (["--micro-batch", 8], "unknown argument --micro-batch"),
        (["--ema-device", "cpu"], "unknown argument --ema-device"),
        (["--fsdp"], "unknown argument --fsdp"),
    ],
)
def test_a_wrong_value_is_one_line_and_exit_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main([str(word) for word in argv])
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and message in lines[0]


def test_resume_previous_needs_a_run():
    with refused("--resume-previous needs --resume"):
        resolve(train, "--resume-previous")
