"""Shows what a checkpoint makes of pictures: the top classes with their probabilities, as text and as a picture.

    python show_example.py --checkpoint runs/<run>/best.pt                     # 16 test pictures
    python show_example.py --checkpoint runs/<run>/best.pt --index 0 17 99     # these
    python show_example.py --checkpoint runs/<run>/best.pt --image cat.jpg     # any picture file
"""

import textwrap
from pathlib import Path

import numpy as np
import torch

import cli
import data
import engine
import figures
import rundir
import sources
from augment import Pipeline
from errors import UserError
from models.weights import load_checkpoint


def build_parser():
    parser = cli.Parser(__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a run's best.pt or last.pt, or its directory")
    parser.add_argument("--index", type=int, nargs="+", metavar="I", help="test pictures by number; -1: a random one")
    parser.add_argument("--image", nargs="+", metavar="FILE", help="picture files, of any size")
    parser.add_argument("--topk", type=cli.number(int, low=1), default=3, metavar="K", help="classes to show")
    parser.add_argument("--seed", type=cli.number(int, low=0), default=0, metavar="N", help="of the random choice of pictures")
    parser.add_argument("--dataset", choices=data.DATASETS, help="instead of the run's own")
    parser.add_argument("--data-dir", metavar="DIR", help="instead of the run's own")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--output", metavar="FILE", help="the picture (default: examples.png beside the checkpoint)")
    return parser


def load_pictures(files, size):
    """(uint8 (N, 3, size, size), their names) of picture files, cut to squares. Raises UserError for an unreadable one."""
    pictures = []
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"there is no picture {file}", status=2)
        picture = sources.decode(file, size)
        if isinstance(picture, str):
            raise UserError(f"{file} can't be read as a picture ({picture})")
        pictures.append(torch.from_numpy(np.array(picture)))
    return torch.stack(pictures).permute(0, 3, 1, 2), [Path(file).name for file in files]


def load_test_pictures(args, card):
    """(Examples, names): the chosen pictures of the test split that the run was made on."""
    directory = Path(args.checkpoint).parent
    saved = rundir.load_config(directory)[0] if (directory / "config.json").is_file() else {}
    dataset = args.dataset or saved.get("dataset", card["source"])
    split = data.load(
        dataset, args.data_dir or saved.get("data_dir", "data"), image_size=card["image_size"],
        limit_test=saved.get("limit_test", 0), skip_bad_images=saved.get("skip_bad_images", False),
    )  # fmt: skip
    if list(split.classes) != card["classes"]:
        raise UserError(f"the checkpoint knows {len(card['classes'])} classes ({', '.join(card['classes'][:3])}, …), "
                        f"{split.name} has {len(split.classes)} ({', '.join(split.classes[:3])}, …)")  # fmt: skip
    count = len(split.test)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(args.seed)).tolist()
    index = order[:16]
    if args.index:
        outside = [i for i in args.index if not -1 <= i < count]
        if outside:
            raise UserError(f"--index {outside[0]}: the test split has pictures 0 to {count - 1} (-1: a random one)", status=2)
        index = [order[-1 - k % count] if i == -1 else i for k, i in enumerate(args.index)]
    return split.test.take(torch.tensor(index)), [f"test {i}" for i in index]


@torch.no_grad()
def predict(model, card, images, device, topk):
    """(probabilities, classes) of the topk classes of uint8 images (N, 3, h, w), each (N, topk), on the CPU."""
    pipeline = Pipeline(card["mean"], card["std"], card["image_size"])
    inputs, _ = pipeline(images.to(device), None)
    probabilities = torch.cat([model(part).float().softmax(1) for part in inputs.split(500)])
    top = probabilities.cpu().topk(min(topk, len(card["classes"])), dim=1)
    return top.values, top.indices


def draw(images, names, truth, probabilities, classes, labels, path):
    """A tile a picture: the picture, enlarged without blur, and a bar for each of its top classes."""
    plt = figures.pyplot()
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    topk = probabilities.shape[1]
    bars = 0.25 * topk + 0.25
    figure, axes = plt.subplots(2 * rows, columns, figsize=(2.6 * columns, (2.5 + bars) * rows), squeeze=False,
                                height_ratios=[2.5, bars] * rows, layout="constrained")  # fmt: skip
    for axis in axes.flat:
        axis.axis("off")
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        picture, chart = axes[2 * (i // columns), i % columns], axes[2 * (i // columns) + 1, i % columns]
        picture.imshow(image, interpolation="nearest")
        title = textwrap.shorten(names[i], 28) + (f": {labels[truth[i]]}" if truth is not None else "")
        picture.set_title(title, fontsize=9)
        colours = ["#0072B2" if truth is None else "#009E73" if c == truth[i] else "#D55E00" for c in classes[i].tolist()]
        chart.axis("on")
        chart.barh(range(topk), probabilities[i].tolist(), color=colours)
        chart.set(xlim=(0, 1), xticks=[], yticks=range(topk), yticklabels=[labels[c] for c in classes[i]])
        chart.tick_params(length=0, labelsize=8)
        chart.invert_yaxis()
        chart.spines[:].set_visible(False)
        for y, p in enumerate(probabilities[i].tolist()):
            chart.text(min(p + 0.02, 0.82), y, f"{100 * p:.0f} %", va="center", fontsize=8)
    figures.save(figure, path, dpi=120)


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.image and args.index:
        raise UserError("--image and --index can't be shown together: run it twice", status=2)
    device = engine.select_device(args.device)
    if Path(args.checkpoint).is_dir():
        args.checkpoint = Path(args.checkpoint) / "best.pt"
    model, card = load_checkpoint(args.checkpoint)
    model = model.to(device, memory_format=torch.channels_last)
    if args.image:
        images, names = load_pictures(args.image, card["image_size"])
        truth = None
    else:
        examples, names = load_test_pictures(args, card)
        images, truth = examples.images, examples.labels.tolist()
    probabilities, classes = predict(model, card, images, device, args.topk)
    for i, name in enumerate(names):
        guesses = zip(classes[i].tolist(), probabilities[i].tolist())
        said = ", ".join(f"{card['classes'][c]} {100 * p:.1f} %" for c, p in guesses)
        print(f"{name}: {said}" if truth is None else f"{name} ({card['classes'][truth[i]]}): {said}")
    path = args.output or Path(args.checkpoint).parent / "examples.png"
    draw(images, names, truth, probabilities, classes, card["classes"], path)
    print(f"picture: {path}")
    return 0


if __name__ == "__main__":
    cli.run(main)
