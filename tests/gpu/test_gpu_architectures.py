"""Every architecture of docs/models.md computes on a GPU what transformers computes there, in float32 and in bf16.

On the CPU: models/test_architectures.py and `make models`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import examine_architectures
import pytest
from architectures import ARCHITECTURES
from examine_architectures import MARK
from gpus import needs_gpu, run_on_gpu
from models_page import row, written_rows
from rank_jobs import run_main
from rank_processes import finish, fork_ranks

pytestmark = pytest.mark.slow
GROUPS = 12  # each is a process, so that workers share the work


def _examine(*names: str) -> list[dict]:
    program = str(Path(examine_architectures.__file__))
    return _findings(run_on_gpu(program, *names, timeout_s=600), names)


def _findings(printed: str, names: Sequence[str]) -> list[dict]:
    lines = [line.removeprefix(MARK) for line in printed.splitlines() if line.startswith(MARK)]
    findings = [json.loads(line) for line in lines]
    assert [finding["name"] for finding in findings] == [*names], printed
    return findings


@needs_gpu
@pytest.mark.parametrize("group", range(GROUPS))
def test_architectures_compute_on_a_gpu_what_transformers_computes(group):
    findings = _examine(*list(ARCHITECTURES)[group::GROUPS])
    assert {finding["device"] for finding in findings} == {"cuda"}
    faults = {finding["name"]: finding["faults"] for finding in findings if finding["faults"]}
    assert faults == {}
    written = written_rows()
    for finding in findings:
        assert row(finding["name"], finding) == written[finding["name"]]


def test_the_examination_runs_without_a_gpu():
    finished = finish(fork_ranks(run_main, "examine_architectures", ["llama"]))
    (finding,) = _findings(finished.output, ["llama"])
    assert finding["device"] == "cpu" and finding["faults"] == []
    assert row("llama", finding) == written_rows()["llama"]
