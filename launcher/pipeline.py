"""Runs all stages in order, skipping what is up to date, and prints the comparison.

Stages: lexicon, corpus, teacher, sequences, senses, shards, student; training and export of every run; evaluation.
"""

import sys

from dskd.program import build_parser, run

EPILOG = """
examples:
  python launcher/pipeline.py --config configs/quickstart.yaml
  python launcher/pipeline.py --config configs/quickstart.yaml workdir=work/mine teacher.train_from_scratch=null \\
      teacher.path=FOLDER
  python launcher/pipeline.py --config FILE --until student      all that training reads; it may then run elsewhere

Start it with plain python: it calls DeepSpeed's launcher itself, with pipeline.launcher_args.
"""


def main() -> int:
    parser = build_parser(__doc__, EPILOG)
    parser.add_argument(
        "--until", metavar="STAGE", help="run the stages up to this one; student is the last before training"
    )
    given = parser.parse_intermixed_args()
    from dskd.pipeline import StageFailedError, exit_code_of, run_pipeline  # --help should not wait for DeepSpeed

    try:
        return run(lambda: run_pipeline(given.config, given.overrides, until=given.until))
    except StageFailedError as failure:
        print(f"error: {failure}; its own message is above", file=sys.stderr)
        return exit_code_of(failure)


if __name__ == "__main__":
    sys.exit(main())
