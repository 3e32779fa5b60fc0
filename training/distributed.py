"""Several processes that train one model: what torchrun says of them, and what they tell each other.

    torchrun --nproc-per-node=4 train.py …                  # each process is a rank, with a GPU, or a share of the CPU

    with join(torch.device("cpu"), batch_size=128) as ranks:
        ranks.sum(torch.tensor([loss_sum, count]))          # over all ranks, on each of them

Each rank holds the data and works on its rows of each batch (data.rank_rows). Either each holds the whole model, and
DistributedDataParallel averages gradients, or each holds a part of every parameter, gradient and optimizer state (`shard`), for
models that are larger than a device. The first rank writes the run's directory and prints; the others are silent.
"""

import contextlib
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn

from common.errors import UserError

# For one rank to decode a folder or to write gigabytes to a slow disk while the others wait: nccl gives up after ten minutes.
PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """This process among `world` of them; local: its number on this machine; sharded: whether each holds a part of a model."""

    device: torch.device
    rank: int = 0
    world: int = 1
    local: int = 0
    sharded: bool = False

    def __str__(self):
        return str(self.device) if self.world == 1 else f"{self.world} x {self.device.type}"

    @property
    def first(self):
        return self.rank == 0

    def sum(self, values):
        """The tensor, in place, with the sum over all ranks."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag):
        """Whether the flag is set on some rank."""
        return (
            bool(flag)
            if self.world == 1
            else bool(self.sum(torch.tensor(float(bool(flag)), device=self.device)).item())
        )

    def spread(self, tensors):
        """Gives every rank the first one's values, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def wait(self):
        """Returns when every rank has called it."""
        if self.world > 1:
            dist.barrier()

    @contextlib.contextmanager
    def one_first(self):
        """A block that one rank of each machine ends before the others begin: it downloads, they find the file."""
        if self.world > 1 and self.local > 0:
            dist.barrier()
        yield
        if self.world > 1 and self.local == 0:
            dist.barrier()

    def parallel(self, model):
        """What to call for a training step, so that gradients are the mean over ranks: the model itself, alone or sharded."""
        if self.world == 1 or self.sharded:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        # Gradients lie in the buffers that are sent: a second copy of them would be as large as the model.
        return nn.parallel.DistributedDataParallel(
            model, device_ids=devices, gradient_as_bucket_view=True
        )


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def in_company():
    """Whether torchrun (or SLURM by way of it) started this process as one of several."""
    return world_size() > 1


def launched():
    """Whether torchrun, or another launcher of several processes, started this one."""
    return in_company() or dist.is_torchelastic_launched()


def is_first():
    """Whether this process is the first or the only one, also where it doesn't join the others."""
    return os.environ.get("RANK", "0") == "0"


def _place():
    """(rank, world size, number on this machine, processes on this machine), as torchrun says. Raises UserError."""
    missing = [name for name in (*PLACE, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {world_size()}, but {', '.join(missing)} is not set: start the processes with "
            f"torchrun, or unset WORLD_SIZE for one process",
            status=2,
        )
    return [int(os.environ[name]) for name in PLACE]


PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@contextlib.contextmanager
def join(device, batch_size):
    """The Ranks of this process: alone on `device`, unless torchrun started several. Raises UserError.

    In company, a GPU each (nccl), or the CPU (gloo); whoever is not first prints nothing.
    """
    if not in_company():
        yield Ranks(device)
        return
    rank, world, local, here = _place()
    if batch_size % world:
        raise UserError(
            f"--batch-size {batch_size} can't be divided among {world} processes: make it a multiple",
            status=2,
        )
    if device.type == "mps" or device.index is not None:
        raise UserError(
            f"--device {device} is one device, for {here} processes: take auto, cuda or cpu",
            status=2,
        )
    if device.type == "cuda":
        if here > torch.cuda.device_count():
            raise UserError(
                f"--nproc-per-node {here} is more than the {torch.cuda.device_count()} GPUs of this machine",
                2,
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device, timeout=PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)
    ended_well = False
    try:
        with contextlib.ExitStack() as stack:
            if rank:
                silence = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(silence))
            yield Ranks(device, rank, world, local)
        ended_well = True
    except (RuntimeError, dist.DistError) as error:
        if not _was_left_alone(error):
            raise
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"another process of this run ended, or can't be reached ({reason})"
        ) from error
    finally:
        # After an error nccl would wait here for what the others don't join, and the error would not be told: cli.run ends
        # the process when it has been.
        if ended_well or device.type != "cuda":
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


def _was_left_alone(error):
    """Whether an error is that of a collective whose other side is gone."""
    said = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in said for word in ("connection", "gloo", "nccl", "socket", "peer")
    )


def shard(model, company):
    """Leaves each rank a part of every parameter (FSDP2, arXiv 2304.11277), block by block, and brings it to its device.

    Raises UserError for a model with scalar parameters (timm's dm_nfnet), which FSDP2 can't divide.
    """
    scalar = next((name for name, p in model.named_parameters() if p.ndim == 0), None)
    if scalar:
        raise UserError(
            f"--fsdp can't divide {scalar}, a parameter of a single number, among processes: leave it out",
            2,
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(company.device.type, (company.world,))
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "blocks":
            for block in module.children():
                fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(state):
    """A state dict, nested as it may be, whose parts are put together, on the first rank's CPU; the others get None for them.

    All ranks have to call it together. On one machine the hosts of eight GPUs are one, which need not hold it eight times.
    """
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(whole, state))
    if not hasattr(state, "full_tensor"):
        return state
    full = state.full_tensor()
    return full.cpu() if dist.get_rank() == 0 else None


def parts(state, like):
    """{name: tensor} whose tensors are cut as those of the same name in `like` are; the opposite of `whole`."""
    return {key: _part(value, like.get(key)) for key, value in state.items()}


def _part(value, like):
    if not hasattr(like, "full_tensor") or not torch.is_tensor(value) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def optimizer_parts(state, optimizer):
    """An optimizer's state dict whose tensors are cut as their parameters are."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return state | {
        "state": {
            i: parts(values, dict.fromkeys(values, params[i]))
            for i, values in state["state"].items()
        }
    }
