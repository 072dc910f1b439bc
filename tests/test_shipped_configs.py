"""The ready configurations: the paper's values are in them, and they train as they are, on toys."""

import math
from pathlib import Path

import pytest
import torch
from repository import REPOSITORY
from safetensors.torch import load_file
from shipped_inputs import LAYERS_OF_LARGE, LAYERS_OF_OTHERS, write_inputs
from stages import build_inputs_of_training
from tiny_wordnet import write_wordnet
from transformers import AutoConfig

from dskd.artifacts import kinds
from dskd.artifacts.manifest import read_manifest
from dskd.config.reading import differences, load_config
from dskd.training.checkpoints import checkpoint
from dskd.training.schedule import divide_batch
from dskd.training.train import train

# Two steps instead of two epochs, a checkpoint of each, shorter texts, and more of them in one pass of the teacher.
# The loader reads in the rank itself, and MLflow is left out, for time.
TOY = {
    "corpus.sequence_length": 128,
    "senses.batch_size": 64,
    "annotation.batch_size": 64,
    "train.steps": 2,
    "train.checkpoint_every": 1,
    "train.num_workers": 0,
    "tracking.enabled": False,
}
# The 70B configuration is an example of scale and not of the paper: of its batch a part will do, and of WordNet.
OF_SCALE = {"train.global_batch_size": 8, "wordnet.path": "wordnet", "corpus.sequence_length": 32}
# By the method's sections, a key and its value (docs/method.md, sections 1 to 5).
PAPER = {
    "lexicon.wordnet": False,
    "senses.key": "predicted",
    "senses.max_states": 100,
    "annotation.kappa": 5,
    "annotation.continuation_tokens": 10,
    "student.layers": 16,
    "student.spacing": "first",
    "student.train_layers": 2,
    "student.train_embeddings": False,
    "student.train_final_norm": False,
    "student.train_lm_head": False,
    "corpus.source": "tasks",
    "corpus.packing": "none",
    "tasks.train_share": 0.25,
    "tasks.choice_shots": 5,
    "tasks.squad_shots": 1,
    "tasks.squad_shots_from": "same_passage",
    "tasks.choice_tokens": 1,
    "tasks.squad_tokens": 10,
    "loss.ce_weight": 1.0,
    "loss.kd_weight": 0.7,
    "loss.divergence": "forward_kl",
    "loss.temperature": 2.0,
    "loss.sense_form": "distance",
    "loss.margin": 1.0,
    "loss.antonym_weight": 1.0,
    "loss.relation_share": 0.4,
    "loss.min_relations": 25,
    "loss.hidden_weight": 0.0,
    "train.weight_decay": 1e-3,
    "train.warmup_share": 0.1,
    "train.epochs": 2.0,
    "precision": "bf16",
}
LLAMA, MISTRAL, LARGE = "llama3-8b-16layers.yaml", "mistral-7b-16layers.yaml", "llama3-70b-to-8b.yaml"
# A CPU takes half the time in fp32; that of Llama-3-8B trains in bf16.
OWN_TOY = {LARGE: OF_SCALE, MISTRAL: {"precision": "fp32"}}
OF_TEACHER = {
    LLAMA: {"senses.k": 10, "loss.sense_weight": 1.0, "tasks.piqa_tokens": None},
    MISTRAL: {"senses.k": 5, "loss.sense_weight": 1.5, "tasks.piqa_tokens": 2},
}
RATE_OF_A_RANK = {LLAMA: 5e-5, MISTRAL: 2e-5}  # in the published program, where each has one sequence
# The teacher's layers that are kept, and the student's that are trained.
LAYERS = {
    LLAMA: (LAYERS_OF_OTHERS, 16, [14, 15]),
    MISTRAL: (LAYERS_OF_OTHERS, 16, [14, 15]),
    LARGE: (LAYERS_OF_LARGE, 7, [5, 6]),
}


def _value(config, key):
    found = config.as_dict()
    for part in key.split("."):
        found = found[part]
    return found


@pytest.mark.parametrize("name", OF_TEACHER)
def test_the_papers_configurations_have_its_values(name):
    config = load_config(REPOSITORY / "configs" / name)
    expected = PAPER | OF_TEACHER[name]
    assert {key: _value(config, key) for key in expected} == expected
    kd = load_config(REPOSITORY / "configs" / name, ["run=kd"])
    assert list(differences(config.as_dict()["loss"], kd.as_dict()["loss"])) == [
        ("sense_weight", OF_TEACHER[name]["loss.sense_weight"], 0.0)
    ]


@pytest.mark.parametrize("name", RATE_OF_A_RANK)
@pytest.mark.parametrize("batch", [3, 8, 16, 64])
def test_the_papers_rate_follows_the_batch(name, batch):
    """The published program multiplies the rate by its ranks, which run one sequence each; it was run on three."""
    train = load_config(REPOSITORY / "configs" / name, [f"train.global_batch_size={batch}"]).train
    assert train.peak_learning_rate == pytest.approx(batch * RATE_OF_A_RANK[name])
    assert train.learning_rate_batch_size == 3
    epoch = 155_506
    assert train.peak_learning_rate * (epoch / batch) == pytest.approx(3 * RATE_OF_A_RANK[name] * (epoch / 3))


@pytest.mark.parametrize("name", RATE_OF_A_RANK)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_papers_batch_is_divided_among_the_gpus_of_a_node(name, ranks):
    train = load_config(REPOSITORY / "configs" / name).train
    micro_batch, accumulation = divide_batch(train, ranks)
    assert micro_batch * accumulation * ranks == train.global_batch_size == 8


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_every_shipped_configuration_trains_at_toy_width(name, tmp_path, monkeypatch, world):
    monkeypatch.chdir(tmp_path)  # where the paths of a shipped config begin
    path, toy = REPOSITORY / "configs" / name, TOY | OWN_TOY.get(name, {})
    overrides = [f"{key}={value}".replace("False", "false") for key, value in toy.items()]
    shipped, config = load_config(path), load_config(path, overrides)
    assert {key for key, *_ in differences(shipped.as_dict(), config.as_dict())} == set(toy)
    write_inputs(tmp_path, config)
    write_wordnet(tmp_path / "wordnet")
    total, kept, trained = LAYERS[name]

    build_inputs_of_training(config, world)
    train(config, world)  # its kd has another weight, and test_other_students.py trains without senses

    layers = _layers(load_file(Path(config.teacher.path) / "model.safetensors"))
    student = _layers(load_file(config.path("student", "model.safetensors")))
    assert AutoConfig.from_pretrained(config.teacher.path).num_hidden_layers == len(layers) == total
    assert sorted(student) == list(range(kept))
    for number, weights in student.items():  # the first ones, as they are
        assert all(weight.equal(layers[number][key]) for key, weight in weights.items())
    steps = [kinds.checkpoint_folder(config) / f"step-{step:08d}" for step in (1, 2)]
    losses = [read_manifest(step, "checkpoint", made_by="-").facts["loss"] for step in steps]
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    weights = load_file(steps[-1] / checkpoint.TRAINED_FILE)
    moved = _layers(weights)
    assert sorted(moved) == trained and len(weights) == sum(map(len, moved.values()))
    assert all(
        not weight.to(torch.bfloat16).equal(student[number][key]) or weight.ndim == 1
        for number in trained
        for key, weight in moved[number].items()
    )
    coverage = read_manifest(config.path("shards", "train"), "shards", made_by="-").facts["coverage"]
    assert all(share > 0 for share in coverage.values()), coverage


def _layers(weights):
    """Returns {layer: {name in the layer: weight}} of the weights that belong to a layer."""
    found = {}
    for name, weight in weights.items():
        if ".layers." in name:
            number, key = name.split(".layers.")[1].split(".", 1)
            found.setdefault(int(number), {})[key] = weight
    return found
