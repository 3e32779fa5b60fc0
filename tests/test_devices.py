"""Devices and precision: selected, checked, and as precise as an evaluation needs."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from helpers.errors import refused
from helpers.paths import ROOT
from helpers.training import CPU

import models
from training import devices, environment, evaluation, linear_probe, mixed_precision
from training.moving_average import MovingAverage

BF16 = torch.bfloat16


def test_a_device_that_does_not_exist_is_refused():
    missing = ["cuda:99", "tpu"]
    if not torch.backends.mps.is_available():
        missing.append("mps")
    for name in missing:
        with refused(f"--device {name}", "must be auto, cpu, cuda, cuda:<n> or mps"):
            devices.select_device(name)
    assert devices.select_device("cpu") == CPU


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
@pytest.mark.parametrize("kept", [True, False])
def test_freed_memory_is_kept_for_the_next_tensor(kept):
    code = f"""
import ctypes, resource, torch
from training.devices import keep_freed_memory
def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: no huge pages
if {kept}:
    keep_freed_memory()
print([page_faults() for _ in range(4)][-1])
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    pages = 2**26 // os.sysconf("SC_PAGE_SIZE")
    assert int(done.stdout) < pages / 10 if kept else int(done.stdout) > pages / 2


def test_precision_is_chosen_for_the_device():
    amp_dtype = mixed_precision.amp_dtype
    assert amp_dtype("off", CPU) is None and amp_dtype("fp16", CPU) == torch.float16
    assert amp_dtype("auto", torch.device("mps")) is None
    for dtype in (None, BF16):
        with mixed_precision.autocast(CPU, dtype):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (dtype or torch.float32)


@pytest.mark.parametrize("has_bf16", [False, True])
def test_automatic_precision_is_bf16_where_the_device_is_fast_in_it(has_bf16, monkeypatch):
    """A GPU that only emulates bf16 is not, nor an Intel CPU without matrix instructions."""

    def is_bf16_supported(including_emulation=True):
        return including_emulation or has_bf16

    expected = BF16 if has_bf16 else None
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert mixed_precision.amp_dtype("auto", torch.device("cuda")) == expected
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    for vendor, dtype in (("AuthenticAMD", expected), ("", expected), ("GenuineIntel", None)):
        monkeypatch.setattr(environment, "_cpuinfo", {"vendor_id": vendor}.get)
        assert mixed_precision.amp_dtype("auto", CPU) == dtype
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert mixed_precision.amp_dtype("auto", CPU) == BF16
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert mixed_precision.amp_dtype("auto", CPU) is None


def test_a_model_that_is_slower_in_bf16_stays_in_fp32_unless_asked(monkeypatch):
    monkeypatch.setattr(mixed_precision, "_cpu_is_fast_in_bf16", lambda: True)
    monkeypatch.setattr(models, "prefers_fp32", lambda name, device: name == "slow")
    for name, amp, dtype in (("slow", "auto", None), ("slow", "bf16", BF16), ("x", "auto", BF16)):
        assert mixed_precision.amp_dtype_for(name, amp, CPU) == dtype


def test_auto_precision_is_fp32_where_bf16_is_slower():
    slow = {name for name, entry in models.MODELS.items() if not entry.bf16_on_cpu}
    assert slow >= {"ghostnet_100", "segnext_mscan_tiny"}
    for name in (*models.MODELS, "timm/resnet18"):
        assert models.prefers_fp32(name, torch.device("cpu")) == (name in slow)
        assert not models.prefers_fp32(name, torch.device("cuda"))


@pytest.mark.parametrize("on", [True, False])
def test_deterministic_settings(on, monkeypatch):
    """fp32 is not rounded to TF32 either way."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.use_deterministic_algorithms(not on)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = on, True
    devices.configure_backends(deterministic=on)
    assert torch.are_deterministic_algorithms_enabled() == on
    assert torch.backends.cudnn.benchmark == (not on)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if on else None)


class CloseLogits(nn.Module):
    """Logits 1 and 1.002 for an image of ones: equal in bf16. (B, 3, H, W) -> (B, 2)"""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.fc.weight.copy_(torch.tensor([[1.0, 0, 0], [1.002, 0, 0]]))

    def get_classifier(self):
        return self.fc

    def forward_features(self, x):
        return x.mean((2, 3))

    def forward_head(self, x, pre_logits=False):
        return x if pre_logits else self.fc(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


@pytest.mark.parametrize("kind", ["model", "probe", "average", "compiled"])
def test_an_evaluation_in_bf16_distinguishes_logits_that_tie_there(kind):
    model, images = CloseLogits(), torch.ones(4, 3, 8, 8)
    if kind == "probe":
        model = linear_probe.Probe(model)
    elif kind == "average":
        model = MovingAverage(model, 0.9).model
    elif kind == "compiled":  # first in training mode
        model.compile(backend="eager")
        with mixed_precision.autocast(CPU, BF16):
            model(images).sum().backward()
    else:
        with mixed_precision.autocast(CPU, BF16):
            assert model.eval()(images).argmax(1).tolist() == [0] * 4  # the wrong class
    labels = torch.ones(4, dtype=torch.int64)
    for _ in range(3):
        assert evaluation.evaluate(model, [(images, labels)], dtype=BF16)["acc"] == 100
    with mixed_precision.autocast(CPU, BF16):
        assert model.train()(images).dtype == BF16  # training is not changed
