"""Measures speed: each figure is a ratio of two things measured in turn in one run, with the median and the spread.

python benchmark.py data        # our batches against a torchvision DataLoader with PIL transforms and 2 workers
python benchmark.py epoch       # an epoch of engine.fit against the bare step, and against the loop people write
python benchmark.py models      # a table: parameters, GMACs, memory, images/s in training and inference, FLOP/s
python benchmark.py models --suite sota --batch-size 16 --output speed     # of the largest, written as files, too
python benchmark.py models --precisions                             # training steps in bf16 against fp32
python benchmark.py checkpoint  # the save after an epoch: how long training waits for it, and memory
python benchmark.py twins       # a training step of ours against timm's, where timm can build the same architecture
"""

from common import command_line

TWINS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnet20",
    "eca_resnet20",
    "coatnet_0",
    "vit_custom",
)


def build_parser():
    parser = command_line.Parser(__doc__.split("\n")[0])
    commands = parser.add_subparsers(
        dest="command",
        required=True,
        parser_class=lambda **options: command_line.Parser("", **options),
    )
    whole = commands.add_parser("data", help="batches a second: ours against a DataLoader")
    whole.add_argument(
        "--images",
        type=command_line.number(int, low=256),
        default=50_000,
        metavar="N",
        help="in a pass over the data",
    )
    epoch = commands.add_parser(
        "epoch", help="an epoch: ours against the bare step and the plain loop"
    )
    epoch.add_argument(
        "--images",
        type=command_line.number(int, low=256),
        default=12_800,
        metavar="N",
        help="in an epoch",
    )
    epoch.add_argument("--model", default="resnet20", metavar="NAME")
    epoch.add_argument(
        "--image-size",
        type=command_line.number(int, low=8),
        default=32,
        metavar="PX",
        help="made of pictures of 32 px",
    )
    epoch.add_argument("--skip-plain", action="store_true", help="leave the plain loop out")
    epoch.add_argument("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"))
    epoch.add_argument(
        "--compile", action="store_true", help="compile the model, for ours and the bare step"
    )
    table = commands.add_parser("models", help="each model's size, work, memory and speed")
    table.add_argument(
        "--models", nargs="+", metavar="NAME", help="these only; timm/<name> takes any of timm's"
    )
    table.add_argument(
        "--suite", default="table", choices=("table", "sota", "all"), help="sota: the largest"
    )
    table.add_argument(
        "--image-size",
        type=command_line.number(int, low=8),
        metavar="PX",
        help="instead of each model's own",
    )
    table.add_argument(
        "--classes",
        type=command_line.number(int, low=2),
        metavar="K",
        help="instead of each model's own",
    )
    table.add_argument("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"))
    table.add_argument(
        "--output", metavar="DIR", help="write models.csv, models.md and models.png there"
    )
    table.add_argument(
        "--runs",
        nargs="+",
        metavar="RUN",
        help="draw their test accuracy against speed, not parameters",
    )
    table.add_argument(
        "--precisions", action="store_true", help="instead, a step in bf16 against fp32, in turn"
    )
    table.add_argument(
        "--quick", action="store_true", help="--precisions with batches of 16 and three rounds"
    )
    saves = commands.add_parser(
        "checkpoint", help="the saves after an epoch: MB, ms, their share of the epoch, memory"
    )
    saves.add_argument("--model", default="resnet18", metavar="NAME")
    saves.add_argument(
        "--images",
        type=command_line.number(int, low=256),
        default=50_000,
        metavar="N",
        help="in an epoch",
    )
    saves.add_argument("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"))
    same = commands.add_parser("twins", help="a training step: our architecture against timm's")
    same.add_argument(
        "--models", nargs="+", metavar="NAME", default=TWINS, choices=TWINS, help="these only"
    )
    same.add_argument("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"))
    for command in (whole, epoch, table, saves, same):
        command.add_argument(
            "--batch-size",
            type=command_line.number(int, low=1),
            default=128,
            metavar="N",
            help="models: at most" if command is table else None,
        )
        command.add_argument(
            "--rounds",
            type=command_line.number(int, low=1),
            default=5,
            metavar="N",
            help="of both in turn",
        )
        command.add_argument("--device", default="auto")
        if command not in (table, saves, same):
            command.add_argument(
                "--workers",
                type=command_line.number(int, low=0),
                default=2,
                metavar="N",
                help="of the DataLoader",
            )
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    if getattr(args, "quick", False):
        args.batch_size, args.rounds = 16, 3
    from bench import (
        comparisons,  # here, where Ctrl-C ends with a line while torch is being imported, too
    )

    comparisons.run(args)
    return 0


if __name__ == "__main__":
    command_line.run(main)
