"""train_toy.py: training, stopping and going on, several processes, and sampling from the command line."""
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_toy
from experiments import data
from tiny_dit import Config, TinyDiT

ROOT = Path(train_toy.__file__).resolve().parent
SMALL = dict(batch=16, samples=12, classifier_iterations=5, steps=3, save_every=10)


def command(*arguments, **environment):
    """Arguments and environment of a subprocess that runs train_toy.py on one thread."""
    return dict(args=[sys.executable, str(ROOT / "train_toy.py"), *map(str, arguments)], cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment})


def flags(**options):
    return [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", value)]


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
    return all(equal(a[key], b[key]) for key in ("step", "curve", "model", "average", "optimizer", "early", "settings"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of one short training that nothing disturbed."""
    out = tmp_path_factory.mktemp("finished")
    torch.set_num_threads(1)
    table = train_toy.main(iterations=60, out=str(out), **SMALL)
    return out, table


# Training


def test_the_whole_job_writes_everything(finished):
    """One call trains, compares and writes weights, an early model, pictures and figures that hold what the table says."""
    out, table = finished
    assert set(table) == {"held out", "no guidance", "CFG", "ERG"}
    for row in table.values():
        assert set(row) == {"frechet", "precision", "recall", "density", "coverage", "prompt"}
        assert all(math.isfinite(value) for value in row.values())
    for name in ("digits.png", "digits-loss.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "digits.json").read_text())["table"] == table
    model, classifier, reference, notes = train_toy.load_checkpoint(out / "digits.pt")
    assert reference.shape[1] == 64 and notes["table"] == table and "train" not in str(model.training)
    average = training_state(out)["average"]
    assert all(torch.equal(value, average[name].half().float()) for name, value in model.state_dict().items())
    early, *_ = train_toy.load_checkpoint(out / "digits-early.pt")
    assert all(torch.equal(value, training_state(out)["early"][name].half().float()) for name, value in early.state_dict().items())
    assert not equal(early.state_dict(), model.state_dict())


def test_training_learns(finished):
    """The loss falls, and its curve has a column for each bin of t."""
    curve = training_state(finished[0])["curve"]
    assert curve.shape == (6, train_toy.BINS)
    assert curve[-1].nanmean() < 0.9 * curve[0].nanmean()


def test_ema_is_the_average_of_the_weights(tmp_path, monkeypatch):
    """The averaged model obeys a <- r a + (1 - r) m at every step, with the stated warm-up of r."""
    seen, original = [], torch._foreach_lerp_

    def record(averages, models, weight):
        before = averages[0].clone()
        original(averages, models, weight)
        seen.append(((before + weight * (models[0].detach() - before) - averages[0]).abs().max().item(), weight))

    monkeypatch.setattr(torch, "_foreach_lerp_", record)
    train_toy.main(iterations=20, out=str(tmp_path), ema=0.6, **SMALL)
    assert len(seen) == 20 and max(error for error, _ in seen) < 1e-6
    assert [weight for _, weight in seen] == pytest.approx([1 - min(0.6, (i + 1) / (i + 10)) for i in range(20)])


def test_learning_rate_schedules():
    """Linear: constant, then down over the last 40 %; cosine: half a wave; both after a linear warm-up of 100 steps."""
    rate = lambda step, schedule: train_toy.learning_rate(step, 1000, 2.0, schedule)
    assert rate(0, "linear") == pytest.approx(0.02) and rate(49, "linear") == pytest.approx(1.0)
    assert [rate(step, "linear") for step in (100, 600, 800, 999)] == pytest.approx([2.0, 2.0, 1.0, 0.005])
    assert [rate(step, "cosine") for step in (500, 750)] == pytest.approx([1.0, 1 + math.cos(0.75 * math.pi)])


def test_every_training_option_bites(tmp_path):
    """Each option of the training changes the averaged weights; the same options give the same weights."""
    images, recipe = data.load("digits"), train_toy.RECIPES["digits"]
    recipe = dataclasses.replace(recipe, model={**recipe.model, "depth": 2, "width": 32})
    base = dict(iterations=12, batch=8, lr=1e-3, schedule="linear", ema=0.9, clip=1.0, seed=0, device=torch.device("cpu"),
                compile=False, resume=False, save_every=0)

    def weights(recipe=recipe, **change):
        return train_toy.train(images, recipe, tmp_path, **{**base, **change})[0].state_dict()

    plain = weights()
    assert equal(weights(), plain)
    for change in (dict(lr=1e-4), dict(schedule="cosine"), dict(ema=0.5), dict(clip=0.01), dict(seed=1), dict(batch=4),
                   dict(recipe=dataclasses.replace(recipe, t_mean=-1.0))):
        assert not equal(weights(**change), plain), change


def test_kill_at_any_moment_and_resume(finished, tmp_path):
    """After two kill -9 and two --resume, weights, optimizer and loss curve are those of the undisturbed run, bit for bit."""
    arguments = [*flags(iterations=60, out=tmp_path, **SMALL)]
    for kill_at in (10, 30):
        process = subprocess.Popen(**command(*arguments, *(["--resume"] if kill_at > 10 else [])),
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.time() + 60
        while time.time() < deadline and process.poll() is None:
            if (tmp_path / "digits-training.pt").is_file() and training_state(tmp_path)["step"] >= kill_at:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert kill_at <= training_state(tmp_path)["step"] < 60
    done = subprocess.run(**command(*arguments, "--resume"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert same_training(training_state(tmp_path), training_state(finished[0]))


def test_ctrl_c_saves_and_says_how_to_go_on(finished, tmp_path, monkeypatch, capsys):
    """Ctrl-C ends between two steps with a checkpoint and the command to go on; going on gives the undisturbed run."""
    draw = train_toy.draw_batch

    def interrupted(*arguments):
        if arguments[-1] == 25:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(*arguments)

    options = dict(iterations=60, out=str(tmp_path), **{**SMALL, "save_every": 0})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_toy, "draw_batch", interrupted)
        train_toy.main(**options)
    assert training_state(tmp_path)["step"] == 30  # the next logged step
    output = capsys.readouterr().out
    assert "To go on: python train_toy.py --iterations 60" in output and output.rstrip().endswith("--resume")
    train_toy.main(resume=True, **options)
    assert same_training(training_state(tmp_path), training_state(finished[0]))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_two_processes_are_one(finished, tmp_path):
    """Two gloo processes with the same global batch have the loss curve and weights of one, within rounding."""
    run = command(*flags(iterations=60, out=tmp_path, **SMALL))
    run["args"][1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(**run, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = training_state(finished[0]), training_state(tmp_path)
    torch.testing.assert_close(two["curve"], one["curve"], rtol=2e-3, atol=1e-4, equal_nan=True)
    for name, value in one["average"].items():
        torch.testing.assert_close(two["average"][name], value, rtol=0, atol=2e-3)


def test_resume_faults(finished, tmp_path):
    """Nothing to resume, and other settings than those of the checkpoint, are clear errors."""
    with pytest.raises(FileNotFoundError, match="does not exist; start without --resume"):
        train_toy.main(iterations=60, out=str(tmp_path), resume=True, **SMALL)
    with pytest.raises(ValueError, match="trained with iterations=60, not 70"):
        train_toy.main(iterations=70, out=str(finished[0]), resume=True, **SMALL)


def test_faults_show_before_the_training(tmp_path, monkeypatch):
    """An unwritable folder and an uneven batch end in one line before any training."""
    (tmp_path / "file").write_text("")
    done = subprocess.run(**command(*flags(out=tmp_path / "file" / "out")), capture_output=True, text=True)
    assert done.returncode == 1 and "cannot write into" in done.stderr and "Traceback" not in done.stderr
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train_toy.dist, "init_process_group", lambda *_: None)
    with pytest.raises(ValueError, match="batch=15 must be a multiple of the 2 processes"):
        train_toy.main(batch=15, out=str(tmp_path))


@pytest.mark.parametrize("wrong, message", [
    (dict(iterations=0), "iterations=0"), (dict(batch=0), "batch=0"), (dict(steps=0), "steps=0"), (dict(clip=0.0), "clip=0.0"),
    (dict(ema=1.5), "ema=1.5"), (dict(save_every=7), "save_every=7"), (dict(samples=5), "samples=5"), (dict(kappa=3.0), "kappa=3.0"),
    (dict(layers=(9, 12)), "layers=9:12 must end at 8"), (dict(tau_i=-1.0), "tau=-1.0"), (dict(data_dir="x"), "--data-dir x has no effect"),
    (dict(negative="same"), "--negative same has no effect with training"),
])
def test_bad_numbers_show_before_the_training(tmp_path, wrong, message):
    """A number out of range, or an option without effect, is an error that names it, and nothing is written."""
    with pytest.raises(ValueError) as error:
        train_toy.main(out=str(tmp_path / "out"), **wrong)
    assert message in str(error.value) and not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    """A diverging run ends with the step and the remedy, and keeps the last good checkpoint."""
    monkeypatch.setattr(train_toy, "flow_matching_loss", lambda model, x, c, *_: model(x, 0.5, c).flatten(1).mean(1) * float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan at step 10; try a smaller --lr"):
        train_toy.main(iterations=60, out=str(tmp_path), **SMALL)
    assert not (tmp_path / "digits-training.pt").exists()


def test_cifar10_trains_from_official_files(tmp_path):
    """CIFAR-10 in its binary layout trains, resumes and samples by caption."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        records = torch.randint(256, (20, 3073), generator=generator, dtype=torch.uint8)
        records[:, 0] %= 10
        (folder / name).write_bytes(records.numpy().tobytes())
    with pytest.MonkeyPatch.context() as patch:
        small = dataclasses.replace(train_toy.RECIPES["cifar10"], model=dict(image_size=32, patch=8, width=16, depth=6, heads=2), layers=(2, 4))
        patch.setitem(train_toy.RECIPES, "cifar10", small)
        options = dict(dataset="cifar10", data_dir=str(tmp_path), out=str(tmp_path / "out"), **SMALL)
        table = train_toy.main(iterations=20, **options)
        assert train_toy.main(iterations=20, resume=True, **options) == table
        images = train_toy.main(prompt="a photo of a horse", dataset="cifar10", out=str(tmp_path / "out"), count=2, steps=2)
    assert images.shape == (2, 3, 32, 32)


# Sampling


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint whose every weight matters, as the sampler sees it."""
    from conftest import random_model
    images = data.load("digits")
    model = random_model(depth=6, vocabulary=images.vocabulary).float()
    path = tmp_path_factory.mktemp("checkpoint") / "digits.pt"
    train_toy.export(path, model, train_toy.AttributeClassifier((10, 6, 4)), torch.zeros(6, 64), {})
    return str(path)


def draw(checkpoint, tmp_path, **options):
    options = dict(prompt="a red seven on blue", count=2, steps=6) | options
    return train_toy.main(checkpoint=checkpoint, out=str(tmp_path), **options)


def test_every_mechanism_changes_the_picture(checkpoint, tmp_path):
    """w, tau_i, tau_c, alpha, gamma, K, kappa, layers, negative, method, steps, seed and prompt each change the sample."""
    changes = [dict(), dict(w=3.0), dict(tau_i=0.5), dict(tau_c=0.5), dict(alpha=0.8), dict(gamma=1.5), dict(tau_i=0.5, K=2),
               dict(kappa=0.6), dict(layers=(4, 6)), dict(seed=1), dict(method="i-erg", negative="same"),
               *(dict(method=m) for m in ("none", "cfg", "c-erg", "i-erg", "erg+apg", "erg+cads"))]
    results = [draw(checkpoint, tmp_path, **change) for change in changes]
    for i, a in enumerate(results):
        assert torch.equal(a, draw(checkpoint, tmp_path, **changes[i]))  # and the same again for the same flags
        for j, b in enumerate(results[:i]):
            assert (a - b).abs().max() > 1e-3, (changes[i], changes[j])
    assert (tmp_path / "erg.png").read_bytes().startswith(b"\x89PNG")


def test_flags_that_would_do_nothing_raise(checkpoint, tmp_path):
    """A flag that the method ignores is an error that names both."""
    for options, message in ((dict(method="none", w=2.0), "w=2.0 has no effect with method='none'"),
                             (dict(method="cfg", tau_i=0.1), "tau_i=0.1 has no effect with method='cfg'"),
                             (dict(method="i-erg", tau_c=0.1), "tau_c=0.1 has no effect"),
                             (dict(method="erg", negative="same"), "negative='same' has no effect"),
                             (dict(method="cfg", prompt=""), "method='cfg' has no effect with an empty prompt")):
        with pytest.raises(ValueError, match=re.escape(message)):
            draw(checkpoint, tmp_path, **options)


def test_flags_of_another_mode_raise(checkpoint, tmp_path):
    """A training flag with --prompt, or a sampling flag in training, is an error before anything runs."""
    for options, message in ((dict(prompt="seven", iterations=5), "--iterations 5 has no effect with --prompt"),
                             (dict(compare=True, resume=True), "--resume True has no effect with --compare"),
                             (dict(method="cfg"), "--method cfg has no effect with training")):
        with pytest.raises(ValueError, match=message):
            train_toy.main(checkpoint=checkpoint if "prompt" in options else None, out=str(tmp_path), **options)
    assert not list(tmp_path.iterdir())


def test_compare_tables_every_method(finished, capsys):
    """--compare samples all methods from a checkpoint; its rows for the trained comparison are the same numbers."""
    out, table = finished
    rows = train_toy.main(compare=True, out=str(out), samples=12, steps=3)
    assert list(rows) == ["held out", "no guidance", "CFG", "C-ERG", "I-ERG", "ERG", "ERG+APG", "ERG+CADS"]
    assert rows["no guidance"]["frechet"] == pytest.approx(table["no guidance"]["frechet"], rel=0.05)
    assert "ERG+CADS" in capsys.readouterr().out
    one = train_toy.main(compare=True, method="c-erg", out=str(out), samples=12, steps=3)
    assert list(one) == ["held out", "C-ERG"] and one["C-ERG"] == rows["C-ERG"]
    other = dataclasses.replace(data.load("digits"), pixels=torch.zeros(1, 28, 28))
    with pytest.raises(ValueError, match="was not trained on dataset='mnist'"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_toy.data, "load", lambda *_: other)
            train_toy.main(compare=True, dataset="mnist", checkpoint=str(out / "digits.pt"), out=str(out))


def test_the_command_line_speaks_clearly(checkpoint, tmp_path):
    """An unknown word names the vocabulary, a missing checkpoint those that exist, a wrong range its form: no traceback."""
    for arguments, message in ((["--prompt", "a pink seven", "--checkpoint", checkpoint], "unknown word 'pink'"),
                               (["--prompt", "a red seven", "--checkpoint", "nowhere.pt"], "checkpoint='nowhere.pt' does not exist"),
                               (["--prompt", "seven", "--layers", "5:3"], "must be FIRST:END")):
        done = subprocess.run(**command(*arguments, "--out", tmp_path), capture_output=True, text=True)
        assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
        assert ("white" in done.stderr) == ("pink" in message)
    with pytest.raises(TypeError, match="no option 'itterations'"):
        train_toy.main(itterations=3)


def test_the_sample_does_not_depend_on_the_batch(checkpoint):
    """Without CADS an image depends on its caption and its noise alone, however many are drawn together."""
    model, *_ = train_toy.load_checkpoint(checkpoint)
    settings = train_toy.guidance_settings("erg", train_toy.RECIPES["digits"])
    captions = ["a red seven on blue", "a white two on black", "seven"]
    together, apart = (train_toy.generate(model, captions, settings, steps=3, batch=batch) for batch in (3, 1))
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-4)


def test_a_training_state_is_not_a_checkpoint(finished):
    """The file for --resume is refused as weights, with the name of the right one in the message."""
    with pytest.raises(ValueError, match="without '-training'"):
        train_toy.load_checkpoint(finished[0] / "digits-training.pt")


def test_classifier_heads_and_accuracy():
    """The classifier has a head an attribute; accuracy counts each, and all at once."""
    classifier = train_toy.AttributeClassifier((10, 6, 4)).eval()
    x = torch.rand(5, 3, 8, 8)
    outputs = classifier(x)
    assert [y.shape for y in outputs] == [(5, 10), (5, 6), (5, 4)]
    right = torch.stack([y.argmax(1) for y in outputs], 1)
    right[0, 0] = (right[0, 0] + 1) % 10
    right[1, 2] = (right[1, 2] + 1) % 4
    assert classifier.accuracy(x, right) == pytest.approx([0.8, 1.0, 0.8, 0.6])


# The shipped weights


SHIPPED = sorted(path.stem for path in train_toy.WEIGHTS.glob("*.pt"))


def test_digits_and_mnist_are_shipped():
    """The repository holds a digits and a mnist checkpoint, each with its early model, in 30 MB at most."""
    assert {"digits", "digits-early", "mnist", "mnist-early"} <= set(SHIPPED)
    assert sum(path.stat().st_size for path in train_toy.WEIGHTS.glob("*.pt")) < 30e6


@pytest.mark.parametrize("name", [name for name in SHIPPED if not name.endswith("-early")])
def test_shipped_weights_draw_what_the_prompt_says(name):
    """Unguided samples of the shipped model show the prompt to its own classifier; CFG shows it more often."""
    model, classifier, reference, notes = train_toy.load_checkpoint(train_toy.WEIGHTS / f"{name}.pt")
    words = data.OBJECTS if name == "cifar10" else data.DIGITS
    labels = torch.arange(40) % 10
    captions = [data.caption(words[n]) if name == "cifar10" else data.caption(words[n], "red", "blue") for n in labels]
    accuracy = []
    for method in ("none", "cfg"):
        x = train_toy.generate(model, captions, train_toy.guidance_settings(method, train_toy.RECIPES[name]), steps=12)
        accuracy.append(classifier.accuracy(x, labels[:, None])[0])
    assert accuracy[0] > 0.7 and accuracy[1] >= accuracy[0] - 0.05, accuracy
    assert isinstance(model, TinyDiT) and isinstance(model.config, Config)
    assert reference.shape[0] >= 1000 and "command" in notes
