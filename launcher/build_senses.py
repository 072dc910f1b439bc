"""Gathers the teacher's states over the training text, clusters them, and writes WORKDIR/senses."""

from dskd.cli.program import run_stage
from dskd.config import Config
from dskd.distributed.world import World

EPILOG = """
examples:
  deepspeed launcher/build_senses.py --config configs/quickstart.yaml
  deepspeed --num_gpus 2 launcher/build_senses.py --config configs/quickstart.yaml senses.k=5

Any number of ranks gives the same dictionary. `dskd lexicon` and launcher/pipeline.py make what it reads. A dictionary
that is up to date is left as it is. If launcher/annotate.py will store states (annotation.store), those of the whole
text are kept for it.
"""


def build(config: Config, world: World, *, force: bool) -> None:
    # Imported here so that --help does not wait for DeepSpeed.
    from dskd.shards.reading import build_senses_and_keep_states

    build_senses_and_keep_states(config, world, force=force)


if __name__ == "__main__":
    run_stage(__doc__, EPILOG, build, help_of_force="gather and build again, even if the dictionary is up to date")
