"""The models' continuations of the same few held-out texts, side by side: `WORKDIR/evaluation/NAME/samples.{json,md}`.

A prompt is the first half of a document of the validation shards, or of a chat what precedes its first answer, and
every model continues it greedily.
`samples.json` is a table that `mlflow.load_table` reads; `samples.md` is the same table for people.
"""

import html
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dskd.artifacts.manifest import read_file, write_json
from dskd.config import Config
from dskd.models.folder import ModelFolder
from dskd.models.frozen import FrozenModel
from dskd.models.generation import before_end, end_tokens, generate_greedily

TABLE_FILE, TEXT_FILE = "samples.json", "samples.md"
_PROMPT, _TEXT = "prompt", "the text itself"


def settings(config: Config) -> dict[str, int]:
    """Returns the part of the config that determines the samples; {} when the config asks for none."""
    if not config.evaluation.samples:
        return {}
    return {"samples": config.evaluation.samples, "sample_tokens": config.evaluation.sample_tokens}


@dataclass(frozen=True)
class Prompts:
    """Texts to continue: token ids [B, T], and how many tokens of each row are the prompt [B] and the document [B].

    `num_tokens` is the number of tokens that a model adds.
    """

    input_ids: torch.Tensor
    prompt_lengths: torch.Tensor
    document_lengths: torch.Tensor
    num_tokens: int

    @classmethod
    def of(cls, config: Config, batch: Mapping[str, torch.Tensor]) -> "Prompts":
        """Takes the first document of each of the first rows of `batch`, which are collated validation samples.

        If it is a chat, this is its part up to the end of its first answer, and the prompt is what precedes the answer.
        """
        count = config.evaluation.samples
        input_ids, mask = batch["input_ids"][:count].long().cpu(), batch["loss_mask"][:count].cpu()
        if "position_ids" in batch:  # a later position 0 begins the next document
            mask = mask & (batch["position_ids"][:count].cpu() == 0).cumsum(dim=1).le(1)
        # A document has a target at every token but its last; a chat, at every token of an answer.
        first = mask.long().argmax(dim=1)  # 0 also for a row without any target
        answer = (mask | (torch.arange(mask.shape[1]) < first[:, None])).long().cumprod(dim=1).sum(dim=1) + 1
        document_lengths = answer.where(mask.any(dim=1), 1)
        prompt_lengths = (first + 1).where(first > 0, document_lengths // 2).clamp(min=1)
        room = input_ids.shape[1] - int(prompt_lengths.max()) if count else 0
        return cls(input_ids, prompt_lengths, document_lengths, max(1, min(config.evaluation.sample_tokens, room)))

    def __len__(self) -> int:
        return len(self.prompt_lengths)


def continue_prompts(model: FrozenModel, prompts: Prompts) -> list[list[int]]:
    """Returns the token ids that the model adds to each prompt, without the end-of-text token and what follows it.

    All ranks must call it.
    """
    if not len(prompts):
        return []
    last = prompts.input_ids.shape[1] - 1
    added = generate_greedily(model, prompts.input_ids, prompts.prompt_lengths, prompts.num_tokens, last).tolist()
    _, ends = end_tokens(model.folder)
    return [before_end(row, ends) for row in added]


def write_samples(
    folder: Path, *, teacher: ModelFolder, prompts: Prompts, continuations: list[list[int]], name: str, teachers: Path
) -> None:
    """Writes the continuations of the model `name` into `folder`, in a column next to the teacher's.

    `continuations` are the token ids that the model added to each prompt. `teachers` is the folder of the teacher's
    evaluation; for the teacher it may not exist yet. All models use the tokenizer of `teacher`.
    """
    tokenizer = teacher.load_tokenizer()
    columns: dict[str, list[str]] = {_PROMPT: [], _TEXT: []}
    for row, start, end in zip(
        prompts.input_ids, prompts.prompt_lengths.tolist(), prompts.document_lengths.tolist(), strict=True
    ):
        columns[_PROMPT].append(tokenizer.decode(row[:start], skip_special_tokens=True))
        rest = row[start : min(end, start + prompts.num_tokens)]
        columns[_TEXT].append(tokenizer.decode(rest, skip_special_tokens=True))
    if (table := read_file(teachers, TABLE_FILE)) is not None:
        samples = json.loads(table)
        index = samples["columns"].index("teacher")
        columns["teacher"] = [row[index] for row in samples["data"]]  # overwritten below if this model is the teacher
    columns[name] = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in continuations]
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    write_json(folder / TABLE_FILE, {"columns": list(columns), "data": rows})
    (folder / TEXT_FILE).write_text(_as_markdown(list(columns), rows), encoding="utf-8")


def _as_markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_cell(text) for text in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    """Returns the text as one cell of a Markdown table: bars, line breaks and tags in it are escaped or removed."""
    return " ".join(html.escape(text, quote=False).replace("|", "\\|").split())
