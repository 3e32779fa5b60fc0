"""Predictions of a checkpoint: the same as the model's, for test pictures and for files of any size."""

import json
import re

import pytest
import torch
from helpers.samples import write_checkpoint

import data
import show_example
from common.errors import UserError
from datasets import shapes
from models.weights import load_checkpoint
from show import assess, predict


@pytest.fixture
def path(tmp_path, monkeypatch, few_shapes):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "load_shapes", lambda: few_shapes)
    return write_checkpoint(tmp_path / "run")


def show(*arguments):
    assert show_example.main(["--device", "cpu", "--checkpoint", *map(str, arguments)]) == 0


def test_a_run_of_train_is_shown_from_its_directory_and_its_last_checkpoint_by_its_average(
    train, capsys
):
    run = train("--epochs", 1, "--ema-decay", 0.5)
    capsys.readouterr()
    show(run)
    assert len(capsys.readouterr().out.splitlines()) == 17
    assert (run / "examples.png").read_bytes().startswith(b"\x89PNG")
    from common import checkpoint

    average = checkpoint.load(run / "last.pt")["ema"]["average"]
    last = load_checkpoint(run / "last.pt")[0]
    assert torch.equal(last.fc.weight, average["fc.weight"]) and not last.training


def test_the_shown_probabilities_are_the_models(path, capsys):
    show(path, "--index", 5, 7, "--topk", 2)
    lines = capsys.readouterr().out.splitlines()[-3:-1]
    model, card = load_checkpoint(path)
    test = data.load("shapes", limit_test=50).test  # the run's test split
    images = test.images[[5, 7]].float() / 255
    x = (images - torch.tensor(card["mean"]).view(3, 1, 1)) / torch.tensor(card["std"]).view(
        3, 1, 1
    )
    values, classes = model(x).softmax(1).topk(2)
    for line, index, p, c in zip(lines, (5, 7), values.tolist(), classes.tolist()):
        truth = shapes.SHAPES[test.labels[index]]
        wanted = f"test {index} ({truth}): " + ", ".join(
            f"{shapes.SHAPES[k]} {100 * v:.1f} %" for k, v in zip(c, p)
        )
        assert line == wanted


def test_random_pictures_follow_the_seed(path, capsys):
    shown = []
    for seed in ("1", "1", "2"):
        show(path, "--index", "-1", "-1", "--seed", seed)
        shown.append(re.findall(r"^test (\d+)", capsys.readouterr().out, re.M))
    assert shown[0] == shown[1] != shown[2] and len(set(shown[0])) == 2


def test_picture_files_of_any_size_and_mode(path, tmp_path, capsys):
    from PIL import Image

    Image.new("L", (90, 40), 100).save(tmp_path / "gray.png")
    Image.new("RGBA", (10, 300), (1, 2, 3, 4)).save(tmp_path / "tall.png")
    show(path, "--image", "gray.png", "tall.png", "--explain", "--output", "x.png")
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0].startswith("gray.png: ")
        and lines[1].startswith("tall.png: ")
        and (tmp_path / "x.png").exists()
    )


def test_mistakes_come_with_the_surest_first(path, capsys):
    show(path, "--errors", "--count", 6, "--json")
    found = json.loads(capsys.readouterr().out)
    tops = [picture["answers"][0]["top"][0] for picture in found["pictures"]]
    assert all(top["class"] != picture["truth"] for top, picture in zip(tops, found["pictures"]))
    sure = [top["probability"] for top in tops]
    assert (
        sure == sorted(sure, reverse=True)
        and len(sure) == 6
        and found["picture_file"].endswith("run/errors.png")
    )
    logits = torch.tensor([[9.0, 0], [0, 5.0], [3.0, 0]])
    assert predict.mistakes(logits, torch.tensor([1, 0, 0]), 5) == [0, 1]


def test_without_a_mistake_nothing_is_drawn(path, capsys, monkeypatch):
    monkeypatch.setattr(predict, "mistakes", lambda *arguments: [])
    show(path, "--errors")
    said = capsys.readouterr()
    assert (
        "no mistakes on all 50 test pictures" in said.err
        and not (path.parent / "errors.png").exists()
    )


def test_two_checkpoints_are_shown_where_they_disagree(path, tmp_path, capsys):
    other = write_checkpoint(tmp_path / "other", seed=1)
    show(path, other.parent, "--count", 3, "--json")
    found = json.loads(capsys.readouterr().out)
    answers = [
        [answer["top"][0]["class"] for answer in picture["answers"]]
        for picture in found["pictures"]
    ]
    assert (
        0 < len(answers) <= 3
        and all(a != b for a, b in answers)
        and (path.parent / "compare.png").is_file()
    )
    show(path, other, "--index", 4)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[3] for line in lines[:2]] == ["run:", "other:"]
    logits = [torch.tensor([[9.0, 0], [9, 0], [1, 0]]), torch.tensor([[5.0, 0], [0, 9], [0, 1]])]
    assert predict.disagreements(logits, 5) == [1, 2]


def test_several_checkpoints_must_know_the_same_classes(path, tmp_path):
    other = write_checkpoint(tmp_path / "other", classes=["a", "b"])
    with pytest.raises(UserError, match="know other classes"):
        show(path, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--index", "50"], "pictures 0 to 49"),
        (["--index", "-2"], "--index -2"),
        (["--image", "nothing.png"], "no picture file nothing"),
        (["--image", "text.png"], "can't be read as a picture"),
        (["--image", "a", "--index", "1"], "together"),
        (["--report", "--export", "onnx"], "together"),
        (["--checkpoint", "nothing.pt"], "no checkpoint nothing.pt"),
        (["--checkpoint", "text.png"], "text.png"),
        (["--checkpoint", "a", "b", "--report"], "--report takes one checkpoint"),
        (["--dataset", "folder", "--data-dir", "nowhere"], "no folder nowhere"),
        (["--output", "no/where.png"], "--output"),
        (["--output", "picture.bmp"], "must end in"),
    ],
)
def test_what_can_not_be_shown_is_named(path, tmp_path, arguments, message):
    (tmp_path / "text.png").write_text("no picture")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as refused:
        show_example.main(["--checkpoint", str(path), "--device", "cpu", *arguments])
    assert "\n" not in str(refused.value) and set(tmp_path.rglob("*")) == before


def test_a_checkpoint_of_an_unknown_model_is_named(path):
    from common import checkpoint

    contents = checkpoint.load(path)
    contents["card"]["model"] = "resnet7"
    checkpoint.save(contents, path)
    with pytest.raises(UserError, match="unknown model 'resnet7'"):
        show(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mean", "abc"),
        ("mean", [0.1, 0.2, float("nan")]),
        ("std", [0.2, 0.2, 0.0]),
        ("image_size", "32"),
        ("image_size", 10**9),
        ("image_size", 0),
        ("classes", 5),
        ("classes", ["a"]),
        ("classes", list(range(10))),
        ("dataset", 5),
        ("source", None),
    ],
)
def test_a_card_that_can_not_be_used_is_refused(path, tmp_path, key, value):
    from common import checkpoint

    contents = checkpoint.load(path)
    contents["card"][key] = value
    checkpoint.save(contents, path)
    with pytest.raises(UserError, match=rf"\A\S+best.pt .*\b{key}\Z"):
        show(path, "--index", 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.complex64])
def test_weights_of_another_type_are_refused(path, dtype):
    from common import checkpoint

    contents = checkpoint.load(path)
    contents["state_dict"]["fc.weight"] = contents["state_dict"]["fc.weight"].to(dtype)
    checkpoint.save(contents, path)
    with pytest.raises(
        UserError, match=rf"\A\S+best.pt was refused: it has weights of type {dtype}\Z"
    ):
        show(path, "--index", 1)


def test_classes_of_a_foreign_checkpoint_have_no_hold_on_the_terminal(tmp_path, capsys):
    from PIL import Image

    path = write_checkpoint(tmp_path / "run", classes=[f"\33[{i}J\n" for i in range(10)])
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    show(path, "--image", tmp_path / "a.png", "--topk", 10)
    out = capsys.readouterr().out
    assert (
        out.count("?[") == 10
        and len(out.splitlines()) == 2
        and all(line.isprintable() for line in out.splitlines())
    )
    robust = {"pictures": 1, "mean": 1.0, "clean": 1.0, "by_corruption": {"fog": [1.0]}}
    found = {
        "dataset": "\33[2J",
        "pictures": 1,
        "accuracy": 1.0,
        "top5": 1.0,
        "calibration_error": 1.0,
        "robustness": robust,
        "weights": "\33[2J",
    }
    said = assess.in_words(found | {"classes": ["\33[2J\n", "b"], "by_class": [1.0, 2.0]})
    assert len(said.splitlines()) == 5 and all(line.isprintable() for line in said.splitlines())
