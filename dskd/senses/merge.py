"""`dskd senses merge`: merges sense dictionaries that were built with the same teacher on different corpora.

K-means clusters the rows of all dictionaries; a row's weight is the number of states that it represents. So this merges
centroids, not the states themselves, which no longer exist by then. To sample states over several corpora, name them
all in one config's `corpus.train`. Spans are composed again from the merged tokens.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from dskd.artifacts import kinds
from dskd.artifacts.building import Building, build_artifact
from dskd.artifacts.manifest import Manifest, Recipe, read_manifest, verify_files
from dskd.config import Config
from dskd.console import progress_bar, stage
from dskd.errors import UserError, listed
from dskd.lexicon.relations import lexicon_manifest
from dskd.models.files.folder import ModelFolder, find_teacher
from dskd.senses.assemble import assemble, write_part
from dskd.senses.cluster import CLUSTER_SETTINGS, TokenSenses, cluster, senses_per_token
from dskd.senses.csr import offsets_of
from dskd.senses.dictionary import FILE, VALUE_BYTES, SenseDictionary, read_dictionary, require_fitting
from dskd.senses.entries import load_entries
from dskd.senses.reservoir import TokenStates, split_tokens


def merge_dictionaries(config: Config, folders: Sequence[Path], output: Path) -> None:
    """Merges the dictionaries in `folders` and writes the result to `output`, the folder to name in `senses.path`.

    Raises:
        UserError: when a dictionary is missing or damaged, or was built with another teacher or tokenizer than the
            config's; when `folders` has fewer than two different folders, the dictionaries' `senses.key` differ, or
            `output` is one of them or holds something else.
    """
    if len({folder.resolve() for folder in folders}) < 2:
        raise UserError("--dictionary: name two or more different folders with sense dictionaries")
    if output.resolve() in {folder.resolve() for folder in folders}:
        raise UserError(f"--output: {output} is one of the dictionaries to merge; name another folder")
    if output.exists() and not _is_dictionary(output):
        raise UserError(f"--output: {output} exists and is not a sense dictionary; name another folder")
    teacher = find_teacher(config)
    opened = _open_all(folders, teacher)
    keys = {str(manifest.config.get("key")) for _, manifest in opened}
    if len(keys) > 1:
        raise UserError(
            f"these dictionaries cannot be merged: their values of senses.key are {' and '.join(sorted(keys))}, so "
            "their rows mean different things; build them again with one key"
        )
    settings = {
        key: value for key, value in config.senses.as_dict().items() if key in (*CLUSTER_SETTINGS, "surface_forms")
    }
    recipe = Recipe(
        kinds.SENSES.name,
        {"lexicon": lexicon_manifest(config).digest}
        | {f"merged {i}": manifest.digest for i, (_, manifest) in enumerate(opened)},
        settings | {"seed": config.seed, "key": keys.pop()},
        teacher=teacher.digest,
        tokenizer=teacher.tokenizer_digest,
    )
    with (
        stage("senses: several dictionaries to one", reads=list(folders), writes=output / FILE),
        build_artifact(output, recipe) as building,
    ):
        _merge(config, [dictionary for dictionary, _ in opened], building, teacher)


def _is_dictionary(folder: Path) -> bool:
    try:
        read_manifest(folder, kinds.SENSES.name)
    except UserError:
        return False
    return True


def _open_all(folders: Sequence[Path], teacher: ModelFolder) -> list[tuple[SenseDictionary, Manifest]]:
    hidden_size = teacher.load_config().hidden_size
    opened, problems = [], []
    for folder in folders:
        try:
            manifest = read_manifest(folder, kinds.SENSES.name)
            dictionary = read_dictionary(folder / FILE)
            require_fitting(dictionary, manifest, teacher, hidden_size)
            verify_files(folder, manifest)
            opened.append((dictionary, manifest))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(listed("these dictionaries cannot be merged", problems))
    return opened


def _merge(config: Config, dictionaries: Sequence[SenseDictionary], building: Building, teacher: ModelFolder) -> None:
    vocab_size, hidden_size = dictionaries[0].vocab_size, dictionaries[0].hidden_size
    entries, entry_counts = load_entries(config, teacher.tokenizer, vocab_size)
    numbers = torch.stack([dictionary.senses_per_token for dictionary in dictionaries]).sum(0)
    states_per_token = torch.stack([dictionary.states_per_token for dictionary in dictionaries]).sum(0)
    sizes = torch.minimum(senses_per_token(states_per_token, config.senses), numbers)
    # A fifth of the budget: reading and clustering copy the rows.
    rows_at_once = max(1, config.senses.memory_bytes // 5 // (VALUE_BYTES * hidden_size))

    def senses() -> Iterator[TokenSenses]:
        with progress_bar(total=vocab_size, label="k-means", unit="tokens") as bar:
            for start, stop in split_tokens(offsets_of(numbers), rows_at_once):
                states, weights = _read_tokens(dictionaries, start, stop)
                yield cluster(states, config.senses, config.seed, torch.device("cpu"), weights)
                bar.update(stop - start)

    part = building.folder / "part-0.safetensors"
    write_part(part, torch.arange(vocab_size), sizes, hidden_size, senses())
    assemble(building, [part], entries, entry_counts, k=config.senses.k)


def _read_tokens(dictionaries: Sequence[SenseDictionary], start: int, stop: int) -> tuple[TokenStates, torch.Tensor]:
    """Reads the rows of all dictionaries for the tokens from `start` up to, not including, `stop`. Returns them sorted
    by token, and the number of states that each row represents.
    """
    vectors, counts, owners = [], [], []
    for dictionary in dictionaries:
        rows = dictionary.rows_of(start, stop)
        vectors.append(dictionary.read(rows))
        counts.append(dictionary.counts[rows.start : rows.stop])
        owners.append(torch.arange(stop - start).repeat_interleave(dictionary.senses_per_token[start:stop]))
    owner = torch.cat(owners)
    order = owner.argsort(stable=True)
    offsets = offsets_of(torch.bincount(owner, minlength=stop - start))
    states = TokenStates(torch.arange(start, stop), offsets, torch.cat(vectors)[order])
    return states, torch.cat(counts)[order]
