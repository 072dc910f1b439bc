"""Annotation: finds the rows of the sense dictionary for each position (docs/method.md, section 3).

Training pulls the student's state to some of these rows and pushes it away from others. Let C(e) be the rows of entry
e, t_i the teacher's state at position i, and y_i the target token there:

    O_i  the kappa rows of C(y_i) nearest to t_i
    P_i  the kappa rows nearest to t_i among C(y_i) and the C(e) of all synonyms e of y_i
    N_i  the kappa rows nearest to t_i among the C(e) of all antonyms e of y_i

Distances are L2, and ties go to the lower row number (:mod:`dskd.shards.search`). P_i and N_i are empty if y_i has
neither synonym nor antonym.

Three options use the teacher further. With `annotation.continuation_tokens` it first continues the training texts
(:mod:`dskd.shards.continuations`). With `annotation.teacher_top_n` its most probable tokens at each position are stored
(:mod:`dskd.models.running.readouts`), and with `annotation.store` its states (:mod:`dskd.shards.storing_states`). If
gathering has kept the states of the training text (:mod:`dskd.shards.reading`), the teacher does not read it again.

The result is a set of streaming shards, written in blocks of sequences. A block's size does not depend on the ranks, so
any number of ranks writes the same files, and a resumed run keeps the blocks written before the interruption.
"""

from collections import Counter
from typing import Any

import numpy as np
import torch

from dskd.artifacts import kinds
from dskd.artifacts.building import Building
from dskd.artifacts.disk_space import report_full_disk
from dskd.artifacts.manifest import verify_files
from dskd.config import Config
from dskd.console import progress_bar, say, stage
from dskd.corpus.build import SPLITS
from dskd.corpus.sequences import TokenBatch
from dskd.distributed.collectives import barrier, main_first, on_main
from dskd.distributed.world import World
from dskd.models.files.folder import find_teacher
from dskd.models.running.frozen import FrozenModel, load_frozen
from dskd.models.running.readouts import chunk_size
from dskd.models.structure.trunk import HandOver
from dskd.shards import join_blocks
from dskd.shards.blocks import WritingThread, block_folder, blocks_of, shard_format_of
from dskd.shards.continuations import Continuer
from dskd.shards.reading import KeptReading, open_reading, remove_reading
from dskd.shards.recipe import AnnotationInputs, TeacherUse, open_inputs, recipe, stale_splits
from dskd.shards.schema import (
    ANTONYM_ROWS,
    OWN_ROWS,
    SYNONYM_ROWS,
    TEACHER_STATES,
    TRUNK_STATES,
    StoredStates,
)
from dskd.shards.search import Searcher
from dskd.shards.storing_states import (
    columns_of_states,
    describe_stored,
    require_space,
    require_unchanged_input,
    stored_bytes,
)
from dskd.shards.text_reader import TextReader
from dskd.shards.writing import BlockWriter, JoinedBlocks, is_block

_COVERAGE = ("with_senses", "with_synonyms", "with_antonyms")


def annotate(config: Config, world: World, *, force: bool = False) -> None:
    """Writes `WORKDIR/shards/train` and `WORKDIR/shards/validation` on all ranks; skips a split that is up to date."""
    inputs = main_first(lambda: open_inputs(config, find_teacher(config)))
    on_main(lambda: verify_files(inputs.dictionary.path.parent, inputs.senses))
    # Rank 0 decides, because all ranks must do the same.
    stale = on_main(lambda: list(SPLITS) if force else stale_splits(config, inputs))
    if "train" not in stale or not inputs.stored:
        on_main(lambda: remove_reading(config))  # states that were kept for shards that are not to be made
    if not stale:
        say(f"up to date: {config.path(kinds.SHARDS.folder)}")
        return
    if "train" in stale:
        config.require_stored()
    uses = {split: TeacherUse.of(config, inputs.stored, split) for split in stale}
    buildings = {
        split: Building(config.path(kinds.SHARDS.folder, split), recipe(config, split, inputs)) for split in stale
    }
    reading = None
    if inputs.stored and "train" in stale:
        reading = open_reading(config, inputs, buildings["train"], world.device)
        size = stored_bytes(inputs.stored, inputs.sequences["train"], uses["train"].continuation_tokens)
        on_main(lambda: require_space(size, buildings["train"]))
        say(f"  {describe_stored(inputs.stored, size, buildings['train'].path)}")
    teacher = None
    if reading is None or stale != ["train"]:
        teacher = load_frozen(inputs.teacher, config, world, with_head=any(use.reads_logits for use in uses.values()))
        if inputs.stored and inputs.stored.trunk_depth and "train" in stale:
            require_unchanged_input(teacher, world)
    searcher = Searcher(
        inputs.dictionary,
        config.annotation.kappa,
        world.device,
        inputs.sequences[stale[0]].frequencies(inputs.dictionary.vocab_size),
        config.annotation.memory_bytes,
    )
    for split, use in uses.items():
        reader: TextReader | KeptReading | None = reading if split == "train" else None
        if reader is None:
            assert teacher is not None, "loaded unless all states are kept"
            reader = _open_reader(config, teacher, use, world)
        _annotate_split(config, split, inputs, use.stored, reader, searcher, buildings[split], world)
        reader.close()
    if teacher is not None:
        teacher.close()


def _open_reader(config: Config, teacher: FrozenModel, use: TeacherUse, world: World) -> TextReader:
    """Returns the reader that runs the teacher."""
    depth = use.stored.trunk_depth if use.stored else 0
    return TextReader(
        teacher,
        Continuer(teacher, use.continuation_tokens, config.seed) if use.continuation_tokens else None,
        use.top_n,
        # Not the chunk size of the config: a key of one training run must not change the last digits of what is stored
        # for all runs.
        chunk_size(None, teacher.vocab_size, world.device),
        HandOver(teacher.decoder.layers, depth) if depth else None,
    )


def _annotate_split(
    config: Config,
    split: str,
    inputs: AnnotationInputs,
    stored: StoredStates | None,
    reader: TextReader | KeptReading,
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
        blocks = blocks_of(len(sequences), sequences.sequence_length, config.annotation, reader.top_n)
        is_done = on_main(lambda: [is_block(block_folder(building.folder, block)) for block in blocks])
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
            report_full_disk(building.folder),
            # While the teacher reads the next batch, a thread packs and writes the last one.
            WritingThread() as thread,
        ):
            shard_format = shard_format_of(config.annotation, sequences.sequence_length, reader.top_n, stored)
            for block in own_blocks:
                writer, counts = BlockWriter(block_folder(building.folder, block), shard_format), Counter[str]()
                for first in range(block.start, block.stop, config.annotation.batch_size):
                    unread = sequences.batch(first, min(first + config.annotation.batch_size, block.stop))
                    samples, counts_of_batch = annotate_batch(unread, first, reader, searcher, stored)
                    counts.update(counts_of_batch)
                    thread.submit(writer.add, samples)
                    bar.update(min(unread.num_tokens * world.world_size, bar.total - bar.n))
                thread.submit(writer.finish, dict(counts))
        done_turns = sum(turns[world.rank :: world.world_size])
        for _ in range(most_turns - done_turns):
            reader.read(sequences.batch(0, 1).without_targets(), 0)
        barrier()
        text = inputs.text.files[sequences.path.name]["sha256"]
        if stored is not None:
            building.facts["stored"] = stored.as_facts()
        with report_full_disk(building.folder):
            on_main(lambda: _publish(building, blocks, text))


def annotate_batch(
    unread: TokenBatch, first: int, reader: TextReader | KeptReading, searcher: Searcher, stored: StoredStates | None
) -> tuple[list[dict[str, np.ndarray]], Counter[str]]:
    """Annotates a batch of sequences.

    Args:
        unread: the sequences.
        first: the number of the first of them.
        reader: the teacher, or the states that were kept of it.
        searcher: the search for the nearest rows.
        stored: the states to store.

    Returns:
        The samples, and the counts and sums from which the manifest's facts are computed.
    """
    read = reader.read(unread, first)
    batch, hidden = read.batch, read.hidden
    # Search the nearest rows for all positions of the batch that have a target.
    targets = batch.input_ids.roll(-1, dims=1)[batch.has_target]
    nearest = searcher.search(hidden[batch.has_target.to(hidden.device)], targets.to(hidden.device))
    columns: dict[str, Any] = {
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
    if stored is not None:
        states: dict[str, Any] = {TEACHER_STATES: hidden, TRUNK_STATES: read.trunk}
        columns |= columns_of_states(batch, {name: states[name] for name in stored.columns}, stored.dtype)
    counts = Counter[str](
        targets=len(targets),
        with_senses=int((nearest.own_rows[:, 0] >= 0).sum()),
        with_synonyms=int(searcher.has_synonyms[targets].sum()),
        with_antonyms=int((nearest.antonym_rows[:, 0] >= 0).sum()),
        continued_tokens=read.continued_tokens,
    )
    counts["antonym_distance"] = float(nearest.antonym_distance.double().sum())  # type: ignore[assignment]
    samples = [{name: column[index] for name, column in columns.items()} for index in range(len(hidden))]
    return samples, counts


def _column(batch: TokenBatch, values: torch.Tensor, dtype: torch.dtype, *, fill: float) -> np.ndarray:
    """Returns a column [B, T, …] with `values` [targets, …] at the positions with a target, and `fill` elsewhere."""
    column = torch.full((*batch.input_ids.shape, *values.shape[1:]), fill, dtype=dtype)
    column[batch.has_target] = values.to("cpu", dtype)
    return column.numpy()


def _publish(building: Building, blocks: list[range], text: str) -> None:
    folders = [block_folder(building.folder, block) for block in blocks]
    counts = Counter[str]()
    joined = JoinedBlocks.of(folders)
    for counts_of_block in joined.facts:
        counts.update(counts_of_block)
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
    if joined.digest_without_states is not None:
        # A run whose shards get states later, or lose them, stays the same run, with the same order of samples.
        building.facts["without_states"] = {"digest": joined.digest_without_states, "samples_per_shard": len(blocks[0])}
    building.publish(joined.hashes)
    shares = ", ".join(f"{100 * share:.1f} % {name.replace('_', ' ')}" for name, share in coverage.items())
    say(f"  {samples:,} samples, {targets:,} target positions: {shares}")
    if continued:
        say(f"  the teacher continued these texts by {counts['continued_tokens']:,} tokens")
