"""Annotation: for every position, the rows of the sense dictionary it is pulled to or pushed from (method, section 3).

With C(e) the rows of entry e, t_i the teacher's state at position i and y_i its target token:

    O_i  the kappa rows of C(y_i) nearest to t_i
    P_i  the kappa rows nearest to t_i among C(y_i) and the C(e) of all synonyms e of y_i
    N_i  the kappa rows nearest to t_i among the C(e) of all antonyms e of y_i

by L2, ties to the lower row number. P_i and N_i are empty where y_i has neither synonym nor antonym. The result is
written as streaming shards in blocks of sequences whose size does not depend on the ranks, so that any number of ranks
writes the same files.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from dskd.config import Config
from dskd.console import progress_bar, say, stage
from dskd.corpus import SPLITS
from dskd.distributed import World, barrier, is_main_process, main_first, on_main, sum_over_ranks
from dskd.manifest import Building, Recipe, is_current, verify_files
from dskd.model_folder import ModelFolder, find_teacher
from dskd.models import FrozenModel, load_frozen
from dskd.senses.dictionary import FILE, SenseDictionary, load_dictionary, require_fitting
from dskd.senses.dictionary import FOLDER as SENSES_FOLDER
from dskd.senses.dictionary import MADE_BY as SENSES_MADE_BY
from dskd.sequences import Sequences, load_sequences
from dskd.shards import FOLDER, join_blocks, write_block

_GATHERED_ELEMENTS = 16_000_000  # floats of candidate rows gathered at one time: 64 MB
_MIN_BLOCKS = 16  # a small corpus is cut into at least so many blocks, so that several ranks have work
_COUNTS = ("targets", "with_senses", "with_synonyms", "with_antonyms")


@dataclass(frozen=True)
class Candidates:
    """The rows that compete for a token: rows[offsets[v]:offsets[v + 1]], ascending."""

    offsets: torch.Tensor  # [V+1] int64
    rows: torch.Tensor  # int64


def recipe(config: Config, split: str, teacher: ModelFolder) -> Recipe:
    """What decides the content of a split's shards. The batch size does not."""
    _, senses = load_dictionary(config)
    _, sequences = load_sequences(config, split, teacher.tokenizer_digest)
    settings = config.annotation.as_dict() | {"precision": config.precision}
    del settings["batch_size"]
    return Recipe(
        "shards",
        {"senses": senses.digest, "sequences": sequences.digest},
        settings,
        teacher=teacher.digest,
        tokenizer=teacher.tokenizer_digest,
    )


def annotate(config: Config, world: World, *, force: bool = False) -> None:
    """Writes `WORKDIR/shards/train` and `WORKDIR/shards/validation` on all ranks; skips what is up to date."""
    source = main_first(lambda: find_teacher(config))
    dictionary = main_first(lambda: _load_fitting_dictionary(config, source))
    wanted = main_first(lambda: {split: recipe(config, split, source) for split in SPLITS})
    # Rank 0's word counts: all ranks must take the same way.
    stale = on_main(lambda: [s for s in SPLITS if force or not is_current(config.path(FOLDER, s), wanted[s])])
    if not stale:
        say(f"up to date: {config.path(FOLDER)}")
        return
    teacher = load_frozen(source, config, world)
    searcher = Searcher(dictionary, config.annotation.kappa, world.device)
    for split in stale:
        sequences, _ = load_sequences(config, split, source.tokenizer_digest)
        _annotate_split(config, split, sequences, teacher, searcher, wanted[split], world)
    teacher.close()


def _load_fitting_dictionary(config: Config, teacher: ModelFolder) -> SenseDictionary:
    dictionary, manifest = load_dictionary(config)
    if is_main_process():
        verify_files(dictionary.path.parent, manifest, made_by=SENSES_MADE_BY)
    require_fitting(
        dictionary,
        manifest,
        teacher=teacher.digest,
        tokenizer=teacher.tokenizer_digest,
        hidden_size=teacher.load_config().hidden_size,
    )
    return dictionary


class Searcher:
    """Finds O_i, P_i and N_i for many positions at once."""

    def __init__(self, dictionary: SenseDictionary, kappa: int, device: torch.device) -> None:
        self.kappa = kappa
        self._vectors = dictionary.vectors().to(device)
        own, related, antonyms = build_candidates(dictionary)
        self._own, self._related, self._antonyms = (_to(candidates, device) for candidates in (own, related, antonyms))
        self.has_synonyms = related.offsets.diff() > own.offsets.diff()

    def search(
        self, states: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """O_i, P_i, N_i [n, kappa] int32 and the mean D(t_i, s) over N_i [n] for teacher states [n, D], targets [n]."""
        own, _ = nearest_rows(states, targets, self._own, self._vectors, self.kappa)
        synonyms, _ = nearest_rows(states, targets, self._related, self._vectors, self.kappa)
        antonyms, distances = nearest_rows(states, targets, self._antonyms, self._vectors, self.kappa)
        exists = antonyms >= 0
        mean_distance = distances.where(exists, 0).sum(-1) / exists.sum(-1).clamp(min=1) / states.shape[-1]
        return own, synonyms, antonyms, mean_distance


def build_candidates(dictionary: SenseDictionary) -> tuple[Candidates, Candidates, Candidates]:
    """The rows that compete for O_i, for P_i and for N_i, by token."""
    entries, entry_offsets = dictionary.entries, dictionary.entry_offsets
    tokens = torch.arange(dictionary.vocab_size)
    synonym_heads = tokens.repeat_interleave(entries.synonym_offsets.diff())
    antonym_heads = tokens.repeat_interleave(entries.antonym_offsets.diff())
    lexical = torch.cat([synonym_heads, antonym_heads]).unique()
    return (
        _rows_by_token(tokens, tokens, entry_offsets, dictionary.vocab_size),
        _rows_by_token(
            torch.cat([lexical, synonym_heads]),
            torch.cat([lexical, entries.synonym_entries.long()]),
            entry_offsets,
            dictionary.vocab_size,
        ),
        _rows_by_token(antonym_heads, entries.antonym_entries.long(), entry_offsets, dictionary.vocab_size),
    )


def nearest_rows(
    states: torch.Tensor, tokens: torch.Tensor, candidates: Candidates, vectors: torch.Tensor, kappa: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kappa candidates of each position's token that are nearest to its state, nearest first.

    Args:
        states: [n, D].
        tokens: [n] int64.
        candidates: the rows that compete, by token.
        vectors: [R, D].
        kappa: how many.

    Returns:
        Row numbers [n, kappa] int32, padded with -1, and their squared distances [n, kappa] float32.
    """
    found = torch.full((len(states), kappa), -1, dtype=torch.int32, device=states.device)
    distances = torch.full((len(states), kappa), torch.inf, device=states.device)
    starts, sizes = candidates.offsets[tokens], candidates.offsets.diff()[tokens]
    # Positions with similarly many candidates go together: padding at most doubles the work.
    widths = torch.where(sizes > 0, 2 ** sizes.clamp(min=1).log2().ceil().long(), 0)
    for width in widths.unique().tolist():
        if width == 0:
            continue
        members = (widths == width).nonzero().squeeze(-1)
        for part in members.split(max(1, _GATHERED_ELEMENTS // (width * states.shape[-1]))):
            place = torch.arange(width, device=states.device)
            exists = place < sizes[part].unsqueeze(-1)
            rows = candidates.rows[torch.where(exists, starts[part].unsqueeze(-1) + place, 0)]
            squares = _squared_distances(states[part].float(), vectors[rows].float())
            # Rows are ascending, so a stable sort gives ties to the lower one.
            ordered, order = squares.masked_fill(~exists, torch.inf).sort(dim=-1, stable=True)
            count = min(kappa, width)
            nearest = rows.gather(1, order[:, :count]).int()
            found[part, :count] = torch.where(ordered[:, :count] < torch.inf, nearest, -1)
            distances[part, :count] = ordered[:, :count]
    return found, distances


def _annotate_split(
    config: Config,
    split: str,
    sequences: Sequences,
    teacher: FrozenModel,
    searcher: Searcher,
    wanted: Recipe,
    world: World,
) -> None:
    target = config.path(FOLDER, split)
    sources = [config.path("sequences"), config.path(SENSES_FOLDER, FILE)]
    with stage(f"annotate: rows of the sense dictionary for every position ({split})", reads=sources, writes=target):
        building = Building(target, wanted)
        on_main(building.clear)
        blocks = _blocks(len(sequences), sequences.sequence_length, config)
        mine = blocks[world.rank :: world.world_size]
        turns = [-(-len(block) // config.annotation.batch_size) for block in blocks]
        # A forward pass under ZeRO-3 needs all ranks: those with less work make up for it at the end.
        most = max(sum(turns[rank :: world.world_size]) for rank in range(world.world_size))
        sums = torch.zeros(len(_COUNTS) + 1, dtype=torch.float64)
        with progress_bar(total=sequences.num_tokens, label="annotating", unit="tokens") as bar:
            for block in mine:
                samples = _annotate_block(block, sequences, teacher, searcher, config, world, sums, bar)
                write_block(_block_folder(building.folder, block), samples)
        done = sum(turns[world.rank :: world.world_size])
        for _ in range(most - done):
            batch = sequences.batch(0, 1)
            teacher.hidden_states(batch.input_ids, batch.position_ids)
        sums = sum_over_ranks(sums.to(world.device)).cpu()
        barrier()
        on_main(lambda: _publish(building, blocks, sums))


def _annotate_block(
    block: range,
    sequences: Sequences,
    teacher: FrozenModel,
    searcher: Searcher,
    config: Config,
    world: World,
    sums: torch.Tensor,
    bar: tqdm,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the samples of a block of sequences, and adds its counts to `sums`."""
    for first in range(block.start, block.stop, config.annotation.batch_size):
        stop = min(first + config.annotation.batch_size, block.stop)
        batch = sequences.batch(first, stop)
        input_ids, counts = batch.input_ids, batch.has_target
        hidden = teacher.hidden_states(input_ids, batch.position_ids)
        targets = input_ids.roll(-1, dims=1)[counts]
        found = searcher.search(hidden[counts.to(world.device)], targets.to(world.device))
        own, synonyms, antonyms, antonym_distance = (tensor.cpu() for tensor in found)
        columns = {}
        for name, rows in (("sense_ids", own), ("synonym_ids", synonyms), ("antonym_ids", antonyms)):
            column = torch.full((*input_ids.shape, searcher.kappa), -1, dtype=torch.int32)
            column[counts] = rows
            columns[name] = column.numpy()
        has_antonyms = antonyms[:, 0] >= 0
        sums += torch.tensor(
            [
                len(targets),
                int((own[:, 0] >= 0).sum()),
                int(searcher.has_synonyms[targets].sum()),
                int(has_antonyms.sum()),
                float(antonym_distance[has_antonyms].double().sum()),
            ],
            dtype=torch.float64,
        )
        columns |= {"input_ids": input_ids.int().numpy(), "loss_mask": counts.to(torch.uint8).numpy()}
        columns["document_starts"] = batch.starts.numpy()
        for index in range(stop - first):
            yield {name: column[index] for name, column in columns.items()}
        bar.update(min(batch.num_tokens * world.world_size, bar.total - bar.n))


def _publish(building: Building, blocks: list[range], sums: torch.Tensor) -> None:
    samples = join_blocks(building.folder, [_block_folder(building.folder, block) for block in blocks])
    targets, *covered, antonym_distance = sums.tolist()
    coverage = {name: count / targets for name, count in zip(_COUNTS[1:], covered, strict=True)}
    building.facts.update(
        samples=samples,
        targets=int(targets),
        coverage=coverage,
        # The unit of `loss.relative_margin`: mean over positions with antonyms of the mean D(t_i, s) over N_i.
        teacher_antonym_distance=antonym_distance / max(covered[-1], 1),
    )
    building.publish()
    shares = ", ".join(f"{100 * share:.1f} % {name.replace('_', ' ')}" for name, share in coverage.items())
    say(f"  {samples:,} samples, {int(targets):,} target positions: {shares}")


def _blocks(num_sequences: int, sequence_length: int, config: Config) -> list[range]:
    """Ranges of sequences, a shard each, of whole batches where that is possible."""
    sample_bytes = sequence_length * (4 + 1 + 3 * 4 * config.annotation.kappa)
    by_size = config.annotation.shard_size_mb * 2**20 // sample_bytes
    size = max(1, min(by_size, -(-num_sequences // _MIN_BLOCKS)))
    return [range(start, min(start + size, num_sequences)) for start in range(0, num_sequences, size)]


def _block_folder(folder: Path, block: range) -> Path:
    return folder / f"block-{block.start:012d}"


def _rows_by_token(
    heads: torch.Tensor, tails: torch.Tensor, entry_offsets: torch.Tensor, vocab_size: int
) -> Candidates:
    """For pairs of a token and an entry, the rows of all its entries by token."""
    sizes = entry_offsets.diff()[tails]
    before = sizes.cumsum(0) - sizes
    rows = torch.arange(int(sizes.sum())) + (entry_offsets[tails] - before).repeat_interleave(sizes)
    owners = heads.repeat_interleave(sizes)
    order = rows.argsort(stable=True)
    order = order[owners[order].argsort(stable=True)]
    counts = torch.bincount(owners, minlength=vocab_size)
    return Candidates(F.pad(counts.cumsum(0), (1, 0)), rows[order])


def _squared_distances(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """|t - s|² [n, C] of states [n, D] to rows [n, C, D]."""
    products = torch.bmm(rows, states.unsqueeze(-1)).squeeze(-1)
    squares = states.square().sum(-1, keepdim=True) - 2 * products + rows.square().sum(-1)
    return squares.clamp(min=0)


def _to(candidates: Candidates, device: torch.device) -> Candidates:
    return Candidates(candidates.offsets.to(device), candidates.rows.to(device))
