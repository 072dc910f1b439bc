"""The model card of an export: what it says of teacher and licence, and that the Hub's own library reads it."""

import ast
import json
import re

import pytest
from huggingface_hub import ModelCard
from tiny_models import save_model

from dskd.artifacts.building import build_artifact
from dskd.artifacts.manifest import Manifest, Recipe
from dskd.config import Config, LossConfig
from dskd.evaluation.evaluations import HELD_OUT
from dskd.models.files import smollm2
from dskd.models.files.digests import digest_of_model
from dskd.models.files.folder import ModelFolder
from dskd.training.checkpoints.checkpoint import Checkpoint
from dskd.training.exporting.card import Result, render_card, write_card
from dskd.training.exporting.card_facts import _of_gguf, _student, _text, describe_teacher, find_source_teacher
from dskd.training.exporting.licences import licence_in_card, obligations

HUB = {
    "origin": "hub",
    "name": "org/big-model",
    "base_model": ["org/big-model"],
    "license": "apache-2.0",
    "architecture": "LlamaForCausalLM",
    "layers": 30,
}


def _facts(teacher=HUB, student=None, loss=None, **card):
    """Facts as an export's manifest has them."""
    return {
        "run": "kd",
        "step": 40,
        "rounding_error": 0.0,
        "card": {
            **({"teacher": teacher} if teacher else {}),
            "student": {"digest": "d", "origin": "cut", "num_layers": 4, "layers": [0, 1, 28, 29]}
            | {"has_chat_template": True}
            | (student or {}),
            "text": {"source": "wordnet", "documents": 1234},
            "lexicon": {"wordnet": {"synonym": 10, "antonym": 2}, "own lists": {"synonym": 3, "antonym": 0}},
            "loss": LossConfig(**(loss or {})).as_dict(),
            "training": {
                "learning_rate": 0.001,
                "global_batch_size": 16,
                "steps": 40,
                "sequences": 640,
                "sequence_length": 128,
                "trained": {"train_layers": 2, "train_embeddings": False, "train_final_norm": True},
                "precision": "bf16",
                "seed": 0,
            },
            **card,
        },
    }


def _card(tmp_path, *arguments, **options):
    """Returns the card as the Hub's library loads it from a file, and its text."""
    text = render_card(*arguments, packages={"dskd": "0.1.0", "torch": "2.9.0", "numpy": "2"}, **options)
    assert write_card(tmp_path, text)
    assert not write_card(tmp_path, text)  # it is there already
    card = ModelCard.load(tmp_path / "README.md")
    assert str(card) == text
    return card.data, card.text


def test_the_card_has_what_the_manifest_says(tmp_path):
    data, text = _card(tmp_path, _facts(loss={"kd_weight": 10, "sense_weight": 1, "hidden_weight": 20}))
    assert data.base_model == "org/big-model"
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "text-generation")
    assert data.eval_results is None
    for part in (
        "[org/big-model](https://huggingface.co/org/big-model) (LlamaForCausalLM, 30 layers)",
        "its layers 0, 1, 28, 29 of 30, counted from 0; trained: the last 2 layers, the final norm",
        "WordNet's definitions and examples; a corpus of 1,234 documents",
        "wordnet (10 synonym pairs, 2 antonym pairs); own lists (3 synonym pairs, 0 antonym pairs)",
        "1 × cross-entropy with the next token + 10 × T² × KL(teacher ‖ student) (T = 2) + 1 × sense loss "
        "(form: distance) + 20 × squared distance to the teacher's last hidden state",
        "40 steps of 16 sequences of up to 128 tokens (81,920 in all, at most)",
        "dskd 0.1.0, torch 2.9.0\n",
        "\n\nNot evaluated yet.\n\n## Licence\n",
        "The teacher is under the Apache License 2.0, which applies to this model too",
        "state that the model was changed",
        "give a copy of the licence (https://www.apache.org/licenses/LICENSE-2.0)",
        "licence (https://wordnet.princeton.edu/license-and-commercial-use), with this notice: WordNet 3.0 Copyright",
        "arXiv:2602.22351",
    ):
        assert part in text, part


def test_without_a_sense_loss_no_lexicon_is_named(tmp_path):
    _, text = _card(tmp_path, _facts(loss={"sense_weight": 0}))
    assert "antonym" not in text
    assert "sense embeddings" not in text


def test_the_card_names_the_share_of_positions_of_the_loss(tmp_path):
    _, text = _card(tmp_path, _facts(loss={"position_share": 0.35}))
    assert "; at 35 % of the positions, drawn at random in each step" in text
    assert "drawn at random" not in _card(tmp_path, _facts())[1]


def test_results_are_in_the_text_and_in_the_head(tmp_path):
    held_out = Result(
        "Held-out text",
        ["teacher", "this model"],
        [("perplexity", ["12.5", "20.25"]), ("accuracy", ["0.5", "0.4"])],
        "held-out-text",
        {"perplexity": 20.25, "accuracy": 0.4},
    )
    data, text = _card(tmp_path, _facts(), results=[held_out])
    assert "Not evaluated" not in text
    assert "\nHeld-out text:\n\n| | teacher | this model |\n|---|---:|---:|\n| perplexity | 12.5 | 20.25 |\n" in text
    assert data.model_name == "kd"
    found = {(result.dataset_type, result.metric_type): result.metric_value for result in data.eval_results}
    assert found == {("held-out-text", "perplexity"): 20.25, ("held-out-text", "accuracy"): 0.4}
    assert {result.dataset_name for result in data.eval_results} == {"Held-out text of WordNet"}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ({"source": "huggingface", "dataset": "org/texts", "documents": 1}, "Held-out text of org/texts"),
        ({"source": "files", "documents": 1}, "Held-out text"),
    ],
)
def test_held_out_text_has_the_name_of_its_dataset_if_that_is_known(tmp_path, text, name):
    result = Result("Held-out text", ["this model"], [], "held-out-text", {"perplexity": 20.25})
    data, _ = _card(tmp_path, _facts(text=text), results=[result])
    assert [result.dataset_name for result in data.eval_results] == [name]


def test_large_numbers_have_no_exponent():
    values = {"perplexity": 28_693_210.6, "kl_from_teacher": 0.123456, "accuracy": 0.00001}
    assert HELD_OUT.in_card.rows(values) == {
        "perplexity": "28,690,000",
        "kl from teacher": "0.1235",
        "accuracy": "1e-05",
    }


@pytest.mark.parametrize("has_template", [True, False])
def test_the_program_in_the_card_is_python_that_chats_or_continues(tmp_path, has_template):
    _, text = _card(tmp_path, _facts(student={"has_chat_template": has_template}))
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    ast.parse(program)
    assert ('"role": "user"' in program) == has_template


@pytest.mark.parametrize(
    ("known", "asks"),
    [
        ({"license": "apache-2.0"}, "keep the teacher's notices"),
        ({"license": "llama3.1"}, "“Built with Llama” where the model is made available; let the model's name begin"),
        ({"license": "llama3"}, "show “Built with Meta Llama 3”"),
        ({"license": "other", "license_name": "llama2"}, "do not use the model or its output to improve other"),
        ({"license": "gemma"}, "bind everybody who gets it to the use restrictions"),
        ({"license": "other", "license_name": "own-terms"}, "name its licence as own-terms. See the teacher's licence"),
        ({}, "The teacher's files do not state its licence. See the teacher's licence"),
    ],
)
def test_the_card_says_what_the_teachers_licence_asks(tmp_path, known, asks):
    teacher = {key: value for key, value in HUB.items() if key != "license"} | known
    data, text = _card(tmp_path, _facts(teacher))
    assert asks in text
    assert (data.license, data.get("license_name")) == (known.get("license"), known.get("license_name"))


def test_a_teacher_that_is_not_here_is_not_named(tmp_path):
    data, text = _card(tmp_path, _facts(teacher=None))
    assert data.base_model is None
    assert data.license is None
    assert "not known: it was not on the machine that exported the model" in text
    assert "do not state its licence" in text


def test_a_pretrained_student_has_a_licence_and_a_name_of_its_own(tmp_path):
    student = {"origin": "path", "name": "org/small", "license": "mit"}
    data, text = _card(tmp_path, _facts(student=student))
    assert data.base_model == ["org/small", "org/big-model"]
    assert data.license is None  # two licences apply
    assert "began as org/small" in text
    assert "which is under the MIT License; that licence applies too: with every copy" in text


def test_markdown_in_names_is_not_read_as_such(tmp_path):
    name = r"Evil | <img src=x> [a](b) `c` *d* _e_ \[f\](g)"
    _, text = _card(tmp_path, _facts({**HUB, "origin": "gguf", "name": name, "base_model": []}))
    assert r"Evil \| &lt;img src=x&gt; \[a\](b) 'c' \*d\* \_e\_ \\\[f\\\](g)" in text
    assert "add `base_model: ORGANISATION/NAME` to the head" in text


@pytest.mark.parametrize(
    "link", ["https://e.org) <script>alert(1)</script>", "https://me:secret@e.org/x", "javascript:x", "http://e.org"]
)
def test_only_plain_addresses_without_a_user_are_links(tmp_path, link):
    for teacher in (
        {**HUB, "license": "other", "license_name": "own", "license_link": link},
        {**HUB, "origin": "gguf", "url": link},
    ):
        data, text = _card(tmp_path, _facts(teacher))
        assert link not in text
        assert data.get("license_link") is None
        (tmp_path / "README.md").unlink()
    of_gguf = _of_gguf({"url": link, "license.link": link})
    assert (of_gguf["url"], of_gguf["license_link"]) == (None, None)
    (tmp_path / "README.md").write_text(f"---\nlicense: other\nlicense_link: {json.dumps(link)}\n---\n")
    assert licence_in_card(tmp_path) == {"license": "other"}


def test_addresses_and_files_of_licences_are_links(tmp_path):
    for link in ("https://e.org/a_b/@c?d=1", "LICENSE.md"):
        data, text = _card(tmp_path, _facts({**HUB, "license": "other", "license_name": "own", "license_link": link}))
        assert data.license_link == link
        assert (f"as own ({link})" in text) == link.startswith("https")
        (tmp_path / "README.md").unlink()


def test_numbers_fit_their_nouns_and_nothing_is_empty():
    facts = _facts(text={"source": "wordnet", "documents": 1})
    facts["card"]["training"] |= {"steps": 1, "global_batch_size": 1}
    text = render_card(facts, packages={})
    assert "1 step of 1 sequence of up to" in text
    assert "a corpus of 1 document\n" in text
    assert "Versions" not in text


@pytest.mark.parametrize(
    ("licence", "says"),
    [
        ({}, "whose files do not state its licence. That licence applies too: see it, wherever the model's makers"),
        ({"license": "own_terms"}, "whose files name its licence as own\\_terms; that licence applies too."),
    ],
)
def test_the_card_refers_to_the_unknown_licence_of_a_pretrained_student(licence, says):
    assert says in render_card(_facts(student={"origin": "path", **licence}), packages={})


def test_a_folder_that_is_gone_is_not_taken_for_a_name_on_the_hub(tmp_path, monkeypatch):
    """Its name may be that of a customer. A model of the Hub is found in a cache, under another path."""
    monkeypatch.chdir(tmp_path)
    student = ModelFolder(tmp_path / "student", "")
    for folder, name in (("private/model", None), ("cache/models--private--model/snapshots/0", "private/model")):
        with build_artifact(tmp_path / "student", Recipe("student", {}, {}, "t", "t")) as building:
            save_model(building.folder)
            building.facts.update(origin="path", path="private/model", revision=None, folder=folder)
        assert _student(student).get("name") == name
    corpus = Manifest("corpus", 1, {}, {"source": "chat", "dataset": "data/chats"}, None, None, {}, {}, {})
    corpus.facts["documents"] = {"train": 3}
    assert _text(corpus)["dataset"] == "data/chats"
    corpus.inputs["data/chats"] = "the digest of its files"
    assert "dataset" not in _text(corpus)


def _teacher(tmp_path, path, card=None):
    """Returns what is known of a random model in a folder, with a card of its own."""
    folder = tmp_path / "model"
    save_model(folder)
    if card is not None:
        (folder / "README.md").write_text(card)
    config = Config(workdir=str(tmp_path / "work"), teacher={"path": path or str(folder)})
    return describe_teacher(config, ModelFolder(folder, ""))


def test_a_teacher_of_the_hub_is_looked_for_on_this_machine_and_never_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    config = Config(workdir=str(tmp_path / "work"), teacher={"path": "org/name"})
    config.path().mkdir()

    def source(teacher):
        manifest = Manifest("checkpoint", 1, {}, {}, teacher, None, {}, {}, {})
        return Checkpoint(tmp_path, 1, manifest)

    assert find_source_teacher(config, source("0" * 64)) is None
    assert "org/name was not fetched from the Hub to this machine" in capsys.readouterr().err
    folder = tmp_path / "cache" / "models--org--name"
    save_model(folder / "snapshots" / "abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    assert find_source_teacher(config, source("0" * 64)) is None
    assert "is another model than the one that run 'dskd' was trained with" in capsys.readouterr().err
    digest = digest_of_model(folder / "snapshots" / "abc", cache=tmp_path / "digests.json")
    assert find_source_teacher(config, source(digest)).path == folder / "snapshots" / "abc"
    (folder / "snapshots" / "abc" / "model.safetensors").unlink()  # as `dskd plan` fetches only the config
    assert find_source_teacher(config, source(digest)) is None


def test_a_teacher_of_the_hub_has_its_name_and_the_licence_of_its_card(tmp_path):
    card = "---\nlicense: llama3.2\nlicense_link: https://example.org/x\nbase_model: org/older\n---\n# A model\n"
    facts = _teacher(tmp_path, "org/name", card)
    assert facts == {
        "origin": "hub",
        "name": "org/name",
        "base_model": ["org/name"],
        "license": "llama3.2",
        "license_link": "https://example.org/x",
        "architecture": "LlamaForCausalLM",
        "layers": 4,
    }
    assert obligations(facts)[0] == "the Llama 3.2 Community License"


@pytest.mark.parametrize(
    "card", [None, "# no head", "---\n[1, 2]\n---\n", "---\na: [\n---\n", "---\nlicense: 3\n---\n"]
)
def test_a_local_teacher_has_no_name_and_the_licence_that_its_card_has_if_any(tmp_path, card):
    assert _teacher(tmp_path, None, card) == {
        "origin": "folder",
        "architecture": "LlamaForCausalLM",
        "layers": 4,
    }
    assert _teacher(tmp_path, None, "---\nlicense: [mit]\n---\n")["license"] == "mit"


@pytest.mark.parametrize(
    ("sha256", "name", "base"),
    [(smollm2.SHA256, "SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"), ("0" * 64, "Odd name", None)],
)
def test_a_gguf_file_that_is_known_by_its_content_has_the_name_of_its_model(tmp_path, sha256, name, base):
    with build_artifact(tmp_path / "teacher", Recipe("teacher", {"gguf": sha256}, {})) as building:
        save_model(building.folder)
        building.facts["provenance"] = {"name": "Odd name", "license": "apache-2.0"}
    config = Config(workdir=str(tmp_path / "work"), teacher={"path": "x.gguf"})
    facts = describe_teacher(config, ModelFolder(tmp_path / "teacher", ""))
    data, text = _card(tmp_path, _facts(facts))
    assert data.base_model == base
    assert f"# kd: a student of {name}\n" in text
    assert ("add `base_model" in text) == (base is None)
    assert data.license == "apache-2.0"
