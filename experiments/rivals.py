"""The methods that the paper compares ERG with, each a few lines on top of erg.py; w = 1 is off for all.

    erg.ERG(w=2.0)                                       # CFG, and with apg=erg.APG() or cads=erg.CADS(): APG, CADS
    erg.ERG(w=interval(2.0, 0.2, 0.8))                   # CFG in a limited interval (Kynkaanniemi et al., 2024)
    guidance = pag(w=1.5, layers=[3, 4])                 # PAG* (Ahn et al., 2024)
    guidance = seg(w=1.5, layers=[3, 4], side=7)         # SEG* (Hong, 2024); cfg=2.0, null=...: with CFG
    guidance = SAG(w=1.2, layer=3, side=7)               # SAG* (Hong et al., 2023)
    guidance = AutoGuidance(w=1.5, weak=early_model, condition=early_model.encode(prompts))  # Karras et al., 2024
    x = x + guidance(model, x, t, condition) / steps     # as erg.Guidance; or tiny_dit.sample(..., guidance=guidance)

The asterisk is the paper's: the method was made for a U-Net, and is applied to middle blocks of a transformer here.
Image tokens come first and form a square of `side` x `side`. Function evaluations per step (`NFE`): 2 for all, but 3
for SEG with CFG, and fewer where an interval or kappa makes the second prediction equal to the first.

Shapes: B batch, H heads, S queries, N keys, D head dimension. Conventions as in erg.py.
"""
import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

import erg


def _finite(name, value, above=None):
    """Raise one clear error unless `value` is a finite number, greater than `above` where that is given."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or (above is not None and value <= above):
        raise ValueError(f"{name}={value!r} must be a finite number" + ("" if above is None else f" greater than {above:g}"))


def _check_time(t):
    if not 0 <= float(t) <= 1:
        raise ValueError(f"t={float(t)} must lie between 0 (noise) and 1 (data)")


def _check_side(side):
    if isinstance(side, bool) or not isinstance(side, int) or side < 2:
        raise ValueError(f"side={side!r} must be a whole number, at least 2: image tokens per row")


# ------------------------------------------------------------------------------------------------
# Attention that is replaced: the mechanisms of Table 6
# ------------------------------------------------------------------------------------------------


def identity_attention(q, k, v, **options):
    """PAG: every token attends to itself alone, so the output is v. (B, H, S, D) -> (B, H, S, D)."""
    if q.shape[-2] != k.shape[-2]:
        raise ValueError(f"identity attention needs as many queries as keys, not {q.shape[-2]} and {k.shape[-2]}")
    heads = q.shape[-3] // v.shape[-3]
    return v if heads == 1 else v.repeat_interleave(heads, -3)  # grouped queries


def gaussian_kernel(sigma, side):
    """Weights of a Gaussian blur for maps of `side` pixels: odd length, 6 sigma at most, and no longer than
    reflection allows (the official code's rule: side, or side + 1 if side is even)."""
    size = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
    if size == 1:
        raise ValueError(f"sigma={sigma!r} has no effect: its kernel is a single pixel; it must exceed 1/6")
    size = min(size, side - (side % 2 - 1))
    x = torch.arange(size, dtype=torch.float64) - size // 2
    weights = torch.exp(-0.5 * (x / sigma).square())
    return weights / weights.sum()


def gaussian_blur(x, sigma):
    """Separable Gaussian blur of maps (..., side, side), reflected at the border."""
    side = x.shape[-1]
    if x.shape[-2] != side:
        raise ValueError(f"maps have the shape {tuple(x.shape[-2:])}; they must be square")
    kernel = gaussian_kernel(sigma, side).to(x)
    pad, flat = len(kernel) // 2, x.reshape(-1, 1, *x.shape[-2:])
    flat = F.pad(flat, (pad, pad, pad, pad), mode="reflect")
    flat = F.conv2d(F.conv2d(flat, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    return flat.reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class SmoothedAttention:
    """SEG: attention with the image queries blurred over the image plane; sigma = inf is their mean.

    The mean query still attends, so this is not the uniform attention of tau = 0.
    """

    sigma: float
    side: int

    def __post_init__(self):
        if not self.sigma > 0:
            raise ValueError(f"sigma={self.sigma!r} must be greater than 0; math.inf is the mean query")
        _check_side(self.side)
        if not math.isinf(self.sigma):
            gaussian_kernel(self.sigma, self.side)

    def __call__(self, q, k, v, **options):
        n = self.side**2
        if q.shape[-2] < n:
            raise ValueError(f"side={self.side} needs {n} image queries; there are {q.shape[-2]}")
        image = q[..., :n, :]  # (B, H, n, D)
        if math.isinf(self.sigma):
            image = image.mean(-2, keepdim=True).expand_as(image)
        else:
            plane = image.transpose(-1, -2).unflatten(-1, (self.side, self.side))  # (B, H, D, side, side)
            image = gaussian_blur(plane, self.sigma).flatten(-2).transpose(-1, -2)
        return F.scaled_dot_product_attention(torch.cat([image, q[..., n:, :]], dim=-2), k, v, **options)


# ------------------------------------------------------------------------------------------------
# Guidance by a model with replaced attention: PAG, SEG, Table 6
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rewired:
    """v = w v_pos + (1 - w) v_weak, v_weak from the same model with `attention` in `layers` where t > kappa.

    `negative` is the condition of v_weak; None is the positive's. With `cfg` other than 1, CFG is added:
    v + (cfg - 1) (v_pos - v_null), v_null with ordinary attention under the condition `null`, for 3 NFE.
    """

    w: float
    attention: Callable
    layers: Collection
    queries: slice | None = None
    kappa: float = -1.0  # at all t
    negative: object = None
    cfg: float = 1.0
    null: object = None

    def __post_init__(self):
        for name in ("w", "cfg"):
            _finite(name, getattr(self, name))
        if not -1 <= self.kappa < 1:
            raise ValueError(f"kappa={self.kappa!r} must be at least 0 and less than 1, or -1 for all t")
        if (self.cfg == 1) != (self.null is None):
            raise ValueError(f"cfg={self.cfg!r} and null go together: CFG needs the null prompt's condition, and "
                             "without CFG it has no effect")

    def __call__(self, model, x, t, condition=None):
        _check_time(t)
        rectified = t > self.kappa + 1e-6 and self.w != 1
        parts = [condition]
        if self.w != 1 and (rectified or self.negative is not None):
            parts.append(condition if self.negative is None else self.negative)
        if self.cfg != 1:
            parts.append(self.null)
        B = len(x)
        rows = dict(rows=slice(B, 2 * B), batch=len(parts) * B)
        with erg.rectify(model, attention=self.attention, layers=self.layers, queries=self.queries,
                         **rows) if rectified else contextlib.nullcontext():
            v = evaluate_together(model, x, t, parts)
        guided = v[0]
        if self.w != 1 and len(v) > (self.cfg != 1) + 1:
            guided = guided + (self.w - 1) * (v[0] - v[1])
        return guided if self.cfg == 1 else guided + (self.cfg - 1) * (v[0] - v[-1])


def evaluate_together(model, x, t, conditions):
    """Velocities at x (B, ...) under each of n conditions, in one batch of nB rows; a single row is repeated."""
    B = len(x)
    rows = lambda c: c.expand(B, *c.shape[1:]) if isinstance(c, Tensor) else c
    together = pytree.tree_map(lambda *c: torch.cat([rows(y) for y in c]) if isinstance(c[0], Tensor) else c[0], *conditions)
    times = torch.full((B * len(conditions),), float(t), dtype=torch.float32, device=x.device)
    return model(x.repeat(len(conditions), *[1] * (x.dim() - 1)), times, together).chunk(len(conditions))


def pag(w, layers, queries=None, **options):
    """Perturbed-attention guidance*: the weak prediction's tokens attend to themselves alone. 2 NFE.

    `queries` restricts it to the image tokens, so that they keep no text and text tokens stay as they are.
    """
    return Rewired(w, identity_attention, layers, queries, **options)


def seg(w, layers, side, sigma=math.inf, **options):
    """Smoothed energy guidance*: the weak prediction's image queries are blurred. 2 NFE; 3 with `cfg` and `null`."""
    return Rewired(w, SmoothedAttention(sigma, side), layers, **options)


# ------------------------------------------------------------------------------------------------
# Guidance by a blurred input, by another model, and by an interval
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SAG:
    """Self-attention guidance*: blur what the model attends to, and contrast with the prediction there. 2 NFE.

    A token is attended to if it gets more than `threshold` times the mean attention of the image tokens in `layer`.
    The predicted image is blurred there with `sigma` (pixels) and noised again with the predicted noise. The noise
    predicted from that is the weak one, as in the official code; in velocities, which are affine in noise at the
    given x, v_weak = model(x_bar, t, condition) + (image - blurred image).
    """

    w: float
    layer: int
    side: int
    sigma: float = 1.0
    threshold: float = 1.0

    def __post_init__(self):
        _finite("w", self.w)
        _finite("sigma", self.sigma, above=0)
        _finite("threshold", self.threshold, above=0)
        _check_side(self.side)

    def __call__(self, model, x, t, condition=None):
        _check_time(t)
        if x.shape[-1] % self.side or x.shape[-2] != x.shape[-1]:
            raise ValueError(f"side={self.side} does not divide images of {x.shape[-2]} x {x.shape[-1]} pixels into square tokens")
        times = torch.full((len(x),), float(t), dtype=torch.float32, device=x.device)
        if self.w == 1:
            return model(x, times, condition)
        received = []

        def watch(q, k, v, **options):
            received.append(attention_received(q, k, self.side**2, options.get("scale")))
            return F.scaled_dot_product_attention(q, k, v, **options)

        with erg.rectify(model, attention=watch, layers=[self.layer]):
            v = model(x, times, condition)
        mask = (received[0] > self.threshold).to(x).view(-1, 1, self.side, self.side)  # (B, 1, side, side)
        mask = F.interpolate(mask, size=x.shape[-2:], mode="nearest")
        image = x + (1 - t) * v
        lost = mask * (image - gaussian_blur(image, self.sigma))
        v_weak = model(x - t * lost, times, condition) + lost
        return erg.guide(v, v_weak, self.w)


def attention_received(q, k, n, scale=None):
    """Attention that each of the first n tokens gets from them, averaged over heads: (B, n), with mean 1."""
    if min(q.shape[-2], k.shape[-2]) < n:
        raise ValueError(f"side={math.isqrt(n)} needs {n} image tokens; there are {min(q.shape[-2], k.shape[-2])}")
    scale = q.shape[-1]**-0.5 if scale is None else scale
    p = (scale * q[..., :n, :] @ k[..., :n, :].mT).softmax(-1)  # (B, H, n, n)
    return p.mean(1).sum(-2)


@dataclasses.dataclass(frozen=True)
class AutoGuidance:
    """The weak prediction is a weaker model's, under its own encoding of the same prompt. 1 NFE of each model."""

    w: float
    weak: Callable
    condition: object = None  # None: the strong model's

    def __post_init__(self):
        _finite("w", self.w)

    def __call__(self, model, x, t, condition=None):
        _check_time(t)
        times = torch.full((len(x),), float(t), dtype=torch.float32, device=x.device)
        v = model(x, times, condition)
        if self.w == 1:
            return v
        return erg.guide(v, self.weak(x, times, condition if self.condition is None else self.condition), self.w)


def interval(w, low, high):
    """The weight of guidance in a limited interval: w where low <= t < high, else 1, which costs no second evaluation."""
    _finite("w", w)
    if not 0 <= low < high <= 1:
        raise ValueError(f"low={low!r}, high={high!r} must satisfy 0 <= low < high <= 1")
    return lambda t: w if low <= t < high else 1.0
