"""Exported models: the same logits, and a README whose code runs and gives the same."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers.errors import refused
from helpers.samples import write_checkpoint
from PIL import Image

import show_example
from show import export, predict

HOSTILE = ["a|b", "```\nimport os\n", "<b>", *"defghij"]


def load(path):
    return predict.Predictor(path, torch.device("cpu"))


ONNX = pytest.param("onnx", marks=pytest.mark.extras("onnxscript", "onnxruntime"))
SAFETENSORS = pytest.param("safetensors", marks=pytest.mark.slow)


def require(kind):
    if kind == "onnx":
        pytest.importorskip("onnxscript", reason="no onnxscript")
        pytest.importorskip("onnxruntime", reason="no onnxruntime")


@pytest.mark.parametrize("kind", [ONNX, "torchscript", SAFETENSORS])
def test_the_file_gives_the_checkpoints_logits_and_its_readme_runs(tmp_path, kind):
    require(kind)
    predictor, out = load(write_checkpoint(tmp_path / "run", classes=HOSTILE)), tmp_path / "out"
    assert "its logits are the checkpoint's" in export.export(predictor, kind, out)
    assert {path.name for path in out.iterdir()} == {"README.md", export.FORMATS[kind].file}
    card = (out / "README.md").read_text()
    for text in ("| epoch 3, the last |", "| 50.00 % (50 images) |", "a\\|b"):
        assert text in card

    pixels = torch.randint(0, 256, (40, 70, 3), dtype=torch.uint8)
    pixels[:, :35] //= 4  # a dark side, so that turning the image changes the answer
    exif = Image.Exif()
    exif[0x0112] = 6  # the image lies on its side
    Image.fromarray(pixels.numpy()).save(out / "image.png", exif=exif)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    environment = {**os.environ, "PYTHONPATH": str(Path(show_example.__file__).parent)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, env=environment)
    images, _ = predict.load_images([out / "image.png"], 32)
    top = predictor.logits(images).softmax(1)[0].topk(3)
    pairs = zip(top.indices.tolist(), top.values.tolist())
    assert done.stdout == "".join(f"{HOSTILE[c]} {100 * p:.1f} %\n" for c, p in pairs), done.stderr


SMALL = {"depth": 2, "width": 24, "heads": 2}
SMALL_TIMM = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}


@pytest.mark.parametrize("kind", [ONNX, "torchscript"])
@pytest.mark.parametrize(
    ("model", "options"),
    [("timm/vit_tiny_patch16_224", SMALL_TIMM), ("vit_custom", SMALL), ("vit_small_data", SMALL)],
)
def test_transformers_are_exported(tmp_path, kind, model, options):
    require(kind)
    predictor = load(write_checkpoint(tmp_path / "run", model=model, **options))
    assert "its logits are the checkpoint's" in export.export(predictor, kind, tmp_path / "out")


@pytest.mark.parametrize(
    ("split", "weights", "accuracy"),
    [
        ("test", "epoch 1, the best on the run's test images", "61.00 %"),
        ("val", "epoch 1, the best on held-out images", "50.00 %"),
    ],
)
def test_the_readme_has_the_accuracy_of_its_weights(tmp_path, split, weights, accuracy):
    metric = {"name": f"{split}_acc", "selected_on": split, "epoch": 1, "value": 61.0}
    card = export.readme(load(write_checkpoint(tmp_path / "run", metric=metric)), "safetensors")
    assert f"| {weights} |" in card and f"| {accuracy}" in card


def test_the_readme_has_no_markup_of_a_card(tmp_path):
    predictor = load(write_checkpoint(tmp_path / "run"))
    predictor.card |= {"seed": "0 |\n\n```python", "dataset": "<img src=x>"}
    config = {"arguments": {"limit_test": "<img src=y>"}}
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    text = export.readme(predictor, "safetensors")
    assert "<img" not in text and text.count("```") == 2 and "| seed | not known |" in text


def test_a_failing_exporter_gives_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no function for aten::strange\nmore of it")

    monkeypatch.setattr(torch.jit, "trace", fail)
    message = "resnet20 can't be exported as torchscript: no function for aten::strange"
    with refused(message):
        export.export(load(write_checkpoint(tmp_path / "run")), "torchscript", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_with_other_logits_is_not_written(tmp_path, monkeypatch):
    save_file = safetensors.torch.save_file

    def spoil(state, *arguments, **options):
        save_file(state | {"fc.bias": state["fc.bias"] + 1}, *arguments, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", spoil)
    with refused("the exported model's logits differ by"):
        export.export(load(write_checkpoint(tmp_path / "run")), "safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_foreign_readme_is_not_replaced(tmp_path):
    path, readme, out = write_checkpoint(tmp_path / "run"), tmp_path / "README.md", tmp_path / "out"
    command = ["--checkpoint", str(path), "--device", "cpu", "--export", "safetensors", "--output"]
    readme.write_text("# My project\n")
    with refused(f"{readme} was not written by --export") as error:
        show_example.main([*command, str(tmp_path)])
    assert error.value.status == 2 and readme.read_text() == "# My project\n"
    assert {each.name for each in tmp_path.iterdir()} == {"README.md", "run"}

    assert show_example.main([*command, str(out)]) == 0
    (out / "model.safetensors").unlink()
    assert show_example.main([*command, str(out)]) == 0  # its own README is replaced
    assert (out / "model.safetensors").is_file()
