"""Limits of positions and tokens, compared with what transformers computes."""

import pytest
import torch
from tiny_models import save_model, word_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
)

from dskd.config import Config
from dskd.errors import UserError
from dskd.models.files.folder import find_teacher
from dskd.models.limits import check_limits, check_new_tokens, check_text, position_limit, vocabulary_size

SMALL = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (LlamaConfig(max_position_embeddings=64), 64),
        (GPT2Config(n_positions=16), 16),
        (OPTConfig(max_position_embeddings=32), 32),
        (BloomConfig(), None),
        (FalconConfig(alibi=True, max_position_embeddings=2048), None),
        (FalconConfig(alibi=False, max_position_embeddings=2048), 2048),
        (
            Qwen2Config(
                max_position_embeddings=32768,
                rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            ),
            131072,
        ),
        (LlamaConfig(max_position_embeddings=64, rope_scaling={"rope_type": "linear", "factor": 2.0}), 64),
        (LlamaConfig(max_position_embeddings=64, rope_scaling={"rope_type": "dynamic", "factor": 2.0}), 64),
        (Gemma3TextConfig(max_position_embeddings=131072, rope_scaling={"rope_type": "linear", "factor": 8.0}), 131072),
        (
            DeepseekV3Config(
                max_position_embeddings=163840,
                rope_scaling={"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
            ),
            163840,
        ),
        (
            LlamaConfig(
                max_position_embeddings=131072,
                rope_scaling={
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            ),
            131072,
        ),
    ],
)
def test_positions_of_a_model(config, limit):
    assert position_limit(config) == limit


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=16),
        OPTConfig(
            vocab_size=30,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffn_dim=16,
            word_embed_proj_dim=16,
            max_position_embeddings=16,
        ),
    ],
)
def test_learned_positions_end_where_the_limit_says(config):
    model = AutoModelForCausalLM.from_config(config)
    limit = position_limit(config)
    model(torch.ones(1, limit, dtype=torch.int64))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.ones(1, limit + 1, dtype=torch.int64))


def test_refusals_name_both_numbers_and_fitting_models_pass(tmp_path):
    tokenizer = word_tokenizer(["a", "b"])
    model_config = LlamaConfig(**{**SMALL, "vocab_size": len(tokenizer)}, max_position_embeddings=32)
    config = Config(workdir=str(tmp_path), teacher={"path": "x"}, corpus={"sequence_length": 32})
    assert vocabulary_size(model_config) == len(tokenizer)
    check_limits(config, tmp_path, model_config, tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    config = Config(workdir=str(tmp_path), teacher={"path": "x"}, corpus={"sequence_length": 33})
    with pytest.raises(UserError) as error:
        check_limits(config, tmp_path, model_config, tokenizer)
    for part in (
        "corpus.sequence_length: 33 is more than the 32 positions",
        f"'<|im_end|>' at the ends of texts, whose id is {len(tokenizer) - 1}, but the model has",
    ):
        assert part in str(error.value)


def test_a_teacher_that_does_not_fit_is_refused_before_its_files_are_hashed(tmp_path):
    save_model(tmp_path / "teacher")
    config = {"workdir": str(tmp_path), "teacher": {"path": str(tmp_path / "teacher")}}
    with pytest.raises(UserError, match=r"corpus\.sequence_length: 1000 is more than"):
        find_teacher(Config(**config, corpus={"sequence_length": 1000}))
    assert not (tmp_path / ".teacher_digests.json").exists()
    find_teacher(Config(**config, corpus={"sequence_length": 16}))
    assert (tmp_path / ".teacher_digests.json").is_file()


def test_answers_need_room_for_a_question(tmp_path):
    model_config = GPT2Config(n_positions=16)
    check_new_tokens("tasks.squad_tokens", 15, tmp_path, model_config)
    with pytest.raises(UserError, match=r"tasks\.squad_tokens: 16 leaves no room for a prompt in the 16 positions"):
        check_new_tokens("tasks.squad_tokens", 16, tmp_path, model_config)


def test_a_text_needs_positions_and_known_tokens():
    tokenizer = word_tokenizer(["a", "b"])
    size = len(tokenizer)
    model_config = GPT2Config(n_positions=4, vocab_size=size)
    check_text([size - 1] * 4, model_config, tokenizer, "x.txt:1")
    with pytest.raises(UserError, match=r"x\.txt:1: it has 5 tokens, which is more than the 4 positions"):
        check_text([0] * 5, model_config, tokenizer, "x.txt:1")
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    with pytest.raises(
        UserError, match=rf"x\.txt:1: it has the token '<\|im_end\|>', whose id is {size}, but the model"
    ):
        check_text([0, size], model_config, tokenizer, "x.txt:1")
