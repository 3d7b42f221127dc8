"""Sections 1 and 2 of erg.py: the Hopfield energy and energy attention, against oracles in float64."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import erg


def draw(*shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def reference_attention(q, k, v, tau, alpha, gamma, K, beta, bias=None):
    """Algorithm 1 again, one query at a time, in plain loops: the independent slow version."""
    out = torch.empty_like(q)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:-1])).tolist():
        b, h, s = index
        state = q[b, h, s].clone()
        for _ in range(K):
            logits = [tau * beta * torch.dot(state, key) for key in k[b, h]]
            weights = torch.exp(torch.stack(logits) + (0 if bias is None else bias[b, h, s]))
            update = sum(weight * value for weight, value in zip(weights / weights.sum(), v[b, h]))
            state = state - gamma * (state - alpha * update)
        out[b, h, s] = state
    return out


def listing_2(q, k, v, tau, alpha, gamma, K):
    """Listing 2 with the text's names: the query is scaled once, and the residual carries tau, too."""
    q = q * tau
    for _ in range(K):
        q = q - gamma * (q - alpha * F.scaled_dot_product_attention(q, k, v))
    return q


@pytest.mark.parametrize("tau, alpha, beta", [(1.0, 1.0, None), (0.1, 1.0, None), (3.0, 0.5, 1.0), (0.7, -2.0, 0.3)])
def test_step_is_the_gradient_of_the_energy(tau, alpha, beta):
    """hopfield_step moves by -gamma times autograd's gradient of hopfield_energy, to 1e-12."""
    xi, X = draw((2, 5, 8), (2, 7, 8))
    xi.requires_grad_()
    energy = erg.hopfield_energy(xi, X, beta=beta, tau=tau, alpha=alpha)
    assert energy.shape == (2, 5)
    gradient, = torch.autograd.grad(energy.sum(), xi)
    step = erg.hopfield_step(xi, X, beta=beta, tau=tau, alpha=alpha, gamma=0.37)
    torch.testing.assert_close(step, xi - 0.37 * gradient, rtol=0, atol=1e-12)


def test_energy_of_copies_of_one_pattern_has_a_closed_form():
    """With N copies of one pattern x, E = |xi|^2 / 2 - alpha (xi.x + log(N) / (tau beta)): the lse has the temperature twice."""
    xi, X = draw((3, 16), (1, 16))
    for tau, n in itertools.product((0.01, 1.0, 50.0), (1, 6)):
        expected = 0.5 * (xi * xi).sum(-1) - 0.6 * (xi @ X[0] + math.log(n) / (tau / 4))
        torch.testing.assert_close(erg.hopfield_energy(xi, X.expand(n, 16), tau=tau, alpha=0.6), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tau", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_energy_never_rises_under_a_full_step(tau, alpha):
    """A step with gamma = 1 is the concave-convex procedure: the energy falls at every one of 30 steps."""
    xi, X = draw((50, 8), (12, 8), seed=1)
    xi, X = 3 * xi, 2 * X
    for _ in range(30):
        new = erg.hopfield_step(xi, X, tau=tau, alpha=alpha)
        fall = erg.hopfield_energy(xi, X, tau=tau, alpha=alpha) - erg.hopfield_energy(new, X, tau=tau, alpha=alpha)
        assert fall.min() > -1e-10
        xi = new


def test_retrieval():
    """At a high temperature factor, a corrupted pattern is drawn back to the stored one within a few steps."""
    X, noise = draw((10, 64), (10, 64), seed=2)
    xi = X + 0.5 * noise
    for _ in range(3):
        xi = erg.hopfield_step(xi, X, tau=8.0)
    torch.testing.assert_close(xi, X, rtol=0, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": torch.ones(6, 6).tril().bool()},
                                     {"attn_mask": torch.linspace(-1, 1, 36).view(6, 6)}])
def test_all_ones_is_bit_identical_to_sdpa(options):
    """tau = alpha = gamma = K = 1 is ordinary attention, bit for bit."""
    q, k, v = draw((2, 3, 6, 8), (2, 3, 6, 8), (2, 3, 6, 8), dtype=torch.float32)
    assert torch.equal(erg.energy_attention(q, k, v, **options), F.scaled_dot_product_attention(q, k, v, **options))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": torch.ones(5, 5).tril().bool()}])
def test_tau_zero_is_the_mean_of_the_values(options):
    """tau -> 0 gives each query the mean of the values that it may see; tau = 0 is that limit, and not "off"."""
    q, k, v = draw(*[(2, 3, 5, 8)] * 3)
    mean = v.cumsum(2) / torch.arange(1, 6).view(5, 1) if options else v.mean(2, keepdim=True).expand_as(q)
    for tau, atol in ((0.0, 1e-12), (torch.zeros(2), 1e-12), (1e-9, 1e-7), (1e-12, 1e-9)):
        torch.testing.assert_close(erg.energy_attention(q, k, v, tau=tau, **options), mean, rtol=0, atol=atol)


def test_tau_infinite_is_the_value_of_the_nearest_key():
    """tau -> infinity gives the value whose key has the largest product with the query."""
    q, k, v = draw((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8))
    nearest = (q @ k.mT).argmax(-1)  # (B, H, S)
    expected = v.gather(2, nearest[..., None].expand(-1, -1, -1, 8))
    torch.testing.assert_close(erg.energy_attention(q, k, v, tau=1e6), expected, rtol=0, atol=1e-9)


def test_entropy_falls_strictly_with_tau():
    """The entropy of every row of attention falls strictly as tau grows."""
    q, k = draw((1, 1, 20, 8), (1, 1, 9, 8), seed=3)
    identity = torch.eye(9, dtype=torch.float64)[None, None]  # with it as values, the output is the attention map
    taus = (0.0, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0)
    entropies = [torch.special.entr(erg.energy_attention(q, k, identity, tau=tau)).sum(-1) for tau in taus]
    torch.testing.assert_close(entropies[0], torch.full_like(entropies[0], math.log(9)), rtol=0, atol=1e-12)
    for flat, sharp in zip(entropies, entropies[1:]):
        assert (sharp < flat).all()


def test_with_values_equal_to_keys_it_is_the_hopfield_step():
    """Algorithm 1 with V = K is K steps of descent on the energy; with V != K it is not."""
    q, k, v = draw((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8))
    settings = dict(tau=0.4, alpha=0.8, gamma=0.6)
    xi = q
    for _ in range(4):
        xi = erg.hopfield_step(xi, k, **settings)
    torch.testing.assert_close(erg.energy_attention(q, k, k, K=4, **settings), xi, rtol=0, atol=1e-12)
    assert (erg.energy_attention(q, k, v, K=4, **settings) - xi).abs().max() > 0.1


@pytest.mark.parametrize("seed", range(12))
def test_algorithm_1_against_plain_loops(seed):
    """Random tau, alpha, gamma, K and masks agree with an independent float64 loop over single queries."""
    generator = torch.Generator().manual_seed(seed)
    pick = lambda *values: values[torch.randint(len(values), (), generator=generator).item()]
    B, H, S, N, D = pick(1, 2), pick(1, 3), pick(1, 4), pick(2, 5), 4
    q, k, v = draw((B, H, S, D), (B, H, N, D), (B, H, N, D), seed=seed)
    settings = dict(tau=pick(0.01, 0.3, 1.0, 2.5), alpha=pick(0.5, 1.0, -1.5), gamma=pick(0.1, 1.0, 1.5), K=pick(1, 2, 5))
    scale = pick(None, 0.7)
    bias = torch.randn(B, H, S, N, generator=generator, dtype=torch.float64)
    keep = torch.rand(B, H, S, N, generator=generator) > 0.3
    keep[..., 0] = True
    for mask, additive in ((None, None), (bias, bias), (keep, torch.zeros_like(bias).masked_fill(~keep, -math.inf))):
        expected = reference_attention(q, k, v, **settings, beta=D**-0.5 if scale is None else scale, bias=additive)
        result = erg.energy_attention(q, k, v, **settings, attn_mask=mask, scale=scale)
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


def test_causal_and_grouped_queries():
    """is_causal and enable_gqa mean what they mean in SDPA, at every step."""
    q, k, v = draw((2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8))
    settings = dict(tau=0.5, alpha=0.9, gamma=0.5, K=3)
    keys, values = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    bias = torch.full((5, 5), -math.inf, dtype=torch.float64).triu(1).expand(2, 4, 5, 5)
    expected = reference_attention(q, keys, values, **settings, beta=8**-0.5, bias=bias)
    result = erg.energy_attention(q, k, v, is_causal=True, enable_gqa=True, **settings)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


def test_listing_2_agrees_only_for_one_full_step():
    """Listing 2 scales the query once: equal to Algorithm 1 for gamma = K = 1, and far from it elsewhere."""
    q, k, v = draw((2, 3, 6, 8), (2, 3, 9, 8), (2, 3, 9, 8), seed=4)
    torch.testing.assert_close(listing_2(q, k, v, 0.01, 0.7, 1.0, 1), erg.energy_attention(q, k, v, tau=0.01, alpha=0.7),
                               rtol=0, atol=1e-12)
    for gamma, steps in ((1.5, 1), (0.5, 1), (0.1, 10)):
        canonical = erg.energy_attention(q, k, v, tau=0.01, gamma=gamma, K=steps)
        gap = (listing_2(q, k, v, 0.01, 1.0, gamma, steps) - canonical).norm() / canonical.norm()
        assert gap > 0.3, (gamma, steps, gap)
    two = erg.energy_attention(q, k, v, tau=0.3, K=2)  # tau is applied again at the second step
    assert (listing_2(q, k, v, 0.3, 1.0, 1.0, 2) - two).norm() / two.norm() > 0.05


def test_tau_per_sample_and_queries_restrict_tau_alone():
    """tau of shape (B,) treats each sample as the number would; queries left out have tau = 1, with all the rest (Listing 2)."""
    q, k, v = draw((3, 2, 6, 8), (3, 2, 7, 8), (3, 2, 7, 8))
    tau, settings = torch.tensor([0.01, 1.0, 3.0], dtype=torch.float64), dict(alpha=0.8, gamma=1.5, K=2)
    for part in (None, slice(0, 4)):
        result, n = erg.energy_attention(q, k, v, tau=tau, queries=part, **settings), 4 if part else 6
        for i in range(3):
            alone = erg.energy_attention(q[i:i + 1, :, :n], k[i:i + 1], v[i:i + 1], tau=tau[i].item(), **settings)
            torch.testing.assert_close(result[i:i + 1, :, :n], alone, rtol=0, atol=1e-12)
        torch.testing.assert_close(result[:, :, n:], erg.energy_attention(q[:, :, n:], k, v, **settings), rtol=0, atol=1e-12)


def test_no_query_by_key_matrix_is_kept():
    """Every step is one fused call: no tensor is larger than the queries."""
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(part.numel() for part in pytree.tree_leaves(out) if isinstance(part, torch.Tensor))
            return out

    q, = draw((1, 1, 4096, 8), dtype=torch.float32)
    with torch.no_grad(), Sizes():
        erg.energy_attention(q, q, q, tau=0.1, gamma=0.5, K=2)
    assert sizes and max(sizes) <= q.numel()
