"""Senses of held-out positions: whether the model's state is nearest to the same sense embeddings as the teacher's.

| measure | at a held-out position | chance |
|---|---|---|
| row_agreement | model and teacher have the same nearest of the two or more rows C(y_i) of its target | 1/C |
| sense_alignment | the nearest row of P_i is nearer than every row of N_i | P/(P + N) |

The nearest row has the smallest L2 distance, the lower row of equal ones, as in annotation, which found the teacher's
(docs/method.md, section 3). The teacher's own row_agreement is 1 except for rounding. sense_alignment is that of
:mod:`dskd.evaluation.held_out_text`. The positions of one sample are one cluster.
"""

import torch

from dskd.console import progress_bar
from dskd.distributed.collectives import sum_over_ranks
from dskd.distributed.world import World
from dskd.evaluation.held_out_text import HeldOutText, alignment
from dskd.evaluation.lexical.scores import Item
from dskd.models.running.frozen import FrozenModel
from dskd.senses.csr import padded_ranges
from dskd.senses.dictionary import SenseDictionary
from dskd.shards import gather_rows

MEASURES = AGREEMENT, ALIGNMENT = "row_agreement", "sense_alignment"
_POSITIONS = 2048  # positions compared with their rows at a time


def senses_of_positions(model: FrozenModel, text: HeldOutText, dictionary: SenseDictionary, world: World) -> list[Item]:
    """Returns an item for each sample and measure, from all ranks, on every rank."""
    # [samples, measures, 3]: hits, positions, and the sum of their chances. Each rank fills in its own samples.
    sums = torch.zeros(text.num_samples, 2, 3, dtype=torch.float64)
    with progress_bar(total=text.num_samples, label="senses of positions", unit="sequences") as bar:
        for batch in text.batches():
            hidden = model.hidden_states(batch["input_ids"], batch.get("position_ids")).flatten(0, 1)
            sample = batch["samples"].repeat_interleave(batch["input_ids"].shape[1])
            targets, mask = batch["labels"].flatten(), batch["loss_mask"].flatten()
            # row_agreement: only targets with several rows have a nearest one to disagree about.
            sizes = dictionary.senses_per_entry[targets.where(mask, 0)]
            several = (mask & (sizes > 1)).nonzero().squeeze(-1)
            for part in several.split(_POSITIONS) if len(several) else ():
                starts, counts = dictionary.entry_offsets[targets[part]], sizes[part]
                rows, exist = padded_ranges(starts, counts, int(counts.max()))
                used, (index,) = gather_rows(dictionary.mapped, [rows.where(exist, -1).int().numpy()])
                nearest = nearest_of(hidden[part.to(world.device)], used.to(world.device), index.to(world.device))
                agree = starts + nearest.cpu() == batch["nearest_sense"].flatten()[part]
                _add(sums[:, 0], sample[part], agree, 1 / counts.double())
            # sense_alignment: by chance the nearest of P + N rows is one of the P.
            both = batch["aligned_positions"]
            near, far = ((batch[name] >= 0).sum(dim=1).double() for name in ("near", "far"))
            _add(sums[:, 1], sample[both], alignment(hidden, batch, world.device).cpu(), near / (near + far))
            bar.update(min(len(batch["input_ids"]) * world.world_size, bar.total - bar.n))
    sums = sum_over_ranks(sums.to(world.device)).cpu()
    return [
        Item(measure, f"sample:{number}", f"sample:{number}", total, chance, int(count))
        for kind, measure in enumerate((AGREEMENT, ALIGNMENT))
        for number, (total, count, chance) in enumerate(sums[:, kind].tolist())
    ]


def nearest_of(states: torch.Tensor, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Returns the column [n] of `index` that holds the row nearest to each of the states [n, D]; the first of equal
    ones.

    `index` [n, C] has each state's candidates, as indices into the `rows` [R, D], padded with -1 on the right.
    """
    squares = (states.float().unsqueeze(1) - rows.float()[index.clamp(min=0)]).square().sum(-1)
    return squares.masked_fill(index < 0, torch.inf).min(dim=-1).indices


def _add(sums: torch.Tensor, samples: torch.Tensor, hits: torch.Tensor, chances: torch.Tensor) -> None:
    values = torch.stack([hits.double(), torch.ones(len(hits), dtype=torch.float64), chances.double()], dim=-1)
    sums.index_add_(0, samples, values)
