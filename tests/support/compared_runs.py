"""Runs as training and evaluation leave them in MLflow, without a model: for the tests of `dskd compare`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rank_processes import ONE_RANK

from dskd.config import Config
from dskd.config.reading import load_config
from dskd.evaluation.held_out_text import EXAMPLES_FILE, MEASURES
from dskd.evaluation.scores_by_example import Examples, Measure, save_examples
from dskd.tracking import log_results, start_tracking

EXPERIMENT, OTHER = "senses & <b>words</b>", "other"
N, STEPS, DATA, OTHER_DATA = 60, 8, "d" * 64, "e" * 64
TOKENS = np.random.default_rng(5).integers(20, 40, N)
TAGS = {"device": "cpu", "world_size": "2", "teacher": "7" * 64, "student": "8" * 64, "sense_dictionary": "9" * 64}


def examples_of(better: float, seed: int, data: str = DATA) -> Examples:
    """Returns a model's scores: texts are equally hard for all models, and this one is `better` nats a token better."""
    of_texts, of_model = np.random.default_rng(1), np.random.default_rng([2, seed])
    per_token = 5 + of_texts.normal(0, 0.5, N) - better + of_model.normal(0, 0.02, N)
    lexical, alignable = TOKENS // 4, TOKENS // 10
    columns = {
        "nll": per_token * TOKENS,
        "tokens": TOKENS,
        "correct": of_model.binomial(TOKENS, 0.3 + better / 2),
        "agree": of_model.binomial(TOKENS, 0.5 + better / 2),
        "lexical_nll": (per_token + 0.3) * lexical,
        "lexical_tokens": lexical,
        "aligned": of_model.binomial(alignable, 0.6),
        "alignable": alignable,
    }
    return Examples(data, [str(number) for number in range(N)], columns, MEASURES)


def track_run(
    path: Path,
    name: str,
    *overrides: str,
    better: float = 0.0,
    seed: int = 0,
    data: str = DATA,
    evaluated: bool = True,
    tags: Mapping[str, str] | None = None,
) -> str:
    """Makes a run like those of training and evaluation; returns its id."""
    config = load_config(path, [f"run={name}", f"seed={seed}", *overrides])
    tracker = start_tracking(config, ONE_RANK, tags=TAGS | dict(tags or {}))
    tracker.log_metrics({"coverage/with_senses": 0.62, "coverage/with_synonyms": 0.25}, 0)
    noise = np.random.default_rng(seed).normal(0, 0.05, STEPS)
    for step in range(1, STEPS + 1):
        loss = 3 + 4 / step - better + noise[step - 1]
        tracker.log_metrics(
            {"train/loss": loss, "train/ce": loss / 2, "train/grad_norm": 1.0 / step, "speed/step_s": 0.5}
            | {"speed/tokens_per_s": 10.0 if step == 1 else 1000.0 + seed, "cost/device_hours": step / 10},
            step,
        )
    tracker.finish("FINISHED")
    assert tracker.run_id is not None
    if evaluated:
        examples = examples_of(better, seed + 10 * len(name), data)
        file = config.path(EXAMPLES_FILE)
        save_examples(file, examples)
        log_results(config, name, tracker.run_id, "evaluation", examples.values(), file, data=data, step=STEPS)
    return tracker.run_id


def track_runs(path: Path) -> dict[str, str]:
    """Makes the runs of a config in which the experiment is `EXPERIMENT`.

    They are two settings with two seeds each, one run of a third, and the parent of a sweep; in `OTHER`, a run that was
    evaluated on other data.

    Returns:
        {name: run id}.
    """
    ids = {}
    for seed in (0, 1):
        ids[f"kd-s{seed}"] = track_run(path, f"kd-s{seed}", "loss.sense_weight=0", seed=seed)
        ids[f"dskd-s{seed}"] = track_run(path, f"dskd-s{seed}", better=0.05, seed=seed)
    ids["margin"] = track_run(path, "margin", "loss.margin=0.5", better=0.004, seed=7, evaluated=False)
    parent = start_tracking(load_config(path, ["run=sweep"]), ONE_RANK, tags={"dskd.kind": "parent"})
    parent.finish("FINISHED")
    assert parent.run_id is not None
    ids["sweep"] = parent.run_id
    elsewhere = [f"tracking.experiment={OTHER}", "loss.sense_weight=0.5"]
    ids["far"] = track_run(path, "far", *elsewhere, data=OTHER_DATA, tags={"device": "cuda"})
    return ids


def add_results(
    path: Path,
    name: str,
    run_id: str,
    folder: str,
    scores: Sequence[float],
    *,
    data: str = "a" * 64,
    measure: str = "score",
    of: str | None = None,
) -> tuple[Config, Examples]:
    """Adds results with one score for each example, like those of benchmarks and lexical measures."""
    config = load_config(path)
    columns = {measure: np.asarray(scores), f"{measure}_items": np.ones(len(scores), dtype=np.int64)}
    table = Examples(
        data, [f"w{n}.n" for n in range(len(scores))], columns, [Measure(measure, measure, f"{measure}_items", data=of)]
    )
    save_examples(config.path(EXAMPLES_FILE), table)
    log_results(config, name, run_id, folder, table.values(), config.path(EXAMPLES_FILE), data=data, step=STEPS)
    return config, table
