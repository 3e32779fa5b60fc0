"""The benchmark compares like with like and prints ratios; what it measures is the machine's affair, not a test's."""

import csv
import json
import re

import pytest
import torch
from conftest import refused
from torch.utils.flop_counter import FlopCounterMode

import benchmark
import models
from bench import comparisons, measure, speeds
from datasets.pipeline import Pipeline
from training import memory


def test_both_sides_deliver_the_same_kind_of_batches():
    examples = comparisons.random_examples(300)
    theirs = comparisons.PilDataset(examples, jitter=True)
    image, label = theirs[3]
    inputs, _ = Pipeline(comparisons.MEAN, comparisons.STD, 32)(
        examples.images[3:4], examples.labels[3:4]
    )
    assert (
        image.shape == inputs.shape[1:]
        and image.dtype == inputs.dtype
        and label == examples.labels[3]
    )


def test_things_are_measured_in_turn():
    order = []
    seconds = measure.in_turn(
        torch.device("cpu"), 2, a=lambda: order.append("a"), b=lambda: order.append("b")
    )
    assert order == ["a", "b"] * 3 and [len(v) for v in seconds.values()] == [2, 2]


def test_data_and_epoch_print_ratios(capsys):
    small = ["--images", "256", "--rounds", "1", "--workers", "0", "--device", "cpu"]
    assert benchmark.main(["data", *small]) == 0
    assert len(re.findall(r"DataLoader .* takes [\d.]+ \(", capsys.readouterr().out)) == 2
    assert benchmark.main(["epoch", *small, "--model", "resnet20", "--image-size", "40"]) == 0
    text = capsys.readouterr().out
    assert (
        "bare forward" in text
        and "plain loop" in text
        and "times as long as the bare steps" in text
    )


def test_saves_are_timed_against_an_epoch(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--model",
        "resnet20",
        "--images",
        "256",
        "--batch-size",
        "8",
        "--rounds",
        "1",
        "--device",
        "cpu",
    ]
    assert benchmark.main(["checkpoint", *arguments]) == 0
    text = capsys.readouterr().out
    assert re.search(r"last.pt 3 MB, with best.pt; an epoch is 256 images .*32 times", text)
    assert (
        len(re.findall(r"(training waits|in the foreground): \d+ .* ms, .* % of an epoch", text))
        == 2
    )
    assert (
        re.search(r"training waits for 0\.\d+ ", text)
        and "times the file" in text
        and not list(tmp_path.iterdir())
    )


@pytest.mark.parametrize("name", benchmark.TWINS)
def test_a_twin_is_the_same_architecture(name):
    def size_and_work(build):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            network = build(name, 100).eval()
            assert network(torch.empty(2, 3, 32, 32)).shape == (2, 100)
        return sum(p.numel() for p in network.parameters()), counter.get_total_flops()

    assert size_and_work(comparisons.timm_twin) == size_and_work(models.create_model)


def test_twins_are_timed_in_turn(capsys):
    assert (
        benchmark.main(
            [
                "twins",
                "--models",
                "resnet20",
                "--batch-size",
                "2",
                "--rounds",
                "1",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert re.search(r"resnet20 .* \d\.\d\d \(", capsys.readouterr().out)


# ---- the table of models ---------------------------------------------------------------------------------------------


CPU = torch.device("cpu")
FEW = ["--rounds", "1", "--batch-size", "2", "--device", "cpu", "--amp", "off"]


@pytest.fixture(autouse=True)
def quick_rounds(monkeypatch):
    monkeypatch.setattr(measure, "ROUND", 0.0)
    monkeypatch.setitem(measure.SIDES, "cpu", (64,))


def test_a_table_of_models_is_printed_and_written(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 1e9)
    place = tmp_path / "a" / "speed"
    chosen = [
        "--models",
        "resnet20",
        "timm/resnet10t",
        "eva_giant",
        "--image-size",
        "28",
        "--output",
        str(place),
    ]
    assert benchmark.main(["models", *FEW, *chosen]) == 0
    text = capsys.readouterr().out
    assert (
        torch.__version__ in text.splitlines()[0]
        and "ceiling, of products of square matrices" in text
    )
    lines = {line.split()[0]: line for line in text.splitlines()[3:]}
    assert re.search(r"resnet20 +28 +278,324 .* \d+\.\d \(\d+\.\d to \d+\.\d\)", lines["resnet20"])
    assert (
        "does not fit: one image needs" in lines["eva_giant"]
        and "1.0 GB are free" in lines["eva_giant"]
    )
    with open(place / "models.csv", newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["resnet20", "timm/resnet10t", "eva_giant"]
    for row in (rows["resnet20"], rows["timm/resnet10t"]):
        ms, images = float(row["train_ms"]), float(row["train_images_per_second"])
        assert float(row["train_ms_least"]) <= ms <= float(row["train_ms_most"])
        assert images * ms / 1000 == pytest.approx(2, rel=1e-3)
        assert float(row["train_us_per_image"]) * images == pytest.approx(1e6, rel=1e-3)
        assert float(row["inference_images_per_second"]) > 0 and float(row["of_ceiling"]) > 0
        assert (row["batch_size"], row["precision"]) == ("2", "float32")
    assert rows["eva_giant"]["train_ms"] == "" and float(rows["eva_giant"]["gmacs"]) > 0
    markdown = (place / "models.md").read_text()
    assert markdown.count("\n| ") == 2 + 3 and "does not fit" in markdown
    assert (place / "models.png").read_bytes()[:4] == b"\x89PNG"


def test_speeds_have_three_digits_however_small():
    assert [measure.rate(x) for x in (0.2657, 0.3, 12.345, 99.96, 4567.8)] == [
        "0.266",
        "0.300",
        "12.3",
        "100",
        "4,568",
    ]
    row = dict.fromkeys((*speeds.COLUMNS, *speeds.TIMES)) | {
        "model": "eva_giant",
        "train_images_per_second": 0.2657,
    }
    cells = speeds.cells(row)
    assert (cells["train images/s"], cells["inference images/s"], cells["model"]) == (
        "0.266",
        "",
        "eva_giant",
    )
    assert measure.spread([2.0, 0.2657, 300.0], measure.rate) == "2.00 (0.266 to 300)"
    assert measure.spread([1.0]) == "1.00 (1.00 to 1.00)"


def test_the_suite_of_the_largest_says_on_a_small_machine_that_they_do_not_fit(capsys, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 1e8)
    monkeypatch.setattr(models, "create_model", only_on_meta(models.create_model))
    assert benchmark.main(["models", "--suite", "sota", *FEW]) == 0
    text = capsys.readouterr().out
    for wanted in (
        "eva02_large 448 305,080,232 361.7",
        "eva_giant 336 1,013,005,672 620.3",
        "convnext_xxlarge 256 846,471,016 197.9",
    ):
        assert re.search(wanted.replace(" ", " +") + r"\d\d .*does not fit", text)


def only_on_meta(create):
    def wrapped(*args, **options):
        assert torch.empty(0).is_meta, "gigabytes"
        return create(*args, **options)

    return wrapped


def test_batches_are_halved_until_one_fits(monkeypatch):
    tried = []
    real = measure.ready_batch

    def ready_batch(size, *rest):
        tried.append(size)
        if size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(size, *rest)

    monkeypatch.setattr(measure, "ready_batch", ready_batch)
    row = speeds.measure_model(
        "resnet20", device=CPU, amp="off", batch_size=12, rounds=1, image_size=16
    )
    assert tried == [12, 6, 3] and row["batch_size"] == 3 and row["status"] == ""
    monkeypatch.setattr(measure, "ready_batch", lambda *args: ready_batch(9))
    row = speeds.measure_model(
        "resnet20", device=CPU, amp="off", batch_size=2, rounds=1, image_size=16
    )
    assert row["batch_size"] is None and row["train_ms"] is None and "does not fit" in row["status"]


def test_a_step_is_three_forward_passes_of_work_but_for_the_first_layer():
    """Backward: the gradient of each weight and of each input, but not of the pictures."""
    _, macs = models.describe("resnet20", 10, 32)
    first = 16 * 3 * 9 * 32 * 32
    assert measure.step_flops("resnet20", 10, 32) == 2 * (3 * macs - first)


def test_quick_functions_are_called_many_times_in_a_round(monkeypatch):
    monkeypatch.setattr(measure, "ROUND", 1e9)
    calls = []
    seconds = measure.repeated(CPU, 3, lambda: calls.append(1))
    assert len(seconds) == 3 and len(calls) == 2 + 3 * 100
    assert measure.flop_ceiling(CPU, None, rounds=1) > 0


def test_accuracy_of_runs_is_drawn_against_speed(tmp_path, train, monkeypatch):
    first, second = train("--epochs", 1, output="a"), train("--epochs", 1, "--seed", 1, output="b")
    found = comparisons.accuracies([str(first), str(second)])
    said = [json.loads((run / "summary.json").read_text())["test_acc"] for run in (first, second)]
    assert found == {"resnet20": pytest.approx(sum(said) / 2)}
    row = dict.fromkeys(speeds.COLUMNS) | {
        "model": "resnet20",
        "parameters": 1,
        "train_images_per_second": 10.0,
    }
    assert speeds.draw([row], tmp_path / "a.png", "here", found)
    assert not speeds.draw([row | {"model": "resnet32"}], tmp_path / "b.png", "here", found)
    assert (tmp_path / "a.png").is_file() and not (tmp_path / "b.png").exists()


@pytest.mark.parametrize(
    "how", [["--quick"], ["--precisions", "--batch-size", "2", "--rounds", "1"]]
)
def test_bf16_against_fp32(capsys, how):
    assert (
        benchmark.main(["models", "--models", "resnet20", "vit_tiny", "--device", "cpu", *how]) == 0
    )
    assert (
        len(re.findall(r"^(?:resnet20|vit_tiny) .* \d\.\d\d \(", capsys.readouterr().out, re.M))
        == 2
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--models", "resnet2O"), "unknown model 'resnet2O': did you mean resnet32 or resnet20"),
        (("--models", "timm/nope"), "timm has no model 'nope'"),
        (
            ("--models", "eva_giant", "--image-size", "30"),
            "timm/eva_giant_patch14_336.clip_ft_in1k: image size 30 is not a m",
        ),
        (("--output", __file__), f"--output {__file__} can't be made"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(words, message, monkeypatch):
    monkeypatch.setattr(measure, "timed", None)
    with refused(message):
        benchmark.main(["models", *words, *FEW])
