"""erg.py on diffusers: toys of the models that people use, changed by hand and rectified, compiled or not."""
import contextlib
import copy
import functools

import pytest
import torch

import erg
import zoo
from zoo import given, normal, randomized

diffusers = pytest.importorskip("diffusers", reason="diffusers, whose models are tested, is missing")

TAU, TEXT = 0.01, 5  # tokens of text


def joint():
    return given((4, 8, 8), 500.0, (TEXT, 24), pooled_projections=torch.randn(2, 16))


def flux():
    places = torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], 1)
    return given((16, 16), 0.5, (TEXT, 24), pooled_projections=torch.randn(2, 16), img_ids=places,
                 txt_ids=torch.zeros(TEXT, 3))


def pixart():
    mask = torch.tensor([[1.0] * 5, [1, 1, 1, 0, 0]])
    return given((4, 8, 8), 500, (TEXT, 24), encoder_attention_mask=mask)


def unet(**more):
    return dict(sample=torch.randn(2, 4, 8, 8), timestep=500, encoder_hidden_states=torch.randn(2, TEXT, 24),
                **more)


def sdxl():
    return unet(added_cond_kwargs=dict(text_embeds=normal(2, 16), time_ids=torch.ones(2, 6).double()))


SD3 = zoo.SD3 | dict(num_layers=4, joint_attention_dim=24, pooled_projection_dim=16)
FLUX = zoo.FLUX | dict(in_channels=16, num_layers=2, num_single_layers=2, joint_attention_dim=24,
                       pooled_projection_dim=16, axes_dims_rope=(2, 2, 4))
DIT = zoo.HEADS | dict(in_channels=4, out_channels=8, num_layers=4, sample_size=8, num_embeds_ada_norm=10)
PIXART = zoo.HEADS | dict(in_channels=4, num_layers=3, cross_attention_dim=16, sample_size=8,
                          caption_channels=24)
UNET = zoo.UNET | dict(block_out_channels=(16, 32), cross_attention_dim=24, norm_num_groups=4,
                       down_block_types=("CrossAttnDownBlock2D",) * 2,
                       up_block_types=("CrossAttnUpBlock2D",) * 2)
SDXL = dict(attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64)
IMAGE = slice(0, 16)
# name: (class, configuration, inputs, number of self and cross calls, chosen layers, image queries)
MODELS = {
    "SD3": ("SD3Transformer2DModel", SD3, joint, (4, 0), [1, 2], IMAGE),
    "SD3.5 with QK-norm": ("SD3Transformer2DModel", SD3 | dict(qk_norm="rms_norm"), joint, (4, 0), [0, 3],
                           IMAGE),
    "SD3.5 medium": ("SD3Transformer2DModel", SD3 | dict(qk_norm="rms_norm", dual_attention_layers=(0, 1)),
                     joint, (6, 0), [0, 3, 4], IMAGE),  # self 1 and 3: the image alone
    "Flux": ("FluxTransformer2DModel", FLUX, flux, (4, 0), [1, 2], slice(TEXT, TEXT + 16)),
    "DiT": ("DiTTransformer2DModel", DIT, lambda: given((4, 8, 8), 500, class_labels=torch.tensor([1, 2])),
            (4, 0), [1, 3], None),
    "PixArt": ("PixArtTransformer2DModel", PIXART, pixart, (3, 3), [0, 2], None),
    "SD 1.5": ("UNet2DConditionModel", UNET | dict(attention_head_dim=2), unet, (7, 7), [2, 3], None),
    "SDXL": ("UNet2DConditionModel", UNET | SDXL, sdxl, (11, 11), [1, 4, 10], None),
}


@functools.lru_cache
def build(name):
    """The model and its inputs, in float64."""
    torch.manual_seed(0)
    kind, config, inputs, *_ = MODELS[name]
    model = randomized(getattr(diffusers, kind)(**config))
    return model, {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x
                   for name, x in inputs().items()}


def run(model, inputs):
    return model(**inputs, return_dict=False)[0]


class ByHand:
    """diffusers' attention written out, whose logits are tempered in some rows and queries."""

    def __init__(self, tau, rows, image):
        self.tau, self.rows, self.image = tau, rows, image

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None,
                 image_rotary_emb=None, temb=None, **kwargs):
        def project(x, kinds, norm_q, norm_k):
            q, k, v = (getattr(attn, kind)(y).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                       for kind, y in zip(kinds, x))
            return norm_q(q) if norm_q else q, norm_k(k) if norm_k else k, v

        flux = type(attn).__name__ == "FluxAttention"
        joint = encoder_hidden_states is not None and getattr(attn, "add_q_proj", None) is not None
        other = hidden_states if joint or encoder_hidden_states is None else encoder_hidden_states
        parts = [project((hidden_states, other, other), ("to_q", "to_k", "to_v"), attn.norm_q, attn.norm_k)]
        if joint:
            parts.append(project([encoder_hidden_states] * 3, ("add_q_proj", "add_k_proj", "add_v_proj"),
                                 attn.norm_added_q, attn.norm_added_k))
        parts = parts[::-1] if flux else parts  # Flux: text first
        q, k, v = (torch.cat(part, dim=2) for part in zip(*parts))
        if image_rotary_emb is not None:
            cos, sin = image_rotary_emb  # (S, D): pairs of neighbours are turned
            q, k = (x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin for x in (q, k))
        logits = q @ k.mT * q.shape[-1]**-0.5
        logits[self.rows, :, self.image or slice(None)] *= self.tau
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, k.shape[2], len(k))
            logits = logits + mask.unflatten(0, (len(k), -1))
        out = (torch.softmax(logits, -1) @ v).transpose(1, 2).flatten(2)
        if not joint:
            return attn.to_out[0](out) if hasattr(attn, "to_out") and attn.to_out is not None else out
        text, image = out.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], 1) if flux else \
            out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], 1)[::-1]
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


def self_attentions(model, inputs):
    """The modules of self-attention in the order in which they run."""
    order, handles = [], []
    for module in model.modules():
        attends = hasattr(module, "processor") and hasattr(module, "to_q")
        if attends and not getattr(module, "is_cross_attention", False):
            handles.append(module.register_forward_pre_hook(lambda module, args: order.append(module)))
    run(model, inputs)
    for handle in handles:
        handle.remove()
    return order


def by_hand(model, inputs, layers, tau, rows=slice(None), image=None):
    """What a copy of the model returns whose chosen layers compute attention by the class above."""
    changed = copy.deepcopy(model)
    modules = self_attentions(changed, inputs)
    for number in layers:
        modules[number].processor = ByHand(tau, rows, image)
    return run(changed, inputs)


@pytest.mark.parametrize("name", MODELS)
def test_equal_to_the_model_changed_by_hand(name):
    """Chosen layers, rows and image queries are as attention written out; tau = 1 is nothing."""
    model, inputs = build(name)
    counts, layers, image = MODELS[name][3:]
    plain, atol = run(model, inputs), 1e-5 if name == "Flux" else 1e-10  # Flux turns its queries in float32
    calls = erg.attention_calls(model, **inputs)
    assert (sum(c.kind == "self" for c in calls), sum(c.kind == "cross" for c in calls)) == counts
    torch.testing.assert_close(by_hand(model, inputs, range(counts[0]), 1.0), plain, rtol=0, atol=atol)
    with erg.rectify(model, tau=1.0):
        assert torch.equal(run(model, inputs), plain)
    results = [plain]
    for rows in (None, slice(1, 2)):
        for queries in [None, image] if image else [None]:
            expected = by_hand(model, inputs, layers, TAU, rows or slice(None), queries)
            with erg.rectify(model, tau=TAU, layers=layers, rows=rows, queries=queries):
                results.append(run(model, inputs))
            torch.testing.assert_close(results[-1], expected, rtol=0, atol=atol)
            assert rows is None or torch.equal(results[-1][0], plain[0])
    assert all((a - b).abs().max() > 100 * atol for i, a in enumerate(results) for b in results[:i])
    assert torch.equal(run(model, inputs), plain)


@pytest.mark.parametrize("name", MODELS)
def test_bad_input_leaves_the_model_as_it_was(name):
    """Layers, rows and tokens that are not there, and training mode, raise; the model stays as it was."""
    model, inputs = build(name)
    counts, plain = MODELS[name][3], run(model, inputs)
    for wrong, error, message in (
            (dict(layers=[0, counts[0]]), RuntimeError, f"layer {counts[0]} was not rectified"),
            (dict(rows=slice(1, 3)), ValueError, r"rows=slice\(1, 3, None\) does not fit the 2 rows"),
            (dict(queries=slice(0, 4096)), ValueError, "queries=slice.* does not fit")):
        with pytest.raises(error, match=message):
            with erg.rectify(model, tau=TAU, **wrong):
                run(model, inputs)
    with pytest.raises(ValueError, match="training mode"), erg.rectify(copy.copy(model).train(), tau=TAU):
        pass
    model.eval()
    assert torch.equal(run(model, inputs), plain) and "forward" not in vars(model)


@pytest.mark.parametrize("name, blocks", [("Flux", False), ("DiT", False),
                                          ("SD3.5 with QK-norm", True)])
@torch._dynamo.config.patch(recompile_limit=32)  # blocks: a graph for each layer
def test_compiled(name, blocks):
    """Compiled as a whole or block by block, without a graph break, rectified models agree; blocks warn."""
    torch._dynamo.reset()
    model, inputs = build(name)
    _, layers, image = MODELS[name][3:]
    settings = dict(tau=TAU, layers=layers, rows=slice(1, 2), queries=image)
    with erg.rectify(model, **settings):
        expected = run(model, inputs)
    fast = copy.deepcopy(model)
    options = dict(backend="aot_eager", fullgraph=True)
    if blocks and name == "Flux":
        fast.compile_repeated_blocks(**options)
    elif blocks:
        for block in fast.transformer_blocks:
            block.compile(**options)
    else:
        fast = torch.compile(fast, **options)
    warns = functools.partial(pytest.warns, UserWarning, match="are compiled on their own")
    for _ in range(3):
        torch.testing.assert_close(run(fast, inputs), run(model, inputs), rtol=0, atol=1e-8)
        with warns() if blocks else contextlib.nullcontext(), erg.rectify(fast, **settings):
            torch.testing.assert_close(run(fast, inputs), expected, rtol=0, atol=1e-8)
    torch._dynamo.reset()


def test_a_cache_that_skips_blocks_warns():
    """PyramidAttentionBroadcast, which shifts the numbers, warns; a layer that it skips is an error."""
    model, inputs = copy.deepcopy(build("Flux"))
    model.enable_cache(diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500,
        spatial_attention_block_identifiers=("single_transformer_blocks",)))
    with pytest.warns(UserWarning, match="made 2 attention calls.*, and others made 4: .* cache"):
        with erg.rectify(model, tau=TAU, layers=[1]), model.cache_context("cond"):
            run(model, inputs), run(model, inputs)
    with pytest.raises(RuntimeError, match="layer 3 was not rectified"):
        with erg.rectify(model, tau=TAU, layers=[3]), model.cache_context("cond"):
            run(model, inputs), run(model, inputs)


def test_native_attention_of_diffusers_by_name():
    """A native back end that was chosen by name is reached as well."""
    model, inputs = copy.deepcopy(build("Flux"))
    expected = by_hand(model, inputs, [1, 2], TAU)
    model.set_attention_backend("_native_math")
    with erg.rectify(model, tau=TAU, layers=[1, 2]):
        torch.testing.assert_close(run(model, inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_another_back_end_raises():
    """A back end that is not scaled_dot_product_attention is an error with the remedy, which works."""
    model, inputs = copy.deepcopy(build("Flux"))
    model, inputs = model.float(), {name: value.float() for name, value in inputs.items()}
    model.set_attention_backend("flex")
    plain = run(model, inputs)
    with pytest.raises(RuntimeError, match="native back end"), erg.rectify(model, tau=TAU, layers=[1, 2]):
        run(model, inputs)
    assert torch.equal(run(model, inputs), plain)
    model.set_attention_backend("native")
    with erg.rectify(model, tau=TAU, layers=[1, 2]):
        assert (run(model, inputs) - plain).abs().max() > 1e-3
