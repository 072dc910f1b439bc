"""Finds the sense rows of every position with the teacher, and writes WORKDIR/shards/{train,validation}."""

from dskd.cli.program import run_stage
from dskd.config import Config
from dskd.distributed.world import World

EPILOG = """
examples:
  deepspeed launcher/annotate.py --config configs/quickstart.yaml
  deepspeed --num_gpus 2 launcher/annotate.py --config configs/quickstart.yaml --force

Any number of ranks writes the same shards. A split that is up to date is skipped.
"""


def build(config: Config, world: World, *, force: bool) -> None:
    from dskd.shards.annotate import annotate  # imported here so that --help does not wait for DeepSpeed

    annotate(config, world, force=force)


if __name__ == "__main__":
    run_stage(__doc__, EPILOG, build, help_of_force="annotate again, even what is up to date")
