"""Measures, with one command, what only a GPU can show about speed and memory, the most valuable first.

    python -m benchmarks.gpu --out FOLDER --work FOLDER_WITH_SPACE       # on one GPU, in ten minutes
    python -m benchmarks.gpu --toy                                       # tries all of it on a CPU, with tiny shapes

Each section is a benchmark in a process of its own, at the shape of Llama-3-8B with random weights; `--list` shows them
with their commands. A section ends when its own limit or the budget is used up, and the next one starts. After each,
`results.jsonl` in the folder of --out gets a line, and `report.md` has all tables for benchmarks/README.md, so a
command that is killed loses only the section that it was in; `log.txt` has what the programs printed. The same command
with the same folder continues: it measures what is not measured yet, or failed.

The work directory of --work (40 GB at this shape, and as much memory for the file cache) is made by the first section
and used by the others.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_report import append_result, read_results, write_report
from benchmarks.report import REPOSITORY, build_parser, machine, parse, print_result, publish
from benchmarks.workload import PRESETS, write_work_directory
from dskd.artifacts.manifest import write_json
from dskd.distributed.world import LAUNCHER_VARIABLES, uses_gpu
from dskd.errors import UserError

_PRESET, _TOY = "8b", "tiny"
_NEEDED_GB = 55  # of disk, for the work directory and what annotation writes
_STEPS = 40  # of text; the fifth of these have stored states
_SHORTEST_S = 20  # a section needs at least this to load anything


@dataclass(frozen=True)
class Section:
    """A benchmark that the plan runs in a process of its own.

    `{work}` and `{preset}` in its arguments are the folder of work directories and the preset's name.
    """

    name: str
    title: str
    module: str
    arguments: str
    toy: str  # arguments with --toy
    limit_s: int  # the most it may take; three times what we expect
    packages: tuple[str, ...] = ()  # without which it cannot run
    needs_work: bool = True


_WORK = "--preset {preset} --states --folder {work}"
SECTIONS = (
    Section("work", "Work directory", "benchmarks.gpu", "--make-work {work}", "--make-work {work} --toy", 240),
    Section(
        "step",
        "Stored states against the teacher in the step",
        "benchmarks.step",
        f"{_WORK} --only states use use-states --rounds 5 --warm-up 1",
        f"{_WORK} --only states use use-states --rounds 1 --warm-up 1",
        200,
    ),
    Section(
        "gkd",
        "TRL's trainer, its chunked loss, and Liger's fused loss",
        "benchmarks.gkd",
        f"{_WORK} --only plain --rounds 1 --steps 3 --warm-up 1 teacher.mode=cached",
        f"{_WORK} --only plain --rounds 1 --steps 1 --warm-up 1 --quick-memory teacher.mode=cached",
        300,
        packages=("trl",),
    ),
    Section(
        "published",
        "The published algorithm",
        "benchmarks.published",
        f"{_WORK} --rounds 3 --sequences 2 teacher.mode=cached",
        f"{_WORK} --rounds 1 --sequences 1 teacher.mode=cached",
        150,
    ),
    Section(
        "loss_memory",
        "Memory of the loss",
        "benchmarks.loss_memory",
        "--positions 8192 --rounds 3",
        "--positions 64 --vocab-size 512 --hidden-size 64 --rounds 1",
        120,
        needs_work=False,
    ),
    Section(
        "teacher_pass",
        "Attention of packed documents, and compiled layers",
        "benchmarks.teacher_pass",
        f"{_WORK} --rounds 5",
        f"{_WORK} --rounds 1 --only 1 2 4",
        180,
    ),
    Section("parts", "Where the time of a step goes", "benchmarks.parts", _WORK, f"{_WORK} --steps 1 --warm-up 1", 120),
    Section(
        "annotation",
        "Annotation against the bare forward pass",
        "benchmarks.annotation",
        "--work {work}/{preset}-states --store --batch-size 4 --turn 4 --batches 12",
        "--work {work}/{preset}-states --store --batch-size 2 --turn 2 --batches 2",
        120,
    ),
    Section(
        "head",
        "Output head",
        "benchmarks.head",
        "--presets 8b --positions 8192 --dtypes bfloat16 --rounds 9",
        "--presets tiny --positions 64 --dtypes float32 --rounds 1 --only eager",
        150,
        needs_work=False,
    ),
    Section(
        "loader",
        "Data loader",
        "benchmarks.loader",
        f"{_WORK} --rounds 1",
        f"{_WORK} --rounds 1",
        150,
    ),
    # It needs the quickstart's teacher.
    Section(
        "study",
        "Arms of the study of students",
        "benchmarks.study",
        "--folder {work}/study",
        "--folder {work}/study --toy",
        300,
        needs_work=False,
    ),
)


@dataclass
class Plan:
    """The sections that a run of the command measures, and its folders."""

    out: Path
    work: Path
    preset: str
    is_toy: bool
    budget_s: float
    sections: Sequence[Section] = SECTIONS
    started: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget_s - (time.monotonic() - self.started)

    def command(self, section: Section, output: Path) -> list[str]:
        """Returns the command of a section, which writes its result to `output`."""
        arguments = (section.toy if self.is_toy else section.arguments).split()
        named = [text.format(work=self.work, preset=self.preset) for text in arguments]
        # Options first: after overrides of the config, they would be read as more values of the preceding option.
        return [sys.executable, "-W", "ignore", "-m", section.module, "--output", str(output), *named]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("work/gpu"), help="folder of results; default: work/gpu")
    parser.add_argument("--work", type=Path, help="folder of work directories; default: removed at the end")
    parser.add_argument("--budget", type=float, default=570.0, metavar="SECONDS", help="default: 570")
    parser.add_argument("--only", nargs="+", choices=[section.name for section in SECTIONS], metavar="SECTION")
    parser.add_argument("--again", action="store_true", help="also measure what --out has already")
    parser.add_argument("--toy", action="store_true", help="try all sections with tiny shapes, on a CPU")
    parser.add_argument("--list", action="store_true", help="print the sections and their commands; measure nothing")
    parser.add_argument("--make-work", type=Path, help=argparse.SUPPRESS)
    args = parse(parser, arguments)
    preset = _TOY if args.toy else _PRESET
    if args.make_work is not None:
        _make_work(args, preset)
        return
    chosen = [section for section in SECTIONS if not args.only or section.name in args.only]
    with tempfile.TemporaryDirectory(prefix="dskd-gpu-") as temporary:
        work = (args.work or Path(temporary)).resolve()
        plan = Plan(args.out, work, preset, args.toy, args.budget, chosen)
        if args.list:
            for section in chosen:
                print(f"{section.name}: {section.title}\n  {' '.join(plan.command(section, Path('RESULT'))[1:])}")
            return
        if not args.toy:
            _require_gpu(work)
        run(plan, again=args.again)
        if args.output is not None:
            write_json(args.output, read_results(plan.out, plan.preset))


def run(plan: Plan, *, again: bool = False) -> None:
    """Runs the sections one after the other, and writes results and report after each."""
    plan.out.mkdir(parents=True, exist_ok=True)
    done = {} if again else {result["name"]: result for result in read_results(plan.out, plan.preset)}
    for section in plan.sections:
        known = done.get(section.name, {})
        if known.get("status") == "measured" and (section.name != "work" or _has_work(plan)):
            print(f"{section.name}: measured before", flush=True)
            continue
        started = time.monotonic()
        status, results = _run_section(plan, section)
        seconds = round(time.monotonic() - started, 1)
        print(f"{section.name}: {status}, {seconds:.0f} s; {max(0, plan.left_s):.0f} s left", flush=True)
        identity = {"name": section.name, "title": section.title, "preset": plan.preset}
        append_result(plan.out, identity | {"status": status, "seconds": seconds} | results)
        write_report(plan.out, plan.preset)
    print(f"results: {plan.out / 'results.jsonl'}; tables: {plan.out / 'report.md'}", flush=True)


def _run_section(plan: Plan, section: Section) -> tuple[str, dict[str, Any]]:
    """Returns a section's status, and its result if there is one."""
    if missing := [name for name in section.packages if importlib.util.find_spec(name) is None]:
        return f"not installed: {', '.join(missing)}", {}
    if section.needs_work and section.name != "work" and not _has_work(plan):
        return "no work directory", {}
    limit_s = min(section.limit_s, plan.left_s)
    if limit_s < _SHORTEST_S:
        return "no time left", {}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command = plan.command(section, output)
        exit_code, printed = _run_in_group(command, plan.out / "log.txt", limit_s)
        if output.is_file():
            result = json.loads(output.read_text())
            # The command that gives the same figures; its file for the result was ours.
            return "measured", result | {"command": result["command"].replace(f"--output {output} ", "")}
    if exit_code is None:
        return f"ended after {limit_s:.0f} s, its limit", {"output": printed}
    return f"failed with exit code {exit_code}", {"output": printed}


def _run_in_group(command: Sequence[str], log: Path, limit_s: float) -> tuple[int | None, str]:
    """Runs a command whose output goes to the end of `log`, and ends it and its children after `limit_s` seconds.

    Returns its exit code, or None if it was ended, and the last of its output.
    """
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    with log.open("ab") as stream:
        start = stream.tell()
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=stream, stderr=subprocess.STDOUT, process_group=0
        )
        # If this process is ended, the section must not keep the GPU.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            exit_code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            exit_code = None
        finally:
            signal.signal(signal.SIGTERM, before)
            _end_group(process)
    with log.open("rb") as stream:
        stream.seek(start)
        return exit_code, stream.read()[-3000:].decode("utf-8", "replace")


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """Ends what is left of a process and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _has_work(plan: Plan) -> bool:
    return (plan.work / f"{plan.preset}-states" / "config.yaml").is_file()


def _make_work(args: argparse.Namespace, preset: str) -> None:
    """Writes the work directory that the sections share, if it is not there, and publishes its size and time."""
    at_start, started = machine(), time.perf_counter()
    folder = args.make_work / f"{preset}-states"
    if not (folder / "config.yaml").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        write_work_directory(folder, PRESETS[preset], steps=_STEPS, states=True)
    seconds = time.perf_counter() - started
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    rows = [["written", f"{size / 1e9:.1f} GB"], ["time", f"{seconds:.0f} s"]]
    publish(args, "benchmarks.gpu", ("", "figure"), rows, {"bytes": size, "seconds": seconds}, at_start)
    print_result("made")


def _require_gpu(work: Path) -> None:
    """Checks that there is a GPU, and space for the work directory.

    Raises:
        SystemExit: with what is missing.
    """
    if not uses_gpu():
        raise SystemExit(
            "there is no GPU (torch sees none, or DS_ACCELERATOR=cpu hides it); `python -m benchmarks.gpu --toy` tries "
            "the plan on the CPU"
        )
    folder = next(folder for folder in (work, *work.parents) if folder.exists())
    made = (work / f"{_PRESET}-states" / "config.yaml").is_file()
    free = shutil.disk_usage(folder).free / 1e9
    if not made and free < _NEEDED_GB:
        raise SystemExit(
            f"{folder} has {free:.0f} GB free, and the work directory needs {_NEEDED_GB}; name another: --work"
        )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        raise SystemExit(str(error)) from error
