"""Code for ranks that tests start without a program of `launcher/` (see forked_rank.py)."""

import argparse
import dataclasses
import functools
import importlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from forked_rank import run_as_rank
from safetensors.torch import load_file, save_file

import dskd.artifacts.building
import dskd.artifacts.manifest
import dskd.distributed.node_cache
import dskd.distributed.shared_memory
import dskd.shards.annotate
import dskd.shards.reading
from dskd.artifacts.hashing import hash_files
from dskd.cli.program import run, run_on_ranks
from dskd.config import Config
from dskd.config.reading import load_config
from dskd.corpus.sequences import open_sequences
from dskd.distributed.collectives import barrier, gather_json
from dskd.distributed.rendezvous import initialize
from dskd.distributed.world import LAUNCHER_VARIABLES, World
from dskd.models.files.folder import ModelFolder, find_teacher
from dskd.models.running.frozen import load_frozen
from dskd.shards.continuations import Continuer
from dskd.shards.text_reader import TextReader
from dskd.tracking import start_tracking
from dskd.tracking.client import load_mlflow
from dskd.training.data.packed_step import StepBatches, count_positions
from dskd.training.models.pair import ModelPair
from dskd.training.models.student import load_student
from dskd.training.models.teacher_source import TeacherSource
from dskd.training.models.width_map import width_of_map
from dskd.training.step import train_step
from dskd.training.width_fit import set_width_map


def _die_in_hashing(folder: Path, only: object = None, **options: object) -> dict:
    """Replaces the hashing of a new artifact by a kill; files that are only compared are hashed as usual."""
    if only is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return hash_files(folder, only, **options)


def build(stage: str, config: Path, environment: dict[str, str], log: Path, *, dies_in_hashing: bool = False) -> None:
    """Builds senses or shards; with `dies_in_hashing`, the process is killed while it publishes."""

    def run() -> None:
        if dies_in_hashing:
            dskd.artifacts.building.hash_files = _die_in_hashing
        loaded = load_config(config)
        world = initialize(60)
        if stage == "senses":
            dskd.shards.reading.build_senses_and_keep_states(loaded, world)
        else:
            dskd.shards.annotate.annotate(loaded, world)
        os._exit(0)  # as the programs do: gloo's threads can abort an interpreter that shuts down

    run_as_rank(run, environment, log)


def head_gradients(folders: Sequence[Path], environment: dict[str, str], log: Path) -> None:
    """Runs :func:`_head_gradients` for each folder."""

    def run() -> None:
        world = initialize(60)
        for folder in folders:
            _head_gradients(folder, world)
        os._exit(0)

    run_as_rank(run, environment, log)


def _head_gradients(folder: Path, world: World) -> None:
    """Runs one step of the student in `FOLDER/student` with a trained head in two micro-batches per rank.

    Rank 0 writes gradients and loss to `gradients.safetensors`. `loss.json` has the divergence and the form of the
    sense loss. Rank r's micro-batch m is row 2 r + m of the tokens and masks in `batch.safetensors`. If the student has
    another width than the teacher, `width_map.safetensors` has the map between their states.
    """
    from deepspeed.utils import safe_get_full_grad

    divergence, form = json.loads((folder / "loss.json").read_text())
    batch = load_file(folder / "batch.safetensors")
    distribution = form == "distribution"

    def senses_of(row: int) -> dict[str, torch.Tensor]:
        """Returns the senses of position 0 and, in all but the last row, of position 1."""
        both = 1 + (row < 3)
        if distribution:
            index = torch.tensor([[0, 1], [1, -1]])[:both]
            return {
                "positions": torch.arange(both),
                "candidate_rows": index,
                "random_rows": torch.tensor([2]),
            }
        return {
            "relation_positions": torch.tensor([0]),
            "synonym_rows": torch.tensor([[0, -1]]),
            "antonym_rows": torch.tensor([[1, -1]]),
            "own_positions": torch.arange(1, both),
            "own_rows": torch.full((both - 1, 1), 2),
        }

    of_form = {"sense_form": form, "sense_temperature": 0.2, "lexical_weight": 1.7} if distribution else {}
    config = Config(
        workdir=str(folder),
        precision="fp32",
        teacher={"path": str(folder / "teacher")},
        corpus={"packing": "stream"},
        student={"train_layers": 1, "train_lm_head": True, "shared_trunk": "off"},
        loss={"hidden_weight": 0.3, "sense_weight": 0.8, "divergence": divergence, **of_form},
        train={"global_batch_size": 4, "micro_batch_size": 1, "loss_chunk_size": 5},
    )
    student = ModelFolder(folder / "student", "")
    teacher = find_teacher(config)
    width = width_of_map(config.loss, student, teacher)
    engine = load_student(student, config, world, teacher=teacher, margin=1.3, accumulation_steps=2, mapped_width=width)
    if width is not None:
        set_width_map(engine, load_file(folder / "width_map.safetensors")["weight"], world)
    pair = ModelPair(load_frozen(teacher, config, world, with_head=False), engine, TeacherSource("loaded"))
    rows = range(2 * world.rank, 2 * world.rank + 2)
    micro_batches = [
        {
            "input_ids": batch["input_ids"][row][None],
            "labels": batch["input_ids"][row][None].roll(-1, 1),
            "loss_mask": batch["loss_mask"][row][None].bool(),
            "senses": {"sense_rows": batch["rows"], **senses_of(row)},
            **({"lexical": batch["input_ids"][row][None] % 2 == 0} if distribution else {}),
        }
        for row in rows
    ]
    step = StepBatches(micro_batches, count_positions(micro_batches))
    gradients = {}

    def keep_gradients() -> None:
        for name, parameter in engine.module.named_parameters():
            if parameter.requires_grad:
                gradients[engine.module.hub_names.get(name, name)] = safe_get_full_grad(parameter).clone()
        step_engine()

    step_engine, engine.step = engine.step, lambda: keep_gradients()
    result = train_step(pair, step, config.loss, world, step=1)
    if world.is_main:
        save_file(gradients | {"loss": torch.tensor(result.loss)}, folder / "gradients.safetensors")
    engine.destroy()
    pair.teacher.close()


def held_by_ranks(folder: Path, environment: dict[str, str], log: Path) -> None:
    """Measures what each rank holds of a frozen model and computes with it; rank 0 writes `held.json`."""

    def run() -> None:
        world = initialize(60)
        config = Config(workdir=str(folder), teacher={"path": str(folder / "teacher")}, precision="fp32")
        teacher = load_frozen(find_teacher(config), config, world)
        ids = torch.arange(24).view(2, 12) + world.rank
        hidden, logits = teacher.read(ids, None, lambda hidden, head: (hidden, head.logits(hidden)))
        parameters = list(teacher.engine.module.parameters())
        held = {
            "held": sum(parameter.ds_tensor.numel() for parameter in parameters),
            "all": sum(p.ds_numel for p in parameters),
            "gathered": sum(p.numel() for p in parameters if p.ds_numel > 10 * 32),
            "devices": sorted({str(p.ds_tensor.device) for p in parameters}),
            "sum": float(hidden.double().sum()),
            "logits": float(logits.double().abs().sum()),
        }
        of_all_ranks = gather_json(held)
        if world.is_main:
            (folder / "held.json").write_text(json.dumps(of_all_ranks))
        os._exit(0)

    run_as_rank(run, environment, log)


def begin_tracking(config: Path, run: str, at: float, environment: dict[str, str], log: Path) -> None:
    """Starts to track a run at the time `at` (`time.time()`), and finishes it."""

    def run_it() -> None:
        loaded = load_config(config, [f"run={run}"])
        load_mlflow()
        time.sleep(max(0.0, at - time.time()))
        start_tracking(loaded, initialize(60), tags={}).finish("FINISHED")
        os._exit(0)

    run_as_rank(run_it, environment, log)


def name_segments_on_nodes(
    folder: Path, hosts: Sequence[str], jobs: int, environment: dict[str, str], log: Path
) -> None:
    """Chooses names of shared memory on a simulated node per rank, at the same time as other jobs.

    A folder replaces the node's shared memory. Fails if another job on the same node chooses names at the same moment.
    """

    def run() -> None:
        host = hosts[int(environment["RANK"])]
        socket.gethostname = lambda: host
        world = dataclasses.replace(initialize(60), local_rank=0)
        dskd.distributed.shared_memory.FOLDER = folder / host
        (folder / f"ready-{os.getpid()}").touch()
        while len(list(folder.glob("ready-*"))) < jobs * len(hosts):
            time.sleep(0.01)
        time.sleep(0.5 * world.rank)  # the first rank of every job comes before the others
        with dskd.distributed.node_cache.streaming_names(folder / f"cache-{os.getpid()}", world):
            mark = folder / host / "chosen"
            mark.touch(exist_ok=False)
            time.sleep(0.5)
            mark.unlink()
            barrier()
        print(f"alone on {host}", flush=True)
        os._exit(0)

    run_as_rank(run, environment, log)


def act_on_nodes(
    action: Callable[[Config, World], object],
    configs: list[Path],
    environment: dict[str, str],
    log: Path,
    *,
    hosts: Sequence[str] = (),
) -> None:
    """Runs `preflight` or `train` as a program does. Each rank has its own config and, with `hosts`, host name."""

    def run() -> None:
        rank = int(environment["RANK"])
        if hosts:
            socket.gethostname = lambda: hosts[rank]
        run_on_ranks(argparse.Namespace(config=configs[rank], overrides=[]), action)

    run_as_rank(run, environment, log)


def join_as_launched(
    without: Sequence[str],
    environment: dict[str, str],
    log: Path,
    *,
    hosts: Sequence[str] | None = None,
    port: int | None = None,
) -> None:
    """Joins the ranks without some of the launcher's variables, and prints [rank, local rank, number of local ranks].

    `hosts` and `port` replace the host names and the port.
    """

    def join() -> None:
        rank = int(environment["RANK"])
        for name in (*without, "LOCAL_WORLD_SIZE"):  # the test's own process may have set this one
            os.environ.pop(name, None)
        if hosts is not None:
            socket.gethostname = lambda: hosts[rank]
        if port is not None:
            os.environ["MASTER_PORT"] = str(port)

        def joined() -> None:
            world = initialize(30)
            barrier()  # rank 0 has the store by which the others join: it must not end before they have joined
            print(json.dumps([world.rank, world.local_rank, int(os.environ["LOCAL_WORLD_SIZE"])]), flush=True)

        os._exit(run(joined))

    run_as_rank(join, environment, log)


def experts_by_ranks(
    folder: Path, names: Sequence[str], lengths: Sequence[Sequence[int]], environment: dict[str, str], log: Path
) -> None:
    """Runs :func:`_examine_experts` for the model in `FOLDER/NAME` of each name.

    `lengths` has, for each time that a model is run, the numbers of tokens of the ranks.
    """

    def run() -> None:
        world = initialize(60)
        for name in names:
            _examine_experts(folder / name, [of_ranks[world.rank] for of_ranks in lengths], world)
        os._exit(0)

    run_as_rank(run, environment, log)


def _examine_experts(folder: Path, lengths: Sequence[int], world: World) -> None:
    """Computes states of the frozen mixture of experts in `FOLDER/teacher`, and gradients of a trained one.

    Each rank has other tokens: `lengths[N]` of them in run N. Rank r writes its states to `states-N-r.safetensors`.
    Rank 0 writes the gradients of the mean of all ranks' squared states to `gradients-N.safetensors`;
    :func:`dskd.models.structure.causal_lm.build_sharded` builds the trained model.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    from dskd.models.running.frozen import Decoder
    from dskd.models.structure.base_model import base_model
    from dskd.models.structure.causal_lm import build_sharded, engine_settings

    config = Config(
        workdir=str(folder),
        teacher={"path": str(folder / "teacher")},
        precision="fp32",
        corpus={"packing": "stream", "sequence_length": 32},
    )
    model_folder = find_teacher(config)
    tokens = [(torch.arange(length)[None] * 7 + 3 + 31 * world.rank) % 120 for length in lengths]
    teacher = load_frozen(model_folder, config, world, with_head=False)
    for number, ids in enumerate(tokens):
        save_file({"states": teacher.hidden_states(ids)}, folder / f"states-{number}-{world.rank}.safetensors")
    teacher.close()
    settings = engine_settings(torch.float32, world, 32, micro_batch_size=1)
    settings["zero_allow_untested_optimizer"] = True
    decoder = Decoder(base_model(build_sharded(model_folder, settings, torch.float32, world)))
    trained = [parameter for name, parameter in decoder.named_parameters() if "layers.3." in name]
    for parameter in decoder.parameters():
        parameter.requires_grad_(any(parameter is one for one in trained))
    # A rate of 0, so that every run begins with the same parameters.
    engine, *_ = deepspeed.initialize(model=decoder, optimizer=torch.optim.AdamW(trained, lr=0.0), config=settings)
    for number, ids in enumerate(tokens):
        engine.backward(engine(ids).square().sum())
        gradients = {
            name.removeprefix("base."): safe_get_full_grad(parameter).clone()
            for name, parameter in decoder.named_parameters()
            if parameter.requires_grad
        }
        engine.step()
        if world.is_main:
            save_file(gradients, folder / f"gradients-{number}.safetensors")
    engine.destroy()


def continuations_by_ranks(folder: Path, config: Config, environment: dict[str, str], log: Path) -> None:
    """Reads the 8 sequences in `FOLDER/sequences.safetensors` with continuations, on two ranks.

    Rank 0 writes `rows.json`: {row: [token ids, the teacher's top tokens at each target]}. The second rank has one
    batch less than the first, so it runs one without targets.
    """

    def run() -> None:
        world = initialize(60)
        sequences = open_sequences(folder / "sequences.safetensors")
        teacher = load_frozen(find_teacher(config), config, world)
        reader = TextReader(teacher, Continuer(teacher, 6, seed=3), 5, 16)
        rows = {}
        for first, stop in [(0, 3), (6, 8)] if world.is_main else [(3, 6)]:
            read = reader.read(sequences.batch(first, stop), first)
            tops = read.top.token_ids.split(read.batch.has_target.sum(dim=1).tolist())
            for row, top in enumerate(tops):
                rows[first + row] = [read.batch.input_ids[row].tolist(), top.tolist()]
        if not world.is_main:
            reader.read(sequences.batch(0, 1).without_targets(), 0)
        first_rows, other_rows = gather_json(rows)
        if world.is_main:
            (folder / "rows.json").write_text(json.dumps({**first_rows, **other_rows}))
        os._exit(0)

    run_as_rank(run, environment, log)


def run_harness(asked: Sequence[tuple[Path, Sequence[str]]], environment: dict[str, str], log: Path) -> None:
    """Runs `lm_eval` in each of the folders with the arguments next to it, in a process that is not a rank of a job."""

    def run() -> None:
        for name in environment.keys() & {*LAUNCHER_VARIABLES, "MASTER_ADDR", "MASTER_PORT"}:
            os.environ.pop(name)
        os.environ |= {"HF_DATASETS_CACHE": str(asked[0][0] / "datasets"), "TOKENIZERS_PARALLELISM": "false"}
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.tasks import TaskManager

        # It would read the definitions of its own tasks too, of which there are thousands, each time that it runs.
        TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_defaults=False)
        for folder, arguments in asked:
            os.chdir(folder)
            sys.argv = ["lm_eval", *arguments]
            cli_evaluate()
        os._exit(0)

    run_as_rank(run, environment, log)


def run_main(module: str, arguments: Sequence[str], environment: dict[str, str], log: Path) -> None:
    """Runs a module that has a function `main`: a benchmark, or an examination."""
    run_as_rank(lambda: importlib.import_module(module).main(arguments), environment, log)
