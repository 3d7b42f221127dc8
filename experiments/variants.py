"""What might mend ERG's weak point (alone, it loses Frechet distance and recall): variants that the paper does not have.

    guidance = Variant(settings, negative, until=0.6)           # kappa as a window: I-ERG where kappa < t < until
    guidance = Variant(settings, negative, renormalize=1.0)     # the guided velocity keeps v_pos's norm
    guidance = Variant(settings, negative, taus={2: 0.01, 5: 0.5})   # a temperature of its own for each layer
    erg.ERG(w=ramp(1.0, 2.0), ...)                              # the weight as a function of t needs no variant

All are used like erg.Guidance, whose settings they take.
"""
import contextlib
import math

import torch

import erg


class Variant(erg.Guidance):
    """erg.Guidance with a window for I-ERG, a renormalized velocity, and a temperature for each layer.

    until: I-ERG acts where kappa < t < until; 1 is the paper's method.
    renormalize: share r of |v_pos| / |v| in the scale (1 - r) + r |v_pos| / |v| of the guided v, per sample; 0 is off.
    taus: {layer: tau} in place of the settings' tau and layers, which still decide whether I-ERG acts at all.
    """

    def __init__(self, settings, negative=None, generator=None, *, until=1.0, renormalize=0.0, taus=None):
        super().__init__(settings, negative, generator)
        for name, value, high in (("until", until, 1), ("renormalize", renormalize, 1)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= high:
                raise ValueError(f"{name}={value!r} must be a number between 0 and 1")
        if (until < 1 or taus is not None) and not settings.rectifies:
            raise ValueError(f"until={until!r}, taus={taus!r} have no effect: the settings leave the denoiser as it is")
        if until <= (0.2 if settings.kappa is None else settings.kappa):
            raise ValueError(f"until={until!r} must exceed kappa, or I-ERG never acts")
        if until == 1 and renormalize == 0 and taus is None:
            raise ValueError("until=1, renormalize=0, taus=None change nothing: use erg.Guidance")
        if taus is not None:
            check_taus(taus, settings)
        self.until, self.renormalize, self.taus, self.v_pos = until, renormalize, taus, None

    def rectifies_at(self, t):
        return super().rectifies_at(t) and (self.until == 1 or t < self.until - 1e-6)

    def predictions(self, model, x, t, positive, negative, rectified):
        if self.taus is None or not rectified:
            v_pos, v_neg = super().predictions(model, x, t, positive, negative, rectified)
        else:
            B = len(x)
            with contextlib.ExitStack() as stack:
                for layer, tau in self.taus.items():
                    stack.enter_context(erg.rectify(model, tau=tau, layers=[layer], rows=slice(B, 2 * B), batch=2 * B,
                                                    queries=self.settings.queries))
                v_pos, v_neg = super().predictions(model, x, t, positive, negative, False)
        self.v_pos = v_pos
        return v_pos, v_neg

    def __call__(self, model, x, t, condition=None):
        self.v_pos = None
        v = super().__call__(model, x, t, condition)
        if self.renormalize == 0 or self.v_pos is None:  # or unguided
            return v
        dims = tuple(range(1, v.dim()))
        norm = lambda y: torch.linalg.vector_norm(y, dim=dims, keepdim=True)
        return v * (1 - self.renormalize + self.renormalize * norm(self.v_pos) / norm(v).clamp_min(1e-12))


def check_taus(taus, settings):
    """One clear error for temperatures by layer that would do nothing, or something else than they say."""
    numbers = isinstance(taus, dict) and all(isinstance(tau, (int, float)) and not isinstance(tau, bool) and tau >= 0
                                             and math.isfinite(tau) for tau in taus.values())
    if not numbers or all(tau == 1 for tau in taus.values()):
        raise ValueError(f"taus={taus!r} must be a dict of layers and temperatures, each at least 0, and not all 1")
    if (settings.alpha, settings.gamma, settings.steps) != (1, 1, 1) or not settings.batched:
        raise ValueError(f"taus={taus!r} cannot be combined with alpha, gamma, steps or batched=False")


def ramp(start, end):
    """A weight that goes from `start` at t = 0 to `end` at t = 1 in a straight line."""
    for name, value in (("start", start), ("end", end)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name}={value!r} must be a finite number")
    return lambda t: start + (end - start) * t
