"""A tiny rectified-flow diffusion transformer, in one file, to try guidance on.

Captions are read by a small transformer encoder trained jointly; image and caption tokens meet in
joint attention with QK-norm, as in SD3 (Esser et al., arXiv 2403.03206); every block is modulated
by adaLN-Zero (Peebles & Xie, arXiv 2212.09748). Attention is plain
`F.scaled_dot_product_attention`: nothing here knows of guidance or of ERG.

    model = TinyDiT(Config(image_size=8, vocabulary=("a", "red", "seven")))
    condition = model.encode(["a red seven"])                    # (1, L, W)
    x = sample(model, torch.randn(1, 3, 8, 8), condition, steps=50)

Conventions: t = 0 is noise, t = 1 is data; x_t = (1 - t) * noise + t * data; the model returns the
velocity v = data - noise; an Euler step is x += v / steps; images lie in [-1, 1].

Shapes: B batch, C channels, S image side, P patch side, N = (S / P)^2 image tokens,
L caption tokens, T = N + L tokens, W width, H heads, D = W / H.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

# ------------------------------------------------------------------------------------------------
# Settings and captions
# ------------------------------------------------------------------------------------------------

PAD = "<pad>"  # fills captions to their full length; a caption of nothing else is the null prompt


@dataclass(frozen=True)
class Config:
    """Everything that is needed to rebuild a model; it is stored in every checkpoint."""

    image_size: int = 8  # S, pixels
    channels: int = 3  # C
    patch: int = 2  # P, pixels
    width: int = 128  # W
    depth: int = 8  # joint blocks
    heads: int = 4  # H
    text_depth: int = 3  # blocks of the caption encoder
    caption_length: int = 6  # L, words
    vocabulary: tuple = ()  # the words; <pad> is added in front

    def __post_init__(self):
        check_whole(**{name: value for name, value in vars(self).items() if name != "vocabulary"})
        if self.image_size % self.patch:
            raise ValueError(f"patch={self.patch} must divide image_size={self.image_size}")
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads} and of 4")
        words = self.vocabulary if isinstance(self.vocabulary, (tuple, list)) else ()
        lower = all(isinstance(word, str) and word.lower().split() == [word] for word in words)
        if not words or not lower or len({PAD, *words}) != len(words) + 1:
            raise ValueError(f"vocabulary={self.vocabulary!r} must be a list of words in lower case, at "
                             f"least one, none twice, and not {PAD!r}")
        object.__setattr__(self, "vocabulary", tuple(words))  # a list after loading JSON


def check_whole(**values):
    """An error unless every value is a whole number, at least 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number, at least 1")


def tokenize(prompts, config):
    """Captions (a list of B strings) -> word numbers, (B, L) int64. "" is the null prompt.

    Raises ValueError for a word outside the vocabulary and for a caption longer than L words.
    """
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"prompts={prompts!r:.200} must be a list of strings, at least one")
    number = {word: i for i, word in enumerate((PAD,) + config.vocabulary)}
    tokens = torch.zeros(len(prompts), config.caption_length, dtype=torch.long)
    for row, prompt in zip(tokens, prompts):
        words = prompt.lower().split()
        unknown = [word for word in words if word not in number]
        if unknown:
            raise ValueError(f"unknown word {unknown[0]!r} in the prompt {prompt!r}; "
                             f"the vocabulary is: {' '.join(config.vocabulary)}")
        if len(words) > config.caption_length:
            raise ValueError(f"the prompt {prompt!r} has {len(words)} words; "
                             f"at most {config.caption_length} are allowed")
        row[:len(words)] = torch.tensor([number[word] for word in words], dtype=torch.long)
    return tokens


def drop_words(tokens, caption=0.1, word=0.1, generator=None):
    """Training's dropout: whole captions (rate `caption`) and single words (rate `word`).

    The words that stay move to the front, as if the shorter caption had been typed: (B, L) -> (B, L).
    It teaches the null prompt that CFG needs, and prompts that lack words.
    """
    if not all(isinstance(rate, (int, float)) and 0 <= rate <= 1 for rate in (caption, word)):
        raise ValueError(f"caption={caption!r}, word={word!r} must be rates between 0 and 1")
    B, L = tokens.shape
    keep = torch.rand(B, L, generator=generator, device=tokens.device) >= word
    keep &= torch.rand(B, 1, generator=generator, device=tokens.device) >= caption
    tokens = tokens * keep
    order = (tokens == 0).to(torch.uint8).argsort(dim=1, stable=True)  # words first, pads last
    return tokens.gather(1, order)


# ------------------------------------------------------------------------------------------------
# The model
# ------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention with QK-norm."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.out = nn.Linear(width, width)

    def forward(self, x):  # (B, T, W)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)  # (B, H, T, D)
        return self.out(x.transpose(1, 2).flatten(2))  # (B, T, W)


def mlp(width):
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))


class TextBlock(nn.Module):
    """A pre-norm transformer block of the caption encoder."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), mlp(width)

    def forward(self, x):  # (B, L, W)
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CaptionEncoder(nn.Module):
    """Word numbers (B, L) -> caption tokens (B, L, W), by self-attention: what C-ERG tempers."""

    def __init__(self, config):
        super().__init__()
        self.words = nn.Embedding(len(config.vocabulary) + 1, config.width)
        self.positions = nn.Parameter(torch.zeros(config.caption_length, config.width))
        self.blocks = nn.ModuleList(TextBlock(config.width, config.heads) for _ in range(config.text_depth))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, tokens):  # (B, L)
        x = self.words(tokens) + self.positions  # (B, L, W)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]  # (B, T, W), (B, W), (B, W) -> (B, T, W)


class JointBlock(nn.Module):
    """An adaLN-Zero block over image and caption tokens: the identity at the start of training."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.attention, self.mlp = Attention(width, heads), mlp(width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x, c):  # (B, T, W), (B, W)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=-1)  # each (B, W)
        x = x + gate1[:, None] * self.attention(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


def frequencies(values, width):
    """Sines and cosines of `values` (...,) at width / 2 frequencies: (..., width)."""
    rates = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=values.device) / (width // 2))
    angles = values[..., None].float() * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class TinyDiT(nn.Module):
    """The velocity v(x_t, t, condition) of a rectified flow."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        W, P, C = config.width, config.patch, config.channels
        self.side = config.image_size // P  # N = side^2
        rows, columns = torch.meshgrid(torch.arange(self.side), torch.arange(self.side), indexing="ij")
        positions = torch.cat([frequencies(rows, W // 2), frequencies(columns, W // 2)], dim=-1)
        self.register_buffer("positions", positions.flatten(0, 1), persistent=False)  # (N, W)
        self.encoder = CaptionEncoder(config)
        self.patch_in = nn.Linear(C * P * P, W)
        self.time = nn.Sequential(nn.Linear(W, W), nn.SiLU(), nn.Linear(W, W))
        self.pooled = nn.Linear(W, W)
        self.blocks = nn.ModuleList(JointBlock(W, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(W, elementwise_affine=False)
        self.modulation = nn.Linear(W, 2 * W)
        self.patch_out = nn.Linear(W, C * P * P)
        self.initialize_weights()

    def initialize_weights(self):
        """Xavier everywhere; then zero what makes blocks the identity and the first velocity zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.encoder.words.weight, std=0.5)
        nn.init.normal_(self.encoder.positions, std=0.5)
        for layer in [block.modulation for block in self.blocks] + [self.modulation, self.patch_out]:
            nn.init.zeros_(layer.weight)  # last, so that nothing overwrites it
            nn.init.zeros_(layer.bias)

    def encode(self, prompts):
        """Captions (a list of B strings) -> caption tokens (B, L, W)."""
        return self.encoder(tokenize(prompts, self.config).to(self.positions.device))

    def patchify(self, x):  # (B, C, S, S) -> (B, N, C P P)
        x = x.unflatten(3, (self.side, -1)).unflatten(2, (self.side, -1))  # (B, C, side, P, side, P)
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def unpatchify(self, x):  # (B, N, C P P) -> (B, C, S, S)
        P = self.config.patch
        x = x.unflatten(2, (-1, P, P)).unflatten(1, (self.side, self.side))  # (B, side, side, C, P, P)
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def forward(self, x, t, condition):
        """x (B, C, S, S), t (B,) or a number, condition (B, L, W) from `encode` -> v (B, C, S, S)."""
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
        if t.device.type == "cpu" and not torch.compiler.is_compiling() and not ((0 <= t) & (t <= 1)).all():
            raise ValueError(f"t={t.tolist()} must lie between 0 (noise) and 1 (data)")
        N, time = self.side**2, frequencies(1000 * t, self.config.width).to(condition.dtype)  # (B, W)
        c = F.silu(self.time(time) + self.pooled(condition.mean(dim=1)))  # (B, W)
        tokens = torch.cat([self.patch_in(self.patchify(x)) + self.positions, condition], dim=1)  # (B, T, W)
        for block in self.blocks:
            tokens = block(tokens, c)
        shift, scale = self.modulation(c).chunk(2, dim=-1)
        tokens = modulate(self.norm(tokens[:, :N]), shift, scale)  # (B, N, W)
        return self.unpatchify(self.patch_out(tokens))  # (B, C, S, S)


# ------------------------------------------------------------------------------------------------
# Training loss and sampler
# ------------------------------------------------------------------------------------------------


def flow_matching_loss(model, data, condition, t, noise):
    """Squared error of the velocity, one number an image: (B,). data, noise (B, C, S, S), t (B,)."""
    s = t.view(-1, *[1] * (data.dim() - 1))
    x_t = (1 - s) * noise + s * data
    return (model(x_t, t, condition) - (data - noise)).square().flatten(1).mean(dim=1)


@torch.no_grad()
def sample(model, noise, condition, steps=50, guidance=None, trajectory=False):
    """Euler's method from t = 0 to t = 1: `steps` equal steps from `noise` (B, C, S, S).

    `guidance` is any function (model, x, t, condition) -> v; None uses the model's own velocity.
    Returns the images, or with `trajectory=True` all of x at t = 0, 1/steps, ..., 1: (steps + 1, B, C, S, S).
    """
    check_whole(steps=steps)
    x, path = noise, [noise]
    for i in range(steps):
        t = i / steps
        v = model(x, t, condition) if guidance is None else guidance(model, x, t, condition)
        x = x + v / steps
        if trajectory:
            path.append(x)
    return torch.stack(path) if trajectory else x
