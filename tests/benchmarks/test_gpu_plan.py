"""The plan of `python -m benchmarks.gpu`: sections that end, fail or are killed, its report, and all of it as a toy."""

import json
import os
import time

import psutil
import pytest
import torch
from rank_processes import ONE_RANK
from repository import REPOSITORY
from tiny_models import save_model

from benchmarks import gpu
from benchmarks.gpu import SECTIONS, Plan, Section, run
from benchmarks.gpu_report import append_result, read_results, write_report
from benchmarks.parts import marked_modules, part_of, shares_of
from benchmarks.profiling import Profile
from benchmarks.teacher_pass import Variant, draw_positions, measure
from dskd.config import Config
from dskd.models.files.folder import find_teacher
from dskd.models.running.frozen import load_frozen

_MEASURES = """
import json, pathlib, sys
with pathlib.Path({log!r}).open("a") as log:
    log.write("x")
table = {{"header": ["", "figure"], "rows": [["speed", "3"], ["short"]]}}
machine = {{"date": "2026-11-30", "cores": 2, "memory_gb": 24}}
result = {{"command": "python -m measures", "machine": machine, "table": table, "results": {{}}}}
pathlib.Path(sys.argv[sys.argv.index("--output") + 1]).write_text(json.dumps(result))
"""
_WAITS = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path({log!r}).write_text(str(child.pid))
time.sleep(600)
"""

_ONLY_IF_ASKED = pytest.mark.skipif(
    "DSKD_TEST_GPU_PLAN" not in os.environ, reason="all sections take minutes: DSKD_TEST_GPU_PLAN=1"
)


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Makes a plan of three programs: one measures, one fails, and one waits with a child of its own."""
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}{os.pathsep}{tmp_path}")
    monkeypatch.setattr(gpu, "_SHORTEST_S", 0)
    (tmp_path / "measures.py").write_text(_MEASURES.format(log=str(tmp_path / "measured")))
    (tmp_path / "fails.py").write_text("print('this went wrong'); raise SystemExit(3)")
    (tmp_path / "waits.py").write_text(_WAITS.format(log=str(tmp_path / "waits")))
    sections = [
        Section("fails", "Fails", "fails", "", "", 60, needs_work=False),
        Section("waits", "Waits", "waits", "", "", 2, needs_work=False),
        Section("absent", "Absent", "measures", "", "", 60, ("no_such_package",), needs_work=False),
        Section("measures", "Measures", "measures", "", "", 60, needs_work=False),
    ]
    return Plan(tmp_path / "out", tmp_path / "work", "tiny", is_toy=True, budget_s=100, sections=sections)


def _is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_section_that_fails_or_takes_too_long_does_not_keep_others_from_being_measured(plan, tmp_path):
    run(plan)
    statuses = {result["name"]: result["status"] for result in read_results(plan.out, "tiny")}
    assert statuses == {
        "fails": "failed with exit code 3",
        "waits": "ended after 2 s, its limit",
        "absent": "not installed: no_such_package",
        "measures": "measured",
    }
    child, deadline = int((tmp_path / "waits").read_text()), time.monotonic() + 30
    while _is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(child)
    report = (plan.out / "report.md").read_text()
    assert "| speed | 3 |" in report and "| short |  |" in report and "python -m measures" in report
    assert "this went wrong" in report and "Not measured: not installed: no_such_package." in report
    assert "this went wrong" in (plan.out / "log.txt").read_text()


def test_the_same_command_again_measures_only_what_is_missing(plan, tmp_path):
    plan.sections = [section for section in plan.sections if section.name in ("fails", "measures")]
    run(plan)
    (tmp_path / "fails.py").write_text((tmp_path / "measures.py").read_text())
    run(plan)
    assert [result["status"] for result in read_results(plan.out, "tiny")] == ["measured"] * 2
    assert (tmp_path / "measured").read_text() == "xx"  # once each
    run(plan, again=True)
    assert (tmp_path / "measured").read_text() == "xxxx"


def test_without_time_nothing_is_started(plan, monkeypatch):
    monkeypatch.setattr(gpu, "_SHORTEST_S", 20)
    plan.budget_s = 10
    run(plan)
    assert {result["status"] for result in read_results(plan.out, "tiny") if result["name"] != "absent"} == {
        "no time left"
    }


def test_a_line_that_was_not_written_to_its_end_and_a_later_failure_lose_nothing(tmp_path):
    measured = {"name": "a", "title": "A", "preset": "8b", "status": "measured", "seconds": 3}
    append_result(tmp_path, measured)
    append_result(tmp_path, {**measured, "status": "failed with exit code 1"})
    append_result(tmp_path, {**measured, "preset": "tiny", "title": "of another shape"})
    with (tmp_path / "results.jsonl").open("a") as stream:
        stream.write('{"name": "b", "ti')
    assert read_results(tmp_path, "8b") == [measured]


def test_without_a_gpu_the_command_says_what_to_do():
    with pytest.raises(SystemExit, match=r"there is no GPU .*benchmarks\.gpu --toy"):
        gpu.main(["--only", "head"])


def test_every_section_runs_a_benchmark_with_options_that_it_has(tmp_path, capsys):
    gpu.main(["--list"])
    printed = capsys.readouterr().out
    for section in SECTIONS:
        assert f"{section.name}: {section.title}" in printed
        assert "{" not in " ".join(Plan(tmp_path, tmp_path, "8b", is_toy=False, budget_s=1).command(section, tmp_path))


def test_operations_belong_to_the_module_around_them(tmp_path):
    model = save_model(tmp_path)
    layers = model.config.num_hidden_layers
    profile = Profile()
    ids = torch.arange(20)[None]
    with torch.no_grad(), marked_modules(torch.nn.ModuleDict({"base": model.model}), "teacher"):
        profile.start()
        model(ids)
        profile.stop()
        model(ids)
    parts = [part_of(event) for event in profile.events() if event.name == "aten::mm"]
    # Per layer: queries, keys, values, output; gate, up, down. The output matrix is in no part.
    assert parts.count("teacher: projections of attention") == 4 * layers
    assert parts.count("teacher: products of the MLP") == 3 * layers
    assert parts.count("other operations") == 1 and len(parts) == 7 * layers + 1
    activations = {part_of(event) for event in profile.events() if event.name == "aten::silu"}
    assert activations == {"teacher: SwiGLU"}
    kernels = {part_of(event) for event in profile.events() if event.name == "aten::scaled_dot_product_attention"}
    assert kernels == {"teacher: attention itself"}
    shares = shares_of(profile)
    assert {"teacher: norms", "teacher: rotation, copies", "teacher: residuals, masks, embeddings"} <= shares.keys()
    assert sum(shares.values()) == pytest.approx(1, abs=0.02)
    assert not model.model.layers[0].mlp._forward_hooks and not model.model.layers[0].mlp._forward_pre_hooks


def test_ways_to_run_the_teacher_are_compared_and_one_that_is_missing_is_named(tmp_path):
    save_model(tmp_path / "teacher")
    config = Config(
        workdir=str(tmp_path),
        teacher={"path": str(tmp_path / "teacher"), "mode": "resident"},
        corpus={"packing": "documents", "sequence_length": 32},
        precision="fp32",
    )
    teacher = load_frozen(find_teacher(config), config, ONE_RANK, with_head=False)
    variants = [
        Variant("whole", "sdpa", packs=False),
        Variant("packed", "sdpa", packs=True),
        Variant("packed, plain", "eager", packs=True),
        Variant("missing", "flash_attention_2", packs=True, package="no_such_package"),
        Variant("unknown", "no_such_attention", packs=True),
    ]
    ids = torch.arange(64).view(2, 32) + 1
    measured = measure(teacher, variants, ids, rounds=1)
    assert measured["missing"] == {"problem": "no_such_package is not installed"}
    assert "no_such_attention" in measured["unknown"]["problem"]
    assert measured["whole"]["difference"] == 0 and measured["packed, plain"]["difference"] < 1e-5
    assert any("attention" in name for name in measured["packed"]["kernels"])
    assert measured["packed"]["speed"]["median"] > 0
    # Documents make a difference, and each of them begins at position 0.
    positions = draw_positions(2, 32)
    assert (positions == 0).sum(dim=1).tolist() == [5, 5] and positions.shape == (2, 32)
    with torch.no_grad():
        assert not torch.allclose(teacher.hidden_states(ids), teacher.hidden_states(ids, positions), atol=1e-3)
    assert teacher.decoder.base.config._attn_implementation == "sdpa"


@pytest.mark.slow
@pytest.mark.parametrize("names", [["work"], pytest.param([], marks=_ONLY_IF_ASKED)])
def test_the_plan_runs_with_tiny_shapes(tmp_path, monkeypatch, names):
    """Its sections are programs of their own; tests/benchmarks/test_benchmarks.py runs two others."""
    chosen = [section for section in SECTIONS if not names or section.name in names]
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # of this process
        monkeypatch.delenv(name, raising=False)
    options = ["--toy", "--budget", "1200", "--threads", "1", "--out", str(tmp_path / "out")]
    gpu.main([*options, *(["--only", *names] if names else [])])
    results = read_results(tmp_path / "out", "tiny")
    statuses = {result["name"]: result["status"] for result in results if result["status"] != "not installed: trl"}
    assert set(statuses.values()) == {"measured"}, json.dumps(results, indent=1)
    assert {section.name for section in chosen} == {result["name"] for result in results}
    report = (tmp_path / "out" / "report.md").read_text()
    assert all(f"## {section.title}" in report for section in chosen)
    if not names:
        assert "python -m benchmarks.step --preset tiny --states" in report
    write_report(tmp_path / "out", "8b")  # nothing was measured at this shape
    assert (tmp_path / "out" / "report.md").read_text().splitlines() == ["# Measured at `8b`"]
