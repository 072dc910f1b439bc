"""Logits that are scaled and capped, and their gradients, against torch's functions and autograd in float64."""

import pytest
import torch
from random_tensors import random_float64

from dskd.models.structure.output_head import LogitTransform, OutputHead

TRANSFORMS = [LogitTransform(0.0625), LogitTransform(cap=3.0), LogitTransform(1.7, cap=0.8)]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=["scale", "cap", "both"])
def test_logits_and_gradients_are_those_of_torch(transform):
    products = (random_float64(5, 7, seed=1) * 4).requires_grad_()
    expected = products * transform.scale
    if transform.cap is not None:
        expected = torch.tanh(expected / transform.cap) * transform.cap
    weights = random_float64(5, 7, seed=2)
    (weights * expected).sum().backward()
    logits = transform.apply(products.detach())
    torch.testing.assert_close(logits, expected.detach(), rtol=1e-14, atol=1e-14)
    gradient = transform.pull_back(weights.clone(), logits)
    torch.testing.assert_close(gradient, products.grad, rtol=1e-12, atol=1e-14)


def test_products_that_are_logits_are_not_copied():
    products, gradient = torch.randn(2, 3), torch.randn(2, 3)
    assert LogitTransform().apply(products) is products
    assert LogitTransform().pull_back(gradient, products) is gradient


def test_bf16_products_are_scaled_and_capped_in_float32():
    states, weight = torch.randn(4, 8).bfloat16(), torch.randn(5, 8).bfloat16() * 20
    products = (states @ weight.T).float()
    logits = OutputHead(weight, LogitTransform(0.3, cap=30.0)).logits(states)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, 30 * (products * 0.3 / 30).tanh())


def test_products_far_above_the_cap_have_finite_logits_and_no_gradient():
    products = torch.tensor([[1e30, -1e30, -torch.inf, 0.0]])
    transform = LogitTransform(cap=30.0)
    logits = transform.apply(products)
    assert logits.tolist() == [[30.0, -30.0, -30.0, 0.0]]
    assert transform.pull_back(torch.ones(1, 4), logits).tolist() == [[0.0, 0.0, 0.0, 1.0]]
