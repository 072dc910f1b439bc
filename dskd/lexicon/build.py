"""The stage `dskd lexicon`: builds `WORKDIR/lexicon` from lexical resources.

`relations.parquet` holds the relations. With MorphoLEX, `flips.parquet` holds every pair whose relation negation
changed, and `bases.parquet` the words that were replaced by their bases.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dskd.artifacts import kinds
from dskd.artifacts.building import build_artifact
from dskd.artifacts.hashing import fingerprint, sha256_of_file
from dskd.artifacts.manifest import Recipe
from dskd.config import Config, LexiconConfig
from dskd.console import say, stage
from dskd.errors import UserError, listed
from dskd.lexicon.dict2vec import read_dict2vec
from dskd.lexicon.languages import find_language
from dskd.lexicon.morpholex import read_morpholex
from dskd.lexicon.negation import BASES_FILE, FLIPS_FILE, find_negation
from dskd.lexicon.reading import Report
from dskd.lexicon.relations import FILE, Pairs, Relation, count_pairs, write_relations
from dskd.lexicon.tsv import read_tsv
from dskd.lexicon.wiktionary import read_wiktionary
from dskd.lexicon.wordnet import WordNet, open_wordnet
from dskd.lexicon.wordnet_relations import ENGLISH, read_indirect_antonyms, read_other_language, read_wordnet

# {config key: the kind of file it names}, for messages.
_FILES = {
    "wiktionary": "a file of Wiktextract, .jsonl or .jsonl.gz",
    "dict2vec": "a file with two words a line",
    "tsv": "a file with lines head<TAB>synonym|antonym<TAB>tail",
    "morpholex": "the workbook of MorphoLEX, .xlsx",
}


def recipe(config: Config) -> Recipe:
    """Returns the recipe of the lexicon: every input and setting that affects its content.

    The user's own lists are identified by content, the large files by size and modification time. Raises a UserError
    that lists all missing files.
    """
    lexicon = config.lexicon
    inputs = {}
    for key, path in _files(lexicon):
        inputs[f"{key}:{path}"] = sha256_of_file(path) if key == "tsv" else fingerprint(path)
    if lexicon.wordnet:
        inputs["wordnet"] = _open_wordnet(lexicon, config.wordnet.path).digest
        for code in lexicon.languages:
            if code != ENGLISH:
                inputs[f"wordnet:{code}"] = hashlib.sha256(find_language(code)[1]).hexdigest()
    return Recipe(kinds.LEXICON.name, inputs, lexicon.as_dict())


def build_lexicon(config: Config) -> None:
    """Reads the configured sources and writes `WORKDIR/lexicon`."""
    target = config.path(kinds.LEXICON.folder)
    wordnet = [f"WordNet ({', '.join(config.lexicon.languages)})"] if config.lexicon.wordnet else []
    sources = [*wordnet, *(str(path) for _, path in _files(config.lexicon))]
    with stage("lexicon: words to synonyms and antonyms", reads=sources, writes=target / FILE):
        with build_artifact(target, recipe(config)) as building:
            report = Report()
            # Read MorphoLEX first, because it is quick: its errors should not appear only after an hour of Wiktionary.
            name = config.lexicon.morpholex
            morpholex = read_morpholex(Path(name).expanduser(), report) if name else None
            pairs = Pairs(read_sources(config.lexicon, config.wordnet.path, report), report.dropped)
            if morpholex is not None:
                words = pairs.words()
                negation = find_negation(morpholex.words, words, config.lexicon.negating_affixes)
                pairs = Pairs(negation.apply(pairs), report.dropped)
                negation.write(building.folder)
                building.facts["negation"] = {
                    "morpholex_words": len(morpholex.words),
                    "morpholex_repeated": morpholex.repeated,
                    **negation.facts(),
                }
            relations = pairs.resolved()
            if not relations:
                raise UserError(f"the sources of the lexicon ({', '.join(sources)}) contain no pair of words")
            if morpholex is not None:
                heads = {relation.head for relation in relations}
                building.facts["negation"] |= {"words_before": len(words), "words_gone": len(words - heads)}
            write_relations(building.folder / FILE, relations)
            by_relation, by_source = count_pairs(relations)
            building.facts.update(
                pairs=by_relation, pairs_by_source=by_source, dropped=dict(report.dropped), malformed=report.facts()
            )
        _report_facts(building.facts)


def read_sources(config: LexiconConfig, wordnet_path: str | None, report: Report) -> Iterator[Relation]:
    """Yields the relations of all sources, one source after the other, unchanged.

    The order is: own lists, WordNet, then Wiktionary and Dict2Vec.
    """
    files = _files(config)
    own = [path for key, path in files if key == "tsv"]
    for path in own:
        yield from read_tsv(path, _list_name(path, own), report)
    if config.wordnet:
        wordnet = _open_wordnet(config, wordnet_path)
        # Read other languages first, so that a WordNet that does not fit them is reported at once.
        for code in sorted(set(config.languages), key=lambda code: (code == ENGLISH, code)):
            yield from read_wordnet(wordnet) if code == ENGLISH else read_other_language(wordnet, code, report)
        if config.indirect_antonyms:
            yield from read_indirect_antonyms(wordnet)
    for key, path in files:
        if key == "wiktionary":
            yield from read_wiktionary(path, config.wiktionary_language, report)
        elif key == "dict2vec":
            yield from read_dict2vec(path, report)


def _open_wordnet(config: LexiconConfig, path: str | None) -> WordNet:
    return open_wordnet(path, other_languages=any(code != ENGLISH for code in config.languages))


def _list_name(path: Path, own: list[Path]) -> str:
    """Returns the source name of an own list: its file name, or its whole path if another source may have that name."""
    is_taken = path.name.startswith("wordnet") or path.name in ("wiktionary", "dict2vec")
    return str(path) if is_taken or [other.name for other in own].count(path.name) > 1 else path.name


def _files(config: LexiconConfig) -> list[tuple[str, Path]]:
    """Returns (config key, path) for every file that the config names, each once. Raises a UserError that lists all
    files which cannot be read.
    """
    named = {key: getattr(config, key) for key in _FILES}
    files = [
        (key, Path(name).expanduser())
        for key, names in named.items()
        for name in ((names,) if isinstance(names, str) else names or ())
    ]
    problems = [
        f"lexicon.{key}: {path} is not a file that can be read; name {_FILES[key]}"
        for key, path in files
        if not path.is_file() or not os.access(path, os.R_OK)
    ]
    if problems:
        raise UserError(listed("files of the lexicon are missing", problems))
    return list({(key, path.resolve()): (key, path) for key, path in files}.values())


def _report_facts(facts: dict[str, Any]) -> None:
    pairs, dropped = facts["pairs"], facts["dropped"]
    say(f"  {pairs['synonym']:,} synonym and {pairs['antonym']:,} antonym pairs, both directions counted")
    for source, counts in facts["pairs_by_source"].items():
        say(f"    {source}: {counts['synonym']:,} and {counts['antonym']:,}")
    say("  dropped " + ", ".join(f"{number:,} {why}" for why, number in dropped.items()))
    if "negation" in facts:
        negation = facts["negation"]
        affixes = ", ".join(f"{affix} {count:,}" for affix, count in negation["bases_by_affix"].items())
        say(
            f"  negation: {negation['flips']:,} pairs changed their relation ({FLIPS_FILE}), both directions counted, "
            f"and {negation['bases']:,} words were replaced by their bases ({BASES_FILE}; by affix: "
            f"{affixes or 'none'})"
        )
        say(
            f"  {negation['words_gone']:,} of the {negation['words_before']:,} words of the sources have no relation "
            "left, mostly because their bases replace them"
        )
