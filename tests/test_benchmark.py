"""The benchmark compares like with like and prints ratios; their values depend on the machine."""

import csv
import json
import re

import pytest
import torch
from helpers.errors import refused
from helpers.samples import write_seeds
from torch.utils.flop_counter import FlopCounterMode

import benchmark
import models
from bench import comparisons, measure, speeds, twins
from datasets.pipeline import Pipeline
from training import memory

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick_rounds(monkeypatch):
    monkeypatch.setattr(measure, "MIN_ROUND", 0.0)
    monkeypatch.setitem(measure.SIDES, "cpu", (64,))


@pytest.fixture
def run(capsys):
    """Runs the script with two images a batch and one round; returns what it prints."""

    def benchmarked(command, *more, sizes="--batch-size 2 --rounds 1"):
        words = f"{command} {sizes} --device cpu".split()
        assert benchmark.main([*words, *more]) == 0
        return capsys.readouterr().out

    return benchmarked


# ---- comparisons ---------------------------------------------------------------------------------


def test_both_loaders_deliver_the_same_kind_of_batches():
    examples = comparisons.random_examples(300)
    image, label = comparisons.PilDataset(examples, jitter=True)[3]
    pipeline = Pipeline(comparisons.MEAN, comparisons.STD, 32)
    inputs, labels = pipeline(examples.images[3:4], examples.labels[3:4])
    assert image.shape == inputs.shape[1:] and image.dtype == inputs.dtype and label == labels[0]


def test_functions_are_measured_in_turn():
    order = []
    functions = dict(a=lambda: order.append("a"), b=lambda: order.append("b"))
    seconds = measure.in_turn(CPU, 2, **functions)
    assert order == ["a", "b"] * 3 and [len(values) for values in seconds.values()] == [2, 2]


@pytest.mark.slow
def test_data_and_epoch_print_ratios(capsys):
    small = ["--images", "256", "--rounds", "1", "--workers", "0", "--device", "cpu"]
    benchmark.main(["data", *small])
    assert len(re.findall(r"DataLoader .* takes [\d.]+ \(", capsys.readouterr().out)) == 2
    benchmark.main(["epoch", *small, "--image-size", "40"])
    text = capsys.readouterr().out
    for words in ("bare training step", "plain loop", "times as long as the bare steps"):
        assert words in text


@pytest.mark.slow
def test_an_epoch_of_a_model_with_rates_of_its_own_is_timed(run):
    assert "times as long as" in run("epoch --model airbench94 --images 256 --skip-plain")


def test_saves_are_timed_against_an_epoch(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = run("checkpoint --model resnet20 --images 256")
    assert re.search(r"last.pt 3 MiB, with best.pt; an epoch is 256 images .*128 times", text)
    pattern = r"(training waits|in the foreground): \d+ .* ms, .* % of an epoch"
    assert len(re.findall(pattern, text)) == 2
    assert re.search(r"training waits for \d+\.\d\d \(", text)
    assert re.search(r"while it saves: (at most .* times the file|this system doesn't tell)", text)
    assert not list(tmp_path.iterdir())


LARGE = ("resnet34", "resnet101", "resnet152")  # variants of resnet18 and resnet50


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in benchmark.TWINS]
)
def test_a_twin_has_the_same_size_and_work(name):
    def size_and_work(create):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            network = create(name, 100).eval()
            assert network(torch.empty(2, 3, 32, 32)).shape == (2, 100)
        return sum(p.numel() for p in network.parameters()), counter.get_total_flops()

    assert size_and_work(twins.timm_twin) == size_and_work(models.create_model)


def test_twins_are_timed(run):
    assert re.search(r"resnet20 .* \d+\.\d\d \(", run("twins --models resnet20"))


# ---- the table of models -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_table_of_models_is_printed_and_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(speeds, "available", lambda device: 1e9)
    directory = tmp_path / "a" / "speed"
    names = ["resnet20", "timm/resnet10t", "eva_giant"]
    results = tmp_path / "results-imagenet.csv"
    results.write_text("model,top1,top1_err\nresnet10t.c3_in1k,68.36,31.64\n")
    options = ["--models", *names, "--output", str(directory), "--timm-results", str(results)]
    text = run("models --amp off --image-size 28 --inference-batch-size 3", *options)
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert torch.__version__ in text.splitlines()[0] and "\nceiling, " in text
    assert f"published top-1: of timm's weights on ImageNet, from {results}" in text
    assert re.search(r"resnet20 +28 +278,324 .* \d+\.\d \(\d+\.\d to \d+\.\d\)", lines["resnet20"])
    assert re.search("does not fit: one image needs .* 1.0 GB are free", lines["eva_giant"])
    with open(directory / "models.csv", newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert list(rows) == names
    for row in (rows["resnet20"], rows["timm/resnet10t"]):
        for part, batch in (("train", 2), ("inference", 3)):
            ms, images = float(row[f"{part}_ms"]), float(row[f"{part}_images_per_second"])
            assert float(row[f"{part}_ms_least"]) <= ms <= float(row[f"{part}_ms_most"])
            assert images * ms / 1000 == pytest.approx(batch, rel=1e-3)
            assert float(row[f"{part}_us_per_image"]) * images == pytest.approx(1e6, rel=1e-3)
            assert float(row[f"{part}_of_ceiling"]) > 0 and row[f"{part}_batch_size"] == f"{batch}"
        flops = 2e9 * float(row["gmacs"]) * float(row["inference_images_per_second"])
        assert float(row["inference_flops_per_second"]) == pytest.approx(flops, rel=1e-3)
        assert row["precision"] == "float32"
    assert rows["eva_giant"]["train_ms"] == "" and float(rows["eva_giant"]["gmacs"]) > 0
    assert [row["published_top1"] for row in rows.values()] == ["", "68.36", ""]
    markdown = (directory / "models.md").read_text()
    assert markdown.count("\n| ") == 2 + 3 and "does not fit" in markdown
    assert (directory / "models.png").read_bytes()[:4] == b"\x89PNG"


def test_speeds_have_three_digits():
    wanted = {0.2657: "0.266", 0.3: "0.300", 12.345: "12.3", 99.96: "100", 4567.8: "4,568"}
    assert {value: measure.rate(value) for value in wanted} == wanted
    assert measure.spread([2.0, 0.2657, 300.0], measure.rate) == "2.00 (0.266 to 300)"
    assert measure.spread([1.0]) == "1.00 (1.00 to 1.00)"
    row = dict.fromkeys((*speeds.COLUMNS, *speeds.TIMES)) | {"train_images_per_second": 0.2657}
    cells = speeds.cells(row)
    assert (cells["train images/s"], cells["inference images/s"]) == ("0.266", "-")


@pytest.mark.slow
def test_large_models_are_not_built_where_they_do_not_fit(run, monkeypatch):
    create_model = models.create_model

    def only_on_meta(*args, **options):
        assert torch.empty(0).is_meta
        return create_model(*args, **options)

    monkeypatch.setattr(speeds, "available", lambda device: 1e8)
    monkeypatch.setattr(models, "create_model", only_on_meta)
    text = run("models --amp off --suite sota")
    for row in (
        "eva02_large 448 305,080,232 361.7",
        "eva_giant 336 1,013,005,672 620.3",
        "convnext_xxlarge 256 846,471,016 197.9",
    ):
        assert re.search(row.replace(" ", " +") + r"\d\d .*does not fit", text)


def case_of(*words, name="resnet20"):
    """A measured case at 16 px, and the arguments."""
    words = ["models", "--amp", "off", "--image-size", "16", "--rounds", "1", *words]
    args = benchmark.build_parser().parse_args(words)
    return speeds.Case(name, args, CPU), args


def test_inference_is_measured_where_training_does_not_fit(monkeypatch):
    case, args = case_of("--batch-size", "4")
    needs = [case.memory_need(part).total(1) for part in ("inference", "train")]
    assert needs[0] < needs[1]
    monkeypatch.setattr(speeds, "available", lambda device: sum(needs) / 2 / memory.USABLE)
    row = speeds.measure_model(case, args, {})
    assert row["inference_ms"] > 0 and row["inference_batch_size"] <= 4
    assert row["train_ms"] is None and row["status"].startswith("train does not fit: one image")


def test_a_model_that_cannot_train_on_one_image_is_named():
    case, args = case_of("--image-size", "8", "--batch-size", "1", name="resnet18")
    row = speeds.measure_model(case, args, {})
    assert row["inference_ms"] > 0 and row["train_ms"] is None
    assert row["status"].startswith("train: Expected more than 1 value per channel")


def test_training_is_skipped_on_request_and_the_plot_is_of_inference(tmp_path):
    case, args = case_of("--inference-batch-size", "3", "--batch-size", "2", "--skip-training")
    row = speeds.measure_model(case, args, {None: 1e12})
    assert row["inference_batch_size"] == 3 and row["inference_of_ceiling"] > 0
    assert [row[key] for key in speeds.PARTS["train"]] == [None] * 7 and row["status"] == ""
    assert speeds.draw([row], tmp_path / "a.png", "here")


def test_batches_are_halved_until_one_fits(monkeypatch):
    tried, ready_batch = [], measure.ready_batch
    case, args = case_of("--batch-size", "12", "--inference-batch-size", "1")

    def limited(largest, size, *rest):
        tried.append(size)
        if size > largest:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return ready_batch(size, *rest)

    monkeypatch.setattr(measure, "ready_batch", lambda *args: limited(3, *args))
    row = speeds.measure_model(case, args, {})
    assert tried == [1, 12, 6, 3] and row["train_batch_size"] == 3 and row["status"] == ""
    monkeypatch.setattr(measure, "ready_batch", lambda *args: limited(0, *args))
    row = speeds.measure_model(case, args, {})
    assert (
        row["train_batch_size"] is None
        and row["train_ms"] is None
        and "does not fit" in row["status"]
    )


def test_quick_functions_are_called_many_times_in_a_round(monkeypatch):
    monkeypatch.setattr(measure, "MIN_ROUND", 1e9)
    calls = []
    seconds = measure.repeated(CPU, 3, lambda: calls.append(1))
    assert len(seconds) == 3 and len(calls) == 2 + 3 * 100
    assert measure.flop_ceiling(CPU, None, rounds=1) > 0


@pytest.mark.slow
def test_accuracies_of_runs_are_read(train):
    runs = [train("--epochs", 1, "--seed", seed, output=str(seed)) for seed in (0, 1)]
    test_acc = [json.loads((run / "summary.json").read_text())["test_acc"] for run in runs]
    found = speeds.accuracies([str(run) for run in runs])
    assert found == {"resnet20": pytest.approx(sum(test_acc) / 2)}


def test_accuracies_of_different_experiments_are_refused(tmp_path):
    write_seeds(tmp_path / "x", "resnet20", [90.0, 92.0], dataset="cifar10", limit_test=0)
    write_seeds(tmp_path / "y", "resnet20", [70.0], dataset="cifar10", limit_test=0, lr=1)
    write_seeds(tmp_path / "z", "resnet32", [70.0], dataset="cifar100", limit_test=0)
    assert speeds.accuracies([str(tmp_path / "x")]) == {"resnet20": 91.0}
    with refused("--runs: ", "are different experiments with resnet20"):
        speeds.accuracies([str(tmp_path / "x"), str(tmp_path / "y")])
    with refused("--runs: the test images differ (cifar10; cifar100)"):
        speeds.accuracies([str(tmp_path / "x"), str(tmp_path / "z")])
    command = f"models --models plain20 --output {tmp_path} --device cpu --runs {tmp_path / 'x'}"
    with refused("--runs: there is no run of these models"):
        benchmark.main(command.split())


def test_options_that_would_be_ignored_are_refused():
    for command, message in (
        ("models --runs x", "--runs needs --output DIR"),
        ("models --quick --suite sota", "--suite has no meaning with --precisions or --quick"),
        ("models --quick --batch-size 64", "--batch-size has no meaning with --precisions or"),
        ("models --precisions --amp off", "--amp has no meaning with --precisions or --quick"),
    ):
        with refused(message):
            benchmark.main(command.split())


def test_a_misspelled_option_of_a_command_is_named(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["models", "--rouds", "3"])
    assert "did you mean --rounds?" in capsys.readouterr().err


def test_saves_need_an_epoch_of_steps(run):
    with refused("--batch-size 512 is larger than --images 256: an epoch has no step"):
        run("checkpoint --model resnet20 --images 256", "--batch-size", "512")


def test_a_batch_that_does_not_fit_is_one_line(run, monkeypatch):
    def out_of_memory(device, function, calls=1):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(measure, "timed", out_of_memory)
    with refused("out of memory: try a smaller --batch-size (CUDA out of memory)"):
        run("epoch --images 256 --skip-plain")


def test_the_optimizer_of_a_recipe_is_measured():
    model = models.create_model("airbench94", 10)
    optimizer = measure.create_optimizer(model, "muon_sgd")
    assert any(group["orthogonal"] for group in optimizer.param_groups)


def test_models_that_cannot_have_an_image_size_are_left_out(capsys, monkeypatch):
    monkeypatch.setitem(speeds.SUITES, "table", ("resnet20", "airbench94"))
    monkeypatch.setattr(speeds, "measure_model", lambda case, *more: {"model": case.name})
    monkeypatch.setattr(speeds, "line", lambda row, with_headings: row["model"])
    words = "models --image-size 48 --batch-size 2 --rounds 1 --device cpu"
    assert benchmark.main(words.split()) == 0
    out = capsys.readouterr().out
    assert "left out: airbench94: image_size must be 32 px, not 48" in out
    assert out.splitlines()[-1] == "resnet20"


def test_accuracy_is_drawn_against_speed(tmp_path):
    row = {"model": "resnet20", "parameters": 1, "train_images_per_second": 10.0}
    assert speeds.draw([row], tmp_path / "a.png", "here", {"resnet20": 90.0})
    other = row | {"model": "resnet32"}
    assert not speeds.draw([other], tmp_path / "b.png", "here", {"resnet20": 90.0})
    assert (tmp_path / "a.png").is_file() and not (tmp_path / "b.png").exists()


@pytest.mark.parametrize(
    "sizes",
    ["--precisions --batch-size 2 --rounds 1", pytest.param("--quick", marks=pytest.mark.slow)],
)
def test_bf16_is_compared_with_fp32(run, sizes):
    text = run("models --models resnet20 vit_tiny", sizes=sizes)
    assert len(re.findall(r"^(?:resnet20|vit_tiny) .* \d+\.\d\d \(", text, re.M)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--models resnet2O", "unknown model 'resnet2O': did you mean resnet32 or resnet20"),
        ("--models timm/nope", "timm has no model 'nope'"),
        ("--models eva_giant --image-size 30", "timm/eva_giant_patch14_336.clip_ft_in1k: image"),
        (f"--timm-results {__file__}", f"--timm-results {__file__} is not timm's results"),
        (
            "--timm-results no.csv",
            "--timm-results no.csv is not timm's results-imagenet.csv (No such",
        ),
        (f"--output {__file__}", f"--output {__file__} can't be made"),
    ],
)
def test_wrong_arguments_are_refused_before_measuring(options, message, run, monkeypatch):
    monkeypatch.setattr(measure, "timed", None)
    with refused(message):
        run(f"models {options}")
