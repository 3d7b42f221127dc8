"""Faults in Python: arguments, data, the cache. A row each: the call, and the words that its one error must hold."""
import dataclasses
import functools
import gzip
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import erg
from conftest import WORDS, check, random_model
from experiments import runs
from experiments.diagnostics import attention_certainty, difference_norms, layer_effects, velocity_variances
from experiments.rivals import (Rewired, SmoothedAttention, autoguidance, gaussian_blur, identity_attention, make_icg, pag, s2,
                                seg, self_guidance, tsg)
from experiments.statistics import difference, equivalence, jackknife, mcnemar, t_below, t_quantile
from test_data import ARCHIVE, BATCHES, BODY, GOOD, RAW, RECORDS, batches, http, idx, source, tar_gz, tree, web  # noqa: F401
from tiny_dit import Config, drop_words, sample, tokenize
from toy import data
from toy.metrics import AttributeClassifier
from toy.metrics import frechet_distance as frechet
from toy.metrics import precision_recall_density_coverage as manifold
from toy.sampling import CADS, generate, prepare, recommended

NAN, INF = math.nan, math.inf


# ---- The Python interface ----------------------------------------------------------------------------------

MODEL = random_model()
CONDITION, NULL = MODEL.encode(["a red seven", "two"]), MODEL.encode(["", ""])
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Q = torch.randn(2, 1, 6, 4, generator=torch.Generator().manual_seed(0))
TOKENS, Q22 = torch.ones(2, 3, dtype=torch.long), torch.zeros(1, 1, 22, 4)
config = functools.partial(Config, vocabulary=WORDS)
attend = functools.partial(erg.energy_attention, Q, Q)
SETTINGS = erg.ERG(w=3.0, tau_i=0.1, layers=[2], kappa=0.2, tau_c=0.3)
CFG, tune = erg.ERG(w=3.0), functools.partial(dataclasses.replace, SETTINGS)
APG = erg.ERG(w=2.0, tau_i=0.1, negative="same", apg=erg.APG())


def rect(model=MODEL, **options):
    with erg.rectify(model, **options):
        MODEL(X, 0.5, CONDITION)


def guided(model=MODEL, x=X, t=0.6, condition=CONDITION, **settings):
    return erg.Guidance(erg.ERG(**{"w": 2.0, **settings}), NULL)(model, x, t, condition)


def encode(encoder=None, **options):
    return erg.encode(encoder or nn.Linear(4, 4).eval(), Q, **{"tau": 0.1, **options})


def each(call, words, *values):
    """A row for each value: call(value), and the words with the value in place of {}."""
    return [(functools.partial(call, value), words.replace("{}", repr(value))) for value in values]


def table(call, *rows):
    """A row for each (value, words): call(value), and the words."""
    return [(functools.partial(call, value), words) for value, words in rows]


ENERGY = [
    *each(lambda name: erg.hopfield_energy(Q, Q, **{name: NAN}), "=nan must be a finite", "beta", "tau", "alpha"),
    *each(lambda name: erg.hopfield_step(Q, Q, **{name: NAN}), "=nan must be a finite", "beta", "tau", "alpha", "gamma"),
    *each(lambda tau: erg.hopfield_energy(Q, Q, tau=tau), "tau={} must be a finite Python number, greater than 0", 0.0, 1j),
    *each(lambda tau: attend(Q, tau=tau), "tau={} must be a finite Python number, at least 0", -0.1, NAN, [0.1, 0.2], "1", 1j),
    *each(lambda tau: attend(Q, tau=tau), "tau=|finite real numbers, at least 0", torch.tensor([1j, 1j]), torch.tensor(-1)),
    *each(lambda tau: attend(Q, tau=tau), "tau is (|it must be a number or (2,), one a row", torch.ones(3), torch.ones(2, 1)),
    *each(lambda alpha: attend(Q, alpha=alpha), "alpha={}", INF, None), *each(lambda gamma: attend(Q, gamma=gamma), "gamma={}", 0.0, "a"),
    *each(lambda K: attend(Q, K=K), "K={} must be a whole number, at least 1", 0, 1.5, True),
    *each(lambda part: attend(Q, queries=part), "queries={} does not fit the 6 queries", slice(0, 99), slice(4, 4)),
    (lambda: attend(torch.ones(2, 1, 6, 5), gamma=0.5), "v is 5 wide and q 4"),
    (lambda: erg.guide(X, X[:1], 2.0), "v_neg is (1, 3, 8, 8); it must be (2, 3, 8, 8)"),
]
RECTIFY = [
    *table(lambda options: rect(**options), ({}, "give tau, alpha"), (dict(tau=0.1, attention=print), "and not both"), (dict(K=2.0), "K=2.0"),
           (dict(gamma=0.5, queries=slice(4)), "queries=slice|has no effect"), (dict(tau=0.1, layers=[6]), "layer 6 was not rectified"),
           (dict(tau=0.1, kind="any"), "kind='any'"), (dict(tau=torch.ones(3)), "tau is (3,)|(2,)"), (dict(attention=3), "attention=3 must be a function"),
           (dict(tau=0.1, when=3), "when=3 must be a function"), (dict(tau=0.1, when=print, model=None), "when=<built-in|None without a model"),
           (dict(tau=0.1, batch=3), "a call has 2 rows where [3] were expected")),
    *each(lambda layers: rect(tau=0.1, layers=layers), "layers={} must be a collection of layer numbers", [], [-1], 3, [1.5], ["a"], "12", [True]),
    *each(lambda tau: rect(tau=tau), "tau=|at least 0", -1.0, 1j, torch.tensor([0.1, -1.0]), torch.tensor(NAN), torch.tensor([1j, 1j])),
    *each(lambda rows: rect(tau=0.1, rows=rows), "rows={} must be a slice of whole numbers, step > 0",
          slice(0, 2.0), [1, 2], 3, slice("a", "b"), slice(0, 2, 0), slice(0, 2, "a"), slice(2, 0, -1)),
    *each(lambda rows: rect(tau=0.1, rows=rows), "rows={} does not fit the 2 rows", slice(1, 8), slice(2, 2)),
    *each(lambda part: rect(tau=0.1, queries=part), "queries={} does not fit the 22 queries", slice(0, 64)),
    *each(lambda f: rect(attention=f, layers=[1]), "attention(q, k, v)=|must be a tensor like q",
          lambda *q, **options: None, lambda q, k, v, **options: v[:1], lambda q, k, v, **options: v[..., :2]),
    *each(lambda batch: rect(tau=0.1, batch=batch), "batch={} must be a whole number", "a", 0),
    *table(lambda model: rect(model, tau=0.1), (len, "model=<built-in|torch.nn.Module"), (nn.Identity(), "Identity is in training mode|eval"),
           (nn.Identity().eval(), "Identity was not called in the context")),
    *each(lambda given: encode(projections=given), "projections={} must be a list of modules", [], 3, ["q_proj"]),
    *table(lambda options: encode(**options), (dict(projections=[MODEL], layers=[0]), "layers=[0] has no effect with projections"), (dict(tau="a"), "tau='a'"),
           (dict(encoder=nn.Linear(4, 4)), "Linear is in training mode"), (dict(projections=[nn.Linear(4, 4)]), "1 of 1 projections did not run")),
]
GUIDANCE = [
    *each(lambda w: erg.ERG(w=w), "w={} must be a finite Python number", NAN, "a", 1j, None, True, torch.tensor(2.0)),
    *table(lambda options: erg.ERG(**{"w": 2.0, **options}),
           (dict(tau_i=-1), "tau_i=-1"), (dict(tau_i=0.1, kappa=1.5), "kappa=1.5"), (dict(tau_i=0.1, layers=()), "layers=()"), (dict(tau_i=0.1, K=0), "K=0"),
           (dict(tau_c=-0.1), "tau_c=-0.1"), (dict(negative="none"), "negative='none'"), (dict(layers=[1]), "layers=[1] has no effect"),
           (dict(kappa=0.3), "kappa=0.3 has no effect"), (dict(queries=slice(4)), "has no effect"), (dict(gamma=0.5, queries=slice(4)), "it restricts tau_i"),
           (dict(layers_c=[1]), "layers_c=[1] has no effect"), (dict(tau_c=0.1, layers_c={}), "layers_c={}"), (dict(negative="same"), "no guidance"),
           (dict(tau_c=0.1, negative="null"), "negative='null' has no effect"), (dict(tau_i=0.1, kappa=1.0, negative="same"), "kappa=1, is no guidance"),
           (dict(tau_c=0.1, layers_c={"clip": [-1]}), "layers_c=[-1]"), (dict(apg=True), "apg=True must be an erg.APG"), (dict(tau_i=0.1, kappa=True), "kappa=True"),
           (dict(tau_i=0.1, layers=(n for n in range(3))), "layers=<generator")),  # would be empty at the second use
    *each(lambda part: erg.ERG(w=2.0, tau_i=0.1, queries=part), "queries={} must be a slice", 3, slice("a", "b"), slice(0, 4, 0)),
    *each(lambda options: erg.APG(**options), "must be a finite Python number", dict(norm_threshold=-1.0), dict(norm_threshold=None), dict(eta=INF), dict(momentum="a")),
    (lambda: CFG.encode(MODEL.encoder, TOKENS), "null=None must be the null prompt"),
    (lambda: CFG.encode(MODEL.encoder, TOKENS, name="clip"), "name='clip' must be a name in layers_c=None"),
    *each(erg.Guidance, "negative=None must be the negative's condition", CFG, erg.PRESETS["sd3-medium"], erg.PRESETS["dit-xl-2"]),
    (lambda: erg.Guidance(erg.PRESETS["mmdit-unconditional"], NULL), "negative=(2, 6, 32)|or None"), (lambda: erg.Guidance(2.0), "settings=2.0 must be an erg.ERG"),
    (lambda: erg.Guidance(APG)(MODEL, X, 1.0, CONDITION), "t=1.0 must be less than 1 with APG"),
    *each(lambda t: guided(t=t), "t=|must be a finite Python number, at least 0, at most 1", 500, -0.1, NAN),
    *table(lambda options: guided(**options), (dict(t=torch.ones(2)), "one element tensors"), (dict(w=lambda t: "3"), "w='3' must be"),
           (dict(condition=None), "condition=None must be given"), (dict(model=random_model().train(), tau_i=0.1), "TinyDiT is in training mode")),
    *each(lambda y: guided(lambda x, t, c: y), "model(x, t, c)=|must be a tensor like x", (X, X), None, 3.0, X[:1]),
    *each(lambda w: guided(lambda x, t, c: (x,), w=w), "model(x, t, c)=|must be a tensor like x", 1.0, 2.0),
    *each(lambda y: guided(lambda x, t, c: y, batched=False), "model(x, t, c)=|must be a tensor like x", (X,), X[:1]),
]
TINY_DIT = [
    *each(lambda depth: config(depth=depth), "depth={} must be a whole number, at least 1", -1, 0, 8.0, True, None),
    *table(lambda options: config(**options), *((dict([pair]), "%s=%r must be a whole number, at least 1" % pair) for pair in (
        ("width", 0), ("channels", 0), ("image_size", -8), ("width", 96.0), ("patch", 0), ("heads", True), ("text_depth", -1), ("caption_length", "6"))),
           (dict(image_size=9), "patch=2 must divide image_size=9"), (dict(width=30), "width=30 must be a multiple")),
    *each(lambda words: Config(vocabulary=words), "vocabulary={} must be a list of words in lower case",
          (), "abc", ("a", "a"), ("a", "<pad>"), ("a", 3), ("a b",), ("A",), ("",), None, 3),
    *each(lambda prompts: tokenize(prompts, MODEL.config), "prompts={} must be a list of strings", [None], None, 3, [["a"]], [], "a red"),
    *table(lambda prompts: tokenize(prompts, MODEL.config), (["a green seven"], "unknown word 'green'|the vocabulary is: a red blue seven two on"),
           (["a " * 7], "has 7 words; at most 6")),
    *each(lambda steps: sample(MODEL, X, CONDITION, steps), "steps={} must be a whole number, at least 1", 0, True, 2.0, "a"),
    *each(lambda rates: drop_words(TOKENS, **rates), "must be rates between 0 and 1", dict(word=2), dict(caption=-0.1), dict(word=NAN), dict(caption="a")),
    *each(lambda t: MODEL(X, t, CONDITION), "must lie between 0 (noise) and 1 (data)", NAN, 2, -0.1, torch.tensor([0.1, NAN])),
]
PAIR = torch.zeros(60, 2), torch.zeros(45, 2)
TOY = [
    *each(lambda psi: CADS(psi=psi), "psi={} must be a finite Python number", "a", 2.0, True, NAN), *each(lambda s: CADS(scale=s), "scale={}", 0.0, INF),
    *each(lambda tau1: CADS(tau1=tau1), "tau1={}", -0.1, None), (lambda: CADS(tau1=0.9, tau2=0.6), "tau2=0.6 must be a finite Python number, greater than 0.9"),
    *each(prepare, "method={} must be one of none, cfg", "sgd", 3, None, ["cfg"]), (lambda: prepare("c-erg", w=2.0), "tau_c is missing for method='c-erg'"),
    (lambda: prepare("cfg", w=2, K=3), "K=3 has no effect with method='cfg'"), (lambda: prepare("cads", w=2.0, tau1="a"), "tau1='a'"),
    (lambda: recommended("sgd", "digits"), "method='sgd' must be one of"), (lambda: recommended("erg", "mnits"), "dataset='mnits' must be one of digits, mnist"),
    *each(lambda captions: generate(MODEL, captions), "prompts={} must be a list", [], "a red"),
    *each(lambda batch: generate(MODEL, ["a"], batch=batch), "batch={} must be a whole number, at least 1", 0, 1.5),
    *each(lambda seed: generate(MODEL, ["a"], seed=seed), "seed={} must be a whole number, at least 0, at most", -1, 2**70, 2**2000, "a"),
    *[row for metric in (manifold, frechet) for row in table(
        lambda pair, metric=metric: metric(*pair), ((torch.zeros(9), PAIR[0]), "real has the shape"), ((PAIR[0], torch.zeros(9, 3)), "2 dimensions and fake 3"),
        ((torch.full((9, 2), NAN), PAIR[0]), "real holds NaN"), ((PAIR[0], torch.full((9, 2), INF)), "fake holds NaN"))],
    *each(lambda k: manifold(*PAIR, k), "k={}|at least 1 and less than the number of samples, 45", 0, -1, 45, 2.0, True, "5"),
    *each(lambda chunk: manifold(*PAIR, 5, chunk), "chunk={}", 0, -3, 7.0, True), (lambda: frechet(PAIR[0], PAIR[1][:1]), "1 samples are too few"),
    (lambda: manifold(*PAIR, 5, None, torch.zeros(30)), "real_radius has the shape (30,)"),
    (lambda: AttributeClassifier((10,), "deep"), "network='deep'"),
]
EXPERIMENTS = [
    *each(lambda w: pag(w, [2]), "w={}", NAN, True, "2"), (lambda: autoguidance(NAN, None), "w=nan"),
    *each(lambda sigma: seg(2.0, [2], 4, sigma), "sigma={}", 0.0, NAN, 0.1, "a"),
    *each(lambda side: seg(2.0, [2], side), "side={} must be a whole number, at least 2", 1, 2.0, "a"),
    (lambda: SmoothedAttention(1.0, 5)(Q22, Q22, Q22), "side=5 needs 25 image queries; there are 22"), (lambda: gaussian_blur(Q22[0], 1.0), "(22, 4)"),
    (lambda: identity_attention(Q22, Q22[:, :, :6], Q22[:, :, :6]), "not 22 and 6"),
    (lambda: Rewired(2.0, identity_attention, [2], kappa=NAN), "kappa=nan"),
    *table(lambda guidance: guidance(MODEL, X, 0.6, CONDITION), (pag(2.0, [6]), "layer 6"), (pag(2.0, []), "layers=[]"),
           (pag(2.0, [2], slice(0, 23)), "queries=slice"), (seg(2.0, [2], 5), "side=5")),
    (lambda: attention_certainty(MODEL, X, 0.5, CONDITION, threshold=2), "threshold=2"),
    (lambda: velocity_variances(MODEL, X[:1], NULL, NULL, NULL), "1 samples"),
    (lambda: layer_effects(MODEL, X, CONDITION, times=(0.9, 0.3)), "times=(0.9, 0.3)"), (lambda: layer_effects(MODEL, X, CONDITION, steps=1), "steps=1"),
    (lambda: difference_norms(MODEL, X, CONDITION, erg.ERG(w=2.0, apg=erg.APG()), NULL), "no apg"), (lambda: difference([1], [2]), "at least 2 pairs"),
    (lambda: difference([1.0, NAN], [1, 2]), "must be finite"), (lambda: t_quantile(1.5, 3), "p=1.5"), (lambda: t_below(NAN, 3), "x=nan"),
    (lambda: jackknife(1.0, [1.0]), "at least 2"), (lambda: jackknife(NAN, [1.0, 2.0]), "value=nan"), (lambda: mcnemar([1], [1, 0]), "1 and 2 answers"),
    (lambda: equivalence(0.0, 1.0, 19, 0.0), "margin=0.0"), *each(lambda w: s2(w, 1), "w={}", NAN, "1"), *each(lambda drop: s2(2.0, drop), "drop={}", 0, 1.5),
    *each(lambda scale: tsg(2.0, scale), "scale={}", 0, NAN), *each(lambda shift: self_guidance(2.0, shift), "shift={}", 0, -1.0),
    (lambda: s2(2.0, 5)(MODEL, X, 0.5, CONDITION), "drop=5 must be at most 4"), (lambda: make_icg(MODEL, TOKENS[:1], None, 2.0), "there is one"),
    *table(lambda options: run(**options).key, (dict(method="cgf"), "method='cgf'"), (dict(task="poem"), "task='poem' must be one of text, class"),
           (dict(steps=0), "steps=0"), (dict(images=8.5), "images=8.5"), (dict(images=30), "images=30 must be a multiple of 20 times 1"), (dict(weights="imagenet"), "weights='imagenet' must be one of"),
           (dict(method="autoguidance"), "weak is missing"), (dict(method="autoguidance", parameters=dict(w=2.0, weak="early")), "weights='early' must be")),
    *table(lambda change: run(method="mechanism", parameters=dict(w=2.0, layers=[1], kappa=0.2, mechanism="identity", negative="null") | change),
           (dict(mechanism="x"), "mechanism='x'"), (dict(negative=""), "negative=''"), (dict(tau_i=0.1), "tau_i=0.1")),
]


def run(weights="digits", task="text", method="cfg", parameters=None, seeds=(0,), images=20, steps=2):
    return runs.Run(weights, task, method, dict(w=1.5) if parameters is None else parameters, list(seeds), images, steps)


@pytest.mark.parametrize("call, words", ENERGY + RECTIFY + GUIDANCE + TINY_DIT + TOY + EXPERIMENTS, ids=lambda _: "")
def test_python_interface(call, words):
    """What is out of range, of another kind or without effect is one error; attention is as it was afterwards."""
    check(call, words)
    assert F.scaled_dot_product_attention is erg._plain and not MODEL._forward_hooks and not MODEL._forward_pre_hooks


def test_dropout_in_a_rectified_call_is_an_error():
    """Dropout would make the two predictions differ by chance."""
    with erg.rectify(tau=0.1):
        check(lambda: F.scaled_dot_product_attention(Q, Q, Q, dropout_p=0.1), "dropout_p=0.1 must be 0")
        F.scaled_dot_product_attention(Q, Q, Q)


# ---- Data --------------------------------------------------------------------------------------------------


def slow(out, closing):
    """A server that sends a byte now and then, for ever."""
    out.write(b"HTTP/1.1 200 OK\r\nContent-Length: 256000\r\n\r\n")
    while not closing.wait(0.02):
        out.write(b"x")


REPLIES = [
    (http(BODY[:-100], len(BODY)), "255,900 of 256,000 bytes"), (http(BODY[:-1] + b"!"), "MD5"), (None, "timed out"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n" + BODY[:100], "IncompleteRead"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n" + BODY[:100], "many"), (b"no HTTP at all\r\n\r\n", "no HTTP at all"),
    (slow, "bytes came in 100 seconds"), (http(b"", status="404 Not Found"), "Not Found"), (http(b""), "MD5"),
]


@pytest.mark.parametrize("reply, words", REPLIES, ids=lambda _: "")
def test_a_bad_reply(web, tmp_path, monkeypatch, reply, words):  # noqa: F811
    """Whatever is wrong with the replies, one error names every mirror and the fault, and no file is left."""
    web.replies.update({"/a/file.bin": reply, "/b/file.bin": reply})
    clock, mirrors, timeout = itertools.count(0, 100), source(web.url + "a/", web.url + "b/"), 0.3 if reply is None else 10
    monkeypatch.setattr(data, "time", SimpleNamespace(monotonic=lambda: next(clock) if reply is slow else 0))
    check(lambda: data.fetch("file.bin", tmp_path, mirrors, timeout), f"{web.url}a/file.bin: |{web.url}b/file.bin: |{words}")
    assert tree(tmp_path) == []


def mnist(folder, images, labels=RECORDS[:, 0]):
    (folder / "train-images-idx3-ubyte.gz").write_bytes(idx(images))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    data.load("mnist", folder)


def cifar10(folder, archive=None, **files):
    (folder / "cifar-10-batches-bin").mkdir()
    for name, content in files.items():
        (folder / "cifar-10-batches-bin" / f"{name}.bin").write_bytes(content)
    if archive is not None:
        (folder / "cifar-10-binary.tar.gz").write_bytes(archive)
    data.load("cifar10", folder, "test" if files else "train")


def damaged(folder, read, content):
    (folder / "file.bin").write_bytes(content)
    read(folder / "file.bin")


def taken(folder, name, file=True):
    """A file in place of a folder, or a folder in place of a file."""
    (folder / "taken").write_bytes(b"a file") if file else (folder / "file.bin").mkdir()
    data.fetch("file.bin", folder / name, source())


IMAGES, HALF = RECORDS[:, 1:785].reshape(-1, 28, 28), gzip.compress(gzip.decompress(ARCHIVE)[:5000])
DATA = [
    *each(lambda images, folder: mnist(folder, images), "not images of 28 x 28 pixels|delete both", IMAGES[:11], RECORDS[:, 0], IMAGES.reshape(12, 14, 56),
          IMAGES[:, :, :14], np.concatenate([IMAGES, IMAGES[:1]])),
    *each(lambda labels, folder: mnist(folder, IMAGES[:len(labels)], labels), "with a label from 0 to 9 for each", RECORDS[:0, 0], RECORDS[:, 0] + 10, IMAGES),
    *each(lambda content, folder: damaged(folder, data.read_records, content), "file.bin is damaged|10,000 records|unpacked again", b"", RECORDS.tobytes()[:-1],
          RECORDS[:3].tobytes(), bytes(3073), bytes(3073 * 10_001), b"\x0a" + bytes(3073 * 10_000 - 1)),
    *each(lambda content, folder: damaged(folder, data.read_idx, content), "file.bin is damaged|downloaded again", b"", b"not gzip", GOOD[:50], GOOD[:-4],
          GOOD[:10] + b"\xff" * 99, *map(gzip.compress, (RAW[:10], RAW[:-1], RAW + b"!", b"\1" + RAW[1:], RAW[:4] + b"\xff" * 4 + RAW[8:]))),
    *each(lambda read, folder: read(folder), "Is a directory", data.read_idx, data.read_records),
    *each(lambda archive, folder: cifar10(folder, archive), "cifar-10-binary.tar.gz is damaged|downloaded again", b"", b"not a tar", ARCHIVE[:100], ARCHIVE[:-5000],
          ARCHIVE[:10] + b"\xff" * 99, gzip.compress(b"not a tar" * 1000), HALF, tar_gz(*batches(BATCHES[:4]))),
    (lambda folder: cifar10(folder, tar_gz(*batches(BATCHES[:4]))), "it does not hold cifar-10-batches-bin/data_batch_5.bin"),
    (lambda folder: cifar10(folder, test_batch=RECORDS[:3].tobytes()), "test_batch.bin is damaged|9,219 bytes, not 10,000 records"),
    *each(lambda name, folder: taken(folder, name), "--data-dir", "taken", "taken/deeper", "x" * 300),
    (lambda folder: taken(folder, ".", file=False), "file.bin is a folder, and should be a file"),
    *each(lambda name, folder: data.load(name), "dataset={} must be one of digits, mnist, cifar10", "mnits", ["digits"], None),
    (lambda folder: data.load("digits", split="valid"), "split='valid' must be one of train, test"),
]


@pytest.mark.parametrize("call, words", DATA, ids=lambda _: "")
def test_data(tmp_path, call, words):
    """A file that is damaged, of another kind or of another size is one error that names it and says what to do."""
    check(lambda: call(tmp_path), words)
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("content, words", [
    (None, "No such file"), (b"", "No data left"), (b"no zip", "pickle"), (dict(images=np.zeros(3)), "labels"),
    (dict(images=np.array([{}], object), labels=np.zeros(1)), "pickle")], ids=lambda _: "")
def test_the_shipped_digits(tmp_path, monkeypatch, content, words):
    """A shipped file that is missing, damaged or holds a pickle is one error."""
    if isinstance(content, dict):
        np.savez(tmp_path / "digits.npz", **content)
    elif content is not None:
        (tmp_path / "digits.npz").write_bytes(content)
    monkeypatch.setattr(data, "SHIPPED", tmp_path)
    check(lambda: data.load("digits"), f"digits.npz is damaged|take it from the repository|{words}")


# ---- The cache of experiments ------------------------------------------------------------------------------

ROW = {"frechet": 1.25, "coverage": 0.5, "nfe": 2.0, "seconds": 0.1}


def edit(change):
    """The file with a change of its record, and all else as it is written."""
    def damage(text):
        record = json.loads(text)
        change(record)
        return json.dumps(record)
    return damage


DAMAGE = [  # what a file of the cache holds instead
    *(lambda text, content=content: content for content in ("", "[]", "null", "3", '"row"', "{}", "row", "[" * 100_000, b"\xff\xfe", b"\0" * 500)),
    lambda text: text[:40], lambda text: text[:-1], lambda text: text + "\n", lambda text: text.replace("1.25", "1.35"),
    lambda text: text.replace("1.25", "NaN"), lambda text: text.replace("1.25", "-Infinity"), lambda text: text.replace("1.25", "true"),
    lambda text: text.replace("1.25", '"1.25"'), lambda text: text.replace("1.25", "1e999"), lambda text: text.replace('"seeds": [0]', '"seeds": [1]'),
    *(edit(lambda record, row=row: record.update(row=row)) for row in ({}, [], None, 3, "row", [1.25], dict(frechet=1.25))),
    edit(lambda record: record["row"].pop("coverage")), edit(lambda record: record.pop("row")), edit(lambda record: record.pop("digest")),
    edit(lambda record: record.pop("parameters")), edit(lambda record: record["parameters"].update(w=2.0)),
    edit(lambda record: record.update(digest="0" * 64)), edit(lambda record: record.update(weights="mnist")),
    lambda text: runs.record(run(seeds=[1]), ROW), lambda text: runs.record(run(task="class"), ROW),  # another run's
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda _: "")
def test_cache(tmp_path, monkeypatch, capsys, damage):
    """A record that is not whole, or not this run's, is named and computed again, once."""
    computed = []
    monkeypatch.setattr(runs, "compute", lambda *given: computed.append(given) or dict(ROW))
    collect = lambda: runs.collect([run()], tmp_path, torch.device("cpu"))[run()]
    row, (file,) = collect(), tmp_path.glob("*.json")
    whole = file.read_text()
    content = damage(whole)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    capsys.readouterr()
    assert collect() == row == collect() and len(computed) == 2 and file.read_text() == whole
    assert capsys.readouterr().err.count(f"{file} is damaged, or another run's: it is computed again") == 1


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_number_that_is_not_finite_is_not_stored(tmp_path, monkeypatch, value):
    """A run whose row holds it ends in an error that names the run, and no file is written."""
    monkeypatch.setattr(runs, "compute", lambda *given: dict(ROW, frechet=value))
    check(lambda: runs.collect([run()], tmp_path, torch.device("cpu")), "Run(weights='digits'|not JSON compliant")
    assert tree(tmp_path) == []


def test_a_folder_in_place_of_a_record(tmp_path, monkeypatch):
    """It is an error before anything is computed."""
    monkeypatch.setattr(runs, "compute", lambda *given: pytest.fail("computed"))
    (tmp_path / f"{run().key}.json").mkdir()
    with pytest.raises(OSError, match=run().key):
        runs.collect([run()], tmp_path, torch.device("cpu"))
