"""Speed and memory of reading Wiktionary: a synthetic Wiktextract file, read by the real reader.

    python -m benchmarks.lexicon_memory --gigabytes 0.5 1 --relations 100000
    python -m benchmarks.lexicon_memory --gigabytes 0.5 --relations 400000

Entries have the shape and size of those in kaikki.org's file of all languages: one in eight is English, and most of a
line is sounds, forms and translations that the reader ignores. Every file is read twice, in separate processes: by the
control, which only unpacks the lines and parses the JSON, and by the reader, which fills the table of relations. The
expected result: memory grows with the distinct relations, not with the size of the file.
"""

import argparse
import gzip
import itertools
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.report import build_parser, machine, parse, print_result, publish, run_child

RELATIONS_PER_ENTRY = 16  # more than in real entries, so that small files have many
ENGLISH_EVERY = 8  # every eighth entry is English


def entries(relations: int) -> Iterator[str]:
    """Yields lines of a Wiktextract file without end; they repeat `relations` distinct pairs."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 11))) for _ in range(relations // 3)]
    fillers = [_filler(draw, words) for _ in range(500)]
    pair = 0
    for number in itertools.count():
        filler = fillers[number % len(fillers)]
        if number % ENGLISH_EVERY:
            yield f'{{"word": "{words[number % len(words)]}", "lang": "Finnish", "lang_code": "fi", {filler}}}\n'
            continue
        places = [(pair + i) % relations for i in range(RELATIONS_PER_ENTRY)]
        head = words[places[0] // RELATIONS_PER_ENTRY % len(words)]
        tails = [words[(index * 7919 + 1) % len(words)] for index in places]
        senses = json.dumps([{"synonyms": [{"word": tail} for tail in tails[1:]], "glosses": ["a gloss"]}])
        antonyms = json.dumps([{"word": f"not {tails[0]}", "sense": "a gloss"}])
        yield (
            f'{{"word": "{head}", "lang": "English", "lang_code": "en", "senses": {senses}, "antonyms": {antonyms}, '
            f"{filler}}}\n"
        )
        pair += RELATIONS_PER_ENTRY


def _filler(draw: random.Random, words: list[str]) -> str:
    """Returns about two kilobytes of JSON with the other fields of an entry."""
    rest = {
        "pos": "noun",
        "etymology_text": " ".join(draw.choices(words, k=40)),
        "sounds": [{"ipa": f"/{draw.choice(words)}/", "tags": ["UK"]} for _ in range(3)],
        "forms": [{"form": draw.choice(words), "tags": ["plural", "genitive"]} for _ in range(8)],
        "translations": [
            {"lang": "French", "code": "fr", "sense": " ".join(draw.choices(words, k=4)), "word": draw.choice(words)}
            for _ in range(10)
        ],
    }
    return json.dumps(rest)[1:-1]


def write(path: Path, size_bytes: int, relations: int) -> None:
    """Writes a compressed Wiktextract file of at least `size_bytes` uncompressed bytes."""
    written = 0
    with gzip.open(path, "wt", compresslevel=1, encoding="utf-8") as stream:
        for line in entries(relations):
            stream.write(line)
            written += len(line)
            if written >= size_bytes:
                return


def read(path: Path, reader: str) -> dict[str, float]:
    """Reads a file and measures it; a child process calls this, so that the peak memory is that of one reader.

    `reader` is `control`, which only unpacks and parses, or `dskd`.
    """
    from dskd.lexicon.reading import Report
    from dskd.lexicon.relations import Pairs
    from dskd.lexicon.wiktionary import read_wiktionary

    before = _peak_mb()
    relations = 0
    started = time.perf_counter()
    if reader == "control":
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            for line in stream:
                json.loads(line)
        seconds = time.perf_counter() - started
    else:
        pairs = Pairs(read_wiktionary(path, "English", Report()))
        seconds = time.perf_counter() - started  # before the table is resolved, which the control does not do
        relations = len(pairs.resolved())
    return {"seconds": seconds, "relations": relations, "before_mb": before, "peak_mb": _peak_mb()}


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0], help="sizes of the files, unpacked")
    parser.add_argument(
        "--relations", type=int, default=200_000, help="approximate number of distinct pairs of words in each file"
    )
    parser.add_argument("--read", nargs=2, metavar=("FILE", "READER"), help=argparse.SUPPRESS)
    args = parse(parser, arguments)
    if args.read:
        print_result(read(Path(args.read[0]), args.read[1]))
        return
    at_start = machine()
    rows, results = [], []
    with tempfile.TemporaryDirectory() as folder:
        for gigabytes in args.gigabytes:
            path = Path(folder) / "wiktionary.jsonl.gz"
            write(path, int(gigabytes * 1e9), args.relations)
            for reader in ("control", "dskd"):
                measured = run_child("benchmarks.lexicon_memory", "--read", path, reader)
                results.append({"gigabytes": gigabytes, "reader": reader, **measured})
                rows.append(
                    [
                        f"{gigabytes:.2f} GB",
                        reader,
                        f"{gigabytes * 1e3 / measured['seconds']:.0f}",
                        f"{measured['relations']:,}",
                        f"{measured['before_mb']:.0f}",
                        f"{measured['peak_mb']:.0f}",
                    ]
                )
    header = ("unpacked", "reader", "MB/s", "relations", "MB at start", "MB at peak")
    publish(args, "benchmarks.lexicon_memory", header, rows, {"files": results}, at_start)


if __name__ == "__main__":
    main(sys.argv[1:])
