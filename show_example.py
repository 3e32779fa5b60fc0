"""Shows what a checkpoint predicts: the top classes with their probabilities, as text and as a figure.

python show_example.py --checkpoint runs/<run>/best.pt                     # 16 test images
python show_example.py --checkpoint runs/<run>/best.pt --index 0 17 99     # these
python show_example.py --checkpoint runs/<run>/best.pt --image cat.jpg --explain
python show_example.py --checkpoint runs/<run>/best.pt --errors            # its most confident mistakes
python show_example.py --checkpoint runs/a runs/b                          # where two disagree
python show_example.py --checkpoint runs/<run>/best.pt --report            # confusion, calibration, …
python show_example.py --checkpoint runs/<run>/best.pt --export onnx
python show_example.py --checkpoint runs/<run>/best.pt --serve             # a page to try images on

Files are written next to the (first) checkpoint, where git ignores them, unless --output is given.
"""

import json
import sys
from pathlib import Path

from common import command_line
from common.command_line import number
from common.errors import UserError
from common.text import printable
from training import arguments


def build_parser():
    parser = command_line.Parser("Shows what a checkpoint predicts, as text and as a figure.")
    add = parser.add_argument
    several = "a run's best.pt or last.pt, or its directory; several: where they disagree"
    add("--checkpoint", required=True, nargs="+", metavar="FILE", help=several)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--output", metavar="FILE", help="the figure, or the directory of --export")

    add = parser.add_argument_group("which images").add_argument
    help = "test images by number; -1: a random one"
    add("--index", type=int, nargs="+", metavar="I", help=help)
    add("--image", nargs="+", metavar="FILE", help="image files, of any size")
    add("--errors", action="store_true", help="the most confident mistakes on the test images")
    help = "how many (default: 16; of several checkpoints 8)"
    add("--count", type=number(int, low=1, high=100), metavar="N", help=help)
    seed_help = "seed of the random choice"
    add("--seed", type=number(int, low=0), default=0, metavar="N", help=seed_help)
    add("--dataset", choices=arguments.DATASETS, help="instead of the run's own")
    add("--data-dir", metavar="DIR", help="instead of the run's own")

    add = parser.add_argument_group("what is shown").add_argument
    topk = number(int, low=1, high=20)
    add("--topk", type=topk, default=3, metavar="K", help="number of classes")
    help = "where it looks: Grad-CAM, or attention rollout for transformers"
    add("--explain", action="store_true", help=help)
    add("--json", action="store_true", help="JSON on standard output instead of text")
    add("--report", action="store_true", help="all test images: report.png and report.json")
    help = "test images that --report corrupts, stratified by class (0: all)"
    add("--corrupted", type=number(int, low=0), default=500, metavar="N", help=help)
    formats = ("onnx", "torchscript", "safetensors")
    add("--export", choices=formats, help="the model with its preprocessing")
    help = "a local page to try images on (needs pip install gradio)"
    add("--serve", action="store_true", help=help)
    help = "address that --serve listens on; 0.0.0.0: for other machines, too"
    add("--host", default="127.0.0.1", help=help)
    port = number(int, low=0, high=65535)
    add("--port", type=port, default=7860, metavar="N", help="port of --serve")
    return parser


def check(args):
    """Raises UserError for arguments that contradict each other or an unusable --output."""
    modes = [f"--{name}" for name in ("report", "export", "serve") if getattr(args, name)]
    choices = [f"--{name}" for name in ("image", "index", "errors") if getattr(args, name)]
    if len(modes) + len(choices) > 1:
        names = " and ".join(modes + choices)
        raise UserError(f"{names} can't be used together: run the script twice", status=2)
    if len(args.checkpoint) > 1 and (modes or args.errors):
        raise UserError(f"{(modes or choices)[0]} takes one checkpoint", status=2)
    if args.output and not args.export:
        from analysis import figures

        figures.check_places([args.output])


def select(args, predictors):
    """(the images to show as a tiles.Selection, the logits of each model for them)."""
    import torch

    from show import predict
    from show.tiles import Selection

    if args.image:
        size = max(predictor.image_size for predictor in predictors)
        selection = Selection(*predict.load_images(args.image, size))
        return selection, [predictor.logits(selection.images) for predictor in predictors]
    test = predict.test_split(predictors, args.dataset, args.data_dir).test
    count = args.count or (16 if len(predictors) == 1 else 8)
    if args.errors:
        logits = predictors[0].logits(test.images)
        chosen, otherwise = predict.mistakes(logits, test.labels, count), "no mistakes"
    elif len(predictors) > 1 and not args.index:
        logits = [predictor.logits(test.images) for predictor in predictors]
        chosen, otherwise = predict.disagreements(logits, count), "they agree"
    else:
        chosen, otherwise = predict.choose(len(test), args.index, args.seed, count), ""
    if not chosen:
        print(f"{otherwise} on all {len(test)} test images", file=sys.stderr)
        return None, []
    chosen_test = test.take(torch.tensor(chosen, dtype=torch.long))
    names = [f"test {i}" for i in chosen]
    selection = Selection(chosen_test.images, names, chosen_test.labels.tolist())
    return selection, [predictor.logits(selection.images) for predictor in predictors]


def show(args, predictors):
    """Predicts, draws and prints; without an image that was asked for, only the last."""
    from show import tiles

    selection, logits = select(args, predictors)
    classes, file, shown = predictors[0].classes, None, []
    if selection is not None:
        pairs = zip(predictors, logits)
        images = selection.images
        answers = [tiles.answer(*pair, images, args.topk, args.explain) for pair in pairs]
        file = Path(args.output or default_file(args, predictors[0]))
        tiles.draw(answers, selection, classes, file)
        shown = [describe(i, selection, answers, predictors) for i in range(len(images))]
    if args.json:
        file = None if file is None else str(file)
        print(json.dumps({"pictures": shown, "picture_file": file}, indent=2))
        return
    for image in shown:
        truth = f" ({image['truth']})" if selection.truth else ""
        for predictor, answer in zip(predictors, image["answers"]):
            name = f" {predictor.name}" if len(predictors) > 1 else ""
            top = (
                f"{guess['class']} {100 * guess['probability']:.1f} %" for guess in answer["top"]
            )
            print(printable(f"{image['picture']}{truth}{name}: {', '.join(top)}"))
    if file:
        print(f"figure: {file}")


def default_file(args, predictor):
    name = "examples"
    if args.errors:
        name = "errors"
    elif len(args.checkpoint) > 1 and not args.image:
        name = "compare"
    return predictor.path.parent / f"{name}{'-explained' if args.explain else ''}.png"


def describe(i, selection, answers, predictors):
    """Image i of a selection with its truth and the answers of all models, as JSON values."""
    classes, described = predictors[0].classes, []
    for predictor, answer in zip(predictors, answers):
        guesses = zip(answer.classes[i].tolist(), answer.probabilities[i].tolist())
        top = [{"class": classes[c], "probability": p} for c, p in guesses]
        described.append({"checkpoint": str(predictor.path), "top": top})
    truth = None if selection.truth is None else classes[selection.truth[i]]
    return {"picture": selection.names[i], "truth": truth, "answers": described}


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

        split = predict.test_split(predictors, args.dataset, args.data_dir)
        path = Path(args.output or first.path.parent / "report.png")
        result = assess.report(first, split, path, args.corrupted)
        print(json.dumps(result, indent=2) if args.json else assess.summary(result))
        print(f"report: {path} {path.with_suffix('.json')}", file=sys.stderr)
    elif args.serve:
        from show import serve

        serve.serve(first, args.topk, args.host, args.port)
    else:
        show(args, predictors)
    return 0


if __name__ == "__main__":
    command_line.run(main)
