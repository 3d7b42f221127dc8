"""examples/your_model.py: two samplers that end where the data are, and guide as eq. 10 says."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import erg
from examples.your_model import YourTransformer, sample_ddim, sample_flow

PATH = Path(__file__).resolve().parent.parent / "examples/your_model.py"
SIGNAL = torch.linspace(0.01, 1, 21).tolist()
OFF = erg.Guidance(erg.ERG(w=1.0, tau_i=0.1, negative="same"))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = YourTransformer().double().eval().requires_grad_(False)
    for block in model.blocks:
        block.qkv.weight[:64] *= 1.5  # more would make it chaotic, and rounding large
    return model


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 16, 32, generator=generator, dtype=torch.float64), torch.arange(4)


def test_it_runs_as_written():
    """40 lines at most; run as a script, it lists the layers and samples twice."""
    assert len(PATH.read_text().splitlines()) <= 40
    done = subprocess.run([sys.executable, PATH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for text in ("middle third of self-attention: range(2, 4)", "DDIM: torch.Size([4, 16, 32])"):
        assert text in done.stdout


def test_the_flow_ends_at_the_data(inputs):
    """If all data are one point, the exact velocity is known, and the sampler ends there from any noise."""
    x, label = inputs
    point = torch.randn(16, 32, dtype=torch.float64)
    result = sample_flow(lambda x, t, label: (point - x) / (1 - t[:, None, None].double()), x, label, OFF)
    torch.testing.assert_close(result, point.expand_as(x), rtol=0, atol=1e-5)  # t is float32


def test_ddim_ends_at_the_data(inputs):
    """If all data are one point, so is the noise in x, and DDIM ends at the point from any noise."""
    x, label = inputs
    point, signal = torch.randn(16, 32, dtype=torch.float64), torch.tensor(SIGNAL, dtype=torch.float64)

    def noise(x, t, label):
        now = signal[(t[0] * 20).round().long()]
        return (x - now**0.5 * point) / (1 - now)**0.5

    torch.testing.assert_close(sample_ddim(noise, x, label, OFF), point.expand_as(x), rtol=0, atol=1e-9)


def test_ddim_is_that_of_diffusers(model, inputs):
    """Unguided and guided, on the same schedule, DDIM takes the steps of diffusers' DDIMScheduler."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers, whose DDIM is compared with, is missing")
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=20, clip_sample=False, steps_offset=0)
    scheduler.set_timesteps(20)
    scheduler.alphas_cumprod = torch.tensor(SIGNAL[:-1], dtype=torch.float64).flip(0)  # 19 is the noisiest
    x, label = inputs
    settings = erg.ERG(w=3.0, tau_i=0.01, layers=range(2, 4), kappa=0.2)
    guidance, y = erg.Guidance(settings, torch.tensor([10])), x
    for i, timestep in enumerate(scheduler.timesteps):
        y = scheduler.step(guidance(model, y, i / 20, label), timestep, y).prev_sample
    torch.testing.assert_close(sample_ddim(model, x, label, erg.Guidance(settings, torch.tensor([10]))), y)


@pytest.mark.parametrize("sampler", [sample_flow, sample_ddim])
def test_guided_as_written_out(model, inputs, sampler):
    """The samplers guide by two passes (eq. 10), the negative without a label and rectified after kappa."""
    x, label = inputs

    def by_hand(model, x, t, label):
        time = torch.full((4,), t)
        positive = model(x, time, label)
        if t <= 0.2:
            return 3 * positive - 2 * model(x, time, torch.full((4,), 10))
        with erg.rectify(tau=0.01, layers=[2, 3]):
            negative = model(x, time, torch.full((4,), 10))
        return 3 * positive - 2 * negative

    settings = erg.ERG(w=3.0, tau_i=0.01, layers=range(2, 4), kappa=0.2)
    result, cfg = (sampler(model, x, label, erg.Guidance(s, torch.tensor([10])))
                   for s in (settings, erg.ERG(w=3.0)))
    torch.testing.assert_close(result, sampler(model, x, label, by_hand), rtol=1e-6, atol=1e-6)
    assert (result - cfg).abs().max() > 1e-3
