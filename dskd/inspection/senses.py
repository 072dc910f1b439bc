"""`dskd inspect senses`: the tokens' numbers of states and senses, and the share of training targets they cover."""

from dataclasses import dataclass, field
from pathlib import Path

from dskd.config import Config
from dskd.console import table
from dskd.corpus.sequences import load_sequences
from dskd.inspection.artifacts import note_lines, open_teacher, or_note
from dskd.inspection.contexts import open_training_shards
from dskd.inspection.histogram import Histogram, draw_histograms, histogram, histogram_text, log2_histogram
from dskd.inspection.tokens import readable, token_texts
from dskd.senses.dictionary import SenseDictionary, load_dictionary

_FREQUENT = 10


@dataclass(frozen=True)
class SensesReport:
    """The contents of the sense dictionary in numbers, and how much of the text it covers."""

    path: Path
    vocab_size: int
    hidden_size: int
    rows: int
    tokens_with_senses: int
    spans: int
    spans_with_senses: int
    states: Histogram  # tokens by the number of states that their senses were made from
    senses: Histogram  # tokens by their number of senses
    coverage: dict[str, float] | None = None  # shares of training targets; None without shards
    frequent: tuple[tuple[str, int], ...] | None = None  # (token without a sense, frequency); None without sequences
    notes: list[str] = field(default_factory=list)


def inspect_senses(config: Config) -> SensesReport:
    """Counts the contents of the sense dictionary, and its coverage of the training text if that exists.

    Raises:
        UserError: when there is no sense dictionary.
    """
    dictionary, manifest = load_dictionary(config)
    notes: list[str] = []
    shards = or_note(lambda: open_training_shards(config, manifest), "share of training targets", notes)
    frequent = or_note(lambda: _frequent_without_senses(config, dictionary), "frequent tokens without senses", notes)
    senses = dictionary.senses_per_token
    return SensesReport(
        dictionary.path,
        dictionary.vocab_size,
        dictionary.hidden_size,
        dictionary.num_rows,
        int((senses > 0).sum()),
        len(dictionary.entries.span_tokens),
        int((dictionary.senses_per_entry[dictionary.vocab_size :] > 0).sum()),
        log2_histogram(dictionary.states_per_token),
        histogram(senses),
        None if shards is None else shards[1].facts["coverage"],
        frequent,
        notes,
    )


def plot_senses(config: Config, report: SensesReport) -> Path:
    """Draws both histograms to `WORKDIR/plots/senses.png`."""
    path = config.path("plots", "senses.png")
    draw_histograms({"states a token": report.states, "senses a token": report.senses}, path)
    return path


def _frequent_without_senses(config: Config, dictionary: SenseDictionary) -> tuple[tuple[str, int], ...]:
    teacher = open_teacher(config)
    sequences, _ = load_sequences(config, "train", teacher.folder.tokenizer_digest)
    counts = sequences.frequencies(dictionary.vocab_size)
    counts[dictionary.senses_per_token > 0] = 0
    numbers, tokens = counts.sort(descending=True, stable=True)
    frequent = [
        (token, number) for token, number in zip(tokens[:_FREQUENT].tolist(), numbers.tolist(), strict=False) if number
    ]
    texts = token_texts(teacher.tokenizer, [[token] for token, _ in frequent])
    return tuple((readable(text), number) for text, (_, number) in zip(texts, frequent, strict=True))


# ---------------------------------------------------------------------------------------------------------------- text


def format_senses(report: SensesReport) -> str:
    """Formats the report as text."""
    lines = [
        f"{report.path}: {report.rows:,} sense embeddings of {report.hidden_size:,} dimensions",
        f"  {report.tokens_with_senses:,} of {report.vocab_size:,} tokens and {report.spans_with_senses:,} of "
        f"{report.spans:,} spans have senses",
        "",
        "Tokens by the number of states of their senses:",
        histogram_text(report.states),
        "",
        "Tokens by their number of senses:",
        histogram_text(report.senses),
    ]
    if report.coverage is not None:
        rows = [[name.replace("_", " "), f"{100 * share:.1f} %"] for name, share in report.coverage.items()]
        lines += ["", table(["training targets", "share"], rows)]
    if report.frequent is not None:
        rows = [[token, f"{number:,}"] for token, number in report.frequent]
        title = "most frequent tokens without a sense"
        lines += [
            "",
            table([title, "times, in a sample"], rows) if rows else "Every token of the training text has a sense.",
        ]
    lines += note_lines(report.notes)
    return "\n".join(lines)
