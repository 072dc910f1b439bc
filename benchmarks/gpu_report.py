"""The results of `python -m benchmarks.gpu`: a file with a line for each section, and a page with their tables."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dskd.console import markdown_table

RESULTS, REPORT = "results.jsonl", "report.md"


def append_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Appends a section's result, and waits until it is on disk."""
    with (folder / RESULTS).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(result) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_results(folder: Path, preset: str) -> list[dict[str, Any]]:
    """Returns the last result of each section at this preset, in the order of their first ones.

    A measured result stays if the section was tried again and failed. A line that was not written to its end is left
    out.
    """
    results: dict[str, dict[str, Any]] = {}
    path = folder / RESULTS
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        name = result["name"]
        is_worse = result["status"] != "measured" and results.get(name, {}).get("status") == "measured"
        if result["preset"] == preset and not is_worse:
            results[name] = result
    return list(results.values())


def write_report(folder: Path, preset: str) -> None:
    """Writes the page: for each section its command, date and machine, and its table, or why there is none."""
    lines = [f"# Measured at `{preset}`", ""]
    for result in read_results(folder, preset):
        lines += [f"## {result['title']}", ""]
        if result["status"] == "measured":
            lines += ["```sh", result["command"], "```", "", _where(result), "", *_table(**result["table"])]
        else:
            lines += [f"Not measured: {result['status']}.", *_last_words(result.get("output", ""))]
        lines.append("")
    partial = folder / f".{REPORT}"
    partial.write_text("\n".join(lines), encoding="utf-8")
    partial.replace(folder / REPORT)


def _where(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    named = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in machine.items() if name != "date")
    return f"{machine['date']}, {named}; {result['seconds']:.0f} s."


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table of Markdown; shorter rows are filled."""
    return markdown_table(header, [[*cells, *[""] * (len(header) - len(cells))] for cells in rows]).splitlines()


def _last_words(output: str) -> list[str]:
    """Returns the end of what a program printed, as a block of text."""
    lines = [line for line in output.splitlines() if line.strip()]
    return ["", "```text", *lines[-15:], "```"] if lines else []
