"""Annotation against the bare forward pass of its teacher: tokens per second of both, which take turns batch by batch.

The teacher has random weights of the given shape, tokens are as frequent as words are (Zipf), and every fifth token has
synonyms and antonyms, whose senses are random rows. The measured code is what `launcher/annotate.py` runs for a block:

    python -m benchmarks.annotation --hidden-size 1024 --layers 8
    python -m benchmarks.annotation --hidden-size 4096 --layers 32 --vocab-size 128256 --length 1024   # on a GPU
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.flops import Shape
from benchmarks.report import build_parser, machine, parse, publish
from benchmarks.synthetic import draw_tokens, write_dictionary, write_teacher
from dskd.config import Config
from dskd.corpus.sequences import Sequences, open_sequences
from dskd.distributed.rendezvous import initialize
from dskd.models.folder import ModelFolder
from dskd.models.frozen import load_frozen
from dskd.shards.annotate import annotate_batch
from dskd.shards.search import Searcher
from dskd.shards.text_reader import TextReader


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences in one forward pass")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--kappa", type=int, default=5)
    parser.add_argument(
        "--synonyms", type=int, default=8, help="synonyms of each lexical token, which has half as many antonyms"
    )
    parser.add_argument("--memory-budget", type=float, default=4.0, help="annotation.memory_budget, in GB")
    args = parse(parser, arguments)
    at_start = machine()
    world = initialize()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
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
        write_teacher(folder, shape, world.device)
        config = Config(
            workdir=name,
            teacher={"path": name, "offload": "none"},  # type: ignore[arg-type]
            annotation={"kappa": args.kappa, "batch_size": args.batch_size},  # type: ignore[arg-type]
        )
        # The inputs of annotation: sequences, a dictionary, the loaded teacher, and the search for its nearest rows.
        sequences = _write_sequences(args, folder)
        dictionary = write_dictionary(
            folder / "senses.safetensors", args.vocab_size, args.hidden_size, k=args.k, synonyms=args.synonyms
        )
        teacher = load_frozen(ModelFolder(folder, "", ""), config, world, with_head=False)
        reader = TextReader(teacher, continuer=None, top_n=0, chunk_size=1)
        searcher = Searcher(
            dictionary,
            args.kappa,
            world.device,
            sequences.frequencies(args.vocab_size),
            int(args.memory_budget * 2**30),
        )
        seconds = {"forward": 0.0, "annotation": 0.0}
        # Both sides process the same batch in turn: the forward pass alone, and all of annotation.
        for number in range(args.batches + 1):  # the first one is a warm-up
            block = range(number * args.batch_size, (number + 1) * args.batch_size)
            batch = sequences.batch(block.start, block.stop)

            def forward(batch=batch):  # type: ignore[no-untyped-def]
                return teacher.hidden_states(batch.input_ids, batch.position_ids).sum().item()

            def annotation(batch=batch, first=block.start):  # type: ignore[no-untyped-def]
                annotate_batch(batch, first, reader, searcher, None)

            for label, action in (("forward", forward), ("annotation", annotation)):
                started = time.perf_counter()
                action()
                if number:
                    seconds[label] += time.perf_counter() - started
        tokens = args.batches * args.batch_size * args.length
        rates = {label: tokens / spent for label, spent in seconds.items()}
    ratio = rates["annotation"] / rates["forward"]
    rows = [[label, f"{rate:,.0f}"] for label, rate in rates.items()] + [["ratio", f"{ratio:.3f}"]]
    publish(args, "benchmarks.annotation", ("tokens/s", ""), rows, {"tokens_per_s": rates, "ratio": ratio}, at_start)


def _write_sequences(args: argparse.Namespace, folder: Path) -> Sequences:
    from safetensors.torch import save_file

    count = (args.batches + 1) * args.batch_size
    tokens = draw_tokens(count, args.length, args.vocab_size)
    lengths = torch.full((count,), args.length, dtype=torch.int32)
    starts = torch.zeros(count, args.length, dtype=torch.uint8)
    starts[:, 0] = 1
    path = folder / "train.safetensors"
    save_file({"input_ids": torch.from_numpy(tokens), "lengths": lengths, "starts": starts}, path)
    return open_sequences(path)


if __name__ == "__main__":
    main(sys.argv[1:])
