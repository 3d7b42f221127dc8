"""experiments/rivals.py against models changed by hand, loops, and formulas in other parametrizations.

The fixtures' model has 4 x 4 image tokens, the first of each sequence, and 6 caption tokens after them; its 6
blocks are layers 0 to 5. In float64, so that "equal" means to about 1e-12 unless it says bit for bit.
"""
import contextlib
import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import erg
from conftest import random_model
from experiments import rivals
from experiments.rivals import (Rewired, SmoothedAttention, autoguidance, gaussian_blur, gaussian_kernel,
                                identity_attention, make_icg, pag, s2, seg, self_guidance, tsg)
from toy.sampling import METHODS, generate, prepare

IMAGE, PROMPTS = slice(0, 16), ["a red seven", "a blue two on red", "seven", ""]
close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-11)


# ---- Independent references --------------------------------------------------------------------------------


class ByHand(nn.Module):
    """An attention module of TinyDiT that computes attend(q, k, v), without torch's function."""

    def __init__(self, original, attend):
        super().__init__()
        self.original, self.attend = original, attend

    def heads(self, x):
        a = self.original
        q, k, v = a.qkv(x).unflatten(-1, (3, a.heads, -1)).permute(2, 0, 3, 1, 4)
        return a.q_norm(q), a.k_norm(k), v

    def forward(self, x):
        return self.original.out(self.attend(*self.heads(x)).transpose(1, 2).flatten(2))


def changed_by_hand(model, layers, attend):
    """A copy of the model whose `layers` compute attend(q, k, v)."""
    changed = copy.deepcopy(model)
    for n in layers:
        changed.blocks[n].attention = ByHand(changed.blocks[n].attention, attend)
    return changed


def random_qkv(n):
    return torch.randn(n, 2, 4, 22, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def softmax_attention(q, k, v):
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) @ v


def values_at_image_tokens(q, k, v):
    """PAG: the output at image tokens is v, that at caption tokens is ordinary."""
    return torch.cat([v[:, :, IMAGE], softmax_attention(q, k, v)[:, :, 16:]], dim=2)


def values_everywhere(q, k, v):
    return v


def blur_by_loops(plane, sigma, length):
    """Convolution of maps (..., side, side) with a Gaussian of length x length, reflected at the border."""
    side, half = plane.shape[-1], length // 2
    mirror = lambda i: abs(i) if abs(i) < side else 2 * (side - 1) - i
    offsets = [(a, b) for a in range(-half, half + 1) for b in range(-half, half + 1)]
    total = sum(math.exp(-(a * a + b * b) / (2 * sigma**2)) for a, b in offsets)
    out = torch.zeros_like(plane)
    for y in range(side):
        for x in range(side):
            for a, b in offsets:
                weight = math.exp(-(a * a + b * b) / (2 * sigma**2)) / total
                out[..., y, x] += weight * plane[..., mirror(y + a), mirror(x + b)]
    return out


def smoothed_queries(q, k, v, sigma):
    """SEG for 4 x 4 image tokens: their queries blurred, or replaced by their mean."""
    image = q[:, :, IMAGE]
    if sigma == math.inf:
        image = image.mean(2, keepdim=True).repeat(1, 1, 16, 1)
    else:
        plane = image.transpose(2, 3).reshape(*image.shape[:2], -1, 4, 4)
        length = 3 if sigma <= 0.5 else 5  # two of these tests' sigmas; 5 is as long as 4 x 4 allows
        image = blur_by_loops(plane, sigma, length).reshape(*image.shape[:2], -1, 16).transpose(2, 3)
    return softmax_attention(torch.cat([image, q[:, :, 16:]], dim=2), k, v)


def image_attention(model, layer, x, t, condition):
    """The attention map (B, H, 16, 16) among image tokens in a layer, from what enters its attention."""
    seen, attention = [], model.blocks[layer].attention
    handle = attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x, t, condition)
    handle.remove()
    q, k, _ = ByHand(attention, None).heads(seen[0])
    return torch.softmax(q[:, :, IMAGE] @ k[:, :, IMAGE].mT / math.sqrt(q.shape[-1]), dim=-1)


@contextlib.contextmanager
def counted(*models):
    """A list of the rows of every forward of the models."""
    rows = []
    handles = [m.register_forward_pre_hook(lambda module, args: rows.append(len(args[0]))) for m in models]
    yield rows
    for handle in handles:
        handle.remove()


# ---- What all have in common -------------------------------------------------------------------------------


RIVALS = ("pag", "seg", "autoguidance", "mechanism")
weak_model = functools.cache(lambda: random_model(1))


def guidances(w):
    return {"pag": pag(w, [2, 3], IMAGE), "seg": seg(w, [2, 3], 4),
            "autoguidance": autoguidance(w, weak_model()),
            "mechanism": Rewired(w, functools.partial(erg.energy_attention, tau=0.1), [2, 3], IMAGE)}


@pytest.mark.parametrize("name", RIVALS)
def test_w_one_is_the_model_bit_for_bit(model, inputs, name):
    """w = 1 is off: the model's own velocity, bit for bit, from one evaluation and none of a weak model."""
    x, t, condition = inputs
    with counted(model, weak_model()) as rows:
        v = guidances(1.0)[name](model, x, 0.6, condition)
    assert torch.equal(v, model(x, t, condition)) and rows == [4]


@pytest.mark.parametrize("name", RIVALS)
def test_the_weight_extrapolates_in_a_straight_line(model, inputs, name):
    """v(w) = w v_pos + (1 - w) v_weak: v_weak is v(0), and every other w follows from v(0) and v(1)."""
    x, t, condition = inputs
    v = lambda w: guidances(w)[name](model, x, 0.6, condition)
    weak, plain = v(0.0), model(x, t, condition)
    assert (weak - plain).abs().max() > 1e-3
    for w in (-1, 0.5, 1.0001, 2.0, 7):
        close(v(w), w * plain + (1 - w) * weak)


@pytest.mark.parametrize("name", RIVALS)
def test_a_sample_does_not_depend_on_its_batch(model, inputs, name):
    """The second of four samples comes out as it does alone."""
    x, _, condition = inputs
    guidance = guidances(2.0)[name]
    close(guidance(model, x, 0.6, condition)[1:2], guidance(model, x[1:2], 0.6, condition[1:2]))


# ---- PAG ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [[2], [1, 4], range(6)])
@pytest.mark.parametrize("queries, attend", [(IMAGE, values_at_image_tokens), (None, values_everywhere)])
def test_pag_against_a_model_changed_by_hand(model, inputs, layers, queries, attend):
    """PAG equals w v + (1 - w) v_weak, v_weak from a copy with v as output at the chosen tokens."""
    x, t, condition = inputs
    weak = changed_by_hand(model, layers, attend)(x, t, condition)
    close(pag(2.5, layers, queries)(model, x, 0.6, condition), 2.5 * model(x, t, condition) - 1.5 * weak)


@pytest.mark.parametrize("heads", [4, 2, 1])
def test_identity_attention_is_attention_under_an_identity_mask(heads):
    """The output is v: what SDPA gives when every query sees its own key alone; also for groups."""
    q, k, v = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    k, v = k[:, :heads], v[:, :heads]
    own = torch.eye(5, dtype=torch.bool)
    masked = F.scaled_dot_product_attention(q, k, v, attn_mask=own, enable_gqa=True)
    close(identity_attention(q, k, v, enable_gqa=True), masked)


# ---- SEG ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side, sigma, length", [
    (7, 0.25, 3), (7, 0.5, 3), (7, 0.7, 5), (7, 1.0, 7), (7, 3.0, 7), (7, 100.0, 7),
    (4, 0.25, 3), (4, 0.7, 5), (4, 1.0, 5), (4, 3.0, 5), (8, 1.0, 7), (8, 5.0, 9), (3, 2.0, 3), (2, 2.0, 3),
])
def test_blur_against_loops(side, sigma, length):
    """The separable blur is the direct 2-D convolution with reflected indices, for odd and even sides."""
    plane = torch.randn(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert len(gaussian_kernel(sigma, side)) == length
    close(gaussian_blur(plane, sigma), blur_by_loops(plane, sigma, length))


def test_a_large_sigma_is_a_box_and_not_the_mean():
    """The kernel is no larger than the map, so sigma -> inf tends to a box blur; inf itself is the mean."""
    plane = torch.randn(3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    box = F.avg_pool2d(F.pad(plane, (2, 2, 2, 2), mode="reflect"), 5, stride=1)
    close(gaussian_blur(plane, 1e6), box)
    q, k, v = torch.randn(3, 2, 4, 16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    smooth = lambda sigma: SmoothedAttention(sigma, 4)(q, k, v)
    torch.testing.assert_close(smooth(1e5), smooth(1e7), rtol=0, atol=1e-8)
    assert (smooth(1e7) - smooth(math.inf)).abs().max() > 1e-2


def test_the_mean_query_still_attends():
    """sigma = inf is attention of the mean query, the same for all image tokens; tau = 0 is another one."""
    q, k, v = torch.randn(3, 2, 4, 22, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = SmoothedAttention(math.inf, 4)(q, k, v)
    mean = softmax_attention(q[:, :, IMAGE].mean(2, keepdim=True), k, v)
    close(out[:, :, IMAGE], mean.expand(2, 4, 16, 8))
    assert (out - erg.energy_attention(q, k, v, tau=0.0))[:, :, IMAGE].abs().max() > 1e-2


@pytest.mark.parametrize("sigma", [0.8, math.inf])
def test_caption_queries_are_not_blurred(sigma):
    """Outputs at caption tokens are ordinary, and do not enter the image tokens' queries."""
    q, k, v, other = random_qkv(4)
    smooth, plain = SmoothedAttention(sigma, 4), softmax_attention(q, k, v)
    close(smooth(q, k, v)[:, :, 16:], plain[:, :, 16:])
    assert (smooth(q, k, v) - plain)[:, :, IMAGE].abs().max() > 1e-2
    exchanged = torch.cat([q[:, :, IMAGE], other[:, :, 16:]], dim=2)
    close(smooth(exchanged, k, v)[:, :, IMAGE], smooth(q, k, v)[:, :, IMAGE])


@pytest.mark.parametrize("options", [
    dict(attn_mask=torch.rand(2, 1, 22, 22, generator=torch.Generator().manual_seed(0)) > 0.5),
    dict(is_causal=True), dict(scale=1.3), dict(enable_gqa=True)], ids=lambda options: next(iter(options)))
def test_smoothing_keeps_the_options_of_the_call(options):
    """Masks, causality, scale and grouped queries act on smoothed queries as on others; none is dropped."""
    q, k, v = random_qkv(3)
    if "enable_gqa" in options:
        k, v = k[:, :2], v[:, :2]
    smooth = torch.cat([q[:, :, IMAGE].mean(2, keepdim=True).expand(2, 4, 16, 8), q[:, :, 16:]], dim=2)
    keys, values = (y.repeat_interleave(4 // y.shape[1], 1) for y in (k, v))
    scores = options.get("scale", 8**-0.5) * smooth @ keys.mT
    causal = torch.ones(22, 22, dtype=torch.bool).tril() if "is_causal" in options else torch.tensor(True)
    scores = scores.masked_fill(~(options.get("attn_mask", torch.tensor(True)) & causal), -math.inf)
    close(SmoothedAttention(math.inf, 4)(q, k, v, **options), scores.softmax(-1) @ values)


@pytest.mark.parametrize("layers", [[2], [1, 4], range(6)])
@pytest.mark.parametrize("sigma", [0.5, 2.0, math.inf])
def test_seg_against_a_model_changed_by_hand(model, inputs, layers, sigma):
    """SEG equals w v + (1 - w) v_weak, v_weak from a copy with smoothed queries in the chosen layers."""
    x, t, condition = inputs
    weak = changed_by_hand(model, layers, functools.partial(smoothed_queries, sigma=sigma))(x, t, condition)
    close(seg(2.5, layers, 4, sigma)(model, x, 0.6, condition), 2.5 * model(x, t, condition) - 1.5 * weak)


# ---- Rewired: Table 6 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("negative", ["same", "null"])
@pytest.mark.parametrize("t", [0.1, 0.3, 0.31, 0.6])
def test_rewired_with_a_temperature_is_i_erg(model, inputs, negative, t):
    """energy_attention through Rewired is erg.Guidance under the same layers, queries, kappa and negative."""
    x, _, condition = inputs
    null = model.encode([""]) if negative == "null" else None
    settings = erg.ERG(w=2.5, tau_i=0.05, layers=[2, 3], queries=IMAGE, kappa=0.3, negative=negative)
    attention = functools.partial(erg.energy_attention, tau=0.05)
    guidance = Rewired(2.5, attention, [2, 3], IMAGE, kappa=0.3, negative=null)
    close(guidance(model, x, t, condition), erg.Guidance(settings, null)(model, x, t, condition))


def test_kappa_is_strict(model, inputs):
    """Attention is replaced for t > kappa, not at t = kappa, also in single precision; -1 is all t."""
    x, _, condition = inputs
    plain = lambda t: model(x, t, condition)
    guidance = pag(2.0, [2], IMAGE, kappa=0.3)
    for t in (0.0, 0.2, 0.3, torch.tensor(0.3), 0.1 + 0.2):
        assert torch.equal(guidance(model, x, t, condition), plain(float(t)))
    for t in (0.3001, 0.9):
        assert torch.equal(guidance(model, x, t, condition), pag(2.0, [2], IMAGE)(model, x, t, condition))
        assert (guidance(model, x, t, condition) - plain(t)).abs().max() > 1e-3
    assert (pag(2.0, [2], IMAGE)(model, x, 0.0, condition) - plain(0.0)).abs().max() > 1e-3


def test_the_negative_condition_is_the_weak_predictions(model, inputs):
    """`negative` conditions v_weak alone; before kappa what is left is CFG with it."""
    x, t, condition = inputs
    negative = model.encode(["blue", "a two", "", "red"])
    guidance = pag(2.5, [2, 3], IMAGE, kappa=0.5, negative=negative)
    weak = changed_by_hand(model, [2, 3], values_at_image_tokens)(x, t, negative)
    close(guidance(model, x, 0.6, condition), 2.5 * model(x, t, condition) - 1.5 * weak)
    close(guidance(model, x, 0.4, condition), 2.5 * model(x, 0.4, condition) - 1.5 * model(x, 0.4, negative))


def test_rewired_evaluates_no_more_than_it_needs(model, inputs):
    """Rows of one forward: 1 a sample, and one more for the weak prediction where it acts."""
    x, _, condition = inputs
    negative = model.encode(["blue"])
    cases = [  # options, rows a sample before kappa, and after it
        (dict(w=2.0), 1, 2), (dict(w=2.0, negative=negative), 2, 2), (dict(w=1.0, negative=negative), 1, 1)]
    for options, before, after in cases:
        guidance = Rewired(attention=identity_attention, layers=[2], queries=IMAGE, kappa=0.5, **options)
        with counted(model) as rows:
            guidance(model, x, 0.5, condition), guidance(model, x, 0.6, condition)
        assert rows == [4 * before, 4 * after], options


# ---- AutoGuidance and APG -----------------------------------------------------------------------------------


def test_autoguidance_is_eq_10_between_two_models(model, inputs):
    """w v + (1 - w) v_weak, under the weak model's own encoding of the prompts if that is given."""
    x, t, condition = inputs
    weak = weak_model()
    own = weak.encode(PROMPTS)
    shared, separate = autoguidance(2.5, weak), autoguidance(2.5, weak, own)
    close(shared(model, x, 0.6, condition), 2.5 * model(x, t, condition) - 1.5 * weak(x, t, condition))
    close(separate(model, x, 0.6, condition), 2.5 * model(x, t, condition) - 1.5 * weak(x, t, own))


@pytest.mark.parametrize("momentum", [0.0, -0.5, 0.3])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_apg_agrees_with_diffusers(momentum, eta):
    """Over four steps, w is a scale of w - 1 in diffusers' original formulation, with and without a limit."""
    peer = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance", reason="the peer")
    for threshold in (0.0, 4.0, 1e3):
        apg = erg.APG(momentum=momentum, eta=eta, norm_threshold=threshold)
        generator, running, buffer = torch.Generator().manual_seed(0), 0.0, peer.MomentumBuffer(momentum)
        for _ in range(4):
            p, n = torch.randn(2, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
            x1, running = apg.update(p, n, 3.5, running)
            theirs = peer.normalized_guidance(p, n, 2.5, buffer, eta, threshold, True)
            close(x1, theirs)


# ---- The model itself, disturbed ---------------------------------------------------------------------------


def test_self_guidance_is_told_a_noisier_time(model, inputs):
    """v + (w - 1) (v - v(t - shift)); never a time below 0."""
    x, t, condition = inputs
    v, weak = (model(x, time, condition) for time in (0.6, 0.5))
    close(self_guidance(2.5, 0.1)(model, x, 0.6, condition), v + 1.5 * (v - weak), atol=1e-6)  # t is float32
    close(self_guidance(2.5, 0.1)(model, x, 0.05, condition), 2.5 * model(x, 0.05, condition) - 1.5 * model(x, 0.0, condition))


def test_s2_skips_inner_blocks(model, inputs):
    """The weak prediction is that of a model without the block, others at other t; the outermost stay."""
    x, _, condition = inputs
    skipped = set()
    for t in (0.0, 0.2, 0.4, 0.6, 0.8):
        weak = 2 * model(x, t, condition) - s2(2.0, 1)(model, x, t, condition)
        for n in range(1, 5):
            without = copy.deepcopy(model)
            del without.blocks[n]
            if (without(x, t, condition) - weak).abs().max() < 1e-10:
                skipped.add(n)
                break
        else:
            pytest.fail("no inner block was skipped")
    assert len(skipped) > 1
    assert not any(module._forward_hooks for module in model.modules())


def test_tsg_disturbs_the_time_embedding(model, inputs):
    """The same noise at the same t, in proportion to `scale`; afterwards the model is as it was."""
    x, _, condition = inputs
    v = model(x, 0.6, condition)
    change = lambda scale: (v - tsg(2.0, scale)(model, x, 0.6, condition))
    close(change(1.0), change(1.0))
    ratio = torch.linalg.vector_norm(change(2e-4)) / torch.linalg.vector_norm(change(1e-4))
    assert ratio.item() == pytest.approx(2, rel=1e-2)
    close(model(x, 0.6, condition), v)


def test_icg_takes_anothers_caption(model, inputs):
    """w v(own caption) + (1 - w) v(that of the sample before)."""
    x, t, _ = inputs
    tokens = torch.randint(1, 7, (4, 6), generator=torch.Generator().manual_seed(0))
    own, other = model.encoder(tokens), model.encoder(tokens[[3, 0, 1, 2]])
    expected = 3 * model(x, t, own) - 2 * model(x, t, other)
    close(make_icg(model, tokens, None, w=3.0)(model, x, 0.6, own), expected, atol=1e-6)


@pytest.mark.parametrize("guidance", [self_guidance(1.0, 0.1), tsg(1.0, 0.5), s2(1.0, 1)])
def test_disturbed_off_is_the_model(model, inputs, guidance):
    """w = 1 is one evaluation of the model."""
    x, _, condition = inputs
    with counted(model) as rows:
        close(guidance(model, x, 0.6, condition), model(x, 0.6, condition))
    assert rows == [4, 4]



# ---- Function evaluations ----------------------------------------------------------------------------------

ENERGY = dict(w=2.0, tau_i=0.1, layers=[2])
FULL_COST = {  # for each method, parameters that make it pay at every step
    "none": {}, "cfg": dict(w=2.0), "apg": dict(w=2.0),
    "cads": dict(w=2.0), "pag": dict(w=2.0, layers=[2]),
    "seg": dict(w=2.0, layers=[2], sigma="inf"), "autoguidance": dict(w=2.0, weak="digits-early"),
    "c-erg": dict(w=2.0, tau_c=0.1), "i-erg": ENERGY, "erg": dict(ENERGY, kappa=0.2, tau_c=0.1),
    "erg+apg": dict(ENERGY, negative="null"), "erg+cads": dict(ENERGY, tau_c=0.1),
    "mechanism": dict(w=2.0, mechanism="identity", layers=[2], kappa=0.2, negative="null"),
    "icg": dict(w=2.0), "tsg": dict(w=2.0, scale=0.5), "self-guidance": dict(w=2.0, shift=0.1),
    "s2": dict(w=2.0, drop=1),
}
OTHER_COST = [  # evaluations a step and image at t = 0, 0.1, ..., 0.9
    ("cfg", dict(w=1.0), 1), ("seg", dict(w=2.0, layers=[2]), 2), ("autoguidance", dict(w=1.0, weak="digits-early"), 1),
    ("i-erg", dict(ENERGY, kappa=0.4, negative="same"), 1.5),
    ("mechanism", dict(w=2.0, mechanism="smoothing", layers=[2], kappa=0.4, negative="same"), 1.5),
]


@pytest.mark.parametrize("method, parameters, expected", [
    *((name, FULL_COST.get(name), METHODS[name].nfe) for name in METHODS), *OTHER_COST])
def test_function_evaluations_a_step_and_image(method, parameters, expected):
    """Rows that all models evaluate, over images and steps, are those of METHODS, fewer where it is off."""
    model = random_model(0, width=16, depth=3, text_depth=1).float()
    weak = rivals.weak_model("digits-early", torch.device("cpu"))
    with counted(model, weak) as rows:
        captions = ["a red seven", "seven", "", "two"]
        images = generate(model, captions, prepare(method, **parameters), steps=10, batch=2)
    assert sum(rows) == round(expected * 4 * 10) and images.isfinite().all()
