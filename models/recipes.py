"""Training recipes: the training arguments that suit a model, as tables of plain values.

A recipe holds what differs from the scripts' defaults. lr: highest learning rate, for the given
batch_size; mixup, cutmix: alpha of the Beta distribution, 0 is off; mix_prob: share of the images
that are mixed; clip_grad: largest norm of the gradient; random_erasing: probability for each image;
layer_decay: factor of the learning rate from a layer to the one before it. The number of warmup
epochs follows from `epochs` by default: 5 of 200 (arXiv 1706.02677 §2.2).
"""

# fmt: off
DEFAULT = {}  # the script's own recipe

# Residual networks of less than two million parameters underfit: no mixing, no label smoothing.
SMALL = dict(
    optimizer="sgd", lr=0.1, batch_size=128,              # arXiv 1512.03385 §4.2
    weight_decay=5e-4, epochs=200,                        # arXiv 1605.07146
    schedule="cosine",                                    # arXiv 1608.03983
    augment="crop,flip", mixup=0.0, cutmix=0.0, label_smoothing=0.0,
)
# Networks of 4 to 26 million parameters memorize 50,000 images.
LARGE = SMALL | dict(
    mixup=0.2, cutmix=1.0, mix_prob=0.5,                  # arXiv 1905.04899
    label_smoothing=0.1,                                  # arXiv 1812.01187 §5.2
)
# ConvNeXt's and HorNet's (arXiv 2201.03545, 2207.14284), with each constructor's own drop-path.
MODERN = dict(
    optimizer="adamw", weight_decay=0.05,
    lr=1e-3, batch_size=128,      # 4e-3 at 4096, scaled by the square root (2205.10287), rounded up
    schedule="cosine", epochs=200, augment="crop,flip,rand_augment",
    mixup=0.8, cutmix=1.0, mix_prob=1.0, label_smoothing=0.1,
    clip_grad=1.0,                                        # CoAtNet's (arXiv 2106.04803)
)
# Less than four million parameters: half of the images stay unmixed.
MODERN_SMALL = MODERN | dict(mix_prob=0.5)
# Small transformers from scratch (arXiv 2112.13492 §4.1); RandAugment replaces their AutoAugment,
# and the warmup is half of theirs.
SCRATCH = MODERN | dict(epochs=100, random_erasing=0.25)

# The fastest known training to 94, 95 and 96 % on CIFAR-10 (arXiv 2404.00498 and its repository)
# and to 75 % on CIFAR-100 (a public record, with the rates below), with smaller images early in
# training and more epochs: 11, 20, 44 and 12 instead of 8, 15, 40 and 10.
# lr: of the convolutions; biases and classifier have multiples of it, for this batch size
# (models/airbench.py). The published code sums the loss over a batch and divides its rates of SGD,
# 10, 9 and 11.5, by 7,851: for the mean of 1,000 images, 10 becomes 1.27. Its decays, 0.0153, 0.012
# and 0.017, are divided by 10, 9 and 11.5. Its triangles begin at a fifth of the highest rate and
# reach it after 23 % of the run, not after a quarter.
# accumulate None: auto, cache-sized parts on a CPU, where the statistics of batch norm are then
# those of a part.
AIRBENCH94 = dict(
    optimizer="muon_sgd", lr=0.24, momentum=0.6, weight_decay=4e-3, batch_size=2000, epochs=11,
    schedule="linear", warmup_epochs=0.0, label_smoothing=0.2, ema_decay=0.0,
    augment="crop,alternating_flip", crop_pixels=2, mixup=0.0, cutmix=0.0,
    progressive="24:0,28:0.35,32:0.65", accumulate=None,
)
AIRBENCH95 = AIRBENCH94 | dict(
    optimizer="sgd", lr=1.27, momentum=0.85, weight_decay=1.5e-3, batch_size=1000, epochs=20,
    schedule="one_cycle", warmup_epochs=None, final_lr=0.07, lookahead=5,
    progressive="28:0,32:0.5",
)
AIRBENCH96 = AIRBENCH95 | dict(
    lr=1.15, weight_decay=1.3e-3, epochs=44, crop_pixels=4, cutout=12,
)
AIRBENCH_C100 = AIRBENCH95 | dict(
    lr=1.46, epochs=12, label_smoothing=0.25,
    augment="crop,alternating_flip,color_jitter", jitter=0.2,
)

# From published weights.
TRANSFER = dict(
    optimizer="adamw", lr=3e-4, weight_decay=0.05, batch_size=128, schedule="cosine", epochs=10,
    layer_decay=0.75,                                     # arXiv 2106.08254 §A
    augment="crop,flip", mixup=0.2, cutmix=1.0, mix_prob=0.5, label_smoothing=0.1, clip_grad=1.0,
)
TRANSFER_SIZE = 224  # image_size in px, which most of timm's weights were made for
# The largest models, from published weights (arXiv 2211.07636, 2303.11331). Not tuned here.
LARGEST = TRANSFER | dict(lr=3e-5, layer_decay=0.85, epochs=5)
# A linear classifier on features of a frozen network: nothing to regularize.
PROBE = TRANSFER | dict(
    lr=3e-3, weight_decay=0.0, layer_decay=1.0, epochs=30,
    augment="none", mixup=0.0, cutmix=0.0, label_smoothing=0.0,
)
# fmt: on
