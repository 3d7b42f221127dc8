"""experiments/: statistics, runs and their cache, the choice on other seeds, claims and pages."""
import ast
import dataclasses
import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from experiments import bench, claims, evidence, runs, stability
from experiments.statistics import (benjamini_hochberg, difference, equivalence, half_width, jackknife,
                                    mcnemar, t_below, t_quantile, two_sided)
from tiny_dit import tokenize
from toy import data, metrics
from toy.sampling import METHODS

TINY = dataclasses.replace(evidence.QUICK, images=40, search=40, variants=40, steps=1)


def small_run(method="cfg", parameters=None, seeds=(0,), images=20, steps=2, task="text", weights="digits",
              blocks=True):
    parameters = dict(w=1.5) if parameters is None else parameters
    return runs.Run(weights, task, method, parameters, list(seeds), images, steps, blocks)


# ---- Statistics --------------------------------------------------------------------------------------------


def test_students_t():
    """Tabulated quantiles, scipy's probabilities, and the normal's for many degrees of freedom."""
    table = {(0.975, 1): 12.7062, (0.975, 4): 2.77645, (0.995, 4): 4.60409, (0.95, 9): 1.83311,
             (0.975, 5000): 1.96044}
    for (p, dof), value in table.items():
        assert t_quantile(p, dof) == pytest.approx(value, rel=1e-5)
        assert half_width(3.0, 19) == pytest.approx(3 * 2.09302, rel=1e-5)
    scipy = pytest.importorskip("scipy.stats", reason="comes with the test extra")
    for x in (-3.0, -0.1, 0.0, 2.0, 40.0):
        assert t_below(x, 19) == pytest.approx(scipy.t.cdf(x, 19), abs=1e-9)
        assert two_sided(x, 2.0, 19) == pytest.approx(2 * scipy.t.sf(abs(x) / 2, 19), abs=1e-8)


def test_differences_are_paired():
    """Their interval is Student's: mean 3 of 1 to 5, half width 2.776 sqrt(2.5 / 5); Bonferroni's is wider."""
    base = [7.0, -1.0, 40.0, 3.0, 0.5]
    more = [v + i for i, v in enumerate(base, 1)]
    assert difference(more, base) == pytest.approx((3, 2.77645 * math.sqrt(2.5 / 5)), rel=1e-5)
    assert difference(more, base, 10)[1] == pytest.approx(t_quantile(0.9975, 4) * math.sqrt(2.5 / 5))


def test_the_jackknife_of_a_mean_and_of_a_variance():
    """Of a mean it is s / sqrt(n), and changes nothing; of the variance with 1 / n it makes that with 1 / (n - 1)."""
    x = torch.randn(30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    others = [torch.cat([x[:i], x[i + 1:]]) for i in range(len(x))]
    mean, error = jackknife(x.mean().item(), [y.mean().item() for y in others])
    assert mean == pytest.approx(x.mean().item()) and error == pytest.approx((x.std() / 30**0.5).item())
    corrected, _ = jackknife(x.var(correction=0).item(), [y.var(correction=0).item() for y in others])
    assert corrected == pytest.approx(x.var().item())


def test_tests_are_scipys():
    """McNemar's exact test is binomial, the two one-sided tests are two t-tests, and the correction is its."""
    scipy = pytest.importorskip("scipy.stats", reason="comes with the test extra")
    a, b = [True] * 9 + [False] * 2 + [True] * 50, [False] * 9 + [True] * 2 + [True] * 50
    assert mcnemar(a, b) == mcnemar(b, a) == pytest.approx(scipy.binomtest(2, 11).pvalue)
    assert mcnemar(a, a) == 1
    upper, lower = scipy.t.cdf((0.1 - 0.5) / 0.2, 19), scipy.t.sf((0.1 + 0.5) / 0.2, 19)
    assert equivalence(0.1, 0.2, 19, 0.5) == pytest.approx(max(upper, lower), abs=1e-9)
    p = [0.01, 0.04, 0.03, 0.9, 0.0001]
    assert benjamini_hochberg(p) == pytest.approx(scipy.false_discovery_control(p).tolist())


# ---- Methods and runs --------------------------------------------------------------------------------------

PLACE = dict(w=2.0, layers=[1, 2], kappa=0.2, negative="null")
CADS, TEMPERED = dict(w=2.0, tau1=0.2, tau2=0.9, scale=0.25), dict(w=2.0, tau_i=0.5, layers=[1, 2])
CHANGES = [  # method, parameters, and changes of which each must change the pictures
    ("cfg", dict(w=1.5), [dict(w=2.0)]), ("autoguidance", dict(w=1.5, weak="digits-early"), [dict(w=2.0)]),
    ("autoguidance", dict(w=1.5, weak="digits-early"), [dict(weak="digits")]),
    ("apg", dict(w=3.0), [dict(w=2.0), dict(norm_threshold=0.1)]),
    ("cads", CADS, [dict(w=3.0), dict(tau1=0.6), dict(tau2=0.5), dict(scale=1.0)]),
    ("pag", dict(w=1.5, layers=[1, 2]), [dict(layers=[5]), dict(w=1.2)]),
    ("seg", dict(w=1.5, layers=[1, 2]), [dict(w=2.0), dict(sigma=0.6), dict(layers=[6])]),
    ("erg", dict(TEMPERED, kappa=0.2, tau_c=0.1), [
        dict(w=3.0), dict(tau_i=0.01), dict(layers=[5]), dict(kappa=0.7), dict(tau_c=3.0), dict(alpha=0.5),
        dict(gamma=0.5), dict(K=3)]),
    ("i-erg", dict(TEMPERED, negative="null"), [dict(negative="same")]),
    ("erg+apg", dict(TEMPERED, tau_c=0.1), [dict(norm_threshold=0.1)]),
    ("erg+cads", dict(TEMPERED, tau_c=0.1), [dict(scale=1.0)]),
    ("mechanism", dict(PLACE, mechanism="temperature", tau_i=0.2), [
        dict(tau_i=0.01), dict(negative="same"), dict(kappa=0.7), dict(layers=[4]), dict(w=3.0)]),
    ("mechanism", dict(PLACE, mechanism="identity"), [
        dict(mechanism="smoothing"), dict(negative="same"), dict(kappa=0.7), dict(layers=[4])]),
    ("icg", dict(w=1.5), [dict(w=2.0)]), ("tsg", dict(w=1.5, scale=0.5), [dict(w=2.0), dict(scale=1.0)]),
    ("self-guidance", dict(w=1.5, shift=0.1), [dict(w=2.0), dict(shift=0.2)]),
    ("s2", dict(w=1.5, drop=1), [dict(w=2.0), dict(drop=2)]),
]


@pytest.mark.parametrize("method, parameters, changes", CHANGES)
def test_every_parameter_changes_the_pictures(method, parameters, changes):
    """No parameter of a method is without effect on what is sampled from the shipped digits."""
    draw = lambda p: runs.sample_run(small_run(method, p, steps=4))[0]
    before = draw(parameters)
    for change in changes:
        assert (before - draw(parameters | change)).abs().max() > 1e-4, change


def test_every_parameter_is_tested():
    """The list above has each parameter of each rival."""
    for method in ("pag", "seg", "autoguidance", "mechanism", "icg", "tsg", "self-guidance", "s2"):
        changed = {name for m, _, changes in CHANGES if m == method for change in changes for name in change}
        assert changed == {*METHODS[method].required, *METHODS[method].optional}, method


def test_a_runs_key_follows_all_that_decides_its_numbers(monkeypatch):
    """Each field, the weights' bytes and the code give another key; the order of parameters doesn't."""
    keys = [small_run(**change).key for change in (
        {}, dict(method="apg"), dict(parameters=dict(w=2.0)), dict(seeds=[1]), dict(images=40), dict(steps=3),
        dict(task="class"), dict(weights="digits-early"), dict(blocks=False))]
    with monkeypatch.context() as patch:
        patch.setattr(runs, "code_digest", lambda: "other")
        keys.append(small_run().key)
    assert len(set(keys)) == len(keys)
    a, b = (small_run("apg", p) for p in (dict(w=2, norm_threshold=1), dict(norm_threshold=1, w=2)))
    assert a == b and hash(a) == hash(b)


def test_bfloat16_rounds_the_pictures(monkeypatch):
    """With --bf16 pictures differ from float32's, and by no more than three digits of rounding make."""
    exact, _ = runs.sample_run(small_run())
    monkeypatch.setattr(runs, "BF16", True)
    rounded, _ = runs.sample_run(small_run())
    assert 0 < (exact - rounded).abs().mean() < 0.02 and rounded.dtype == torch.float32


def test_the_code_that_decides_a_runs_numbers(tmp_path):
    """SOURCES hold all of the project that they import. A changed number is other code, and a comment is not."""
    for name in runs.SOURCES:
        text = (runs.ROOT / name).read_text()
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("# a comment\n" + text.replace("1_000_003", "1_000_033"))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names]
                module = getattr(node, "module", None)
                files = [f"{n.replace('.', '/')}.py" for n in names + [module or ""] + [f"{module}.{n}" for n in names]]
                assert all(file in runs.SOURCES for file in files if (runs.ROOT / file).is_file()), (name, files)
    changed = runs.code_digest(tmp_path)
    sampling = tmp_path / "toy" / "sampling.py"
    sampling.write_text(sampling.read_text().replace("1_000_033", "1_000_003"))
    runs.code_digest.cache_clear()
    assert runs.code_digest(tmp_path) == runs.code_digest() != changed


def test_finished_runs_are_read_and_not_computed(tmp_path, monkeypatch):
    """A second call computes nothing. A file that was cut short is computed again, to the same numbers."""
    run = small_run()
    first = runs.collect([run, run], tmp_path, torch.device("cpu"))[run]
    file, = tmp_path.glob("*.json")
    file.write_text(file.read_text()[:40])
    again = runs.collect([run], tmp_path, torch.device("cpu"))[run]
    assert first | dict(seconds=0) == again | dict(seconds=0)
    monkeypatch.setattr(runs, "compute", lambda *args: pytest.fail("computed again"))
    assert runs.collect([run], tmp_path, torch.device("cpu"))[run] == again


def test_a_row_measures_what_it_says():
    """Prompt accuracy only where there is a prompt; nfe is 1 unguided, 2 with CFG, less before kappa."""
    text, word, empty = (runs.compute(small_run("none", {}, task=task)) for task in runs.TASKS)
    assert "prompt" in text and "prompt" in word and "prompt" not in empty
    assert text["prompt"][0] == text["right"].count("1") / 20 and len(text["right"]) == 20
    assert text["nfe"] == 1 and runs.compute(small_run())["nfe"] == 2
    same = dict(w=1.5, tau_i=0.1, layers=[1], kappa=0.5, negative="same")  # acts at t = 0.75 alone
    assert runs.compute(small_run("i-erg", same, steps=4, task="unconditional"))["nfe"] == pytest.approx(1.25)


def test_prompts_of_the_three_tasks():
    """Full captions, the class alone, and nothing, from the same attributes; every class as often."""
    words = dict(data.load("digits").attributes)
    (text, a), (word, b), (empty, _) = (runs.draw_prompts(words, task, 20, 3) for task in runs.TASKS)
    assert torch.equal(a, b) and a[:, 0].sort().values.tolist() == [n // 2 for n in range(20)]
    assert set(empty) == {""}
    for caption, short, row in zip(text, word, a.tolist()):
        digit, ink, paper = (names[n] for names, n in zip(words.values(), row))
        assert caption == f"a {ink} {digit} on {paper}" and short == f"a {digit}" and ink != paper
    assert runs.draw_prompts(words, "text", 20, 4)[0] != text
    photos, labels = runs.draw_prompts({"object": ("cat", "dog")}, "text", 4, 0)
    assert photos == [f"a photo of a {('cat', 'dog')[i]}" for i in labels[:, 0].tolist()]


# ---- Metrics -----------------------------------------------------------------------------------------------


def test_a_row_is_toy_metrics_with_and_without_each_block():
    """Of all images and of those outside a block, each metric is what toy/metrics.py makes of them."""
    real, block = runs.real_features("digits", 80)
    fake = real[torch.randperm(80, generator=torch.Generator().manual_seed(0))] + 0.3 * torch.randn(
        real.shape, generator=torch.Generator().manual_seed(1), dtype=real.dtype)
    own = torch.arange(80) % runs.BLOCKS
    row = runs.measure(fake, own, "digits")
    for b, place in ((runs.ALL, 0), (0, 1), (7, 8), (19, 20)):
        parts = real[block != b], fake[own != b]
        expected = dict(frechet=metrics.frechet_distance(*parts),
                        **metrics.precision_recall_density_coverage(*parts, k=runs.NEIGHBOURS))
        assert {m: values[place] for m, values in row.items()} == pytest.approx(expected, rel=1e-9)
    short = runs.measure(fake, own, "digits", blocks=False)
    assert short["recall"] == row["recall"][:1] and short["frechet"] == row["frechet"]


def test_real_images():
    """They are held out, every class as often, and others than the reference; the extrapolated distance
    between two sets of real images is near 0, far below the biased one."""
    source, (real, block) = data.load("digits", split="test"), runs.real_features("digits", 200)
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
    assert len(real) == 200 and block.bincount(minlength=20).min() >= 4 and len(order) == 360
    again, _ = runs.real_features("digits", 200, "again")
    assert (torch.cdist(real, again).amin(1) > 0).all()
    row = runs.measure_real("digits", 1000)
    assert abs(runs.value(row, "frechet")) < 0.35 and row["density"][0] == pytest.approx(1, abs=0.15)


class SecondSampler:
    """Euler's method, CFG and ERG from their formulas, in float64, without erg.py and toy/sampling.py."""

    def __init__(self, model):
        self.model, self.tau, self.queries = model.double(), {}, {}
        for part in (*model.blocks, *model.encoder.blocks):
            part.attention.forward = lambda x, a=part.attention: self.attend(a, x)

    def attend(self, a, x):
        q, k, v = (y.unflatten(-1, (a.heads, -1)).transpose(1, 2) for y in a.qkv(x).chunk(3, dim=-1))
        q, k = (F.normalize(y, dim=-1) * y.shape[-1]**0.5 * norm.weight for y, norm in ((q, a.q_norm), (k, a.k_norm)))
        logits = q @ k.mT / q.shape[-1]**0.5
        logits[:, :, :self.queries.get(a)] *= self.tau.get(a, 1.0)
        return a.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))

    @torch.no_grad()
    def images(self, captions, noise, steps, w, layers=None, tau_i=1.0, tau_c=None, kappa=0.0):
        model, x = self.model, noise.double()
        strong = model.encoder(tokenize(captions, model.config))
        if tau_c is not None:
            self.tau = {block.attention: tau_c for block in model.encoder.blocks}
        weak = model.encoder(tokenize(captions if tau_c else [""] * len(captions), model.config))
        for i in range(steps):
            self.tau = {}
            v = model(x, i / steps, strong)
            if layers and i / steps > kappa:
                self.tau = {model.blocks[n].attention: tau_i for n in layers}
                self.queries = {a: model.side**2 for a in self.tau}
            v = w * v + (1 - w) * model(x, i / steps, weak)
            x = x + v / steps
        return x.clamp(-1, 1)


@pytest.mark.parametrize("method, parameters", [
    ("none", {}), ("cfg", dict(w=2.0)), ("erg", dict(w=2.0, tau_i=0.1, tau_c=0.05, layers=[1, 2], kappa=0.3))])
def test_a_table_recomputed(method, parameters):
    """A second sampler, prdc and scipy's matrix root find the same table."""
    prdc = pytest.importorskip("prdc", reason="comes with the test extra")
    scipy = pytest.importorskip("scipy.linalg", reason="comes with the test extra")
    run, numpy = small_run(method, parameters, seeds=(0, 1), images=120, steps=5), lambda y: y.double().numpy()
    row, (model, classifier) = runs.compute(run), runs.load_checkpoint(runs.weights_file("digits"))[:2]
    second, x, right = SecondSampler(model), [], []
    for seed in (0, 1):
        captions, attributes = runs.draw_prompts(data.load("digits").attributes, "text", 60, seed)
        noise = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        x.append(second.images(captions, noise, 5, **dict(dict(w=1.0), **parameters)).float())
        guesses = torch.stack([y.argmax(1) for y in classifier(x[-1])], dim=1)
        right += (guesses == attributes).all(1).tolist()
    real, fake = numpy(runs.real_features("digits", 120)[0]), numpy(metrics.features_of(classifier, torch.cat(x)))
    s1, s2 = (torch.from_numpy(y).T.cov().numpy() for y in (real, fake))
    mean = real.mean(0) - fake.mean(0)
    frechet = mean @ mean + (s1 + s2 - 2 * scipy.sqrtm(s1 @ s2).real).trace()
    assert row["frechet"][0] == pytest.approx(frechet, rel=1e-3)
    assert row["prompt"][0] == pytest.approx(sum(right) / 120, abs=0.009)
    for name, value in prdc.compute_prdc(real, fake, nearest_k=3).items():
        assert row[name][0] == pytest.approx(value, abs=0.02), name


# ---- The choice on other seeds -----------------------------------------------------------------------------


def invented(run):
    """A row that is best at w = 1.25 on the search seeds; nothing is sampled."""
    far = abs(run.parameters.get("w", 1) - 1.25) + sum(run.parameters.get("layers", [0])) / 100
    score = 1 + far + (0 if run.blocks else 0.001)
    row = {m: [score] * 21 for m in evidence.METRICS if m != "prompt" or run.task != "unconditional"}
    return dict(row, right="01" * (run.images // 2), nfe=2.0, seconds=0.0)


@pytest.mark.parametrize("task", evidence.TASKS)
def test_the_choice(task):
    """Variants first, then w, on the search seeds alone; reported on others, with the chosen settings."""
    asked = []

    def collect(wanted, title):
        asked.append((title, wanted))
        return {run: invented(run) for run in wanted}

    study, scale = ("digits", task, "digits"), evidence.QUICK
    plans = {study: evidence.rows_of(task, "digits", dict(tau_i=0.1, tau_c=0.3, kappa=0.0))}
    chosen = evidence.choose([study], plans, scale, collect)
    (result,) = evidence.report([study], plans, chosen, scale, collect)
    for title, wanted in asked:
        assert {tuple(run.seeds) for run in wanted} == {scale.seeds if title == "report" else scale.search_seeds}
    assert set(result["rows"]) == set(plans[study])
    for label, row in result["rows"].items():
        fixed = plans[study][label]
        assert row["method"] == "none" or row["parameters"]["w"] == 1.25
        if "layers" not in fixed.fixed and "layers" in row["parameters"]:
            assert row["parameters"]["layers"] == [0, 1], label


def test_mild_erg_is_the_best_of_the_second_round():
    """Successive halving: all settings in the first round, the best nine at three w in the second."""
    asked = []

    def collect(wanted, title):
        asked.append(wanted)
        return {run: dict(invented(run), frechet=[1 + abs(run.parameters.get("tau_i", 1.0) - 0.3)
                                                   + run.parameters.get("kappa", 0.0)] * 21) for run in wanted}

    mild, rounds = evidence.choose_mild(evidence.QUICK, collect)
    assert mild["tau_i"] == 0.3 and mild["kappa"] == 0 and [len(r) for r in rounds] == [30, 9]
    assert len(asked[-1]) == 27


# ---- Claims ------------------------------------------------------------------------------------------------


def study(task, name="digits", **gains):
    """A study whose rows have a level and no noise but a small one that all share; higher is better."""
    level = lambda up, sign: [10 + sign * up + 0.01 * (i % 3) + 0.002 * i * up for i in range(21)]
    rows = {label: dict(row=dict(frechet=level(up, -1), density=level(up, 1), prompt=level(up, 1),
                                                      right="1" * int(50 + up) + "0" * (50 - int(up))))
            for label, up in gains.items()}
    search = {label: [[1.5, 9.0, 0.5], [2.0, -up, 0.5]] for label, up in gains.items()}
    return dict(set=name, task=task, weights=name, rows=rows, search=search)


def test_verdicts():
    """Positive, negative, equal and contradicting gains; "as good as"; the best of several on the search seeds."""
    claim = claims.Claim("", "", "text", "frechet", "a", "b")
    ask = lambda claim, *studies: claims.verdict(claim, f := claims.judge(claim, studies), f["p"])
    up, down = study("text", a=3, b=0), study("text", a=0, b=3)
    assert ask(claim, up) == ask(claim, up, up) == "holds" and ask(claim, down) == "does not hold"
    assert ask(claim, up, down) == "depends on the training"
    assert ask(claim, study("text", a=1, b=1)) == "undecided"
    prompt = dataclasses.replace(claim, metric="prompt")
    assert ask(prompt, study("text", a=20, b=0)) == "holds" and ask(prompt, study("text", a=2, b=0)) == "undecided"
    several = dataclasses.replace(claim, metric="density", b=("b", "c", "never measured"))
    found = claims.judge(several, [study("text", a=3, b=0, c=5)])
    assert found["rows"] == ["c"] and found["mean"] == pytest.approx(-2, abs=0.1)
    same = dataclasses.replace(claim, same=True)
    assert ask(same, study("text", a=1, b=1, **{claims.NONE: 0})) == "holds"
    assert ask(same, study("text", a=5, b=0, **{claims.NONE: 0})) == "does not hold"
    assert claims.judge(claim, []) is None and claims.judge(claim, [study("text", a=1)]) is None


def test_gains_are_of_infinitely_many_images():
    """The Frechet gain is the difference of the extrapolated distances; its error is the paired one."""
    a, b = study("text", a=3, b=0)["rows"].values()
    gain, error = claims.paired(a["row"], b["row"], "frechet")
    assert gain == pytest.approx(runs.value(b["row"], "frechet") - runs.value(a["row"], "frechet"))
    differences = [y - x for x, y in zip(a["row"]["frechet"], b["row"]["frechet"])]
    assert error == pytest.approx(jackknife(differences[0], differences[1:])[1])


def test_the_primary_claims_ask_for_rows_that_exist():
    """Each row of a claim is one that its task samples, and the correction is over all that is asked."""
    mild = dict(tau_i=0.1, tau_c=0.3, kappa=0.0)
    for claim in claims.PRIMARY:
        there = set(evidence.rows_of(claim.task, "digits", mild)) | {"AutoGuidance"}
        assert {claim.a, *([claim.b] if isinstance(claim.b, str) else claim.b)} <= there, claim.text
    studies = [study("text", **{"ERG": 3, "CFG": 0, claims.NONE: 1})]
    found = claims.verdicts(studies)
    assert len(found) == 3 and [f["adjusted"] for f in found.values()] == pytest.approx(
        benjamini_hochberg([f["p"] for f in found.values()]))


# ---- The command, from the runs to the files ---------------------------------------------------------------


def test_all_of_it_from_the_runs_to_the_verdicts(tmp_path, monkeypatch):
    """It ends in numbers, pages and a picture; again, it samples nothing; `page` makes the same pages."""
    monkeypatch.setattr(evidence, "QUICK", TINY)
    monkeypatch.setattr(evidence, "studies_of", lambda sets: [("digits", "class", "digits"),
                                                              ("digits", "unconditional", "digits")])
    out = tmp_path / "out"
    given = dict(step="sample", finished=False, quick=True, sets=data.NAMES, data=None, out=str(out),
                 cache=tmp_path / "cache", device="cpu", bf16=False)
    evidence.main(**given)
    record = json.loads((out / "evidence.json").read_text())
    assert record["minutes"] > 0 and record["hardware"] and record["torch"] == str(torch.__version__)
    pages = [(out / name).read_text() for name in ("evidence.md", "CLAIMS.md")]
    assert all(claim.text in pages[1] for claim in claims.PRIMARY) and "## digits: no caption" in pages[0]
    assert (out / "frontiers-digits.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(runs, "compute", lambda *args: pytest.fail("computed again"))
    evidence.main(**given)
    assert json.loads((out / "evidence.json").read_text())["studies"] == record["studies"]
    evidence.main(**given | dict(step="page"))
    assert [(out / name).read_text() for name in ("evidence.md", "CLAIMS.md")] == pages


def test_density_of_parts(monkeypatch):
    """A cell is the mean gap in density over parts of all classes, here counted ball by ball."""
    monkeypatch.setattr(stability, "IMAGES", (40, 80))
    monkeypatch.setattr(stability, "NEIGHBOURS", (3,))
    source, seen = data.load("digits", split="train"), {}
    for i, label in enumerate(("CFG", "C-ERG", "ERG")):  # other real digits in the place of samples
        seen[label], *_ = source.draw(torch.arange(80 * i, 80 * (i + 1)), torch.Generator().manual_seed(i))
    monkeypatch.setattr(runs, "sample_run", lambda run, device: (seen[run.parameters["label"]], None))
    monkeypatch.setattr(runs.Run, "__post_init__", lambda self: None)
    text = "\n".join(stability.tables("digits", {y: dict(method="cfg", parameters=dict(label=y)) for y in seen}, "cpu"))
    classifier, gaps = runs.checkpoint("digits")[1], {}
    real, _ = runs.real_features("digits", 80)
    for label, x in seen.items():
        fake, found = metrics.features_of(classifier, x).double(), []
        for part in (0, 1):
            r, f = real[40 * part:][:40], fake[40 * part:][:40]
            radii = [sorted((a - b).norm() for b in r)[3] for a in r]
            found.append(sum((a - b).norm() < radius for a, radius in zip(r, radii) for b in f).item() / 120)
        gaps[label] = sum(found) / 2
    for label in ("C-ERG", "ERG"):
        assert f"| {label} - CFG, 40 images | {gaps[label] - gaps['CFG']:+.3f} |" in text and gaps[label] != gaps["CFG"]
    levels = [metrics.frechet_distance(*pair) for pair in zip(real.split(40), runs.real_features("digits", 80, "again")[0].split(40))]
    assert f"{sum(levels) / 2:.3f} (40)" in text


def test_two_processes_find_what_one_finds(tmp_path):
    """Under torchrun the runs are shared out, and the numbers are those of one process."""
    script = tmp_path / "shared.py"
    script.write_text(f"""import sys
sys.path.insert(0, {str(runs.ROOT)!r})
import torch
from experiments import runs
runs.start_processes(torch.device("cpu"))
wanted = [runs.Run("digits", "text", "cfg", dict(w=w), [0], 20, 2) for w in (1.5, 2.0, 3.0)]
runs.collect(wanted, {str(tmp_path / "cache")!r}, torch.device("cpu"))
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True,
                          timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    for w in (1.5, 2.0, 3.0):
        run = small_run(parameters=dict(w=w))
        row, expected = runs.read(run, tmp_path / "cache"), runs.compute(run)
        assert "2 processes" in row["hardware"]
        for metric in ("frechet", "density", "recall", "prompt"):
            assert row[metric] == pytest.approx(expected[metric], rel=1e-3, abs=1e-3), metric


def test_the_committed_pages_follow_from_the_committed_numbers():
    """Every page is what the code makes of the JSON beside it, and no claim was left out."""
    found = json.loads((evidence.RESULTS / "bench.json").read_text())
    assert (evidence.RESULTS / "bench.md").read_text() == bench.page(found)
    record = json.loads((evidence.RESULTS / "evidence.json").read_text())
    assert (evidence.RESULTS / "evidence.md").read_text() == evidence.markdown(record)
    page = (evidence.RESULTS.parent / "CLAIMS.md").read_text()
    assert page == claims.page(record["studies"]) and page.count("\n| ") == len(claims.PRIMARY) + 1
    rows = [line.split("|") for line in (evidence.RESULTS / "stability.md").read_text().splitlines() if " - CFG" in line]
    for _, name, few, _, many, _ in rows:  # what CLAIMS.md says of density
        assert float(many) > 0 and ("250" not in name or float(few) > 0) and ("2,000" not in name or float(few) < 0)
    assert len(rows) == 16
