"""The pipeline's last output: the comparison, examples of senses, and the exported models."""

import textwrap

from dskd.artifacts import kinds
from dskd.compare.results import DifferentDataError
from dskd.compare.text import compare
from dskd.config import Config
from dskd.errors import UserError
from dskd.inspection.examples import describe_examples
from dskd.models.files.folder import ModelFolder, load_tokenizer
from dskd.training.exporting import card


def describe_results(config: Config, teacher: ModelFolder | None = None) -> str:
    """Returns what the pipeline prints at its end: the comparison with what the models say, the senses of a few words,
    and the exported models, with a program that uses one. `teacher` is the config's, if it was found before.
    """
    parts = [compare_or_explain(config)]
    try:
        parts.append(describe_examples(config, teacher))
    except UserError as problem:  # such as a dictionary that was removed since; nothing that was made depends on it
        parts.append(f"No senses to show: {problem}")
    folders = {run: config.path(kinds.EXPORT.folder, run) for run in config.run_names}
    width = max(map(len, folders))
    exported = "\n".join(f"  {run.ljust(width)}  {folder}" for run, folder in folders.items())
    shown = folders.get(config.run) or [*folders.values()][-1]
    has_template = bool(load_tokenizer(shown, trust_remote_code=config.teacher.trust_remote_code).chat_template)
    program = textwrap.indent(card.chat_program(str(shown), has_template), "  ")
    parts.append(
        f"Trained students, which transformers loads, each with a model card (README.md):\n{exported}\n\n"
        f"{'Chat with one' if has_template else 'Let one continue a text'}, in Python:\n{program}"
    )
    return "\n\n".join(filter(None, parts))


def compare_or_explain(config: Config) -> str:
    """Returns the comparison with what the models say or, if earlier tracked runs were evaluated on other data, the
    reason why there is none.

    That is not a failure of the pipeline, since all artifacts exist.
    """
    try:
        return compare(config, with_texts=True)
    except DifferentDataError as error:
        return f"Not compared: {error}"
