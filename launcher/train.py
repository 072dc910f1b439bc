"""Trains a student from annotated shards, and writes WORKDIR/checkpoints/RUN."""

from dskd.cli.program import build_parser, parse, run_on_ranks
from dskd.config import Config
from dskd.distributed.world import World
from dskd.training.schedule import divide_batch

EPILOG = """
examples:
  deepspeed launcher/train.py --config configs/quickstart.yaml                 all GPUs of this machine, or one CPU rank
  deepspeed --num_gpus 2 launcher/train.py --config configs/quickstart.yaml    two ranks, with or without GPUs
  python launcher/train.py --config configs/quickstart.yaml run=kd             one rank, the run called kd
  deepspeed launcher/train.py --config FILE --resume                           resume from the last checkpoint

launcher/pipeline.py makes everything that training reads.
"""


def main() -> None:
    parser = build_parser(__doc__, EPILOG)
    parser.add_argument(
        "--resume", action="store_true", help="continue from the run's last checkpoint, if there is one"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="train from scratch; the first new checkpoint replaces the run's old ones",
    )
    args = parse(parser)
    if args.resume and args.overwrite:
        parser.error("--resume continues from the checkpoints that --overwrite removes; give only one of them")

    def work(config: Config, world: World) -> None:
        from dskd.training.train import train  # imported here so that --help does not wait for DeepSpeed

        train(config, world, resume=args.resume, overwrite=args.overwrite)

    run_on_ranks(args, work, check=lambda config, ranks: divide_batch(config.train, ranks))


if __name__ == "__main__":
    main()
