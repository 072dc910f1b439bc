"""The head under ZeRO-3 on two ranks, against whole logits and autograd in one process."""

import json

import pytest
import torch
from rank_jobs import head_gradients
from rank_processes import finish, fork_ranks
from safetensors.torch import load_file, save_file
from tiny_models import save_model
from torch.nn import functional as F

pytestmark = pytest.mark.slow

COUNTED = torch.tensor([11, 2, 6, 0])
ON_RANKS = [
    ("llama", "forward_kl", "distance"),  # untied
    ("llama", "reverse_kl", "distribution"),
    ("qwen2", "jensen_shannon", "distance"),  # tied to the embeddings
    ("narrow", "forward_kl", "distance"),  # of another width than its teacher
    ("narrow", "forward_kl", "distribution"),
]


@pytest.fixture(scope="module")
def steps_of_two_ranks(tmp_path_factory):
    """{(architecture, kind, form): its folder, its student and teacher in float64}; two ranks took a step of each."""
    cases = {}
    for architecture, kind, form in ON_RANKS:
        folder = tmp_path_factory.mktemp("head")
        teacher = save_model(folder / "teacher", "llama" if architecture == "narrow" else architecture, seed=1).double()
        student = save_model(folder / "student", architecture).double()
        if architecture == "narrow":
            save_file({"weight": _width_map()}, folder / "width_map.safetensors")
        cases[architecture, kind, form] = folder, student, teacher
        (folder / "loss.json").write_text(json.dumps([kind, form]))
        save_file(_batch(), folder / "batch.safetensors")
    finish(fork_ranks(head_gradients, [folder for folder, *_ in cases.values()], ranks=2), 240)
    return cases


def _width_map():
    return torch.randn(32, 24, generator=torch.Generator().manual_seed(4)) * 0.235


def _batch():
    ids = torch.arange(4 * 12).view(4, 12) * 11 % 117
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(2)) * 0.5
    return {"input_ids": ids, "loss_mask": (torch.arange(12) < COUNTED[:, None]).to(torch.uint8), "rows": rows}


@pytest.mark.parametrize(("architecture", "kind", "form"), ON_RANKS)
def test_two_ranks_with_unequal_numbers_of_tokens_have_the_plain_gradients(
    steps_of_two_ranks, architecture, kind, form
):
    """Compares two ranks under ZeRO-3, each with two micro-batches, a trained head and all terms, to whole logits and
    loops in one process in float64. DeepSpeed computes in float32."""
    folder, student, teacher = steps_of_two_ranks[architecture, kind, form]
    batch = _batch()
    ids, mask, rows, counted = batch["input_ids"], batch["loss_mask"].bool(), batch["rows"], COUNTED
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("layers.3." in name or parameter is student.lm_head.weight)
    hidden = states = student.model(ids).last_hidden_state
    width_map = _width_map().double().requires_grad_()
    if architecture == "narrow":
        states = hidden @ width_map.T
    with torch.no_grad():
        teacher_states = teacher.model(ids).last_hidden_state
    q, p = ((s @ m.lm_head.weight.T)[mask] for s, m in ((hidden, student), (teacher_states, teacher)))
    ce = F.cross_entropy(q, ids.roll(-1, 1)[mask], reduction="none")
    q, p = (q / 2).softmax(-1), (p / 2).softmax(-1)
    m = (p + q) / 2
    divergence = {
        "forward_kl": p * (p / q).log(),
        "reverse_kl": q * (q / p).log(),
        "jensen_shannon": (p * (p / m).log() + q * (q / m).log()) / 2,
    }[kind].sum(-1)
    of_logits = (ce + 0.7 * 2**2 * divergence).sum() / counted.sum()
    # In each sequence position 0 is pulled to row 0 and pushed from row 1, in all but the last position 1 to row 2.
    far = 1.3 - (states[:, 0] - rows[1]).square().mean(-1)
    assert 0 < (far > 0).sum() < 4
    sense = (states[:, 0] - rows[0]).square().mean(-1).sum() + far.clamp(min=0).sum()
    sense = sense + (states[:3, 1] - rows[2]).square().mean(-1).sum()
    if form == "distribution":
        # Position 0 has rows 0 and 1, position 1 has row 1, and all have row 2; an even token counts 1.7.
        q, p = (-(s[:, :2, None] - rows).square().mean(-1) / 0.2 for s in (states, teacher_states))
        q, p = (torch.stack([z[:, 0], z[:, 1] + torch.tensor([-torch.inf, 0, 0])], 1).log_softmax(-1) for z in (q, p))
        each = (p.exp() * (p - q)).nan_to_num(0).sum(-1)
        sense = each[:, 0].sum() + each[:3, 1].sum()
        even = torch.where(ids % 2 == 0, 1.7, 1.0)[mask]
        of_logits = (even * (ce + 0.7 * 2**2 * divergence)).sum() / even.sum()
    distance = (states - teacher_states).square().mean(-1)[mask].sum()
    # The definition of a mean: everything over the number of positions on all ranks.
    loss = of_logits + 0.3 * distance / counted.sum() + 0.8 * sense / 7
    loss.backward()
    found = load_file(folder / "gradients.safetensors")
    assert float(found.pop("loss")) == pytest.approx(loss.item(), rel=1e-5)
    expected = {name: p.grad.float() for name, p in student.named_parameters() if p.grad is not None}
    assert len(expected) == 10 + 3 * (architecture == "qwen2")
    if architecture == "narrow":
        expected["width_map.weight"] = width_map.grad.float()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
