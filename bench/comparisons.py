"""What benchmark.py measures: ours in turn with what there is to compare it with, and the table of models.

    run(benchmark.build_parser().parse_args(["epoch", "--rounds", "3"]))      # prints ratios

The others are a torchvision DataLoader with PIL transforms, the bare training step, the loop people write, timm's networks.
"""

import statistics
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

import models
from analysis import metrics
from bench import speeds
from bench.measure import (
    flop_ceiling,
    in_turn,
    machine,
    rate,
    ready_batch,
    reset_peak,
    spread,
    training_step,
)
from data import Batches
from datasets.archives import ARCHIVES
from datasets.examples import Examples
from datasets.pipeline import Pipeline
from training import devices, loop, mixed_precision, moving_average, optimizers, run_directory

MEAN, STD = ARCHIVES["cifar10"].mean, ARCHIVES["cifar10"].std
JITTER = 0.2  # brightness, contrast and saturation, as color_jitter's defaults


class PilDataset(Dataset):
    """Pictures as arrays, opened by PIL and transformed one by one, as torchvision's CIFAR10 does."""

    def __init__(self, examples, jitter=False, image_size=32):
        from torchvision import transforms

        bicubic = transforms.InterpolationMode.BICUBIC
        steps = [transforms.Resize(image_size, bicubic)] if image_size != 32 else []
        steps += [
            transforms.RandomCrop(image_size, padding=image_size // 8),
            transforms.RandomHorizontalFlip(),
        ]
        if jitter:
            steps.append(transforms.ColorJitter(JITTER, JITTER, JITTER))
        self.transform = transforms.Compose(
            [*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        )
        self.images = examples.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = examples.labels.tolist()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        from PIL import Image

        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def random_examples(count):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(
        0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator
    ).permute(0, 3, 1, 2)
    return Examples(images, torch.randint(0, 10, (count,), generator=generator))


def report(seconds, images, ours):
    """Prints images a second of each, and the ratio of each to ours, round by round."""
    for name, values in seconds.items():
        ratios = [theirs / mine for theirs, mine in zip(values, seconds[ours])]
        extra = "" if name == ours else f"   takes {spread(ratios)} times as long as {ours}"
        print(f"  {name:<44}{spread([images / v for v in values], rate)} images/s{extra}")


def measure_data(args, device):
    examples = random_examples(args.images)
    for title, names in (
        ("crop, flip, normalise", ("crop", "flip")),
        ("crop, flip, color jitter, normalise", ("crop", "flip", "color_jitter")),
    ):
        batches = Batches(examples, args.batch_size, Pipeline(MEAN, STD, 32, names), device=device)
        loader = DataLoader(
            PilDataset(examples, "color_jitter" in names),
            args.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=args.workers,
        )
        numbers = iter(range(10**6))

        def ours(batches=batches, numbers=numbers):
            for _ in batches.epoch(next(numbers)):
                pass

        def theirs(loader=loader):
            for inputs, labels in loader:
                inputs.to(device), labels.to(device)

        print(f"{title}, batch {args.batch_size}, {args.images:,} images:")
        report(
            in_turn(device, args.rounds, ours=ours, DataLoader=theirs),
            len(batches) * args.batch_size,
            "ours",
        )


def measure_epoch(args, device):
    examples = random_examples(args.images)
    dtype = mixed_precision.amp_dtype(args.amp, device)
    name = models.canonical(args.model)
    options = models.parse_options([], name, args.image_size)

    def setup(layout, compiled):
        devices.seed_model(0, torch.device("cpu"), 0, "init")
        model = models.choose_attention(models.create_model(name, 10, **options), device, dtype)
        model = model.to(device, memory_format=layout).train()
        if compiled:
            model.compile()
        return model, optimizers.create_optimizer("sgd", optimizers.param_groups(model, 5e-4), 0.1)

    # Ours: augmentation, the moving average and the figures included.
    model, optimizer = setup(torch.channels_last, args.compile)
    ema = moving_average.Ema(model, 0.999)
    pipeline = Pipeline(MEAN, STD, args.image_size, ("crop", "flip"), num_classes=10)
    batches = Batches(examples, args.batch_size, pipeline, device=device)
    progress = loop.Progress()

    def ours():
        loop.fit(
            model,
            batches,
            optimizer=optimizer,
            lr_at=lambda step: 0.01,
            epochs=progress.epoch + 1,
            progress=progress,
            dtype=dtype,
            after_step=ema.update,
        )

    # Bare: the same precision and layout, on tensors that lie ready; nothing else.
    bare = SimpleNamespace()
    bare.model, bare.optimizer = setup(torch.channels_last, args.compile)
    bare.inputs, bare.targets = next(batches.epoch(0))

    def bare_steps():
        for _ in range(len(batches)):
            with mixed_precision.autocast(device, dtype):
                logits = bare.model(bare.inputs)
            F.cross_entropy(logits.float(), bare.targets).backward()
            bare.optimizer.step()
            bare.optimizer.zero_grad(set_to_none=True)

    # Plain: what people write.
    plain_model, _ = setup(torch.contiguous_format, False)
    plain_optimizer = torch.optim.SGD(
        plain_model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4
    )
    pictures = PilDataset(examples, image_size=args.image_size)
    loader = DataLoader(
        pictures, args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers
    )

    def plain():
        running, correct = 0.0, 0
        for inputs, targets in loader:
            inputs, targets = inputs.to(device), targets.to(device)
            plain_optimizer.zero_grad()
            logits = plain_model(inputs)
            loss = F.cross_entropy(logits, targets)
            loss.backward()
            plain_optimizer.step()
            running += loss.item()
            correct += (logits.argmax(1) == targets).sum().item()
        return running, correct

    print(
        f"an epoch of {name}, {args.image_size} px, batch {args.batch_size}, {len(batches)} steps, amp {args.amp}"
        f"{', compiled' if args.compile else ''}:"
    )
    titles = {"engine.fit": ours, "bare forward, backward, step": bare_steps}
    if not args.skip_plain:
        titles["plain loop (DataLoader, fp32, .item())"] = plain
    seconds = in_turn(device, args.rounds, **titles)
    report(seconds, len(batches) * args.batch_size, "engine.fit")
    overhead = [
        mine / theirs
        for mine, theirs in zip(seconds["engine.fit"], seconds["bare forward, backward, step"])
    ]
    print(f"  engine.fit takes {spread(overhead, '.3f')} times as long as the bare steps")


def measure_precisions(args, device):
    """A line a model: parameters, GMACs, milliseconds of a training step in bf16 and fp32, and their ratio round by round."""
    print(f"{'model':<30}{'parameters':>14}{'GMACs':>9}{'bf16 ms':>9}{'fp32 ms':>9}  bf16 / fp32")
    for name in args.models or speeds.SUITES["table"]:
        options = models.parse_options([], name, 32)
        parameters, macs = models.describe(name, 100, 32, options)
        model = (
            models.create_model(name, 100, **options)
            .to(device, memory_format=torch.channels_last)
            .train()
        )
        step = training_step(model, *ready_batch(args.batch_size, 32, 100, device), device)
        seconds = in_turn(
            device,
            args.rounds,
            bf16=lambda step=step: step(torch.bfloat16),
            fp32=lambda step=step: step(None),
        )
        ms = {kind: 1000 * statistics.median(values) for kind, values in seconds.items()}
        ratios = [a / b for a, b in zip(seconds["bf16"], seconds["fp32"])]
        print(
            f"{name:<30}{parameters:>14,}{macs / 1e9:>9.3f}{ms['bf16']:>9.1f}{ms['fp32']:>9.1f}  {spread(ratios)}"
        )
        sys.stdout.flush()


def measure_checkpoint(args, device):
    """The save after an epoch that is the best so far, of SGD's state with a moving average, against training steps.

    Training waits for the copy of the state; the files are written while it continues. "in the foreground" is the same work
    with training waiting for all of it.
    """
    name = models.canonical(args.model)
    model = models.create_model(name, 10).to(device, memory_format=torch.channels_last).train()
    optimizer = optimizers.create_optimizer("sgd", optimizers.param_groups(model, 5e-4), 1e-4)
    ema, dtype = moving_average.Ema(model, 0.999), mixed_precision.amp_dtype(args.amp, device)

    def step(inputs, targets):
        with mixed_precision.autocast(device, dtype):
            logits = model(inputs)
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update()

    def best(last):
        return {"state_dict": last["ema"]["average"]}

    step(*ready_batch(2, 32, 10, device))  # momentum is there from now on
    state = {
        "state_dict": model.state_dict(),
        "ema": ema.state_dict(),
        "training": {"optimizer": optimizer.state_dict()},
    }
    with tempfile.TemporaryDirectory(
        dir=Path.cwd()
    ) as directory:  # a disk as runs have it, not one in memory
        run = run_directory.RunDir.create(Path(directory) / "run", {})

        def save():
            run.end_epoch({"epoch": 1, "step": 1}, state, best)

        def save_and_wait():
            save()
            run.wait()

        reset_peak(torch.device("cpu"))  # what the step took before would hide what a save takes
        before = devices.peak_memory_mb(torch.device("cpu"))
        save_and_wait()
        size = (run.path / "last.pt").stat().st_size / 2**20
        grown = (devices.peak_memory_mb(torch.device("cpu")) or 0) - (before or 0)
        batch = ready_batch(args.batch_size, 32, 10, device)
        seconds = in_turn(
            device,
            args.rounds,
            step=lambda: step(*batch),
            foreground=save_and_wait,
            save=save,
            wait=run.wait,
        )
        run.close()
    steps = args.images // args.batch_size
    print(
        f"{name}: last.pt {size:.0f} MB, with best.pt; an epoch is {args.images:,} images in batches of {args.batch_size} "
        f"({steps} times a step)"
    )
    for key, what in (("save", "training waits"), ("foreground", "in the foreground")):
        shares = [100 * b / (b + steps * a) for a, b in zip(seconds["step"], seconds[key])]
        print(
            f"{what}: {spread([1000 * s for s in seconds[key]], '.0f')} ms, {spread(shares)} % of an epoch"
        )
    ratios = [a / b for a, b in zip(seconds["save"], seconds["foreground"])]
    print(f"training waits for {spread(ratios)} of it")
    print(
        f"memory of the process: {grown:.0f} MB more at most while it saves, {grown / size:.2f} times the file"
    )


def measure_models(args, device):
    """The table of speeds.py: a line a model as it is measured, then the files."""
    accuracy = accuracies(args.runs) if args.runs else None
    names = args.models or speeds.SUITES[args.suite]
    for name in names:  # all that is wrong is said before anything is measured
        size, classes, options = speeds.layout(name, args.image_size, args.classes)
        if args.models or args.image_size:
            models.describe(name, classes, size, options)
    types = dict.fromkeys((None, mixed_precision.amp_dtype(args.amp, device)))
    ceilings = {dtype: flop_ceiling(device, dtype, args.rounds) for dtype in types}
    best = ", ".join(
        f"{value / 1e12:.2f} TFLOP/s in {str(dtype or torch.float32)[6:]}"
        for dtype, value in ceilings.items()
    )
    print(f"ceiling, of products of square matrices: {best}")
    rows = []
    for name in names:
        rows.append(
            speeds.measure_model(
                name,
                device=device,
                amp=args.amp,
                batch_size=args.batch_size,
                rounds=args.rounds,
                image_size=args.image_size,
                classes=args.classes,
                ceilings=ceilings,
            )
        )
        print(speeds.line(rows[-1], first=len(rows) == 1), flush=True)
    if args.output:
        heading = f"{machine(device)}; median of {args.rounds} rounds; ceiling: {best}"
        print("written:", *speeds.write(rows, args.output, heading, accuracy))


def accuracies(patterns):
    """{model: mean test accuracy in percent} of finished runs."""
    found = {}
    for run in metrics.load_runs(patterns):
        if run.figure("test") is not None:
            found.setdefault(run.arguments.get("model"), []).append(run.figure("test"))
    return {model: statistics.mean(values) for model, values in found.items()}


def timm_twin(name, num_classes):
    """The architecture of one of TWINS, made of timm's blocks: the same parameter count, the same work."""
    from timm.models import maxxvit, resnet, vision_transformer

    if name == "vit_custom":
        shape = dict(
            img_size=32,
            patch_size=4,
            embed_dim=192,
            depth=9,
            num_heads=12,
            mlp_ratio=2,
            drop_path_rate=0.1,
        )
        return vision_transformer.VisionTransformer(num_classes=num_classes, **shape)
    if name == "coatnet_0":
        convolution = maxxvit.MaxxVitConvCfg(expand_output=False, init_values=None)
        config = maxxvit.MaxxVitCfg(
            (96, 192, 384, 640), (2, 3, 5, 2), ("C", "C", "T", "T"), 56, conv_cfg=convolution
        )
        # Made for 128 px: with the two strides that are taken away, its stages work on a 32x32 picture's 32 to 4 pixels.
        network = maxxvit.MaxxVit(config, img_size=128, num_classes=num_classes, drop_path_rate=0.2)
        network.stem = nn.Sequential(
            nn.Conv2d(3, 56, 3, padding=1, bias=False), nn.BatchNorm2d(56), nn.GELU()
        )
        first = network.stages[0].blocks[0]
        first.conv2_kxk.stride, first.shortcut.pool = (1, 1), nn.Identity()
        return network
    layers = {
        "18": (2, 2, 2, 2),
        "20": (3, 3, 3),
        "50": (3, 4, 6, 3),
        "101": (3, 4, 23, 3),
        "152": (3, 8, 36, 3),
    }
    depth = name.partition("resnet")[2]
    kind = resnet.Bottleneck if int(depth) >= 50 else resnet.BasicBlock
    layers = layers.get(depth, (3, 4, 6, 3))
    if len(layers) == 4:
        network, width = resnet.ResNet(kind, layers, num_classes), 64
    else:
        attention = {"attn_layer": "eca"} if name.startswith("eca") else {}
        network, width = (
            resnet.ResNet(kind, layers, num_classes, channels=(16, 32, 64), block_args=attention),
            16,
        )
        network.bn1 = nn.BatchNorm2d(width)
        network.layer1[0], network.layer4 = kind(width, width, **attention), nn.Identity()
    network.conv1, network.maxpool = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.Identity()
    return network


def measure_twins(args, device):
    dtype = mixed_precision.amp_dtype(args.amp, device)
    print(f"{'model':<20}{'ours ms':>9}{'timm ms':>9}  ours / timm")
    for name in args.models:
        batch, steps = ready_batch(args.batch_size, 32, 100, device), {}
        for kind, network in (
            ("ours", models.create_model(name, 100)),
            ("timm", timm_twin(name, 100)),
        ):
            step = training_step(
                network.to(device, memory_format=torch.channels_last).train(), *batch, device
            )
            steps[kind] = lambda step=step: step(dtype)
        seconds = in_turn(device, args.rounds, **steps)
        ms = {kind: 1000 * statistics.median(values) for kind, values in seconds.items()}
        ratios = [a / b for a, b in zip(seconds["ours"], seconds["timm"])]
        print(f"{name:<20}{ms['ours']:>9.1f}{ms['timm']:>9.1f}  {spread(ratios)}")
        sys.stdout.flush()


def run(args):
    """Prints what the command measures, after a line about the machine."""
    device = devices.select_device(args.device)
    if args.command == "models":
        args.models = args.models and [models.canonical(name) for name in args.models]
        if args.output:
            speeds.make_directory(args.output)
    print(f"{machine(device)}; median (least to most) of {args.rounds} rounds in turn", flush=True)
    commands = {
        "data": measure_data,
        "epoch": measure_epoch,
        "models": measure_models,
        "checkpoint": measure_checkpoint,
        "twins": measure_twins,
    }
    if args.command == "models" and (args.quick or args.precisions):
        measure_precisions(args, device)
    else:
        commands[args.command](args, device)
