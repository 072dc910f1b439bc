"""The time that the teacher takes to write the text itself (`corpus.source: teacher`), and the memory that it needs.

The ranks write batches of texts. A prompt is read at once, and then each pass of the model gives one token of every
text in the batch. Such a pass reads all weights, and the keys and values of all tokens before; for small batches that
takes longer than the computation. It is assumed that every text has all its tokens, so the hours are an upper bound
for the same rates (a batch waits for its longest text anyway).
"""

import functools
from dataclasses import dataclass
from pathlib import Path

from dskd.artifacts import kinds
from dskd.artifacts.hashing import MANIFEST_NAME
from dskd.artifacts.manifest import read_manifest
from dskd.config import Config
from dskd.config.data import KEYS_OF_TEXTS
from dskd.corpus.written.requests import find_senses
from dskd.errors import UserError, first_line
from dskd.lexicon.wordnet import needs_no_download, open_wordnet
from dskd.models.files.folder import has_tokenizer, load_tokenizer
from dskd.models.running.sampling import is_whole
from dskd.plan.architecture import Architecture
from dskd.plan.cluster import Cluster
from dskd.plan.memory import RESERVED_ON_GPU, RESERVED_ON_HOST
from dskd.plan.shapes import Shapes
from dskd.plan.speed import forward_flops

_PROMPT_TOKENS = 80  # assumed: a request has about 50, and a chat template adds some
_LOGITS_BYTES = 4 * 6  # a row of logits and what sampling makes of it


@dataclass(frozen=True)
class Writing:
    """The needs of the stage in which the teacher writes; None if it depends on an unknown number of texts.

    With a server, only `texts`, `tokens` and `flops_per_token` are of use.
    """

    is_done: bool
    texts: int | None
    missing: str  # why the number of texts is unknown, "" if it is not
    tokens: int | None  # to write, at most
    flops_per_token: float  # for each written token, with its share of the prompt
    tokens_per_s: float  # of all ranks
    hours: float | None
    limit: str  # what limits the speed
    memory: int  # bytes of a rank


def plan_writing(config: Config, cluster: Cluster, architecture: Architecture, teacher: Shapes) -> Writing | None:
    """Plans the stage; returns None if the teacher does not write the text."""
    corpus = config.corpus
    if corpus.source != "teacher":
        return None
    done = _written_texts(config)
    texts, missing = (done, "") if done is not None else _texts_to_write(config, architecture.values()["vocab_size"])
    new, length = corpus.max_new_tokens, _PROMPT_TOKENS + corpus.max_new_tokens
    values, size = architecture.values(), cluster.dtype(config.precision).itemsize
    batch = min(corpus.batch_size, -(-texts // cluster.world_size)) if texts else corpus.batch_size
    # Bytes that a pass reads: the weights, and keys and values of the tokens so far, on average half of the new ones.
    numel = architecture.numel()
    cache = 2 * architecture.key_value_width() * size * values["num_hidden_layers"]  # of a token
    read = numel * size + batch * cache * (_PROMPT_TOKENS + new / 2)
    # Seconds of a pass that writes one token of each text in the batch, by what they are spent on.
    is_sharded = not is_whole(config, numel * size, cluster.gpu_memory)
    others = (cluster.world_size - 1) / cluster.world_size
    flops = forward_flops(architecture, teacher, length)
    seconds = {
        "computation": batch * flops / cluster.flops,
        "reading weights, keys and values from memory (a larger corpus.batch_size helps)": read
        / cluster.memory_bandwidth,
        "gathering the sharded teacher for every token (corpus.server may be faster)": is_sharded
        * (size * numel * others / cluster.bandwidth),
    }
    limit = max(seconds, key=lambda name: seconds[name])
    of_prompts = batch * _PROMPT_TOKENS * flops / cluster.flops
    tokens_per_s = cluster.world_size * batch * new / (new * seconds[limit] + of_prompts)
    tokens = texts and texts * new
    weights = numel * size / (cluster.world_size if is_sharded else 1)
    reserved = RESERVED_ON_GPU if cluster.device == "cuda" else RESERVED_ON_HOST
    return Writing(
        done is not None,
        texts,
        missing,
        tokens,
        flops * length / new,
        tokens_per_s,
        tokens and tokens / tokens_per_s / 3600,
        limit,
        round(weights + batch * (cache * length + _LOGITS_BYTES * values["vocab_size"])) + reserved,
    )


def _texts_to_write(config: Config, vocab_size: int) -> tuple[int | None, str]:
    """Returns the number of texts, or None and why it is unknown: nothing is fetched for a plan."""
    corpus, teacher = config.corpus, config.teacher
    if corpus.max_senses is not None:
        return corpus.max_senses * corpus.texts_per_sense, ""
    folder = config.path(kinds.TEACHER.folder) if teacher.is_made else Path(teacher.path or "").expanduser()
    if not has_tokenizer(folder):
        return None, f"set corpus.max_senses, as {folder} has no tokenizer on this machine"
    try:
        if not needs_no_download(config.wordnet.path):
            return None, "set corpus.max_senses, as this machine has no WordNet"
        senses = _count_senses(folder, teacher.trust_remote_code, config.wordnet.path, vocab_size)
    except UserError as error:
        return None, f"set corpus.max_senses, or correct this: {first_line(error)}"
    return senses * corpus.texts_per_sense, ""


@functools.cache  # a plan is made again for every change that may make the job fit
def _count_senses(folder: Path, trust_remote_code: bool, wordnet: str | None, vocab_size: int) -> int:
    """Returns the number of senses of words that are one token of the tokenizer in `folder`."""
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    return len(find_senses(open_wordnet(wordnet), tokenizer, vocab_size, seed=0))


def _written_texts(config: Config) -> int | None:
    """Returns the number of texts that are written as the config says, None if there are none."""
    folder, corpus = config.path(kinds.WRITTEN.folder), config.corpus.as_dict()
    if not (folder / MANIFEST_NAME).is_file():
        return None
    manifest = read_manifest(folder, kinds.WRITTEN.name, files_are_here=False)
    are_these = all(manifest.config.get(key) == corpus[key] for key in KEYS_OF_TEXTS)
    return int(manifest.facts["texts"]) if are_these else None
