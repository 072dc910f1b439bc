"""The stage `launcher/build_senses.py`: builds `WORKDIR/senses` from lexicon, teacher and text.

The sampled states are kept in a separate folder until the dictionary is complete. An interrupted build resumes from
them. With `senses.keep_states`, so does a later build with other cluster settings.
"""

import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from dskd.artifacts import kinds
from dskd.artifacts.building import Building, remove_partial
from dskd.artifacts.manifest import Recipe, is_current, read_manifest
from dskd.config import Config
from dskd.console import progress_bar, say, stage
from dskd.corpus.sequences import Sequences, load_sequences
from dskd.distributed.collectives import barrier, main_first, on_main
from dskd.distributed.world import World
from dskd.models.folder import ModelFolder, find_teacher
from dskd.models.frozen import load_frozen
from dskd.models.precision import resolve_precision
from dskd.senses.assemble import assemble, write_part
from dskd.senses.cluster import TokenSenses, cluster, senses_per_token
from dskd.senses.dictionary import FILE, load_fitting_dictionary
from dskd.senses.entries import load_entries
from dskd.senses.gather import Progress, gather_states, read_progress
from dskd.senses.reservoir import SampledStates

# Settings of `senses` that do not affect which states are sampled.
_CLUSTERING = ("k", "states_per_sense", "restarts", "max_iterations", "surface_forms")
STATES = "states"  # never published: its folder stays a partial one
# Settings of `senses` that affect neither the sample nor the dictionary.
_NOT_IN_RECIPE = ("path", "batch_size", "memory_budget", "save_minutes", "keep_states")


def recipe(config: Config, teacher: ModelFolder) -> Recipe:
    """Returns the recipe of the dictionary: every input and setting that affects its content."""
    lexicon = read_manifest(config.path(kinds.LEXICON.folder), "lexicon")
    sampled = _sampling(config, teacher)
    settings = {key: value for key, value in config.senses.as_dict().items() if key not in _NOT_IN_RECIPE}
    return Recipe(
        "senses",
        {"lexicon": lexicon.digest, **sampled.inputs},
        {**sampled.config, **settings},
        teacher=sampled.teacher,
        tokenizer=sampled.tokenizer,
    )


def build_senses(config: Config, world: World, *, force: bool = False) -> None:
    """Gathers states on all ranks, clusters each token on the rank that owns it, and writes the dictionary on rank 0.

    Leaves a dictionary that is up to date unchanged, unless `force` is set; `force` also gathers the states again.
    """
    if config.senses.path is not None:
        main_first(lambda: load_fitting_dictionary(config, find_teacher(config)))
        say(f"senses.path: {config.senses.path} is used, nothing is built")
        return
    target = config.path(kinds.SENSES.folder)
    source = main_first(lambda: find_teacher(config))
    wanted = main_first(lambda: recipe(config, source))
    if not force and on_main(lambda: is_current(target, wanted)):
        say(f"up to date: {target}")
        if not config.senses.keep_states:
            on_main(lambda: remove_partial(config.path(STATES)))
        return
    sources = [config.path(name) for name in ("lexicon", "sequences")]
    with stage("senses: teacher states to sense embeddings", reads=sources, writes=target / FILE):
        sequences, _ = load_sequences(config, "train", source.tokenizer_digest)
        vocab_size = source.load_config().vocab_size
        # Check this before gathering, which takes hours: the lexicon may be in another language than the tokenizer's.
        on_main(lambda: _check_lexicon(config, source, vocab_size))
        building = Building(target, wanted)
        states = Building(config.path(STATES), main_first(lambda: _sampling(config, source)))
        on_main(lambda: _prepare(building, states, force=force))
        runs = _sample(config, source, sequences, states.folder, world)

        part = building.folder / f"part-{world.rank}.safetensors"
        _cluster_own(config, runs, part, world)
        barrier()
        parts = [building.folder / f"part-{rank}.safetensors" for rank in range(world.world_size)]
        on_main(lambda: assemble(config, building, parts, vocab_size, source.load_tokenizer()))
        on_main(lambda: _finish(building, states, keep_states=config.senses.keep_states))


def _check_lexicon(config: Config, source: ModelFolder, vocab_size: int) -> None:
    load_entries(config, source.load_tokenizer(), vocab_size)


def _sampling(config: Config, teacher: ModelFolder) -> Recipe:
    """Returns the recipe of the sampled states: every input and setting that affects which states are sampled."""
    _, sequences = load_sequences(config, "train", teacher.tokenizer_digest)
    settings = config.senses.as_dict()
    for key in (*_CLUSTERING, *_NOT_IN_RECIPE):
        del settings[key]
    return Recipe(
        "states",
        {"sequences": sequences.digest},
        settings | {"seed": config.seed, "precision": resolve_precision(config.precision)},
        teacher=teacher.digest,
        tokenizer=teacher.tokenizer_digest,
    )


def _prepare(building: Building, states: Building, *, force: bool) -> None:
    building.clear()
    if force:
        states.clear()
    states.resume_or_clear()


def _finish(building: Building, states: Building, *, keep_states: bool) -> None:
    building.publish()
    if not keep_states:
        shutil.rmtree(states.folder)
    states.release()


def _sample(config: Config, source: ModelFolder, sequences: Sequences, folder: Path, world: World) -> list[Path]:
    """Returns the runs that hold the sample, and gathers them first if they are incomplete.

    Loads the teacher only when it has to gather.
    """
    progress = Progress(**on_main(lambda: asdict(read_progress(folder))))
    if progress.sequences_done == len(sequences):
        say(f"  uses the states in {folder}")
        return [folder / run for run in progress.runs]
    teacher = load_frozen(source, config, world, with_head=config.senses.key == "predicted")
    runs = gather_states(teacher, sequences, config.senses, config.seed, world, folder)
    teacher.close()
    return runs


def _cluster_own(config: Config, runs: list[Path], path: Path, world: World) -> None:
    """Clusters the states of the tokens that this rank owns, and writes its part of the dictionary to `path`."""
    settings = config.senses
    sampled = SampledStates(runs, settings.max_states, share=(world.rank, world.world_size))

    def senses() -> Iterator[TokenSenses]:
        with progress_bar(total=len(sampled.tokens), label="k-means", unit="tokens") as bar:
            # A fifth of the budget: reading and clustering copy parts of the states, and the senses can need as much
            # memory as the states.
            for states in sampled.ranges(int(settings.memory_budget * 2**30) // 5):
                yield cluster(states, settings, config.seed, world.device)
                bar.update(len(states.tokens))

    sizes = senses_per_token(sampled.counts, settings)
    write_part(path, sampled.tokens, sizes, sampled.hidden_size, senses())
