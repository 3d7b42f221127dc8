# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # ERG from scratch, in sixty lines
#
# Entropy Rectifying Guidance (ERG) improves what a diffusion or flow model draws. It asks the same model twice, the
# second time with a spoilt attention, and steps away from the second answer. Here you type it yourself: sixty lines,
# from loading a trained model to a guided sample, without this repository's `erg.py`. Afterwards `erg.py` does the
# same, and every number must agree.
#
# Ten minutes to read, half a minute to run, no GPU. You need to know PyTorch, and that attention is
# $\mathrm{softmax}(q k^\top / \sqrt d)\,v$. Who reads only one of the notebooks should read this one.
#
# The two folded cells fetch the repository, and judge the pictures. Neither counts among the sixty lines, nor do the
# imports.

# %% jupyter={"source_hidden": true} cellView="form"
# @title Find or fetch the repository
# The repository around this notebook; elsewhere (Colab) it is fetched at the commit that this ran with.
import subprocess
import sys
from pathlib import Path

REPOSITORY, COMMIT = "", "f27a04e30e3baa5b30246a4119a9cbf36b7ff51d"
PLACES = (Path.cwd(), *Path.cwd().parents, Path("erg-guidance").resolve())
ROOT = next((path for path in PLACES if (path / "notebooks/drawing.py").is_file()), None)
if ROOT is None:
    if not REPOSITORY:
        raise FileNotFoundError("erg.py is not around this notebook: set REPOSITORY to its address")
    subprocess.run(["git", "clone", "--quiet", REPOSITORY, "erg-guidance"], check=True)
    subprocess.run(["git", "-C", "erg-guidance", "checkout", "--quiet", COMMIT], check=True)
    ROOT = Path("erg-guidance").resolve()
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

# %%
from unittest import mock

import torch
import torch.nn.functional as F
from drawing import show
from tiny_dit import Config, TinyDiT

# %% [markdown]
# ## 1. A digit out of noise
#
# `TinyDiT` is a small text-to-image transformer, trained on coloured MNIST. Its encoder turns a caption into six
# vectors, one a word. Its denoiser is given an image `x`, a time `t` and these vectors.

# %%
torch.set_num_threads(1)  # the model is small: more threads would wait for each other
state = torch.load(ROOT / "weights/mnist.pt", weights_only=True)
model = TinyDiT(Config(**state["config"])).eval().requires_grad_(False)
model.load_state_dict(state["model"])

captions = ["a red seven on blue", "a white three on green", "a yellow eight on black", "a green five on red",
            "a purple two on black", "a white four on blue", "a red nine on green", "a yellow six on red"]
condition = model.encode(captions)  # (8, 6, 96): images, words, width
noise = torch.randn(8, 3, 28, 28, generator=torch.Generator().manual_seed(10))

# %% [markdown]
# The denoiser answers with a velocity, the direction from noise to data. At t = 0 the image is noise, at t = 1 it is
# data. To sample is to follow the velocity from 0 to 1, here in 25 steps.
#
# **Predict**: at which t can you first read the digits?

# %%
def sample(velocity):
    path = [noise]
    for i in range(25):
        x = path[-1]
        path.append(x + velocity(x, i / 25) / 25)
    return path


# %%
path = sample(lambda x, t: model(x, t, condition))
show({f"t = {i / 25:.1f}": path[i] for i in range(0, 26, 5)}, captions)

# %% [markdown]
# At t = 0.4 the white four can be guessed, at t = 0.6 all of them can be read.
#
# The result is uneven: the three is torn, the five and the two are odd, and the nine could be a three. Of the seeds 0
# to 11 we chose 10, because here is something to mend. Most digits of this model need no help.
#
# ## 2. A flat attention
#
# Attention has one number that ERG turns, a temperature $\tau$ on the logits:
# $\mathrm{softmax}(\tau\,q k^\top / \sqrt d)\,v$. With $\tau = 1$ nothing changes. With $\tau$ near 0 all logits are
# near 0, so each query takes the mean of all values. Its attention has the highest entropy that there is, and has
# forgotten where to look.
#
# All of the model's attention goes through one function of PyTorch, `F.scaled_dot_product_attention`, so we put our own
# in its place for a while: no line of the model changes, and the same lines would reach any other model that calls it.
# `calls` keeps the logits of each call, so their number so far tells in which layer we are.

# %%
calls = []  # the logits of each attention call


def tempered(tau, layers, queries=slice(None)):
    """Context: in these layers, these queries attend with temperature tau."""
    def attention(q, k, v):  # (8, heads, tokens, d) each
        logits = q @ k.mT / q.shape[-1] ** 0.5  # (8, heads, queries, keys)
        if len(calls) in layers:
            logits[:, :, queries] *= tau
        calls.append(logits)
        return logits.softmax(dim=-1) @ v
    calls.clear()
    return mock.patch.object(F, "scaled_dot_product_attention", attention)


# %% [markdown]
# The image is cut into 7 x 7 patches. They come first among the tokens, and the six words follow. Only the patches are
# flattened, in layers 2 and 3 of eight. Below is where *one* patch looks, the one in the middle of the white three at
# t = 0.4: bright is much attention. Each layer has four heads.
#
# **Predict**: what does a patch need to see in order to draw a stroke, and what of it is left at $\tau = 0.01$?

# %%
x, t, image, maps = path[10], 10 / 25, slice(0, 49), {}
v = model(x, t, condition)
for tau in (1.0, 0.3, 0.01):
    with tempered(tau, (2, 3), image):
        v_weak = model(x, t, condition)
    heads = torch.cat([calls[n].softmax(dim=-1)[1, :, 24, image] for n in (2, 3)])
    maps[f"tau = {tau}"] = 2 * heads.view(8, 1, 7, 7).sqrt() - 1
    assert torch.allclose(v_weak, v, atol=1e-5) == (tau == 1.0)
print(f"{len(calls)} calls, each of {calls[0].shape[-1]} tokens")
show(maps, [f"layer {n}, head {head}" for n in (2, 3) for head in range(4)])

# %% [markdown]
# In layer 2 each head looks at one neighbour: to the left, below, above, to the right. In layer 3 the heads look along
# the stroke. At $\tau = 0.3$ the neighbours are still there. At 0.01 a patch sees everything alike, and nothing in
# particular.
#
# So `v_weak` is the velocity of a model that no longer knows its neighbours. From any velocity you can read which
# picture the model expects at t = 1: it is `x + (1 - t) * v`.
#
# **Predict**: what will the weak model get wrong, the colours, the place of the digit, or its strokes?

# %%
strong, weak = x + (1 - t) * v, x + (1 - t) * v_weak
show({"x at t = 0.4": x, "strong": strong, "weak": weak, "difference, × 2": 2 * (strong - weak)}, captions)
print(f"the flat layers change v by {(v - v_weak).norm() / v.norm():.0%}")

# %% [markdown]
# Colours and place stay, and the strokes fall apart. So the difference, in the last row, is a drawing of whole strokes.
# It is 22 % of the velocity.
#
# ## 3. The contrast
#
# Guidance walks on from the weak prediction through the strong one, and beyond:
#
# $$v = w\,v_{strong} + (1 - w)\,v_{weak} = v_{strong} + (w - 1)\,(v_{strong} - v_{weak})$$
#
# With w = 1 it is off. Here w = 2. The flat layers act only where t > $\kappa$ = 0.2; before that, attention is
# ordinary. This is I-ERG, the image's half of the method. Its weak prediction has the same caption as the strong one.
#
# **Predict**: which of the broken digits will I-ERG mend?

# %%
def guided(w, weak_condition, kappa=0.2):
    def velocity(x, t):
        v = model(x, t, condition)
        with tempered(0.01 if t > kappa else 1.0, (2, 3), image):
            v_weak = model(x, t, weak_condition)
        return w * v + (1 - w) * v_weak
    return velocity


# %%
assert torch.allclose(sample(guided(1.0, condition))[-1], path[-1], atol=1e-4)  # w = 1 is off
i_erg = sample(guided(2.0, condition))[-1]
show({"no guidance": path[-1], "I-ERG": i_erg}, captions)

# %% [markdown]
# Strokes close and get thicker, and the nine becomes a nine. The five and the two stay odd, and the three stays open at
# the top. With the same caption on both sides, nothing pushes towards what the caption says.
#
# ## 4. The encoder
#
# The other half, C-ERG, spoils what the model knows of the *caption*. The caption encoder has three layers of attention
# of its own. We flatten all three, for all words. The denoiser stays as it is.
#
# **Predict**: if the weak encoding alone is drawn, without any guidance, what will you see?

# %%
with tempered(0.01, range(3)):
    weak_condition = model.encode(captions)
print(f"the encoding changes by {(weak_condition - condition).norm() / condition.norm():.0%}")
alone = sample(lambda x, t: model(x, t, weak_condition))[-1]
show({"caption": path[-1], "weak encoding": alone}, captions)

# %% [markdown]
# Digits, but other ones, in other colours: a classifier finds three of eight digits as asked, and one colour. The weak
# encoding has lost what the caption says, not how to draw. That is why the two halves belong together: one contrast is
# about strokes, the other about the caption.
#
# ## 5. ERG
#
# Both at once: the weak prediction gets the weak encoding at all t, and flat attention where t > 0.2. With $\kappa = 1$
# no step is left to flatten, which makes C-ERG alone, and with an empty caption classifier-free guidance (CFG). All of
# them ask the model twice a step.
#
# **Predict**: which row follows its captions best?

# %%
null = model.encode([""] * 8)
cfg = sample(guided(2.0, null, kappa=1.0))[-1]
c_erg = sample(guided(2.0, weak_condition, kappa=1.0))[-1]
erg_sample = sample(guided(2.0, weak_condition))[-1]
show({"no guidance": path[-1], "CFG": cfg, "I-ERG": i_erg, "C-ERG": c_erg, "ERG": erg_sample}, captions)

# %% jupyter={"source_hidden": true} cellView="form"
# @title What a classifier reads in these pictures, and what the text says
from toy.data import DIGITS, INKS, PAPERS
from toy.sampling import WEIGHTS, load_checkpoint

classifier = load_checkpoint(WEIGHTS / "mnist.pt")[1]
WORDS = [list(words) for words in (DIGITS, INKS, PAPERS)]
asked = [[WORDS[i].index(caption.split()[at]) for caption in captions] for i, at in ((0, 2), (1, 1), (2, 4))]


def read(images):
    """How many digits, inks and papers are those of the captions; the digits that were read."""
    with torch.no_grad():
        found = [logits.argmax(dim=-1) for logits in classifier(images.clamp(-1, 1))]
    return [(a == torch.tensor(b)).sum().item() for a, b in zip(found, asked)], found[0].tolist()


def ink(images):
    """The share of pixels that are nearer to the brightest than to the corner's colour."""
    bright = (images - images[:, :, :1, :1]).square().sum(1).sqrt()
    return (bright > bright.amax((1, 2), keepdim=True) / 2).float().mean((1, 2))


ROWS = {"no guidance": path[-1], "weak encoding": alone, "CFG": cfg, "I-ERG": i_erg, "C-ERG": c_erg,
        "ERG": erg_sample}
for name, images in ROWS.items():
    (digits, inks, papers), numbers = read(images)
    print(f"{name:13} as asked: {digits} digits, {inks} inks, {papers} papers of 8; read as {numbers}; "
          f"ink on {ink(images).mean():.1%}")
right = {name: read(images)[0] for name, images in ROWS.items()}
assert right["no guidance"] == [7, 8, 8] and read(path[-1])[1][6] == 3 and right["weak encoding"] == [3, 1, 1]
assert all(right[name] == [8, 8, 8] for name in ("CFG", "I-ERG", "C-ERG", "ERG"))
assert all(ink(erg_sample).mean() > ink(images).mean() for images in (path[-1], cfg, i_erg, c_erg))
assert round(100 * ((v - v_weak).norm() / v.norm()).item()) == 22 and 0.01 < heads.min() < heads.max() < 0.03
for tau in (1.0, 0.3):  # patch 24 looks at its neighbours to the left, below, above, to the right
    with tempered(tau, (2, 3), image):
        model(x, t, condition)
    assert calls[2][1, :, 24, image].argmax(dim=-1).tolist() == [23, 31, 17, 25]
claims = [line.split("|") for line in (ROOT / "experiments/CLAIMS.md").read_text().splitlines()]
mnist = {row[1].strip(): row[3] for row in claims if len(row) > 3}  # of thousands of pictures
assert "**does not hold**" in mnist["ERG follows the prompt more often than CFG"]
assert "**holds**" in mnist["ERG has a lower Frechet distance than no guidance"]

# %% [markdown]
# CFG, C-ERG and ERG straighten the seven, the five and the two. I-ERG closes strokes: the nine is mended in all four
# rows, and the three has fewer holes with I-ERG than with C-ERG. ERG has both, and the thickest strokes. The classifier
# reads all eight digits as asked in each guided row, and seven without guidance.
#
# Eight pictures cannot tell which is better. [Thousands](../experiments/CLAIMS.md) can: on MNIST ERG beats no guidance,
# and CFG follows a full caption more often than ERG. ERG has its use where CFG is not at hand: it needs no training
# with empty captions, and I-ERG needs no caption at all.
#
# ## 6. The same with `import erg`
#
# You have written the whole method: sixty lines, of which 11 replace attention and 7 guide. `erg.py` adds what a model
# of your own needs: both predictions in one batch, an error where nothing was flattened, the other knobs of the paper.
# Its names are those of the paper, so `tempered` is `erg.rectify`, and $\tau$ is `tau_i` in the image and `tau_c` in
# the caption.

# %%
import erg
from toy.sampling import generate, prepare

with erg.rectify(model, tau=0.01, layers=(2, 3), queries=image):
    assert torch.allclose(model(x, t, condition), v_weak, atol=1e-5)
ordinary, spoilt = erg.encode(model.encode, captions, tau=0.01)
assert torch.equal(ordinary, condition) and torch.allclose(spoilt, weak_condition, atol=1e-5)

settings = erg.ERG(w=2.0, tau_i=0.01, layers=range(2, 4), queries=image, kappa=0.2, tau_c=0.01)
guidance = erg.Guidance(settings, spoilt)
theirs = sample(lambda x, t: guidance(model, x, t, condition))[-1]
knobs = dict(w=2.0, tau_i=0.01, layers=range(2, 4), kappa=0.2, tau_c=0.01)
toy = generate(model, captions, prepare("erg", **knobs), steps=25, seed=10)
print(f"largest difference of a pixel: erg {(theirs - erg_sample).abs().max():.0e}, "
      f"toy {(toy - erg_sample.clamp(-1, 1)).abs().max():.0e}")
assert torch.allclose(theirs, erg_sample, atol=1e-4)
assert torch.allclose(toy, erg_sample.clamp(-1, 1), atol=1e-4)  # what sample_toy.py runs

# %% [markdown]
# They agree up to rounding: PyTorch's fused attention sums in another order than our softmax.
#
# Where to go on: [why a temperature, and what it does to an energy](1_energy.ipynb); [when a weak prediction
# helps](2_guidance_in_2d.ipynb); [every knob, measured](3_transformer.ipynb); [a model of your
# own](4_your_own_model.ipynb).
#
# ## 7. Real weights
#
# On a GPU, with `pip install diffusers transformers accelerate`, the same lines guide DiT-XL/2, which draws the 1,000
# classes of ImageNet. `pipe` is the unmodified pipeline of diffusers, and runs both predictions in one batch: `rows`
# are the weak one's. It counts time from 1000 (noise) to 0. As in the paper, the weak prediction has no class, and
# attention is flat in layers 12 to 14 of 28 where t > 0.3, with w = 5. The cell was tested with a small model of random
# weights, and never ran with the real ones. For Stable Diffusion 3 there is [`examples/sd3.py`](../examples/sd3.py).
#
# **Predict**: if your machine can run it, where will the two rows differ, in the objects or in their details?

# %%
def compare(pipe, labels, steps=50, settings=erg.PRESETS["dit-xl-2"]):
    """Images of the classes `labels` from the same noise, under CFG and under ERG."""
    n = len(labels)

    def draw():
        images = pipe(class_labels=labels, guidance_scale=settings.w, num_inference_steps=steps,
                      generator=torch.Generator().manual_seed(0), output_type="np").images
        return 2 * torch.from_numpy(images).permute(0, 3, 1, 2) - 1  # (n, 3, 256, 256)

    after_kappa = lambda x, timestep, **options: 1 - timestep.max().item() / 1000 > settings.kappa
    cfg = draw()
    with erg.rectify(pipe.transformer, tau=settings.tau_i, layers=settings.layers, rows=slice(n, 2 * n),
                     batch=2 * n, when=after_kappa):
        return {"CFG": cfg, "ERG": draw()}


try:
    if not torch.cuda.is_available():
        raise OSError("no GPU")
    from diffusers import DiTPipeline
    pipe = DiTPipeline.from_pretrained("facebook/DiT-XL-2-256", torch_dtype=torch.float16).to("cuda")
except (ImportError, OSError) as error:
    print("skipped:", error)
else:
    show(compare(pipe, [207, 360, 387, 974, 88, 979, 417, 279]))

# %% [markdown]
# ## What did not work
#
# - **Beating CFG on these digits.** With full captions CFG follows the prompt more often, on two trained models, with
#   the best w of each ([claims](../experiments/CLAIMS.md)).
# - **A seed without a choice.** With most of the twelve seeds the rows look much alike, because the model draws well
#   without guidance.
# - **I-ERG alone for what the caption says.** It made the nine, and left the five and the two as they were.
# - **Sharper instead of flatter.** With $\tau = 3$ in `guided`, I-ERG adds dots to the eight and the two, and the nine
#   is read as a seven.
#
# ## Three things to try
#
# 1. In the last figure, replace both 2.0 by 8.0. Which of CFG and ERG burns first?
#    <details><summary>Answer</summary>
#
#    ERG: 42 % of its pixels leave the range of the data by more than 0.1, against 3 % under CFG, and its five turns
#    turquoise. Two contrasts add up, so ERG wants a smaller w here.
#    </details>
# 2. In section 4, flatten one layer of the encoder only: `[0]`, `[1]` or `[2]` for `range(3)`. Where is the caption
#    lost?
#    <details><summary>Answer</summary>
#
#    In layer 0: alone it gives the same eight digits as all three together. With layer 1 or 2 the pictures stay as
#    asked, seven digits of eight, as without guidance.
#    </details>
# 3. In `guided`, flatten layers `(6, 7)` instead of `(2, 3)`. What does I-ERG change now?
#    <details><summary>Answer</summary>
#
#    Colours instead of strokes: 42 % of the pixels leave the range by more than 0.1, the seven turns orange, and the
#    three stays torn. The paper takes layers in the middle.
#    </details>
