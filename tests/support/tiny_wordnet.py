"""A WordNet of a few synsets, written by hand in the format of its dictionary files (wndb(5WN))."""

from pathlib import Path

HEADER = "  1 This is a test. WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved.\n"

# Name, part of speech, lemmas, pointers: (symbol, target, number of the source's lemma, of the target's; 0: synset).
SYNSETS = [
    ("entity", "n", ["entity"], []),
    ("car", "n", ["car", "auto", "motor_car"], []),
    ("hot", "a", ["hot"], [("!", "cold", 1, 1), ("&", "scorching", 0, 0), ("&", "torrid", 0, 0)]),
    ("cold", "a", ["cold"], [("!", "hot", 1, 1), ("&", "frigid", 0, 0)]),
    ("scorching", "s", ["scorching"], [("&", "hot", 0, 0)]),
    ("torrid", "s", ["torrid", "hot"], [("&", "hot", 0, 0)]),
    ("frigid", "s", ["frigid"], [("&", "cold", 0, 0)]),
    ("large", "a", ["large", "big"], [("!", "small", 1, 1), ("!", "small", 2, 2), ("&", "huge", 0, 0)]),
    ("small", "a", ["small", "little"], [("!", "large", 1, 1), ("!", "large", 2, 2)]),
    ("huge", "s", ["huge", "galore(ip)"], [("&", "large", 0, 0)]),
]
_FILES = {"n": "noun", "v": "verb", "a": "adj", "s": "adj", "r": "adv"}
_LEXNAMES = {"n": 3, "v": 38, "a": 0, "s": 0, "r": 2}  # noun.Tops, verb.motion, adj.all and adv.all of lexnames(5WN)


def write_wordnet(folder: Path, synsets=SYNSETS, glosses: dict[str, str] | None = None) -> dict[str, str]:
    """Writes the dictionary files, and returns the offset of each synset with its part of speech, as `00000095-a`.

    A gloss is a definition and examples in double quotes, separated by semicolons.
    """
    folder.mkdir(parents=True)
    parts = {name: part for name, part, *_ in synsets}
    glosses = dict.fromkeys(parts, "a gloss") | (glosses or {})
    offsets: dict[str, int] = {}
    for part in dict.fromkeys(_FILES.values()):
        here = [synset for synset in synsets if _FILES[synset[1]] == part]
        place = len(HEADER)
        for synset in here:  # offsets have a fixed width, so the length of a line does not depend on them
            offsets[synset[0]] = place
            place += len(_line(synset, dict.fromkeys(parts, 0), parts, glosses))
    for part in dict.fromkeys(_FILES.values()):
        here = [synset for synset in synsets if _FILES[synset[1]] == part]
        lines = "".join(_line(synset, offsets, parts, glosses) for synset in here)
        (folder / f"data.{part}").write_text(HEADER + lines)
        (folder / f"index.{part}").write_text(HEADER + "".join(_index(here, offsets)))
        (folder / f"{part}.exc").write_text("")
    return {name: f"{offsets[name]:08d}-{part}" for name, part in parts.items()}


def _line(synset, offsets, parts, glosses):
    name, part, lemmas, pointers = synset
    words = " ".join(f"{lemma} 0" for lemma in lemmas)
    links = " ".join(
        f"{symbol} {offsets[target]:08d} {'a' if parts[target] == 's' else parts[target]} {source:02x}{aim:02x}"
        for symbol, target, source, aim in pointers
    )
    body = " ".join(filter(None, (words, f"{len(pointers):03d}", links)))
    return f"{offsets[name]:08d} {_LEXNAMES[part]:02d} {part} {len(lemmas):02x} {body} | {glosses[name]}  \n"


def _index(synsets, offsets):
    places: dict[str, list[str]] = {}
    for name, _, lemmas, _ in synsets:
        for lemma in lemmas:
            places.setdefault(lemma.split("(")[0], []).append(name)
    for lemma, names in sorted(places.items()):
        part = synsets[0][1].replace("s", "a")
        found = " ".join(f"{offsets[name]:08d}" for name in names)
        yield f"{lemma} {part} {len(names)} 0 {len(names)} 0 {found}  \n"
