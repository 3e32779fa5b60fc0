"""Weights from files (.pt, .pth or .safetensors), and models from checkpoints of runs.

line, card = load_weights(model, "runs/x")      # the classifier may have other classes
model, card = load_checkpoint("runs/x/best.pt")
"""

import math
import sys
from pathlib import Path

import torch

from common import checkpoint
from common.errors import UserError, first_line
from models.inspection import classifiers
from models.lora import BASE, merged
from models.registry import from_card

WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
CARD_KEYS = {"classes", "image_size", "mean", "std", "source"}  # needed to use a model


def weights_file(path):
    """The file that --weights names; a run's directory stands for its best.pt. Raises UserError."""
    file = Path(path) / "best.pt" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"there is no weights file {file}", status=2)
    return file


def read_weights(path):
    """(state dict, card or None) of a file: plain, under "state_dict" or "model", or of a run.

    A run's file gives its moving average, if it has one, and its card. Raises UserError.
    """
    card, is_of_run = None, False
    if Path(path).suffix == ".safetensors":
        state = _read_safetensors(path)
    else:
        state = checkpoint.load_untrusted(path, "weights file")
        is_of_run = isinstance(state, dict) and {"digest", "contents"} <= set(state)
        if is_of_run:
            state = checkpoint.load(path)  # of a run: checks the digest
            card = _card_with_statistics(state)
    for key in ("ema", "average", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    items = state.items() if isinstance(state, dict) else ()
    tensors = {key: value for key, value in items if isinstance(value, torch.Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no weights")
    if not all(map(checkpoint.has_its_elements, tensors.values())):
        raise UserError(f"{path} was refused: it holds tensors without elements of their own")
    tensors = _without_wrappers(tensors)
    if not is_of_run and any(BASE in key for key in tensors):
        raise UserError(f"{path} holds adapters of another program: merge them into the weights")
    return merged(tensors), card


def _read_safetensors(path):
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        problem = f"is truncated, damaged or not a safetensors file ({error})"
        raise UserError(f"{path} {problem}") from error


def _card_with_statistics(contents):
    """The card of a run's checkpoint, or None if it lacks the mean and std of the images."""
    card = contents.get("card") if isinstance(contents, dict) else None
    if isinstance(card, dict) and are_statistics(card.get("mean"), card.get("std")):
        return card
    return None


def are_statistics(mean, std):
    """Whether these are mean and std of three channels: finite numbers, std above zero."""
    return _is_triple(mean) and _is_triple(std) and min(std) > 0


def _is_triple(values):
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        return False
    return all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)


def _without_wrappers(state):
    plain = {}
    for key, value in state.items():
        if not isinstance(key, str):
            continue
        while key.startswith(WRAPPERS):
            key = key.split(".", 1)[1]
        plain[key.replace("._orig_mod.", ".")] = value
    return plain


def load_weights(model, path):
    """Loads a file into `model`. Returns (a line that says what was loaded, card or None).

    A classifier of another shape keeps its fresh weights; positions and patch embeddings of another
    size are resampled. Raises UserError if anything but the classifier is missing or doesn't fit.
    """
    path = weights_file(path)
    state, card = read_weights(path)
    state, own = _adapt(state, model, path), model.state_dict()
    fitting = {
        key: value for key, value in state.items() if key in own and value.shape == own[key].shape
    }
    _check_fit(path, model, state, fitting)
    model.load_state_dict(fitting, strict=False)
    fresh = [key for key in own if key not in fitting]
    unused = [key for key in state if key not in own]
    line = f"weights: {len(fitting)} of {len(own)} tensors from {path}"
    if fresh:
        line += f"; new: {', '.join(fresh)}"
    if unused:
        more = " …" if len(unused) > 3 else ""
        line += f"; not used: {', '.join(unused[:3])}{more} ({len(unused)})"
    return line, card


def _adapt(state, model, path):
    """Resizes positions and patches to the model: by its own method, or by timm's function."""
    try:
        if hasattr(model, "adapt_weights"):
            return model.adapt_weights(state)
        timm_filter = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        return timm_filter(state, model) if timm_filter else state
    except Exception as error:  # tensors of another network may raise anything
        problem = f"holds weights of another model ({first_line(error)})"
        raise UserError(f"{path} {problem}") from error


def _check_fit(path, model, state, fitting):
    """Raises UserError unless all tensors of the model but its classifier's are among `fitting`."""
    own, optional = model.state_dict(), classifier_keys(model)
    misfits = [key for key in own if key not in fitting and key not in optional]
    if not misfits:
        return
    key = misfits[0]
    if key in state:
        problem = f"{key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
    else:
        problem = f"{key} is missing"
    count = f"{len(misfits)} of {len(own)} don't fit"
    raise UserError(f"{path} holds weights of another model: {problem} ({count})")


def classifier_keys(model):
    """Names of the parameters of the classifier."""
    ids = {id(p) for head in classifiers(model) for p in head.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in ids}


def load_checkpoint(path):
    """(model in evaluation mode, card) of a run's best.pt or last.pt, on the CPU.

    The weights are the moving average, if the run has one. The card has what is needed to use them:
    model, options, num_classes, classes, image_size, mean, std, dataset; and "epoch", after which
    they were saved (None: within one), and "metric", which best.pt was chosen by (else None).
    Raises UserError.
    """
    contents = checkpoint.load(path)
    try:
        card = contents["card"] | {"epoch": _epoch(contents), "metric": _metric(contents)}
        if missing := CARD_KEYS - set(card):
            raise KeyError(*missing)
        weights = contents["ema"]["average"] if contents.get("ema") else contents["state_dict"]
        return _model_with_weights(card, merged(weights)).eval(), card
    except UserError as error:
        raise UserError(f"{path} was refused: {error}") from error
    except Exception as error:  # unknown contents may raise anything
        problem = f"is not a best.pt or last.pt of this program ({first_line(error)})"
        raise UserError(f"{path} {problem}") from error


def _epoch(contents):
    """The epoch after which weights were saved; None for weights saved within an epoch."""
    progress = contents.get("training", {}).get("progress", {})
    if contents.get("metric"):
        epoch = contents["metric"]["epoch"]
    else:
        epoch = None if progress.get("batch") else progress.get("epoch")
    return None if epoch is None else int(epoch)


def _metric(contents):
    metric = contents.get("metric")
    if not metric:
        return metric
    return {"selected_on": str(metric["selected_on"]), "value": float(metric["value"])}


def _model_with_weights(card, weights):
    """The model of a card. Memory is allocated only after the weights are known to fit."""
    with torch.device("meta"):
        model = from_card(card)
    model.load_state_dict(weights, assign=True)
    if any(buffer.is_meta for buffer in model.buffers()):
        # Buffers that are not saved are made with the model.
        model = from_card(card)
        model.load_state_dict(weights, assign=True)
    return model
