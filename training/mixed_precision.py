"""Mixed precision: which type autocast uses, and what stays in fp32."""

from contextlib import contextmanager

import torch

import models
from training import environment


def amp_dtype(amp, device):
    """The type of --amp for autocast, None for fp32. auto: bf16 where the device is fast in it."""
    if amp != "auto":
        return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and _cpu_is_fast_in_bf16()
    return torch.bfloat16 if fast else None


def amp_dtype_for(model_name, amp, device):
    """amp_dtype of a run: with auto, a model that is slower in bf16 there stays in fp32."""
    if amp == "auto" and models.prefers_fp32(model_name, device):
        return None
    return amp_dtype(amp, device)


def _cpu_is_fast_in_bf16():
    """With matrix instructions (AMX), or AVX512-BF16 of a CPU that is not Intel's.

    On an Intel CPU with AVX512-BF16 but without AMX, which virtual machines may hide, a training
    step in bf16 took 1.23 to 1.56 times as long as in fp32; on an AMD EPYC, 0.44 to 0.61 times
    (docs/results.md, "Precision").
    """
    if not torch.backends.mkldnn.is_available():
        return False
    if torch.cpu._is_amx_tile_supported():
        return True
    return torch.cpu._is_avx512_bf16_supported() and not environment.is_intel()


def autocast(device, dtype):
    """Always entered; with dtype None it does nothing."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def name(dtype):
    return str(dtype or torch.float32).removeprefix("torch.")


@contextmanager
def fp32_classifier(model, dtype):
    """A block in which the last linear layer computes in fp32 under autocast.

    Logits of 8 or 11 bits tie, and then the order of the classes would decide. A layer of another
    kind stays as it is. The layer's own product is replaced after it was computed: it is small, and
    a hook that left autocast before it would not return to it after an error.
    """
    layers = [layer for layer in models.classifiers(model) if isinstance(layer, torch.nn.Linear)]
    hooks = [layer.register_forward_hook(_in_fp32) for layer in layers] if dtype else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _in_fp32(layer, inputs, output):
    with torch.autocast(output.device.type, enabled=False):
        return layer.forward(inputs[0].float())
