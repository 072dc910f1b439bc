"""Checks by config.json alone, before a model has weights: models that are refused, and settings made harmless."""

import json

import pytest
from architectures import ARCHITECTURES
from transformers import BioGptConfig, DbrxConfig, LlamaConfig, MptConfig, OPTConfig

from dskd.config import CorpusConfig
from dskd.errors import UserError
from dskd.models.checks.architecture import check_architecture
from dskd.models.files.folder import ModelFolder
from dskd.models.structure.causal_lm import empty_model
from dskd.models.structure.cut_config import cut_config

_LLAMA = {
    **{"vocab_size": 30, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "model_type": "llama"},
}


def _folder(path, **values):
    (path / "config.json").write_text(json.dumps(values))
    return ModelFolder(path, "")


@pytest.mark.parametrize("packing", ["documents", "stream", "none"])
def test_a_rotary_table_that_depends_on_the_batch_is_refused(tmp_path, packing):
    folder = _folder(tmp_path, **_LLAMA, rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    check_architecture(folder, CorpusConfig(packing=packing, sequence_length=64))
    with pytest.raises(UserError, match=r"rope_type: dynamic(.|\n)*now 65, to at most 64"):
        check_architecture(folder, CorpusConfig(packing=packing, sequence_length=65))


_SMALL = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_OPT = OPTConfig(**_SMALL, ffn_dim=16, word_embed_proj_dim=16, dropout=0.2, attention_dropout=0.3, layerdrop=0.5)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**_SMALL, attention_dropout=1),
        _OPT,
        BioGptConfig(**_SMALL, layerdrop=0.5, activation_dropout=0.1),
        MptConfig(vocab_size=30, d_model=16, n_heads=2, n_layers=2, attn_config={"attn_pdrop": 0.4}),
        DbrxConfig(
            **{"vocab_size": 30, "d_model": 16, "n_heads": 2, "n_layers": 2, "resid_pdrop": 0.3},
            attn_config={"attn_pdrop": 0.4, "kv_n_heads": 2, "rope_theta": 1e4},
            ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 2, "moe_top_k": 1},
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_nothing_is_dropped_in_any_architecture(tmp_path, config):
    config.save_pretrained(tmp_path)
    rates = {
        f"{path}.{name}": value
        for path, module in empty_model(ModelFolder(tmp_path, "")).named_modules()
        for name, value in vars(module).items()
        if ("drop" in name or (type(module).__name__.startswith("Dropout") and name == "p"))
        and isinstance(value, (int, float))
    }
    assert rates
    assert set(rates.values()) == {0.0}, rates


def test_states_that_are_projected_before_the_output_matrix_are_refused(tmp_path):
    folder = _folder(tmp_path, **_OPT.to_dict() | {"word_embed_proj_dim": 8})
    with pytest.raises(
        UserError, match=r"states of 8 values, and hidden_size of config.json is 16(.|\n)*not supported"
    ):
        check_architecture(folder, CorpusConfig())


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"rope_scaling": {"rope_type": "unheard-of", "factor": 2.0}}, "unheard-of"),
        ({"hidden_act": "unheard-of"}, "unheard-of"),
        ({"pad_token_id": 99}, "AssertionError"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers is '4'"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"rms_norm_eps": None, "intermediate_size": -3}, "RuntimeError"),
        ({"num_attention_heads": "two"}, "TypeError"),
    ],
    ids=str,
)
def test_wrong_values_of_config_json_are_refused_with_its_name(tmp_path, values, named):
    folder = _folder(tmp_path, **_LLAMA | values)
    with pytest.raises(UserError, match=r"config\.json: ") as error:
        check_architecture(folder, CorpusConfig())
    assert named in str(error.value)


def test_a_mixture_cut_to_dense_layers_alone_is_refused_by_name():
    values = ARCHITECTURES["ernie4-5-moe"].config().to_dict()
    assert values["moe_layer_start_index"] == 1
    cut_config(values, [0, 1])
    with pytest.raises(
        UserError, match=r"student\.layers: the student keeps no mixture-of-experts layer(.|\n)*keep at least one"
    ):
        cut_config(values, [0])
