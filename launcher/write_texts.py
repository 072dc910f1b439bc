"""Lets the teacher write texts that use words in their senses (corpus.source: teacher), and writes WORKDIR/written."""

from dskd.cli.program import run_stage
from dskd.config import Config
from dskd.distributed.world import World

EPILOG = """
examples:
  deepspeed launcher/write_texts.py --config FILE
  deepspeed --num_gpus 2 launcher/write_texts.py --config FILE corpus.max_senses=5000
  python launcher/write_texts.py --config FILE corpus.server=http://localhost:8000     one process: a server writes

Any number of ranks writes the same texts. Texts that are up to date are left as they are. launcher/pipeline.py runs
this stage and the next, which makes the corpus of the texts.
"""


def build(config: Config, world: World, *, force: bool) -> None:
    from dskd.corpus.written.write import write_texts  # imported here so that --help does not wait for torch

    write_texts(config, world, force=force)


if __name__ == "__main__":
    run_stage(__doc__, EPILOG, build, help_of_force="write again, even what is up to date")
