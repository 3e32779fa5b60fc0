"""Going on: after kill -9 at twenty moments, with arguments that are refused or allowed, and what a resumed run says of itself.

Signals, the features of a run one by one and losses that are not finite stand in test_faults.py; checkpoints that go from one
kind of training to another in test_faults_files.py.
"""

import argparse
import random
import signal
import time

import pytest
import torch
from conftest import OPTIONS, TINY, refused
from processes import TIMEOUT, kill_in_save, signal_in, tell_of
from test_faults import equal, files, go_on, one_error, position
from test_train import same, same_state, stop_after, summary, untimed

import train as train_script
import train_sota
import train_vit
from common import checkpoint
from training import experiment, loop, optimizers, resume

# ---- killed ----------------------------------------------------------------------------------------------------------

KILLS, EPOCHS = 20, 10


def kill_at(forks, arguments, moment, delay, sign):
    """Starts a run and kills it `delay` seconds after a moment (see tell_of); its end, which may have come before that."""
    process = forks.start(*arguments, faults=[tell_of(moment, sign)])
    end = time.monotonic() + TIMEOUT
    while not sign.exists() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    return process.wait()


@pytest.mark.slow
def test_twenty_kills_at_random_moments(forks, tmp_path):
    """The moments are the opening of the directory or one of the next steps, and up to a tenth of a second more.

    A run that ends before its kill is followed by another one; only kills that cut a run short count.
    """
    options = (
        *TINY,
        "--device",
        "cpu",
        "--epochs",
        EPOCHS,
        "--ema-decay",
        0.8,
        "--mixup",
        0.4,
        "--val-size",
        10,
        "--batch-size",
        28,
    )
    whole = tmp_path / "whole"
    assert forks.run(*options, "--output-dir", whole).returncode == 0
    draw, kills, inside, runs = random.Random(20), 0, 0, []
    while kills < KILLS:
        runs.append(tmp_path / f"cut-{len(runs)}")
        assert len(runs) <= KILLS
        arguments, status = (*options, "--output-dir", runs[-1]), None
        while status != 0 and kills < KILLS:
            moment, delay = draw.randrange(6), draw.uniform(0, 0.1)
            if not (runs[-1] / "last.pt").exists():
                moment = max(1, moment)  # from its first step on there is something to go on from
            done = kill_at(forks, arguments, moment, delay, tmp_path / f"sign-{len(runs)}-{kills}")
            status = done.returncode
            assert status in (0, -signal.SIGKILL), done.err
            if status:
                kills += 1
                there = position(runs[-1])  # whole, and every epoch that it knows has its row
                inside += 0 < there["epoch"] < EPOCHS
                known = [row["epoch"] for row in untimed(runs[-1])] if there["epoch"] else []
                assert known[: there["epoch"]] == [str(k + 1) for k in range(there["epoch"])]
                arguments = ("--resume", runs[-1], "--device", "cpu")
    assert inside >= KILLS // 2
    if status:
        assert forks.run(*arguments).returncode == 0
    for directory in runs:
        assert equal(whole, directory) and not list(directory.glob(".*.tmp"))
        assert [row["epoch"] for row in untimed(directory)] == [str(k + 1) for k in range(EPOCHS)]


# ---- best.pt and summary.json ------------------------------------------------------------------------------------------


def killed_in_step(forks, directory):
    """Goes on with a run until its next step, and kills it there."""
    done = forks.run(
        "--resume", directory, "--device", "cpu", faults=[signal_in("first batch", signal.SIGKILL)]
    )
    assert done.returncode == -signal.SIGKILL, done.err


@pytest.mark.parametrize("lost", ["missing", "foreign"])
def test_the_best_checkpoint_is_made_anew_from_the_last_one(forks, whole, tmp_path, lost):
    """Of a run that was killed after the last.pt of its best epoch and before its best.pt."""
    cut = tmp_path / "cut"
    forks.run(*OPTIONS, "--output-dir", cut, faults=[kill_in_save(2, "renamed")])
    state, best = checkpoint.load(cut / "last.pt"), cut / "best.pt"
    assert state["training"]["best"]["epoch"] == position(cut)["epoch"] == 1 and not best.exists()
    if lost == "foreign":
        other = checkpoint.load(whole / "best.pt")
        checkpoint.save(other | {"metric": other["metric"] | {"epoch": 3}}, best)
    killed_in_step(forks, cut)
    found = checkpoint.load(best)
    assert same(found["state_dict"], state["ema"]["average"]) and found["metric"]["epoch"] == 1
    go_on(forks, cut)
    assert equal(whole, cut)


@pytest.mark.parametrize("how", ["missing", "damaged", "foreign"])
def test_a_best_checkpoint_that_the_test_will_miss_is_told_before_the_training(
    forks, tmp_path, how
):
    """With held-out images, where it can't be made anew: of an epoch before the last one."""
    cut, options = (
        tmp_path / "cut",
        (*OPTIONS, "--lr", 0),
    )  # without any learning the first epoch stays the best
    forks.run(*options, "--output-dir", cut, faults=[kill_in_save(3, "renamed")])
    best = cut / "best.pt"
    contents = checkpoint.load(best)
    assert contents["metric"]["epoch"] == 1 and position(cut)["epoch"] == 2
    if how == "foreign":
        checkpoint.save(contents | {"metric": contents["metric"] | {"epoch": 2}}, best)
    elif how == "damaged":
        best.write_bytes(best.read_bytes()[:-100])
    else:
        best.unlink()
    before = files(cut)
    one_error(forks.run("--resume", cut, "--device", "cpu"), "best.pt")
    assert files(cut) == before
    checkpoint.save(contents, best)
    assert "test accuracy" in go_on(forks, cut).out


def test_what_the_summary_said_before_is_gone_while_a_run_goes_on(forks, copy, tmp_path):
    cut = tmp_path / "cut"
    forks.run(*OPTIONS, "--output-dir", cut, faults=[signal_in("training", signal.SIGTERM)])
    assert summary(cut)["status"] == "interrupted"
    killed_in_step(forks, cut)
    assert not (cut / "summary.json").exists()
    refused = forks.run("--resume", copy, "--device", "cpu", "--batch-size", 8)
    assert refused.returncode == 2 and summary(copy)["status"] == "finished"


# ---- arguments ---------------------------------------------------------------------------------------------------------

SAYS_WHERE = {"config", "output_dir", "resume", "resume_previous", "help"}


def another(action, value):
    """A value, as a word of the command line, that an option takes and a run doesn't have."""
    if action.choices:
        return next(str(choice) for choice in action.choices if choice != value)
    if action.dest in ("augment", "model", "model_arg"):
        return {"augment": "flip", "model": "resnet32", "model_arg": "shortcut=pad"}[action.dest]
    if action.type is None:
        return "another"
    return next(word for word in ("1", "0.5", "9") if _takes(action, word) not in (None, value))


def _takes(action, word):
    try:
        return action.type(word)
    except argparse.ArgumentTypeError:
        return None


@pytest.mark.parametrize("script", [train_script, train_vit, train_sota])
def test_every_argument_is_refused_by_name_or_free(whole, script):
    """Not a list of fields: whatever option is added later must be one or the other, or be train_sota.py's for one call."""
    saved = checkpoint.load(whole / "last.pt")["training"]["arguments"]
    of_the_call = SAYS_WHERE | set(getattr(script, "OWN", ()))
    actions = [
        action for action in script.build_parser()._actions if action.dest not in of_the_call
    ]
    words = {
        action.dest: [action.option_strings[0]]
        + [another(action, saved[action.dest])] * (action.nargs != 0)
        for action in actions
    }
    for name, option in words.items():
        arguments = ["--resume", str(whole), *option]
        if name in resume.FREE:
            args, _, _ = experiment.resolve_arguments(script.build_parser(), arguments)
            assert getattr(args, name) != saved[name]
        else:
            with refused("can't go on with", f"{option[0]} is ", " there, not ") as error:
                experiment.resolve_arguments(script.build_parser(), arguments)
            assert error.value.status == 2
    together = [
        word for name, option in words.items() if name not in resume.FREE for word in option
    ]
    with refused("can't go on with") as error:
        experiment.resolve_arguments(script.build_parser(), ["--resume", str(whole), *together])
    for name in words.keys() - resume.FREE:
        assert f"{words[name][0]} is " in str(error.value)


def test_what_train_sota_has_of_its_own_goes_with_a_run_and_leaves_it_alone(copy, capsys):
    before = files(copy)
    assert train_sota.main(["--resume", str(copy), "--dry-run", "--gpu-memory", "24"]) == 0
    assert "resnet20, 32 px, 10 classes" in capsys.readouterr().out
    for words, message in (
        (["--smoke"], "leave --resume out"),
        (["--gpu-memory", "24"], "--gpu-memory goes with --dry-run"),
    ):
        with refused("", message) as error:
            train_sota.main(["--resume", str(copy), *words])
        assert error.value.status == 2
    assert files(copy) == before


def test_the_command_that_began_a_run_goes_on_with_it(train, monkeypatch):
    """With --resume in the place of --output-dir; "auto" is what it was."""
    options = (*TINY, "--epochs", 2, "--warmup-epochs", "auto", "--ema-decay", "auto")
    whole = train(*options, output="whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        cut = train(*options, output="cut", status=143)
    with refused("can't go on with", "--warmup-epochs is 0.2 there, not 1.0"):
        train("--resume", cut, "--warmup-epochs", 1)
    with refused("can't go on with", "--weights is not given there, not x.pt"):
        train("--resume", cut, "--weights", "x.pt")
    train("--resume", cut, *options)
    assert untimed(whole) == untimed(cut) and same_state(whole, cut)


@pytest.mark.parametrize(
    ("schedule", "steps", "allowed"),
    [
        ("cosine", 2, True),  # in the warmup of three steps
        ("cosine", 5, False),
        ("linear", 5, False),
        ("one_cycle", 3, True),
        ("multi_step", 5, True),  # before the first fall of the rate, at the sixth step of twelve
        ("multi_step", 7, False),
    ],
)
def test_a_run_is_extended_as_if_it_had_been_asked_at_the_start_or_not_at_all(
    train, monkeypatch, schedule, steps, allowed
):
    options = ("--schedule", schedule, "--warmup-epochs", 1, "--ema-decay", 0.8)
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        cut = train(*options, "--epochs", 4, output="cut", status=143)
    if allowed:
        train("--resume", cut, "--epochs", 5)
        whole = train(*options, "--epochs", 5, output="whole")
        assert untimed(whole) == untimed(cut) and same_state(whole, cut)
        assert summary(cut)["test_acc"] == summary(whole)["test_acc"]
    else:
        before = files(cut)
        with refused("--epochs 5", schedule, "start a new run") as error:
            train("--resume", cut, "--epochs", 5)
        assert error.value.status == 2 and files(cut) == before


@pytest.mark.parametrize(("before", "after"), [("off", "fp16"), ("fp16", "bf16")])
def test_a_run_goes_on_in_another_precision(train, monkeypatch, before, after):
    options = ("--epochs", 2, "--ema-decay", 0.8)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        cut = train(*options, "--amp", before, output="cut", status=143)
    train("--resume", cut, "--amp", after)
    whole = train(*options, "--amp", before, output="whole")
    ours, theirs = (float(untimed(directory)[-1]["train_loss"]) for directory in (cut, whole))
    assert ours == pytest.approx(theirs, rel=0.05) and ours != theirs


def test_a_model_that_is_infinite_only_when_it_is_evaluated_stops_the_run(train, monkeypatch):
    """From the second epoch on; its training figures are as good as ever."""
    real, calls = loop.evaluate, []

    def evaluate(model, batches, **options):
        calls.append(1)
        hook = (
            model.register_forward_hook(lambda module, inputs, logits: logits * float("inf"))
            if len(calls) > 1
            else None
        )
        found = real(model, batches, **options)
        if hook:
            hook.remove()
        return found

    options = ("--epochs", 3, "--ema-decay", 0)
    whole = train(*options, output="whole")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", evaluate)
        with refused(
            "the test loss after step 6 (epoch 2) is nan, with learning rate", "last good one"
        ) as error:
            train(*options, output="cut")
    cut = whole.with_name("cut")
    assert (
        error.value.status == 1
        and summary(cut)["status"] == "failed"
        and position(cut)["epoch"] == 1
    )
    train("--resume", cut)
    assert untimed(whole) == untimed(cut) and same_state(whole, cut)


@pytest.mark.parametrize("owner", [torch.nn.Module, torch.optim.Optimizer])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB."),
        RuntimeError(
            "Error(s) in loading state_dict for ResNet: an exception occurred : ('CUDA out of memory. Tried …',)"
        ),
    ],
    ids=["raised", "reported"],
)
def test_running_out_of_memory_on_resume_is_no_misfit(train, monkeypatch, owner, error):
    directory = train(
        "--epochs", 1, "--schedule", "constant", "--warmup-epochs", 0, "--ema-decay", 0
    )

    def load_state_dict(self, state, *rest, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, "load_state_dict", load_state_dict)
        with refused("out of memory with 32 images of 32 px at once: try --micro-batch 16") as told:
            train("--resume", directory, "--epochs", 2)
    assert told.value.status == 1
    train("--resume", directory, "--epochs", 2)


def test_gradient_checkpointing_counts_each_image_once_in_batch_norm(train, monkeypatch):
    """The weights and statistics are those of a run without it, also where it is switched on for the rest of a run."""
    options = ("--model", "timm/test_resnet", "--epochs", 2, "--accumulate", 2, "--ema-decay", 0.8)
    plain = train(*options, output="plain")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        cut = train(*options, output="cut", status=143)
    train("--resume", cut, "--grad-checkpointing")
    checkpointed = train(*options, "--grad-checkpointing", output="checkpointed")
    state = checkpoint.load(plain / "last.pt")
    assert any("running_var" in name for name in state["state_dict"])
    for directory in (cut, checkpointed):
        other = checkpoint.load(directory / "last.pt")
        assert untimed(plain) == untimed(directory)
        assert all(same(state[key], other[key]) for key in ("state_dict", "ema"))
        assert same(state["training"]["optimizer"], other["training"]["optimizer"])


def test_a_muon_run_keeps_adamw_averages_for_its_first_and_last_layer(train):
    state = checkpoint.load(train("--epochs", 1, "--optimizer", "muon") / "last.pt")
    momenta, averages = (
        [
            tuple(each[name].shape)
            for each in state["training"]["optimizer"]["state"].values()
            if name in each
        ]
        for name in ("momentum_buffer", "exp_avg_sq")
    )
    edges = {tuple(state["state_dict"][name].shape) for name in ("stem.0.weight", "fc.weight")}
    assert edges == {shape for shape in averages if len(shape) > 1} and not edges & set(momenta)
    assert len(momenta) == 20  # the filters in between, shortcuts included


@pytest.mark.parametrize("steps", [None, 4])
def test_a_muon_run_from_before_its_groups_were_divided_continues_as_it_began(
    train, monkeypatch, steps
):
    """Muon keeps the classifier and the first convolution then; `steps` is None for a run that was killed before its first."""
    options = ("--epochs", 2, "--optimizer", "muon", "--ema-decay", 0.8)
    with monkeypatch.context() as patch:
        patch.setattr(optimizers, "muon_groups", lambda groups, model, saved=None: groups)
        whole = train(*options, output="whole")
        if steps:
            stop_after(patch, steps)
            cut = train(*options, output="cut", status=143)
        else:
            patch.setattr(loop, "fit", interrupted_at_once)
            cut = train(*options, output="cut", status=143)
    train("--resume", cut)
    assert untimed(whole) == untimed(cut) and same_state(whole, cut)


def interrupted_at_once(*_, **__):
    raise loop.Interrupted
