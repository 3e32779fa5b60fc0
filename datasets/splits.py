"""Stratified subsets of a dataset: limits, and a held-out part for validation."""

from dataclasses import replace

import torch

from common.errors import UserError


def stratified(labels, count, seed=0):
    """Sorted indices of `count` examples; each class has its share to within one example."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    shares = torch.bincount(labels) * count  # multiplied by len(labels), to stay integers
    quota = shares // len(labels)
    by_remainder = (shares % len(labels)).argsort(descending=True, stable=True)
    quota[by_remainder[: count - int(quota.sum())]] += 1
    chosen = [order[labels[order] == label][:number] for label, number in enumerate(quota.tolist())]
    return torch.cat(chosen).sort().values


def limit(examples, count, flag):
    """A stratified subset of `count` examples (0: all). Raises UserError, which names the flag."""
    if not count:
        return examples
    if count > len(examples):
        raise UserError(f"{flag} {count} is more than the {len(examples)} images there are", 2)
    return examples.take(stratified(examples.labels, count))


def hold_out(split, val_size):
    """The split with `val_size` stratified training images as split.val. Raises UserError."""
    if not val_size:
        return split
    count, classes = len(split.train), split.num_classes
    if count < 2 * classes:
        few = f"{count} training images are fewer than two for each of {classes} classes"
        raise UserError(f"--val-size {val_size}: {few}", 2)
    if not classes <= val_size <= count - classes:
        raise UserError(
            f"--val-size {val_size} must be {classes} to {count - classes}: "
            f"{count} training images of {classes} classes are divided",
            2,
        )
    held_out = stratified(split.train.labels, val_size)
    remaining = torch.ones(count, dtype=torch.bool).index_fill_(0, held_out, False).nonzero()
    return replace(
        split, train=split.train.take(remaining.squeeze(1)), val=split.train.take(held_out)
    )
