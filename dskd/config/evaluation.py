"""The sections `evaluation` and `tasks`: the data and settings with which models are measured."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field

from dskd.config.section import PathText, Section

TaskName = Literal["arc_challenge", "commonsense_qa", "piqa", "mmlu", "squad_v2"]
TASKS: tuple[TaskName, ...] = get_args(TaskName)
Prompt = Annotated[str, Field(pattern=r"\S")]


class EvaluationConfig(Section):
    """Measures on held-out text, continuations of texts, answers to requests, and lexical measures."""

    batch_size: int = Field(16, ge=1, description="number of sequences in one forward pass")
    samples: int = Field(4, ge=0, description="number of held-out texts that every model continues; 0: none")
    prompts: tuple[Prompt, ...] = Field(
        (),
        description="requests that every model answers in addition, through the chat template; without one, beginnings "
        "of texts that it continues",
    )
    sample_tokens: int = Field(24, ge=1, description="number of tokens of each continuation, chosen greedily")
    wic: PathText | None = Field(
        None,
        description="with --lexical. File NAME.data.txt of Words in Context as published, with NAME.gold.txt in the "
        "same folder. Use the same for all runs that you compare; otherwise their lexical measures differ in data",
    )
    wic_threshold: PathText | None = Field(
        None,
        description="with wic. Another such file, such as that of the training split, on which the threshold is chosen",
    )

    def problems(self) -> Iterator[str]:
        """Yields a message if the threshold is for no pairs, or would be chosen on the pairs that it is applied to."""
        if self.wic_threshold is None:
            return
        if self.wic is None:
            yield "wic_threshold needs evaluation.wic, the pairs that the threshold is applied to; set it too"
        elif (path := Path(self.wic).expanduser().resolve()) == Path(self.wic_threshold).expanduser().resolve():
            yield (
                f"wic_threshold is evaluation.wic itself, {path}, and the threshold would be chosen on what is "
                "measured; name another file, such as that of the training split, or leave it out"
            )


class TasksConfig(Section):
    """The paper's benchmarks, for evaluation and for training (docs/method.md, sections 4 and 5).

    Each is a folder with the benchmark's files, as published or as on the Hub, or the name of a dataset on the Hub.
    """

    arc_challenge: PathText = Field("allenai/ai2_arc", min_length=1, description="folder or dataset of ARC-Challenge")
    commonsense_qa: PathText = Field(
        "tau/commonsense_qa", min_length=1, description="folder or dataset of CommonsenseQA"
    )
    piqa: PathText = Field("baber/piqa", min_length=1, description="folder or dataset of PIQA")
    mmlu: PathText = Field("cais/mmlu", min_length=1, description="folder or dataset of MMLU")
    squad_v2: PathText = Field("rajpurkar/squad_v2", min_length=1, description="folder or dataset of SQuAD v2")
    evaluate: tuple[TaskName, ...] = Field(
        (), description="benchmarks that all models are evaluated on at the end of launcher/pipeline.py"
    )
    choice_shots: int = Field(5, ge=0, description="number of examples in a prompt, in all tasks but squad_v2")
    squad_shots: int = Field(1, ge=0, description="number of examples in a prompt of squad_v2")
    squad_shots_from: Literal["other_passages", "same_passage"] = Field(
        "other_passages",
        description="where the examples of squad_v2 are from. other_passages: of the training split, drawn at random; "
        "same_passage: answerable questions about the question's own passage, or none if it has none (the paper)",
    )
    choice_tokens: int = Field(2, ge=1, description="largest number of tokens in an answer, in all tasks but squad_v2")
    piqa_tokens: int | None = Field(
        None,
        ge=1,
        description="the same in piqa, whose digits are two tokens for some tokenizers; null: choice_tokens",
    )
    squad_tokens: int = Field(10, ge=1, description="largest number of tokens in an answer in squad_v2")
    limit: int | None = Field(
        None, ge=1, description="number of examples, drawn at random, per task (mmlu: per subject); null: all"
    )
    batch_size: int = Field(16, ge=1, description="number of prompts that a rank runs at once")
    train_share: float = Field(
        0.25, gt=0, le=1, description="with corpus.source: tasks. Share of training splits to use, except for squad_v2"
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="seed for drawing few-shot examples, tasks.limit and training splits; separate from `seed`, so "
        "that all runs get the same questions",
    )
