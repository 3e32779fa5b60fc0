"""Draws are made ahead and sent to a GPU together; a batch takes few operations there.

The GPU is a stand-in that counts operations (helpers/counted_gpu.py).
"""

import pytest
import torch
from helpers.batches import MEAN, MIXED, STD, random_examples
from helpers.counted_gpu import CountedGpu, gpu_stand_in, on_host  # noqa: F401 (a fixture)
from helpers.training import resolve

import train
import train_vit
from data import Batches
from datasets import draws
from datasets.draws import send_in_groups
from datasets.examples import Split
from datasets.pipeline import TRANSFORMS, Pipeline
from training.distributed import Ranks
from training.inputs import Inputs

CUDA = torch.device("cuda:0")
pytestmark = pytest.mark.usefixtures("gpu_stand_in")


def training_batches(script, count, *argv):
    examples = random_examples(count)
    args = resolve(script, "--batch-size", 128, "--resident", "device", *argv)
    split = Split("shapes", examples, None, examples, tuple("abcdefghij"), MEAN, STD)
    return Inputs(args, split, (MEAN, STD), Ranks(CUDA), None, 128).training_batches(None)


MIXING = ("--augment", "crop,flip", "--mixup", 0.2, "--cutmix", 1)


@pytest.mark.parametrize(
    "script, argv, most", [(train, MIXING, 40), (train_vit, (), 150)], ids=["mixing", "train_vit"]
)
def test_a_batch_takes_few_operations_and_most_take_no_upload(script, argv, most):
    with CountedGpu() as gpu:
        batches = training_batches(script, 128 * 20, *argv)
        next(batches.epoch(0))  # constants are sent once
        uploads = []
        gpu.kernels.clear()
        for _ in batches.epoch(1):
            uploads.append(gpu.uploads.total())
    assert gpu.kernels.total() <= 20 * most and not gpu.downloads
    sent = [number for number in range(1, 20) if uploads[number] > uploads[number - 1]]
    assert sent == [1, 3, 7, 15] and uploads[19] - uploads[0] == len(sent)


EVERYTHING = Pipeline(MEAN, STD, 40, TRANSFORMS, erasing=0.5, **MIXED)
CROPS = Pipeline(MEAN, STD, 32, ("crop", "alternating_flip"), **MIXED, mix_per="batch")


@pytest.mark.parametrize("pipeline", [EVERYTHING, CROPS], ids=["everything", "crops"])
@pytest.mark.parametrize(
    "options", [dict(repeats=2), dict(shuffle=False), dict(rank=1, world_size=2)], ids=str
)
def test_batches_of_draws_that_were_sent_in_groups_are_the_same(pipeline, options, monkeypatch):
    monkeypatch.setattr(draws, "MAX_BATCHES", 3)
    examples = random_examples(64)
    options |= {"seed": 3, "resident": "device"}
    expected = list(Batches(examples, 8, pipeline, **options).epoch(2))
    for start in (0, 5):
        with CountedGpu():
            batches = Batches(examples, 8, pipeline, device=CUDA, **options)
            batches = [tuple(map(on_host, batch)) for batch in batches.epoch(2, start=start)]
        for batch, (inputs, targets) in zip(batches, expected[start:], strict=True):
            assert torch.equal(batch[0], inputs) and torch.equal(batch[1], targets)


def test_groups_grow_to_a_limit_and_are_drawn_during_the_steps():
    drawn, ahead, groups = [], [], []

    def batches():
        for number in range(300):
            drawn.append(number)
            yield torch.tensor([number]), (torch.rand(2, 3), None, [number])

    with CountedGpu() as gpu:
        for step, (number, (values, nothing, plain)) in enumerate(send_in_groups(batches(), CUDA)):
            assert on_host(number).tolist() == plain == [step] and nothing is None
            assert values.shape == (2, 3)
            ahead.append(len(drawn) - step - 1)
            groups.append(gpu.uploads.total())
    assert ahead[:4] == [0, 1, 2, 3] and max(ahead) < 2 * draws.MAX_BATCHES
    sizes = [groups.count(number) for number in range(1, groups[-1] + 1)]
    assert sizes == [1, 2, 4, 8, 16, 32, 64, 64, 64, 45]
