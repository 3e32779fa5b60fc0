"""Several processes train as one: real ones, started by torchrun, on the CPU."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, refused
from processes import signal_in, terminate_job_in
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_faults import equal
from test_train import rows, stop_after, summary

import train as train_script
from common import checkpoint
from datasets import shapes
from models import create_model
from models.weights import load_checkpoint
from training import distributed, loop
from training.distributed import Ranks, join, shard
from training.sync_batch_norm import SyncBatchNorm

NO_BATCH_NORM = (
    "--model",
    "vit_custom",
    "--model-arg",
    "width=24",
    "--model-arg",
    "depth=2",
    "--model-arg",
    "heads=2",
    "--drop-path",
    0,
    "--lr",
    1e-3,
)
EVA = (
    "--model",
    "timm/eva_giant_patch14_336",
    "--model-arg",
    "depth=2",
    "--model-arg",
    "embed_dim=48",
    "--model-arg",
    "num_heads=3",
    "--image-size",
    28,
    "--lr",
    1e-3,
)  # with buffers that are averaged, too
COMMON = (
    *TINY[:-2],
    "--batch-size",
    36,
    "--limit-train",
    144,
    "--epochs",
    2,
    "--amp",
    "off",
    "--device",
    "cpu",
    "--ema-decay",
    0.8,
)


@pytest.fixture(autouse=True)
def all_shapes(train, monkeypatch, real=shapes.load_shapes):
    """The pictures that processes of their own have, not the few of other tests."""
    monkeypatch.setattr(shapes, "load_shapes", real)


def torchrun(world, *arguments, script="train_vit.py", **options):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={world}",
        "--standalone",
        ROOT / script,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [str(word) for word in (*command, *arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def finish(process, status=0):
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert (process.returncode == 0) == (status == 0), err
    return out, err


def curve(directory):
    names = ("train_loss", "test_loss", "ema_test_loss", "train_acc", "test_acc")
    return torch.tensor([[float(row[name]) for name in names] for row in rows(directory)])


def right(directory):
    """The accuracy (%) that the confusion matrix in the run's events has."""
    events = EventAccumulator(str(directory), size_guidance={"tensors": 0}).Reload()
    text = events.Tensors("confusion/text_summary")[0].tensor_proto.string_val[0].decode()
    counts = torch.tensor(
        [[int(cell) for cell in line.split("|")[2:-1]] for line in text.splitlines()[2:]]
    )
    return 100 * counts.diagonal().sum().item() / counts.sum().item()


@pytest.mark.parametrize(
    ("world", "model"),
    # Batch norm and ReLU magnify rounding: in float64 the gradients agree to 1e-13, in fp32 to half a percent. Hence the rate.
    [
        (2, NO_BATCH_NORM),
        (2, (*EVA, "--fsdp")),
        (3, (*NO_BATCH_NORM, "--accumulate", 2)),
        (2, ("--model", "resnet20", "--sync-bn", "--lr", 1e-5)),
        (3, (*NO_BATCH_NORM, "--fsdp", "--limit-test", 49, "--clip-grad", 1)),
    ],
    ids=["2", "fsdp-buffers", "3", "sync-bn", "fsdp"],
)
def test_the_curve_does_not_depend_on_the_number_of_ranks(train, tmp_path, world, model):
    """Accuracies are compared too: of all images, each counted once."""
    alone = train(*COMMON, *(word for word in model if word != "--fsdp"), output="alone")
    out, _ = finish(torchrun(world, *COMMON, *model, "--output-dir", tmp_path / "company"))
    assert (
        f"on {world} x cpu" in out and len(out.splitlines()) == 4
    )  # the first rank's lines, and nobody else's
    torch.testing.assert_close(curve(tmp_path / "company"), curve(alone), rtol=1e-5, atol=1e-5)
    assert right(tmp_path / "company") == pytest.approx(
        summary(tmp_path / "company")["test_acc"], abs=1e-3
    )
    ours, theirs = (
        load_checkpoint(path / "last.pt")[0].state_dict() for path in (alone, tmp_path / "company")
    )
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-3, atol=1e-4, msg=key)


OURS = 'train_vit.py", line'  # of a traceback; torchrun prints one of its own when a rank fails


def ranks_of(process):
    """Process ids of the ranks: torchrun's children."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_signal_to_one_rank_ends_all_and_one_process_goes_on(train, tmp_path):
    many = ("--epochs", 200)
    cut = tmp_path / "cut"
    process = torchrun(
        2,
        *COMMON,
        *NO_BATCH_NORM,
        *many,
        "--schedule",
        "constant",
        "--warmup-epochs",
        0,
        "--output-dir",
        cut,
    )
    wait_for(cut / "metrics.csv", process)
    os.kill(ranks_of(process)[1], signal.SIGTERM)  # not the one that writes
    out, err = finish(process, status=1)
    found = summary(cut)
    assert found["status"] == "interrupted" and "go on with --resume" in out and OURS not in err
    done = checkpoint.load(cut / "last.pt")["training"]["progress"]
    assert (
        4 <= done["step"] < 800
        and done["step"] == 4 * done["epoch"] + done["batch"] == found["steps"]
    )
    train("--resume", cut, "--epochs", done["epoch"] + 1)
    alone = train(
        *COMMON,
        *NO_BATCH_NORM,
        "--epochs",
        done["epoch"] + 1,
        "--schedule",
        "constant",
        "--warmup-epochs",
        0,
        "--ema-decay",
        0.8,
        output="alone",
    )
    torch.testing.assert_close(curve(cut)[:, :3], curve(alone)[:, :3], rtol=1e-3, atol=1e-3)
    assert len(curve(cut)) == done["epoch"] + 1


@pytest.fixture
def with_faults(tmp_path):
    """with_faults(faults) -> a script for torchrun: train.py after these faults of processes.py, with few shapes."""

    def write(faults):
        script = tmp_path / "faulty.py"
        script.write_text(
            f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
            f"import cli, engine, processes, sources, train\n"
            f"shapes = sources.load_shapes(train=400, test=100)\nsources.load_shapes = lambda: shapes\n"
            f"for name, arguments in {faults!r}:\n    processes.FAULTS[name](*arguments)\ncli.run(train.main)\n"
        )
        return script

    return write


# Sender and phases of processes.py: the first SIGTERMs, and in two of them more while the state is saved.
MOMENTS = [(1, ["training"]), (0, ["evaluation"]), (0, ["saving"]), (0, ["first batch", "saving"])]
MORE = [
    (0, ["training"]),
    (1, ["evaluation"]),
    *((rank, [phase]) for phase in ("first batch", "test") for rank in (0, 1)),
]
MOMENTS += [pytest.param(*moment, marks=pytest.mark.soak) for moment in MORE]


CUT = (
    *COMMON,
    *NO_BATCH_NORM,
    "--val-size",
    24,
    "--batch-size",
    30,
    "--schedule",
    "constant",
    "--warmup-epochs",
    0,
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, few_shapes):
    """The rows of the run that is cut."""
    directory = tmp_path_factory.mktemp("runs") / "alone"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "load_shapes", lambda: few_shapes)
        assert train_script.main([str(word) for word in (*CUT, "--output-dir", directory)]) == 0
    return rows(directory)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("rank", "phases"), MOMENTS)
def test_sigterm_to_torchrun_and_every_rank_loses_no_step(
    train, uninterrupted, few_shapes, tmp_path, monkeypatch, with_faults, rank, phases
):
    monkeypatch.setattr(shapes, "load_shapes", lambda: few_shapes)
    cut, sign = tmp_path / "cut", tmp_path / "sign"
    script = with_faults([terminate_job_in(phases, rank, sign)])
    out, err = finish(torchrun(2, *CUT, "--output-dir", cut, script=script), status=1)
    found, done = summary(cut), checkpoint.load(cut / "last.pt")["training"]["progress"]
    assert (found["status"], found.get("signal")) == ("interrupted", signal.SIGTERM), (found, err)
    assert f"--resume {cut}" in out.splitlines()[-1] and 'faulty.py", line' not in err
    assert found["steps"] == done["step"] >= int(sign.read_text())
    if "saving" not in phases:  # epochs are saved in the background, while the next steps run
        assert done["step"] - int(sign.read_text()) <= 1
    train("--resume", cut)
    assert summary(cut)["status"] == "finished" and len(rows(cut)) == len(uninterrupted)
    for ours, theirs in zip(rows(cut), uninterrupted):
        for name in ("train_loss", "val_loss", "ema_val_loss"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-3)


@pytest.mark.parametrize("how", [(), ("--fsdp",)], ids=["ddp", "fsdp"])
def test_a_run_of_one_process_goes_on_in_two_with_held_out_images(
    train, tmp_path, monkeypatch, how
):
    options = (*COMMON, *NO_BATCH_NORM, "--val-size", 20, "--batch-size", 30)
    alone = train(*options, output="alone")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        cut = train(*options, output="cut", status=143)
    finish(torchrun(2, "--resume", cut, *how))
    assert summary(cut)["status"] == "finished"
    assert summary(cut)["test_acc"] == pytest.approx(
        summary(alone)["test_acc"], abs=2.01
    )  # one picture of fifty
    assert [row["step"] for row in rows(cut)] == [row["step"] for row in rows(alone)]
    for ours, theirs in zip(rows(cut), rows(alone)):
        for name in ("train_loss", "val_loss", "ema_val_loss"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-5)


@pytest.mark.slow
def test_a_run_resumes_from_shards_and_from_whole_models_alike(train, tmp_path):
    """Momenta of shards are contiguous, others channels_last: see optim.load_optimizer."""
    options = (
        *COMMON,
        "--model",
        "resnet20",
        "--sync-bn",
        "--optimizer",
        "adamw",
        "--lr",
        1e-4,
        "--schedule",
        "constant",
        "--warmup-epochs",
        0,
    )
    alone = curve(train(*options, "--epochs", 4, output="alone"))

    def assert_as_alone(directory, epochs):
        """The losses; accuracies are of few images."""
        assert summary(directory)["epochs"] == epochs
        torch.testing.assert_close(curve(directory)[:, :3], alone[:epochs, :3], rtol=0, atol=2e-4)

    cut = train(*options, "--epochs", 1, output="cut")
    finish(torchrun(2, "--resume", cut, "--epochs", 2, "--fsdp", script="train.py"))
    assert_as_alone(cut, 2)
    single = Path(shutil.copytree(cut, tmp_path / "single"))
    train("--resume", single, "--epochs", 3)
    assert_as_alone(single, 3)
    finish(torchrun(2, "--resume", cut, "--epochs", 3, "--no-fsdp", script="train.py"))
    assert_as_alone(cut, 3)
    finish(torchrun(2, "--resume", cut, "--epochs", 4, "--fsdp", script="train.py"))
    assert_as_alone(cut, 4)


@pytest.mark.slow
def test_three_ranks_resume_to_the_same_bits(forks, tmp_path):
    """A sum of three depends on its order, and that on where DistributedDataParallel keeps each gradient."""
    options = (*COMMON, *NO_BATCH_NORM, "--optimizer", "adam")
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def finish_ranks(*arguments, faults=()):
        return [rank.wait().returncode for rank in forks.start_ranks(3, *arguments, faults=faults)]

    assert finish_ranks(*options, "--output-dir", whole) == [0, 0, 0]
    assert (
        finish_ranks(*options, "--output-dir", cut, faults=[signal_in("training", signal.SIGTERM)])
        == [143] * 3
    )
    assert finish_ranks("--resume", cut, "--device", "cpu") == [0, 0, 0]
    assert equal(whole, cut)


def test_bad_input_is_said_once(tmp_path):
    _, err = finish(
        torchrun(2, *COMMON, *NO_BATCH_NORM, "--batch-size", 35, "--output-dir", tmp_path / "run"),
        status=2,
    )
    said = [
        line
        for line in err.splitlines()
        if "--batch-size 35 can't be divided among 2 processes" in line
    ]
    assert len(said) == 1 and OURS not in err and not (tmp_path / "run").exists()


def test_synchronised_batch_norm_is_batch_norm_of_a_process_alone(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        ours, theirs = SyncBatchNorm(5), torch.nn.BatchNorm2d(5)
        for norm in (ours, theirs):
            torch.manual_seed(0)
            torch.nn.init.normal_(norm.weight)
            torch.nn.init.normal_(norm.bias)
        x = torch.randn(4, 5, 3, 3) * 3 + 7
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        for norm, each in zip((ours, theirs), inputs):
            norm(each).sin().sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-5)
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value)
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    finally:
        torch.distributed.destroy_process_group()


def test_after_an_error_nccl_is_not_waited_for(monkeypatch):
    """Taking it down in order would wait for collectives that the other ranks may never join."""
    began, ended = [], []
    place = dict(
        RANK=0,
        WORLD_SIZE=2,
        LOCAL_RANK=0,
        LOCAL_WORLD_SIZE=2,
        MASTER_ADDR="localhost",
        MASTER_PORT=1,
    )
    for key, value in place.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setattr(
        torch.distributed,
        "init_process_group",
        lambda backend, **options: began.append((backend, options)),
    )
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: ended.append(1))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name, left in (("cuda", 0), ("cpu", 1)):
        with pytest.raises(ValueError, match="wrong"), join(torch.device(name), 8):
            raise ValueError("wrong")
        assert len(ended) == left
    with join(torch.device("cuda"), 8) as company:
        assert company.device == torch.device("cuda", 0)
    assert len(ended) == 2 and [backend for backend, _ in began] == ["nccl", "gloo", "nccl"]
    assert all(options["timeout"].total_seconds() > 600 for _, options in began)


@pytest.mark.parametrize(
    "given", [{}, dict(RANK=0, LOCAL_RANK=0, MASTER_ADDR="localhost", MASTER_PORT=1)]
)
def test_half_of_what_torchrun_sets_is_refused(monkeypatch, given):
    for key in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    for key, value in (given | dict(WORLD_SIZE=2)).items():
        monkeypatch.setenv(key, str(value))
    with (
        refused(
            "WORLD_SIZE is 2, but", "LOCAL_WORLD_SIZE", "start the processes with torchrun"
        ) as error,
        join(torch.device("cpu"), 8),
    ):
        pass
    assert error.value.status == 2


def test_each_rank_evaluates_as_many_images_at_once_as_a_process_alone(train, monkeypatch):
    """The second process is only counted on: what it says is what this one says."""
    monkeypatch.setattr(Ranks, "sum", lambda self, values: values)
    monkeypatch.setattr(Ranks, "spread", lambda self, tensors: None)
    monkeypatch.setattr(Ranks, "parallel", lambda self, model: model)
    monkeypatch.setattr(Ranks, "one_first", lambda self: contextlib.nullcontext())
    options = (
        "--limit-train",
        144,
        "--limit-test",
        1100,
        "--batch-size",
        144,
        "--epochs",
        1,
        "--ema-decay",
        0,
    )
    sizes = {}
    for world in (1, 2):
        seen = sizes[world] = []

        def evaluate(model, batches, real=loop.evaluate, seen=seen, **options):
            hook = model.register_forward_pre_hook(
                lambda module, inputs: seen.append(len(inputs[0]))
            )
            try:
                return real(model, batches, **options)
            finally:
                hook.remove()

        with monkeypatch.context() as patch:
            patch.setattr(
                distributed,
                "join",
                lambda device, size, n=world: contextlib.nullcontext(Ranks(device, 0, n)),
            )
            patch.setattr(loop, "evaluate", evaluate)
            train(*options, output=str(world))
    assert sizes == {1: [500, 500, 100], 2: [500, 50]}


def test_a_process_alone_talks_to_nobody():
    alone = Ranks(torch.device("cpu"))
    values, model = torch.ones(2), torch.nn.Linear(1, 1)
    assert (
        alone.sum(values) is values
        and alone.parallel(model) is model
        and alone.any(True)
        and not alone.any(None)
    )


def test_a_model_with_scalar_parameters_can_not_be_sharded():
    with torch.device("meta"):
        model = create_model("nfnet_f0", 10)
    with refused("--fsdp can't divide", "skipinit_gain", "a parameter of a single number"):
        shard(model, Ranks(torch.device("cpu"), world=2))
