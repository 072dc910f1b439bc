"""The output of `dskd plan`: speed, disk, what it refuses, and the plans that the documentation shows."""

import json
import re
import shlex
from dataclasses import replace

import pytest
from config_files import write_config
from plans import LLAMA, MACHINES, SMALL, STORED, cluster_of, config_of, shapes_file
from repository import REPOSITORY
from tiny_models import save_model
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.flops import Shape, step_flops
from dskd.artifacts.building import build_artifact
from dskd.artifacts.manifest import Recipe
from dskd.config.reading import load_config
from dskd.errors import UserError
from dskd.plan.architecture import Architecture, find_architecture
from dskd.plan.plan import make_plan
from dskd.plan.report import format_plan
from dskd.plan.shapes import plan_student, teacher_shapes
from dskd.plan.speed import flops_per_token
from dskd.shards import TEACHER_STATES, TRUNK_STATES
from dskd.students.student import build_student


@pytest.mark.parametrize(("stored", "share"), [(False, 1.0), (True, 1.0), (True, 0.35)])
@pytest.mark.parametrize("trunk", ["on", "off"])
def test_flops_are_those_of_the_formula(tmp_path, trunk, stored, share):
    columns = [TEACHER_STATES, TRUNK_STATES][: 1 + (trunk == "on")] if stored else []
    store = f"annotation.store={json.dumps(columns)}"
    config = config_of(tmp_path, f"student.shared_trunk='{trunk}'", store, f"loss.position_share={share}")
    architecture = Architecture(json.dumps(LLAMA), "llama")
    student = plan_student(config, architecture)
    shape = Shape(120, 32, 48, 4, 2, teacher_layers=4, student_layers=3, trained_layers=2, sequence_length=16)
    flops = flops_per_token(config, architecture, teacher_shapes(architecture), student)
    expected = step_flops(shape, shared_trunk=trunk == "on", stored_states=stored, position_share=share)
    assert flops == pytest.approx(expected)


@pytest.mark.parametrize(("tied", "products"), [(True, 4), (False, 3)])
def test_trained_embeddings_that_are_tied_to_the_head_cost_its_gradient(tmp_path, tied, products):
    config = config_of(tmp_path, "student.train_embeddings=true")
    architecture = Architecture(json.dumps(LLAMA | {"tie_word_embeddings": tied}), "llama")
    student = plan_student(config, architecture)
    flops = flops_per_token(config, architecture, teacher_shapes(architecture), student)
    assert flops["head"] == products * 2 * 32 * 120


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


def test_the_map_of_a_student_of_another_width_is_planned(tmp_path):
    """It is trained, but not exported; the mapped states take memory in the loss."""
    sizes = {"layers": 2, "hidden_size": 16, "heads": 2}
    config, architecture = _with_student(tmp_path, {"from_config": sizes}), Architecture(json.dumps(LLAMA), "llama")
    mapped = config.model_copy(update={"loss": config.loss.model_copy(update={"hidden_weight": 1.0})})
    students = [plan_student(each, architecture) for each in (config, mapped)]
    plain, with_map = (
        flops_per_token(each, architecture, teacher_shapes(architecture), student)["head"]
        for each, student in zip((config, mapped), students, strict=True)
    )
    assert with_map - plain == 3 * 2 * 16 * 32  # the mapped states, their gradient and the map's
    assert students[1].shapes.trained_numel - students[0].shapes.trained_numel == 32 * 16
    assert students[1].whole_numel == students[0].whole_numel
    loss, of_mapped = (
        make_plan(each, cluster_of(1, "cuda"), architecture).memory.gpu.loss for each in (config, mapped)
    )
    states = config.train.micro_batch_size * 16 * 32 * 2  # bytes of [B, T, D'] in bf16
    assert of_mapped - loss >= states


def test_a_pretrained_student_is_planned_like_the_same_model_cut_from_the_teacher(tmp_path):
    """A model of the teacher's shape with fewer layers: only where it comes from differs."""
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained" / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 3}))
    trained = {"train_embeddings": True, "train_final_norm": True, "train_lm_head": True}
    plans = [
        make_plan(_with_student(tmp_path, student), cluster_of(2, "cuda"), Architecture(json.dumps(LLAMA), "llama"))
        for student in ({"path": str(tmp_path / "pretrained")}, {"layers": 3, "train_layers": "all", **trained})
    ]
    one, other = ((plan.memory, plan.speed, plan.disk, plan.student.shapes) for plan in plans)
    assert one == other
    assert "(student.path is not cut from the teacher)" in format_plan(plans[0])


def test_a_pretrained_student_without_a_config_json_is_refused(tmp_path):
    config = _with_student(tmp_path, {"path": str(tmp_path)})
    with pytest.raises(UserError, match=r"student\.path: there is no file .*config\.json; name a folder that has one"):
        plan_student(config, Architecture(json.dumps(LLAMA), "llama"))


def test_a_step_is_as_fast_as_the_disk_delivers_its_stored_states(tmp_path):
    def plan_of(disk_bandwidth, *overrides):
        config = config_of(tmp_path, "train.global_batch_size=32", "train.micro_batch_size=4", *STORED, *overrides)
        cluster = replace(cluster_of(4, "cuda"), disk_bandwidth=disk_bandwidth)
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
    assert f"a step takes {1 / slow.comparison.gain:,.1f} times as long as with the teacher" in format_plan(slow)
    least = slow.comparison.break_even * 1e3
    assert f"reading is faster above --disk-bandwidth {least / 2**30:.2g}" in format_plan(slow)
    assert plan_of(0.99 * least).comparison.gain < 1 < plan_of(1.01 * least).comparison.gain
    flops = computed.speed.flops_per_token["teacher_layers"] * 16 * 1000
    assert slow.comparison.storing_s >= flops / 4 / 1e14
    # One run of the teacher serves the dictionary and the shards, unless annotation needs more of it.
    both = slow.comparison.disk
    assert slow.disk.sample_kept * 1000 == slow.disk.sample_states * 1000 == both
    text = format_plan(slow)
    assert "of disk, and twice that until the shards are complete" in text
    assert "the same, kept until the shards are complete" in text
    assert re.search(r"the dictionary runs the teacher once, for about [\d.,]+ hours, and annotation does not;", text)
    more = plan_of(1e3, "annotation.teacher_top_n=3")
    assert (more.disk.sample_kept, more.comparison.reads_once) == (0, False)
    assert re.search(r"annotation runs the teacher once, for about [\d.,]+ hours;", format_plan(more))


@pytest.mark.parametrize("rate", ["0", "-1", "abc", "5GB", "5MB", "nan", "inf", "1e300", "1e-300", ""])
def test_a_rate_without_meaning_is_refused(tmp_path, dskd, rate):
    config_of(tmp_path)
    for option in ("--disk-bandwidth", "--host-memory"):
        code, _, error = dskd("plan", "--config", tmp_path / "config.yaml", *MACHINES, f"{option}={rate}")
        assert code == 2
        assert f"{option}: expected a number above 0 (1e-12 to 1e12) without a unit, found {rate!r}" in error


@pytest.mark.parametrize("rate", ["1e-12", "1e12"])
def test_the_slowest_and_the_fastest_disk_are_planned(tmp_path, dskd, rate):
    config_of(tmp_path)
    shapes = ["--teacher-config", shapes_file(tmp_path)]
    code, printed, _ = dskd(
        "plan", "--config", tmp_path / "config.yaml", *MACHINES, *shapes, *SMALL, f"--disk-bandwidth={rate}"
    )
    assert code == 0
    assert f"at --disk-bandwidth {float(rate):g}" in printed


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({}, ("'nobody/nothing'", "cannot be fetched", "--teacher-config FILE")),
        ({"path": "./nothing"}, ("there is no folder ./nothing", "--teacher-config FILE")),
        ({"path": "notes.txt"}, ("notes.txt is a file; name a Hugging Face model folder, or a GGUF file",)),
        (
            {"path": "folder"},
            ("there is no config.json (there is x.gguf: name that file, teacher.path: folder/x.gguf)",),
        ),
    ],
)
def test_a_teacher_that_cannot_be_found_is_named_with_the_option_that_helps(tmp_path, monkeypatch, dskd, change, parts):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.gguf").touch()
    config_of(tmp_path, **change)
    code, _, error = dskd("plan", "--config", tmp_path / "config.yaml", *MACHINES)
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
def test_a_file_that_is_not_the_config_of_a_decoder_is_named(tmp_path, dskd, text, part):
    config_of(tmp_path)
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    options = ["--config", tmp_path / "config.yaml", "--teacher-config", tmp_path / "x.json", *MACHINES]
    code, _, error = dskd("plan", *options, "student.layers=1", "student.train_layers=1")
    assert code == 2 and part in error and "Traceback" not in error


def test_a_warning_about_keys_that_transformers_lacks_names_the_file_once(tmp_path, dskd):
    config_of(tmp_path)
    file = shapes_file(tmp_path, attention_sink_scale=0.5, transformers_version="4.40.0")
    options = ["--config", tmp_path / "config.yaml", "--teacher-config", file, *MACHINES]
    _, _, error = dskd("plan", *options, "student.layers=2", "student.train_layers=1")
    warning = f"warning: --teacher-config: {file} (transformers 4.40.0): transformers "
    assert error.count("attention_sink_scale") == error.count(warning) == 1


def test_a_batch_that_training_would_refuse_is_refused_here(tmp_path, dskd):
    config_of(tmp_path)
    options = ["--config", tmp_path / "config.yaml", "--teacher-config", shapes_file(tmp_path), *MACHINES]
    code, _, error = dskd("plan", *options, "student.layers=2", "train.global_batch_size=7")
    assert code == 2 and "train.global_batch_size: 7 sequences cannot be divided among 2 ranks" in error


def test_a_shipped_config_is_planned_with_the_student_that_is_cut(tmp_path, dskd):
    """Those of Llama are planned at their own width, below: the documented plans."""
    save_model(tmp_path / "teacher", "mistral")
    path = REPOSITORY / "configs" / "mistral-7b-16layers.yaml"
    toy = [
        *(f"workdir={tmp_path / 'work'}", f"teacher.path={tmp_path / 'teacher'}", "student.layers=2"),
        *("student.train_layers=1", "corpus.sequence_length=32"),
    ]
    for run in load_config(path).run_names:
        code, printed, error = dskd("plan", "--config", path, *MACHINES, *toy, f"run={run}")
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
def test_the_documented_plans_are_what_the_command_prints(monkeypatch, dskd, number):
    monkeypatch.chdir(REPOSITORY)
    command, expected = _documented()[number]
    _, *arguments = shlex.split(command.replace("\\\n", " "))[1:]
    code, printed, _ = dskd("plan", *arguments)
    assert printed == expected and code == 0


def test_the_documented_refusal_is_what_the_command_prints(monkeypatch, dskd):
    monkeypatch.chdir(REPOSITORY)
    text = (REPOSITORY / "docs" / "scale.md").read_text(encoding="utf-8")
    (expected,) = re.findall(r"With GPUs of 16 GB.*?```\n(.*?)```", text, flags=re.DOTALL)
    _, *arguments = shlex.split(_documented()[0][0].replace("\\\n", " "))[1:]
    code, printed, _ = dskd("plan", *arguments, "--gpu-memory", 16)
    assert expected in printed and code == 3


def _planned_states(tmp_path, dskd, *overrides, **teacher):
    config = tmp_path / "config.yaml"
    write_config(config, {"workdir": str(tmp_path / "work"), "teacher": {"path": "a/b", **teacher}})
    options = ["--config", config, "--teacher-config", shapes_file(tmp_path), "--nodes", 1, "--gpus-per-node", 1]
    options += ["--gpu-memory", 80, "--host-memory", 200, *SMALL, *overrides]
    return dskd("plan", *options)


def test_shards_with_states_of_another_depth_or_type_have_to_be_annotated_again(tmp_path, dskd):
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
        _, printed, _ = _planned_states(tmp_path, dskd, *STORED, *changes)
        assert ("They are done: the shards exist" in printed) == is_done, changes
        assert ("The shards in the work directory hold other data of the teacher" in printed) != is_done, changes


def test_a_plan_says_which_stored_states_are_not_read(tmp_path, dskd):
    _, printed, _ = _planned_states(tmp_path, dskd, *STORED, mode="resident")
    assert "Stored states: teacher_states and trunk_states, which training does not read" in printed
    assert "because teacher.mode is resident; set teacher.mode to auto" in printed
    _, printed, _ = _planned_states(tmp_path, dskd, *STORED, "annotation.store=[trunk_states]")
    assert "Stored states: trunk_states, which training does not read, because there are no teacher_states" in printed


def test_a_trunk_that_the_teacher_rules_out_is_not_planned(tmp_path):
    config = config_of(tmp_path, *STORED, "student.train_lm_head=true")
    tied = Architecture(json.dumps({**LLAMA, "tie_word_embeddings": True}), "llama")
    with pytest.raises(
        UserError, match=r"annotation\.store: trunk_states .* there are none: .* embeddings are trained"
    ):
        make_plan(config, cluster_of(), tied, samples=1000)


def test_layers_chosen_by_importance_are_those_of_the_cut_student_and_until_then_assumed(tmp_path, dskd):
    options = ["student.spacing=importance", "student.train_layers=1"]
    _, printed, _ = _planned_states(tmp_path, dskd, *options)
    assert "the lowest 2 are computed once" in printed
    assert "; these are the layers of student.spacing: ends, until `dskd student` has measured others" in printed
    measured = {"samples": 64, "tokens": 999, "layers": [0.4, 0.1, 0.2, 0.3], "blocks": [0.4, 0.1, 0.2, 0.3]}
    settings = {"layers": 3, "importance_samples": 64}
    with build_artifact(tmp_path / "work" / "student", Recipe("student", {}, settings)) as building:
        building.facts.update(layers=[0, 2, 3], importance=measured)
    _, printed, _ = _planned_states(tmp_path, dskd, *options)
    assert "the lowest 1 are computed once" in printed and "has measured others" not in printed
    config = config_of(tmp_path, *options)
    assert plan_student(config, Architecture(json.dumps(LLAMA), "llama")).layers == [0, 2, 3]
    code, _, error = _planned_states(tmp_path, dskd, *options, "student.layers=4")
    assert code == 2 and "student.layers keeps all of the teacher's 4" in error


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_counted_once(tied):
    values = LLAMA | {"tie_word_embeddings": tied}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**values))
    assert Architecture(json.dumps(values), "llama").numel() == model.num_parameters()


def test_a_plan_shows_how_many_parameters_the_teacher_has(tmp_path, dskd):
    file = tmp_path / "config.json"
    large = {"vocab_size": 49152, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}
    file.write_text(
        json.dumps(LLAMA | large | {"intermediate_size": 1536, "num_hidden_layers": 30, "tie_word_embeddings": True})
    )
    config_of(tmp_path)
    _, printed, _ = dskd("plan", "--config", tmp_path / "config.yaml", "--teacher-config", file, *MACHINES)
    assert "30 layers, 0.13 billion parameters" in printed
