"""The places that dskd searches for WordNet, in order. The dictionary files are those of this machine's WordNet."""

import shutil

import pytest
from tiny_wordnet import SYNSETS, write_wordnet

from dskd.errors import UserError
from dskd.lexicon import wordnet
from dskd.lexicon.wordnet import DICTIONARY_FILES, _private_folder, open_wordnet


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Only the dictionary files, as Debian's package has them: neither lexnames nor index.sense."""
    folder = tmp_path_factory.mktemp("wordnet") / "dict"
    write_wordnet(folder, [*SYNSETS, ("run", "v", ["run"], [])])
    assert {file.name for file in folder.iterdir()} >= set(DICTIONARY_FILES)
    return folder


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A machine without WordNet in any of the places."""
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
    assert found.reader.synset("car.n.01").lemma_names() == ["car", "auto", "motor_car"]
    assert found.reader.synset("run.v.01").lexname() == "verb.motion"
    assert not (bare / "lexnames").exists()  # nothing is written into the user's folder


def test_a_config_path_that_is_not_a_dictionary_is_refused_with_the_missing_files(nowhere, tmp_path):
    with pytest.raises(UserError, match=r"wordnet.path: .* lacks data.noun"):
        open_wordnet(str(tmp_path))


def test_debians_files_are_the_last_resort_and_their_copy_is_used_again(nowhere, bare, monkeypatch):
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


def test_several_processes_may_complete_one_copy_at_once(tmp_path):
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


def test_an_incomplete_folder_is_refused_with_the_missing_files_until_repaired(nowhere, bare, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(bare, folder)
    (folder / "noun.exc").rename(tmp_path / "noun.exc")
    with pytest.raises(UserError, match=rf"wordnet\.path: {folder} is not a complete .* lacks noun\.exc"):
        open_wordnet(str(folder))
    (tmp_path / "noun.exc").rename(folder / "noun.exc")
    data = (folder / "index.adv").read_bytes()
    (folder / "index.adv").write_bytes(b"junk junk junk\n" * 9)
    with pytest.raises(UserError, match=rf"^{folder}: nltk cannot read this WordNet .* repair the files there"):
        open_wordnet(str(folder))
    (folder / "index.adv").write_bytes(data)
    assert open_wordnet(str(folder)).origin == folder
    (folder / "data.noun").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 15300280\n")
    open_wordnet.cache_clear()
    with pytest.raises(UserError, match=rf"{folder}/data\.noun: this is only a pointer of git"):
        open_wordnet(str(folder))


def test_an_incomplete_wordnet_in_nltks_data_is_refused_and_not_skipped(nowhere, bare, monkeypatch):
    import nltk

    folder = nowhere / "nltk_data" / "corpora" / "wordnet"
    shutil.copytree(bare, folder)
    (folder / "verb.exc").unlink()
    nltk.data.path.append(str(nowhere / "nltk_data"))
    monkeypatch.setattr(wordnet, "DICTIONARY_FOLDERS", (bare,))
    with pytest.raises(UserError, match=rf"{folder}: this WordNet is incomplete: it lacks verb\.exc, lexnames"):
        open_wordnet()


def test_for_other_languages_nltks_wordnet_comes_before_debians(nowhere, bare, monkeypatch):
    import nltk

    monkeypatch.setattr(wordnet, "DICTIONARY_FOLDERS", (bare,))
    assert open_wordnet().origin == bare
    princetons = nowhere / "princetons" / "wordnet"
    shutil.copytree(bare, princetons)
    (princetons / "lexnames").write_text(wordnet._lexnames())
    tried = []

    def download(name, download_dir, **options):
        tried.append(name)
        shutil.make_archive(f"{download_dir}/corpora/{name}", "zip", princetons.parent, name)

    monkeypatch.setattr(nltk, "download", download)
    open_wordnet.cache_clear()
    assert open_wordnet().origin == bare
    assert not tried  # for English, the copy that exists is enough
    found = open_wordnet(other_languages=True).folder
    assert tried == ["wordnet"]
    assert found.name.startswith("wordnet-zip-")
    open_wordnet.cache_clear()
    assert open_wordnet(other_languages=True).folder == open_wordnet().folder == found
    assert tried == ["wordnet"]


@pytest.mark.parametrize("content", [b"", b"PK no zip", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_damaged_zip_is_named(nowhere, content):
    import nltk

    archive = nowhere / "nltk_data" / "corpora" / "wordnet.zip"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(content)
    nltk.data.path.append(str(nowhere / "nltk_data"))
    with pytest.raises(UserError, match=rf"{archive}: this zip file has no readable WordNet"):
        open_wordnet()
