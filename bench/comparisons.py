"""Ours against alternatives, measured in turn: batches, an epoch, and the saving of checkpoints.

The alternatives are a torchvision DataLoader with PIL transforms, the training step alone, and a
plain training loop as in tutorials.
"""

import itertools
import tempfile
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import models
from bench import measure
from common.errors import UserError
from data import Batches
from datasets.archives import ARCHIVES
from datasets.examples import Examples
from datasets.pipeline import Pipeline
from training import devices, mixed_precision, run_directory
from training.loop import StepSettings, train_epoch
from training.moving_average import MovingAverage
from training.state import State

MEAN, STD = ARCHIVES["cifar10"].mean, ARCHIVES["cifar10"].std
JITTER = 0.2  # brightness, contrast and saturation, as color_jitter's defaults
FIT, BARE, PLAIN = "train_epoch", "bare training step", "plain loop (DataLoader, fp32, .item())"


class PilDataset(Dataset):
    """Images as arrays, opened by PIL and transformed one by one, as torchvision's CIFAR10 does."""

    def __init__(self, examples, jitter=False, image_size=32):
        steps = [
            transforms.RandomCrop(image_size, padding=image_size // 8),
            transforms.RandomHorizontalFlip(),
        ]
        if image_size != 32:
            steps.insert(0, transforms.Resize(image_size, transforms.InterpolationMode.BICUBIC))
        if jitter:
            steps.append(transforms.ColorJitter(JITTER, JITTER, JITTER))
        steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        self.transform = transforms.Compose(steps)
        self.images = examples.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = examples.labels.tolist()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def random_examples(count):
    generator, shape = torch.Generator().manual_seed(0), (count, 32, 32, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return Examples(images.permute(0, 3, 1, 2), labels)


def _loader(dataset, args):
    options = dict(shuffle=True, drop_last=True, num_workers=args.workers)
    return DataLoader(dataset, args.batch_size, **options)


def _report(seconds, images, ours):
    """Prints images per second of each function, and its time relative to ours."""
    for name, values in seconds.items():
        speed = measure.spread([images / value for value in values], measure.rate)
        line = f"  {name:<44}{speed} images/s"
        if name != ours:
            line += f"   takes {measure.ratio(seconds, name, ours)} times as long as {ours}"
        print(line)


# ---- data ----------------------------------------------------------------------------------------


def measure_data(args, device):
    examples = random_examples(args.images)
    for names in (("crop", "flip"), ("crop", "flip", "color_jitter")):
        batches = Batches(examples, args.batch_size, Pipeline(MEAN, STD, 32, names), device=device)
        loader = _loader(PilDataset(examples, "color_jitter" in names), args)
        epochs = itertools.count()

        def ours(batches=batches, epochs=epochs):
            for _ in batches.epoch(next(epochs)):
                pass

        def theirs(loader=loader):
            for inputs, labels in loader:
                inputs.to(device), labels.to(device)

        title = ", ".join(names).replace("_", " ")
        print(f"{title}, normalize, batch {args.batch_size}, {args.images:,} images:")
        seconds = measure.in_turn(device, args.rounds, ours=ours, DataLoader=theirs)
        _report(seconds, len(batches) * args.batch_size, "ours")


# ---- an epoch ------------------------------------------------------------------------------------


def measure_epoch(args, device):
    name, size = models.canonical(args.model), args.image_size
    dtype = mixed_precision.amp_dtype_for(name, args.amp, device)
    examples = random_examples(args.images)
    pipeline = Pipeline(MEAN, STD, size, ("crop", "flip"), num_classes=10)
    batches = Batches(examples, args.batch_size, pipeline, device=device)

    def create(compiled=args.compile, memory_format=torch.channels_last):
        devices.seed_model(0, torch.device("cpu"), 0, "init")
        model = models.create_model(name, 10, **models.parse_options([], name, size))
        model = measure.to_device(model, device, dtype, memory_format)
        if compiled:
            model.compile()
        return model

    functions = {
        FIT: _fit_epoch(create(), batches, device, dtype),
        BARE: _bare_epoch(create(), batches, device, dtype),
    }
    if not args.skip_plain:
        plain_model = create(compiled=False, memory_format=torch.contiguous_format)
        loader = _loader(PilDataset(examples, image_size=size), args)
        functions[PLAIN] = _plain_epoch(plain_model, loader, device)
    precision = mixed_precision.name(dtype)
    setting = f"batch {args.batch_size}, {len(batches)} steps, {precision}"
    print(f"an epoch of {name}, {size} px, {setting}{', compiled' if args.compile else ''}:")
    seconds = measure.in_turn(device, args.rounds, **functions)
    _report(seconds, len(batches) * args.batch_size, FIT)
    overhead = measure.ratio(seconds, FIT, BARE, ".3f")
    print(f"  {FIT} takes {overhead} times as long as the bare steps")


def _fit_epoch(model, batches, device, dtype):
    """Ours, with augmentation, the moving average and the metrics."""
    optimizer = measure.create_optimizer(model, lr=0.1)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    state = State(model, optimizer, scaler, average=MovingAverage(model, 0.999))
    settings = StepSettings(lr_at=lambda step, end=1.0: 0.01, dtype=dtype)

    def epoch():
        train_epoch(state, batches, settings)
        state.progress.finish_epoch()

    return epoch


def _bare_epoch(model, batches, device, dtype):
    """Training steps on one batch that is ready, in the same precision and layout."""
    optimizer = measure.create_optimizer(model, lr=0.1)
    step = measure.training_step(model, optimizer, device, dtype)
    inputs, targets = next(batches.epoch(0))

    def epoch():
        for _ in range(len(batches)):
            step(inputs, targets)

    return epoch


def _plain_epoch(model, loader, device):
    """What many tutorials do: fp32, and metrics for which the host waits in each step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    step = measure.training_step(model, optimizer, device)

    def epoch():
        # torch's own settings, with TF32 in convolutions
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            return train()

    def train():
        loss_sum, correct = 0.0, 0
        for inputs, targets in loader:
            inputs, targets = inputs.to(device), targets.to(device)
            loss, logits = step(inputs, targets)
            loss_sum += loss.item()
            correct += (logits.argmax(1) == targets).sum().item()
        return loss_sum, correct

    return epoch


# ---- checkpoints ---------------------------------------------------------------------------------


def _best(last):
    """What best.pt holds, from the copied state of last.pt."""
    return {"state_dict": last["ema"]["average"]}


def measure_checkpoint(args, device):
    """Saving after an epoch that is the best so far: SGD's state and a moving average.

    Training waits while the state is copied; the files are written while it continues. "in the
    foreground" is the same work with training waiting for all of it.
    """
    steps = args.images // args.batch_size
    if not steps:
        sizes = f"--batch-size {args.batch_size} is larger than --images {args.images}"
        raise UserError(f"{sizes}: an epoch has no step", status=2)
    name = models.canonical(args.model)
    dtype = mixed_precision.amp_dtype_for(name, args.amp, device)
    model = models.create_model(name, 10, **models.parse_options([], name, 32))
    model = measure.to_device(model, device, dtype)
    optimizer, ema = measure.create_optimizer(model), MovingAverage(model, 0.999)
    update = measure.training_step(model, optimizer, device, dtype)

    def step(inputs, targets):
        update(inputs, targets)
        ema.update()

    # Creates the optimizer's state. Two images: memory that a large batch has left to the process
    # would hide what saving takes.
    step(*measure.ready_batch(2, 32, 10, device))
    state = {
        "state_dict": model.state_dict(),
        "ema": ema.state_dict(),
        "training": {"optimizer": optimizer.state_dict()},
    }
    # In the current directory, on a disk as runs have it: the system's may be in memory.
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as directory:
        run = run_directory.RunDir.create(Path(directory) / "run", {})

        def save():
            run.end_epoch({"epoch": 1, "step": 1}, state, _best)

        def foreground():
            save()
            run.wait()

        process = torch.device("cpu")
        is_measured = measure.reset_peak(process)
        before = measure.peak(process)
        foreground()
        extra_bytes = measure.peak(process) - before if is_measured else None
        size = (run.path / "last.pt").stat().st_size
        train = partial(step, *measure.ready_batch(args.batch_size, 32, 10, device))
        functions = dict(step=train, foreground=foreground, save=save, wait=run.wait)
        seconds = measure.in_turn(device, args.rounds, **functions)
        run.close()
    epoch = f"{args.images:,} images in batches of {args.batch_size} ({steps} times a step)"
    model_name = f"{name} in {mixed_precision.name(dtype)}"
    print(f"{model_name}: last.pt {size / 2**20:.0f} MiB, with best.pt; an epoch is {epoch}")
    _print_saves(seconds, steps, size, extra_bytes)


def _print_saves(seconds, steps, size, extra_bytes):
    """steps: of an epoch; size: bytes of last.pt; extra_bytes: of memory, None if unknown."""
    for key, title in (("save", "training waits"), ("foreground", "in the foreground")):
        times = zip(seconds["step"], seconds[key])
        shares = [100 * saving / (saving + steps * step) for step, saving in times]
        milliseconds = measure.spread([1000 * value for value in seconds[key]], ".0f")
        print(f"{title}: {milliseconds} ms, {measure.spread(shares)} % of an epoch")
    print(f"training waits for {measure.ratio(seconds, 'save', 'foreground')} of it")
    extra = "this system doesn't tell"
    if extra_bytes is not None:
        share = f"{extra_bytes / size:.2f} times the file"
        extra = f"at most {extra_bytes / 2**20:.0f} MiB more, {share}"
    print(f"memory of the process while it saves: {extra}")
