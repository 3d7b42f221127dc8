"""Metrics: Frechet distance, precision, recall, density and coverage.

    classifier = train_classifier(images, "plain", iterations=1000)   # or "residual", for photographs
    reference = features_of(classifier, real)                         # (N, F)
    row = evaluate(generated, attributes, classifier, reference)      # {"frechet": ..., "prompt": ...}

Real (N, F) and generated (M, F) features come from an attribute classifier, on any device that has float64.
"""
import contextlib

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------
# Distances between sets of features
# ------------------------------------------------------------------------------------------------


def _check(real, fake):
    for name, features in (("real", real), ("fake", fake)):
        if features.dim() != 2:
            raise ValueError(f"{name} has the shape {tuple(features.shape)}, not (samples, dimensions)")
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
        raise ValueError(f"{min(len(real), len(fake))} samples are too few for a covariance, which needs 2")
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
    """The four manifold metrics as a dict (Kynkaanniemi et al., 2019; Naeem et al., 2020).

    Each is in [0, 1] but density. A ball's radius is the distance to the k-th neighbour, itself not counted.
    Inside is strict. Distances are formed for `chunk` samples at a time, by default so many that they take
    256 MiB. `real_radius` (N,) saves computing `ball_radii(real, k)` anew for each generated set.
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
        raise ValueError(f"real_radius has the shape {tuple(real_radius.shape)}; it must be ({len(real)},)")
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


BETTER = {"frechet": "lower"} | dict.fromkeys(
    ("precision", "recall", "density", "coverage", "prompt"), "higher")


# ------------------------------------------------------------------------------------------------
# Attribute classifier: prompt accuracy, and features for the metrics
# ------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions around a shortcut; `stride` 2 halves the image."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1, bias=False)
        same = inputs == width and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, width, 1, stride, bias=False)

    def forward(self, x):  # (B, inputs, S, S)
        y = F.relu(self.norm1(x))
        return self.shortcut(y) + self.conv2(F.relu(self.norm2(self.conv1(y))))  # (B, width, S / stride, ...)


def plain_layers():
    """For handwriting: three convolutions; a 3 x 3 map of 64 channels."""
    layers, channels = [], 3
    for width in (32, 64, 64):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    return [*layers, nn.AdaptiveAvgPool2d(3), nn.Flatten()], 9 * channels


def residual_layers():
    """For photographs: a wide residual network of 13 convolutions and 0.3 M parameters."""
    layers, channels = [nn.Conv2d(3, 32, 3, padding=1, bias=False)], 32
    for width, stride in ((32, 1), (32, 1), (48, 2), (48, 1), (72, 2), (72, 1)):
        layers.append(Residual(channels, width, stride))
        channels = width
    return [*layers, nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()], channels


class AttributeClassifier(nn.Module):
    """A small convolutional network, "plain" or "residual", with one head an attribute.

    `features` are its last hidden layer, each normalized to variance 1 over the training images, so that a
    Frechet distance is in units of standard deviations.
    """

    def __init__(self, classes, network="plain", hidden=64):
        super().__init__()
        if network not in ("plain", "residual"):
            raise ValueError(f"network={network!r} must be 'plain' or 'residual'")
        self.classes, self.network = tuple(classes), network
        layers, width = plain_layers() if network == "plain" else residual_layers()
        self.features = nn.Sequential(*layers, nn.Linear(width, hidden), nn.BatchNorm1d(hidden, affine=False))
        self.heads = nn.Sequential(nn.ReLU(), nn.Linear(hidden, sum(classes)))

    def forward(self, x):  # (B, 3, S, S) -> A tensors (B, classes)
        return self.heads(self.features(x)).split(self.classes, dim=1)

    @torch.no_grad()
    def accuracy(self, x, attributes, batch=512):
        """Shares of images (n, 3, S, S) whose attributes (n, A) are recognized: each, and all at once."""
        device = self.heads[1].weight.device
        outputs = [self(part.to(device)) for part in x.split(batch)]
        guesses = [torch.stack([y.argmax(1) for y in heads], dim=1) for heads in outputs]
        right = (torch.cat(guesses).cpu() == attributes.cpu()).double()  # (n, A)
        return right.mean(0).tolist() + [right.amin(1).mean().item()]


def shift_and_flip(x, generator, most=4):
    """Images (B, 3, S, S), each moved by at most `most` pixels and mirrored at random."""
    B, S, device = len(x), x.shape[-1], x.device
    start = torch.randint(2 * most + 1, (2, B, 1), generator=generator, device=device)
    rows, columns = start + torch.arange(S, device=device)  # each (B, S)
    mirrored = torch.rand(B, 1, generator=generator, device=device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    number = torch.arange(B, device=device).view(-1, 1, 1)
    moved = F.pad(x, (most,) * 4)[number, :, rows[:, :, None], columns[:, None, :]]  # (B, S, S, 3)
    return moved.permute(0, 3, 1, 2)  # channels stay last in memory, as convolutions like it


def train_classifier(images, network="plain", iterations=1000, seed=0, device="cpu"):
    """Fit an AttributeClassifier to `images` (data.Images); returned in evaluation mode.

    "plain" is trained by Adam with a falling rate, "residual" by one cycle of SGD with shifts and flips.
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AttributeClassifier([len(words) for words in images.attributes.values()], network).to(device)
    if network == "plain":
        batch, lr, rise, smoothing, source = 128, 3e-3, 0.0, 0.0, images
        optimizer = torch.optim.AdamW(model.parameters(), lr)
    else:
        batch, lr, rise, smoothing, source = 512, 0.4, 0.2, 0.1, images.to(device)
        model = model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    at = source.labels.device
    generator = torch.Generator(at).manual_seed(seed)
    half = device.type == "cuda" and network == "residual"
    for i in tqdm(range(iterations), desc="classifier", leave=False, mininterval=1.0):
        rate = min((i + 1) / max(1, rise * iterations), (1 - i / iterations) / (1 - rise))
        optimizer.param_groups[0]["lr"] = lr * rate
        rows = torch.randint(len(source), (batch,), generator=generator, device=at)
        x, attributes = source.draw(rows, generator)
        x = x if network == "plain" else shift_and_flip(x, generator)
        with torch.autocast("cuda", torch.bfloat16) if half else contextlib.nullcontext():
            outputs, attributes = model(x.to(device)), attributes.to(device)
        loss = sum(F.cross_entropy(y.float(), attributes[:, k], label_smoothing=smoothing)
                   for k, y in enumerate(outputs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.to(memory_format=torch.contiguous_format).eval()


@torch.no_grad()
def features_of(classifier, x, batch=512):
    """Images (n, 3, S, S) -> features (n, F) on the CPU."""
    device = classifier.heads[1].weight.device
    return torch.cat([classifier.features(part.to(device)).cpu() for part in x.split(batch)])


def evaluate(x, attributes, classifier, reference):
    """One row of the table: metrics of images x (n, C, S, S) against reference features (N, F)."""
    fake = features_of(classifier, x)
    return {"frechet": frechet_distance(reference, fake),
            **precision_recall_density_coverage(reference, fake),
            "prompt": classifier.accuracy(x, attributes)[-1]}
