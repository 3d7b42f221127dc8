"""experiments/diagnostics.py against closed forms."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import erg
from conftest import random_model
from experiments.diagnostics import attention_certainty, difference_norms, layer_effects, velocity_variances


class Attend(nn.Module):
    def forward(self, q, k, **options):
        return F.scaled_dot_product_attention(q, k, k, **options)


def test_uniform_and_one_hot_attention():
    """Zero queries have entropy log(N) and no certain row; huge ones entropy 0 and certain rows alone."""
    k = torch.eye(7)[None, None]
    uniform, = attention_certainty(Attend().eval(), torch.zeros(1, 1, 7, 7), k)
    expected = pytest.approx((math.log(7), 1, 0))
    assert (uniform.entropy, uniform.relative_entropy, uniform.certain) == expected
    hot, = attention_certainty(Attend().eval(), 1000 * k, k)
    assert hot.entropy == pytest.approx(0, abs=1e-6) and hot.certain == 1


def test_certainty_against_the_map_itself():
    """Entropy and share agree with the whole attention map, with masks, scale, groups and chunks."""
    q, k = 3 * torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(0)), torch.randn(2, 2, 9, 8)
    keep = torch.rand(2, 1, 9, 9) > 0.3
    keep[..., 0] = True
    masks = dict(attn_mask=keep), dict(attn_mask=keep[:, :, :1]), dict(is_causal=True)
    for options in ({}, dict(scale=1.3), *masks):
        identity = torch.eye(9).expand(2, 2, 9, 9)
        p = F.scaled_dot_product_attention(q, k, identity, enable_gqa=True, **options)
        row, = attention_certainty(Attend().eval(), q, k, threshold=0.6, chunk=4, enable_gqa=True, **options)
        assert row.entropy == pytest.approx(torch.special.entr(p).sum(-1).mean().item(), rel=1e-5)
        assert row.certain == pytest.approx((p.amax(-1) > 0.6).float().mean().item(), rel=1e-6)


def test_certainty_numbers_every_layer():
    """One row a layer, in their order."""
    model = random_model()
    x, condition = torch.randn(2, 3, 8, 8, dtype=torch.float64), model.encode(["a red seven", "two"])
    layers = attention_certainty(model, x, 0.5, condition)
    assert [row.layer for row in layers] == list(range(6))
    assert len({row.entropy for row in layers}) == 6


def test_difference_norms_obey_pythagoras():
    """Parallel and orthogonal parts square up to the difference; I-ERG is rectified after kappa."""
    model = random_model()
    noise, c = torch.randn(3, 3, 8, 8, dtype=torch.float64), model.encode(["a red seven"] * 3)
    null = model.encode([""] * 3)
    t, parallel, orthogonal = difference_norms(model, noise, c, erg.ERG(w=2.0), null, steps=4)
    assert t.tolist() == [0, 0.25, 0.5, 0.75]
    first = model(noise, 0.0, c) - model(noise, 0.0, null)
    assert (parallel[0]**2 + orthogonal[0]**2).item() == pytest.approx(first.square().mean().item(), rel=1e-5)
    x = noise + erg.Guidance(erg.ERG(w=2.0), null)(model, noise, 0.0, c) / 4  # the path is the guided one
    second = model(x, 0.25, c) - model(x, 0.25, null)
    assert (parallel**2 + orthogonal**2)[1].item() == pytest.approx(second.square().mean().item(), rel=1e-5)
    same = erg.ERG(w=2.0, tau_i=0.1, negative="same", kappa=0.3)
    _, parallel, orthogonal = difference_norms(model, noise, c, same, steps=4)
    assert (parallel[:2] < 1e-12).all() and (orthogonal[:2] < 1e-12).all() and (orthogonal[2:] > 1e-3).all()


def test_velocity_variances_of_a_known_model():
    """For v = a noise + b c, with independent rows, the four variances are known."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, 1, 1, 1, generator=generator)
    c = torch.randn(20_000, 1, 1, generator=generator)
    model = lambda x, t, c: 2 * x + 3 * c.view(-1, 1, 1, 1)
    variances = velocity_variances(model, noise, c, torch.zeros_like(c), 0.5 * c)
    known = {"marginal null": 4, "marginal weak": 4 + 2.25, "conditional null": 9, "conditional weak": 2.25}
    assert {name: v.item() for name, v in variances.items()} == pytest.approx(known, rel=0.05)


# ---- Layers ------------------------------------------------------------------------------------------------


def test_effects_are_those_of_rectified_forwards():
    """Each range's effect is the relative orthogonal change of the velocity on the unguided path."""
    model = random_model(depth=3)
    noise, c = torch.randn(4, 3, 8, 8, dtype=torch.float64), model.encode(["a red seven", "two", "a", ""])
    effects = layer_effects(model, noise, c, tau=0.1, steps=4, times=(0.25, 0.5))
    assert [e.layers for e in effects] == [range(a, b) for a in range(3) for b in range(a + 1, 4)]
    x = noise + model(noise, 0.0, c) / 4
    for t, size in ((0.25, lambda e: e.early), (0.5, lambda e: e.late)):
        v = model(x, t, c)
        for effect in effects:
            with erg.rectify(model, tau=0.1, layers=effect.layers):
                weak = model(x, t, c)
            cosine = F.cosine_similarity(v.flatten(1), (v - weak).flatten(1))
            sizes = (v - weak).flatten(1).norm(dim=1) / v.flatten(1).norm(dim=1) * (1 - cosine**2).sqrt()
            assert size(effect) == pytest.approx(sizes.mean().item(), rel=1e-5)
        x = x + v / 4
    assert len(layer_effects(model, noise, c, steps=4, times=(0.25, 0.5), longest=1)) == 3
    restricted = layer_effects(model, noise, c, tau=0.1, steps=4, times=(0.25, 0.5), queries=slice(0, 4))
    assert all(a.early != b.early for a, b in zip(effects, restricted))
