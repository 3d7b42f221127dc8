"""What ERG looks at, measured on any model: figures 5, 6 and 7, and what each layer does.

    for layer in attention_certainty(model, x, t, condition): print(layer)         # figure 7
    difference_norms(model, noise, condition, settings, negative)                  # figure 6
    velocity_variances(model, noise, condition, null, weak)                        # figure 5
    for effect in layer_effects(model, noise, condition): print(effect)            # of ranges of layers

All of it runs through erg.py's rectifier, so it works wherever that does.
Shapes: B batch, H heads, S queries, N keys, D head dimension.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import erg


@dataclass(frozen=True)
class Certainty:
    """How decided one attention layer is, averaged over samples, heads and queries."""

    layer: int  # among the self-attention calls
    entropy: float  # of a row of attention, in nats; log(N) is uniform
    relative_entropy: float  # the same over log(N), 0 to 1
    certain: float  # share of rows whose largest probability exceeds the threshold


@torch.no_grad()
def attention_certainty(model, *args, threshold=0.95, chunk=256, **kwargs):
    """Entropy, and share of rows with a probability above `threshold`, a self-attention layer (fig. 7).

    Runs model(*args, **kwargs) once, unchanged. Maps are formed for `chunk` queries at a time. Masks,
    causal attention and grouped queries are taken into account. Returns a list of Certainty.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold={threshold!r} must lie between 0 and 1")
    layers = []

    def watch(q, k, v, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
        keys = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3) if enable_gqa else k  # (B, H, N, D)
        S, N = q.shape[-2], k.shape[-2]
        entropy = certain = 0.0
        for start in range(0, S, chunk):
            part = slice(start, start + chunk)
            factor = q.shape[-1]**-0.5 if scale is None else scale
            logits = factor * q[..., part, :].float() @ keys.float().mT
            if is_causal:
                ahead = torch.ones(S, N, dtype=torch.bool, device=q.device).triu(1)[part]
                logits = logits.masked_fill(ahead, -torch.inf)
            if attn_mask is not None:
                mask = attn_mask[..., part, :] if attn_mask.shape[-2] > 1 else attn_mask
                logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
            p = logits.softmax(-1)  # (B, H, chunk, N)
            entropy += torch.special.entr(p).sum(-1).mean((0, 1)).sum().item() / S
            certain += (p.amax(-1) > threshold).float().mean((0, 1)).sum().item() / S
        layers.append(Certainty(len(layers), entropy, entropy / max(math.log(N), 1e-12), certain))
        return F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal, scale=scale,
                                              enable_gqa=enable_gqa)

    with erg.rectify(model if isinstance(model, torch.nn.Module) else None, attention=watch):
        model(*args, **kwargs)
    return layers


@torch.no_grad()
def difference_norms(model, noise, condition, settings, negative=None, steps=25):
    """Norms of the parts of v_pos - v_neg parallel and orthogonal to v_pos, along the guided path (fig. 6).

    `settings` and `negative` as for erg.Guidance; both predictions are made at every step, before kappa with
    ordinary attention. Returns t, parallel and orthogonal, each (steps,): root mean square over pixels.
    """
    if settings.apg is not None or callable(settings.w):
        raise ValueError(f"settings={settings!r} must have a constant w, and no apg")
    guidance, x, rows = erg.Guidance(settings, negative), noise, []
    negative = condition if negative is None else negative
    for i in range(steps):
        t = i / steps
        v_pos, v_neg = guidance.predictions(model, x, t, condition, negative, guidance.rectifies_at(t))
        parallel, orthogonal = erg.project(v_pos - v_neg, v_pos)
        rows.append((t, parallel.square().mean().sqrt().item(), orthogonal.square().mean().sqrt().item()))
        x = x + erg.guide(v_pos, v_neg, settings.w) / steps
    return torch.tensor(rows).unbind(1)


@torch.no_grad()
def velocity_variances(model, noise, condition, null, weak):
    """Variances of the first velocity over noises and prompts, one number a pixel (fig. 5, eqs. 13 and 14).

    noise (n, C, S, S); condition, null and weak (n, L, W), one prompt a row. Returns a dict of (C, S, S):
    "marginal null", "marginal weak": Var[v(null)], Var[v(weak)];
    "conditional null", "conditional weak": Var[v(c) - v(null)], Var[v(c) - v(weak)].
    """
    if len(noise) < 2:
        raise ValueError(f"noise holds {len(noise)} samples; a variance needs at least 2")
    t = torch.zeros(len(noise), device=noise.device)
    v, v_null, v_weak = (model(noise, t, c) for c in (condition, null, weak))
    return {"marginal null": v_null.var(0), "marginal weak": v_weak.var(0),
            "conditional null": (v - v_null).var(0), "conditional weak": (v - v_weak).var(0)}


# ---- Layers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effect:
    """What rectifying some layers does: the change orthogonal to the velocity, over the velocity's norm."""

    layers: range
    early: float
    late: float


@torch.no_grad()
def layer_effects(model, noise, condition, tau=0.01, queries=None, times=(0.3, 0.9), steps=20, longest=None):
    """The Effect of every range of at most `longest` self-attention layers at two times of the unguided path.

    noise (B, ...), condition as the model takes it; a batch of 16 to 32 will do. One forward for each range
    and time. `longest` None is no limit.
    """
    if not 0 < times[0] < times[1] < 1:
        raise ValueError(f"times={times!r} must be two numbers with 0 < early < late < 1")
    at = [round(t * steps) for t in times]
    if not at[0] < at[1] < steps:
        raise ValueError(f"steps={steps!r} are too few to tell the times {times} apart")
    moments, x = [], noise  # what the model is given at the two times, and its velocity
    for i in range(at[1] + 1):
        given = (x, torch.full((len(x),), i / steps, device=x.device), condition)
        v = model(*given)
        if i in at:
            moments.append((given, v))
        x = x + v / steps
    calls = erg.attention_calls(model, *moments[0][0])
    n, effects, norm = sum(call.kind == "self" for call in calls), [], lambda v: v.flatten(1).norm(dim=1)
    for start in range(n):
        for end in range(start + 1, min(n, start + (longest or n)) + 1):
            size = []
            for given, v in moments:
                with erg.rectify(model, tau=tau, layers=range(start, end), queries=queries):
                    weak = model(*given)
                _, orthogonal = erg.project(v - weak, v)
                size.append((norm(orthogonal) / norm(v)).mean().item())
            effects.append(Effect(range(start, end), *size))
    return effects
