"""A random teacher that knows the words of a small WordNet, and the config of a job in which it writes its text."""

from pathlib import Path
from typing import Any

from config_files import write_config
from tiny_models import save_model
from tiny_wordnet import write_wordnet

# Of one token each; the others end sentences, so that random text has some.
WORDS = ["entity", "car", "auto", "hot", "cold", "scorching", "torrid", "frigid", "large", "big", "small", "little"]
OTHERS = [*(f"w{index}" for index in range(60)), *(f"end{index}." for index in range(46))]
NUM_SENSES = 13  # hot is in two synsets; huge and galore are not tokens
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def write_job(folder: Path, *, chat_template: str | None = None, **corpus: Any) -> Path:
    """Writes a teacher, a WordNet and a config in which the teacher writes the corpus, and returns the config."""
    save_model(folder / "teacher", words=[*WORDS, *OTHERS])
    if chat_template is not None:
        (folder / "teacher" / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    write_wordnet(folder / "wordnet")
    settings = {
        "workdir": str(folder / "work"),
        "precision": "fp32",
        "teacher": {"path": str(folder / "teacher"), "offload": "none"},
        "wordnet": {"path": str(folder / "wordnet")},
        "corpus": {"source": "teacher", "sequence_length": 16, "max_new_tokens": 20, "texts_per_sense": 8, **corpus},
    }
    path = folder / "config.yaml"
    write_config(path, settings)
    return path
