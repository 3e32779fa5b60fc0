"""What the runs of a sweep would cost on this machine, from a few timed steps of each experiment.

print_plan(runs, num_slots=1)      # runs: of plans.Run; num_slots: how many run at once

The steps are those of training/loop.py on random images, with fresh weights: nothing is downloaded.
Saving, TensorBoard and the view averages of --tta are not counted. A run on a CPU also keeps the
memory of its steps (devices.keep_freed_memory), which the process of a sweep must not.
"""

import argparse
import contextlib
import io
import math
import time
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

import data
from common.errors import UserError
from common.free_memory import available
from datasets.examples import Examples, Split
from sweeps.launch import clock
from sweeps.plans import describe
from training import (
    arguments,
    config_file,
    devices,
    distributed,
    memory,
    mixed_precision,
    out_of_memory,
    preflight,
)
from training.checks import check_arguments
from training.evaluation import evaluate
from training.fitting import requested_micro_batch
from training.initial_model import build_model
from training.inputs import Inputs, batch_parts
from training.loop import StepSettings, train_epoch
from training.moving_average import MovingAverage
from training.optimizers import create_optimizer
from training.progressive import size_schedule
from training.state import State

# Training images, test images, classes.
SIZES = {"cifar10": (50_000, 10_000, 10), "cifar100": (50_000, 10_000, 100)}
SIZES["shapes"] = (10_000, 2_000, 10)
SECONDS = 3  # that a timed step may take; a longer one is timed with fewer images
STEPS = 3  # that are timed


def print_plan(runs, num_slots, timed=True):
    """Prints what each experiment is and, if timed, costs, as comments of a shell."""
    total, unknown = 0.0, []
    for label in dict.fromkeys(run.label for run in runs):
        members = [run for run in runs if run.label == label]
        print(f"# {label}: {describe(members[0])}", flush=True)
        if not timed:
            continue
        if members[0].script == "train_sota":
            print_memory(members[0].args)
        try:
            seconds, speed = cost(members[0].args)
        except UserError as error:
            unknown.append(label)
            print(f"#   no estimate: {error}", flush=True)
            continue
        total += seconds * len(members)
        text = f"about {clock(seconds)} a run, {speed:.3g} training images/s"
        print(f"#   {text}; {len(members)} of these", flush=True)
    if timed:
        without = f", without {', '.join(unknown)}" if unknown else ""
        together = clock(total / max(1, num_slots))
        print(f"# together about {together} with {num_slots} at a time{without}")


def print_memory(args):
    """Prints what --dry-run of train_sota.py prints."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        preflight.dry_run(args, gpu_memory=None)
    print("".join(f"#   {line}".rstrip() + "\n" for line in text.getvalue().splitlines()), end="")


def cost(args):
    """(seconds of a run, training images per second). Raises UserError where it can't run here."""
    args = argparse.Namespace(**(config_file.OTHER_SCRIPTS | vars(args)))
    args.pretrained, args.weights, args.output_dir = False, None, None
    if args.freeze_backbone:
        raise UserError("the cost of --freeze-backbone is not estimated")
    ranks = distributed.Ranks(devices.select_device(args.device))
    check_arguments(args, None, ranks)
    devices.configure_backends(deterministic=args.deterministic)
    train_images, eval_images, classes = _sizes(args)
    dtype = mixed_precision.amp_dtype_for(args.model, args.amp, ranks.device)
    largest = _images_at_once(args, classes, ranks.device, dtype)
    images = 2  # batch norm can't train on one
    with out_of_memory.explained(args, ranks):
        step, evaluation = time_steps(args, classes, ranks, dtype, images)
        # Part of a step's time doesn't depend on its images, so their number can't be computed.
        while images < largest and 4 * step < SECONDS:
            images = min(largest, 4 * images)
            step, evaluation = time_steps(args, classes, ranks, dtype, images)
    if train_images < args.batch_size:
        raise UserError(f"--batch-size {args.batch_size} is more than {train_images} images")
    steps = args.epochs * (train_images // args.batch_size)
    trained = steps * args.batch_size * _share_of_work(args, steps)
    evaluations = math.ceil(args.epochs / args.eval_every) * (1 if args.ema_decay == 0 else 2)
    evaluated = evaluations * eval_images
    if args.eval_train:
        evaluated += train_images
    return (trained * step + evaluated * evaluation) / images, images / step


def _share_of_work(args, steps):
    """The pixels that the steps train on, relative to those of full images (--progressive)."""
    size_at = size_schedule(args.progressive, steps)
    sizes = [size_at(step) or args.image_size for step in range(steps)]
    return sum(size**2 for size in sizes) / len(sizes) / args.image_size**2 if sizes else 1.0


def _sizes(args):
    """(training images, images of an evaluation, classes)"""
    if args.dataset in SIZES:
        train, test, classes = SIZES[args.dataset]
    else:
        split = data.load(args.dataset, args.data_dir, **arguments.data_options(args))
        return len(split.train), len(split.val or split.test), split.num_classes
    train = min(train, args.limit_train or train) - args.val_size
    return train, args.val_size or min(test, args.limit_test or test), classes


def _images_at_once(args, classes, device, dtype):
    """The images that are trained at once. Raises UserError where they don't fit into memory."""
    parts = batch_parts(args, distributed.Ranks(device)).accumulate
    images, free = math.ceil(args.batch_size / parts), available(device)
    need = memory.need_of_run(args, classes, device=device.type, dtype=dtype)
    micro_batch = requested_micro_batch(args)
    if micro_batch is None:
        images = min(images, need.largest(free))
    elif micro_batch:
        images = min(images, micro_batch)
    if max(1, images) > need.largest(free):
        images = max(1, images)
        needed, free = preflight.in_gb(need.total(images)), preflight.in_gb(free)
        raise UserError(f"it needs {needed} GB with {images} at once, and {free} GB are free")
    return images


def time_steps(args, classes, ranks, dtype, images):
    """(seconds of a training step, of an evaluation) on `images` random images."""
    state, settings, inputs = _start(args, classes, ranks, dtype, images)
    batches = inputs.training_batches(state.model)
    seconds = []
    for _ in range(2):  # the first epoch chooses kernels and allocates memory
        train_epoch(state, batches, settings)
        seconds.append(state.progress.seconds / len(batches))
        state.progress.finish_epoch()
        if seconds[0] > SECONDS:
            break
    start = time.perf_counter()
    evaluate(state.model, inputs.evaluation_batches(state.model), dtype=dtype)
    devices.synchronize(ranks.device)
    return min(seconds), time.perf_counter() - start


def _start(args, classes, ranks, dtype, images):
    """The state, StepSettings and Inputs of a run with batches of `images` random images."""
    args = argparse.Namespace(**vars(args) | {"batch_size": images, "repeated_augment": 1})
    steps = STEPS if images > 2 else 1
    examples = Examples(
        torch.randint(0, 256, (steps * images, 3, 32, 32), dtype=torch.uint8),
        torch.randint(0, classes, (steps * images,)),
    )
    few = examples.take(torch.arange(images))
    names = tuple(map(str, range(classes)))
    split = Split("random", examples, None, few, names, (0.5,) * 3, (0.25,) * 3)
    many = examples.take(torch.arange(100) % len(examples))  # for a first layer made of images
    start = replace(split, train=many)
    model, normalization = build_model(args, start, None, lora_rank=args.lora_rank)
    model = distributed.place(model, ranks, dtype)
    state = State(
        model=model,
        optimizer=create_optimizer(args, model, None, dtype),
        average=MovingAverage(model, 0.9) if args.ema_decay != 0 else None,
    )
    if args.compile:
        state.compile()
    settings = StepSettings(
        lr_at=lambda step, end=1.0: 1e-12,  # at zero, some gradients would be left out
        loss_fn=partial(F.cross_entropy, label_smoothing=args.label_smoothing),
        dtype=dtype,
        clip_grad=args.clip_grad,
        ranks=ranks,
    )
    return state, settings, Inputs(args, split, normalization, ranks, dtype, images)
