"""Students that are not cut from the teacher, trained on real shards: another architecture, width and depth."""

import shutil

import pytest
import torch
from plain_training import PlainTraining
from rank_processes import run_program
from safetensors.torch import load_file
from tiny_work import BEFORE_TRAINING, RESIDENT, TINY, copy_work
from tracked_results import losses_of
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from dskd.config.reading import load_config
from dskd.errors import UserError
from dskd.evaluation.held_out_text import evaluate
from dskd.evaluation.scores_by_example import read_examples
from dskd.shards.annotate import annotate
from dskd.students.student import build_student
from dskd.training.checkpoints import checkpoint
from dskd.training.exporting.export import build_export
from dskd.training.status import report_status
from dskd.training.train import train

pytestmark = pytest.mark.slow

# Checkpoints after steps 2 and 3; on one rank two micro-batches a step.
SETTINGS = {
    **TINY["train"],
    **{"steps": 3, "checkpoint_every": 2, "micro_batch_size": 4, "warmup_share": 0.0, "gradient_clipping": 0.5},
    "num_workers": 0,
}
LOSS = {"kd_weight": 0.8, "temperature": 1.5, "sense_weight": 0.0}
NEW = {"layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 2, "tie_embeddings": False}
KEPT = [name for name in BEFORE_TRAINING if name != "student"]


@pytest.fixture(scope="module")
def pretrained(tiny, tmp_path_factory):
    """A tied Qwen 2 with the teacher's tokenizer and 40 more rows of padding, narrower than the teacher."""
    folder, teacher = tmp_path_factory.mktemp("pretrained"), load_config(tiny).path("teacher")
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    torch.manual_seed(5)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer) + 40,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)  # so that predictions are not uniform
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tiny, pretrained, world, tmp_path_factory):
    """The config of a run with that student, which one rank trained."""
    changes = {"teacher": RESIDENT, "student": {"path": str(pretrained)}, "loss": LOSS, "train": SETTINGS}
    path = copy_work(tiny, tmp_path_factory.mktemp("run"), *KEPT, **changes)
    config = load_config(path)
    build_student(config)
    train(config, world)
    return path


def _tensors(path):
    return load_file(checkpoint.latest(load_config(path)).path / checkpoint.TRAINED_FILE)


def test_losses_and_weights_are_those_of_a_plain_loop_with_transformers(trained, tmp_path):
    """The divergence is over the tokens that both models have."""
    config = load_config(trained)
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(config.path(name), dtype=torch.float32) for name in ("teacher", "student")
    )
    assert teacher.vocab_size == student.vocab_size - 40
    end = AutoTokenizer.from_pretrained(config.path("teacher")).eos_token_id
    plain = PlainTraining(config, tmp_path / "cache", student=student, teacher=teacher, end=end)
    expected = {"loss": [], "ce": [], "kl": []}
    for step in plain.steps():
        ce, kl = step.ce().mean(), step.kl(1.5).mean()
        total = ce + 0.8 * 1.5**2 * kl
        plain.minimise(total)
        for name, value in (("loss", total), ("ce", ce), ("kl", kl)):
            expected[name].append(value.item())
    for name, values in expected.items():
        assert [value for _, value in losses_of(trained, f"train/{name}")] == pytest.approx(values, rel=1e-4), name
    tensors = _tensors(trained)
    named = dict(student.named_parameters())  # the tied matrix once
    assert set(tensors) == set(named)
    for name, parameter in named.items():
        torch.testing.assert_close(tensors[name], parameter.detach(), rtol=1e-3, atol=3e-5)
    assert report_status(config)


def test_the_export_is_the_trained_student_for_transformers_alone(trained):
    config = load_config(trained)
    build_export(config)
    folder = config.path("export", config.run)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    probe = load_file(checkpoint.latest(config).path / checkpoint.PROBE_FILE)
    ids, expected = probe["input_ids"], probe["logits"]
    options = {"position_ids": probe["position_ids"]} if "position_ids" in probe else {}
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids, **options).logits, expected, rtol=1e-3, atol=1e-4)
    assert AutoTokenizer.from_pretrained(folder)("large and small")["input_ids"]


def test_two_ranks_train_the_same_student(trained, copy_of_tiny):
    """A run whose student is trained as a whole resumes in test_width_map.py."""
    of_one = load_config(trained)
    changes = {"teacher": RESIDENT, "student": {"path": of_one.student.path}, "loss": LOSS, "train": SETTINGS}
    two = copy_of_tiny(*KEPT, **changes)
    shutil.copytree(of_one.path("student"), load_config(two).path("student"))
    run_program("train.py", two, ranks=2)
    for name in ("loss", "ce", "kl", "grad_norm"):
        values = [[value for _, value in losses_of(path, f"train/{name}")] for path in (trained, two)]
        assert values[0] == pytest.approx(values[1], rel=2e-4), name
    tensors = _tensors(two)
    for name, tensor in _tensors(trained).items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-3, atol=2e-5)


def test_its_states_are_not_compared_with_sense_embeddings_of_another_width(trained, world):
    config = load_config(trained)
    evaluate(config, world)
    measures = {
        name: {
            measure.name
            for measure in read_examples((config.path("evaluation", name) / "examples.parquet").read_bytes()).measures
        }
        for name in ("teacher", "student")
    }
    assert measures["teacher"] - measures["student"] == {"sense_alignment"}
    assert "agreement" in measures["student"]


def test_a_new_student_trains_from_stored_states_as_with_the_teacher(copy_of_tiny, world):
    annotation = {**TINY["annotation"], "batch_size": 2, "teacher_top_n": 0, "store": ["teacher_states"]}
    settings = {**SETTINGS, "micro_batch_size": 2, "num_workers": 0}
    kept = [name for name in KEPT if name != "shards"]
    path = copy_of_tiny(*kept, annotation=annotation, student={"from_config": NEW}, loss=LOSS, train=settings)
    config = load_config(path)
    build_student(config)
    annotate(config, world)
    results = []
    for run, mode in (("shards", "auto"), ("online", "resident")):
        chosen = load_config(path, [f"run={run}", f"teacher.mode={mode}"])
        train(chosen, world)
        results.append(load_file(checkpoint.latest(chosen).path / checkpoint.TRAINED_FILE))
    assert "lm_head.weight" in results[0]
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


def test_the_most_probable_tokens_need_one_size_of_vocabulary(trained, world):
    cached = load_config(trained, ["teacher.mode=cached", "run=cached"])
    with pytest.raises(UserError, match=r"needs the same vocabulary size .* choose a student with the teacher's"):
        train(cached, world)
