"""erg.rectify on the denoisers of diffusers (zoo.py), against attention that is computed by hand."""
import contextlib
import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F

import erg
from zoo import UNREACHABLE, ZOO

diffusers = pytest.importorskip("diffusers", reason="diffusers, whose denoisers are tested, is missing")
pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers and of flex_attention

TAU = 0.1
MISSED = "layer 0 was not rectified.* 0 of kind 'self'"
ALL = {**ZOO, **UNREACHABLE}
every = pytest.mark.parametrize("name", ZOO)


def first(out):
    """The first tensor of an output."""
    while not isinstance(out, torch.Tensor):
        out = out.sample if hasattr(out, "sample") else out[0]
    return out


class Model:
    """A denoiser of the zoo in evaluation mode, every weight random, and its inputs."""

    def __init__(self, name):
        self.entry = dict(dict(kind="self", image=None, main="hidden_states", output=first, tolerance=1e-5),
                          **ALL[name])
        torch.manual_seed(0)
        self.module = getattr(diffusers, name)(**self.entry["config"]).eval().requires_grad_(False)
        for key, p in self.module.named_parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=p[0].numel()**-0.5)
            else:
                torch.nn.init.normal_(p, mean=float(key.endswith("weight")), std=0.3)
        self.inputs = self.entry["inputs"]()
        self.plain = self()
        self.calls = erg.attention_calls(self.module, **copy.deepcopy(self.inputs))
        self.numbers = tuple(sum(call.kind == kind for call in self.calls) for kind in ("self", "cross"))
        self.kind, self.folds = self.entry["kind"], self.entry.get("folds", False)
        count = sum(call.kind == self.kind for call in self.calls)
        self.joint = self.entry.get("joint", range(count))  # calls in which the image takes part
        self.ends = sorted({self.joint[0], self.joint[-1]}) if self.joint else []

    def __call__(self, module=None, **inputs):
        with torch.no_grad():
            return self.entry["output"]((module or self.module)(**copy.deepcopy({**self.inputs, **inputs})))

    def check(self, result, expected, plain=None):
        """`result` is `expected` but for rounding, and the plain output is not."""
        plain, tolerance = self.plain if plain is None else plain, self.entry["tolerance"] * expected.norm()
        assert (result - expected).norm() < tolerance < 0.1 * (expected - plain).norm()

    def call(self, number):
        """The erg.AttentionCall of this number of the image's kind."""
        return next(call for call in self.calls if (call.kind, call.number) == (self.kind, number))


@functools.lru_cache(None)
def load(name):
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return Model(name)


@contextlib.contextmanager
def patched(answer):
    """The attention function is answer(this call's numbers by kind, the original, arguments by name)."""
    original, counts = F.scaled_dot_product_attention, {"self": 0, "cross": 0, "all": 0}

    def sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        kind = "self" if query.shape[-2] == key.shape[-2] else "cross"
        numbers = {kind: counts[kind], "all": counts["all"]}
        for k in numbers:
            counts[k] += 1
        call = dict(query=query, key=key, value=value, attn_mask=attn_mask, dropout_p=dropout_p,
                    is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
        return answer(numbers, original, call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", sdpa)
        yield counts


def softmax_attention(tau, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    """softmax(tau * scale * q k^T + mask) v in so many words."""
    assert dropout_p == 0
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3) for x in (key, value))
    logits = tau * (query.shape[-1]**-0.5 if scale is None else scale) * (query @ key.mT)
    if is_causal:
        logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    if attn_mask is not None:
        boolean = attn_mask.dtype == torch.bool
        logits = logits.masked_fill(~attn_mask, -math.inf) if boolean else logits + attn_mask
    return logits.softmax(-1) @ value


def by_hand(model, kind, number, rows=slice(None), queries=slice(None), **inputs):
    """The output with TAU in one attention call, for these rows and queries."""
    def answer(numbers, original, call):
        out = original(**call)
        if numbers.get(kind) == number:
            out[rows][..., queries, :] = softmax_attention(TAU, **call)[rows][..., queries, :]
        return out

    with patched(answer):
        return model(**inputs)


@every
def test_calls_and_tau_one(name):
    """The numbers of calls are the table's and those counted by hand, and tau = 1 leaves every bit."""
    model = load(name)
    with patched(lambda numbers, original, call: original(**call)) as counts:
        assert torch.equal(model(), model.plain) and model.plain.isfinite().all()
    assert (counts["self"], counts["cross"]) == model.entry["calls"]
    assert model.numbers == model.entry["calls"]
    ends = dict(layers=model.ends)
    for settings in (dict(), ends, dict(ends, queries=model.entry["image"]), dict(ends, rows=slice(1, 2))):
        if model.folds and "rows" in settings:
            continue
        with erg.rectify(model.module, tau=1.0, kind=model.kind, **settings):
            assert torch.equal(model(), model.plain)


def tempered(model, number, **part):
    """The output with TAU in one layer, by erg.rectify."""
    with erg.rectify(model.module, tau=TAU, kind=model.kind, layers=[number], **part):
        return model()


@every
def test_layers_rows_and_queries_as_by_hand(name):
    """In the image's first and last layer, tau does what it does by hand: in all, one sample, the image.

    The other sample keeps every bit. Where rows are not samples, they are refused.
    """
    model, one, image = load(name), slice(1, 2), ZOO[name].get("image")
    for number in model.ends:
        everywhere = by_hand(model, model.kind, number)
        model.check(tempered(model, number), everywhere)
        if model.folds:
            with pytest.raises(ValueError, match="rows where|rows=slice"):
                tempered(model, number, rows=one)
        else:
            result = tempered(model, number, rows=one)
            assert model.call(number).query[0] == len(result) == 2
            assert torch.equal(result[0], model.plain[0])
            model.check(result, by_hand(model, model.kind, number, rows=one))
        if image is not None:
            result = tempered(model, number, queries=image)
            model.check(result, by_hand(model, model.kind, number, queries=image))
            differs = (everywhere - result).norm() > model.entry["tolerance"] * result.norm()
            assert differs or number != model.ends[0]


@every
def test_which_queries_are_the_image(name):
    """Another image changes the table's queries, and no others, of the calls in which it takes part."""
    model = load(name)
    seen = []

    def answer(numbers, original, call):  # no attention, so that no token moves another
        if model.kind in numbers:
            seen[-1].append(call["query"])
        return torch.zeros(*call["query"].shape[:-1], call["value"].shape[-1])

    def another(x):
        if isinstance(x, (list, tuple)):
            return [another(y) for y in x]
        return x + torch.randn_like(x) if x.is_floating_point() else (x + 1) % 8

    main = model.entry["main"]
    for inputs in ({}, {main: another(model.inputs[main])}):
        seen.append([])
        with patched(answer):
            model(**inputs)
    for number, (a, b) in enumerate(zip(*seen)):
        moved = (a != b).any(-1).flatten(0, -2).any(0).nonzero().flatten().tolist()
        every_one = list(range(a.shape[-2]))
        image = every_one[model.entry["image"] or slice(None)]
        assert moved == image if number in model.joint else moved in ([], every_one, image)


@pytest.mark.parametrize("name", [name for name in ZOO if ZOO[name].get("kind") == "cross"])
def test_image_queries_with_more_keys_are_not_self(name):
    """Where the image's queries see the text's keys, too, kind="self" is the text alone, or raises."""
    model = load(name)
    own = [call for call in model.calls if call.kind == "self"]
    if own:
        text = {call.query[-2] for call in own}
        assert len(text) == 1 and not text & {call.query[-2] for call in model.calls if call.kind == "cross"}
        return
    with pytest.raises(RuntimeError, match=MISSED), erg.rectify(model.module, tau=TAU):
        model()


@pytest.mark.parametrize("name", UNREACHABLE)
def test_attention_out_of_reach_raises(name):
    """Self-attention that is not scaled_dot_product_attention is an error, and the model stays as it was."""
    model = load(name)
    assert model.numbers == model.entry["calls"]
    plain = F.scaled_dot_product_attention
    for layers in (None, [0]):
        with pytest.raises(RuntimeError, match=MISSED), erg.rectify(model.module, tau=TAU, layers=layers):
            model()
    assert torch.equal(model(), model.plain)
    assert "forward" not in vars(model.module) and F.scaled_dot_product_attention is plain


@pytest.mark.parametrize("name", [
    "AllegroTransformer3DModel", "CosmosTransformer3DModel", "PixArtTransformer2DModel", "Transformer2DModel",
    "LTXVideoTransformer3DModel", "WanTransformer3DModel"])
def test_kind_all_does_not_depend_on_the_text(name):
    """A text as long as the image makes cross-attention "self"; as "all", each call keeps its number."""
    model = load(name)
    short = model.inputs["encoder_hidden_states"]
    length = model.call(0).query[-2]
    inputs = dict(encoder_hidden_states=torch.randn(2, length, short.shape[-1]))
    if "encoder_attention_mask" in model.inputs:
        mask = model.inputs["encoder_attention_mask"]
        inputs["encoder_attention_mask"] = torch.ones(2, length, dtype=mask.dtype)
    calls = erg.attention_calls(model.module, **copy.deepcopy({**model.inputs, **inputs}))
    assert [c.kind for c in model.calls] == ["self", "cross"] * 2 and [c.kind for c in calls] == ["self"] * 4
    assert [c.module for c in calls] == [c.module for c in model.calls]
    for text in (dict(), inputs):
        plain = model(**text)
        pairs = ((2, "self", 2), (1, "self", 1)) if text else ((2, "self", 1), (1, "cross", 0))
        for number, kind, same in pairs:
            with erg.rectify(model.module, tau=TAU, kind="all", layers=[number]):
                result = model(**text)
            model.check(result, by_hand(model, "all", number, **text), plain)
            with erg.rectify(model.module, tau=TAU, kind=kind, layers=[same]):
                assert torch.equal(model(**text), result)
