"""Weights from a file (.pt, .pth or .safetensors) into a model whose classifier may have another number of classes."""

import sys
from pathlib import Path

import torch

from common import checkpoint, errors
from common.errors import UserError
from models import classifiers, from_card
from models.lora import merged

WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel's and torch.compile's


def plain_keys(state):
    """A state dict without the prefixes that wrappers add."""
    out = {}
    for key, value in state.items():
        if not isinstance(key, str):
            continue
        while key.startswith(WRAPPERS):
            key = key.split(".", 1)[1]
        out[key.replace("._orig_mod.", ".")] = value
    return out


def weights_file(path):
    """The file that --weights names: a run's directory stands for its best.pt. Raises UserError where there is none."""
    found = Path(path) / "best.pt" if Path(path).is_dir() else Path(path)
    if not found.is_file():
        raise UserError(f"there is no weights file {found}", status=2)
    return found


def read_weights(path):
    """(state dict, card or None) of a file: plain, under "state_dict" or "model", or a run's best.pt or last.pt.

    Of a run's file, the weights are its moving average, if it has one; its card says what they were made with.
    """
    card = None
    if Path(path).suffix == ".safetensors":
        state = _read_safetensors(path)
    else:
        state = checkpoint.load_untrusted(path, "weights file")
        if isinstance(state, dict) and {"digest", "contents"} <= set(state):
            state = checkpoint.load(path)  # one of ours: its digest is checked
            card = _card(state)
    for key in ("ema", "average", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = isinstance(state, dict) and {
        k: v for k, v in state.items() if isinstance(v, torch.Tensor)
    }
    if not tensors:
        raise UserError(f"{path} holds no weights")
    if not all(map(checkpoint.has_its_elements, tensors.values())):
        raise UserError(f"{path} was refused: it holds tensors without elements of their own")
    return merged(plain_keys(tensors)), card


def _card(contents):
    """The card of a run's checkpoint, if it tells the statistics of the pictures."""
    card = contents.get("card") if isinstance(contents, dict) else None
    return (
        card
        if isinstance(card, dict) and all(len(card.get(key, ())) == 3 for key in ("mean", "std"))
        else None
    )


def _read_safetensors(path):
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is truncated, damaged or not a safetensors file ({error})"
        ) from error


def load_weights(model, path):
    """Loads a file into `model`. Returns (one line that says what was loaded, the card of a run's file or None).

    A classifier of another shape stays fresh; positions and patch embeddings of another size are resampled. Raises UserError
    when the file fits another architecture: anything but the classifier missing or of another shape.
    """
    path = weights_file(path)
    (state, card), own = read_weights(path), model.state_dict()
    state = _adapt(state, model, path)
    may_be_new = classifier_keys(model)
    fitting = {
        key: value for key, value in state.items() if key in own and value.shape == own[key].shape
    }
    misfits = [key for key in own if key not in fitting and key not in may_be_new]
    if misfits:
        key = misfits[0]
        found = (
            f"is {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
            if key in state
            else "is missing"
        )
        raise UserError(
            f"{path} holds weights of another model: {key} {found} ({len(misfits)} of {len(own)} don't fit)"
        )
    model.load_state_dict(fitting, strict=False)
    fresh = [key for key in own if key not in fitting]
    unused = [key for key in state if key not in fitting and key not in fresh]
    line = f"weights: {len(fitting)} of {len(own)} tensors from {path}"
    if fresh:
        line += f"; new: {', '.join(fresh)}"
    if unused:
        line += (
            f"; not used: {', '.join(unused[:3])}{' …' if len(unused) > 3 else ''} ({len(unused)})"
        )
    return line, card


def _adapt(state, model, path):
    """The state with positions and patches of the model's size: as timm does it for its networks, or as the model does."""
    adapt = getattr(model, "adapt_weights", None)
    filtering = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        return adapt(state) if adapt else filtering(state, model) if filtering else state
    except Exception as error:  # whatever another network's tensors do there
        raise UserError(
            f"{path} holds weights of another model ({errors.first_line(error)})"
        ) from error


def classifier_keys(model):
    """Names of the parameters of the classifier."""
    ids = {id(p) for head in classifiers(model) for p in head.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in ids}


def load_checkpoint(path):
    """(model in evaluation mode, card) of a run's best.pt or last.pt (its moving average, if it has one), on the CPU.

    The card says what is needed to use it: model, options, num_classes, classes, image_size, mean, std, dataset. Added are
    "epoch", after which the weights were saved (None: within one), and "metric", what a best.pt was chosen by (else None).
    """
    contents = checkpoint.load(path)
    try:
        metric, training = contents.get("metric"), contents.get("training", {})
        within = training.get("progress", {}).get("batch", 0)
        epoch = (
            metric["epoch"]
            if metric
            else None
            if within
            else training.get("progress", {}).get("epoch")
        )
        if metric:
            metric = {"selected_on": str(metric["selected_on"]), "value": float(metric["value"])}
        card = contents["card"] | {
            "epoch": epoch if epoch is None else int(epoch),
            "metric": metric,
        }
        weights = contents["ema"]["average"] if contents.get("ema") else contents["state_dict"]
        with torch.device("meta"):  # nothing is allocated before the weights are known to fit
            model = from_card(card)
        weights = merged(weights)
        model.load_state_dict(weights, assign=True)
        if any(
            buffer.is_meta for buffer in model.buffers()
        ):  # what no file holds is made with the model
            model = from_card(card)
            model.load_state_dict(weights, assign=True)
        missing = {"classes", "image_size", "mean", "std", "source"} - set(card)
        if missing:
            raise KeyError(*missing)
    except UserError as error:
        raise UserError(f"{path} was refused: {error}") from error
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        raise UserError(
            f"{path} is no best.pt or last.pt of this program ({errors.first_line(error)})"
        ) from error
    return model.eval(), card
