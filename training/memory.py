"""The memory that a training step needs, counted before it is allocated: on tensors that only have
shapes.

    need = training_need(model, 448, device="cuda", dtype=torch.bfloat16, optimizer="adamw")
    need.total(micro_batch=8), need.largest(available(torch.device("cuda")))

The model is on the meta device. Weights, gradients, the optimizer's state and the moving average
are counted by their elements. Activations are what autograd keeps for the backward pass, each
storage once; they grow linearly with the batch, so two small batches are enough.
"""

import contextlib
import unittest.mock
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models
from models import lora
from models.layers import Conv3x3
from models.weights import classifier_keys
from training.distributed import local_tensor
from training.initial_model import model_options
from training.mixed_precision import autocast
from training.optimizers import STATES

USABLE = 0.9  # share of the free memory to plan with; see `activations` for what is not counted
GB = 1e9


@dataclass(frozen=True)
class Need:
    """Bytes that training takes on the device; host: in host memory; image: per image of a step."""

    parameters: int  # and buffers
    gradients: int
    optimizer: int
    average: int
    copies: int  # of weights in autocast's type, kept from the forward to the backward pass
    image: int  # activations
    host: int  # the copy that a save writes, and a moving average that is kept there
    snapshot: int = 0  # that copy, where the device is the host

    @property
    def fixed(self):
        """Independent of the batch."""
        state = self.parameters + self.gradients + self.optimizer + self.average
        return state + self.copies + self.snapshot

    def total(self, micro_batch):
        return self.fixed + micro_batch * self.image

    def largest(self, free):
        """The most images at once that fit into `free` bytes, or 0."""
        return max(0, int((USABLE * free - self.fixed) // max(1, self.image)))


def training_need(
    model, image_size, *, device, dtype, optimizer, trained=None, ema=True, ema_on_host=False
):
    """The Need of a model on the meta device, which becomes a fake one.

    device: "cpu" or "cuda", need not be present; dtype: autocast's, None for fp32; trained: names
    of the parameters that are trained (default: those that require gradients).
    """
    parameters = tensor_bytes([*model.parameters(), *model.buffers()])
    if trained is None:
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
    trainable = tensor_bytes(p for name, p in model.named_parameters() if name in trained)
    states = STATES.get(optimizer, 2) * trainable  # most of timm's keep two
    average = parameters if ema else 0
    average_on_host = average if ema_on_host and device != "cpu" else 0
    copies, image = activations(model, image_size, device=device, dtype=dtype)
    return Need(
        parameters=parameters,
        gradients=trainable,
        optimizer=states,
        average=average - average_on_host,
        copies=copies,
        image=image,
        host=parameters + average + states + average_on_host,
    )


def activations(model, image_size, *, device, dtype):
    """(bytes independent of the batch, bytes per image) that a step keeps for its backward pass.

    From a forward pass on fake tensors in training mode under autocast. With gradient
    checkpointing: the inputs of the parts that are recomputed, and the largest part. Independent
    of the batch are weights cast to autocast's type, kept until the forward pass ends. Not
    counted: gradients of one layer's outputs, workspaces, the allocator's fragments.
    torch.compile keeps less than this.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        _replace_tensors(model.train(), lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu"))
        for module in model.modules():
            if isinstance(module, Conv3x3) and device != "cpu":
                module.product_on = None
        # Batch norm needs two images at least.
        few, many = (
            saved_bytes(model, torch.empty(n, 3, image_size, image_size), dtype, as_on=device)
            for n in (2, 4)
        )
    return 2 * few.all - many.all, (many.kept - few.kept) // 2


def inference_need(model, image_size, *, device, dtype):
    """The Need of a forward pass without gradients; arguments as of `training_need`.

    Activations are the most bytes that exist at once. Not counted: what `activations` leaves out.
    """
    parameters = tensor_bytes([*model.parameters(), *model.buffers()])
    peaks = []
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        _replace_tensors(model.eval(), lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu"))
        own = {_storage(t) for t in [*model.parameters(), *model.buffers()]}
        for count in (2, 4):
            casts = _CudaCasts() if device == "cuda" and dtype else contextlib.nullcontext()
            with casts, LiveBytes(own) as live, autocast(torch.device("cpu"), dtype):
                model(torch.empty(count, 3, image_size, image_size))
            peaks.append(live.peak)
    few, many = peaks
    need = dict.fromkeys(("gradients", "optimizer", "average", "host"), 0)
    return Need(
        parameters=parameters, copies=max(0, 2 * few - many), image=(many - few) // 2, **need
    )


class LiveBytes(TorchDispatchMode):
    """A block whose tensors are counted; peak: the most bytes that existed at once.

    own: storages that are not counted.
    """

    def __init__(self, own):
        super().__init__()
        self.own, self.alive, self.peak = own, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor) and _storage(tensor) not in self.own:
                storage = tensor.untyped_storage()
                self.alive[StorageWeakRef(storage)] = storage.nbytes()
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.alive.values()))
        return outputs


def _replace_tensors(model, make):
    """Replaces each parameter and buffer by make(tensor); shared ones stay shared.

    Module._apply fails for modules that are used twice.
    """
    replaced = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in replaced:
                    new = make(old)
                    if tensors is module._parameters:
                        new = torch.nn.Parameter(new, old.requires_grad)
                    replaced[id(old)] = new, old  # the old one is kept so that its id is not reused
                tensors[name] = replaced[id(old)][0]


@dataclass(frozen=True)
class SavedBytes:
    """What autograd keeps of a forward pass; all: without gradient checkpointing."""

    kept: int
    all: int


def saved_bytes(model, inputs, dtype, as_on="cpu"):
    """SavedBytes of a forward pass and its loss. Inputs are counted, weights are not.

    Works on real and on fake tensors. as_on: whose choice of fp32 for norms and softmax under
    autocast, "cpu" or "cuda".
    """
    own = {_storage(t) for t in [*model.parameters(), *model.buffers()]}
    kept, recomputed, largest_part = {}, {}, 0

    def keep(storages):
        def pack(tensor):
            if _storage(tensor) not in own:
                # The storage is held so that its number is not reused.
                storages[_storage(tensor)] = tensor.untyped_storage()
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    def checkpoint(function, *args, use_reentrant=None, **options):
        nonlocal largest_part
        part = {}
        for t in args:
            if isinstance(t, torch.Tensor) and _storage(t) not in own:
                kept[_storage(t)] = t.untyped_storage()
        with keep(part):
            outputs = function(*args, **options)
        recomputed.update(part)
        largest_part = max(largest_part, _size(part, without=kept))
        return outputs

    casts = _CudaCasts() if as_on == "cuda" and dtype else contextlib.nullcontext()
    patched = unittest.mock.patch("torch.utils.checkpoint.checkpoint", checkpoint)
    with patched, keep(kept), casts:
        with autocast(inputs.device, dtype):
            logits = model(inputs)
        labels = torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)
        # The loss holds the graph until everything is counted.
        loss = F.cross_entropy(logits.float(), labels)
    del loss
    return SavedBytes(_size(kept) + largest_part, _size(kept | recomputed))


class _CudaCasts(torch.overrides.TorchFunctionMode):
    """Norms and softmax in fp32, as autocast has them on CUDA and not on a CPU."""

    IN_FP32 = (F.layer_norm, F.group_norm, F.softmax, torch.softmax, torch.Tensor.softmax)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.IN_FP32 and args[0].is_floating_point():
            args = (args[0].float(), *args[1:])
        return function(*args, **(kwargs or {}))


def _size(storages, without=()):
    return sum(storage.nbytes() for key, storage in storages.items() if key not in without)


def _storage(tensor):
    return tensor.untyped_storage()._cdata


def tensor_bytes(tensors):
    return sum(t.numel() * t.element_size() for t in map(local_tensor, tensors))


# ---- of a run ------------------------------------------------------------------------------------


def need_of_run(args, num_classes, *, device, dtype, world_size=1):
    """The Need of a run on each of `world_size` devices. device: "cpu" or "cuda".

    A frozen backbone only runs forward: its images count as if it were trained, which is more than
    they need.
    """
    options = model_options(args)
    with torch.device("meta"):
        model = models.create_model(args.model, num_classes, **options)
        if args.lora_rank:
            layers = lora.linear_layers(args.model, num_classes, args.image_size, options)
            lora.add_counted(model, args.lora_rank, layers)
    if args.grad_checkpointing:
        models.checkpoint_gradients(model, args.model)
    models.choose_attention(model, torch.device(device), dtype)
    need = training_need(
        model,
        args.image_size,
        device=device,
        dtype=dtype,
        optimizer=args.optimizer,
        trained=classifier_keys(model) if args.freeze_backbone else None,
        ema=args.ema_decay != 0,
        ema_on_host=args.ema_device == "cpu",
    )
    if args.lookahead:
        buffers = tensor_bytes(b for b in model.buffers() if b.is_floating_point())
        copy = need.gradients + buffers  # what is trained, and the statistics
        need = replace(need, average=need.average + copy, host=need.host + copy)
    if device == "cpu":
        need = replace(need, snapshot=need.host)
    if args.fsdp:
        shared = ("parameters", "gradients", "optimizer", "average")
        return replace(need, **{name: getattr(need, name) // world_size for name in shared})
    if world_size > 1:  # DistributedDataParallel's buffers are as large as the gradients
        return replace(need, gradients=2 * need.gradients)
    return need
