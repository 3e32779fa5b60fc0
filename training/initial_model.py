"""The model that a run starts from: fresh, published, from a file, or as a run that resumes had
it.
"""

import torch

import models
from common.text import printable
from datasets.pipeline import Pipeline
from models import lora
from models.weights import load_weights
from training import devices, linear_probe, resume

INITIAL_IMAGES = 5000  # that a model may be initialized with


def build_model(args, split, saved, lora_rank=0):
    """(model on the CPU, (mean, std) for its images).

    The weights of a run that resumes are loaded later, by State.restore. mean and std are those
    that the weights were trained with where they are known, else those of the training images.
    """
    options = model_options(args)
    devices.seed_model(args.seed, torch.device("cpu"), 0, "init")
    pretrained = args.pretrained and not saved
    model = models.create_model(args.model, split.num_classes, pretrained=pretrained, **options)
    if args.grad_checkpointing:
        models.checkpoint_gradients(model, args.model)
    normalization = split.mean, split.std
    if saved:
        normalization = saved["card"]["mean"], saved["card"]["std"]
    elif args.weights:
        line, card = load_weights(model, args.weights)
        print(printable(line))  # it names tensors of the file
        if card:
            normalization = card["mean"], card["std"]
        elif models.is_published(args.model):
            normalization = models.normalization(model)
    elif args.pretrained:
        classes = split.num_classes
        print(f"weights: {args.model} as published, with a new classifier for {classes} classes")
        normalization = models.normalization(model)
    elif hasattr(model, "initialize"):
        model.initialize(initial_images(split.train, normalization, args.image_size))
    if lora_rank:
        devices.seed_model(args.seed, torch.device("cpu"), 0, "adapters")
        layers = lora.linear_layers(args.model, split.num_classes, args.image_size, options)
        lora.add_adapters(model, lora_rank, layers)
    if args.freeze_backbone:
        model = linear_probe.Probe(model)
        if saved:  # its features are computed before State.restore
            with resume.refuse_misfits():
                model.load_state_dict(saved["state_dict"])
    return model, normalization


def initial_images(examples, normalization, image_size):
    """INITIAL_IMAGES training images as the model gets them, without augmentation.

    They are evenly spaced: the first images of a folder are all of one class.
    """
    count = min(INITIAL_IMAGES, len(examples))
    index = torch.arange(count) * len(examples) // count
    pixels = examples.gather(index).permute(0, 3, 1, 2)
    images, _ = Pipeline(*normalization, image_size)(pixels, examples.labels[index])
    return images


def model_options(args):
    return models.parse_options(args.model_arg, args.model, args.image_size, args.drop_path)


def model_card(args, split, normalization):
    """What is needed to use the weights of a run without its arguments."""
    mean, std = normalization
    return {
        "model": args.model,
        "options": model_options(args),
        "num_classes": split.num_classes,
        "classes": list(split.classes),
        "image_size": args.image_size,
        "mean": list(mean),
        "std": list(std),
        "dataset": split.name,
        "source": args.dataset,
        "seed": args.seed,
    }
