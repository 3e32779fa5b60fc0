"""Before a large model is trained: what a step needs, and a trial of everything with a small copy.

dry_run(args, gpu_memory=80)
smoke(parser, given, main)
"""

import copy
import math
import os
from pathlib import Path

import torch

import data
import models
from common.errors import UserError
from common.free_memory import available
from common.scopes import flag, words
from datasets import image_folder
from models.published import smallest
from models.weights import load_checkpoint
from training import devices, distributed, memory, mixed_precision, run_directory
from training.fitting import requested_micro_batch
from training.initial_model import model_options
from training.inputs import cached_parts
from training.memory import GB

SMOKE = {"dataset": "shapes", "micro_batch": 8, "ema_decay": 0.9, "tag": "smoke", "curves": False}
# What replaces the given values: a short run, which can be extended by an epoch.
SHORT = {
    "limit_train": 48,
    "limit_test": 24,
    "val_size": 0,
    "patience": 0,
    "batch_size": 16,
    "epochs": 1,
    "schedule": "constant",
    "final_lr": 0.0,
    "warmup_epochs": 0.0,
    "eval_every": 1,
    "lookahead": 0,
    "progressive": "none",
}
# What makes a step smaller, one line of the table each.
SMALLER = (
    {},
    {"grad_checkpointing": True},
    {"ema_device": "cpu"},
    {"grad_checkpointing": True, "ema_device": "cpu"},
    {"lora_rank": 16},
    {"freeze_backbone": True},
)


def print_need(args, num_classes, *, dtype, device, free):
    """Prints what a step needs of a device ("cpu", "cuda") with `free` bytes; returns a Need."""
    world_size = distributed.world_size()
    parameters, macs = models.describe(
        args.model, num_classes, args.image_size, model_options(args)
    )
    need = memory.need_of_run(args, num_classes, device=device, dtype=dtype, world_size=world_size)
    precision = mixed_precision.name(dtype)
    print(
        f"{args.model}, {args.image_size} px, {num_classes} classes: {parameters:,} parameters, "
        f"{macs / 1e9:.1f} GMACs per image; {precision} on {device}"
    )
    items = {
        "parameters": need.parameters,
        "gradients": need.gradients,
        f"{args.optimizer}'s state": need.optimizer,
        "moving average": need.average,
        f"weights in {precision}": need.copies,
        "the copy to be saved": need.snapshot,
    }
    listed = ", ".join(f"{name} {in_gb(size)}" for name, size in items.items() if size)
    on_host = "" if device == "cpu" else f"; to save it, {in_gb(need.host)} on the host"
    total, image = in_gb(need.fixed), in_gb(need.image)
    print(f"GB: {listed}, together {total}; activations {image} per image{on_host}")
    share = max(data.rank_shares(args.batch_size, world_size))
    parts = args.accumulate or cached_parts(args, torch.device(device), share)
    print(_verdict(args, need, share, parts, free))
    return need


def _verdict(args, need, share, parts, free):
    """Whether a step of `share` images fits into `free` bytes, as a sentence."""
    most = need.largest(free)
    micro_batch = requested_micro_batch(args)
    if micro_batch:
        wanted = min(share, micro_batch)
    elif micro_batch == 0:
        wanted = math.ceil(share / parts)
    else:  # auto
        wanted = min(share, max(1, most))
    if wanted <= most:
        verdict = "fits"
    else:
        verdict = f"does not fit, {most} at once would" if most else "does not fit"
    times = _count(math.ceil(share / wanted), "time")
    return (
        f"needs {in_gb(need.total(wanted))} GB for {_count(wanted, 'image')} at once, "
        f"{times} for a batch of {share}; {in_gb(free)} GB are free, "
        f"of which a tenth is kept spare: {verdict}"
    )


def _count(number, noun):
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def in_gb(size):
    return f"{size / GB:.2f}" if size >= GB else f"{size / GB:.2g}"


def dry_run(args, gpu_memory):
    """Prints what a step needs, and with which arguments it would need less. Builds shapes only.

    gpu_memory: GB of the GPU to plan for, None for the device of this machine.
    """
    if not distributed.is_main_process():
        return 0
    if gpu_memory:
        device, free = "cuda", gpu_memory * GB
        dtype = mixed_precision.amp_dtype("bf16" if args.amp == "auto" else args.amp, None)
    else:
        here = devices.select_device(args.device)
        device, free = here.type, available(here)
        dtype = mixed_precision.amp_dtype_for(args.model, args.amp, here)
    num_classes = number_of_classes(args)
    need = print_need(args, num_classes, dtype=dtype, device=device, free=free)
    columns = f"{'GB besides images':>18}{'GB per image':>13}{'images at once':>16}"
    print(f"\n{'to make it smaller':<40}{columns}")
    for changes in SMALLER:
        changed = copy.copy(args)
        vars(changed).update(changes)
        option = " ".join(words(changes)) or "as asked"
        try:
            if changes:
                need = memory.need_of_run(
                    changed,
                    num_classes,
                    device=device,
                    dtype=dtype,
                    world_size=distributed.world_size(),
                )
        except UserError:  # of this change: the run itself has been counted by now
            print(f"{option:<40}  not with this model")
            continue
        sizes = f"{need.fixed / GB:>18.2f}{need.image / GB:>13.3f}{need.largest(free):>16}"
        print(f"{option:<40}{sizes}")
    return 0


def number_of_classes(args):
    """Of the dataset, where one is named; else those that the model is listed with."""
    if args.origin["dataset"] == "default" and not args.config:
        return models.MODELS[args.model].classes if args.model in models.MODELS else 1000
    if args.dataset == "folder":
        directory = Path(args.data_dir) / "train"
        classes = image_folder.class_names(directory) if directory.is_dir() else []
        if not classes:
            raise UserError(f"--data-dir {args.data_dir} has no train/<class>/", 2)
        return len(classes)
    return {"cifar10": 10, "cifar100": 100, "shapes": 10}[args.dataset]


def smoke(parser, given, main):
    """Trains a small copy of the model for an epoch, resumes for another, and reads what was saved.

    given: the arguments on the command line; main: of the script.
    """
    for name in ("pretrained", "weights", "resume", "config", "freeze_backbone"):
        if given.get(name):
            raise UserError(f"--smoke trains fresh weights: leave {flag(name)} out", 2)
    if given.get("dry_run"):
        raise UserError("--smoke trains and --dry-run doesn't: give one of them", 2)
    if distributed.world_size() > 1:
        raise UserError("--smoke is for one process", 2)
    chosen = _small_copy(parser, given)
    directory, copied = chosen["output_dir"], ", ".join(chosen["model_arg"]) or "all its layers"
    print(f"smoke: {chosen['model']} with {copied}, {chosen['image_size']} px, {directory}")
    if status := main(words(chosen)):
        return status
    again = {"resume": directory, "epochs": chosen["epochs"] + 1, "curves": False}
    if "device" in given:
        again["device"] = given["device"]
    if status := main(words(again)):
        return status
    model, card = load_checkpoint(os.path.join(directory, "best.pt"))
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"smoke: trained, saved, evaluated, resumed; best.pt holds {parameters:,} parameters of "
        f"{card['model']}"
    )
    return 0


def _small_copy(parser, given):
    """The arguments of a trial: a small copy of the model, and what is `given`, but for SHORT."""
    given = {name: value for name, value in given.items() if name not in ("smoke", "gpu_memory")}
    name = models.canonical(given.get("model", parser.get_default("model")))
    options, size = {}, 32
    if models.is_published(name):
        published = name.removeprefix("timm/")
        if not name.startswith("timm/"):
            published = models.MODELS[name].timm_name
        options, size = smallest(published)
        name = f"timm/{published}"
        given.setdefault("layer_decay", 0.85)
    pairs = [f"{key}={value}" for key, value in options.items()] + given.get("model_arg", [])
    path = run_directory.new_path("runs", "shapes", name, "smoke", given.get("seed", 0))
    small = SMOKE | {"image_size": size, "output_dir": str(path)}
    if "accumulate" in given:
        del small["micro_batch"]
    return small | given | SHORT | {"model": name, "model_arg": pairs}
