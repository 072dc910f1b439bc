"""Measures how long the study's trainings take here, and how its arms differ: a look at some arms with two seeds.

    python -m benchmarks.study --folder FOLDER            # on the GPU if there is one
    python -m benchmarks.study --folder FOLDER --toy      # with tiny sizes

The folder is the study's work directory: it gets the text that the teacher writes, its states, and the results, and the
same command continues there. `python -m benchmarks.quality` has all of the study.
"""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.__main__ import CONFIG
from benchmarks.quality.arms import LOOK_SEEDS
from benchmarks.quality.results import Result, read_results, results_by_arm
from benchmarks.quality.trainings import Runner, require_arms
from benchmarks.report import build_parser, default_device, machine, parse, publish
from dskd.artifacts.lock import release_lock
from dskd.config.reading import load_config
from dskd.errors import UserError
from dskd.pipeline import LOCK, run_pipeline

_ARMS = ("kd", "senses", "divergence", "divergence random", "rarity")
_SEEDS = LOOK_SEEDS[:2]
_SIZES = ("corpus.max_sequences=512", "corpus.max_senses=2600")  # 65,536 tokens
_MEASURES = ("kl", "agreement", "perplexity", "lexical_perplexity")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="the work directory")
    parser.add_argument("--arms", nargs="+", default=_ARMS, metavar="NAME", help=f"default: {', '.join(_ARMS)}")
    parser.add_argument("--toy", action="store_true", help="try it with tiny sizes")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a key of study.yaml")
    args = parse(parser, arguments)
    require_arms(args.arms)
    device, at_start, started = default_device().type, machine(), time.perf_counter()
    file = CONFIG.with_name("toy.yaml") if args.toy else CONFIG
    overrides = [f"workdir={args.folder}", *(() if args.toy else _SIZES), *args.overrides]
    run_pipeline(file, overrides, until="shards")
    config = load_config(file, overrides)
    release_lock(config.path(LOCK))  # the pipeline holds it until this process ends
    prepared = time.perf_counter() - started
    path = args.folder / "results.jsonl"
    name = "gpu" if device == "cuda" else "cpu"
    runner = Runner(config, name, path, device=device)
    runner.run(args.arms, _SEEDS, float("inf"), looks=True)
    results = [
        result
        for result in results_by_arm(read_results(path), name, args.arms)
        if result.stage == "look" and result.seed in _SEEDS and result.arm in args.arms
    ]
    rows = [_row(arm, [result for result in results if result.arm == arm]) for arm in args.arms]
    header = ("arm", "seeds", "steps", "tokens", "seconds", *(name.replace("_", " ") for name in _MEASURES))
    raw = {"prepared_s": prepared, "results": [json.loads(result.to_json()) for result in results]}
    publish(args, "benchmarks.study", header, rows, raw, at_start)


def _row(name: str, results: Sequence[Result]) -> list[str]:
    """Returns the means over seeds."""
    first = results[0]
    seconds = statistics.mean(result.cpu_seconds for result in results)
    means = (statistics.mean(result.measures[measure] for result in results) for measure in _MEASURES)
    counts = (len(results), first.steps, first.tokens)
    return [name, *(f"{count:,}" for count in counts), f"{seconds:.1f}", *(f"{mean:,.4f}" for mean in means)]


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        raise SystemExit(str(error)) from error
