"""A published experiment: a directory of results/, checked, and what its tables say.

    experiment = load("results/eca")      # refuses files that don't belong together
    experiment.rows, experiment.differences, experiment.facts

results/eca holds experiment.json (title, comparisons, command, the names of its runs, whether each
ran alone on its machine, so that its time counts), a directory
<label>-s<seed> for each run with config.json, metrics.csv and summary.json, notes.md, and the
figure. The labels are the rows of the table.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from analysis import differences, metrics, replicates, tables
from common import files
from common.errors import UserError
from common.text import printable

ABOUT, NOTES, FIGURE = "experiment.json", "notes.md", "curves.svg"
COLUMNS = "experiment n test tta train_clean train epochs parameters gmacs"
DECIMAL = r"\d+\.\d+"


@dataclass
class Experiment:
    """about: experiment.json; groups: a replicates.Group for each label; configs: of all runs.

    planned: how many seeds there are to be, if it is known.
    """

    directory: Path
    about: dict
    groups: list
    configs: list
    planned: int = 0

    @property
    def name(self):
        return self.directory.name

    @property
    def seeds(self):
        return min(len(group.counted) for group in self.groups)

    @property
    def progress(self):
        """Such as "2 of 3 seeds"; "" if all that were planned are measured."""
        return f"{self.seeds} of {self.planned} seeds" if self.seeds < self.planned else ""

    @property
    def title(self):
        return self.about["title"] + (f" ({self.progress})" if self.progress else "")

    @property
    def selection(self):
        """What was selected on the test set, as half a sentence; "" if nothing was."""
        selected = self.about.get("selected_on_test", "")
        return f"{selected} was selected on the test set" if selected else ""

    @property
    def heading(self):
        return self.title[:1].upper() + self.title[1:]

    @property
    def rows(self):
        """The table: a row for each label. Without about["timed"], runs shared their machine.

        Then the median time of an epoch is shown, which an interruption doesn't change.
        """
        wanted = [*COLUMNS.split(), "seconds" if self.about.get("timed") else "epoch_seconds"]
        table = tables.compare(self.groups, wanted)
        for key in wanted:
            if all(row[key] is None for row in table.rows):
                del table.columns[key]
        return table.cells()

    @property
    def differences(self):
        """A row for each comparison and measure: the difference of accuracy with its interval.

        Accuracies on training images are compared where both groups have them.
        """
        return [
            {"question": question, **tables.difference_cells(*compared)}
            for question, *compared in differences.compare(self.groups, self.about["comparisons"])
        ]

    @property
    def data(self):
        """The datasets, by the names that experiment.json gives to folders, and their limits."""
        names = self.about.get("data", {})
        data_sets = {}
        for config in self.configs:
            arguments = config["arguments"]
            folder = arguments["dataset"] == "folder"
            name = arguments["data_dir"] if folder else arguments["dataset"]
            name, limit = names.get(name, name), arguments.get("limit_train")
            data_sets[f"{limit:,} training images of {name}" if limit else name] = True
        return ", ".join(data_sets)

    @property
    def threads(self):
        """Such as "2 threads"; "" on another device than a CPU."""
        if not all(config["device"].startswith("cpu") for config in self.configs):
            return ""
        numbers = self._in_all_parts("threads")
        return f"{', '.join(numbers)} thread{'' if numbers == ['1'] else 's'}"

    @property
    def _parts(self):
        """The config.json of all runs, and what is known of their parts where they were resumed."""
        return [part for config in self.configs for part in (config, *config.get("resumed", []))]

    def _in_all_parts(self, name):
        """The values that parts of runs have of a fact, each once, as texts."""
        return list(dict.fromkeys(str(part[name]) for part in self._parts if name in part))

    @property
    def commits(self):
        """Of all runs, and of their parts where they were resumed."""
        return list(dict.fromkeys(part["git"]["commit"] for part in self._parts))

    @property
    def facts(self):
        """Sentences with what the runs were made on, as in their config.json."""

        names = ("device", "threads", "precision", "torch")
        known = {name: ", ".join(self._in_all_parts(name)) for name in names}
        commits = ", ".join(commit[:12] for commit in self.commits)
        if len(self.commits) > 1:
            commits += f" ({self.about['reference']['compared']})"
        reported = ", ".join(dict.fromkeys(group.reported for group in self.groups))
        runs = [run for group in self.groups for run in group.counted]
        weights = dict.fromkeys(run.summary["weights"] for run in runs if "weights" in run.summary)
        if weights:
            reported += f" (weights: {', '.join(weights)})"
        selection = f" {self.selection[:1].upper()}{self.selection[1:]}." if self.selection else ""
        return [
            f"Data: {self.data}. Test accuracy of the {reported}, mean ± standard deviation over "
            f"n seeds.{selection}",
            f"Machine: {known['device']}, threads: {known['threads']}, {known['precision']}; "
            f"torch {known['torch']}. Commit: {commits}.",
        ]

    @property
    def notes(self):
        """The paragraphs of notes.md: what the result means. [] without the file."""
        path = self.directory / NOTES
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]

    @property
    def digest(self):
        """Of what the figure is drawn from."""
        paths = sorted(self.directory.glob("*/metrics.csv"))
        contents = [f"{path.parent.name}\n".encode() + path.read_bytes() for path in paths]
        return hashlib.sha256(b"\n".join(contents)).hexdigest()[:16]

    def check_notes(self):
        """Raises UserError where notes.md has a decimal number that the tables don't have."""
        tabled = [cell for row in [*self.rows, *self.differences] for cell in row.values()]
        known = set(re.findall(DECIMAL, " ".join(tabled)))
        for number in re.findall(DECIMAL, " ".join(self.notes)):
            if number not in known:
                raise UserError(f"{self.directory / NOTES}: {number} is not in the tables", 2)


def find(results):
    """The published experiments in a directory, by name. Raises UserError."""
    return [load(path.parent) for path in sorted(Path(results).glob(f"[!.]*/{ABOUT}"))]


def load(directory):
    """An Experiment. Raises UserError where its files don't belong together."""
    directory = Path(directory)
    about = files.read_json(directory / ABOUT)
    if not _is_complete(about):
        raise _refusal(directory, f"holds no published experiment (no readable {ABOUT})")
    names = about["runs"]
    present = {path.name for path in directory.iterdir() if path.is_dir()}
    if present != set(names):
        one = min(present ^ set(names))
        reason = f"lacks {one}" if one in names else f"holds {one}, which {ABOUT} doesn't name"
        raise _refusal(directory, reason)
    by_label = {}
    for name in names:
        label, _, seed = name.rpartition("-s")
        by_label.setdefault(label, {})[seed] = _read_run(directory / name, seed)
    for label, members in by_label.items():
        _check_replicates(directory, label, members)
    groups = [replicates.Group(label, list(runs.values())) for label, runs in by_label.items()]
    configs = [files.read_json(directory / name / "config.json") for name in names]
    precisions = sorted({str(config.get("precision")) for config in configs})
    if len(precisions) > 1:
        raise _refusal(directory, f"has runs in {' and in '.join(precisions)}")
    experiment = Experiment(directory, about, groups, configs)
    _check_comparisons(experiment)
    tested = about.get("reference", {}).get("commits", [])
    if len(experiment.commits) > 1 and not set(experiment.commits) <= set(tested):
        commits = ", ".join(commit[:12] for commit in experiment.commits)
        raise _refusal(directory, f"has runs of different commits: {commits}")
    return experiment


def _is_complete(about):
    """Whether experiment.json has all keys, with values of the right types."""

    def are_texts(values):
        return isinstance(values, list) and all(isinstance(value, str) for value in values)

    def is_comparison(value):
        return are_texts(value) and len(value) == 3

    comparisons, reference = about.get("comparisons"), about.get("reference", {})
    return (
        are_texts([about.get("title"), about.get("command"), about.get("selected_on_test", "")])
        and are_texts(about.get("runs"))
        and bool(about["runs"])
        and isinstance(comparisons, list)
        and all(map(is_comparison, comparisons))
        and isinstance(about.get("data", {}), dict)
        and isinstance(about.get("timed", False), bool)
        and isinstance(reference, dict)
        and are_texts(reference.get("commits", []))
        and isinstance(reference.get("compared", ""), str)
    )


def _refusal(directory, reason):
    return UserError(printable(f"{directory} {reason}"), status=2)


def _read_run(path, seed):
    """A metrics.Run. Raises UserError if it isn't finished or contradicts itself."""
    run, config = metrics.Run(path / "metrics.csv"), files.read_json(path / "config.json")
    if not run.arguments or not _has_origin(config) or config["git"].get("dirty") is not False:
        raise _refusal(path, "doesn't say its arguments, its device and an unmodified commit")
    if run.status != "finished" or run.scalars["test"] is None:
        raise _refusal(path, f"is not a finished run ({run.status})")
    if str(run.arguments.get("seed")) != seed:
        raise _refusal(path, f"is of seed {run.arguments.get('seed')}")
    epochs = run.summary.get("epochs")
    if not isinstance(epochs, int) or run.epochs != list(range(1, epochs + 1)):
        raise _refusal(path, f"has {len(run.epochs)} epochs in metrics.csv, not those it trained")
    last, test = run.scalars["last"], run.scalars["test"]
    selected = run.evaluation.endswith("val")  # then the curve isn't of the test images
    if not selected and last is not None and abs(last - test) > 1e-3:
        raise _refusal(path, f"reports {test:.2f} % in summary.json and {last:.2f} % in its curve")
    return run


def _has_origin(config):
    """Whether config.json names the device, and the commit of each part of the run."""
    parts = config.get("resumed", [])
    if not isinstance(config.get("device"), str) or not isinstance(parts, list):
        return False
    gits = [part.get("git") if isinstance(part, dict) else None for part in (config, *parts)]
    return all(isinstance(git, dict) and isinstance(git.get("commit"), str) for git in gits)


def _check_replicates(directory, label, members):
    """Raises UserError unless these runs {seed: run} differ by their seeds 0 to n-1 only."""
    wanted = {str(seed) for seed in range(len(members))}
    if set(members) != wanted:
        missing = min(wanted - set(members), key=int)
        seeds = " ".join(sorted(members, key=int))
        reason = f"lacks {label}-s{missing}: it has the seeds {seeds}, and must have 0 to n-1"
        raise _refusal(directory, reason)
    groups = replicates.group(list(members.values()))
    if len(groups) > 1:
        names, _ = replicates.compare_arguments(groups)
        raise _refusal(directory, f"has runs of {label} that differ in {', '.join(names)}")


def _check_comparisons(experiment):
    groups = {group.name: group for group in experiment.groups}
    for _, *labels in experiment.about["comparisons"]:
        for label in labels:
            if label not in groups:
                raise _refusal(experiment.directory, f"compares {label}, which has no runs")
        ours, theirs = (groups[label] for label in labels)
        if len(replicates.test_images([ours, theirs])) > 1:
            reason = f"compares {labels[0]} and {labels[1]}, which have other test images"
            raise _refusal(experiment.directory, reason)
