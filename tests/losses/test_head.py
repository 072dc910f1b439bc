"""The chunked head against the plain formulation, with whole logits and autograd, in float64."""

import json

import pytest
import torch
from rank_jobs import head_gradients
from rank_processes import finish, fork_ranks
from safetensors.torch import load_file, save_file
from tiny_models import save_model
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dskd.config import LossConfig
from dskd.losses.head import DistillationHead, HeadSizes, Normalizers
from dskd.losses.terms import SUMS, TERMS

B, T, D, D_TEACHER, V, R, K = 2, 6, 5, 7, 11, 4, 2
D_NARROW = 3  # of a student whose states are mapped to D


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "hidden": random(B, T, D),
        "weight": random(V, D),
        "teacher_hidden": random(B, T, D),
        "teacher_weight": random(V, D),
        "labels": torch.randint(0, V, (B, T), generator=generator),
        "loss_mask": torch.rand(B, T, generator=generator) < 0.7,
        "senses": {
            "sense_rows": random(R, D),
            "relation_positions": torch.tensor([1, 8]),
            "synonym_rows": torch.tensor([[0, 1], [2, -1]]),
            "antonym_rows": torch.tensor([[3, -1], [-1, -1]]),
            "own_positions": torch.tensor([2, 3, 9]),
            "own_rows": torch.tensor([[0, -1], [1, 2], [3, 0]]),
        },
        "candidates": {
            "sense_rows": random(R, D),
            "positions": torch.tensor([9, 1, 8]),
            "candidate_rows": torch.tensor([[0, 3], [-1, 0], [-1, -1]]),
            "random_rows": torch.tensor([1, 2]),
        },
        "narrow_hidden": random(B, T, D_NARROW),
        "narrow_weight": random(V, D_NARROW),
        "width_map": random(D, D_NARROW),
    }


def _plain(case, loss, hidden, weight, normalizers, teacher_weight=None, token_weights=None, mapped=None):
    """Computes L as in section 4 of the paper, one expression for each term, with loops for the senses."""
    mask, compared = case["loss_mask"], hidden if mapped is None else mapped
    emphasis = 1 if token_weights is None else token_weights[mask]
    teacher_weight = case["teacher_weight"] if teacher_weight is None else teacher_weight
    logits, teacher = hidden @ weight.T, case["teacher_hidden"] @ teacher_weight.T
    ce = F.cross_entropy(logits[mask], case["labels"][mask], reduction="none")
    p, q = ((z / loss.temperature).softmax(-1)[mask] for z in (teacher, logits))
    m = (p + q) / 2
    kl = {
        "forward_kl": p * (p / q).log(),
        "reverse_kl": q * (q / p).log(),
        "jensen_shannon": (p * (p / m).log() + q * (q / m).log()) / 2,
    }[loss.divergence].sum(-1)
    distance = ((compared - case["teacher_hidden"]) ** 2).mean(-1)[mask].sum()
    senses = _plain_senses if loss.sense_form == "distance" else _plain_sense_divergence
    total = senses(case, loss, compared.reshape(-1, D))
    of_logits = (emphasis * (loss.ce_weight * ce + loss.kd_weight * loss.temperature**2 * kl)).sum()
    return (
        normalizers.targets * (of_logits + loss.hidden_weight * distance)
        + normalizers.senses * loss.sense_weight * total,
        (ce.sum(), kl.sum(), distance, total),
    )


def _plain_senses(case, loss, flat):
    senses, total = case["senses"], 0
    for position, near, far in zip(
        senses["relation_positions"], senses["synonym_rows"], senses["antonym_rows"], strict=True
    ):
        pulls = [((flat[position] - senses["sense_rows"][row]) ** 2).mean() for row in near if row >= 0]
        pushes = [
            (loss.margin - ((flat[position] - senses["sense_rows"][row]) ** 2).mean()).clamp(min=0)
            for row in far
            if row >= 0
        ]
        total = total + loss.synonym_weight * sum(pulls) / len(pulls)
        total = total + (loss.antonym_weight * sum(pushes) / len(pushes) if pushes else 0)
    for position, rows in zip(senses["own_positions"], senses["own_rows"], strict=True):
        pulls = [((flat[position] - senses["sense_rows"][row]) ** 2).mean() for row in rows if row >= 0]
        total = total + sum(pulls) / len(pulls)
    return total


def _plain_sense_divergence(case, loss, flat):
    senses, total = case["candidates"], 0
    for position, rows in zip(senses["positions"], senses["candidate_rows"], strict=True):
        named = senses["sense_rows"][[row for row in rows.tolist() if row >= 0] + senses["random_rows"].tolist()]
        q, p = (
            (-(states[position] - named).square().mean(-1) / loss.sense_temperature).softmax(-1)
            for states in (flat, case["teacher_hidden"].reshape(-1, D))
        )
        total = total + (p * (p / q).log()).sum()
    return total


WEIGHTS = {"ce_weight": 0.9, "kd_weight": 0.7, "sense_weight": 1.3, "hidden_weight": 0.4}
LOSS = LossConfig(**WEIGHTS, margin=6.0, synonym_weight=0.8, antonym_weight=0.6)
DISTRIBUTION = LossConfig(**WEIGHTS, sense_form="distribution", sense_temperature=0.6)
NORMALIZERS = Normalizers(targets=0.25, senses=0.5)


def _run(case, head, **changes):
    hidden = case["hidden"].clone().requires_grad_()
    inputs = {
        "labels": case["labels"],
        "loss_mask": case["loss_mask"],
        "normalizers": NORMALIZERS,
        "teacher_hidden": case["teacher_hidden"],
        "senses": case["senses"],
    }
    total, terms = head(hidden, **{**inputs, **changes})
    (3 * total).backward()
    return total.detach(), dict(zip(SUMS, terms.tolist(), strict=True)), hidden.grad, head.weight.grad


def _expected(case, loss, *, trained_head=False, teacher_weight=None, token_weights=None):
    hidden = case["hidden"].clone().requires_grad_()
    weight = case["weight"].clone().requires_grad_(trained_head)
    total, sums = _plain(case, loss, hidden, weight, NORMALIZERS, teacher_weight, token_weights)
    (3 * total).backward()
    return total.detach(), [float(value.detach()) for value in sums], hidden.grad, weight.grad


def _computed(loss):
    return {term.name for term in TERMS if term.is_computed(loss)}


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_loss_and_gradients_are_those_of_the_plain_formulation(case, chunk_size, trained_head, kind):
    loss = LOSS.model_copy(update={"divergence": kind})
    weight = nn.Parameter(case["weight"].clone(), requires_grad=trained_head)
    sizes = {"chunk_size": chunk_size, "block_size": 3}
    found = _run(case, DistillationHead(weight, case["teacher_weight"], loss, **sizes))
    expected = _expected(case, loss, trained_head=trained_head)
    for index in (0, 2, 3):
        torch.testing.assert_close(found[index], expected[index])
    assert [found[1][name] for name in ("ce", "kl", "hidden", "sense")] == pytest.approx(expected[1], rel=1e-5)
    assert {name for name, value in found[1].items() if value} == _computed(loss) | {"hinges"}


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_weights_of_positions_and_the_distribution_of_senses_are_those_of_the_plain_formulation(case, chunk_size):
    weights = torch.linspace(0.2, 3, B * T, dtype=torch.float64).view(B, T)
    weight = nn.Parameter(case["weight"].clone())
    head = DistillationHead(weight, case["teacher_weight"], DISTRIBUTION, chunk_size=chunk_size)
    found = _run(case, head, senses=case["candidates"], token_weights=weights)
    expected = _expected(case, DISTRIBUTION, trained_head=True, token_weights=weights)
    for index in (0, 2, 3):
        torch.testing.assert_close(found[index], expected[index])
    # The reported terms do not contain the weights, so runs with other weights stay comparable.
    assert [found[1][name] for name in ("ce", "kl", "hidden", "sense")] == pytest.approx(expected[1], rel=1e-5)
    assert {name for name, value in found[1].items() if value} == _computed(DISTRIBUTION)


@pytest.mark.parametrize("chunk_size", [4, 100])
@pytest.mark.parametrize(("loss", "senses"), [(LOSS, "senses"), (DISTRIBUTION, "candidates")])
def test_of_a_student_of_another_width_the_mapped_states_are_compared(case, loss, senses, chunk_size):
    """The logits are those of its own states. Both have gradients, and through the mapped ones the map has one."""
    gradients, losses = [], []
    for is_plain in (False, True):
        hidden, weight, width_map = (
            nn.Parameter(case[name].clone()) for name in ("narrow_hidden", "narrow_weight", "width_map")
        )
        mapped = hidden @ width_map.T
        if is_plain:
            total, sums = _plain(case, loss, hidden, weight, NORMALIZERS, mapped=mapped)
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
    found, expected = _run(case, head), _expected(case, LOSS, teacher_weight=case["weight"])
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
    weights = torch.linspace(0.2, 3, B * T, dtype=torch.float64).view(B, T)
    plain = _run(case, DistillationHead(*args, chunk_size=4), token_weights=weights)
    sizes = {"chunk_size": 4, "block_size": 3}  # also a block of one row
    compiled = _run(case, DistillationHead(*args, **sizes, compile_losses=True), token_weights=weights)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close((plain[0], plain[2]), (compiled[0], compiled[2]))


def test_a_cached_distribution_over_all_tokens_equals_the_teacher(case):
    loss = LOSS.model_copy(update={"hidden_weight": 0.0})
    head = DistillationHead(
        nn.Parameter(case["weight"], requires_grad=False), case["teacher_weight"], loss, chunk_size=4
    )
    top = (case["teacher_hidden"] @ case["teacher_weight"].T).log_softmax(-1).topk(V, dim=-1)
    cache = {"token_ids": top.indices, "logprobs": top.values, "rest_logprob": torch.full((B, T), -torch.inf)}
    online, cached = _run(case, head), _run(case, head, teacher_hidden=None, teacher_cache=cache)
    torch.testing.assert_close((cached[0], cached[2]), (online[0], online[2]))
    assert cached[1] == pytest.approx(online[1])
    # The shards store half precision, so results agree up to its rounding.
    rounded = _run(case, head, teacher_hidden=None, teacher_cache={**cache, "logprobs": top.values.half()})
    torch.testing.assert_close((rounded[0], rounded[2]), (online[0], online[2]), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("padded", ["student", "teacher"])
def test_vocabularies_padded_to_different_sizes_are_compared_on_shared_tokens(case, padded):
    padding = torch.full((3, D), 0.1, dtype=torch.float64)
    weight, teacher_weight = case["weight"], case["teacher_weight"]
    if padded == "student":
        weight = torch.cat([weight, padding])
    else:
        teacher_weight = torch.cat([teacher_weight, padding])
    found = _run(case, DistillationHead(nn.Parameter(weight), teacher_weight, LOSS, chunk_size=4))
    assert found[1]["kl"] == pytest.approx(_expected(case, LOSS)[1][1])
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
    expected, found = (_run(x, head, senses=None) for x, head in zip(inputs, heads, strict=True))
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


@pytest.mark.slow
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
