import pytest
import torch
from sklearn.cluster import KMeans

from dskd.senses.kmeans import groups, kmeans

SEED = 11


def _clouds(sizes, hidden_size=8, seed=0):
    """Padded points [G, N, D] and their mask: mixtures of a few Gaussians, far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.zeros(len(sizes), max(sizes), hidden_size)
    mask = torch.zeros(len(sizes), max(sizes), dtype=torch.bool)
    for index, size in enumerate(sizes):
        centers = 10 + 3 * torch.randn(6, hidden_size, generator=generator)
        which = torch.randint(0, 6, (size,), generator=generator)
        points[index, :size] = centers[which] + torch.randn(size, hidden_size, generator=generator)
        mask[index, :size] = True
    return points, mask


def _fit(points, mask, k, **options):
    return kmeans(points, mask, k, seed=SEED, keys=torch.arange(len(points)), **options)


def test_inertia_is_close_to_that_of_scikit_learn():
    points, mask = _clouds([40 + 3 * i for i in range(40)])
    found = _fit(points, mask, 5, restarts=2)
    expected = torch.tensor(
        [KMeans(5, n_init=10, random_state=0).fit(points[i][mask[i]].numpy()).inertia_ for i in range(len(points))]
    )
    ratios = found.inertia / expected
    assert ratios.min() > 0.999  # less inertia than ten restarts only by rounding; otherwise ours would be wrong
    assert ratios.median() < 1.03


def test_inertia_counts_and_centers_agree_with_each_other():
    points, mask = _clouds([17, 30, 25])
    found = _fit(points, mask, 4)
    for index in range(3):
        real = points[index][mask[index]]
        distances = torch.cdist(real.double(), found.centers[index].double()) ** 2
        nearest = distances.argmin(-1)
        assert found.inertia[index].item() == pytest.approx(float(distances.min(-1).values.sum()), rel=1e-4)
        assert found.counts[index].tolist() == torch.bincount(nearest, minlength=4).tolist()
        for center in range(4):  # each centre is the mean of its points
            torch.testing.assert_close(
                found.centers[index, center], real[nearest == center].mean(0), rtol=1e-4, atol=1e-4
            )


def test_the_clusters_of_a_token_do_not_depend_on_its_group():
    points, mask = _clouds([20, 32, 32, 24])
    together = _fit(points, mask, 3)
    alone = kmeans(points[2:3], mask[2:3], 3, seed=SEED, keys=torch.tensor([2]))
    torch.testing.assert_close(together.centers[2:3], alone.centers)


def test_more_restarts_never_raise_the_inertia():
    points, mask = _clouds([50] * 20)
    assert (_fit(points, mask, 6, restarts=4).inertia <= _fit(points, mask, 6).inertia * (1 + 1e-6)).all()


def test_equal_points_leave_no_center_undefined():
    points = torch.ones(1, 6, 3)
    points[0, 5] = 2.0
    found = _fit(points, torch.ones(1, 6, dtype=torch.bool), 3)
    assert torch.isfinite(found.centers).all()
    assert found.inertia.item() == pytest.approx(0, abs=1e-6)
    assert found.counts.sum() == 6


def test_groups_hold_every_token_once_and_pad_by_size_alone():
    sizes = torch.tensor([11, 16, 17, 24, 25, 100, 64, 12])
    numbers = torch.tensor([5, 5, 5, 3, 5, 5, 2, 5])
    seen = {}
    for indices, width, k in groups(sizes, numbers, 4, torch.device("cpu")):
        for index in indices.tolist():
            assert index not in seen
            seen[index] = width
            assert k == numbers[index]
            assert sizes[index] <= width < max(2 * int(sizes[index]), 17)
    assert len(seen) == len(sizes)


def test_a_weighted_point_counts_like_repeated_points():
    (points,), _ = _clouds([30])
    weights = torch.randint(1, 5, (30,), generator=torch.Generator().manual_seed(0))
    repeated = points.repeat_interleave(weights, dim=0)
    weighted = _fit(points[None], weights[None], 4, restarts=2)
    plain = _fit(repeated[None], torch.ones(1, len(repeated)), 4, restarts=2)
    torch.testing.assert_close(weighted.centers, plain.centers)
    assert torch.equal(weighted.counts, plain.counts)
    torch.testing.assert_close(weighted.inertia, plain.inertia)
