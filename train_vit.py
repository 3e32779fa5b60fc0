"""Train a vision transformer on small images, from scratch or from published weights.

    python train_vit.py                                 # vit_small_data, 100 epochs of CIFAR-10
    python train_vit.py --pretrained                    # ViT-Tiny of ImageNet, 224 px, 10 epochs
    python train_vit.py --model vit_tiny --weights model.safetensors --freeze-backbone    # a probe
    python train_vit.py --resume runs/<run>             # bit-identical continuation

RECIPE is what small data needs from scratch, after arXiv 2112.13492: shifted patch tokens and local
attention are in the model, the rest is here. Starting from weights has a recipe of its own: AdamW
3e-4, falling by a quarter per layer towards the input, 10 epochs (models/recipes.py). Any other
model of --list-models can be trained, too. The accuracy of RECIPE was not measured here;
results/README.md lists what was.
"""

from functools import partial

import torch
import torch.nn.functional as F

import data
import models
from analysis.curves import draw_finished
from common import command_line
from training import arguments, devices, distributed, doctor, mixed_precision, out_of_memory, resume
from training.checks import check_arguments
from training.evaluation import Curve, evaluate_epoch
from training.initial_model import build_model, model_card
from training.inputs import Inputs, batch_parts
from training.lookahead import Lookahead
from training.loop import StepSettings, train_epoch
from training.moving_average import MovingAverage
from training.optimizers import create_optimizer
from training.progressive import size_schedule
from training.run import open_run
from training.schedules import Plan
from training.state import Confusion, State

RECIPE = {
    "model": "vit_small_data",
    "epochs": 100,  # arXiv 2112.13492 §4.1
    "batch_size": 128,  # images; arXiv 2112.13492 §4.1
    "optimizer": "adamw",
    "lr": 1e-3,  # peak; arXiv 2112.13492 §4.1
    "weight_decay": 0.05,  # not on norms, biases, tokens and positions; arXiv 2112.13492 §4.1
    "schedule": "cosine",
    "clip_grad": 1.0,  # largest norm of the gradient
    "label_smoothing": 0.1,
    "augment": "crop,flip,rand_augment",  # RandAugment instead of the paper's AutoAugment
    "mixup": 0.8,  # alpha
    "cutmix": 1.0,  # alpha
    "mix_prob": 1.0,  # share of the images that are mixed
    "random_erasing": 0.25,  # share of the images that lose a rectangle
}
PRETRAINED_MODEL = "vit_tiny"  # the default model with --pretrained


def build_parser():
    return arguments.training_parser(__doc__, RECIPE, PRETRAINED_MODEL)


def main(argv=None):
    args, saved = arguments.resolve(build_parser(), argv)
    if args.doctor:
        return doctor.report(args)
    if args.list_models:
        return models.print_table()
    with distributed.join(args) as ranks, out_of_memory.explained(args, ranks):
        return train(args, saved, ranks)


def train(args, saved, ranks):
    """Trains and tests a model; saved: the contents of last.pt of a run that resumes."""
    if resume.is_finished(args, saved):
        return 0
    check_arguments(args, saved, ranks)
    devices.configure_backends(deterministic=args.deterministic)
    device, dtype = ranks.device, mixed_precision.amp_dtype_for(args.model, args.amp, ranks.device)

    with ranks.local_first():
        split = data.load(args.dataset, args.data_dir, **arguments.data_options(args))
    resume.check_data(split, saved, ranks)

    model, normalization = build_model(args, split, saved)
    model = distributed.place(model, ranks, dtype, sync_bn=args.sync_bn)

    parts = batch_parts(args, ranks)
    inputs = Inputs(args, split, normalization, ranks, dtype, parts.images_at_once)
    train_batches = inputs.training_batches(model)
    eval_batches = inputs.evaluation_batches(model)

    plan = Plan.of(args, len(train_batches))
    resume.check_epochs(args, saved, len(train_batches))
    state = State(
        model=model,
        optimizer=create_optimizer(args, model, saved, dtype),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        average=MovingAverage(model, plan.ema_decay) if plan.ema_decay else None,
        lookahead=Lookahead(model, args.lookahead, plan.steps) if args.lookahead else None,
        confusion=Confusion(split.num_classes, device),
        card=model_card(args, split, normalization),
        facts=resume.data_facts(split),
        record=arguments.record(args, plan.automatic | parts.automatic),
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
