"""Where images are: on the device, or on the host, which sends batches ahead of the step."""

from concurrent.futures import ThreadPoolExecutor

import torch

from common.free_memory import available

# A dataset of at most so many bytes is padded once, instead of in each batch (CIFAR: 154 MB).
PREPARED_ON_CPU = 2**28
BYTES_PER_BLOCK = 2**26


def should_stream(examples, device, resident):
    """Whether batches are sent from the host; resident: "device", "host" or "auto"."""
    if resident == "auto":
        # On MPS, the view that windows are cropped from may be copied as a whole, for each batch.
        return device.type == "mps" or not _fits(examples, device)
    return resident == "host"


def _fits(examples, device):
    already_there = device.type == "cpu" and not examples.cached
    # A border for cropping adds half of the images' size, and two copies exist while it is made.
    return already_there or examples.nbytes <= available(device) / 3


def should_prepare(examples, device):
    """Whether a dataset that isn't streamed is copied and prepared once, for all batches."""
    if device.type != "cpu" or len(examples.shape) == 2:  # features
        return True
    return not examples.cached and examples.nbytes <= PREPARED_ON_CPU


def resident_bytes(examples, device, resident="auto"):
    """GPU memory that Batches will take for these images, with their border for cropping."""
    if device.type != "cuda" or should_stream(examples, device, resident):
        return 0
    return int(1.6 * examples.nbytes)


def copy_to_device(examples, device):
    """The images (N, 3, H, W), channels_last, or features (N, D), on a device.

    A subset or a cached folder is copied in blocks: the host never holds a second copy of it.
    """
    if device.type == "cpu" or (not examples.cached and examples.rows is None):
        return examples.images.to(device)
    count, channels, height, width = examples.shape
    images = torch.empty(count, height, width, channels, dtype=torch.uint8, device=device)
    block = max(1, BYTES_PER_BLOCK // (channels * height * width))
    for index in torch.arange(count).split(block):
        images[index[0] : index[-1] + 1] = examples.gather(index).to(device)
    return images.permute(0, 3, 1, 2)


def send_ahead(examples, indices, device, stream):
    """Yields the images (B, 3, H, W) of each batch on the device; indices: a tensor for each batch.

    A thread gathers and sends the next batch during the step on the current one. stream: a CUDA
    stream for the copies, None on other devices.
    """

    def send(index):
        _, channels, height, width = examples.shape
        shape = (len(index), height, width, channels)
        # Pinning all images instead would need a second copy, of up to twice their size.
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=stream is not None)
        examples.gather(index, out=images)
        if stream is None:
            return images.to(device), None
        with torch.cuda.stream(stream):
            return images.to(device, non_blocking=True), stream.record_event()

    def select_device():
        # A new thread uses the first GPU, and would leave a context there.
        if stream is not None:
            torch.cuda.set_device(device)

    indices = iter(indices)
    with ThreadPoolExecutor(1, initializer=select_device) as thread:

        def send_next():
            index = next(indices, None)
            return None if index is None else thread.submit(send, index)

        pending = send_next()
        while pending is not None:
            images, sent = pending.result()
            pending = send_next()
            if sent:
                current = torch.cuda.current_stream(device)
                current.wait_event(sent)
                images.record_stream(current)
            yield images.permute(0, 3, 1, 2)
