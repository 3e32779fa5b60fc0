"""Exported models: the same logits, and a README whose code runs and says the same."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from helpers.samples import write_checkpoint

import show_example
from common.errors import UserError
from show import export, predict

HOSTILE = ["a|b", "```\nimport os\n", "<b>", *"defghij"]


def turned():
    """EXIF data of a camera that was held upright: the image lies on its side."""
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.extras("onnxscript", "onnxruntime")
@pytest.mark.parametrize("kind", export.FILES)
def test_the_file_gives_the_checkpoints_logits_and_its_readme_runs(tmp_path, kind):
    if kind == "onnx":
        pytest.importorskip("onnxscript", reason="no onnxscript")
        pytest.importorskip("onnxruntime", reason="no onnxruntime")
    from PIL import Image

    predictor = predict.Predictor(
        write_checkpoint(tmp_path / "run", classes=HOSTILE), torch.device("cpu")
    )
    line = export.export(predictor, kind, tmp_path / "out")
    assert "its logits are the checkpoint's" in line
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        export.FILES[kind],
    ]

    card = (tmp_path / "out/README.md").read_text()
    assert (
        "| epoch 3, the last |" in card and "| 50.00 % (50 pictures) |" in card and "a\\|b" in card
    )
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    pixels = torch.randint(0, 256, (40, 70, 3), dtype=torch.uint8)
    pixels[:, :35] //= 4  # a dark side, so that turning the image changes the answer
    Image.fromarray(pixels.numpy()).save(tmp_path / "out/picture.png", exif=turned())
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "out",
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    images, _ = predict.load_pictures([tmp_path / "out/picture.png"], 32)
    top = predictor.logits(images).softmax(1)[0].topk(3)
    wanted = "".join(
        f"{HOSTILE[c]} {100 * p:.1f} %\n" for c, p in zip(top.indices.tolist(), top.values.tolist())
    )
    assert done.stdout == wanted, done.stderr


@pytest.mark.extras("onnxscript", "onnxruntime")
@pytest.mark.parametrize("kind", ["onnx", "torchscript"])
@pytest.mark.parametrize(
    ("model", "options"),
    [
        (
            "timm/vit_tiny_patch16_224",
            {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2},
        ),
        ("vit_custom", {"depth": 2, "width": 24, "heads": 2}),
        ("vit_small_data", {"depth": 2, "width": 24, "heads": 2}),
    ],
)
def test_a_transformer_is_exported_too(tmp_path, kind, model, options):
    if kind == "onnx":
        pytest.importorskip("onnxscript", reason="no onnxscript")
        pytest.importorskip("onnxruntime", reason="no onnxruntime")
    predictor = predict.Predictor(
        write_checkpoint(tmp_path / "run", model=model, **options), torch.device("cpu")
    )
    assert "its logits are the checkpoint's" in export.export(predictor, kind, tmp_path / "out")


@pytest.mark.parametrize(
    ("on", "says"),
    [
        ("test", ("epoch 1, the best on these test pictures", "61.00 %")),
        ("val", ("epoch 1, the best on held-out pictures", "50.00 %")),
    ],
)
def test_the_card_has_the_accuracy_of_its_own_weights(tmp_path, on, says):
    path = write_checkpoint(
        tmp_path / "run", metric={"name": f"{on}_acc", "selected_on": on, "epoch": 1, "value": 61.0}
    )
    card = export.readme(predict.Predictor(path, torch.device("cpu")), "safetensors")
    assert all(f"| {word}" in card for word in says)


def test_a_model_that_an_exporter_does_not_know_is_one_line_and_leaves_nothing(
    tmp_path, monkeypatch
):
    def fail(*arguments):
        raise RuntimeError("no function for aten::strange\nmore of it")

    monkeypatch.setattr(export, "_write_torchscript", fail)
    predictor = predict.Predictor(write_checkpoint(tmp_path / "run"), torch.device("cpu"))
    with pytest.raises(
        UserError,
        match=r"\Aresnet20 can't be exported as torchscript: no function for aten::strange\Z",
    ):
        export.export(predictor, "torchscript", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_gives_other_logits_is_not_written(tmp_path, monkeypatch):
    predictor = predict.Predictor(write_checkpoint(tmp_path / "run"), torch.device("cpu"))
    write = export._write_safetensors

    def spoil(model, images, card, path):
        write(model, images, card, path)
        model.model.fc.bias.data += 1

    monkeypatch.setattr(export, "_write_safetensors", spoil)
    with pytest.raises(UserError, match="logits differ by"):
        export.export(predictor, "safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_readme_of_somebody_else_is_not_replaced(tmp_path):
    path = write_checkpoint(tmp_path / "run")
    readme = tmp_path / "README.md"
    command = ["--checkpoint", str(path), "--device", "cpu", "--export", "safetensors", "--output"]
    readme.write_text("# My project\n")
    with pytest.raises(
        UserError, match=r"\A\S+README.md was not written by --export: .*\Z"
    ) as refused:
        show_example.main([*command, str(tmp_path)])
    assert refused.value.status == 2 and readme.read_text() == "# My project\n"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["README.md", "run"]

    assert show_example.main([*command, str(tmp_path / "out")]) == 0
    (tmp_path / "out/model.safetensors").unlink()
    assert show_example.main([*command, str(tmp_path / "out")]) == 0  # its own is replaced
    assert (tmp_path / "out/model.safetensors").is_file()
