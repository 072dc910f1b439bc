"""Tests that a model's folder is found or refused with everything it lacks, and that its digest follows its content."""

import pytest
from tiny_models import save_model

from dskd.config import Config
from dskd.errors import UserError
from dskd.models.files.folder import find_teacher, find_tokenizer_folder


def _teacher(tmp_path, **options):
    return Config(workdir=str(tmp_path / "work"), teacher={"path": str(tmp_path / "teacher"), **options})


def test_a_folder_without_a_model_is_refused_with_everything_it_lacks(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError) as error:
        find_teacher(_teacher(tmp_path))
    message = str(error.value)
    assert "there is no config.json" in message
    assert "no weights" in message
    assert "there is pytorch_model.bin: convert it" in message
    assert "no tokenizer" in message


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./missing", "not-a-hub-name"])
def test_a_folder_that_does_not_exist_is_refused_without_asking_the_hub(tmp_path, path):
    with pytest.raises(UserError, match=r"teacher\.path: there is no folder"):
        find_teacher(Config(workdir=str(tmp_path), teacher={"path": path}))


def test_cut_weights_are_refused(tmp_path):
    save_model(tmp_path / "teacher")
    file = tmp_path / "teacher" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        find_teacher(_teacher(tmp_path))


def test_the_digest_of_a_teacher_follows_its_content(tmp_path):
    save_model(tmp_path / "teacher", seed=0)
    (tmp_path / "work").mkdir()
    first, again = find_teacher(_teacher(tmp_path)), find_teacher(_teacher(tmp_path))
    save_model(tmp_path / "teacher", seed=1)
    other = find_teacher(_teacher(tmp_path))
    assert first.digest == again.digest != other.digest
    assert first.tokenizer_digest == other.tokenizer_digest


def test_a_folder_without_a_tokenizer_is_named_with_its_key(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(
        UserError, match=rf"^teacher\.tokenizer: {tmp_path}: there is no tokenizer: neither tokenizer.jso"
    ):
        find_tokenizer_folder(str(tmp_path))
