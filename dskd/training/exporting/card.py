"""The model card of an export, `README.md`: what the model was made from, how it scores, and what its licence asks.

A card is a function of the export's manifest and of results. The evaluation follows the export, so a card is written
with the export, and again when there are results. The manifest does not list it, so rewriting the card does not make
evaluations stale.
"""

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from dskd.artifacts.files import write_text
from dskd.config import LossConfig
from dskd.errors import counted
from dskd.losses.terms import minimised_terms
from dskd.models.files.folder import MODEL_CARD_NAME
from dskd.students.spacing import as_text
from dskd.training.exporting import HELD_OUT_TEXT
from dskd.training.exporting.licences import is_link, licence_link, obligations

FACTS = "card"  # of the export's manifest, see :mod:`dskd.training.exporting.card_facts`
_TEMPLATE = "card.md.jinja"
_WORDNET = (
    "WordNet's data is under Princeton University's WordNet licence "
    "(https://wordnet.princeton.edu/license-and-commercial-use), with this notice: WordNet 3.0 Copyright 2006 by "
    "Princeton University. All rights reserved. It is provided “as is”, without warranties of any kind."
)
_TAGS = ["dskd", "knowledge-distillation"]
_VERSIONS = ("dskd", "torch", "deepspeed", "transformers", "tokenizers")
_TEXTS = {
    "wordnet": "WordNet's definitions and examples",
    "files": "files of the person who trained it",
    "huggingface": "a dataset",
    "chat": "chats",
    "tasks": "prompts made of the training splits of benchmarks",
    "teacher": "texts that the teacher wrote",
}
_DIVERGENCES = {
    "forward_kl": "KL(teacher ‖ student)",
    "reverse_kl": "KL(student ‖ teacher)",
    "jensen_shannon": "Jensen-Shannon divergence of teacher and student",
}


@dataclass(frozen=True)
class Result:
    """The results of one evaluation: a row for each measure, a column for each model, the exported one last."""

    title: str
    models: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]  # label and cells
    data: str  # a name for the evaluated data
    scores: Mapping[str, float]  # {name of a metric: the exported model's score}, for the head of the card


def write_card(folder: Path, text: str) -> bool:
    """Writes an export's card, unless it is there already; returns True if it did."""
    file = folder / MODEL_CARD_NAME
    if file.is_file() and file.read_text(encoding="utf-8") == text:
        return False
    write_text(file, text)
    return True


def render_card(facts: Mapping[str, Any], packages: Mapping[str, str], results: Sequence[Result] = ()) -> str:
    """Returns the text of a card, with its head as the Hub reads it.

    Args:
        facts: those of the export's manifest.
        packages: the versions of packages, from the same manifest.
        results: what was measured; empty before the evaluation.
    """
    from huggingface_hub import ModelCard
    from jinja2 import Environment, StrictUndefined

    card = facts[FACTS]
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    template = environment.from_string(resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8"))
    versions = [f"{name} {packages[name]}" for name in _VERSIONS if name in packages]
    text = template.render(
        head=_head(facts["run"], card, results).to_yaml(),
        title=f"{facts['run']}: a student of {_teacher_name(card) or 'a larger language model'}",
        summary=_summary(card),
        usage=chat_program(".", card["student"]["has_chat_template"], comment="this folder, or the name on the Hub"),
        made=[*_made(facts), *([("Versions", ", ".join(versions))] if versions else [])],
        results=results,
        licence=_licence(card),
    )
    return str(ModelCard(text))


def chat_program(model: str, has_chat_template: bool, comment: str = "") -> str:
    """Returns a few lines of Python that chat with a model, or continue a text if it has no chat template."""
    load = f'chat = pipeline("text-generation", {json.dumps(model)}){f"  # {comment}" if comment else ""}'
    if has_chat_template:
        ask = 'chat([{"role": "user", "content": "What is the opposite of hot?"}], max_new_tokens=60)'
        show = f'answer = {ask}\nprint(answer[0]["generated_text"][-1]["content"])'
    else:
        show = 'print(chat("The opposite of hot is", max_new_tokens=40)[0]["generated_text"])'
    return f"from transformers import pipeline\n\n{load}\n{show}"


def _head(run: str, card: Mapping[str, Any], results: Sequence[Result]) -> Any:
    """Returns the head of the card, a `ModelCardData`."""
    from huggingface_hub import EvalResult, ModelCardData

    teacher, student = card.get("teacher", {}), card["student"]
    # A pretrained student has a licence of its own, so the teacher's alone is not the model's.
    of_licence = teacher if student["origin"] != "path" or student.get("license") == teacher.get("license") else {}
    bases = [*([student["name"]] if "name" in student else []), *teacher.get("base_model", [])]
    scores = [
        EvalResult(
            task_type="text-generation",
            dataset_type=result.data,
            dataset_name=_dataset_name(result, card),
            metric_type=name,
            metric_value=float(f"{score:.6g}"),
        )
        for result in results
        for name, score in result.scores.items()
    ]
    return ModelCardData(
        base_model=bases[0] if len(bases) == 1 else bases or None,
        license=of_licence.get("license"),
        license_name=of_licence.get("license_name"),
        license_link=licence_link(of_licence.get("license_link")),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=_TAGS,
        datasets=[card["text"]["dataset"]] if "dataset" in card.get("text", {}) else None,
        model_name=run if scores else None,
        eval_results=scores or None,
    )


def _dataset_name(result: Result, card: Mapping[str, Any]) -> str:
    """Returns the name of what was evaluated: of held-out text, with that of the dataset from which it was held out."""
    text = card.get("text", {})
    dataset = text.get("dataset") or ("WordNet" if text.get("source") == "wordnet" else None)
    return f"{result.title} of {dataset}" if result.data == HELD_OUT_TEXT and dataset else result.title


def _plain(text: Any) -> str:
    """Returns a name from somebody else's file with Markdown and HTML escaped."""
    return html.escape(re.sub(r"[\\\[\]*_|]", r"\\\g<0>", str(text)), quote=False).replace("`", "'")


def _teacher_name(card: Mapping[str, Any]) -> str:
    return _plain(card.get("teacher", {}).get("name", ""))


def _summary(card: Mapping[str, Any]) -> str:
    with_senses = (
        ", with a loss that compares its hidden states with sense embeddings of words (Decoder-based Sense Knowledge "
        "Distillation)"
        if _loss_of(card).reads("sense_rows")
        else ""
    )
    return (
        f"A language model of {counted(card['student']['num_layers'], 'layer')}, distilled from a larger one, the "
        f"teacher{with_senses}. It was made with `dskd`. Nobody has examined what it says: expect errors, and the "
        "teacher's biases."
    )


def _made(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns name and text of each fact on how the model was made."""
    card = facts[FACTS]
    lines = [("Teacher", _teacher(card.get("teacher"))), ("Student", _student(card))]
    if "text" in card:
        lines.append(("Text", _text(card["text"])))
    if "lexicon" in card and _loss_of(card).reads("sense_rows", "lexical_marks"):
        lines.append(("Synonyms and antonyms", _lexicon(card["lexicon"])))
    return [*lines, ("Loss", _loss(_loss_of(card))), ("Training", _training(card["training"], facts["rounding_error"]))]


def _teacher(teacher: Mapping[str, Any] | None) -> str:
    if teacher is None:
        return "not known: it was not on the machine that exported the model"
    what = f"{teacher['architecture']}, {counted(teacher['layers'], 'layer')}"
    if teacher["origin"] == "scratch":
        return f"trained from scratch on the same text ({what})"
    if teacher["origin"] == "hub":
        revision = f", revision {_plain(teacher['revision'])}" if "revision" in teacher else ""
        return f"[{_plain(teacher['name'])}](https://huggingface.co/{teacher['name']}){revision} ({what})"
    remedy = "add `base_model: ORGANISATION/NAME` to the head of this card if it is on the Hub"
    if teacher["origin"] == "folder":
        return f"a model in a local folder, whose files do not name it ({what}); {remedy}"
    parts = [_plain(teacher.get("name", "a model whose file does not name it"))]
    if "organization" in teacher:
        parts.append(f"of {_plain(teacher['organization'])}")
    if "derived_from" in teacher:
        parts.append(f"made from {', '.join(map(_plain, teacher['derived_from']))}")
    if is_link(teacher.get("url", "")):
        parts.append(teacher["url"])
    missing = "" if teacher.get("base_model") else f"; {remedy}"
    return f"{', '.join(parts)}: read from a GGUF file, and dequantised ({what}){missing}"


def _student(card: Mapping[str, Any]) -> str:
    student, trained = card["student"], _trained(card["training"]["trained"])
    if student["origin"] == "from_config":
        return f"{counted(student['num_layers'], 'layer')}, which began with random weights; {trained}"
    if student["origin"] == "path":
        return f"began as {_plain(student.get('name', 'another pretrained model'))}; {trained}"
    of = f" of {card['teacher']['layers']}" if "teacher" in card else ""
    return f"cut from the teacher: its layers {as_text(student['layers'])}{of}, counted from 0; {trained}"


def _trained(settings: Mapping[str, Any]) -> str:
    layers = settings["train_layers"]
    parts = []
    if layers == "all":
        parts.append("all layers")
    elif isinstance(layers, list):
        parts.append(f"layers {as_text(layers)} of the student")
    elif layers:
        parts.append("the last layer" if layers == 1 else f"the last {layers} layers")
    names = {"train_embeddings": "embeddings", "train_final_norm": "the final norm", "train_lm_head": "the output head"}
    parts += [name for key, name in names.items() if settings.get(key)]
    return f"trained: {', '.join(parts)}"


def _text(text: Mapping[str, Any]) -> str:
    name = _TEXTS.get(text["source"], text["source"])
    if "dataset" in text:
        name = f"[{_plain(text['dataset'])}](https://huggingface.co/datasets/{text['dataset']})"
    if "benchmarks" in text:
        name += f" ({', '.join(text['benchmarks'])})"
    return f"{name}; a corpus of {counted(text['documents'], 'document')}"


def _lexicon(lexicon: Mapping[str, Mapping[str, int]]) -> str:
    return "; ".join(
        f"{_plain(source)} ({', '.join(counted(count, f'{relation} pair') for relation, count in counts.items())})"
        for source, counts in lexicon.items()
    )


def _loss_of(card: Mapping[str, Any]) -> LossConfig:
    """Returns the section `loss` of the trained run; a key that its export does not have is at its default."""
    return LossConfig.model_construct(**card["loss"])


def _loss(loss: LossConfig) -> str:
    """Returns the terms of the loss with their weights."""
    keys = {**dict(loss), "divergence": _DIVERGENCES[loss.divergence]}
    terms = [
        f"{getattr(loss, term.weight):g} × {term.formula.format_map(keys)}"
        for term in minimised_terms()
        if term.is_weighted(loss)
    ]
    weighted = f"; words with relations weigh {loss.lexical_weight:g}" if loss.reads("lexical_marks") else ""
    share = loss.position_share
    drawn = "" if share == 1 else f"; at {100 * share:g} % of the positions, drawn at random in each step"
    return f"{' + '.join(terms)}{weighted}{drawn}"


def _training(training: Mapping[str, Any], rounding: float | None) -> str:
    text = f"{counted(training['steps'], 'step')} of {counted(training['global_batch_size'], 'sequence')}"
    if "sequence_length" in training:
        tokens = training["sequences"] * training["sequence_length"]
        text += f" of up to {training['sequence_length']:,} tokens ({tokens:,} in all, at most)"
    text += (
        f"; AdamW, peak learning rate {training['learning_rate']:g}; {training['precision']}; seed {training['seed']}"
    )
    if rounding:
        text += f"; rounding to the type of these files changes logits by {rounding:.1e} (relative)"
    return text


def _licence(card: Mapping[str, Any]) -> list[str]:
    """Returns the paragraphs on licences."""
    teacher, student = card.get("teacher"), card["student"]
    paragraphs = []
    if teacher is not None and teacher["origin"] == "scratch":
        paragraphs.append(
            "The teacher was trained from scratch by the person who made this model, who chooses a licence."
        )
    else:
        paragraphs.append(_of_teacher(teacher or {}))
    if student["origin"] == "path":
        name, asks = obligations(student)
        began = "The weights began as those of another model"
        if asks is not None:
            paragraphs.append(f"{began}, which is under {name}; that licence applies too: {asks}.")
        elif name:
            paragraphs.append(f"{began}, whose files name its licence as {_plain(name)}; that licence applies too.")
        else:
            paragraphs.append(
                f"{began}, whose files do not state its licence. That licence applies too: see it, wherever the "
                "model's makers state it, before you share this model."
            )
    source = card.get("text", {}).get("source")
    if source == "wordnet" or any(name.startswith("wordnet") for name in card.get("lexicon", {})):
        paragraphs.append(_WORDNET)
    return paragraphs


def _of_teacher(teacher: Mapping[str, Any]) -> str:
    name, asks = obligations(teacher)
    link = f" ({teacher['license_link']})" if is_link(teacher.get("license_link", "")) else ""
    if asks is not None:
        return f"The teacher is under {name}{link}, which applies to this model too: {asks}."
    if name:
        return (
            f"The teacher's files name its licence as {_plain(name)}{link}. See the teacher's licence for what it asks "
            "of models made from it."
        )
    return (
        "The teacher's files do not state its licence. See the teacher's licence, wherever its makers state it, before "
        "you share this model: it decides whether you may, and under which terms."
    )
