"""Unmodified pipelines of diffusers run I-ERG by one line around pipe(...); toy size, random weights."""
import contextlib
import copy
import dataclasses
import functools
import inspect

import numpy as np
import pytest
import torch
from torch import nn

import erg

diffusers = pytest.importorskip("diffusers", reason="diffusers, whose pipelines are tested, is missing")
pytest.importorskip("transformers", reason="transformers, which the pipelines import, is missing")

from examples.pipelines import second_forward  # noqa: E402
from test_diffusers import MODELS, ByHand  # noqa: E402
from test_zoo import patched, softmax_attention  # noqa: E402
from zoo import ZOO, normal  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers' schedulers
B, IMAGE = 2, 24  # samples; image tokens, 4 x 6 of 8 x 12 latents
TAU, KAPPA, W, STEPS = 0.01, 0.3, 3.0, 8
close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-5)  # Flux turns its queries in float32


def by_rows(rows, **queries):
    """The line for both prompts in one forward, the negative's in these rows."""
    return lambda pipe, model, layers: erg.rectify(
        model, tau=TAU, layers=layers, rows=rows, batch=2 * B, **queries,
        when=lambda hidden_states, timestep, **kwargs: 1 - timestep.max().item() / 1000 > KAPPA)


def by_turns(t, **queries):
    """The line for a forward for each prompt, where t(pipe, timestep that the model gets) is the time."""
    return lambda pipe, model, layers: erg.rectify(
        model, tau=TAU, layers=layers, **queries,
        when=second_forward(lambda timestep: t(pipe, timestep) > KAPPA))


@dataclasses.dataclass
class Case:
    """A pipeline, the line that rectifies it, and its sampler."""

    pipe: object
    layers: list
    line: object  # (pipe, model, layers) -> the recommended context
    arguments: dict  # of the pipeline
    negative: int | None = None  # its half of the rows, 0 or 1; None: a forward of its own, the second
    image: slice | None = None  # queries, as in `line`
    noise: torch.Tensor = dataclasses.field(default_factory=lambda: normal(B, 4, 8, 12))
    schedule: dict = dataclasses.field(default_factory=lambda: dict(sigmas=np.linspace(1, 1 / STEPS, STEPS)))
    t: object = lambda scheduler, i: 1 - scheduler.timesteps[i].item() / 1000  # at step i
    time: object = lambda timestep: timestep  # what the model is given
    guided: object = lambda pos, neg: W * pos + (1 - W) * neg
    finish: object = lambda pipe, x: x  # after the last step
    attention: object = None  # (model, layer) -> the attention that ByHand can stand in for

    def __post_init__(self):
        names = ("unet", "transformer", "transformer_2")  # Wan 2.2 has two
        models = [getattr(self.pipe, name, None) for name in names]
        self.models = [model for model in models if model is not None]

    def run(self, rectified=False):
        """What the pipeline returns, and each step's arguments and output, positive and negative."""
        made, accepted = [], inspect.signature(self.pipe.__call__).parameters

        def note(model, args, kwargs, out):
            made.append((inspect.signature(model.forward).bind(*args, **kwargs).arguments, tensor(out)))

        given = dict(latents=self.noise, height=64, width=96, output_type="latent", return_dict=False)
        given |= dict(self.arguments, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))
        with contextlib.ExitStack() as stack:
            for model in self.models:
                stack.callback(model.register_forward_hook(note, with_kwargs=True).remove)
                if rectified:
                    stack.enter_context(self.line(self.pipe, model, self.layers))
            out = self.pipe(**{name: x for name, x in given.items() if name in accepted})[0]
        if self.negative is None:
            return out, list(zip(made[::2], made[1::2]))
        parts = [slice(B, 2 * B), slice(0, B)][::-1 if self.negative else 1]
        return out, [[tuple(half(x, part) for x in forward) for part in parts] for forward in made]

    def predict(self, model, given, weak):
        """The model's output, if weak with the logits of the chosen layers tempered by hand."""
        if weak and self.attention:
            model = copy.deepcopy(model)
            for n in self.layers:
                self.attention(model, n).processor = ByHand(TAU, slice(None), self.image)

        def answer(numbers, original, call):
            out, image = original(**call), self.image or slice(None)
            if weak and not self.attention and numbers.get("self") in self.layers:
                out[..., image, :] = softmax_attention(TAU, **call)[..., image, :]
            return out

        with patched(answer):
            return tensor(model(**given))

    def by_hand(self, steps, rectified):
        """The sampler written out, two forwards a step, the negative's weak where t > kappa; and that."""
        scheduler = copy.deepcopy(self.pipe.scheduler)
        scheduler.set_timesteps(**self.schedule)
        after = [self.t(scheduler, i) > KAPPA for i in range(len(scheduler.timesteps))]
        x = self.noise * getattr(scheduler, "init_noise_sigma", 1)
        boundary, scale = self.pipe.config.get("boundary_ratio", 0), lambda x, timestep: x
        scale = getattr(scheduler, "scale_model_input", scale)
        for timestep, weak in zip(scheduler.timesteps, after):
            model, v = self.models[int(timestep < 1000 * boundary)], []
            scaled = scale(x, timestep)
            for negative, (given, _) in enumerate(steps[0]):  # prompts, masks, positions
                a = next(name for name in ("hidden_states", "sample", "x") if name in given)
                b = "timestep" if "timestep" in given else "t"
                new = list(scaled.double()[:, :, None]) if a == "x" else scaled.to(given[a].dtype)
                time = self.time(timestep).expand(B).to(given[b].dtype)
                v.append(self.predict(model, given | {a: new, b: time}, negative and rectified and weak))
            x = scheduler.step(self.guided(*v), timestep, x, return_dict=False)[0]
        return self.finish(self.pipe, x), after


def tensor(out):
    """The prediction in a model's output."""
    while not isinstance(out, torch.Tensor):
        out = torch.stack(out) if isinstance(out, list) else out[0]
    return out


def half(x, part):
    """A part of 2 B rows, of all that has as many."""
    if isinstance(x, dict):
        return {name: half(y, part) for name, y in x.items()}
    return x[part] if isinstance(x, (list, torch.Tensor)) and getattr(x, "ndim", 1) and len(x) == 2 * B else x


def build(pipeline, model, config, scheduler=None, name="transformer", **parts):
    """The pipeline with a model whose weights are all random, and without text encoders."""
    if not hasattr(diffusers, pipeline):
        pytest.skip(f"diffusers {diffusers.__version__} has no {pipeline}")
    torch.manual_seed(0)
    for name in [name, "transformer_2"] if "boundary_ratio" in parts else [name]:
        parts[name] = getattr(diffusers, model)(**ZOO[model]["config"] | config)
        parts[name].double().eval().requires_grad_(False)
        for key, p in parts[name].named_parameters():
            norm = "norm_q" in key or "norm_k" in key or "norm_added" in key  # attention far from uniform
            nn.init.normal_(p, mean=2.0 if norm else float(p.dim() == 1 and key.endswith("weight")),
                            std=0.0 if norm else p[0].numel()**-0.5 if p.dim() > 1 else 0.3)
    parts["scheduler"] = scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    kind = getattr(diffusers, pipeline)
    needed = [n for n, p in inspect.signature(kind).parameters.items() if p.default is p.empty]
    pipe = kind(**dict.fromkeys(needed) | parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def autoencoder():
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(block_out_channels=[4], norm_num_groups=2,
                                   latent_channels=4).double().eval()


def prompts(**pairs):
    """What a pipeline takes for the prompts and, by names with "negative_", for the negative ones."""
    return {sign + name: pair[i] for name, pair in pairs.items() for i, sign in enumerate(("", "negative_"))}


def texts(width, lengths=(5, 5)):
    return tuple(normal(B, length, width, seed=seed) for seed, length in zip((2, 3), lengths))


def unet_attention(model, n):
    """The n-th self-attention in the order in which they run: down, middle, up."""
    parts = [*model.down_blocks, model.mid_block, *model.up_blocks]
    return [b.attn1 for part in parts for a in part.attentions for b in a.transformer_blocks][n]


def same_norm(pos, neg):
    """Qwen-Image and Lumina 2 give the guided velocity the norm of the positive."""
    v = W * pos + (1 - W) * neg
    return v * (pos.norm(dim=-1, keepdim=True) / v.norm(dim=-1, keepdim=True))


FIRST, LAST = slice(0, B), slice(-IMAGE, None)  # rows; the image's queries where it follows a text
TOKENS, POOLED = normal(B, IMAGE, 16), tuple(normal(B, 16, seed=seed) for seed in (4, 5))
MASKS = [torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]), torch.tensor([[1, 1, 0, 0, 0]] * 2)]
TRAINED = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
EVENLY = dict(schedule=dict(num_inference_steps=STEPS))
FOUR = EVENLY | dict(guided=lambda pos, neg: (W * pos + (1 - W) * neg)[:, :4])  # and variances
TIMES = np.linspace(1000, 1, STEPS).astype(int).astype(np.float32)
FLUX = dict(layers=[1, 2], line=by_turns(lambda pipe, timestep: 1 - timestep, queries=LAST), image=LAST,
            noise=TOKENS, time=lambda timestep: timestep / 1000)  # text, then image
CASES = {
    "DiT": lambda: Case(  # prompts first, then the null class; always decodes
        build("DiTPipeline", "DiTTransformer2DModel", MODELS["DiT"][1] | dict(num_embeds_ada_norm=1000),
              diffusers.DDIMScheduler(), vae=autoencoder()),
        [1, 3], by_rows(slice(B, 2 * B)), dict(class_labels=[1, 2], guidance_scale=W, output_type="pt"), 1,
        **FOUR,
        noise=torch.randn(B, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        attention=lambda model, n: model.transformer_blocks[n].attn1,
        finish=lambda pipe, x: (pipe.vae.decode(x / 0.18215).sample / 2 + 0.5).clamp(0, 1)),
    "PixArt-alpha": lambda: Case(
        build("PixArtAlphaPipeline", "PixArtTransformer2DModel", MODELS["PixArt"][1],
              diffusers.DPMSolverMultistepScheduler()),
        [0, 2], by_rows(FIRST), dict(prompts(prompt_embeds=texts(24), prompt_attention_mask=MASKS),
                                     guidance_scale=W, negative_prompt=None, use_resolution_binning=False),
        0, **FOUR,
        attention=lambda model, n: model.transformer_blocks[n].attn1),
    "Stable Diffusion 1.5": lambda: Case(
        build("StableDiffusionPipeline", "UNet2DConditionModel", MODELS["SD 1.5"][1],
              diffusers.PNDMScheduler(skip_prk_steps=True, **TRAINED), "unet", requires_safety_checker=False),
        [2, 3], by_rows(FIRST), dict(prompts(prompt_embeds=texts(24)), guidance_scale=W), 0,
        attention=unet_attention, **EVENLY),
    "Stable Diffusion XL": lambda: Case(
        build("StableDiffusionXLPipeline", "UNet2DConditionModel", MODELS["SDXL"][1],
              diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **TRAINED), "unet"),
        [1, 4, 10], by_rows(FIRST),
        dict(prompts(prompt_embeds=texts(24), pooled_prompt_embeds=POOLED), guidance_scale=W), 0,
        attention=unet_attention, **EVENLY),
    "Stable Diffusion 3": lambda: Case(  # image, then text
        build("StableDiffusion3Pipeline", "SD3Transformer2DModel",
              MODELS["SD3"][1] | dict(dual_attention_layers=())),
        [1, 2], by_rows(FIRST, queries=slice(0, IMAGE)),
        dict(prompts(prompt_embeds=texts(24), pooled_prompt_embeds=POOLED), guidance_scale=W), 0,
        slice(0, IMAGE), attention=lambda model, n: model.transformer_blocks[n].attn, **EVENLY),
    "Z-Image": lambda: Case(  # prompts first; image, then text, after layers of either alone; time is t
        build("ZImagePipeline", "ZImageTransformer2DModel", dict(n_layers=4)), [3, 4],
        lambda pipe, model, layers: erg.rectify(
            model, tau=TAU, layers=layers, rows=slice(B, 2 * B), batch=2 * B, queries=slice(0, IMAGE),
            when=lambda x, t, *args, **kwargs: t[0].item() > KAPPA),
        dict(prompts(prompt_embeds=[list(normal(B, n, 6)) for n in (5, 3)]), guidance_scale=W - 1), 1,
        slice(0, IMAGE), normal(B, 4, 8, 12).float(), time=lambda timestep: (1000 - timestep) / 1000,
        guided=lambda pos, neg: -(pos.float() + (W - 1) * (pos.float() - neg.float()))[:, :, 0]),
    "Flux": lambda: Case(
        build("FluxPipeline", "FluxTransformer2DModel", MODELS["Flux"][1]), **FLUX,
        arguments=dict(prompts(prompt_embeds=texts(24), pooled_prompt_embeds=POOLED), true_cfg_scale=W),
        attention=lambda model, n: [*model.transformer_blocks, *model.single_transformer_blocks][n].attn),
    "Chroma": lambda: Case(
        build("ChromaPipeline", "ChromaTransformer2DModel",
              dict(num_layers=2, num_single_layers=2, in_channels=16)),
        arguments=dict(prompts(prompt_embeds=texts(8),
                               prompt_attention_mask=[mask.double() for mask in MASKS]),
                       guidance_scale=W), **FLUX),
    "Qwen-Image": lambda: Case(
        build("QwenImagePipeline", "QwenImageTransformer2DModel",
              dict(num_layers=4, in_channels=16, patch_size=2)),
        arguments=dict(prompts(prompt_embeds=texts(6, (5, 3)), prompt_embeds_mask=(MASKS[0], None)),
                       true_cfg_scale=W),
        guided=same_norm, **FLUX),
    "Lumina 2": lambda: Case(  # text, then image, after layers of either alone; time is t
        build("Lumina2Pipeline", "Lumina2Transformer2DModel", dict(num_layers=4)), [3, 4],
        by_turns(lambda pipe, timestep: timestep, queries=LAST),
        dict(prompts(prompt_embeds=texts(6), prompt_attention_mask=MASKS), guidance_scale=W), image=LAST,
        time=lambda timestep: 1 - timestep / 1000, guided=lambda pos, neg: -same_norm(pos, neg)),
    "CogView4": lambda: Case(  # text, then image; the timesteps do not follow the sigmas
        build("CogView4Pipeline", "CogView4Transformer2DModel", dict(num_layers=4)), [1, 2],
        by_turns(lambda pipe, _: 1 - pipe.scheduler.sigmas[pipe.scheduler.step_index or 0], queries=LAST),
        dict(prompts(prompt_embeds=texts(8, (5, 3))), guidance_scale=W), image=LAST,
        noise=normal(B, 4, 8, 12).float(),
        schedule=dict(timesteps=TIMES, sigmas=TIMES / 1000), t=lambda scheduler, i: 1 - scheduler.sigmas[i]),
    "Wan 2.2": lambda: Case(  # one model near the noise, then another
        build("WanPipeline", "WanTransformer3DModel", dict(num_layers=4), boundary_ratio=0.5), [1, 2],
        by_turns(lambda pipe, timestep: 1 - timestep / 1000), noise=normal(B, 4, 2, 8, 12).float(), **EVENLY,
        arguments=dict(prompts(prompt_embeds=texts(6)), guidance_scale=W, num_frames=5)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_pipeline_is_the_sampler_written_out(name):
    """With the line, the negative forwards are weak exactly where t > kappa; before and after, none is."""
    case = CASES[name]()
    plain, steps = case.run()
    close(case.by_hand(steps, False)[0], plain)
    out, rectified = case.run(rectified=True)
    expected, after = case.by_hand(steps, True)
    close(out, expected)
    assert (out - plain).abs().max() > 0.05
    first = after.index(True)
    assert 0 < first < len(after) == len(steps)
    for a, b in zip(steps[:first], rectified):
        assert torch.equal(a[0][1], b[0][1]) and torch.equal(a[1][1], b[1][1])
    assert torch.equal(steps[first][0][1], rectified[first][0][1])  # the positive prediction
    assert ((steps[first][1][1] - rectified[first][1][1]).flatten(1).norm(dim=1) > 1e-2).all()
    assert torch.equal(case.run()[0], plain)


@pytest.mark.parametrize("name", ["Flux", "Qwen-Image", "CogView4"])
def test_two_forwards_of_the_same_prompt(name):
    """`second_forward` finds the negative's forward also where its prompt is the prompt itself."""
    case = CASES[name]()
    case.arguments = {name: case.arguments[name.removeprefix("negative_")] for name in case.arguments}
    out, steps = case.run(rectified=True)
    close(out, case.by_hand(steps, True)[0])
    assert (out - case.by_hand(steps, False)[0]).abs().max() > 0.1


def test_second_forward():
    """It is true in each second forward at a timestep, also if they repeat, or if guidance ends or pauses."""
    for times, expected in (([9, 9, 5, 5, 1, 1], [0, 1, 0, 1, 0, 1]),
                            ([9, 9, 5, 5, 5, 5], [0, 1, 0, 1, 0, 1]),  # Heun
                            ([9, 9, 5, 1], [0, 1, 0, 0]), ([9, 5, 5, 1, 9, 9], [0, 0, 1, 0, 0, 1])):
        for bound in (10, 6):
            when = second_forward(lambda timestep: timestep < bound)
            made = [when(timestep=torch.tensor([time] * B)) for time in times]
            assert made == [e and time < bound for e, time in zip(expected, times)]
