"""Results in the model cards of exports: written again after an evaluation, since a model is exported before it."""

import json
from pathlib import Path
from typing import Any

from dskd.artifacts import kinds
from dskd.artifacts.building import artifact_lock
from dskd.artifacts.lock import lock_if_free
from dskd.artifacts.manifest import Manifest, read_file, read_manifest
from dskd.config import Config
from dskd.console import warn
from dskd.errors import UserError
from dskd.evaluation.evaluations import EVALUATIONS, Evaluation
from dskd.evaluation.models import LABELS, TEACHER, UNTRAINED_STUDENT
from dskd.evaluation.suite import FILE
from dskd.training.exporting.card import FACTS, Result, render_card, write_card


def update_cards(config: Config) -> None:
    """Writes the model card of each of the config's exports again if there are results that it does not have.

    Exports of earlier versions, which have no card, stay as they are. A card that cannot be written is a warning.
    """
    for run in config.run_names:
        folder = config.path(kinds.EXPORT.folder, run)
        try:
            manifest = read_manifest(folder, kinds.EXPORT.name)
        except UserError:  # not exported, or damaged, which others report
            continue
        if FACTS not in manifest.facts:
            continue
        text = render_card(manifest.facts, manifest.packages, read_results(config, run, manifest))
        with lock_if_free(artifact_lock(folder)) as is_free:
            if not is_free:  # it is being exported again, so these results are of another model
                continue
            try:
                write_card(folder, text)
            except OSError as error:
                warn(f"{folder}: the results cannot be written into the model card ({error.strerror})")


def read_results(config: Config, run: str, export: Manifest) -> list[Result]:
    """Returns the results of an export in all evaluations, next to those of the teacher and the untrained student.

    Results of another model, or on other data than the export's, are left out.
    """
    digests = {
        TEACHER: export.teacher,
        UNTRAINED_STUDENT: export.facts[FACTS]["student"]["digest"],
        run: export.digest,
    }
    results = []
    for evaluation in EVALUATIONS.values():
        measured = {name: _read(config, evaluation, name, digest) for name, digest in digests.items()}
        own = measured[run]
        if own is None:
            continue
        section = evaluation.in_card
        same = {
            name: result[0]
            for name, result in measured.items()
            if result is not None and _data(result[1]) == _data(own[1])
        }
        texts = {name: section.rows(values) for name, values in same.items()}
        rows = [(label, [of_model.get(label, "-") for of_model in texts.values()]) for label in texts[run]]
        results.append(
            Result(
                section.title(own[0]),
                [LABELS.get(name, "this model") for name in same],
                rows,
                section.data,
                section.scores(own[0]),
            )
        )
    return results


def _read(
    config: Config, evaluation: Evaluation, name: str, digest: str | None
) -> tuple[dict[str, Any], Manifest] | None:
    """Returns the measures of a model and their manifest; None if it was not evaluated, or another model was."""
    folder: Path = evaluation.folder_of(config, name)
    try:
        manifest = read_manifest(folder, evaluation.kind.name)
    except UserError:
        return None
    content = read_file(folder, FILE)
    if content is None or manifest.inputs.get("model") != digest:
        return None
    return json.loads(content), manifest


def _data(manifest: Manifest) -> dict[str, Any]:
    """Returns everything that results depend on but the model."""
    inputs = {name: digest for name, digest in manifest.inputs.items() if name != "model"}
    return {**inputs, "precision": manifest.config.get("precision")}
