"""The angles that layers turn states by: against transformers' own hidden states and plain numpy."""

import numpy as np
import pytest
import torch
from layer_angles import plain_angles
from tiny_models import save_model
from transformers import AutoModelForCausalLM

from dskd.corpus.sequences import position_ids_of
from dskd.errors import UserError
from dskd.models.running.frozen import Decoder
from dskd.models.structure.base_model import base_model
from dskd.students.importance import Text, measure_blocks

CPU = torch.device("cpu")
IDS = (torch.arange(60) * 13 % 117).view(3, 20)
# Two documents in the first sequence, one in the second, and one of seven tokens in the third, which is padded.
STARTS = torch.tensor([[*[1], *[0] * 8, *[1], *[0] * 10], [1, *[0] * 19], [1, *[0] * 19]], dtype=torch.uint8)
DOCUMENTS = [(0, 0, 9), (0, 9, 20), (1, 0, 20), (2, 0, 7)]
IS_TOKEN = torch.arange(20) < torch.tensor([[20], [20], [7]])


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_angles_are_those_of_transformers_states_for_each_document_alone(tmp_path, architecture, size):
    save_model(tmp_path, architecture)
    decoder = Decoder(base_model(AutoModelForCausalLM.from_pretrained(tmp_path)))
    batches = [slice(0, 2), slice(2, 3)]
    texts = [Text(IDS[rows], position_ids_of(STARTS[rows]), IS_TOKEN[rows]) for rows in batches]
    measured = measure_blocks(decoder, texts, size, CPU)
    documents = [IDS[row, begin:end] for row, begin, end in DOCUMENTS]
    for blocks, of_size in ((measured.layers, 1), (measured.blocks, size)):
        expected, count = plain_angles(tmp_path, documents, of_size)
        np.testing.assert_allclose(blocks, expected, rtol=1e-5)
        assert (measured.samples, measured.tokens, measured.block_size) == (3, count, size)
    assert len(set(np.round(measured.layers, 4))) > 2  # the layers differ


def test_a_layer_that_hardly_changes_anything_has_a_small_angle_and_not_a_rounded_one(tmp_path):
    """In float32 the cosine of angles below 3e-4 is 1."""
    model = save_model(tmp_path)
    with torch.no_grad():
        for output in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            output.weight *= 1e-5
    model.save_pretrained(tmp_path)
    decoder = Decoder(base_model(AutoModelForCausalLM.from_pretrained(tmp_path)))
    measured = measure_blocks(decoder, [Text(IDS, None, torch.ones_like(IDS, dtype=torch.bool))], 1, CPU)
    expected, _ = plain_angles(tmp_path, list(IDS), 1)
    assert 0 < expected[1] < 1e-4
    np.testing.assert_allclose(measured.layers, expected, rtol=1e-2)


def test_states_that_are_not_finite_are_refused(tmp_path):
    model = save_model(tmp_path).float()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.inf
    text = Text(IDS, None, torch.ones_like(IDS, dtype=torch.bool))
    with pytest.raises(UserError, match="states are not finite"):
        measure_blocks(Decoder(model.model), [text], 2, CPU)
    with pytest.raises(UserError, match="have no tokens"):
        measure_blocks(Decoder(model.model), [], 2, CPU)
