"""A chat model from a GGUF file through all stages, to a student that is exported, evaluated and can be published."""

import json
import random

import pytest
import torch
from gguf_files import TEXTS, write_gguf
from huggingface_hub import ModelCard
from stages import build_inputs_of_training
from transformers import AutoModelForCausalLM, AutoTokenizer

from dskd.cli.results import describe_results
from dskd.config import Config
from dskd.errors import UserError
from dskd.evaluation import held_out_text
from dskd.evaluation.held_out_text import evaluate
from dskd.evaluation.results_in_cards import update_cards
from dskd.models.gguf.teacher import build_teacher
from dskd.training.exporting.export import build_export
from dskd.training.train import train

pytestmark = pytest.mark.slow
PROMPTS = ("What is the opposite of hot?", "Say it's more")
NEW_TOKENS = 12


def _settings(folder):
    return {
        "workdir": str(folder / "work"),
        "precision": "fp32",
        "teacher": {"path": str(folder / "model.gguf"), "mode": "resident"},
        "corpus": {"source": "files", "train": (str(folder / "text.jsonl"),), "sequence_length": 32},
        "lexicon": {"wordnet": False, "tsv": (str(folder / "own.tsv"),)},
        "senses": {"k": 2, "key": "target"},
        "annotation": {"kappa": 2},
        "student": {"layers": 2, "train_layers": 1},
        "train": {"steps": 3, "global_batch_size": 4, "num_workers": 0, "learning_rate": 0.01},
        "evaluation": {"prompts": PROMPTS, "samples": 2, "sample_tokens": NEW_TOKENS},
        "tracking": {"enabled": False},
    }


@pytest.fixture(scope="module")
def config(tmp_path_factory, world):
    folder = tmp_path_factory.mktemp("chat")
    keys = {"general.source.url": "https://huggingface.co/org/tiny-chat", "general.organization": "Org <b>"}
    write_gguf(folder / "model.gguf", keys=keys)
    words = [text.split() for text in TEXTS[:2]]
    draw = random.Random(0)
    lines = [" ".join(draw.choices(words[0] + words[1], k=12)) for _ in range(120)]
    (folder / "text.jsonl").write_text("".join(f"{json.dumps({'text': line})}\n" for line in lines))
    (folder / "own.tsv").write_text("hot\tantonym\tcold\nhot\tsynonym\tsum\ncold\tsynonym\tmore\n")
    config = Config(**_settings(folder))
    build_teacher(config)
    build_inputs_of_training(config, world)
    train(config, world)
    build_export(config)
    return config


def test_the_card_has_results_after_the_evaluation_which_stays_up_to_date(config, world):
    file = config.path("export", "dskd", "README.md")
    assert "Not evaluated yet" in file.read_text()
    evaluate(config, world)
    update_cards(config)
    assert held_out_text.are_current(config)
    card = ModelCard.load(file)
    assert card.data.base_model == "org/tiny-chat"
    assert card.data.license == "apache-2.0"
    measures = json.loads(config.path("evaluation", "dskd", "measures.json").read_text())
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {name: pytest.approx(measures[name], rel=1e-5) for name in ("perplexity", "accuracy")}
    assert "| | teacher | student before training | this model |" in card.text
    perplexity = float(f"{measures['perplexity']:.4g}")  # four digits, written out
    assert f"| {perplexity:,.0f} |\n" in card.text
    teacher = "Tiny, of Org &lt;b&gt;, made from Tiny Base, https://huggingface.co/org/tiny-chat: read from a GGUF file"
    assert teacher in card.text
    assert "its layers 0, 2 of 3, counted from 0; trained: the last layer" in card.text
    assert str(config.path().parent) not in file.read_text()
    before = file.stat().st_mtime_ns
    update_cards(config)
    assert file.stat().st_mtime_ns == before


def test_answers_are_those_that_transformers_generates_for_the_chat(config, world):
    evaluate(config, world)
    tokenizer = AutoTokenizer.from_pretrained(config.path("export", "dskd"))
    for name, folder in (("teacher", "teacher"), ("student", "student"), ("dskd", "export/dskd")):
        model = AutoModelForCausalLM.from_pretrained(config.path(folder), dtype=torch.float32)
        expected = []
        for prompt in PROMPTS:
            chat = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
            said = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
            expected.append([prompt, "", tokenizer.decode(said, skip_special_tokens=True)])
        table = json.loads(config.path("evaluation", name, "samples.json").read_text())
        assert [[row[0], row[1], row[-1]] for row in table["data"][: len(PROMPTS)]] == expected
        assert len(table["data"]) == len(PROMPTS) + 2
        assert all(row[1] for row in table["data"][len(PROMPTS) :])  # held-out texts have a known end


def test_the_end_of_the_pipeline_shows_answers_senses_and_a_program_that_chats(config, world):
    evaluate(config, world)
    printed = describe_results(config)
    for part in (*PROMPTS, "  teacher ", "  student before training ", "  dskd ", "  (the text itself) "):
        assert f"\n{part}" in printed, part
    for part in ("hot: 2 senses, of ", " states; near ", "«hot»"):
        assert part in printed, part
    assert f"\n  dskd  {config.path('export', 'dskd')}\n" in printed
    program = printed.partition("in Python:\n")[2]
    said = []
    exec("\n".join(line.removeprefix("  ") for line in program.splitlines()), {"print": said.append})
    assert len(said) == 1
    assert isinstance(said[0], str)


def test_a_request_that_does_not_fit_is_refused_before_a_model_is_loaded(config, world):
    long = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"sample_tokens": 120})})
    with pytest.raises(
        UserError, match=r"evaluation.prompts\[0\]: its \d+ tokens, .*the 120 of .*the 128 positions of"
    ):
        evaluate(long, world)


def test_requests_are_part_of_the_recipe_and_a_config_without_them_has_the_recipe_of_before(config):
    def recipe(**changes):
        changed = config.model_copy(update={"evaluation": config.evaluation.model_copy(update=changes)})
        models = held_out_text.candidates(changed)
        return held_out_text.recipe(changed, models[0], held_out_text.open_inputs(changed, models[0].folder)).config

    assert recipe(prompts=()) == {"precision": "fp32", "samples": 2, "sample_tokens": NEW_TOKENS}
    assert recipe(prompts=PROMPTS) != recipe(prompts=PROMPTS[:1])
