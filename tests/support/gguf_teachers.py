"""Teachers made from GGUF files, and the check that one is refused."""

import pytest
import torch
from config_files import write_config

from dskd.config import Config
from dskd.errors import UserError
from dskd.models.gguf.teacher import build_teacher


def gguf_config(path, **teacher):
    """Returns a config whose teacher is the GGUF file `path`, with `work` next to the file as the work directory."""
    return Config(
        workdir=str(path.parent / "work"),
        teacher={"path": str(path), **teacher},
        corpus={"source": "files", "train": ("text.txt",), "sequence_length": 64},
    )


def gguf_config_file(path):
    """Writes that config next to the GGUF file, and returns its path."""
    file = path.parent / "mine.yaml"
    values = gguf_config(path).as_dict() | {
        "student": {"layers": 2, "train_layers": 1},
        "train": {"global_batch_size": 4},
    }
    values["corpus"]["train"] = [str(path.parent / "text.txt")]
    write_config(file, values)
    return file


def build_gguf(path, **teacher):
    """Makes the teacher of a GGUF file, and returns the config and the teacher's folder."""
    config = gguf_config(path, **teacher)
    build_teacher(config)
    return config, config.path("teacher")


def assert_refused(path, *says, **teacher):
    """Checks that the teacher of a GGUF file is refused with a message that has these texts; returns the message."""
    config = gguf_config(path, **teacher)
    with pytest.raises(UserError) as error:
        build_teacher(config)
    for text in says:
        assert text in str(error.value), str(error.value)
    assert not config.path("teacher").exists()
    return str(error.value)


@torch.no_grad()
def logits_of(model):
    """Returns the logits [1, 40, V] of 40 different tokens."""
    return model(input_ids=torch.arange(40)[None] * 7 % model.config.vocab_size).logits
