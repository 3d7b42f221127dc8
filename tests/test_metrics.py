"""experiments/metrics.py against closed forms and slow loops."""
import pytest
import torch

from experiments.metrics import frechet_distance, precision_recall_density_coverage


def test_frechet_distance_of_a_set_to_itself_shifted_and_scaled():
    """It is 0 to itself, |s|^2 after a shift s, and sum (sqrt l_i (1 - c))^2 after scaling by c about the mean."""
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ torch.diag(torch.arange(1., 7).double())
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 3) == pytest.approx(6 * 9, rel=1e-9)
    centred = x - x.mean(0)
    assert frechet_distance(centred, 0.25 * centred) == pytest.approx(0.75**2 * x.T.cov().trace().item(), rel=1e-9)


def test_frechet_distance_does_not_depend_on_the_basis():
    """A rotation of both sets leaves it as it is, and it is symmetric, also with singular covariances."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 6, generator=generator).double(), 2 + torch.randn(4, 6, generator=generator).double()
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator).double())[0]
    value = frechet_distance(x, y)
    assert frechet_distance(x @ rotation, y @ rotation) == pytest.approx(value, rel=1e-6)
    assert frechet_distance(y, x) == pytest.approx(value, rel=1e-6)


def test_manifold_metrics_against_loops():
    """Precision, recall, density and coverage agree with their definitions written as loops."""
    generator = torch.Generator().manual_seed(2)
    real, fake, k = torch.randn(30, 3, generator=generator).double(), 0.3 + torch.randn(25, 3, generator=generator).double(), 3
    ball = lambda points: [sorted((p - q).norm().item() for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]
    inside = [[(r - f).norm().item() < radius for f in fake] for r, radius in zip(real, ball(real))]
    expected = {"precision": sum(map(any, zip(*inside))) / 25, "density": sum(map(sum, inside)) / (k * 25),
                "coverage": sum(map(any, inside)) / 30,
                "recall": sum(any((r - f).norm().item() < radius for f, radius in zip(fake, ball(fake))) for r in real) / 30}
    assert precision_recall_density_coverage(real, fake, k) == pytest.approx(expected)


def test_coverage_has_its_expected_value():
    """For two samples of one law, E[coverage] = 1 - prod (N - i) / (2N - i) over i = 1..k."""
    generator = torch.Generator().manual_seed(3)
    n, k = 400, 5
    coverage = sum(precision_recall_density_coverage(*torch.randn(2, n, 4, generator=generator), k)["coverage"] for _ in range(8)) / 8
    expected = 1 - torch.tensor([(n - i) / (2 * n - i) for i in range(1, k + 1)]).prod().item()
    assert coverage == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("real, fake, message", [
    (torch.zeros(9), torch.zeros(9, 2), "real has the shape"), (torch.zeros(9, 3), torch.zeros(9, 2), "3 dimensions and fake 2"),
    (torch.full((9, 2), float("nan")), torch.zeros(9, 2), "NaN"), (torch.zeros(5, 2), torch.zeros(9, 2), "k=5"),
])
def test_bad_input_is_named(real, fake, message):
    """Wrong shapes, NaN and too few samples are one clear error."""
    with pytest.raises(ValueError) as error:
        precision_recall_density_coverage(real, fake)
    assert message in str(error.value)
    if "k=" not in message:
        with pytest.raises(ValueError):
            frechet_distance(real, fake)
