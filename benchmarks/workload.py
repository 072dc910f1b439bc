"""A work directory with random weights and text, and our training step on it.

No other benchmark module knows the internal structure of training. `launcher/train.py` could train from the
directory: it has teacher, student, sense dictionary and annotated shards with their manifests, and the config as
`config.yaml`. Loading, data loader, engines and step are those of training; tracker and checkpoints are left out.
"""

import argparse
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from benchmarks.flops import Shape
from benchmarks.report import build_parser, default_device
from benchmarks.synthetic import draw_annotation, draw_tokens, write_dictionary, write_teacher
from dskd import shards
from dskd.artifacts import kinds
from dskd.artifacts.building import build_artifact
from dskd.artifacts.manifest import Recipe
from dskd.config import Config, LossConfig
from dskd.config.reading import load_config
from dskd.corpus.sequences import TokenBatch
from dskd.distributed.node_cache import open_node_cache
from dskd.distributed.rendezvous import initialize
from dskd.distributed.world import World, uses_gpu
from dskd.losses.head import DistillationHead, HeadSizes, Normalizers
from dskd.models.files.folder import ModelFolder, find_teacher
from dskd.models.running.frozen import load_frozen
from dskd.models.structure.trained import trained_layers
from dskd.models.structure.trunk import HandOver
from dskd.senses.dictionary import FILE as DICTIONARY_FILE
from dskd.shards.schema import LARGEST_SHARD, TEACHER_STATES, TRUNK_STATES, StoredStates
from dskd.shards.storing_states import columns_of_states, plan_stored
from dskd.shards.writing import write_block
from dskd.students.student import build_student
from dskd.training.data.loader import load_steps
from dskd.training.data.packed_step import StepBatches
from dskd.training.freed_memory import keep_freed_memory
from dskd.training.inputs import build_collator, load_inputs, load_sense_bank
from dskd.training.models.pair import load_pair
from dskd.training.schedule import plan_schedule
from dskd.training.step import StepResult, train_step

_SENSES_PER_TOKEN, _SYNONYMS, _KAPPA = 10, 8, 5
_TOKENS_FILE = "tokens.npy"


@dataclass(frozen=True)
class Preset:
    """The shape of the models, and the numbers of sequences in a step and in a micro-batch."""

    shape: Shape
    global_batch_size: int
    micro_batch_size: int


PRESETS = {
    # Only tries the benchmarks themselves: a step takes milliseconds.
    "tiny": Preset(Shape(512, 64, 128, 4, 2, 4, 3, 1, 64), global_batch_size=4, micro_batch_size=2),
    # A step takes about a second on two cores; the head's share of the FLOPs is the same as at 8B.
    "small": Preset(Shape(8192, 512, 1792, 8, 2, 8, 4, 2, 256), global_batch_size=8, micro_batch_size=4),
    # SmolLM2-135M to 15 layers: the smallest model whose vocabulary makes the head as large as its layers.
    "smollm2": Preset(Shape(49_152, 576, 1536, 9, 3, 30, 15, 2, 512), global_batch_size=4, micro_batch_size=2),
    # The same with all of the student's layers trained, as other systems do: teacher and student share no trunk.
    "smollm2-whole": Preset(Shape(49_152, 576, 1536, 9, 3, 30, 15, 15, 512), global_batch_size=4, micro_batch_size=2),
    # Llama-3-8B to 16 layers.
    "8b": Preset(Shape(128_256, 4096, 14_336, 32, 8, 32, 16, 2, 2048), global_batch_size=16, micro_batch_size=4),
}


def build_workload_parser(description: str | None) -> argparse.ArgumentParser:
    """Builds a parser with options for the preset, the work directory's folder and `section.key=value` overrides."""
    parser = build_parser(description)
    default = "8b" if uses_gpu() else "small"
    parser.add_argument(
        "--preset", choices=PRESETS, default=default, help="sizes; default: 8b on a GPU, otherwise small"
    )
    parser.add_argument(
        "--folder", type=Path, help="make the work directory in this folder and keep it; if there is one, use it"
    )
    parser.add_argument(
        "--states", action="store_true", help="the shards hold the teacher's states, which teacher.mode=cached reads"
    )
    parser.add_argument(
        "--sequence-length", type=int, metavar="TOKENS", help="of the shards' sequences; default: the preset's"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a key of the config")
    return parser


@contextmanager
def work_directory(args: argparse.Namespace) -> Iterator[Path]:
    """Yields the path of the config of a work directory of the preset's size, which is written if it does not exist.

    With `args.states`, its shards hold the teacher's states. The directory is removed afterwards, unless the user gave
    its folder.
    """
    with TemporaryDirectory(prefix="dskd-benchmark-") as temporary:
        preset, name = PRESETS[args.preset], f"{args.preset}-states" if args.states else args.preset
        if args.sequence_length is not None:
            name = f"{name}-{args.sequence_length}"
            preset = replace(preset, shape=replace(preset.shape, sequence_length=args.sequence_length))
        folder = args.folder / name if args.folder is not None else Path(temporary)
        if not (folder / "config.yaml").is_file():
            write_work_directory(folder, preset, states=args.states)
        yield folder / "config.yaml"


def write_work_directory(folder: Path, preset: Preset, *, steps: int = 100, states: bool = False) -> None:
    """Writes everything that a training run of `steps` steps reads; `config.yaml` comes last.

    With `states`, the shards hold what training reads instead of running the teacher. They are then of a fifth of the
    steps, because they are large; training reads them again and again.
    """
    steps = max(1, steps // 5) if states else steps
    shape = preset.shape
    settings = {
        "workdir": str(folder.resolve()),
        "teacher": {"path": str(folder.resolve() / "llama"), "mode": "resident", "offload": "none"},
        "corpus": {"packing": "stream", "sequence_length": shape.sequence_length},
        "annotation": {"kappa": _KAPPA, "store": _columns(shape) if states else []},
        "student": {
            "layers": shape.student_layers,
            "spacing": "first",
            "train_layers": shape.trained_layers,
        },
        "train": {
            "steps": 10_000,
            "global_batch_size": preset.global_batch_size,
            "micro_batch_size": preset.micro_batch_size,
            "num_workers": 1,
        },
        "tracking": {"enabled": False},
    }
    folder.mkdir(parents=True, exist_ok=True)
    # The config gets its final name at the end, so that an interrupted directory does not count as complete.
    written = folder / ".config.yaml"
    written.write_text(yaml.safe_dump(settings), encoding="utf-8")
    config = load_config(written)
    write_teacher(folder / "llama", shape, default_device())
    teacher = find_teacher(config)
    identity = {"teacher": teacher.digest, "tokenizer": teacher.tokenizer_digest}
    with build_artifact(config.path(kinds.SENSES.folder), Recipe("senses", **identity)) as building:
        dictionary = write_dictionary(
            building.folder / DICTIONARY_FILE,
            shape.vocab_size,
            shape.hidden_size,
            k=_SENSES_PER_TOKEN,
            synonyms=_SYNONYMS,
        )
    # Shards of random tokens: every position but the last has a target, and each sequence is one document.
    tokens = draw_tokens(steps * preset.global_batch_size, shape.sequence_length, shape.vocab_size)
    with build_artifact(config.path(kinds.SHARDS.folder, "train"), Recipe("shards", **identity)) as building:
        mask, starts = np.ones(tokens.shape, np.uint8), np.zeros(tokens.shape, np.uint8)
        mask[:, -1], starts[:, 0] = 0, 1
        annotation = draw_annotation(tokens, dictionary, _KAPPA)
        columns = {"input_ids": tokens, "loss_mask": mask, "document_starts": starts, **annotation}
        samples = ({name: column[i] for name, column in columns.items()} for i in range(len(tokens)))
        if stored := plan_stored(config, teacher):
            samples = _with_states(samples, config, teacher, stored, preset.micro_batch_size)
            building.facts["stored"] = asdict(stored)
            size = preset.global_batch_size * shape.sequence_length * shape.hidden_size * 8  # of both columns, at most
            write_block(
                building.folder,
                samples,
                shards.columns_of(teacher_top_n=0, stored=stored),
                compression=None,
                most_bytes=min(size + 2**20, LARGEST_SHARD),
            )
        else:
            write_block(building.folder, samples)
        building.facts.update(samples=len(tokens), targets=int(mask.sum()), coverage={}, teacher_antonym_distance=2.0)
    np.save(config.path(_TOKENS_FILE), tokens)
    build_student(config)
    written.rename(folder / "config.yaml")


def _columns(shape: Shape) -> list[str]:
    """Returns the columns of states that a student of this shape can read."""
    return [TEACHER_STATES, TRUNK_STATES] if shape.trained_layers < shape.student_layers else [TEACHER_STATES]


def _with_states(
    samples: Iterator[dict[str, Any]], config: Config, folder: ModelFolder, stored: StoredStates, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Yields the samples with the teacher's states, computed in batches of `batch_size`."""
    world = initialize()
    teacher = load_frozen(folder, config, world, with_head=False)
    trunk = HandOver(teacher.decoder.layers, stored.trunk_depth) if stored.trunk_depth else None
    while batch := list(itertools.islice(samples, batch_size)):
        tokens, mask, starts = (
            torch.from_numpy(np.stack([sample[name] for sample in batch]))
            for name in ("input_ids", "loss_mask", "document_starts")
        )
        hidden = teacher.hidden_states(tokens.long())
        states = {TEACHER_STATES: hidden} | ({} if trunk is None else {TRUNK_STATES: trunk.take()})
        read = TokenBatch(tokens.long(), None, mask.bool(), starts, tokens.numel())
        columns = columns_of_states(read, states, stored.dtype)
        for index, sample in enumerate(batch):
            yield sample | {name: column[index] for name, column in columns.items()}
    teacher.close()


class OurTraining:
    """Our training step, set up as `launcher/train.py` does."""

    def __init__(self, config: Config, world: World, *, teacher: Any = None) -> None:
        """Loads everything; `teacher` is a loaded teacher that several trainings share, or None to load one.

        If training reads the teacher's states from the shards, `teacher` is ignored.
        """
        self.config, self._world = config, world
        inputs = load_inputs(config)
        schedule = plan_schedule(config, inputs.shards, world.world_size)
        self.pair = load_pair(
            config,
            world,
            inputs.teacher,
            inputs.student,
            margin=config.loss.margin,
            accumulation_steps=schedule.accumulation_steps,
            source=inputs.source,
            teacher=teacher if inputs.source.kind == "loaded" else None,
        )
        self.teacher, self.engine = self.pair.teacher, self.pair.engine
        collate = build_collator(config, inputs, schedule, self.pair.source)
        cache = open_node_cache(config.train.shard_cache, world)
        bank = load_sense_bank(config, inputs, world)
        self._batches = load_steps(config, schedule, collate, cache, world, start_step=0, sense_bank=bank)
        if world.device.type == "cpu":
            keep_freed_memory()
        self._step = 0
        self.waited_s = 0.0  # time spent waiting for data, over all steps
        self.last: StepResult | None = None

    @property
    def tokens_per_step(self) -> int:
        """Number of tokens that the models read in a step."""
        return self.config.train.global_batch_size * self.config.corpus.sequence_length

    def step(self) -> None:
        """Runs one optimizer step, from waiting for its data to the new weights."""
        started = time.perf_counter()
        batches = self.take_batches()
        self.waited_s += time.perf_counter() - started
        self._step += 1
        self.last = train_step(self.pair, batches, self.config.loss, self._world, step=self._step)

    def take_batches(self) -> StepBatches:
        """Returns the micro-batches of the next step, whose memory the loader uses again a few steps later."""
        return next(self._batches)

    def close_loader(self) -> None:
        """Ends the loader."""
        self._batches.close()

    def close(self, *, keep_teacher: bool = False) -> None:
        """Ends the loader and frees memory; with `keep_teacher`, the teacher stays loaded."""
        self.close_loader()
        self.pair.close(keep_teacher=keep_teacher)


def load_teacher(config: Config, world: World) -> Any:
    """Loads the frozen teacher as training does, with its output matrix, which other stages also read."""
    return load_frozen(find_teacher(config), config, world)


def teacher_tensors(teacher: Any) -> list[torch.Tensor]:
    """Returns the tensors of the teacher that this rank holds: parameters, shares of parameters, buffers."""
    module = getattr(teacher.engine, "module", teacher.engine)
    parameters = list(module.parameters())
    shares = [parameter.ds_tensor for parameter in parameters if hasattr(parameter, "ds_tensor")]
    return [*(parameter.data for parameter in parameters), *shares, *module.buffers()]


def build_loss(
    weight: nn.Parameter, teacher_weight: torch.Tensor | None, loss: LossConfig, device: torch.device, **options: Any
) -> Any:
    """Returns our head as a function of student states [N, D], teacher states [N, D], labels [N] and senses.

    Args:
        weight: the student's output matrix [V, D].
        teacher_weight: the teacher's output matrix [V, D], or None if it is the same.
        loss: weights of the terms.
        device: the tensors' device, which determines the chunk size.
        options: further keyword arguments of the head.
    """
    sizes = HeadSizes.of(None, weight.shape[0], device)
    head = DistillationHead(
        weight, teacher_weight, loss, **{"chunk_size": sizes.chunk, "block_size": sizes.block} | options
    )

    def run(
        hidden: torch.Tensor, teacher_hidden: torch.Tensor, labels: torch.Tensor, senses: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the mean loss, for the backward pass, and the sums of its terms (:data:`dskd.losses.terms.SUMS`)."""
        positions = 0 if senses is None else len(senses["relation_positions"]) + len(senses["own_positions"])
        return head(
            hidden[None],
            labels=labels[None],
            loss_mask=torch.ones_like(labels, dtype=torch.bool)[None],
            normalizers=Normalizers(targets=1 / len(labels), senses=1 / max(positions, 1)),
            teacher_hidden=teacher_hidden[None],
            senses=senses,
        )

    return run


def read_config(path: Path, overrides: Sequence[str], *more: str) -> Config:
    """Reads the config of a work directory and applies the overrides."""
    return load_config(path, [*overrides, *more])


def shape_of(config: Config) -> Shape:
    """Returns the shape that a config and its teacher describe."""
    model = find_teacher(config).load_config()
    student = config.student
    return Shape(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_heads=model.num_attention_heads,
        num_kv_heads=model.num_key_value_heads,
        teacher_layers=model.num_hidden_layers,
        student_layers=student.num_layers,
        trained_layers=len(trained_layers(student, student.num_layers)),
        sequence_length=config.corpus.sequence_length,
    )


def read_tokens(config: Config) -> np.ndarray:
    """Loads the token ids [S, T] int32 of the training shards, for training code that does not read our shards."""
    return np.load(config.path(_TOKENS_FILE))
