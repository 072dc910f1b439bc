"""What the documents say of the repository is true."""

import re
import subprocess
import sys

import pytest
from repository import REPOSITORY

DOCUMENTS = [file for folder in (".", "docs", "cluster/*") for file in sorted(REPOSITORY.glob(f"{folder}/*.md"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_link_and_every_file_named_exists(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (path.parent / target).resolve().exists(), target
    for name in re.findall(r"`((?:dskd|launcher|configs|tests)/[\w/.-]+\.(?:py|yaml))`", text):
        assert (REPOSITORY / name).exists(), name


def test_every_invariant_names_a_test_that_exists():
    links = re.findall(r"\[(test_\w+)\]\(\.\./(tests/[\w/]+\.py)\)", (REPOSITORY / "docs/invariants.md").read_text())
    assert len(links) > 20
    for name, file in links:
        assert f"def {name}(" in (REPOSITORY / file).read_text(encoding="utf-8"), name


@pytest.mark.parametrize("program", sorted((REPOSITORY / "launcher").glob("*.py")), ids=lambda path: path.name)
def test_every_program_teaches_its_use(program):
    finished = subprocess.run(
        [sys.executable, str(program), "--help"], capture_output=True, text=True, timeout=60, cwd=REPOSITORY
    )
    assert finished.returncode == 0, finished.stderr
    for part in ("examples:", "--config FILE", "section.key=value"):
        assert part in finished.stdout


def test_only_one_package_imports_mlflow_and_one_reads_the_launchers_variables():
    sources = {path: path.read_text(encoding="utf-8") for path in (REPOSITORY / "dskd").rglob("*.py")}
    importers = {p.parent.name for p, text in sources.items() if re.search(r"^\s*(?:from|import) mlflow", text, re.M)}
    readers = {p.parent.name for p, text in sources.items() if re.search(r'"(?:RANK|WORLD_SIZE|LOCAL_RANK)"', text)}
    assert importers == {"tracking"}
    assert readers == {"distributed"}
