"""What needs a GPU: kernels, types, CUDA graphs, compilation, memory and training on a CUDA device.

    python -m pytest -q -m gpu                         # all of it; skipped without a CUDA device
    ERG_TEST_DEVICE=cpu python -m pytest -q -m gpu     # a dry run of these tests on the CPU, as far as it goes
"""
import contextlib
import copy
import math
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import erg
from conftest import random_model
from test_energy import draw
from test_rectify import run
from tiny_dit import tokenize

CUDA = os.environ.get("ERG_TEST_DEVICE") != "cpu"
DEVICE = "cuda" if CUDA else "cpu"
MISSING = CUDA and not torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING, reason="needs a CUDA device (dry run: ERG_TEST_DEVICE=cpu)")]

LIMITS = {"float32": 1e-5, "TF32": 5e-3, "bfloat16": 3e-2, "float16": 5e-3}  # of the relative error
TYPES = ["float32", "bfloat16", "float16"]
WEAK = [dict(tau=0.01, queries=slice(0, 16)), dict(tau=0.1, alpha=0.7, gamma=1.5, K=2), dict(tau=[0.1, 2.0])]
CAPTIONS = ["a red seven", "a blue two on red", "seven on", "a"]


def skip_on_cpu(what):
    if not CUDA:
        pytest.skip(f"{what}: only on a CUDA device")


def error(a, b):
    """|a - b| / |b| in float64."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return ((a - b).norm() / b.norm()).item()


def moved(model, kind, *inputs):
    """Copies of the model and of its inputs on the device, in a type; times and tokens keep theirs."""
    dtype = getattr(torch, kind)
    return [copy.deepcopy(model).to(DEVICE, dtype), *(y.to(DEVICE, dtype if y.dim() > 2 else y.dtype) for y in inputs)]


def at(device, tau, **settings):
    """Settings of rectify; a tau for each row becomes a tensor on the device."""
    return dict(settings, tau=torch.tensor(tau, device=device) if isinstance(tau, list) else tau)


@pytest.fixture(autouse=True)
def precise():
    """Float32 is float32 unless a test allows TF32; a training's own settings do not outlast it."""
    precision, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.benchmark = benchmark


def algorithm_1(q, k, v, tau=1.0, alpha=1.0, gamma=1.0, K=1, queries=None, attn_mask=None, is_causal=False, scale=None):
    """Algorithm 1 in float64 on the CPU, with the matrix of attention written out."""
    q, k, v = (y.cpu().double() for y in (q, k, v))
    factor, bias = torch.ones_like(q[..., :1]), torch.zeros(q.shape[-2], k.shape[-2], dtype=torch.float64)
    factor[..., queries or slice(None), :] = torch.as_tensor(tau).cpu().double().reshape(-1, 1, 1, 1)
    mask = torch.ones_like(bias).bool().tril() if is_causal else attn_mask
    if mask is not None:
        bias = bias.masked_fill(~mask.cpu(), -math.inf) if mask.dtype == torch.bool else mask.cpu().double()
    for _ in range(K):
        logits = (q.shape[-1]**-0.5 if scale is None else scale) * (factor * q) @ k.mT + bias
        q = q - gamma * (q - alpha * logits.softmax(-1) @ v)
    return q


@pytest.mark.filterwarnings("ignore")  # torch warns why a kernel is not used
@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("kernel", ["the usual", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"])
def test_energy_attention_against_float64(kernel, kind):
    """In each kernel and type that plain attention has, each setting under each mask is Algorithm 1, within rounding."""
    if kernel not in ("the usual", "MATH"):
        skip_on_cpu(kernel)
    dtype = getattr(torch, "float32" if kind == "TF32" else kind)
    torch.set_float32_matmul_precision("high" if kind == "TF32" else "highest")
    q, keys, values, additive = (y.to(DEVICE, dtype) for y in draw(*[(4, 4, 64, 32)] * 3, (4, 1, 64, 64)))
    masks = [(64, {}), (40, {}), (64, dict(is_causal=True)), (64, dict(attn_mask=additive)),
             (64, dict(attn_mask=(additive > -0.5) | torch.eye(64, device=DEVICE).bool()))]
    per_row = torch.tensor([0.3, 1.0, 1.7, 0.0], device=DEVICE)
    every = [dict(tau=0.01), dict(tau=0.0), dict(tau=2.0, queries=slice(0, 32)), dict(tau=per_row),
             dict(tau=3.0, scale=0.1), dict(tau=per_row, queries=slice(16, 64), alpha=-0.5, gamma=0.5, K=2),
             dict(tau=0.1, alpha=0.7, gamma=1.5, K=3)]
    ran = 0
    for n, mask in masks:
        k, v = keys[:, :, :n], values[:, :, :n]
        with contextlib.nullcontext() if kernel == "the usual" else sdpa_kernel(getattr(SDPBackend, kernel)):
            try:
                F.scaled_dot_product_attention(q, k, v, **mask)
            except RuntimeError:  # this kernel is not made for it
                continue
            for settings in every:
                result = erg.energy_attention(q, k, v, **settings, **mask)
                assert result.dtype == dtype
                assert error(result, algorithm_1(q, k, v, **settings, **mask)) < LIMITS[kind], (n, *mask, settings)
        ran += 1
    assert ran == len(masks) or kernel not in ("the usual", "MATH")
    if not ran:
        pytest.skip(f"{kernel} is not made for {dtype}")


@pytest.mark.parametrize("settings", WEAK)
@pytest.mark.parametrize("kind", TYPES + ["autocast"])
def test_plain_rows_keep_every_bit(model, inputs, kind, settings):
    """Plain rows keep every bit when others are rectified, in each type and under autocast; all are as in float64."""
    rectified = dict(settings, layers=[2], rows=slice(2, 4))
    expected = run(model, inputs, (model, at("cpu", **rectified)))
    model, *inputs = moved(model, kind if kind in TYPES else "float32", *inputs)
    with torch.autocast(DEVICE, torch.bfloat16) if kind == "autocast" else contextlib.nullcontext():
        plain, weak = model(*inputs), run(model, inputs, (model, at(DEVICE, **rectified)))
        assert torch.equal(run(model, inputs, (model, dict(tau=1.0, rows=slice(2, 4)))), plain)
    assert weak.dtype == plain.dtype and torch.equal(weak[:2], plain[:2])
    assert error(weak, expected) < LIMITS.get(kind, LIMITS["bfloat16"]) and error(weak[2:], plain[2:]) > 3e-2


def replayed(model, rectified, values, rest):
    """The outputs of one captured forward, replayed for each of the values."""
    held, side, graph = values[0].clone(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with erg.rectify(model, **rectified):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # cuBLAS and cuDNN prepare themselves outside of the capture
            model(held, *rest)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            out = model(held, *rest)
    for value in values:
        held.copy_(value)
        graph.replay()
        yield out.clone()


@pytest.mark.parametrize("settings", WEAK)
@pytest.mark.parametrize("how", ["torch.cuda.graph", "default", "reduce-overhead"])
def test_captured_and_compiled_forwards(afresh, inputs, how, settings):
    """Captured or compiled, a rectified forward is the eager one, on other inputs too; so is a compiled plain one."""
    if how != "default":
        skip_on_cpu("CUDA graphs")
    model, x, *rest = moved(random_model(depth=2), "float32", *inputs)
    rectified, values = at(DEVICE, layers=[1], rows=slice(2, 4), **settings), (x, x.flip(3))
    plain = [model(value, *rest) for value in values]
    weak = [run(model, (value, *rest), (model, rectified)) for value in values]
    assert error(weak[0], weak[1]) > 0.1 and error(weak[0], plain[0]) > 1e-3
    if how == "torch.cuda.graph":
        assert max(map(error, replayed(model, rectified, values, rest), weak)) < LIMITS["float32"]
        return
    fast = torch.compile(model, mode=how, fullgraph=True)
    for _ in range(3):  # reduce-overhead captures in the second round
        for i, value in enumerate(values):
            assert error(run(fast, (value, *rest), (fast, rectified)), weak[i]) < LIMITS["float32"]
            assert error(fast(value, *rest), plain[i]) < LIMITS["float32"]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("more", [{}, dict(apg=erg.APG()), dict(alpha=0.7, gamma=1.5, K=2)])
def test_guidance_in_one_pass_and_in_two(model, inputs, kind, more):
    """ERG and APG in one pass of 2B rows and in two of B are those of the float64 model, before and after kappa."""
    def steps(model, x, batched):
        settings = erg.ERG(w=2.0, tau_i=0.01, tau_c=0.1, layers=[2, 3], queries=slice(0, 16), batched=batched, **more)
        condition, negative = settings.encode(model.encoder, tokenize(CAPTIONS, model.config).to(x.device))
        guidance = erg.Guidance(settings, negative)
        return torch.stack([guidance(model, x, t, condition) for t in (0.1, 0.3, 0.5)])

    expected = steps(model, inputs[0], True)
    model, x = moved(model, kind, inputs[0])
    for batched in (True, False):  # errors of v_pos and v_neg come in w and w - 1 times
        assert error(steps(model, x, batched), expected) < (2 + 1) * LIMITS[kind]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("layers", [None, [1]])
def test_encode(model, kind, layers):
    """C-ERG's strong encoding is the encoder's own, bit for bit; the weak one is that in float64, within rounding."""
    tokens = tokenize(CAPTIONS, model.config)
    expected = erg.encode(model.encoder, tokens, tau=0.01, layers=layers)
    model, tokens = moved(model, kind, tokens)
    strong, weak = erg.encode(model.encoder, tokens, tau=0.01, layers=layers)
    assert torch.equal(strong, model.encoder(tokens)) and error(weak, strong) > 1e-2
    assert error(strong, expected[0]) < LIMITS[kind] and error(weak, expected[1]) < LIMITS[kind]


def test_memory_of_a_step():
    """At its peak, a step of ERG takes the memory of a step of CFG, to one hundredth."""
    skip_on_cpu("statistics of memory")
    model = random_model(image_size=32, width=192, heads=6, depth=4).to(DEVICE, torch.bfloat16)
    x = torch.randn(64, 3, 32, 32, device=DEVICE, dtype=torch.bfloat16)
    condition, null, peaks = model.encode(["a red seven"] * 64), model.encode([""]), []
    for settings in (erg.ERG(w=2.0), erg.ERG(w=2.0, tau_i=0.01, layers=[1, 2], queries=slice(0, 256))):
        for _ in range(2):  # the first time, libraries take their workspace
            torch.cuda.reset_peak_memory_stats()
            erg.Guidance(settings, null)(model, x, 0.5, condition)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= 1.01 * peaks[0]


def test_training_and_going_on(afresh, tmp_path, monkeypatch):
    """A compiled training, in bfloat16 on CUDA, ends with a table; going on from a save gives the same weights."""
    pytest.importorskip("tqdm", reason="train_toy.py needs tqdm")
    import train_toy
    from test_train_toy import SMALL, TINY, training_state
    whole, parts, save = tmp_path / "whole", tmp_path / "parts", train_toy.Job.save

    def keep(job):
        save(job)
        if job.run.step == 10:
            shutil.copytree(whole, parts)

    monkeypatch.setitem(train_toy.RECIPES, "digits", TINY)
    monkeypatch.setattr("toy.drawing.draw_grid", lambda *given: None)  # pictures would take the longest
    monkeypatch.setattr(train_toy, "draw_loss", lambda *given: None)
    options = dict(iterations=30, device=DEVICE, compile=True, **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(train_toy.Job, "save", keep)
        table = train_toy.main(out=str(whole), **options)
    assert all(math.isfinite(value) for row in table.values() for value in row.values())
    weights = lambda state: torch.cat([value.flatten() for value in state["average"].values()])
    begun = training_state(parts)
    train_toy.main(out=str(parts), resume=True, **options)
    whole, parts = training_state(whole), training_state(parts)
    assert (begun["step"], parts["step"], weights(parts).device.type) == (10, 30, DEVICE)
    assert error(weights(parts) - weights(begun), weights(whole) - weights(begun)) < 0.03  # atomic sums vary


def test_metrics():
    """In float64, distances, features and the table's row on the device are those on the CPU."""
    pytest.importorskip("tqdm", reason="toy/metrics.py needs tqdm")
    from test_metrics import two_sets
    from toy import metrics
    sets, x, attributes = two_sets(300, 250), draw((300, 3, 8, 8))[0], torch.arange(100)[:, None] % 4
    for metric in (metrics.frechet_distance, metrics.precision_recall_density_coverage):
        assert metric(*(y.to(DEVICE) for y in sets)) == pytest.approx(metric(*sets), rel=1e-9)
    for network in ("plain", "residual"):
        classifier = metrics.AttributeClassifier([4], network).double().eval()
        features = metrics.features_of(classifier, x)
        row = lambda: metrics.evaluate(x[:100], attributes, classifier, features[100:])  # others: no ties
        expected = row()
        assert error(metrics.features_of(classifier.to(DEVICE), x), features) < 1e-9
        assert row() == pytest.approx(expected, rel=1e-6)
