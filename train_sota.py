"""Fine-tunes the largest models, made to fit: EVA-02 large (448 px), EVA giant (336), ConvNeXt-XXL (256), and any of timm's.

    python train_sota.py --model eva_giant --dry-run                   # what a step needs, in GB, without weights or memory
    python train_sota.py --model eva02_large --pretrained --grad-checkpointing                   # 5 epochs of CIFAR-10
    python train_sota.py --model eva_giant --pretrained --lora-rank 16 --ema-device cpu          # adapters, with peft
    python train_sota.py --model convnext_xxlarge --pretrained --freeze-backbone                 # a linear probe
    torchrun --nproc-per-node=8 train_sota.py --model eva_giant --pretrained --fsdp              # a part of it on each GPU
    python train_sota.py --model eva02_large --smoke                   # the whole way with a small copy, in seconds

The recipe: AdamW 3e-5, falling with each layer towards the input, batches of 128 in as many parts as the device's memory
asks for (--micro-batch auto), bf16, five epochs. It was not tuned here; what it reaches is not measured.
"""

from common import command_line
from common.errors import UserError
from training import arguments

OWN = ("dry_run", "gpu_memory", "smoke")  # of this call, not of the run


def build_parser():
    parser = arguments.training_parser(__doc__.split("\n")[0], model="eva02_large", epochs=5)
    arguments.change_defaults(parser, optimizer="adamw", image_size=224, micro_batch=None)
    group = parser.add_argument_group("before training")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="say what a step needs, and what would make it smaller; stop",
    )
    group.add_argument(
        "--gpu-memory",
        type=command_line.number(above=0),
        metavar="GB",
        help="with --dry-run: plan for such a GPU",
    )
    group.add_argument(
        "--smoke",
        action="store_true",
        help="try the whole way, resuming too, with a small copy of the model",
    )
    return parser


def main(argv=None):
    parser = build_parser()
    given = command_line.explicit(parser, argv)
    import models
    from training import (
        experiment,  # here, where Ctrl-C ends with a line while torch is being imported, too
        memory,
        preflight,
    )

    if given.get("smoke"):
        return preflight.smoke(parser, argv, main, OWN)
    args, origin, state = experiment.resolve_arguments(parser, argv)
    own = {name: vars(args).pop(name, None) for name in OWN}
    for name in OWN:
        origin.pop(name, None)
    if args.list_models:
        return models.print_table()
    if own["dry_run"]:
        return preflight.dry_run(args, origin, own["gpu_memory"])
    if own["gpu_memory"]:
        raise UserError("--gpu-memory goes with --dry-run", status=2)

    def before(args, options, num_classes, dtype, company):
        preflight.say_need(
            args, options, num_classes, dtype, company.device.type, memory.available(company.device)
        )

    return experiment.run(args, origin, state, before)


if __name__ == "__main__":
    command_line.run(main)
