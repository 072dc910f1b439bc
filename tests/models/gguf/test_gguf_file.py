"""Tests that a file that is no whole GGUF model is refused."""

import pytest
from gguf_files import write_gguf
from gguf_teachers import assert_refused


@pytest.mark.parametrize("share", [0.001, 0.01, 0.5, 0.999999])
def test_a_file_that_is_cut_short_is_refused_before_anything_is_loaded(tmp_path, share):
    path = write_gguf(tmp_path / "model.gguf").path
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert_refused(
        path, "the file is cut short", "download it again" if share < 0.1 else f"it has {int(len(content) * share):,}"
    )


def test_what_is_no_gguf_model_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    assert_refused(path, "there is no such file")
    path.mkdir()
    assert_refused(path, "this is a folder")
    path.rmdir()
    path.write_bytes(b"PK\x03\x04 some zip file")
    assert_refused(path, "this is not a GGUF file: it begins with b'PK\\x03\\x04'")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\n")
    assert_refused(path, "only a pointer", "git lfs pull")
    path.write_bytes(b"GGUF\x01\x00\x00\x00")
    assert_refused(path, "format version 1")
    write_gguf(path, keys={"split.count": 3, "split.no": 0})
    assert_refused(path, "part 1 of a model in 3 files", "llama-gguf-split --merge")
