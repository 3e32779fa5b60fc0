"""Linear probing: a classifier learns on the features of a frozen network, which are computed once.

    probe = Probe(model)                                    # freezes all but the classifier
    examples = features(probe, batches, dtype)              # Examples of (N, D) instead of pictures
    fit(probe, Batches(examples, 128, AsTheyAre()), …)

Since a frozen network in evaluation mode gives the same features each time, an epoch costs a matrix product. What is saved
is the whole network.
"""

import torch
import torch.nn as nn

from common.errors import UserError
from datasets.examples import Examples
from models import classifiers
from training import mixed_precision


class Probe(nn.Module):
    """A frozen network with a classifier that learns. Pictures (B, 3, H, W), or their features (B, D) -> (B, K)

    Its state dict is the network's own.
    """

    def __init__(self, model):
        super().__init__()
        heads = classifiers(model)
        if not all(
            hasattr(model, name) for name in ("forward_features", "forward_head", "get_classifier")
        ):
            raise UserError(
                "this model can't be frozen: it doesn't tell its features from its classifier (timm's do)",
                2,
            )
        if len(heads) != 1 or isinstance(
            heads[0], nn.ModuleList
        ):  # of a distilled network, or of branches
            raise UserError("this model can't be frozen: it has several classifiers", 2)
        self.model = model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)

    def get_classifier(self):
        return self.model.get_classifier()

    def features(self, x):
        """What the classifier sees. (B, 3, H, W) -> (B, D)"""
        return self.model.forward_head(self.model.forward_features(x), pre_logits=True)

    def forward(self, x):
        return self.model.get_classifier()(x if x.ndim == 2 else self.features(x))

    def train(self, mode=True):
        """The frozen part stays in evaluation mode: its batch norms and dropout are frozen, too."""
        super().train(False)
        self.model.get_classifier().train(mode)
        return self

    def state_dict(self, *args, **options):
        return self.model.state_dict(*args, **options)

    def load_state_dict(self, *args, **options):
        return self.model.load_state_dict(*args, **options)


class AsTheyAre:
    """A pipeline (see augment.Pipeline) that takes features as they are."""

    def prepare(self, features):
        return features

    def batch(self, features, labels, index, generator):
        return features.index_select(0, index), labels[index]


@torch.no_grad()
def features(probe, batches, dtype=None):
    """Examples of the features (N, D) float32 of all pictures of `batches`, which don't shuffle; dtype: autocast's."""
    probe.eval()
    device, found = batches.labels.device, []
    for inputs, _ in batches:
        with mixed_precision.autocast(device, dtype):
            if not found:
                _check_classifier(probe, inputs[:1])
            found.append(probe.features(inputs).float())
    return Examples(torch.cat(found), batches.labels)


def _check_classifier(probe, image):
    """Raises UserError unless the classifier makes of the features what the network makes of the image.

    Some of timm's have a norm between the two (EfficientViT of MSRA), or a convolution for a classifier (DLA, DPN).
    """
    try:
        answer = probe(probe.features(image)).float()
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a classifier says that takes no features
        answer = None
    wanted = probe.model(image).float()
    if answer is None or not torch.allclose(
        answer, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()), equal_nan=True
    ):
        raise UserError(
            "this model can't be frozen: its classifier needs more than its features", 2
        )
