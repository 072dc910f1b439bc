"""The documents name files, sections, keys and tests that exist; programs explain themselves."""

import ast
import importlib.metadata
import re
import sys
import tomllib

import pytest
from repository import REPOSITORY

from dskd.config import Config, Section

FOLDERS = (".", "docs", "cluster/*", "benchmarks", "benchmarks/*")
DOCUMENTS = [file for folder in FOLDERS for file in sorted(REPOSITORY.glob(f"{folder}/*.md"))]
# The endings of files that are named after sections of the config.
FILE_ENDINGS = ("py", "md", "yaml", "json", "jsonl", "parquet", "safetensors", "sbatch")
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))


@each_document
def test_every_link_and_file_in_a_document_exists(path):
    text = path.read_text(encoding="utf-8")
    for target, section in re.findall(r"\]\(([^)#\s]*)(?:#([^)]+))?\)", text):
        if target.startswith("http"):
            continue
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), target
        assert not section or section in _sections(file), f"{target}#{section}"
    for name in re.findall(r"(?<![\w/.-])((?:dskd|launcher|configs|cluster|benchmarks|tests)/[\w/.-]+)", text):
        name = name.rstrip(".")
        assert (REPOSITORY / name).exists(), name


def _sections(file):
    """Returns the anchors that GitHub gives to the headings of a Markdown file."""
    text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_contributing_names_every_folder_and_module_at_the_top_of_the_library():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|([^|]*`dskd/[^|]*)\|", text, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`dskd/([\w.]+)/?`", row)}
    folders = {file.parent.name for file in REPOSITORY.glob("dskd/*/__init__.py")}
    assert named == folders | {file.name for file in REPOSITORY.glob("dskd/*.py")} - {"__init__.py"}


@each_document
def test_every_config_key_in_a_document_exists(path):
    sections = {name: field.annotation for name, field in Config.model_fields.items() if _is_section(field.annotation)}
    assert {"train", "loss", "senses"} <= sections.keys()
    text = path.read_text(encoding="utf-8")
    for section, key in re.findall(rf"(?<![\w./-])({'|'.join(sections)})\.([a-z_]+)\b(?!/)", text):
        if key not in FILE_ENDINGS:
            assert key in {*sections[section].model_fields, *vars(sections[section])}, f"{section}.{key}"


def _is_section(annotation):
    return isinstance(annotation, type) and issubclass(annotation, Section)


def test_every_invariant_names_a_test_that_exists():
    links = re.findall(r"\[(test_\w+)\]\(\.\./(tests/[\w/]+\.py)\)", (REPOSITORY / "docs/invariants.md").read_text())
    assert len(links) > 20
    for name, file in links:
        assert f"def {name}(" in (REPOSITORY / file).read_text(encoding="utf-8"), name


def test_only_tracking_imports_mlflow_only_distributed_reads_launchers_and_nothing_reads_schedulers():
    sources = {path: path.read_text(encoding="utf-8") for path in (REPOSITORY / "dskd").rglob("*.py")}
    importers = {p.parent.name for p, text in sources.items() if re.search(r"^\s*(?:from|import) mlflow", text, re.M)}
    readers = {p.parent.name for p, text in sources.items() if re.search(r'"(?:RANK|WORLD_SIZE|LOCAL_RANK)"', text)}
    schedulers = re.compile(r"\b(?:SLURM|SBATCH|KUBERNETES|PBS|LSB)_[A-Z]|JOB_COMPLETION_INDEX")
    assert importers == {"tracking"}
    assert readers == {"distributed"}
    assert [path for path, text in sources.items() if schedulers.search(text)] == []


PACKAGES = [file for file in sorted((REPOSITORY / "dskd").rglob("__init__.py")) if file.parent.name != "dskd"]


@pytest.mark.parametrize("path", PACKAGES, ids=lambda path: str(path.parent.relative_to(REPOSITORY)))
def test_the_docstring_of_every_package_lists_its_modules(path):
    """Each has a line that begins with its name, or the name in backticks."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    listed = {*re.findall(r"^(\w+/?)  +\S", text, re.MULTILINE), *re.findall(r"`(\w+)`", text)}
    modules = {file.stem for file in path.parent.glob("[!_]*.py")}
    packages = {f"{file.parent.name}/" for file in path.parent.glob("*/__init__.py")}
    assert modules | packages <= listed
    lines = set(re.findall(r"^(\w+/?)  +\S", text, re.MULTILINE))
    assert lines <= modules | packages


def test_every_package_that_the_library_imports_is_a_declared_dependency():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["hub"]]
    declared = {_normalized(re.match(r"[\w.-]+", text)[0]) for text in declared}
    distributions = importlib.metadata.packages_distributions()
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (REPOSITORY / "dskd").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    imported = {name.partition(".")[0] for name in names} - {"dskd", *sys.stdlib_module_names}
    undeclared = {
        name for name in imported if not declared & {_normalized(one) for one in distributions.get(name, [name])}
    }
    assert "torch" in imported
    assert undeclared == set()


def _normalized(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_test_that_continuous_integration_chooses_exists():
    """`.ci/run` chooses tests on a cluster by parts of their names; a part that is in no name chooses nothing."""
    script = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    chosen = " ".join(
        [*re.findall(r"^ *chosen=(.+)$", script, re.MULTILINE), *re.findall(r"-k '([^$'][^']*)'", script)]
    )
    parts = {part for part in re.findall(r"\w+", chosen) if part not in ("or", "and", "chosen")}
    files = sorted((REPOSITORY / "tests" / "cluster").glob("test_*.py"))
    names = " ".join(
        name for file in files for name in (file.stem, *re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE))
    )
    assert len(parts) > 10
    assert {part for part in parts if part not in names} == set()


def test_every_file_of_tests_that_is_to_run_early_exists():
    named = re.findall(r'^    "(test_\w+\.py)",$', (REPOSITORY / "tests" / "conftest.py").read_text(), re.MULTILINE)
    assert len(named) > 5
    assert set(named) <= {file.name for file in (REPOSITORY / "tests").rglob("test_*.py")}
