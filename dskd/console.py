"""Output to the terminal: stage headings, progress bars with rates, and plain lines, mostly from rank 0 only."""

import io
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from dskd.config.section import GB
from dskd.distributed.world import is_main_process

T = TypeVar("T")


def allow_any_text() -> None:
    """Makes standard output and error accept every character: those that the locale lacks are printed as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(message: str) -> None:
    """Prints one line on rank 0 without disturbing a progress bar."""
    if is_main_process():
        tqdm.write(message, file=sys.stderr)


def warn(message: str) -> None:
    """Prints a warning on the rank that calls it."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


def progress(items: Iterable[T], *, total: int | None, label: str, unit: str) -> Iterator[T]:
    """Yields `items` and shows a progress bar with the rate in `unit` per second; without a bar except on rank 0."""
    yield from tqdm(items, total=total, desc=f"  {label}", unit=f" {unit}", **_bar_options())


def progress_bar(*, total: int | None, label: str, unit: str, initial: int = 0) -> tqdm:
    """Returns a progress bar to advance with `.update(n)`, for work that does not come one item at a time."""
    return tqdm(total=total, initial=initial, desc=f"  {label}", unit=f" {unit}", unit_scale=True, **_bar_options())


def _bar_options() -> dict:
    # In a file or a batch job's log a bar would be one endless line, so there it is drawn only every 30 seconds.
    interactive = sys.stderr.isatty()
    return {
        "disable": not is_main_process(),
        "file": sys.stderr,
        "dynamic_ncols": interactive,
        "mininterval": 0.5 if interactive else 30.0,
        "smoothing": 0.1,
    }


@contextmanager
def stage(name: str, *, reads: Sequence[Path | str], writes: Path | str) -> Iterator[None]:
    """Prints what a stage reads and writes and, at its end, how long it took."""
    say(f"== {name}\n  reads  {', '.join(str(source) for source in reads)}\n  writes {writes}")
    started = time.perf_counter()
    yield
    say(f"  done in {time.perf_counter() - started:.1f} s")


def gigabytes(size: float) -> str:
    """Returns `size`, in bytes, as text in GB (2^30 bytes), or a small one in MB (2^20 bytes) or KB."""
    for unit, in_bytes in (("GB", GB), ("MB", 2**20)):
        if size >= 0.01 * in_bytes:
            return f"{size / in_bytes:,.2f} {unit}"
    return f"{size / 2**10:.2f} KB"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats rows as a table of Markdown, without a line break at its end; bars in cells are escaped."""
    lines = ([cell.replace("|", "\\|") for cell in cells] for cells in (header, ["---"] * len(header), *rows))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Formats rows as text columns: aligns the first `left` columns to the left, the others (numbers) to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
