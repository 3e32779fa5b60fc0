"""What a training step needs of a device's memory, counted before there is any: on tensors that have shapes only.

    need = training_need(model, 448, device="cuda", dtype=torch.bfloat16, optimizer="adamw")     # a model on the meta device
    need.total(micro_batch=8), need.largest(available(torch.device("cuda")))

Weights, gradients, the optimizer's state and the moving average are counted by their elements. Activations are what autograd
keeps for the backward pass, each storage once; since they grow with the batch in a straight line, two small batches tell all.
"""

import contextlib
import platform
import subprocess
import unittest.mock
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torch.utils.checkpoint

import engine

STATES = {"sgd": 1, "adam": 2, "adamw": 2, "muon": 1}  # tensors of a weight's size that an optimizer keeps for it
SPARE = 0.9  # part of the free memory to plan with: the rest is for what is not counted, see `activations`
GB = 1e9


@dataclass(frozen=True)
class Need:
    """Bytes that training takes: of the device, besides them on the host, and for each image of a forward pass."""

    parameters: int  # and buffers
    gradients: int
    optimizer: int
    average: int
    copies: int  # of weights, in the precision of autocast, kept from forward to backward
    image: int  # activations of one image
    host: int  # on the host, where that is not the device: the moving average, if it is kept there, and what a save takes

    @property
    def fixed(self):
        """Whatever the batch is."""
        return self.parameters + self.gradients + self.optimizer + self.average + self.copies

    def total(self, micro_batch):
        return self.fixed + micro_batch * self.image

    def largest(self, free):
        """The most images at once that fit into so many free bytes, or 0."""
        return max(0, int((SPARE * free - self.fixed) // max(1, self.image)))


def training_need(model, image_size, *, device, dtype, optimizer, ema=True, ema_on_host=False):
    """The Need of a model, which lies on the meta device and becomes a fake one on `device` ("cpu" or "cuda"; none is used).

    dtype: autocast's, None for fp32; optimizer: a name of optim.OPTIMIZERS. What doesn't require gradients is frozen.
    """
    tensors = [*model.parameters(), *model.buffers()]
    parameters, state = _bytes(tensors), STATES[optimizer]
    trainable = _bytes(p for p in model.parameters() if p.requires_grad)
    average = parameters if ema else 0
    copies, image = activations(model, image_size, device=device, dtype=dtype)
    saving = parameters + average + state * trainable  # on a CPU no copy is made, but the file is read back
    return Need(
        parameters=parameters,
        gradients=trainable,
        optimizer=state * trainable,
        average=0 if ema_on_host and device != "cpu" else average,
        copies=copies,
        image=image,
        host=saving + (average if ema_on_host and device != "cpu" else 0),
    )


def activations(model, image_size, *, device, dtype):
    """(bytes whatever the batch is, bytes for each image) that a step keeps for its backward pass.

    A forward pass on tensors without memory, in training mode, under autocast. With gradient checkpointing: the inputs of
    the parts that are computed again, and the largest of these parts. What doesn't depend on the batch are weights cast to
    autocast's type. Left out: what the backward pass needs for a moment (the gradients of one layer's outputs), workspaces
    of matrix products and convolutions, and the allocator's fragments; torch.compile keeps less than this.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu")).train()
        # Two images at least: batch norm takes no single value for each channel.
        few, more = (saved_bytes(model, torch.empty(n, 3, image_size, image_size), dtype, as_on=device) for n in (2, 4))
    image = (more - few) // 2
    return few - 2 * image, image


def saved_bytes(model, inputs, dtype, as_on="cpu"):
    """Bytes that autograd keeps of a forward pass and its loss for the backward pass: inputs, but not weights, counted.

    Works on real tensors as on fake ones. Parts under gradient checkpointing count with their inputs, and the largest of
    them once as a whole. as_on: whose choice of fp32 for norms and softmax under autocast, "cpu" or "cuda".
    """
    own = {_storage(t) for t in [*model.parameters(), *model.buffers()]}
    kept, largest = {}, 0

    def keeping(into):
        def pack(tensor):
            if _storage(tensor) not in own:
                into[_storage(tensor)] = tensor.untyped_storage()  # held, so that no other one gets its number
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    def checkpointed(function, *args, use_reentrant=None, **options):
        nonlocal largest
        part = {}
        kept.update({_storage(t): t.untyped_storage() for t in args if isinstance(t, torch.Tensor) and t.requires_grad})
        with keeping(part):
            out = function(*args, **options)
        largest = max(largest, sum(storage.nbytes() for key, storage in part.items() if key not in kept))
        return out

    casts = _CastsOfCuda() if as_on == "cuda" and dtype else contextlib.nullcontext()
    with unittest.mock.patch("torch.utils.checkpoint.checkpoint", checkpointed), keeping(kept), casts:
        with engine.autocast(inputs.device, dtype):
            logits = model(inputs)
        # A parameter of the graph holds what was kept until here.
        loss = F.cross_entropy(logits.float(), torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device))
    del loss
    return sum(storage.nbytes() for storage in kept.values()) + largest


class _CastsOfCuda(torch.overrides.TorchFunctionMode):
    """Norms and softmax in fp32, where autocast on CUDA has them, and on a CPU doesn't."""

    IN_FP32 = (F.layer_norm, F.group_norm, F.softmax, torch.softmax, torch.Tensor.softmax)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.IN_FP32 and args[0].is_floating_point():
            args = (args[0].float(), *args[1:])
        return function(*args, **(kwargs or {}))


def _storage(tensor):
    return tensor.untyped_storage()._cdata


def _bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)
