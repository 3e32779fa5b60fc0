"""What the runs of a sweep say together: tables and curves of the means, and the differences that answer its questions.

report("eca", runs, Path("runs/sweep-eca-cifar100"), command="python sweep.py eca")      # runs: plans.Run
"""

from analysis import curves, metrics, replicates, tables
from common import files
from sweeps.suites import SUITES

NOTE = """\
Differences are of final test accuracy, in points, experiment minus baseline. Standard errors are over seeds: of the mean of
the pairs' differences where the seeds pair, else Welch's. Intervals are 95 %, by Student's t. They speak of other seeds, not
of other pictures, and each for itself: of twenty rows without any difference, one is expected to look resolved.
"""


def report(name, runs, root, command):
    """Prints the tables of the finished runs, and writes results.md and curves.png."""
    finished, chosen = [run for run in runs if run.finished], SUITES[name]
    if not finished:
        return
    groups = {
        label: [run for run in finished if run.label == label] for label in chosen.experiments
    }
    groups = {
        label: [metrics.Run(run.path / "metrics.csv") for run in group]
        for label, group in groups.items()
        if group
    }
    means, answers = (
        [replicates.Group(*each) for each in groups.items()],
        list(differences(chosen.questions, finished)),
    )
    experiments = tables.compare(
        means, ("experiment", "n", "test", "train", "parameters", "gmacs")
    ).cells()
    curves.draw(means, root / "curves.png")

    text = f"# {name}: {chosen.title}\n\n    {command}\n\n{origin(finished)}\n\n"
    text += f"{tables.markdown_table(experiments)}\n![means over seeds](curves.png)\n"
    tables.print_table(experiments)
    if answers:
        text += f"\n{tables.markdown_table(answers)}\n{NOTE}"
        print()
        tables.print_table(answers)
    absent = [run.path.name for run in runs if run not in finished]
    text += f"\nNot finished: {', '.join(absent)}.\n" if absent else ""
    with files.replacing(root / "results.md", "w") as file:
        file.write(text)
    print(f"\ntables: {root / 'results.md'}  curves: {root / 'curves.png'}")


def differences(questions, finished):
    """A row of the table for each pair of experiments that a question names and that has runs."""
    summaries = {}
    for run in finished:
        summaries.setdefault(run.label, {})[run.args.seed] = run.summary
    for question, ours, theirs in questions:
        if ours not in summaries or theirs not in summaries:
            continue
        a, b = (
            {seed: found["test_acc"] for seed, found in summaries[label].items()}
            for label in (ours, theirs)
        )
        found = replicates.difference(a, b)
        size, base = (
            next(iter(summaries[label].values()))["parameters"] for label in (ours, theirs)
        )
        yield {
            "experiment": ours,
            "baseline": theirs,
            "difference": f"{found.value:+.2f}",
            "std error": "" if found.error is None else f"{found.error:.2f}",
            "95 % interval": ""
            if found.error is None
            else f"{found.low:+.2f} to {found.high:+.2f}",
            "n": found.n,
            "verdict": found.verdict,
            "parameters": f"{100 * (size / base - 1):+.1f} %",
            "question": question,
        }


def origin(finished):
    """What the runs were made from and on, as their config.json says."""
    configs = [metrics.read_json(run.path / "config.json") for run in finished]
    commits = [config.get("git") or {"commit": "unknown", "dirty": False} for config in configs]
    facts = {
        "dataset": [run.args.dataset for run in finished],
        "epochs": [run.args.epochs for run in finished],
        "seeds": [run.args.seed for run in finished],
        "accuracy of the": [run.summary.get("reported") for run in finished],
        "device": [config.get("device") for config in configs],
        "torch": [config.get("torch") for config in configs],
        "commit": [each["commit"][:12] + " (changed since)" * each["dirty"] for each in commits],
    }
    return (
        "; ".join(
            f"{fact} {', '.join(map(str, dict.fromkeys(values)))}" for fact, values in facts.items()
        )
        + "."
    )
