"""Predictions of a checkpoint: the same as the model's, for test pictures and for files of any size."""

import re

import pytest
import torch

import data
import show_example
import sources
from errors import UserError
from models.weights import load_checkpoint


@pytest.fixture
def checkpoint_path(train):
    return train("--epochs", 2, "--ema-decay", 0.5) / "best.pt"


def test_sixteen_test_pictures_by_default(checkpoint_path, capsys):
    capsys.readouterr()
    assert show_example.main(["--checkpoint", str(checkpoint_path), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 17 and (checkpoint_path.parent / "examples.png").read_bytes().startswith(b"\x89PNG")


def test_the_shown_probabilities_are_the_models(checkpoint_path, capsys):
    arguments = ["--checkpoint", str(checkpoint_path), "--index", "5", "7", "--topk", "2", "--device", "cpu"]
    show_example.main(arguments)
    lines = capsys.readouterr().out.splitlines()[-3:-1]
    model, card = load_checkpoint(checkpoint_path)
    test = data.load("shapes", limit_test=50).test  # the run's test split
    images = test.images[[5, 7]].float() / 255
    x = (images - torch.tensor(card["mean"]).view(3, 1, 1)) / torch.tensor(card["std"]).view(3, 1, 1)
    values, classes = model(x).softmax(1).topk(2)
    for line, index, p, c in zip(lines, (5, 7), values.tolist(), classes.tolist()):
        truth = sources.SHAPES[test.labels[index]]
        wanted = f"test {index} ({truth}): " + ", ".join(f"{sources.SHAPES[k]} {100 * v:.1f} %" for k, v in zip(c, p))
        assert line == wanted


def test_the_last_checkpoint_shows_its_average(checkpoint_path):
    best, last = load_checkpoint(checkpoint_path)[0], load_checkpoint(checkpoint_path.parent / "last.pt")[0]
    import checkpoint

    average = checkpoint.load(checkpoint_path.parent / "last.pt")["ema"]["average"]
    assert torch.equal(last.fc.weight, average["fc.weight"]) and not best.training and not last.training


def test_random_pictures_follow_the_seed(checkpoint_path, capsys):
    capsys.readouterr()
    shown = []
    for seed in ("1", "1", "2"):
        show_example.main(["--checkpoint", str(checkpoint_path), "--index", "-1", "-1", "--seed", seed, "--device", "cpu"])
        shown.append(re.findall(r"^test (\d+)", capsys.readouterr().out, re.M))
    assert shown[0] == shown[1] != shown[2] and len(set(shown[0])) == 2


def test_picture_files_of_any_size_and_mode(checkpoint_path, tmp_path, capsys):
    from PIL import Image

    Image.new("L", (90, 40), 100).save(tmp_path / "gray.png")
    Image.new("RGBA", (10, 300), (1, 2, 3, 4)).save(tmp_path / "tall.png")
    capsys.readouterr()
    files = [str(tmp_path / name) for name in ("gray.png", "tall.png")]
    show_example.main(["--checkpoint", str(checkpoint_path), "--image", *files, "--device", "cpu", "--output", "x.png"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("gray.png: ") and lines[1].startswith("tall.png: ") and (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--index", "50"], "pictures 0 to 49"),
        (["--index", "-2"], "--index -2"),
        (["--image", "nothing.png"], "no picture nothing"),
        (["--image", "text.png"], "can't be read as a picture"),
        (["--image", "a", "--index", "1"], "together"),
        (["--checkpoint", "nothing.pt"], "no checkpoint nothing.pt"),
        (["--checkpoint", "text.png"], "text.png"),
        (["--dataset", "folder", "--data-dir", "nowhere"], "no folder nowhere"),
        (["--output", "no/where.png"], "--output"),
    ],
)
def test_what_can_not_be_shown_is_named(checkpoint_path, tmp_path, arguments, message):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match=message) as refused:
        show_example.main(["--checkpoint", str(checkpoint_path), "--device", "cpu", *arguments])
    assert "\n" not in str(refused.value)
