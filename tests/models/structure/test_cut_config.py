"""Tests that each kept layer has its kind in the config.json of a student."""

import pytest

from dskd.errors import UserError
from dskd.models.structure.cut_config import cut_config


def test_lists_with_one_item_per_layer_are_cut_too():
    config = {
        "num_hidden_layers": 4,
        "layer_types": ["a", "b", "c", "d"],
        "max_window_layers": 3,
        "eos_token_id": [1] * 4,
        "ffn_multipliers": [1, 2, 3, 4],
        "ssm_multipliers": [1, 2, 3, 4],
    }
    assert cut_config(config, [0, 3]) == {
        "num_hidden_layers": 2,
        "layer_types": ["a", "d"],
        "max_window_layers": 1,
        "eos_token_id": [1] * 4,
        "ffn_multipliers": [1, 4],
        "ssm_multipliers": [1, 2, 3, 4],
    }


def test_rules_become_lists_that_give_each_layer_the_kind_it_had():
    rule = {"num_hidden_layers": 6, "sliding_window_pattern": 3}
    full = {**rule, "layer_types": ["sliding", "sliding", "full"] * 2}
    assert cut_config(rule, [0, 2, 5], full) == {"num_hidden_layers": 3, "layer_types": ["sliding", "full", "full"]}
    sparse = {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}  # experts in 1 and 5
    assert cut_config(sparse, [1, 2, 3, 5]) == {
        "num_hidden_layers": 4,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1, 2],
    }
    numbered = {"num_hidden_layers": 6, "moe_layers": [1, 3, 5], "interleave_moe_layer_step": 2}
    assert cut_config(numbered, [0, 1, 5]) == {"num_hidden_layers": 3, "moe_layers": [1, 2]}
    dense_first = {"num_hidden_layers": 6, "first_k_dense_replace": 2}
    assert cut_config(dense_first, [0, 3, 5]) == {"num_hidden_layers": 3, "first_k_dense_replace": 1}


def test_a_rule_without_a_list_is_replaced_by_another_or_the_layers_are_refused():
    ernie = {"num_hidden_layers": 6, "moe_layer_interval": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 5}
    assert cut_config(ernie, [0, 3, 5]) == {  # experts in 1, 3 and 5
        "num_hidden_layers": 3,
        "moe_layer_interval": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
    }
    with pytest.raises(UserError, match="gives the kinds of layers by a rule"):
        cut_config(ernie, [1, 2, 3, 4])
    jamba = {"num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1}
    cut = cut_config(jamba, [0, 2, 3])  # attention in 1, 3 and 5
    assert [layer % cut["attn_layer_period"] == cut["attn_layer_offset"] for layer in range(3)] == [False, False, True]
