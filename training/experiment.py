"""From resolved arguments to a finished run: what train.py, train_vit.py and train_sota.py have in common.

    args, origin, state = arguments(parser, argv)
    return run(args, origin, state)

The order matters: everything that can be refused is refused before the run's directory is made.
"""

import contextlib
import copy
import math
import os
import signal
import sys
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

import data
import models
from common import command_line
from common.errors import UserError
from common.text import printable
from datasets.augment import Pipeline
from models import lora
from models.weights import load_weights, weights_file
from training import (
    arguments,
    devices,
    distributed,
    environment,
    linear_probe,
    loop,
    memory,
    mixed_precision,
    moving_average,
    optimizers,
    resume,
    run_directory,
    schedules,
    sync_batch_norm,
    tensorboard,
)
from training.terminal import Reporter, StopSignal

EVAL_BATCH = 500  # images of each rank


def resolve_arguments(parser, argv, published=None):
    """(arguments, {argument: where its value came from}, contents of last.pt or None) of a command line.

    published: the default model with --pretrained, where it is another than without. Raises UserError; a --resume that
    contradicts the run is refused with the arguments named.
    """
    given = command_line.explicit(parser, argv)
    if "resume_previous" in given and "resume" not in given:
        raise UserError("--resume-previous goes with --resume RUN", 2)
    if "resume" in given:
        return resume.arguments(parser, given)
    config, config_origin = (
        run_directory.load_config(given["config"]) if "config" in given else ({}, {})
    )
    if published and given.get("pretrained", config.get("pretrained")):
        parser.set_defaults(model=published)
    for each in (given, config):
        if isinstance(each.get("model"), str):
            each["model"] = models.canonical(each["model"])
    args, origin = arguments.resolve(
        parser, given, config, recipe, optimizers.OPTIMIZERS, config_origin
    )
    return args, origin, None


def recipe(chosen):
    """What goes with a model, or with starting from weights of it."""
    transfer = bool(chosen.get("pretrained") or chosen.get("weights"))
    return models.recipe(chosen["model"], transfer, bool(chosen.get("freeze_backbone")))


@dataclass
class Training:
    """Everything that changes while a run trains, and what is needed to use its weights (`card`) or to go on (`facts`)."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: moving_average.Ema | None
    card: dict
    facts: dict
    confusion: tensorboard.Confusion  # of the evaluation that the test accuracy is of
    progress: loop.Progress = field(default_factory=loop.Progress)
    best: dict = field(default_factory=lambda: {"epoch": 0, "value": -1.0})
    history: list = field(
        default_factory=list
    )  # of `reported`, at each evaluation: [seconds of training, top-1 %, top-5 %]

    @property
    def reported(self):
        """The model whose accuracy is the run's: the moving average, where there is one."""
        return self.ema.model if self.ema else self.model

    def at_hand(self):
        """A block in which `reported` lies on the device, to be evaluated."""
        return self.ema.at_hand() if self.ema else contextlib.nullcontext(self.model)

    def best_contents(self, curve):
        """A function that makes the contents of best.pt of those of the last.pt of the same epoch, the best one so far."""
        metric = {"name": _headline(self, curve), "selected_on": curve, **self.best}

        def contents(last):
            weights = last["ema"]["average"] if last["ema"] else last["state_dict"]
            return {"card": last["card"], "metric": metric, "state_dict": lora.merged(weights)}

        return contents

    def state_dict(self, args, origin):
        """Contents of last.pt; of a sharded model, all ranks have to ask for it together."""
        training = {
            "arguments": vars(args),
            "origin": origin,
            "facts": self.facts,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": self.progress.state_dict(),
            "best": self.best,
            "history": self.history,
        }
        average = self.ema.state_dict() if self.ema else None
        return distributed.whole(
            {
                "card": self.card,
                "state_dict": self.model.state_dict(),
                "ema": average,
                "training": training,
            }
        )

    @resume.refusing_misfits
    def load_state_dict(self, state):
        """Raises UserError where the state is of another form."""
        training = state["training"]
        optimizers.load_optimizer(
            self.optimizer, distributed.optimizer_parts(training["optimizer"], self.optimizer)
        )
        if training["scaler"]:
            self.scaler.load_state_dict(training["scaler"])
        if self.ema:
            average = distributed.parts(state["ema"]["average"], self.ema.model.state_dict())
            self.ema.load_state_dict(state["ema"] | {"average": average})
        self.progress.load_state_dict(training["progress"])
        self.best.update(training["best"])
        self.history = training.get(
            "history", []
        )  # see resume.open_directory for files that lack it


def run(args, origin, state, before=None):
    """Trains and tests as `args` say, from `state`, the contents of a last.pt, or from the start; returns the exit status.

    In a process that torchrun started it is one of several at the same run (see ranks). before: is called with args, options,
    number of classes, autocast's type and ranks, before the model is built.
    """
    with (
        distributed.join(devices.select_device(args.device), args.batch_size) as company,
        memory.explained(args, company.world),
    ):
        return _run(args, origin, state, company, before)


def _run(args, origin, state, company, before):
    if state and (figures := resume.finished(args, state)):
        print(
            f"{args.output_dir} is finished already: test accuracy {figures['test_acc']:.2f} % ({figures['reported']})"
        )
        return 0
    options = models.parse_options(args.model_arg, args.model, args.image_size, args.drop_path)
    device = company.device
    auto_fp32 = args.amp == "auto" and models.prefers_fp32(args.model, device)
    dtype = None if auto_fp32 else mixed_precision.amp_dtype(args.amp, device)
    _check_before_work(args, origin, state, options, company)
    devices.make_deterministic(args.deterministic)

    with company.one_first():
        split = data.load(
            args.dataset,
            args.data_dir,
            data_url=args.data_url,
            image_size=args.image_size,
            val_size=args.val_size,
            limit_train=args.limit_train,
            limit_test=args.limit_test,
            skip_bad_images=args.skip_bad_images,
        )
    for note in split.notes if company.first else ():
        print(printable(f"{split.name}: {note}"), file=sys.stderr)  # it may name a file
    facts = {"train_images": len(split.train), "classes": list(split.classes)}
    if state:
        resume.check_data(facts, state)
    if before:
        before(args, options, split.num_classes, dtype, company)
    model, mean, std = _build(args, options, split, state)
    if args.sync_bn and company.world > 1:
        model = sync_batch_norm.sync_batch_norm(model, device)
    model, average = models.choose_attention(model, device, dtype), None
    if args.fsdp and company.world > 1:
        average = distributed.shard(copy.deepcopy(model), company) if args.ema_decay != 0 else None
        model, company = distributed.shard(model, company), replace(company, sharded=True)
    else:
        model = model.to(device, memory_format=torch.channels_last)
    beside = sum(
        data.resident_bytes(part, device, args.resident)
        for part in (split.train, split.val or split.test)
    )
    at_once = memory.cut_batches(
        args, origin, model, options, split.num_classes, dtype, company, beside
    )
    # Four parts of training, as one process would cut it, because nothing is kept for a backward pass.
    at_once = at_once or min(EVAL_BATCH, 4 * max(1, args.batch_size // args.accumulate))
    evaluated = at_once * company.world
    plain = Pipeline(mean, std, args.image_size)
    train_pipeline, curve_pipeline = _train_pipeline(args, mean, std, split.num_classes), plain
    curve = "val" if split.val else "test"
    train_examples, curve_examples = split.train, split.val or split.test
    if args.freeze_backbone:
        model, train_pipeline, curve_pipeline = (
            linear_probe.Probe(model),
            linear_probe.AsTheyAre(),
            linear_probe.AsTheyAre(),
        )
        train_examples, curve_examples = (
            linear_probe.features(
                model,
                data.Batches(
                    examples, at_once, plain, device=device, shuffle=False, resident=args.resident
                ),
                dtype,
            )
            for examples in (train_examples, curve_examples)
        )
    place = dict(device=device, rank=company.rank, world=company.world)
    resident = "device" if args.freeze_backbone else args.resident  # features are there already
    batches = data.Batches(
        train_examples,
        args.batch_size,
        train_pipeline,
        seed=args.seed,
        repeats=args.repeated_augment,
        resident=resident,
        **place,
    )
    curve_batches = data.Batches(
        curve_examples, evaluated, curve_pipeline, shuffle=False, resident=resident, **place
    )

    _resolve_auto(args, origin, args.epochs, args.epochs * len(batches))
    if state:
        resume.check_epochs(args, origin, state, len(batches))
    lr_at = schedules.learning_rate(
        args.schedule, args.lr, args.epochs * len(batches), round(args.warmup_epochs * len(batches))
    )
    training = Training(
        model=model,
        optimizer=optimizers.create_optimizer(
            args.optimizer,
            _groups(args, model, state),
            args.lr,
            args.momentum,
            fused=dtype != torch.float16 and not (company.sharded and device.type == "cpu"),
        ),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        ema=moving_average.Ema(model, args.ema_decay, average, host=args.ema_device == "cpu")
        if args.ema_decay
        else None,
        card={
            "model": args.model,
            "options": options,
            "num_classes": split.num_classes,
            "classes": list(split.classes),
            "image_size": args.image_size,
            "mean": list(mean),
            "std": list(std),
            "dataset": split.name,
            "source": args.dataset,
            "seed": args.seed,
        },
        facts=facts,
        confusion=tensorboard.Confusion(split.num_classes, device),
    )
    if state:
        training.load_state_dict(state)
    if args.compile:
        for each in {id(m): m for m in (training.model, training.reported)}.values():
            each.compile()  # in place: the keys of the state dict stay as they are

    parameters, macs = models.describe(args.model, split.num_classes, args.image_size, options)
    precision = str(dtype or torch.float32).removeprefix("torch.")
    devices.reset_peak_memory(device)
    with StopSignal(launched=distributed.launched()) as stop:
        directory = run_directory.NullRunDir()
        if company.first:
            directory = _open_directory(args, origin, split, device, precision, state, training)
        report = Reporter(args, batches)
        report.start(split, parameters, precision, company, training.progress, directory)
        try:
            if not state:
                directory.save_last(
                    training.state_dict(args, origin)
                )  # from here on there is always one to go on from
                if company.first and not args.freeze_backbone:
                    _show_batch(directory, batches, mean, std)
            _fit(
                args,
                origin,
                training,
                batches,
                curve_batches,
                curve,
                lr_at,
                dtype,
                directory,
                report,
                stop,
                company,
            )
            directory.wait()
            if split.val:
                test_batches = data.Batches(
                    split.test, evaluated, plain, shuffle=False, resident=args.resident, **place
                )
                tested = _test_chosen(training, directory, test_batches, dtype, stop, company)
            company.sum(training.confusion.counts)
            if not company.first:
                return 0
            figures = _final_figures(training, tested if split.val else None)
            directory.write_summary(
                "finished",
                **figures,
                **_standing(training, curve),
                parameters=parameters,
                gmacs=macs / 1e9,
                **_seconds_to(training.history),
                peak_memory_mb=devices.peak_memory_mb(device),
            )
        except loop.Interrupted:
            directory.save_last(training.state_dict(args, origin))
            directory.write_summary("interrupted", signal=stop.number, **_standing(training, curve))
            company.wait()  # torchrun ends the other ranks, the one that saves too, when one has ended
            report.close()
            epoch = min(training.progress.epoch + 1, args.epochs)
            print(f"interrupted in epoch {epoch}; go on with --resume {directory.path}")
            return 128 + (stop.number or signal.SIGTERM)  # where another rank was asked
        except BaseException as error:
            with contextlib.suppress(
                OSError, UserError
            ):  # the error that ended the training is the one to report
                directory.wait()
            with contextlib.suppress(OSError):
                directory.write_summary(
                    "failed",
                    reason=str(error) or type(error).__name__,
                    **_standing(training, curve),
                )
            raise
        else:  # the run is finished: what goes wrong with its last pictures doesn't make it a failed one
            tensorboard.write_end(
                directory, args, split.classes, training.confusion.counts, training.progress.step
            )
        finally:
            report.close()
            directory.close()
        print(
            f"test accuracy {figures['test_acc']:.2f} % ({figures['reported']})  {directory.path}"
        )
        return 0


@resume.refusing_misfits
def _groups(args, model, state):
    """The parameter groups of the run's optimizer."""
    groups = optimizers.param_groups(model, args.weight_decay, args.layer_decay)
    if args.optimizer != "muon":
        return groups
    return optimizers.muon_groups(groups, model, state["training"]["optimizer"] if state else None)


@resume.refusing_misfits
def _build_from(state, model):
    model.load_state_dict(state["state_dict"])
    return model, state["card"]["mean"], state["card"]["std"]


def _build(args, options, split, state):
    """(model on the CPU, mean, std): fresh or with the weights that a run starts from, and the statistics for its pictures.

    The statistics are those that the weights were made with, where they are known, else the training pictures' own.
    """
    devices.seed_model(args.seed, torch.device("cpu"), 0, "init")
    model = models.create_model(
        args.model, split.num_classes, pretrained=args.pretrained and not state, **options
    )
    if args.grad_checkpointing:
        models.checkpoint_gradients(model, args.model)
    layers = (
        lora.linear_layers(args.model, split.num_classes, args.image_size, options)
        if args.lora_rank
        else None
    )
    if state:
        return _build_from(
            state, lora.add_adapters(model, args.lora_rank, layers) if layers else model
        )
    card = None
    if args.weights:
        line, card = load_weights(model, args.weights)
        print(printable(line))  # it names tensors of the file
    elif args.pretrained:
        print(
            f"weights: {args.model} as published, a new classifier for {split.num_classes} classes"
        )
    if layers:
        devices.seed_model(args.seed, torch.device("cpu"), 0, "adapters")
        lora.add_adapters(model, args.lora_rank, layers)
    if card:
        return model, card["mean"], card["std"]
    published = (args.weights or args.pretrained) and models.is_published(args.model)
    return model, *(models.normalization(model) if published else (split.mean, split.std))


def _check_before_work(args, origin, state, options, company):
    """Raises UserError for what can be refused without data or model."""
    smallest = (
        2 * (args.batch_size // 2 // company.world) if company.world > 1 else args.batch_size
    )  # see data.rank_rows
    if args.accumulate > smallest:
        of = f"of --batch-size {args.batch_size}{' that a process has' * (company.world > 1)}"
        raise UserError(
            f"--accumulate {args.accumulate} is more than the {smallest} images {of}", status=2
        )
    if (
        args.micro_batch != 0
        and origin.get("accumulate") == origin.get("micro_batch") == "command line"
    ):
        raise UserError(
            "--accumulate and --micro-batch say the same in two ways: give one of them", 2
        )
    if args.cutout >= args.image_size:
        raise UserError(
            f"--cutout {args.cutout} leaves nothing of pictures of {args.image_size} px", status=2
        )
    if (
        args.warmup_epochs is not None
        and args.warmup_epochs >= args.epochs
        and args.schedule != "constant"
    ):
        raise UserError(
            f"--warmup-epochs {args.warmup_epochs:g} is as long as the run ({args.epochs} epochs)",
            status=2,
        )
    if args.weights and state is None:
        weights_file(args.weights)
    if args.pretrained:
        models.require_published(args.model)
    if args.batch_size % args.repeated_augment:
        raise UserError(
            f"--batch-size {args.batch_size} is not a multiple of --repeated-augment {args.repeated_augment}",
            2,
        )
    if args.fsdp and (args.freeze_backbone or args.optimizer == "muon" or args.amp == "fp16"):
        raise UserError("--fsdp goes without --freeze-backbone, --optimizer muon and --amp fp16", 2)
    if args.fsdp and (args.lora_rank or args.ema_device != "same"):
        raise UserError("--fsdp goes without --lora-rank and --ema-device cpu", 2)
    if args.fsdp and "RANK" not in os.environ and state is None:
        raise UserError(
            "--fsdp divides a model among processes: start them with torchrun --nproc-per-node=N", 2
        )
    if args.lora_rank and args.freeze_backbone:
        raise UserError("--lora-rank trains what --freeze-backbone keeps: give one of them", 2)
    if args.lora_rank:
        lora.require_peft()
    if args.freeze_backbone and not (args.pretrained or args.weights):
        raise UserError(
            "--freeze-backbone needs weights that are worth keeping: --pretrained or --weights FILE",
            2,
        )
    if args.freeze_backbone and (
        args.augment != "none" or args.mixup or args.cutmix or args.cutout or args.random_erasing
    ):
        raise UserError(
            "--freeze-backbone computes features once, of pictures as they are: give --augment none with it",
            2,
        )
    if args.output_dir and state is None and company.first:
        run_directory.refuse_if_taken(args.output_dir)
    models.describe(args.model, 10, args.image_size, options)


def _train_pipeline(args, mean, std, num_classes):
    transforms = () if args.augment == "none" else args.augment.split(",")
    return Pipeline(
        mean,
        std,
        args.image_size,
        transforms,
        num_classes=num_classes,
        crop_mode=args.crop_padding,
        cutout_size=args.cutout,
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        mix_probability=args.mix_prob,
        erasing=args.random_erasing,
    )


def _headline(training, curve):
    """The column of metrics.csv that best.pt is chosen by and that is reported."""
    return f"{'ema_' if training.ema else ''}{curve}_acc"


def _fit(
    args,
    origin,
    training,
    batches,
    curve_batches,
    curve,
    lr_at,
    dtype,
    directory,
    report,
    stop,
    company,
):
    """engine.fit with what follows each epoch: evaluation, a row of metrics.csv, best.pt, last.pt, a line."""
    headline = _headline(training, curve)
    measured = {"": lambda: contextlib.nullcontext(training.model)} | (
        {"ema_": training.at_hand} if training.ema else {}
    )

    def measure(epoch):
        """The curve's figures; None where --eval-every leaves an epoch out."""
        wanted = epoch % args.eval_every == 0 or epoch == args.epochs
        figures = {}
        for prefix, at_hand in measured.items():
            found, final = {}, f"{prefix}test_acc" == headline and epoch == args.epochs
            if wanted:
                with at_hand() as model:
                    company.spread(
                        model.buffers()
                    )  # the statistics of batch norms were each rank's own
                    see = training.confusion if final else None
                    found = loop.evaluate(
                        model, curve_batches, dtype=dtype, stop=stop, ranks=company, see=see
                    )
            if wanted and not math.isfinite(found["loss"]):
                step = training.progress.step
                raise loop.NonFiniteLoss(
                    f"the {curve} loss after step {step} (epoch {epoch}) is {found['loss']}, with "
                    f"learning rate {lr_at(step - 1):.4g}: stopped, and last.pt is the last good one; "
                    f"try a smaller --lr"
                )
            figures |= {
                f"{prefix}{curve}_{name}": found.get(name) for name in ("loss", "acc", "top5")
            }
        return figures

    def after_epoch(figures):
        figures["peak_memory_mb"] = devices.peak_memory_mb(next(training.model.parameters()).device)
        best = None
        if figures[headline] is not None:
            top5 = figures[headline.replace("acc", "top5")]
            training.history.append([training.progress.total_seconds, figures[headline], top5])
            if figures[headline] > training.best["value"]:
                training.best.update(epoch=figures["epoch"], value=figures[headline])
                best = training.best_contents(curve)
        directory.end_epoch(figures, training.state_dict(args, origin), best)
        report.epoch(figures, curve)

    loop.fit(
        company.parallel(training.model),
        batches,
        optimizer=training.optimizer,
        lr_at=lr_at,
        epochs=args.epochs,
        progress=training.progress,
        loss_fn=lambda logits, y: F.cross_entropy(logits, y, label_smoothing=args.label_smoothing),
        dtype=dtype,
        scaler=training.scaler,
        accumulate=args.accumulate,
        clip_grad=args.clip_grad,
        seed=args.seed,
        after_step=training.ema.update if training.ema else None,
        measure=measure,
        after_epoch=after_epoch,
        stop=stop,
        show=report.step if company.first else None,
        ranks=company,
    )


def _test_chosen(training, directory, batches, dtype, stop, company):
    """The figures of best.pt on the test set, which is read here only."""
    with training.at_hand() as model:
        trained = {name: value.clone() for name, value in model.state_dict().items()}
        chosen = [
            resume.read_best(directory, (training.best["epoch"],))["state_dict"]
            if company.first
            else None
        ]
        if company.world > 1:
            torch.distributed.broadcast_object_list(chosen)
        try:
            model.load_state_dict(distributed.parts(lora.adapted(chosen[0], trained), trained))
            return loop.evaluate(
                model, batches, dtype=dtype, stop=stop, ranks=company, see=training.confusion
            )
        finally:  # what is trained stays as it is, should this be interrupted
            model.load_state_dict(trained)


def _final_figures(training, tested):
    """The headline: the test figures of the weights chosen on held-out images or, without these, of the last epoch's."""
    if not training.history:
        raise UserError(
            "metrics.csv doesn't have the accuracy of the last epoch"
        )  # another version or program began it
    _, top1, top5 = training.history[-1]
    return {
        "test_acc": tested["acc"] if tested else top1,
        "test_top5": tested["top5"] if tested else top5,
        "reported": "best epoch on held-out images" if tested else "last epoch",
        "weights": "moving average" if training.ema else "as trained",
    }


def _resolve_auto(args, origin, epochs, steps):
    """Puts numbers for "auto" into the arguments, so that config.json and last.pt hold what was used."""
    for name, value in schedules.auto_values(args.schedule, epochs, steps).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
            origin[name] = "auto"


def _open_directory(args, origin, split, device, precision, state, training):
    """The run's directory, with config.json as the run is now."""
    config = {
        "arguments": vars(args),
        "from": origin,
        "precision": precision,
        **environment.environment(device),
    }
    if state:
        return resume.open_directory(args, config, state, training, "val" if split.val else "test")
    path = args.output_dir or run_directory.new_path(
        "runs", split.name, args.model, args.tag, args.seed
    )
    return run_directory.RunDir.create(path, config)


def _show_batch(directory, batches, mean, std):
    """A grid of the first augmented pictures, for TensorBoard."""
    inputs, _ = next(batches.epoch(0))
    scale, shift = (torch.tensor(v, device=inputs.device).view(3, 1, 1) for v in (std, mean))
    pictures = (inputs[:64] * scale + shift).clamp(0, 1).cpu()
    side = int(len(pictures) ** 0.5)
    rows = [torch.cat(list(pictures[i * side : (i + 1) * side]), dim=2) for i in range(side)]
    directory.events.add_image("augmented training images", torch.cat(rows, dim=1))


def _standing(training, curve):
    progress, best = training.progress, training.best
    return {
        "epochs": progress.epoch,
        "steps": progress.step,
        "best_epoch": best["epoch"] or None,
        f"best_{curve}_acc": best["value"] if best["epoch"] else None,
        "best_selected_on": curve,
        "train_seconds": progress.total_seconds + progress.seconds,
    }


def _seconds_to(history):
    """Training seconds to 90 and 95 % of the final accuracy."""
    final = history[-1][1]
    return {
        f"seconds_to_{part}": next(
            seconds for seconds, top1, _ in history if top1 >= part / 100 * final
        )
        for part in (90, 95)
    }
