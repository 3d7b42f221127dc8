"""Metrics: Frechet distance, precision, recall, density, coverage, saturation, and the mean rank over them.

Real (N, F) and generated (M, F) features come from an attribute classifier, on any device that has float64.
"""
import math

import torch


def _check(real, fake):
    for name, features in (("real", real), ("fake", fake)):
        if features.dim() != 2:
            raise ValueError(f"{name} has the shape {tuple(features.shape)}; features must be (samples, dimensions)")
        if not torch.isfinite(features).all():
            raise ValueError(f"{name} holds NaN or infinite features")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"real has {real.shape[1]} dimensions and fake {fake.shape[1]}; they must agree")
    return real.double(), fake.double()


def frechet_distance(real, fake):
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), of Gaussians fitted to both (Heusel et al., 2017).

    Biased upwards for few samples: compare numbers of equally many samples only.
    """
    real, fake = _check(real, fake)
    if min(len(real), len(fake)) < 2:
        raise ValueError(f"{min(len(real), len(fake))} samples are too few for a covariance; at least 2 are needed")
    s1, s2 = real.T.cov(), fake.T.cov()
    values, vectors = torch.linalg.eigh(s1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T  # S1^(1/2)
    cross = torch.linalg.eigvalsh(root @ s2 @ root).clamp_min(0).sqrt().sum()  # tr (S1 S2)^(1/2)
    return ((real.mean(0) - fake.mean(0)).square().sum() + s1.trace() + s2.trace() - 2 * cross).item()


def distances(a, b):
    """(N, F), (M, F) -> (N, M), without the matrix product, which makes equal points differ by 1e-7."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def ball_radii(x, k, chunk=1000):
    """Distance of each of x (N, F) to its k-th neighbour, itself not counted: (N,)."""
    x = x.double()
    return torch.cat([distances(part, x).kthvalue(k + 1, dim=1).values for part in x.split(chunk)])


def precision_recall_density_coverage(real, fake, k=5, chunk=None, real_radius=None):
    """The four manifold metrics as a dict (Kynkaanniemi et al., 2019; Naeem et al., 2020), each in [0, 1] but density.

    A ball's radius is the distance to the k-th neighbour, itself not counted; inside is strict. Distances are formed
    for `chunk` samples at a time (by default so many that they take 256 MiB), so 50,000 x 50,000 needs no more memory.
    `real_radius` (N,), the radii of `ball_radii(real, k)`, saves computing them anew for each generated set.
    """
    real, fake = _check(real, fake)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k < min(len(real), len(fake)):
        raise ValueError(f"k={k!r} must be a whole number, at least 1 and less than the number of samples, "
                         f"{min(len(real), len(fake))}")
    if chunk is None:
        chunk = max(1, 2**25 // max(len(real), len(fake)))
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk={chunk!r} must be a whole number, at least 1")
    if real_radius is not None and real_radius.shape != (len(real),):
        raise ValueError(f"real_radius has the shape {tuple(real_radius.shape)}; it must be ({len(real)},), one for each real sample")
    radius = ball_radii(real, k, chunk) if real_radius is None else real_radius.to(real)  # (N,)
    fake_radius = ball_radii(fake, k, chunk)  # (M,)
    precise = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    recalled = covered = pairs = 0
    for part, r in zip(real.split(chunk), radius.split(chunk)):
        distance = distances(part, fake)  # (chunk, M)
        inside = distance < r[:, None]  # fake j lies in the ball of real i
        precise |= inside.any(0)
        pairs += inside.sum().item()
        covered += inside.any(1).sum().item()
        recalled += (distance < fake_radius).any(1).sum().item()
    return {"precision": precise.double().mean().item(), "recall": recalled / len(real),
            "density": pairs / (k * len(fake)), "coverage": covered / len(real)}


def saturation(x):
    """Mean of HSV saturation times value, that is max - min over the channels, of images (n, 3, H, W) in [-1, 1].

    HSV saturation alone would read the faintest noise on black as full colour.
    """
    if x.dim() != 4 or x.shape[1] != 3:
        raise ValueError(f"images have the shape {tuple(x.shape)}; they must be (n, 3, H, W)")
    if not torch.isfinite(x).all():
        raise ValueError("images hold NaN or infinite values")
    rgb = ((x + 1) / 2).clamp(0, 1)
    return (rgb.amax(1) - rgb.amin(1)).double().mean().item()


BETTER = {"frechet": "lower", "precision": "higher", "recall": "higher", "density": "higher", "coverage": "higher",
          "prompt": "higher", "digit": "higher", "ink": "higher", "paper": "higher", "object": "higher"}


def mean_ranks(rows, metrics):
    """Appendix A.1: the rank of each row (a dict of numbers) in each metric, averaged over `metrics`; 1 is best.

    Ties share the mean of their ranks. Directions are those of BETTER.
    """
    if not rows or not metrics:
        raise ValueError(f"{'metrics' if rows else 'rows'} is empty; there is nothing to rank")
    total = [0.0] * len(rows)
    for name in metrics:
        if name not in BETTER:
            raise ValueError(f"metric {name!r} must be one of {', '.join(BETTER)}")
        if any(name not in row for row in rows):
            raise ValueError(f"metric {name!r} is missing in a row, which has {', '.join(next(r for r in rows if name not in r))}")
        values = [row[name] if BETTER[name] == "lower" else -row[name] for row in rows]
        if not all(map(math.isfinite, values)):
            raise ValueError(f"metric {name!r} is not finite in every row")
        for i, value in enumerate(values):
            total[i] += sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2
    return [t / len(metrics) for t in total]
