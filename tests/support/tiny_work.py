"""The small work directory that the real pipeline makes once for many tests, and copies of it."""

import contextlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from config_files import write_config
from rank_processes import finish, fork_ranks
from repository import REPOSITORY
from wordnet_files import pairs, read_synsets, some_texts

from dskd.artifacts.lock import release_lock
from dskd.config import Config
from dskd.lexicon.relations import Pairs, Relation
from dskd.lexicon.wordnet import DICTIONARY_FOLDERS, open_wordnet

TINY = {
    "run": "dskd",
    "seed": 3,
    "precision": "fp32",
    "teacher": {
        "train_from_scratch": {
            "vocab_size": 2048,
            "num_layers": 4,
            "hidden_size": 64,
            "num_heads": 2,
            "train_tokens": 60_000,
            "batch_size": 32,
        }
    },
    "corpus": {"source": "files", "sequence_length": 32, "max_sequences": 96, "max_validation_sequences": 38},
    "senses": {"key": "target", "k": 3, "max_states": 20, "batch_size": 8},
    "annotation": {"kappa": 2, "batch_size": 8, "teacher_top_n": 4},
    "student": {"layers": 2, "train_layers": 1},
    "loss": {"min_relations": 3},
    "train": {
        "learning_rate": 1.0e-3,
        "steps": 6,
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "checkpoint_every": 3,
        "num_workers": 1,
        "loss_chunk_size": 50,
        "collective_timeout_s": 120,
    },
    "tracking": {"experiment": "tests"},
    "evaluation": {"batch_size": 10, "samples": 3, "sample_tokens": 8},
}
# The teacher as it trains students in the least time: every rank holds all of it.
RESIDENT = {**TINY["teacher"], "mode": "resident"}
# The database without runs that copies start with.
NO_RUNS = "mlflow.db"
BEFORE_TRAINING: Sequence[str] = (
    *("corpus", "lexicon", "teacher", "sequences", "senses", "shards", "student"),
    NO_RUNS,
)


def make_database(file: Path) -> None:
    """Makes an MLflow database without runs."""
    from mlflow import MlflowClient

    MlflowClient(f"sqlite:///{file}").search_experiments()


def make_tiny(folder: Path, no_runs: Path) -> None:
    """Makes `work` of the config `tiny.yaml` in `folder`, and `printed.txt`, the output of the pipeline.

    `no_runs` is a database without runs.

    Text and relations are a part of WordNet's, read without nltk and written to files: with it this would take longer
    than the rest. `corpus.source: wordnet` and `lexicon.wordnet` have tests of their own.
    """
    from dskd import pipeline

    installed = (place for place in DICTIONARY_FOLDERS if (place / "data.noun").is_file())
    synsets = read_synsets(next(installed, None) or open_wordnet().folder)
    lines = "".join(f"{json.dumps({'text': text})}\n" for text in some_texts(synsets, 4000))
    (folder / "text.jsonl").write_text(lines, encoding="utf-8")
    related = Pairs(Relation(*pair, "wordnet") for pair in pairs(synsets) if max(map(len, pair[:2])) <= 8)
    short = "".join(f"{r.head}\t{r.relation}\t{r.tail}\n" for r in related.resolved() if len(r.head) <= 6)
    own = "# head, relation, tail\nlarge\tsynonym\tgreat\nlarge\tantonym\tsmall\n"
    (folder / "own.tsv").write_text(own + short, encoding="utf-8")
    config = write_config(
        folder / "tiny.yaml",
        TINY,
        workdir=str(folder / "work"),
        corpus={**TINY["corpus"], "train": [str(folder / "text.jsonl")]},
        lexicon={"wordnet": False, "tsv": [str(folder / "own.tsv")]},
    )
    # MLflow's tables are created once: the work directory, too, begins with a database without runs.
    shutil.copyfile(no_runs, folder / NO_RUNS)
    (folder / "work").mkdir(exist_ok=True)
    shutil.copyfile(no_runs, folder / "work" / NO_RUNS)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(pipeline, "launch", launch_forked)
        patch.setattr("dskd.distributed.stopping.listen", lambda: None)  # pytest handles signals to this process
        pipeline.run_pipeline(config, [])
    release_lock(folder / "work" / pipeline.LOCK)
    (folder / "printed.txt").write_text(printed.getvalue(), encoding="utf-8")


def launch_forked(_: Config, program: str, arguments: Sequence[str], *, ranks: int = 2) -> None:
    """Replaces the pipeline's own `launch`: starts ranks as other tests do, without DeepSpeed's launcher."""
    from forked_rank import run_launcher

    finish(fork_ranks(run_launcher, REPOSITORY / "launcher" / program, list(arguments), ranks=ranks), timeout_s=540)


def copy_work(config: Path, folder: Path, *artifacts: str, **changes: object) -> Path:
    """Writes a config in `folder`, with a work directory that begins with some of the artifacts of `config`'s."""
    base = yaml.safe_load(config.read_text(encoding="utf-8"))
    source, target = Path(base["workdir"]), folder / "work"
    target.mkdir(parents=True, exist_ok=True)
    for artifact in artifacts:
        if artifact == NO_RUNS:
            shutil.copyfile(config.parent / NO_RUNS, target / NO_RUNS)
        else:
            shutil.copytree(source / artifact, target / artifact)
    return write_config(folder / "config.yaml", base, **{"workdir": str(target), **changes})
