"""Splits batches into parts that fit into the memory of the device (--micro-batch).

parts = split_batches(args, model, averaged, split, dtype, ranks)     # inputs.BatchParts
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F

import data
from common.errors import UserError
from common.free_memory import available
from datasets.residency import resident_bytes
from training.inputs import BatchParts, batch_parts
from training.memory import GB, USABLE, need_of_run, tensor_bytes
from training.mixed_precision import autocast
from training.out_of_memory import is_out_of_memory


def split_batches(args, model, averaged, split, dtype, ranks):
    """The BatchParts of a run's arguments, the same on all ranks.

    averaged: see distributed.place_large. --micro-batch auto is found on CUDA by trying. Elsewhere,
    with a frozen backbone, and where ranks work together in a forward pass (--fsdp, --sync-bn), it
    is the estimate against the free memory. Raises UserError where not even one image fits.
    """
    micro_batch = requested_micro_batch(args)
    if micro_batch == 0:
        derived = {"micro_batch": 0} if args.micro_batch != 0 else {}
        return replace(batch_parts(args, ranks), derived=derived)
    shares = data.rank_shares(args.batch_size, ranks.world_size)
    automatic = {}
    if micro_batch is None:
        micro_batch = _largest_micro_batch(
            args,
            model=model,
            averaged=averaged,
            split=split,
            dtype=dtype,
            ranks=ranks,
            share=max(shares),
        )
        automatic = {"micro_batch": micro_batch}
    if args.freeze_backbone:  # its features are small
        parts = batch_parts(args, ranks)
        return replace(parts, images_at_once=micro_batch, automatic=automatic | parts.automatic)
    accumulate = number_of_parts(shares, micro_batch)
    at_once = min(micro_batch, max(shares))
    return BatchParts(accumulate, at_once, automatic, {"accumulate": accumulate})


def number_of_parts(shares, micro_batch):
    """Into how many parts each rank splits its share of a batch.

    Raises UserError where a rank has fewer images than another has parts.
    """
    parts, ranks = math.ceil(max(shares) / micro_batch), len(shares)
    if parts > min(shares):
        unequal = f"{ranks} processes have {min(shares)} to {max(shares)} images of a batch"
        raise UserError(
            f"can't train one image at a time where {unequal}: choose --micro-batch 2 or, for a "
            f"new run, a --batch-size that is a multiple of {2 * ranks}",
            2,
        )
    return parts


def requested_micro_batch(args):
    """--micro-batch: a number of images, 0 for --accumulate, None for auto.

    An --accumulate that was asked for more explicitly than --micro-batch decides.
    """
    order = {"config": 1, "command line": 2}
    accumulate, micro_batch = (
        order.get(args.origin.get(name), 0) for name in ("accumulate", "micro_batch")
    )
    return 0 if accumulate > micro_batch else args.micro_batch


def _largest_micro_batch(args, *, model, averaged, split, dtype, ranks, share):
    """The images of a part if `share` images are split into as few parts as fit.

    Raises UserError if not even one image fits.
    """
    device = ranks.device
    need = need_of_run(
        args, split.num_classes, device=device.type, dtype=dtype, world_size=ranks.world_size
    )
    resident = sum(
        resident_bytes(part, device, args.resident)
        for part in (split.train, split.val or split.test)
    )
    loaded = _bytes_of(model)
    if averaged is not None and ranks.sharded:  # else it is on the host
        loaded += _bytes_of(averaged)
    free = max(0, available(device) + loaded - resident)
    # What is not allocated yet, and the share of the memory that is not planned with.
    reserve = need.optimizer + need.average + resident + int((1 - USABLE) * free)
    if ranks.world_size > 1 and not ranks.sharded:
        # DistributedDataParallel's buffers for gradients, which the trial doesn't have.
        reserve += tensor_bytes(p for p in model.parameters() if p.requires_grad)
    # A rank that ran out of memory would leave the others waiting.
    synchronized = ranks.world_size > 1 and (ranks.sharded or args.sync_bn)

    def fits(images):
        if device.type == "cuda" and not synchronized and not args.freeze_backbone:
            good = step_fits(model, images, args.image_size, dtype, reserve)
        else:
            good = images <= need.largest(free)
        return not ranks.any(not good)

    parts = fewest_parts(share, fits)
    if parts is None:
        one, gb = need.total(1) / GB, free / GB
        raise UserError(
            f"a step of {args.model} with one image needs {one:.2f} GB, and {device} has {gb:.2f} "
            f"GB free: python train_sota.py --dry-run lists what would make it fit"
        )
    return math.ceil(share / parts)


def _bytes_of(model):
    return tensor_bytes([*model.parameters(), *model.buffers()])


def fewest_parts(images, fits):
    """The smallest number of parts of a batch so that the largest part fits, or None.

    fits(count) is called for few counts: all images, halves until one fits, then in between.
    """
    parts, failed = 1, 0
    while not fits(math.ceil(images / parts)):
        if parts >= images:
            return None
        parts, failed = min(2 * parts, images), parts
    while parts - failed > 1:
        middle = (parts + failed) // 2
        largest = math.ceil(images / middle)
        if largest == math.ceil(images / parts) or fits(largest):
            parts = middle
        else:
            failed = middle
    return parts


def step_fits(model, images, image_size, dtype, reserve=0):
    """Whether a forward and backward pass of `images` fits besides `reserve` bytes, by trying.

    The model stays as it was, with its statistics and gradients.
    """
    device = next(model.parameters()).device
    statistics = [buffer.clone() for buffer in model.buffers()]

    def step():
        held = torch.empty(reserve, dtype=torch.uint8, device=device)
        for _ in range(2):  # the gradients of the first pass are there during the second
            inputs = torch.zeros(images, 3, image_size, image_size, device=device)
            with autocast(device, dtype):
                logits = model(inputs.contiguous(memory_format=torch.channels_last))
            F.cross_entropy(logits.float(), logits.argmax(1)).backward()
        del held

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
