"""Gathers the teacher's states over the training text, clusters them, and writes WORKDIR/senses."""

from dskd.cli.program import build_parser, parse, run_on_ranks
from dskd.config import Config
from dskd.distributed.world import World

EPILOG = """
examples:
  deepspeed launcher/build_senses.py --config configs/quickstart.yaml
  deepspeed --num_gpus 2 launcher/build_senses.py --config configs/quickstart.yaml senses.k=5

Any number of ranks gives the same dictionary. `dskd lexicon` and launcher/pipeline.py make what it reads. A dictionary
that is up to date is left as it is.
"""


def main() -> None:
    parser = build_parser(__doc__, EPILOG)
    parser.add_argument(
        "--force", action="store_true", help="gather and build again, even if the dictionary is up to date"
    )
    args = parse(parser)

    def work(config: Config, world: World) -> None:
        from dskd.senses.build import build_senses  # imported here so that --help does not wait for DeepSpeed

        build_senses(config, world, force=args.force)

    run_on_ranks(args, work)


if __name__ == "__main__":
    main()
