"""timm's networks with published weights, for transfer: at any size of picture, with any number of classes.

Positions are interpolated and patch embeddings resampled by timm, from the published size to the one that is asked for.
Nothing else departs from timm's definitions.
"""

import difflib
import logging

from common.errors import UserError
from models.layers import drop_path_rates


def create_timm(name, num_classes, pretrained=False, **options):
    """timm's network of a name, which may carry a tag of its weights (resnet18.a1_in1k); pretrained: weights from the hub.

    Raises UserError for an unknown name or option, and where weights were asked for and can't be downloaded.
    """
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(f'timm/{key}' for key in near)}?" if near else ""
        raise UserError(f"timm has no model {name!r}{hint}", status=2)
    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # it would print each of its retries
    try:
        if pretrained:
            _check_hub(name)
        network = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **options)
    except (
        Exception
    ) as error:  # the hub's, the network's and the constructor's errors have no common class
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        if pretrained:
            raise UserError(
                f"timm/{name}: the pretrained weights could not be downloaded ({reason}); without network, fetch "
                f"model.safetensors of timm/{name} from the Hugging Face hub on another machine and give it with --weights FILE"
            ) from error
        raise UserError(f"timm/{name}: {reason}", status=2) from error
    _check_patch(name, network, options.get("img_size"))
    return network


def _check_hub(name):
    """Raises an error within seconds where a network's weights are not in the cache and their hub can't be reached.

    huggingface_hub itself would try for a minute. Its session knows HF_HUB_OFFLINE and proxies. Any answer will do.
    """
    import timm
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.utils import get_session

    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if not config or not config.hf_hub_id:
        return  # its weights lie at an address of their own, for which nothing retries
    repository = config.hf_hub_id.split("@")[0]
    if any(
        isinstance(try_to_load_from_cache(repository, file), str)
        for file in ("model.safetensors", "pytorch_model.bin")
    ):
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # of requests, httpx or huggingface_hub, by its version
        raise ConnectionError(f"{constants.ENDPOINT} can't be reached: {error}") from error


def _check_patch(name, network, image_size):
    """timm would leave the border out."""
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    sides = (patch,) if isinstance(patch, int) else patch
    if image_size and sides and any(image_size % side for side in sides):
        raise UserError(
            f"timm/{name}: image size {image_size} is not a multiple of the patch, {sides[0]} px",
            status=2,
        )


def has_fixed_size(name):
    """Whether timm's network of a name has to know the size of its pictures (an option img_size)."""
    import timm

    config = timm.get_pretrained_cfg(name, allow_unregistered=True) if timm.is_model(name) else None
    return bool(config and config.fixed_input_size)


def native_size(name):
    """Pixels on a side of the pictures that timm's network of a name was published with."""
    import timm

    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return config.input_size[-1] if config and config.input_size else 224


def vision_transformer(
    num_classes=10, *, name, pretrained=False, image_size=224, patch_size=0, drop_path=0.0
):
    """A ViT at another size. patch_size 0: an eighth of the picture, between 4 and 16, so that 32 px still make 64 tokens."""
    drop_path_rates(drop_path, 1)  # checks it
    patch_size = patch_size or min(16, max(4, image_size // 8))
    return create_timm(
        name,
        num_classes,
        pretrained,
        img_size=image_size,
        patch_size=patch_size,
        drop_path_rate=drop_path,
    )


def network(num_classes=10, *, name, pretrained=False, drop_path=0.0):
    """A network that takes pictures of any size."""
    drop_path_rates(drop_path, 1)  # checks it
    return create_timm(name, num_classes, pretrained, drop_path_rate=drop_path)


def sized_network(num_classes=10, *, name, pretrained=False, image_size=0, drop_path=0.0):
    """A network whose positions belong to one size of picture, with its own patches. image_size 0: the published size."""
    drop_path_rates(drop_path, 1)  # checks it
    return create_timm(
        name, num_classes, pretrained, img_size=image_size or None, drop_path_rate=drop_path
    )


def smallest(name):
    """(timm's arguments, image size) that leave of a network what tries it out in seconds: a layer or two, few channels.

    Families call their depths and widths differently: the first arguments that this one takes, and that leave less of it. A
    network that takes none stays whole.
    """
    import torch

    def parameters(image_size, options):
        options = options | ({"img_size": image_size} if has_fixed_size(name) else {})
        try:
            with torch.device("meta"), torch.no_grad():
                network = create_timm(name, 10, **options).eval()
                network(torch.empty(1, 3, image_size, image_size))
        except Exception:  # each constructor and each first layer says in its own way that it can't
            return None
        return sum(p.numel() for p in network.parameters())

    published = native_size(name)
    sizes = [size for size in (56, 64, 128) if size < published] + [published]
    whole = parameters(published, {})
    for options in CUTS:
        for size in sizes:
            found = parameters(size, options)
            if found and (not options or found < whole):
                return options, size
    return {}, published


# Transformers; ConvNeXt; networks of stages, each with its depth; residual networks; whatever there is.
CUTS = (
    dict(depth=2, embed_dim=96, num_heads=6),
    dict(depths=(1, 1, 1, 1), dims=(16, 32, 64, 128)),
    dict(depth=2),
    dict(depths=(1, 1, 1, 1)),
    dict(layers=(1, 1, 1, 1)),
    {},
)
