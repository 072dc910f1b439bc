"""The stage `launcher/build_senses.py`: builds `WORKDIR/senses` from lexicon, teacher and text.

The sampled states are kept in a separate folder until the dictionary is complete. An interrupted build resumes from
them. With `senses.keep_states`, so does a later build with other cluster settings.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from dskd.artifacts import kinds
from dskd.artifacts.building import Building, remove_partial
from dskd.artifacts.files import remove_tree
from dskd.artifacts.manifest import Manifest, Recipe, is_current
from dskd.config import Config
from dskd.console import progress_bar, say, stage
from dskd.corpus.sequences import Sequences, load_sequences
from dskd.distributed.collectives import barrier, main_first, on_main
from dskd.distributed.world import World
from dskd.lexicon.relations import lexicon_manifest
from dskd.models.files.folder import ModelFolder, find_teacher
from dskd.models.running.frozen import FrozenModel, load_frozen
from dskd.models.running.precision import resolve_precision
from dskd.senses.assemble import assemble, write_part
from dskd.senses.cluster import CLUSTER_SETTINGS, TokenSenses, cluster, senses_per_token
from dskd.senses.dictionary import FILE, load_fitting_dictionary
from dskd.senses.entries import Entries, load_entries
from dskd.senses.gather import GatheringProgress, StateKeeper, gather_states, read_progress
from dskd.senses.reservoir import SampledStates

# Settings of `senses` that affect the dictionary but not which states are sampled.
_NOT_SAMPLING = (*CLUSTER_SETTINGS, "surface_forms")
# Settings of `senses` that affect neither the sample nor the dictionary.
_NOT_IN_RECIPE = ("path", "batch_size", "memory_budget", "save_minutes", "keep_states")


@dataclass(frozen=True)
class DictionaryInputs:
    """The inputs from which a dictionary is built, checked to fit together."""

    teacher: ModelFolder
    lexicon: Manifest
    sequences: Sequences
    text: Manifest  # of the sequences


# Opens the keeper of the states that gathering computes, or None if it needs none. Its arguments: the teacher, the
# inputs, the number of sequences that an interrupted gathering has done, and the ranks, all of which call it.
KeepStates = Callable[[FrozenModel, DictionaryInputs, int, World], AbstractContextManager[StateKeeper | None]]


def open_inputs(config: Config, teacher: ModelFolder) -> DictionaryInputs:
    """Opens what a dictionary is built from. Raises a UserError when lexicon or sequences are missing, or the sequences
    were tokenized with another tokenizer.
    """
    return DictionaryInputs(
        teacher, lexicon_manifest(config), *load_sequences(config, "train", teacher.tokenizer_digest)
    )


def recipe(config: Config, inputs: DictionaryInputs) -> Recipe:
    """Returns the recipe of the dictionary: every input and setting that affects its content."""
    states = states_recipe(config, inputs)
    settings = {key: value for key, value in config.senses.as_dict().items() if key not in _NOT_IN_RECIPE}
    return Recipe(
        kinds.SENSES.name,
        {"lexicon": inputs.lexicon.digest, **states.inputs},
        {**states.config, **settings},
        teacher=states.teacher,
        tokenizer=states.tokenizer,
    )


def states_recipe(config: Config, inputs: DictionaryInputs) -> Recipe:
    """Returns the recipe of the sampled states: every input and setting that affects which states are sampled."""
    settings = config.senses.as_dict()
    for key in (*_NOT_SAMPLING, *_NOT_IN_RECIPE):
        del settings[key]
    return Recipe(
        kinds.STATES.name,
        {"sequences": inputs.text.digest},
        settings | {"seed": config.seed, "precision": resolve_precision(config.precision)},
        teacher=inputs.teacher.digest,
        tokenizer=inputs.teacher.tokenizer_digest,
    )


def build_senses(config: Config, world: World, *, force: bool = False, keep_states: KeepStates | None = None) -> None:
    """Gathers states on all ranks, clusters each token on the rank that owns it, and writes the dictionary on rank 0.

    Leaves a dictionary that is up to date unchanged, unless `force` is set; `force` also gathers the states again.
    `keep_states` opens what keeps the states of the whole text for another stage.
    """
    teacher = main_first(lambda: find_teacher(config))
    if config.senses.path is not None:
        main_first(lambda: load_fitting_dictionary(config, teacher))
        say(f"senses.path is set: using {config.senses.path}, building nothing")
        return
    inputs = main_first(lambda: open_inputs(config, teacher))
    target = config.path(kinds.SENSES.folder)
    building = Building(target, recipe(config, inputs))
    if not force and on_main(lambda: is_current(target, building.recipe)):
        say(f"up to date: {target}")
        if not config.senses.keep_states:
            on_main(lambda: remove_partial(config.path(kinds.STATES.folder)))
        return
    sources = [config.path(name) for name in ("lexicon", "sequences")]
    with stage("senses: teacher states to sense embeddings", reads=sources, writes=target / FILE):
        # Rank 0 builds the entries before gathering, which takes hours: the lexicon may be in another language than the
        # tokenizer's. Only rank 0 needs them.
        entries: list[tuple[Entries, dict[str, int]]] = []
        vocab_size = teacher.load_config().vocab_size
        on_main(lambda: entries.append(load_entries(config, teacher.tokenizer, vocab_size)))
        # Never published: the folder stays a partial one.
        states = Building(config.path(kinds.STATES.folder), states_recipe(config, inputs))
        on_main(lambda: _prepare(building, states, force=force))
        runs = _sample(config, inputs, states.folder, world, keep_states)

        _cluster_own_tokens(config, runs, building.folder / f"part-{world.rank}.safetensors", world)
        barrier()
        parts = [building.folder / f"part-{rank}.safetensors" for rank in range(world.world_size)]
        on_main(lambda: assemble(building, parts, *entries[0], k=config.senses.k))
        on_main(lambda: _finish(building, states, keep_states=config.senses.keep_states))


def _prepare(building: Building, states: Building, *, force: bool) -> None:
    building.clear()
    if force:
        states.clear()
    states.resume_or_clear()


def _finish(building: Building, states: Building, *, keep_states: bool) -> None:
    building.publish()
    if not keep_states:
        remove_tree(states.folder)
    states.release()


def _sample(
    config: Config, inputs: DictionaryInputs, folder: Path, world: World, keep_states: KeepStates | None
) -> list[Path]:
    """Returns the runs that hold the sample, and gathers them first if they are incomplete.

    Loads the teacher only when it has to gather.
    """
    progress = GatheringProgress(**on_main(lambda: asdict(read_progress(folder))))
    if progress.sequences_done == len(inputs.sequences):
        say(f"  uses the states in {folder}")
        return [folder / run for run in progress.runs]
    teacher = load_frozen(inputs.teacher, config, world, with_head=config.senses.key == "predicted")
    kept = nullcontext() if keep_states is None else keep_states(teacher, inputs, progress.sequences_done, world)
    with kept as keeper:
        runs = gather_states(teacher, inputs.sequences, config.senses, config.seed, world, folder, keeper)
    teacher.close()
    return runs


def _cluster_own_tokens(config: Config, runs: list[Path], path: Path, world: World) -> None:
    """Clusters the states of the tokens that this rank owns, and writes its part of the dictionary to `path`."""
    settings = config.senses
    sampled = SampledStates(runs, settings.max_states, share=(world.rank, world.world_size))

    def senses() -> Iterator[TokenSenses]:
        with progress_bar(total=len(sampled.tokens), label="k-means", unit="tokens") as bar:
            # A fifth of the budget: reading and clustering copy parts of the states, and the senses can need as much
            # memory as the states.
            for states in sampled.ranges(settings.memory_bytes // 5):
                yield cluster(states, settings, config.seed, world.device)
                bar.update(len(states.tokens))

    sizes = senses_per_token(sampled.counts, settings)
    write_part(path, sampled.tokens, sizes, sampled.hidden_size, senses())
