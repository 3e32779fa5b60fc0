"""Trains a vision transformer on small pictures: from scratch, with what few pictures need, or from published weights.

    python train_vit.py                                            # from scratch: vit_small_data, 100 epochs of CIFAR-10
    python train_vit.py --pretrained                               # ViT-Tiny from ImageNet at 224 px, 10 epochs
    python train_vit.py --model vit_tiny --weights model.safetensors --freeze-backbone     # a linear probe

From scratch: shifted patch tokens and local attention (arXiv 2112.13492), AdamW 1e-3, weight decay 0.05, a warmup and
a cosine, RandAugment, MixUp or CutMix on all images, random erasing, label smoothing, stochastic depth.
From weights: AdamW 3e-4, falling by a quarter with each layer towards the input; the classifier is new.
Any other model of --list-models may be given, too. Results, with mean, deviation and n, stand in the README.
"""

from common import command_line
from training import arguments


def build_parser():
    return arguments.training_parser(__doc__.split("\n")[0], model="vit_small_data", epochs=100)


def main(argv=None):
    parser = build_parser()
    parser.parse_args(argv)  # --help and what is wrong in any case don't wait for torch
    import models
    from training import (
        experiment,  # here, where Ctrl-C ends with a line while torch is being imported, too
    )

    args, origin, state = experiment.resolve_arguments(parser, argv, published="vit_tiny")
    if args.list_models:
        return models.print_table()
    return experiment.run(args, origin, state)


if __name__ == "__main__":
    command_line.run(main)
