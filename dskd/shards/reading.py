"""The teacher's states of the training text, kept while the sense dictionary's are gathered, for annotation to take.

Gathering runs the teacher over the text, and annotation, which needs the finished dictionary, would run it over the
same text again. If annotation will store states, a :class:`ReadingKeeper` writes those of gathering to the folder
`.reading.partial` of the work directory, in a file for each batch of each rank, and :class:`KeptReading` gives them to
annotation, which removes the folder. It is never published. If annotation cannot use it, the teacher runs again.

The name of a file is the number of its first sequence. It has `lengths` [B] int32, and each stored column [R, D]: the
states of its B sequences one after the other, as :func:`dskd.shards.storing_states.columns_of_states` returns them. R
is the sum of the lengths.
"""

import bisect
import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dskd.artifacts import kinds
from dskd.artifacts.building import LOCK_PATIENCE_S, Building, artifact_lock, remove_partial
from dskd.artifacts.disk_space import DISK_IS_FULL, nearest_existing, require_disk_space
from dskd.artifacts.files import remove_tree, replaced_file
from dskd.artifacts.lock import hold_lock, release_lock
from dskd.artifacts.manifest import Manifest, Recipe
from dskd.artifacts.tensor_file import create_tensors, is_whole, map_tensor
from dskd.config import Config
from dskd.console import say, warn
from dskd.corpus.sequences import TokenBatch
from dskd.distributed.collectives import on_main
from dskd.distributed.world import World, is_main_process
from dskd.errors import UserError, first_line
from dskd.models.files.folder import ModelFolder, find_teacher
from dskd.models.running.frozen import FrozenModel
from dskd.models.structure.trunk import HandOver
from dskd.senses.build import DictionaryInputs, build_senses
from dskd.shards.blocks import WritingThread
from dskd.shards.recipe import AnnotationInputs, open_inputs, stale_splits
from dskd.shards.schema import TEACHER_STATES, TRUNK_STATES, StoredStates
from dskd.shards.storing_states import (
    columns_of_states,
    plan_stored,
    require_space,
    require_unchanged_input,
    stored_bytes,
)
from dskd.shards.text_reader import TextRead

_FILE_DTYPES = {"bfloat16": "BF16", "float32": "F32"}  # safetensors' names


def reads_once(config: Config) -> bool:
    """Returns True if one run of the teacher over the training text can serve the dictionary and the shards.

    It cannot if annotation changes the text, reads logits, or uses a dictionary of other texts.
    """
    annotation = config.annotation
    more = annotation.continuation_tokens or annotation.teacher_top_n
    return TEACHER_STATES in annotation.store and not more and config.senses.path is None


def build_senses_and_keep_states(config: Config, world: World, *, force: bool = False) -> None:
    """Builds the sense dictionary, and keeps the states that annotation will need. All ranks must call this."""
    build_senses(config, world, force=force, keep_states=functools.partial(keep_states, config, force=force))
    # The new dictionary may equal the one that the shards were made with.
    on_main(lambda: remove_reading(config) if _shards_are_current(config) else None)


def remove_reading(config: Config) -> None:
    """Removes the kept states, unless another process uses them, and releases their lock."""
    path = config.path(kinds.READING.folder)
    remove_partial(path)
    release_lock(artifact_lock(path))


class ReadingKeeper:
    """The keeper of the states that one rank computes while gathering.

    A thread writes them while the teacher reads the next batch. If the disk becomes full, it removes the folder, and
    keeps nothing from then on.
    """

    def __init__(self, folder: Path, stored: StoredStates, trunk: HandOver | None, thread: WritingThread) -> None:
        self._folder = folder
        self._stored = stored
        self._trunk = trunk
        self._thread = thread
        self._has_ended = False

    def keep(self, batch: TokenBatch, first: int, hidden: torch.Tensor) -> None:
        """Keeps the last hidden states [B, T, D] of a batch, of which `first` is the number of the first sequence."""
        states: dict[str, Any] = {TEACHER_STATES: hidden}
        if self._trunk is not None:
            states[TRUNK_STATES] = self._trunk.take()
        if batch.num_tokens and not self._has_ended:
            self._thread.submit(self._write, first, columns_of_states(batch, states, self._stored.dtype))

    def flush(self) -> None:
        """Waits until everything kept so far is on disk."""
        self._thread.wait()

    def _write(self, first: int, columns: Mapping[str, list[np.ndarray]]) -> None:
        lengths = [len(rows) for rows in columns[TEACHER_STATES]]
        shape = sum(lengths), self._stored.hidden_size
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {"lengths": ("I32", (len(lengths),))}
        shapes |= dict.fromkeys(columns, (_FILE_DTYPES[self._stored.dtype], shape))
        try:
            with replaced_file(_file(self._folder, first)) as new, create_tensors(new, shapes) as maps:
                maps["lengths"][:] = lengths
                for name, rows in columns.items():
                    np.concatenate(rows, out=maps[name])
        except OSError as error:
            if error.errno in DISK_IS_FULL:
                warn(f"{self._folder}: {error.strerror}; removing the kept states: annotation runs the teacher again")
                remove_tree(self._folder)
            elif not isinstance(error, FileNotFoundError):  # otherwise another rank has removed the folder
                raise
            self._has_ended = True


@contextmanager
def keep_states(
    config: Config, teacher: FrozenModel, inputs: DictionaryInputs, done: int, world: World, *, force: bool
) -> Iterator[ReadingKeeper | None]:
    """Yields the keeper of a gathering's states, or None if they are of no use or cannot be kept.

    If a reading is needed and cannot be kept, prints why. If none is kept, removes what is there. All ranks must call
    this.

    Args:
        config: the experiment.
        teacher: the teacher, which must run over all sequences from `done` on during the block.
        inputs: the inputs of the dictionary.
        done: the number of sequences of which an interrupted gathering has sampled the states.
        world: the ranks.
        force: whether the dictionary is built even if it is up to date.
    """
    stored = None
    if on_main(lambda: reads_once(config) and not (force and _shards_are_current(config))):
        try:
            facts = on_main(lambda: asdict(_prepare(config, inputs, done)))
            stored = StoredStates(**facts | {"columns": tuple(facts["columns"])})
            if stored.trunk_depth:
                require_unchanged_input(teacher, world)
        except UserError as error:
            stored = None
            say(f"  keeps no states for annotation, which will run the teacher again: {first_line(error)}")
    if stored is None:
        on_main(lambda: remove_reading(config))
        yield None
        return
    building = _building(config, inputs.teacher, inputs.text, stored)
    say(f"  keeps {' and '.join(stored.columns)} in {building.folder}: annotation need not run the teacher again")
    trunk = HandOver(teacher.decoder.layers, stored.trunk_depth) if stored.trunk_depth else None
    try:
        with WritingThread() as thread:
            yield ReadingKeeper(building.folder, stored, trunk, thread)
    finally:
        if trunk is not None:
            trunk.close()
        building.release()


def _prepare(config: Config, inputs: DictionaryInputs, done: int) -> StoredStates:
    """Prepares the folder, on rank 0, which then holds its lock. Returns what to keep.

    Raises:
        UserError: if nothing can be kept; then it does not hold the lock.
    """
    stored = plan_stored(config, inputs.teacher)
    assert stored is not None, "checked by reads_once"
    building = _building(config, inputs.teacher, inputs.text, stored)
    building.resume_or_clear()
    with ExitStack() as if_it_fails:
        if_it_fails.callback(building.release)
        for left in building.folder.glob(".*.partial"):
            left.unlink()
        kept = sum(_kept(building.folder).values())
        if kept < done:
            raise UserError(
                f"{building.folder} has the states of {kept:,} sequences, and this gathering resumes after {done:,}"
            )
        size = stored_bytes(stored, inputs.sequences, 0)
        shards = config.path(kinds.SHARDS.folder, "train")
        require_disk_space(
            building.folder,
            size * (2 if _disk_of(shards) == _disk_of(building.folder) else 1),
            "the states that annotation.store names, once here and once in the shards",
            already_written=_size_of(building.folder),
        )
        if_it_fails.pop_all()
    return stored


class KeptReading:
    """The states that gathering has kept of the whole training text. Annotation reads them as it lets a teacher read.

    Reads the batches of :class:`dskd.shards.text_reader.TextReader` in any sizes, on any rank.
    """

    top_n = 0  # of the teacher's most probable tokens

    def __init__(
        self, building: Building, stored: StoredStates, files: Mapping[int, int], device: torch.device
    ) -> None:
        """Takes {first sequence of a file: number of its sequences}, in order and without gaps."""
        self._building = building
        self._stored = stored
        self._starts = list(files)
        self._device = device
        self._open = functools.lru_cache(maxsize=1)(self._map)  # batches come in order, so each file is opened once

    def read(self, batch: TokenBatch, first: int) -> TextRead:
        """Returns a batch with its states, 0 at positions that are not stored; `first` is its first sequence."""
        shape = (*batch.input_ids.shape, self._stored.hidden_size)
        dtype: torch.dtype = getattr(torch, self._stored.dtype)
        states = {name: torch.zeros(shape, dtype=dtype) for name in self._stored.columns}
        for row in range(len(batch.input_ids)):
            start = self._starts[bisect.bisect_right(self._starts, first + row) - 1]
            offsets, columns = self._open(start)
            begin, end = offsets[first + row - start : first + row - start + 2]
            for name, column in columns.items():
                states[name][row, : end - begin] = torch.from_numpy(np.array(column[begin:end])).view(dtype)
        return TextRead(batch, states[TEACHER_STATES].to(self._device), None, states.get(TRUNK_STATES), 0)

    def close(self) -> None:
        """Removes the folder, once the shards have the states. All ranks may call this; rank 0 does it."""
        if is_main_process():
            remove_tree(self._building.folder)
            self._building.release()

    def _map(self, start: int) -> tuple[list[int], dict[str, np.ndarray]]:
        file = _file(self._building.folder, start)
        offsets = [0, *np.cumsum(map_tensor(file, "lengths", "I32")).tolist()]
        dtype = _FILE_DTYPES[self._stored.dtype]
        return offsets, {name: map_tensor(file, name, dtype) for name in self._stored.columns}


def open_reading(
    config: Config, inputs: AnnotationInputs, shards: Building, device: torch.device
) -> KeptReading | None:
    """Returns the kept states if annotation can take them; otherwise removes them.

    Prints which of the two happens, and why. All ranks must call this; rank 0 then holds the folder's lock.

    Args:
        config: the experiment.
        inputs: the inputs of annotation, which stores states.
        shards: the shards of the training text, which are to be made.
        device: where annotation searches.
    """
    stored = inputs.stored
    assert stored is not None, "annotation stores no states"
    building = _building(config, inputs.teacher, inputs.text, stored)

    def examine() -> dict[str, Any]:
        problem = _why_unusable(config, building)
        sequences, files = inputs.sequences["train"], _kept(building.folder)
        if problem is None and sum(files.values()) < len(sequences):
            problem = f"{building.folder} has the states of {sum(files.values()):,} of {len(sequences):,} sequences"
        if problem is None and _is_in_the_way(building, shards, stored_bytes(stored, sequences, 0)):
            problem = f"the disk has no room for {building.folder} in addition to the shards"
        if problem is not None:
            remove_reading(config)
        return {"problem": problem, "files": [*files.items()]}

    examined = on_main(examine)
    if examined["problem"] is not None:
        say(f"  runs the teacher over the training text: {examined['problem']}")
        return None
    say(f"  takes the teacher's states from {building.folder}: the gathering of the dictionary's states kept them")
    return KeptReading(building, stored, dict(examined["files"]), device)


def _why_unusable(config: Config, building: Building) -> str | None:
    """Returns why annotation cannot read what is in the folder; otherwise None, and this process holds its lock."""
    folder = building.folder
    if not reads_once(config):
        return (
            "gathering keeps states only with teacher_states in annotation.store, and without "
            "annotation.continuation_tokens, annotation.teacher_top_n and senses.path"
        )
    if not folder.is_dir():
        return "the gathering of the dictionary's states kept none"
    try:
        hold_lock(artifact_lock(building.path), f"reads {folder}", wait_s=LOCK_PATIENCE_S)
    except UserError as error:
        return first_line(error)
    if not building.can_resume():
        return f"{folder} is of another teacher, text, precision or depth, or of another version of a package"
    return None


def _is_in_the_way(building: Building, shards: Building, size: int) -> bool:
    """Returns True if the disk has room for `size` bytes of states in the shards only without the kept ones."""
    if _disk_of(shards.folder) != _disk_of(building.folder) or _has_space(size, shards):
        return False
    return _has_space(size - _size_of(building.folder), shards)


def _has_space(size: int, shards: Building) -> bool:
    try:
        require_space(size, shards)
    except UserError:
        return False
    return True


def _building(config: Config, teacher: ModelFolder, text: Manifest, stored: StoredStates) -> Building:
    """Returns the folder under construction, which is never published, with what its content depends on."""
    recipe = Recipe(
        kinds.READING.name,
        {"sequences": text.digest},
        asdict(stored),
        teacher=teacher.digest,
        tokenizer=teacher.tokenizer_digest,
    )
    return Building(config.path(kinds.READING.folder), recipe)


def _shards_are_current(config: Config) -> bool:
    """Returns True if the shards of the training text are up to date with the dictionary that is here now."""
    try:
        return "train" not in stale_splits(config, open_inputs(config, find_teacher(config)))
    except UserError:  # such as a dictionary that is missing
        return False


def _kept(folder: Path) -> dict[int, int]:
    """Returns {first sequence of a file: number of its sequences}, in order, up to the first sequence without a file.

    If several files have a sequence, because batches had other sizes before an interruption, it is that of one file.
    """
    files: dict[int, int] = {}
    first = 0
    while is_whole(file := _file(folder, first)):
        files[first] = len(map_tensor(file, "lengths", "I32"))
        first += files[first]
    return files


def _file(folder: Path, first: int) -> Path:
    return folder / f"{first:012d}.safetensors"


def _size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _disk_of(path: Path) -> int:
    return nearest_existing(path).stat().st_dev
