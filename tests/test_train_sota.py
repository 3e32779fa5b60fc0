"""train_sota.py from end to end, on small copies: made to fit, adapted, tried out; what is refused."""

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, refused
from test_train import same_state, stop_after, untimed

import models
import train_sota
from common import checkpoint
from models import lora
from models.weights import load_checkpoint, load_weights
from training import memory

OPTIONS = dict(depth=2, embed_dim=48, num_heads=3)
EVA = "timm/eva_giant_patch14_336"
SMALL = (
    "--model",
    EVA,
    *(word for key, value in OPTIONS.items() for word in ("--model-arg", f"{key}={value}")),
    "--image-size",
    56,
    "--lr",
    1e-3,
    "--layer-decay",
    0.8,
)


@pytest.fixture
def train_small(train):
    return functools.partial(train, *SMALL, script=train_sota)


def arguments(directory):
    return json.loads((directory / "config.json").read_text())["arguments"]


def weights_of(directory, file="last.pt"):
    return checkpoint.load(directory / file)["state_dict"]


# ---- what a step needs -------------------------------------------------------------------------------------------------


def test_a_dry_run_of_the_largest_takes_little(tmp_path):
    """In a process of its own, whose memory is measured; that it is quick is no test's affair."""
    code = "import sys, torch, engine, train_sota; train_sota.main('--model eva_giant --dry-run --gpu-memory 80'.split()); "
    code += "print(engine.peak_memory_mb(torch.device('cpu')), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert 300 < float(done.stderr) < 3000
    assert "eva_giant, 336 px, 1000 classes: 1,013,005,672 parameters, 620.3 GMACs" in done.stdout
    for line in (
        "parameters 4.05, gradients 4.05, adamw's state 8.10, moving average 4.05",
        "--grad-checkpointing",
        "--ema-device cpu",
        "--lora-rank 16",
        "80.00 GB are free",
    ):
        assert line in done.stdout
    assert not list(tmp_path.iterdir())


def dry_run(capsys, *words):
    assert train_sota.main([str(word) for word in (*words, "--dry-run")]) == 0
    return capsys.readouterr().out


def test_a_dry_run_of_several_processes_is_printed_by_the_first(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    printed = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert train_sota.main(["--model", "resnet20", "--dry-run", "--gpu-memory", "8"]) == 0
        printed.append(capsys.readouterr().out)
    assert "GB are free" in printed[0] and printed[1] == ""


def test_a_dry_run_follows_the_arguments(capsys, tmp_path):
    text = dry_run(
        capsys, *SMALL, "--gpu-memory", 1e-3, "--batch-size", 64, "--dataset", "cifar100"
    )
    assert "56 px, 100 classes" in text and "does not fit" in text
    text = dry_run(
        capsys, *SMALL, "--gpu-memory", 24, "--micro-batch", 16, "--batch-size", 64, "--amp", "off"
    )
    assert (
        "for 16 images at once, 4 times for a batch of 64" in text
        and "float32 on cuda" in text
        and "fits" in text
    )
    for name in ("cats", "dogs", "newts"):
        (tmp_path / "train" / name).mkdir(parents=True)
    assert "3 classes" in dry_run(
        capsys, *SMALL, "--dataset", "folder", "--data-dir", tmp_path, "--device", "cpu"
    )
    assert "convnext_xxlarge, 256 px, 1000 classes: 846,471,016" in dry_run(
        capsys, "--model", "convnext_xxlarge"
    )


@pytest.mark.parametrize("name", ["resnet20", "timm/resnet10t", "hornet_tiny"])
def test_a_dry_run_says_what_does_not_go_with_a_model(capsys, name):
    text = dry_run(capsys, "--model", name, "--image-size", 32, "--gpu-memory", 24)
    assert (
        "--lora-rank 16                            not with this model\n" in text
        and "\n--freeze-backbone  " in text
    )


def test_a_run_says_first_what_it_needs(train_small, capsys):
    train_small("--epochs", 1)
    text = capsys.readouterr().out
    need, begin, epoch = (
        text.index(words) for words in ("images at once", "shapes: 96 training images", "epoch 1/1")
    )
    assert need < begin < epoch
    assert "moving average" in text and "GB are free, of which a tenth is spared: fits" in text


# ---- to make it fit ----------------------------------------------------------------------------------------------------


def test_a_run_that_was_cut_in_parts_goes_on_in_smaller_ones(train_small):
    """What to do after running out of memory; how a batch is cut was on the command line, and --accumulate would be refused."""
    cut = train_small(
        "--epochs",
        1,
        "--accumulate",
        2,
        "--schedule",
        "constant",
        "--warmup-epochs",
        0,
        "--ema-decay",
        0.5,
    )
    again = train_small("--resume", cut, "--epochs", 2, "--micro-batch", 8, "--device", "cpu")
    config = json.loads((again / "config.json").read_text())
    assert (config["arguments"]["micro_batch"], config["arguments"]["accumulate"]) == (8, 4)
    assert config["from"]["micro_batch"] == config["from"]["epochs"] == "command line"
    assert config["from"]["accumulate"] == "--micro-batch"


def test_parts_of_a_batch_are_accumulated(train_small):
    """The global batch stays: as many steps, and the same ones as with --accumulate."""
    cut = train_small("--epochs", 1, "--micro-batch", 12, output="cut")
    assert (arguments(cut)["micro_batch"], arguments(cut)["accumulate"]) == (12, 3)
    same = train_small("--epochs", 1, "--accumulate", 3, output="same")
    assert (arguments(same)["micro_batch"], arguments(same)["accumulate"]) == (0, 3)
    for name, value in weights_of(cut).items():
        assert torch.equal(value, weights_of(same)[name])
    assert len(untimed(cut)) == len(untimed(same))


def test_auto_is_what_fits_and_is_kept_when_a_run_goes_on(train_small, train, monkeypatch):
    """A run cut off on a machine with little memory goes on in the same parts on one with more."""
    with torch.device("meta"):
        model = models.create_model(EVA, 10, **OPTIONS, img_size=56)
    need = memory.training_need(model, 56, device="cpu", dtype=None, optimizer="adamw")
    need = replace(need, snapshot=need.host)  # on a CPU, a save's copy takes of the same memory
    monkeypatch.setattr(
        memory, "available", lambda device: need.total(10) / 0.9 - need.parameters + 100
    )
    options = ("--epochs", 2, "--amp", "off", "--drop-path", 0.2, "--grad-checkpointing")
    whole = train_small(*options, output="whole")
    assert arguments(whole)["micro_batch"] >= 10 and arguments(whole)["accumulate"] in (2, 3, 4)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        cut = train_small(*options, output="cut", status=143)
    monkeypatch.setattr(memory, "available", lambda device: 1e12)
    train("--resume", cut, script=train_sota)
    assert untimed(whole) == untimed(cut) and same_state(whole, cut)
    again = train_small("--config", cut / "config.json", "--epochs", 1, output="again")
    assert (arguments(again)["micro_batch"], arguments(again)["accumulate"]) == (
        32,
        1,
    )  # auto is found anew


def test_an_average_on_the_host_is_the_same_average(train_small):
    options = ("--epochs", 2, "--val-size", 20, "--ema-decay", 0.5)
    here = train_small(*options, output="here")
    host = train_small(*options, "--ema-device", "cpu", output="host")
    a, b = (checkpoint.load(directory / "last.pt") for directory in (here, host))
    for part in ("state_dict", "ema"):
        one, other = (x[part]["average"] if part == "ema" else x[part] for x in (a, b))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert untimed(here) == untimed(host)
    assert not all(
        torch.equal(value, a["state_dict"][key]) for key, value in a["ema"]["average"].items()
    )


# ---- adapters ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(5)
    path = tmp_path / "weights.pt"
    torch.save(models.create_model(EVA, 7, **OPTIONS, img_size=56).state_dict(), path)
    return path


@pytest.mark.extras("peft")
def test_adapters_learn_and_are_merged_into_plain_weights(train_small, weights, monkeypatch):
    pytest.importorskip("peft")
    directory = train_small(
        "--epochs", 2, "--weights", weights, "--lora-rank", 3, "--ema-decay", 0, "--amp", "off"
    )
    source = models.create_model(EVA, 10, **OPTIONS, img_size=56)
    load_weights(source, weights)
    monkeypatch.setitem(sys.modules, "peft", None)  # what was saved needs no peft
    trained, card = load_checkpoint(directory / "best.pt")
    layers = {f"{name}.weight" for name in lora.linear_layers(EVA, 10, 56, card["options"])}
    assert layers and not any(
        "qkv" in name for name in layers
    )  # this attention takes its weights without calling the layer
    before, after = source.state_dict(), trained.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == layers | {"head.weight", "head.bias"}
    for name in layers:
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= 3
    groups = checkpoint.load(directory / "last.pt")["training"]["optimizer"]["param_groups"]
    assert sum(len(group["params"]) for group in groups) == 2 * len(layers) + 2
    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(
            load_checkpoint(directory / "last.pt")[0](x), load_weights_into(source, directory)(x)
        )


def load_weights_into(model, directory):
    load_weights(model, directory / "last.pt")
    return model.eval()


@pytest.mark.extras("peft")
def test_merged_weights_are_the_model_with_adapters(weights):
    pytest.importorskip("peft")
    options = OPTIONS | dict(img_size=56)
    model = models.create_model(EVA, 10, **options).eval()
    lora.add_adapters(model, 4, lora.linear_layers(EVA, 10, 56, options))
    plain, x = models.create_model(EVA, 10, **options).eval(), torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        plain.load_state_dict(lora.merged(model.state_dict()))
        torch.testing.assert_close(plain(x), model(x))  # as it was: adapters begin at zero
        for name, p in model.named_parameters():
            if name.endswith((lora.UP, "head.weight")):  # the classifier, too, begins near zero
                torch.nn.init.normal_(p, std=0.1)
        wanted, state = model(x), model.state_dict()
        assert not torch.allclose(plain(x), wanted, atol=1e-3)
        plain.load_state_dict(lora.merged(state))
        torch.testing.assert_close(plain(x), wanted, rtol=1e-4, atol=1e-5)
        model.load_state_dict(lora.adapted(plain.state_dict(), state))
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    assert lora.merged(plain.state_dict()).keys() == plain.state_dict().keys()


@pytest.mark.extras("peft")
def test_an_interrupted_run_with_adapters_goes_on_to_the_same_bits(
    train_small, train, weights, monkeypatch
):
    pytest.importorskip("peft")
    options = (
        "--epochs",
        2,
        "--weights",
        weights,
        "--lora-rank",
        2,
        "--val-size",
        20,
        "--ema-decay",
        0.5,
        "--ema-device",
        "cpu",
    )
    whole = train_small(*options, output="whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        cut = train_small(*options, output="cut", status=143)
    weights.unlink()
    train("--resume", cut, script=train_sota)
    assert untimed(whole) == untimed(cut) and same_state(whole, cut)
    summary = json.loads((whole / "summary.json").read_text())
    assert (
        summary["reported"] == "best epoch on held-out images" and 0 <= summary["test_acc"] <= 100
    )


def test_without_peft_adapters_are_refused_in_one_line(train_small, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused("--lora-rank needs the peft library, which is not installed: pip install peft"):
        train_small("--lora-rank", 4)
    assert not (tmp_path / "run").exists()


# ---- tried out -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["eva02_large", "eva_giant", "convnext_xxlarge", "timm/resnet18", "vit_custom"]
)
def test_a_smoke_run_goes_the_whole_way(name, tmp_path, monkeypatch, few_shapes, capsys):
    from datasets import shapes

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "load_shapes", lambda: few_shapes)
    device = (
        [] if name == "vit_custom" else ["--device", "cpu"]
    )  # as the README has it, it is chosen
    assert train_sota.main(["--model", name, "--smoke", *device]) == 0
    text = capsys.readouterr().out
    (directory,) = (tmp_path / "runs").iterdir()
    assert "smoke" in directory.name and "from epoch 2, step 4" in text
    assert "smoke: trained, saved, evaluated, resumed; best.pt holds" in text
    config, summary = (
        json.loads((directory / f"{part}.json").read_text()) for part in ("config", "summary")
    )
    assert (
        summary["status"] == "finished" and summary["epochs"] == 2 and len(untimed(directory)) == 2
    )
    assert (config["arguments"]["accumulate"], config["arguments"]["batch_size"]) == (2, 16)
    assert not {"smoke", "dry_run", "gpu_memory"} & config["arguments"].keys()
    model, card = load_checkpoint(directory / "best.pt")
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters < 6e6 and model(
        torch.zeros(1, 3, card["image_size"], card["image_size"])
    ).shape == (1, 10)


# ---- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.extras("peft")
@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (("--image-size", 60), f"{EVA}: image size 60 is not a multiple of the patch, 14 px", 2),
        (
            ("--accumulate", 2, "--micro-batch", 4),
            "--accumulate and --micro-batch say the same in two ways",
            2,
        ),
        (
            ("--lora-rank", 2, "--freeze-backbone", "--augment", "none"),
            "--lora-rank trains what --freeze-backbone keeps",
            2,
        ),
        (("--lora-rank", 2, "--fsdp"), "--fsdp goes without --lora-rank and --ema-device cpu", 2),
        (
            ("--fsdp",),
            "--fsdp divides a model among processes: start them with torchrun --nproc-per-node=N",
            2,
        ),
        (("--smoke", "--dry-run"), "--smoke trains and --dry-run doesn't: give one of them", 2),
        (("--gpu-memory", 80), "--gpu-memory goes with --dry-run", 2),
        (
            ("--smoke", "--pretrained"),
            "--smoke tries a small copy with fresh weights: leave --pretrained out",
            2,
        ),
        (("--dry-run", "--dataset", "folder"), "--data-dir data has no train/<class>/", 2),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    train_small, tmp_path, arguments, message, status
):
    if "--lora-rank" in arguments:
        pytest.importorskip("peft")
    with refused(message) as error:
        train_small(*arguments)
    assert error.value.status == status and not (tmp_path / "run").exists()


def test_names_that_timm_has_not(script, tmp_path):
    done = script("train_sota.py", "--model", "timm/eva_gigantic", "--dry-run", cwd=tmp_path)
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and "timm has no model 'eva_gigantic'" in done.stderr
    )


def test_too_little_memory_is_said_before_anything_is_written(train_small, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    with refused(f"a step of {EVA} with one image needs", "--dry-run says what would make it fit"):
        train_small("--epochs", 1)
    assert not (tmp_path / "run").exists()


def test_running_out_of_memory_in_a_step_leaves_whole_files(train_small, monkeypatch):
    """As CUDA's allocator says it, in the second epoch."""
    steps, real = [], torch.optim.AdamW.step

    def step(self, *args, **options):
        steps.append(1)
        if len(steps) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with refused(
        "out of memory with 32 images of 56 px at once: try --micro-batch 16",
        "what was saved is whole",
    ):
        train_small("--epochs", 2)


def test_what_is_left_after_that_goes_on(train_small, train, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        test_running_out_of_memory_in_a_step_leaves_whole_files(train_small, patch)
    directory = tmp_path / "run"
    assert json.loads((directory / "summary.json").read_text())["status"] == "failed"
    assert not list(directory.glob(".*.tmp")) and load_checkpoint(directory / "last.pt")
    train("--resume", directory, "--micro-batch", 16, script=train_sota)
    assert arguments(directory)["accumulate"] == 2 and len(untimed(directory)) == 2
