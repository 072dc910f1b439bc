"""Commands that compute nothing start quickly, because they do not import the large libraries."""

import subprocess
import sys

import pytest
from repository import REPOSITORY

SLOW = ("torch", "deepspeed", "transformers", "streaming", "mlflow", "pyarrow")


@pytest.mark.parametrize(
    "code",
    [
        "import dskd",
        "import dskd.console, dskd.distributed.world, dskd.artifacts.building",
        "import sys; sys.argv = ['dskd', '--help']; import dskd.__main__; dskd.__main__.main()",
        "import sys; sys.argv = ['dskd', 'plan', '--help']; import dskd.__main__; dskd.__main__.main()",
        "import sys; sys.argv = ['dskd', 'config']; import dskd.__main__; dskd.__main__.main()",
        "import sys; sys.argv = ['dskd', 'config', '--config', 'configs/quickstart.yaml']; "
        "import dskd.__main__; dskd.__main__.main()",
        "import sys; sys.argv = ['dskd', 'status', '--config', 'configs/quickstart.yaml', 'workdir=no-such-folder']; "
        "import dskd.__main__; assert dskd.__main__.main() == 3",
        *(
            f"import runpy, sys; sys.argv = ['{name}', '--help']; "
            f"runpy.run_path('launcher/{name}', run_name='__main__')"
            for name in sorted(file.name for file in (REPOSITORY / "launcher").glob("*.py"))
        ),
    ],
)
def test_commands_that_compute_nothing_import_no_torch(code):
    says = f"print('\\nslow:', sorted(set({SLOW}) & set(sys.modules)))"
    script = f"import sys, atexit; atexit.register(lambda: {says})\n{code}"
    command = [sys.executable, "-c", script]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == "slow: []"
