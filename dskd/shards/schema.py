"""The columns of a sample of the annotated shards, and checks that shards fit the experiment (docs/formats.md)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dskd.artifacts import kinds
from dskd.artifacts.manifest import Manifest, read_manifest, require_same, verify_files
from dskd.artifacts.mds import INDEX, files_with_hashes_of_samples
from dskd.config import TEACHER_STATES as TEACHER_STATES
from dskd.config import TRUNK_STATES as TRUNK_STATES
from dskd.config import Config
from dskd.errors import UserError

# The columns of row numbers of the sense dictionary. Everywhere but on disk they are called own_rows, synonym_rows and
# antonym_rows.
OWN_ROWS, SYNONYM_ROWS, ANTONYM_ROWS = "sense_ids", "synonym_ids", "antonym_ids"  # O_i, P_i, N_i
COLUMNS = {
    "input_ids": "ndarray:int32",
    "loss_mask": "ndarray:uint8",
    "document_starts": "ndarray:uint8",
    OWN_ROWS: "ndarray:int32",
    SYNONYM_ROWS: "ndarray:int32",
    ANTONYM_ROWS: "ndarray:int32",
}
# Additional columns with `annotation.teacher_top_n`.
TEACHER_COLUMNS = {
    "teacher_token_ids": "ndarray:int32",
    "teacher_logprobs": "ndarray:float16",
    "teacher_rest_logprob": "ndarray:float32",
}
# How the columns TEACHER_STATES and TRUNK_STATES of `annotation.store` are stored, by the type of the states. NumPy has
# no bf16, so its raw bits are stored.
STORED_AS = {"bfloat16": "ndarray:uint16", "float32": "ndarray:float32"}
PRECISION_OF = {"bfloat16": "bf16", "float32": "fp32"}
DTYPE_OF = {precision: dtype for dtype, precision in PRECISION_OF.items()}
HASH = "xxh64"
LARGEST_SHARD = 2**31  # bytes of the largest shard file: half of what 32-bit offsets can address
SHARD_HEADER = 2**20  # bytes of these that are reserved for the header


@dataclass(frozen=True)
class StoredStates:
    """The states [T', D] of the teacher that shards hold for each sample; T' is 1 + its last position with a target.

    `teacher_states` are the last hidden states, after the final norm, and 0 at positions without a target.
    `trunk_states` are those that enter layer `trunk_depth`. What follows T' is padding, and not stored. A sample
    without any target has one position.
    """

    columns: tuple[str, ...]  # TEACHER_STATES, TRUNK_STATES or both
    dtype: str  # "bfloat16" or "float32": the type that the teacher computed in
    hidden_size: int  # D
    trunk_depth: int  # 0 without TRUNK_STATES

    @classmethod
    def of(cls, manifest: Manifest) -> "StoredStates | None":
        """Returns what the manifest of shards says that they hold; None if they hold no states.

        Raises:
            UserError: if the manifest does not say all of it, or names other layers below the trunk's depth.
        """
        facts: Mapping[str, Any] | None = manifest.facts.get("stored")
        if facts is None:
            return None
        try:
            stored = cls(tuple(facts["columns"]), facts["dtype"], facts["hidden_size"], facts["trunk_depth"])
        except (KeyError, TypeError) as error:
            raise UserError(
                f"the manifest of the shards does not describe their stored states ({error!r} in facts.stored); make "
                f"the shards again with `{kinds.SHARDS.made_by}`"
            ) from None
        # Older manifests lack the layers: those below a trunk's depth have always been the teacher's lowest.
        if (layers := facts.get("trunk_layers", stored.trunk_layers)) != stored.trunk_layers:
            raise UserError(
                f"the manifest of the shards says that the teacher's layers {layers} computed their trunk_states, and "
                f"a student can only start from those of its lowest {stored.trunk_depth} layers; make the shards again "
                f"with `{kinds.SHARDS.made_by}`"
            )
        return stored

    @property
    def trunk_layers(self) -> list[int]:
        """The teacher's layers that computed `trunk_states`: a student that starts from these has the same, frozen."""
        return list(range(self.trunk_depth))

    def as_facts(self) -> dict[str, Any]:
        """Returns what the manifest of the shards records as `stored`."""
        return {**asdict(self), "trunk_layers": self.trunk_layers}

    @property
    def encodings(self) -> dict[str, str]:
        """{column: its encoding}."""
        return dict.fromkeys(self.columns, STORED_AS[self.dtype])


def digest_without_states(manifest: Manifest) -> str:
    """Returns the digest that shards have, or would have without the teacher's states.

    It identifies what the numbers of a run depend on: stored states are those that a loaded teacher computes. For
    shards with states that were written before annotation recorded it, it is the digest of all files.
    """
    return manifest.facts.get("without_states", {}).get("digest", manifest.digest)


def columns_of(*, teacher_top_n: int, stored: StoredStates | None = None) -> dict[str, str]:
    """Returns {column: its encoding} for the shards that annotation writes."""
    return COLUMNS | (TEACHER_COLUMNS if teacher_top_n else {}) | ({} if stored is None else stored.encodings)


def sample_bytes(sequence_length: int, *, kappa: int, teacher_top_n: int, stored: StoredStates | None = None) -> int:
    """Returns the bytes of a sample's columns before compression; of states, as if it had no padding."""
    values = {
        **dict.fromkeys((OWN_ROWS, SYNONYM_ROWS, ANTONYM_ROWS), kappa),
        **dict.fromkeys(("teacher_token_ids", "teacher_logprobs"), teacher_top_n),
        **dict.fromkeys((TEACHER_STATES, TRUNK_STATES), 0 if stored is None else stored.hidden_size),
    }
    columns = columns_of(teacher_top_n=teacher_top_n, stored=stored)
    position = sum(
        np.dtype(encoding.removeprefix("ndarray:")).itemsize * values.get(name, 1) for name, encoding in columns.items()
    )
    return sequence_length * position


def load_manifest(config: Config, split: str) -> Manifest:
    """Returns the manifest of `WORKDIR/shards/SPLIT`.

    With a remote copy, only the manifest has to exist here.

    Raises:
        UserError: when the shards are missing or damaged.
    """
    here = config.train.shard_remote is None
    return read_manifest(config.path(kinds.SHARDS.folder, split), kinds.SHARDS.name, files_are_here=here)


def require_fitting(
    config: Config, split: str, manifest: Manifest, *, senses: str, teacher: str, tokenizer: str
) -> None:
    """Checks that shards were built with this sense dictionary, teacher and tokenizer, and have not changed since.

    Of shards with states, which can have terabytes, only the index is read: it has a hash of each sample, which is
    compared whenever that sample is read. Their sizes were compared when the manifest was read. The files of a remote
    copy are verified when they are read, too (:func:`open_shards`).

    Raises:
        UserError: when they were not, or have changed; it names both sides, or the changed file.
    """
    folder = config.path(kinds.SHARDS.folder, split)
    remedy = f"make the shards again with `{kinds.SHARDS.made_by}`"
    for what, expected, actual in (
        ("tokenizers", tokenizer, manifest.tokenizer),
        ("teachers", teacher, manifest.teacher),
        ("sense dictionaries", senses, manifest.inputs.get("senses")),
    ):
        require_same(what, expected=expected, actual=actual, between=f"{folder} and what is here now", remedy=remedy)
    if config.train.shard_remote is None:
        # The index first: it says which of the other files are left out here.
        of_index = {name: entry for name, entry in manifest.files.items() if name == INDEX}
        verify_files(folder, replace(manifest, files=of_index))
        verify_files(folder, manifest, except_for=[INDEX, *files_with_hashes_of_samples(folder / INDEX)])


def require_teacher_cache(config: Config, split: str, manifest: Manifest) -> None:
    """Checks that the shards hold the teacher's distributions over `annotation.teacher_top_n` tokens.

    Raises:
        UserError: when they hold none, or distributions over another number of tokens; it names the command that builds
            them again.
    """
    top_n, stored = config.annotation.teacher_top_n, manifest.config.get("teacher_top_n")
    if stored and stored != top_n:
        raise UserError(
            f"annotation.teacher_top_n: {top_n}, but {config.path(kinds.SHARDS.folder, split)} holds the teacher's "
            f"{stored} most probable tokens; set it to {stored}, or make the shards again with `{kinds.SHARDS.made_by}`"
        )
    if not stored:
        states = StoredStates.of(manifest)
        if states is not None and TEACHER_STATES in states.columns:
            raise UserError(
                f"annotation.teacher_top_n: {top_n}, but {config.path(kinds.SHARDS.folder, split)} holds "
                "teacher_states, and no most probable tokens; set it to 0 to read the states"
            )
        held = "nothing of the teacher" if states is None else f"only {' and '.join(states.columns)} of the teacher"
        remedy = (
            "" if top_n else "set annotation.store to [teacher_states], or annotation.teacher_top_n (to 64, say), and "
        )
        raise UserError(
            f"{config.path(kinds.SHARDS.folder, split)}: the shards hold {held}; teacher.mode: cached reads "
            "teacher_states or the most probable tokens for "
            f"{config.loss.keys_that_read('teacher_probabilities')}; {remedy}make the shards again with "
            f"`{kinds.SHARDS.made_by}`, or set teacher.mode to zero3"
        )


def require_samples(manifest: Manifest, folder: Path, needed: int, what: str) -> None:
    """Checks that shards have at least `needed` samples, the size of one global batch; `what` describes that number.

    Raises:
        UserError: when they have fewer; it names both numbers.
    """
    samples = manifest.facts["samples"]
    if samples < needed:
        raise UserError(f"{folder}: there are {samples} samples, fewer than {what} ({needed}); lower it, or add text")
