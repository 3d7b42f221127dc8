"""toy/metrics.py against closed forms, slow loops, and other libraries."""
import itertools

import pytest
import torch

from toy.metrics import (AttributeClassifier, ball_radii, frechet_distance,
                         precision_recall_density_coverage, shift_and_flip)


def two_sets(n=60, m=45, dimensions=6, seed=4):
    """Real and generated features of different laws, with correlated dimensions, in float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64)
    real = torch.randn(n, dimensions, generator=generator, dtype=torch.float64) @ mix
    return real, 0.4 + 1.1 * torch.randn(m, dimensions, generator=generator, dtype=torch.float64) @ mix


def test_frechet_distance_of_sets_shifted_scaled_and_rotated():
    """It is 0 to itself, |s|^2 after a shift s, sum (sqrt l_i (1 - c))^2 after scaling by c; it is symmetric, in every basis."""
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ torch.diag(torch.arange(1., 7).double())
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 3) == pytest.approx(6 * 9, rel=1e-9)
    centred = x - x.mean(0)
    assert frechet_distance(centred, 0.25 * centred) == pytest.approx(0.75**2 * x.T.cov().trace().item(), rel=1e-9)
    (x, y), rotation = two_sets(40, 4), torch.linalg.qr(two_sets(6, 2)[0])[0]  # a singular covariance
    for pair in ((x @ rotation, y @ rotation), (y, x)):
        assert frechet_distance(*pair) == pytest.approx(frechet_distance(x, y), rel=1e-6)


def test_manifold_metrics_against_loops():
    """Precision, recall, density and coverage agree with their definitions written as loops."""
    (real, fake), k = two_sets(30, 25, 3), 3
    ball = lambda points: [sorted((p - q).norm().item() for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]
    inside = [[(r - f).norm().item() < radius for f in fake] for r, radius in zip(real, ball(real))]
    expected = {"precision": sum(map(any, zip(*inside))) / 25, "density": sum(map(sum, inside)) / (k * 25),
                "coverage": sum(map(any, inside)) / 30,
                "recall": sum(any((r - f).norm().item() < radius for f, radius in zip(fake, ball(fake))) for r in real) / 30}
    assert precision_recall_density_coverage(real, fake, k) == pytest.approx(expected)
    assert precision_recall_density_coverage(real, fake) == precision_recall_density_coverage(real, fake, 5)


def test_coverage_has_its_expected_value():
    """For two samples of one law, E[coverage] = 1 - prod (N - i) / (2N - i) over i = 1..k."""
    generator = torch.Generator().manual_seed(3)
    n, k = 400, 5
    coverage = sum(precision_recall_density_coverage(*torch.randn(2, n, 4, generator=generator), k)["coverage"] for _ in range(8)) / 8
    expected = 1 - torch.tensor([(n - i) / (2 * n - i) for i in range(1, k + 1)]).prod().item()
    assert coverage == pytest.approx(expected, abs=0.01)


def test_manifold_metrics_agree_with_prdc():
    """The authors' package gives the same four numbers, for sets of different and of equal sizes."""
    compute_prdc = pytest.importorskip("prdc", reason="the reference is the package prdc").compute_prdc
    for k, n, m in itertools.product((1, 3, 5), (60, 40, 50), (45, 70, 50)):
        real, fake = two_sets(n, m)
        assert precision_recall_density_coverage(real, fake, k) == pytest.approx(compute_prdc(real.numpy(), fake.numpy(), k))


def test_frechet_distance_agrees_with_torchmetrics():
    """Features passed through an identity in place of Inception give torchmetrics' distance."""
    pytest.importorskip("torchmetrics", reason="the reference is torchmetrics'")
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Identity(torch.nn.Identity):
        num_features = 6

    real, fake = two_sets(200, 150)
    metric = FrechetInceptionDistance(feature=Identity())
    metric.update(real, real=True)
    for part in fake.split(40):
        metric.update(part, real=False)
    assert frechet_distance(real, fake) == pytest.approx(metric.compute().item(), rel=1e-6)
    assert frechet_distance(real, fake) > 0.1


@pytest.mark.parametrize("chunk", [1, 7, 60, 1000])
def test_chunks_and_known_radii_change_nothing(chunk):
    """Any number of samples at a time, and radii that are handed in, give the numbers of all at once."""
    for real, fake in (two_sets(), two_sets(33, 80)):
        expected = precision_recall_density_coverage(real, fake, 3)
        assert precision_recall_density_coverage(real, fake, 3, chunk) == expected
        assert precision_recall_density_coverage(real, fake, 3, chunk, ball_radii(real, 3)) == expected


@pytest.mark.parametrize("chunk", [1, 7, None])
def test_sets_that_are_equal_constant_or_far(chunk):
    """All is found in a copy of a set. Nothing is in one far away, nor in the balls of radius 0 of equal constants."""
    real, fake = two_sets()
    x = 5 * torch.randn(1, 8, generator=torch.Generator().manual_seed(0)).double().expand(40, -1)  # not exact in a product
    for pair, value in (((real, real), 1), ((real, fake + 1e3), 0), ((x, x), 0)):
        assert set(precision_recall_density_coverage(*pair, 5, chunk).values()) == {value}


def test_a_fake_on_the_border_is_outside():
    """On a line of real samples at 0, 1, ..., 9 with k = 1, a generated one at distance 1 is outside, at 0.99 inside."""
    real, k = torch.arange(10.).view(-1, 1), 1
    outside = precision_recall_density_coverage(real, torch.tensor([[10.0], [-1.0], [30.0]]), k)
    assert (outside["precision"], outside["density"], outside["coverage"]) == (0, 0, 0)
    inside = precision_recall_density_coverage(real, torch.tensor([[9.99], [-0.99], [30.0]]), k)
    assert (inside["precision"], inside["density"], inside["coverage"]) == pytest.approx((2 / 3, 2 / 3, 2 / 10))


@pytest.mark.parametrize("network, size, most", [("plain", 8, 0.15e6), ("plain", 28, 0.15e6), ("residual", 32, 0.5e6)])
def test_classifier_heads_and_accuracy(network, size, most):
    """The classifier has a head an attribute; accuracy counts each, and all at once."""
    classifier = AttributeClassifier((10, 6, 4), network).eval()
    x = torch.rand(5, 3, size, size)
    outputs = classifier(x)
    assert [y.shape for y in outputs] == [(5, 10), (5, 6), (5, 4)]
    right = torch.stack([y.argmax(1) for y in outputs], 1)
    right[0, 0] = (right[0, 0] + 1) % 10
    right[1, 2] = (right[1, 2] + 1) % 4
    assert classifier.accuracy(x, right, batch=2) == pytest.approx([0.8, 1.0, 0.8, 0.6])
    assert sum(p.numel() for p in classifier.parameters()) < most


def test_shifts_and_flips_move_whole_images():
    """Every result is the image or its mirror, moved by at most 4 pixels onto black; all moves occur."""
    x = 1 + torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(torch.cat([x, x.flip(3)]), (4,) * 4)
    moves = {padded[m, :, r:r + 6, c:c + 6].numpy().tobytes() for m in (0, 1) for r in range(9) for c in range(9)}
    moved = shift_and_flip(x.expand(4000, -1, -1, -1), torch.Generator().manual_seed(0))
    assert {image.contiguous().numpy().tobytes() for image in moved} == moves
