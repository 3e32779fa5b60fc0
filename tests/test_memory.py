"""Memory: counted without allocating it, as a real step takes it; how a batch is split to fit."""

import copy
import math
from argparse import Namespace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn as nn
from helpers.errors import refused
from helpers.training import CPU, resolve

import models
import train_sota
from common import free_memory
from models import lora
from models.layers import Conv3x3
from training import fitting, inputs, memory, optimizers, out_of_memory
from training.distributed import Ranks, gather, shard

EVA02, EVA = "timm/eva02_large_patch14_448", "timm/eva_giant_patch14_336"
EVA_SMALL = dict(depth=3, embed_dim=48, num_heads=3, img_size=56), 56
SMALL = {  # model: (options, px)
    "vit_custom": (dict(width=24, depth=3, heads=2), 32),
    "timm/convnext_xxlarge": (dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)), 64),
    EVA02: EVA_SMALL,
    EVA: EVA_SMALL,
    "resnet20": ({}, 32),
}


def build(name, device="cpu", checkpointing=False):
    options, size = SMALL[name]
    with torch.device(device):
        model = models.create_model(name, 10, **options)
    if checkpointing:
        model.set_grad_checkpointing(True)
    return model.train(), size


def weights_of(model):
    return 4 * sum(p.numel() for p in model.parameters())


def test_saved_bytes_of_a_small_network_counted_by_hand():
    """The inputs, the ReLU's outputs (which the next layer keeps as well), and of the loss the
    log-probabilities, the labels and the number that the mean divides by."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 20), nn.ReLU(), nn.Linear(20, 7))
    B = 5
    saved = memory.saved_bytes(model, torch.zeros(B, 3, 4, 4), None)
    assert saved.kept == saved.all == 4 * (B * 48 + B * 20 + B * 7 + 1) + 8 * B


def test_inference_needs_what_exists_at_once():
    """At most the inputs and two outputs of layers, since nothing is kept for a backward pass."""
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Sigmoid(), nn.Conv2d(8, 8, 3, padding=1)]
    model = nn.Sequential(*layers, nn.Sigmoid(), nn.Flatten(), nn.Linear(8 * 16 * 16, 10))
    need = memory.inference_need(model, 16, device="cpu", dtype=None)
    assert need.image == 4 * (3 + 8 + 8) * 16 * 16 and need.copies == need.gradients == 0
    assert need.total(1) == weights_of(model) + need.image


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", SMALL)
def test_activations_are_what_a_real_step_keeps(name, dtype):
    model, size = build(name)
    meta, _ = build(name, "meta")
    models.choose_attention(model, CPU, dtype)
    models.choose_attention(meta, CPU, dtype)
    fixed, image = memory.activations(meta, size, device="cpu", dtype=dtype)
    for B in (3, 8):
        real = memory.saved_bytes(model, torch.randn(B, 3, size, size), dtype).kept
        assert fixed + B * image == pytest.approx(real, rel=0.02)
    # Independent of the batch: autocast's copies of weights, and batch norm's statistics.
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    copies = 2 * sum(layer.weight.numel() for layer in layers) if dtype else 0
    statistics = sum(8 * m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert fixed == pytest.approx(copies + statistics, rel=0.05, abs=500)


def test_patches_are_kept_on_a_cpu_only():
    layers = nn.Sequential(nn.Conv2d(3, 512, 1), Conv3x3(512, 512), nn.Flatten())
    bytes_of = {
        device: memory.activations(copy.deepcopy(layers), 4, device=device, dtype=None)[1]
        for device in ("cpu", "cuda")
    }
    patches, inputs = 4 * 9 * 512 * 16, 4 * 512 * 16
    assert bytes_of["cpu"] - bytes_of["cuda"] == patches - inputs


@pytest.mark.parametrize("name", [name for name in SMALL if name != "resnet20"])
def test_checkpointing_keeps_the_inputs_of_blocks_and_one_block(name):
    (plain, size), (checkpointed, _) = build(name, "meta"), build(name, "meta", checkpointing=True)
    how = dict(device="cpu", dtype=torch.bfloat16)
    fixed, image = memory.activations(plain, size, **how)
    function = torch.utils.checkpoint.checkpoint
    fixed_again, image_again = memory.activations(checkpointed, size, **how)
    assert torch.utils.checkpoint.checkpoint is function
    assert fixed_again == fixed and image / 6 < image_again < image * 0.8


def test_norms_keep_fp32_under_autocast_on_cuda():
    on = {}
    for device in ("cpu", "cuda"):
        model, size = build("timm/convnext_xxlarge", "meta")
        _, on[device] = memory.activations(model, size, device=device, dtype=torch.bfloat16)
    assert 1.02 < on["cuda"] / on["cpu"] < 1.5


def arguments(*argv):
    options, size = SMALL["vit_custom"]
    words = [word for key, value in options.items() for word in ("--model-arg", f"{key}={value}")]
    common = ("--model", "vit_custom", *words, "--image-size", size, "--batch-size", 32)
    return resolve(train_sota, *common, *argv)


def need_of(*argv, world_size=1):
    args = arguments(*argv)
    return memory.need_of_run(args, 10, device="cuda", dtype=torch.bfloat16, world_size=world_size)


def test_weights_gradients_optimizer_state_and_average_are_counted():
    weights, head = weights_of(build("vit_custom", "meta")[0]), 4 * (24 * 10 + 10)

    def counted(*argv, **options):
        need = need_of(*argv, **options)
        return need.parameters, need.gradients, need.optimizer, need.average, need.host

    need = need_of()
    assert counted() == (weights, weights, 2 * weights, weights, 4 * weights)
    assert need.fixed == 5 * weights + need.copies and need.total(7) == need.fixed + 7 * need.image
    assert counted("--optimizer", "sgd")[2] == weights
    assert counted("--ema-decay", 0)[3] == 0
    assert counted("--ema-device", "cpu")[3:] == (0, need.host + weights)
    frozen = ("--freeze-backbone", "--weights", "x.pt", "--optimizer", "adamw")
    assert counted(*frozen)[:3] == (weights, head, 2 * head)
    assert counted("--fsdp", world_size=4)[:3] == (weights // 4, weights // 4, weights // 2)
    assert need_of("--fsdp", world_size=4).image == need.image


def test_a_module_that_is_used_twice_is_counted_once():
    with torch.device("meta"):
        first, shared = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        blocks = nn.Sequential(shared), nn.Sequential(shared)
        model = nn.Sequential(first, *blocks, nn.Flatten(), nn.Linear(8 * 16, 10))
    need = memory.training_need(model, 4, device="cpu", dtype=None, optimizer="sgd")
    assert need.parameters == 4 * (3 * 8 * 9 + 8 + 8 * 8 * 9 + 8 + 8 * 16 * 10 + 10)
    assert need.image > 0


def test_the_largest_micro_batch_leaves_a_tenth_of_the_memory():
    state = dict(parameters=40, gradients=40, optimizer=80, average=40)
    need = memory.Need(**state, copies=0, image=10, host=0)
    assert [need.largest(free) for free in (100, 222, 234, 1000 / 0.9)] == [0, 0, 1, 80]
    assert need.total(80) <= 1000


@pytest.mark.extras("peft")
def test_adapters_are_counted_as_peft_builds_them():
    pytest.importorskip("peft")
    (options, size), rank = SMALL[EVA02], 4
    layers, needs = lora.linear_layers(EVA02, 10, size, options), []
    for add in (lora.add_counted, lora.add_adapters):
        with torch.device("meta"):
            model = add(models.create_model(EVA02, 10, **options), rank, layers)
        how = dict(device="cuda", dtype=torch.bfloat16, optimizer="adamw")
        needs.append(memory.training_need(model, size, **how))
    assert needs[0] == needs[1]
    linear = [m for name, m in build(EVA02)[0].named_modules() if name in layers]
    adapters = sum(rank * (m.in_features + m.out_features) for m in linear)
    assert needs[0].gradients == 4 * (adapters + 48 * 10 + 10)


@pytest.mark.parametrize("images", [1, 2, 7, 16, 33, 128])
def test_a_batch_is_split_into_the_fewest_parts_that_fit(images):
    for limit in range(1, images + 1):
        fits = Mock(side_effect=lambda count, limit=limit: count <= limit)
        parts = fitting.fewest_parts(images, fits)
        fewest = next(k for k in range(1, images + 1) if math.ceil(images / k) <= limit)
        assert math.ceil(images / parts) == math.ceil(images / fewest)
        assert fits.call_count <= 2 * math.log2(images) + 2
    assert fitting.fewest_parts(images, lambda count: False) is None


class Limited(nn.Module):
    """(B, 3, H, W) -> (B, 4); raises the error for more than `most` images."""

    def __init__(self, most, error):
        super().__init__()
        self.norm, self.fc, self.most, self.error = nn.BatchNorm2d(3), nn.Linear(3, 4), most, error
        self.calls = []  # (images, whether there are gradients)

    def forward(self, x):
        self.calls.append((len(x), self.fc.weight.grad is not None))
        if len(x) > self.most:
            raise self.error
        return self.fc(self.norm(x).mean((2, 3)))


@pytest.mark.parametrize("trained", ["", "--freeze-backbone", "--lora-rank 4"])
def test_lookahead_is_counted_as_a_copy_of_what_is_trained(trained):
    def need(*options):
        args = arguments(*trained.split(), *options)
        return memory.need_of_run(args, 10, device="cuda", dtype=None)

    plain, lookahead = need(), need("--lookahead", 5)
    assert lookahead.average - plain.average == plain.gradients  # vit_custom has no buffers
    assert lookahead.host - plain.host == plain.gradients
    assert (plain.gradients < plain.parameters / 2) == bool(trained)


def test_one_image_at_a_time_needs_equal_shares():
    assert fitting.number_of_parts([4, 2, 2], 2) == 2
    with refused("can't train one image at a time where 3 processes have 2 to 4", "multiple of 6"):
        fitting.number_of_parts([4, 2, 2], 1)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_trying_a_step_leaves_the_model_as_it_was(error):
    model = Limited(4, error("CUDA error: out of memory"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert fitting.step_fits(model, 4, 8, None) and not fitting.step_fits(model, 5, 8, None)
    # The second pass is beside the gradients of the first one.
    assert model.calls == [(4, False), (4, True), (5, False)]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def split_batches(monkeypatch, free, *argv, ranks=None, averaged=False):
    """The BatchParts of a run on a device with `free` bytes before the model was placed.

    averaged: whether the model of the moving average was placed, too.
    """
    model, _ = build("vit_custom")
    placed = weights_of(model) * (2 if averaged else 1)
    monkeypatch.setattr(fitting, "available", lambda device: free - placed)
    images = SimpleNamespace(nbytes=10**6, cached=False)
    split = SimpleNamespace(num_classes=10, train=images, val=None, test=images)
    average = copy.deepcopy(model) if averaged else None
    args = arguments(*argv)
    return fitting.split_batches(args, model, average, split, None, ranks or Ranks(CPU))


def test_auto_splits_a_batch_by_the_free_memory(monkeypatch):
    need = memory.need_of_run(arguments(), 10, device="cpu", dtype=None)
    assert need.snapshot == need.host  # the copy that is being saved is in the same memory
    for images, accumulate in ((32, 1), (11, 3)):
        free = need.total(images) / 0.9 + 10
        split = split_batches(monkeypatch, free, "--micro-batch", "auto")
        assert (split.images_at_once, split.accumulate) == (images, accumulate)
        assert split.automatic == {"micro_batch": images}
        assert split.derived == {"accumulate": accumulate}
    with refused("a step of vit_custom with one image needs", "--dry-run"):
        split_batches(monkeypatch, need.total(1) / 0.9 - 100, "--micro-batch", "auto")


def test_a_sharded_average_is_counted_once(monkeypatch):
    monkeypatch.setattr(Ranks, "any", lambda self, flag: flag)
    ranks = Ranks(CPU, world_size=2, sharded=True)
    auto = ("--micro-batch", "auto", "--fsdp")
    need = memory.need_of_run(arguments(*auto), 10, device="cpu", dtype=None, world_size=2)
    free = need.total(8) / 0.9 + 10
    for averaged in (False, True):
        split = split_batches(monkeypatch, free, *auto, ranks=ranks, averaged=averaged)
        assert split.images_at_once == 8


@pytest.mark.parametrize(
    ("argv", "accumulate", "derived"),
    [
        (("--micro-batch", 5), 7, {"accumulate": 7}),
        (("--micro-batch", 0, "--accumulate", 3), 3, {}),
        (("--accumulate", 4), 4, {"micro_batch": 0}),
        (("--micro-batch", 4, "--freeze-backbone", "--weights", "x.pt"), 1, {}),
    ],
)
def test_a_given_split_is_not_changed(monkeypatch, argv, accumulate, derived):
    split = split_batches(monkeypatch, 0, *argv)
    assert (split.accumulate, split.automatic, split.derived) == (accumulate, {}, derived)


def test_automatic_parts_for_the_caches_are_asked_for_explicitly(monkeypatch):
    monkeypatch.setattr(inputs, "CACHED_PIXELS", 8 * 32**2)
    split = split_batches(monkeypatch, 0, "--accumulate", "auto")
    assert (split.accumulate, split.automatic) == (4, {"accumulate": 4})
    assert split.derived == {"micro_batch": 0}


@pytest.mark.parametrize(("world_size", "sync_bn"), [(1, True), (2, False), (2, True)])
def test_a_gpu_tries_a_step_unless_another_rank_would_wait(monkeypatch, world_size, sync_bn):
    """It leaves room for the optimizer's state, the average, the images, and a tenth."""
    step_fits = Mock(return_value=True)
    monkeypatch.setattr(fitting, "step_fits", step_fits)
    monkeypatch.setattr(fitting, "resident_bytes", lambda *_: 10**6)
    monkeypatch.setattr(Ranks, "any", lambda self, flag: flag)
    ranks = Ranks(torch.device("cuda"), world_size=world_size)
    options = ["--sync-bn"] if sync_bn else []
    split = split_batches(monkeypatch, 10**9, "--micro-batch", "auto", *options, ranks=ranks)
    assert split.images_at_once == 32 // world_size
    if world_size > 1 and sync_bn:
        step_fits.assert_not_called()
    else:
        weights, resident = weights_of(build("vit_custom")[0]), 2 * 10**6
        spare = int((1 - memory.USABLE) * (10**9 - resident))
        _, images, _, _, reserve = step_fits.call_args.args
        copies = 3 if world_size == 1 else 4  # AdamW's two, the average, and DDP's buffers
        assert (images, reserve) == (32 // world_size, copies * weights + resident + spare)


def test_a_shard_of_a_model_is_counted_as_a_shard():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
        model = shard(model, Ranks(CPU, rank=1, world_size=4))
        assert memory.tensor_bytes(model.parameters()) == 4 * (64 * 64 + 3 * 64) // 4
        state = gather(model.state_dict())  # on the first rank, which writes files
        assert state["0.weight"] is None and state["1.running_var"].shape == (64,)
        # torch has no fused kernel for shards.
        optimizer = optimizers.build_optimizer("sgd", optimizers.param_groups(model, 0.1), 0.1)
        model(torch.ones(2, 64)).sum().backward()
        optimizer.step()
    finally:
        torch.distributed.destroy_process_group()


def explained(error, world_size=1, device=CPU, **changes):
    args = Namespace(
        **{"batch_size": 64, "accumulate": 2, "image_size": 448, "resume": None} | changes,
        resident="auto",
    )
    with out_of_memory.explained(args, Ranks(device, world_size=world_size)):
        raise error


def test_running_out_of_memory_says_what_to_try():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.\nmore")
    message = "out of memory with 32 images of 448 px at once: try"
    smaller = "python train_sota.py --resume {} --micro-batch 16; saved files are complete"
    with refused(f"{message} --accumulate 4, or {smaller.format('<run>')} (CUDA out of memory"):
        explained(error)
    with refused(f"{message} {smaller.format('runs/x')}"):
        explained(error, resume="runs/x")
    with refused(f"{message} --micro-batch 16; saved files"):
        explained(error, micro_batch=None)
    with refused(f"{message} --micro-batch 16, or --resident host; saved files"):
        explained(error, micro_batch=None, device=torch.device("cuda"))
    with refused("out of memory with 1 images", "--grad-checkpointing"):
        explained(MemoryError(), world_size=32)
    with refused("out of memory with 4 images"):  # some ranks have two of the 24
        explained(MemoryError(), world_size=8, batch_size=24, accumulate=1)
    for text in out_of_memory.MESSAGES:
        with refused(message):
            explained(RuntimeError(f"[enforce fail at x.cpp:1] {text} when calling f"))
    with pytest.raises(RuntimeError, match="shapes"):
        explained(RuntimeError("shapes don't fit"))


@pytest.mark.parametrize(("free", "expected"), [(5, True), (50, False)])
def test_a_convolution_without_memory_for_its_workspace_is_recognized(monkeypatch, free, expected):
    error = RuntimeError("FIND was unable to find an engine to execute this computation")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 100))
    assert out_of_memory.is_out_of_memory(error) == expected


def test_the_buffers_of_distributed_data_parallel_are_counted():
    one, two = (need_of(world_size=world_size) for world_size in (1, 2))
    assert two.gradients == 2 * one.gradients and two.fixed == one.fixed + one.gradients


def test_a_container_may_have_less_memory_than_the_machine(tmp_path):
    assert free_memory._left_in_container(tmp_path) == []
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 50\n")
    assert free_memory._left_in_container(tmp_path) == [350]
    job = tmp_path / "system.slice" / "job"
    job.mkdir(parents=True)
    for name in ("memory.current", "memory.stat"):
        (job / name).write_text((tmp_path / name).read_text())
    (job / "memory.max").write_text("900\n")
    membership = tmp_path / "cgroup"
    membership.write_text("1:cpu:/x\n0::/system.slice/job\n")
    assert free_memory._left_in_container(tmp_path, membership) == [350, 250]
    membership.write_text("0::/../other\n")
    assert free_memory._left_in_container(tmp_path, membership) == [350]
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory._left_in_container(tmp_path, membership) == []
    assert 0 < free_memory.available(CPU) < 2**50
