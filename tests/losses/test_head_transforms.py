"""Logits that each model scales or caps: the head against the plain formulation, in float64."""

import pytest
import torch
from plain_head import FORMULAS, LOSS, NORMALIZERS, TRANSFORMS, V, random_case, run_head, run_plain
from torch import nn
from torch.nn import functional as F

from dskd.losses.head import DistillationHead


@pytest.fixture
def case():
    return random_case()


@pytest.mark.parametrize(("student", "teacher"), [("scale", "cap"), ("cap", "both"), ("both", "scale"), ("", "cap")])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("shared", [False, True])
def test_each_model_scales_and_caps_its_own_logits(case, student, teacher, kind, shared):
    """Also if one matrix serves both models, and one product gives the logits of both."""
    loss = LOSS.model_copy(update={"divergence": kind})
    weight = nn.Parameter(case["weight"].clone(), requires_grad=not shared)
    transforms = {"transform": TRANSFORMS[student], "teacher_transform": TRANSFORMS[teacher]}
    teacher_weight = None if shared else case["teacher_weight"]
    head = DistillationHead(weight, teacher_weight, loss, chunk_size=4, block_size=3, **transforms)
    found = run_head(case, head)
    options = {"teacher_weight": case["weight"]} if shared else {}
    expected = run_plain(case, loss, trained_head=not shared, transforms=(student, teacher), **options)
    for index in (0, 2, 3):
        torch.testing.assert_close(found[index], expected[index], rtol=1e-10, atol=1e-12)
    assert [found[1][name] for name in ("ce", "kl")] == pytest.approx(expected[1][:2], rel=1e-5)
    torch.testing.assert_close(head(case["hidden"]), FORMULAS[student](case["hidden"] @ case["weight"].T))


@pytest.mark.parametrize("n", [3, V])
@pytest.mark.parametrize("student", ["scale", "cap", "both"])
def test_a_cached_distribution_is_the_teachers_after_its_own_transform(case, student, n):
    """The head applies the student's transform to the student's logits, and none to the teacher's probabilities."""
    loss = LOSS.model_copy(update={"hidden_weight": 0.0, "sense_weight": 0.0})
    logprobs = FORMULAS["cap"](case["teacher_hidden"] @ case["teacher_weight"].T).log_softmax(-1)
    top = logprobs.topk(n, dim=-1)
    rest = logprobs.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
    cache = {"token_ids": top.indices, "logprobs": top.values, "rest_logprob": rest}
    transforms = {"transform": TRANSFORMS[student], "teacher_transform": TRANSFORMS["cap"]}
    head = DistillationHead(nn.Parameter(case["weight"].clone()), None, loss, chunk_size=4, **transforms)
    found = run_head(case, head, teacher_hidden=None, teacher_cache=cache, senses=None)

    hidden, weight = (case[name].clone().requires_grad_() for name in ("hidden", "weight"))
    mask = case["loss_mask"]
    logits = FORMULAS[student](hidden @ weight.T)[mask]
    q, others = logits.log_softmax(-1), torch.ones_like(logits).scatter(-1, top.indices[mask], 0.0) > 0
    classes = [q.gather(-1, top.indices[mask]), q.masked_fill(~others, -torch.inf).logsumexp(-1, keepdim=True)]
    known = [top.values[mask], rest[mask].unsqueeze(-1)]
    q, p = ((torch.cat(part[: 1 if n == V else 2], -1) / loss.temperature).log_softmax(-1) for part in (classes, known))
    kl = (p.exp() * (p - q)).sum()
    ce = F.cross_entropy(logits, case["labels"][mask], reduction="sum")
    total = NORMALIZERS.targets * (loss.ce_weight * ce + loss.kd_weight * loss.temperature**2 * kl)
    (3 * total).backward()
    expected = total.detach(), hidden.grad, weight.grad
    torch.testing.assert_close((found[0], *found[2:]), expected, rtol=1e-10, atol=1e-12)
