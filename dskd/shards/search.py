"""Finds the rows of the sense dictionary nearest to the teacher's states: O_i, P_i, N_i (docs/method.md, section 3).

Positions with the same target share their candidates, so the search groups them: a tile is one target token with up to
16 of its positions, and tiles with a similar number of candidates become one batched matrix product. The rows of
frequent tokens stay on the device; if the dictionary exceeds the memory budget, the others are read from disk.

Shapes: n positions, D hidden, V vocabulary, R rows of the dictionary.
"""

from dataclasses import dataclass

import torch

from dskd.senses.csr import Csr, offsets_of, padded_ranges, ranges
from dskd.senses.dictionary import VALUE_BYTES, SenseDictionary
from dskd.senses.distances import squared_distances

_TILE = 16  # maximum number of positions of one token in a product, which fetches the token's rows once for all of them
_ELEMENTS = {"cpu": 8_000_000, "cuda": 128_000_000}  # floats of candidate rows in one product: 32 MB, 512 MB


@dataclass(frozen=True)
class NearestRows:
    """The row numbers for n positions, nearest first, padded with -1."""

    own_rows: torch.Tensor  # O_i [n, kappa] int32
    synonym_rows: torch.Tensor  # P_i [n, kappa] int32
    antonym_rows: torch.Tensor  # N_i [n, kappa] int32
    antonym_distance: torch.Tensor  # [n], mean |t_i - s|² / D over N_i; 0 if N_i is empty


class Searcher:
    """A search for O_i, P_i and N_i, for many positions at once.

    Args:
        dictionary: the dictionary that is searched.
        kappa: maximum number of rows in each of O_i, P_i and N_i.
        device: the device of the states.
        frequencies: [V], how often each token is a target; the rows of frequent tokens stay on the device.
        memory_budget: bytes of rows that stay on the device.
    """

    def __init__(
        self,
        dictionary: SenseDictionary,
        kappa: int,
        device: torch.device,
        frequencies: torch.Tensor | None = None,
        memory_budget: int = 2**62,
    ) -> None:
        self.kappa = kappa
        own, synonyms, _ = candidates = build_candidates(dictionary)
        if frequencies is None:
            frequencies = torch.ones(dictionary.vocab_size, dtype=torch.int64)
        self._rows = DictionaryVectors(
            dictionary, _row_use(candidates, frequencies, dictionary.num_rows), memory_budget, device
        )
        self.has_synonyms = synonyms.sizes > own.sizes  # the candidates for P_i include those for O_i
        self._own, self._synonyms, self._antonyms = (lists.to(device) for lists in candidates)

    def search(self, states: torch.Tensor, targets: torch.Tensor) -> NearestRows:
        """Returns the rows for teacher states [n, D] with target tokens [n]; all are on the searcher's device."""
        states = states.float()
        tiles = _Tiles(targets)
        own_rows, _ = nearest_rows(states, tiles, self._own, self._rows, self.kappa)
        synonym_rows, _ = nearest_rows(states, tiles, self._synonyms, self._rows, self.kappa)
        antonym_rows, distances = nearest_rows(states, tiles, self._antonyms, self._rows, self.kappa)
        exists = antonym_rows >= 0
        mean_distance = distances.where(exists, 0).sum(-1) / exists.sum(-1).clamp(min=1) / states.shape[-1]
        return NearestRows(own_rows, synonym_rows, antonym_rows, mean_distance)


def build_candidates(dictionary: SenseDictionary) -> tuple[Csr, Csr, Csr]:
    """Returns the candidate rows of every token [V], ascending, for O_i, for P_i and for N_i."""
    tokens = torch.arange(dictionary.vocab_size)
    synonyms, antonyms = dictionary.entries.neighbours("synonym"), dictionary.entries.neighbours("antonym")
    lexical = torch.cat([synonyms.owners, antonyms.owners]).unique()
    # The entry of a token has the token's number, so a token can be paired with itself.
    return (
        _rows_by_token(dictionary, tokens, tokens),
        _rows_by_token(dictionary, torch.cat([lexical, synonyms.owners]), torch.cat([lexical, synonyms.values.long()])),
        _rows_by_token(dictionary, antonyms.owners, antonyms.values.long()),
    )


class DictionaryVectors:
    """The dictionary's vectors by row number: the most used are on the device, the others are read from disk.

    Args:
        dictionary: the dictionary.
        use: [R], how often each row is a candidate.
        memory_budget: bytes of vectors on the device.
        device: the device that holds the most used vectors and returns all.
    """

    def __init__(
        self, dictionary: SenseDictionary, use: torch.Tensor, memory_budget: int, device: torch.device
    ) -> None:
        self._map = dictionary.mapped
        self._device = device
        fitting = min(dictionary.num_rows, memory_budget // (VALUE_BYTES * dictionary.hidden_size))
        resident = use.argsort(descending=True, stable=True)[:fitting].sort().values
        self._all_resident = len(resident) == dictionary.num_rows
        self._slots = torch.full((dictionary.num_rows,), -1, dtype=torch.int64)
        self._slots[resident] = torch.arange(len(resident))
        self._slots = self._slots.to(device)
        self._resident = self._read(resident)

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the vectors [..., D] float32 of row numbers [...], on the device."""
        if self._all_resident:
            return self._resident[rows].float()
        slots = self._slots[rows]
        absent = slots < 0
        taken = torch.empty(*rows.shape, self._map.shape[1], device=self._device)
        taken[~absent] = self._resident[slots[~absent]].float()
        # Read each of the other rows from disk once, even if it is a candidate of several tokens.
        on_disk, inverse = rows[absent].unique(return_inverse=True)
        taken[absent] = self._read(on_disk.cpu())[inverse].float()
        return taken

    def _read(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._map[rows.numpy()]).view(torch.bfloat16).to(self._device)


class _Tiles:
    """The positions [n] grouped into tiles, each of one token and at most `_TILE` of its positions.

    Tile j has token tokens[j] and the positions order[starts[j]:starts[j] + sizes[j]].
    """

    def __init__(self, tokens: torch.Tensor) -> None:
        # Sort the positions by token, so that each tile is a stretch of `order`.
        ordered, self.order = tokens.sort(stable=True)
        distinct, counts = ordered.unique_consecutive(return_counts=True)
        # A token with many positions has several tiles; `number` counts them within each token.
        per_token = -(-counts // _TILE)
        self.tokens = distinct.repeat_interleave(per_token)
        number = torch.arange(len(self.tokens), device=tokens.device)
        number -= offsets_of(per_token)[:-1].repeat_interleave(per_token)
        self.starts = offsets_of(counts)[:-1].repeat_interleave(per_token) + number * _TILE
        self.sizes = (counts.repeat_interleave(per_token) - number * _TILE).clamp(max=_TILE)
        self.heights = _power_of_two(self.sizes)


def nearest_rows(
    states: torch.Tensor, tiles: _Tiles, candidates: Csr, rows: DictionaryVectors, kappa: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the kappa candidates of each position's token that are nearest to its state, nearest first.

    Args:
        states: [n, D] float32.
        tiles: the positions, grouped by token.
        candidates: the candidate rows of every token.
        rows: the vectors.
        kappa: maximum number of rows per position.

    Returns:
        Row numbers [n, kappa] int32, padded with -1, and their squared distances [n, kappa] float32. Ties go to the
        lower row number.
    """
    device = states.device
    nearest = torch.full((len(states), kappa), -1, dtype=torch.int32, device=device)
    distances = torch.full((len(states), kappa), torch.inf, device=device)
    starts, numbers = candidates.offsets[tiles.tokens], candidates.sizes[tiles.tokens]
    widths = torch.where(numbers > 0, _power_of_two(numbers), 0)
    # Encode height and width (positions and candidates of a tile) in one number: tiles of one shape go into one
    # product. Rounding up to a power of two at most doubles each side.
    shapes = widths * 2 * _TILE + tiles.heights
    for shape in shapes[widths > 0].unique().tolist():
        width, height = divmod(shape, 2 * _TILE)
        members = (shapes == shape).nonzero().squeeze(-1)
        for part in members.split(max(1, _ELEMENTS[device.type] // (width * states.shape[-1]))):
            # The row numbers of each tile's candidates and the positions in each tile, padded to one shape.
            places, exists = padded_ranges(starts[part], numbers[part], width)
            competing = candidates.values[places]
            places, is_position = padded_ranges(tiles.starts[part], tiles.sizes[part], height)
            positions = tiles.order[places]
            chosen = states[positions]
            squares = squared_distances(chosen, chosen.square().sum(-1), rows.take(competing))
            # Candidates are in ascending order, so a stable sort puts the lower row first in a tie.
            ordered, order = squares.masked_fill(~exists.unsqueeze(1), torch.inf).sort(dim=-1, stable=True)
            count = min(kappa, width)
            ordered, order = ordered[..., :count], order[..., :count]
            numbers_of_rows = competing.unsqueeze(1).expand(-1, height, -1).gather(-1, order).int()
            # Write back the results of real positions; candidates that are only padding become -1.
            into = positions[is_position]
            nearest[into, :count] = torch.where(ordered < torch.inf, numbers_of_rows, -1)[is_position]
            distances[into, :count] = ordered[is_position]
    return nearest, distances


def _rows_by_token(dictionary: SenseDictionary, heads: torch.Tensor, tails: torch.Tensor) -> Csr:
    """Collects, for pairs of a token (`heads`) and an entry (`tails`), the rows of all entries of each token."""
    sizes = dictionary.senses_per_entry[tails]
    rows = ranges(dictionary.entry_offsets[tails], sizes)
    owners = heads.repeat_interleave(sizes)
    # Sort by token, then by row: a stable sort by row first, and one by token after it.
    order = rows.argsort(stable=True)
    order = order[owners[order].argsort(stable=True)]
    return Csr(offsets_of(torch.bincount(owners, minlength=dictionary.vocab_size)), rows[order])


def _row_use(candidates: tuple[Csr, ...], frequencies: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Returns how often each row [R] is a candidate, if each token is a target as often as `frequencies` [V] says."""
    use = torch.zeros(num_rows, dtype=torch.int64)
    for lists in candidates:
        use.index_add_(0, lists.values, frequencies.repeat_interleave(lists.sizes))
    return use


def _power_of_two(values: torch.Tensor) -> torch.Tensor:
    """Returns the smallest power of two at or above each integer; 1 for 0. A logarithm is not exact on every device."""
    return 1 << torch.frexp((values - 1).clamp(min=0).double()).exponent.long()
