"""MixUp and CutMix of a batch: each image and its target are mixed with those of its neighbor.

Row 2i is mixed with row 2i + 1. A batch is a random permutation, so neighbors are random pairs; a
rank's rows start at an even row, so it holds both images of each pair.
Images are float (B, C, H, W), targets float (B, K) with rows that sum to one.
"""

import torch

from datasets.augment import box_edges, box_masks, to_nhwc
from datasets.draws import of_the_batch, per_image, rand, rand_beta

MIX_PER = ("image", "batch")


def draw_mixing(generator, count, shape, mixup_alpha, cutmix_alpha, probability, per="image"):
    """(neighbor, kept, edges) for `blend`: each image is mixed with the given probability.

    If both alphas are above 0, MixUp and CutMix are equally likely. per: "image", or "batch" for
    one choice, one share and one box for all images.

    MixUp (arXiv 1710.09412) keeps a share Beta(alpha, alpha) of the image; the rest is its
    neighbor's.
    CutMix (arXiv 1905.04899) pastes a box of the neighbor; targets are weighted by the areas.
    """
    # In a batch of odd size, the last image is its own neighbor.
    neighbor = (torch.arange(count) ^ 1).clamp_(max=count - 1)
    rows = count
    if per == "batch":
        rows, generator = 1, of_the_batch(generator)
    draws = rand(generator, rows, 2)
    mixed = draws[:, 0] < probability
    if mixup_alpha and cutmix_alpha:
        takes_mixup = draws[:, 1] < 0.5
    else:
        takes_mixup = torch.full((rows,), bool(mixup_alpha))
    kept = torch.ones(rows)
    if mixup_alpha:
        beta = rand_beta(generator, rows, mixup_alpha)
        kept = torch.where(mixed & takes_mixup, beta, kept)
    if not cutmix_alpha:
        return neighbor, per_image(kept), None
    centers, sides = _cutmix_boxes(generator, rows, shape, cutmix_alpha)
    cut = mixed & ~takes_mixup
    # The box of an image that isn't cut is empty.
    return neighbor, per_image(kept), box_edges(centers, sides * cut[:, None])


def _cutmix_boxes(generator, count, shape, alpha):
    """Centers and sides (count, 2) of boxes whose area, unclipped, is 1 - Beta(alpha, alpha)."""
    kept = rand_beta(generator, count, alpha)
    size = torch.tensor(shape)
    centers = (rand(generator, count, 2) * size).floor()
    return centers, ((1 - kept).sqrt()[:, None] * size).floor()


def blend(images, targets, neighbor, kept, edges):
    """kept * own + (1 - kept) * neighbor's, and the neighbor's inside the boxes.

    neighbor: rows (B,); kept: (B or 1, 1, 1, 1), 1 where the box isn't empty; edges: (B or 1, 2, 2)
    of the boxes, or None.
    """
    if edges is not None:
        kept = kept - box_masks(edges, images)
    others = to_nhwc(images).index_select(0, neighbor).permute(0, 3, 1, 2)
    kept_targets = kept.mean((1, 2, 3))[:, None]
    other_targets = targets.index_select(0, neighbor)
    return torch.lerp(others, images, kept), torch.lerp(other_targets, targets, kept_targets)
