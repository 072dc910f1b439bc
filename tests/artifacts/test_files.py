"""Creating folders and replacing files."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from dskd.artifacts.files import make_folder, replaced_file, write_text
from dskd.errors import UserError


def test_ranks_can_create_one_folder_at_the_same_time(tmp_path):
    folder = tmp_path / "parent" / "made"
    with ThreadPoolExecutor(8) as pool:
        for made in [pool.submit(make_folder, folder) for _ in range(2000)]:
            made.result()
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_created_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    what = r"cannot write there \(\S+/file is a file, not a folder\); "
    for path in ("file", "file/below", "file/below/that"):
        with pytest.raises(UserError, match=f"{path}: {what}set workdir to a folder you may write"):
            make_folder(tmp_path / path)
    with pytest.raises(UserError, match=f"{what}name another one with --to"):
        make_folder(tmp_path / "file", remedy="name another one with --to")


def test_a_link_to_a_missing_folder_is_reported(tmp_path):
    (tmp_path / "work").symlink_to(tmp_path / "unmounted" / "work")
    with pytest.raises(UserError, match=r"work: this is a link to .*unmounted/work, which is not there; make that"):
        make_folder(tmp_path / "work")


def test_a_link_to_a_file_stays_when_the_file_is_replaced(tmp_path):
    (tmp_path / "reports").mkdir()
    (tmp_path / "report.html").symlink_to(tmp_path / "reports" / "mine.html")
    for text in ("first", "second"):
        write_text(tmp_path / "report.html", text)
        assert (tmp_path / "report.html").is_symlink()
        assert (tmp_path / "reports" / "mine.html").read_text() == text
    assert len([*(tmp_path / "reports").iterdir()]) == 1


def test_processes_can_replace_one_file_at_the_same_time(tmp_path):
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
