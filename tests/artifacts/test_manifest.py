import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from repository import REPOSITORY
from safetensors.torch import save_file

from dskd.artifacts import building as building_module
from dskd.artifacts import manifest as manifests
from dskd.artifacts.building import build_artifact
from dskd.artifacts.manifest import Recipe, is_current, read_file, read_manifest, require_same, verify_files
from dskd.errors import OutageError, UserError

HOLDER = (
    "import sys; from pathlib import Path; "
    "from dskd.artifacts.building import Building; from dskd.artifacts.manifest import Recipe; "
    "Building(Path(sys.argv[1]), Recipe('senses')).clear(); print('clear', flush=True); sys.stdin.read()"
)
RECIPE = Recipe("senses", {"corpus": "abc"}, {"k": (1, 2)}, teacher="t", tokenizer="u")


def _build(path, content=b"data"):
    with build_artifact(path, RECIPE) as building:
        (building.folder / "inner").mkdir()
        (building.folder / "inner" / "file").write_bytes(content)
        building.facts["n"] = 3


def _read(path):
    return read_manifest(path, "senses", made_by="make senses")


def test_an_artifact_records_what_it_was_made_from(tmp_path):
    _build(tmp_path / "a")
    manifest = _read(tmp_path / "a")
    assert manifest.inputs == {"corpus": "abc"}
    assert manifest.config == {"k": [1, 2]}
    assert (manifest.teacher, manifest.tokenizer, manifest.facts) == ("t", "u", {"n": 3})
    assert list(manifest.files) == ["inner/file"]
    assert manifest.packages["torch"]


def test_an_artifact_is_current_only_for_its_own_recipe(tmp_path):
    _build(tmp_path / "a")
    assert is_current(tmp_path / "a", RECIPE)
    assert not is_current(tmp_path / "a", Recipe("senses", {"corpus": "abd"}, {"k": (1, 2)}, "t", "u"))
    assert not is_current(tmp_path / "a", Recipe("senses", {"corpus": "abc"}, {"k": (1, 3)}, "t", "u"))
    assert not is_current(tmp_path / "a", Recipe("senses", {"corpus": "abc"}, {"k": (1, 2)}, "v", "u"))
    assert not is_current(tmp_path / "b", RECIPE)
    (tmp_path / "a" / "inner" / "file").unlink()
    assert not is_current(tmp_path / "a", RECIPE)


def test_equal_content_has_equal_digests(tmp_path):
    for name, content in (("a", b"data"), ("b", b"data"), ("c", b"dath")):
        _build(tmp_path / name, content)
    assert _read(tmp_path / "a").digest == _read(tmp_path / "b").digest != _read(tmp_path / "c").digest


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_decides_who_can_read_tensors(tmp_path, umask, mode):
    """safetensors lets only the owner read what it writes."""
    before = os.umask(umask)
    try:
        with build_artifact(tmp_path / "a", RECIPE) as building:
            save_file({"x": torch.zeros(2)}, building.folder / "x.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "x.safetensors").stat().st_mode & 0o777 == mode


def test_a_build_that_fails_publishes_nothing_and_keeps_the_old(tmp_path):
    _build(tmp_path / "a")
    with pytest.raises(RuntimeError, match="boom"), build_artifact(tmp_path / "a", RECIPE) as building:
        (building.folder / "file").write_bytes(b"half")
        raise RuntimeError("boom")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    assert _read(tmp_path / "a").facts == {"n": 3}


def test_a_link_to_a_larger_disk_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    place = tmp_path / "work" / "senses"
    place.parent.mkdir()
    place.symlink_to(tmp_path / "disk" / "of_work")
    for content in (b"first", b"second", b"third"):
        with build_artifact(place, RECIPE) as building:
            assert building.folder.parent == tmp_path / "disk"  # renaming stays within that file system
            (building.folder / "file").write_bytes(content)
        assert place.is_symlink()
        assert (tmp_path / "disk" / "of_work" / "file").read_bytes() == content
        assert is_current(place, RECIPE)
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["of_work"]
    assert [path.name for path in place.parent.iterdir()] == ["senses"]


def test_leftovers_in_a_linked_folder_are_removed(tmp_path):
    (tmp_path / "disk" / ".real.partial").mkdir(parents=True)
    (tmp_path / "disk" / ".real.partial" / "leftover").write_bytes(b"x")
    (tmp_path / "a").symlink_to(tmp_path / "disk" / "real")
    building_module.remove_partial(tmp_path / "a")
    assert not [*(tmp_path / "disk").iterdir()]
    # The temporary folder itself is a link.
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "leftover").write_bytes(b"x")
    (tmp_path / ".b.partial").symlink_to(tmp_path / "elsewhere")
    _build(tmp_path / "b")
    assert list(_read(tmp_path / "b").files) == ["inner/file"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("not mounted/senses", r"a: this is a link to .*senses, which is not there, nor is .*not mounted; mount that"),
        ("file", r"a: this is a link to .*file, which is not a folder; remove it"),
        ("/proc", r"a: this is a link to /proc, which is a mount point, so it cannot be replaced"),
    ],
)
def test_a_path_that_cannot_be_replaced_is_refused_before_the_work(tmp_path, target, message):
    (tmp_path / "file").touch()
    (tmp_path / "a").symlink_to(tmp_path / target)
    with pytest.raises(UserError, match=message), build_artifact(tmp_path / "a", RECIPE):
        raise AssertionError("the work has begun")
    assert not (tmp_path / "not mounted").exists()


def test_leftovers_of_a_killed_build_do_not_enter_the_next(tmp_path):
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.partial" / "leftover").write_bytes(b"x")
    _build(tmp_path / "a")
    assert list(_read(tmp_path / "a").files) == ["inner/file"]


def test_damaged_files_are_reported(tmp_path):
    _build(tmp_path / "a")
    file = tmp_path / "a" / "inner" / "file"
    file.write_bytes(b"dat")
    with pytest.raises(UserError, match=r"inner/file: the manifest says 4 bytes, but it has 3 bytes"):
        _read(tmp_path / "a")
    file.write_bytes(b"dota")
    manifest = _read(tmp_path / "a")
    with pytest.raises(UserError, match=r"inner/file: the content is not what the manifest says"):
        verify_files(tmp_path / "a", manifest, made_by="make senses")
    file.unlink()
    with pytest.raises(UserError, match="it is missing"):
        _read(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "shards"}, "expected an artifact of kind 'senses', found 'shards'"),
        ({"schema_version": 99}, r"this artifact \('senses'\) has format 99, this version of dskd reads 1"),
        ({"kind": None, "extra": 1}, "this is not a manifest"),
    ],
)
def test_other_artifacts_are_refused(tmp_path, change, message):
    _build(tmp_path / "a")
    file = tmp_path / "a" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        _read(tmp_path / "a")


def test_a_missing_artifact_is_reported_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match="there is no sense dictionary here; make it with `make senses`"):
        _read(tmp_path / "a")


def test_inputs_that_do_not_fit_are_reported_with_both_sides():
    with pytest.raises(UserError, match=r"a and b: made with different teachers \(one… and two…\); make it again"):
        require_same("teachers", expected="one", actual="two", between="a and b", remedy="make it again")


def test_two_processes_never_make_the_same_artifact(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(building_module, "LOCK_PATIENCE_S", 0.1)
    _build(tmp_path / "a")
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "a")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY)
    assert holder.stdout.readline() == b"clear\n"
    says = rf"another process \(pid {holder.pid} on .*\) makes .*a; wait"
    with pytest.raises(OutageError, match=says):
        _build(tmp_path / "a", b"other")
    assert len(re.findall(says, capsys.readouterr().err)) == 1
    holder.kill()
    holder.wait(10)
    _build(tmp_path / "a", b"other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]  # no lock, no partial folder


def test_a_reader_gets_the_new_artifact_during_a_replacement(tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "_LOOK_AGAIN_S", 0)
    load = manifests._load_manifest
    contents = [b"longer", b"still longer"]

    def load_then_replace(path):
        manifest = load(path)
        if contents:
            _build(path, contents.pop(0))
        return manifest

    for look in (_read, lambda path: is_current(path, RECIPE)):
        _build(tmp_path / "a")
        contents[:] = [b"longer", b"still longer"]
        with monkeypatch.context() as patch:
            patch.setattr(manifests, "_load_manifest", load_then_replace)
            found = look(tmp_path / "a")
        assert found is True or found.files == _read(tmp_path / "a").files
        assert not contents


def test_a_reader_waits_while_an_artifact_is_replaced(tmp_path, monkeypatch):
    _build(tmp_path / "a")
    place, old = tmp_path / "a", tmp_path / ".a.old"
    monkeypatch.setattr(time, "sleep", lambda _: old.rename(place))  # as the other process does in the meantime
    for look in (_read, lambda path: is_current(path, RECIPE), lambda path: read_file(path, "inner/file") == b"data"):
        place.rename(old)
        assert look(place)
    assert read_file(place, "inner/none") is None
