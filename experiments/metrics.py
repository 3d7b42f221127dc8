"""Metrics on feature vectors: Frechet distance, precision, recall, density, coverage.

All take real (N, F) and generated (M, F) features of an attribute classifier, on any device.
"""
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
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), of Gaussians fitted to both (Heusel et al., 2017)."""
    real, fake = _check(real, fake)
    if min(len(real), len(fake)) < 2:
        raise ValueError(f"{min(len(real), len(fake))} samples are too few for a covariance; at least 2 are needed")
    s1, s2 = real.T.cov(), fake.T.cov()
    values, vectors = torch.linalg.eigh(s1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T  # S1^(1/2)
    cross = torch.linalg.eigvalsh(root @ s2 @ root).clamp_min(0).sqrt().sum()  # tr (S1 S2)^(1/2)
    return ((real.mean(0) - fake.mean(0)).square().sum() + s1.trace() + s2.trace() - 2 * cross).item()


def precision_recall_density_coverage(real, fake, k=5):
    """The four manifold metrics as a dict (Kynkaanniemi et al., 2019; Naeem et al., 2020), each in [0, 1]
    but density. A ball's radius is the distance to the k-th neighbour, itself not counted; inside is strict."""
    real, fake = _check(real, fake)
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(f"k={k} must be at least 1 and less than the number of samples, {min(len(real), len(fake))}")
    radius = lambda features: torch.cdist(features, features).kthvalue(k + 1, dim=1).values
    distance = torch.cdist(real, fake)  # (N, M)
    in_real = distance < radius(real)[:, None]  # fake j lies in the ball of real i
    return {"precision": in_real.any(0).double().mean().item(),
            "recall": (distance < radius(fake)[None]).any(1).double().mean().item(),
            "density": in_real.double().sum(0).mean().item() / k,
            "coverage": in_real.any(1).double().mean().item()}
