"""Runs all stages in order, skipping what is up to date, and prints the comparison, what the models say, the senses of
three words, and where the trained students are.

Stages: lexicon, written (if the teacher writes the text), corpus, teacher (first, if it is a GGUF file), sequences,
student, senses, shards; `train RUN` and `export RUN` for every run; evaluation; tasks, if the config's
`tasks.evaluate` names benchmarks.
"""

import sys

from dskd.cli.program import build_parser, parse, run
from dskd.distributed.world import leave_launcher

EPILOG = """
examples:
  python launcher/pipeline.py --config configs/quickstart.yaml
  python launcher/pipeline.py --config configs/quickstart.yaml workdir=work/mine teacher.path=FOLDER
  python launcher/pipeline.py --config FILE --until teacher      makes the teacher of teacher.path: MODEL.gguf, no more
  python launcher/pipeline.py --config FILE --until student      the stages before the senses

Start it with plain python: it calls DeepSpeed's launcher itself, with pipeline.launcher_args.
"""


def main() -> int:
    parser = build_parser(__doc__, EPILOG)
    parser.add_argument("--until", metavar="STAGE", help="the last stage to run; later stages are left as they are")
    args = parse(parser)
    leave_launcher()
    from dskd.cli.launching import StageFailedError
    from dskd.pipeline import run_pipeline  # imported here so that --help does not wait for DeepSpeed

    try:
        return run(lambda: run_pipeline(args.config, args.overrides, until=args.until))
    except StageFailedError as failure:
        print(f"error: {failure}; its own message is above", file=sys.stderr)
        return failure.exit_code


if __name__ == "__main__":
    sys.exit(main())
