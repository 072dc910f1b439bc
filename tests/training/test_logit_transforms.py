"""Pairs whose logits are scaled or capped, from text to export: numbers are those of transformers and autograd."""

import shutil

import pytest
import torch
from architectures import save_architecture
from config_files import write_config
from plain_training import PlainTraining
from safetensors.torch import load_file
from stages import build_inputs_of_training
from tiny_work import NO_RUNS
from tracked_results import losses_of
from transformers import AutoModelForCausalLM

from dskd.config.reading import load_config
from dskd.training.checkpoints import checkpoint
from dskd.training.exporting.export import build_export
from dskd.training.train import train

pytestmark = pytest.mark.slow

END = 0
WORDS = [f"w{index}" for index in range(100)]
CUT = {"layers": 2, "train_layers": "all", "train_embeddings": True, "train_final_norm": True, "train_lm_head": True}
BASE = {
    "precision": "fp32",
    "teacher": {"path": "teacher", "mode": "resident"},
    "lexicon": {"wordnet": False, "tsv": ["own.tsv"]},
    "corpus": {"source": "files", "train": ["text.txt"], "sequence_length": 16, "max_sequences": 24},
    "senses": {"k": 2, "max_states": 4},
    "annotation": {"kappa": 2},
    "loss": {"kd_weight": 0.8, "temperature": 1.5, "hidden_weight": 2.0, "sense_weight": 0.0},
    "train": {
        **{"steps": 3, "learning_rate": 1.0e-3, "warmup_share": 0.0, "gradient_clipping": 0.5, "weight_decay": 0.01},
        **{"global_batch_size": 8, "micro_batch_size": 4, "num_workers": 0, "loss_chunk_size": 50},
    },
}


def _save(folder, name, seed=0):
    """Writes a random model whose products of states and output matrix are large enough for a cap to change them."""
    model = save_architecture(folder, name, seed=seed)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)
    model.save_pretrained(folder)


def _load(folder):
    """Loads a model for the plain loop: with eager attention, which applies the cap of Gemma 2's scores."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize(("teacher", "student"), [("gemma2", None), ("cohere", None), ("gemma2", "granite")])
def test_a_pair_trains_as_in_a_plain_loop_and_its_export_computes_the_same(
    tmp_path, monkeypatch, world, no_runs, teacher, student
):
    """The student is cut from the teacher, or a model of another architecture, with its own scale; all of it trains."""
    monkeypatch.chdir(tmp_path)
    _save(tmp_path / "teacher", teacher)
    if student is not None:
        _save(tmp_path / "other", student, seed=1)
    texts = (" ".join(WORDS[(7 * i + 3 * j) % 100] for j in range(5 + i % 9)) for i in range(90))
    (tmp_path / "text.txt").write_text("\n\n".join(texts))
    (tmp_path / "own.tsv").write_text("".join(f"w{i}\tsynonym\tw{i + 1}\n" for i in range(10, 99)))
    keys = CUT if student is None else {"path": "other"}
    path = write_config(tmp_path / "config.yaml", BASE, workdir=str(tmp_path / "work"), student=keys)
    config = load_config(path)
    config.path().mkdir()
    shutil.copyfile(no_runs, config.path(NO_RUNS))
    build_inputs_of_training(config, world)
    train(config, world)
    build_export(config)

    student = _load(config.path("student"))
    plain = PlainTraining(config, tmp_path / "cache", student=student, teacher=_load("teacher"), end=END)
    expected = {"loss": [], "ce": [], "kl": [], "hidden": []}
    for step in plain.steps():
        ce, kl, hidden = step.ce().mean(), step.kl(1.5).mean(), step.hidden()
        total = ce + 0.8 * 1.5**2 * kl + 2.0 * hidden
        plain.minimise(total)
        for name, value in (("loss", total), ("ce", ce), ("kl", kl), ("hidden", hidden)):
            expected[name].append(value.item())
    for name, values in expected.items():
        assert [value for _, value in losses_of(path, f"train/{name}")] == pytest.approx(values, rel=1e-4), name
    trained, named = (
        load_file(checkpoint.latest(config).path / checkpoint.TRAINED_FILE),
        dict(student.named_parameters()),
    )
    assert set(trained) == set(named)
    for name, parameter in named.items():
        torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-3, atol=2e-5)
    exported = AutoModelForCausalLM.from_pretrained(config.path("export", config.run), dtype=torch.float32)
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, student(ids).logits, rtol=1e-3, atol=1e-3)
