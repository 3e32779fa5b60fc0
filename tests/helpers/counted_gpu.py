"""A stand-in for a GPU: its tensors say cuda, are computed on the CPU, and operations are counted.

    with CountedGpu() as gpu:
        x = torch.zeros(2, device="cuda") + 1
    gpu.kernels.total(), on_host(x)

kernels: {operation of ATen: number} of those that compute or copy on the GPU. Each launches at
least one kernel. Views, allocations and operations on empty tensors launch none and aren't counted.
uploads: operations that take a tensor from the host, other than a scalar. downloads: those that
give one to the host, which has to wait for them.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode,
)
from torch.utils._pytree import tree_leaves, tree_map

from datasets import draws

INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)


@pytest.fixture
def gpu_stand_in(monkeypatch):
    """For tests with a CountedGpu: torch finds a driver, and no tensors stay in the cache."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    draws.constant.cache_clear()
    yield
    draws.constant.cache_clear()


class GpuTensor(torch.Tensor):
    """`held`: its values, on the CPU."""

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        options = {"dtype": held.dtype, "device": "cuda:0"}
        tensor = torch.Tensor._make_wrapper_subclass(cls, held.shape, **layout, **options)
        tensor.held = held
        return tensor

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function not in INDEXING:
            return super().__torch_function__(function, types, args, kwargs)
        # These would select the device in C++ before they are dispatched.
        mode = _get_current_dispatch_mode()
        with _disable_current_modes():
            return mode.compute(function, args, {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} outside of the block")


class CountedGpu(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.kernels, self.uploads, self.downloads = Counter(), Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        return self.compute(function, args, kwargs)

    def compute(self, function, args, kwargs):
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        from_gpu = [tensor for tensor in tensors if isinstance(tensor, GpuTensor)]
        device = kwargs.get("device")
        to_gpu = device is not None and torch.device(device).type == "cuda"
        if not from_gpu and not to_gpu:
            return function(*args, **kwargs)
        if device is not None:
            kwargs = kwargs | {"device": "cpu"}
        result = function(*tree_map(on_host, args), **tree_map(on_host, kwargs))
        if function is torch.ops.aten._local_scalar_dense.default or (device and not to_gpu):
            self.downloads[function] += 1
            return result
        if any(tensor.dim() and not isinstance(tensor, GpuTensor) for tensor in tensors):
            self.uploads[function] += 1
        elif _launches(function, [tensor.held for tensor in from_gpu], result):
            self.kernels[function] += 1
        return tree_map(lambda value: _on_gpu(function, value, from_gpu), result)


def on_host(value):
    return value.held if isinstance(value, GpuTensor) else value


def _on_gpu(function, value, inputs):
    if not isinstance(value, torch.Tensor):
        return value
    same = [tensor for tensor in inputs if tensor.held is value]  # changed in place
    return same[0] if same and not _changes_shape(function) else GpuTensor(value)


def _changes_shape(function):
    return torch.Tag.inplace_view in getattr(function, "tags", ())


def _launches(function, inputs, result):
    if function is torch.Tensor.__setitem__:
        return True
    if "empty" in str(function) or _changes_shape(function):
        return False
    outputs = [v for v in tree_leaves(result) if isinstance(v, torch.Tensor) and v.numel()]
    storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    views = all(tensor.untyped_storage().data_ptr() in storages for tensor in outputs)
    return not views or (bool(outputs) and function not in INDEXING and function._schema.is_mutable)
