"""Predictions, losses and distributions read chunk by chunk, against torch's functions on all logits at once."""

import pytest
import torch

from dskd.models.running import readouts
from dskd.models.running.readouts import next_token, predict, top_tokens
from dskd.models.structure.output_head import LogitTransform, OutputHead

P, D, V = 37, 8, 50


def _states_and_weight(scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(P, D, generator=generator) * scale, torch.randn(V, D, generator=generator)


@pytest.mark.parametrize("n", [1, 5, V - 1, V])
@pytest.mark.parametrize("chunk_size", [1, 10, 100])
@pytest.mark.parametrize("cap", [None, 4.0])
def test_top_tokens_are_those_of_a_sorted_log_softmax(n, chunk_size, cap):
    states, weight = _states_and_weight()
    top = top_tokens(states, OutputHead(weight, LogitTransform(cap=cap)), n, chunk_size)
    logits = (states @ weight.T).double()
    logits = logits if cap is None else cap * (logits / cap).tanh()
    logprobs, order = logits.log_softmax(-1).sort(dim=-1, descending=True)
    assert torch.equal(top.token_ids, order[:, :n])
    torch.testing.assert_close(top.logprobs.double(), logprobs[:, :n], rtol=1e-5, atol=1e-5)
    rest = logprobs[:, n:].logsumexp(-1) if n < V else torch.full((P,), -torch.inf, dtype=torch.float64)
    torch.testing.assert_close(top.rest_logprob.double(), rest, rtol=1e-5, atol=1e-5)


def test_the_mass_of_the_rest_keeps_its_digits_where_the_teacher_is_sure():
    states, weight = _states_and_weight(scale=30.0)
    rest = top_tokens(states, OutputHead(weight), 3, 10).rest_logprob
    expected = (states.double() @ weight.double().T).log_softmax(-1).sort(dim=-1, descending=True).values
    expected = expected[:, 3:].logsumexp(-1)
    assert expected.min() < -40  # 1 - sum is 0 there
    torch.testing.assert_close(rest.double(), expected, rtol=1e-4, atol=1e-4)


def test_of_equally_probable_tokens_the_lower_comes_first():
    logits = torch.tensor([[1.0, 3.0, 3.0, -2.0, 3.0, 1.0, -2.0, 0.0, -0.0]])
    states = torch.eye(9)[:1] * 0 + logits  # the matrix is the identity: the states are the logits
    top = top_tokens(states, OutputHead(torch.eye(9)), 9, 4)
    assert top.token_ids.tolist() == [[1, 2, 4, 0, 5, 7, 8, 3, 6]]
    assert top_tokens(states, OutputHead(torch.eye(9)), 2, 4).token_ids.tolist() == [[1, 2]]


def test_no_position_gives_no_rows():
    top = top_tokens(torch.empty(0, D), OutputHead(torch.randn(V, D)), 4, 10)
    assert top.token_ids.shape == top.logprobs.shape == (0, 4)
    assert top.rest_logprob.shape == (0,)


@pytest.mark.parametrize("chunk_size", [1, 10, P, 100])
@pytest.mark.parametrize("scale", [1.0, 0.0625])
def test_losses_and_predictions_are_those_of_all_logits_at_once(monkeypatch, chunk_size, scale):
    states, weight = _states_and_weight()
    logits, labels, head = states @ weight.T * scale, torch.arange(P) % V, OutputHead(weight, LogitTransform(scale))
    nll, predicted = next_token(states, labels, head, chunk_size)
    expected = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(predicted, logits.argmax(-1))
    monkeypatch.setattr(readouts, "chunk_size", lambda *_: chunk_size)
    assert torch.equal(predict(states, head), logits.argmax(-1))


def test_no_position_gives_no_losses_and_no_predictions():
    states, head = torch.empty(0, D), OutputHead(torch.randn(V, D))
    nll, predicted = next_token(states, torch.empty(0, dtype=torch.int64), head, 10)
    assert nll.shape == predicted.shape == predict(states, head).shape == (0,)
    assert (nll.dtype, predicted.dtype) == (torch.float64, torch.int64)
