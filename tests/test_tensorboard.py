"""TensorBoard's events, read as TensorBoard reads them."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.training import CPU, batches
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

import data
from training import tensorboard
from training.run_directory import RunDir
from training.state import Confusion, Progress

ARGUMENTS = {"lr": 0.07, "model": "resnet20", "model_arg": ["n=3"], "device": "cpu"}
FIGURES = {"test_acc": 75.0, "test_top5": 100.0, "reported": "last epoch"}


def read(path):
    return EventAccumulator(str(path), size_guidance={"images": 0, "tensors": 0}).Reload()


def confusion_in(events):
    """The counts in the table of the confusion matrix."""
    text = events.Tensors("confusion/text_summary")[0].tensor_proto.string_val[0].decode()
    rows = [line.replace("\\|", "").split("|")[2:-1] for line in text.splitlines()[2:]]
    return torch.tensor([[int(cell) for cell in row] for row in rows])


def write_end(directory):
    confusion = Confusion(2, CPU)
    confusion(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1]))
    state = SimpleNamespace(confusion=confusion, progress=Progress(epoch=2, step=6))
    tensorboard.write_end(directory, ARGUMENTS, FIGURES, ("a", "b|c"), state)


@pytest.fixture
def directory(tmp_path):
    directory = RunDir.create(tmp_path / "run", {})
    yield directory
    directory.close()


def test_curves_images_hyper_parameters_and_confusion_are_written(directory):
    row = {"epoch": 1, "step": 3, "train_loss": 0.5, "test_acc": 75.0, "ema_test_acc": None}
    directory.append_row(row)
    card = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    tensorboard.write_images(directory.events, batches(), card)
    write_end(directory)
    events = read(directory.path)
    (grid,), tags = events.Images("augmented training images"), events.Tags()
    assert (grid.width, grid.height) == (5 * 8, 5 * 8)  # of a batch of 32 images
    assert set(tags["images"]) == {"augmented training images", "confusion"}
    final = {"final/test_acc", "final/test_top5"}
    assert set(tags["scalars"]) == {"train_loss", "test_acc", *final}
    assert events.Scalars("test_acc")[0].value == events.Scalars("final/test_acc")[0].value == 75
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    started = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert set(started.hparams) == {"lr", "model", "model_arg"}  # what identifies a run
    assert started.hparams["lr"].number_value == 0.07
    assert confusion_in(events).tolist() == [[2, 1], [0, 1]]


def test_a_confusion_image_is_blue_where_predictions_are():
    image = tensorboard.confusion_image(torch.tensor([[4, 0], [2, 2]]))
    cells = [image[:, y, x].tolist() for y in (0, 47) for x in (0, 47)]
    assert image.shape == (3, 48, 48)
    assert cells[0] == pytest.approx(tensorboard.BLUE) and cells[1] == [1, 1, 1]
    assert cells[2] == cells[3] and cells[2] not in cells[:2]
    many = torch.zeros(tensorboard.MAX_DRAWN, tensorboard.MAX_DRAWN, dtype=torch.int64)
    assert tensorboard.confusion_image(many).shape == (3, 2000, 2000)


def test_a_full_disk_at_the_end_is_only_reported(directory, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensorboard, "write_hparams", full)
    write_end(directory)
    assert "events can't be written (No space left" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("held_out", [0, 20])
def test_the_confusion_matrix_of_a_run_is_that_of_its_test_accuracy(train, monkeypatch, held_out):
    """With held-out images it is of the best weights, and the test images are read once."""
    epoch, read_images = data.Batches.epoch, []

    def record(self, *place, **options):
        read_images.append(len(self.labels))
        return epoch(self, *place, **options)

    monkeypatch.setattr(data.Batches, "epoch", record)
    run = train("--epochs", 3, "--val-size", held_out, "--ema-decay", 0 if held_out else 0.5)
    if held_out:
        assert (read_images.count(20), read_images.count(50)) == (3, 1)
    counts, summary = confusion_in(read(run)), json.loads((run / "summary.json").read_text())
    assert counts.sum() == 50 and 2 * counts.trace() == pytest.approx(summary["test_acc"])


@pytest.mark.slow
def test_an_error_in_the_last_images_leaves_the_run_finished(train, monkeypatch):
    monkeypatch.setattr(tensorboard, "confusion_image", None)
    with pytest.raises(TypeError):
        train("--epochs", 1)
    assert json.loads(Path("run/summary.json").read_text())["status"] == "finished"
