"""Annotation: finds the rows of the sense dictionary for each position (docs/method.md, section 3).

Training pulls the student's state to some of these rows and pushes it away from others. Let C(e) be the rows of entry
e, t_i the teacher's state at position i, and y_i the target token there:

    O_i  the kappa rows of C(y_i) nearest to t_i
    P_i  the kappa rows nearest to t_i among C(y_i) and the C(e) of all synonyms e of y_i
    N_i  the kappa rows nearest to t_i among the C(e) of all antonyms e of y_i

Distances are L2, and ties go to the lower row number (:mod:`dskd.shards.search`). P_i and N_i are empty if y_i has
neither synonym nor antonym.

Two options use the teacher further. With `annotation.continuation_tokens` it first continues the training texts
(:mod:`dskd.shards.continuations`). With `annotation.teacher_top_n` its most probable tokens at each position are stored
(:mod:`dskd.models.readouts`).

The result is a set of streaming shards, written in blocks of sequences. A block's size does not depend on the ranks, so
any number of ranks writes the same files, and a resumed run keeps the blocks written before the interruption.
"""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dskd.artifacts import kinds
from dskd.artifacts.building import Building
from dskd.artifacts.manifest import Manifest, Recipe, is_current, verify_files, write_json
from dskd.config import Config
from dskd.console import progress_bar, say, stage
from dskd.corpus.build import SPLITS
from dskd.corpus.sequences import Sequences, TokenBatch, load_sequences
from dskd.distributed.collectives import barrier, main_first, on_main
from dskd.distributed.world import World
from dskd.errors import UserError
from dskd.models.folder import ModelFolder, find_teacher
from dskd.models.frozen import FrozenModel, load_frozen
from dskd.models.precision import resolve_precision
from dskd.models.readouts import TopTokens, chunk_size, top_tokens
from dskd.senses.dictionary import SenseDictionary, load_fitting_dictionary
from dskd.senses.states import read_states_of, states_of
from dskd.shards import columns_of, join_blocks, sample_bytes, write_block
from dskd.shards.continuations import Continuer
from dskd.shards.schema import ANTONYM_ROWS, OWN_ROWS, SYNONYM_ROWS
from dskd.shards.search import Searcher

_MIN_BLOCKS = 16  # a small corpus is cut into up to this many blocks, so that several ranks have work
_COVERAGE = ("with_senses", "with_synonyms", "with_antonyms")
_COUNTS_FILE = "counts.json"  # of a block, until the blocks are joined


@dataclass(frozen=True)
class AnnotationInputs:
    """The inputs of annotation, checked to fit together."""

    teacher: ModelFolder
    dictionary: SenseDictionary
    senses: Manifest  # of the dictionary
    sequences: dict[str, Sequences]  # by split
    text: Manifest  # of the sequences


def open_inputs(config: Config, teacher: ModelFolder) -> AnnotationInputs:
    """Opens what annotation reads.

    Raises:
        UserError: when the dictionary or the sequences are missing, damaged or made with another teacher or tokenizer,
            or when `annotation.teacher_top_n` is more than the teacher's number of tokens.
    """
    dictionary, senses = load_fitting_dictionary(config, teacher)
    vocab_size, top_n = teacher.load_config().vocab_size, config.annotation.teacher_top_n
    if top_n > vocab_size:
        raise UserError(
            f"annotation.teacher_top_n: {top_n} is more than the {vocab_size} tokens that {teacher.path} has; set it "
            "to 64, say, or 0 to store none"
        )
    sequences = {}
    for split in SPLITS:
        sequences[split], text = load_sequences(config, split, teacher.tokenizer_digest)
    return AnnotationInputs(teacher, dictionary, senses, sequences, text)


def recipe(config: Config, split: str, inputs: AnnotationInputs) -> Recipe:
    """Returns the recipe of a split's shards: every input and setting that affects their content.

    The batch size does not, nor does the memory budget.
    """
    settings = config.annotation.as_dict() | {"precision": resolve_precision(config.precision)}
    for key in ("batch_size", "memory_budget"):
        del settings[key]
    # Leave out keys whose value changes nothing, so that shards written before a key existed stay up to date.
    if not _teacher_top_n(config, split):
        del settings["teacher_top_n"]
    del settings["store"]
    if _continuation_tokens(config, split):
        settings["seed"] = config.seed
    else:
        del settings["continuation_tokens"]
    return Recipe(
        "shards",
        {"senses": inputs.senses.digest, "sequences": inputs.text.digest},
        settings,
        teacher=inputs.teacher.digest,
        tokenizer=inputs.teacher.tokenizer_digest,
    )


def annotate(config: Config, world: World, *, force: bool = False) -> None:
    """Writes `WORKDIR/shards/train` and `WORKDIR/shards/validation` on all ranks; skips a split that is up to date."""
    inputs = main_first(lambda: open_inputs(config, find_teacher(config)))
    on_main(lambda: verify_files(inputs.dictionary.path.parent, inputs.senses))
    buildings = {
        split: Building(config.path(kinds.SHARDS.folder, split), recipe(config, split, inputs)) for split in SPLITS
    }
    # Rank 0 decides, because all ranks must do the same.
    stale = on_main(
        lambda: [
            split for split, building in buildings.items() if force or not is_current(building.path, building.recipe)
        ]
    )
    if not stale:
        say(f"up to date: {config.path(kinds.SHARDS.folder)}")
        return
    reads_logits = any(_continuation_tokens(config, split) or _teacher_top_n(config, split) for split in stale)
    teacher = load_frozen(inputs.teacher, config, world, with_head=reads_logits)
    searcher = Searcher(
        inputs.dictionary,
        config.annotation.kappa,
        world.device,
        inputs.sequences[stale[0]].frequencies(inputs.dictionary.vocab_size),
        config.annotation.memory_bytes,
    )
    for split in stale:
        max_tokens = _continuation_tokens(config, split)
        reader = TextReader(
            teacher,
            Continuer(teacher, max_tokens, config.seed) if max_tokens else None,
            _teacher_top_n(config, split),
            # Not the chunk size of the config: a key of one training run must not change the last digits of what is
            # stored for all runs.
            chunk_size(None, teacher.vocab_size, world.device),
        )
        _annotate_split(config, split, inputs, reader, searcher, buildings[split], world)
    teacher.close()


@dataclass(frozen=True)
class TextRead:
    """A batch that the teacher has read, and continued if the config says so, with the teacher's states for it."""

    batch: TokenBatch
    hidden: torch.Tensor  # [B, T, D]
    top: TopTokens | None  # the teacher's most probable tokens, for the positions that have a target
    continued_tokens: int


@dataclass(frozen=True)
class TextReader:
    """The teacher's passes over a batch: the same number for every batch, because all ranks must take part in each."""

    teacher: FrozenModel
    continuer: Continuer | None
    top_n: int
    chunk_size: int

    def read(self, batch: TokenBatch, first: int) -> TextRead:
        """Runs the teacher on a batch; `first` is the number of its first sequence."""
        added = 0
        if self.continuer is not None:
            batch, added = self.continuer.extend(batch, first)
        if not self.top_n:
            return TextRead(batch, states_of(self.teacher, batch, first), None, added)
        has_target = batch.has_target.to(self.teacher.device)
        hidden, top = read_states_of(
            self.teacher,
            batch,
            first,
            lambda hidden, weight: top_tokens(hidden[has_target], weight, self.top_n, self.chunk_size),
        )
        return TextRead(batch, hidden, top, added)


def _continuation_tokens(config: Config, split: str) -> int:
    return config.annotation.continuation_tokens if split == "train" else 0


def _teacher_top_n(config: Config, split: str) -> int:
    # On held-out text the teacher itself is run, so nothing is stored for it.
    return config.annotation.teacher_top_n if split == "train" else 0


def _annotate_split(
    config: Config,
    split: str,
    inputs: AnnotationInputs,
    reader: TextReader,
    searcher: Searcher,
    building: Building,
    world: World,
) -> None:
    """Annotates the blocks of a split that an interrupted annotation has not written, and publishes the shards."""
    sequences = inputs.sequences[split]
    with stage(
        f"annotate: rows of the sense dictionary for every position ({split})",
        reads=[config.path(kinds.SEQUENCES.folder), inputs.dictionary.path],
        writes=building.path,
    ):
        on_main(building.resume_or_clear)
        blocks = _blocks(len(sequences), sequences.sequence_length, config, split)
        is_done = on_main(lambda: [_block_folder(building.folder, block).is_dir() for block in blocks])
        left = [block for block, done in zip(blocks, is_done, strict=True) if not done]
        if len(left) < len(blocks):
            say(f"  resuming: {len(blocks) - len(left)} of {len(blocks)} blocks were written before an interruption")
        own_blocks = left[world.rank :: world.world_size]
        turns = [-(-len(block) // config.annotation.batch_size) for block in left]
        # A forward pass under ZeRO-3 needs all ranks: ranks with less work run passes without targets at the end.
        most_turns = max(sum(turns[rank :: world.world_size]) for rank in range(world.world_size))
        tokens_left = sum(int(sequences.lengths[block.start : block.stop].sum()) for block in left)
        with (
            progress_bar(
                total=sequences.num_tokens,
                initial=sequences.num_tokens - tokens_left,
                label="annotating",
                unit="tokens",
            ) as bar,
            # While the teacher reads the next block, a thread compresses and writes the last one.
            ThreadPoolExecutor(max_workers=1) as writer,
        ):
            written: Future[None] | None = None
            for block in own_blocks:
                samples, counts = _annotate_block(block, sequences, reader, searcher, config, world, bar)
                if written is not None:
                    written.result()
                folder = _block_folder(building.folder, block)
                written = writer.submit(_write_block, folder, samples, columns_of(teacher_top_n=reader.top_n), counts)
            if written is not None:
                written.result()
        done_turns = sum(turns[world.rank :: world.world_size])
        for _ in range(most_turns - done_turns):
            reader.read(sequences.batch(0, 1).without_targets(), 0)
        barrier()
        text = inputs.text.files[sequences.path.name]["sha256"]
        on_main(lambda: _publish(building, blocks, text))


def _annotate_block(
    block: range,
    sequences: Sequences,
    reader: TextReader,
    searcher: Searcher,
    config: Config,
    world: World,
    bar: tqdm,
) -> tuple[list[dict[str, np.ndarray]], dict[str, float]]:
    """Annotates a block of sequences, and returns its samples and its counts."""
    samples: list[dict[str, np.ndarray]] = []
    counts = Counter[str]()
    for first in range(block.start, block.stop, config.annotation.batch_size):
        unread = sequences.batch(first, min(first + config.annotation.batch_size, block.stop))
        read = reader.read(unread, first)
        batch, hidden = read.batch, read.hidden
        # Search the nearest rows for all positions of the batch that have a target.
        targets = batch.input_ids.roll(-1, dims=1)[batch.has_target]
        nearest = searcher.search(hidden[batch.has_target.to(world.device)], targets.to(world.device))
        columns = {
            "input_ids": batch.input_ids.int().numpy(),
            "loss_mask": batch.has_target.to(torch.uint8).numpy(),
            "document_starts": batch.starts.numpy(),
        }
        for column, rows in (
            (OWN_ROWS, nearest.own_rows),
            (SYNONYM_ROWS, nearest.synonym_rows),
            (ANTONYM_ROWS, nearest.antonym_rows),
        ):
            columns[column] = _column(batch, rows, torch.int32, fill=-1)
        if read.top is not None:
            columns["teacher_token_ids"] = _column(batch, read.top.token_ids, torch.int32, fill=-1)
            columns["teacher_logprobs"] = _column(batch, read.top.logprobs, torch.float16, fill=0)
            columns["teacher_rest_logprob"] = _column(batch, read.top.rest_logprob, torch.float32, fill=0)
        # One sample per sequence, and the sums from which `_publish` computes the facts of the manifest.
        samples += ({name: column[index] for name, column in columns.items()} for index in range(len(hidden)))
        counts["targets"] += len(targets)
        counts["with_senses"] += int((nearest.own_rows[:, 0] >= 0).sum())
        counts["with_synonyms"] += int(searcher.has_synonyms[targets].sum())
        counts["with_antonyms"] += int((nearest.antonym_rows[:, 0] >= 0).sum())
        counts["antonym_distance"] += float(nearest.antonym_distance.double().sum())  # type: ignore[assignment]
        counts["continued_tokens"] += read.continued_tokens
        bar.update(min(unread.num_tokens * world.world_size, bar.total - bar.n))
    return samples, dict(counts)


def _column(batch: TokenBatch, values: torch.Tensor, dtype: torch.dtype, *, fill: float) -> np.ndarray:
    """Returns a column [B, T, …] with `values` [targets, …] at the positions with a target, and `fill` elsewhere."""
    column = torch.full((*batch.input_ids.shape, *values.shape[1:]), fill, dtype=dtype)
    column[batch.has_target] = values.to("cpu", dtype)
    return column.numpy()


def _write_block(
    folder: Path, samples: Sequence[dict[str, np.ndarray]], columns: dict[str, str], counts: dict[str, float]
) -> None:
    """Writes a block under a temporary name and renames it when it is complete."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_block(partial, iter(samples), columns)
    write_json(partial / _COUNTS_FILE, counts)
    partial.rename(folder)


def _publish(building: Building, blocks: list[range], text: str) -> None:
    folders = [_block_folder(building.folder, block) for block in blocks]
    counts = Counter[str]()
    for folder in folders:
        counts.update(json.loads((folder / _COUNTS_FILE).read_text(encoding="utf-8")))
    samples = join_blocks(building.folder, folders)
    targets = counts["targets"]
    coverage = {name: counts[name] / max(targets, 1) for name in _COVERAGE}
    building.facts.update(
        samples=samples,
        targets=targets,
        coverage=coverage,
        text=text,  # identifies the tokens only: shards with other senses can have the same value
        # The unit of `loss.relative_margin`: the mean of D(t_i, s) over N_i, averaged over the positions with antonyms.
        teacher_antonym_distance=counts["antonym_distance"] / max(counts["with_antonyms"], 1),
    )
    continued = "continuation_tokens" in building.recipe.config
    if continued:
        building.facts["continued_tokens"] = counts["continued_tokens"]
    building.publish()
    shares = ", ".join(f"{100 * share:.1f} % {name.replace('_', ' ')}" for name, share in coverage.items())
    say(f"  {samples:,} samples, {targets:,} target positions: {shares}")
    if continued:
        say(f"  the teacher continued these texts by {counts['continued_tokens']:,} tokens")


def _blocks(num_sequences: int, sequence_length: int, config: Config, split: str) -> list[range]:
    """Splits the sequences into ranges, one per shard.

    All but the last have the same size, which depends only on these arguments.
    """
    size_of_sample = sample_bytes(
        sequence_length, kappa=config.annotation.kappa, teacher_top_n=_teacher_top_n(config, split)
    )
    by_size = config.annotation.shard_size_mb * 2**20 // size_of_sample
    size = max(1, min(by_size, -(-num_sequences // _MIN_BLOCKS)))
    return [range(start, min(start + size, num_sequences)) for start in range(0, num_sequences, size)]


def _block_folder(folder: Path, block: range) -> Path:
    return folder / ".blocks" / f"{block.start:012d}"
