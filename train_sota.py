"""Fine-tune the largest models, made to fit: EVA-02 large (448 px), EVA giant (336 px),
ConvNeXt-XXL (256 px), and any other model of timm.

    python train_sota.py --model eva_giant --dry-run                        # GB that a step needs
    python train_sota.py --model eva02_large --pretrained --grad-checkpointing
    python train_sota.py --model eva_giant --pretrained --lora-rank 16 --ema-device cpu
    python train_sota.py --model convnext_xxlarge --pretrained --freeze-backbone    # a linear probe
    torchrun --nproc-per-node=8 train_sota.py --model eva_giant --pretrained --fsdp    # sharded
    python train_sota.py --model eva02_large --smoke    # everything with a small copy, in seconds

Batches are split into as many parts as the memory of the device requires (--micro-batch auto).
RECIPE was not tuned here; its accuracy is not measured.
"""

from functools import partial

import torch
import torch.nn.functional as F

import data
import models
from analysis.curves import draw_finished
from common import command_line
from common.errors import UserError
from common.free_memory import available
from training import (
    arguments,
    devices,
    distributed,
    doctor,
    mixed_precision,
    out_of_memory,
    preflight,
    resume,
)
from training.checks import check_arguments, check_fitting
from training.evaluation import Curve, evaluate_epoch
from training.fitting import split_batches
from training.initial_model import build_model, model_card
from training.inputs import Inputs
from training.lookahead import Lookahead
from training.loop import StepSettings, train_epoch
from training.moving_average import MovingAverage
from training.optimizers import create_optimizer
from training.options import FITTING, PREFLIGHT
from training.progressive import size_schedule
from training.run import open_run
from training.schedules import Plan
from training.state import Confusion, State

# A tenth of the rate for smaller models, falling less with depth (arXiv 2211.07636, 2303.11331).
RECIPE = {
    "model": "eva02_large",
    "epochs": 5,
    "batch_size": 128,  # images, in as many parts as the memory requires
    "optimizer": "adamw",
    "lr": 3e-5,  # peak, of the classifier
    "layer_decay": 0.85,  # of the learning rate, per layer towards the input
    "weight_decay": 0.05,  # not on norms and biases
    "schedule": "cosine",
    "clip_grad": 1.0,  # largest norm of the gradient
    "label_smoothing": 0.1,
    "augment": "crop,flip",
    "mixup": 0.2,  # alpha
    "cutmix": 1.0,  # alpha
    "mix_prob": 0.5,  # share of the images that are mixed
    "image_size": 224,  # pixels; the three large models bring their own
}


def build_parser():
    parser = arguments.training_parser(__doc__, RECIPE)
    arguments.add_options(parser, "fitting into memory", FITTING)
    arguments.add_options(parser, "before training", PREFLIGHT)
    return parser


def main(argv=None):
    parser = build_parser()
    given = arguments.parse(parser, argv)
    if given.get("smoke"):
        return preflight.smoke(parser, given, main)
    args, saved = arguments.resolve(parser, given=given)
    if args.doctor:
        return doctor.report(args)
    if args.list_models:
        return models.print_table()
    if args.dry_run:
        return preflight.dry_run(args, args.gpu_memory)
    if args.gpu_memory:
        raise UserError("--gpu-memory needs --dry-run", 2)
    with distributed.join(args) as ranks, out_of_memory.explained(args, ranks):
        return train(args, saved, ranks)


def train(args, saved, ranks):
    """Trains and tests a model; saved: the contents of last.pt of a run that resumes."""
    if resume.is_finished(args, saved):
        return 0
    check_arguments(args, saved, ranks)
    check_fitting(args, saved)
    devices.configure_backends(deterministic=args.deterministic)
    device, dtype = ranks.device, mixed_precision.amp_dtype_for(args.model, args.amp, ranks.device)

    with ranks.local_first():
        split = data.load(args.dataset, args.data_dir, **arguments.data_options(args))
    resume.check_data(split, saved, ranks)
    here = dict(dtype=dtype, device=device.type, free=available(device))
    preflight.print_need(args, split.num_classes, **here)

    model, normalization = build_model(args, split, saved, lora_rank=args.lora_rank)
    model, averaged, ranks = distributed.place_large(model, args, ranks, dtype)
    parts = split_batches(args, model, averaged, split, dtype, ranks)
    inputs = Inputs(args, split, normalization, ranks, dtype, parts.images_at_once)
    train_batches = inputs.training_batches(model)
    eval_batches = inputs.evaluation_batches(model)

    plan = Plan.of(args, len(train_batches))
    resume.check_epochs(args, saved, len(train_batches))
    state = State(
        model=model,
        optimizer=create_optimizer(args, model, saved, dtype),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        average=MovingAverage(model, plan.ema_decay, averaged) if plan.ema_decay else None,
        lookahead=Lookahead(model, args.lookahead, plan.steps) if args.lookahead else None,
        confusion=Confusion(split.num_classes, device),
        card=model_card(args, split, normalization),
        facts=resume.data_facts(split),
        record=arguments.record(args, plan.automatic | parts.automatic, parts.derived),
    )
    if saved:
        state.restore(saved)
    if args.compile:
        state.compile()

    settings = StepSettings(
        lr_at=plan.lr_at,
        loss_fn=partial(F.cross_entropy, label_smoothing=args.label_smoothing),
        dtype=dtype,
        accumulate=parts.accumulate,
        clip_grad=args.clip_grad,
        seed=args.seed,
        ranks=ranks,
        size_at=size_schedule(args.progressive, plan.steps),
    )
    # Without held-out images the curve follows the test set, and the last epoch is what counts.
    curve = Curve("val" if split.val else "test", args.eval_every, args.epochs)
    with open_run(args, split, state, curve, settings, train_batches, saved) as run:
        while not run.done:
            row = train_epoch(state, train_batches, settings, run.stop, run.show)
            row |= evaluate_epoch(state, eval_batches, curve, settings, run.stop)
            run.end_epoch(row)  # metrics.csv, last.pt, best.pt, TensorBoard, a line
        run.finish(run.final_test(inputs, train_batches, eval_batches))
    draw_finished(run)  # curves.png
    return run.exit_status


if __name__ == "__main__":
    command_line.run(main)
