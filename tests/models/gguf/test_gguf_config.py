"""Tests that the config of a GGUF file's model leaves nothing out."""

import numpy as np
import pytest
import torch
from gguf_files import write_gguf
from gguf_teachers import assert_refused, build_gguf
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


def test_what_transformers_cannot_read_or_would_leave_out_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    content = write_gguf(path).path.read_bytes()
    path.write_bytes(content.replace(b"llama", b"lamma"))
    assert_refused(path, "cannot read the architecture 'lamma' from GGUF, only", "llama")
    write_gguf(path, keys={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0})
    assert_refused(
        path, "llama.rope.scaling.type: linear (its model would have none)", "llama.rope.scaling.factor: 2.0"
    )
    write_gguf(path, keys={"llama.attention.value_length": 8, "llama.logit_scale": 0.5})
    assert_refused(
        path, "llama.attention.value_length: 8 (its model would have 16)", "llama.logit_scale: 0.5 (there is no"
    )
    write_gguf(path, tensors={"blk.0.attn_q.bias": np.ones(64, np.float32)})
    assert_refused(path, "leaves out 1 of 31 tensors", "blk.0.attn_q.bias")
    write_gguf(path, without=("blk.1.ffn_up.weight",))
    assert_refused(path, "lacks 1 tensors", "layers.1.mlp.up_proj.weight")
    write_gguf(path, keys={"llama.vocab_size": 400})
    assert_refused(path, "its keys say 400 tokens, but there are 335 embeddings")
    write_gguf(path, tensors={"blk.0.extra": np.ones(32, np.int8)})
    assert_refused(path, "cannot dequantise I8")
    write_gguf(path, tensors={"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)})
    assert_refused(path, "its rotations are scaled by rope_freqs.weight (from 1 to 3), and not as in Llama 3.1")


def test_the_scaling_of_rotations_of_llama_3_is_read_from_its_factors(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 8}
    frequencies = [
        LlamaForCausalLM(
            LlamaConfig(**shape, intermediate_size=8, rope_theta=50_000.0, **more)
        ).model.rotary_emb.inv_freq
        for more in ({}, {"rope_scaling": scaling})
    ]
    factors = (frequencies[0] / frequencies[1]).numpy()
    assert factors.min() == 1
    assert factors.max() == pytest.approx(8)
    path = write_gguf(tmp_path / "model.gguf", tensors={"rope_freqs.weight": factors}).path
    _, folder = build_gguf(path)
    found = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq
    torch.testing.assert_close(found, frequencies[1])
