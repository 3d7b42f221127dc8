"""tiny_dit.py: the model's structure, the loss and the sampler, against oracles."""
import pytest
import torch

from conftest import WORDS, random_model
from tiny_dit import Config, TinyDiT, drop_words, flow_matching_loss, sample, tokenize


def config(**settings):
    return Config(**{**dict(width=32, heads=4, depth=3, vocabulary=WORDS), **settings})


def test_every_block_is_the_identity_at_the_start():
    """adaLN-Zero: an untrained block returns its input bit for bit, and the first velocity is zero."""
    torch.manual_seed(0)
    model = TinyDiT(config())
    tokens, c = torch.randn(2, 22, 32), torch.randn(2, 32)
    for block in model.blocks:
        assert torch.equal(block(tokens, c), tokens)
    assert torch.equal(model(torch.randn(2, 3, 8, 8), 0.5, model.encode(["a", "red"])), torch.zeros(2, 3, 8, 8))


def test_weights_at_the_start():
    """Xavier's limits sqrt(6 / (inputs + outputs)) are met, biases are 0, words and positions have deviation 0.5."""
    model = TinyDiT(config(width=96))
    for layer in (module for module in model.modules() if isinstance(module, torch.nn.Linear) and module.weight.any()):
        assert layer.weight.abs().max().item() == pytest.approx((6 / sum(layer.weight.shape))**0.5, rel=0.01)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    assert [p.std().item() for p in (model.encoder.words.weight, model.encoder.positions)] == pytest.approx([0.5, 0.5], rel=0.2)


def test_against_the_formulas_written_out():
    """The whole model agrees with its definition on plain tensors, in float64."""
    model, x, t = random_model(), torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([0.25, 0.75]).double()
    w, (W, H) = dict(model.named_parameters()), (32, 4)
    linear = lambda name, y: y @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    norm = lambda y: (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    affine = lambda name, y: norm(y) * w[f"{name}.weight"] + w[f"{name}.bias"]
    mlp = lambda name, y: linear(f"{name}.2", torch.nn.GELU("tanh")(linear(f"{name}.0", y)))
    waves = lambda y, n: torch.cat([f(y[:, None] / 10_000**(torch.arange(n / 2).double() * 2 / n)) for f in (torch.sin, torch.cos)], -1)
    def attention(name, y):
        q, k, v = linear(f"{name}.qkv", y).view(2, -1, 3, H, W // H).unbind(2)  # each (B, T, H, D)
        q, k = (z / z.square().mean(-1, keepdim=True).sqrt() * w[f"{name}.{n}_norm.weight"] for z, n in ((q, "q"), (k, "k")))
        p = (torch.einsum("bihd,bjhd->bhij", q, k) / (W / H)**0.5).softmax(-1)
        return linear(f"{name}.out", torch.einsum("bhij,bjhd->bihd", p, v).flatten(2))
    y = w["encoder.words.weight"][torch.tensor([[1, 2, 4, 0, 0, 0], [5, 0, 0, 0, 0, 0]])] + w["encoder.positions"]
    for name in (f"encoder.blocks.{i}" for i in range(3)):
        y = y + attention(f"{name}.attention", affine(f"{name}.norm1", y))
        y = y + mlp(f"{name}.mlp", affine(f"{name}.norm2", y))
    words, silu, rows = affine("encoder.norm", y), lambda y: y * y.sigmoid(), waves(torch.arange(4.0).double(), W // 2)
    c = silu(linear("time.2", silu(linear("time.0", waves(1000 * t, W)))) + linear("pooled", words.mean(1)))
    y = torch.cat([linear("patch_in", model.patchify(x)) + torch.cat([rows.repeat_interleave(4, 0), rows.repeat(4, 1)], -1), words], 1)
    for name in (f"blocks.{i}" for i in range(6)):
        a, b, gate_a, d, e, gate_d = linear(f"{name}.modulation", c)[:, None].split(W, -1)
        y = y + gate_a * attention(f"{name}.attention", norm(y) * (1 + b) + a)
        y = y + gate_d * mlp(f"{name}.mlp", norm(y) * (1 + e) + d)
    a, b = linear("modulation", c)[:, None].split(W, -1)
    v = linear("patch_out", norm(y[:, :16]) * (1 + b) + a)
    torch.testing.assert_close(model.patchify(model(x, t, model.encode(["a red seven", "two"]))), v, rtol=1e-4, atol=1e-4)


def test_every_parameter_learns():
    """Once the zero layers have moved, a gradient reaches every parameter."""
    model = random_model().requires_grad_(True)
    condition = model.encode(["a red seven", "two"])
    data, noise = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    flow_matching_loss(model, data, condition, torch.tensor([0.2, 0.8], dtype=torch.float64), noise).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("size, patch", [(8, 2), (28, 4), (6, 3)])
def test_patchify_and_back(size, patch):
    """unpatchify inverts patchify, and token n holds the pixels of patch n in reading order."""
    model = TinyDiT(config(image_size=size, patch=patch))
    x = torch.randn(2, 3, size, size)
    tokens = model.patchify(x)
    assert tokens.shape == (2, (size // patch)**2, 3 * patch**2)
    assert torch.equal(model.unpatchify(tokens), x)
    side = size // patch
    assert torch.equal(tokens[0, side + 1].view(3, patch, patch), x[0, :, patch:2 * patch, patch:2 * patch])


def test_image_and_caption_reach_every_pixel():
    """Attention is joint: a pixel, a word and the time change every pixel of the velocity."""
    model = random_model()
    x, condition = torch.randn(1, 3, 8, 8, dtype=torch.float64), model.encode(["a red seven"])
    moved = x.clone()
    moved[0, 0, 0, 0] += 1
    for other in ((moved, 0.5, condition), (x, 0.5, model.encode(["a blue seven"])), (x, 0.51, condition)):
        assert ((model(*other) - model(x, 0.5, condition)).abs() > 1e-9).all()


def test_t_is_a_number_or_a_tensor():
    """t = 0.5, a tensor of it, and one per sample mean the same."""
    model = random_model()
    x, condition = torch.randn(2, 3, 8, 8, dtype=torch.float64), model.encode(["a", "red"])
    assert torch.equal(model(x, 0.5, condition), model(x, torch.tensor([0.5, 0.5]), condition))
    mixed = model(x, torch.tensor([0.5, 0.9]), condition)
    for n, t in enumerate((0.5, 0.9)):
        torch.testing.assert_close(mixed[n:n + 1], model(x[n:n + 1], t, condition[n:n + 1]), rtol=0, atol=1e-12)


def test_tokenize():
    """Words become their numbers, <pad> is 0 and fills up; the null prompt is all pads."""
    assert tokenize(["a red seven", ""], config()).tolist() == [[1, 2, 4, 0, 0, 0], [0] * 6]


def test_drop_words_rates_and_order():
    """Whole captions and single words are dropped at their rates; the words that stay keep their order, in front."""
    tokens = torch.arange(1, 6).repeat(20_000, 1)
    generator = torch.Generator().manual_seed(0)
    kept = drop_words(tokens, caption=0.2, word=0.1, generator=generator)
    lengths = (kept > 0).sum(1)
    assert (lengths == 0).double().mean().item() == pytest.approx(0.2 + 0.8 * 0.1**5, abs=0.01)
    assert (kept > 0).double().mean().item() == pytest.approx(0.8 * 0.9, abs=0.01)
    for row in kept[:200].tolist():
        words = [w for w in row if w]
        assert row == words + [0] * (5 - len(words)) and words == sorted(words)
    assert torch.equal(drop_words(tokens, caption=0.0, word=0.0), tokens)
    assert (drop_words(tokens, generator=generator) > 0).double().mean().item() == pytest.approx(0.9 * 0.9, abs=0.01)


def test_loss_oracle_one_point():
    """If the data is one point, v = (data - x_t) / (1 - t) is known: its loss is 0, and that of v + d is mean d^2."""
    data = torch.randn(1, 3, 8, 8, dtype=torch.float64).expand(5, -1, -1, -1)
    noise, shift = torch.randn(2, 5, 3, 8, 8, dtype=torch.float64)
    t = torch.rand(5, dtype=torch.float64) * 0.9
    for d, loss, atol in ((0, torch.zeros(5).double(), 1e-20), (shift, shift.square().flatten(1).mean(1), 1e-9)):
        oracle = lambda x, t, condition: (data - x) / (1 - t).view(-1, 1, 1, 1) + d
        torch.testing.assert_close(flow_matching_loss(oracle, data, None, t, noise), loss, rtol=0, atol=atol)


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_sampler_oracle_one_point(steps):
    """With the velocity of one data point, every number of Euler steps lands on it exactly."""
    point = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    noise = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    end = sample(lambda x, t, condition: (point - x) / (1 - t), noise, None, steps)
    torch.testing.assert_close(end, point.expand_as(end), rtol=0, atol=1e-12)


def test_sampler_oracle_gaussian():
    """For data ~ N(m, s^2) the flow carries x_0 to m + s x_0; Euler's error falls as 1 / steps."""
    m, s = 1.5, 0.4
    noise = torch.randn(1000, dtype=torch.float64)

    def velocity(x, t, condition):
        variance = (1 - t)**2 + t**2 * s**2
        return m + (t * s**2 - (1 - t)) / variance * (x - t * m)

    errors = [(sample(velocity, noise, None, steps) - (m + s * noise)).abs().max().item() for steps in (50, 100, 200, 400)]
    assert errors[-1] < 0.01
    for coarse, fine in zip(errors, errors[1:]):
        assert 1.8 < coarse / fine < 2.2


def test_trajectory_and_guidance():
    """The trajectory holds every x from noise to result, and a guidance object takes the model's place at each t."""
    noise, seen, model = torch.randn(2, 3, 4, 4), [], lambda x, t, c: torch.full_like(x, c)
    path = sample(model, noise, 2.0, 4, trajectory=True)
    assert path.shape == (5, 2, 3, 4, 4) and torch.equal(path[0], noise)
    torch.testing.assert_close(path, noise + 2 * torch.linspace(0, 1, 5).view(5, 1, 1, 1, 1))
    guidance = lambda model, x, t, condition: seen.append(t) or 3 * model(x, t, condition)
    torch.testing.assert_close(sample(model, noise, 2.0, 4, guidance), noise + 6)
    assert seen == [0, 0.25, 0.5, 0.75]
