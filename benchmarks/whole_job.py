"""The whole job, one annotation and E epochs of R runs, with stored states against the teacher in every step.

    python -m benchmarks.whole_job --preset smollm2

Four pieces of work take turns, each on the tokens of one optimizer step: annotation, annotation that also stores the
teacher's states, a training step that runs the teacher, and one that reads the states. A job is one annotation and E ·
R steps for each piece of text; making the sense dictionary, which is the same in both, is left out. Each annotated
piece is written as shards with their hashes into a temporary folder, before the next one is read;
`launcher/annotate.py` does both at the same time.
"""

import itertools
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import Spread, machine, parse, publish, ratios, take_turns
from benchmarks.workload import (
    OurTraining,
    build_workload_parser,
    load_teacher,
    read_config,
    read_tokens,
    work_directory,
)
from dskd import shards
from dskd.config import Config
from dskd.corpus.sequences import TokenBatch
from dskd.distributed.rendezvous import initialize, shutdown
from dskd.models.structure.trunk import HandOver
from dskd.senses.dictionary import load_dictionary
from dskd.shards.annotate import annotate_batch
from dskd.shards.search import Searcher
from dskd.shards.storing_states import plan_stored
from dskd.shards.text_reader import TextReader
from dskd.shards.writing import BlockWriter, ShardFormat

_READS = (1, 2, 4, 12)  # E · R
_TRAINING = {"teacher in the step": "teacher.mode=resident", "stored states": "teacher.mode=cached"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_workload_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=6, help="measured turns of each piece of work")
    args = parse(parser, arguments)
    args.states = True
    at_start = machine()
    with work_directory(args) as path, tempfile.TemporaryDirectory(prefix="dskd-benchmark-") as written:
        world = initialize()
        config = read_config(path, args.overrides)
        teacher = load_teacher(config, world)
        trainings = {
            name: OurTraining(read_config(path, args.overrides, key), world, teacher=teacher)
            for name, key in _TRAINING.items()
        }
        work: dict[str, Callable[[], object]] = {name: training.step for name, training in trainings.items()}
        work |= {
            name: _annotation(config, teacher, Path(written, name), stores=stores)
            for name, stores in (("annotation", False), ("annotation that stores", True))
        }
        seconds = take_turns(work, rounds=args.rounds)
        tokens = trainings["stored states"].tokens_per_step
        for training in trainings.values():
            training.close(keep_teacher=True)
        teacher.close()
        shutdown()
    rows = [[name, Spread.of(tokens / value for value in values).text(",.0f"), ""] for name, values in seconds.items()]
    jobs = {}
    for reads in _READS:
        with_states, with_teacher = (
            [one + reads * step for one, step in zip(seconds[annotation], seconds[training], strict=True)]
            for annotation, training in (
                ("annotation that stores", "stored states"),
                ("annotation", "teacher in the step"),
            )
        )
        ratio = ratios({"states": with_states, "teacher": with_teacher}, "teacher", "states")
        jobs[reads] = ratio.as_dict()
        rows.append([f"E · R = {reads}, times as fast", ratio.text(".2f"), ""])
    results = {"seconds": {name: Spread.of(values).as_dict() for name, values in seconds.items()}, "jobs": jobs}
    publish(args, "benchmarks.whole_job", ("", "tokens/s, or ratio", ""), rows, results, at_start)


def _annotation(config: Config, teacher: Any, folder: Path, *, stores: bool) -> Callable[[], None]:
    """Returns a function that annotates the sequences of one step and writes them as a block of shards."""
    dictionary, _ = load_dictionary(config)
    stored = plan_stored(config, teacher.folder) if stores else None
    trunk = HandOver(teacher.decoder.layers, stored.trunk_depth) if stored and stored.trunk_depth else None
    reader = TextReader(teacher, continuer=None, top_n=0, chunk_size=1, trunk=trunk)
    searcher = Searcher(dictionary, config.annotation.kappa, teacher.device)
    shard_format = ShardFormat(
        shards.columns_of(teacher_top_n=0, stored=stored), compression=None if stores else "zstd"
    )
    tokens, size, batch_size = read_tokens(config), config.train.global_batch_size, config.annotation.batch_size
    turns = itertools.count()

    def annotate() -> None:
        turn = next(turns)
        writer = BlockWriter(folder / str(turn), shard_format)
        for first in range(0, size, batch_size):
            start = (turn * size + first) % len(tokens)
            batch = _token_batch(torch.from_numpy(tokens[start : start + min(batch_size, size - first)]).long())
            samples, _ = annotate_batch(batch, start, reader, searcher, stored)
            writer.add(samples)
        writer.finish({})

    return annotate


def _token_batch(input_ids: torch.Tensor) -> TokenBatch:
    """Returns whole sequences, each a document of its own."""
    has_target = torch.ones_like(input_ids, dtype=torch.bool)
    has_target[:, -1] = False
    starts = torch.zeros_like(input_ids, dtype=torch.uint8)
    starts[:, 0] = 1
    return TokenBatch(input_ids, None, has_target, starts, input_ids.numel())


if __name__ == "__main__":
    main(sys.argv[1:])
