"""Sampled texts of a model, with transformers' own generation, in batches and on all ranks.

The token that a row gets is a function of the row's seed, of the token's place and of the probabilities: neither the
other rows of the batch nor the number of ranks decide what is drawn. They can change the last digits of the
probabilities, so equal texts need equal batches.

A model that fits is whole on every rank, because a sharded one sends all of its weights to all ranks for every token.
Shapes: B rows of a batch, T tokens, V vocabulary.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from dskd.config import Config
from dskd.console import say
from dskd.distributed.collectives import any_rank
from dskd.distributed.world import World
from dskd.errors import UserError
from dskd.models.checks.architecture import check_architecture
from dskd.models.checks.reference import compare_with_transformers
from dskd.models.files.folder import ModelFolder
from dskd.models.files.weights import TensorReader
from dskd.models.running.frozen import Decoder, frozen_settings
from dskd.models.running.generation import before_end, end_tokens
from dskd.models.running.precision import compute_dtype
from dskd.models.structure.base_model import base_model
from dskd.models.structure.causal_lm import build_sharded, destroy_engine, empty_tensors, load_resident
from dskd.random_numbers import uniform

_FIRST_TOKENS = 256  # that are looked at before all of the vocabulary is sorted
_ROOM = 2.0  # times the weights: keys and values, logits, and what else is in the memory


@dataclass(frozen=True)
class Sampling:
    """The sampling settings: the maximum number of new tokens, the temperature and top-p."""

    max_new_tokens: int
    temperature: float
    top_p: float


@dataclass(frozen=True)
class Sampler:
    """A causal LM of transformers that continues prompts; `engine` is its ZeRO-3 engine, None if it is not sharded."""

    causal_lm: Any
    engine: Any | None
    folder: ModelFolder
    device: torch.device
    ends: tuple[int, ...]  # the tokens that end a text
    nvme_folder: Path | None = None

    @property
    def needs_all_ranks(self) -> bool:
        """True if all ranks must call :meth:`sample` equally often: they gather the weights together."""
        return self.engine is not None

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling) -> list[list[int]]:
        """Returns the token ids that continue each of B prompts, without the end-of-text token and what follows it.

        Args:
            prompts: token ids of each row, at least one.
            seeds: of each row, from 0 to 2^63 - 1.
            sampling: how tokens are drawn.

        Raises:
            UserError: when the model's logits are not finite.
        """
        from transformers import GenerationConfig, LogitsProcessorList

        width, padding = max(map(len, prompts)), self.ends[0] if self.ends else 0
        # Padded on the left, so that all rows continue in the same column.
        input_ids = torch.tensor([[padding] * (width - len(row)) + [*row] for row in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=self.device)
        draw = _Draw(torch.tensor(seeds, dtype=torch.int64, device=self.device), width, sampling, self.folder)
        # Greedy, because `draw` leaves one token of each row: transformers would draw from one generator for all rows.
        settings = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            eos_token_id=list(self.ends) or None,
            pad_token_id=padding,
        )
        with torch.no_grad():
            output = self.causal_lm.generate(
                input_ids=input_ids,
                attention_mask=mask,
                generation_config=settings,
                logits_processor=LogitsProcessorList([draw]),
                synced_gpus=self.needs_all_ranks,
            )
        return [before_end(row, self.ends) for row in output[:, width:].tolist()]

    def close(self) -> None:
        """Frees the model's memory, and deletes its files on NVMe."""
        if self.engine is not None:
            destroy_engine(self.engine)
        else:
            empty_tensors((*self.causal_lm.parameters(), *self.causal_lm.buffers()))
        if self.nvme_folder is not None:
            shutil.rmtree(self.nvme_folder, ignore_errors=True)


def load_sampler(folder: ModelFolder, config: Config, world: World) -> Sampler:
    """Loads a model to sample from: whole on every rank if it fits or `teacher.mode` is resident, otherwise sharded.

    All ranks must call it.

    Raises:
        UserError: when weights are missing, the model is not supported, it computes something different from
            transformers, or there is no disk to offload it to.
    """
    from transformers import GenerationConfig

    dtype = compute_dtype(config.precision, world.device)
    check_architecture(folder, config.corpus)
    engine, nvme_folder = None, None
    if _is_resident(folder, config, world, dtype):
        causal_lm = load_resident(folder, dtype, world).requires_grad_(False)
    else:
        import deepspeed  # imported here so that commands that load no model do not wait for it

        say(f"  {folder.path}: sharded over the ranks, which gather it for every token")
        settings, nvme_folder = frozen_settings(folder, config, world, dtype)
        causal_lm = build_sharded(folder, settings, dtype, world).requires_grad_(False).eval()
        engine, *_ = deepspeed.initialize(model=causal_lm, config=settings)
        engine.eval()
        causal_lm = engine.module
    # What a call does not set comes from transformers' defaults, not from the model's own settings for generation.
    causal_lm.generation_config = GenerationConfig()
    decoder = Decoder(base_model(causal_lm))
    compare_with_transformers(decoder, decoder, folder, world, dtype)
    ends = tuple(end_tokens(folder)[1])
    return Sampler(causal_lm, engine, folder, world.device, ends, nvme_folder)


def _is_resident(folder: ModelFolder, config: Config, world: World, dtype: torch.dtype) -> bool:
    if world.device.type == "cuda":
        free = torch.cuda.mem_get_info(world.device)[0]
    else:
        free = psutil.virtual_memory().available // world.world_size
    weights = TensorReader(folder.path).numel * dtype.itemsize
    return not any_rank(not is_whole(config, weights, free), world)


def is_whole(config: Config, weights: int, memory: int) -> bool:
    """Returns True if a rank with this memory holds all of the model that writes; all bytes.

    `teacher.mode` decides it if it is resident or zero3; otherwise the model is whole if it fits.
    """
    if config.teacher.mode in ("resident", "zero3"):
        return config.teacher.mode == "resident"
    return _ROOM * weights <= memory


class _Draw:
    """A logits processor that leaves the token of each row that the row's seed draws."""

    def __init__(self, seeds: torch.Tensor, width: int, sampling: Sampling, folder: ModelFolder) -> None:
        self._seeds = seeds  # [B] int64
        self._width = width  # of the prompts
        self._sampling = sampling
        self._folder = folder

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Returns scores [B, V] that are 0 for the drawn token, and minus infinity for all others."""
        probabilities = (scores / self._sampling.temperature).softmax(-1)
        if not probabilities[:, 0].isfinite().all():
            raise UserError(
                f"{self._folder.path}: the probabilities of the next token are not finite; check its weights, or use "
                "precision: fp32"
            )
        if self._sampling.top_p < 1:
            least = least_probability(probabilities, self._sampling.top_p)
            probabilities = probabilities.masked_fill(probabilities < least[:, None], 0)
        # The first token at which the sum of probabilities passes a random share of all.
        cumulative = probabilities.cumsum(-1, dtype=torch.float64)
        share = uniform(0, self._seeds, input_ids.shape[1] - self._width)[:, None]
        drawn = torch.searchsorted(cumulative, share * cumulative[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn.clamp(max=scores.shape[-1] - 1), 0.0)


def least_probability(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Returns the smallest probability [B] among the most probable tokens that have `top_p` together.

    All tokens with this probability count, so the order of equal ones does not matter. Sorting all of the vocabulary
    takes as long as a small model's forward pass, so it is only done for rows in which the first ones are not enough.
    """

    def read(first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = first.cumsum(-1, dtype=torch.float64) - first  # of the more probable ones
        least = torch.where(before < top_p, first, torch.inf).amin(-1)
        return least, before[:, -1] + first[:, -1] >= top_p

    least, is_enough = read(probabilities.topk(min(_FIRST_TOKENS, probabilities.shape[-1]), dim=-1).values)
    if not is_enough.all():
        rows = (~is_enough).nonzero().squeeze(1)
        least[rows] = read(probabilities[rows].sort(dim=-1, descending=True).values)[0]
    return least
