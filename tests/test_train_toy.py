"""train_toy.py: training, stopping and going on, several processes, a box of time."""
import dataclasses
import datetime
import functools
import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sample_toy
import train_toy
from tiny_dit import Config, tokenize
from toy import data, drawing
from toy.sampling import load_checkpoint

ROOT = Path(train_toy.__file__).resolve().parent
SMALL = dict(batch=16, samples=12, classifier_iterations=5, steps=3, save_every=10)
RECIPE = train_toy.RECIPES["digits"]
TINY = dataclasses.replace(RECIPE, model={**RECIPE.model, "depth": 2, "width": 32})


@pytest.fixture(autouse=True, scope="module")
def tiny():
    """Trainings here are of a smaller model than the data set's recipe has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_toy.RECIPES, "digits", TINY)
        yield


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Pictures take as long as these trainings: only `finished`, which is made before, draws them."""
    monkeypatch.setattr(drawing, "draw_grid", lambda *given: None)
    monkeypatch.setattr(train_toy, "draw_loss", lambda *given: None)


def process(first="", environment=(), **options):
    """Another process that trains on one thread as train_toy.main(**options) does here, after the code `first`.

    It ends without Python's clearing up, in which threads of gloo were seen to abort on a busy machine.
    """
    code = f"import os, train_toy\ntrain_toy.RECIPES['digits'] = train_toy.{TINY}\n{first}\ntrain_toy.main(**{options})\nos._exit(0)"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **dict(environment)})


def training_state(folder, name="digits"):
    return torch.load(Path(folder) / f"{name}-training.pt", weights_only=True)


def equal(a, b):
    """Whether nested states are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def same_training(a, b):
    keys = ("step", "curve", "model", "average", "optimizers", "weak", "settings")
    return all(equal(training_state(a)[key], training_state(b)[key]) for key in keys)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of one short training that nothing disturbed, and its table."""
    out = tmp_path_factory.mktemp("finished")
    torch.set_num_threads(1)
    return out, train_toy.main(iterations=40, out=str(out), **SMALL)


def test_the_whole_job_writes_everything(finished):
    """One call trains, compares and writes weights, an early model, pictures and the table; the loss falls."""
    (out, table), state = finished, training_state(finished[0])
    assert set(table) == {"held out", "no guidance", "CFG", "ERG"}
    for row in table.values():
        assert set(row) == {"frechet", "precision", "recall", "density", "coverage", "prompt"}
        assert all(map(math.isfinite, row.values()))
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in ("digits.png", "digits-loss.png"))
    assert json.loads((out / "digits.json").read_text())["table"] == table
    weak = {f"digits-{name}": kept for name, kept in state["weak"].items()}
    assert set(weak) == {"digits-early", "digits-quarter", "digits-half"}
    for name, kept in {**weak, "digits": state["average"]}.items():
        model, _, reference, notes = load_checkpoint(out / f"{name}.pt")
        assert all(torch.equal(value, kept[key].half().float()) for key, value in model.state_dict().items())
    assert reference.shape[1] == 64 and notes["table"] == table
    assert notes["options"]["iterations"] == notes["step"] == notes["iterations"] == 40
    curve = state["curve"]
    assert curve.shape == (4, train_toy.BINS) and curve[-1].nanmean() < 0.9 * curve[0].nanmean()


@pytest.fixture
def averaged(tmp_path, monkeypatch):
    """A function of options that trains without the table, and returns the averaged weights."""
    monkeypatch.setattr(train_toy, "compare", lambda *given, **named: {})

    def train(**options):
        train_toy.main(out=str(tmp_path), **{**SMALL, "iterations": 4, "batch": 8, "save_every": 0, **options})
        return training_state(tmp_path)["average"]
    return train


def test_ema_is_the_average_of_the_weights(averaged, monkeypatch, tmp_path):
    """The averaged model obeys a <- r a + (1 - r) m, with the stated warm-up of r; weak models are a at 1/16, 1/4, 1/2."""
    seen, path, original = [], [], torch._foreach_lerp_

    def record(averages, models, weight):
        expected = averages[0] + weight * (models[0].detach() - averages[0])
        original(averages, models, weight)
        seen.append(((expected - averages[0]).abs().max().item(), weight))
        path.append(averages[0].clone())

    monkeypatch.setattr(torch, "_foreach_lerp_", record)
    last = averaged(iterations=20, ema=0.6)
    assert len(seen) == 20 and max(error for error, _ in seen) < 1e-6
    first = next(name for name, _ in train_toy.TinyDiT(Config(vocabulary=("a",))).named_parameters())
    weak = training_state(tmp_path)["weak"]
    for name, step in (("early", 1), ("quarter", 5), ("half", 10)):
        assert torch.equal(weak[name][first], path[step - 1]) and not torch.equal(weak[name][first], last[first])
    expected = [1 - min(0.6, (i + 1) / (i + 10)) for i in range(20)]
    assert [weight for _, weight in seen] == pytest.approx(expected)


def newton_schulz(g, steps):
    """The iteration of Muon's authors, in float64: g (n, m) towards the nearest orthogonal matrix."""
    x = g.double() / g.double().norm()
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def test_optimizers():
    """Muon has the matrices of attention and MLPs, AdamW all else; both step as their papers say, at the rate given."""
    torch.manual_seed(0)
    model = train_toy.TinyDiT(Config(vocabulary=("a",), width=32, depth=2, text_depth=1))
    muon, adamw = train_toy.optimizers(model, 0.1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [[names.pop(parameter) for parameter in o.param_groups[0]["params"]] for o in (muon, adamw)]
    kinds = ("attention.qkv.weight", "attention.out.weight", "mlp.0.weight", "mlp.2.weight")
    assert not names and len(groups[0]) == 3 * 4 and all(name.endswith(kinds) for name in groups[0])
    assert not any(name.endswith(kinds) for name in groups[1])
    matrix, bias = model.blocks[0].attention.out, model.blocks[0].mlp[0].bias
    before = matrix.weight.detach().clone(), bias.detach().clone()
    matrix.weight.grad, bias.grad = torch.randn(32, 32), torch.randn(128)
    muon.step(), adamw.step()
    expected = 0.1 * 0.2 * math.sqrt(32) * newton_schulz(matrix.weight.grad, 3)
    assert ((before[0] - matrix.weight) - expected).norm() < 0.02 * expected.norm()  # torch iterates in bfloat16
    assert torch.allclose(before[1] - bias, 0.1 * bias.grad.sign(), atol=1e-5)  # Adam's first step


def test_compilation_by_default(monkeypatch):
    """A long training on a CPU is compiled if a compiler works, a short one is not; a GPU's is."""
    options = lambda **given: SimpleNamespace(**{"iterations": None, "minutes": None, **given})
    working = lambda f: f
    for compiler, expected in ((working, True), (None, False)):
        monkeypatch.setattr(torch, "compile", compiler)
        for given in (dict(iterations=2001), dict(minutes=10.5)):
            assert train_toy.compile_pays(options(**given), torch.device("cpu")) is expected
        for given in (dict(iterations=2000), dict(minutes=10)):
            assert not train_toy.compile_pays(options(**given), torch.device("cpu"))
        assert train_toy.compile_pays(options(iterations=1), torch.device("cuda"))
        assert not train_toy.compile_pays(options(iterations=9000), torch.device("mps"))


def test_learning_rate():
    """A linear warm-up of 100 steps, then constant, then down over the last 40 %; without an end it stays."""
    rates = [train_toy.learning_rate(step, 1000, 2.0) for step in (0, 49, 100, 600, 800, 999)]
    assert rates == pytest.approx([0.02, 1.0, 2.0, 2.0, 1.0, 0.005])
    assert train_toy.learning_rate(10**6, math.inf, 2.0) == 2.0


def test_an_update_is_adams():
    """Gradients are clipped to norm 1, Adam's decays are 0.9 and 0.95, weights do not decay; the curve has mean losses by t."""
    run, t = train_toy.Training(Config(**TINY.model, vocabulary=("a",)), 0.1, 0, torch.device("cpu")), torch.tensor([0.01, 0.3, 0.36, 1.0])
    weight, expected, m, v = run.model.patch_out.bias, run.model.patch_out.bias.detach().double(), 0, 0
    for step in (1, 2, 3):
        x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(step)) * 3 / step**2
        run.update(lambda x, tokens, t, noise: x @ weight + 100 * t, (x, None, t, None), 0.1, 0.995)
        g = x.double().mean(0) / x.double().mean(0).norm().clamp_min(1)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        expected = expected - 0.1 * m / (1 - 0.9**step) / (v / (1 - 0.95**step)).sqrt()
        torch.testing.assert_close(weight.double(), expected, rtol=0, atol=1e-4)
        if step == 1:  # when the loss is 100 t, for the weight is 0
            assert (run.read_loss(), run.step, run.seconds) == (pytest.approx(167 / 4), 1, 0)
            assert run.curve.nan_to_num(-1).tolist() == [pytest.approx([1, -1, 33, -1, -1, -1, -1, 100])]


def test_every_training_option_bites(averaged, monkeypatch):
    """Each option of the training changes the averaged weights; the same options give the same weights."""
    plain = averaged()
    assert equal(averaged(), plain)
    for change in (dict(lr=1e-4), dict(ema=0.1), dict(seed=1), dict(batch=4)):
        assert not equal(averaged(**change), plain), change
    for change in (dict(t_mean=-1.0), dict(flips=True)):
        monkeypatch.setitem(train_toy.RECIPES, "digits", dataclasses.replace(TINY, **change))
        assert not equal(averaged(), plain), change


def test_batches_hold_what_the_recipe_says():
    """A batch is a function of seed and step; a tenth of the captions is null and a tenth the class alone."""
    images = data.load("digits")
    images.name, images.attributes = "cifar10", {"object": tuple(data.OBJECTS)}
    images.pixels = torch.arange(8, dtype=torch.uint8).expand(len(images), 3, 8, 8)  # brighter to the right
    config = Config(vocabulary=images.vocabulary)
    tables, mean = train_toy.caption_tables(images, config), lambda y: y.double().mean().item()
    draw = lambda step: train_toy.draw_batch(images, tables, train_toy.RECIPES["cifar10"], 4000, 0, step)
    x, tokens, t, noise = draw(3)
    assert equal(draw(3), (x, tokens, t, noise)) and not torch.equal(draw(4)[0], x)
    tokens, alone = torch.cat([draw(step)[1] for step in range(5)]), tokenize([f"a {word}" for word in data.OBJECTS], config)
    assert mean((tokens == 0).all(1)) == pytest.approx(0.1, abs=0.007)
    assert mean((tokens[:, None] == alone).all(2).any(1)) == pytest.approx(0.1, abs=0.02)
    assert mean(x[:, 0, 0, 0] > x[:, 0, 0, -1]) == pytest.approx(0.5, abs=0.03)  # mirrored
    assert tables[0].shape == (10, config.caption_length) and t.shape == (4000,) and noise.shape == x.shape
    assert [stat(y).item() for y in (t.logit(), noise) for stat in (torch.mean, torch.std)] == pytest.approx([0, 1, 0, 1], abs=0.05)


def test_full_captions_are_whole(tmp_path):
    """With --full-captions every caption of a batch is one of the data set's, none empty and none shortened;
    the option is part of what --resume repeats."""
    images = data.load("digits")
    tables = train_toy.caption_tables(images, Config(vocabulary=images.vocabulary))
    recipe = dataclasses.replace(train_toy.RECIPES["digits"], full_captions=True)
    _, tokens, *_ = train_toy.draw_batch(images, tables, recipe, 1000, 0, 3)
    assert (tokens[:, None] == tables[0].flatten(0, -2)).all(2).any(1).all()
    options = dict(SMALL, iterations=10, out=str(tmp_path))
    train_toy.main(full_captions=True, **options)
    with pytest.raises(data.DataError, match="full_captions True, not False"):
        train_toy.main(resume=True, **options)


KILL = """
def stop(module, name, at, calls=[]):
    plain = getattr(module, name)
    setattr(module, name, lambda *given: calls.append(1) or (len(calls) == at and os.kill(os.getpid(), 9)) or plain(*given))
"""


def test_kill_at_any_moment_and_resume(finished, tmp_path):
    """After two kill -9, in a step and in a save, and two --resume, the state is that of an undisturbed run."""
    options = dict(iterations=40, out=str(tmp_path), **SMALL)
    # a save writes six files, of which the training's state is the first; a temporary file is left
    for moment, resume, step in (("train_toy, 'draw_batch', 16", False, 10), ("os, 'fsync', 6 + 1", True, 20)):
        killed = process(KILL + f"stop({moment})", resume=resume, **options)
        _, errors = killed.communicate(timeout=100)
        assert killed.returncode == -signal.SIGKILL, errors
        assert training_state(tmp_path)["step"] == step and len(list(tmp_path.glob("*.part"))) == resume
    train_toy.main(resume=True, **options)
    assert same_training(tmp_path, finished[0]) and not list(tmp_path.glob("*.part"))


def test_ctrl_c_saves_and_says_how_to_go_on(finished, tmp_path, monkeypatch, capsys):
    """Ctrl-C ends between two steps with a checkpoint; going on gives the undisturbed run."""
    draw, options = train_toy.draw_batch, dict(iterations=40, out=str(tmp_path), **{**SMALL, "save_every": 0})
    press = lambda *given: given[-1] == 25 and os.kill(os.getpid(), signal.SIGINT) or draw(*given)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_toy, "draw_batch", press)
        train_toy.main(**options)
    assert training_state(tmp_path)["step"] == 30  # the next logged step
    assert "To go on, give the same command with --resume" in capsys.readouterr().out
    train_toy.main(resume=True, **options)
    assert same_training(tmp_path, finished[0])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_two_processes_are_one(finished, tmp_path, monkeypatch):
    """Two gloo processes with the same global batch have the loss and weights of one, within rounding."""
    options = dict(iterations=40, out=str(tmp_path), device="cpu", **SMALL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        places = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    start = functools.partial(train_toy.dist.init_process_group, timeout=datetime.timedelta(seconds=100))
    monkeypatch.setattr(train_toy.dist, "init_process_group", start)
    other = process(environment=dict(places, RANK="1", LOCAL_RANK="1"), **options)
    for name, value in dict(places, RANK="0", LOCAL_RANK="0").items():  # as torchrun does
        monkeypatch.setenv(name, value)
    try:
        train_toy.main(**options)
        assert other.wait(timeout=100) == 0, other.stderr.read()
    finally:
        other.kill()
    one, two = training_state(finished[0]), training_state(tmp_path)
    torch.testing.assert_close(two["curve"], one["curve"], rtol=2e-3, atol=1e-4, equal_nan=True)
    for name, value in one["average"].items():
        torch.testing.assert_close(two["average"][name], value, rtol=0, atol=2e-3)


def test_a_loss_that_is_not_finite_stops_the_run(averaged, tmp_path, monkeypatch):
    """A diverging run ends with the step and the remedy, and keeps the last good checkpoint."""
    loss = train_toy.flow_matching_loss
    monkeypatch.setattr(train_toy, "flow_matching_loss", lambda *given: loss(*given) * float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan at step 10; try a smaller --lr"):
        averaged(iterations=40, save_every=10)
    assert not (tmp_path / "digits-training.pt").exists()


def test_cifar10_trains_from_official_files(tmp_path, monkeypatch):
    """CIFAR-10 in its binary layout trains, resumes and samples by caption."""
    (tmp_path / "cifar-10-batches-bin").mkdir()
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        records = torch.randint(256, (20, 3073), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        records[:, 0] %= 10
        (tmp_path / "cifar-10-batches-bin" / name).write_bytes(records.numpy().tobytes())
    monkeypatch.setattr(data, "RECORDS", 20)
    small = dict(image_size=32, patch=8, width=16, depth=6, heads=2)
    recipe = dataclasses.replace(train_toy.RECIPES["cifar10"], model=small)
    monkeypatch.setitem(train_toy.RECIPES, "cifar10", recipe)
    options = dict(dataset="cifar10", data_dir=str(tmp_path), out=str(tmp_path), **{**SMALL, "classifier_iterations": 1})
    table = train_toy.main(iterations=16, **options)
    assert train_toy.main(iterations=16, resume=True, **options) == table
    _, classifier, *_ = load_checkpoint(tmp_path / "cifar10.pt")
    assert classifier.network == "residual" and classifier(torch.zeros(2, 3, 32, 32))[0].shape == (2, 10)
    images = sample_toy.main(prompt="a horse", dataset="cifar10", out=str(tmp_path), count=2, steps=2)
    assert images.shape == (2, 3, 32, 32)


def test_a_box_of_time_sets_the_iterations(tmp_path, capsys):
    """--minutes measures the speed, says and stores how many iterations fit; --resume uses that number."""
    options = dict(minutes=0.08, out=str(tmp_path), **SMALL)
    train_toy.main(**options)
    state, output = training_state(tmp_path), capsys.readouterr().out
    assert state["seconds"] < 15 and state["step"] == state["iterations"] > 20
    assert "images/s" in output and "iterations in all" in output
    assert set(state["weak"]) == set(train_toy.WEAK) and not equal(state["weak"]["half"], state["average"])
    train_toy.main(resume=True, **options)
    assert equal(training_state(tmp_path), state)


def test_a_cpu_is_told_how_long_it_takes(tmp_path, monkeypatch, capsys):
    """Before any work it says for how long, and from hours on that a GPU is meant; --minutes bounds the classifier."""
    asked = []

    def judge(job, kept):
        asked.append((job.options.classifier_iterations, [p.grad for p in job.run.model.parameters() if p.grad is not None]))
        raise KeyboardInterrupt

    monkeypatch.setattr(train_toy.Job, "judge", judge)
    for options, words in ((dict(iterations=10**8), "hours on 1 thread"), (dict(iterations=1), "minutes on 1 thread"),
                           (dict(minutes=0.2), "")):
        with pytest.raises(KeyboardInterrupt):
            train_toy.main(device="cpu", out=str(tmp_path), **options)
        output = capsys.readouterr().out
        assert words in output and ("meant for a GPU" in output) == ("hours" in words) and bool(words) == bool(output)
    assert asked[:2] == [(1000, [])] * 2 and 1 <= asked[2][0] < 1000


def test_the_speed_leaves_out_the_first_steps():
    """After a slow start and then 10 steps a second, 970 fit into 100 seconds: 3 % are spare."""
    run, marks = SimpleNamespace(step=0, iterations=None, device="cpu"), []
    with pytest.MonkeyPatch.context() as patch:
        for run.step, now, fit in ((10, 60.0, None), (20, 61.0, None), (30, 67.0, 30 + 176), (120, 76.0, pytest.approx(120 + 970, abs=1)),
                                   (130, 175.5, 130 + 1), (131, 176.0, 131)):
            patch.setattr(train_toy.time, "time", lambda now=now: now)
            assert train_toy.fit_iterations(run, marks, 176.0, 64) == fit
