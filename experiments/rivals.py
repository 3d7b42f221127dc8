"""The methods that the paper compares ERG with, each a few lines on top of erg.py; w = 1 is off for all.

    guidance = pag(w=1.5, layers=[3, 4])                 # PAG* (Ahn et al., 2024)
    guidance = seg(w=1.5, layers=[3, 4], side=7)         # SEG* (Hong, 2024)
    guidance = self_guidance(w=1.5, shift=0.1)           # and tsg, s2: the model itself, disturbed
    guidance = autoguidance(w=1.5, weak=early_model, condition=early_model.encode(prompts))
    x = x + guidance(model, x, t, condition) / steps     # as erg.Guidance

Importing this adds a row for each to toy.sampling.METHODS, at the end of this file.

The asterisk is the paper's: the method was made for a U-Net, and acts on middle blocks of a transformer here.
Image tokens come first and form a square of `side` x `side`. AutoGuidance is Karras et al., 2024.

Shapes: B batch, H heads, S queries, N keys, D head dimension. Conventions as in erg.py.
"""
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F

import erg
from toy import data
from toy.sampling import METHODS, Method, load_checkpoint, weights_file


# ---- Attention that is replaced: the mechanisms of Table 6 -------------------------------------------------


def identity_attention(q, k, v, **options):
    """PAG: every token attends to itself alone, so the output is v. (B, H, S, D) -> (B, H, S, D)."""
    if q.shape[-2] != k.shape[-2]:
        raise ValueError(f"queries and keys must be equally many, not {q.shape[-2]} and {k.shape[-2]}")
    heads = q.shape[-3] // v.shape[-3]
    return v if heads == 1 else v.repeat_interleave(heads, -3)  # grouped queries


def gaussian_kernel(sigma, side):
    """Weights of a Gaussian blur for maps of `side` pixels: an odd number of them, over 6 sigma at most.

    They are no more than reflection allows (the official code's rule: side, or side + 1 if side is even).
    """
    size = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
    if size == 1:
        raise ValueError(f"sigma={sigma!r} has no effect: its kernel is one pixel; it must exceed 1/6")
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
        erg.check_numbers(whole=True, low=2, side=self.side)  # image tokens a row
        if self.sigma != math.inf:  # the mean query
            erg.check_numbers(above=0, sigma=self.sigma)
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


# ---- Guidance by a model with replaced attention: PAG, SEG, Table 6 ----------------------------------------


@dataclasses.dataclass(frozen=True)
class Rewired:
    """v = w v_pos + (1 - w) v_weak, v_weak from the same model with `attention` in `layers` where t > kappa.

    `negative` is the condition of v_weak; None is the positive's.
    """

    w: float
    attention: Callable
    layers: Collection
    queries: slice | None = None
    kappa: float = -1.0  # at all t
    negative: object = None

    def __post_init__(self):
        erg.check_numbers(w=self.w)
        if not -1 <= self.kappa < 1:
            raise ValueError(f"kappa={self.kappa!r} must be at least 0 and less than 1, or -1 for all t")

    def __call__(self, model, x, t, condition=None):
        rectified = t > self.kappa + 1e-6 and self.w != 1
        parts = [condition]
        if self.w != 1 and (rectified or self.negative is not None):
            parts.append(condition if self.negative is None else self.negative)
        B, context = len(x), contextlib.nullcontext()
        if rectified:
            context = erg.rectify(model, attention=self.attention, layers=self.layers, queries=self.queries,
                                  rows=slice(B, 2 * B), batch=len(parts) * B)
        with context:
            v = evaluate_together(model, x, t, parts)
        return v[0] if len(v) == 1 else erg.guide(*v, self.w)


def evaluate_together(model, x, t, conditions):
    """Velocities at x (B, ...) under n conditions (B or 1, L, W), in a batch of nB rows."""
    B, n = len(x), len(conditions)
    together = torch.cat([c.expand(B, *c.shape[1:]) for c in conditions])
    times = torch.full((n * B,), float(t), dtype=torch.float32, device=x.device)
    return model(torch.cat([x] * n), times, together).chunk(n)


def pag(w, layers, queries=None, **options):
    """Perturbed-attention guidance*: the weak prediction's tokens attend to themselves alone.

    `queries` restricts it to the image tokens, so that they keep no text and text tokens stay as they are.
    """
    return Rewired(w, identity_attention, layers, queries, **options)


def seg(w, layers, side, sigma=math.inf, **options):
    """Smoothed energy guidance*: the weak prediction's image queries are blurred."""
    return Rewired(w, SmoothedAttention(sigma, side), layers, **options)


# ---- Guidance by the model itself, disturbed, by another model, and by another caption ---------------------


@dataclasses.dataclass(frozen=True)
class Contrast:
    """v = w v_pos + (1 - w) v_weak, with any weak(model, x, t (B,), condition) -> v_weak."""

    w: float
    weak: Callable

    def __post_init__(self):
        erg.check_numbers(w=self.w)

    def __call__(self, model, x, t, condition=None):
        times = torch.full((len(x),), float(t), dtype=torch.float32, device=x.device)
        v = model(x, times, condition)
        return v if self.w == 1 else erg.guide(v, self.weak(model, x, times, condition), self.w)


def autoguidance(w, weak, condition=None):
    """AutoGuidance: the weak prediction is a weaker model's, under its own condition, if that is given."""
    return Contrast(w, lambda model, x, t, own: weak(x, t, own if condition is None else condition))


def self_guidance(w, shift):
    """Self-Guidance (Li et al., arXiv 2412.05827): the weak prediction is told a noisier time, t - shift."""
    erg.check_numbers(above=0, shift=shift)
    return Contrast(w, lambda model, x, t, condition: model(x, (t - shift).clamp_min(0), condition))


def tsg(w, scale):
    """Time-step guidance* (Sadat et al., arXiv 2407.02687): noise on the embedding of the time.

    Its deviation is `scale` times the embedding's own, at all t. The noise is a function of t.
    """
    erg.check_numbers(above=0, scale=scale)

    def weak(model, x, t, condition):
        generator = torch.Generator().manual_seed(round(1e6 * float(t[0])))

        def disturb(module, args, embedding):
            noise = torch.randn(embedding.shape, generator=generator).to(embedding)
            return embedding + scale * embedding.std() * noise

        hook = model.time.register_forward_hook(disturb)
        try:
            return model(x, t, condition)
        finally:
            hook.remove()
    return Contrast(w, weak)


def s2(w, drop):
    """S2-Guidance* (arXiv 2508.12880): `drop` blocks are skipped, others at each t, never the outermost."""
    erg.check_numbers(whole=True, low=1, drop=drop)

    def weak(model, x, t, condition):
        inner = list(model.blocks)[1:-1]
        if drop > len(inner):
            raise ValueError(f"drop={drop} must be at most {len(inner)}, the number of inner blocks")
        generator = torch.Generator().manual_seed(round(1e6 * float(t[0])))
        chosen = torch.randperm(len(inner), generator=generator)[:drop].tolist()
        hooks = [inner[i].register_forward_hook(lambda module, args, out: args[0]) for i in chosen]
        try:
            return model(x, t, condition)
        finally:
            for hook in hooks:
                hook.remove()
    return Contrast(w, weak)


def make_icg(model, tokens, null, w):
    """Independent condition guidance (Sadat et al., arXiv 2407.02687): the negative is another's caption."""
    if len(tokens) < 2:
        raise ValueError("icg takes the captions of other samples, and there is one; sample several at once")
    return erg.Guidance(erg.ERG(w=w), model.encoder(tokens).roll(1, 0))


# ---- Their rows in the table of methods --------------------------------------------------------------------


def rival(make):
    """A builder for METHODS from make(model, tokens, null, **parameters), the guidance of a batch."""
    def build(**p):
        return lambda model, tokens, null, seed: (model.encoder(tokens), make(model, tokens, null, **p))
    return build


def make_seg(model, tokens, null, w, layers, sigma=math.inf):
    return seg(w, layers, model.side, float(sigma))  # float reads the "inf" of a record


@functools.cache
def weak_model(name, device):
    return load_checkpoint(weights_file(name), device)[0].requires_grad_(False)


def make_autoguidance(model, tokens, null, w, weak):
    """`weak` is the name of a checkpoint: see weights_file."""
    model = weak_model(weak, tokens.device)
    return autoguidance(w, model, model.encoder(tokens))


def make_mechanism(model, tokens, null, w, mechanism, layers, kappa, negative, tau_i=None):
    attention = {"temperature": functools.partial(erg.energy_attention, tau=tau_i),
                 "identity": identity_attention, "smoothing": SmoothedAttention(math.inf, model.side)}
    condition = model.encoder(null) if negative == "null" else None
    return Rewired(w, attention[mechanism], layers, slice(0, model.side**2), kappa, condition)


def build_mechanism(**p):
    """Table 6: three ways to weaken the same attention at the same place."""
    data.check_name(("temperature", "identity", "smoothing"), mechanism=p["mechanism"])
    data.check_name(("null", "same"), negative=p["negative"])
    if ("tau_i" in p) != (p["mechanism"] == "temperature"):
        raise ValueError(f"tau_i={p.get('tau_i')!r} does not fit mechanism={p['mechanism']!r}: "
                         "the temperature needs it, and nothing else takes it")
    return rival(make_mechanism)(**p)


METHODS |= {
    "pag": Method("PAG*", "#B79F00", rival(lambda model, *_, **p: pag(**p, queries=slice(0, model.side**2))),
                  ("w", "layers")),
    "seg": Method("SEG*", "#66A61E", rival(make_seg), ("w", "layers"), ("sigma",)),
    "autoguidance": Method("AutoGuidance", "#3B3B6D", rival(make_autoguidance), ("w", "weak")),
    "icg": Method("ICG", "#1B9E77", rival(make_icg), ("w",)),
    "tsg": Method("TSG*", "#7570B3", rival(lambda *_, **p: tsg(**p)), ("w", "scale")),
    "self-guidance": Method("Self-Guidance", "#E7298A", rival(lambda *_, **p: self_guidance(**p)),
                            ("w", "shift")),
    "s2": Method("S2*", "#666666", rival(lambda *_, **p: s2(**p)), ("w", "drop")),
    "mechanism": Method("mechanism", "#DDCC77", build_mechanism,
                        ("w", "mechanism", "layers", "kappa", "negative"), ("tau_i",)),
}
