"""train_sota.py from start to end on small copies of large models."""

import functools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers.errors import refused
from helpers.paths import ROOT
from helpers.runs import (
    CONSTANT,
    arguments,
    assert_same_training,
    files,
    last,
    read_json,
    rows,
    same,
    summary,
    words,
)

import models
import train_sota
from models import lora
from models.weights import load_checkpoint, load_weights
from training import distributed, fitting, memory
from training.arguments import resolve
from training.checks import check_fitting

EVA = "timm/eva_giant_patch14_336"
OPTIONS = dict(depth=2, embed_dim=48, num_heads=3)
MODEL = ["--model", EVA, "--image-size", 56]
MODEL += [word for key in OPTIONS for word in ("--model-arg", f"{key}={OPTIONS[key]}")]
SMALL = [*MODEL, *words("--lr 0.001 --layer-decay 0.8")]


@pytest.fixture
def train_small(train):
    return functools.partial(train, *SMALL, script=train_sota)


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(5)
    path = tmp_path / "weights.pt"
    torch.save(models.create_model(EVA, 7, **OPTIONS, img_size=56).state_dict(), path)
    return path


# ---- before training -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dry_run_of_the_largest_model_takes_little_memory(tmp_path):
    code = """
import sys, torch, train_sota
from training.devices import peak_memory_mb
train_sota.main("--model eva_giant --dry-run --gpu-memory 80".split())
print(peak_memory_mb(torch.device("cpu")), file=sys.stderr)
"""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}){code}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and 300 < float(done.stderr) < 3000, done.stderr
    for text in (
        "eva_giant, 336 px, 1000 classes: 1,013,005,672 parameters, 620.3 GMACs",
        "parameters 4.05, gradients 4.05, adamw's state 8.10, moving average 4.05",
        "80.00 GB are free",
        *("--grad-checkpointing", "--ema-device cpu", "--lora-rank 16"),
    ):
        assert text in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.fixture
def dry_run(capsys):
    def run(*options):
        assert train_sota.main([*map(str, options), "--dry-run"]) == 0
        return capsys.readouterr().out

    return run


def test_only_the_first_rank_prints_a_dry_run(dry_run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, printed in ((0, True), (1, False)):
        monkeypatch.setenv("RANK", str(rank))
        text = dry_run(*words("--model resnet20 --gpu-memory 8"))
        assert bool(text) == ("GB are free" in text) == printed


def test_a_dry_run_follows_the_arguments(dry_run, monkeypatch, tmp_path):
    text = dry_run(*MODEL, *words("--gpu-memory 0.001 --batch-size 64 --dataset cifar100"))
    assert "56 px, 100 classes" in text and "does not fit" in text
    text = dry_run(*MODEL, *words("--gpu-memory 24 --micro-batch 16 --batch-size 64 --amp off"))
    assert "for 16 images at once, 4 times for a batch of 64" in text
    assert "float32 on cuda" in text and text.count("fits") == 1
    text = dry_run(*MODEL, *words("--gpu-memory 24 --accumulate 4 --batch-size 64"))
    assert "for 16 images at once, 4 times for a batch of 64" in text
    text = dry_run(*MODEL, *words("--gpu-memory 24 --micro-batch 1000 --batch-size 64"))
    assert "for 64 images at once, 1 time for a batch of 64" in text
    monkeypatch.setenv("WORLD_SIZE", "8")
    text = dry_run(*MODEL, *words("--gpu-memory 24 --micro-batch 4 --batch-size 24"))
    assert "for 4 images at once, 1 time for a batch of 4" in text  # some ranks have two
    monkeypatch.delenv("WORLD_SIZE")
    for name in ("cats", "dogs", "newts"):
        (tmp_path / "train" / name).mkdir(parents=True)
    (tmp_path / "train" / ".hidden").mkdir()
    text = dry_run(*MODEL, *words("--device cpu --dataset folder --data-dir"), tmp_path)
    assert "3 classes" in text


@pytest.mark.parametrize("name", ["resnet20", "timm/resnet10t"])
def test_a_dry_run_names_what_a_model_does_not_support(dry_run, name):
    lines = dry_run("--model", name, "--image-size", 32, "--gpu-memory", 24).splitlines()
    (line,) = [line for line in lines if line.startswith("--lora-rank 16")]
    assert line.endswith("not with this model")
    assert any(line.startswith("--freeze-backbone") for line in lines)


@pytest.mark.slow
def test_a_smoke_run_of_options_that_an_epoch_more_would_change(train):
    options = words("--smoke --device cpu --accumulate 2 --schedule cosine --eval-every 2")
    options += words("--lookahead 2 --final-lr 0.1 --batch-size 64 --epochs 50 --val-size 5000")
    options += words("--patience 3 --limit-train 100")
    assert train_sota.main(["--model", "resnet20", *options]) == 0


@pytest.mark.slow
def test_a_run_of_train_py_can_be_resumed(train):
    """It keeps its parts of a batch, which change the statistics of batch norm."""
    directory = train("--epochs", 2, "--accumulate", 2, stop_after=4)
    assert train_sota.main(["--resume", str(directory), "--device", "cpu"]) == 0
    assert summary(directory)["status"] == "finished"
    values = arguments(directory)
    assert (values["accumulate"], values["micro_batch"]) == (2, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["eva02_large", "eva_giant", "convnext_xxlarge", "timm/resnet18", "vit_custom"]
)
def test_a_smoke_run_does_everything(train, tmp_path, capsys, name):
    assert train_sota.main(["--model", name, "--smoke", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    (directory,) = (tmp_path / "runs").iterdir()
    assert "smoke" in directory.name and "from epoch 2, step 4" in text
    assert "smoke: trained, saved, evaluated, resumed; best.pt holds" in text
    assert (summary(directory)["status"], summary(directory)["epochs"]) == ("finished", 2)
    values = arguments(directory)
    assert (values["accumulate"], values["batch_size"]) == (2, 16)
    assert not {"smoke", "dry_run", "gpu_memory"} & values.keys()
    model, card = load_checkpoint(directory / "best.pt")
    size = card["image_size"]
    assert sum(p.numel() for p in model.parameters()) < 6e6
    assert model(torch.zeros(1, 3, size, size)).shape == (1, 10)


# ---- fitting into memory -------------------------------------------------------------------------


@pytest.mark.slow
def test_parts_of_a_batch_take_the_same_steps(train_small, capsys):
    """A run prints what it needs first."""
    split = train_small("--epochs", 1, "--micro-batch", 12, output="split")
    text = capsys.readouterr().out
    positions = [text.index(part) for part in ("images at once", "96 training images", "epoch 1/1")]
    assert positions == sorted(positions) and "a tenth is kept spare: fits" in text
    assert (arguments(split)["micro_batch"], arguments(split)["accumulate"]) == (12, 3)
    accumulated = train_small("--epochs", 1, "--accumulate", 3, output="accumulated")
    assert arguments(accumulated)["micro_batch"] == 0
    assert same(last(split)["state_dict"], last(accumulated)["state_dict"])


@pytest.mark.slow
def test_a_run_resumes_in_smaller_parts(train_small, train):
    """Also if --accumulate was given at the start."""
    directory = train_small("--epochs", 1, "--accumulate", 2, *CONSTANT)
    train("--resume", directory, "--epochs", 2, "--micro-batch", 8, script=train_sota)
    config = read_json(directory / "config.json")
    assert (config["arguments"]["micro_batch"], config["arguments"]["accumulate"]) == (8, 4)
    assert config["from"]["micro_batch"] == config["from"]["epochs"] == "command line"
    assert config["from"]["accumulate"] == "--micro-batch"


@pytest.mark.slow
def test_automatic_parts_stay_when_a_run_resumes_with_more_memory(train_small, train, monkeypatch):
    with torch.device("meta"):
        model = models.create_model(EVA, 10, **OPTIONS, img_size=56)
    need = memory.training_need(model, 56, device="cpu", dtype=None, optimizer="adamw")
    need = replace(need, snapshot=need.host)  # on a CPU, a save's copy takes the same memory
    free = need.total(10) / memory.USABLE - need.parameters + 100
    monkeypatch.setattr(fitting, "available", lambda device: free)
    options = words("--epochs 2 --amp off --drop-path 0.2 --grad-checkpointing")
    expected = train_small(*options, output="expected")
    assert arguments(expected)["micro_batch"] >= 10 and arguments(expected)["accumulate"] > 1
    cut = train_small(*options, output="cut", stop_after=4)
    monkeypatch.setattr(fitting, "available", lambda device: 1e12)
    train("--resume", cut, script=train_sota)
    assert_same_training(cut, expected)
    # Another run with this config finds its own parts.
    repeated = train_small("--config", cut / "config.json", "--epochs", 1, output="repeated")
    assert (arguments(repeated)["micro_batch"], arguments(repeated)["accumulate"]) == (32, 1)


def test_too_little_memory_is_refused_before_anything_is_written(
    train_small, monkeypatch, tmp_path
):
    monkeypatch.setattr(fitting, "available", lambda device: 1000)
    message = (f"a step of {EVA} with one image needs", "--dry-run lists what would make it fit")
    with refused(*message):
        train_small("--epochs", 1)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_that_ran_out_of_memory_resumes_in_smaller_parts(train_small, train, tmp_path):
    directory, optimizer_step, steps = tmp_path / "run", torch.optim.AdamW.step, []

    def step(self, *args, **options):
        steps.append(1)
        if len(steps) == 4:  # in the second epoch
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return optimizer_step(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        message = "out of memory with 32 images of 56 px at once: try --micro-batch 16"
        with refused(message, "saved files are complete"):
            train_small("--epochs", 2)
    assert summary(directory)["status"] == "failed"
    assert not any(name.endswith(".tmp") for name in files(directory))
    train("--resume", directory, "--micro-batch", 16, script=train_sota)
    assert arguments(directory)["accumulate"] == 2 and len(rows(directory)) == 2


# ---- adapters ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.extras("peft")
def test_adapters_learn_and_are_merged_into_the_weights(train, train_small, weights, monkeypatch):
    pytest.importorskip("peft")
    options = words("--epochs 2 --lora-rank 3 --ema-decay 0 --amp off --weights")
    directory = train_small(*options, weights)
    monkeypatch.setitem(sys.modules, "peft", None)  # what was saved doesn't need it
    source = models.create_model(EVA, 10, **OPTIONS, img_size=56)
    load_weights(source, weights)
    trained, card = load_checkpoint(directory / "best.pt")
    layers = {f"{name}.weight" for name in lora.linear_layers(EVA, 10, 56, card["options"])}
    # This attention uses the weights of qkv without calling the layer.
    assert layers and not any("qkv" in name for name in layers)
    before, after = source.state_dict(), trained.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == layers | {"head.weight", "head.bias"}
    for name in layers:
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= 3
    groups = last(directory)["training"]["optimizer"]["param_groups"]
    assert sum(len(group["params"]) for group in groups) == 2 * len(layers) + 2
    load_weights(source, directory / "last.pt")
    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        loaded = load_checkpoint(directory / "last.pt")[0]
        torch.testing.assert_close(loaded(x), source.eval()(x))
    with refused("can't resume", "--lora-rank needs train_sota.py"):
        train("--resume", directory)


@pytest.mark.extras("peft")
def test_merged_weights_are_the_model_with_adapters():
    pytest.importorskip("peft")
    options = OPTIONS | dict(img_size=56)
    model, plain = (models.create_model(EVA, 10, **options).eval() for _ in range(2))
    lora.add_adapters(model, 4, lora.linear_layers(EVA, 10, 56, options))
    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        plain.load_state_dict(lora.merged(model.state_dict()))
        torch.testing.assert_close(plain(x), model(x))  # adapters start at zero
        for name, p in model.named_parameters():
            if name.endswith((lora.UP, "head.weight")):
                torch.nn.init.normal_(p, std=0.1)
        expected, state = model(x), model.state_dict()
        assert not torch.allclose(plain(x), expected, atol=1e-3)
        plain.load_state_dict(lora.merged(state))
        torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)
        model.load_state_dict(lora.adapted(plain.state_dict(), state))
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["resnet18", "airbench94"])
def test_a_model_without_adapters_is_refused_before_its_data_is_loaded(train, monkeypatch, model):
    monkeypatch.setattr(lora, "require_peft", lambda: None)
    monkeypatch.setattr(train_sota.data, "load", None)
    with refused("--lora-rank"):
        train("--model", model, "--lora-rank", 8, script=train_sota)


def test_a_model_that_cannot_be_sharded_is_refused_before_its_data_is_loaded(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    args, _ = resolve(train_sota.build_parser(), words("--model timm/dm_nfnet_f0 --fsdp"))
    with refused("--fsdp can't shard", "a single number"):
        check_fitting(args, None)


def test_adapters_without_peft_are_refused(train_small, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused("--lora-rank needs the peft library, which is not installed: pip install peft"):
        train_small("--lora-rank", 4)
    assert not (tmp_path / "run").exists()


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--image-size 60", "image size 60 is not a multiple of the patch, 14 px"),
        ("--smoke --dry-run", "--smoke trains and --dry-run doesn't: give one of them"),
        ("--smoke --pretrained", "--smoke trains fresh weights: leave --pretrained out"),
        ("--gpu-memory 80", "--gpu-memory needs --dry-run"),
        ("--dry-run --dataset folder", "--data-dir data has no train/<class>/"),
        ("--dry-run --model timm/eva_gigantic", "timm has no model 'eva_gigantic'"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(train_small, tmp_path, options, message):
    with refused("", message) as error:
        train_small(*words(options))
    assert error.value.status == 2 and not (tmp_path / "run").exists()
