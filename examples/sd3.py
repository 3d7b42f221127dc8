"""Stable Diffusion 3 under CFG and under ERG, side by side, on an unmodified pipeline of diffusers.

    python examples/sd3.py "a corgi in a spacesuit" --seed 0     # a GPU; --offload if its memory is short
    python examples/sd3.py --tiny                                # random weights, without a network

The weights are gated: accept their licence on the hub and log in with `hf auth login` first. Needs diffusers,
transformers, accelerate and matplotlib beside PyTorch. Tested with --tiny alone.

The settings are those of the paper for sd3-medium (Table 7, appendix E): w = 5, 28 Euler steps, tau_i = 0.01
in layers 6 and 7 where t > 0.2, tau_c = 0.1 in most layers of the three text encoders. To use it elsewhere,
copy this file and erg.py: `weak_embeddings` and `guided` are all that a script of your own needs.
"""
import argparse
import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # erg.py, one folder up
import erg  # noqa: E402

ENCODERS = {"clip-vit-l": "text_encoder", "openclip-vit-g": "text_encoder_2", "t5-xxl": "text_encoder_3"}
DEFAULTS = erg.PRESETS["sd3-medium"]


def weak_embeddings(pipe, prompt, settings, **options):
    """Embeddings for pipe(**...): of the prompt, and for the negative prompt its weak encoding (C-ERG).

    options: those of pipe.encode_prompt, such as num_images_per_prompt, max_sequence_length, clip_skip. With
    settings.tau_c = 1 the negative is that of the empty prompt, or of the same one: see settings.negative.
    """
    encode = dict(prompt_2=None, prompt_3=None, do_classifier_free_guidance=False, **options)
    positive, _, pooled, _ = pipe.encode_prompt(prompt, **encode)
    with contextlib.ExitStack() as stack:
        for name, attribute in ENCODERS.items():
            encoder = getattr(pipe, attribute)
            if settings.tau_c != 1 and encoder is not None:  # the pipeline does without T5 if memory is short
                by_name = isinstance(settings.layers_c, Mapping)
                if by_name and name not in settings.layers_c:
                    raise ValueError(f"layers_c={settings.layers_c!r} names no layers of {name}")
                layers = settings.layers_c[name] if by_name else settings.layers_c
                stack.enter_context(erg.rectify(encoder, tau=settings.tau_c, layers=layers))
        null = settings.tau_c == 1 and settings.negative != "same"
        prompt = ("" if isinstance(prompt, str) else [""] * len(prompt)) if null else prompt
        negative, _, negative_pooled, _ = pipe.encode_prompt(prompt, **encode)
    return dict(prompt_embeds=positive, pooled_prompt_embeds=pooled,
                negative_prompt_embeds=negative, negative_pooled_prompt_embeds=negative_pooled)


@contextlib.contextmanager
def guided(pipe, settings, rows, height, width):
    """Context in which pipe(..., guidance_scale=settings.w) makes `rows` images with I-ERG and APG.

    I-ERG acts on the rows of the negative prompt, which diffusers puts first; on the queries of the image,
    which SD3 puts before the text; and where t > kappa. diffusers counts time as 1000 * (1 - t).
    """
    if callable(settings.w) or not settings.w > 1:
        raise ValueError(f"w={settings.w!r} must be a number greater than 1, or the pipeline is unguided")
    side = pipe.vae_scale_factor * pipe.patch_size
    tokens = (height // side) * (width // side)
    queries = settings.queries or slice(0, tokens)
    running = [0.0]

    def project(transformer, args, kwargs, output):
        """APG: both rows get the guided velocity, which the pipeline's own formula then leaves as it is."""
        velocity = output[0].float()  # noise - data, (2 B, C, H, W)
        x, sigma = kwargs["hidden_states"].float()[:rows], kwargs["timestep"][0].item() / 1000
        negative, positive = (x - sigma * v for v in velocity.chunk(2))  # predictions of the data
        x1, running[0] = settings.apg.update(positive, negative, settings.w, running[0])
        return (torch.cat([(x - x1) / sigma] * 2).to(output[0].dtype), *output[1:])

    def after_kappa(*args, hidden_states, timestep, **kwargs):
        made = (hidden_states.shape[-2] // pipe.patch_size) * (hidden_states.shape[-1] // pipe.patch_size)
        if made != tokens:
            raise ValueError(f"height={height}, width={width} are {tokens} image tokens, but the pipeline "
                             f"makes {made}")
        return 1 - timestep[0].item() / 1000 > settings.kappa + 1e-6

    with contextlib.ExitStack() as stack:
        if settings.rectifies:
            stack.enter_context(erg.rectify(
                pipe.transformer, tau=settings.tau_i, alpha=settings.alpha, gamma=settings.gamma,
                K=settings.K, layers=settings.layers, queries=queries if settings.tau_i != 1 else None,
                rows=slice(0, rows), batch=2 * rows, when=after_kappa))
        if settings.apg is not None:
            stack.callback(pipe.transformer.register_forward_hook(project, with_kwargs=True).remove)
        yield


def generate(pipe, prompt, settings, *, height, width, steps=28, max_sequence_length=256, images=1, seed=0,
             **options):
    """What pipe(..., **options) returns, under these settings: erg.ERG(w=5.0) is CFG."""
    embeddings = weak_embeddings(pipe, prompt, settings, num_images_per_prompt=images,
                                 max_sequence_length=max_sequence_length)
    with guided(pipe, settings, len(embeddings["prompt_embeds"]), height, width):
        return pipe(**embeddings, guidance_scale=settings.w, height=height, width=width,
                    num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), **options)


def tiny_pipeline(seed=0):
    """The whole pipeline with random weights: text encoders as deep as the real ones, but 32 wide."""
    from diffusers import (AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel,
                           StableDiffusion3Pipeline)
    from transformers import (CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config,
                              T5EncoderModel, T5Tokenizer)
    torch.manual_seed(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    clip = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=32)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((x, -3.0) for x in "\u2581" + letters)]
    t5 = T5Tokenizer(vocab=pieces, extra_ids=0)

    def clip_encoder(layers):
        return CLIPTextModelWithProjection(CLIPTextConfig(
            vocab_size=54, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
            num_attention_heads=4, projection_dim=32, max_position_embeddings=32, bos_token_id=52,
            eos_token_id=53, pad_token_id=53))

    pipe = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16, num_layers=12, attention_head_dim=8, num_attention_heads=4, in_channels=4,
            out_channels=4, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64,
            pos_embed_max_size=16),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),  # as sd3-medium's
        vae=AutoencoderKL(block_out_channels=(8,) * 4, down_block_types=["DownEncoderBlock2D"] * 4,
                          up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=4, norm_num_groups=4,
                          shift_factor=0.0),
        text_encoder=clip_encoder(12), tokenizer=clip, text_encoder_2=clip_encoder(32), tokenizer_2=clip,
        text_encoder_3=T5EncoderModel(T5Config(vocab_size=30, d_model=64, d_kv=8, d_ff=64, num_layers=24,
                                               num_heads=4)),
        tokenizer_3=t5)
    for name in ("transformer", *ENCODERS.values()):
        module = getattr(pipe, name).eval().requires_grad_(False)
        for parameter in module.parameters():  # attention that is far from uniform
            std = parameter.shape[-1]**-0.5 if parameter.dim() > 1 else 0.1
            parameter += torch.randn_like(parameter) * std
    return pipe


def main(prompt="a red seven", model="stabilityai/stable-diffusion-3-medium-diffusers", tiny=False,
         offload=False, out="out/sd3.png", height=None, width=None, steps=28, images=1, seed=0, w=DEFAULTS.w,
         tau_i=DEFAULTS.tau_i, layers="6:8", kappa=DEFAULTS.kappa, tau_c=DEFAULTS.tau_c, alpha=1.0, gamma=1.0,
         K=1, apg=False):
    """Write a picture: `images` under CFG on the left, under ERG on the right. Returns both (B, H, W, 3)."""
    first, _, last = layers.partition(":")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise ValueError(f"layers={layers!r} must be l_min:l_max with l_min < l_max, for example 6:8")
    where = dict(layers_c=DEFAULTS.layers_c) if tau_c != 1 else {}
    if (tau_i, alpha, gamma, K) != (1, 1, 1, 1):  # with I-ERG
        where |= dict(layers=range(int(first), int(last)), kappa=kappa)
    settings = erg.ERG(w=w, tau_i=tau_i, tau_c=tau_c, alpha=alpha, gamma=gamma, K=K,
                       apg=erg.APG() if apg else None, **where)
    if steps < 1:
        raise ValueError(f"steps={steps!r} must be at least 1")
    if tiny:
        pipe = tiny_pipeline()
    else:
        from diffusers import StableDiffusion3Pipeline
        device = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else device
        dtype = torch.float32 if device == "cpu" else torch.float16
        pipe = StableDiffusion3Pipeline.from_pretrained(model, torch_dtype=dtype)
        pipe.enable_model_cpu_offload() if offload else pipe.to(device)
    height, width = height or (128 if tiny else 1024), width or (128 if tiny else 1024)
    options = dict(height=height, width=width, steps=steps, images=images, seed=seed, output_type="np",
                   max_sequence_length=32 if tiny else 256)
    pictures = {f"CFG, w = {w:g}": generate(pipe, prompt, erg.ERG(w=w), **options).images,
                f"ERG, w = {w:g}": generate(pipe, prompt, settings, **options).images}
    draw(pictures, prompt, out)
    return tuple(pictures.values())


def draw(pictures, prompt, out):
    """Columns of images (B, H, W, 3) under their labels."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = len(next(iter(pictures.values())))
    figure, axes = plt.subplots(rows, len(pictures), figsize=(8, 4.3 * rows), squeeze=False,
                                layout="constrained")
    for column, (label, images) in zip(axes.T, pictures.items()):
        column[0].set_title(label)
        for axis, image in zip(column, images):
            axis.imshow(image)
            axis.set_axis_off()
    figure.suptitle(prompt)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    plt.close(figure)
    print(f"wrote {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a red seven")
    parser.add_argument("--model", default="stabilityai/stable-diffusion-3-medium-diffusers",
                        help="on the hub, or a folder")
    parser.add_argument("--tiny", action="store_true", help="random weights, 128 x 128 pixels, no network")
    parser.add_argument("--offload", action="store_true", help="keep on the GPU only the part that runs")
    parser.add_argument("--out", default="out/sd3.png", help="where to write the picture")
    parser.add_argument("--height", type=int, help="pixels, a multiple of 16; 1024, or 128 with --tiny")
    parser.add_argument("--width", type=int, help="pixels, a multiple of 16; 1024, or 128 with --tiny")
    parser.add_argument("--steps", type=int, default=28, help="Euler steps")
    parser.add_argument("--images", type=int, default=1, help="images of the prompt, under each method")
    parser.add_argument("--seed", type=int, default=0, help="of the noise that both start from")
    parser.add_argument("--w", type=float, default=DEFAULTS.w, help="guidance weight of both, greater than 1")
    parser.add_argument("--tau-i", type=float, default=DEFAULTS.tau_i,
                        help="temperature in the denoiser; 1 is off")
    parser.add_argument("--layers", default="6:8", help="l_min:l_max of the denoiser, l_max exclusive")
    parser.add_argument("--kappa", type=float, default=DEFAULTS.kappa,
                        help="I-ERG acts where t > kappa (0 noise, 1 data)")
    parser.add_argument("--tau-c", type=float, default=DEFAULTS.tau_c,
                        help="temperature in the text encoders; 1 is off")
    parser.add_argument("--alpha", type=float, default=1.0, help="weight of the matching term")
    parser.add_argument("--gamma", type=float, default=1.0, help="step size")
    parser.add_argument("--K", type=int, default=1, help="steps of energy attention")
    parser.add_argument("--apg", action="store_true", help="ERG with adaptive projected guidance")
    main(**vars(parser.parse_args()))
