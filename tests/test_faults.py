"""Faults of files and on the command line, a row each: the call, and the words that its one error must hold."""
import dataclasses
import errno
import io
import math
import os
import signal
import subprocess
import sys
import zipfile

import pytest
import torch

import sample_toy
import train_toy
from conftest import check, random_model
from experiments import evidence
from toy import command, files
from toy.metrics import AttributeClassifier
from toy.sampling import WEIGHTS, export

NAN, INF = math.nan, math.inf


# ---- Files -------------------------------------------------------------------------------------------------

TINY = dict(image_size=8, patch=4, width=16, depth=2, heads=2, text_depth=1)
SHORT = dict(iterations=10, batch=4, classifier_iterations=1)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """This computer has a CPU alone."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture(scope="module", autouse=True)
def made(tmp_path_factory):
    """What a training of ten steps writes: {name: bytes}. Trainings here are that short, and have no table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_toy.RECIPES, "digits", dataclasses.replace(train_toy.RECIPES["digits"], model=TINY))
        patch.setattr(train_toy, "compare", lambda *given, **named: {})
        patch.setattr(train_toy, "draw_loss", lambda *given: None)
        out = tmp_path_factory.mktemp("made")
        train_toy.main(out=str(out), device="cpu", **SHORT)
        yield {path.name: path.read_bytes() for path in out.glob("*.pt")}


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def edited(change):
    """A damage that changes the loaded dict and saves it again, with the right check sums."""
    def damage(raw):
        state = torch.load(io.BytesIO(raw), weights_only=True)
        change(state)
        return saved(state)
    return damage


def put(name, *keys, value=NAN):
    """Puts a number into a tensor, the last element of state[name][key]..."""
    def change(state):
        part = state[name]
        for key in keys:
            part = part[key]
        part.view(-1)[-1] = value
    return edited(change)


def settings(name, **changes):
    return edited(lambda state: state[name].update(changes))


def text_zip(raw):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as parts:
        parts.writestr("words.txt", "no weights")
    return file.getvalue()


def middle(raw, damage):
    return raw[:len(raw) // 2] + damage(raw[len(raw) // 2:])


LAYER = "patch_in.weight"
ANY = [
    (lambda raw: b"", "not a zip file"), (lambda raw: b"no weights", "not a zip file"), (lambda raw: raw[:99], "not a zip file"),
    (lambda raw: raw[:len(raw) // 2], "not a zip file"), (lambda raw: raw[:-1], "not a zip file"), (text_zip, "words.txt"),
    (lambda raw: middle(raw, lambda y: bytes([y[0] ^ 1]) + y[1:]), "damaged: a check sum is wrong"),
    (lambda raw: middle(raw, lambda y: bytes(512) + y[512:]), "damaged: a check sum is wrong"),
    (lambda raw: saved([1, 2]), "it holds a list"), (lambda raw: saved(torch.zeros(2)), "it holds a Tensor"),
    (lambda raw: saved({}), "it holds nothing"), (lambda raw: saved(ValueError("a pickle")), "Weights only load failed"),
]
WEIGHT = [
    *((edited(lambda state, key=key: state.pop(key)), f"'{key}' is missing; it holds ")
      for key in ("config", "model", "classes", "classifier", "reference", "notes")),
    (put("model", LAYER), f"{LAYER} holds NaN"), (put("model", LAYER, value=INF), f"{LAYER} holds NaN or infinity"),
    (put("classifier", "heads.1.bias"), "heads.1.bias holds NaN"), (put("reference"), "reference holds NaN"),
    (settings("config", width=32), "size mismatch"), (settings("config", depth=3), "blocks.2"),
    (settings("config", depths=3), "depths"), (edited(lambda state: state.update(classes=[10, 6])), "size mismatch"),
    (edited(lambda state: state.update(network="residual")), "Missing key"), (edited(lambda state: state.update(model=[])), "list"),
    (lambda raw: None, "a regular file"), ("digits-training.pt", "'config' is missing; it holds settings, judge"),
]
STATE = [
    *((edited(lambda state, key=key: state.pop(key)), f"'{key}' is missing; it holds ")
      for key in ("settings", "judge", "step", "iterations", "seconds", "weak", "curve", "model", "average", "optimizers")),
    (edited(lambda state: state["settings"].pop("lr")), "'lr' is missing"),
    (edited(lambda state: state["judge"].pop("classifier")), "'classifier' is missing"),
    *((put(name, LAYER), f"{LAYER} holds NaN") for name in ("model", "average")),
    (put("weak", "half", LAYER, value=-INF), f"{LAYER} holds NaN"), (put("optimizers", 1, "state", 0, "exp_avg"), "exp_avg holds NaN"),
    (settings("settings", iterations=70), "trained with iterations 70, not 10; give the same settings"),
    (settings("settings", seed=1), "trained with seed 1, not 0"), (settings("settings", config={}), "trained with config {}"),
    (edited(lambda state: state["model"].pop(LAYER)), "Missing key"), (edited(lambda state: state.update(optimizers=[{}, {}])), "is missing"),
    (lambda raw: None, "a regular file"), ("digits.pt", "'settings' is missing; it holds config, model"),
]


@pytest.mark.parametrize("name, damage, words", [
    *(("digits.pt", *row) for row in ANY + WEIGHT), *(("digits-training.pt", *row) for row in ANY + STATE)], ids=lambda _: "")
def test_checkpoints(tmp_path, made, name, damage, words):
    """A damaged or foreign file is one error that names it, and says what it holds and what was expected."""
    path, content = tmp_path / name, made[damage] if isinstance(damage, str) else damage(made[name])
    path.mkdir() if content is None else path.write_bytes(content)
    if name == "digits.pt":
        call, expected = lambda: sample_toy.main(prompt="seven", out=str(tmp_path), checkpoint=str(path)), "weights of train_toy.py"
    else:
        call, expected = lambda: train_toy.main(out=str(tmp_path), resume=True, **SHORT), "the state of a training"
    check(call, f"{path}|{words}" + ("" if "trained" in words or content is None else f"|expected {expected}"))
    assert not list(tmp_path.glob("*.part")) and (content is None or path.read_bytes() == content)


def test_a_flipped_byte_shows(tmp_path):
    """Whichever byte is flipped, the file is refused, or what it holds is the same."""
    state = dict(model={"a": torch.arange(4.0), "b": torch.ones(2, dtype=torch.half)}, notes={"step": 10})
    raw, refused = bytearray(saved(state)), 0
    for i in range(len(raw)):
        raw[i] ^= 255
        (tmp_path / "state.pt").write_bytes(raw)
        try:
            with files.load(tmp_path / "state.pt", "anything") as found:
                assert str(found) == str(state), i
        except files.DataError:
            refused += 1
        raw[i] ^= 255
    assert refused > len(raw) / 2


def fail(number):
    def fsync(handle):
        raise OSError(number, os.strerror(number))
    return fsync


WRITES = [
    ("taken", "File exists"), ("folder", "not a regular file"), ("pipe", "not a regular file"), ("to_pipe", "not a regular file"),
    ("/dev/null", "not a regular file"), ("/proc/none/x", ""), ("x" * 300, "too long"),
]


@pytest.mark.parametrize("name, words", WRITES, ids=lambda _: "")
def test_places(tmp_path, name, words):
    """What is no regular file, or cannot be made, is refused before anything is computed, and stays as it is."""
    (tmp_path / "folder").mkdir(), os.mkfifo(tmp_path / "pipe"), (tmp_path / "to_pipe").symlink_to("pipe")
    (tmp_path / "taken").write_text("mine")
    path, before = tmp_path / name / ("x" if name == "taken" else ""), sorted(os.listdir(tmp_path))
    for call in (lambda: files.writable(path), lambda: files.write_whole(path, lambda file: pytest.fail("computed")),
                 lambda: files.save(path, {}), lambda: sample_toy.main(prompt="seven", out=str(tmp_path), picture=str(path))):
        check(call, f"cannot write {path}|{words}|--out")
    assert sorted(os.listdir(tmp_path)) == before and (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("write", [lambda path: files.save(path, dict(x=torch.ones(9))), lambda path: files.write_whole(path, lambda f: f.write(bytes(2345))),
                                   lambda path: export(path, random_model(), AttributeClassifier((4,)), torch.ones(2, 3), {})], ids=lambda _: "")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(tmp_path, monkeypatch, write, number):
    """The error has the path, the bytes that it takes and those that are free; the older file is whole."""
    (tmp_path / "a.pt").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fail(number))
    with pytest.raises(files.DiskFull, match=r"no space for .*a\.pt: it needs [\d,]{3,} bytes, and [\d,]+ are free"):
        write(tmp_path / "a.pt")
    assert os.listdir(tmp_path) == ["a.pt"] and (tmp_path / "a.pt").read_bytes() == b"old"


@pytest.mark.parametrize("state", [dict(a=torch.tensor(NAN)), dict(a=dict(b=[torch.tensor([0, INF])]))], ids=lambda _: "")
def test_numbers_that_are_not_finite_are_not_saved(tmp_path, state):
    """A model that diverged does not take the place of one that is good."""
    with pytest.raises(FloatingPointError, match="holds NaN or infinity; .*a.pt is not written"):
        files.save(tmp_path / "a.pt", state)
    assert os.listdir(tmp_path) == []


def test_links_are_followed(tmp_path):
    """A link to a file, or to one that is not there yet, stays, and its file gets the content."""
    (tmp_path / "old").write_text("old"), (tmp_path / "to_old").symlink_to("old"), (tmp_path / "to_new").symlink_to("folder/new")
    for name, target in (("to_old", "old"), ("to_new", "folder/new")):
        files.write_whole(tmp_path / name, lambda file: file.write(b"new"))
        assert (tmp_path / name).is_symlink() and (tmp_path / target).read_text() == "new"


def test_what_a_dead_process_left_is_cleared(tmp_path):
    """A temporary file goes with the next write if its process is dead, and no other file goes."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = f".a.pt.{os.getpid()}.x.part .a.pt.1.x.part .a.pt.x.part a.{dead.pid}.x.part .a.{dead.pid}.x a.pt".split()
    for name in (*names, f".a.pt.{dead.pid}.abc.part", f".b.pt.{10**30}.x.part"):
        (tmp_path / name).write_text("")
    files.writable(tmp_path / "c.pt")
    assert sorted(os.listdir(tmp_path)) == sorted(names)


def test_one_training_in_a_folder(tmp_path):
    """A second training of the same data set is an error that names the process; a stale lock is no obstacle."""
    lock = tmp_path / ".digits.lock"
    with files.locked(lock):
        check(lambda: train_toy.main(out=str(tmp_path), **SHORT), f"process {os.getpid()} is at work there|.digits.lock|--out")
        with files.locked(tmp_path / ".mnist.lock"):
            pass
    lock.write_text("1")
    with files.locked(lock):
        assert lock.read_text() == str(os.getpid())


# ---- The command line --------------------------------------------------------------------------------------


def bad(low, high, whole=False, extra=()):
    """Values that a number from `low` to `high` refuses."""
    return [low - 1, high * 10, NAN, INF, "many", "", True, 1e38, *([1.5] if whole else []), *extra]


TRAIN = dict(seed=bad(0, 2**32 - 1, True, ["9" * 20]), save_every=bad(0, 10**9, True), steps=bad(1, 1000, True), minutes=bad(0, 1e5, extra=[0.0]),
             iterations=bad(1, 10**9, True), batch=bad(1, 10**5, True, ["9" * 12]), lr=bad(0, 10, extra=[0.0]), ema=bad(0, 1, extra=[1.0]),
             samples=bad(6, 10**5, True), classifier_iterations=bad(1, 10**6, True), out=["", " ", "a\0b"], data_dir=[""],
             device=["tpu", "cuda:0", 0], dataset=["mnits", ""], resume=["yes", 2], compile=["no"])
SAMPLE = dict(count=bad(1, 100, True, [10**9]), samples=bad(6, 10**5, True), steps=bad(1, 1000, True), seed=bad(0, 2**32 - 1, True),
              w=bad(-100, 100), tau_i=bad(0, 100), tau_c=bad(0, 100), alpha=bad(-100, 100), gamma=bad(0, 100, extra=[0.0]), K=bad(1, 100, True),
              kappa=bad(0, 1), layers=["5:3", "3:3", "3", "a:b", ":", "-1:3", "3:", "", range(0), range(1, 7, 2), [1], 2], negative=["none", ""],
              method=["sgd", ""], dataset=["imagenet"], out=[""], picture=[""], checkpoint=[""], data_dir=[" "], device=["gpu"])
OPTIONS = [(main, {name: value}, f"--{name.replace('_', '-')}") for main, table in ((train_toy.main, TRAIN), (sample_toy.main, SAMPLE))
           for name, values in table.items() for value in values]
HERE = dict(prompt="seven")  # with the shipped weights
TOGETHER = [
    (train_toy.main, dict(minutes=1.0, iterations=5), "minutes=1.0 and iterations=5 exclude each other"),
    (train_toy.main, dict(save_every=7), "save_every=7 must be a multiple of 10"), (train_toy.main, dict(data_dir="x"), "data_dir='x' has no effect"),
    (train_toy.main, dict(itertions=5), "--itertions=5"), (sample_toy.main, dict(HERE, tau=1), "--tau=1"),
    *((main, dict(given, device=name), f"device='{name}' is not there; this computer has: cpu") for name in ("cuda", "mps")
      for main, given in ((train_toy.main, SHORT), (sample_toy.main, HERE), (sample_toy.main, dict(compare=True)))),
    (sample_toy.main, {}, "either --prompt or --compare"), (sample_toy.main, dict(HERE, compare=True), "either --prompt or --compare"),
    (sample_toy.main, dict(compare=True, count=3), "count=3 has no effect with --compare"),
    (sample_toy.main, dict(HERE, samples=9), "samples=9 has no effect without --compare"),
    (sample_toy.main, dict(HERE, data_dir="x"), "data_dir='x' has no effect without --compare"),
    *((sample_toy.main, dict(mode, method=method, **given), f"{name}={given[name]!r} has no effect with method='{method}'|obeys")
      for mode in (HERE, dict(compare=True)) for method, name, given in (
          ("none", "w", dict(w=3.0)), ("cfg", "tau_i", dict(tau_i=0.1)), ("i-erg", "tau_c", dict(tau_c=0.1)), ("c-erg", "K", dict(K=2)),
          ("apg", "layers", dict(layers=range(1, 2))), ("cads", "kappa", dict(kappa=0.1)))),
    (sample_toy.main, dict(HERE, negative="same"), "negative='same' has no effect"),
    (sample_toy.main, dict(HERE, method="i-erg", tau_i=1.0), "has no effect: tau_i = alpha = gamma = K = 1"),
    *((sample_toy.main, dict(prompt="", method=method), "has no effect with an empty prompt") for method in ("cfg", "apg", "c-erg")),
    (sample_toy.main, dict(HERE, layers=range(3, 99)), "layers=range(3, 99) must end at most with the depth, 8"),
    (sample_toy.main, dict(HERE, layers="3:99"), "layers=range(3, 99)"), (sample_toy.main, dict(prompt="a pink seven"), "unknown word 'pink'"),
    (sample_toy.main, dict(prompt=5), "unknown word '5'"), (sample_toy.main, dict(prompt="a " * 9), "has 9 words"),
    (sample_toy.main, dict(HERE, dataset="mnist", checkpoint=str(WEIGHTS / "digits.pt")), "not trained on dataset='mnist'"),
    (sample_toy.main, dict(HERE, checkpoint="nowhere.pt"), "cannot read nowhere.pt (No such file|weights/: cifar10"),
    *((main, dict(given, out="/proc/none"), "cannot write /proc/none/") for main, given in (
        (train_toy.main, SHORT), (sample_toy.main, HERE), (sample_toy.main, dict(compare=True)))),
    (train_toy.main, dict(SHORT, resume=True), "No such file|start without --resume, or name its folder with --out"),
]


@pytest.mark.parametrize("main, options, words", OPTIONS + TOGETHER, ids=lambda _: "")
def test_options(tmp_path, monkeypatch, main, options, words):
    """An option out of range, of another type, or without effect is named with what is allowed, before any work."""
    for work in ("toy.sampling.sample", "train_toy.train_classifier", "toy.data.fetch"):
        monkeypatch.setattr(work, lambda *given, **named: pytest.fail("worked"))
    given = {"out": str(tmp_path / "out"), **options}
    check(lambda: main(**given), words)
    assert not list(tmp_path.glob("out/[!.]*"))


def test_an_uneven_batch(tmp_path, monkeypatch):
    """Each process takes an equal part of a batch."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    check(lambda: train_toy.main(batch=15, out=str(tmp_path)), "batch=15 must be a multiple of the 2 processes")


def stop(**options):
    raise KeyboardInterrupt


def oops(**options):
    raise RuntimeError("a fault\nof w=3 in torch")


SCRIPTS = dict(train=(train_toy.main, train_toy.arguments), sample=(sample_toy.main, sample_toy.arguments),
               evidence=(evidence.main, evidence.arguments), stop=(stop, train_toy.arguments), oops=(oops, sample_toy.arguments))


@pytest.mark.parametrize("typed, code, words", [
    ("train --lr inf", 2, "error: argument --lr: inf must be a number from 1e-09 to 10"), ("train --seed -1", 2, "--seed: -1 must be a whole number from 0 to"),
    ("train --batch", 2, "--batch: expected one argument"), ("train --device cuda", 2, "error: --device 'cuda' is not there"),
    ("train --save-every 7", 2, "error: --save-every 7 must be"), ("train --minutes 1 --iterations 9", 2, "--minutes 1.0 and --iterations 9 exclude"),
    ("train --out=", 2, "argument --out: '' must be the name"), ("train --resume --out nowhere", 2, "error: cannot read nowhere/digits-training.pt"),
    ("sample --prompt seven --K 0", 2, "--K: 0 must be a whole number"), ("sample --prompt seven --tau-i -1", 2, "--tau-i: -1 must be a number from 0"),
    ("sample --compare --method none --w 3", 2, "error: --w 3.0 has no effect with --method 'none'"),
    ("sample --prompt seven --method cfg --tau-i 0.1", 2, "--tau-i 0.1 has no effect with --method 'cfg', which obeys: w"),
    ("sample --prompt seven --layers 4:2", 2, "--layers: 4:2 must be FIRST:END"), ("sample --tau 1", 2, "unrecognized arguments: --tau 1"),
    ("sample seven", 2, "unrecognized arguments: seven"), ("evidence table9", 2, "invalid choice: 'table9'"), ("evidence --sets imagenet", 2, "invalid choice: 'imagenet'"),
    ("evidence --cache=", 2, "--cache: '' must be"), ("evidence --quick --out /proc/none", 2, "cannot write /proc/none/"),
    ("evidence --quick --cache /proc/none --out x", 2, "cannot write /proc/none/"), ("evidence --device cuda --quick --out x", 2, "--device 'cuda' is not there"),
    ("evidence page --out nowhere", 2, "nowhere/evidence.json is damaged"), ("stop", 130, "stopped"),
    ("oops", 1, "error: RuntimeError: a fault of --w 3 in torch (ERG_DEBUG=1 shows where)"),
], ids=lambda _: "")
def test_the_door(tmp_path, monkeypatch, capsys, typed, code, words):
    """Errors leave in one line that names flags as they are typed: 2 is the user's, 130 Ctrl-C, 1 any other; ERG_DEBUG has the traceback."""
    monkeypatch.chdir(tmp_path)
    script, *arguments = typed.split()
    main, parser = SCRIPTS[script]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    for debug in ("", "1"):
        monkeypatch.setenv("ERG_DEBUG", debug)
        with pytest.raises(SystemExit) as end:
            command.run(main, parser())
        error = capsys.readouterr().err
        assert end.value.code == code and words in error and ("Traceback" in error) == (bool(debug) and code != 130), error
        assert debug or error.count("\n") == 1


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_wait_for_the_step(name):
    """Ctrl-C, SIGTERM and a closed terminal ask a training to stop and save, at once the second time; nohup stays in force."""
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with train_toy.Interrupt() as ignored:
            signal.raise_signal(number)
        signal.signal(number, signal.SIG_DFL)
        with train_toy.Interrupt() as asked, pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
            assert asked.stop
            signal.raise_signal(number)
        assert not ignored.stop and signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
