"""The sections for the stages before training: `corpus`, `wordnet`, `lexicon`, `senses` and `annotation`."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from dskd.config.evaluation import TASKS, TaskName
from dskd.config.section import GB, PathText, Section
from dskd.config.server_url import SERVER_KEY_VARIABLE, ServerUrl

_KEYS_OF_FILES = ("train", "validation")
_KEYS_OF_DATASETS = ("dataset", "dataset_config", "dataset_revision", "train_split", "validation_split")
# The keys of `corpus` that say which texts the teacher writes, and how; in all, those that are only for such texts.
KEYS_OF_TEXTS = ("max_senses", "texts_per_sense", "max_new_tokens", "temperature", "top_p")
_KEYS_OF_RANKS, _KEYS_OF_SERVERS = ("batch_size",), ("server_model", "server_requests")
WRITING_KEYS = (*KEYS_OF_TEXTS, *_KEYS_OF_RANKS, "server", *_KEYS_OF_SERVERS)
_KEYS_OF_SOURCES = {
    ("files", "chat"): _KEYS_OF_FILES,
    ("huggingface", "chat"): _KEYS_OF_DATASETS,
    ("tasks",): ("tasks",),
    ("chat",): ("loss_on", "long_chats"),
    ("teacher",): WRITING_KEYS,
}
LARGEST_BATCH = 256  # texts that are written at once, and saved together

# The states of the teacher that shards can store, by the names of their columns.
TEACHER_STATES, TRUNK_STATES = "teacher_states", "trunk_states"


class CorpusConfig(Section):
    """The text from which senses are gathered, and on which students are trained."""

    source: Literal["wordnet", "files", "huggingface", "tasks", "chat", "teacher"] = Field(
        "wordnet",
        description="source of the text. wordnet: glosses and examples; files: your own; huggingface: a dataset "
        "that `datasets` can load; tasks: prompts of the paper's benchmarks (section tasks); chat: chats in files or "
        "in a dataset, written with the teacher's chat template; teacher: the teacher writes about senses of "
        "words (docs/text-and-words.md)",
    )
    tasks: Annotated[tuple[TaskName, ...], Field(min_length=1)] = Field(
        TASKS,
        description="with source: tasks. Benchmarks whose training splits become few-shot prompts (docs/method.md, "
        "section 4)",
    )
    train: tuple[PathText, ...] = Field(
        (),
        description="with source: files or chat. Paths, folders or globs of .txt, .jsonl and .json (also .gz, .zst, "
        ".bz2, .xz), .parquet, .arrow, and folders of MDS shards or of Dataset.save_to_disk; chats are not in .txt or "
        "MDS",
    )
    validation: tuple[PathText, ...] = Field(
        (), description="with source: files or chat. Held-out files; empty: a share of the training documents"
    )
    dataset: PathText | None = Field(
        None, description="with source: huggingface or chat. Its name on the Hub, or a folder"
    )
    dataset_config: str | None = Field(None, description="configuration of the dataset, if it has several")
    dataset_revision: str | None = Field(None, description="branch, tag or commit of a dataset on the Hub")
    train_split: str = Field("train", min_length=1, description="split of the dataset to train on")
    validation_split: str | None = Field(None, description="held-out split; null: a share of the training documents")
    text_field: str = Field(
        "text",
        min_length=1,
        description="key or column that holds the text, if there are several; with source: chat, the one that holds "
        "the turns, if it is neither messages nor conversations",
    )
    validation_share: float = Field(0.05, gt=0, lt=0.5, description="share of documents held out, chosen by a hash")
    sequence_length: int = Field(128, ge=8, description="number of tokens in a training sequence")
    packing: Literal["documents", "stream", "none"] = Field(
        "documents",
        description="how documents fill sequences. documents: end to end, each by itself (attention and positions "
        "begin again); stream: end to end as one text; none: each document is one sample, padded",
    )
    loss_on: Literal["assistant", "all"] = Field(
        "assistant",
        description="with source: chat. Tokens that count in the loss. assistant: what the assistant says, and the "
        "token that ends its turn; all: every token of a chat",
    )
    long_chats: Literal["refuse", "drop"] = Field(
        "refuse",
        description="with source: chat, which never cuts a chat. Chats longer than sequence_length are refused, or "
        "left out and counted",
    )
    max_senses: int | None = Field(
        None,
        ge=1,
        description="with source: teacher. Number of senses to write for, drawn with `seed`; null: all senses of all "
        "words that are one token",
    )
    texts_per_sense: int = Field(1, ge=1, description="with source: teacher. Number of texts to write for each sense")
    max_new_tokens: int = Field(
        96,
        ge=8,
        description="with source: teacher. Most tokens of a text; one that is not finished by then is cut after its "
        "last whole sentence",
    )
    temperature: float = Field(
        0.8, gt=0, le=2, description="with source: teacher. Temperature at which the teacher samples"
    )
    top_p: float = Field(
        0.95,
        gt=0,
        le=1,
        description="with source: teacher. It samples among the most probable tokens that have this probability "
        "together; 1: among all",
    )
    batch_size: int = Field(
        32,
        ge=1,
        le=LARGEST_BATCH,
        description="with source: teacher, without server. Texts that a rank writes at once",
    )
    server: ServerUrl | None = Field(
        None,
        description="with source: teacher. URL of a server with OpenAI's chat completions, such as vLLM or SGLang, "
        f"which writes in the teacher's place; if it asks for a key, set {SERVER_KEY_VARIABLE} in the environment",
    )
    server_model: str | None = Field(
        None, min_length=1, description="with server. Name of the model there; null: its only one"
    )
    server_requests: int = Field(32, ge=1, le=4096, description="with server. Requests that it gets at once")
    max_sequences: int | None = Field(None, ge=1, description="largest number of training sequences; null: all")
    max_validation_sequences: int | None = Field(
        None, ge=1, description="largest number of held-out sequences; null: all"
    )

    def problems(self) -> Iterator[str]:
        """Yields messages about keys that do not fit the source."""
        if self.source == "files" and not self.train:
            yield "source: files needs corpus.train, a list of paths or globs"
        if self.source == "huggingface" and not self.dataset:
            yield "source: huggingface needs corpus.dataset, a name on the Hub or a folder"
        if self.source == "chat":
            yield from self._problems_of_chats()
        if self.source == "teacher":
            yield from self._problems_of_writing()
        yield from self.keys_without_use("corpus", "source", _KEYS_OF_SOURCES)

    def _problems_of_writing(self) -> Iterator[str]:
        if self.server is None and (keys := self.changed(_KEYS_OF_SERVERS)):
            yield f"{' and '.join(f'corpus.{key}' for key in keys)}: there is no corpus.server; set it, or remove them"
        if self.server is not None and self.changed(_KEYS_OF_RANKS):
            yield (
                "corpus.batch_size is for a teacher that writes here, and corpus.server writes; remove it, and set "
                "corpus.server_requests to the number of requests that the server gets at once"
            )

    def _problems_of_chats(self) -> Iterator[str]:
        of_files, of_datasets = (
            [f"corpus.{key}" for key in self.changed(keys)] for keys in (_KEYS_OF_FILES, _KEYS_OF_DATASETS)
        )
        if of_files and of_datasets:
            yield (
                f"source: chat reads either files or a dataset, and {', '.join([*of_files, *of_datasets])} are set; "
                "remove those of one of them"
            )
        elif not self.train and not self.dataset:
            yield (
                "source: chat needs corpus.train, a list of paths or globs, or corpus.dataset, a name on the Hub or a "
                "folder"
            )


class WordNetConfig(Section):
    """The location of WordNet."""

    path: PathText | None = Field(
        None, description="folder with WordNet's dictionary files (data.noun, index.noun, …); null: search"
    )


Language = Annotated[str, Field(pattern=r"^[a-z]{3}$")]
Affix = Annotated[str, Field(pattern=r"^([a-z]+-|-[a-z]+)$")]


class LexiconConfig(Section):
    """The sources of synonyms and antonyms (docs/method.md, section 1)."""

    wordnet: bool = Field(True, description="use WordNet: the lemmas of a synset as synonyms, and direct antonyms")
    indirect_antonyms: bool = Field(
        False, description="also indirect antonyms of English adjectives, through adjectives they are similar to"
    )
    languages: Annotated[tuple[Language, ...], Field(min_length=1)] = Field(
        ("eng",),
        description="languages of WordNet, as ISO 639-3 codes; all but eng need Open Multilingual WordNet",
    )
    wiktionary: tuple[PathText, ...] = Field((), description="files of Wiktextract (kaikki.org), .jsonl or .jsonl.gz")
    wiktionary_language: str = Field(
        "English", min_length=1, description="language of the entries to read, their `lang`"
    )
    dict2vec: tuple[PathText, ...] = Field((), description="pair lists of Dict2Vec, with two synonyms a line")
    tsv: tuple[PathText, ...] = Field(
        (), description="your own lists of WORD<TAB>synonym|antonym<TAB>WORD; # is a comment"
    )
    morpholex: PathText | None = Field(
        None, description="file of MorphoLEX (.xlsx): words with a negating affix count as their base, negated"
    )
    negating_affixes: tuple[Affix, ...] = Field(
        ("un-", "dis-", "non-", "im-", "-less"),
        description="with morpholex: its labels of affixes that negate, prefixes as un-, suffixes as -less. Its label "
        "im- also covers the negating in-, il- and ir-; its label in- means into (docs/method.md, section 1)",
    )

    def problems(self) -> Iterator[str]:
        """Yields messages about a lack of sources, and about keys that are for another source."""
        if not (self.wordnet or self.wiktionary or self.dict2vec or self.tsv):
            yield "no source of relations: set wordnet: true, or wiktionary, dict2vec or tsv to a list of files"
        if not self.wordnet and self.languages != ("eng",):
            yield "languages are those of WordNet: set wordnet: true, or remove them"
        if self.indirect_antonyms and not (self.wordnet and "eng" in self.languages):
            yield "indirect_antonyms come from WordNet in English: set wordnet: true and add eng to languages"


class SensesConfig(Section):
    """Settings for building the sense dictionary (docs/method.md, section 2)."""

    path: PathText | None = Field(
        None, description="folder of a finished dictionary to use instead, such as `dskd senses merge` writes"
    )
    key: Literal["predicted", "target"] = Field(
        "predicted",
        description="token under which a state is stored: the one the teacher predicts (the paper), or the next one",
    )
    k: int = Field(10, ge=1, description="largest number of senses of a token")
    states_per_sense: int | None = Field(
        None, ge=1, description="kept states of a token for each of its senses, up to k senses; null: always k"
    )
    max_states: int = Field(100, ge=1, description="number of states kept for a token, drawn at random")
    batch_size: int = Field(16, ge=1, description="number of sequences in one forward pass of the teacher")
    memory_budget: float = Field(
        4.0, gt=0, description="GB (2^30 bytes) of states that a rank holds in memory; more are written to disk"
    )
    save_minutes: float = Field(
        10.0, ge=0, description="minutes between saved points, from which an interrupted gathering of states resumes"
    )
    keep_states: bool = Field(
        False, description="keep the sampled states on disk; changing k or restarts then needs no teacher"
    )
    restarts: int = Field(1, ge=1, description="number of k-means runs for each token; the best is kept")
    max_iterations: int = Field(50, ge=1, description="largest number of Lloyd iterations in a k-means run")

    surface_forms: tuple[Literal["capitalized", "sentence_initial"], ...] = Field(
        (),
        description="forms of a word to use in addition to ' word' (the paper), if they are one token. "
        "capitalized: ' Word'; sentence_initial: 'Word' at the beginning of a text",
    )

    def problems(self) -> Iterator[str]:
        """Yields a message if there are more senses than states."""
        if self.k > self.max_states:
            yield (
                f"k {self.k} is more than max_states {self.max_states}, the most states of a token that are kept; "
                "lower k, or raise max_states"
            )

    @property
    def memory_bytes(self) -> int:
        """The memory budget in bytes."""
        return int(self.memory_budget * GB)


def _in_order(store: tuple[str, ...]) -> tuple[str, ...]:
    # The order has no meaning, and two orders must not be two recipes.
    return tuple(sorted(set(store)))


class AnnotationConfig(Section):
    """Settings for making the streaming shards (docs/method.md, section 3).

    A target token with senses has rows of the sense dictionary: its own (O_i), those of its synonyms (P_i) and those of
    its antonyms (N_i).
    """

    kappa: int = Field(5, ge=1, description="number of sense rows that a position is pulled to, and pushed from")
    batch_size: int = Field(16, ge=1, description="number of sequences in one forward pass of the teacher")
    shard_size_mb: int = Field(64, ge=1, description="size of a shard in MB before compression")
    memory_budget: float = Field(
        4.0,
        gt=0,
        description="GB (2^30 bytes) of sense embeddings a rank holds on its device; the others are read from disk",
    )
    store: Annotated[tuple[Literal["teacher_states", "trunk_states"], ...], AfterValidator(_in_order)] = Field(
        (),
        description="states of the teacher to store, so that training need not compute them again (docs/method.md, "
        "section 3). teacher_states: after its last layer; trunk_states: those that enter the student's lowest layer "
        "that is not shared with it",
    )
    teacher_top_n: int = Field(
        0,
        ge=0,
        description="number of most probable next tokens of the teacher stored per position, for teacher.mode: cached; "
        "0: none",
    )
    continuation_tokens: int = Field(
        0,
        ge=0,
        description="with corpus.packing: none. The teacher continues each training text greedily, by 1 to this number "
        "of tokens; text and continuation are the sample (docs/method.md, section 4). 0: none",
    )

    @property
    def memory_bytes(self) -> int:
        """The memory budget in bytes."""
        return int(self.memory_budget * GB)
