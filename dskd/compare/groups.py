"""Groups: runs of one experiment that differ in nothing but their seed."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dskd.compare.choosing import SEED, settings_of
from dskd.compare.statistics import Estimate
from dskd.tracking import TrackedRun

# Digests of what a run was made from: where they differ the settings alone do not tell two groups apart.
INPUT_TAGS = ("dataset", "teacher", "student", "sense_dictionary")
_SHOWN_DIGITS = 12


@dataclass(frozen=True)
class Group:
    """Runs of the same settings, under a name that no other group of the comparison has."""

    name: str
    runs: Sequence[TrackedRun]

    @property
    def label(self) -> str:
        """The name, and how many seeds where there are several."""
        return self.name if len(self.runs) == 1 else f"{self.name} ({len(self.runs)} seeds)"

    def estimate(self, values: Mapping[str, float]) -> Estimate | None:
        """Over the seeds, from {run id: value}; None where no run has one."""
        found = [values[run.run_id] for run in self.runs if run.run_id in values]
        return Estimate.of(found) if found else None

    def by_seed(self, values: Mapping[str, float]) -> dict[str, list[float]]:
        """{seed: values of its runs}."""
        seeds: dict[str, list[float]] = {}
        for run in self.runs:
            if run.run_id in values:
                seeds.setdefault(run.params.get(SEED, "-"), []).append(values[run.run_id])
        return seeds


def group_runs(runs: Sequence[TrackedRun]) -> list[Group]:
    """The runs by experiment and settings without the seed, in the order of their first runs."""
    together: dict[tuple, list[TrackedRun]] = {}
    for run in runs:
        settings = {key: value for key, value in settings_of(run).items() if key != SEED}
        together.setdefault((run.experiment_id, *sorted(settings.items())), []).append(run)
    groups = [Group(_common_name([run.name for run in members]), members) for members in together.values()]
    if len({group.name for group in groups}) < len(groups) > 1 and len({run.experiment_id for run in runs}) > 1:
        groups = [Group(f"{group.runs[0].experiment}/{group.name}", group.runs) for group in groups]
    return _numbered(groups)


def config_differences(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """(key, its value in each group) of the settings in which the groups differ, and of the digests of their inputs."""
    rows = []
    settings = [settings_of(group.runs[0]) for group in groups]
    for key in sorted(set().union(*settings) - {SEED}):
        values = [one.get(key, "-") for one in settings]
        if len(set(values)) > 1:
            rows.append((key, values))
    for tag in INPUT_TAGS:
        values = [_digest_shown(group, tag) for group in groups]
        if len(set(values)) > 1:
            rows.append((f"{tag} (digest)", values))
    return rows


def _digest_shown(group: Group, tag: str) -> str:
    digests = {run.tags.get(tag, "-") for run in group.runs}
    return digests.pop()[:_SHOWN_DIGITS] if len(digests) == 1 else f"{len(digests)} different"


def _common_name(names: Sequence[str]) -> str:
    """What the names of a group's runs begin with: `kd` of `kd-seed1` and `kd-seed2`."""
    distinct = list(dict.fromkeys(names))
    if len(distinct) == 1:
        return distinct[0]
    prefix = re.sub(r"[-_.=+ ]+(?:seed|s)?[-_.=+ ]*\d*$", "", _common_prefix(distinct))
    return prefix or f"{distinct[0]} and others"


def _common_prefix(texts: Sequence[str]) -> str:
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    return "".join(letters[0] for letters in alike)


def _numbered(groups: Sequence[Group]) -> list[Group]:
    """The same groups; of those with one name the second is called `NAME #2`, and so on."""
    seen: dict[str, int] = {}
    numbered = []
    for group in groups:
        seen[group.name] = seen.get(group.name, 0) + 1
        number = seen[group.name]
        numbered.append(group if number == 1 else Group(f"{group.name} #{number}", group.runs))
    return numbered
