"""Commands that compute nothing start quickly, because they do not import the large libraries."""

import json
import os
import subprocess
import sys

from config_files import write_config
from repository import REPOSITORY

SLOW = ("torch", "deepspeed", "transformers", "streaming", "mlflow", "pyarrow")
QUICKSTART = "configs/quickstart.yaml"
# Arguments of `dskd`, with the exit code.
COMMANDS = [
    (["--help"], 0),
    (["plan", "--help"], 0),
    (["config"], 0),
    (["config", "--config", QUICKSTART], 0),
    (["status", "--config", QUICKSTART, "workdir=no-such-folder"], 3),
]
# After each command it prints the large libraries that are imported by then.
SCRIPT = """
import json, runpy, sys

def run(action, *arguments):
    sys.argv = list(arguments)
    try:
        code = action()
    except SystemExit as ended:
        code = ended.code
    print("\\nran:", json.dumps([arguments, code or 0, sorted(set({slow}) & set(sys.modules))]))

import dskd
import dskd.console, dskd.distributed.world, dskd.artifacts.building
import dskd.__main__
run(lambda: 0, "import")
for arguments, _ in {commands}:
    run(dskd.__main__.main, "dskd", *arguments)
for name in {launchers}:
    run(lambda: not runpy.run_path("launcher/" + name, run_name="__main__"), name, "--help")
"""


def test_commands_that_compute_nothing_import_no_torch():
    """One process runs all of them, because each imports most of what the others do."""
    launchers = sorted(file.name for file in (REPOSITORY / "launcher").glob("*.py"))
    script = SCRIPT.format(slow=SLOW, commands=COMMANDS, launchers=launchers)
    command = [sys.executable, "-c", script]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
    assert finished.returncode == 0, finished.stderr
    lines = [line.removeprefix("ran: ") for line in finished.stdout.splitlines() if line.startswith("ran: ")]
    expected = [[["import"], 0, []]]
    expected += [[["dskd", *arguments], code, []] for arguments, code in COMMANDS]
    expected += [[[name, "--help"], 0, []] for name in launchers]
    assert [json.loads(line) for line in lines] == expected


def test_ranks_that_cannot_share_a_batch_refuse_it_without_torch(tmp_path):
    """Every rank would otherwise import for seconds first; only rank 0 prints the message."""
    config = write_config(tmp_path / "c.yaml", {"workdir": str(tmp_path / "work"), "teacher": {"path": "t"}})
    without_torch = (
        "import runpy, sys; sys.modules['torch'] = None; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    )
    command = [sys.executable, "-c", without_torch, "launcher/train.py", "--config", str(config)]
    command += ["train.global_batch_size=7"]
    for rank, messages in enumerate((1, 0)):
        environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"}
        ended = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, timeout=60)
        assert ended.returncode == 2, ended.stderr
        assert ended.stderr.count("7 sequences cannot be divided among 2 ranks") == messages
        assert "Traceback" not in ended.stderr
