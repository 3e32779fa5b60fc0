"""Other processes that load a dataset."""

import multiprocessing
import os
import threading
from pathlib import Path

import torch

import data
from common import checkpoint
from datasets import archives, image_folder
from datasets.pipeline import Pipeline

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["data"])


def load_together(processes, name, directory, data_url=None, archive=None):
    """[(digest of what was loaded, how often a folder was decoded)] of simultaneous loads."""
    barrier = CONTEXT.Barrier(processes)
    arguments = (name, directory, data_url, archive)
    with CONTEXT.Pool(processes, _keep, (barrier,)) as pool:
        return pool.starmap(_load, [arguments] * processes, chunksize=1)


def _keep(barrier):
    global _barrier
    _barrier = barrier


def _load(name, directory, data_url, archive):
    if archive:
        archives.ARCHIVES[name] = archive
    decode_folder, decodes = image_folder._decode_folder, []

    def counting(*arguments):
        decodes.append(1)
        return decode_folder(*arguments)

    image_folder._decode_folder = counting
    _barrier.wait()
    split = data.load(name, directory, data_url=data_url)
    parts = [split.train.images, split.train.labels, split.test.images, split.test.labels]
    return checkpoint.digest(parts), len(decodes)


def train_with_little_memory(directory, image_size, megabytes):
    """(bytes of the training images, digest of weights and logits) of a linear model on a folder.

    The process may allocate that many megabytes more than it has after its imports. Pages of files
    that are mapped for reading don't count.
    """
    with CONTEXT.Pool(1) as pool:
        return pool.apply(_train, (directory, image_size, megabytes))


def _train(directory, image_size, megabytes):
    import resource

    from PIL import Image, ImageOps  # noqa: F401

    Image.init()  # imports the decoders
    torch.set_num_threads(1)
    os.cpu_count = lambda: 2  # the stacks of the threads that decode count, too
    threading.stack_size(8 * 2**20)
    status = Path("/proc/self/status").read_text().splitlines()
    used = next(1024 * int(line.split()[1]) for line in status if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + 2**20 * megabytes,) * 2)
    split = data.load("folder", directory, image_size=image_size, val_size=40)
    pool, weights = torch.nn.AdaptiveAvgPool2d(4), torch.zeros(48, split.num_classes)
    weights.requires_grad_()
    # No optimizer: torch would import its compiler for it, within the limit.
    augmented = Pipeline(split.mean, split.std, image_size, ("crop", "flip"))
    for inputs, labels in data.Batches(split.train, 4, augmented):
        loss = torch.nn.functional.cross_entropy(pool(inputs).flatten(1) @ weights, labels)
        (gradient,) = torch.autograd.grad(loss, weights)
        weights.data -= 0.1 * gradient
    plain = Pipeline(split.mean, split.std, image_size)
    test = data.Batches(split.test, 4, plain, shuffle=False)
    logits = [pool(inputs).flatten(1) @ weights for inputs, _ in test]
    return split.train.nbytes, checkpoint.digest([weights, logits])
