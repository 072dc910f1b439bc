"""The models' continuations of the same few texts, side by side: `WORKDIR/evaluation/NAME/samples.{json,md}`.

A prompt is a request of `evaluation.prompts`, through the chat template if there is one; or the first half of a
document of the validation shards, or of a chat what precedes its first answer. Every model continues it greedily.
`samples.json` is a table that `mlflow.load_table` reads; `samples.md` is the same table for people.
"""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dskd.artifacts.hashing import digest_of_json
from dskd.artifacts.manifest import read_file, write_json
from dskd.config import Config
from dskd.console import markdown_table
from dskd.corpus.tasks.prompts import Prompter
from dskd.errors import UserError
from dskd.evaluation.batching import padded
from dskd.models.files.folder import ModelFolder
from dskd.models.limits import position_limit, vocabulary_size
from dskd.models.running.frozen import FrozenModel
from dskd.models.running.generation import before_end, end_tokens, generate_greedily
from dskd.models.tokenizing import require_known

CONTINUATIONS_TABLE, CONTINUATIONS_TEXT = "samples.json", "samples.md"
_PROMPT, _TEXT = "prompt", "the text itself"
# A text is shown if each of its halves has this many tokens: the model can tell from the first what it is about.
_LEAST_TOKENS = 5
_ROWS_FOR_A_SAMPLE = 16  # of which one is likely to begin with such a text


@dataclass(frozen=True)
class Request:
    """A request of `evaluation.prompts`, and its tokens."""

    text: str
    tokens: Sequence[int]


def read_requests(config: Config, teacher: ModelFolder) -> list[Request]:
    """Returns the requests with the tokens that all models read. Raises a UserError when the chat template raises an
    error.
    """
    if not config.evaluation.prompts:
        return []
    prompter = Prompter(teacher.tokenizer)
    return [Request(text, prompter.tokens(prompter.request(text))) for text in config.evaluation.prompts]


def settings(config: Config, requests: Sequence[Request]) -> dict[str, Any]:
    """Returns what determines the continuations; {} when the config asks for none."""
    if not (config.evaluation.samples or requests):
        return {}
    values: dict[str, Any] = {"samples": config.evaluation.samples, "sample_tokens": config.evaluation.sample_tokens}
    if requests:  # not a key otherwise, so that results of configs without requests stay up to date
        values["requests"] = digest_of_json([[request.text, request.tokens] for request in requests])
    return values


@dataclass(frozen=True)
class Prompts:
    """The texts to continue: token ids [B, T], and how many tokens of each row are the prompt [B] and the document [B].

    `num_tokens` is the number of tokens that a model adds, and T - 1 the last position that it uses. `texts` are shown
    as the prompts, if there are any, and otherwise the tokens.
    """

    input_ids: torch.Tensor
    prompt_lengths: torch.Tensor
    document_lengths: torch.Tensor
    num_tokens: int
    texts: Sequence[str] = ()

    @classmethod
    def of_requests(cls, config: Config, requests: Sequence[Request], models: Sequence[ModelFolder]) -> "Prompts":
        """Takes requests, which have no known answer.

        Raises:
            UserError: when a model lacks a token of a request, or positions for its answer.
        """
        added = config.evaluation.sample_tokens
        lengths = torch.tensor([len(request.tokens) for request in requests])
        for model in models if requests else ():
            model_config = model.load_config()
            limit, size = position_limit(model_config), vocabulary_size(model_config)
            for number, request in enumerate(requests):
                key = f"evaluation.prompts[{number}]"
                require_known(request.tokens, size, model.tokenizer, f"{key} for {model.path}")
                if limit is not None and len(request.tokens) + added > limit:
                    raise UserError(
                        f"{key}: its {len(request.tokens)} tokens, with the chat template's, and the {added} of "
                        f"evaluation.sample_tokens are more than the {limit} positions of {model.path}; shorten the "
                        "prompt, or lower evaluation.sample_tokens"
                    )
        room = [0] * added  # for the positions of the answer
        rows = padded([[*request.tokens, *room] for request in requests])
        return cls(rows, lengths, lengths, added, [request.text for request in requests])

    @staticmethod
    def num_rows(config: Config) -> int:
        """Returns how many validation samples :meth:`of` chooses from."""
        return max(1, _ROWS_FOR_A_SAMPLE * config.evaluation.samples)

    @classmethod
    def of(cls, config: Config, batch: Mapping[str, torch.Tensor]) -> "Prompts":
        """Takes the first document of each of the first rows of `batch`, which are collated validation samples.

        Rows whose first document is a text too short to continue, or has no targets, are used only if there are not
        enough others.

        If the document is a chat, this is its part up to the end of its first answer, and the prompt is what precedes
        the answer.
        """
        count = config.evaluation.samples
        input_ids, mask = batch["input_ids"].long().cpu(), batch["loss_mask"].cpu()
        if "position_ids" in batch:  # a later position 0 begins the next document
            mask = mask & (batch["position_ids"].cpu() == 0).cumsum(dim=1).le(1)
        # A document has a target at every token but its last; a chat, at every token of an answer.
        first = mask.long().argmax(dim=1)  # 0 also for a row without any target
        answer = (mask | (torch.arange(mask.shape[1]) < first[:, None])).long().cumprod(dim=1).sum(dim=1) + 1
        document_lengths = answer.where(mask.any(dim=1), 1)
        prompt_lengths = (first + 1).where(first > 0, document_lengths // 2).clamp(min=1)
        is_long = (first > 0) | (torch.minimum(prompt_lengths, document_lengths - prompt_lengths) >= _LEAST_TOKENS)
        chosen = (~is_long).long().argsort(stable=True)[:count].sort().values
        input_ids, prompt_lengths, document_lengths = (
            values[chosen] for values in (input_ids, prompt_lengths, document_lengths)
        )
        room = input_ids.shape[1] - int(prompt_lengths.max()) if count else 0
        return cls(input_ids, prompt_lengths, document_lengths, max(1, min(config.evaluation.sample_tokens, room)))

    def __len__(self) -> int:
        return len(self.prompt_lengths)


def continue_prompts(model: FrozenModel, prompts: Prompts) -> list[list[int]]:
    """Returns the token ids that the model adds to each prompt, without the token that ends it and what follows that.

    All ranks must call it.
    """
    if not len(prompts):
        return []
    last = prompts.input_ids.shape[1] - 1
    added = generate_greedily(model, prompts.input_ids, prompts.prompt_lengths, prompts.num_tokens, last).tolist()
    _, ends = end_tokens(model.folder)
    return [before_end(row, ends) for row in added]


def write_continuations(
    folder: Path,
    *,
    teacher: ModelFolder,
    prompts: Sequence[Prompts],
    continuations: Sequence[list[int]],
    name: str,
    teachers: Path,
) -> None:
    """Writes the continuations of the model `name` into `folder`, in a column next to the teacher's.

    `continuations` are the token ids that the model added to each of all prompts. `teachers` is the folder of the
    teacher's evaluation; for the teacher it may not exist yet. All models use the tokenizer of `teacher`.
    """
    tokenizer = teacher.tokenizer
    columns: dict[str, list[str]] = {_PROMPT: [], _TEXT: []}
    for group in prompts:
        lengths = zip(group.prompt_lengths.tolist(), group.document_lengths.tolist(), strict=True)
        for number, (start, end) in enumerate(lengths):
            row = group.input_ids[number]
            shown = group.texts[number] if group.texts else tokenizer.decode(row[:start], skip_special_tokens=True)
            columns[_PROMPT].append(shown)
            rest = row[start : min(end, start + group.num_tokens)]
            columns[_TEXT].append(tokenizer.decode(rest, skip_special_tokens=True))
    if (table := read_file(teachers, CONTINUATIONS_TABLE)) is not None:
        written = json.loads(table)
        prompt, index = written["columns"].index(_PROMPT), written["columns"].index("teacher")
        teacher_texts = {row[prompt]: row[index] for row in written["data"]}
        # An earlier version may have let the teacher continue other texts. Overwritten below if this is the teacher.
        columns["teacher"] = [teacher_texts.get(text, "") for text in columns[_PROMPT]]
    columns[name] = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in continuations]
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    write_json(folder / CONTINUATIONS_TABLE, {"columns": list(columns), "data": rows})
    text = markdown_table(list(columns), [[_cell(continuation) for continuation in row] for row in rows]) + "\n"
    (folder / CONTINUATIONS_TEXT).write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class ContinuationTable:
    """The content of `samples.json`: {prompt: continuation} of each model, and of the texts themselves."""

    of_models: Mapping[str, Mapping[str, str]]
    texts_themselves: Mapping[str, str]


def parse_continuations(content: bytes) -> ContinuationTable:
    """Reads the content of `samples.json`. Raises a ValueError when it is another file."""
    try:
        table = json.loads(content)
        columns = dict(zip(table["columns"], zip(*table["data"], strict=True), strict=True)) if table["data"] else {}
        prompts = columns.pop(_PROMPT, ())
        of = {name: dict(zip(prompts, texts, strict=True)) for name, texts in columns.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"this is not a table of continuations ({error!r})") from None
    of_texts = of.pop(_TEXT, {})
    return ContinuationTable(of, of_texts)


def _cell(text: str) -> str:
    """Returns the text as one cell of a Markdown table: tags in it are escaped, and line breaks removed."""
    return " ".join(html.escape(text, quote=False).split())
