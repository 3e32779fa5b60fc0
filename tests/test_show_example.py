"""Predictions of a checkpoint: those of its model, for test images and for files of any size."""

import json
import re

import pytest
import torch
from helpers.errors import refused
from helpers.samples import write_checkpoint
from PIL import Image

import data
import show_example
from analysis import figures
from common import checkpoint
from datasets import shapes
from models.weights import load_checkpoint
from show import assess, predict

CPU = torch.device("cpu")


@pytest.fixture
def path(tmp_path, monkeypatch, few_shapes):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "load_shapes", lambda: few_shapes)
    return write_checkpoint(tmp_path / "run")


@pytest.fixture
def show(capsys):
    """Runs the script and returns what it prints."""

    def run(*arguments):
        capsys.readouterr()
        assert show_example.main(["--device", "cpu", "--checkpoint", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("options", [("--index", 3), ("--report", "--corrupted", 10)])
def test_a_figure_is_also_shown_in_a_window(path, show, monkeypatch, options):
    plt, windows = figures.pyplot(), []
    monkeypatch.setattr(figures, "has_display", lambda: True)
    monkeypatch.setattr(plt, "show", lambda: windows.extend(plt.get_fignums()))
    show(path, *options, "--show")
    plt.close("all")
    assert len(windows) == 1 and list(path.parent.glob("*.png"))


def test_running_out_of_memory_is_one_line(path, show, monkeypatch):
    def out_of_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(predict, "load_all", out_of_memory)
    with refused("out of memory: free some memory (CUDA out of memory)"):
        show(path)


@pytest.mark.slow
def test_a_run_is_shown_by_its_moving_average(train, show):
    run = train("--epochs", 1, "--ema-decay", 0.5)
    assert len(show(run).splitlines()) == 17
    assert (run / "examples.png").read_bytes().startswith(b"\x89PNG")
    average = checkpoint.load(run / "last.pt")["ema"]["average"]
    last = load_checkpoint(run / "last.pt")[0]
    assert torch.equal(last.fc.weight, average["fc.weight"]) and not last.training


def test_the_shown_probabilities_are_the_models(path, show):
    lines = show(path, "--index", 5, 7, "--topk", 2).splitlines()
    model, card = load_checkpoint(path)
    test = data.load("shapes", limit_test=50).test  # the run's test split
    mean, std = (torch.tensor(card[key]).view(3, 1, 1) for key in ("mean", "std"))
    top = model((test.images[[5, 7]] / 255 - mean) / std).softmax(1).topk(2)
    for line, i, classes, values in zip(lines, (5, 7), top.indices.tolist(), top.values.tolist()):
        guesses = (f"{shapes.SHAPES[c]} {100 * p:.1f} %" for c, p in zip(classes, values))
        assert line == f"test {i} ({shapes.SHAPES[test.labels[i]]}): {', '.join(guesses)}"


def test_other_images_are_not_limited_as_those_of_the_run(path, tmp_path):
    for part in ("train", "test"):
        for name in shapes.SHAPES:
            (tmp_path / "mine" / part / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / "mine" / part / name / "0.png")
    other = write_checkpoint(tmp_path / "other", classes=sorted(shapes.SHAPES))
    assert len(predict.test_split(predict.load_all([path], CPU)).test) == 50
    mine = dict(dataset="folder", data_dir=str(tmp_path / "mine"))
    assert len(predict.test_split(predict.load_all([other], CPU), **mine).test) == 10


def test_a_damaged_config_is_as_none(path, few_shapes):
    for limit in ("all", True, -5):
        arguments = {"dataset": ["x"], "data_dir": None, "limit_test": limit}
        (path.parent / "config.json").write_text(json.dumps({"arguments": arguments}))
        predictor = predict.Predictor(path, torch.device("cpu"))
        assert len(predict.test_split([predictor]).test) == len(few_shapes.test)


def test_random_images_follow_the_seed(path, show):
    outputs = [show(path, "--index", "-1", "-1", "--seed", seed) for seed in (1, 1, 2)]
    shown = [re.findall(r"^test (\d+)", output, re.M) for output in outputs]
    assert shown[0] == shown[1] != shown[2] and len(set(shown[0])) == 2


def test_image_files_of_any_size_and_mode_are_shown(path, tmp_path, show):
    Image.new("L", (90, 40), 100).save(tmp_path / "gray.png")
    Image.new("RGBA", (10, 300), (1, 2, 3, 4)).save(tmp_path / "tall.png")
    lines = show(path, "--image", "gray.png", "tall.png", "--explain", "--output", "x.png")
    assert re.match(r"gray.png: .*\ntall.png: ", lines) and (tmp_path / "x.png").exists()


def test_mistakes_are_shown_the_most_confident_first(path, show):
    result = json.loads(show(path, "--errors", "--count", 6, "--json"))
    tops = [image["answers"][0]["top"][0] for image in result["images"]]
    assert all(top["class"] != image["truth"] for top, image in zip(tops, result["images"]))
    confidence = [top["probability"] for top in tops]
    assert confidence == sorted(confidence, reverse=True) and len(confidence) == 6
    assert result["figure"].endswith("run/errors.png")
    logits = torch.tensor([[9.0, 0], [0, 5.0], [3.0, 0]])
    assert predict.mistakes(logits, torch.tensor([1, 0, 0]), 5) == [0, 1]


def test_without_a_mistake_nothing_is_drawn(path, capsys, monkeypatch):
    monkeypatch.setattr(predict, "mistakes", lambda *arguments: [])
    show_example.main(["--device", "cpu", "--checkpoint", str(path), "--errors"])
    assert "no mistakes on 50 test images" in capsys.readouterr().err
    assert not (path.parent / "errors.png").exists()


def test_two_checkpoints_are_shown_where_they_disagree(path, tmp_path, show):
    other = write_checkpoint(tmp_path / "other", seed=1)
    result = json.loads(show(path, other.parent, "--count", 3, "--json"))
    for image in result["images"]:
        first, second = (answer["top"][0]["class"] for answer in image["answers"])
        assert first != second
    assert 0 < len(result["images"]) <= 3 and (path.parent / "compare.png").is_file()
    lines = show(path, other, "--index", 4).splitlines()
    assert [line.split(" ")[3] for line in lines[:2]] == ["run:", "other:"]
    logits = [torch.tensor([[9.0, 0], [9, 0], [1, 0]]), torch.tensor([[5.0, 0], [0, 9], [0, 1]])]
    assert predict.disagreements(logits, 5) == [1, 2]


def test_several_checkpoints_must_have_the_same_classes(path, tmp_path, show):
    other = write_checkpoint(tmp_path / "other", classes=["a", "b"])
    with refused(path, " and ", other, " can't be compared: their classes differ"):
        show(path, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--index 50", "images 0 to 49"),
        ("--index -2", "--index -2"),
        ("--image nothing.png", "no image file nothing"),
        ("--image text.png", "can't be read as an image"),
        ("--image a --index 1", "together"),
        ("--report --export onnx", "together"),
        ("--export onnx --show", "--show needs a figure: --export draws none"),
        ("--report --explain", "--explain has no meaning with --report"),
        ("--corrupted 100", "--corrupted needs --report"),
        ("--port 80", "--port needs --serve"),
        ("--image a --dataset cifar10", "--dataset has no meaning with --image"),
        ("--checkpoint nothing.pt", "no checkpoint nothing.pt"),
        ("--checkpoint text.png", "text.png"),
        ("--checkpoint a b --report", "--report takes one checkpoint"),
        ("--dataset folder --data-dir nowhere", "no folder nowhere"),
        ("--output no/where.png", "--output"),
        ("--output image.bmp", "image.bmp"),
    ],
)
def test_what_can_not_be_shown_is_named(path, tmp_path, show, arguments, message):
    (tmp_path / "text.png").write_text("no image")
    before = set(tmp_path.rglob("*"))
    with refused("") as error:
        show(path, *arguments.split())
    assert message in str(error.value) and set(tmp_path.rglob("*")) == before


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
        ("model", "resnet7"),
    ],
)
def test_an_unusable_card_is_refused(path, show, key, value):
    contents = checkpoint.load(path)
    contents["card"][key] = value
    checkpoint.save(contents, path)
    with refused(path, key):
        show(path, "--index", 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.complex64])
def test_weights_of_another_type_are_refused(path, show, dtype):
    contents = checkpoint.load(path)
    contents["state_dict"]["fc.weight"] = contents["state_dict"]["fc.weight"].to(dtype)
    checkpoint.save(contents, path)
    with refused(path, f" was refused: it has weights of type {dtype}"):
        show(path, "--index", 1)


def test_statistics_of_another_type_are_refused(path, show):
    contents = checkpoint.load(path)
    weights = contents["state_dict"]
    name = next(name for name in weights if name.endswith("running_mean"))
    weights[name] = weights[name].double()
    checkpoint.save(contents, path)
    with refused(path, " was refused: it has weights of type torch.float64"):
        show(path, "--index", 1)


def test_an_image_size_that_the_model_does_not_take_is_refused(tmp_path, path, show):
    path = write_checkpoint(tmp_path / "vit", model="vit_custom", depth=1)
    contents = checkpoint.load(path)
    contents["card"]["image_size"] = 64
    checkpoint.save(contents, path)
    with refused("vit_custom can't take images of 64 px"):
        show(path, "--index", 1)


def test_class_names_can_not_control_the_terminal(tmp_path, show):
    path = write_checkpoint(tmp_path / "run", classes=[f"\33[{i}J\n" for i in range(10)])
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    output = show(path, "--image", tmp_path / "a.png", "--topk", 10)
    assert output.count("?[") == 10 and len(output.splitlines()) == 2
    assert all(line.isprintable() for line in output.splitlines())


def test_class_names_can_not_control_the_terminal_in_a_report():
    robustness = {"mean": 1.0, "clean": 1.0, "by_corruption": {"fog": [1.0]}, "images": 1}
    result = {"accuracy": 1.0, "top5": 1.0, "calibration_error": 1.0, "robustness": robustness}
    result |= {"classes": ["\33[2J\n", "b"], "by_class": [1.0, 2.0], "images": 1}
    summary = assess.summary(result | {"dataset": "\33[2J", "weights": "\33[2J"})
    assert len(summary.splitlines()) == 5
    assert all(line.isprintable() for line in summary.splitlines())


def test_batches_become_smaller_until_they_fit(path, few_shapes, monkeypatch):
    predictor, sizes = predict.Predictor(path, CPU), []
    expected, model = predictor.logits(few_shapes.test.images), predictor.model

    def limited(inputs):
        sizes.append(len(inputs))
        if len(inputs) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model(inputs)

    monkeypatch.setattr(predictor, "model", limited)
    limit = 20
    torch.testing.assert_close(predictor.logits(few_shapes.test.images), expected)
    assert sizes == [100, 100, 62, 31, *[15] * 6, 10]
    limit = 0
    with refused(f"{path}: cpu has too little memory"):
        predictor.logits(few_shapes.test.images)


@pytest.mark.parametrize("name", ["summary", "config"])
def test_a_report_does_not_overwrite_a_file_of_the_run(path, name):
    arguments = ["--checkpoint", str(path), "--report", "--output", f"{name}.png"]
    with refused(f"--output {name}.png: --report would overwrite {name}.json"):
        show_example.main(arguments)


def test_a_place_that_is_not_writable_is_named_before_any_work(path, monkeypatch):
    monkeypatch.setattr(figures.os, "access", lambda directory, mode: False)
    with refused(f"{path.parent}/report.png can't be written: give a place for it with --output"):
        show_example.main(["--checkpoint", str(path), "--report", "--device", "cpu"])
    with refused(f"{path.parent}/examples.png can't be written: give a place"):
        show_example.main(["--checkpoint", str(path), "--device", "cpu"])
