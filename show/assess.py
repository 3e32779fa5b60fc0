"""What a checkpoint is worth on a whole test split: confusion, accuracy by class, calibration, robustness.

    found = report(predictor, split, Path("report.png"))       # writes report.png and report.json

Calibration error is torchmetrics' (the expected one of arXiv 1706.04599: 15 bins of equal width, weighted by their pictures).
"""

import json

import torch

from analysis import figures
from common.text import printable
from datasets.splits import stratified
from show import corruptions

BINS = 15
FEW = 5  # pictures of a bin that is not drawn
MOST_NAMES = 20  # classes whose names and figures are written out


def measure(predictor, split, corrupted=500):
    """Figures of the test split as JSON values. Accuracies are in percent, of confusion the rows are the true classes.

    corrupted: pictures that corruption is measured on, a share of each class (0: all).
    """
    test, classes = split.test, len(predictor.classes)
    logits = predictor.logits(test.images)
    found = classification(logits, test.labels, classes)
    if 0 < corrupted < len(test):
        test = test.take(stratified(test.labels, corrupted))
        logits = predictor.logits(test.images)
    accuracies = {
        name: [
            _accuracy(
                predictor.logits(corruptions.corrupt(test.images, name, strength)), test.labels
            )
            for strength in corruptions.STRENGTHS
        ]
        for name in corruptions.CORRUPTIONS
    }
    every = [value for values in accuracies.values() for value in values]
    return {
        "checkpoint": str(predictor.path),
        "weights": predictor.standing()[1],
        "dataset": split.name,
        "pictures": len(split.test),
        "classes": predictor.classes,
        **found,
        "robustness": {
            "pictures": len(test),
            "clean": _accuracy(logits, test.labels),
            "mean": sum(every) / len(every),
            "by_corruption": accuracies,
        },
    }


def classification(logits, labels, classes):
    """accuracy, top5, confusion, by_class, calibration_error and its bins, of logits (N, K) and labels (N,)."""
    from torchmetrics.functional.classification import (
        multiclass_calibration_error,
        multiclass_confusion_matrix,
    )

    probabilities = logits.double().softmax(1)
    confidence, answer = probabilities.max(1)
    confusion = multiclass_confusion_matrix(answer, labels, num_classes=classes)
    error = multiclass_calibration_error(
        probabilities, labels, num_classes=classes, n_bins=BINS, norm="l1"
    )
    rows = confusion.sum(1)
    by_class = [
        100 * float(confusion[i, i]) / int(rows[i]) if rows[i] else None for i in range(classes)
    ]
    top = logits.topk(min(5, classes), dim=1).indices == labels[:, None]
    return {
        "accuracy": _accuracy(logits, labels),
        "top5": 100 * float(top.any(1).double().mean()),
        "by_class": by_class,
        "confusion": confusion.tolist(),
        "calibration_error": 100 * float(error),
        "bins": reliability(confidence, answer == labels),
    }


def reliability(confidence, right):
    """For each of BINS bins of confidence that holds a picture: its limits, mean confidence and accuracy (%), pictures."""
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    bins = []
    for i in range(BINS):
        inside = place == i
        if inside.any():
            bins.append(
                {
                    "low": i / BINS,
                    "high": (i + 1) / BINS,
                    "pictures": int(inside.sum()),
                    "confidence": 100 * float(confidence[inside].mean()),
                    "accuracy": 100 * float(right[inside].double().mean()),
                }
            )
    return bins


def _accuracy(logits, labels):
    return 100 * float((logits.argmax(1) == labels).double().mean())


def in_words(found):
    """The figures that fit a terminal."""
    known = [
        (name, value)
        for name, value in zip(found["classes"], found["by_class"])
        if value is not None
    ]
    worst, best = min(known, key=lambda each: each[1]), max(known, key=lambda each: each[1])
    tough = found["robustness"]
    weakest = min(tough["by_corruption"].items(), key=lambda each: sum(each[1]))
    lines = [
        f"weights of {found['weights']}",
        f"{found['dataset']}, {found['pictures']:,} test pictures: top-1 {found['accuracy']:.2f}, top-5 {found['top5']:.2f} %",
        f"by class: {worst[0]} {worst[1]:.1f} % to {best[0]} {best[1]:.1f} %",
        f"expected calibration error: {found['calibration_error']:.2f} %",
        f"corrupted ({tough['pictures']:,} pictures): {tough['mean']:.2f} % on average, {tough['clean']:.2f} % clean; "
        f"worst: {weakest[0].replace('_', ' ')} {sum(weakest[1]) / len(weakest[1]):.2f} %",
    ]
    return "\n".join(map(printable, lines))  # classes are called what the checkpoint says


def report(predictor, split, path, corrupted=500):
    """Measures, and writes the figure and, beside it, the JSON file. Returns the figures."""
    found = measure(predictor, split, corrupted)
    draw(found, path)
    figures.write(path.with_suffix(".json"), json.dumps(found, indent=1).encode())
    return found


# ---- the figure ------------------------------------------------------------------------------------------------------


def draw(found, path):
    """Confusion and accuracy by class above, reliability and robustness below."""
    plt = figures.pyplot(9)
    figure, axes = plt.subplots(
        2, 2, figsize=(11.5, 9.6), layout="constrained", width_ratios=(1.15, 1)
    )
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    _confusion(figure, axes[0, 0], found)
    _by_class(axes[0, 1], found)
    _robustness(figure, axes[1, 0], found)
    _reliability(axes[1, 1], found)
    figure.suptitle(
        figures.plain(
            f"{found['dataset']}, {found['pictures']:,} test pictures, {found['checkpoint']}: "
            f"weights of {found['weights']}",
            150,
        ),
        fontsize=9,
    )
    figures.save(figure, path, dpi=110)


def _label(text):
    return figures.plain(text, 18)


def _confusion(figure, axis, found):
    counts = torch.tensor(found["confusion"], dtype=torch.float)
    shares = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    image = axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=100)
    classes = found["classes"]
    axis.set(title="confusion (% of the true class)", xlabel="answer", ylabel="true class")
    if len(classes) <= MOST_NAMES:
        axis.set_xticks(
            range(len(classes)),
            map(_label, classes),
            rotation=45,
            ha="right",
            rotation_mode="anchor",
        )
        axis.set_yticks(range(len(classes)), map(_label, classes))
        for i, row in enumerate(shares.tolist()):
            for j, share in enumerate(row):
                if share >= 0.5:
                    axis.text(
                        j,
                        i,
                        f"{share:.0f}",
                        ha="center",
                        va="center",
                        fontsize=min(8, 90 / len(classes)),
                        color="white" if share > 55 else "black",
                    )
    figure.colorbar(image, ax=axis, shrink=0.8)


def _by_class(axis, found):
    order = sorted(
        (value, name)
        for value, name in zip(found["by_class"], found["classes"])
        if value is not None
    )
    shown = (
        order if len(order) <= MOST_NAMES else order[: MOST_NAMES // 2] + order[-MOST_NAMES // 2 :]
    )
    title = (
        "accuracy by class"
        if len(shown) == len(order)
        else f"the {MOST_NAMES // 2} worst and best of {len(order)} classes"
    )
    axis.barh(
        range(len(shown)),
        [value for value, _ in shown],
        color="#9ecae1",
        edgecolor=figures.RIGHT,
        linewidth=0.6,
    )
    for row, (value, _) in enumerate(shown):
        place = 0 if value > 15 else value
        axis.annotate(
            f"{value:.1f}",
            (place, row),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axis.axvline(found["accuracy"], color="#444444", linestyle=":", linewidth=1)
    title += f" (dotted: all, {found['accuracy']:.2f} %)"
    axis.set(title=title, xlabel="accuracy (%)", xlim=(0, 100), ylim=(len(shown) - 0.4, -0.6))
    axis.set_yticks(range(len(shown)), [_label(name) for _, name in shown])
    axis.tick_params(axis="y", length=0)
    figures.tidy(axis)
    axis.grid(axis="y", visible=False)


def _reliability(axis, found):
    """Accuracy against confidence, with the pictures of each bin as the dots' area; a handful says nothing, and is left out."""
    total, bins = found["pictures"], [each for each in found["bins"] if each["pictures"] >= FEW]
    axis.plot((0, 100), (0, 100), color="#888888", linewidth=1, linestyle=":", label="calibrated")
    confidence, accuracy = ([each[name] for each in bins] for name in ("confidence", "accuracy"))
    axis.vlines(confidence, confidence, accuracy, color=figures.WRONG, linewidth=1.5, label="gap")
    axis.scatter(
        confidence,
        accuracy,
        s=[12 + 700 * each["pictures"] / total for each in bins],
        color=figures.RIGHT,
        alpha=0.65,
        linewidth=0,
        label=f"bins of {FEW} pictures or more (area)",
        clip_on=False,
    )
    axis.set(
        title=f"reliability: expected calibration error {found['calibration_error']:.2f} %",
        xlabel="mean confidence (%)",
        ylabel="accuracy (%)",
        xlim=(0, 100),
        ylim=(0, 100),
    )
    figures.tidy(axis)
    legend = axis.legend(
        frameon=False, loc="best"
    )  # above the line where confidence is too high, below it else
    legend.legend_handles[-1].set_sizes([40])


def _robustness(figure, axis, found):
    tough = found["robustness"]
    names = sorted(tough["by_corruption"], key=lambda name: -sum(tough["by_corruption"][name]))
    values = torch.tensor([tough["by_corruption"][name] for name in names])
    image = axis.imshow(values.numpy(), cmap="viridis", vmin=0, vmax=100, aspect="auto")
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            axis.text(
                j,
                i,
                f"{value:.0f}",
                ha="center",
                va="center",
                fontsize=8,
                color="black" if value > 60 else "white",
            )
    axis.set_xticks(range(5), corruptions.STRENGTHS)
    axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    where = f"accuracy (%) on {tough['pictures']:,} corrupted pictures"
    axis.set(
        xlabel="strength", title=f"{where}:\nmean {tough['mean']:.1f}, clean {tough['clean']:.1f}"
    )
    axis.tick_params(length=0)
    figure.colorbar(image, ax=axis, shrink=0.8)
