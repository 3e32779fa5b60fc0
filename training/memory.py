"""What a training step needs of a device's memory, counted before there is any: on tensors that have shapes only.

    need = training_need(model, 448, device="cuda", dtype=torch.bfloat16, optimizer="adamw")     # a model on the meta device
    need.total(micro_batch=8), need.largest(available(torch.device("cuda")))

Weights, gradients, the optimizer's state and the moving average are counted by their elements. Activations are what autograd
keeps for the backward pass, each storage once; since they grow with the batch in a straight line, two small batches tell all.
"""

import contextlib
import unittest.mock
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import torch.utils.checkpoint

import data
import models
from common.errors import UserError
from common.free_memory import available
from models import lora
from models.weights import classifier_keys
from training import mixed_precision

STATES = {
    "sgd": 1,
    "adam": 2,
    "adamw": 2,
    "muon": 1,
}  # tensors of a weight's size that an optimizer keeps for it
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
    host: int  # on the host: the copy that a save writes, and a moving average that is kept there
    snapshot: int = 0  # that copy, where the device is the host

    @property
    def fixed(self):
        """Whatever the batch is."""
        return (
            self.parameters
            + self.gradients
            + self.optimizer
            + self.average
            + self.copies
            + self.snapshot
        )

    def total(self, micro_batch):
        return self.fixed + micro_batch * self.image

    def largest(self, free):
        """The most images at once that fit into so many free bytes, or 0."""
        return max(0, int((SPARE * free - self.fixed) // max(1, self.image)))


def training_need(
    model, image_size, *, device, dtype, optimizer, trained=None, ema=True, ema_on_host=False
):
    """The Need of a model, which lies on the meta device and becomes a fake one on `device` ("cpu" or "cuda"; none is used).

    dtype: autocast's, None for fp32; optimizer: a name of optim.OPTIMIZERS; trained: names of the parameters that learn (by
    default those that require gradients).
    """
    tensors = [*model.parameters(), *model.buffers()]
    parameters, state = _bytes(tensors), STATES[optimizer]
    trainable = _bytes(
        p
        for name, p in model.named_parameters()
        if (p.requires_grad if trained is None else name in trained)
    )
    average = parameters if ema else 0
    copies, image = activations(model, image_size, device=device, dtype=dtype)
    away = ema_on_host and device != "cpu"
    return Need(
        parameters=parameters,
        gradients=trainable,
        optimizer=state * trainable,
        average=0 if away else average,
        copies=copies,
        image=image,
        host=parameters + average + state * trainable + (average if away else 0),
    )


def activations(model, image_size, *, device, dtype):
    """(bytes whatever the batch is, bytes for each image) that a step keeps for its backward pass.

    A forward pass on tensors without memory, in training mode, under autocast. With gradient checkpointing: the inputs of
    the parts that are computed again, and the largest of these parts. What doesn't depend on the batch are weights cast to
    autocast's type, which it keeps until the forward pass ends. Left out: what the backward pass needs for a moment (the
    gradients of one layer's outputs), workspaces of matrix products and convolutions, and the allocator's fragments;
    torch.compile keeps less than this.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        _replace_tensors(model.train(), lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu"))
        # Two images at least: batch norm takes no single value for each channel.
        sizes = [
            saved_bytes(model, torch.empty(n, 3, image_size, image_size), dtype, as_on=device)
            for n in (2, 4)
        ]
    (few, few_whole), (more, more_whole) = sizes
    image = (more - few) // 2
    return 2 * few_whole - more_whole, image


def _replace_tensors(model, make):
    """Puts make(tensor) in place of each parameter and buffer; Module._apply stumbles over modules that are used twice."""
    made = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, value in own.items():
                if value is None:
                    continue
                if id(value) not in made:
                    new = make(value)
                    new = (
                        torch.nn.Parameter(new, value.requires_grad)
                        if own is module._parameters
                        else new
                    )
                    made[id(value)] = (
                        new,
                        value,
                    )  # the old one lives on, so that no other one gets its id
                own[name] = made[id(value)][0]


def saved_bytes(model, inputs, dtype, as_on="cpu"):
    """(bytes that autograd keeps of a forward pass and its loss for the backward pass, the same without checkpointing).

    Inputs are counted, weights are not. Works on real tensors as on fake ones. Of parts under gradient checkpointing, all
    inputs are kept, and the largest part as a whole. as_on: whose choice of fp32 for norms and softmax under autocast, "cpu"
    or "cuda".
    """
    own = {_storage(t) for t in [*model.parameters(), *model.buffers()]}
    kept, largest, whole = {}, 0, {}

    def keeping(into):
        def pack(tensor):
            if _storage(tensor) not in own:
                into[_storage(tensor)] = (
                    tensor.untyped_storage()
                )  # held, so that no other one gets its number
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    def checkpointed(function, *args, use_reentrant=None, **options):
        nonlocal largest
        part = {}
        kept.update(
            {
                _storage(t): t.untyped_storage()
                for t in args
                if isinstance(t, torch.Tensor) and _storage(t) not in own
            }
        )
        with keeping(part):
            out = function(*args, **options)
        whole.update(part)
        largest = max(largest, _size(part, but=kept))
        return out

    casts = _CastsOfCuda() if as_on == "cuda" and dtype else contextlib.nullcontext()
    with (
        unittest.mock.patch("torch.utils.checkpoint.checkpoint", checkpointed),
        keeping(kept),
        casts,
    ):
        with mixed_precision.autocast(inputs.device, dtype):
            logits = model(inputs)
        # A parameter of the graph holds what was kept until here.
        loss = F.cross_entropy(
            logits.float(), torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)
        )
    del loss
    return _size(kept) + largest, _size(kept | whole)


class _CastsOfCuda(torch.overrides.TorchFunctionMode):
    """Norms and softmax in fp32, where autocast on CUDA has them, and on a CPU doesn't."""

    IN_FP32 = (F.layer_norm, F.group_norm, F.softmax, torch.softmax, torch.Tensor.softmax)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.IN_FP32 and args[0].is_floating_point():
            args = (args[0].float(), *args[1:])
        return function(*args, **(kwargs or {}))


# ---- of a run ------------------------------------------------------------------------------------------------------------


def of_run(args, options, num_classes, *, device, dtype, world=1):
    """The Need of the run that a training script's arguments say, on each of `world` devices of a type ("cpu", "cuda").

    A frozen backbone learns nothing, but passes the pictures on once: its images count as if it were trained, which is more
    than they take.
    """
    with torch.device("meta"):
        model = models.create_model(args.model, num_classes, **options)
        if args.lora_rank:
            layers = lora.linear_layers(args.model, num_classes, args.image_size, options)
            lora.add_counted(model, args.lora_rank, layers)
    if args.grad_checkpointing:
        models.checkpoint_gradients(model, args.model)
    models.choose_attention(model, torch.device(device), dtype)
    trained = classifier_keys(model) if args.freeze_backbone else None
    need = training_need(
        model,
        args.image_size,
        device=device,
        dtype=dtype,
        optimizer=args.optimizer,
        trained=trained,
        ema=args.ema_decay != 0,
        ema_on_host=args.ema_device == "cpu",
    )
    need = replace(need, snapshot=need.host if device == "cpu" else 0)
    if not args.fsdp:
        return need
    shared = ("parameters", "gradients", "optimizer", "average")
    return replace(need, **{name: getattr(need, name) // world for name in shared})


def cut_batches(args, origin, model, options, num_classes, dtype, ranks, beside=0):
    """Has --accumulate follow --micro-batch, "auto" (None) resolved; returns the images of a forward pass, or 0 for any number.

    On CUDA by trying, elsewhere by the estimate against the free memory; all ranks find the same. beside: bytes that the data
    will take of the device. Raises UserError where not even one image fits.
    """
    asked = {"config": 1, "command line": 2}
    if asked.get(origin.get("accumulate"), 0) > asked.get(origin.get("micro_batch"), 0):
        args.micro_batch = 0  # that was a default
    if args.micro_batch == 0:
        return 0
    rows = [data.rank_rows(args.batch_size, rank, ranks.world) for rank in range(ranks.world)]
    shares = [part.stop - part.start for part in rows]
    share = max(shares)
    if args.micro_batch is None:
        need = of_run(
            args, options, num_classes, device=ranks.device.type, dtype=dtype, world=ranks.world
        )
        args.micro_batch = _largest(args, need, model, dtype, ranks, share, beside)
        origin["micro_batch"] = "auto"
    if not args.freeze_backbone:  # its features are no pictures
        args.accumulate = min(-(-share // args.micro_batch), *shares)
        origin["accumulate"] = "--micro-batch"
    return args.micro_batch


def _largest(args, need, model, dtype, ranks, share, beside):
    there = _bytes(
        [*model.parameters(), *model.buffers()]
    )  # the model's part that lies on the device already
    free = max(0, available(ranks.device) + there - beside)
    # What is not there yet, and a tenth, as in the estimate: for batches while they are made, and for what lies in fragments.
    later = need.optimizer + need.average + beside + int((1 - SPARE) * free)
    together = ranks.world > 1 and (
        ranks.sharded or args.sync_bn
    )  # a rank without memory would leave the others waiting

    def fits(images):
        if ranks.device.type == "cuda" and not together and not args.freeze_backbone:
            good = step_fits(model, images, args.image_size, dtype, reserve=later)
        else:
            good = images <= need.largest(free)
        return not ranks.any(not good)

    parts = fewest_parts(share, fits)
    if parts is None:
        raise UserError(
            f"a step of {args.model} with one image needs {need.total(1) / GB:.2f} GB, and {ranks.device} has "
            f"{free / GB:.2f} GB free: python train_sota.py --dry-run says what would make it fit"
        )
    return -(-share // parts)


def fewest_parts(images, fits):
    """The least number of parts of a batch such that the largest of them fits, or None where one image doesn't.

    fits(count) is asked of a few counts: of the whole, of halves until one fits, then of what lies between.
    """
    parts, failed = 1, 0
    while not fits(-(-images // parts)):
        if parts >= images:
            return None
        parts, failed = min(2 * parts, images), parts
    while parts - failed > 1:
        middle = (parts + failed) // 2
        if -(-images // middle) == -(-images // parts) or fits(-(-images // middle)):
            parts = middle
        else:
            failed = middle
    return parts


def step_fits(model, images, image_size, dtype, reserve=0):
    """Whether a forward and a backward pass of so many images find room on the model's device beside `reserve` bytes, tried.

    The model stays as it was, its statistics and gradients included.
    """
    device = next(model.parameters()).device
    statistics = [buffer.clone() for buffer in model.buffers()]

    def step():
        held = torch.empty(
            reserve, dtype=torch.uint8, device=device
        )  # the optimizer's state is not there yet
        for _ in range(2):  # the first one's gradients lie there during the second
            inputs = torch.zeros(images, 3, image_size, image_size, device=device)
            with mixed_precision.autocast(device, dtype):
                logits = model(inputs.contiguous(memory_format=torch.channels_last))
            F.cross_entropy(logits.float(), logits.argmax(1)).backward()
        return held

    model.train()
    try:
        step()
        return True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
        for buffer, value in zip(model.buffers(), statistics):
            buffer.copy_(value)
        if device.type == "cuda":
            torch.cuda.empty_cache()


@contextlib.contextmanager
def explained(args, world=1):
    """Turns running out of memory in the block into a UserError that says what to try."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        images = -(-args.batch_size // (world * args.accumulate))
        smaller = (
            f"--micro-batch {images // 2}"
            if images > 1
            else "--grad-checkpointing, --ema-device cpu or --lora-rank 16"
        )
        raise UserError(
            f"out of memory with {images} images of {args.image_size} px at once: try {smaller}; what was saved is "
            f"whole ({str(error).strip().splitlines()[0][:120]})"
        ) from error


def is_out_of_memory(error):
    """Whether an exception says that there is no more memory: CUDA's or its libraries', the CPU allocator's or Python's."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error) for words in NO_MEMORY
    )


NO_MEMORY = (
    "can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Failed to CUDA calloc",
)


def _size(storages, but=()):
    return sum(storage.nbytes() for key, storage in storages.items() if key not in but)


def _storage(tensor):
    return tensor.untyped_storage()._cdata


def _bytes(tensors):
    own = (
        t.to_local() if hasattr(t, "to_local") else t for t in tensors
    )  # of a sharded one, a part
    return sum(t.numel() * t.element_size() for t in own)
