"""Do senses help? Tunes and trains every arm of the study, five seeds each, and saves one line of results per training.

An arm is a way to train: plain fine-tuning, KD, KD + hidden-state distance, KD + own senses, + synonyms, DSKD, and
arms that add to the tuned hidden-state distance. Each arm tries four values of its weight, which are compared on one
part of the held-out text. The best value is trained on five other seeds and measured once, on the other part. Then one
factor at a time is changed (teacher, kappa, steps, text, ...).
"""

import argparse
from pathlib import Path

from benchmarks.quality import work
from dskd.cli.program import run
from dskd.errors import UserError

EPILOG = """
examples:
  python -m benchmarks.quality --work work/quality                        all of it; the same command resumes
  python -m benchmarks.quality --work work/quality --minutes 30           starts no training after half an hour
  python -m benchmarks.quality --work work/quality --stages tune test     without changing single factors
  python -m benchmarks.quality --report                                   README.md and docs/results.md from the results
  python -m benchmarks.quality --work work/quality --stages               only what all arms share, up to the shards

On a CPU one thread is as fast as two at this size: OMP_NUM_THREADS=1. The same command may run several times at once,
each on a core of its own. The students of the test stay in WORK/VARIANT/export.
"""
REPORT = Path(__file__).with_name("README.md")
SUMMARY = Path(__file__).parent.parent.parent / "docs" / "results.md"
STAGES = ("tune", "test", "factor")
RESULTS = Path(__file__).with_name("results.jsonl")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="folder for the work directories")
    parser.add_argument("--report", action="store_true", help="train nothing: write README.md from the results")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FILE.jsonl", help="default: the committed ones"
    )
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=STAGES, help="the stages to run; default: all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no training after this many minutes")
    args = parser.parse_args()
    if (args.work is None) != args.report:
        parser.error("use --work FOLDER to train, or --report to write the report of the results")

    def action() -> int:
        from benchmarks.quality.report import write_report, write_summary
        from benchmarks.quality.results import read_results

        if args.report:
            results = read_results(args.results)
            if not results:
                raise UserError(f"--results {args.results}: this file has no results; {REPORT} stays as it is")
            write_report(results, REPORT)
            write_summary(results, SUMMARY)
            print(f"wrote {REPORT} and the table in {SUMMARY}")
            return 0
        from benchmarks.quality.trainings import Runner  # imported late, so that --help does not wait for DeepSpeed
        from dskd.distributed.rendezvous import initialize

        work.prepare(args.work)
        runner = Runner(args.work, args.results, initialize())
        runner.run(tuple(args.stages), args.minutes * 60)
        return 0

    return run(action)


if __name__ == "__main__":
    raise SystemExit(main())
