"""Writes blocks of texts with the teacher, on all ranks, with transformers' own generation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dskd.config import Config
from dskd.console import progress_bar
from dskd.corpus.written.blocks import write_block
from dskd.corpus.written.prompts import WritingPrompter
from dskd.corpus.written.requests import Request
from dskd.distributed.world import World
from dskd.errors import UserError
from dskd.models.files.folder import ModelFolder
from dskd.models.limits import position_limit
from dskd.models.running.sampling import Sampling, load_sampler


def write_with_teacher(
    config: Config,
    world: World,
    teacher: ModelFolder,
    prompter: WritingPrompter,
    requests: Sequence[Request],
    left: Sequence[range],
    folder: Path,
) -> int:
    """Writes the blocks `left` of the requests into `folder`, and returns the number of tokens this rank has written.

    Ranks take turns. A batch is a function of the requests and of `corpus.batch_size`, and never crosses a block.

    Raises:
        UserError: when a prompt leaves no room for a text, and the errors of
            :func:`dskd.models.running.sampling.load_sampler`.
    """
    tokenizer, size = teacher.tokenizer, config.corpus.batch_size
    _require_positions(config, teacher, prompter, requests)
    sampler = load_sampler(teacher, config, world)
    sampling = Sampling(config.corpus.max_new_tokens, config.corpus.temperature, config.corpus.top_p)
    own = left[world.rank :: world.world_size]
    written = 0

    def sample(batch: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        seeds = [request.seed(config.seed) for request in batch]
        return sampler.sample([prompter.tokens(request) for request in batch], seeds, sampling)

    total = len(requests)
    with progress_bar(total=total, initial=total - sum(map(len, left)), label="writing", unit="texts") as bar:
        for block in own:
            texts: list[str] = []
            for first in range(block.start, block.stop, size):
                batch = requests[first : min(first + size, block.stop)]
                added = sample(batch, sampling)
                written += sum(map(len, added))
                texts += _decode(tokenizer, added)
                bar.update(min(len(batch) * world.world_size, bar.total - bar.n))
            answers = zip(texts, requests[block.start : block.stop], strict=True)
            write_block(folder, block, [prompter.answer(text, request) for text, request in answers])
        if sampler.needs_all_ranks:
            # Ranks with less work take part in the others' passes.
            turns = [-(-len(block) // size) for block in left]
            of_ranks = [sum(turns[rank :: world.world_size]) for rank in range(world.world_size)]
            for _ in range(max(of_ranks) - of_ranks[world.rank]):
                sample(requests[:1], Sampling(1, 1.0, 1.0))
    sampler.close()
    return written


def _decode(tokenizer: Any, rows: list[list[int]]) -> list[str]:
    texts: list[str] = tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return texts


def _require_positions(
    config: Config, teacher: ModelFolder, prompter: WritingPrompter, requests: Sequence[Request]
) -> None:
    limit = position_limit(teacher.load_config())
    if limit is None:
        return
    longest = max(requests, key=lambda request: len(prompter.text(request)))
    tokens, new = len(prompter.tokens(longest)), config.corpus.max_new_tokens
    if tokens + new > limit:
        raise UserError(
            f"corpus.max_new_tokens: {new} tokens after a prompt of {tokens} ({longest.name}) are more than the "
            f"{limit} positions that {teacher.path} has; set it to {max(0, limit - tokens)} at most",
            known_to_all_ranks=True,
        )
