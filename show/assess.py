"""A report on a test split: confusion, accuracy by class, calibration and robustness.

    result = report(predictor, split, Path("report.png"))    # writes report.png and report.json

The calibration error is the expected one of arXiv 1706.04599: over 15 bins of equal width, weighted
by their numbers of images.
"""

import json

import numpy as np
import torch

from analysis import figures
from common.text import printable
from datasets.splits import stratified
from show import corruptions

BINS = 15
# Pixels of the images that are corrupted at once: as floats they take four times their memory.
BLOCK = 500 * 32 * 32
MIN_DRAWN = 5  # images of a bin; the accuracy of fewer says nothing
MAX_NAMES = 20  # classes that are listed in the figure


def report(predictor, split, path, corrupted=500, show=False):
    """Measures a model, writes the figure and the JSON file next to it, and returns the results.

    show: also draw it for figures.show.
    """
    result = measure(predictor, split, corrupted)
    draw(result, path, show)
    figures.write(path.with_suffix(".json"), json.dumps(result, indent=1).encode())
    return result


def measure(predictor, split, corrupted=500):
    """Results on the test split as JSON values, with accuracies in percent.

    corrupted: images to measure robustness on, stratified by class (0: all).
    """
    logits = predictor.logits(split.test.images)
    return {
        "checkpoint": str(predictor.path),
        "weights": predictor.standing()[1],
        "dataset": split.name,
        "images": len(split.test),
        "classes": predictor.classes,
        **classification(logits, split.test.labels, len(predictor.classes)),
        "robustness": _robustness(predictor, split.test, logits, corrupted),
    }


def _robustness(predictor, test, logits, count):
    if 0 < count < len(test):
        test = test.take(stratified(test.labels, count))
        logits = predictor.logits(test.images)

    def accuracy(name, strength):
        generator = corruptions.generator(name, strength)
        height, width = test.images.shape[2:]
        blocks = test.images.split(max(1, BLOCK // (height * width)))
        logits = [
            predictor.logits(corruptions.corrupt(block, name, strength, generator))
            for block in blocks
        ]
        return _accuracy(torch.cat(logits), test.labels)

    by_corruption = {
        name: [accuracy(name, strength) for strength in corruptions.STRENGTHS]
        for name in corruptions.CORRUPTIONS
    }
    accuracies = sum(by_corruption.values(), [])
    return {
        "images": len(test),
        "clean": _accuracy(logits, test.labels),
        "mean": sum(accuracies) / len(accuracies),
        "by_corruption": by_corruption,
    }


def classification(logits, labels, num_classes):
    """accuracy, top5, by_class, confusion (a row for each true class), calibration_error and bins.

    logits: (N, K); labels: (N,).
    """
    from torchmetrics.functional import classification as metrics

    probabilities = logits.double().softmax(1)
    confidence, predicted = probabilities.max(1)
    confusion = metrics.multiclass_confusion_matrix(predicted, labels, num_classes)
    bins = _reliability(confidence, predicted == labels)
    correct_and_total = zip(confusion.diag().tolist(), confusion.sum(1).tolist())
    in_top5 = logits.topk(min(5, num_classes), dim=1).indices == labels[:, None]
    return {
        "accuracy": _accuracy(logits, labels),
        "top5": 100 * float(in_top5.any(1).double().mean()),
        "by_class": [100 * right / total if total else None for right, total in correct_and_total],
        "confusion": confusion.tolist(),
        "calibration_error": _calibration_error(bins),
        "bins": bins,
    }


def _reliability(confidence, correct):
    """For each bin that isn't empty: its limits, images, mean confidence and accuracy (%)."""
    bin_of, bins = (confidence * BINS).long().clamp(max=BINS - 1), []
    for i in bin_of.unique().tolist():
        inside = bin_of == i
        bins.append(
            {
                "low": i / BINS,
                "high": (i + 1) / BINS,
                "images": int(inside.sum()),
                "confidence": 100 * float(confidence[inside].mean()),
                "accuracy": 100 * float(correct[inside].double().mean()),
            }
        )
    return bins


def _calibration_error(bins):
    # torchmetrics gives images with a confidence of exactly 1 a bin of their own.
    gaps = sum(one["images"] * abs(one["accuracy"] - one["confidence"]) for one in bins)
    return gaps / sum(one["images"] for one in bins)


def _accuracy(logits, labels):
    return 100 * float((logits.argmax(1) == labels).double().mean())


def summary(result):
    """The most important results as text for a terminal."""
    worst, least = min(_measured_classes(result), key=lambda item: item[1])
    best, most = max(_measured_classes(result), key=lambda item: item[1])
    robust = result["robustness"]
    hardest, values = min(robust["by_corruption"].items(), key=lambda item: sum(item[1]))
    lines = [
        f"weights of {result['weights']}",
        f"{result['dataset']}, {result['images']:,} test images: "
        f"top-1 {result['accuracy']:.2f}, top-5 {result['top5']:.2f} %",
        f"by class: {worst} {least:.1f} % to {best} {most:.1f} %",
        f"expected calibration error: {result['calibration_error']:.2f} %",
        f"corrupted ({robust['images']:,} images): {robust['mean']:.2f} % on average, "
        f"{robust['clean']:.2f} % clean; "
        f"worst: {hardest.replace('_', ' ')} {sum(values) / len(values):.2f} %",
    ]
    return "\n".join(map(printable, lines))


def _measured_classes(result):
    """(name, accuracy) of each class that has test images."""
    pairs = zip(result["classes"], result["by_class"])
    return [(name, accuracy) for name, accuracy in pairs if accuracy is not None]


# ---- the figure ----------------------------------------------------------------------------------


def draw(result, path, show=False):
    plt = figures.pyplot(9, show)
    figures.save(_figure(plt, result), path, dpi=110)
    if show:
        _figure(plt, result)


def _figure(plt, result):
    """Confusion and accuracy by class above, robustness and reliability below."""
    style = dict(figsize=(11.5, 9.6), layout="constrained", width_ratios=(1.15, 1))
    figure, axes = plt.subplots(2, 2, **style)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    confusion = _draw_confusion(axes[0, 0], result)
    _draw_classes(axes[0, 1], result)
    robustness = _draw_robustness(axes[1, 0], result["robustness"])
    _draw_reliability(axes[1, 1], result)
    for image in (confusion, robustness):
        figure.colorbar(image, ax=image.axes, shrink=0.8)
    title = (
        f"{result['dataset']}, {result['images']:,} test images, {result['checkpoint']}: "
        f"weights of {result['weights']}"
    )
    figure.suptitle(figures.plain(title, 150), fontsize=9)
    return figure


def _draw_confusion(axis, result):
    counts = torch.tensor(result["confusion"], dtype=torch.float)
    shares = (100 * counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    axis.set(title="confusion (% of the true class)", xlabel="answer", ylabel="true class")
    names = [figures.plain(name, 18) for name in result["classes"]]
    if len(names) <= MAX_NAMES:
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(names)), names)
        _write_cells(axis, shares, shares > 55, fontsize=min(8, 90 / len(names)), least=0.5)
    return image


def _write_cells(axis, values, is_white, fontsize=8, least=0.0):
    """Writes the values that are not below `least` into the cells of an image."""
    for (row, column), value in np.ndenumerate(values):
        if value >= least:
            color = "white" if is_white[row, column] else "black"
            style = dict(ha="center", va="center", fontsize=fontsize, color=color)
            axis.text(column, row, f"{value:.0f}", **style)


def _draw_classes(axis, result):
    classes = sorted(_measured_classes(result), key=lambda item: (item[1], item[0]))
    title = "accuracy by class"
    if len(classes) > MAX_NAMES:
        half = MAX_NAMES // 2
        title = f"the {half} worst and best of {len(classes)} classes"
        classes = classes[:half] + classes[-half:]
    rows, values = range(len(classes)), [value for _, value in classes]
    axis.barh(rows, values, color="#9ecae1", edgecolor=figures.RIGHT, linewidth=0.6)
    for row, value in zip(rows, values):
        xy = (0 if value > 15 else value, row)
        style = dict(xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
        axis.annotate(f"{value:.1f}", xy, **style)
    axis.axvline(result["accuracy"], color="#444444", linestyle=":", linewidth=1)
    axis.set(title=f"{title} (dotted: all, {result['accuracy']:.2f} %)", xlabel="accuracy (%)")
    axis.set(ylabel="true class", xlim=(0, 100), ylim=(len(classes) - 0.4, -0.6))
    axis.set_yticks(rows, [figures.plain(name, 18) for name, _ in classes])
    axis.tick_params(axis="y", length=0)
    figures.tidy(axis)
    axis.grid(axis="y", visible=False)


def _draw_reliability(axis, result):
    """Accuracy against confidence: a dot for each bin, whose area is its share of the images."""
    bins = [one for one in result["bins"] if one["images"] >= MIN_DRAWN]
    confidence = [one["confidence"] for one in bins]
    accuracy = [one["accuracy"] for one in bins]
    areas = [12 + 700 * one["images"] / result["images"] for one in bins]
    axis.plot((0, 100), (0, 100), color="#888888", linewidth=1, linestyle=":", label="calibrated")
    axis.vlines(confidence, confidence, accuracy, color=figures.WRONG, linewidth=1.5, label="gap")
    style = dict(color=figures.RIGHT, alpha=0.65, linewidth=0, clip_on=False)
    label = f"bins of {MIN_DRAWN} images or more (area)"
    axis.scatter(confidence, accuracy, s=areas, label=label, **style)
    axis.set(xlabel="mean confidence (%)", ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 100))
    axis.set_title(f"reliability: expected calibration error {result['calibration_error']:.2f} %")
    figures.tidy(axis)
    axis.legend(frameon=False, loc="best").legend_handles[-1].set_sizes([40])


def _draw_robustness(axis, robustness):
    by_corruption = robustness["by_corruption"]
    names = sorted(by_corruption, key=lambda name: -sum(by_corruption[name]))
    values = torch.tensor([by_corruption[name] for name in names]).numpy()
    image = axis.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    _write_cells(axis, values, values <= 60)
    axis.set_xticks(range(5), corruptions.STRENGTHS)
    axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    title = f"accuracy (%) on {robustness['images']:,} corrupted images:\n"
    title += f"mean {robustness['mean']:.1f}, clean {robustness['clean']:.1f}"
    axis.set(xlabel="strength", ylabel="corruption", title=title)
    axis.tick_params(length=0)
    return image
