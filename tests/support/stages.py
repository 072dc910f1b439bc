"""The stages before training, called one after the other in this process."""

from dskd.config import Config
from dskd.corpus.build import build_corpus
from dskd.corpus.sequences import build_sequences
from dskd.distributed.world import World
from dskd.lexicon.build import build_lexicon
from dskd.models.files.folder import ModelFolder, find_teacher
from dskd.senses.build import build_senses
from dskd.shards.annotate import annotate
from dskd.students.student import build_student


def build_inputs_of_training(config: Config, world: World) -> None:
    """Builds all that training reads; the teacher is there already."""
    build_inputs_of_ranks(config)
    build_senses(config, world)
    annotate(config, world)
    build_student(config)


def build_inputs_of_ranks(config: Config) -> None:
    """Builds the lexicon, the corpus and its sequences, which the stages that run on ranks read."""
    build_lexicon(config)
    build_corpus(config)
    build_sequences_of(config)


def build_sequences_of(config: Config) -> ModelFolder:
    """Builds the sequences of a corpus with the tokenizer of the config's teacher, which it returns."""
    teacher = find_teacher(config)
    build_sequences(config, teacher.tokenizer, teacher.tokenizer_digest)
    return teacher
