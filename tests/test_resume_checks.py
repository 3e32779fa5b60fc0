"""What may change when a run resumes, and what is refused, before its directory is touched."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers.errors import refused
from helpers.training import resolve

import train
import train_sota
from common import checkpoint
from common.scopes import flag, names
from datasets.examples import Examples, Split
from training import arguments, out_of_memory, resume
from training.schedules import Plan


def saved_run(path, *argv, script=train, **progress):
    """A directory with last.pt (which is returned) of a run with two epochs of three steps done."""
    args = resolve(script, "--model", "resnet20", *argv)
    values, origin = arguments.record(args, Plan.of(args, steps_per_epoch=3).automatic)
    done = {"epoch": 2, "step": 6, "batch": 0} | progress
    saved = {"training": {"arguments": values, "origin": origin, "progress": done}}
    path.mkdir(exist_ok=True)
    checkpoint.save(saved, path / "last.pt")
    return saved


# ---- arguments -----------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    saved_run(tmp_path / "run", "--lr", 0.3, "--tag", "a", "--seed", 1, "--epochs", 5)
    return tmp_path / "run"


def test_a_run_resumes_with_its_own_arguments(path):
    args, saved = arguments.resolve(train.build_parser(), ["--resume", str(path / "last.pt")])
    assert (args.lr, args.tag, args.epochs, args.output_dir) == (0.3, "a", 5, str(path))
    assert args.origin["lr"] == "command line" and saved["training"]["progress"]["epoch"] == 2
    assert args.resume_previous is False


def test_machine_arguments_and_epochs_may_change(path):
    argv = ("--resume", path, "--tag", "b", "--device", "cpu", "--epochs", 9, "--compile")
    args = resolve(train, *argv)
    assert (args.tag, args.device, args.epochs, args.compile) == ("b", "cpu", 9, True)
    assert args.origin["tag"] == args.origin["epochs"] == "command line"


def test_an_argument_that_identifies_a_run_is_refused_unless_it_is_equal(path):
    assert resolve(train, "--resume", path, "--lr", 0.3, "--seed", 1).lr == 0.3
    with refused(f"can't resume {path}: --lr is 0.3 there, not 0.1; --seed is 1 there, not 2"):
        resolve(train, "--resume", path, "--lr", 0.1, "--seed", 2)


def test_every_argument_that_identifies_a_run_is_refused_by_name(tmp_path):
    saved_run(tmp_path, script=train_sota)
    defaults = arguments.defaults(train_sota.build_parser())
    for name in names("identity") - {"epochs"}:
        with refused("can't resume", f"{flag(name)} is"):
            resume.resolve(defaults, {"resume": str(tmp_path), name: "something else"})


def test_auto_on_the_command_line_is_what_the_run_started_with(tmp_path):
    saved = saved_run(tmp_path, "--epochs", 50)["training"]["arguments"]
    assert resolve(train, "--resume", tmp_path, "--ema-decay", "auto").ema_decay > 0
    assert resolve(train, "--resume", tmp_path).ema_decay == saved["ema_decay"]
    saved_run(tmp_path, "--ema-decay", 0.8)
    with refused("can't resume", "--ema-decay is 0.8 there, not auto"):
        resolve(train, "--resume", tmp_path, "--ema-decay", "auto")


def test_another_micro_batch_decides_about_accumulate_again(tmp_path):
    saved_run(tmp_path, "--accumulate", 2, script=train_sota)
    args = resolve(train_sota, "--resume", tmp_path, "--micro-batch", 16)
    assert args.micro_batch == 16 and args.origin["micro_batch"] == "command line"
    assert args.origin["accumulate"] == "--micro-batch"


@pytest.mark.parametrize("option", ["--config", "--output-dir"])
def test_config_and_output_dir_are_refused_with_resume(path, option):
    with refused("--resume takes", "leave --config and --output-dir out"):
        resolve(train, "--resume", path, option, path)


def test_a_checkpoint_that_is_not_of_a_run_is_refused(tmp_path):
    checkpoint.save({"training": {"arguments": {}}}, tmp_path / "last.pt")
    with refused(tmp_path / "last.pt", "is not the last.pt of a run"):
        resolve(train, "--resume", tmp_path)


# ---- the number of epochs ------------------------------------------------------------------------


def check_epochs(tmp_path, epochs, *argv, **progress):
    """Resumes a run of 4 epochs after its second one with another number of epochs."""
    saved = saved_run(tmp_path, "--epochs", 4, *argv, **progress)
    args = resolve(train, "--resume", tmp_path, "--epochs", epochs)
    resume.check_epochs(args, saved, steps_per_epoch=3)


CONSTANT = ("--schedule", "constant", "--warmup-epochs", 0, "--ema-decay", 0)


def test_a_run_with_a_constant_schedule_can_be_extended_or_cut_short(tmp_path):
    for epochs in (2, 9):
        check_epochs(tmp_path, epochs, *CONSTANT)
    check_epochs(tmp_path, 4)  # the same number


@pytest.mark.parametrize(
    ("epochs", "argv", "message"),
    [
        (1, CONSTANT, ": the run has 2 epochs already"),
        (9, CONSTANT[:4], "another --ema-decay from the start"),
        (
            9,
            (*CONSTANT[:2], *CONSTANT[4:]),
            "another --warmup-epochs from the start (0.9, not 0.4)",
        ),
        (9, CONSTANT[2:], "with the cosine schedule"),
        (2, (*CONSTANT, "--eval-every", 3), "with --eval-every 3, epoch 2"),
    ],
)
def test_epochs_with_other_steps_from_the_start_are_refused(tmp_path, epochs, argv, message):
    with refused(f"--epochs {epochs}", message):
        check_epochs(tmp_path, epochs, *argv)


def test_an_epoch_that_was_begun_can_not_be_cut_off(tmp_path):
    with refused("--epochs 2: the run has 3 epochs already"):
        check_epochs(tmp_path, 2, *CONSTANT, batch=1)


# ---- the data, and contents that don't fit -------------------------------------------------------


def split(count=20, classes=("a", "b")):
    examples = Examples(torch.zeros(count, 3, 8, 8, dtype=torch.uint8), torch.zeros(count))
    return Split("name", examples, None, examples, classes, (), ())


def test_other_data_is_refused():
    saved = {"training": {"facts": resume.data_facts(split())}}
    resume.check_data(split(), saved)
    resume.check_data(split(30), None)
    with refused("can't resume: the data has changed", "train images: 20 there, 30 here"):
        resume.check_data(split(30), saved)
    with refused("can't resume", "classes: 2 (a, b) there, 2 (a, c) here"):
        resume.check_data(split(classes=("a", "c")), saved)
    with refused("last.pt doesn't fit this run"):
        resume.check_data(split(), {"training": {"facts": {}}})


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), ValueError("x\ny")])
def test_contents_that_do_not_fit_are_refused_in_one_line(error):
    @resume.refuse_misfits
    def load():
        raise error

    with refused("can't resume: last.pt doesn't fit this run", "x"):
        load()


def test_names_or_shapes_that_do_not_fit_are_refused():
    load = resume.refuse_misfits(torch.nn.Linear(2, 2).load_state_dict)
    with refused("can't resume", "Linear"):
        load(torch.nn.Linear(2, 3).state_dict())


@pytest.mark.parametrize("text", [*out_of_memory.MESSAGES, "CUDA error: device-side assert"])
def test_errors_of_the_device_stay_what_they_are(text):
    @resume.refuse_misfits
    def load():
        raise RuntimeError(text)

    with pytest.raises(RuntimeError, match=text):
        load()


# ---- a finished run ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "finished"),
    [
        ({}, True),
        ({"status": "interrupted"}, False),
        ({"epochs": 1}, False),
        ({"test_acc": None}, False),
    ],
)
def test_a_run_is_finished_if_its_summary_says_so(tmp_path, capsys, changes, finished):
    summary = {"status": "finished", "epochs": 2, "test_acc": 91.5, "reported": "last epoch"}
    (tmp_path / "summary.json").write_text(json.dumps(summary | changes))
    args = SimpleNamespace(output_dir=str(tmp_path), epochs=2)
    assert resume.is_finished(args, {"training": {"progress": {"epoch": 2}}}) is finished
    assert ("test accuracy 91.50 % (last epoch)" in capsys.readouterr().out) is finished
    assert not resume.is_finished(args, {"training": {"progress": {"epoch": 1}}})
    assert not resume.is_finished(args, None)
