"""Measures speed in alternating rounds; prints the median and the range of the ratios.

python benchmark.py data        # our batches against a torchvision DataLoader with PIL transforms
python benchmark.py epoch       # our epoch against the bare training step and a plain loop
python benchmark.py models      # a table: parameters, GMACs, speed of inference and of training
python benchmark.py models --suite sota --batch-size 16 --output speed   # the largest, as files too
python benchmark.py models --suite sota --inference-batch-size 512 --skip-training
python benchmark.py models --precisions      # training steps in bf16 against fp32
python benchmark.py checkpoint  # saving after an epoch: how long training waits, and memory
python benchmark.py twins       # a training step against timm's, for the same architectures
python benchmark.py time-to --model airbench94 --runs 5 -- --tta flip-shift    # whole runs
"""

from common import command_line
from common.command_line import number
from common.errors import UserError
from common.scopes import flag

TWINS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnet20", "eca_resnet20", "coatnet_0", "vit_custom"),
)
MODEL_HELP = "one of `python train.py --list-models`, or timm/<name>"


def build_parser():
    parser = command_line.Parser(__doc__.split("\n")[0])
    commands = parser.add_subparsers(
        dest="command",
        required=True,
        parser_class=lambda **options: command_line.Parser("", **options),
    )

    def add_command(name, help):
        add = commands.add_parser(name, help=help).add_argument
        what = " of bare steps and matrix products" if name == "time-to" else ""
        rounds = f"timed rounds{what}; the median is shown"
        add("--rounds", type=number(int, low=1), default=5, metavar="N", help=rounds)
        if name == "time-to":
            return add
        images = "images in a batch" + (", at most" if name == "models" else "")
        add("--batch-size", type=number(int, low=1), default=128, metavar="N", help=images)
        add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
        if name != "data":
            choices = ("auto", "off", "bf16", "fp16")
            precision = "precision; auto: bf16 where it is fast, else fp32 (off)"
            add("--amp", default="auto", choices=choices, help=precision)
        return add

    def add_images(add, default):
        help = "images in an epoch"
        add("--images", type=number(int, low=256), default=default, metavar="N", help=help)

    def add_workers(add):
        help = "worker processes of the DataLoader"
        add("--workers", type=number(int, low=0), default=2, metavar="N", help=help)

    add = add_command("data", "images per second: our batches against a DataLoader")
    add_images(add, 50_000)
    add_workers(add)

    add = add_command("epoch", "an epoch: ours against the bare step and a tutorial's plain loop")
    add_images(add, 12_800)
    add_workers(add)
    size = number(int, low=8)
    add("--model", default="resnet20", metavar="NAME", help=MODEL_HELP)
    resized = "of the inputs, resized from 32 px"
    add("--image-size", type=size, default=32, metavar="PX", help=resized)
    add("--skip-plain", action="store_true", help="leave the plain loop out")
    add("--compile", action="store_true", help="compile the model, except in the plain loop")

    add = add_command("models", "each model's size, work, memory and speed")
    add_model_options(add, size)

    add = add_command("checkpoint", "saving after an epoch: MiB, ms, share of the epoch, memory")
    add_images(add, 50_000)
    add("--model", default="resnet18", metavar="NAME", help=MODEL_HELP)

    add = add_command("twins", "a training step: our architecture against timm's")
    names = dict(nargs="+", metavar="NAME", default=TWINS, choices=TWINS)
    add("--models", **names, help="only these").shown_default = "all"

    add_time_to(add_command("time-to", "whole runs of a recipe: time to accuracies, mean accuracy"))
    return parser


def add_time_to(add):
    add("--model", default="airbench94", metavar="NAME", help=MODEL_HELP)
    add("--runs", type=number(int, low=1), default=1, metavar="N", help="with seeds 0 … N - 1")
    add("--output-dir", metavar="DIR", help="instead of runs/time-to/<dataset>-<model>")
    add("--bare", action="store_true", help="also time bare steps, and the runs in them")
    add("--json", metavar="FILE", help="write the results there")
    help = "arguments of the training script, after --"
    add("training", nargs="*", metavar="ARGUMENT", help=help)


def add_model_options(add, size):
    """The options of `benchmark.py models`. size: the type of a number of pixels."""
    suites = ("table", "sota", "all")
    add("--models", nargs="+", metavar="NAME", help="only these; timm/<name> for any of timm's")
    add("--suite", default="table", choices=suites, help="sota: the largest")
    add("--image-size", type=size, metavar="PX", help="instead of each model's own")
    add("--classes", type=number(int, low=2), metavar="K", help="instead of each model's own")
    inference = dict(type=number(int, low=1), metavar="N")
    at_most = "largest batch of inference (default: as --batch-size)"
    add("--inference-batch-size", **inference, help=at_most)
    add("--skip-training", action="store_true", help="measure inference only")
    results = "timm's results-imagenet.csv, for the published top-1 of its weights"
    add("--timm-results", metavar="FILE", help=results)
    add("--output", metavar="DIR", help="write models.csv, models.md and models.png there")
    add("--runs", nargs="+", metavar="RUN", help="plot these runs' test accuracy against speed")
    add("--precisions", action="store_true", help="only a training step in bf16 against fp32")
    add("--quick", action="store_true", help="as --precisions --batch-size 16 --rounds 3")


def check_models_options(args):
    """Raises UserError for options of `benchmark.py models` that would be ignored."""
    if args.runs and not args.output:
        raise UserError("--runs needs --output DIR: the plot is written there", 2)
    if args.precisions or args.quick:
        ignored = dict(suite="table", image_size=None, classes=None, inference_batch_size=None)
        ignored |= dict(skip_training=False, output=None, timm_results=None, amp="auto")
        if args.quick:
            ignored |= dict(batch_size=128, rounds=5)
        for name, default in ignored.items():
            if getattr(args, name) != default:
                raise UserError(f"{flag(name)} has no meaning with --precisions or --quick", 2)


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.command == "models":
        check_models_options(args)
    # Imported here, so that --help doesn't import torch, and Ctrl-C while it does is one line.
    from bench import comparisons, measure, speeds, time_to, twins
    from training import devices, out_of_memory

    if args.command == "time-to":
        return time_to.main(args)
    commands = {
        "data": comparisons.measure_data,
        "epoch": comparisons.measure_epoch,
        "models": speeds.print_table,
        "checkpoint": comparisons.measure_checkpoint,
        "twins": twins.print_table,
    }
    command = commands[args.command]
    if args.command == "models" and (args.quick or args.precisions):
        command = speeds.print_precisions
        if args.quick:
            args.batch_size, args.rounds = 16, 3
    device = devices.select_device(args.device)
    devices.configure_backends(deterministic=False)  # as in training
    machine = measure.machine(device)
    print(f"{machine}; median (least to most) of {args.rounds} rounds", flush=True)
    with out_of_memory.named("try a smaller --batch-size"):
        command(args, device)
    return 0


if __name__ == "__main__":
    command_line.run(main)
