"""`dskd inspect senses`: the tokens' numbers of states and senses, and the share of training targets they cover."""

from dskd.config import Config
from dskd.console import table
from dskd.corpus.sequences import load_sequences
from dskd.inspection.artifacts import note_lines, open_teacher, or_note
from dskd.inspection.contexts import open_training_shards
from dskd.inspection.histogram import draw_histograms, histogram, histogram_text, log2_histogram
from dskd.inspection.tokens import readable, token_texts
from dskd.senses.dictionary import SenseDictionary, load_dictionary

_FREQUENT = 10


def report_senses(config: Config, *, with_picture: bool) -> str:
    """Returns a report on the sense dictionary, and on its coverage of the training text if that exists.

    `with_picture` also draws the histograms to `WORKDIR/plots/senses.png`. Raises a UserError without a dictionary.
    """
    dictionary, manifest = load_dictionary(config)
    notes: list[str] = []
    shards = or_note(lambda: open_training_shards(config, manifest), "share of training targets", notes)
    frequent = or_note(lambda: _frequent_without_senses(config, dictionary), "frequent tokens without senses", notes)
    senses, spans = dictionary.senses_per_token, dictionary.senses_per_entry[dictionary.vocab_size :]
    by_states, by_senses = log2_histogram(dictionary.states_per_token), histogram(senses)
    lines = [
        f"{dictionary.path}: {dictionary.num_rows:,} sense embeddings of {dictionary.hidden_size:,} dimensions",
        f"  {int((senses > 0).sum()):,} of {dictionary.vocab_size:,} tokens and {int((spans > 0).sum()):,} of "
        f"{len(spans):,} spans have senses",
        "",
        "Tokens by the number of states of their senses:",
        histogram_text(by_states),
        "",
        "Tokens by their number of senses:",
        histogram_text(by_senses),
    ]
    if shards is not None:
        rows = [[name.replace("_", " "), f"{100 * share:.1f} %"] for name, share in shards[1].facts["coverage"].items()]
        lines += ["", table(["training targets", "share"], rows)]
    if frequent is not None:
        header = ["most frequent tokens without a sense", "times, in a sample"]
        lines += ["", table(header, frequent) if frequent else "Every token of the training text has a sense."]
    lines += note_lines(notes)
    if with_picture:
        path = config.path("plots", "senses.png")
        draw_histograms({"states a token": by_states, "senses a token": by_senses}, path)
        lines += ["", f"Picture: {path}"]
    return "\n".join(lines)


def _frequent_without_senses(config: Config, dictionary: SenseDictionary) -> list[list[str]]:
    """Returns the most frequent tokens of the training text that have no sense, each with its frequency in a sample."""
    teacher = open_teacher(config)
    sequences, _ = load_sequences(config, "train", teacher.folder.tokenizer_digest)
    counts = sequences.frequencies(dictionary.vocab_size)
    counts[dictionary.senses_per_token > 0] = 0
    numbers, tokens = counts.sort(descending=True, stable=True)
    frequent = [
        (token, number) for token, number in zip(tokens[:_FREQUENT].tolist(), numbers.tolist(), strict=False) if number
    ]
    texts = token_texts(teacher.tokenizer, [[token] for token, _ in frequent])
    return [[readable(text), f"{number:,}"] for text, (_, number) in zip(texts, frequent, strict=True)]
