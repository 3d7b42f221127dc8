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
# # 4. Your own model
#
# You have a model that nobody here has seen, and want to guide it by Entropy Rectifying Guidance (ERG). This notebook goes
# from the list of its attention calls to a result that you have checked, first on a transformer written and trained below,
# then on an unmodified Stable Diffusion 3 pipeline at toy size, and it makes on purpose the mistakes that give no error. About
# 30 minutes to read, a minute to run. You need to know PyTorch, what attention is, and guidance as in notebook 2.
#
# | step | question | tool |
# |---|---|---|
# | 1. list | Which attention calls does a forward make, and of how many tokens? | `erg.attention_calls` |
# | 2. choose | Which layers matter, and when? | `middle_third()`, `layer_effects` |
# | 3. say whose | Which rows of the batch are the negative's, which queries are the image's? | `rows=`, `queries=` |
# | 4. rectify | Where does the sampler call the model, and how does it count time? | `erg.rectify`, `when=` |
# | 5. check | Is it what it should be, and only there? | a slow softmax, and a fingerprint |
# | 6. guide | Is it better than what you had? | `erg.Guidance`, or the pipeline itself |
#
# *Conventions*: $t = 0$ is noise, $t = 1$ is data, $v$ = data - noise; $w = 1$ is off; $\tau < 1$ flattens attention, $\tau = 0$
# makes it uniform; layers are `range(l_min, l_max)`, without `l_max`.
#
# The model is a small transformer for the shipped 8 x 8 digits: 16 patches of four pixels, and in front of them one token for
# the class. It knows nothing of ERG. The one demand is in `Attention.forward`: **attention is
# `F.scaled_dot_product_attention`**. QK-norm in front of it, as in SD3.5, is welcome; pitfall 1 is about it.

# %%
# The repository around this notebook; elsewhere (Colab) it is fetched at the commit that this ran with.
import subprocess
import sys
from pathlib import Path

REPOSITORY, COMMIT = "", "a594aba65f71863288f43f9bcd06a58c6467b9ce"
PLACES = (Path.cwd(), *Path.cwd().parents, Path("erg-guidance").resolve())
ROOT = next((path for path in PLACES if (path / "notebooks/drawing.py").is_file()), None)
if ROOT is None:
    if not REPOSITORY:
        raise FileNotFoundError("erg.py is not around this notebook: set REPOSITORY to its address")
    subprocess.run(["git", "clone", "--quiet", REPOSITORY, "erg-guidance"], check=True)
    subprocess.run(["git", "-C", "erg-guidance", "checkout", "--quiet", COMMIT], check=True)
    ROOT = Path("erg-guidance").resolve()
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import copy
import itertools
import math
import os
import textwrap
import time
from unittest import mock

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from torch import nn

import erg
from drawing import COLOURS, QUICK, label, pictures, style
from experiments.diagnostics import fading_layers, layer_effects
from toy.data import load

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
try:
    import transformers  # noqa: F401
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline  # noqa: F401
    from examples import sd3
except ImportError as error:
    sd3, reason = None, f"skipped ({error}): pip install diffusers transformers"
style()
torch.set_num_threads(1)  # training then takes the same way again on the same machine
FADE = LinearSegmentedColormap.from_list("fade", ["#ecc6da", COLOURS["I-ERG"], "#4a1238"])
FADE.set_under("#ececec")


def stripes(ax, change, names, title, top, border):
    """A square for each row (down) and step (across), grey where nothing changed; a line at t = kappa."""
    ax.pcolormesh(change, cmap=FADE, vmin=1e-12, vmax=top, edgecolor="white", linewidth=1.5)
    ax.axvline(border, color="#222222", lw=1.2, ls=(0, (4, 3)))
    ax.set(yticks=torch.arange(len(names)) + 0.5, yticklabels=names, xticks=[], title=title)
    ax.invert_yaxis()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


# %%
class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, head = heads, width // heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.q_norm, self.k_norm = nn.RMSNorm(head), nn.RMSNorm(head)

    def project(self, x):  # (B, S, W) -> each (B, H, S, D)
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for layer in (self.q, self.k, self.v))
        return self.q_norm(q), self.k_norm(k), v

    def forward(self, x):
        return self.out(F.scaled_dot_product_attention(*self.project(x)).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(),
                                 nn.Linear(2 * width, width))

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class YourModel(nn.Module):
    def __init__(self, width=64, depth=6, heads=2):
        super().__init__()
        self.classes = nn.Embedding(11, width)  # class 10: none
        self.positions = nn.Parameter(torch.randn(16, width) / 2)
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.patch_in, self.patch_out = nn.Linear(4, width), nn.Linear(width, 4)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])

    def forward(self, x, t, classes):  # (B, 1, 8, 8), (B,), (B,)
        patches = self.patch_in(F.unfold(x, 2, stride=2).mT) + self.positions  # (B, 16, W)
        tokens = torch.cat([self.classes(classes)[:, None], patches], dim=1) + self.time(t[:, None])[:, None]
        tokens = self.norm(self.blocks(tokens))  # (B, 17, W)
        return F.fold(self.patch_out(tokens[:, 1:]).mT, (8, 8), 2, stride=2)


# %%
digits = load("digits")
data, classes = digits.pixels[:, None].float() / 127.5 - 1, digits.labels  # (1437, 1, 8, 8) in [-1, 1]


def train(model, steps, batch=64, rate=3e-3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    losses = []
    for _ in range(steps):
        rows, t, noise = torch.randint(len(data), (batch,)), torch.rand(batch), torch.randn(batch, 1, 8, 8)
        given = torch.where(torch.rand(batch) < 0.15, 10, classes[rows])  # for CFG, some are told no class
        x_t = (1 - t[:, None, None, None]) * noise + t[:, None, None, None] * data[rows]
        loss = (model(x_t, t, given) - (data[rows] - noise)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


torch.manual_seed(0)
began, model = time.time(), YourModel()
losses = train(model, 25 if QUICK else 500)
model.eval().requires_grad_(False)
print(f"{len(losses)} steps in {time.time() - began:.0f} s; loss at first {sum(losses[:20]) / 20:.2f}, "
      f"at last {sum(losses[-20:]) / 20:.2f}\n")

n = 16 if QUICK else 64
t, NONE, patches = torch.full((n,), 0.5), torch.tensor([10]), slice(1, None)
noise = torch.randn(300, 1, 8, 8, generator=torch.Generator().manual_seed(1))[:20 if QUICK else 300]
wanted = torch.arange(len(noise)) % 10
x, c = 0.5 * noise[:n] + 0.5 * data[:n], classes[:n]  # x_t at t = 0.5, and its class
calls = erg.attention_calls(model, x, t, c)
print(calls)

# %% [markdown]
# **Step 1: list.** Six calls, all self-attention, of 17 tokens: the class first, then the patches. Their numbers are what
# `layers` means.
#
# **Step 2: choose the layers.** First look at what there is to flatten: above, the attention of each layer, rows are queries
# and columns are keys, averaged over 64 digits at $t = 0.5$ and over the heads, with the mean entropy of a row, between 0 (one
# key takes all) and $\log 17 = 2.83$ nats (uniform); bright is much. But a pattern that is lost need not be missed. So below is
# what the prediction loses, early and late in sampling, for each choice of layers from `l_min` (down) to `l_max` (across): the
# norm of the change of $v$ orthogonal to $v$, in per cent of the norm of $v$, at $\tau = 0.01$.
#
# **Predict**: does the entropy of *every* row rise as $\tau$ falls? Which single layer (the diagonal) matters most? The list
# suggests the middle third, `range(2, 4)`: does its effect grow or fade from $t = 0.3$ to $t = 0.9$?

# %%
def watch(q, k, v, **options):
    logits.append(q @ k.mT / q.shape[-1] ** 0.5)  # (B, H, S, N)
    return F.scaled_dot_product_attention(q, k, v, **options)


def entropy(p):
    return torch.special.entr(p).sum(-1)  # -sum p log p, in nats


logits = []
with erg.rectify(model, attention=watch):  # any function in the place of attention; this one only looks
    model(x, t, c)
effects, middle = layer_effects(model, noise[:n], wanted[:n], queries=patches,
                               longest=2 if QUICK else None), calls.middle_third()  # 21 ranges
above, below = plt.figure(figsize=(9.6, 6.4)).subfigures(2, 1, height_ratios=[1, 2.4])
for i, ax in enumerate(above.subplots(1, 7)):
    p = (logits[i] if i < 6 else 0.01 * logits[2]).softmax(-1)
    ax.imshow(p.mean((0, 1)), norm=PowerNorm(0.6, 0, 0.35))
    ax.set(xticks=[], yticks=[], xlabel=f"{entropy(p).mean():.2f} nats")
    ax.set_title(f"layer {i}" if i < 6 else r"layer 2, $\tau$ = 0.01")
    ax.spines[:].set_visible(False)
for ax, when, then in zip(below.subplots(1, 2), ("early", "late"), (0.3, 0.9)):
    square = torch.full((6, 6), torch.nan)
    for e in effects:
        change = square[e.layers[0], e.layers[-1]] = 100 * getattr(e, when)
        ax.text(e.layers[-1], e.layers[0], f"{change:.0f}", ha="center", va="center", size=12,
                color="wk"[change > 35])
    ax.imshow(square, vmin=0, vmax=70)
    for colour, lw in (("white", 7), (COLOURS["ERG"], 3)):
        ax.add_patch(plt.Rectangle((middle[-1] - 0.5, middle[0] - 0.5), 1, 1, fill=False, lw=lw, ec=colour))
    ax.set(xticks=range(6), xticklabels=range(1, 7), yticks=range(6), xlabel="l_max", ylabel="l_min",
           title=f"{when}, t = {then}: change of the prediction in %")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
label(ax, -0.3, 4.5, "framed: the\nmiddle third", COLOURS["ERG"], fontsize=11)
plt.show()
for sharp, flat in ((1.0, 0.3), (0.3, 0.01), (0.01, 0.0)):  # every head, every row
    assert all((entropy((flat * z).softmax(-1)) >= entropy((sharp * z).softmax(-1)) - 1e-5).all()
               for z in logits)
early, late = ({e.layers: getattr(e, when) for e in effects} for when in ("early", "late"))
assert QUICK or early[range(4, 6)] < early[range(0, 2)] and early[range(3, 6)] < late[range(3, 6)]
fading = fading_layers(effects)
print("largest logit of each layer:", ", ".join(f"{z.abs().max():.1f}" for z in logits))
print(f"chosen: {middle}, effect {early[middle]:.0%} early, {late[middle]:.0%} late; fading_layers suggests "
      f"{fading}")

# %% [markdown]
# Every row's entropy rises, in every head of every layer: $\mathrm{d}H/\mathrm{d}\tau = -\tau\,\mathrm{Var}_p(z) \le 0$, with the
# logits $z$ and their softmax $p$. QK-norm holds the logits of all layers to a few units (printed), so one $\tau$ does for all.
# Early on the first layers matter most and the last ones little, and the effect of the last three grows; here that of the middle
# third grows, too. The rule of `fading_layers` (a large early effect that does not grow) suggests a range of its own; notebook 3
# tells how far to trust either. We go on with the middle third, where most will begin, and look at both in step 6.
#
# **Step 3: say whose.** One forward carries the positive and the negative: `rows` are the negative's, and there is no
# convention: `erg.Guidance` puts them last, the Stable Diffusion pipelines of diffusers first. `queries` are the image's
# tokens, here all but the first. **Step 4: rectify** is one `with`. **Step 5: check** is the reason for this notebook. Four
# questions answer whether it is right, on any model:
#
# 1. Are the positive rows bit-equal to a plain forward, and the negative ones not?
# 2. Is it the attention that you meant? A slow softmax that is patched in by hand knows nothing of `erg.py`.
# 3. At $\tau = 0$, does every query get the mean of the values?
# 4. Is the model afterwards as it was?
#
# The last lines make two mistakes on purpose: the wrong half of the rows, and `queries` forgotten. Which of the four
# questions finds them?

# %%
def far(v, plain):
    return ((v - plain).norm() / plain.norm()).item()


def rectified(model, options, *args, **kwargs):
    with erg.rectify(model, **options):
        return model(*args, **kwargs)


def by_hand(tau, layers, queries=slice(None)):
    """Context for one forward: in these attention calls, softmax(tau q k^T / sqrt(d)) v in so many words."""
    fused, number = F.scaled_dot_product_attention, itertools.count()

    def attend(query, key, value, **options):
        if next(number) not in layers:
            return fused(query, key, value, **options)
        logits = query @ key.mT / query.shape[-1] ** 0.5  # (B, H, S, N)
        logits[..., queries, :] *= tau
        return logits.softmax(-1) @ value

    return mock.patch.object(F, "scaled_dot_product_attention", attend)


# %%
null = x, t, NONE.expand(n)
both = torch.cat([x, x]), torch.cat([t, t]), torch.cat([c, null[2]])  # 2n rows, the negative's last
where, batch = dict(layers=middle, queries=patches), dict(rows=slice(n, 2 * n), batch=2 * n)
plain = model(*both)
v_pos, v_neg = rectified(model, dict(tau=0.01, **where, **batch), *both).chunk(2)
assert torch.equal(v_pos, plain[:n]) and far(v_neg, plain[n:]) > 0.01  # 1
for tau in (0.0, 0.01, 0.3, 3.0):
    with by_hand(tau, middle, patches):
        slow = model(*null)
    difference = far(rectified(model, dict(tau=tau, **where), *null), slow)
    print(f"tau = {tau:<4}  off from the slow softmax by {difference:.0e}, from plain by "
          f"{far(slow, plain[n:]):.0%}")
    assert difference < 1e-5  # 2
h, attention = torch.randn(n, 17, 64), model.blocks[2].attention
mean = attention.out(attention.v(h).mean(1, keepdim=True)).expand(n, 17, 64)
torch.testing.assert_close(rectified(attention, dict(tau=0.0), h), mean)  # 3
assert torch.equal(model(*both), plain)  # 4

wrong = rectified(model, dict(tau=0.01, rows=slice(0, n), batch=2 * n, **where), *both)
forgotten = rectified(model, dict(tau=0.01, layers=middle, **batch), *both)
print(f"wrong rows:        no error; the positive prediction moves by {far(wrong[:n], plain[:n]):.0%}")
print(f"queries forgotten: no error; the negative prediction is off by {far(forgotten[n:], v_neg):.1%}")
assert not torch.equal(wrong[:n], plain[:n]) and far(forgotten[n:], v_neg) > 1e-4

# %% [markdown]
# Question 1 finds the wrong rows, question 2 the forgotten `queries`: both are legal calls, and no error can know what you
# meant. The rest of the notebook relies on these two checks.
#
# **Step 6: guide.** Four ways to draw the same ten classes from the same noise, $w = 2$ where there is guidance: CFG (the
# negative has no class), ERG (no class, and two layers flattened where $t > 0.2$), I-ERG alone (the same class, two layers
# flattened). Three numbers judge 300 digits each: the share that the nearest real digit reads as the class asked for, the
# distance to it (fidelity: small is good), and the distance between two digits of one class (diversity: large is good, as
# long as they are digits); distances are Euclidean, over 64 pixels in [-1, 1]. Below the figure, `erg.Guidance` is checked
# against the same step in so many words.
#
# **Predict**: by how much does each beat no guidance, and does any of them win in all three numbers?

# %%
def sample(settings, steps=4 if QUICK else 25):
    x, guidance = noise, erg.Guidance(settings, None if settings.negative == "same" else NONE)
    for i in range(steps):
        x = x + guidance(model, x, i / steps, wanted) / steps
    return x.clamp(-1, 1)


def judge(x, asked):
    distance, nearest = torch.cdist(x.flatten(1), data.flatten(1)).min(1)
    within = torch.stack([torch.pdist(x[asked == k].flatten(1)).mean() for k in range(10)])
    return (classes[nearest] == asked).float().mean().item(), distance.mean().item(), within.mean().item()


flat, test = dict(tau_i=0.01, queries=patches, kappa=0.2), load("digits", split="test")
HEADS = "read as\nasked", "to the\nnearest", "between\ntwo"
runs = {"no guidance": erg.ERG(w=1), "CFG": erg.ERG(w=2), "ERG": erg.ERG(w=2, layers=middle, **flat),
        "I-ERG": erg.ERG(w=2, layers=middle, negative="same", **flat),
        f"ERG, {fading}": erg.ERG(w=2, layers=fading, **flat)}
made = {"real images": test.pixels[:, None].float() / 127.5 - 1}
made |= {name: sample(settings) for name, settings in runs.items()}
score = {name: judge(y, test.labels if name == "real images" else wanted) for name, y in made.items()}
figure, axes = plt.subplots(5, 1, figsize=(10, 5))
for ax, name in zip(axes, made):
    real = name == "real images"
    pictures(ax, torch.stack([made[name][(test.labels if real else wanted) == k][0] for k in range(10)]))
    label(ax, -3, 3.5, name, COLOURS[name], ha="right", fontsize=11)
    for at, text, head in zip((96, 109, 122), "{:.0%} {:.2f} {:.2f}".format(*score[name]).split(), HEADS):
        label(ax, at, 3.5, text, "#222222", fontweight="normal", fontsize=11, ha="center")
        label(ax, at, -2, head if real else "", "#666666", fontweight="normal", ha="center", va="bottom")
plt.show()
# before kappa and behind it, what erg.Guidance does, in so many words
for time_t, tau in ((0.1, 1.0), (0.5, 0.01)):
    x_t, now = noise[:n], torch.full((n,), time_t)
    with by_hand(tau, middle, patches):
        v_neg = model(x_t, now, NONE.expand(n))
    v = 2 * model(x_t, now, wanted[:n]) - v_neg  # eq. 10 with w = 2
    assert far(erg.Guidance(runs["ERG"], NONE)(model, x_t, time_t, wanted[:n]), v) < 1e-5
for name in runs:
    print("{:17} read as asked {:.0%}, to the nearest {:.2f}, between two {:.2f}".format(name, *score[name]))
best = dict.fromkeys(("no guidance", "CFG", "ERG"), math.inf)
for name in [*best] * (3 if QUICK else 12):
    began = time.perf_counter()
    erg.Guidance(runs[name], NONE)(model, noise[:n], 0.5, wanted[:n])
    best[name] = min(best[name], time.perf_counter() - began)
print("a step of 64 digits:", ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in best.items()))
assert QUICK or min(score["CFG"][0], score["ERG"][0]) > score["no guidance"][0] + 0.02
# closer, and less diverse
assert QUICK or score["CFG"][1] < score["ERG"][1] and score["CFG"][2] < score["ERG"][2]

# %% [markdown]
# None wins in all three: CFG and ERG both draw what was asked, CFG comes closer to real digits, ERG keeps more of the
# diversity, at about the price of CFG (printed). I-ERG alone has no class to leave behind, and reads less well. Whether a
# trade is worth it is for your own measure to say; three numbers on 8 x 8 digits settle nothing about your model. If it has a
# text encoder, C-ERG is one line more: `condition, negative = settings.encode(encoder, tokens)`.
#
# **A pipeline of diffusers.** Nobody lets you into its sampling loop, so the `with` goes around the call, and `when` is asked
# at the start of each forward. For Stable Diffusion 3: of the 2n rows **the first n are the negative's**, its image tokens
# come before the text's, and `timestep` runs from 1000 (noise) to 0, so $t$ = 1 - timestep / 1000. The pipeline below has
# the real one's parts and schedule (28 steps, shift 3), but 12 small blocks of random weights: it makes textures, no
# pictures, and everything that can be checked can be checked on it. C-ERG comes first, in `weak_embeddings`.
#
# The check is a fingerprint: a hook keeps the inputs and outputs of all forwards, and each is compared, row by row, with a
# plain forward of the same inputs.
#
# **Predict**: two images, so four rows, and 28 steps: which of the 112 squares will be coloured if $\kappa = 0.2$?

# %%
def fingerprint(model, run):
    """What run() returns, and how far each row of each forward is from a plain one, (rows, forwards)."""
    kept, first = [], lambda out: out[0] if isinstance(out, tuple) else out
    handle = model.register_forward_hook(lambda _, *forward: kept.append(forward), with_kwargs=True)
    try:
        result = run()
    finally:
        handle.remove()
    plain = [first(model(*args, **kwargs)).flatten(1) for args, kwargs, _ in kept]
    changes = [(first(out).flatten(1) - v).norm(dim=1) / v.norm(dim=1) for (*_, out), v in zip(kept, plain)]
    return result, torch.stack(changes, dim=1)


STEPS = 6 if QUICK else 28


def textures():
    return pipe(**embeddings, guidance_scale=5.0, height=64, width=96, num_inference_steps=STEPS,
                output_type="latent", generator=torch.Generator().manual_seed(0)).images


def make(tau):  # 64 x 96 pixels are 4 x 6 = 24 image tokens
    with erg.rectify(pipe.transformer, tau=tau, layers=range(6, 8), rows=slice(0, 2), batch=4,
                     queries=slice(0, 24), when=lambda timestep,
                     **kwargs: 1 - timestep[0].item() / 1000 > 0.2):
        return textures()


if sd3 is None:
    print(reason)
else:
    pipe, prompts = sd3.tiny_pipeline(), ["a red seven", "a blue two"]
    pipe.set_progress_bar_config(disable=True)
    embeddings = sd3.weak_embeddings(pipe, prompts, erg.PRESETS["sd3-medium"], max_sequence_length=16)
    latents, change = fingerprint(pipe.transformer, lambda: make(0.01))
    times = 1 - pipe.scheduler.timesteps / 1000
    figure, ax = plt.subplots(figsize=(9.2, 2.7))
    title = (f"What I-ERG changed in each of {STEPS} forwards: grey is nothing, the darkest "
             f"{change.max():.0%} of v")
    names, border = ["negative 1", "negative 2", "positive 1", "positive 2"], (times <= 0.2).sum()
    stripes(ax, change, names, title, change.max(), border)
    ax.set(xticks=torch.arange(0, STEPS, 3) + 0.5, xticklabels=[f"{t:.2f}" for t in times[::3]],
           xlabel="t of the step")
    plt.show()

# %%
if sd3 is not None:
    assert (change[2:] == 0).all() and torch.equal(change[:2] > 0, (times > 0.2).expand(2, STEPS))
    print(f"{(times <= 0.2).sum()} of {STEPS} steps, {(times <= 0.2).float().mean():.0%}, are over before "
          "0.2")
    y = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    # the sampler, written out
    for timestep, step in zip(pipe.scheduler.timesteps, pipe.scheduler.sigmas.diff()):
        v = {}
        for sign, tau in (("", 1.0), ("negative_", 0.01 if 1 - timestep / 1000 > 0.2 else 1.0)):
            prompt, pooled = embeddings[f"{sign}prompt_embeds"], embeddings[f"{sign}pooled_prompt_embeds"]
            with by_hand(tau, (6, 7), queries=slice(0, 24)):
                v[sign] = pipe.transformer(y, prompt, pooled, timestep.expand(2)).sample
        y = y + step * (5 * v[""] - 4 * v["negative_"])  # eq. 10 with w = 5
    plain = textures()
    print(f"off from the sampler written out by {far(latents, y):.0e}, from C-ERG alone by "
          f"{far(latents, plain):.0%}")
    assert far(latents, y) < 1e-3 < far(latents, plain) and torch.equal(make(1.0), plain)

# %% [markdown]
# The upper right block and nothing else. The shifted schedule spends 43 % of its steps before $t = 0.2$: kappa is a time, not a
# share of the steps. The latents are those of a sampler written out in a few lines with a slow softmax, and $\tau = 1$ gives
# the pipeline's own, bit by bit. Other pipelines want other `rows`, or `second_forward` of `examples/pipelines.py`; `examples/MODELS.md` has the lines.
#
# ## Pitfall 1: a hook before QK-norm
#
# Listing 1 of the paper tempers attention by a hook that multiplies the query *projection* by $\tau$. For text encoders
# without QK-norm that is the same as $\tau$ in the softmax. But QK-norm comes after the projection, and divides by the norm of
# what it is given.
#
# **Predict**: the two layers of the digits' model, flattened by the hook and by `erg.rectify`. How far does each move the
# prediction at $\tau = 0.1$? And what will the hook do as $\tau$ goes to $10^{-4}$, where rectifying has nothing left to flatten?

# %%
def hooked(model, projections, tau, *args):
    handles = [p.register_forward_hook(lambda module, inputs, output: tau * output) for p in projections]
    try:
        return model(*args)
    finally:
        for handle in handles:
            handle.remove()


queries, v = [model.blocks[i].attention.q for i in middle], model(x, t, c)
taus = [10 ** (-i / 8) for i in range(1, 17 if QUICK else 33)]
hook = [far(hooked(model, queries, tau, x, t, c), v) for tau in taus]
after = [far(rectified(model, dict(tau=tau, layers=middle), x, t, c), v) for tau in taus]
figure, ax = plt.subplots(figsize=(8, 4.4))
for y, colour, beside in ((after, COLOURS["I-ERG"], 0.35), (hook, "#555555", 4)):
    ax.loglog(taus, y, color=colour, lw=3)
    for i in (7, 15):  # 0.1 and 0.01
        ax.plot(taus[i], y[i], "o", color=colour, ms=8)
        label(ax, taus[i], y[i] * beside, f"{100 * y[i]:.2g}%", colour, ha="center", fontsize=10)
label(ax, 0.7, 0.9, "erg.rectify, after QK-norm", COLOURS["I-ERG"], fontsize=11)
label(ax, 3e-3, 2e-4, "hook on the query\nprojection, before it", "#555555", fontsize=11)
ax.set(xlim=(1, 1e-4), ylim=(3e-8, 2), xlabel=r"$\tau$", ylabel="change of the prediction",
       title="QK-norm undoes the hook; what is left comes from its eps")
plt.show()
print(f"tau = 0.01: hook {hook[15]:.1e}, {hook[15] / hook[7]:.0f} times that at 0.1; rectify {after[15]:.1e}")
assert hook[15] < 0.05 * after[15] and 50 < hook[15] / hook[7] < 200
for name, norm in (("SD3", None), ("SD3 with the QK-norm of SD3.5", "rms_norm")) if sd3 is not None else ():
    config = {key: value for key, value in pipe.transformer.config.items() if key[0] != "_"}
    other = SD3Transformer2DModel(**{**config, "qk_norm": norm}).eval().requires_grad_(False)
    # the weights of both, but for the norms
    other.load_state_dict(pipe.transformer.state_dict(), strict=False)
    inputs = latents, prompt, pooled, torch.full((2,), 500.0)
    plain, to_q = other(*inputs).sample, [other.transformer_blocks[i].attn.to_q for i in (6, 7)]
    h = hooked(other, to_q, 0.1, *inputs).sample
    r = rectified(other, dict(tau=0.1, layers=(6, 7), queries=slice(0, 24)), *inputs).sample
    print(f"{name}, tau = 0.1: hook on to_q {far(h, plain):.1e}, rectify {far(r, plain):.1e}")
    assert far(h, r) < 1e-5 if norm is None else far(h, plain) < 1e-3 * far(r, plain)

# %% [markdown]
# The hook moves nothing that anyone would see. With $m$ the mean square of $q$, RMS normalization makes of $\tau q$ the vector
# $q / \sqrt{m + \varepsilon / \tau^2}$: only $\varepsilon$ remembers $\tau$, and the change grows as $1 / \tau^2$, a hundredfold
# for each factor of ten, until $\varepsilon$ outgrows $m$ and flattens after all. Such a bug passes every test that asks only for
# *some* difference. In SD3, which has no QK-norm, the hook is exact; with the QK-norm of SD3.5 put in, the same hook is silent.
#
# ## Pitfall 2: attention that is out of reach
#
# `erg.rectify` sees calls of `F.scaled_dot_product_attention`. `nn.TransformerEncoder` makes them, and so does
# `nn.MultiheadAttention` unless it is asked for its weights (`need_weights=True`, its default). A model that writes its softmax
# out makes none (`attn_implementation="eager"` in transformers), and neither does flash-attn. Here is the same model in eager
# mode, and then its cure: call the fused function, and see that the prediction stays before you rectify anything.
#
# Below that are five more mistakes that are refused. Which of them would you have made?

# %%
class Eager(Attention):
    def forward(self, x):
        q, k, v = self.project(x)
        attention = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)  # (B, H, S, S)
        return self.out((attention @ v).transpose(1, 2).flatten(2))


def refused(function):
    try:
        function()
    except (RuntimeError, ValueError) as error:
        print(textwrap.fill(f"{type(error).__name__}: {error}", 116, subsequent_indent="    "), end="\n\n")
        return
    raise AssertionError("not refused")


usual = dict(tau=0.01, layers=middle)
for block in model.blocks:
    block.attention.__class__ = Eager
eager = model(x, t, c)
print(erg.attention_calls(model, x, t, c), end="\n\n")
refused(lambda: rectified(model, usual, x, t, c))
for block in model.blocks:
    block.attention.__class__ = Attention  # the cure
fused = model(x, t, c)
print(f"off from eager: fused {far(fused, eager):.0e}, rectified "
      f"{far(rectified(model, usual, x, t, c), eager):.0%}\n")
assert far(fused, eager) < 1e-5
refused(lambda: rectified(model, dict(tau=0.01, layers=[6]), x, t, c))
refused(lambda: rectified(copy.deepcopy(model).train(), usual, x, t, c))
refused(lambda: rectified(model, dict(rows=slice(n, 2 * n), batch=2 * n, **usual), x, t, c))
refused(lambda: erg.ERG(w=2, tau_i=1, layers=middle))
refused(lambda: erg.encode(model, x, t, c, tau=0.1, projections=queries))  # pitfall 1

# %% [markdown]
# ## Pitfall 3: time the other way, and other borders
#
# Diffusers counts noise levels: `timestep` 1000 is noise. `Theirs` wraps the digits' model in this fashion, and `their_sampler`
# runs it with 30 steps of SD3's schedule (shift 3), the negative's rows first. One run has $t$ = 1 - timestep / 1000 in its
# `when`, and $\kappa = 0.2$. The others make one mistake each: they take timestep / 1000 for $t$, or the share of the steps
# for $t$, or rectify the other half of the rows.
#
# **Predict**: how many of the 30 steps will be rectified in each? Whose digits will you be able to tell from the right ones?

# %%
class Theirs(nn.Sequential):
    """A model as in diffusers: timestep 1000 is noise, 0 is data, and it predicts noise - data."""

    def forward(self, x, timestep, classes):
        return -self[0](x, 1 - timestep / 1000, classes)


def their_sampler(model, x, asked, w=2.0, steps=30, shift=3.0):
    s = torch.linspace(1, 0, steps + 1)
    given = torch.cat([NONE.expand(len(x)), asked])  # the negative's rows first
    sigmas = shift * s / (1 + (shift - 1) * s)
    for sigma, step in zip(sigmas, sigmas.diff()):
        v_neg, v_pos = model(torch.cat([x, x]), 1000 * sigma.expand(2 * len(x)), given).chunk(2)
        x = x + step * erg.guide(v_pos, v_neg, w)
    return x.clamp(-1, 1)


def run(rows, when):
    with erg.rectify(theirs, tau=0.01, layers=middle, queries=patches, rows=rows, batch=2 * m, when=when):
        return their_sampler(theirs, noise[:m], wanted[:m])


theirs, m, step = Theirs(model).eval(), 20 if QUICK else 100, itertools.count()
first, second, right = slice(0, m), slice(m, 2 * m), lambda x, timestep, classes: 1 - timestep[0] / 1000 > 0.2
cases = {"right": (first, right),
         "time the other way": (first, lambda x, timestep, classes: timestep[0] / 1000 > 0.2),
         "share of the steps for t": (first, lambda *forward: next(step) / 30 > 0.2),
         "the other rows": (second, right)}
acted, (figure, axes) = {}, plt.subplots(4, 2, figsize=(9.8, 5.8), width_ratios=[1.7, 1])
for (left, side), (name, case) in zip(axes, cases.items()):
    drawn, change = fingerprint(theirs, lambda: run(*case))
    change = change.unflatten(0, (2, m)).mean(1)  # (2, 30)
    acted[name] = change > 0
    stripes(left, change, ["negative", "positive"], f"{name}: {acted[name].sum()} of 30 steps", 0.6, 13)
    pictures(side, drawn[:5])
    print("{:25} asked {:.0%}, nearest {:.2f}, between {:.2f}".format(name, *judge(drawn, wanted[:m])))
left.set(xticks=[0.5, 13, 29.5], xticklabels=["noise", "t = 0.2", "data"])
plt.show()
negative, positive = acted["right"]
assert negative.tolist() == [i >= 13 for i in range(30)] and not positive.any()  # 13 / 30 = 43 %
assert acted["time the other way"][0].tolist() == [i < 28 for i in range(30)]
assert acted["share of the steps for t"][0].tolist() == [i > 6 for i in range(30)]
assert torch.equal(acted["the other rows"], acted["right"].flip(0))

# %% [markdown]
# With time the other way, attention is flattened in the 13 noisy steps that kappa should spare, and spared in the last two. With
# the share of the steps for $t$ it is flattened six steps too early. With the other rows the *positive* is flattened, and
# the digits blur: of the three mistakes, the only one that shows in the pictures here. The fingerprint shows each at once.
#
# | what goes wrong | what you would see | what to do |
# |---|---|---|
# | attention written out, flash-attn, `nn.MultiheadAttention` with weights | `RuntimeError` in each forward | the fused function; `need_weights=False` |
# | a hook before QK-norm | next to nothing | `erg.rectify` |
# | time the other way, or steps for time | a fingerprint that begins or ends elsewhere | $t$ = 1 - timestep / 1000 |
# | wrong rows | positive rows that change; blur | look up whose rows are first, then check |
# | `queries` forgotten in joint attention | not the slow softmax | `queries=` the image's tokens |
# | layers of the text, or of another part | other *queries* in the table of calls | choose among the image's |
# | two forwards a step (Flux, Wan) | an error: rows are missing | no `rows`; `when=second_forward(...)` of `examples/pipelines.py` |
# | training mode, no such layer, guidance that is off | an error that says so | what it says |
#
# ## What did not work
#
# The model is trained when the notebook runs, so the numbers are those of the run above, and another machine has others. The
# asserts also held with other seeds of the training, 1 to 4.
#
# - **Better digits than CFG's.** At $w = 2$ CFG is ahead of ERG in two of the three numbers of step 6 (98 % to 100 %, 2.58 to 2.37).
#   I-ERG alone reads less well than either (95 %), and here is no closer to real digits than no guidance is.
# - **A choice of layers without a look.** The effect of the middle third grows late in sampling (20 % to 33 % here). The range that
#   `fading_layers` suggests comes out between ERG and CFG in all three numbers here: another trade, not a better one.
# - **Finding a mistake by quality.** Time the other way reads no worse than the right way (99 % and 97 % here). A score that
#   goes up proves nothing about the code.
# - **Real weights.** The pipeline ran at toy size with random weights. That its latents are the written-out sampler's says that
#   the method is applied as meant, and nothing about the pictures of the real one.
#
# ## Three things to try
#
# 1. In step 2, `calls.middle_third()` → `range(0, 2)`: which of the three numbers of step 6 move, and which way?
# 2. In `Attention`, `nn.RMSNorm(head), nn.RMSNorm(head)` → the same with `eps=1e-6` in both, as many models have it: at which
#    $\tau$ does the hook of pitfall 1 now move the prediction by one per cent?
# 3. In `their_sampler`, `shift=3.0` → `shift=1.0`: which two of the four runs become the same, and why? (The asserts below
#    the figure are those of shift 3, and will say so.)
