"""Finds the sense rows of every position with the teacher, and writes WORKDIR/shards/{train,validation}."""

from dskd.cli.program import build_parser, parse, run_on_ranks
from dskd.config import Config
from dskd.distributed.world import World

EPILOG = """
examples:
  deepspeed launcher/annotate.py --config configs/quickstart.yaml
  deepspeed --num_gpus 2 launcher/annotate.py --config configs/quickstart.yaml --force

Any number of ranks writes the same shards. A split that is up to date is skipped.
"""


def main() -> None:
    parser = build_parser(__doc__, EPILOG)
    parser.add_argument("--force", action="store_true", help="annotate again, even what is up to date")
    args = parse(parser)

    def work(config: Config, world: World) -> None:
        from dskd.shards.annotate import annotate  # imported here so that --help does not wait for DeepSpeed

        annotate(config, world, force=args.force)

    run_on_ranks(args, work)


if __name__ == "__main__":
    main()
