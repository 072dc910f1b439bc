"""Planned memory: against counts that others publish, sums by hand, and what training really allocates."""

import json

import numpy as np
import pytest
import torch
from forked_rank import run_launcher
from plans import LLAMA, STORED, WITHOUT_TRUNK, cluster_of, config_of
from rank_processes import finish, fork_ranks
from repository import REPOSITORY
from tiny_models import save_model
from transformers import AutoModelForCausalLM

from benchmarks.flops import Shape
from dskd.losses.head import DistillationHead, HeadSizes
from dskd.models.structure.output_head import LogitTransform
from dskd.plan import activations
from dskd.plan.activations import Batch, student_activations
from dskd.plan.architecture import Architecture
from dskd.plan.gathering import gather
from dskd.plan.known_models import KNOWN_MODELS
from dskd.plan.live_bytes import LiveBytes
from dskd.plan.memory import batch_of
from dskd.plan.plan import make_plan
from dskd.plan.shapes import Shapes, Weight, plan_student
from dskd.shards.schema import ANTONYM_ROWS, OWN_ROWS, SYNONYM_ROWS
from dskd.training.data.collator import _name_rows
from dskd.training.data.distribution_candidates import CandidateRows


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("meta-llama/meta-llama-3-8b", 8_030_261_248),
        ("meta-llama/meta-llama-3-70b", 70_553_706_496),
        ("meta-llama/llama-3.1-405b", 405_853_388_800),
        ("mistralai/mistral-7b-instruct-v0.1", 7_241_732_096),
    ],
)
def test_known_shapes_have_the_parameters_that_their_authors_publish(name, published):
    model = Architecture(json.dumps(KNOWN_MODELS[name]), name).build()
    assert sum(parameter.numel() for parameter in model.parameters()) == published


def test_stored_states_take_two_bytes_a_number_on_disk_and_where_batches_are_held(tmp_path):
    def plan_of(*overrides):
        config = config_of(tmp_path, "train.global_batch_size=32", "train.micro_batch_size=4", *overrides)
        return make_plan(config, cluster_of(2, "cuda"), Architecture(json.dumps(LLAMA), "llama"), samples=1000)

    computed, stored, no_trunk = plan_of(), plan_of(*STORED), plan_of(*STORED, *WITHOUT_TRUNK)
    states = 2 * 16 * 32 * 2  # two columns of 16 tokens, D = 32, two bytes each
    assert stored.disk.sample - computed.disk.sample == stored.disk.sample_states == states
    batches = stored.memory.gpu.batches - computed.memory.gpu.batches
    assert batches == 2 * 16 * states  # 16 sequences a step and rank, in the GPU's two copies
    # Three whole steps in page-locked memory, of each of the two ranks; states are not among what workers prepare.
    assert stored.memory.host.batches - computed.memory.host.batches == 2 * 3 * 16 * states
    assert stored.memory.gpu.teacher == 0 < computed.memory.gpu.teacher
    # Without a shared trunk the student computes its layers from token ids, and one column is read.
    assert no_trunk.memory.gpu.batches - computed.memory.gpu.batches == batches / 2
    assert no_trunk.student.shapes.numel > stored.student.shapes.numel


@pytest.mark.parametrize(
    ("overrides", "is_counted"),
    [
        ((), True),
        (STORED, True),
        ((*STORED, "loss.kd_weight=0", "loss.hidden_weight=1"), False),
        (("teacher.mode=cached", "annotation.teacher_top_n=4"), False),
    ],
    ids=["loaded", "states", "states without logits", "most probable tokens"],
)
def test_the_teachers_output_matrix_is_counted_if_its_logits_are_computed(tmp_path, overrides, is_counted):
    config = config_of(tmp_path, "student.train_lm_head=true", *overrides)
    student = plan_student(config, Architecture(json.dumps(LLAMA), "llama"))
    assert student.teacher_matrix == (LLAMA["vocab_size"] * LLAMA["hidden_size"] if is_counted else 0)


def test_bytes_count_as_long_as_something_refers_to_them():
    with LiveBytes() as live:
        one = torch.ones(100)
        view = one[:50].view(5, 10)
        two = one * 2
        assert live.now == 800  # a view takes nothing
        del one
        assert live.now == 800  # its memory is the view's
        del view, two
    assert live.now == 0
    assert live.peak == 800


def _activations(config, batch, dtype, *, sizes, with_teacher, has_copy=False):
    """Measures the activations of a student of two layers, anew."""
    return student_activations.__wrapped__(
        Architecture(json.dumps(LLAMA), "llama"),
        (0, 1),
        0,
        config.student,
        config.loss,
        batch,
        dtype,
        sizes=sizes,
        checkpointing=False,
        with_teacher=with_teacher,
        teacher_matrix=(LLAMA["vocab_size"], LLAMA["hidden_size"]),
        has_copy=has_copy,
        teacher_transform=LogitTransform(),
    )


def test_a_layer_keeps_the_tensors_that_autograd_saves(tmp_path):
    """Independent of the counter: the tensors that autograd saves, storage by storage, in a real forward pass."""
    config = config_of(tmp_path, "student.layers=2", "student.shared_trunk='off'", "loss.kd_weight=0")
    planned = _activations(
        config, Batch(2, 16, False, 0, 0, 5, 0), torch.float32, sizes=HeadSizes(8, 8), with_teacher=False
    )
    save_model(tmp_path / "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", attn_implementation="sdpa")
    model.model.layers = model.model.layers[:2]
    model.requires_grad_(False)
    model.model.layers.requires_grad_(True)
    saved, held = {}, []

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        held.append(tensor)  # or its memory would be another one's
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ids = torch.zeros(2, 16, dtype=torch.int64)
        result = model.model(ids, use_cache=False).last_hidden_state
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = sum(size for pointer, size in saved.items() if pointer not in weights)
    kept += result.untyped_storage().nbytes()
    assert planned.kept == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize(
    ("overrides", "teacher_top_n", "with_teacher"),
    [((), 0, True), (("student.train_lm_head=true", "precision=fp32"), 0, True), (("loss.hidden_weight=0",), 4, False)],
    ids=["frozen head", "trained head", "most probable tokens"],
)
def test_a_plan_of_one_chunk_has_the_peaks_of_all_chunks(tmp_path, monkeypatch, overrides, teacher_top_n, with_teacher):
    """32 positions in chunks of 5, the last of which is smaller; a chunk is two blocks."""
    config = config_of(tmp_path, *overrides)
    batch = Batch(2, 16, True, 6, 12, 5, teacher_top_n)
    options = {"with_teacher": with_teacher, "has_copy": config.student.train_lm_head}
    peaks = []
    for head in (activations._HeadOfOneChunk, DistillationHead):
        monkeypatch.setattr(activations, "_HeadOfOneChunk", head)
        peaks.append(_activations(config, batch, torch.bfloat16, sizes=HeadSizes(5, 3), **options))
    assert peaks[0] == peaks[1]
    assert peaks[0].loss > 0


def test_a_share_of_the_positions_takes_less_memory_in_the_loss_alone(tmp_path):
    """The states of student and teacher at the positions, and their gradient, are fewer; 16 positions by half are 8."""
    every, half = (
        _activations(
            config_of(tmp_path, f"loss.position_share={share}"),
            Batch(2, 16, True, 0, 0, 5, 0, draws_targets=share < 1),
            torch.bfloat16,
            sizes=HeadSizes(4, 4),
            with_teacher=True,
        )
        for share in (1, 0.5)
    )
    assert (half.kept, half.forward) == (every.kept, every.forward)
    of_states = 3 * 2 * 8 * LLAMA["hidden_size"] * 2  # of bf16
    assert every.loss - half.loss == pytest.approx(of_states, rel=0.15)  # and a few numbers of each position


@pytest.mark.parametrize("overrides", [(), ("loss.sense_form=distribution", "loss.sense_candidates=[own, random]")])
def test_the_planned_inputs_of_the_sense_loss_have_the_shapes_that_the_collator_brings(tmp_path, overrides):
    config = config_of(tmp_path, "annotation.kappa=5", "train.sense_bank=device", "loss.min_relations=3", *overrides)
    batch = batch_of(config, 1, relations=3 / 16)
    planned = activations.loaded_tensors(batch, 32, torch.float32)["senses"]
    rows = {name: np.arange(80).reshape(16, 5) for name in (OWN_ROWS, SYNONYM_ROWS, ANTONYM_ROWS)}
    candidates = CandidateRows.of(config.loss, 0, 10**9) if overrides else None
    brought = _name_rows([{**rows, "step": 1}], 16, [(np.arange(3), np.arange(3, 6))], candidates)
    assert {name: tuple(tensor.shape) for name, tensor in planned.items()} == {
        name: values.shape for part in brought for name, values in part.items()
    }


def test_a_plan_with_sense_distributions_counts_their_candidates(tmp_path):
    small, large = (
        make_plan(
            config_of(tmp_path, "loss.sense_form=distribution", f"loss.sense_random_candidates={count}"),
            cluster_of(1),
            Architecture(json.dumps(LLAMA), "llama"),
        ).memory.gpu
        for count in (128, 4096)
    )
    assert large.loss > small.loss


def test_the_optimizer_takes_sixteen_bytes_for_each_trained_element(tmp_path):
    config = config_of(tmp_path, "precision=fp32")
    architecture = Architecture(json.dumps(LLAMA), "llama")
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32
    for ranks in (1, 2, 4):
        memory = make_plan(config, cluster_of(ranks), architecture).memory
        held = 16 * 2 * layer / ranks + 50_000_000 * 4  # two layers, and the bucket that gradients are summed up in
        assert 0 <= memory.gpu.optimizer - held <= 12 * 2 * layer  # what the step needs for a moment


def _modules(count, numel):
    return Shapes(tuple((Weight(f"layers.{number}.weight", numel, True),) for number in range(count)))


def test_zero3_gathers_every_weight_once_and_prefetches_within_its_limits():
    large = gather(_modules(20, 300_000_000), persistent=1000, backward=False)
    assert large.travelled == 20 * 300_000_000
    assert large.forward == 2 * 300_000_000  # the one that runs, and the next: one is more than is read ahead
    small = gather(_modules(100, 20_000_000), persistent=1000, backward=False)
    # Three ahead with each that runs, until a billion elements are whole or on their way.
    assert 0.9e9 <= small.forward <= 1.2e9
    # What is used again soon stays: the backward pass gathers nothing again.
    assert gather(_modules(2, 300_000_000), persistent=1000, backward=True).travelled == 600_000_000
    assert gather(_modules(2, 1000), persistent=1000, backward=True).travelled == 0


def test_annotation_holds_keys_and_values_of_the_texts_that_the_teacher_continues(tmp_path):
    def of_annotation(*overrides):
        config = config_of(tmp_path, "corpus.packing=none", "annotation.batch_size=64", *overrides)
        plan = make_plan(config, cluster_of(1, "cuda"), Architecture(json.dumps(LLAMA), "llama"))
        return next(stage.gpu for stage in plan.before if stage.name == "annotation")

    of_cache = 2 * 4 * 64 * 16 * 2 * 8 * 2  # keys and values of 4 layers: 64 texts of 16 tokens, 2 heads of 8, bf16
    added = of_annotation("annotation.continuation_tokens=2") - of_annotation()
    assert of_cache <= added <= 1.3 * of_cache


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "mode"), [(2, "zero3"), (1, "cached")])
def test_memory_is_within_a_tenth_of_what_training_allocates(tmp_path_factory, ranks, mode):
    from benchmarks.plan_memory import plan_bytes
    from benchmarks.report import parse_result
    from benchmarks.workload import Preset, write_work_directory

    stored = mode == "cached"
    folder = tmp_path_factory.getbasetemp() / mode
    if not (folder / "config.yaml").is_file():
        shape = Shape(4096, 512, 1536, 8, 2, teacher_layers=4, student_layers=3, trained_layers=2, sequence_length=64)
        write_work_directory(folder, Preset(shape, global_batch_size=8, micro_batch_size=4), steps=15, states=stored)
    precision = "auto" if stored else "fp32"  # states are stored in the type that `auto` means here
    settings = [f"teacher.mode={mode}", "teacher.offload=none", f"precision={precision}"]
    settings += [f"train.global_batch_size={4 * ranks}"]
    arguments = ["--child", str(folder / "config.yaml"), *settings]
    processes = fork_ranks(run_launcher, REPOSITORY / "benchmarks" / "plan_memory.py", arguments, ranks=ranks)
    finish(processes)
    measured = parse_result(arguments, 0, processes[0].output)
    assert plan_bytes(folder / "config.yaml", ranks, settings) == pytest.approx(max(measured), rel=0.1)
