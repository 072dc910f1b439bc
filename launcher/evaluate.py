"""Measures teacher, cut student and exported students on the held-out shards, and writes WORKDIR/evaluation/NAME."""

from dskd.config import Config
from dskd.distributed import World
from dskd.program import build_parser, run_on_ranks

EPILOG = """
examples:
  deepspeed launcher/evaluate.py --config configs/quickstart.yaml
  deepspeed --num_gpus 2 launcher/evaluate.py --config configs/quickstart.yaml --force

`dskd compare` prints the measures side by side. A model whose measures are up to date is skipped.
"""


def main() -> None:
    parser = build_parser(__doc__, EPILOG)
    parser.add_argument("--force", action="store_true", help="evaluate also what is up to date")
    given = parser.parse_intermixed_args()

    def work(config: Config, world: World) -> None:
        from dskd.evaluate import evaluate  # after the arguments: --help should not wait for DeepSpeed

        evaluate(config, world, force=given.force)

    run_on_ranks(given, work)


if __name__ == "__main__":
    main()
