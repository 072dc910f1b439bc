"""Groups: runs of one experiment that differ only in their seed."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dskd.compare.choosing import SEED, settings_of
from dskd.compare.statistics import Estimate
from dskd.tracking import TrackedRun

# Tags with the digests of a run's inputs. They tell groups apart whose settings are the same.
INPUT_TAGS = ("dataset", "teacher", "student", "sense_dictionary")
SHOWN_DIGITS = 12


@dataclass(frozen=True)
class Group:
    """A group of runs with the same settings, under a name that is unique in the comparison."""

    name: str
    runs: Sequence[TrackedRun]

    @property
    def label(self) -> str:
        """The name, with the number of seeds if there are several."""
        return self.name if len(self.runs) == 1 else f"{self.name} ({len(self.runs)} seeds)"

    @property
    def mixed_inputs(self) -> list[str]:
        """The inputs that are not the same for all runs of the group."""
        return [tag for tag in INPUT_TAGS if len({run.tags.get(tag) for run in self.runs}) > 1]

    def estimate(self, values: Mapping[str, float]) -> Estimate | None:
        """Returns the mean over seeds, with its interval, from {run id: value}; None if no run has a value."""
        run_values = [values[run.run_id] for run in self.runs if run.run_id in values]
        return Estimate.of(run_values) if run_values else None

    def by_seed(self, values: Mapping[str, float]) -> dict[str, list[float]]:
        """Returns {seed: values of its runs}, from {run id: value}."""
        seeds: dict[str, list[float]] = {}
        for run in self.runs:
            if run.run_id in values:
                seeds.setdefault(run.params.get(SEED, "-"), []).append(values[run.run_id])
        return seeds


def group_runs(runs: Sequence[TrackedRun]) -> tuple[list[Group], list[str]]:
    """Groups the runs by experiment and by settings without the seed; also returns notes about the groups.

    The groups are in the order of their first runs. A group has one run for each seed: if two have the same seed, the
    one that was trained to its end is kept; of equal ones, the newer. If two runs have the same seed but different
    inputs, the runs are also grouped by inputs, because they differ in more than their settings.
    """
    together: dict[tuple, list[TrackedRun]] = {}
    for run in runs:
        settings = {key: value for key, value in settings_of(run).items() if key != SEED}
        together.setdefault((run.experiment_id, *sorted(settings.items())), []).append(run)
    notes: list[str] = []
    members = [group for alike in together.values() for group in _by_inputs(alike)]
    groups = [
        Group(_common_name([run.name for run in members_once]), members_once)
        for members_once in (_once_a_seed(alike, notes) for alike in members)
    ]
    if len({group.name for group in groups}) < len(groups) > 1 and len({run.experiment_id for run in runs}) > 1:
        groups = [Group(f"{group.runs[0].experiment}/{group.name}", group.runs) for group in groups]
    groups = _numbered(groups)
    notes += [
        f"the seeds of {group.name} have different inputs ({', '.join(group.mixed_inputs)}), which adds to their "
        "spread; --tag INPUT=HASH chooses the runs with one of them"
        for group in groups
        if group.mixed_inputs
    ]
    return groups, notes


def _by_inputs(runs: Sequence[TrackedRun]) -> list[list[TrackedRun]]:
    """Returns all runs as one group, or groups them by their inputs if runs of one seed have different inputs."""
    by_seed: dict[str, set[tuple]] = {}
    for run in runs:
        by_seed.setdefault(run.params.get(SEED, "-"), set()).add(_inputs_of(run))
    if all(len(inputs) == 1 for inputs in by_seed.values()):
        return [list(runs)]
    by_inputs: dict[tuple, list[TrackedRun]] = {}
    for run in runs:
        by_inputs.setdefault(_inputs_of(run), []).append(run)
    return list(by_inputs.values())


def _inputs_of(run: TrackedRun) -> tuple:
    return tuple(run.tags.get(tag) for tag in INPUT_TAGS)


def _once_a_seed(runs: Sequence[TrackedRun], notes: list[str]) -> list[TrackedRun]:
    """Returns one run for each seed, and adds a note about the others."""
    best: dict[str, TrackedRun] = {}
    for run in sorted(runs, key=lambda run: (run.status == "FINISHED", run.start_time_s)):
        best[run.params.get(SEED, "-")] = run
    left_out = [run for run in runs if run not in best.values()]
    if left_out:
        kept = [run.name for run in runs if run in best.values()]
        names = ", ".join(run.label for run in left_out)
        notes.append(f"left out, because other runs have the same settings and seed: {names}; kept: {', '.join(kept)}")
    return [run for run in runs if run in best.values()]


def config_differences(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Returns (key, its value in each group) for each setting and each input's digest in which the groups differ."""
    rows = []
    settings = [settings_of(group.runs[0]) for group in groups]
    for key in sorted(set().union(*settings) - {SEED}):
        values = [group_settings.get(key, "-") for group_settings in settings]
        if len(set(values)) > 1:
            rows.append((key, values))
    for tag in INPUT_TAGS:
        values = [_digest_shown(group, tag) for group in groups]
        if len(set(values)) > 1:
            rows.append((f"{tag} (digest)", values))
    return rows


def _digest_shown(group: Group, tag: str) -> str:
    digests = {run.tags.get(tag, "-") for run in group.runs}
    return digests.pop()[:SHOWN_DIGITS] if len(digests) == 1 else f"{len(digests)} different"


def _common_name(names: Sequence[str]) -> str:
    """Returns the common beginning of the names of a group's runs: `kd` for `kd-seed1` and `kd-seed2`."""
    distinct = list(dict.fromkeys(names))
    if len(distinct) == 1:
        return distinct[0]
    alike = os.path.commonprefix(distinct)  # noqa: RUF071 # by letters, as names are not paths
    prefix = re.sub(r"[-_.=+ ]+(?:seed|s)?[-_.=+ ]*\d*$", "", alike)
    return prefix or f"{distinct[0]} and others"


def _numbered(groups: Sequence[Group]) -> list[Group]:
    """Returns the groups with unique names: the second group called NAME is renamed `NAME #2`, and so on."""
    seen: dict[str, int] = {}
    numbered = []
    for group in groups:
        seen[group.name] = seen.get(group.name, 0) + 1
        number = seen[group.name]
        numbered.append(group if number == 1 else Group(f"{group.name} #{number}", group.runs))
    return numbered
