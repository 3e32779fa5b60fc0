"""TensorBoard's files, read back as TensorBoard reads them."""

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import data
from analysis import metrics
from training import tensorboard


def test_a_run_leaves_curves_pictures_hyper_parameters_and_its_confusion(train):
    run = train("--epochs", 2, "--lr", 0.07, "--ema-decay", 0.5)
    found = EventAccumulator(str(run), size_guidance={"images": 0, "tensors": 0}).Reload()
    tags = found.Tags()
    assert {"train_loss", "train_acc", "test_loss", "test_acc", "ema_test_acc", "lr"} <= set(
        tags["scalars"]
    )
    accuracies = [float(row["test_acc"]) for row in metrics.read_metrics(run / "metrics.csv")]
    assert [event.value for event in found.Scalars("test_acc")] == pytest.approx(
        accuracies, rel=1e-4
    )
    assert {"augmented training images", "confusion"} <= set(tags["images"])
    image = found.Images("confusion")[0]
    assert (image.width, image.height) == (240, 240)

    data = found.SummaryMetadata("_hparams_/session_start_info").plugin_data
    from tensorboard.plugins.hparams import plugin_data_pb2

    started = plugin_data_pb2.HParamsPluginData.FromString(data.content).session_start_info
    assert (
        started.hparams["lr"].number_value == 0.07
        and started.hparams["model"].string_value == "resnet20"
    )
    summary = metrics.read_json(run / "summary.json")
    assert found.Scalars("final/test_acc")[0].value == pytest.approx(summary["test_acc"])

    text = found.Tensors("confusion/text_summary")[0].tensor_proto.string_val[0].decode()
    counts = [[int(cell) for cell in line.split("|")[2:-1]] for line in text.splitlines()[2:]]
    assert sum(map(sum, counts)) == 50
    right = sum(counts[i][i] for i in range(10))
    assert 100 * right / 50 == pytest.approx(
        summary["test_acc"]
    )  # of the weights that are reported


def test_with_held_out_images_the_confusion_is_of_the_chosen_weights_and_of_the_one_pass_over_the_test(
    train, monkeypatch
):
    real, passes = data.Batches.epoch, []

    def epoch(self, *place, **options):
        passes.append(len(self.labels))
        return real(self, *place, **options)

    monkeypatch.setattr(data.Batches, "epoch", epoch)
    run = train("--epochs", 3, "--val-size", 20, "--ema-decay", 0)
    assert (passes.count(20), passes.count(50)) == (3, 1)
    found = EventAccumulator(str(run), size_guidance={"tensors": 0}).Reload()
    text = found.Tensors("confusion/text_summary")[0].tensor_proto.string_val[0].decode()
    counts = [[int(cell) for cell in line.split("|")[2:-1]] for line in text.splitlines()[2:]]
    assert 2 * sum(counts[i][i] for i in range(10)) == pytest.approx(
        metrics.read_json(run / "summary.json")["test_acc"]
    )


def test_a_picture_is_blue_where_a_row_is():
    image = tensorboard.picture(torch.tensor([[4, 0], [2, 2]]))
    assert image.shape == (3, 48, 48)
    assert image[:, 0, 0].tolist() == pytest.approx(tensorboard.BLUE) and image[
        :, 0, 47
    ].tolist() == [1, 1, 1]
    assert image[:, 47, 0].tolist() == image[:, 47, 47].tolist() and image[:, 47, 0].tolist() != [
        1,
        1,
        1,
    ]
    assert tensorboard.picture(torch.zeros(1000, 1000, dtype=torch.int64)).shape == (3, 2000, 2000)


def test_a_full_disk_at_the_end_fails_no_run(train, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensorboard, "write_hparams", full)
    run = train("--epochs", 1)
    assert metrics.read_json(run / "summary.json")["status"] == "finished"
    assert (
        "TensorBoard's last figures could not be written (No space left" in capsys.readouterr().err
    )


def test_a_fault_in_the_last_pictures_leaves_the_run_finished(train, monkeypatch):
    monkeypatch.setattr(tensorboard, "picture", None)
    with pytest.raises(TypeError):
        train("--epochs", 1)
    assert metrics.read_json(Path("run/summary.json"))["status"] == "finished"
