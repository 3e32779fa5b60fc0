"""Shows what a checkpoint predicts, as text and as a figure.

python show_example.py --checkpoint runs/<run>/best.pt                  # 16 test images
python show_example.py --checkpoint runs/<run>/best.pt --index 0 17 99  # these
python show_example.py --checkpoint runs/<run>/best.pt --image cat.jpg --explain
python show_example.py --checkpoint runs/<run>/best.pt --errors         # its most confident errors
python show_example.py --checkpoint runs/a runs/b                       # where two disagree
python show_example.py --checkpoint runs/<run>/best.pt --report         # confusion, calibration, …
python show_example.py --checkpoint runs/<run>/best.pt --export onnx
python show_example.py --checkpoint runs/<run>/best.pt --serve          # a page to try images on

Files are written next to the (first) checkpoint, where git ignores them, unless --output is given.
"""

import json
import sys
from pathlib import Path

from common import command_line
from common.command_line import number
from common.errors import UserError
from common.scopes import flag
from common.text import printable
from data import DATASETS

# Of options that have no meaning without --report or --serve.
DEFAULTS = dict(corrupted=500, host="127.0.0.1", port=7860)


def build_parser():
    parser = command_line.Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    checkpoints = "a run, or its best.pt, last.pt or epoch-N.pt; several: where they disagree"
    add("--checkpoint", required=True, nargs="+", metavar="FILE", help=checkpoints)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--output", metavar="FILE", help="the figure, or the directory of --export")
    add("--show", action="store_true", help="also open the figure in a window")

    add = parser.add_argument_group("which images").add_argument
    indices = "test images by number; -1: a random one"
    add("--index", type=int, nargs="+", metavar="I", help=indices)
    add("--image", nargs="+", metavar="FILE", help="image files, of any size")
    add("--errors", action="store_true", help="the most confident mistakes on the test images")
    count = "how many (default: 16; of several checkpoints 8)"
    add("--count", type=number(int, low=1, high=100), metavar="N", help=count)
    add("--seed", type=number(int, low=0), default=0, metavar="N", help="seed of the random choice")
    add("--dataset", choices=DATASETS, help="default: that of the run")
    add("--data-dir", metavar="DIR", help="default: that of the run")

    add = parser.add_argument_group("what is shown").add_argument
    add("--topk", type=number(int, low=1, high=20), default=3, metavar="K", help="classes to show")
    explain = "draw what predictions depend on: Grad-CAM, or attention rollout for transformers"
    add("--explain", action="store_true", help=explain)
    add("--json", action="store_true", help="JSON on standard output instead of text")
    add(
        "--report", action="store_true", help="evaluate all test images: report.png and report.json"
    )
    corrupted = "test images that --report corrupts, stratified by class (0: all)"
    add(
        "--corrupted",
        type=number(int, low=0),
        default=DEFAULTS["corrupted"],
        metavar="N",
        help=corrupted,
    )
    formats = ("onnx", "torchscript", "safetensors")
    add("--export", choices=formats, help="the model with its preprocessing")
    page = "a local page to try images on (needs pip install gradio)"
    add("--serve", action="store_true", help=page)
    add("--host", default=DEFAULTS["host"], help="address of --serve (0.0.0.0: any)")
    add(
        "--port",
        type=number(int, low=0, high=65535),
        default=DEFAULTS["port"],
        metavar="N",
        help="port of --serve",
    )
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
    ignored = []
    if args.image:
        ignored += ["dataset", "data_dir", "count"]
    if args.index:
        ignored += ["count"]
    if modes:
        ignored += ["explain", "count"]
    if args.export or args.serve:
        ignored += ["json", "dataset", "data_dir"]
    if args.serve:
        ignored += ["output"]
    for name in ignored:
        if getattr(args, name):
            raise UserError(f"{flag(name)} has no meaning with {(modes + choices)[0]}", status=2)
    for name, mode in (("corrupted", "report"), ("host", "serve"), ("port", "serve")):
        if getattr(args, name) != DEFAULTS[name] and not getattr(args, mode):
            raise UserError(f"{flag(name)} needs {flag(mode)}", status=2)
    if args.show and (args.export or args.serve):
        raise UserError(f"--show needs a figure: {modes[0]} draws none", status=2)
    if args.output and not args.export:
        from analysis import figures

        figures.check_places([args.output])
    if args.report and Path(args.output or "").stem in ("config", "summary"):
        name = Path(args.output).with_suffix(".json").name
        raise UserError(f"--output {args.output}: --report would overwrite {name}", status=2)


def select(args, predictors):
    """(the images to show as a tiles.Selection, the name of the figure's file)."""
    import torch

    from show import predict
    from show.tiles import Selection

    if args.image:
        size = max(predictor.image_size for predictor in predictors)
        return Selection(*predict.load_images(args.image, size)), "examples"
    test = predict.test_split(predictors, args.dataset, args.data_dir).test
    count = args.count or (16 if len(predictors) == 1 else 8)
    name, if_none = ("examples" if len(predictors) == 1 else "compare"), "the models agree"
    if args.errors:
        name, if_none = "errors", "there are no mistakes"
        chosen = predict.mistakes(predictors[0].logits(test.images), test.labels, count)
    elif len(predictors) > 1 and not args.index:
        logits = [predictor.logits(test.images) for predictor in predictors]
        chosen = predict.disagreements(logits, count)
    else:
        chosen = predict.choose(len(test), args.index, args.seed, count)
    if not chosen:
        print(f"{if_none} on {len(test):,} test images", file=sys.stderr)
    taken = test.take(torch.tensor(chosen, dtype=torch.long))
    return Selection(taken.images, [f"test {i}" for i in chosen], taken.labels.tolist()), name


def show(args, predictors, window):
    """Predicts, draws and prints; returns the figure's file. Without an image, nothing is drawn.

    window: also draw for figures.show.
    """
    from analysis import figures
    from show import tiles

    directory = predictors[0].path.parent
    figures.check_places([args.output or directory / "examples.png"])
    selection, name = select(args, predictors)
    classes, file, answers = predictors[0].classes, None, []
    if len(selection.images):
        for predictor in predictors:
            logits = predictor.logits(selection.images)
            answer = tiles.answer(predictor, logits, selection.images, args.topk, args.explain)
            answers.append(answer)
        name += "-explained" if args.explain else ""
        file = str(args.output or directory / f"{name}.png")
        tiles.draw(answers, selection, classes, file, window)
    images = []
    for i, image in enumerate(selection.names):
        truth = None if selection.truth is None else classes[selection.truth[i]]
        images.append({"image": image, "truth": truth, "answers": []})
        for predictor, answer in zip(predictors, answers):
            top = zip(answer.classes[i].tolist(), answer.probabilities[i].tolist())
            top = [{"class": classes[c], "probability": p} for c, p in top]
            images[i]["answers"].append({"checkpoint": str(predictor.path), "top": top})
    if args.json:
        print(json.dumps({"images": images, "figure": file}, indent=2))
        return file
    print_answers(images, predictors)
    if file:
        print(f"figure: {file}")
    return file


def print_answers(images, predictors):
    for image in images:
        truth = "" if image["truth"] is None else f" ({image['truth']})"
        for predictor, answer in zip(predictors, image["answers"]):
            model = f" {predictor.name}" if len(predictors) > 1 else ""
            top = (f"{one['class']} {100 * one['probability']:.1f} %" for one in answer["top"])
            print(printable(f"{image['image']}{truth}{model}: {', '.join(top)}"))


def present(args, device):
    """Does what the arguments ask for with the checkpoints."""
    from analysis import figures
    from show import predict

    predictors = predict.load_all(args.checkpoint, device)
    first, file = predictors[0], None
    window = args.show and figures.has_display()
    if args.export:
        from show import export

        directory = Path(args.output or first.path.parent / f"export-{args.export}")
        print(export.export(first, args.export, directory))
    elif args.report:
        from show import assess

        file = Path(args.output or first.path.parent / "report.png")
        figures.check_places([file])
        split = predict.test_split(predictors, args.dataset, args.data_dir)
        result = assess.report(first, split, file, args.corrupted, window)
        print(json.dumps(result, indent=2) if args.json else assess.summary(result))
        print(f"report: {file} {file.with_suffix('.json')}", file=sys.stderr)
    elif args.serve:
        from show import serve

        serve.serve(first, args.topk, args.host, args.port)
    else:
        file = show(args, predictors, window)
    if args.show and file:
        figures.show([file])


def main(argv=None):
    args = build_parser().parse_args(argv)
    check(args)
    from training import devices, out_of_memory

    devices.configure_backends(deterministic=False)  # as in training
    device = devices.select_device(args.device)
    advice = "free some memory" + ("" if device.type == "cpu" else ", or try --device cpu")
    with out_of_memory.named(advice):
        present(args, device)
    return 0


if __name__ == "__main__":
    command_line.run(main)
