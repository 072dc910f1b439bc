"""Annotation against the bare forward pass of its teacher: tokens per second of both, batch by batch in turn.

The teacher has random weights of the given shape, tokens are as frequent as words are (Zipf), and a fifth of them has
synonyms and antonyms, whose senses are random rows. What runs is what `launcher/annotate.py` runs for a block:

    python benchmarks/annotation.py --hidden-size 1024 --layers 8
    python benchmarks/annotation.py --hidden-size 4096 --layers 32 --vocab-size 128256 --length 1024   # on a GPU
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from dskd.annotate import TextReader, _annotate_block
from dskd.config import Config
from dskd.distributed import initialize
from dskd.model_folder import ModelFolder
from dskd.models import load_frozen
from dskd.senses.dictionary import read_dictionary, save_dictionary
from dskd.senses.entries import Entries
from dskd.senses.search import Searcher
from dskd.sequences import Sequences, open_sequences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences in one forward pass")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--kappa", type=int, default=5)
    parser.add_argument("--synonyms", type=int, default=8, help="of a lexical token; half as many antonyms")
    parser.add_argument("--memory-budget", type=float, default=4.0, help="annotation.memory_budget, in GB")
    given = parser.parse_args()
    world = initialize()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_teacher(given, folder)
        config = Config(
            workdir=name,
            teacher={"path": name, "offload": "none"},  # type: ignore[arg-type]
            annotation={"kappa": given.kappa, "batch_size": given.batch_size},  # type: ignore[arg-type]
        )
        sequences = _write_sequences(given, folder)
        dictionary = _write_dictionary(given, folder)
        teacher = load_frozen(ModelFolder(folder, "", ""), config, world, with_head=False)
        reader = TextReader(teacher, continuer=None, top_n=0, chunk_size=1)
        searcher = Searcher(
            dictionary,
            given.kappa,
            world.device,
            sequences.frequencies(given.vocab_size),
            int(given.memory_budget * 2**30),
        )
        seconds = {"forward": 0.0, "annotation": 0.0}
        for number in range(given.batches + 1):  # the first is to warm up
            block = range(number * given.batch_size, (number + 1) * given.batch_size)
            batch = sequences.batch(block.start, block.stop)

            def forward(batch=batch):  # type: ignore[no-untyped-def]
                return teacher.hidden_states(batch.input_ids, batch.position_ids).sum().item()

            def annotation(block=block):  # type: ignore[no-untyped-def]
                with tqdm(disable=True, total=0) as bar:
                    _annotate_block(block, sequences, reader, searcher, config, world, bar)

            for label, action in (("forward", forward), ("annotation", annotation)):
                started = time.perf_counter()
                action()
                if number:
                    seconds[label] += time.perf_counter() - started
        tokens = given.batches * given.batch_size * given.length
        rates = {label: tokens / spent for label, spent in seconds.items()}
        print(json.dumps(vars(given)))
        print(f"{world.device}, {torch.get_num_threads()} threads, {dictionary.num_rows:,} rows")
        print(
            f"forward {rates['forward']:,.0f} tokens/s, annotation {rates['annotation']:,.0f} tokens/s: "
            f"{rates['annotation'] / rates['forward']:.3f} of the bare forward pass"
        )


def _write_teacher(given: argparse.Namespace, folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, given.hidden_size // 128)
    shape = LlamaConfig(
        vocab_size=given.vocab_size,
        hidden_size=given.hidden_size,
        intermediate_size=given.hidden_size * 7 // 2,
        num_hidden_layers=given.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=given.length,
        dtype="bfloat16",
    )
    LlamaForCausalLM(shape).bfloat16().save_pretrained(folder)


def _write_sequences(given: argparse.Namespace, folder: Path) -> Sequences:
    from safetensors.torch import save_file

    count = (given.batches + 1) * given.batch_size
    frequency = 1 / np.arange(1, given.vocab_size + 1)
    tokens = np.random.default_rng(0).choice(given.vocab_size, (count, given.length), p=frequency / frequency.sum())
    lengths = torch.full((count,), given.length, dtype=torch.int32)
    starts = torch.zeros(count, given.length, dtype=torch.uint8)
    starts[:, 0] = 1
    path = folder / "train.safetensors"
    save_file({"input_ids": torch.from_numpy(tokens).int(), "lengths": lengths, "starts": starts}, path)
    return open_sequences(path)


def _write_dictionary(given: argparse.Namespace, folder: Path):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    lexical = torch.rand(given.vocab_size, generator=generator) < 0.2
    csr = {}
    for name, number in (("synonym", given.synonyms), ("antonym", given.synonyms // 2)):
        sizes = torch.where(lexical, number, 0)
        entries = torch.randint(0, given.vocab_size, (int(sizes.sum()),), generator=generator)
        csr[f"{name}_offsets"] = F.pad(sizes.cumsum(0), (1, 0))
        csr[f"{name}_entries"] = entries.int()
    entries = Entries(given.vocab_size, torch.empty(0, 3, dtype=torch.int32), **csr)
    rows = given.vocab_size * given.k
    path = folder / "senses.safetensors"
    vectors = torch.randn(rows, given.hidden_size, generator=generator, dtype=torch.bfloat16)
    offsets = torch.arange(given.vocab_size + 1) * given.k
    save_dictionary(path, vectors, torch.ones(rows, dtype=torch.int64), offsets, entries)
    return read_dictionary(path)


if __name__ == "__main__":
    main()
