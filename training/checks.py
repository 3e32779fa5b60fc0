"""What can be refused before any data is loaded or any model is built."""

import torch

import data
import models
from common.errors import UserError, first_line
from common.scopes import flag, words
from datasets.archives import ARCHIVES
from models import lora
from models.weights import weights_file
from training import distributed, linear_probe, progressive, run_directory
from training.fitting import number_of_parts, requested_micro_batch
from training.initial_model import model_options
from training.optimizers import optimizer_defaults, param_groups
from training.schedules import WITH_FINAL_RATE


def check_arguments(args, saved, ranks):
    """Raises UserError for arguments that contradict each other or the model."""
    smallest = _check_batches(args, ranks)
    _check_transfer(args, saved)
    _check_optimizer(args)
    if saved is None:
        _check_augmentation(args)
        _check_data_options(args)
        _check_repeats(args)
    if args.cutout >= args.image_size:
        size = args.image_size
        raise UserError(f"--cutout {args.cutout} must be less than the image size, {size} px", 2)
    if args.patience and not args.val_size:
        raise UserError(f"--patience {args.patience} needs held-out images: add --val-size", 2)
    warmup = args.warmup_epochs
    if warmup is not None and warmup >= args.epochs and args.schedule != "constant":
        epochs = args.epochs
        raise UserError(f"--warmup-epochs {warmup:g} is as long as the run ({epochs} epochs)", 2)
    is_explicit = args.origin.get("final_lr") == "command line"
    if is_explicit and args.final_lr and args.schedule not in WITH_FINAL_RATE:
        known = ", ".join(WITH_FINAL_RATE)
        raise UserError(f"--final-lr needs --schedule {known}, not {args.schedule}", 2)
    if args.output_dir and saved is None and ranks.is_main:
        run_directory.refuse_if_taken(args.output_dir)
    # Raises UserError where the model can't be built for this image size.
    models.describe(args.model, 10, args.image_size, model_options(args))
    _check_model_has(args)
    _check_progressive(args)
    has_others = args.sync_bn and ranks.world_size > 1
    if smallest == 1 and not has_others and not args.freeze_backbone:
        _check_single_images(args)


def _check_batches(args, ranks):
    """Returns the fewest images of a process that a step trains on at once."""
    shares = data.rank_shares(args.batch_size, ranks.world_size)
    smallest, whose = min(shares), f"of --batch-size {args.batch_size}"
    if ranks.world_size > 1:
        whose += " that a process has"
        if args.batch_size < 2 * ranks.world_size:
            few = f"--batch-size {args.batch_size} is too small for {ranks.world_size} processes"
            raise UserError(f"{few}: each needs two images", 2)
    if args.batch_size % args.repeated_augment:
        repeats = f"--repeated-augment {args.repeated_augment}"
        raise UserError(f"--batch-size {args.batch_size} is not a multiple of {repeats}", 2)
    micro_batch = requested_micro_batch(args) if hasattr(args, "micro_batch") else 0
    if micro_batch == 0 or args.freeze_backbone:
        parts = args.accumulate or 1  # auto fits
    else:  # a resumed run has the --accumulate that followed for its processes
        parts = number_of_parts(shares, micro_batch) if micro_batch else 1
    if parts > smallest:
        raise UserError(f"--accumulate {parts} is more than the {smallest} images {whose}", 2)
    return smallest // parts


def _check_model_has(args):
    """Raises UserError for options that not every model has, before images are downloaded."""
    if not (args.grad_checkpointing or args.layer_decay != 1 or args.freeze_backbone):
        return
    with torch.device("meta"):
        model = models.create_model(args.model, 10, **model_options(args))
    if args.grad_checkpointing:
        models.checkpoint_gradients(model, args.model)
    if args.layer_decay != 1:
        param_groups(model, args.weight_decay, args.layer_decay)
    if args.freeze_backbone:
        linear_probe.Probe(model)


def _check_single_images(args):
    """Raises UserError for batch norm over a single pixel: a part of one image on a 1x1 map."""
    sizes = [size for size, _ in progressive.parse_stages(args.progressive)]
    size = min([args.image_size, *sizes])
    with torch.device("meta"):
        model = models.create_model(args.model, 10, **model_options(args)).train()
        try:
            model(torch.empty(1, 3, size, size))
        except ValueError as error:
            raise UserError(
                f"{args.model} can't train on one image at a time ({first_line(error)}): choose a "
                "larger --batch-size or fewer parts (--accumulate, --micro-batch)",
                2,
            ) from error


def _check_transfer(args, saved):
    if args.weights and saved is None:
        weights_file(args.weights)
    if args.pretrained:
        models.require_published(args.model)
    if args.pretrained and args.weights and saved is None:
        raise UserError("--pretrained and --weights exclude each other: give one of them", 2)
    if not args.freeze_backbone:
        return
    if not (args.pretrained or args.weights):
        raise UserError(
            "--freeze-backbone needs trained weights: --pretrained or --weights FILE", 2
        )
    mixing = args.mixup or args.cutmix or args.cutout or args.random_erasing
    if args.augment != "none" or mixing:
        raise UserError(
            "--freeze-backbone computes features once, without augmentation: add --augment none", 2
        )
    if args.tta != "none":
        raise UserError(f"--tta {args.tta} can't be used with --freeze-backbone", 2)
    if args.repeated_augment > 1:
        raise UserError("--repeated-augment can't be used with --freeze-backbone", 2)
    if args.layer_decay != 1:
        raise UserError("--layer-decay can't be used with --freeze-backbone", 2)


def _check_optimizer(args):
    """Refuses what an optimizer doesn't have only where it was asked for."""
    explicit = {name for name, source in args.origin.items() if source == "command line"}
    if not args.nesterov:
        explicit.add("nesterov")
    missing = {"momentum", "nesterov"} - set(optimizer_defaults(args.optimizer))
    refused = words({name: getattr(args, name) for name in sorted(explicit & missing)})
    if refused:
        raise UserError(f"{refused[0]} can't be chosen with --optimizer {args.optimizer}", 2)


def _check_augmentation(args):
    """Refuses settings of the command line that would have no effect."""
    transforms, mixing = args.augment.split(","), args.mixup or args.cutmix
    for name, used, needed in (
        ("crop_padding", "crop" in transforms, "crop in --augment"),
        ("crop_pixels", "crop" in transforms, "crop in --augment"),
        ("jitter", "color_jitter" in transforms, "color_jitter in --augment"),
        ("mix_per", mixing, "--mixup or --cutmix above 0"),
        ("mix_prob", mixing, "--mixup or --cutmix above 0"),
    ):
        if args.origin[name] == "command line" and not used:
            option = " ".join(words({name: getattr(args, name)}))
            raise UserError(f"{option} has no effect without {needed}", 2)


def _check_repeats(args):
    """Refuses copies of an image in a batch that would be equal, or mirrored alike."""
    if args.repeated_augment == 1:
        return
    repeats = f"--repeated-augment {args.repeated_augment}"
    if "alternating_flip" in args.augment.split(","):
        raise UserError(f"{repeats} can't be used with alternating_flip in --augment", 2)
    others = args.mixup or args.cutmix or args.cutout or args.random_erasing
    if args.augment == "none" and not others:
        raise UserError(f"{repeats} would repeat equal images: it needs an augmentation", 2)


def _check_data_options(args):
    """Refuses what the dataset doesn't use."""
    for name, used in (
        ("data_url", args.dataset in ARCHIVES),
        ("skip_bad_images", args.dataset == "folder"),
    ):
        if getattr(args, name) and args.origin.get(name) == "command line" and not used:
            raise UserError(f"{flag(name)} has no effect with --dataset {args.dataset}", 2)


def _check_progressive(args):
    sizes = [size for size, _ in progressive.parse_stages(args.progressive)]
    if not sizes:
        return
    given = f"--progressive {args.progressive}"
    if args.freeze_backbone:
        raise UserError(f"{given}: --freeze-backbone computes features once, at full size", 2)
    if sizes[-1] != args.image_size:
        raise UserError(f"{given} must end at the image size, {args.image_size} px", 2)
    for size in sizes[:-1]:
        models.describe(args.model, 10, size, model_options(args))


def check_fitting(args, saved):
    """Raises UserError for the options of train_sota.py that don't go together."""
    both_explicit = args.origin["accumulate"] == args.origin["micro_batch"] == "command line"
    if args.micro_batch != 0 and both_explicit:
        raise UserError("--accumulate and --micro-batch both split the batch: give one of them", 2)
    if args.lora_rank and args.freeze_backbone:
        raise UserError("--lora-rank and --freeze-backbone exclude each other: give one of them", 2)
    options = model_options(args)
    if args.lora_rank:
        lora.require_peft()
        lora.linear_layers(args.model, 10, args.image_size, options)
    if not args.fsdp:
        return
    if args.optimizer in ("muon", "muon_sgd") or args.optimizer.startswith("timm/"):
        raise UserError(f"--fsdp can't be used with --optimizer {args.optimizer}", 2)
    if args.freeze_backbone or args.amp == "fp16":
        raise UserError("--fsdp can't be used with --freeze-backbone or --amp fp16", 2)
    if args.lora_rank or args.ema_device != "same":
        raise UserError("--fsdp can't be used with --lora-rank or --ema-device cpu", 2)
    if distributed.world_size() == 1 and saved is None:
        raise UserError("--fsdp needs several processes: use torchrun --nproc-per-node=N", 2)
    with torch.device("meta"):
        distributed.require_shardable(models.create_model(args.model, 10, **options))
