"""Making folders."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from dskd.errors import UserError
from dskd.folders import make_folder, replaced_file


def test_ranks_may_make_one_folder_at_once(tmp_path):
    folder = tmp_path / "parent" / "made"
    with ThreadPoolExecutor(8) as pool:
        for made in [pool.submit(make_folder, folder) for _ in range(2000)]:
            made.result()
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_the_users_mistake(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/below: cannot write there \(Not a directory\); set workdir"):
        make_folder(tmp_path / "file" / "below")


def test_processes_may_replace_one_file_at_once(tmp_path):
    path = tmp_path / "table.txt"
    with replaced_file(path) as first, replaced_file(path) as second:
        second.write_text("second")
        first.write_text("first, and longer")
    assert path.read_text() == "first, and longer"
    with pytest.raises(KeyError), replaced_file(path) as broken:
        broken.write_text("half")
        raise KeyError
    assert path.read_text() == "first, and longer"
    assert list(tmp_path.iterdir()) == [path]
