"""Finds out what is supported for each architecture of the table by trying it: on one rank, and on two with different
tokens, it compares every number with transformers' own model. `make models` writes docs/models.md from the findings.

A numeric difference is a fault, which fails a test; a refusal is a finding, which the page shows.
"""

import contextlib
import io
import json
import os
import re
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from architectures import POSITIONS, VOCABULARY, save_architecture
from forked_rank import run_as_rank
from loaded_pairs import load_models
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from dskd.config import Config, CorpusConfig
from dskd.distributed.collectives import barrier, gather_json
from dskd.distributed.rendezvous import initialize
from dskd.distributed.world import World
from dskd.errors import UserError
from dskd.losses.head import Normalizers
from dskd.models.checks.architecture import check_architecture
from dskd.models.checks.probes import check_documents
from dskd.models.files.folder import ModelFolder, find_teacher
from dskd.models.running.frozen import load_frozen
from dskd.models.structure.base_model import base_model
from dskd.models.structure.final_norm import final_norm_names
from dskd.models.structure.layers import layers_of
from dskd.students.student import build_student, find_student
from dskd.training.exporting.rehearsal import rehearse_export
from dskd.training.models.pair import load_pair
from dskd.training.models.teacher_source import TeacherSource

LENGTH = 80  # longer than windows and chunks, and than the positions for which rotary factors change
DOCUMENTS = 16  # short enough that packed documents reach neither chunks nor positions with other rotary factors
LONG = 4 * POSITIONS
CUT, LOWEST = (0, 1, 3), (0, 1)
LIMITS = ("stream limit", "documents limit")
# Relative to the largest state. In bf16, kernels may add in another order.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
_LOSS_TOLERANCE = 0.05  # of a step in bf16, relative to fp32
Finding = dict[str, Any]


def examine(names: Sequence[str], folder: Path, thorough: bool, environment: dict[str, str], log: Path) -> None:
    """Examines architectures as one rank; rank 0 writes `FOLDER/NAME.json` for each."""

    def run() -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        warnings.simplefilter("ignore")
        world = initialize(90)
        for name in names:
            print(name, flush=True)
            finding = examine_one(name, folder / name, world, thorough=thorough)
            findings = gather_json(finding)
            if world.is_main:
                faults = list(dict.fromkeys(fault for one in findings for fault in one["faults"]))
                (folder / f"{name}.json").write_text(json.dumps({**findings[0], "faults": faults}))
                shutil.rmtree(folder / name)
        os._exit(0)

    run_as_rank(run, environment, log)


def examine_one(name: str, folder: Path, world: World, *, thorough: bool) -> Finding:
    """Examines an architecture in an empty folder, and returns what this rank found.

    If not `thorough`, it examines no training step, no export and no bf16.
    """
    finding: Finding = {"refused": None, "documents": None, "cut": None, "trunk": None, "faults": []}
    finding |= dict.fromkeys(LIMITS)
    if world.is_main:
        save_architecture(folder / "teacher", name)
    barrier()
    config = _config(folder, "stream")
    try:
        check_architecture(find_teacher(config), config.corpus)
        finding |= find_limits(find_teacher(config))
        with contextlib.redirect_stderr(io.StringIO()):
            teacher = _examine_teacher(folder, world, finding, thorough=thorough)
            _examine_student(folder, world, teacher, finding, thorough=thorough)
        teacher.close()
    except UserError as error:
        finding["refused"] = reason_of(error, folder)
    except Exception:  # a fault of this architecture only: the others are still examined
        finding["faults"].append(traceback.format_exc())
    return finding


def _config(folder: Path, packing: str, dtype: torch.dtype = torch.float32, **sections: Any) -> Config:
    student = {"layers": CUT, "train_layers": 1, **sections.pop("student", {})}
    teacher = {"path": str(folder / "teacher"), "offload": "none", **sections.pop("teacher", {})}
    return Config(
        workdir=str(folder / "work"),
        precision="fp32" if dtype == torch.float32 else "bf16",
        teacher=teacher,
        student=student,
        corpus={"packing": packing, "sequence_length": DOCUMENTS if packing == "documents" else LENGTH},
        loss={"sense_weight": 0.0},
        train={"global_batch_size": world_size(), "micro_batch_size": 1},
        **sections,
    )


def world_size() -> int:
    """Returns the number of ranks of this job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _tokens(rank: int) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(rank))


def find_limits(teacher: ModelFolder) -> Finding:
    """Returns why longer sequences are refused, as streams and as packed documents; None for what is not refused."""
    finding: Finding = dict.fromkeys(LIMITS)
    for key, packing, length in zip(LIMITS, ("stream", "documents"), (LONG, LENGTH), strict=True):
        corpus = CorpusConfig(packing=packing, sequence_length=length)
        try:
            check_architecture(teacher, corpus)
        except UserError as error:
            finding[key] = reason_of(error, teacher.path.parent)
    return finding


@torch.no_grad()
def _examine_teacher(folder: Path, world: World, finding: Finding, *, thorough: bool) -> Any:
    """Compares all kinds of teachers with transformers, and returns the one in fp32 under ZeRO-3."""
    verdicts: list[str | None] = []
    kept: Any = None
    kinds = [(torch.float32, "zero3")]
    if thorough:
        kinds += [(torch.bfloat16, "zero3"), (torch.float32, "resident"), (torch.bfloat16, "resident")]
    for dtype, mode in kinds:
        config = _config(folder, "stream", dtype, teacher={"mode": mode})
        teacher = load_frozen(find_teacher(config), config, world)
        expected = _from_pretrained(folder / "teacher", dtype).to(world.device)
        ids, where = _tokens(world.rank).to(world.device), f"teacher, {dtype}, {mode}".replace("torch.", "")
        hidden, logits = teacher.read(ids, None, lambda hidden, head: (hidden, head.logits(hidden)))
        output = expected(ids, output_hidden_states=True, use_cache=False)
        _compare(finding, f"{where}: states", hidden, _last_states(expected, ids), dtype)
        _compare(finding, f"{where}: logits", logits, output.logits, dtype)
        _compare_buffers(finding, where, teacher.decoder.base, expected)
        try:
            check_architecture(teacher.folder, _config(folder, "documents").corpus)
            check_documents(teacher.engine, teacher.decoder, teacher.folder, world, dtype)
            verdicts.append(None)
        except UserError as error:
            verdicts.append(reason_of(error, folder))
        if kept is None:
            kept = teacher
        else:
            teacher.close()
    finding["documents"] = verdicts[0]
    if len(set(verdicts)) > 1:
        finding["faults"].append(f"packed documents: the verdicts differ between number formats and modes: {verdicts}")
    return kept


def _examine_student(folder: Path, world: World, teacher: Any, finding: Finding, *, thorough: bool) -> None:
    """Cuts students, compares them with the pruned teacher, and trains one for a step."""
    refusals = []
    for layers in (LOWEST, CUT):
        config = _config(folder, "stream", student={"layers": layers})
        refusal = None
        if world.is_main:
            try:
                build_student(config)
                _compare_with_pruned(folder, layers, finding)
            except UserError as error:
                refusal = reason_of(error, folder)
        refusals.append(gather_json(refusal)[0])
    finding["cut"] = next((refusal for refusal in refusals if refusal), None)
    if all(refusals):
        return
    layers = LOWEST if refusals[1] else CUT
    packing = "stream" if finding["documents"] else "documents"
    options = {"margin": 1.0, "accumulation_steps": 1, "teacher": teacher}
    norm = bool(_final_norm(folder))
    config = _config(folder, packing, student={"layers": layers, "shared_trunk": "on", "train_final_norm": norm})
    if refusals[1] and world.is_main:
        build_student(config)
    barrier()
    try:
        pair = load_pair(
            config, world, find_teacher(config), find_student(config), source=TeacherSource.of(config), **options
        )
    except UserError as error:
        finding["trunk"] = reason_of(error, folder)
        if not thorough:
            return
        config = _config(folder, packing, student={"layers": layers, "shared_trunk": "off", "train_final_norm": norm})
        pair = load_pair(
            config, world, find_teacher(config), find_student(config), source=TeacherSource.of(config), **options
        )
    if thorough:
        rehearse_export(pair, find_student(config), config, world)
        loss = _examine_step(folder, pair, world, finding)
        is_shared = pair.trunk is not None
        _examine_step_in_bf16(folder, layers, world, finding, is_shared=is_shared, train_norm=norm, expected=loss)
    if pair.trunk is not None:
        pair.trunk.close()
    pair.engine.destroy()


def _final_norm(folder: Path) -> set[str]:
    """Returns the names of the final norm's parameters; a norm without parameters, such as OLMo's, has none."""
    try:
        return final_norm_names(_from_pretrained(folder / "teacher"))
    except UserError:
        return set()


def _examine_step_in_bf16(
    folder: Path,
    layers: Sequence[int],
    world: World,
    finding: Finding,
    *,
    is_shared: bool,
    train_norm: bool,
    expected: float,
) -> None:
    """Checks that a step in bf16 has almost the loss of fp32, from the same trunk, which has late positions too."""
    student = {"layers": layers, "shared_trunk": "on" if is_shared else "off", "train_final_norm": train_norm}
    try:
        pair = load_models(_config(folder, "stream", torch.bfloat16, student=student), world)
    except UserError as error:
        finding["faults"].append(f"a student is trained in fp32 but not in bf16: {reason_of(error, folder)}")
        return
    loss = _take_step(pair, world)
    if not abs(loss - expected) <= _LOSS_TOLERANCE * expected:
        finding["faults"].append(f"step in bf16: the loss is {loss:.4f}, in fp32 {expected:.4f}")
    pair.engine.destroy()
    pair.teacher.close()  # type: ignore[union-attr]


def _take_step(pair: Any, world: World) -> float:
    """Computes the gradients of a step, and returns the loss of this rank's tokens."""
    ids = _tokens(world.rank).to(world.device)
    states, inputs = pair.run_teacher(ids)
    mask = torch.ones(1, LENGTH, dtype=torch.bool, device=world.device)
    mask[:, -1] = False
    loss, _ = pair.engine(
        inputs,
        labels=ids.roll(-1, 1),
        loss_mask=mask,
        normalizers=Normalizers(1 / (LENGTH - 1), 1.0),
        teacher_hidden=states,
    )
    pair.engine.backward(loss)
    return float(loss)


def _examine_step(folder: Path, pair: Any, world: World, finding: Finding) -> float:
    """Compares the gradients of a step with plain autograd of transformers' models over the tokens of all ranks, and
    returns the loss of this rank's tokens.
    """
    from deepspeed.utils import safe_get_full_grad

    loss = _take_step(pair, world)
    module = pair.engine.module
    found = {
        module.hub_names[name]: safe_get_full_grad(parameter)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }

    places = folder / "work" / "student", folder / "teacher"
    student, teacher = (_from_pretrained(place).to(world.device) for place in places)
    ids = torch.cat([_tokens(rank) for rank in range(world.world_size)]).to(world.device)
    logits = student(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    with torch.no_grad():
        teacher_logits = teacher(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    kl = F.kl_div(
        (logits / 2).log_softmax(-1), (teacher_logits / 2).log_softmax(-1), log_target=True, reduction="batchmean"
    )
    (F.cross_entropy(logits, ids[:, 1:].flatten()) + 0.7 * 4 * kl).backward()
    parameters = dict(student.named_parameters())
    last, norm = f".{student.config.num_hidden_layers - 1}.", _final_norm(folder)
    unknown = sorted(set(found) - set(parameters))
    others = [name for name in found if last not in name and name not in norm]
    if unknown or others:
        finding["faults"].append(
            f"step: trained parameters of other layers: {others}; names that are not parameters: {unknown}"
        )
        return loss
    largest = max(float(p.grad.abs().max()) for p in parameters.values() if p.grad is not None)
    for name, gradient in found.items():
        expected = parameters[name].grad
        expected = torch.zeros_like(parameters[name]) if expected is None else expected
        error = float((gradient - expected).abs().max()) / largest
        if not error <= 1e-4:
            finding["faults"].append(f"step: the gradient of {name} differs by {error:.1e} of the largest gradient")
    return loss


@torch.no_grad()
def _compare_with_pruned(folder: Path, layers: Sequence[int], finding: Finding) -> None:
    """Compares the cut student with the teacher, whose other layers are bypassed."""
    student, teacher = _from_pretrained(folder / "work" / "student"), _from_pretrained(folder / "teacher")
    for number, layer in enumerate(layers_of(teacher)):
        if number not in layers:
            layer.register_forward_hook(_bypass, with_kwargs=True)
    ids = _tokens(0)
    expected = teacher(ids, use_cache=False).logits
    _compare(finding, f"student of layers {layers}", student(ids, use_cache=False).logits, expected, torch.float32)


def _bypass(layer: Any, args: Any, kwargs: Any, output: Any) -> Any:
    states = args[0] if args else kwargs["hidden_states"]
    return (states, *output[1:]) if isinstance(output, tuple) else states


def _from_pretrained(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    values = json.loads((folder / "config.json").read_text())
    # Gemma 2 caps the scores of attention, which transformers' default leaves out; a student's config.json says it.
    is_capped = values.get("attn_logit_softcapping") is not None and "_attn_implementation" not in values
    options = {"attn_implementation": "eager"} if is_capped else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def _last_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Returns the input of the output matrix, which a hook finds whatever the model calls its parts."""
    seen = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(ids, use_cache=False)
    hook.remove()
    return seen[0]


def _compare(finding: Finding, what: str, found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    found, expected = found.double(), expected.double()
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCE[dtype]:
        finding["faults"].append(f"{what}: relative difference of {error:.1e}")


def _compare_buffers(finding: Finding, where: str, base: Any, expected: Any) -> None:
    theirs = dict(base_model(expected).named_buffers())
    for name, buffer in base.named_buffers():
        if buffer.dtype != theirs[name].dtype or not torch.equal(buffer, theirs[name]):
            finding["faults"].append(f"{where}: buffer {name} differs from that of transformers' model")


def reason_of(error: UserError, folder: Path) -> str:
    """Returns the message without the paths of the teacher and of the student in `folder`."""
    text = str(error).replace(f"{folder}/teacher: ", "").replace(f"{folder / 'work' / 'student'}: ", "")
    return re.sub(r"\s+", " ", text)


def find(names: Sequence[str], *, timeout_s: float) -> dict[str, Finding]:
    """Examines architectures thoroughly, on one rank and on two, and returns {name: finding}.

    What is supported must not depend on the number of ranks.
    """
    one, two = (_find(names, ranks, timeout_s) for ranks in (1, 2))
    for name, finding in two.items():
        finding["faults"] += [f"on one rank: {fault}" for fault in one[name].pop("faults")]
        finding["faults"] += [
            f"{key} on one rank: {value}; on two: {finding[key]}"
            for key, value in one[name].items()
            if value != finding[key]
        ]
    return two


def _find(names: Sequence[str], ranks: int, timeout_s: float) -> dict[str, Finding]:
    from rank_processes import finish, fork_ranks

    with tempfile.TemporaryDirectory() as folder:
        finish(fork_ranks(examine, names, Path(folder), True, ranks=ranks), timeout_s)
        return {name: json.loads(Path(folder, f"{name}.json").read_text()) for name in names}
