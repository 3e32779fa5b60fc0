"""Several processes that train one model (ranks): what torchrun says about them, what they share.

    torchrun --nproc-per-node=4 train.py …      # each process is a rank, with a GPU or on the CPU

    with join(args) as ranks:
        ranks.sum(torch.tensor([loss_sum, count]))      # over all ranks, on each of them

Each rank has the data and works on its rows of each batch (data.rank_rows). Either each has the
whole model and DistributedDataParallel averages the gradients, or each has a shard of every
parameter, gradient and optimizer state (`shard`), for models larger than a device. The first rank
writes the run's directory and prints; the others are silent.
"""

import contextlib
import copy
import os
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import models
from common.errors import UserError, first_line
from training.devices import keep_freed_memory, select_device
from training.sync_batch_norm import sync_batch_norm

# One rank may decode a folder or write gigabytes to a slow disk while the others wait; the
# default of nccl is ten minutes.
TIMEOUT = timedelta(hours=2)
# VARIABLES and MASTER are set by torchrun.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MASTER = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process among `world_size` of them.

    local_rank: its number on this machine; sharded: whether each has a shard of the model.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    sharded: bool = False

    def __str__(self):
        return (
            str(self.device) if self.world_size == 1 else f"{self.world_size} x {self.device.type}"
        )

    @property
    def is_main(self):
        return self.rank == 0

    def sum(self, values):
        """The tensor, in place, with the sum over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag):
        """Whether the flag is set on any rank."""
        if self.world_size == 1:
            return bool(flag)
        return bool(self.sum(torch.tensor(float(bool(flag)), device=self.device)).item())

    def broadcast(self, tensors):
        """Gives every rank the first rank's values, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def broadcast_object(self, value):
        """The first rank's value, on every rank."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def broadcast_tensors(self, tensors):
        """The first rank's {name: tensor}, on every rank's host.

        One by one, because an object that is sent is on each rank's device as a whole.
        """
        names = self.broadcast_object(list(tensors))
        return {name: self.broadcast_object(tensors.get(name)) for name in names}

    def wait(self):
        """Returns when every rank has called it."""
        if self.world_size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def local_first(self):
        """A block that one rank per machine finishes first: it downloads a file, others find it."""
        if self.world_size > 1 and self.local_rank > 0:
            dist.barrier()
        yield
        if self.world_size > 1 and self.local_rank == 0:
            dist.barrier()

    def parallel(self, model):
        """What to call in a training step so that gradients are averaged over the ranks."""
        if self.world_size == 1 or self.sharded:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        # Gradients are views of the buffers that are sent: a copy would be as large as the model.
        # Statistics of batch norm are sent before an evaluation (evaluate_epoch), not in each step.
        parallel = nn.parallel.DistributedDataParallel(
            model, device_ids=devices, gradient_as_bucket_view=True
        )
        parallel.broadcast_buffers = False  # as an argument, it has another name in newer versions
        return parallel


def world_size():
    return _number("WORLD_SIZE") if "WORLD_SIZE" in os.environ else 1


def _number(variable):
    """The value of one of torchrun's variables. Raises UserError."""
    try:
        return int(os.environ[variable])
    except ValueError as error:
        value = os.environ[variable]
        raise UserError(f"{variable} must be a number, not {value!r}: use torchrun", 2) from error


def is_launched():
    """Whether torchrun, or another launcher of several processes, started this one."""
    return world_size() > 1 or dist.is_torchelastic_launched()


def local_tensor(tensor):
    """What this process holds of a tensor: its shard, or all of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def is_main_process():
    """Whether this process is the first or only one; it need not have joined the others."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def join(args):
    """The Ranks of this process: alone, unless torchrun started several. Raises UserError.

    Several ranks have a GPU each (nccl) or share the CPU (gloo); all but the first print nothing.
    """
    device = select_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    if world_size() == 1:
        yield Ranks(device)
        return
    ranks = _read_environment(device, args.batch_size)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(ranks.device)
            dist.init_process_group("nccl", device_id=ranks.device, timeout=TIMEOUT)
        else:
            dist.init_process_group("gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        address, reason = ":".join(map(os.environ.get, MASTER)), first_line(error)
        raise UserError(f"the processes can't be connected at {address} ({reason})") from error
    succeeded = False
    try:
        with contextlib.ExitStack() as stack:
            if not ranks.is_main:
                null = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(null))
            yield ranks
        succeeded = True
    except (RuntimeError, dist.DistError) as error:
        if not _lost_another_rank(error):
            raise
        reason = first_line(error)
        raise UserError(f"another process ended or can't be reached ({reason})") from error
    finally:
        # After an error nccl would wait here for ranks that never come, and the error would not be
        # shown. command_line.run ends the process.
        if succeeded or device.type != "cuda":
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


def _read_environment(device, batch_size):
    """The Ranks that torchrun's variables describe. Raises UserError."""
    missing = [name for name in (*VARIABLES, *MASTER) if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {world_size()}, but {', '.join(missing)} is not set: start the "
            f"processes with torchrun, or unset WORLD_SIZE for one process",
            2,
        )
    rank, processes, local_rank, local_processes = map(_number, VARIABLES)
    if batch_size % processes:
        raise UserError(
            f"--batch-size {batch_size} can't be divided by {processes} processes: make it a "
            f"multiple",
            2,
        )
    if device.type == "mps" or device.index is not None:
        others = "cpu" if device.type == "mps" else "auto, cuda or cpu"
        raise UserError(
            f"--device {device} is one device for {local_processes} processes: use {others}", 2
        )
    if device.type == "cuda":
        if local_processes > torch.cuda.device_count():
            gpus = torch.cuda.device_count()
            raise UserError(f"--nproc-per-node {local_processes}: this machine has {gpus} GPUs", 2)
        device = torch.device("cuda", local_rank)
    return Ranks(device, rank, processes, local_rank)


def _lost_another_rank(error):
    """Whether this is the error of a collective operation whose other side is gone."""
    words = ("connection", "gloo", "nccl", "socket", "peer")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def place(model, ranks, dtype, sync_bn=False):
    """The model on the device of this rank, channels_last; sync_bn: batch norm over all ranks."""
    model = _prepare(model, ranks, dtype, sync_bn)
    return model.to(ranks.device, memory_format=torch.channels_last)


def place_large(model, args, ranks, dtype):
    """(model, averaged, ranks): the model on the device, or with --fsdp a shard of it.

    averaged: the model for the moving average where that is sharded or stays in host memory, else
    None. It is copied first, on the CPU, so that the device never holds two whole models.
    """
    model = _prepare(model, ranks, dtype, args.sync_bn)
    sharded = args.fsdp and ranks.world_size > 1
    on_host = args.ema_device == "cpu" and ranks.device.type != "cpu"
    averaged = None
    if args.ema_decay != 0 and (sharded or on_host):
        averaged = copy.deepcopy(model)
    if not sharded:
        return model.to(ranks.device, memory_format=torch.channels_last), averaged, ranks
    if averaged is not None:
        averaged = shard(averaged, ranks)
    return shard(model, ranks), averaged, replace(ranks, sharded=True)


def _prepare(model, ranks, dtype, sync_bn):
    if sync_bn and ranks.world_size > 1:
        model = sync_batch_norm(model, ranks.device)
    return models.choose_attention(model, ranks.device, dtype)


# ---- a shard of the model on each rank -----------------------------------------------------------


def shard(model, ranks):
    """Leaves each rank a shard of every parameter, on its device (FSDP2; arXiv 2304.11277 is FSDP).

    Raises UserError as require_shardable does.
    """
    require_shardable(model)
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "blocks":
            for block in module.children():
                fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def require_shardable(model):
    """Raises UserError for scalar parameters (timm's dm_nfnet), which can't be sharded."""
    scalar = next((name for name, p in model.named_parameters() if p.ndim == 0), None)
    if scalar:
        raise UserError(f"--fsdp can't shard {scalar}, a single number: leave --fsdp out", 2)


def gather(state):
    """A nested state dict with its shards put together, on the CPU of the first rank.

    The other ranks get None instead: the memory of a machine need not hold it once per GPU. All
    ranks have to call it together.
    """
    if isinstance(state, dict):
        return {key: gather(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(gather, state))
    if not hasattr(state, "full_tensor"):
        return state
    full = state.full_tensor()
    return full.cpu() if dist.get_rank() == 0 else None


def shard_like(state, like):
    """{name: tensor}, each sharded as the one of the same name; the opposite of gather."""
    return {key: _shard_tensor(value, like.get(key)) for key, value in state.items()}


def shard_optimizer(state, optimizer):
    """An optimizer's state dict with its tensors sharded as the parameters are."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    sharded = {
        i: {key: _shard_tensor(value, params[i]) for key, value in values.items()}
        for i, values in state["state"].items()
    }
    return state | {"state": sharded}


def _shard_tensor(value, like):
    if not hasattr(like, "full_tensor") or not torch.is_tensor(value) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
