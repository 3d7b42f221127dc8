"""What ERG looks at, measured on any model: the paper's figures 5, 6 and 7.

    for layer in attention_certainty(model, x, t, condition): print(layer)         # figure 7
    difference_norms(model, noise, condition, settings, negative)                  # figure 6
    velocity_variances(model, noise, condition, null, weak)                        # figure 5

All of it runs through erg.py's rectifier, so it works wherever that does.
Shapes: B batch, H heads, S queries, N keys, D head dimension.
"""
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
    """Entropy, and share of rows with a probability above `threshold`, for every self-attention layer (fig. 7).

    Runs model(*args, **kwargs) once, unchanged. Maps are formed for `chunk` queries at a time and thrown away.
    Masks, causal attention and grouped queries are taken into account. Returns a list of Certainty.
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
            logits = (q[..., part, :].float() @ keys.float().mT) * (q.shape[-1]**-0.5 if scale is None else scale)
            if is_causal:
                ahead = torch.ones(S, N, dtype=torch.bool, device=q.device).triu(1)[part]
                logits = logits.masked_fill(ahead, -torch.inf)
            if attn_mask is not None:
                mask = attn_mask[..., part, :] if attn_mask.shape[-2] > 1 else attn_mask
                logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
            p = logits.softmax(-1)  # (B, H, chunk, N)
            entropy += torch.special.entr(p).sum(-1).mean((0, 1)).sum().item() / S
            certain += (p.amax(-1) > threshold).float().mean((0, 1)).sum().item() / S
        layers.append(Certainty(len(layers), entropy, entropy / max(torch.tensor(float(N)).log().item(), 1e-12), certain))
        return F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)

    with erg.rectify(model if isinstance(model, torch.nn.Module) else None, attention=watch):
        model(*args, **kwargs)
    return layers


@torch.no_grad()
def difference_norms(model, noise, condition, settings, negative=None, steps=25):
    """Norms of the parts of v_pos - v_neg parallel and orthogonal to v_pos, along the guided path (fig. 6).

    `settings` and `negative` as for erg.Guidance; both predictions are made at every step, before kappa with
    ordinary attention. Returns t (steps,), parallel (steps,), orthogonal (steps,): root mean square over pixels.
    """
    guidance, x, rows = erg.Guidance(settings, negative), noise, []
    for i in range(steps):
        t = i / steps
        v_pos, v_neg = guidance.predictions(model, x, t, condition, condition if negative is None else negative,
                                            guidance.rectifies_at(t))
        parallel, orthogonal = erg.project(v_pos - v_neg, v_pos)
        rows.append((t, parallel.square().mean().sqrt().item(), orthogonal.square().mean().sqrt().item()))
        x = x + guidance(model, x, t, condition) / steps
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
