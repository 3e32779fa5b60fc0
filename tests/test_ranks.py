"""Several processes train as one, on the CPU: by torchrun, or forked with its variables."""

import os
import shutil
import signal
import socket
import sys
from argparse import Namespace

import pytest
import torch
from helpers.errors import refused
from helpers.faults import terminate_job
from helpers.paths import ROOT
from helpers.processes import encode, output, torchrun
from helpers.runs import CNN, CONSTANT, TINY, VIT, progress, rows, summary, words
from helpers.training import CPU, evaluate_checkpoint, network, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datasets.splits import limit
from models import create_model
from models.weights import load_checkpoint
from training.distributed import Ranks, _read_environment, join, shard
from training.run import Run
from training.sync_batch_norm import SyncBatchNorm

EVA = words(
    "--model timm/eva_giant_patch14_336 --model-arg depth=2 --model-arg embed_dim=48 "
    "--model-arg num_heads=3 --image-size 28 --lr 0.001"
)
STEADY = [*VIT, "--drop-path", "0"]  # each rank draws its own paths
COMMON = [*TINY, *CONSTANT, *words("--device cpu --epochs 2 --amp off --lr 0.001")]
COMMON += words("--batch-size 36 --limit-train 144")
HELD_OUT = words("--val-size 24 --batch-size 30")


def curve(directory):
    """(epochs, losses and accuracies) of metrics.csv"""
    names = [name for name in rows(directory)[0] if name.endswith(("loss", "acc"))]
    return torch.tensor([[float(row[name]) for name in names] for row in rows(directory)])


def losses(directory):
    names = [name for name in rows(directory)[0] if name.endswith("loss")]
    return torch.tensor([[float(row[name]) for name in names] for row in rows(directory)])


def accuracy_of_confusion(directory):
    """The accuracy (%) of the confusion matrix in the run's TensorBoard events."""
    events = EventAccumulator(str(directory), size_guidance={"tensors": 0}).Reload()
    text = events.Tensors("confusion/text_summary")[0].tensor_proto.string_val[0].decode()
    cells = [[int(cell) for cell in line.split("|")[2:-1]] for line in text.splitlines()[2:]]
    counts = torch.tensor(cells)
    return 100 * counts.diagonal().sum().item() / counts.sum().item()


# ---- the same results ----------------------------------------------------------------------------


# Batch norm and ReLU magnify rounding: in float64 the gradients agree to 1e-13, in fp32 to 0.5 %.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "model", "options"),
    [
        (2, STEADY, ""),
        (2, EVA, "--fsdp"),  # with buffers that are averaged, too
        (3, STEADY, "--accumulate 2"),
        (2, words("--model resnet20"), "--sync-bn --lr 0.00001"),
        (3, STEADY, "--fsdp --limit-test 49 --clip-grad 1"),
    ],
    ids=["two", "sharded buffers", "three", "batch norm", "sharded"],
)
def test_the_curve_is_independent_of_the_number_of_ranks(forks, tmp_path, world, model, options):
    """Accuracies are compared, too: each image counts once."""
    one, several = tmp_path / "one", tmp_path / "several"
    start = (*COMMON, *model, *words(options), "--output-dir")
    forks.run(*(word for word in start if word != "--fsdp"), one, script="train_sota")
    out = forks.run_ranks(world, *start, several, script="train_sota")
    assert f"on {world} x cpu" in out
    torch.testing.assert_close(curve(several), curve(one), rtol=1e-5, atol=1e-5)
    accuracy = pytest.approx(summary(several)["test_acc"], abs=1e-3)
    assert accuracy_of_confusion(several) == accuracy
    states = [load_checkpoint(path / "last.pt")[0].state_dict() for path in (several, one)]
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("ema_decay", [0, 0.8])
def test_every_rank_evaluates_with_the_statistics_that_are_saved(
    forks, tmp_path, few_shapes, ema_decay
):
    """In training each rank has statistics of batch norm of its own."""
    options = words("--epochs 2 --lr 0.1 --batch-size 36 --amp off --ema-decay")
    run = tmp_path / "run"
    forks.run_ranks(2, *TINY, *CNN, *options, ema_decay, "--device", "cpu", "--output-dir", run)
    examples = limit(few_shapes.test, 50, "--limit-test")
    expected = evaluate_checkpoint(run / "last.pt", examples)["loss"]
    measured = rows(run)[-1]["ema_test_loss" if ema_decay else "test_loss"]
    assert float(measured) == pytest.approx(expected, rel=1e-5)


def test_the_final_test_has_the_statistics_of_the_first_rank():
    """Where the moving average is on the host, those of an evaluation were of a copy."""

    class Second(Ranks):
        def broadcast(self, tensors):
            for tensor in tensors:
                tensor.fill_(7)

    state = start(network(norm=True), ema_decay=0.9)
    ranks, directory = Second(CPU, rank=1, world_size=2), Namespace(wait=lambda: None)
    run = Namespace(state=state, ranks=ranks, directory=directory, split=Namespace(val=None))
    with Run._tested_weights(run) as model:
        assert model is state.average.model and (model[1].running_mean == 7).all()


@pytest.mark.slow
def test_a_convolutional_run_moves_between_shards_ranks_and_one_process(forks, tmp_path):
    """Momenta of shards are contiguous, others channels_last: see optimizers.load_optimizer."""
    options = [*COMMON, *HELD_OUT, *words("--sync-bn --optimizer adamw --lr 0.0001")]
    one, cut, single = (tmp_path / name for name in ("one", "cut", "single"))
    forks.run(*options, "--epochs", 4, "--output-dir", one, script="train_sota")
    expected = losses(one)

    def resume(world, directory, epochs, *more):
        words = ("--resume", directory, "--epochs", epochs, "--device", "cpu", *more)
        forks.run_ranks(world, *words, script="train_sota")
        assert summary(directory)["epochs"] == epochs
        torch.testing.assert_close(losses(directory), expected[:epochs], rtol=0, atol=2e-4)

    forks.run(*options, "--epochs", 1, "--output-dir", cut, script="train_sota")
    resume(2, cut, 2, "--fsdp")
    shutil.copytree(cut, single)
    resume(1, single, 3)
    resume(2, cut, 3, "--no-fsdp")
    resume(2, cut, 4, "--fsdp")


# ---- signals -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process(forks, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "one"
    forks.run(*COMMON, *HELD_OUT, *STEADY, "--output-dir", directory)
    return directory


# The rank that sends the signals and the phases: in two of them more SIGTERMs come during the save.
MOMENTS = [(1, ["training"]), (0, ["evaluation"]), (0, ["saving"]), (0, ["first step", "saving"])]
MORE = [(0, ["training"]), (1, ["evaluation"]), (0, ["first step"]), (1, ["test"])]
MOMENTS += [pytest.param(*moment, marks=pytest.mark.soak) for moment in MORE]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("rank", "phases"), MOMENTS)
def test_sigterm_to_torchrun_and_every_rank_loses_no_step(
    forks, one_process, tmp_path, rank, phases
):
    cut, sign = tmp_path / "cut", tmp_path / "sign"
    process = torchrun(
        2,
        *(*COMMON, *HELD_OUT, *STEADY, "--output-dir", cut),
        script=("-m", "helpers.faulty_train"),
        FAULTS=encode([(terminate_job, phases, rank, sign)]),
        PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    )
    out, err = output(process)
    ended, sent = summary(cut), int(sign.read_text())
    assert process.returncode != 0 and 'faulty_train.py", line' not in err, err
    assert (ended["status"], ended.get("signal")) == ("interrupted", signal.SIGTERM), err
    assert f"--resume {cut}" in out.splitlines()[-1]
    assert ended["steps"] == progress(cut)["step"] >= sent
    if "saving" not in phases:  # training continues during a save
        assert ended["steps"] - sent <= 1
    forks.resume(cut)
    assert summary(cut)["status"] == "finished"
    torch.testing.assert_close(losses(cut), losses(one_process), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_an_error_of_all_ranks_is_printed_once(tmp_path):
    process = torchrun(2, *COMMON, *VIT, "--batch-size", 35, "--output-dir", tmp_path / "run")
    _, err = output(process)
    message = "--batch-size 35 can't be divided by 2 processes"
    assert process.returncode != 0 and sum(message in line for line in err.splitlines()) == 1
    assert 'train_vit.py", line' not in err and not (tmp_path / "run").exists()


# ---- units ---------------------------------------------------------------------------------------


def test_synchronized_batch_norm_of_one_process_is_batch_norm(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        ours, theirs = SyncBatchNorm(5), torch.nn.BatchNorm2d(5)
        torch.nn.init.normal_(ours.weight)
        torch.nn.init.normal_(ours.bias)
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(4, 5, 3, 3) * 3 + 7
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        for norm, images in zip((ours, theirs), inputs):
            norm(images).sin().sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    finally:
        torch.distributed.destroy_process_group()


PLACE = dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2)
MASTER = dict(MASTER_ADDR="localhost", MASTER_PORT=1)


def set_environment(monkeypatch, values):
    for name in (*PLACE, *MASTER):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def test_after_an_error_nccl_is_not_shut_down(monkeypatch):
    """That would wait for collectives that the other ranks may never join."""
    started, ended = [], []
    set_environment(monkeypatch, PLACE | MASTER)
    start = lambda backend, **options: started.append((backend, options))  # noqa: E731
    monkeypatch.setattr(torch.distributed, "init_process_group", start)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: ended.append(1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name, shutdowns in (("cuda", 0), ("cpu", 1)):
        args = Namespace(device=name, batch_size=8)
        with pytest.raises(ValueError, match="wrong"), join(args):
            raise ValueError("wrong")
        assert len(ended) == shutdowns
    with join(Namespace(device="cuda", batch_size=8)) as ranks:
        assert ranks.device == torch.device("cuda", 0)
    assert len(ended) == 2 and [backend for backend, _ in started] == ["nccl", "gloo", "nccl"]
    assert all(options["timeout"].total_seconds() > 600 for _, options in started)


@pytest.mark.parametrize(("name", "others"), [("mps", "cpu"), ("cuda:1", "auto, cuda or cpu")])
def test_one_device_for_several_processes_is_refused(monkeypatch, name, others):
    set_environment(monkeypatch, PLACE | MASTER)
    with refused(f"--device {name} is one device for 2 processes: use {others}"):
        _read_environment(torch.device(name), 8)


@pytest.mark.parametrize("given", [{}, dict(RANK=0, LOCAL_RANK=0) | MASTER])
def test_an_incomplete_environment_of_torchrun_is_refused(monkeypatch, given):
    set_environment(monkeypatch, given | {"WORLD_SIZE": 2})
    message = ("WORLD_SIZE is 2, but", "LOCAL_WORLD_SIZE", "start the processes with torchrun")
    with refused(*message) as error, join(Namespace(device="cpu", batch_size=8)):
        pass
    assert error.value.status == 2


def test_variables_that_are_no_numbers_are_refused(monkeypatch):
    for name in PLACE:
        set_environment(monkeypatch, PLACE | MASTER | {name: "two"})
        message = f"{name} must be a number, not 'two': use torchrun"
        with refused(message) as error, join(Namespace(device="cpu", batch_size=8)):
            pass
        assert error.value.status == 2


def test_processes_that_do_not_find_each_other_are_one_line(monkeypatch):
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        set_environment(monkeypatch, PLACE | MASTER | {"MASTER_PORT": port})
        message = f"the processes can't be connected at localhost:{port} ("
        with refused(message), join(Namespace(device="cpu", batch_size=8)):
            pass


def test_a_model_with_scalar_parameters_is_not_sharded():
    with torch.device("meta"):
        model = create_model("nfnet_f0", 10)
    with refused("--fsdp can't shard", "skipinit_gain", "a single number"):
        shard(model, Ranks(torch.device("cpu"), world_size=2))
