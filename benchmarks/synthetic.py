"""Random models, dictionaries and text of any size, for benchmarks in which only shapes matter.

Tokens are as frequent as words are (Zipf: token 0 is the most frequent one). Every fifth token has synonyms and
antonyms; such a token is the target of about 17 % of the positions.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from benchmarks.flops import Shape
from dskd.senses.dictionary import SenseDictionary, read_dictionary
from dskd.senses.entries import Entries

_POOL = 65_536  # number of different random sense embeddings; a larger dictionary repeats them
_GENERATED = 64  # positions of a teacher beyond a sequence, so that it can continue the sequence


def draw_tokens(count: int, length: int, vocab_size: int) -> np.ndarray:
    """Draws token ids [count, length] int32."""
    frequency = 1 / np.arange(1, vocab_size + 1)
    random = np.random.default_rng(0)
    return random.choice(vocab_size, (count, length), p=frequency / frequency.sum()).astype(np.int32)


def llama_config(shape: Shape, num_layers: int) -> Any:
    """Returns the config of a Llama with the sizes of a shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=shape.sequence_length + _GENERATED,
        bos_token_id=0,
        eos_token_id=0,
    )


def write_teacher(folder: Path, shape: Shape, device: torch.device) -> None:
    """Writes a Hugging Face folder with a Llama of this shape in bf16, and a tokenizer that knows no words."""
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    config = llama_config(shape, shape.teacher_layers)
    torch.manual_seed(0)
    with device:  # on the GPU if there is one, which draws billions of random numbers faster
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<end>": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()


def write_dictionary(path: Path, vocab_size: int, hidden_size: int, *, k: int, synonyms: int) -> SenseDictionary:
    """Writes a dictionary with `k` senses for each token, and returns it.

    Every fifth token has `synonyms` random synonyms and half as many antonyms.
    """
    # The relations as CSR: offsets [V + 1] into a flat array of entries.
    generator = torch.Generator().manual_seed(0)
    lexical = torch.arange(vocab_size) % 5 == 4
    csr = {}
    for name, number in (("synonym", synonyms), ("antonym", synonyms // 2)):
        sizes = torch.where(lexical, number, 0)
        entries = torch.randint(0, vocab_size, (int(sizes.sum()),), generator=generator)
        csr[f"{name}_offsets"] = F.pad(sizes.cumsum(0), (1, 0))
        csr[f"{name}_entries"] = entries.int()
    rows = vocab_size * k
    pool = torch.randn(min(rows, _POOL), hidden_size, generator=generator).bfloat16()
    vectors = pool.repeat(-(-rows // len(pool)), 1)[:rows]
    counts, offsets = torch.ones(rows, dtype=torch.int64), torch.arange(vocab_size + 1) * k
    entries = Entries(vocab_size, torch.empty(0, 3, dtype=torch.int32), **csr)
    save_file({"vectors": vectors, "counts": counts, "entry_offsets": offsets, **entries.tensors()}, path)
    return read_dictionary(path)


def draw_annotation(tokens: np.ndarray, dictionary: SenseDictionary, kappa: int) -> dict[str, np.ndarray]:
    """Draws the columns of annotated shards for tokens [S, T]: random rows of the right entries, [S, T, kappa] each.

    For a training step it does not matter which rows they are, but it does matter how many they are and how far apart
    in the file.
    """
    random = np.random.default_rng(1)
    targets = np.roll(tokens, -1, axis=1)
    offsets = dictionary.entry_offsets.numpy()

    def rows_of(entries: np.ndarray) -> np.ndarray:
        number = random.integers(0, offsets[entries + 1] - offsets[entries])
        return (offsets[entries] + number).astype(np.int32)

    columns = {"sense_ids": rows_of(np.repeat(targets[..., None], kappa, axis=-1))}
    for kind in ("synonym", "antonym"):
        starts = getattr(dictionary.entries, f"{kind}_offsets").numpy()
        entries = getattr(dictionary.entries, f"{kind}_entries").numpy()
        # For each position draw `kappa` of its target's related entries, and of each entry one row; -1 without any.
        numbers = (starts[targets + 1] - starts[targets])[..., None]
        entry = random.integers(0, np.maximum(numbers, 1), (*targets.shape, kappa))
        entry = np.minimum(starts[targets][..., None] + entry, len(entries) - 1)
        columns[f"{kind}_ids"] = np.where(numbers > 0, rows_of(entries[entry]), -1).astype(np.int32)
    for column in columns.values():
        column[:, -1] = -1  # the last position has no target
    return columns
