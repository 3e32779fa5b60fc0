"""timm's networks, with published weights for transfer: any image size, any number of classes.

timm interpolates positions and resamples patch embeddings from the published size to another one.
Nothing else departs from timm's definitions.
"""

import difflib
import logging

import torch

from common.errors import UserError, first_line
from models.layers import check_drop_path

HUB_TIMEOUT = 5  # seconds


def create_timm(name, num_classes, pretrained=False, **options):
    """timm's network, whose name may carry the tag of its weights (resnet18.a1_in1k).

    pretrained: with weights from the Hugging Face hub. Raises UserError for an unknown name or
    option, and if the weights can't be downloaded.
    """
    import timm

    if not timm.is_model(name):
        similar = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        names = " or ".join(f"timm/{key}" for key in similar)
        hint = f"; did you mean {names}?" if similar else ""
        raise UserError(f"timm has no model {name!r}{hint}", status=2)
    # It would print each of its retries.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if pretrained and not weights_name(name):
        raise UserError(f"timm has no weights of {name}: leave --pretrained out", status=2)
    try:
        if pretrained:
            _check_hub(name)
        network = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **options)
    except Exception as error:  # errors of the hub and of constructors have no common class
        if not pretrained:
            raise UserError(f"timm/{name}: {first_line(error)}", status=2) from error
        repository = _config(name).hf_hub_id or f"timm/{name}"
        raise UserError(
            f"timm/{name}: the pretrained weights could not be downloaded ({first_line(error)}); "
            f"without network access, fetch model.safetensors of {repository} from the Hugging "
            "Face hub on another machine and pass it with --weights FILE"
        ) from error
    _check_patch_size(name, network, options.get("img_size"))
    return network


def _check_hub(name):
    """Raises ConnectionError within seconds if weights are not cached and the hub doesn't answer.

    huggingface_hub itself would try for a minute. Its session respects HF_HUB_OFFLINE and proxies.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.utils import get_session

    config = _config(name)
    if not config or not config.hf_hub_id:
        return  # the weights are not on the hub
    repository = config.hf_hub_id.split("@")[0]
    for file in ("model.safetensors", "pytorch_model.bin"):
        if isinstance(try_to_load_from_cache(repository, file), str):
            return
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception as error:  # of requests, httpx or huggingface_hub, depending on its version
        raise ConnectionError(f"{constants.ENDPOINT} can't be reached: {error}") from error


def _check_patch_size(name, network, image_size):
    """Raises UserError if patches don't cover the image: timm would ignore its border."""
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    sides = (patch, patch) if isinstance(patch, int) else patch
    pixels = (image_size, image_size) if isinstance(image_size, int) else image_size
    if pixels and sides and any(p % side for p, side in zip(pixels, sides)):
        message = f"image size {image_size} is not a multiple of the patch, {sides[0]} px"
        raise UserError(f"timm/{name}: {message}", status=2)


def _config(name):
    """timm's configuration of a network and its weights, or None. UserError for a wrong tag."""
    import timm

    if not timm.is_model(name):
        return None
    try:
        return timm.get_pretrained_cfg(name, allow_unregistered=True)
    except RuntimeError as error:  # the network has no weights with this tag
        raise UserError(f"timm/{name}: {first_line(error)}", status=2) from error


def weights_name(name):
    """The name with the tag of its weights: resnet18 -> resnet18.a1_in1k; None without weights."""
    config = _config(name)
    return f"{config.architecture}.{config.tag}" if config and config.has_weights else None


def has_fixed_size(name):
    """Whether timm's network needs to know the image size (its option img_size)."""
    config = _config(name)
    return bool(config and config.fixed_input_size)


def native_size(name):
    """Pixels on a side of the images that timm's network was published with."""
    config = _config(name)
    return config.input_size[-1] if config and config.input_size else 224


def family(name):
    """timm's module of a network, such as resnet; "" if timm has no such network."""
    import timm

    if not timm.is_model(name):
        return ""
    return timm.model_entrypoint(name.split(".")[0]).__module__.rsplit(".", 1)[-1]


def vision_transformer(
    num_classes=10, *, name, pretrained=False, image_size=224, patch_size=0, drop_path=0.0
):
    """A ViT at another image size.

    patch_size 0: an eighth of the image, between 4 and 16, so that 32 px still make 64 tokens.
    """
    check_drop_path(drop_path)
    sizes = dict(img_size=image_size, patch_size=patch_size or min(16, max(4, image_size // 8)))
    return create_timm(name, num_classes, pretrained, drop_path_rate=drop_path, **sizes)


def any_size_network(num_classes=10, *, name, pretrained=False, drop_path=0.0):
    """A network that takes images of any size."""
    check_drop_path(drop_path)
    return create_timm(name, num_classes, pretrained, drop_path_rate=drop_path)


def fixed_size_network(num_classes=10, *, name, pretrained=False, image_size=0, drop_path=0.0):
    """A network with learned positions for one image size. image_size 0: the published one."""
    check_drop_path(drop_path)
    size = dict(img_size=image_size or None)
    return create_timm(name, num_classes, pretrained, drop_path_rate=drop_path, **size)


# Options that shrink a network; families of networks name their depths and widths differently.
SMALLER = (
    dict(depth=2, embed_dim=96, num_heads=6),  # vision transformers
    dict(depths=(1, 1, 1, 1), dims=(16, 32, 64, 128)),  # ConvNeXt
    dict(depth=2),
    dict(depths=(1, 1, 1, 1)),
    dict(layers=(1, 1, 1, 1)),  # residual networks
)


def smallest(name):
    """timm's options and the image size of a copy of a network that trains in seconds.

    The first of SMALLER that the network accepts and that reduces its parameters, at the smallest
    image size that works; else no options and the published size.
    """
    published = native_size(name)
    sizes = [size for size in (56, 64, 128) if size < published] + [published]
    full = _count_parameters(name, published, {})
    for options in SMALLER:
        for size in sizes:
            parameters = _count_parameters(name, size, options)
            if parameters and (full is None or parameters < full):
                return options, size
    works = (size for size in sizes if _count_parameters(name, size, {}))
    return {}, next(works, published)


def _count_parameters(name, image_size, options):
    """Parameters of timm's network, or None if it can't be built so or take images of this size."""
    if has_fixed_size(name):
        options = options | {"img_size": image_size}
    try:
        with torch.device("meta"), torch.no_grad():
            network = create_timm(name, 10, **options).eval()
            network(torch.empty(1, 3, image_size, image_size))
    except Exception:  # constructors and first layers raise anything
        return None
    return sum(p.numel() for p in network.parameters())
