"""experiments/variants.py against erg.Guidance, and against a model changed by hand."""
import copy
import dataclasses
import functools
import math

import pytest
import torch
from torch import nn

import erg
from experiments.variants import Variant, ramp

IMAGE = slice(0, 16)  # of the fixtures' model: 4 x 4 image tokens, then 6 caption tokens
SETTINGS = erg.ERG(w=3.0, tau_i=0.05, layers=[2, 3], kappa=0.2, negative="null", queries=IMAGE)
close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-11)


@pytest.fixture
def null(model):
    return model.encode([""])


def norms(v):
    return v.flatten(1).norm(dim=1)


class Tempered(nn.Module):
    """An attention module of TinyDiT, written out, with tau at the image tokens' queries."""

    def __init__(self, original, tau):
        super().__init__()
        self.original, self.tau = original, tau

    def forward(self, x):
        a = self.original
        q, k, v = a.qkv(x).unflatten(-1, (3, a.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = a.q_norm(q) @ a.k_norm(k).mT / math.sqrt(q.shape[-1])
        scores[:, :, IMAGE] *= self.tau
        return a.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def tempered_by_hand(model, taus):
    changed = copy.deepcopy(model)
    for n, tau in taus.items():
        changed.blocks[n].attention = Tempered(changed.blocks[n].attention, tau)
    return changed


# until: a window for I-ERG


@pytest.mark.parametrize("batched", [True, False])
def test_until_is_a_window(model, inputs, null, batched):
    """For kappa < t < until it is erg.Guidance, bit for bit; elsewhere CFG. Both ends are outside."""
    x, _, condition = inputs
    settings = dataclasses.replace(SETTINGS, batched=batched)
    variant, erg_itself = Variant(settings, null, until=0.6), erg.Guidance(settings, null)
    cfg = erg.Guidance(erg.ERG(w=3.0, batched=batched), null)
    for t in (0.0, 0.2, torch.tensor(0.2), 0.6, torch.tensor(0.6), 0.1 * 6, 0.7, 0.99):
        assert torch.equal(variant(model, x, t, condition), cfg(model, x, t, condition)), t
    for t in (0.2001, 0.4, 0.5999):
        assert torch.equal(variant(model, x, t, condition), erg_itself(model, x, t, condition)), t
        assert (variant(model, x, t, condition) - cfg(model, x, t, condition)).abs().max() > 1e-3


# renormalize: the guided velocity keeps v_pos's norm


@pytest.mark.parametrize("share", [0.1, 1.0])
@pytest.mark.parametrize("changes", [dict(), dict(batched=False), dict(apg=erg.APG()), dict(w=-2.0)])
def test_renormalize_keeps_the_norm_of_the_positive(model, inputs, null, changes, share):
    """The norm is (1 - r) |v| + r |v_pos|, and the direction is that of the guided velocity."""
    x, t, condition = inputs
    settings = dataclasses.replace(SETTINGS, **changes)
    v, plain = Variant(settings, null, renormalize=share)(model, x, 0.6, condition), model(x, t, condition)
    guided = erg.Guidance(settings, null)(model, x, 0.6, condition)
    close(norms(v), (1 - share) * norms(guided) + share * norms(plain))
    assert (norms(guided) / norms(plain) - 1).abs().min() > 1e-3
    close(v / norms(v).view(-1, 1, 1, 1), guided / norms(guided).view(-1, 1, 1, 1))


def test_renormalize_leaves_what_is_not_guided(model, inputs, null):
    """Where w = 1, or nothing differs before kappa, the velocity is the model's own, bit for bit."""
    x, _, condition = inputs
    plain = lambda t: model(x, t, condition)
    late = Variant(dataclasses.replace(SETTINGS, w=lambda t: 3.0 if t > 0.5 else 1.0), null, renormalize=1.0)
    assert (late(model, x, 0.6, condition) - plain(0.6)).abs().max() > 1e-3
    assert torch.equal(late(model, x, 0.4, condition), plain(0.4))  # after a guided step, too
    same = Variant(dataclasses.replace(SETTINGS, negative="same"), renormalize=1.0)
    assert torch.equal(same(model, x, 0.2, condition), plain(0.2))


def test_renormalize_works_without_erg(model, inputs, null):
    """Plain CFG may be renormalized; a velocity that guidance makes zero stays zero instead of NaN."""
    x, t, condition = inputs
    v = Variant(erg.ERG(w=3.0), null, renormalize=1.0)(model, x, 0.6, condition)
    close(norms(v), norms(model(x, t, condition)))
    halves = lambda x, t, c: x * c.view(-1, 1, 1, 1)  # w v_pos + (1 - w) v_neg = 2 x - 2 x
    ones = torch.ones(4, dtype=torch.float64)
    zero = Variant(erg.ERG(w=2.0), 2 * ones, renormalize=1.0)(halves, x, 0.6, ones)
    assert torch.equal(zero, torch.zeros_like(x))


# taus: a temperature of its own for each layer


@pytest.mark.parametrize("settings", [SETTINGS, dataclasses.replace(SETTINGS, queries=None)])
def test_equal_taus_are_the_settings_tau(model, inputs, null, settings):
    """One temperature for all chosen layers is the settings' tau and layers, at kappa, too."""
    x, _, condition = inputs
    variant = Variant(settings, null, taus={2: 0.05, 3: 0.05})
    for t in (0.1, 0.2, 0.6):
        close(variant(model, x, t, condition), erg.Guidance(settings, null)(model, x, t, condition))


@pytest.mark.parametrize("taus", [{2: 0.05, 3: 0.5}, {5: 0.0, 0: 2.0}, {n: 0.1 * n for n in range(6)}])
def test_taus_against_a_model_changed_by_hand(model, inputs, null, taus):
    """Each layer has its own temperature, whatever their order and whatever the settings' tau and layers."""
    x, t, condition = inputs
    weak = tempered_by_hand(model, taus)(x, t, null.expand(4, -1, -1))
    close(Variant(SETTINGS, null, taus=taus)(model, x, 0.6, condition), 3 * model(x, t, condition) - 2 * weak)


# ramp: the weight as a function of t


def test_ramp_is_the_weight_of_that_time(model, inputs, null):
    """It goes straight from one end to the other, and gives at each t what that number would as w."""
    assert [ramp(1.0, 4.0)(t) for t in (0.0, 0.5, 1.0)] == [1.0, 2.5, 4.0] and ramp(3, 1)(0.25) == 2.5
    x, _, condition = inputs
    ramped = erg.Guidance(dataclasses.replace(SETTINGS, w=ramp(1.0, 3.0)), null)
    for t in (0.1, 0.6):
        number = erg.Guidance(dataclasses.replace(SETTINGS, w=1 + 2 * t), null)
        close(ramped(model, x, t, condition), number(model, x, t, condition))
    assert torch.equal(ramped(model, x, 0.0, condition), model(x, 0.0, condition))
