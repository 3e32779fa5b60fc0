"""Time to accuracy: trains a model's recipe several times to the end, each as a process of its own.

Everything is charged: the start of Python, imports, loading the data, initialization, augmentation
and saving. Evaluations are listed separately. The download of the data and the decoding of a folder
come before the first run. A run that was interrupted resumes, and is charged for each of its
processes until its last save.
"""

import importlib
import statistics
from collections import Counter
from pathlib import Path

import torch

import models
from analysis import formats, metrics, replicates, tables
from bench import measure
from common import checkpoint, files
from common.errors import UserError
from common.scopes import flag
from sweeps import launch, plans
from training import arguments, devices, environment, optimizers
from training.checks import check_arguments
from training.distributed import Ranks
from training.progressive import size_schedule

TARGETS = (90, 92, 94, 95, 96)  # percent
TARGETS_100 = (60, 65, 70, 75)  # from 50 classes on
# Epochs of the published runs (arXiv 2404.00498 and its repository) that --bare compares with.
PUBLISHED_EPOCHS = {"airbench94": 8, "airbench95": 15, "airbench96": 40, "airbench_c100": 10}
# Arguments of a training script that are decided here, or that leave no training to measure.
NOT_HERE = (
    *("model", "seed", "output_dir", "resume", "resume_previous", "list_models"),
    *("freeze_backbone", "dry_run", "gpu_memory", "smoke", "doctor"),
)


def main(args):
    """Trains what is not finished yet, prints the results; returns the exit status."""
    if args.json and not Path(args.json).resolve().parent.is_dir():
        raise UserError(f"--json {args.json}: there is no such directory", 2)
    runs = plan(args)
    root, todo = runs[0].path.parent, [run for run in runs if run.state != "finished"]
    with plans.lock(root):
        failed, stopped = train(runs, todo)
        finished = [run for run in runs if run.finished]
        if stopped:
            done = f"{len(finished)} of {len(runs)} runs finished"
            print(f"interrupted with {done}; the same command resumes")
            return 128 + stopped
        if finished:
            report = measured(finished, args)
            print_report(report)
            if args.json:
                files.write_json(args.json, report)
    return 1 if failed else 0


def plan(args):
    """A plans.Run for each seed. Raises UserError."""
    name = models.canonical(args.model)
    script = script_of(name)
    parser = importlib.import_module(script).build_parser()
    given = arguments.parse(parser, args.training)
    for key in NOT_HERE:
        if key in given:
            raise UserError(f"{flag(key)} can't be given to the runs of time-to: leave it out", 2)
    given["model"] = name
    resolved, _ = arguments.resolve(parser, given=dict(given))
    check_arguments(resolved, None, Ranks(devices.select_device(resolved.device)))
    label = name.replace("/", "_")
    root = Path(args.output_dir or f"runs/time-to/{resolved.dataset}-{label}")
    return [
        plans.make_run(name, root / f"{label}-s{seed}", script, given | {"seed": seed}, parser)
        for seed in range(args.runs)
    ]


def script_of(name):
    """The training script whose recipe suits a model."""
    if name in models.MODELS and models.MODELS[name].large:
        return "train_sota"
    return "train_vit" if "vit" in name else "train"


def train(runs, todo):
    """Executes the runs `todo`, one after another. Returns ({failed run: reason}, signal or 0)."""
    if not todo:
        return {}, 0
    plans.prepare(todo)
    slots = launch.find_slots(todo[0].args.device, jobs=1)
    progress = launch.Progress(todo, len(runs), 1, estimate=True)
    return launch.execute(launch.in_order(todo), launch.start_here, slots, progress.report)


# ---- what is measured ----------------------------------------------------------------------------


def measured(runs, args):
    """The report of finished runs as JSON values."""
    card = checkpoint.load(runs[0].path / "last.pt")["card"]
    targets = TARGETS_100 if card["num_classes"] >= 50 else TARGETS
    results = [result(run, targets) for run in runs]
    summary, config = runs[0].summary, files.read_json(runs[0].path / "config.json")
    # The precision is that of the run, whichever --amp it had.
    dtype = None if config["precision"] == "float32" else getattr(torch, config["precision"])
    device = devices.select_device(runs[0].args.device)
    here = environment.environment(device)
    if any(here[fact] != config[fact] for fact in ("device", "threads")):
        there, this = (f"{one['device']}, {one['threads']} threads" for one in (config, here))
        reason = f"the runs were made on {there}, and this is {this}"
        raise UserError(f"{reason}: repeat the command there, or use another --output-dir", 2)
    devices.configure_backends(runs[0].args.deterministic)  # as in the runs
    flops = 3 * 2 * average_macs(card, runs[0].args, summary["steps"])
    speed = statistics.fmean(one["images_per_second"] for one in results)
    ceiling = measure.flop_ceiling(device, dtype, args.rounds)
    report = {
        "model": card["model"],
        "arguments": args.training,
        "epochs": summary["epochs"],
        "steps_per_epoch": summary["steps"] / summary["epochs"],
        "batch_size": runs[0].args.batch_size,
        "tta": runs[0].args.tta,
        "targets": targets,
        "measured_on": metrics.Run(runs[0].path / "metrics.csv").measured_on,
        "machine": list(dict.fromkeys(machine(run) for run in runs)),
        "runs": results,
        "flops_per_image": flops,
        "flops_per_second": flops * speed,
        "ceiling_flops_per_second": ceiling,
        "of_ceiling": flops * speed / ceiling,
    }
    if args.bare:
        report["bare"] = bare_steps(report, card, runs[0].args, device, dtype, args.rounds)
    return report


def result(run, targets):
    """The numbers of a finished run; times in seconds, accuracies in percent."""
    table, summary = metrics.Run(run.path / "metrics.csv"), run.summary
    training = table.position("seconds")
    charged = {
        epoch: total - evaluation
        for epoch, total, evaluation in zip(
            table.epochs, table.columns["total_seconds"], table.columns["eval_seconds"]
        )
    }
    reached = {}
    for target in targets:
        epochs = [epoch for epoch, top1 in zip(*table.curve("eval_acc")) if top1 >= target]
        reached[str(target)] = None
        if epochs:
            reached[str(target)] = [charged[epochs[0]], training[epochs[0]]]
    images = summary["steps"] * run.args.batch_size
    return {
        "seed": run.args.seed,
        "path": str(run.path),
        "test_acc": summary["test_acc"],
        "test_tta_acc": summary.get("test_tta_acc"),
        "charged_and_training_seconds_to": reached,
        "charged_seconds": summary["total_seconds"] - summary["eval_seconds"],
        "train_seconds": summary["train_seconds"],
        "eval_seconds": summary["eval_seconds"],
        "images_per_second": images / summary["train_seconds"],
        "resumed": len(files.read_json(run.path / "config.json").get("resumed", [])),
    }


def average_macs(card, args, steps):
    """Multiply-accumulates of an image, over the steps of a run with --progressive."""
    size_at = size_schedule(args.progressive, steps)
    counts = Counter(size_at(step) or card["image_size"] for step in range(steps))
    total = 0
    for size, count in counts.items():
        _, macs = models.describe(card["model"], card["num_classes"], size, card["options"])
        total += count * macs
    return total / steps


def machine(run):
    """Device, threads, versions and precision of a run, as its config.json has them."""
    config = files.read_json(run.path / "config.json")
    return (
        f"{config['device']}, {config['threads']} threads on {config['cores']} cores; "
        f"torch {config['torch']}, Python {config['python']}; {config['precision']}"
    )


def bare_steps(report, card, args, device, dtype, rounds):
    """The bare step at the full batch and size, and the time of the runs in such steps.

    That is forward pass, backward pass and optimizer on one batch that is ready, in one piece.
    """
    model = measure.to_device(models.from_card(card), device, dtype)
    optimizer = optimizers.create_optimizer(args, model, dtype=dtype)
    step = measure.training_step(model, optimizer, device, dtype)
    batch = measure.ready_batch(args.batch_size, card["image_size"], card["num_classes"], device)
    seconds = measure.repeated(device, rounds, lambda: step(*batch))
    epochs = PUBLISHED_EPOCHS.get(card["model"], report["epochs"])
    reference = epochs * report["steps_per_epoch"]
    ratios = [
        one["charged_seconds"] / reference / value for one in report["runs"] for value in seconds
    ]
    return {"step_seconds": seconds, "epochs": epochs, "ratios": ratios}


# ---- what is printed -----------------------------------------------------------------------------


def print_report(report):
    results, n = report["runs"], len(report["runs"])
    print(
        f"\n{report['model']}: {report['epochs']} epochs of {report['steps_per_epoch']:g} steps of "
        f"{report['batch_size']} images; n = {n}"
    )
    print(*report["machine"], sep="\n")
    rows, images = [], report["measured_on"]
    title = "to {} %" if images.startswith("test") else f"to {{}} % on {images} images"
    for target in report["targets"]:
        pairs = [one["charged_and_training_seconds_to"][str(target)] for one in results]
        reached = [pair for pair in pairs if pair]
        rows.append(_row(title.format(target), f"{len(reached)} of {n}", *zip(*reached)))
    names = ("charged_seconds", "train_seconds", "eval_seconds")
    seconds = ([one[name] for one in results] for name in names)
    rows.append(_row("to the end", f"{n} of {n}", *seconds))
    formats.print_table(rows)

    accuracy = mean_std([one["test_acc"] for one in results], ".2f")
    print(f"test accuracy, single view: {accuracy} %")
    if report["tta"] != "none":
        accuracy = mean_std([one["test_tta_acc"] for one in results], ".2f")
        print(f"test accuracy, --tta {report['tta']}: {accuracy} %")
    print(f"training: {mean_std([one['images_per_second'] for one in results], ',.0f')} images/s")
    speed, ceiling = report["flops_per_second"] / 1e12, report["ceiling_flops_per_second"] / 1e12
    share = 100 * report["of_ceiling"]
    print(f"arithmetic: {speed:.3f} TFLOP/s, {share:.0f} % of a matrix product's {ceiling:.3f}")
    if "bare" in report:
        bare = report["bare"]
        print(f"bare step: {measure.spread(bare['step_seconds'], '.3f')} s")
        ratio = measure.spread(bare["ratios"], ".3f")
        print(f"time to the end: {ratio} of {bare['epochs']} epochs of bare steps")
    if any(one["resumed"] for one in results):
        print("Some runs were resumed: what they lost after a last save is not charged.")


def _row(what, count, charged=(), training=(), evaluation=()):
    return {
        "time": what,
        "n": count,
        "total without evaluations (s)": mean_std(charged, ".1f"),
        "training (s)": mean_std(training, ".1f"),
        "evaluations (s)": mean_std(evaluation, ".1f"),
    }


def mean_std(values, style):
    """The text of "mean ± standard deviation"; "-" without values."""
    return tables.show(replicates.summarize(values), style)
