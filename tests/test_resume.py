"""A run that resumes ends as the uninterrupted run, or is refused before anything is written."""

import signal

import pytest
import torch
from helpers.errors import refused
from helpers.faults import fix_accuracies, kill_in_save, send
from helpers.processes import assert_one_error
from helpers.runs import (
    CNN,
    CONSTANT,
    OPTIONS,
    RUN,
    VIT,
    arguments,
    assert_same_run,
    assert_same_training,
    assert_same_weights,
    files,
    last,
    progress,
    read_json,
    rows,
    same,
    summary,
    words,
)

import models
import train as train_script
import train_sota
from common import checkpoint
from models.weights import load_checkpoint
from training import evaluation, inputs

pytestmark = pytest.mark.slow


# ---- cut in the middle of an epoch ---------------------------------------------------------------

# {what is trained: (script, ranks, model, options)}. Later options replace those of RUN.
# fmt: off
CASES = {
    "SGD, MixUp, accumulation": (
        "train", 1, CNN, "--mixup 0.4 --mix-prob 1 --accumulate 3 --warmup-epochs 2 --lookahead 3"),
    "Adam, no average": (
        "train", 1, CNN, "--optimizer adam --ema-decay 0 --schedule one_cycle --eval-every 2"),
    "AdamW, test set, augmentation": (
        "train", 1, CNN, "--optimizer adamw --val-size 0 --augment trivial_augment --cutout 8"),
    "Muon, CutMix": ("train", 1, CNN, "--optimizer muon --cutmix 1 --clip-grad 1"),
    "Muon and SGD, whitened": (
        "train", 1, ("--model", "airbench94"), "--optimizer muon_sgd --lr 0.01 --final-lr 0.1"),
    "an optimizer of timm": ("train", 1, CNN, "--optimizer timm/adafactorbv --lr 0.01"),
    "fp16": ("train", 1, CNN, "--amp fp16 --clip-grad 1 --lookahead 2"),
    "drop-path, erasing": (
        "train_vit", 1, VIT, "--drop-path 0.5 --random-erasing 0.5 --repeated-augment 4"),
    "layer decay": ("train_vit", 1, VIT, "--weights WEIGHTS --layer-decay 0.7"),
    "frozen backbone": (
        "train_vit", 1, VIT, "--weights WEIGHTS --freeze-backbone --augment none"),
    "automatic parts of a batch": (
        "train_sota", 1, VIT, "--micro-batch auto --drop-path 0.2"),
    "LoRA": ("train_sota", 1, VIT, "--weights WEIGHTS --lora-rank 2 --ema-device cpu"),
    "two ranks": ("train", 2, CNN, "--sync-bn --lookahead 2"),
    "three ranks": ("train_vit", 3, VIT, "--optimizer adam --batch-size 27 --drop-path 0.2"),
    "FSDP": ("train_sota", 2, VIT, "--fsdp --clip-grad 1 --lookahead 2"),
}
# fmt: on


def cases():
    """The names of CASES; adapters need a package."""
    marks = {"LoRA": pytest.mark.extras("peft")}
    return [pytest.param(case, marks=marks.get(case, ())) for case in CASES]


@pytest.mark.parametrize("case", cases())
def test_a_run_cut_within_an_epoch_resumes_bit_identically(forks, tmp_path, case):
    """The file of the weights that it started from is not needed any more."""
    script, world, model, options = CASES[case]
    if case == "LoRA":
        pytest.importorskip("peft")
    weights, expected, cut = (tmp_path / name for name in ("weights.pt", "expected", "cut"))
    torch.manual_seed(5)
    network = models.create_model("vit_custom", 7, width=24, depth=2, heads=2)
    torch.save(network.state_dict(), weights)
    start = (world, *RUN, *model, *words(options.replace("WEIGHTS", str(weights))), "--output-dir")
    forks.run_ranks(*start, expected, script=script)
    cutting = [(send, "training", signal.SIGTERM)]
    # A signal to one rank, which doesn't write, stops all.
    forks.run_ranks(*start, cut, script=script, faults=cutting, faulty=world - 1, status=143)
    assert progress(cut)["batch"] > 0 and progress(cut)["step"] < 9
    weights.unlink()
    forks.run_ranks(world, "--resume", cut, "--device", "cpu", script=script)
    assert_same_run(cut, expected)


def test_a_run_resumes_with_the_parts_that_auto_chose_at_its_start(train, monkeypatch):
    """Parts of ten images: three of a batch of 28; on the machine of the resume, one."""
    options = (*RUN, *CNN)
    expected = train(*options, "--accumulate", 3, output="expected")
    with monkeypatch.context() as patch:
        patch.setattr(inputs, "CACHED_PIXELS", 10 * 32**2)
        cut = train(*options, "--accumulate", "auto", output="cut", stop_after=4)
    assert arguments(cut)["accumulate"] == 3
    assert read_json(cut / "config.json")["from"]["accumulate"] == "auto"
    with refused("can't resume", "--accumulate is 3 there, not 1"):
        train("--resume", cut, "--accumulate", 1)
    train("--resume", cut, "--accumulate", "auto")
    assert rows(cut) == rows(expected)
    assert same(last(cut)["state_dict"], last(expected)["state_dict"])


@pytest.mark.gpu
def test_a_deterministic_run_on_a_gpu_resumes_bit_identically(train):
    options = words("--device cuda --deterministic --epochs 3")
    expected = train(*options, output="expected")
    cut = train(*options, output="cut", stop_after=4)
    train("--resume", cut, "--device", "cuda")
    assert_same_run(cut, expected)


# ---- what a run that resumes writes --------------------------------------------------------------


def test_the_columns_of_another_version_are_kept(train, uninterrupted):
    """In another order, without some of today's and with one that is unknown."""
    cut = train(*OPTIONS, stop_after=5)
    columns = [name for name in reversed(rows(cut)[0]) if name not in ("val_top5", "lr")]
    values = ",".join(rows(cut)[0][name] for name in columns)
    (cut / "metrics.csv").write_text(f"{','.join(columns)},later\n{values},7\n")
    train("--resume", cut)
    ours, expected = rows(cut), rows(uninterrupted)
    assert list(ours[0])[: len(columns) + 1] == [*columns, "later"] and ours[0]["later"] == "7"
    assert [{name: row[name] for name in expected[0]} for row in ours[1:]] == expected[1:]
    assert summary(cut)["status"] == "finished"


@pytest.mark.parametrize("change", [("\n2,", "\nx,"), ("\n3,", "\n2,"), None])
def test_a_table_that_lacks_an_epoch_is_refused(train, copy, change):
    (copy / "summary.json").unlink()
    text = (copy / "metrics.csv").read_text()
    (copy / "metrics.csv").unlink()
    if change:
        (copy / "metrics.csv").write_text(text.replace(*change))
    before = files(copy)
    with refused(copy / "metrics.csv"):
        train("--resume", copy)
    assert files(copy) == before


def test_the_config_says_what_the_run_was_before(train):
    directory = train(*CNN, *CONSTANT, "--epochs", 1)
    train("--resume", directory, "--epochs", 2, "--amp", "off")
    config = read_json(directory / "config.json")
    assert (config["arguments"]["epochs"], config["precision"]) == (2, "float32")
    (resumed,) = config["resumed"]
    assert resumed["at_epoch"] == 2 and resumed["before"]["arguments"]["epochs"] == 1


def test_an_old_summary_is_removed_when_a_run_resumes(train, forks):
    cut = train(*OPTIONS, stop_after=5)
    assert summary(cut)["status"] == "interrupted"
    with refused("can't resume", "--batch-size"):
        train("--resume", cut, "--batch-size", 8)
    assert (cut / "summary.json").exists()
    killing = (send, "first step", signal.SIGKILL)
    done = forks.run("--resume", cut, "--device", "cpu", faults=[killing])
    assert done.returncode == -signal.SIGKILL and not (cut / "summary.json").exists()


def test_the_accuracy_in_the_summary_is_exact(train):
    """Of 49 images it has more digits than metrics.csv; also where only the test was left."""
    directory = train(*CNN, *words("--epochs 1 --limit-test 49 --seed 1"))
    before = summary(directory)
    accuracy = checkpoint.load(directory / "best.pt")["metric"]["value"]
    assert before["test_acc"] == accuracy == before["best_test_acc"]
    assert accuracy * 49 / 100 == pytest.approx(round(accuracy * 49 / 100), abs=1e-9)
    (directory / "summary.json").unlink()  # as after a kill between the last save and the end
    table = directory / "metrics.csv"
    table.write_text(table.read_text().replace(f"{accuracy:.6g}", "99"))
    train("--resume", directory)
    machine = {"peak_memory_mb": 0, "total_seconds": 0}
    assert summary(directory) | machine == before | machine


# ---- best.pt -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["missing", "of another epoch"])
def test_best_pt_is_written_again_from_last_pt(forks, uninterrupted, tmp_path, lost):
    """Where last.pt is of the best epoch and the run was killed before it wrote best.pt."""
    cut = tmp_path / "cut"
    forks.run(*OPTIONS, "--output-dir", cut, faults=[(kill_in_save, 2, "renamed")])
    best = cut / "best.pt"
    assert last(cut)["training"]["best"]["epoch"] == 1 and not best.exists()
    if lost == "of another epoch":
        contents = checkpoint.load(uninterrupted / "best.pt")
        checkpoint.save(contents | {"metric": contents["metric"] | {"epoch": 3}}, best)
    killing = (send, "first step", signal.SIGKILL)
    forks.run("--resume", cut, "--device", "cpu", faults=[killing])
    assert checkpoint.load(best)["metric"]["epoch"] == 1
    assert same(checkpoint.load(best)["state_dict"], last(cut)["ema"]["average"])
    forks.resume(cut)
    assert_same_run(cut, uninterrupted)


@pytest.mark.parametrize("lost", ["missing", "damaged", "of another epoch"])
def test_a_best_pt_that_will_be_tested_is_checked_first(train, forks, tmp_path, lost):
    """The first epoch, without an error, stays the best one."""
    cut = tmp_path / "cut"
    faults = [(fix_accuracies, 100.0, 100.0), (kill_in_save, 3, "renamed")]
    forks.run(*OPTIONS, "--output-dir", cut, faults=faults)
    best = cut / "best.pt"
    contents = checkpoint.load(best)
    assert contents["metric"]["epoch"] == 1 and progress(cut)["epoch"] == 2
    if lost == "of another epoch":
        checkpoint.save(contents | {"metric": contents["metric"] | {"epoch": 2}}, best)
    elif lost == "damaged":
        best.write_bytes(best.read_bytes()[:-100])
    else:
        best.unlink()
    before = files(cut)
    assert_one_error(forks.run("--resume", cut, "--device", "cpu"), "best.pt")
    assert files(cut) == before
    checkpoint.save(contents, best)
    train("--resume", cut)
    assert (summary(cut)["status"], summary(cut)["best_epoch"]) == ("finished", 1)


def test_weights_are_kept_every_few_epochs_and_written_once(train, forks, tmp_path):
    """Also where the run was killed before it wrote them; a resume leaves them as they are."""
    cut, killing = tmp_path / "cut", (kill_in_save, 2, "renamed")
    forks.run(*OPTIONS, "--save-every", 1, "--output-dir", cut, faults=[killing])
    assert progress(cut)["epoch"] == 1 and not list(cut.glob("epoch-*.pt"))
    train("--resume", cut)
    assert len(list(cut.glob("epoch-*.pt"))) == 3
    model, card = load_checkpoint(cut / "epoch-3.pt")
    assert (card["epoch"], card["metric"]) == (3, None)
    assert same(dict(model.state_dict()), last(cut)["ema"]["average"])
    (cut / "summary.json").unlink()
    (cut / "last.pt").write_bytes(b"damaged")
    before = {path: path.stat().st_mtime_ns for path in cut.glob("epoch-*.pt")}
    train("--resume", cut, "--resume-previous", "--save-every", 2)  # the last epoch once more
    assert {path: path.stat().st_mtime_ns for path in cut.glob("epoch-*.pt")} == before


def test_a_run_stops_early_at_the_same_epoch_if_it_is_resumed(train, monkeypatch, capsys):
    evaluate_epoch, accuracies = train_script.evaluate_epoch, {2: 30.0, 4: 40.0, 6: 40.0, 8: 20.0}

    def with_fixed_accuracy(state, *arguments):
        row = evaluate_epoch(state, *arguments)
        return row | {"ema_val_acc": accuracies.get(state.epoch + 1)}

    monkeypatch.setattr(train_script, "evaluate_epoch", with_fixed_accuracy)
    options = (*OPTIONS, *words("--epochs 9 --eval-every 2 --patience 2"))
    expected = train(*options, output="expected")
    ended = summary(expected)
    assert (ended["best_epoch"], ended["epochs"], ended["stopped_early"]) == (4, 8, True)
    assert (ended["status"], ended["reported"]) == ("finished", "best epoch on held-out images")
    text = capsys.readouterr().out
    assert "stopped early after epoch 8: epoch 4 was the best" in text
    cut = train(*options, output="cut", stop_after=14)  # in the fifth epoch
    train("--resume", cut)
    assert_same_run(cut, expected)
    before = files(cut)
    train("--resume", cut)
    assert files(cut) == before and "is already finished" in capsys.readouterr().out
    (cut / "summary.json").unlink()  # as after a kill before the final test
    train("--resume", cut)
    assert_same_run(cut, expected)
    assert summary(cut)["stopped_early"]


# ---- what may change -----------------------------------------------------------------------------


def test_options_of_another_script_are_refused(train, copy):
    """The run of train.py has no --lora-rank."""
    with refused("can't resume", "--lora-rank is 0 there, not 2"):
        train("--resume", copy, "--lora-rank", 2, script=train_sota)


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [("constant", None), ("cosine", 2), ("multi_step", 5)],
    ids=["a finished run", "within the warmup", "before the rate falls"],
)
def test_an_extended_run_is_as_if_started_so(train, schedule, steps):
    options = (*CNN, "--schedule", schedule, *words("--warmup-epochs 1 --ema-decay 0.8"))
    cut = train(*options, "--epochs", 4, output="cut", stop_after=steps)
    train("--resume", cut, "--epochs", 5)
    expected = train(*options, "--epochs", 5, output="expected")
    assert_same_training(cut, expected)
    assert summary(cut)["test_acc"] == summary(expected)["test_acc"]


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["training"].pop("progress"),
        lambda state: state["training"].update(arguments=3),
        lambda state: state["training"]["optimizer"].update(param_groups=[]),
        lambda state: state["state_dict"].update({"fc.bias": torch.zeros(3)}),
    ],
)
def test_a_last_pt_with_other_contents_is_refused(train, copy, change):
    (copy / "summary.json").unlink()
    state = last(copy)
    change(state)
    checkpoint.save(state, copy / "last.pt")
    with refused("", "last.pt"):
        train("--resume", copy)


NAMES = {"off": "float32", "fp16": "float16", "bf16": "bfloat16"}


@pytest.mark.parametrize(("before", "after"), [("off", "fp16"), ("fp16", "bf16")])
def test_a_run_resumes_in_another_precision_and_says_so(train, before, after, capsys):
    options = (*CNN, *words("--epochs 2 --ema-decay 0.8 --amp"), before)
    expected = train(*options, output="expected")
    cut = train(*options, output="cut", stop_after=4)
    capsys.readouterr()
    train("--resume", cut, "--amp", after)
    note = f"resuming in {NAMES[after]}: until here the run computed in {NAMES[before]} (--amp)"
    assert capsys.readouterr().err.splitlines().count(note) == 1
    assert note in (cut / "log.txt").read_text()
    ours, theirs = (float(rows(path)[-1]["train_loss"]) for path in (cut, expected))
    assert ours == pytest.approx(theirs, rel=0.05) and ours != theirs


def test_a_compiled_run_resumes_as_a_plain_one_and_back(train, monkeypatch):
    """Without a C++ compiler: what is tested is what compiling does to checkpoints."""
    compile_model, compiled = torch.nn.Module.compile, []

    def compile_without_kernels(self, **options):
        compiled.append((type(self).__name__, options))
        compile_model(self, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_kernels)
    options = (*VIT, *CONSTANT, *words("--amp off --lr 0.001 --epochs"))
    expected = train(*options, 3, output="expected")
    assert not compiled
    cut = train(*options, 1, "--compile", output="cut")
    assert compiled == [("ViT", {"dynamic": False})] * 2  # the model and its moving average
    assert not any("_orig_mod" in name for name in last(cut)["state_dict"])
    train("--resume", cut, "--epochs", 2, "--no-compile")
    assert len(compiled) == 2
    train("--resume", cut, "--epochs", 3, "--compile")
    assert len(compiled) == 4
    for part in (lambda state: state["state_dict"], lambda state: state["ema"]["average"]):
        torch.testing.assert_close(part(last(cut)), part(last(expected)), rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_counts_an_image_once_in_batch_norm(train, monkeypatch):
    """Also where it is switched on when a run resumes."""
    recompute, recomputed = torch.utils.checkpoint.checkpoint, []

    def counting(*arguments, **options):
        recomputed.append(1)
        return recompute(*arguments, **options)

    monkeypatch.setattr("torch.utils.checkpoint.checkpoint", counting)
    options = (*CNN, *words("--epochs 2 --accumulate 2 --ema-decay 0.8"))
    plain = train(*options, output="plain")
    cut = train(*options, output="cut", stop_after=4)
    assert not recomputed
    train("--resume", cut, "--grad-checkpointing")
    assert recomputed
    checkpointed = train(*options, "--grad-checkpointing", output="checkpointed")
    assert any("running_var" in name for name in last(plain)["state_dict"])
    for directory in (cut, checkpointed):
        assert rows(directory) == rows(plain)
        assert_same_weights(directory, plain)


def test_an_infinite_loss_in_an_evaluation_stops_the_run(
    train, uninterrupted, tmp_path, monkeypatch
):
    """The training of the second epoch was as good as ever."""
    evaluate, calls = evaluation.evaluate, []

    def spoiled(*args, **options):
        calls.append(1)
        return evaluate(*args, **options) | ({"loss": float("nan")} if len(calls) > 2 else {})

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", spoiled)
        with refused("the val loss after step 6 (epoch 2) is nan", "last.pt is the last good"):
            train(*OPTIONS)
    cut = tmp_path / "run"
    assert summary(cut)["status"] == "failed" and progress(cut)["epoch"] == 1
    train("--resume", cut)
    assert_same_run(cut, uninterrupted)
