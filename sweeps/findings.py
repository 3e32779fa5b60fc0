"""Results of a sweep: tables and curves of the means, and differences between experiments.

report("eca", runs, Path("runs/sweep-eca-cifar100"), "python sweep.py eca")   # runs: of plans.Run
"""

from analysis import curves, metrics, replicates, tables
from common import files
from sweeps.suites import SUITES

COLUMNS = ("experiment", "n", "test", "train", "parameters", "gmacs")
NOTE = """\
Differences are of final test accuracy, in points, experiment minus baseline. Standard errors are
over seeds: of the mean of the paired differences if the experiments share seeds, else Welch's.
Intervals are 95 %, by Student's t. They describe other seeds, not other images, and hold for each
row alone: of twenty rows without any difference, one is expected to look resolved.
"""


def report(name, runs, root, command):
    """Prints the tables of the finished runs and writes results.md and curves.png."""
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
    experiments = tables.compare(groups, COLUMNS).cells()
    answers = list(differences(suite.comparisons(), finished))
    curves.draw(groups, root / "curves.png")

    text = f"# {name}: {suite.title}\n\n    {command}\n\n{origin(finished)}\n\n"
    text += f"{tables.markdown_table(experiments)}\n![means over seeds](curves.png)\n"
    tables.print_table(experiments)
    if answers:
        text += f"\n{tables.markdown_table(answers)}\n{NOTE}"
        print()
        tables.print_table(answers)
    unfinished = [run.path.name for run in runs if run not in finished]
    if unfinished:
        text += f"\nNot finished: {', '.join(unfinished)}.\n"
    with files.replacing(root / "results.md", "w") as file:
        file.write(text)
    print(f"\ntables: {root / 'results.md'}  curves: {root / 'curves.png'}")


def differences(comparisons, finished):
    """A table row for each (question, experiment, baseline) that has finished runs."""
    accuracies, parameters = {}, {}
    for run in finished:
        summary = run.summary
        accuracies.setdefault(run.label, {})[run.args.seed] = summary["test_acc"]
        parameters[run.label] = summary["parameters"]
    for question, experiment, baseline in comparisons:
        if experiment not in accuracies or baseline not in accuracies:
            continue
        found = replicates.difference(accuracies[experiment], accuracies[baseline])
        ratio = parameters[experiment] / parameters[baseline]
        error = interval = ""
        if found.error is not None:
            error = f"{found.error:.2f}"
            interval = f"{found.low:+.2f} to {found.high:+.2f}"
        yield {
            "experiment": experiment,
            "baseline": baseline,
            "difference": f"{found.value:+.2f}",
            "std error": error,
            "95 % interval": interval,
            "n": found.n,
            "verdict": found.verdict,
            "parameters": f"{100 * (ratio - 1):+.1f} %",
            "question": question,
        }


def origin(finished):
    """A sentence with the data, versions and devices of the runs, as in their config.json."""
    configs = [files.read_json(run.path / "config.json") for run in finished]
    facts = {
        "dataset": [run.args.dataset for run in finished],
        "epochs": [run.args.epochs for run in finished],
        "seeds": [run.args.seed for run in finished],
        "accuracy of the": [run.summary.get("reported") for run in finished],
        "device": [config.get("device") for config in configs],
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
