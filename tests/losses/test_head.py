"""The chunked head against the plain formulation, with whole logits and autograd, in float64."""

import pytest
import torch
from plain_head import (
    DISTRIBUTION,
    LOSS,
    NORMALIZERS,
    TRANSFORMS,
    B,
    D,
    T,
    V,
    plain_loss,
    random_case,
    run_head,
    run_plain,
)
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dskd.config import LossConfig
from dskd.losses.head import DistillationHead, HeadSizes, Normalizers
from dskd.losses.terms import SUMS, TERMS

D_TEACHER = 7


@pytest.fixture
def case():
    return random_case()


def _computed(loss):
    return {term.name for term in TERMS if term.is_computed(loss)}


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_loss_and_gradients_are_those_of_the_plain_formulation(case, chunk_size, trained_head, kind):
    loss = LOSS.model_copy(update={"divergence": kind})
    weight = nn.Parameter(case["weight"].clone(), requires_grad=trained_head)
    sizes = {"chunk_size": chunk_size, "block_size": 3}
    found = run_head(case, DistillationHead(weight, case["teacher_weight"], loss, **sizes))
    expected = run_plain(case, loss, trained_head=trained_head)
    for index in (0, 2, 3):
        torch.testing.assert_close(found[index], expected[index])
    assert [found[1][name] for name in ("ce", "kl", "hidden", "sense")] == pytest.approx(expected[1], rel=1e-5)
    assert {name for name, value in found[1].items() if value} == _computed(loss) | {"hinges"}


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_weights_of_positions_and_the_distribution_of_senses_are_those_of_the_plain_formulation(case, chunk_size):
    weights = torch.linspace(0.2, 3, B * T, dtype=torch.float64).view(B, T)
    weight = nn.Parameter(case["weight"].clone())
    head = DistillationHead(weight, case["teacher_weight"], DISTRIBUTION, chunk_size=chunk_size)
    found = run_head(case, head, senses=case["candidates"], token_weights=weights)
    expected = run_plain(case, DISTRIBUTION, trained_head=True, token_weights=weights)
    for index in (0, 2, 3):
        torch.testing.assert_close(found[index], expected[index])
    # The reported terms do not contain the weights, so runs with other weights stay comparable.
    assert [found[1][name] for name in ("ce", "kl", "hidden", "sense")] == pytest.approx(expected[1], rel=1e-5)
    assert {name for name, value in found[1].items() if value} == _computed(DISTRIBUTION)


@pytest.mark.parametrize("chunk_size", [4, 100])
@pytest.mark.parametrize(("loss", "senses"), [(LOSS, "senses"), (DISTRIBUTION, "candidates")])
def test_the_mapped_states_of_a_student_of_another_width_are_compared(case, loss, senses, chunk_size):
    """The logits are those of its own states. Both have gradients, and through the mapped ones the map has one."""
    gradients, losses = [], []
    for is_plain in (False, True):
        hidden, weight, width_map = (
            nn.Parameter(case[name].clone()) for name in ("narrow_hidden", "narrow_weight", "width_map")
        )
        mapped = hidden @ width_map.T
        if is_plain:
            total, sums = plain_loss(case, loss, hidden, weight, NORMALIZERS, mapped=mapped)
        else:
            head = DistillationHead(weight, case["teacher_weight"], loss, chunk_size=chunk_size, block_size=3)
            inputs = {name: case[name] for name in ("labels", "loss_mask", "teacher_hidden")}
            total, terms = head(hidden, mapped=mapped, normalizers=NORMALIZERS, senses=case[senses], **inputs)
            found = dict(zip(SUMS, terms.tolist(), strict=True))
            sums = [torch.tensor(found[name]) for name in ("ce", "kl", "hidden", "sense")]
        (3 * total).backward()
        losses.append([float(value.detach()) for value in (total, *sums)])
        gradients.append([hidden.grad, weight.grad, width_map.grad])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)
        assert found.norm() > 0


def test_one_matrix_serves_student_and_teacher(case):
    head = DistillationHead(nn.Parameter(case["weight"], requires_grad=False), None, LOSS, chunk_size=4)
    found, expected = run_head(case, head), run_plain(case, LOSS, teacher_weight=case["weight"])
    assert found[1]["kl"] == pytest.approx(expected[1][1])
    torch.testing.assert_close((found[0], found[2]), (expected[0], expected[2]))


class _LargestTensor(TorchDispatchMode):
    """A mode that records the number of elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return made


@pytest.mark.parametrize("teacher", ["loaded", "cached", "shared"])
def test_no_tensor_of_a_step_has_more_than_one_chunks_logits(teacher, monkeypatch):
    """Half of the positions have rows of the sense dictionary if there is a teacher to compare them with.

    If one output matrix serves both models, one product has the logits of student and teacher.
    """
    positions, hidden_size, vocab_size, chunk = 600, 8, 500, 16
    hidden, teacher_hidden = torch.randn(2, 1, positions, hidden_size)
    head = DistillationHead(
        nn.Parameter(torch.randn(vocab_size, hidden_size), requires_grad=teacher != "shared"),
        None if teacher == "shared" else torch.randn(vocab_size, hidden_size),
        LOSS.model_copy(update={"hidden_weight": 0.0}) if teacher == "cached" else DISTRIBUTION,
        chunk_size=chunk,
    )
    monkeypatch.setattr("dskd.losses.sense_distance._GATHERED", {"cpu": chunk * vocab_size // 2})
    of_teacher = {
        "teacher_hidden": teacher_hidden,
        "senses": {
            "sense_rows": torch.randn(100, hidden_size),
            "positions": torch.arange(0, positions, 2),
            "candidate_rows": torch.arange(positions // 2 * 12).view(-1, 12) % 80,
            "random_rows": torch.arange(80, 100),
        },
    }
    if teacher == "cached":
        top = (teacher_hidden @ head.teacher_weight.T).log_softmax(-1).topk(5)
        of_teacher = {
            "teacher_cache": {
                "token_ids": top.indices,
                "logprobs": top.values,
                "rest_logprob": (1 - top.values.exp().sum(-1)).log(),
            }
        }
    hidden.requires_grad_()
    with _LargestTensor() as largest:
        total, _ = head(
            hidden,
            labels=torch.arange(positions)[None] % vocab_size,
            loss_mask=torch.ones(1, positions, dtype=torch.bool),
            normalizers=NORMALIZERS,
            token_weights=torch.ones(1, positions),
            **of_teacher,
        )
        total.backward()
    assert largest.numel <= (2 if teacher == "shared" else 1) * chunk * vocab_size


@pytest.mark.slow
def test_compiled_losses_are_the_same(case):
    torch._dynamo.utils.counters.clear()
    args = nn.Parameter(case["weight"], requires_grad=False), case["teacher_weight"], LOSS
    options = {"chunk_size": 4, "transform": TRANSFORMS["both"], "teacher_transform": TRANSFORMS["cap"]}
    weights = torch.linspace(0.2, 3, B * T, dtype=torch.float64).view(B, T)
    plain = run_head(case, DistillationHead(*args, **options), token_weights=weights)
    options |= {"block_size": 3, "compile_losses": True}  # also a block of one row
    compiled = run_head(case, DistillationHead(*args, **options), token_weights=weights)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close((plain[0], plain[2]), (compiled[0], compiled[2]))


def test_a_cached_distribution_over_all_tokens_equals_the_teacher(case):
    loss = LOSS.model_copy(update={"hidden_weight": 0.0})
    head = DistillationHead(
        nn.Parameter(case["weight"], requires_grad=False), case["teacher_weight"], loss, chunk_size=4
    )
    top = (case["teacher_hidden"] @ case["teacher_weight"].T).log_softmax(-1).topk(V, dim=-1)
    cache = {"token_ids": top.indices, "logprobs": top.values, "rest_logprob": torch.full((B, T), -torch.inf)}
    online, cached = run_head(case, head), run_head(case, head, teacher_hidden=None, teacher_cache=cache)
    torch.testing.assert_close((cached[0], cached[2]), (online[0], online[2]))
    assert cached[1] == pytest.approx(online[1])
    # The shards store half precision, so results agree up to its rounding.
    rounded = run_head(case, head, teacher_hidden=None, teacher_cache={**cache, "logprobs": top.values.half()})
    torch.testing.assert_close((rounded[0], rounded[2]), (online[0], online[2]), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("padded", ["student", "teacher"])
def test_vocabularies_padded_to_different_sizes_are_compared_on_shared_tokens(case, padded):
    padding = torch.full((3, D), 0.1, dtype=torch.float64)
    weight, teacher_weight = case["weight"], case["teacher_weight"]
    if padded == "student":
        weight = torch.cat([weight, padding])
    else:
        teacher_weight = torch.cat([teacher_weight, padding])
    found = run_head(case, DistillationHead(nn.Parameter(weight), teacher_weight, LOSS, chunk_size=4))
    assert found[1]["kl"] == pytest.approx(run_plain(case, LOSS)[1][1])
    mask = case["loss_mask"]
    ce = F.cross_entropy((case["hidden"] @ weight.T)[mask], case["labels"][mask], reduction="sum")
    assert found[1]["ce"] == pytest.approx(float(ce))


def test_a_batch_in_which_nothing_counts_still_has_a_gradient(case):
    # Under ZeRO-3 a rank without a gradient would leave the others waiting.
    hidden = case["hidden"].clone().requires_grad_()
    head = DistillationHead(nn.Parameter(case["weight"]), case["teacher_weight"], LossConfig(), chunk_size=4)
    total, _ = head(
        hidden,
        labels=case["labels"],
        loss_mask=torch.zeros(B, T, dtype=torch.bool),
        normalizers=Normalizers(1.0, 1.0),
        teacher_hidden=case["teacher_hidden"],
    )
    total.backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() == 0


def test_a_teacher_of_another_width_is_fine_without_a_hidden_state_term(case):
    head = DistillationHead(
        nn.Parameter(case["weight"]), torch.randn(V, D_TEACHER, dtype=torch.float64), LossConfig(), chunk_size=4
    )
    total, _ = head(
        case["hidden"],
        labels=case["labels"],
        loss_mask=case["loss_mask"],
        normalizers=Normalizers(1.0, 1.0),
        teacher_hidden=torch.randn(B, T, D_TEACHER, dtype=torch.float64),
    )
    assert torch.isfinite(total)


@pytest.mark.parametrize("steps", [3, 6, 7, 12])
def test_the_scale_of_bf16_gradients_is_not_rounded_to_bf16(case, steps):
    """1/3 is .33398 in bf16: every gradient would be .2 % too large, more than its own rounding and always upwards."""
    hidden = case["hidden"].bfloat16().requires_grad_(True)
    weight = nn.Parameter(case["weight"].bfloat16())
    head = DistillationHead(weight, None, LossConfig(kd_weight=0, sense_weight=0), chunk_size=64)
    gradients = []
    for scale in (1.0, 1 / steps):
        hidden.grad = weight.grad = None
        loss, _ = head(hidden, labels=case["labels"], loss_mask=case["loss_mask"], normalizers=Normalizers(1.0, 1.0))
        (loss * scale).backward()
        gradients.append((hidden.grad.double(), weight.grad.double()))
    for whole, scaled in zip(*gradients, strict=True):
        ratio = (whole * scaled).sum() / whole.square().sum()
        assert float(ratio) * steps == pytest.approx(1, abs=6e-4)


def test_in_bf16_only_matrix_products_are_rounded(case):
    """The expected gradients are those of float64 at the same bf16 numbers."""
    exact = {
        name: value.bfloat16().double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in case.items()
    }
    loss = LossConfig(sense_weight=0)
    heads = [
        DistillationHead(nn.Parameter(x["weight"].to(dtype)), x["teacher_weight"].to(dtype), loss, chunk_size=4)
        for x, dtype in ((exact, torch.float64), (exact, torch.bfloat16))
    ]
    inputs = [
        {**exact, **{n: exact[n].to(t) for n in ("hidden", "teacher_hidden")}} for t in (torch.float64, torch.bfloat16)
    ]
    expected, found = (run_head(x, head, senses=None) for x, head in zip(inputs, heads, strict=True))
    assert found[1]["ce"] == pytest.approx(expected[1]["ce"], rel=5e-3)
    assert found[1]["kl"] == pytest.approx(expected[1]["kl"], rel=2e-2)
    for ours, theirs in zip(found[2:], expected[2:], strict=True):
        assert (ours.double() - theirs).norm() < 0.01 * theirs.norm()


def test_a_chunk_is_whole_tiles_of_matrix_products_and_a_block_fits_the_caches():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert HeadSizes.of(None, 49_152, cpu) == (256, 5)
    assert HeadSizes.of(None, 128_256, gpu) == (512, 65)
    assert HeadSizes.of(64, 128_256, gpu) == (64, 65)
    assert HeadSizes.of(None, 10**9, cpu) == (256, 1)


def test_without_labels_the_head_gives_logits(case):
    head = DistillationHead(nn.Parameter(case["weight"]), None, LossConfig(), chunk_size=4)
    torch.testing.assert_close(head(case["hidden"]), case["hidden"] @ case["weight"].T)
