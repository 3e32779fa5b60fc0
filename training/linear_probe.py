"""Linear probing: a classifier learns on the features of a frozen network, which are computed once.

    probe = Probe(model)                            # freezes everything but the classifier
    examples = features(probe, batches, dtype)      # Examples of (N, D) instead of images
    train_batches = data.Batches(examples, 128, IdentityPipeline())

A frozen network in evaluation mode gives the same features each time, so an epoch costs a matrix
product. Checkpoints hold the whole network.
"""

import torch
import torch.nn as nn

from common.errors import UserError
from datasets.examples import Examples
from models import classifiers
from training import mixed_precision


class Probe(nn.Module):
    """A frozen network with a trainable classifier. Images (B, 3, H, W) or features (B, D) -> (B,
    K)

    Its state dict is the network's own.
    """

    def __init__(self, model):
        super().__init__()
        heads = classifiers(model)
        needed = ("forward_features", "forward_head", "get_classifier")
        if not all(hasattr(model, name) for name in needed):
            raise UserError(
                "--freeze-backbone: this model doesn't separate features and head (ResNet-20 to "
                "110, our ViTs and timm's models do)",
                2,
            )
        if len(heads) != 1 or isinstance(heads[0], nn.ModuleList):  # distilled, or several branches
            raise UserError("--freeze-backbone: this model has several classifiers", 2)
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
        """The frozen part stays in evaluation mode: batch norm and dropout are frozen, too."""
        super().train(False)
        self.model.get_classifier().train(mode)
        return self

    def state_dict(self, *args, **options):
        return self.model.state_dict(*args, **options)

    def load_state_dict(self, *args, **options):
        return self.model.load_state_dict(*args, **options)


class IdentityPipeline:
    """A pipeline (see datasets.pipeline.Pipeline) that passes features on unchanged."""

    alternating_flip = False

    def prepare(self, features):
        return features

    def draw(self, *args, **options):
        return ()

    def batch(self, features, labels, index, drawn):
        return features.index_select(0, index), labels[index]


@torch.no_grad()
def features(probe, batches, dtype=None):
    """Examples of the features (N, D) float32 of all images; `batches` must not shuffle."""
    probe.eval()
    device, outputs = batches.labels.device, []
    for inputs, _ in batches:
        with mixed_precision.autocast(device, dtype):
            if not outputs:
                _check_classifier(probe, inputs[:1])
            outputs.append(probe.features(inputs).float())
    return Examples(torch.cat(outputs), batches.labels)


def _check_classifier(probe, image):
    """Raises UserError unless the classifier turns the features into what the network returns.

    Some of timm's have a norm in between (EfficientViT of MSRA), or a convolution as classifier
    (DLA).
    """
    expected = probe.model(image).float()
    try:
        output = probe(probe.features(image)).float()
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a classifier raises that doesn't take features
        output = None
    tolerance = 1e-4 * float(expected.abs().max())
    if output is None or not torch.allclose(output, expected, 0, tolerance, equal_nan=True):
        raise UserError(
            "--freeze-backbone: the classifier of this model needs more than its features", 2
        )
