"""Before a large model is trained: what a step will need, and a try of the whole way with a small copy of it.

dry_run(args, origin, gpu_memory=80)                            # arguments as train_sota.py resolves them
smoke(parser, ["--model", "eva_giant", "--smoke"], main, own)
"""

import copy
from pathlib import Path

import models
from common import command_line
from common.errors import UserError
from models.published import smallest
from models.weights import load_checkpoint
from training import devices, distributed, memory, mixed_precision, run_directory
from training.memory import GB

SMOKE = dict(
    dataset="shapes",
    limit_train=48,
    limit_test=24,
    batch_size=16,
    micro_batch=8,
    epochs=1,
    schedule="constant",
    warmup_epochs=0.0,
    ema_decay=0.9,
    tag="smoke",
)
SMALLER = (
    "grad_checkpointing",
    "ema_device=cpu",
    "grad_checkpointing ema_device=cpu",
    "lora_rank=16",
    "freeze_backbone",
)


def say_need(args, options, num_classes, dtype, device, free):
    """Prints what a step needs of a type of device ("cpu", "cuda") against its free bytes; returns the memory.Need."""
    parameters, macs = models.describe(args.model, num_classes, args.image_size, options)
    need = memory.of_run(
        args, options, num_classes, device=device, dtype=dtype, world=distributed.world_size()
    )
    precision = str(dtype).removeprefix("torch.") if dtype else "float32"
    print(
        f"{args.model}, {args.image_size} px, {num_classes} classes: {parameters:,} parameters, {macs / 1e9:.1f} GMACs an "
        f"image; {precision} on {device}"
    )
    parts = {
        "parameters": need.parameters,
        "gradients": need.gradients,
        f"{args.optimizer}'s state": need.optimizer,
        "moving average": need.average,
        f"weights in {precision}": need.copies,
        "the copy to be saved": need.snapshot,
    }
    parts = ", ".join(f"{name} {in_gb(size)}" for name, size in parts.items() if size)
    on_host = "" if device == "cpu" else f"; to save it, {in_gb(need.host)} on the host"
    print(
        f"GB: {parts}, together {in_gb(need.fixed)}; activations {in_gb(need.image)} an image{on_host}"
    )
    share, most = -(-args.batch_size // distributed.world_size()), need.largest(free)
    wanted = (
        args.micro_batch or min(share, max(1, most))
        if args.micro_batch != 0
        else -(-share // args.accumulate)
    )
    verdict = (
        "fits"
        if wanted <= most
        else f"does not fit, {most} at once would"
        if most
        else "does not fit"
    )
    times = -(-share // wanted)
    print(
        f"needs {in_gb(need.total(wanted))} GB for {wanted} image{'s' * (wanted > 1)} at once, "
        f"{times} time{'s' * (times > 1)} for a batch of {share}; {in_gb(free)} GB are free, of which a tenth is spared: "
        f"{verdict}"
    )
    return need


def in_gb(size):
    return f"{size / GB:.2f}" if size >= GB else f"{size / GB:.2g}"


def dry_run(args, origin, gpu_memory):
    """Prints what a step of the run needs, and what other arguments would make of it. Shapes are all that is built.

    Of several processes, the first one prints.
    """
    if not distributed.is_first():
        return 0
    options = models.parse_options(args.model_arg, args.model, args.image_size, args.drop_path)
    if gpu_memory:
        device, free = "cuda", gpu_memory * GB
        dtype = mixed_precision.amp_dtype("bf16" if args.amp == "auto" else args.amp, None)
    else:
        here = devices.select_device(args.device)
        device, free, dtype = (
            here.type,
            memory.available(here),
            mixed_precision.amp_dtype(args.amp, here),
        )
    classes = number_of_classes(args, origin)
    need = say_need(args, options, classes, dtype, device, free)
    print(
        f"\n{'to make it smaller':<40}{'GB besides images':>18}{'GB an image':>13}{'images at once':>16}"
    )
    for flags in ("", *SMALLER):
        changed, words = copy.copy(args), ["as asked"] * (not flags)
        for flag in flags.split():
            key, _, value = flag.partition("=")
            vars(changed)[key] = {"": True, "16": 16}.get(value, value)
            words.append(f"--{key.replace('_', '-')} {value}".strip())
        try:
            found = (
                need
                if not flags
                else memory.of_run(
                    changed,
                    options,
                    classes,
                    device=device,
                    dtype=dtype,
                    world=distributed.world_size(),
                )
            )
        except UserError:  # the run itself has been counted by now
            print(f"{' '.join(words):<40}  not with this model")
            continue
        print(
            f"{' '.join(words):<40}{found.fixed / GB:>18.2f}{found.image / GB:>13.3f}{found.largest(free):>16}"
        )
    return 0


def number_of_classes(args, origin):
    """Of the data set, where one is named; else those that the model is listed with."""
    if origin["dataset"] == "default":
        return models.MODELS[args.model].classes if args.model in models.MODELS else 1000
    if args.dataset == "folder":
        places = [place for place in (Path(args.data_dir) / "train").glob("*") if place.is_dir()]
        if not places:
            raise UserError(f"--data-dir {args.data_dir} has no train/<class>/", status=2)
        return len(places)
    return {"cifar10": 10, "cifar100": 100, "shapes": 10}[args.dataset]


def smoke(parser, argv, main, own):
    """Trains a small copy of the model for an epoch, goes on for another one, and reads what was saved.

    main: of the script, taking its words; own: arguments that are of this call, not of the run.
    """
    given = command_line.explicit(parser, argv)
    for key in ("pretrained", "weights", "resume", "config", "freeze_backbone"):
        if key in given:
            raise UserError(
                f"--smoke tries a small copy with fresh weights: leave --{key.replace('_', '-')} out",
                status=2,
            )
    if given.get("dry_run"):
        raise UserError("--smoke trains and --dry-run doesn't: give one of them", status=2)
    if distributed.in_company():
        raise UserError("--smoke is for one process", status=2)
    name, options, size = models.canonical(given.pop("model", parser.get_default("model"))), {}, 32
    if models.is_published(name):
        published = (
            name.removeprefix("timm/")
            if name.startswith("timm/")
            else models.MODELS[name].fixed["name"]
        )
        options, size = smallest(published)
        name = f"timm/{published}"
        given.setdefault("layer_decay", 0.85)
    pairs = [f"{key}={value}" for key, value in options.items()] + given.pop("model_arg", [])
    given.setdefault(
        "output_dir",
        str(run_directory.new_path("runs", "shapes", name, "smoke", given.get("seed", 0))),
    )
    chosen = SMOKE | dict(model=name, image_size=size, model_arg=pairs) | given
    words = []
    for key, value in chosen.items():
        if key not in own and value is not False:
            for each in value if isinstance(value, list) else [value]:
                words += [
                    f"--{key.replace('_', '-')}",
                    *([] if each is True else ["auto" if each is None else str(each)]),
                ]
    print(
        f"smoke: {name} with {', '.join(pairs) or 'all its layers'}, {chosen['image_size']} px, {chosen['output_dir']}"
    )
    if status := main(words):
        return status
    again = ["--resume", chosen["output_dir"], "--epochs", str(chosen["epochs"] + 1)]
    if status := main(again + (["--device", given["device"]] if "device" in given else [])):
        return status
    model, card = load_checkpoint(Path(chosen["output_dir"]) / "best.pt")
    print(
        f"smoke: trained, saved, evaluated, resumed; best.pt holds {sum(p.numel() for p in model.parameters()):,} parameters "
        f"of {card['model']}"
    )
    return 0
