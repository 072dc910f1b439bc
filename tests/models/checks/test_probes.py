"""Documents that share a sequence stay apart in the engines, or the model is refused."""

from pathlib import Path

import architectures
import pytest
import torch
from packed_documents import IDS, SIZES, STARTS
from rank_processes import ONE_RANK
from tiny_models import ARCHITECTURES, SHAPE, save_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BloomConfig, Gemma3TextConfig, GPTNeoConfig

from dskd.config import Config
from dskd.corpus.sequences import position_ids_of
from dskd.errors import UserError
from dskd.losses.head import Normalizers
from dskd.models.checks.probes import check_documents
from dskd.models.files.folder import ModelFolder, find_teacher
from dskd.models.running.frozen import Decoder, load_frozen
from dskd.models.structure.base_model import base_model
from dskd.training.models.student import load_student


def _config(tmp_path, **sections):
    return Config(workdir=str(tmp_path), teacher={"path": str(tmp_path / "teacher")}, precision="fp32", **sections)


def _documents():
    return [document.unsqueeze(0) for row, sizes in zip(IDS, SIZES, strict=True) for document in row.split(sizes)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_documents_have_the_states_they_have_alone(tmp_path, world, architecture):
    plain = save_model(tmp_path / "teacher", architecture)
    config = _config(tmp_path)
    teacher = load_frozen(find_teacher(config), config, world)
    packed = teacher.hidden_states(IDS, position_ids_of(STARTS)).flatten(0, 1)
    with torch.no_grad():
        apart = torch.cat([plain.base_model(document).last_hidden_state[0] for document in _documents()])
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-5)
    crossing = teacher.hidden_states(IDS).flatten(0, 1)
    assert (crossing[1:24] - apart[1:24]).abs().max() > 0.1
    torch.testing.assert_close(crossing[24:], apart[24:], rtol=1e-5, atol=1e-5)
    teacher.close()


@pytest.mark.parametrize(("architecture", "recompute"), [*((name, False) for name in ARCHITECTURES), ("mistral", True)])
def test_the_student_learns_from_packed_documents_as_from_single_ones(tmp_path, world, architecture, recompute):
    """Loss and gradients of the DeepSpeed engine, with and without recomputed activations, against plain autograd."""
    plain = save_model(tmp_path / "teacher", architecture)
    train = {"activation_checkpointing": recompute, "global_batch_size": 2, "micro_batch_size": 2}
    loss = {"kd_weight": 0.0, "sense_weight": 0.0}
    config = _config(tmp_path, loss=loss, train=train, student={"train_layers": 2})
    engine = load_student(find_teacher(config), config, world, teacher=None, margin=1.0, accumulation_steps=1)
    has_target = torch.ones(2, 24, dtype=torch.bool)
    has_target[0, [0, 9, 23]] = has_target[1, 23] = False
    count = int(has_target.sum())
    total, _ = engine(
        IDS,
        position_ids_of(STARTS),
        labels=IDS.roll(-1, dims=1),
        loss_mask=has_target,
        normalizers=Normalizers(1 / count, 1.0),
    )
    engine.backward(total)

    losses = [
        F.cross_entropy(plain(document).logits[0, :-1], document[0, 1:], reduction="sum") for document in _documents()
    ]
    expected = sum(losses) / count
    expected.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = {name: p.grad for name, p in plain.named_parameters() if ".layers.3." in name}
    from deepspeed.utils import safe_get_full_grad

    compared = 0
    for name, parameter in engine.module.decoder.base.named_parameters():
        if "layers.3." in name:
            expected_gradient = gradients[f"model.{name}"]
            torch.testing.assert_close(safe_get_full_grad(parameter), expected_gradient, rtol=1e-3, atol=1e-6)
            compared += 1
    assert compared == len(gradients) > 5
    engine.destroy()


CROSSING = {
    "bloom": lambda: BloomConfig(vocab_size=120, hidden_size=32, n_layer=2, n_head=4),  # ignores positions
    "gpt-neo": lambda: GPTNeoConfig(  # uses them, and attention crosses
        vocab_size=120, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    ),
}


@pytest.mark.parametrize("architecture", CROSSING)
def test_a_model_in_which_documents_see_each_other_is_refused(tmp_path, world, architecture):
    save_model(tmp_path / "teacher")
    (tmp_path / "teacher" / "config.json").unlink()
    AutoModelForCausalLM.from_config(CROSSING[architecture]()).save_pretrained(tmp_path / "teacher")
    config = _config(tmp_path)
    with pytest.raises(UserError, match=r"does not keep documents apart .* Set corpus.packing to stream") as error:
        load_frozen(find_teacher(config), config, world)
    assert error.value.known_to_all_ranks
    for packing in ("stream", "none"):
        config = _config(tmp_path, corpus={"packing": packing})
        load_frozen(find_teacher(config), config, world).close()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bf16_is_precise_enough_to_tell(tmp_path, world, architecture):
    save_model(tmp_path / "teacher", architecture)
    config = _config(tmp_path).model_copy(update={"precision": "bf16"})
    load_frozen(find_teacher(config), config, world).close()


def test_a_student_in_which_documents_see_each_other_is_refused(tmp_path, world):
    save_model(tmp_path / "teacher")
    AutoModelForCausalLM.from_config(CROSSING["bloom"]()).save_pretrained(tmp_path / "teacher")
    config = _config(tmp_path, student={"train_layers": 1})
    with pytest.raises(UserError, match="BloomModel does not keep documents apart"):
        load_student(find_teacher(config), config, world, teacher=None, margin=1.0, accumulation_steps=1)


def test_a_model_that_takes_no_positions_is_refused(tmp_path, world):
    class WithoutPositions(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> None:
            raise AssertionError("it need not be run")

    decoder = Decoder(WithoutPositions())
    with pytest.raises(UserError, match="WithoutPositions does not keep documents apart"):
        check_documents(decoder, decoder, ModelFolder(tmp_path, ""), world, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "apart"),
    [("llama", True), ("qwen3-moe", True), ("lfm2", False), ("llama4-dense", False), ("bloom", False)],
)
def test_both_types_judge_packed_documents_alike(tmp_path, dtype, name, apart):
    architectures.save_architecture(tmp_path, name)
    if name == "llama4-dense":  # the second document meets a boundary that it does not meet alone
        architectures.edit_config(tmp_path, attention_chunk_size=8)
    base = base_model(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval())

    def run(input_ids, position_ids):
        return base(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state

    def check():
        decoder = Decoder(base)
        check_documents(run, decoder, ModelFolder(Path("teacher"), ""), ONE_RANK, dtype)

    if apart:
        check()
    else:
        with pytest.raises(UserError, match="does not keep documents apart"):
            check()


def test_a_model_that_looks_ahead_is_refused(tmp_path, world):
    save_model(tmp_path / "teacher")
    (tmp_path / "teacher" / "config.json").unlink()
    model_config = Gemma3TextConfig(**SHAPE, head_dim=8, use_bidirectional_attention=True)
    AutoModelForCausalLM.from_config(model_config).save_pretrained(tmp_path / "teacher")
    for packing in ("documents", "none"):
        config = _config(tmp_path, corpus={"packing": packing})
        with pytest.raises(UserError, match="depends on the tokens after it"):
            load_frozen(find_teacher(config), config, world)
