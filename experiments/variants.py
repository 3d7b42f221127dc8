"""Variants of ERG that the paper does not have: what might mend its Frechet distance.

    guidance = Variant(settings, negative, until=0.6)                # I-ERG where kappa < t < until
    guidance = Variant(settings, negative, renormalize=1.0)          # the guided velocity keeps v_pos's norm
    guidance = Variant(settings, negative, taus={2: 0.01, 5: 0.5})   # a temperature for each layer
    erg.ERG(w=ramp(1.0, 2.0), ...)                                   # a weight that depends on t

All are used like erg.Guidance, whose settings they take. Importing this adds "variant" to
toy.sampling.METHODS.
"""
import contextlib

import torch

import erg
from toy.sampling import ERG, METHODS, Method, guided_by


class Variant(erg.Guidance):
    """erg.Guidance with a window for I-ERG, a renormalized velocity, and a temperature for each layer.

    until: I-ERG acts where kappa < t < until; 1 is the paper's method.
    renormalize: a share r; the guided v is scaled by (1 - r) + r |v_pos| / |v|, per sample; 0 is off.
    taus: {layer: tau} instead of the settings' tau_i and layers. The settings need a tau_i other than 1, too.
    """

    def __init__(self, settings, negative=None, *, until=1.0, renormalize=0.0, taus=None):
        super().__init__(settings, negative)
        erg.check_numbers(low=0, high=1, until=until, renormalize=renormalize)
        if (until < 1 or taus is not None) and not settings.rectifies:
            raise ValueError(f"until={until!r}, taus={taus!r} have no effect: the settings leave "
                             "the denoiser as it is")
        if until <= settings.kappa:
            raise ValueError(f"until={until!r} must exceed kappa={settings.kappa!r}, or I-ERG never acts")
        if until == 1 and renormalize == 0 and taus is None:
            raise ValueError("until=1, renormalize=0, taus=None change nothing: use erg.Guidance")
        plain = (settings.alpha, settings.gamma, settings.K, settings.batched) == (1, 1, 1, True)
        if taus is not None and not (isinstance(taus, dict) and taus and plain):
            raise ValueError(f"taus={taus!r} must hold a layer, and goes with alpha = gamma = K = 1 and "
                             "batched=True alone")
        self.until, self.renormalize, self.taus, self.v_pos = until, renormalize, taus, None

    def rectifies_at(self, t):
        return super().rectifies_at(t) and (self.until == 1 or t < self.until - 1e-6)

    def predictions(self, model, x, t, positive, negative, rectified):
        B, by_layer = len(x), self.taus if rectified and self.taus is not None else {}
        with contextlib.ExitStack() as stack:
            for layer, tau in by_layer.items():
                stack.enter_context(erg.rectify(model, tau=tau, layers=[layer], queries=self.settings.queries,
                                                rows=slice(B, 2 * B), batch=2 * B))
            v_pos, v_neg = super().predictions(model, x, t, positive, negative, rectified and not by_layer)
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


def ramp(start, end):
    """A weight that goes from `start` at t = 0 to `end` at t = 1 in a straight line."""
    erg.check_numbers(start=start, end=end)
    return lambda t: start + (end - start) * t


def build_variant(w, w_end=None, norm_threshold=None, until=1.0, renormalize=0.0, taus=None, **p):
    """taus as a list of [layer, tau], as a record holds them."""
    apg = None if norm_threshold is None else erg.APG(norm_threshold=norm_threshold)
    prepared = guided_by(erg.ERG(w=w if w_end is None else ramp(w, w_end), **p, apg=apg))
    if (until, renormalize, taus) == (1, 0, None):
        return prepared
    options = dict(until=until, renormalize=renormalize, taus=None if taus is None else dict(taus))

    def condition_and_variant(*batch):
        condition, plain = prepared(*batch)
        return condition, Variant(plain.settings, plain.negative, **options)
    return condition_and_variant


METHODS["variant"] = Method("variant", "#882255", build_variant, ("w",),
                            (*ERG, "w_end", "until", "renormalize", "taus", "norm_threshold"))
