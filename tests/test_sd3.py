"""examples/sd3.py: the complete StableDiffusion3Pipeline under ERG, at toy size with random weights."""
import copy
import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import erg

pytest.importorskip("diffusers", reason="diffusers, whose pipeline is tested, is missing")
pytest.importorskip("transformers", reason="transformers, whose text encoders the pipeline needs, is missing")

from examples import sd3  # noqa: E402
from test_diffusers import ByHand  # noqa: E402
from test_transformers import attentions, hand_attention  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PROMPT = ["a red seven", "a blue two"]
SIZE = dict(height=64, width=96, max_sequence_length=16)  # 4 x 6 image tokens
SETTINGS = erg.PRESETS["sd3-medium"]


@pytest.fixture(scope="module")
def pipe():
    pipe = sd3.tiny_pipeline()
    for name in ("transformer", *sd3.ENCODERS.values()):
        getattr(pipe, name).double()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe, settings, prompt=PROMPT, steps=6, **options):
    return sd3.generate(pipe, prompt, settings, steps=steps, output_type="latent", **SIZE, **options).images


def by_hand(pipe, settings, layers=(6, 7), kappa=0.2, weak=True, steps=6, rows=2, image=slice(0, 24)):
    """The sampler written out: two forwards a step, the negative's with attention computed by hand."""
    embeddings = sd3.weak_embeddings(pipe, PROMPT, settings, max_sequence_length=SIZE["max_sequence_length"])
    rectified, running = copy.deepcopy(pipe.transformer), 0.0
    for n in layers:
        rectified.transformer_blocks[n].attn.processor = ByHand(settings.tau_i, slice(None), image)
    x = torch.randn(rows, 4, 8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pipe.scheduler.set_timesteps(steps)
    for timestep in pipe.scheduler.timesteps:
        t = 1 - timestep.item() / 1000
        given = dict(hidden_states=x, timestep=timestep.expand(rows), return_dict=False)
        p = pipe.transformer(**given, encoder_hidden_states=embeddings["prompt_embeds"],
                             pooled_projections=embeddings["pooled_prompt_embeds"])[0]
        n = (rectified if t > kappa else pipe.transformer)(
            **given, encoder_hidden_states=embeddings["negative_prompt_embeds"],
            pooled_projections=embeddings["negative_pooled_prompt_embeds"])[0]
        v = settings.w * p + (1 - settings.w) * n
        if settings.apg is not None:
            x1, running = settings.apg.update(x - (1 - t) * p, x - (1 - t) * n, settings.w, running)
            v = (x - x1) / (1 - t)
        x = pipe.scheduler.step(v, timestep, x, return_dict=False)[0]
    return x


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # the scheduler computes in float32


def test_without_erg_it_is_the_pipeline_itself(pipe):
    """erg.ERG(w=5) gives the latents of pipe(prompt, guidance_scale=5), bit by bit."""
    options = dict(height=64, width=96, max_sequence_length=16, num_inference_steps=6, output_type="latent")
    expected = pipe(PROMPT, guidance_scale=5.0, generator=torch.Generator().manual_seed(0), **options).images
    assert torch.equal(latents(pipe, erg.ERG(w=5.0)), expected)


@pytest.mark.parametrize("apg", [None, erg.APG(), erg.APG(momentum=0.0, eta=0.5, norm_threshold=2.0)])
def test_erg_is_the_sampler_written_out(pipe, apg):
    """I-ERG after kappa on the negative rows' image queries, C-ERG, APG: as by hand; each setting bites."""
    settings = dataclasses.replace(SETTINGS, apg=apg)
    result = latents(pipe, settings)
    close(result, by_hand(pipe, settings))
    for change in (dict(tau_c=0.5), dict(tau_i=0.5), dict(layers=[7]), dict(kappa=0.8), dict(w=4.0),
                   dict(apg=erg.APG(eta=0.9)), dict(gamma=0.5), dict(alpha=0.5), dict(K=3, tau_i=0.5)):
        assert (latents(pipe, dataclasses.replace(settings, **change)) - result).abs().max() > 1e-3, change


@pytest.mark.filterwarnings("ignore:when=... was true in none")
@pytest.mark.parametrize("kappa", [0.0, 0.2, 0.5, 1.0])
def test_kappa_under_the_shifted_schedule(pipe, kappa, monkeypatch):
    """Exactly the steps with t > kappa are rectified, where t = 1 - sigma and sigma is shifted by 3."""
    asked, rectify = {}, erg.rectify  # whether the forward at t is rectified

    def spying(*args, when, **kwargs):
        def told(*args, timestep, **kwargs):
            asked[1 - timestep[0].item() / 1000] = result = when(*args, timestep=timestep, **kwargs)
            return result
        return rectify(*args, when=told, **kwargs)

    monkeypatch.setattr(erg, "rectify", spying)
    latents(pipe, dataclasses.replace(SETTINGS, kappa=kappa, tau_c=1.0, layers_c=None), steps=28)
    sigma = torch.linspace(1, 0.003, 28)  # diffusers shifts the smallest sigma twice
    assert list(asked) == pytest.approx((1 - 3 * sigma / (1 + 2 * sigma)).tolist(), abs=1e-3)
    assert all(rectified == (t > kappa) for t, rectified in asked.items())
    if kappa == 0.2:
        assert sum(asked.values()) == 16  # 43 % of the steps are before it


def test_c_erg_of_the_three_encoders(pipe):
    """The negative's embeddings are of encoders changed by hand in Table 7's layers."""
    result = sd3.weak_embeddings(pipe, PROMPT, SETTINGS, max_sequence_length=16)
    options = dict(prompt_2=None, prompt_3=None, max_sequence_length=16, do_classifier_free_guidance=False)
    strong, _, pooled, _ = pipe.encode_prompt(PROMPT, **options)
    changed = copy.copy(pipe)
    layers = {"text_encoder": (12, range(1, 10)), "text_encoder_2": (32, range(1, 31)),
              "text_encoder_3": (24, range(1, 22))}
    for name, (depth, chosen) in layers.items():
        encoder = copy.deepcopy(getattr(pipe, name))
        modules = attentions(encoder)
        assert len(modules) == depth
        for n in chosen:
            modules[n].forward = functools.partial(hand_attention, modules[n], 0.1, 1.0)
        setattr(changed, name, encoder)
    weak, _, weak_pooled, _ = changed.encode_prompt(PROMPT, **options)
    assert torch.equal(result["prompt_embeds"], strong)
    assert torch.equal(result["pooled_prompt_embeds"], pooled)
    torch.testing.assert_close(result["negative_prompt_embeds"], weak, rtol=0, atol=1e-9)
    torch.testing.assert_close(result["negative_pooled_prompt_embeds"], weak_pooled, rtol=0, atol=1e-9)
    change = (weak - strong).abs()
    for part in change[:, :32, :32], change[:, :32, 32:], change[:, 32:]:  # CLIP-L, CLIP-G, T5
        assert part.max() > 1e-2


def test_the_pipeline_is_left_as_it_was(pipe):
    """After ERG, and after errors of all kinds, the pipeline's own latents are those before, bit by bit."""
    before = latents(pipe, erg.ERG(w=5.0))
    latents(pipe, SETTINGS)
    for error, message, wrong in (
            (RuntimeError, "layer 12 was not", dict(layers=range(10, 13))),
            (RuntimeError, "layer 12 was not", dict(layers_c=range(5, 13))),
            (ValueError, "queries=slice.* does not fit the .* queries", dict(queries=slice(0, 4096))),
            (ValueError, "w=1.0 must be a number greater than 1", dict(w=1.0)),
            (ValueError, "w=<function", dict(w=lambda t: 5.0)),
            (ValueError, "layers_c=.* names no layers of t5",
             dict(layers_c=dict.fromkeys(list(sd3.ENCODERS)[:2], [1])))):
        with pytest.raises(error, match=message):
            latents(pipe, dataclasses.replace(SETTINGS, **wrong))
    pipe.text_encoder_2.train()
    with pytest.raises(ValueError, match="CLIPTextModelWithProjection is in training mode"):
        latents(pipe, SETTINGS)
    pipe.text_encoder_2.eval()
    assert torch.equal(latents(pipe, erg.ERG(w=5.0)), before)


def test_a_context_for_other_pictures_raises(pipe):
    """Another size or number of images, no guidance, or a third forward of the positives: an error."""
    embeddings = sd3.weak_embeddings(pipe, PROMPT, SETTINGS, max_sequence_length=16)
    options = dict(embeddings, num_inference_steps=2, output_type="latent", height=64, width=96)
    for rows, height, change, message in (
            (2, 128, dict(), "height=128, width=96 are 48 image tokens, but the pipeline makes 24"),
            (1, 64, dict(), r"has 4 rows where \[2\] were expected"),
            (2, 64, dict(guidance_scale=1.0), r"has 2 rows where \[4\] were expected"),
            (2, 64, dict(skip_guidance_layers=[3], skip_layer_guidance_stop=0.9, num_inference_steps=4),
             "has 2 rows")):
        with pytest.raises(ValueError, match=message):
            with sd3.guided(pipe, SETTINGS, rows, height, 96):
                pipe(**options | change)


def test_fewer_parts(pipe):
    """I-ERG with either negative, C-ERG, several images, and a pipeline without T5 run and differ."""
    none = dict(tau_c=1.0, layers_c=None)
    results = [latents(pipe, settings) for settings in (
        erg.ERG(w=5.0), dataclasses.replace(SETTINGS, **none),
        dataclasses.replace(SETTINGS, **none, negative="same"),
        erg.ERG(w=5.0, tau_c=0.1, layers_c=SETTINGS.layers_c), SETTINGS)]
    smaller = copy.copy(pipe)
    smaller.text_encoder_3 = None
    results.append(latents(smaller, SETTINGS))
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(results) for b in results[:i])
    assert latents(pipe, SETTINGS, prompt="a red seven", images=3).shape == (3, 4, 8, 12)


def test_the_script_as_a_new_user_runs_it(tmp_path):
    """`python examples/sd3.py --tiny` writes its picture without a network."""
    out = tmp_path / "new" / "sd3.png"
    command = [sys.executable, ROOT / "examples/sd3.py", "--tiny", "--steps", "4", "--out", out]
    offline = dict(HF_HUB_OFFLINE="1", PATH="/usr/bin:/bin", HOME=str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=offline, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"wrote {out}" in done.stdout and out.stat().st_size > 10000
    cfg, ours = sd3.main(tiny=True, steps=2, out=str(out), apg=True)
    assert cfg.shape == ours.shape == (1, 128, 128, 3) and abs(cfg - ours).max() > 1e-3
    assert abs(sd3.main(tiny=True, steps=2, out=str(out), tau_i=1.0)[1] - cfg).max() > 1e-3  # C-ERG alone
    cfg, ours = sd3.main(tiny=True, steps=2, out=str(out), tau_i=1.0, tau_c=1.0)
    assert (cfg == ours).all()
    for wrong in (dict(steps=0), dict(layers="6"), dict(layers="8:6"), dict(kappa=1.5), dict(tau_i=-1.0)):
        with pytest.raises(ValueError, match=next(iter(wrong)).removesuffix("_i")):
            sd3.main(tiny=True, out=str(out), **wrong)
