"""Trains a convolutional network on small pictures, from scratch or from published weights.

    python train.py --model resnet34 --epochs 500                       # CIFAR-10
    python train.py --dataset shapes --model resnet20 --epochs 3        # no files, no network, a minute on any machine
    python train.py --resume runs/<run>                                 # goes on to the same bits

The default recipe, for residual networks on CIFAR-10, after arXiv 1512.03385, 1605.07146, 1812.01187 and 1905.04899:
SGD 0.1 with Nesterov momentum 0.9 and weight decay 5e-4 (not on norms and biases), batch 128, a warmup and a cosine; crop
and flip; CutMix or MixUp on half of the images, label smoothing 0.1; a moving average of the weights.
`--augment none --optimizer adam` is the naive baseline to compare with.
Results, with mean, deviation and n, stand in the README.
"""

from common import command_line
from training import arguments


def build_parser():
    return arguments.training_parser(__doc__.split("\n")[0], model="resnet18", epochs=200)


def main(argv=None):
    parser = build_parser()
    parser.parse_args(argv)  # --help and what is wrong in any case don't wait for torch
    import models
    from training import (
        experiment,  # here, where Ctrl-C ends with a line while torch is being imported, too
    )

    args, origin, state = experiment.resolve_arguments(parser, argv)
    if args.list_models:
        return models.print_table()
    return experiment.run(args, origin, state)


if __name__ == "__main__":
    command_line.run(main)
