"""The choice of tracked runs to compare: by experiment, tag, name or id."""

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dskd.config import Config
from dskd.errors import UserError
from dskd.tracking import KIND_TAG, PARENT, TrackedRun, read_run, read_runs

# Settings for where and how a run is made. They may differ within one and the same experiment.
_SHOWN_TEXTS = ("evaluation.prompts", "evaluation.samples", "evaluation.sample_tokens")  # they change no measure
_IGNORED_PARAMS, _IGNORED_SECTIONS = ("run", "workdir", "seeds", *_SHOWN_TEXTS), ("runs.", "tracking.")
SEED = "seed"
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_SHORT_ID = re.compile(r"[0-9a-f]{8,31}$")  # the beginning of a run's id, as comparisons print it


@dataclass(frozen=True)
class Selection:
    """The user's choice of runs; if empty, the newest run of each name in the config's experiment."""

    experiments: Sequence[str] = ()
    runs: Sequence[str] = ()  # names or ids
    tags: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.experiments or self.runs or self.tags)


@dataclass(frozen=True)
class Chosen:
    """The runs to compare, and notes about runs that are left out."""

    runs: Sequence[TrackedRun]
    notes: Sequence[str] = ()


def choose_runs(config: Config, selection: Selection) -> Chosen:
    """Chooses the runs: in the order of the user's selection; without one, in the config's order and by start time.

    Of several runs with the same name and settings, the newest is chosen, because it was trained last. If the selection
    is empty, the newest run of each name is chosen, whatever its settings.

    Raises:
        UserError: when a part of the selection has no run that can be compared; the message says what to choose.
    """
    # Full ids are looked up one by one, in any experiment. If nothing else is selected, the choice is complete.
    ids = [text for text in selection.runs if _RUN_ID.fullmatch(text)]
    names = [text for text in selection.runs if text not in ids]
    by_id: list[TrackedRun] = []
    for run_id in ids:
        run = read_run(config, run_id)
        if run is None:
            raise UserError(f"--run {run_id}: no run has this id; `dskd compare --config FILE` shows the newest runs")
        if run.tags.get(KIND_TAG) == PARENT:
            raise UserError(f"--run {run_id}: {run.name!r} is the parent of a sweep and trained nothing; name its runs")
        if selection.experiments and run.experiment not in selection.experiments:
            raise UserError(
                f"--run {run_id}: {run.name!r} is in experiment {run.experiment!r}, but --experiment names only "
                f"{', '.join(selection.experiments)}; add that experiment, or leave --experiment out"
            )
        by_id.append(run)
    if not names and ids:
        return Chosen(_matching(by_id, selection.tags, by_id))
    all_runs = runs = read_runs(config, selection.experiments)
    if not selection:
        newest = newest_of_each(runs, config.run_names)
        return Chosen(newest, _hidden(runs, newest))
    # A text that is not a name but is a prefix of exactly one run's id means that run.
    known = list(dict.fromkeys(run.name for run in runs))
    by_beginning = {
        name: [run for run in runs if run.run_id.startswith(name)] for name in names if _SHORT_ID.match(name)
    }
    by_id += [alike[0] for name, alike in by_beginning.items() if name not in known and len(alike) == 1]
    names = [name for name in names if name in known or len(by_beginning.get(name, ())) != 1]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"its runs: {', '.join(sorted(known)) or 'none'}"
            where = ", ".join(selection.experiments) or config.tracking.experiment
            raise UserError(f"--run {name}: experiment {where} has no run of this name; {hint}")
    if selection.runs:
        runs = [run for run in runs if run.name in names]
    # Tags are matched before the newest run is chosen: the newest of some name and settings may lack the tags.
    runs = [run for run in runs if _has(run, selection.tags)]
    newest = newest_of_each(runs, names, settings_matter=True)
    matching = _matching([*by_id, *(run for run in newest if run not in by_id)], selection.tags, all_runs)
    return Chosen(matching, _hidden(runs, matching))


def newest_of_each(
    runs: Sequence[TrackedRun], names: Sequence[str], *, settings_matter: bool = False
) -> list[TrackedRun]:
    """Returns the newest run of each name: first those of `names`, in that order, then the others by start time.

    With `settings_matter`, returns the newest run of each name and settings, which include the seed; a run that was
    trained to its end is preferred to one that was not.
    """
    newest: dict[tuple, TrackedRun] = {}
    for run in sorted(runs, key=lambda run: (settings_matter and run.status == "FINISHED", run.start_time_s)):
        settings = tuple(sorted(settings_of(run).items())) if settings_matter else ()
        newest[run.experiment_id, run.name, settings] = run
    order = {name: number for number, name in enumerate(names)}
    return sorted(newest.values(), key=lambda run: (order.get(run.name, len(order)), run.start_time_s))


def settings_of(run: TrackedRun) -> dict[str, str]:
    """Returns the run's configuration without the settings for where and how it was made."""
    return {
        key: value
        for key, value in run.params.items()
        if key not in _IGNORED_PARAMS and not key.startswith(_IGNORED_SECTIONS)
    }


def _hidden(runs: Sequence[TrackedRun], chosen: Sequence[TrackedRun]) -> list[str]:
    """Returns a note about older runs with the name of a chosen one; [] if there are none."""
    ids, names = {run.run_id for run in chosen}, {run.name for run in chosen}
    older = [run for run in runs if run.run_id not in ids and run.name in names]
    if not older:
        return []
    shown = ", ".join(f"{count} of {name}" for name, count in Counter(run.name for run in older).items())
    return [f"older runs of the same name are left out ({shown}); --run ID names one of them"]


def _has(run: TrackedRun, tags: Mapping[str, str]) -> bool:
    return all(run.tags.get(key) == value for key, value in tags.items())


def _matching(runs: Sequence[TrackedRun], tags: Mapping[str, str], all_runs: Sequence[TrackedRun]) -> list[TrackedRun]:
    """Returns the runs that have these tags. If there is none, the UserError names values that these tags have in
    `all_runs`.
    """
    chosen = [run for run in runs if _has(run, tags)]
    if chosen:
        return chosen
    experiments = ", ".join(dict.fromkeys(run.experiment for run in all_runs))
    where = f" in experiment {experiments}" if experiments else ""
    if not tags:
        raise UserError(f"there is no run to compare{where}")
    required = ", ".join(f"{key}={value}" for key, value in tags.items())
    seen = sorted({f"{key}={run.tags[key]}" for run in all_runs for key in tags if key in run.tags})
    raise UserError(f"no run{where} has the tags {required}; there are {', '.join(seen[:8]) or 'none with these keys'}")
