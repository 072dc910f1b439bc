"""Sampling in batches: each row's tokens are those that its own seed draws from the model's own probabilities."""

import pytest
import torch
from rank_processes import ONE_RANK
from tiny_models import save_model
from transformers import GenerationConfig, TopPLogitsWarper

from dskd.config import Config
from dskd.errors import UserError
from dskd.models.files.folder import find_teacher
from dskd.models.running.sampling import Sampling, least_probability, load_sampler
from dskd.random_numbers import uniform

PROMPTS = [[5, 17, 3], [9], [4, 4, 60, 71, 2, 33], [88, 12]]
SEEDS = [11, 2**62 + 5, 0, 7]


def _config(folder):
    return Config(
        workdir=str(folder / "work"),
        precision="fp32",
        teacher={"path": str(folder / "teacher")},
        corpus={"sequence_length": 16},
    )


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "teacher")


@pytest.fixture
def sampler(tmp_path, model):
    config = _config(tmp_path)
    return load_sampler(find_teacher(config), config, ONE_RANK)


@torch.no_grad()
def _drawn_one_by_one(model, prompt, seed, sampling):
    """Draws tokens in the plainest way: one row, no padding, no cache, the most probable tokens first by hand."""
    ids, added = list(prompt), []
    for step in range(sampling.max_new_tokens):
        logits = model(torch.tensor([ids])).logits[0, -1].double() / sampling.temperature
        probabilities = logits.softmax(-1)
        order = probabilities.argsort(descending=True).tolist()
        kept, together = set(), 0.0
        for token in order:
            kept.add(token)
            together += float(probabilities[token])
            if together >= sampling.top_p:
                break
        share, passed, total = float(uniform(0, torch.tensor(seed), step)), 0.0, 0.0
        total = sum(float(probabilities[token]) for token in kept)
        for token in sorted(kept):
            passed += float(probabilities[token])
            if passed > share * total:
                break
        if token == 0:  # the end of a text
            break
        ids.append(token)
        added.append(token)
    return added


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.6), (1.5, 0.9)])
def test_rows_of_a_batch_get_the_tokens_that_they_get_alone(sampler, model, temperature, top_p):
    sampling = Sampling(12, temperature, top_p)
    expected = [_drawn_one_by_one(model, *row, sampling) for row in zip(PROMPTS, SEEDS, strict=True)]
    assert sampler.sample(PROMPTS, SEEDS, sampling) == expected
    assert any(len(row) == 12 for row in expected)
    assert sampler.sample(PROMPTS[2:], SEEDS[2:], sampling) == expected[2:]


@torch.no_grad()
def test_tokens_are_as_frequent_as_they_are_probable(sampler, model):
    sampled = sampler.sample([PROMPTS[0]] * 4000, range(4000), Sampling(1, 0.2, 1.0))
    tokens = torch.tensor([row[0] if row else 0 for row in sampled])
    frequencies = torch.bincount(tokens, minlength=120) / len(tokens)
    probabilities = (model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.2).softmax(-1)
    assert 0.05 < probabilities.max() < 0.95
    deviation = (probabilities * (1 - probabilities) / len(tokens)).sqrt()
    assert ((frequencies - probabilities).abs() <= 4.5 * deviation + 1e-6).all()


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_the_nucleus_is_that_of_transformers(top_p):
    logits = torch.randn(6, 700, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[0.1], [1], [2], [4], [8], [20]]
    )
    expected = TopPLogitsWarper(top_p)(None, logits).isfinite()
    probabilities = logits.softmax(-1)
    kept = probabilities >= least_probability(probabilities, top_p)[:, None]
    assert (kept == expected).all()
    assert len(set(kept.sum(-1).tolist())) > 2  # also more than are looked at first
    assert (kept.sum(-1) > 256).any() == (top_p > 0.1)


def test_equally_probable_tokens_are_in_the_nucleus_together():
    probabilities = torch.tensor([[0.25, 0.25, 0.1, 0.25, 0.15], [0.1, 0.5, 0.2, 0.1, 0.1]])
    assert least_probability(probabilities, 0.3).tolist() == [0.25, 0.5]


def test_weights_that_are_not_finite_are_refused(sampler):
    sampler.causal_lm.get_output_embeddings().weight.data[:] = torch.nan
    with pytest.raises(UserError, match="probabilities of the next token are not finite"):
        sampler.sample(PROMPTS, SEEDS, Sampling(2, 1.0, 0.9))


def test_tokens_that_only_the_generation_config_names_end_a_text(tmp_path, model):
    GenerationConfig(eos_token_id=[0, 42]).save_pretrained(tmp_path / "teacher")
    config = _config(tmp_path)
    assert load_sampler(find_teacher(config), config, ONE_RANK).ends == (0, 42)
