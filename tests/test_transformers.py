"""C-ERG on transformers' text encoders: the logits of the chosen layers are tempered, and nothing else."""
import contextlib
import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import erg

transformers = pytest.importorskip("transformers", reason="transformers, which is tested, is missing")

# Random encoders of 4 layers, 4 heads and head dimension 8; padded prompts

D, LAYERS, EOS = 8, range(1, 3), 98
TOKENS = dict(vocab_size=99, bos_token_id=1, eos_token_id=EOS, pad_token_id=0)
TOY = dict(TOKENS, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
GROUPED = dict(TOY, num_key_value_heads=2, head_dim=D)
T5 = dict(TOKENS, d_model=32, d_kv=D, d_ff=48, num_layers=4, num_heads=4, feed_forward_proj="gated-gelu")
ENCODERS = {
    "CLIPTextModel": ("CLIPTextConfig", TOY),
    "CLIPTextModelWithProjection": ("CLIPTextConfig", TOY | dict(projection_dim=24)),
    "T5EncoderModel": ("T5Config", T5), "UMT5EncoderModel": ("UMT5Config", T5),
    "BertModel": ("BertConfig", TOY),
    "LlamaModel": ("LlamaConfig", GROUPED), "MistralModel": ("MistralConfig", GROUPED),
    "Qwen2Model": ("Qwen2Config", GROUPED), "Qwen3Model": ("Qwen3Config", GROUPED),
    "Qwen2_5_VLTextModel": ("Qwen2_5_VLTextConfig", GROUPED | dict(
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2]))),
    "Gemma2Model": ("Gemma2Config", GROUPED | dict(
        query_pre_attn_scalar=16, attn_logit_softcapping=2.0, sliding_window=4)),
}
REACHED = [name for name in ENCODERS if name != "Gemma2Model"]  # it caps its logits, in no SDPA
EAGER = [(name, "eager") for name in ENCODERS]
REMEDY = "attn_implementation='sdpa'"


def build(name, implementation="sdpa", **settings):
    """An encoder with random weights everywhere, in float64."""
    torch.manual_seed(0)
    config, toy = ENCODERS[name]
    config = getattr(transformers, config)(**toy | settings, attn_implementation=implementation)
    encoder = getattr(transformers, name)(config).double().eval().requires_grad_(False)
    for parameter in encoder.parameters():
        parameter += torch.randn_like(parameter) * (parameter.shape[-1]**-0.5 if parameter.dim() > 1 else 0.3)
    return encoder


def prompts(padded=True):
    """Prompts of 8 and 5 tokens, padded and with a mask; or two of 8 tokens without one."""
    ids = torch.randint(3, EOS, (2, 8), generator=torch.Generator().manual_seed(1))
    ids[:, 7] = EOS
    if not padded:
        return dict(input_ids=ids)
    ids[1, 4:] = torch.tensor([EOS, 0, 0, 0])
    return dict(input_ids=ids, attention_mask=torch.tensor([[1] * 8, [1] * 5 + [0] * 3]))


def encode(encoder, inputs, **settings):
    return erg.encode(encoder, **inputs, output_hidden_states=True, tau=0.1, **settings)


def run(encoder, inputs):
    return encoder(**inputs, output_hidden_states=True)


def pooled(output):
    return [output[name] for name in ("pooler_output", "text_embeds") if name in output]


def assert_close(a, b, atol=1e-10):
    """Two encodings agree in all that they hold: final and hidden states, and pooled vectors."""
    a, b = ([output.last_hidden_state, *output.hidden_states, *pooled(output)] for output in (a, b))
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def distance(a, b):
    return (a.last_hidden_state - b.last_hidden_state).abs().max()


@contextlib.contextmanager
def untouched(encoder, inputs):
    """The plain encoding; afterwards it, the hooks and the attention function must be the same again."""
    def state():  # not "no hooks": transformers records outputs by hooks of its own
        hooks = [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in encoder.modules()]
        return hooks, vars(encoder).get("forward"), F.scaled_dot_product_attention

    plain = run(encoder, inputs)
    before = state()
    yield plain
    assert state() == before
    assert_close(run(encoder, inputs), plain, 0)


# The reference


def part(module, *names):
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def attentions(encoder):
    """The encoder's self-attention modules, in order."""
    return [module for module in encoder.modules()
            if isinstance(part(module, "q_proj", "q", "query"), nn.Linear)]


def queries(encoder, layers=LAYERS, names=("q_proj", "q", "query")):
    """The query projections of these layers."""
    return [part(attentions(encoder)[n], *names) for n in layers]


def hand_attention(self, tau, tau_bias, hidden_states, attention_mask=None, *_, mask=None, position_bias=None,
                   position_embeddings=None, **__):
    """softmax(tau * scale * q k^T + tau_bias * (position bias + mask)) v; tau_bias is rightly 1."""
    family, mask = type(self).__name__.removesuffix("Attention"), attention_mask if mask is None else mask
    q, k, v = (part(self, *names)(hidden_states).unflatten(-1, (-1, D)).transpose(1, 2)  # (B, H, S, D)
               for names in (("q_proj", "q", "query"), ("k_proj", "k", "key"), ("v_proj", "v", "value")))
    if family == "Qwen3":
        q, k = self.q_norm(q), self.k_norm(k)
    if position_embeddings is not None:
        cos, sin = (x[:, None] for x in position_embeddings)
        q, k = (x * cos + torch.cat([-x[..., D // 2:], x[..., :D // 2]], -1) * sin for x in (q, k))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = tau * q @ k.mT / {"T5": 1, "UMT5": 1, "Gemma2": 4}.get(family, math.sqrt(D))
    if family == "Gemma2":
        logits = 2 * torch.tanh(logits / 2)
    if family in ("T5", "UMT5"):
        position_bias = self.compute_bias(*logits.shape[-2:]) if position_bias is None else position_bias
        logits = logits + tau_bias * position_bias
    if mask is None and family not in ("T5", "UMT5", "BertSelf"):
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        boolean = mask.dtype == torch.bool
        logits = logits.masked_fill(~mask, -math.inf) if boolean else logits + tau_bias * mask
    out = (torch.softmax(logits, -1) @ v).transpose(1, 2).flatten(2)
    out = out if family == "BertSelf" else part(self, "o_proj", "o", "out_proj")(out)
    return (out, position_bias, None) if family == "T5" else (out, None)


def by_hand(encoder, inputs, layers=LAYERS, tau=0.1, tau_bias=1.0):
    """What a copy of the encoder returns whose chosen layers compute attention by the function above."""
    changed = copy.deepcopy(encoder)
    for number in layers:
        module = attentions(changed)[number]
        module.forward = functools.partial(hand_attention, module, tau, tau_bias)
    return run(changed, inputs)


@pytest.mark.parametrize("name", ENCODERS)
def test_the_reference_is_not_vacuous(name):
    """By hand, tau = 1 is the plain encoder, and each choice of layers gives another encoding."""
    encoder, inputs = build(name, "eager" if name == "Gemma2Model" else "sdpa"), prompts()
    results = [run(encoder, inputs)]
    assert_close(by_hand(encoder, inputs, range(4), tau=1.0), results[0],
                 1e-5 if name == "Gemma2Model" else 1e-10)
    results += [by_hand(encoder, inputs, layers) for layers in ([1], [2], [1, 2], [0, 1], range(4))]
    assert all(distance(a, b) > 1e-3 for i, a in enumerate(results) for b in results[:i])


# Through scaled_dot_product_attention


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", REACHED)
def test_the_weak_encoding_is_that_of_a_hand_written_attention(name, padded):
    """The strong encoding keeps every bit; the weak one changes after the first chosen layer, as by hand."""
    encoder, inputs = build(name), prompts(padded)
    with untouched(encoder, inputs) as plain:
        strong, weak = encode(encoder, inputs, layers=LAYERS)
        assert_close(strong, plain, 0)
        assert_close(weak, by_hand(encoder, inputs))
    pairs = list(zip(strong.hidden_states, weak.hidden_states, strict=True))
    assert len(pairs) == 5 and all(torch.equal(a, b) for a, b in pairs[:2])
    assert len(pooled(weak)) == name.startswith(("CLIP", "Bert"))
    pairs = pairs[2:] + list(zip(pooled(strong), pooled(weak), strict=True))
    assert all(((a - b).flatten(1).norm(dim=1) > 1e-2).all() for a, b in pairs)  # in both prompts


@pytest.mark.parametrize("name", ["T5EncoderModel", "UMT5EncoderModel", "CLIPTextModel", "LlamaModel"])
def test_position_bias_and_masks_are_not_tempered(name):
    """A position bias, and a mask of finite numbers, are added to tempered logits as they are."""
    encoder, generator = build(name), torch.Generator().manual_seed(2)
    finite = prompts() | dict(attention_mask=torch.randn(2, 1, 8, 8, dtype=torch.float64,
                                                         generator=generator))
    for inputs in [finite] + [prompts()] * ("T5" in name):
        for chosen in (dict(layers=LAYERS), dict(projections=queries(encoder))):
            _, weak = encode(encoder, inputs, **chosen)
            assert_close(weak, by_hand(encoder, inputs))
            assert distance(weak, by_hand(encoder, inputs, tau_bias=0.1)) > 1e-2


@pytest.mark.parametrize("preset, name, encoder, depth, layers, tau", [
    ("sd3-medium", "clip-vit-l", "CLIPTextModelWithProjection", 12, range(1, 10), 0.1),
    ("sd3-medium", "openclip-vit-g", "CLIPTextModelWithProjection", 32, range(1, 31), 0.1),
    ("sd3-medium", "t5-xxl", "T5EncoderModel", 24, range(1, 22), 0.1),
    ("mmdit-text-to-image", "t5", "T5EncoderModel", 24, range(0, 24), 0.01),
    ("mmdit-text-to-image", "llama3", "LlamaModel", 32, range(0, 32), 0.01)])
def test_layers_of_table_7(preset, name, encoder, depth, layers, tau):
    """At the encoders' real depths, the presets temper l_min to l_max - 1 and no other layer."""
    encoder = build(encoder, **{"num_layers" if encoder == "T5EncoderModel" else "num_hidden_layers": depth})
    assert len(attentions(encoder)) == depth
    _, weak = erg.PRESETS[preset].encode(encoder, **prompts(), output_hidden_states=True, name=name)
    assert_close(weak, by_hand(encoder, prompts(), layers, tau))
    for other in {layers[1:], layers[:-1], range(max(layers.start - 1, 0), layers.stop),
                  range(layers.start, min(layers.stop + 1, depth))} - {layers}:
        assert distance(weak, by_hand(encoder, prompts(), other, tau)) > 1e-3


# Attention that computes elsewhere


@pytest.mark.parametrize("name, implementation", [*EAGER, ("LlamaModel", "another")])
def test_attention_elsewhere_is_refused_with_the_remedy(name, implementation):
    """Eager attention, or another back end: an error, and the encoder is left as it was. The remedy works."""
    eager = transformers.models.llama.modeling_llama.eager_attention_forward
    transformers.AttentionInterface.register("another", eager)
    encoder, inputs = build(name, implementation), prompts(padded=implementation == "eager")
    with untouched(encoder, inputs):
        for layers in (LAYERS, None):
            with pytest.raises(RuntimeError, match=REMEDY):
                encode(encoder, inputs, layers=layers)
    if name in REACHED:
        encoder.set_attn_implementation("sdpa")
        assert_close(encode(encoder, inputs, layers=LAYERS)[1], by_hand(encoder, inputs))


@pytest.mark.parametrize("name, implementation", [*EAGER, *((name, "sdpa") for name in REACHED)])
def test_query_projections(name, implementation):
    """Tempered query projections, or the norms after them, give the hand-written encoding (Listing 1)."""
    encoder, inputs = build(name, implementation), prompts()
    chosen = queries(encoder, names=["q_norm"]) if name == "Qwen3Model" else queries(encoder)
    with untouched(encoder, inputs) as plain:
        strong, weak = encode(encoder, inputs, projections=chosen)
    assert_close(strong, plain, 0)
    atol = 1e-10 if implementation == "sdpa" else 1e-5  # eager: softmax in float32
    assert_close(weak, by_hand(encoder, inputs), atol)
    assert distance(weak, plain) > 1e-2


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_query_projections_before_a_norm_are_refused(implementation):
    """QK-norm undoes a tempered projection: an error."""
    encoder = build("Qwen3Model", implementation)
    with untouched(encoder, prompts()), pytest.raises(RuntimeError, match="a norm of the queries"):
        encode(encoder, prompts(), projections=queries(encoder))


# Bad input


@pytest.mark.parametrize("name", ["CLIPTextModel", "T5EncoderModel", "LlamaModel", "Qwen3Model"])
def test_layers_that_the_encoder_does_not_have(name):
    """Layers out of range are an error that names the first and how many there are."""
    encoder = build(name)
    for layers in (range(2, 6), [4]):
        with untouched(encoder, prompts()), pytest.raises(RuntimeError, match="layer 4 was.* 4 times, 4 of"):
            encode(encoder, prompts(), layers=layers)


@pytest.mark.parametrize("by_projections", [True, False])
@pytest.mark.parametrize("name", ["T5EncoderModel", "LlamaModel"])  # with dropout, and without any
def test_training_mode_is_refused(name, by_projections):
    """An encoder in training mode would draw dropout anew for the weak encoding: an error."""
    encoder = build(name).train()
    with pytest.raises(ValueError, match="training mode"):
        encode(encoder, prompts(), projections=queries(encoder) if by_projections else None)


@pytest.mark.parametrize("wrong", ["none", "another's", "one of another's", "one that never runs"])
def test_wrong_projections(wrong):
    """Projections that are none, another encoder's or idle are an error; one given twice is tempered once."""
    encoder = build("CLIPTextModel")
    encoder.idle = nn.Linear(2, 2)
    mine, others = queries(encoder), queries(build("CLIPTextModel"))
    projections = {"none": [], "another's": others, "one of another's": mine[:1] + others[1:],
                   "one that never runs": mine + [encoder.idle]}[wrong]
    assert_close(encode(encoder, prompts(), projections=mine + mine)[1], by_hand(encoder, prompts()))
    with untouched(encoder, prompts()), pytest.raises((ValueError, RuntimeError), match="projections"):
        encode(encoder, prompts(), projections=projections)
