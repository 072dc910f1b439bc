"""Examines architectures of the table in this process, on the device that DeepSpeed uses, and prints the findings.

    python tests/support/examine_architectures.py llama qwen3

For `make models`, ranks without a GPU do the same (architecture_findings.py).
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

MARK = "finding: "  # begins the lines with a finding


def main(names: list[str]) -> None:
    """Prints a line of JSON for each architecture: its name, the device, and the finding."""
    import transformers
    from architecture_findings import examine_one

    from dskd.distributed.rendezvous import initialize

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    world = initialize()
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            finding = examine_one(name, Path(folder), world, thorough=True)
        print(f"\n{MARK}{json.dumps({'name': name, 'device': world.device.type, **finding})}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
