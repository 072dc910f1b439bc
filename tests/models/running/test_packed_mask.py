"""The attention mask of packed documents is transformers' own, value for value."""

import pytest
import torch
import transformers
from transformers import AttentionMaskInterface, LlamaConfig
from transformers.masking_utils import (
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
    sdpa_mask,
)

from dskd.models.running.packed_mask import build_masks_by_broadcasting

pytestmark = pytest.mark.skipif(transformers.__version__[0] != "4", reason="transformers broadcasts by itself")
PACKED = [[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 0]]
PADDED = [[0, 0, 1, 1, 1, 1, 1], [1] * 7]


@pytest.fixture
def without_vmap(monkeypatch):
    """Lets `torch.vmap` fail from the call of this fixture on."""

    def refuse(*_, **__):
        raise AssertionError("vmap is called")

    return lambda: monkeypatch.setattr(torch, "vmap", refuse)


@pytest.mark.parametrize("create", [create_causal_mask, create_sliding_window_causal_mask, create_chunked_causal_mask])
@pytest.mark.parametrize(
    ("positions", "padding"), [(PACKED, None), ([[*range(7)]] * 2, None), (None, None), (None, PADDED)]
)
def test_the_mask_of_packed_documents_is_that_of_transformers_without_vmap(create, positions, padding, without_vmap):
    """Masks of padded sequences and of single documents stay those of transformers."""
    config = LlamaConfig(attn_implementation="sdpa", sliding_window=3, attention_chunk_size=4)
    positions, padding = (None if values is None else torch.tensor(values) for values in (positions, padding))

    def mask():
        return create(config, torch.zeros(2, 7, 4), padding, torch.arange(7), None, positions)

    AttentionMaskInterface.register("sdpa", sdpa_mask)
    expected = mask()
    build_masks_by_broadcasting()
    if positions is not None:
        without_vmap()
    found = mask()
    if expected is None:
        assert found is None
    else:
        assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
        assert found.equal(expected)
