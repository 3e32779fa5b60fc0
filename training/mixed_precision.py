"""Autocast: which type it takes, and what stays in fp32."""

from contextlib import contextmanager

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

from models import classifiers


def amp_dtype(amp, device):
    """The autocast type for --amp: None is fp32. auto is bf16 where the device has instructions for it."""
    if amp == "auto":
        if device.type == "cuda":
            return (
                torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
            )
        return torch.bfloat16 if device.type == "cpu" and _cpu_has_bf16() else None
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def _cpu_has_bf16():
    if torch.backends.mkldnn.is_available():
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return False


def autocast(device, dtype):
    """Always entered; `dtype` None makes it do nothing."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


@contextmanager
def _fp32_classifier(model, dtype):
    """Under autocast, the last linear layer in fp32: logits of 8 or 11 bits tie, and then the order of classes decides.

    A layer of another kind stays as it is. The layer's own product is computed and replaced: it is small, and a hook that
    left autocast would not return to it after an error.
    """
    layers = (
        [layer for layer in classifiers(model) if isinstance(layer, torch.nn.Linear)]
        if dtype
        else []
    )
    hooks = [layer.register_forward_hook(_in_fp32) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _in_fp32(layer, inputs, output):
    with torch.autocast(output.device.type, enabled=False):
        return layer.forward(inputs[0].float())
