"""Results of a sweep: tables and curves of the means, and differences between experiments.

report("eca", runs, Path("runs/sweep-eca-cifar100"), "python sweep.py eca")   # runs: of plans.Run
"""

import json

from analysis import curves, differences, formats, metrics, replicates, tables
from common import files
from sweeps.suites import SUITES

COLUMNS = (
    *("experiment", "n", "test", "error_rate", "train_clean", "train", "parameters", "per_million"),
    *("gmacs", "seconds", "epoch_seconds", "speed"),
)
NOTE = """\
Differences are of final accuracy on the test images or, with --eval-train, on the training images
without augmentation: in points, experiment minus baseline. Standard errors are over seeds: of the
mean of the paired differences if the experiments share seeds, else Welch's. Intervals are 95 %, by
Student's t: they cover the variation between seeds, not between test sets, and are not corrected
for multiple comparisons. Of twenty rows without any difference, one is expected to look resolved.
"""


def report(name, runs, root, command):
    """Prints the tables of the finished runs and writes results.md, .csv, .json and curves.png."""
    finished = [run for run in runs if run.finished]
    if not finished:
        return
    suite = SUITES[name]
    groups = []
    for label in suite.experiments:
        members = [run for run in finished if run.label == label]
        if members:
            read = [metrics.Run(run.path / "metrics.csv") for run in members]
            groups.append(replicates.Group(label, read))
    table = tables.compare(groups, COLUMNS)
    if suite.ranked:
        table.sort("test")
    experiments = table.cells()
    compared = list(differences.compare(groups, suite.comparisons()))

    text = f"# {name}: {suite.question}\n\n    {command}\n\n{origin(finished)}\n\n"
    text += f"{formats.markdown_table(experiments)}\n![means over seeds](curves.png)\n"
    text += "".join(f"\n{formats.markdown_text(sentence)}\n" for sentence in table.sentences)
    formats.print_table(experiments)
    if compared:
        cells = [difference_cells(*comparison) for comparison in compared]
        text += f"\n{formats.markdown_table(cells)}\n{NOTE}"
        print()
        formats.print_table(cells)
    unfinished = [run.path.name for run in runs if run not in finished]
    if unfinished:
        text += f"\nNot finished: {', '.join(unfinished)}.\n"
    results = {"suite": name, "question": suite.question, "command": command}
    results |= {
        "experiments": [_json_row(row) for row in table.rows],
        "differences": [json_difference(*comparison) for comparison in compared],
    }
    results["runs"] = [_json_run(run) for run in finished]
    contents = {"md": text, "csv": table.render("csv"), "json": json.dumps(results, indent=1)}
    for suffix, content in contents.items():
        with files.replacing(root / f"results.{suffix}", "w") as file:
            file.write(content)
    curves.draw(groups, root / "curves.png")
    print(f"\ntables: {root}/results.md, .csv, .json  curves: {root / 'curves.png'}")


def _json_row(row):
    """A row of the table of experiments: {"mean", "std", "n"} for what varies with the seed."""
    return {
        key: value._asdict() if isinstance(value, replicates.MeanStd) else value
        for key, value in row.items()
    }


def _json_run(run):
    known = {"experiment": run.label, "seed": run.args.seed, "directory": run.path.name}
    config = files.read_json(run.path / "config.json")
    return known | {"arguments": config.get("arguments"), "summary": run.summary}


def json_difference(question, ours, theirs, measure, difference):
    """What results.json says of a difference that differences.compare yields."""
    row = {"question": question, "experiment": ours.name, "baseline": theirs.name}
    row |= {"accuracy_on": differences.MEASURES[measure]}
    row |= {"parameters_percent": parameters_percent(ours, theirs)}
    return row | difference._asdict() | {"verdict": difference.verdict}


def difference_cells(question, ours, theirs, measure, difference):
    """{title: text} of the same."""
    cells = tables.difference_cells(ours, theirs, measure, difference)
    error = "" if difference.error is None else f"{difference.error:.2f}"
    parameters = f"{parameters_percent(ours, theirs):+.1f} %"
    return cells | {"std error": error, "parameters": parameters, "question": question}


def parameters_percent(ours, theirs):
    """How many more parameters one group of runs has than the other, in percent."""
    return 100 * (ours.scalar("parameters").mean / theirs.scalar("parameters").mean - 1)


def origin(finished):
    """A sentence with the data, versions and devices of the runs, as in their config.json."""
    configs = [files.read_json(run.path / "config.json") for run in finished]
    facts = {
        "dataset": [run.args.dataset for run in finished],
        "epochs": [run.args.epochs for run in finished],
        "seeds": [run.args.seed for run in finished],
        "accuracy of the": [run.summary.get("reported") for run in finished],
        "precision": [config.get("precision") for config in configs],
        "device": [config.get("device") for config in configs],
        "threads": [config.get("threads") for config in configs],
        "torch": [config.get("torch") for config in configs],
        "commit": [commit(config.get("git")) for config in configs],
    }
    texts = [
        f"{fact} {', '.join(map(str, dict.fromkeys(values)))}" for fact, values in facts.items()
    ]
    return "; ".join(texts) + "."


def commit(git):
    """The commit of a run's config.json; git is None outside a repository."""
    if not git:
        return "unknown"
    return git["commit"][:12] + (" (changed since)" if git["dirty"] else "")
