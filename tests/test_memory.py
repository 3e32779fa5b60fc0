"""What memory.py counts without memory is what real steps keep; how a batch is cut to fit."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from conftest import refused

import models
from common import free_memory
from models import lora
from training import memory, optimizers
from training.distributed import Ranks, shard, whole

CPU = torch.device("cpu")
SMALL = {
    "vit_custom": (dict(width=24, depth=3, heads=2), 32),
    "timm/convnext_xxlarge": (dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)), 64),
    "timm/eva02_large_patch14_448": (dict(depth=3, embed_dim=48, num_heads=3, img_size=56), 56),
    "timm/eva_giant_patch14_336": (dict(depth=3, embed_dim=48, num_heads=3, img_size=56), 56),
    "resnet20": ({}, 32),
}


def build(name, device="cpu", again=False):
    options, size = SMALL[name]
    with torch.device(device):
        model = models.create_model(name, 10, **options)
    if again:
        model.set_grad_checkpointing(True)
    return model.train(), size


# ---- activations -----------------------------------------------------------------------------------------------------


def test_what_a_small_network_keeps_counted_by_hand():
    """Two linear layers and a ReLU: the input, the ReLU's output (which the second layer keeps, too), and the loss's."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 20), nn.ReLU(), nn.Linear(20, 7))
    B = 5
    kept, _ = memory.saved_bytes(model, torch.zeros(B, 3, 4, 4), None)
    floats = (
        B * 48 + B * 20 + B * 7 + 1
    )  # of the loss: log-probabilities and the weight that their mean is over
    assert kept == 4 * floats + 8 * B  # and its labels


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", SMALL)
def test_activations_are_what_a_real_step_keeps(name, dtype):
    model, size = build(name)
    models.choose_attention(model, CPU, dtype)
    meta, _ = build(name, "meta")
    models.choose_attention(meta, CPU, dtype)
    fixed, image = memory.activations(meta, size, device="cpu", dtype=dtype)
    for B in (3, 8):
        real, _ = memory.saved_bytes(model, torch.randn(B, 3, size, size), dtype)
        assert fixed + B * image == pytest.approx(real, rel=0.02)
    weights = sum(
        m.weight.numel() for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))
    )
    statistics = sum(8 * m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    # The copies that autocast makes, and batch norm's means and deviations.
    assert fixed == pytest.approx((2 * weights if dtype else 0) + statistics, rel=0.05, abs=500)


@pytest.mark.parametrize("name", [name for name in SMALL if name != "resnet20"])
def test_checkpointing_keeps_inputs_of_blocks_and_one_block(name):
    plain, size = build(name, "meta")
    again, _ = build(name, "meta", again=True)
    fixed, image = memory.activations(plain, size, device="cpu", dtype=torch.bfloat16)
    fixed_again, image_again = memory.activations(again, size, device="cpu", dtype=torch.bfloat16)
    assert fixed_again == fixed and image / 6 < image_again < image * 0.8


def test_checkpointing_is_counted_and_not_changed():
    """The real function is there again afterwards, and gives the gradients that it gave."""
    model, size = build("vit_custom", again=True)
    function = torch.utils.checkpoint.checkpoint
    memory.saved_bytes(model, torch.zeros(2, 3, size, size), None)
    assert torch.utils.checkpoint.checkpoint is function


def test_norms_keep_fp32_under_autocast_on_cuda():
    counted = {}
    for device in ("cpu", "cuda"):
        model, size = build("timm/convnext_xxlarge", "meta")
        _, counted[device] = memory.activations(model, size, device=device, dtype=torch.bfloat16)
    assert 1.02 < counted["cuda"] / counted["cpu"] < 1.5


# ---- a run's need ----------------------------------------------------------------------------------------------------


def need_of(**changes):
    options, size = SMALL["vit_custom"]
    args = SimpleNamespace(
        model="vit_custom",
        image_size=size,
        lora_rank=0,
        grad_checkpointing=False,
        freeze_backbone=False,
        optimizer="adamw",
        ema_decay=None,
        ema_device="same",
        fsdp=False,
    )
    vars(args).update(changes)
    return memory.of_run(
        args, options, 10, device="cuda", dtype=torch.bfloat16, world=changes.get("world", 1)
    )


def test_weights_gradients_state_and_average_are_counted():
    weights = 4 * sum(p.numel() for p in build("vit_custom", "meta")[0].parameters())
    need = need_of()
    assert (need.parameters, need.gradients, need.optimizer, need.average) == (
        weights,
        weights,
        2 * weights,
        weights,
    )
    assert need.fixed == 5 * weights + need.copies and need.total(7) == need.fixed + 7 * need.image
    assert need.host == 4 * weights
    assert need_of(optimizer="sgd").optimizer == weights and need_of(ema_decay=0.0).average == 0
    away = need_of(ema_device="cpu")
    assert away.average == 0 and away.host == need.host + weights
    head = 4 * (24 * 10 + 10)
    frozen = need_of(freeze_backbone=True)
    assert (frozen.parameters, frozen.gradients, frozen.optimizer) == (weights, head, 2 * head)
    shared = need_of(fsdp=True, world=4)
    assert (
        shared.parameters == weights // 4
        and shared.optimizer == weights // 2
        and shared.image == need.image
    )


def test_a_module_that_is_used_twice_is_counted_once():
    with torch.device("meta"):
        shared = nn.Conv2d(8, 8, 3, padding=1)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Sequential(shared),
            nn.Sequential(shared),
            nn.Flatten(),
            nn.Linear(8 * 16, 10),
        )
    need = memory.training_need(model, 4, device="cpu", dtype=None, optimizer="sgd")
    assert (
        need.parameters == 4 * (3 * 8 * 9 + 8 + 8 * 8 * 9 + 8 + 8 * 16 * 10 + 10) and need.image > 0
    )


def test_the_largest_micro_batch_leaves_a_tenth():
    need = memory.Need(
        parameters=40, gradients=40, optimizer=80, average=40, copies=0, image=10, host=0
    )
    assert [need.largest(free) for free in (100, 222, 234, 1000 / 0.9)] == [0, 0, 1, 80]
    assert need.total(80) <= 1000


@pytest.mark.extras("peft")
def test_adapters_are_counted_as_peft_makes_them():
    pytest.importorskip("peft")
    name, rank = "timm/eva02_large_patch14_448", 4
    options, size = SMALL[name]
    layers, found = lora.linear_layers(name, 10, size, options), []
    for add in (lora.add_counted, lora.add_adapters):
        with torch.device("meta"):
            model = add(models.create_model(name, 10, **options), rank, layers)
        found.append(
            memory.training_need(
                model, size, device="cuda", dtype=torch.bfloat16, optimizer="adamw"
            )
        )
    assert found[0] == found[1]
    adapters = sum(
        rank * (m.in_features + m.out_features)
        for n, m in build(name)[0].named_modules()
        if n in layers
    )
    assert found[0].gradients == 4 * (adapters + 48 * 10 + 10)


# ---- to make it fit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [1, 2, 7, 16, 33, 128])
def test_a_batch_is_cut_into_the_fewest_parts_that_fit(images):
    for limit in range(1, images + 3):
        asked = []
        parts = memory.fewest_parts(
            images, lambda count, limit=limit, asked=asked: asked.append(count) or count <= limit
        )
        wanted = next(k for k in range(1, images + 1) if math.ceil(images / k) <= limit)
        assert math.ceil(images / parts) == math.ceil(images / wanted)
        assert len(asked) <= 2 * math.log2(images) + 2
    assert memory.fewest_parts(images, lambda count: False) is None


class Hungry(nn.Module):
    """(B, 3, H, W) -> (B, 4), for at most `most` images."""

    def __init__(self, most, error):
        super().__init__()
        self.error = error
        self.norm, self.fc, self.most, self.seen = nn.BatchNorm2d(3), nn.Linear(3, 4), most, []

    def forward(self, x):
        self.seen.append((len(x), self.fc.weight.grad is not None))
        if len(x) > self.most:
            raise self.error
        return self.fc(self.norm(x).mean((2, 3)))


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory")],
)
def test_a_tried_step_leaves_the_model_as_it_was(error):
    model = Hungry(4, error)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert memory.step_fits(model, 4, 8, None) and not memory.step_fits(model, 5, 8, None)
    assert model.seen == [
        (4, False),
        (4, True),
        (5, False),
    ]  # the second pass beside the gradients of the first
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def cut(monkeypatch, free, batch_size=32, origin=None, **changes):
    args = SimpleNamespace(
        model="vit_custom",
        image_size=32,
        lora_rank=0,
        grad_checkpointing=False,
        freeze_backbone=False,
        optimizer="adamw",
        ema_decay=None,
        ema_device="same",
        fsdp=False,
        micro_batch=None,
        accumulate=1,
        batch_size=batch_size,
    )
    vars(args).update(changes)
    options, _ = SMALL["vit_custom"]
    model, _ = build("vit_custom")
    monkeypatch.setattr(
        memory, "available", lambda device: free - memory._bytes(model.parameters())
    )
    origin = origin or {"accumulate": "default", "micro_batch": "default"}
    at_once = memory.cut_batches(args, origin, model, options, 10, None, Ranks(CPU))
    return at_once, args, origin


def test_a_batch_is_cut_by_the_free_memory(monkeypatch):
    options, size = SMALL["vit_custom"]
    need = memory.training_need(
        build("vit_custom", "meta")[0], size, device="cpu", dtype=None, optimizer="adamw"
    )
    need = replace(need, snapshot=need.host)  # the copy that is being saved lies in the same memory
    at_once, args, origin = cut(monkeypatch, need.total(32) / 0.9 + 10)
    assert (at_once, args.micro_batch, args.accumulate, origin["micro_batch"]) == (
        32,
        32,
        1,
        "auto",
    )
    at_once, args, origin = cut(monkeypatch, need.total(11) / 0.9 + 10)
    assert (at_once, args.micro_batch, args.accumulate) == (11, 11, 3) and origin[
        "accumulate"
    ] == "--micro-batch"
    with refused("a step of vit_custom with one image needs", "--dry-run"):
        cut(monkeypatch, need.total(1) / 0.9 - 100)


def test_what_was_asked_for_is_left_alone(monkeypatch):
    assert cut(monkeypatch, 0, micro_batch=5)[1].accumulate == 7
    assert cut(monkeypatch, 0, micro_batch=0, accumulate=3)[1].accumulate == 3
    asked = {"accumulate": "command line", "micro_batch": "default"}
    at_once, args, _ = cut(monkeypatch, 0, accumulate=4, origin=asked)
    assert (at_once, args.micro_batch, args.accumulate) == (0, 0, 4)
    assert cut(monkeypatch, 0, micro_batch=4, freeze_backbone=True)[1].accumulate == 1


def test_a_micro_batch_is_tried_on_a_gpu_beside_what_comes_later(monkeypatch):
    """The optimizer's state, the average, the pictures, and a tenth; but not where a rank would wait for another."""
    tried, gpu = [], torch.device("cuda")
    monkeypatch.setattr(
        memory,
        "step_fits",
        lambda model, images, *rest, reserve: tried.append((images, reserve)) or True,
    )
    monkeypatch.setattr(memory, "available", lambda device: 10**9)
    monkeypatch.setattr(Ranks, "any", lambda self, flag: flag)
    need, (model, _) = need_of(), build("vit_custom")
    args = SimpleNamespace(model="vit_custom", image_size=32, freeze_backbone=False, sync_bn=True)
    assert memory._largest(args, need, model, None, Ranks(gpu), 32, 10**8) == 32
    free = 9 * 10**8 + need.parameters
    assert tried == [(32, need.optimizer + need.average + 10**8 + int((1 - memory.SPARE) * free))]
    assert (
        memory._largest(args, need, model, None, Ranks(gpu, world=2), 16, 0) == 16
        and len(tried) == 1
    )


def test_what_lies_on_a_device_of_a_sharded_model_is_a_part():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        model = shard(
            nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)), Ranks(CPU, rank=1, world=4)
        )
        assert memory._bytes(model.parameters()) == 4 * (64 * 64 + 3 * 64) // 4
        state = whole(model.state_dict())
        assert state["0.weight"] is None and state["1.running_var"].shape == (
            64,
        )  # it is the first rank that writes
        optimizer = optimizers.create_optimizer(
            "sgd", optimizers.param_groups(model, 0.1), 0.1
        )  # torch has no fused kernel for parts
        model(torch.ones(2, 64)).sum().backward()
        optimizer.step()
    finally:
        torch.distributed.destroy_process_group()


def test_running_out_of_memory_says_what_to_try():
    args = SimpleNamespace(batch_size=64, accumulate=2, image_size=448)
    with (
        refused(
            "out of memory with 32 images of 448 px at once: try --micro-batch 16",
            "CUDA out of memory",
        ),
        memory.explained(args),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.\nmore")
    with (
        refused("out of memory with 1 images", "--grad-checkpointing"),
        memory.explained(args, world=32),
    ):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried …"
        )
    with refused("out of memory with 32 images"), memory.explained(args):
        raise RuntimeError(
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
        )
    with pytest.raises(RuntimeError, match="shapes"), memory.explained(args):
        raise RuntimeError("shapes don't fit")


def test_a_container_may_have_less_than_the_machine(tmp_path):
    assert free_memory._left_in_container(tmp_path) == []
    for name, text in {
        "memory.max": "1000\n",
        "memory.current": "700\n",
        "memory.stat": "anon 1\ninactive_file 50\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert free_memory._left_in_container(tmp_path) == [350]
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory._left_in_container(tmp_path) == []
    assert 0 < free_memory.available(CPU) < 2**50
