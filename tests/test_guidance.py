"""Sections 3, 5 and 6 of erg.py: C-ERG, the guidance update, APG, and the settings."""
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import erg
from conftest import random_model
from test_rectify import run
from tiny_dit import sample, tokenize


@pytest.fixture
def tokens(model):
    return tokenize(["a red seven", "a blue two on red", "seven", "a"], model.config)


@pytest.fixture
def null(model):
    return tokenize([""] * 4, model.config)


def step(settings, model, x, tokens, null, t=0.6):
    condition, negative = settings.encode(model.encoder, tokens, null=null)
    return erg.Guidance(settings, negative)(model, x, t, condition)


class Projected(nn.Module):
    """Attention whose queries come from a module, and then perhaps go through a norm."""

    def __init__(self, norm=None):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))
        self.norm = norm or nn.Identity()

    def forward(self, x):  # (B, S, D)
        q, k, v = self.norm(self.q_proj(x)), self.k_proj(x), self.v_proj(x)
        return x + F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


class Linear(Projected):
    """Normalized linear attention."""

    def forward(self, x):
        weights = self.q_proj(x).relu() @ x.relu().mT
        return (weights @ x) / weights.sum(-1, keepdim=True)


def test_weak_encoding_by_interception_and_by_projection_agree():
    """Where nothing normalizes queries, Listing 1's hook and the interception give the same weak encoding."""
    torch.manual_seed(0)
    encoder, x = nn.Sequential(*(Projected() for _ in range(3))).double().eval(), torch.randn(2, 5, 8, dtype=torch.float64)
    strong, weak = erg.encode(encoder, x, tau=0.1, layers=[1, 2])
    erg.encode(encoder, x, tau=0.9999)  # little is changed, but not too little
    hooked, by_hook = erg.encode(encoder, x, tau=0.1, projections=[encoder[1].q_proj, encoder[2].q_proj])
    assert torch.equal(strong, encoder(x)) and torch.equal(hooked, strong)
    torch.testing.assert_close(weak, by_hook, rtol=0, atol=1e-12)
    assert (weak - strong).abs().max() > 1e-3
    assert not any(m._forward_hooks for m in encoder.modules())


@pytest.mark.parametrize("encoder", [Projected(nn.RMSNorm(8)), Linear()])
def test_a_weak_encoding_equal_to_the_strong_one_is_an_error(encoder):
    """QK-norm and linear attention undo a projection hook, which is noticed."""
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match="left the encoding as it was.*norm of the queries"):
        erg.encode(encoder.eval(), x, tau=0.1, projections=[encoder.q_proj])
    assert not any(m._forward_hooks for m in encoder.modules())
    if isinstance(encoder.norm, nn.RMSNorm):  # the interception is not fooled
        mean = encoder.v_proj(x).mean(1, keepdim=True)
        torch.testing.assert_close(erg.encode(encoder, x, tau=0.0)[1], x + mean)


def test_the_weak_encoding_is_all_that_the_encoder_returns():
    """Nested outputs keep their structure, pooled vectors included; both encodings get all arguments."""
    class Two(nn.Module):
        def forward(self, x, factor=1):
            y = factor * F.scaled_dot_product_attention(x, x, x)
            return {"tokens": y, "pooled": (y.mean(2), None)}

    x = torch.randn(2, 1, 5, 8)
    strong, weak = erg.encode(Two().eval(), x, tau=0.0, factor=2)
    torch.testing.assert_close(weak["pooled"][0], 2 * x.mean(2))
    assert (strong["pooled"][0] - weak["pooled"][0]).abs().max() > 1e-3 and weak["pooled"][1] is None


def test_guide_is_exact_and_the_same_in_every_parametrization():
    """Guiding velocities equals guiding noise or data predictions and converting, since the weights sum to 1."""
    x, v_pos, v_neg = torch.randn(3, 2, 5, dtype=torch.float64)
    t, w = 0.3, 4.0
    v = erg.guide(v_pos, v_neg, w)
    torch.testing.assert_close(v, 4 * v_pos - 3 * v_neg)
    to_data, to_noise = lambda v: x + (1 - t) * v, lambda v: x - t * v
    torch.testing.assert_close(to_data(v), erg.guide(to_data(v_pos), to_data(v_neg), w))
    torch.testing.assert_close(to_noise(v), erg.guide(to_noise(v_pos), to_noise(v_neg), w))


@pytest.mark.parametrize("batched", [True, False])
def test_against_the_update_by_hand(model, inputs, tokens, null, batched):
    """CFG, C-ERG, I-ERG (null and same) and ERG equal eq. 10 written out, with one batch as with two passes."""
    x, t = inputs[0], torch.full((4,), 0.6)
    condition, empty = model.encoder(tokens), model.encoder(null)
    weak = erg.encode(model.encoder, tokens, tau=0.2, layers=[1])[1]
    settings, c_erg = dict(layers=[2, 3], alpha=0.9, gamma=1.2, K=2), dict(tau_c=0.2, layers_c=[1])
    i_erg, rectified = dict(settings, tau_i=0.05), lambda c: run(model, (x, t, c), (model, dict(settings, tau=0.05)))
    for given, negative in ((dict(), model(x, t, empty)), (c_erg, model(x, t, weak)), (i_erg, rectified(empty)),
                            (dict(i_erg, negative="null"), rectified(empty)), (i_erg | c_erg, rectified(weak)),
                            (dict(i_erg, negative="same"), rectified(condition))):
        v = step(erg.ERG(w=3.0, batched=batched, **given), model, x, tokens, null)
        torch.testing.assert_close(v, 3 * model(x, t, condition) - 2 * negative, rtol=0, atol=1e-11)


def test_every_setting_bites(model, inputs, tokens, null):
    """Changing any one setting changes the guided velocity."""
    base = erg.ERG(w=3.0, tau_i=0.1, layers=[2, 3], kappa=0.2, tau_c=0.3, layers_c=[1])
    changes = [dict(), dict(w=2.0), dict(tau_i=0.01), dict(layers=[2]), dict(kappa=0.7), dict(tau_c=0.1), *(dict(layers_c=n) for n in ([0], [2], None)),
               dict(alpha=0.8), dict(gamma=1.5), dict(K=2), dict(queries=slice(0, 16)), dict(apg=erg.APG()),
               dict(apg=erg.APG(eta=0.5)), dict(apg=erg.APG(norm_threshold=0.05)), dict(tau_c=1.0, layers_c=None),
               dict(tau_c=1.0, layers_c=None, negative="same")]
    results = [step(dataclasses.replace(base, **change), model, inputs[0], tokens, null) for change in changes]
    assert all((a - b).abs().max() > 1e-6 for i, a in enumerate(results) for b in results[:i])


@pytest.mark.parametrize("kappa", [0.2, 0.3, 0.4, 0.5, 0.7])
def test_kappa_is_strict_and_in_t(model, inputs, tokens, null, kappa):
    """I-ERG acts for t > kappa and not at t = kappa, also if t comes as a float32 tensor; before, the negative is ordinary."""
    at = lambda t, **settings: step(erg.ERG(w=3.0, **settings), model, inputs[0], tokens, null, t)
    i_erg = dict(tau_i=0.1, layers=[2], kappa=kappa)
    for t in (0.0, kappa - 0.1, kappa, torch.tensor(kappa)):
        assert torch.equal(at(t, **i_erg), at(t))
    assert (at(kappa + 1e-4, **i_erg) - at(kappa + 1e-4)).abs().max() > 1e-3


def test_evaluations_are_counted(model, inputs, tokens, null):
    """2B rows a step; B where w = 1 or the negative equals the positive; on average 2 - kappa in the unconditional case."""
    def rows(settings, steps=10):
        counted = []
        count = lambda x, t, condition: counted.append(len(x)) or model(x, t, condition)
        condition, negative = settings.encode(model.encoder, tokens, null=null)
        sample(count, inputs[0], condition, steps, erg.Guidance(settings, negative))
        return counted

    i_erg = dict(w=3.0, tau_i=0.1, kappa=0.4)
    assert rows(erg.ERG(w=3.0)) == rows(erg.ERG(**i_erg)) == [8] * 10
    assert rows(erg.ERG(w=3.0, batched=False)) == [4] * 20
    assert rows(erg.ERG(w=1.0)) == [4] * 10
    assert rows(erg.ERG(w=lambda t: 3.0 if t > 0.45 else 1.0)) == [4] * 5 + [8] * 5
    assert rows(erg.ERG(**i_erg, negative="same")) == [4] * 5 + [8] * 5  # t = 0, 0.1, ..., 0.4 are not greater than kappa
    assert sum(rows(erg.ERG(**i_erg, negative="same"), steps=100)) / 400 == pytest.approx(2 - 0.4, abs=0.011)


def test_w_one_is_the_positive_prediction(model, inputs, tokens, null):
    """w = 1 is off: bit for bit the model's own velocity, and its limit is continuous; w may be a function of t."""
    at = lambda w, t=0.6: step(erg.ERG(w=w, tau_i=0.1), model, inputs[0], tokens, null, t)
    plain = model(inputs[0], 0.6, model.encoder(tokens))
    assert torch.equal(at(1.0), plain)
    torch.testing.assert_close(at(1 + 1e-9), plain, rtol=0, atol=1e-6)
    for t in (0.1, 0.6):
        torch.testing.assert_close(at(lambda t: 1 + 5 * t, t), at(1 + 5 * t, t))


def test_the_null_prompt_serves_all_rows_and_may_have_its_own_arguments(model, inputs, tokens, null):
    """A negative of a single row is repeated; `null` may be all of the encoder's keyword arguments, such as a mask."""
    x, condition, encoded = inputs[0], model.encoder(tokens), model.encoder(null)
    at = lambda negative, **given: erg.Guidance(erg.ERG(w=3.0, **given), negative)(model, x, 0.5, condition)
    for batched in (True, False):
        torch.testing.assert_close(at(encoded[:1], batched=batched), at(encoded), rtol=0, atol=1e-12)
    encoder, ones = lambda tokens, mask: tokens * mask, torch.ones(3)
    pairs = [erg.ERG(w=2.0).encode(encoder, ones, mask=ones, null=null) for null in ({"tokens": ones, "mask": 0 * ones}, 2 * ones)]
    assert [y.sum() for pair in pairs for y in pair] == [3, 0, 3, 6]


def test_an_unconditional_model_and_nested_conditions(inputs):
    """condition=None works for a model without one, and nested conditions are stacked leaf by leaf."""
    class Unconditional(nn.Module):
        def forward(self, x, t, condition):
            assert condition is None
            h = x.flatten(2)[:, None]
            return x + F.scaled_dot_product_attention(h, h, h)[:, 0].view_as(x)

    x, model, ones = inputs[0], Unconditional().eval(), torch.ones(4, dtype=torch.float64)
    v = erg.Guidance(erg.ERG(w=2.0, tau_i=0.0, kappa=0.2, negative="same"))(model, x, 0.5)
    weak = x + x.flatten(2).mean(1, keepdim=True).expand(-1, 3, -1).reshape(x.shape)
    torch.testing.assert_close(v, 2 * model(x, 0.5, None) - weak)
    nested = lambda x, t, c: x * c["scale"][:, None, None, None] + c["pair"][0].view(-1, 1, 1, 1)
    positive, negative = ({"scale": s * ones, "pair": (p * ones, None)} for s, p in ((2, 1), (1, 0)))
    torch.testing.assert_close(erg.Guidance(erg.ERG(w=3.0), negative)(nested, x, 0.5, positive), 3 * (2 * x + 1) - 2 * x)


def test_the_whole_of_sampling_is_batch_independent(model, inputs, tokens, null):
    """A sample does not depend on the other samples of its batch, under ERG + APG."""
    settings = erg.ERG(w=3.0, tau_i=0.1, layers=[2], kappa=0.2, tau_c=0.3, apg=erg.APG())

    def run(rows):
        condition, negative = settings.encode(model.encoder, tokens[rows])
        return sample(model, inputs[0][rows], condition, 6, erg.Guidance(settings, negative))

    torch.testing.assert_close(run(slice(0, 4))[1:2], run(slice(1, 2)), rtol=1e-9, atol=1e-9)
    guidance = erg.Guidance(settings, model.encoder(null))
    first, second = (guidance(model, inputs[0], 0.6, model.encoder(tokens)) for _ in range(2))
    assert (first - second).abs().max() > 1e-4  # APG's momentum acts from the second step on


def test_apg_against_the_formulas_written_out():
    """Momentum, clip, project on the positive, per sample over all other dimensions, in this order."""
    apg = erg.APG(momentum=-0.5, eta=0.25, norm_threshold=11.0)  # below some of the norms, and above others
    generator, running, momentum = torch.Generator().manual_seed(0), 0.0, [0.0, 0.0]
    for _ in range(3):
        p, n = torch.randn(2, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
        x1, running = apg.update(p, n, 4.0, running)
        for b in range(2):
            momentum[b] = (p - n)[b] - 0.5 * momentum[b]
            d = momentum[b] * min(1.0, 11.0 / momentum[b].norm())
            parallel = (d * p[b]).sum() / (p[b] * p[b]).sum() * p[b]
            torch.testing.assert_close(x1[b], p[b] + 3.0 * (d - parallel + 0.25 * parallel), rtol=1e-11, atol=1e-11)
    parallel, rest = erg.project(p, n)  # two parts, one along the target, the other at right angles to it
    torch.testing.assert_close(parallel + rest, p)
    torch.testing.assert_close((rest * n).flatten(1).sum(1), torch.zeros(2).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(erg.project(parallel, n)[0], parallel)


def test_apg_guides_in_data_space(model, inputs, tokens, null):
    """In a step, velocities are turned into predictions of the data, guided, and turned back."""
    x, t = inputs[0], 0.6
    settings = erg.ERG(w=3.0, apg=erg.APG(norm_threshold=0.7))
    pos, neg = (model(x, t, model.encoder(c)) for c in (tokens, null))
    x1, _ = settings.apg.update(x + 0.4 * pos, x + 0.4 * neg, 3.0)
    torch.testing.assert_close(step(settings, model, x, tokens, null), (x1 - x) / 0.4, rtol=1e-9, atol=1e-9)
    in_velocity, _ = settings.apg.update(pos, neg, 3.0)  # what two public implementations do
    assert (in_velocity - (x1 - x) / 0.4).abs().max() > 1e-2


def test_apg_in_half_precision_does_not_cancel():
    """APG with eta = 1, no clipping and no momentum is eq. 10, also in bfloat16 and near t = 1, where x1 - x is small."""
    v_pos, v_neg, x = torch.randn(3, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    model = lambda x, t, c: torch.where(((c == 1) & (t.dtype == torch.float32)).view(-1, 1, 1, 1), torch.cat([v_pos, v_pos]), torch.cat([v_neg, v_neg]))
    settings = erg.ERG(w=2.0, apg=erg.APG(momentum=0.0, eta=1.0, norm_threshold=0.0))
    p, n = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(settings.apg.update(p, n, 3.0)[0], erg.guide(p, n, 3.0), rtol=1e-12, atol=1e-12)
    v = erg.Guidance(settings, torch.zeros(2))(model, x, 0.98, torch.ones(2))
    expected = 2 * v_pos.float() - v_neg.float()
    assert v.dtype == torch.bfloat16 and (v.float() - expected).norm() / expected.norm() < 0.01


def test_presets_are_table_7():
    """The presets hold Table 7's numbers."""
    found = {name: (p.w, p.tau_i, p.layers, p.kappa, p.tau_c, p.gamma, p.negative, p.layers_c) for name, p in erg.PRESETS.items()}
    three = {"openclip-vit-g": range(1, 31), "clip-vit-l": range(1, 10), "t5-xxl": range(1, 22)}
    assert found == {
        "mmdit-text-to-image": (5, 0.01, range(10, 17), 0.4, 0.01, 1.5, None, {"llama3": range(0, 32), "t5": range(0, 24)}),
        "mmdit-unconditional": (3, 0.01, range(10, 17), 0.2, 1, 1, "same", None),
        "dit-xl-2": (5, 0.01, range(12, 15), 0.3, 1, 1, "null", None),
        "sd3-medium": (5, 0.01, range(6, 8), 0.2, 0.1, 1, None, three)}


def test_presets_run(tokens, null):
    """A preset drives a model that is deep enough, with its encoder picked by name."""
    model = random_model(depth=8, text_depth=10)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    settings = erg.PRESETS["sd3-medium"]
    with pytest.raises(ValueError, match="name='clip' must be a name in layers_c=.*'clip-vit-l'"):
        settings.encode(model.encoder, tokens, name="clip")
    condition, negative = settings.encode(model.encoder, tokens, name="clip-vit-l")
    v = erg.Guidance(settings, negative)(model, x, 0.5, condition)
    assert (v - model(x, 0.5, condition)).abs().max() > 1e-3


def test_conditions_that_do_not_match_are_named(model, inputs):
    """A negative condition of another dtype, device, length or nesting is one error that says so, before any forward."""
    x, t, condition = inputs
    settings = erg.ERG(w=2.0, tau_i=0.1, layers=[2])

    def refuse(*args, **kwargs):
        raise AssertionError("the model must not run")

    for negative, given, message in (
            (condition.float(), condition, "torch.float64 and the negative's has .*torch.float32"),
            (condition.to("meta"), condition, "device"),
            (condition[:, :3], condition, r"\(4, 3, 32\).*batched=False"),
            (condition[:3], condition, r"\(3, 6, 32\).*a row for each of 4 samples; batched=False"),
            (condition[:1], condition[:3], r"\(3, 6, 32\).*a row for each of 4 samples"),
            ((condition, condition), condition, "one pass needs two alike")):
        with pytest.raises((ValueError, RuntimeError), match=message):
            erg.Guidance(settings, negative)(refuse, x, 0.5, given)
    two = dataclasses.replace(settings, batched=False)  # other lengths do with two passes
    assert erg.Guidance(two, condition[:, :3])(model, x, 0.5, condition).shape == x.shape


def test_guidance_in_half_precision():
    """In bfloat16 the guided prediction is as exact as the result can be written, and w = 1 is the positive one."""
    generator = torch.Generator().manual_seed(0)
    v_pos = torch.randn(10000, generator=generator).bfloat16()
    v_neg = (v_pos - 0.1 * torch.randn(10000, generator=generator)).bfloat16()
    exact = 5.0 * v_pos.double() + (1 - 5.0) * v_neg.double()
    error = (erg.guide(v_pos, v_neg, 5.0).double() - exact).norm() / (exact - v_pos).norm()
    assert error < 1.5 * (exact.bfloat16().double() - exact).norm() / (exact - v_pos).norm()
    assert torch.equal(erg.guide(v_pos, v_neg, 1.0), v_pos)


@pytest.mark.parametrize("values", [(5.0, 2.0), ("b", "a"), (True, False), (None, 2)])
def test_conditions_with_values_that_are_not_tensors(inputs, values):
    """Values that are not tensors may differ in two passes; in one that is an error, as tensors against None are."""
    x, ones = inputs[0], torch.ones(4, dtype=torch.float64)
    model = lambda x, t, c: (2 if c[0] == values[1] else 5) * x + c[1].view(-1, 1, 1, 1)
    guide = lambda batched, n, p: erg.Guidance(erg.ERG(w=3.0, batched=batched), (n, -ones))(model, x, 0.5, (p, ones))
    torch.testing.assert_close(guide(False, *values), 3 * (2 * x + 1) - 2 * (5 * x - 1))
    for batched, *pair in ((True, *values), (True, ones, None), (True, None, ones)):
        with pytest.raises(ValueError, match="the condition has .* and the negative's has"):
            guide(batched, *pair)
