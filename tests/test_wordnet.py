"""Where WordNet is looked for, and in which order. The dictionary files are those of the WordNet that was found."""

import shutil

import pytest

from dskd import wordnet
from dskd.errors import UserError
from dskd.wordnet import DICTIONARY_FILES, _private_folder, open_wordnet


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Only the dictionary files, as Debian's package has them: neither lexnames nor index.sense."""
    folder = tmp_path_factory.mktemp("dict")
    for file in open_wordnet().folder.iterdir():
        if file.name not in ("lexnames", "index.sense", "LICENSE"):
            shutil.copyfile(file, folder / file.name)
    assert {file.name for file in folder.iterdir()} >= set(DICTIONARY_FILES)
    return folder


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A machine on which WordNet is in none of the places."""
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(wordnet, "DICTIONARY_FOLDERS", (tmp_path / "none",))
    monkeypatch.setattr(nltk, "download", lambda *args, **options: False)
    open_wordnet.cache_clear()
    yield tmp_path
    open_wordnet.cache_clear()


def test_without_wordnet_the_error_names_three_ways_out(nowhere):
    with pytest.raises(UserError) as error:
        open_wordnet()
    for way in ("nltk.downloader wordnet", "apt-get install wordnet-base", "wordnet.path=FOLDER"):
        assert way in str(error.value)


def test_bare_dictionary_files_named_by_the_config_are_completed(nowhere, bare):
    found = open_wordnet(str(bare))
    assert found.reader.synset("happy.a.01").lemma_names() == ["happy"]
    assert found.reader.synset("run.v.01").lexname() == "verb.motion"
    assert not (bare / "lexnames").exists()  # a folder of the user's is not written to


def test_a_config_path_that_is_no_dictionary_says_what_it_lacks(nowhere, tmp_path):
    with pytest.raises(UserError, match=r"wordnet.path: .* lacks data.noun"):
        open_wordnet(str(tmp_path))


def test_debians_files_are_the_last_resort_and_found_at_once_the_next_time(nowhere, bare, monkeypatch):
    monkeypatch.setattr(wordnet, "DICTIONARY_FOLDERS", (bare,))
    first = open_wordnet()
    assert first.reader.synset("entity.n.01")
    open_wordnet.cache_clear()
    monkeypatch.setattr(wordnet, "DICTIONARY_FOLDERS", ())
    assert open_wordnet().folder == first.folder
    assert open_wordnet().digest == first.digest


def test_nltks_own_data_comes_before_a_download_and_may_be_zipped(nowhere, bare, monkeypatch):
    import nltk

    data = nowhere / "nltk_data"
    (data / "corpora").mkdir(parents=True)
    shutil.copytree(bare, data / "build" / "wordnet")
    (data / "build" / "wordnet" / "lexnames").write_text(wordnet._lexnames())
    shutil.make_archive(str(data / "corpora" / "wordnet"), "zip", data / "build", "wordnet")
    nltk.data.path.append(str(data))
    monkeypatch.setattr(nltk, "download", lambda *a, **o: pytest.fail("a download was tried"))
    assert open_wordnet().reader.synset("entity.n.01")


def test_processes_may_complete_it_at_once(tmp_path):
    target = tmp_path / "corpora" / "wordnet"
    with _private_folder(target) as first:
        (first / "lexnames").touch()
        with _private_folder(target) as second:
            (second / "lexnames").touch()
    assert list(target.parent.iterdir()) == [target]
    assert (target / "lexnames").is_file()


def test_there_are_forty_five_lexicographer_files():
    lines = wordnet._lexnames().splitlines()
    assert len(lines) == 45
    assert (lines[3], lines[5], lines[38]) == ("03\tnoun.Tops\t1", "05\tnoun.animal\t1", "38\tverb.motion\t2")
