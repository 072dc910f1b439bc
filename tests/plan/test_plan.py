"""The output of `dskd plan`: against counts that others publish, sums by hand, and what training really allocates."""

import json
import re
import shlex
import sys
from dataclasses import replace

import pytest
import torch
from forked_rank import run_launcher
from rank_processes import finish, fork_ranks
from repository import REPOSITORY
from tiny_models import SHAPE, save_model
from transformers import AutoModelForCausalLM

from benchmarks.flops import Shape, step_flops
from dskd.__main__ import main
from dskd.artifacts.building import build_artifact
from dskd.artifacts.manifest import Recipe
from dskd.config.reading import load_config
from dskd.errors import UserError
from dskd.losses.head import HeadSizes
from dskd.models.cutting import build_student
from dskd.plan import GB
from dskd.plan.activations import Batch, student_activations
from dskd.plan.changes import Change, candidates, smallest_change
from dskd.plan.cluster import Cluster
from dskd.plan.gathering import gather
from dskd.plan.known_models import KNOWN_MODELS
from dskd.plan.live_bytes import LiveBytes
from dskd.plan.plan import make_plan
from dskd.plan.report import format_plan
from dskd.plan.shapes import Architecture, Shapes, Weight, find_architecture, plan_student, teacher_shapes
from dskd.plan.speed import flops_per_token
from dskd.plan.stored import loads_teacher
from dskd.shards import TEACHER_STATES, TRUNK_STATES

MACHINES = ["--nodes", "1", "--gpus-per-node", "2", "--gpu-memory", "80", "--host-memory", "500"]
SMALL = ["student.layers=3", "student.train_layers=2", "corpus.sequence_length=16"]
LLAMA = {"model_type": "llama", **SHAPE}


def _cluster(ranks=1, device="cpu", memory=80, host=500):
    return Cluster(1, ranks, round(memory * GB), round(host * GB), device, 40 * GB, 25 * GB, 5 * GB, 1e14)


def _config(tmp_path, *overrides, **teacher):
    path = tmp_path / "config.yaml"
    sections = {"workdir": str(tmp_path / "work"), "teacher": {"path": "nobody/nothing", **teacher}}
    path.write_text(json.dumps(sections), encoding="utf-8")
    return load_config(path, [*SMALL, *overrides])


def _shapes_file(tmp_path, **values):
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps({**LLAMA, **values}), encoding="utf-8")
    return path


def _run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["dskd", "plan", *map(str, arguments)])
    code = main()
    printed = capsys.readouterr()
    return code, printed.out, printed.err


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


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("trunk", ["on", "off"])
def test_flops_are_those_of_the_formula(tmp_path, trunk, stored):
    columns = [TEACHER_STATES, TRUNK_STATES][: 1 + (trunk == "on")] if stored else []
    config = _config(tmp_path, f"student.shared_trunk='{trunk}'", f"annotation.store={json.dumps(columns)}")
    architecture = Architecture(json.dumps(LLAMA), "llama")
    student = plan_student(config, architecture)
    shape = Shape(120, 32, 48, 4, 2, teacher_layers=4, student_layers=3, trained_layers=2, sequence_length=16)
    flops = flops_per_token(config, architecture, teacher_shapes(architecture), student)
    assert flops == step_flops(shape, shared_trunk=trunk == "on", stored_states=stored)


def _with_student(tmp_path, student):
    path = tmp_path / "config.yaml"
    sections = {"workdir": str(tmp_path / "work"), "teacher": {"path": "nobody/nothing"}, "student": student}
    path.write_text(json.dumps(sections), encoding="utf-8")
    return load_config(path, ["corpus.sequence_length=16", "loss.sense_weight=0"])


def test_another_student_is_planned_with_its_own_shape(tmp_path):
    sizes = {"layers": 2, "hidden_size": 16, "heads": 2}
    config, architecture = _with_student(tmp_path, {"from_config": sizes}), Architecture(json.dumps(LLAMA), "llama")
    student = plan_student(config, architecture)
    of_layer = 4 * 16 * 16 + 3 * 16 * 40  # four matrices of attention, and three of width 8/3 · 16, rounded to 40
    assert student.whole_numel == 120 * 16 + 2 * (of_layer + 2 * 16) + 16  # tied
    assert student.shapes.trained_numel == student.whole_numel
    assert student.teacher_matrix == 120 * 32
    attention, of_teacher = 4 * 8 * 16, (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48, 4 * 8 * 32)
    assert flops_per_token(config, architecture, teacher_shapes(architecture), student) == {
        "teacher_layers": 4 * (2 * of_teacher[0] + of_teacher[1]),
        "student_layers": 2 * (2 * of_layer + attention),
        "backward_layers": 2 * (4 * of_layer + 2 * attention),
        "head": 3 * 2 * 16 * 120 + 2 * 32 * 120,
    }


def test_a_pretrained_student_is_planned_like_the_same_model_cut_from_the_teacher(tmp_path):
    """A model of the teacher's shape with fewer layers: only where it comes from differs."""
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained" / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 3}))
    trained = {"train_embeddings": True, "train_final_norm": True, "train_lm_head": True}
    plans = [
        make_plan(_with_student(tmp_path, student), _cluster(2, "cuda"), Architecture(json.dumps(LLAMA), "llama"))
        for student in ({"path": str(tmp_path / "pretrained")}, {"layers": 3, "train_layers": "all", **trained})
    ]
    one, other = ((plan.memory, plan.speed, plan.disk, plan.student.shapes) for plan in plans)
    assert one == other
    assert "(student.path is not cut from the teacher)" in format_plan(plans[0])


def test_a_pretrained_student_without_a_config_json_is_refused(tmp_path):
    config = _with_student(tmp_path, {"path": str(tmp_path)})
    with pytest.raises(UserError, match=r"student\.path: there is no file .*config\.json; name a folder that has one"):
        plan_student(config, Architecture(json.dumps(LLAMA), "llama"))


STORED = ("precision=bf16", f"annotation.store=[{TEACHER_STATES},{TRUNK_STATES}]")
WITHOUT_TRUNK = ("student.shared_trunk=off", f"annotation.store=[{TEACHER_STATES}]")


def test_stored_states_take_two_bytes_a_number_on_disk_and_where_batches_are_held(tmp_path):
    def plan_of(*overrides):
        config = _config(tmp_path, "train.global_batch_size=32", "train.micro_batch_size=4", *overrides)
        return make_plan(config, _cluster(2, "cuda"), Architecture(json.dumps(LLAMA), "llama"), samples=1000)

    computed, stored, no_trunk = plan_of(), plan_of(*STORED), plan_of(*STORED, *WITHOUT_TRUNK)
    states = 2 * 16 * 32 * 2  # two columns of 16 tokens, D = 32, two bytes each
    assert stored.disk.sample - computed.disk.sample == stored.disk.sample_states == states
    batches = stored.memory.gpu.batches - computed.memory.gpu.batches
    assert batches == 2 * 16 * states  # 16 sequences a step and rank, in the GPU's two copies
    # Four steps of two workers and two in page-locked memory, of each of the two ranks.
    assert stored.memory.host.batches - computed.memory.host.batches == 2 * (2 * 2 + 2) * 16 * states
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
    config = _config(tmp_path, "student.train_lm_head=true", *overrides)
    student = plan_student(config, Architecture(json.dumps(LLAMA), "llama"))
    assert student.teacher_matrix == (LLAMA["vocab_size"] * LLAMA["hidden_size"] if is_counted else 0)


def test_a_step_is_as_fast_as_the_disk_delivers_its_stored_states(tmp_path):
    def plan_of(disk_bandwidth, *overrides):
        config = _config(tmp_path, "train.global_batch_size=32", "train.micro_batch_size=4", *STORED, *overrides)
        cluster = replace(_cluster(4, "cuda"), disk_bandwidth=disk_bandwidth)
        return make_plan(config, cluster, Architecture(json.dumps(LLAMA), "llama"), samples=1000)

    of_step = 32 * 16 * 2 * 32 * 2  # bytes of both columns: 32 sequences of 16 tokens, D = 32
    slow, fast = plan_of(1e3), plan_of(1e15)
    assert slow.speed.step_s == pytest.approx(of_step / 1e3)
    assert fast.speed.step_s == slow.speed.step_without_reading_s < slow.speed.step_s
    assert slow.comparison.rate == fast.comparison.rate == pytest.approx(of_step / 4 / fast.speed.step_s)
    # The other run is the one with a teacher.
    computed = plan_of(1e3, "annotation.store=[]")
    assert slow.comparison.computing == computed.speed
    assert computed.comparison.reading == slow.speed
    assert slow.comparison.gain == computed.comparison.gain == computed.speed.step_s / slow.speed.step_s
    flops = computed.speed.flops_per_token["teacher_layers"] * 16 * 1000
    assert slow.comparison.storing_s >= flops / 4 / 1e14


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


def test_a_layer_keeps_the_tensors_that_autograd_saves(tmp_path):
    """Independent of the counter: the tensors that autograd saves, storage by storage, in a real forward pass."""
    config = _config(tmp_path, "student.layers=2", "student.shared_trunk='off'", "loss.kd_weight=0")
    batch = Batch(2, 16, False, 0, 0, 5, 0)
    planned = student_activations(
        Architecture(json.dumps(LLAMA), "llama"),
        (0, 1),
        0,
        config.student,
        config.loss,
        batch,
        torch.float32,
        sizes=HeadSizes(8, 8),
        checkpointing=False,
        with_teacher=False,
        teacher_matrix=(LLAMA["vocab_size"], LLAMA["hidden_size"]),
        has_copy=False,
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


def test_the_optimizer_takes_sixteen_bytes_for_each_trained_element(tmp_path):
    config = _config(tmp_path, "precision=fp32")
    architecture = Architecture(json.dumps(LLAMA), "llama")
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32
    for ranks in (1, 2, 4):
        memory = make_plan(config, _cluster(ranks), architecture).memory
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


def test_a_job_that_does_not_fit_is_refused_with_a_change_that_makes_it_fit(tmp_path, monkeypatch, capsys):
    # A vocabulary that makes the teacher the largest part: 2 · 200,000 · 256 elements in float32 and more.
    shapes = _shapes_file(tmp_path, vocab_size=200_000, hidden_size=256, num_hidden_layers=4)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"workdir": str(tmp_path), "teacher": {"path": "a/b", "mode": "resident"}}))
    options = ["--config", config, "--teacher-config", shapes, "--nodes", 1, "--gpus-per-node", 4, "--host-memory", 200]
    settings = ["student.layers=2", "corpus.sequence_length=256", "train.micro_batch_size=4"]
    code, printed, _ = _run(monkeypatch, capsys, *options, "--gpu-memory", 80, *settings)
    assert code == 0 and printed.rstrip().endswith("fits")
    stages = re.findall(r"^(?:peak, in .*|gathering states|annotation) +([\d.]+) +[\d.]+$", printed, flags=re.MULTILINE)
    assert len(stages) == 3
    needed = max(map(float, stages))
    code, printed, _ = _run(monkeypatch, capsys, *options, "--gpu-memory", needed - 0.05, *settings)
    assert code == 3
    change = re.search(r"The smallest change that fits: (.*)", printed).group(1)
    code, printed, _ = _run(
        monkeypatch, capsys, *options, "--gpu-memory", needed - 0.05, *settings, *shlex.split(change)
    )
    assert code == 0, printed


def test_a_stage_before_training_that_does_not_fit_is_refused_until_it_is_done(tmp_path, monkeypatch, capsys):
    """Annotation reads more texts at once than training, and also holds the teacher's output matrix."""
    shapes = _shapes_file(tmp_path, vocab_size=200_000, hidden_size=256)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"workdir": str(tmp_path / "work"), "teacher": {"path": "a/b", "mode": "zero3"}}))
    options = ["--config", config, "--teacher-config", shapes, "--nodes", 1, "--gpus-per-node", 2, "--host-memory", 200]
    options += ["student.layers=2", "student.train_layers=1", "annotation.batch_size=64", "senses.batch_size=1"]
    options += ["train.global_batch_size=2"]
    code, printed, _ = _run(monkeypatch, capsys, *options, "--gpu-memory", 80)
    training, annotation = (
        float(re.search(rf"^{name}.* +([\d.]+) +[\d.]+$", printed, flags=re.MULTILINE).group(1))
        for name in ("peak, in", "annotation")
    )
    assert code == 0 and training < annotation - 0.1
    options += ["--gpu-memory", annotation - 0.05]
    code, printed, _ = _run(monkeypatch, capsys, *options)
    assert code == 3 and f"for annotation each GPU needs {annotation:g} GB" in printed
    change = re.search(r"The smallest change that fits: (.*)", printed).group(1)
    assert change.startswith("annotation.")
    assert _run(monkeypatch, capsys, *options, change)[0] == 0
    with build_artifact(tmp_path / "work" / "shards" / "train", Recipe("shards", {}, {})) as building:
        building.facts["samples"] = 64
    code, printed, _ = _run(monkeypatch, capsys, *options)
    assert code == 0 and "the shards exist" in printed


def test_the_speed_of_a_change_is_that_of_the_plan_with_it(tmp_path, monkeypatch, capsys):
    """Several nodes communicate over another network than the GPUs of one."""
    shapes = _shapes_file(tmp_path, vocab_size=100_000, hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
    _config(tmp_path, mode="zero3")
    options = ["--config", tmp_path / "config.yaml", "--teacher-config", shapes, "--nodes", 1, "--gpus-per-node", 8]
    options += ["--host-memory", 500, "student.layers=3", "student.train_layers=3", "student.train_lm_head=true"]
    options += ["senses.memory_budget=0.01", "annotation.memory_budget=0.01", "senses.batch_size=1"]
    options += ["annotation.batch_size=1", "train.micro_batch_size=1", "train.loss_chunk_size=64"]
    options += ["train.activation_checkpointing=true", "train.global_batch_size=64", "teacher.offload=nvme"]
    options += ["teacher.nvme_path=/local", f"annotation.store=[{TEACHER_STATES}]", "teacher.mode=auto"]
    code, printed, _ = _run(monkeypatch, capsys, *options, "--gpu-memory", 80)
    needed = float(re.search(r"peak, in .* +([\d.]+) +[\d.]+\n", printed).group(1))
    code, printed, _ = _run(monkeypatch, capsys, *options, "--gpu-memory", needed - 0.02)
    assert code == 3
    nodes, speed = re.search(r"fits: --nodes (\d+)\n.* ([\d,]+) tokens/s are expected", printed).groups()
    options[options.index("--nodes") + 1] = nodes
    code, printed, _ = _run(monkeypatch, capsys, *options, "--gpu-memory", needed - 0.02)
    assert code == 0
    assert re.search(rf"tokens/s of all ranks +{speed}$", printed, re.MULTILINE)


def test_annotation_holds_keys_and_values_of_the_texts_that_the_teacher_continues(tmp_path):
    def of_annotation(*overrides):
        config = _config(tmp_path, "corpus.packing=none", "annotation.batch_size=64", *overrides)
        plan = make_plan(config, _cluster(1, "cuda"), Architecture(json.dumps(LLAMA), "llama"))
        return next(stage.gpu for stage in plan.before if stage.name == "annotation")

    of_cache = 2 * 4 * 64 * 16 * 2 * 8 * 2  # keys and values of 4 layers: 64 texts of 16 tokens, 2 heads of 8, bf16
    added = of_annotation("annotation.continuation_tokens=2") - of_annotation()
    assert of_cache <= added <= 1.3 * of_cache


def _refused(tmp_path):
    """Returns a plan that does not fit, and one that does."""
    config = _config(tmp_path, "train.global_batch_size=48")
    small, large = (
        make_plan(config, _cluster(1, "cuda", memory), Architecture(json.dumps(LLAMA), "llama")) for memory in (1, 80)
    )
    assert (small.fits, large.fits) == (False, True)
    return small, large


@pytest.mark.parametrize("needed", [3, 4, 5, 65])
def test_the_smallest_number_of_nodes_that_fits_is_named(tmp_path, needed):
    small, large = _refused(tmp_path)

    def replan(change):
        if change.nodes is not None and change.nodes == 66:
            raise UserError("cannot be divided")
        return large if (change.nodes or 1) >= needed else small

    change, changed = smallest_change(small, replan)
    assert (change, changed) == (Change((), needed), large)


def test_only_settings_that_are_needed_are_named(tmp_path):
    small, large = _refused(tmp_path)
    needed = {"train.activation_checkpointing=true", "train.loss_chunk_size=64", "train.micro_batch_size=1"}
    change, _ = smallest_change(small, lambda change: large if needed <= set(change.overrides) else small)
    assert set(change.overrides) == needed
    assert smallest_change(small, lambda change: small) is None


def test_storing_the_teachers_states_is_proposed_with_its_bytes(tmp_path):
    config = _config(tmp_path, "student.shared_trunk=on", "loss.hidden_weight=1", mode="resident")
    cluster = _cluster(1, "cuda", 80)
    plan = make_plan(config, cluster, Architecture(json.dumps(LLAMA), "llama"), samples=2**20)
    (change,) = (change for change in candidates(plan) if "annotation.store" in change.text())
    assert change.text() == "teacher.mode=auto 'annotation.store=[teacher_states,trunk_states]'"
    changed = make_plan(
        load_config(tmp_path / "config.yaml", [*SMALL, "loss.hidden_weight=1", *change.overrides]),
        cluster,
        plan.architecture,
        samples=2**20,
    )
    assert not loads_teacher(changed.config)
    (cost,) = change.preparations(changed)
    assert (
        "annotated again" in cost and "2.0 GB of disk" in cost
    )  # 2**20 sequences · 16 tokens · 2 columns · 32 · 2 bytes


def test_a_host_that_is_too_small_is_no_reason_to_offload(tmp_path, monkeypatch, capsys):
    _config(tmp_path)
    options = ["--config", tmp_path / "config.yaml", "--teacher-config", _shapes_file(tmp_path), *MACHINES]
    code, printed, _ = _run(monkeypatch, capsys, *options, "student.layers=2", "--host-memory", 1)
    assert code == 3 and "Offload: not needed" in printed
    assert "the processes of 2 ranks alone are assumed to need 4 GB" in printed


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({}, ("'nobody/nothing'", "cannot be fetched", "--teacher-config FILE")),
        ({"path": "./nothing"}, ("there is no folder ./nothing", "--teacher-config FILE")),
    ],
)
def test_a_teacher_that_cannot_be_found_is_named_with_the_option_that_helps(
    tmp_path, monkeypatch, capsys, change, parts
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    _config(tmp_path, **change)
    code, _, error = _run(monkeypatch, capsys, "--config", tmp_path / "config.yaml", *MACHINES)
    assert code == 2
    for part in parts:
        assert part in error


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "is not a readable config.json"),
        ("\ufeff{}", "it begins with a byte order mark, with which transformers cannot read it; save it as UTF-8"),
        ('{"hidden_size": 3}', "has no model_type"),
        ('{"model_type": "llama"}', "num_hidden_layers: expected a number, 1 or more; it is missing"),
        (json.dumps(LLAMA | {"num_attention_heads": 0}), "num_attention_heads: expected a number, 1 or more; found 0"),
        (json.dumps(LLAMA | {"vocab_size": "many"}), "vocab_size: expected a number, 1 or more; found 'many'"),
        (json.dumps(LLAMA | {"hidden_act": "none"}), "transformers cannot build this architecture"),
        ('{"model_type": "nonsense", "num_hidden_layers": 2}', "'nonsense' is unknown to transformers"),
        ('{"model_type": "bert", "num_hidden_layers": 2}', "'bert' is an encoder"),
    ],
)
def test_a_file_that_is_not_the_config_of_a_decoder_is_named(tmp_path, monkeypatch, capsys, text, part):
    _config(tmp_path)
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    options = ["--config", tmp_path / "config.yaml", "--teacher-config", tmp_path / "x.json", *MACHINES]
    code, _, error = _run(monkeypatch, capsys, *options, "student.layers=1", "student.train_layers=1")
    assert code == 2 and part in error and "Traceback" not in error


def test_a_warning_about_keys_that_transformers_lacks_names_the_file_once(tmp_path, monkeypatch, capsys):
    _config(tmp_path)
    file = _shapes_file(tmp_path, attention_sink_scale=0.5, transformers_version="4.40.0")
    options = ["--config", tmp_path / "config.yaml", "--teacher-config", file, *MACHINES]
    _, _, error = _run(monkeypatch, capsys, *options, "student.layers=2", "student.train_layers=1")
    warning = f"warning: --teacher-config: {file} (transformers 4.40.0): transformers "
    assert error.count("attention_sink_scale") == error.count(warning) == 1


def test_a_batch_that_training_would_refuse_is_refused_here(tmp_path, monkeypatch, capsys):
    _config(tmp_path)
    options = ["--config", tmp_path / "config.yaml", "--teacher-config", _shapes_file(tmp_path), *MACHINES]
    code, _, error = _run(monkeypatch, capsys, *options, "student.layers=2", "train.global_batch_size=7")
    assert code == 2 and "train.global_batch_size: 7 sequences cannot be divided among 2 ranks" in error


def test_a_shipped_config_is_planned_with_the_student_that_is_cut(tmp_path, monkeypatch, capsys):
    """Those of Llama are planned at their own width, below: the documented plans."""
    save_model(tmp_path / "teacher", "mistral")
    path = REPOSITORY / "configs" / "mistral-7b-16layers.yaml"
    toy = [
        *(f"workdir={tmp_path / 'work'}", f"teacher.path={tmp_path / 'teacher'}", "student.layers=2"),
        *("student.train_layers=1", "corpus.sequence_length=32"),
    ]
    for run in load_config(path).run_names:
        code, printed, error = _run(monkeypatch, capsys, "--config", path, *MACHINES, *toy, f"run={run}")
        assert code == 0, printed + error
    config = load_config(path, toy)
    build_student(config)
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "work" / "student")
    planned = plan_student(config, find_architecture(config, None))
    assert planned.whole_numel == sum(parameter.numel() for parameter in cut.parameters())
    assert len(planned.layers) == cut.config.num_hidden_layers == 2


def _documented():
    text = (REPOSITORY / "docs" / "scale.md").read_text(encoding="utf-8")
    return re.findall(r"```console\n\$ (dskd plan (?:[^\n]*\\\n)*[^\n]*)\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(3))
def test_the_documented_plans_are_what_the_command_prints(monkeypatch, capsys, number):
    monkeypatch.chdir(REPOSITORY)
    command, expected = _documented()[number]
    _, *arguments = shlex.split(command.replace("\\\n", " "))[1:]
    code, printed, _ = _run(monkeypatch, capsys, *arguments)
    assert printed == expected and code == 0


def test_the_documented_refusal_is_what_the_command_prints(monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    text = (REPOSITORY / "docs" / "scale.md").read_text(encoding="utf-8")
    (expected,) = re.findall(r"With GPUs of 16 GB.*?```\n(.*?)```", text, flags=re.DOTALL)
    _, *arguments = shlex.split(_documented()[0][0].replace("\\\n", " "))[1:]
    code, printed, _ = _run(monkeypatch, capsys, *arguments, "--gpu-memory", 16)
    assert expected in printed and code == 3


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "mode"), [(1, "zero3"), (2, "zero3"), (1, "cached")])
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


def _planned_states(tmp_path, monkeypatch, capsys, *overrides, **teacher):
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"workdir": str(tmp_path / "work"), "teacher": {"path": "a/b", **teacher}}))
    options = ["--config", config, "--teacher-config", _shapes_file(tmp_path), "--nodes", 1, "--gpus-per-node", 1]
    options += ["--gpu-memory", 80, "--host-memory", 200, *SMALL, *overrides]
    return _run(monkeypatch, capsys, *options)


def test_shards_with_states_of_another_depth_or_type_have_to_be_annotated_again(tmp_path, monkeypatch, capsys):
    facts = {"columns": [TEACHER_STATES, TRUNK_STATES], "dtype": "bfloat16", "hidden_size": 32, "trunk_depth": 2}
    with build_artifact(tmp_path / "work" / "shards" / "train", Recipe("shards", {}, {})) as building:
        building.facts.update(samples=64, stored=facts)
    for changes, is_done in (
        (["student.train_layers=1"], True),  # of three layers, so the trunk has two
        (["student.train_layers=2"], False),
        (["student.train_layers=1", "precision=fp32"], False),
        (["student.train_layers=1", f"annotation.store=[{TEACHER_STATES}]"], False),
        (["student.train_layers=1", "annotation.teacher_top_n=8"], False),
    ):
        _, printed, _ = _planned_states(tmp_path, monkeypatch, capsys, *STORED, *changes)
        assert ("They are done: the shards exist" in printed) == is_done, changes


def test_a_plan_says_which_stored_states_are_not_read(tmp_path, monkeypatch, capsys):
    _, printed, _ = _planned_states(tmp_path, monkeypatch, capsys, *STORED, mode="resident")
    assert "Stored states: teacher_states and trunk_states, which training does not read" in printed
    assert "because teacher.mode is resident; set teacher.mode to auto" in printed
    _, printed, _ = _planned_states(tmp_path, monkeypatch, capsys, *STORED, "annotation.store=[trunk_states]")
    assert "Stored states: trunk_states, which training does not read, because there are no teacher_states" in printed


def test_a_trunk_that_the_teacher_rules_out_is_not_planned(tmp_path):
    config = _config(tmp_path, *STORED, "student.train_lm_head=true")
    tied = Architecture(json.dumps({**LLAMA, "tie_word_embeddings": True}), "llama")
    with pytest.raises(
        UserError, match=r"annotation\.store: trunk_states .* they share none: .* embeddings are trained"
    ):
        make_plan(config, _cluster(), tied, samples=1000)


def test_layers_chosen_by_importance_are_those_of_the_cut_student_and_until_then_assumed(tmp_path, monkeypatch, capsys):
    options = ["student.spacing=importance", "student.train_layers=1"]
    _, printed, _ = _planned_states(tmp_path, monkeypatch, capsys, *options)
    assert "the lowest 2 are computed once" in printed
    assert "; these are the layers of student.spacing: ends, until `dskd student` has measured others" in printed
    measured = {"samples": 64, "tokens": 999, "layers": [0.4, 0.1, 0.2, 0.3], "blocks": [0.4, 0.1, 0.2, 0.3]}
    settings = {"layers": 3, "importance_samples": 64}
    with build_artifact(tmp_path / "work" / "student", Recipe("student", {}, settings)) as building:
        building.facts.update(layers=[0, 2, 3], importance=measured)
    _, printed, _ = _planned_states(tmp_path, monkeypatch, capsys, *options)
    assert "the lowest 1 are computed once" in printed and "has measured others" not in printed
    config = _config(tmp_path, *options)
    assert plan_student(config, Architecture(json.dumps(LLAMA), "llama")).layers == [0, 2, 3]
    code, _, error = _planned_states(tmp_path, monkeypatch, capsys, *options, "student.layers=4")
    assert code == 2 and "student.layers keeps all of the teacher's 4" in error
