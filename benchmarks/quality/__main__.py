"""Trains students of one teacher in many ways and compares them: what makes a good one, and whether senses help.

The config's pipeline runs up to the shards, in which the teacher's states are stored; then every training takes
minutes, in plain torch, with the loss of `dskd`. The arms are in arms.py, the measures in measures.py.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dskd.cli.program import parse, run, split_overrides
from dskd.errors import UserError

EPILOG = """
examples:
  python -m benchmarks.quality                                     all of it; the same command resumes
  python -m benchmarks.quality --arms senses divergence            these arms and those that they build on
  python -m benchmarks.quality --looks                             three seeds of every arm, untuned: leads, in about
                                                                   2.5 CPU hours
  python -m benchmarks.quality --arms kd senses --length 8192 16384
                                                                   tuned arms on a quarter and half of the text
  python -m benchmarks.quality --seeds --minutes 30                tuning alone; starts no training after half an hour
  python -m benchmarks.quality --name handbook --config handbook.yaml
                                                                   on a text of your own: a copy of study.yaml with
                                                                   another workdir and corpus: {source: files, train:
                                                                   [handbook/*.txt], sequence_length: 128,
                                                                   validation_share: 0.2}
  … --values-of written                                            there, with the values chosen on the text "written"
  python -m benchmarks.quality --report                            README.md from the results

On a CPU one thread is nearly as fast as two at this size: OMP_NUM_THREADS=1. The same command may run several times at
once, each on a core of its own.
"""
HERE = Path(__file__).parent
REPORT, RESULTS, CONFIG = HERE / "README.md", HERE / "results.jsonl", HERE / "study.yaml"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, default=CONFIG, help="teacher and text; default: study.yaml")
    parser.add_argument("--name", default="written", help="name of the text in the results; default: written")
    parser.add_argument("--arms", nargs="+", default=[], metavar="NAME", help="train only these; default: all")
    parser.add_argument(
        "--seeds", nargs="*", type=int, metavar="SEED", help="of the test or the looks; default: 0 to 4, or 100 to 102"
    )
    parser.add_argument("--looks", action="store_true", help="train arms without tuning, with three seeds: for leads")
    parser.add_argument(
        "--length",
        nargs="+",
        type=int,
        default=(),
        metavar="TOKENS",
        help="train arms with their chosen values on these numbers of tokens, and test them; more than the text has "
        "are several epochs of it",
    )
    parser.add_argument(
        "--values-of",
        default="",
        metavar="NAME",
        help="test arms with the values that were chosen on another text of the results; only arms in --arms without a "
        "value there are tuned on this text",
    )
    parser.add_argument("--pairs", nargs="*", default=[], metavar="FILE", help="pairs of AntSynNET")
    parser.add_argument(
        "--questions",
        nargs="*",
        default=[],
        metavar="BENCHMARK=FOLDER",
        help="arc_easy, arc_challenge, piqa, commonsense_qa, each with the folder of its files as published",
    )
    parser.add_argument(
        "--separation",
        action="store_true",
        help="measure how well states tell the senses of a word apart, on WordNet's examples; a minute to find them",
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FILE.jsonl", help="default: the committed ones"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of training; default: cpu")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no training after this many minutes")
    parser.add_argument("--report", action="store_true", help="train nothing: write README.md from the results")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a key of the config")
    args = parse(parser, "arms", "pairs")

    def action() -> int:
        from benchmarks.quality.results import read_results

        if args.report:
            from benchmarks.quality.report import write_report

            results = read_results(args.results)
            if not results:
                raise UserError(f"--results {args.results}: this file has no results; {REPORT} stays as it is")
            write_report(results, REPORT)
            print(f"wrote {REPORT}")
            return 0
        # Imported late, so that --help does not wait for torch.
        from benchmarks.quality.arms import LOOK_SEEDS, TEST_SEEDS
        from benchmarks.quality.pairs import read_pairs
        from benchmarks.quality.questions import folder_of
        from benchmarks.quality.trainings import Runner, require_arms, require_values
        from dskd.artifacts.lock import release_lock
        from dskd.config.reading import load_config
        from dskd.pipeline import LOCK, run_pipeline

        # Wrong arguments are refused before the pipeline takes its time.
        questions, overrides = split_places(args.questions)
        overrides = [*args.overrides, *overrides]
        config = load_config(args.config, overrides)
        require_arms(args.arms)
        pairs = [Path(file).expanduser() for file in args.pairs]
        read_pairs(pairs)
        for place in questions:
            folder_of(place)
        results = read_results(args.results)
        if args.values_of:
            if args.looks:
                raise UserError("--values-of: looks have no chosen values")
            require_values(results, args.values_of, args.arms)
        run_pipeline(args.config, overrides, until="shards")
        release_lock(config.path(LOCK))  # the pipeline holds it until this process ends
        runner = Runner(config, args.name, args.results, pairs, questions, args.device, separation=args.separation)
        seeds = args.seeds if args.seeds is not None else LOOK_SEEDS if args.looks else TEST_SEEDS
        runner.run(args.arms, seeds, args.minutes * 60, looks=args.looks, lengths=args.length, values_of=args.values_of)
        return 0

    return run(action)


def split_places(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the places of benchmarks after `--questions`, and the overrides of the config that follow them."""
    from dskd.config import Config

    overrides, _ = split_overrides(
        [word for word in words if word.partition("=")[0].partition(".")[0] in Config.model_fields]
    )
    return [word for word in words if word not in overrides], overrides


if __name__ == "__main__":
    raise SystemExit(main())
