"""examples/guider.py: ERG as a guider of diffusers' modular pipelines, at toy size with random weights."""
import contextlib
import gc
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import erg

pytest.importorskip("diffusers", minversion="0.42", reason="the guider is for diffusers' modular pipelines")
pytest.importorskip("transformers", reason="diffusers' modular pipelines import it")

from diffusers import (AutoencoderKL, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel,  # noqa: E402
                       SD3Transformer2DModel, StableDiffusion3Pipeline, WanTransformer3DModel)
from diffusers.guiders import ClassifierFreeGuidance  # noqa: E402
from diffusers.modular_pipelines.flux2.denoise import Flux2KleinBaseDenoiseStep  # noqa: E402
from diffusers.modular_pipelines.stable_diffusion_3.encoders import (  # noqa: E402
    StableDiffusion3TextEncoderStep)
from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import (  # noqa: E402
    StableDiffusion3AutoBlocks, StableDiffusion3T2ICoreDenoiseStep)
from diffusers.modular_pipelines.wan.denoise import WanDenoiseStep  # noqa: E402

import zoo  # noqa: E402
from examples.guider import EntropyRectifyingGuidance, weak_negative  # noqa: E402
from zoo import normal, randomized  # noqa: E402

STEPS = 8
IERG = dict(tau_i=0.01, layers=[1, 2])


@pytest.fixture(scope="module")
def pipe():
    """A modular Stable Diffusion 3 of four joint blocks, without text encoders and autoencoder."""
    model = SD3Transformer2DModel(**zoo.SD3 | dict(
        num_layers=4, joint_attention_dim=32, pooled_projection_dim=16, qk_norm="rms_norm"))
    pipe = StableDiffusion3T2ICoreDenoiseStep().init_pipeline()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.update_components(transformer=randomized(model), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


X = normal(2, 4, 8, 8)
POSITIVE = dict(prompt_embeds=normal(2, 5, 32, seed=2), pooled_prompt_embeds=normal(2, 16, seed=3))
NEGATIVE = dict(negative_prompt_embeds=normal(2, 5, 32, seed=4),
                negative_pooled_prompt_embeds=normal(2, 16, seed=5))


def run(pipe, guider, negative=NEGATIVE, steps=STEPS):
    pipe.update_components(guider=guider)
    return pipe(**POSITIVE, **negative, latents=X, num_inference_steps=steps, height=64, width=64,
                output="latents")


def sd3(pipe, x, timestep, negative):
    """One evaluation of the transformer, without a guider."""
    given = [*NEGATIVE.values()] if negative else [*POSITIVE.values()]
    return pipe.transformer(hidden_states=x, timestep=timestep.expand(2), encoder_hidden_states=given[0],
                            pooled_projections=given[1], return_dict=False)[0]


def rectify(model, tau_i=None, queries=None, **settings):
    return erg.rectify(model, tau=tau_i, queries=queries and slice(*queries), **settings)


def by_hand(pipe, settings, *, kappa=0.2, predict=sd3, x=X, same=False, apg=None, w=5.0):
    """The sampler written out: two passes, the second one rectified where t > kappa."""
    pipe.scheduler.set_timesteps(STEPS)
    running = 0.0
    for timestep in pipe.scheduler.timesteps:
        t = 1 - timestep.item() / 1000
        p = n = predict(pipe, x, timestep, False)
        with rectify(pipe.transformer, **settings) if t > kappa else contextlib.nullcontext():
            if t > kappa or not same:
                n = predict(pipe, x, timestep, not same)
        v = w * p + (1 - w) * n
        if apg is not None and not (same and t <= kappa):
            x1, running = apg.update(x - (1 - t) * p, x - (1 - t) * n, w, running)
            v = (x - x1) / (1 - t)
        x = pipe.scheduler.step(v, timestep, x, return_dict=False)[0]
    return x


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-6)  # the scheduler computes in float32


@contextlib.contextmanager
def evaluations(model):
    """Lists the time of each evaluation of the model."""
    times = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: times.append(1 - kwargs["timestep"][0].item() / 1000), with_kwargs=True)
    yield times
    handle.remove()


def test_without_rectification_it_is_classifier_free_guidance(pipe):
    """tau_i = 1 is ClassifierFreeGuidance; in bfloat16, eq. 10 is rounded once, at the end."""
    ours, theirs = EntropyRectifyingGuidance(7.5), ClassifierFreeGuidance(7.5)
    close(run(pipe, ours), run(pipe, theirs))
    p, n = X, normal(*X.shape, seed=9)
    torch.testing.assert_close(ours.forward(p, n).pred, theirs.forward(p, n).pred, rtol=0, atol=1e-13)
    p, n = p.bfloat16(), n.bfloat16()
    assert torch.equal(ours.forward(p, n).pred, (7.5 * p.float() - 6.5 * n.float()).bfloat16())


@pytest.mark.parametrize("settings", [
    dict(guidance_scale=1.0), dict(enabled=False), dict(start=0.5, stop=0.5)])
def test_switched_off_it_is_one_evaluation(pipe, settings):
    """At w = 1, disabled, or outside start to stop, latents are bit by bit those without guidance."""
    expected = run(pipe, ClassifierFreeGuidance(1.0))
    with evaluations(pipe.transformer) as times:
        assert torch.equal(run(pipe, EntropyRectifyingGuidance(**IERG, **settings)), expected)
    assert len(times) == STEPS


@pytest.mark.parametrize("settings", [
    IERG, dict(tau_i=0.0), dict(IERG, queries=[0, 16]), dict(IERG, queries=[None, -5]),
    dict(alpha=0.7, gamma=0.5, K=2, layers=range(3, 4))])
def test_equal_to_two_passes_by_hand(pipe, settings):
    """The guider samples what a written-out loop with erg.rectify around the second pass samples."""
    result = run(pipe, EntropyRectifyingGuidance(5.0, **settings))
    close(result, by_hand(pipe, settings))
    assert (result - run(pipe, EntropyRectifyingGuidance(5.0))).abs().max() > 1e-2


def autoencoder():
    return AutoencoderKL(block_out_channels=(4,) * 4, norm_num_groups=2, latent_channels=4, sample_size=64,
                         down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                         shift_factor=0.0).double()


def test_equal_to_the_plain_pipeline_under_rectify(pipe):
    """StableDiffusion3Pipeline with erg.rectify on its negative rows gives the same latents."""
    plain = StableDiffusion3Pipeline(transformer=pipe.transformer, scheduler=pipe.scheduler,
                                     vae=autoencoder(),
                                     text_encoder=None, text_encoder_2=None, text_encoder_3=None,
                                     tokenizer=None, tokenizer_2=None, tokenizer_3=None)
    plain.set_progress_bar_config(disable=True)
    with rectify(plain.transformer, **IERG, rows=slice(0, 2),  # its order is negative, positive
                     when=lambda *args, timestep, **kwargs: 1 - timestep[0].item() / 1000 > 0.4):
        expected = plain(**POSITIVE, **NEGATIVE, latents=X, num_inference_steps=STEPS, guidance_scale=5.0,
                         height=64, width=64, output_type="latent").images
    close(run(pipe, EntropyRectifyingGuidance(5.0, **IERG, kappa=0.4)), expected)


@pytest.mark.parametrize("kappa, steps", [(0.2, 11), (0.0, 19), (0.4, 7), (1.0, 0)])
def test_kappa_in_the_time_of_the_model(pipe, monkeypatch, kappa, steps):
    """The steps with t > kappa (0.2 by default) are rectified, t = 1 - sigma with the schedule's shift."""
    rectified, attend = [], erg.energy_attention
    monkeypatch.setattr(erg, "energy_attention",
                        lambda *args, **kwargs: rectified.append(times[-1]) or attend(*args, **kwargs))
    settings = IERG if kappa == 0.2 else dict(IERG, kappa=kappa)
    with evaluations(pipe.transformer) as times:
        run(pipe, EntropyRectifyingGuidance(5.0, **settings), steps=20)
    sigma = torch.linspace(1, 3 / 1002, 20, dtype=torch.float64)  # between the scheduler's ends,
    t = 1 - 3 * sigma / (1 + 2 * sigma)  # shifted by 3
    assert times[::2] == times[1::2] == pytest.approx(t.tolist(), abs=1e-6)
    assert rectified == [s for s in times[::2] if s > kappa for _ in IERG["layers"]]
    assert len(rectified) == 2 * steps


def test_without_a_negative_condition_it_is_the_prompts(pipe):
    """Without a negative, or with negative="same", there is one evaluation up to kappa and two after it."""
    expected = by_hand(pipe, IERG, same=True)
    for guider, negative in ((EntropyRectifyingGuidance(5.0, **IERG), {}),
                             (EntropyRectifyingGuidance(5.0, **IERG, negative="same"), NEGATIVE)):
        with evaluations(pipe.transformer) as times:
            close(run(pipe, guider, negative), expected)
        assert len(times) == STEPS + sum(t > 0.2 for t in set(times)) and times.count(times[-1]) == 2
    assert guider.num_conditions == 1 and guider.new(negative=None).num_conditions == 2
    for settings in (dict(), dict(IERG, negative="null")):
        with pytest.raises(ValueError, match="negative"):
            run(pipe, EntropyRectifyingGuidance(5.0, **settings), {})


def test_config_is_plain_json_and_survives_a_round_trip(pipe, tmp_path):
    """save_pretrained, from_pretrained and new keep the config, and their guider samples the same."""
    guider = EntropyRectifyingGuidance(4.0, tau_i=0.01, layers=range(1, 3), kappa=0.3, queries=slice(0, 16),
                                       stop=0.9, apg=erg.APG(eta=0.5))
    expected = run(pipe, guider)
    guider.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "guider_config.json").read_text())
    assert stored["layers"] == [1, 2] and stored["queries"] == [0, 16] and stored["kappa"] == 0.3
    assert stored["apg"] == dict(momentum=-0.5, eta=0.5, norm_threshold=5.0)
    for other in (EntropyRectifyingGuidance.from_pretrained(tmp_path), guider.new()):
        assert other.settings == guider.settings
        assert {k: other.config[k] for k in stored} == {k: guider.config[k] for k in stored} == stored
        assert torch.equal(run(pipe, other), expected)
    changed = guider.new(guidance_scale=2.0, layers={3}, apg=None)
    config = changed.config
    assert (changed.guidance_scale, config.layers, config.kappa, config.apg) == (2.0, [3], 0.3, None)
    assert EntropyRectifyingGuidance(4.0).new().guidance_scale == 4.0  # given by position
    close(run(pipe, ClassifierFreeGuidance(5.0)), run(pipe, EntropyRectifyingGuidance(5.0)))  # swapped back


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("apg", [None, {}])
def test_a_failing_denoiser_is_left_as_it_was(pipe, error, apg):
    """An error in a rectified forward leaves no trace in the model; a later run is as if it had not been."""
    guider, model = EntropyRectifyingGuidance(5.0, **IERG, apg=apg), pipe.transformer
    attend = torch.nn.functional.scaled_dot_product_attention
    expected, before = run(pipe, guider), (model.__dict__.copy(), sd3(pipe, X, torch.tensor(500.0), False))

    def fail(module, args):
        if torch.nn.functional.scaled_dot_product_attention is not attend:
            raise error("stop")

    handle = model.norm_out.register_forward_pre_hook(fail)
    with pytest.raises(error, match="stop"):
        run(pipe, guider)
    handle.remove()
    assert model.__dict__ == before[0] and torch.nn.functional.scaled_dot_product_attention is attend
    assert torch.equal(sd3(pipe, X, torch.tensor(500.0), False), before[1])
    with pytest.raises(RuntimeError, match="layer 4 was not rectified"):
        run(pipe, EntropyRectifyingGuidance(5.0, **dict(IERG, layers=[4])))
    assert model.__dict__ == before[0] and torch.equal(run(pipe, guider), expected)


def test_an_error_beside_the_denoiser(pipe):
    """Prepared but not cleaned up, the model is as it was at the next step, and without the guider."""
    model, evaluate = pipe.transformer, lambda: sd3(pipe, X, torch.tensor(500.0), False)
    plain = evaluate()
    for release in (lambda guider: guider.set_state(1, 2, torch.tensor(400.0)) or guider,
                    lambda guider: None):
        guider = EntropyRectifyingGuidance(5.0, **IERG)
        guider.set_state(0, 2, torch.tensor(500.0))
        for _ in guider.prepare_inputs({"encoder_hidden_states": (X, X + 1)}):
            guider.prepare_models(model)
        assert (evaluate() - plain).abs().max() > 1e-3
        guider = release(guider)
        gc.collect()
        assert "forward" not in model.__dict__ and torch.equal(evaluate(), plain)


def test_a_forward_replaced_by_others_is_kept(pipe):
    """Offloading and caching hooks replace a model's forward: it is theirs again after each evaluation."""
    model, calls = pipe.transformer, []
    original, expected = model.forward, run(pipe, EntropyRectifyingGuidance(5.0, **IERG))

    def theirs(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    model.forward = theirs
    try:
        assert torch.equal(run(pipe, EntropyRectifyingGuidance(5.0, **IERG)), expected)
        assert model.forward is theirs and len(calls) == 2 * STEPS
    finally:
        del model.forward


@pytest.mark.parametrize("apg", [{}, dict(momentum=0.3, eta=0.5, norm_threshold=2.0)])
def test_apg_in_the_space_of_the_data(pipe, apg):
    """APG is erg.APG on x - sigma * prediction, as written out; its momentum starts anew with each run."""
    guider = EntropyRectifyingGuidance(5.0, **IERG, apg=apg)
    expected = by_hand(pipe, IERG, apg=erg.APG(**apg))
    for _ in range(2):
        close(run(pipe, guider), expected)
    close(run(pipe, guider, {}), by_hand(pipe, IERG, apg=erg.APG(**apg), same=True))
    assert (expected - by_hand(pipe, IERG)).abs().max() > 1e-2
    neutral = EntropyRectifyingGuidance(5.0, **IERG, apg=dict(momentum=0.0, eta=1.0, norm_threshold=0.0))
    close(run(pipe, neutral), run(pipe, neutral.new(apg=None)))


def test_apg_without_latents_raises():
    """A denoiser that takes no `hidden_states`, such as a U-Net that predicts noise, is refused by name."""
    guider, model = EntropyRectifyingGuidance(5.0, apg={}), nn.Identity()
    guider.set_state(0, 2, 999)
    batches = guider.prepare_inputs({"prompt_embeds": (X, X + 1)})
    for batch in batches:
        guider.prepare_models(model)
        batch.noise_pred = model(X)
        guider.cleanup_models(model)
    with pytest.raises(ValueError, match="apg=.*hidden_states"):
        guider(batches)


def positions(kind, length):
    ids = torch.zeros(2, length, 4)
    ids[..., 0], ids[..., 3] = kind, torch.arange(length)
    return ids


WAN = dict(prompt_embeds=normal(2, 5, 16, seed=2), negative_prompt_embeds=normal(2, 3, 16, seed=4))
FLUX2 = dict(WAN, txt_ids=positions(0, 5), negative_txt_ids=positions(0, 3), latent_ids=positions(0, 6),
             image_latents=normal(2, 4, 8, seed=6), image_latent_ids=positions(10, 4))


def flux2(pipe, x, timestep, negative):
    prefix, ids = "negative_" * negative, torch.cat([FLUX2["latent_ids"], FLUX2["image_latent_ids"]], 1)
    return pipe.transformer(
        hidden_states=torch.cat([x, FLUX2["image_latents"]], 1), timestep=timestep.expand(2).double() / 1000,
        encoder_hidden_states=FLUX2[prefix + "prompt_embeds"], txt_ids=FLUX2[prefix + "txt_ids"],
        guidance=None,
        img_ids=ids, return_dict=False)[0][:, :x.shape[1]]


def wan(pipe, x, timestep, negative):
    return pipe.transformer(hidden_states=x, timestep=timestep.expand(2).double(), return_dict=False,
                            encoder_hidden_states=WAN["negative_" * negative + "prompt_embeds"])[0]


@pytest.mark.parametrize("apg", [None, {}])
@pytest.mark.parametrize("predict, step, given, x", [
    (flux2, Flux2KleinBaseDenoiseStep, FLUX2, normal(2, 6, 8)),
    (wan, WanDenoiseStep, dict(WAN, dtype=torch.float64), normal(2, 4, 2, 4, 4))])
def test_denoising_steps_of_other_pipelines(predict, step, given, x, apg):
    """Prompts of two lengths; Flux 2's reference image; Wan's cross-attention is not among the layers."""
    if predict is wan:
        model = WanTransformer3DModel(**zoo.WAN | dict(text_dim=16, num_layers=3, rope_max_seq_len=32))
    else:
        model = Flux2Transformer2DModel(**zoo.FLUX | dict(
            in_channels=8, num_layers=2, num_single_layers=3, attention_head_dim=16, joint_attention_dim=16,
            axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=16, guidance_embeds=False))
    pipe = step().init_pipeline()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.update_components(transformer=randomized(model), scheduler=scheduler,
                           guider=EntropyRectifyingGuidance(5.0, **IERG, kappa=0.3, apg=apg))
    expected = by_hand(pipe, IERG, kappa=0.3, predict=predict, x=x, apg=None if apg is None else erg.APG())
    pipe.scheduler.set_timesteps(STEPS)
    timesteps = pipe.scheduler.timesteps
    close(pipe(**given, latents=x, num_inference_steps=STEPS, timesteps=timesteps, output="latents"),
          expected)


class Tokenizer:
    """Letters as tokens."""

    model_max_length = 12

    def __call__(self, prompts, padding, max_length=12, **kwargs):
        rows = [[ord(c) % 90 + 3 for c in prompt][:max_length - 1] + [2] for prompt in prompts]
        return SimpleNamespace(input_ids=torch.tensor([row + [0] * (max_length - len(row)) for row in rows]))


@pytest.fixture
def text():
    """The text encoders of a modular Stable Diffusion 3, at toy size."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel
    clips = [CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=100, hidden_size=8 * n, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
        max_position_embeddings=12, projection_dim=8, eos_token_id=2, bos_token_id=1,
        pad_token_id=0)) for n in (1, 2)]
    t5 = T5EncoderModel(T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=16, num_layers=3, num_heads=2))
    pipe = StableDiffusion3TextEncoderStep().init_pipeline()
    encoders = dict(text_encoder=clips[0], text_encoder_2=clips[1], text_encoder_3=t5)
    pipe.update_components(**{name: randomized(encoder) for name, encoder in encoders.items()},
                           tokenizer=Tokenizer(), tokenizer_2=Tokenizer(), tokenizer_3=Tokenizer())
    return pipe


def embeddings(pipe, **prompts):
    state = pipe(**prompts, max_sequence_length=12)
    return {name: state.get(name) for name in (*POSITIVE, *NEGATIVE)}


PROMPT = ["a red seven", "a blue two"]


def layers_of(text):
    return {text.text_encoder: range(1, 3), text.text_encoder_2: None, text.text_encoder_3: range(0, 2)}


def test_weak_negative_is_the_encoding_of_rectified_encoders(text):
    """Negative embeddings are those of rectified encoders, pooled ones too; the positive ones stay plain."""
    encoders, both = layers_of(text), dict(prompt=PROMPT, negative_prompt=PROMPT)
    strong = embeddings(text, prompt=PROMPT)
    with contextlib.ExitStack() as stack:
        for encoder, layers in encoders.items():
            stack.enter_context(erg.rectify(encoder, tau=0.1, layers=layers))
        expected = embeddings(text, prompt=PROMPT)
    with weak_negative(encoders, tau=0.1):
        for _ in range(2):  # two images in one context
            result = embeddings(text, **both)
            for name in POSITIVE:
                assert torch.equal(result[name], strong[name])
                assert torch.equal(result["negative_" + name], expected[name])
                assert (expected[name] - strong[name]).abs().max() > 1e-3
    assert torch.equal(embeddings(text, **both)["negative_prompt_embeds"], strong["prompt_embeds"])


def test_the_whole_pipeline_from_prompt_to_image(pipe, text):
    """The lines at the head of the example, on all blocks of Stable Diffusion 3: I-ERG and C-ERG together."""
    whole = StableDiffusion3AutoBlocks().init_pipeline()
    whole.update_components(transformer=pipe.transformer, scheduler=pipe.scheduler, **text.components)
    whole.update_components(vae=autoencoder())
    both = dict(prompt=PROMPT, negative_prompt=PROMPT)
    options = dict(latents=X, num_inference_steps=STEPS, height=64, width=64)
    for given in (pipe, whole):
        given.update_components(guider=EntropyRectifyingGuidance(5.0, **IERG, kappa=0.2))
    with weak_negative(layers_of(text), tau=0.1):
        weak = embeddings(text, **both)
        state = whole(**both, max_sequence_length=12, output_type="pt", **options)
    assert state.get("images").shape == (2, 3, 64, 64)
    assert torch.equal(state.get("latents"), pipe(**weak, **options, output="latents"))


def test_weak_negative_without_a_weak_encoding_raises(text):
    """A pipeline that never encodes the prompt a second time is an error, not a strong negative."""
    for prompts in (dict(prompt="seven"), dict(prompt="seven", negative_prompt="")):
        with pytest.raises(RuntimeError, match="negative_prompt"), pytest.warns(match="was true in none"):
            with weak_negative({text.text_encoder: None}, tau=0.1):
                embeddings(text, **prompts)
    with pytest.raises(ValueError, match="layers="), weak_negative({text.text_encoder: 3}, tau=0.1):
        pass


@pytest.mark.parametrize("name, value", [
    ("guidance_scale", "5"), ("guidance_scale", lambda t: 5.0), ("guidance_scale", float("nan")),
    ("tau_i", -0.1),
    ("tau_i", None), ("layers", 6), ("layers", []), ("layers", [-1]), ("layers", "67"), ("layers", iter(())),
    ("kappa", 1.5), ("alpha", None), ("gamma", 0.0), ("K", 0), ("K", 1.5), ("queries", [1]), ("queries", 16),
    ("queries", ["a", 2]), ("queries", slice(0, 16, 2)), ("negative", "weak"), ("apg", True),
    ("apg", dict(limit=3.0)),
    ("num_train_timesteps", 0), ("num_train_timesteps", "1000"), ("start", 1.5), ("stop", -0.1)])
def test_bad_arguments_raise_by_name(name, value):
    """Each bad argument is one error, which names it."""
    with pytest.raises((ValueError, TypeError), match=f"^{name}=|`{name}`"):
        EntropyRectifyingGuidance(**{**dict(tau_i=0.01), name: value})
    with pytest.raises(ValueError, match="^norm_threshold="):
        EntropyRectifyingGuidance(apg=dict(norm_threshold=-1.0))


def test_settings_without_effect_and_foreign_times_raise():
    """layers, kappa or queries without tau_i, "same" without I-ERG, and timesteps out of range are errors."""
    for settings in (dict(layers=[1]), dict(kappa=0.3), dict(queries=[0, 4]), dict(negative="same")):
        with pytest.raises(ValueError, match=next(iter(settings))):
            EntropyRectifyingGuidance(5.0, **settings)
    guider = EntropyRectifyingGuidance(5.0, **IERG, num_train_timesteps=1)
    for timestep, t in ((1.0, 0.0), (0.25, 0.75)):
        guider.set_state(0, 2, torch.tensor(timestep))
        assert guider.t == t
    guider.set_state(0, 2, torch.tensor(999.0))
    with pytest.raises(ValueError, match="num_train_timesteps"):
        guider.prepare_inputs({"prompt_embeds": (X, X + 1)})
