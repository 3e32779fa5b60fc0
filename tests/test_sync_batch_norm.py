"""--sync-bn: batch norm on the parts of several ranks is that of the whole batch."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn as nn
from helpers.batches import seeded
from helpers.errors import refused
from helpers.networks import randomize
from helpers.training import CPU

from training import sync_batch_norm

PARTS = [slice(0, 5), slice(5, 8)]  # of a batch of eight: ranks may differ by their images


class ThreadReduce:
    """all_reduce over two ranks that are threads."""

    def __init__(self):
        self.barrier, self.values = threading.Barrier(2, timeout=300), [None, None]
        self.thread = threading.local()

    def __call__(self, tensor):
        self.values[self.thread.rank] = tensor.clone()
        self.barrier.wait()
        total = self.values[0] + self.values[1]
        self.barrier.wait()
        tensor.copy_(total)

    def run(self, function):
        """[function(rank)], each in its thread. On a CPU its backward pass is there, too."""

        def on_rank(rank):
            self.thread.rank = rank
            return function(rank)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(on_rank, range(2)))


def train_step(norm, images, weights):
    """(output, gradient of the images) of a pass of batch norm."""
    images = images.clone().requires_grad_()
    output = norm(images)
    (output * weights).sum().backward()
    return output.detach(), images.grad


@pytest.mark.parametrize("momentum", [0.1, None])
def test_two_ranks_normalize_and_train_as_one(monkeypatch, momentum):
    plain = randomize(nn.BatchNorm2d(4, momentum=momentum)).train()
    ranks = [sync_batch_norm.sync_batch_norm(copy.deepcopy(plain), CPU) for _ in range(2)]
    images, weights = (torch.randn(8, 4, 6, 6, generator=seeded(n)) for n in range(2))
    images = 3 * images + 5
    reduce = ThreadReduce()
    monkeypatch.setattr(sync_batch_norm.dist, "all_reduce", reduce)
    for _ in range(2):
        expected = train_step(plain, images, weights)
        parts = reduce.run(
            lambda rank: train_step(ranks[rank], images[PARTS[rank]], weights[PARTS[rank]])
        )
        for ours, whole in zip(zip(*parts), expected):
            torch.testing.assert_close(torch.cat(ours), whole, rtol=1e-4, atol=1e-5)
    for name, parameter in plain.named_parameters():
        summed = sum(norm.get_parameter(name).grad for norm in ranks)
        torch.testing.assert_close(summed, parameter.grad, rtol=1e-4, atol=1e-4)
    for norm in ranks:
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(norm.get_buffer(name), buffer, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.eval()(images), copy.deepcopy(plain).eval()(images))


def test_other_norms_that_need_a_gpu_are_refused():
    with refused("--sync-bn: BatchNorm1d needs a GPU for this") as error:
        sync_batch_norm.sync_batch_norm(nn.Sequential(nn.BatchNorm1d(2)), CPU)
    assert error.value.status == 2
