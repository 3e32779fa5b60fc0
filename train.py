"""Train a convolutional network on small images, from scratch or from published weights.

    python train.py --model resnet34 --epochs 500                   # CIFAR-10
    python train.py --dataset shapes --model resnet20 --epochs 3    # no download, a minute
    python train.py --model timm/resnet50 --pretrained              # fine-tune published weights
    python train.py --resume runs/<run>                             # bit-identical continuation
    torchrun --nproc-per-node=4 train.py --model resnet50           # several GPUs

RECIPE is for residual networks of 4 to 26 million parameters on CIFAR-10. Other models bring their
own (--list-models). `--augment none --optimizer adam` is the baseline to compare with.
The accuracy of RECIPE was not measured here; results/README.md lists what was.
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

# Not in the table, because they follow from the length: the horizon of the moving average, a
# twentieth of the run (--ema-decay), and the warmup, a tenth, at most 5 epochs (arXiv 1706.02677
# §2.2).
RECIPE = {
    "model": "resnet18",
    "epochs": 200,  # arXiv 1605.07146
    "batch_size": 128,  # images; arXiv 1512.03385 §4.2
    "optimizer": "sgd",  # with Nesterov momentum
    "lr": 0.1,  # peak; arXiv 1512.03385 §4.2
    "momentum": 0.9,
    "weight_decay": 5e-4,  # not on norms and biases; arXiv 1605.07146, 1812.01187 §3.1
    "schedule": "cosine",  # arXiv 1608.03983
    "label_smoothing": 0.1,  # arXiv 1812.01187 §5.2
    "augment": "crop,flip",  # by 4 pixels (arXiv 1512.03385 §4.2), reflected (1605.07146 §3)
    "mixup": 0.2,  # alpha; arXiv 1710.09412
    "cutmix": 1.0,  # alpha; arXiv 1905.04899
    "mix_prob": 0.5,  # share of the images that are mixed
}


def build_parser():
    return arguments.training_parser(__doc__, RECIPE)


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
