"""Shows what a checkpoint makes of pictures: the top classes with their probabilities, as text and as a picture.

    python show_example.py --checkpoint runs/<run>/best.pt                     # 16 test pictures
    python show_example.py --checkpoint runs/<run>/best.pt --index 0 17 99     # these
    python show_example.py --checkpoint runs/<run>/best.pt --image cat.jpg --explain
    python show_example.py --checkpoint runs/<run>/best.pt --errors            # its most confident mistakes
    python show_example.py --checkpoint runs/a runs/b                          # where two disagree
    python show_example.py --checkpoint runs/<run>/best.pt --report            # confusion, calibration, robustness
    python show_example.py --checkpoint runs/<run>/best.pt --export onnx
    python show_example.py --checkpoint runs/<run>/best.pt --serve             # a page to drop pictures on

Pictures go beside the (first) checkpoint, where git ignores them, unless --output says.
"""

import json
import sys
from pathlib import Path

from common import command_line
from common.errors import UserError
from common.text import printable
from training import arguments


def build_parser():
    parser = command_line.Parser(__doc__.split("\n")[0])
    parser.add_argument(
        "--checkpoint",
        required=True,
        nargs="+",
        metavar="FILE",
        help="a run's best.pt or last.pt, or its directory; several: where they disagree",
    )
    group = parser.add_argument_group("which pictures")
    group.add_argument(
        "--index",
        type=int,
        nargs="+",
        metavar="I",
        help="test pictures by number; -1: a random one",
    )
    group.add_argument("--image", nargs="+", metavar="FILE", help="picture files, of any size")
    group.add_argument(
        "--errors", action="store_true", help="the most confident mistakes on the test pictures"
    )
    group.add_argument(
        "--count",
        type=command_line.number(int, low=1, high=100),
        metavar="N",
        help="how many (default: 16; of several checkpoints 8)",
    )
    group.add_argument(
        "--seed",
        type=command_line.number(int, low=0),
        default=0,
        metavar="N",
        help="of the random choice of pictures",
    )
    group.add_argument("--dataset", choices=arguments.DATASETS, help="instead of the run's own")
    group.add_argument("--data-dir", metavar="DIR", help="instead of the run's own")
    group = parser.add_argument_group("what is shown")
    group.add_argument(
        "--topk",
        type=command_line.number(int, low=1, high=20),
        default=3,
        metavar="K",
        help="classes to show",
    )
    group.add_argument(
        "--explain",
        action="store_true",
        help="where it looks: Grad-CAM, of transformers attention rollout",
    )
    group.add_argument(
        "--json", action="store_true", help="JSON on standard output instead of text"
    )
    group.add_argument(
        "--report", action="store_true", help="the whole test split: report.png and report.json"
    )
    group.add_argument(
        "--corrupted",
        type=command_line.number(int, low=0),
        default=500,
        metavar="N",
        help="test pictures that --report corrupts, a share of each class (0: all)",
    )
    group.add_argument(
        "--export",
        choices=("onnx", "torchscript", "safetensors"),
        help="the model with its preprocessing",
    )
    group.add_argument(
        "--serve",
        action="store_true",
        help="a local page to try pictures on (needs pip install gradio)",
    )
    group.add_argument(
        "--host",
        default="127.0.0.1",
        help="where --serve listens; 0.0.0.0: for other machines, too",
    )
    group.add_argument(
        "--port",
        type=command_line.number(int, low=0, high=65535),
        default=7860,
        metavar="N",
        help="of --serve",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="the picture, or --export's directory (beside the checkpoint)",
    )
    return parser


def check(args):
    """Raises UserError for arguments that contradict each other or name a place that can't be written."""
    modes = [f"--{name}" for name in ("report", "export", "serve") if getattr(args, name)]
    choices = [f"--{name}" for name in ("image", "index", "errors") if getattr(args, name)]
    if len(modes) + bool(choices) > 1 or len(choices) > 1:
        raise UserError(
            f"{' and '.join(modes + choices)} can't be done together: run it twice", status=2
        )
    if len(args.checkpoint) > 1 and (modes or args.errors):
        raise UserError(f"{(modes or choices)[0]} takes one checkpoint", status=2)
    if args.output and not args.export:
        from analysis import figures

        figures.check_places([args.output])


def pictures(args, predictors):
    """(images, names, truth or None, logits of each model, name of the picture file) as the arguments choose them."""
    import torch

    from show import predict

    if args.image:
        images, names = predict.load_pictures(
            args.image, max(each.card["image_size"] for each in predictors)
        )
        return images, names, None, [each.logits(images) for each in predictors], "examples"
    test = predict.test_split(predictors, args.dataset, args.data_dir).test
    stem = "errors" if args.errors else "compare" if len(predictors) > 1 else "examples"
    number = args.count or (16 if len(predictors) == 1 else 8)
    if args.errors or (len(predictors) > 1 and not args.index):
        logits = [each.logits(test.images) for each in predictors]
        chosen = (
            predict.mistakes(logits[0], test.labels, number)
            if args.errors
            else predict.disagreements(logits, number)
        )
        if not chosen:
            print(
                f"{'no mistakes' if args.errors else 'they agree'} on all {len(test)} test pictures",
                file=sys.stderr,
            )
    else:
        chosen = predict.choose(len(test), args.index, args.seed, number)
    picked = test.take(torch.tensor(chosen, dtype=torch.long))
    logits = [each.logits(picked.images) for each in predictors] if chosen else []
    return picked.images, [f"test {i}" for i in chosen], picked.labels.tolist(), logits, stem


def show(args, predictors):
    from show import tiles

    images, names, truth, logits, stem = pictures(args, predictors)
    labels, path = predictors[0].classes, None
    answers = [
        tiles.answer(*each, images, args.topk, args.explain) for each in zip(predictors, logits)
    ]
    if answers:
        path = args.output or predictors[0].path.parent / f"{stem}{'-explained' * args.explain}.png"
        tiles.draw(answers, names, images, truth, labels, path)
    true = [None] * len(names) if truth is None else [labels[label] for label in truth]
    found = [{"picture": name, "truth": each, "answers": []} for name, each in zip(names, true)]
    for predictor, each in zip(predictors, answers):
        for picture, classes, probabilities in zip(
            found, each.classes.tolist(), each.probabilities.tolist()
        ):
            top = [{"class": labels[c], "probability": p} for c, p in zip(classes, probabilities)]
            picture["answers"].append({"checkpoint": str(predictor.path), "top": top})
    if args.json:
        print(json.dumps({"pictures": found, "picture_file": path and str(path)}, indent=2))
        return
    for each in found:
        for predictor, one in zip(predictors, each["answers"]):
            who = f"{each['picture']}" + (f" ({each['truth']})" if truth is not None else "")
            who += f" {predictor.name}" if len(predictors) > 1 else ""
            said = ", ".join(
                f"{guess['class']} {100 * guess['probability']:.1f} %" for guess in one["top"]
            )
            print(printable(f"{who}: {said}"))  # classes are called what the checkpoint says
    if path:
        print(f"picture: {path}")


def main(argv=None):
    args = build_parser().parse_args(argv)
    check(args)
    from show import predict
    from training import devices

    predictors = predict.load_all(args.checkpoint, devices.select_device(args.device))
    first = predictors[0]
    if args.export:
        from show import export

        directory = Path(args.output or first.path.parent / f"export-{args.export}")
        print(export.export(first, args.export, directory))
    elif args.report:
        from show import assess

        test = predict.test_split(predictors, args.dataset, args.data_dir)
        path = Path(args.output or first.path.parent / "report.png")
        found = assess.report(first, test, path, args.corrupted)
        print(json.dumps(found, indent=2) if args.json else assess.in_words(found))
        print(f"report: {path} {path.with_suffix('.json')}", file=sys.stderr)
    elif args.serve:
        from show import serve

        serve.serve(first, args.topk, args.host, args.port)
    else:
        show(args, predictors)
    return 0


if __name__ == "__main__":
    command_line.run(main)
