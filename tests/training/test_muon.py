"""Muon in float32 against torch's, which orthogonalises in bfloat16, and against singular values."""

import pytest
import torch

from dskd.training.muon import Float32Muon, orthogonalize


@pytest.mark.parametrize("shape", [(12, 12), (24, 8), (8, 24)])
def test_the_update_has_the_singular_vectors_of_the_matrix_and_values_near_1(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = left.T @ orthogonalize(matrix) @ right.T
    assert (values.diagonal() > 0.5).all() and (values.diagonal() < 1.5).all()
    assert torch.allclose(values, values.diagonal().diag(), atol=1e-4)


@pytest.mark.parametrize("shape", [(12, 12), (24, 8), (8, 24)])
def test_steps_are_those_of_torch_up_to_its_rounding(shape):
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizers = Float32Muon([ours], lr=0.1), torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0)
    for _ in range(4):
        gradient = torch.randn(shape, generator=generator)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = (theirs - start).norm()
    assert moved > 0.5
    assert (ours - theirs).norm() < 0.03 * moved
