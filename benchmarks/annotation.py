"""Annotation against the bare forward pass of its teacher: tokens per second of both, which take turns.

The teacher has random weights of the given shape, tokens are as frequent as words are (Zipf), and every fifth token has
synonyms and antonyms, whose senses are random rows. The measured code is what `launcher/annotate.py` runs for a block.
With --store also annotation that stores the teacher's states, and writes its samples as shards while the next batch is
read; the other side writes nothing. With --work, teacher, dictionary and text are those of a work directory of other
benchmarks (`--folder`), and the options for sizes are not read:

    python -m benchmarks.annotation --hidden-size 1024 --layers 8
    python -m benchmarks.annotation --hidden-size 4096 --layers 32 --vocab-size 128256 --length 1024   # on a GPU
    python -m benchmarks.annotation --work FOLDER/8b-states --store
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.flops import Shape
from benchmarks.report import Spread, build_parser, default_device, machine, parse, publish, ratios, take_turns
from benchmarks.synthetic import draw_tokens, write_dictionary, write_teacher
from benchmarks.workload import read_config, read_tokens
from dskd.config import Config
from dskd.corpus.sequences import Sequences, open_sequences
from dskd.distributed.rendezvous import initialize, shutdown
from dskd.models.files.folder import find_teacher
from dskd.models.running.frozen import FrozenModel, load_frozen
from dskd.models.structure.trunk import HandOver
from dskd.senses.dictionary import SenseDictionary, load_dictionary
from dskd.shards.annotate import annotate_batch
from dskd.shards.blocks import WritingThread, shard_format_of
from dskd.shards.schema import TEACHER_STATES, TRUNK_STATES, StoredStates
from dskd.shards.search import Searcher
from dskd.shards.storing_states import plan_stored
from dskd.shards.text_reader import TextReader
from dskd.shards.writing import BlockWriter


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences in one forward pass")
    parser.add_argument("--batches", type=int, default=8, help="measured batches of each side")
    parser.add_argument("--turn", type=int, default=1, help="batches of a side before the other side's turn")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--kappa", type=int, default=5)
    parser.add_argument(
        "--synonyms", type=int, default=8, help="synonyms of each lexical token, which has half as many antonyms"
    )
    parser.add_argument("--memory-budget", type=float, default=4.0, help="annotation.memory_budget, in GB")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="a work directory of other benchmarks")
    parser.add_argument("--store", action="store_true", help="also measure annotation that stores states")
    args = parse(parser, arguments)
    at_start = machine()
    world = initialize()
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        # The inputs of annotation: sequences, a dictionary, the loaded teacher, and the search for its nearest rows.
        folder = Path(name)
        config, dictionary = _read_work(args) if args.work else _write_work(args, folder)
        sequences = _write_sequences(_tokens(args, config), folder)
        teacher = load_frozen(find_teacher(config), config, world, with_head=False)
        searcher = Searcher(
            dictionary,
            config.annotation.kappa,
            world.device,
            sequences.frequencies(dictionary.vocab_size),
            int(args.memory_budget * 2**30),
        )
        sides = {
            "forward": _forward(teacher, sequences, args),
            "annotation": _annotation(teacher, sequences, searcher, args, None),
        }
        if args.store:
            stored = plan_stored(config, teacher.folder)
            assert stored is not None, f"annotation.store of {config.workdir} is empty"
            sides["annotation that stores"] = _annotation(
                teacher, sequences, searcher, args, _Storing(config, stored, folder / "shards")
            )
        seconds = take_turns(sides, rounds=args.batches // args.turn)
        teacher.close()
        shutdown()
    tokens = args.turn * args.batch_size * sequences.sequence_length
    rates = {side: Spread.of(tokens / value for value in values) for side, values in seconds.items()}
    rows = [[side, rate.text(",.0f"), ""] for side, rate in rates.items()]
    results: dict[str, Any] = {"tokens_per_s": {side: rate.as_dict() for side, rate in rates.items()}}
    for side in (side for side in sides if side != "forward"):
        ratio = ratios(seconds, "forward", side)
        results[f"{side} / forward"] = ratio.as_dict()
        rows.append([f"{side} / forward, tokens/s", ratio.text(), ">= 0.9 on a GPU at D = 4,096"])
    publish(args, "benchmarks.annotation", ("", "figure", "goal"), rows, results, at_start)


def _read_work(args: argparse.Namespace) -> tuple[Config, SenseDictionary]:
    config = read_config(args.work / "config.yaml", [])
    return config, load_dictionary(config)[0]


def _write_work(args: argparse.Namespace, folder: Path) -> tuple[Config, SenseDictionary]:
    """Writes a random teacher and a random dictionary of the given sizes."""
    heads = max(1, args.hidden_size // 128)
    shape = Shape(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 7 // 2,
        num_heads=heads,
        num_kv_heads=max(1, heads // 4),
        teacher_layers=args.layers,
        student_layers=args.layers,
        trained_layers=0,
        sequence_length=args.length,
    )
    write_teacher(folder / "teacher", shape, default_device())
    config = Config(
        workdir=str(folder),
        teacher={"path": str(folder / "teacher"), "mode": "resident", "offload": "none"},  # type: ignore[arg-type]
        corpus={"packing": "stream", "sequence_length": args.length},  # type: ignore[arg-type]
        annotation={"kappa": args.kappa, "store": (TEACHER_STATES, TRUNK_STATES) * args.store},  # type: ignore[arg-type]
        student={"layers": args.layers // 2, "spacing": "first", "train_layers": 1},  # type: ignore[arg-type]
    )
    file = folder / "senses.safetensors"
    return config, write_dictionary(file, args.vocab_size, args.hidden_size, k=args.k, synonyms=args.synonyms)


def _tokens(args: argparse.Namespace, config: Config) -> np.ndarray:
    """Returns the tokens [S, T] of all batches; the first turn is a warm-up."""
    count = (args.batches + args.turn) * args.batch_size
    if args.work:
        tokens = read_tokens(config)
        return np.concatenate([tokens] * -(-count // len(tokens)))[:count]
    return draw_tokens(count, args.length, args.vocab_size)


def _forward(teacher: FrozenModel, sequences: Sequences, args: argparse.Namespace) -> Callable[[], None]:
    """Returns a function that runs the teacher on the next turn's batches."""
    turns = _turns(len(sequences), args)

    def forward() -> None:
        for block in next(turns):
            batch = sequences.batch(block.start, block.stop)
            teacher.hidden_states(batch.input_ids, batch.position_ids).sum().item()

    return forward


@dataclass(frozen=True)
class _Storing:
    """The columns of the teacher's states that annotation stores, and the folder for its shards."""

    config: Config
    stored: StoredStates
    folder: Path


def _annotation(
    teacher: FrozenModel, sequences: Sequences, searcher: Searcher, args: argparse.Namespace, storing: _Storing | None
) -> Callable[[], None]:
    """Returns a function that annotates the next turn's batches."""
    turns = _turns(len(sequences), args)
    stored = None if storing is None else storing.stored
    trunk = HandOver(teacher.decoder.layers, stored.trunk_depth) if stored and stored.trunk_depth else None
    reader = TextReader(teacher, continuer=None, top_n=0, chunk_size=1, trunk=trunk)

    def annotate() -> None:
        for block in next(turns):
            annotate_batch(sequences.batch(block.start, block.stop), block.start, reader, searcher, None)

    def annotate_and_store() -> None:
        assert storing is not None
        shard_format = shard_format_of(storing.config.annotation, sequences.sequence_length, 0, stored)
        writer = BlockWriter(storing.folder, shard_format)
        with WritingThread() as thread:
            for block in next(turns):
                batch = sequences.batch(block.start, block.stop)
                samples, _ = annotate_batch(batch, block.start, reader, searcher, stored)
                thread.submit(writer.add, samples)
            thread.submit(writer.finish, {})
        shutil.rmtree(storing.folder)  # so that a long measurement needs no more disk than a turn

    return annotate if storing is None else annotate_and_store


def _turns(count: int, args: argparse.Namespace) -> Iterator[list[range]]:
    """Yields the batches of each turn, as ranges of sequences."""
    batches = [range(start, start + args.batch_size) for start in range(0, count, args.batch_size)]
    for start in range(0, len(batches), args.turn):
        yield batches[start : start + args.turn]


def _write_sequences(tokens: np.ndarray, folder: Path) -> Sequences:
    """Writes sequences [S, T] that are one document each, and opens them as annotation does."""
    lengths = torch.full((len(tokens),), tokens.shape[1], dtype=torch.int32)
    starts = torch.zeros(tokens.shape, dtype=torch.uint8)
    starts[:, 0] = 1
    path = folder / "train.safetensors"
    save_file({"input_ids": torch.from_numpy(tokens), "lengths": lengths, "starts": starts}, path)
    return open_sequences(path)


if __name__ == "__main__":
    main(sys.argv[1:])
