"""experiments/: runs and their cache, the search, statistics, reports and claims."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_toy
from experiments import claims, entries, inside, report, reproduce, runs
from experiments.metrics import BETTER
from experiments.statistics import difference, estimate, gain, judge, t_quantile, winners

RESULTS = Path(__file__).resolve().parent.parent / "experiments" / "results"
TINY = entries.Scale(images={"digits": 8}, sweep={"digits": 8}, steps=2, seeds=(0, 1), search_seeds=(1000,), budget=2, layer_stride=2)


def small_run(method="cfg", parameters=None, seed=0, images=8, steps=2, task="text", weights="digits"):
    return runs.Run(weights, task, method, dict(w=1.5) if parameters is None else parameters, seed, images, steps)


# ------------------------------------------------------------------------------------------------
# Statistics
# ------------------------------------------------------------------------------------------------


def test_the_interval_is_students():
    """For 1, 2, 3, 4, 5 the mean is 3, s = sqrt(2.5), and the half width 2.776 s / sqrt(5); a constant has width 0."""
    mean, half = estimate([1, 2, 3, 4, 5])
    assert mean == 3 and half == pytest.approx(2.77645 * math.sqrt(2.5 / 5), rel=1e-5)
    assert estimate([2.0, 2.0, 2.0]) == (2.0, 0.0) and estimate([7])[1] == math.inf


def test_quantiles_of_students_t():
    """Tabulated values, and the normal's for many degrees of freedom."""
    table = {(0.975, 1): 12.7062, (0.975, 4): 2.77645, (0.995, 4): 4.60409, (0.95, 9): 1.83311, (0.975, 5000): 1.96044}
    for (p, dof), value in table.items():
        assert t_quantile(p, dof) == pytest.approx(value, rel=1e-5)
    with pytest.raises(ValueError, match="p=1.5"):
        t_quantile(1.5, 3)


def test_several_comparisons_widen_the_interval():
    """Bonferroni's interval of m comparisons is the one at 1 - 0.05 / m."""
    assert estimate([1, 2, 3, 4, 5], 10)[1] == pytest.approx(t_quantile(0.9975, 4) * math.sqrt(2.5 / 5))


def test_the_interval_covers_the_mean_in_95_of_100():
    """Over many draws of five normal values the interval covers the mean as often as it says; 40 values likewise."""
    generator = torch.Generator().manual_seed(0)
    for n in (2, 5, 40):
        draws = torch.randn(4000, n, generator=generator, dtype=torch.float64).tolist()
        covered = sum(abs(mean) <= half for mean, half in map(estimate, draws)) / len(draws)
        assert covered == pytest.approx(0.95, abs=0.012)


def test_pairing_removes_what_seeds_share():
    """A constant gain is found beneath a spread that hides it from unpaired intervals; lower is better where it is."""
    base = [0.0, 10.0, -7.0, 3.0, 30.0]
    better = [v + 0.1 + 0.001 * i for i, v in enumerate(base)]
    assert difference(better, base)[0] == pytest.approx(0.102)
    verdict = lambda *args: judge(*gain(*args))
    assert verdict(better, base) == "holds" and verdict(base, better) == "does not hold"
    assert verdict(better, base, "lower") == "does not hold" and verdict(base, base) == "undecided"
    assert winners({"a": base, "b": better}, "higher") == {"b"} and winners({"a": base, "b": better}, "lower") == {"a"}
    assert winners({"a": base, "b": better, "c": better}, "higher") == set()


@pytest.mark.parametrize("call, message", [
    (lambda: estimate([]), "values=[]"), (lambda: estimate([1, math.nan]), "nan"), (lambda: difference([1], [1, 2]), "1 and 2 values"),
])
def test_bad_values_are_named(call, message):
    """Empty, infinite and unequal lists are one clear error."""
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


# ------------------------------------------------------------------------------------------------
# Methods and runs
# ------------------------------------------------------------------------------------------------

LAYERS = [1, 2]
CHANGES = [  # method, parameters, and a change that must change the pictures
    ("cfg", dict(w=1.5), dict(w=2.0)), ("interval", dict(w=3.0, low=0.2, high=0.9), dict(low=0.5)), ("interval", dict(w=3.0, low=0.0, high=0.9), dict(high=0.3)),
    ("apg", dict(w=3.0), dict(norm_threshold=0.1)), ("cads", dict(w=2.0, tau1=0.2, tau2=0.9, scale=0.25), dict(tau1=0.6)),
    ("cads", dict(w=2.0, tau1=0.2, tau2=0.9, scale=0.25), dict(tau2=0.5)), ("cads", dict(w=2.0, tau1=0.2, tau2=0.9, scale=0.25), dict(scale=1.0)),
    ("pag", dict(w=1.5, layers=LAYERS), dict(layers=[5])), ("pag", dict(w=1.5, layers=LAYERS), dict(w=1.2)),
    ("sag", dict(w=1.5, layer=3, sigma=1.0), dict(layer=0)), ("sag", dict(w=1.5, layer=3, sigma=1.0), dict(sigma=0.5)), ("sag", dict(w=1.5, layer=3, sigma=1.0), dict(w=1.1)),
    ("seg", dict(w=1.5, layers=LAYERS), dict(sigma=0.6)), ("seg", dict(w=1.5, layers=LAYERS), dict(cfg=2.0)), ("seg", dict(w=1.5, layers=LAYERS), dict(layers=[6])),
    ("autoguidance", dict(w=1.5), dict(w=2.0)),
    *[("erg", dict(w=2.0, tau=0.5, layers=LAYERS, kappa=0.2, tau_c=0.1), change) for change in (
        dict(w=3.0), dict(tau=0.01), dict(layers=[5]), dict(kappa=0.7), dict(tau_c=3.0), dict(alpha=0.5), dict(gamma=0.5), dict(steps=3))],
    ("erg", dict(w=2.0, tau=0.5, layers=LAYERS, negative="null"), dict(negative="same")),
    ("erg+apg", dict(w=3.0, tau=0.1, layers=LAYERS, tau_c=0.1), dict(norm_threshold=0.1)),
    ("erg+cads", dict(w=2.0, tau=0.1, layers=LAYERS, tau_c=0.1), dict(scale=1.0)),
    *[("mechanism", dict(w=2.0, mechanism="temperature", tau=0.2, layers=LAYERS, kappa=0.2, negative="null"), change) for change in (
        dict(tau=0.01), dict(negative="same"), dict(kappa=0.7), dict(layers=[4]))],
    *[("mechanism", dict(w=2.0, mechanism="identity", layers=LAYERS, kappa=0.2, negative="null"), change) for change in (
        dict(mechanism="smoothing"), dict(negative="same"), dict(kappa=0.7), dict(layers=[4]))],
    *[("variant", dict(w=2.0, tau=0.2, layers=LAYERS, tau_c=0.1), change) for change in (
        dict(until=0.5), dict(renormalize=1.0), dict(taus=[[1, 0.01], [4, 0.3]]), dict(w_end=1.0), dict(norm_threshold=0.1))],
]


@pytest.mark.parametrize("method, parameters, change", CHANGES, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_every_parameter_changes_the_pictures(method, parameters, change):
    """No parameter of a method is without effect on what is sampled from the shipped digits."""
    before, after = (runs.sample_run(small_run(method, p, images=2, steps=4))[0] for p in (parameters, {**parameters, **change}))
    assert (before - after).abs().max() > 1e-4


def test_every_parameter_is_tested():
    """The list above has each parameter of each method that the tables search or compare."""
    for method, known in runs.METHODS.items():
        if method not in ("erg+apg", "erg+cads", "variant"):  # beyond ERG's own
            assert {name for m, _, change in CHANGES if m == method for name in change} | {"w"} >= {*known.required, *known.optional} - {"mechanism"}, method


def test_a_runs_key_follows_all_that_decides_its_numbers(monkeypatch):
    """Each field, the weights' bytes and the version give another key; the order of parameters does not."""
    keys = [small_run(**change).key for change in (
        {}, dict(method="apg"), dict(parameters=dict(w=2.0)), dict(seed=1), dict(images=9), dict(steps=3), dict(task="class"), dict(weights="digits-early"))]
    monkeypatch.setattr(runs, "VERSION", runs.VERSION + 1)
    keys.append(small_run().key)
    assert len(set(keys)) == len(keys)
    a, b = (small_run("interval", dict(pairs)) for pairs in ([("w", 2.0), ("low", 0.1), ("high", 0.5)], [("high", 0.5), ("low", 0.1), ("w", 2.0)]))
    assert a == b and hash(a) == hash(b)


def test_finished_runs_are_read_and_not_computed(tmp_path, monkeypatch):
    """A second call computes nothing; a file that was cut short, as by a full disk, is computed again, to the same numbers."""
    run = small_run()
    first = runs.collect([run, run], tmp_path, torch.device("cpu"))[run]
    file, = tmp_path.glob("*.json")
    file.write_text(file.read_text()[:40])
    again = runs.collect([run], tmp_path, torch.device("cpu"))[run]
    assert {k: v for k, v in first.items() if k != "seconds"} == {k: v for k, v in again.items() if k != "seconds"}
    monkeypatch.setattr(runs, "compute", lambda *args: pytest.fail("computed again"))
    assert runs.collect([run], tmp_path, torch.device("cpu"))[run] == again


def test_a_row_measures_what_it_says():
    """Prompt accuracy only where there is a prompt; nfe is 1 without guidance, 2 with CFG, and less before kappa."""
    text, word, empty = (runs.compute(small_run("none", {}, task=task)) for task in runs.TASKS)
    assert {"digit", "ink", "paper", "prompt"} <= set(text) and "prompt" in word and "digit" not in word and "prompt" not in empty
    assert text["nfe"] == 1 and runs.compute(small_run())["nfe"] == 2
    same = dict(w=1.5, tau=0.1, layers=[1], kappa=0.5, negative="same")
    assert runs.compute(small_run("erg", same, steps=4, task="unconditional"))["nfe"] == pytest.approx(1.25)  # t = 0.75 alone


def test_prompts_of_the_three_tasks():
    """Full captions, the class alone, and nothing, from the same attributes; every class as often; seeds differ."""
    words = {"digit": tuple(train_toy.data.DIGITS), "ink": tuple(train_toy.data.INKS), "paper": tuple(train_toy.data.PAPERS)}
    (text, a), (word, b), (empty, _) = (runs.draw_prompts(words, task, 20, 3) for task in runs.TASKS)
    assert torch.equal(a, b) and sorted(a[:, 0].tolist()) == sorted(2 * list(range(10))) and set(empty) == {""}
    for caption, short, (digit, ink, paper) in zip(text, word, a.tolist()):
        assert caption == f"a {words['ink'][ink]} {words['digit'][digit]} on {words['paper'][paper]}" and short == f"a {words['digit'][digit]}"
        assert words["ink"][ink] != words["paper"][paper]
    assert runs.draw_prompts(words, "text", 20, 4)[0] != text
    photos, labels = runs.draw_prompts({"object": ("cat", "dog")}, "text", 4, 0)
    assert photos == [f"a photo of a {('cat', 'dog')[i]}" for i in labels[:, 0].tolist()]


def test_real_images_score_as_real():
    """Real images against other real images have density 1, and the coverage of two samples of one law,
    1 - prod (N - i) / (N + M - i) over i = 1..k."""
    rows = [runs.measure_real("digits", seed, 256) for seed in range(4)]
    n = len(runs.checkpoint("digits")[2]) - 256
    expected = 1 - math.prod((n - i) / (n + 256 - i) for i in range(1, 6))
    assert sum(row["coverage"] for row in rows) / 4 == pytest.approx(expected, abs=0.03)
    assert sum(row["density"] for row in rows) / 4 == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("call, message", [
    (lambda: small_run("cgf"), "method='cgf'"), (lambda: small_run("cfg", dict(tau=0.1)), "tau=0.1 has no effect with method='cfg'"),
    (lambda: small_run("cfg", {}), "w is missing"), (lambda: small_run("interval", dict(w=2.0, high=0.5)), "low is missing"),
    (lambda: small_run("mechanism", dict(w=2.0, mechanism="x", layers=[1], kappa=0.2, negative="null")), "mechanism='x'"),
    (lambda: small_run("mechanism", dict(w=2.0, mechanism="identity", layers=[1], kappa=0.2, negative="nul")), "negative='nul'"),
    (lambda: small_run("mechanism", dict(w=2.0, mechanism="identity", tau=0.1, layers=[1], kappa=0.2, negative="null")), "tau=0.1"),
    (lambda: small_run(task="poem"), "task='poem'"), (lambda: reproduce.main(["table9"]), "NAME='table9'"),
    (lambda: reproduce.main(["table1", "--weights", "imagenet"]), "--weights imagenet"),
])
def test_bad_input_is_named(call, message):
    """Unknown methods, parameters, tasks, entries and checkpoints are one clear error, before anything is sampled."""
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


# ------------------------------------------------------------------------------------------------
# Search
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", runs.TASKS)
@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_every_method_has_the_same_budget(name, task):
    """Each method may try six different settings, all of which it obeys; the ranges of layers differ."""
    for method, grid in entries.grids(name, task).items():
        assert len(grid) == len({json.dumps(p, sort_keys=True) for p in grid}) == entries.FULL.budget, method
        for parameters in grid:
            assert runs.build(method, parameters, weak=lambda: None) is not None
    assert len({tuple(r) for r in entries.layer_ranges(name)}) == 2


def drive(generator, score):
    """Run an entry with invented rows, and list the runs of each round."""
    rounds, rows = [], None
    try:
        while True:
            wanted = generator.send(rows)
            rounds.append(wanted)
            rows = {run: score(run) for run in wanted}
    except StopIteration as stop:
        return rounds, stop.value


def test_the_search_takes_the_best_mean_rank_and_reports_other_seeds():
    """With rows that are best at w = 2, every method that tries w = 2 is reported there, on seeds that the search has not seen."""
    def score(run):
        good = -abs(run.parameters.get("w", 1) - 2) + run.seed * 1e-3
        return {m: good if BETTER.get(m) == "higher" else -good for m in (*entries.QUALITY, "prompt", "saturation", "nfe")}

    rounds, result = drive(entries.table1(entries.FULL, "digits"), score)
    assert len(rounds) == 2 and {run.seed for run in rounds[0]} == {1000} and {run.seed for run in rounds[1]} == {0, 1, 2, 3, 4}
    assert len(result["rows"]) == 12
    for label, row in result["rows"].items():
        if row["method"] != "none":
            tried = [p["parameters"]["w"] for p in result["search"][label]]
            assert row["parameters"]["w"] == min(tried, key=lambda w: abs(w - 2)), label
    assert min(result["search"]["CFG"], key=lambda row: row["mean_rank"])["parameters"] == {"w": 2.0}


def test_the_rank_correlation():
    """1 and -1 for monotone relations of any shape; scipy's value with ties."""
    values = [3.0, 1.0, 2.0, 5.0, 2.0]
    assert entries.rank_correlation(values, [v**3 for v in values]) == pytest.approx(1) and entries.rank_correlation(values, [-v for v in values]) == pytest.approx(-1)
    scipy = pytest.importorskip("scipy.stats", reason="comes with the test extra")
    other = [1.0, 4.0, 4.0, 2.0, 0.0]
    assert entries.rank_correlation(values, other) == pytest.approx(scipy.spearmanr(values, other).statistic)


def test_a_suggestion_is_placed_in_the_grid():
    """With invented rows, the position of a row is its place by mean rank, and what is not in the grid has none."""
    rows = {f"{i}:{i + 1}": dict(values={m: [float(-i if BETTER[m] == "higher" else i)] * 2 for m in entries.metrics_of("text")}) for i in range(5)}
    found = entries.placed(rows, "1:2")
    assert (found["position"], found["of"], found["best"], found["rank"], found["median_rank"]) == (2, 5, "0:1", [2.0, 2.0], 3.0)
    assert "position" not in entries.placed(rows, None)


def test_entries_share_one_queue():
    """Entries that run side by side are asked for all their runs of a round at once, and each gets its own rows."""
    asked = []

    def collect(wishes):
        asked.append(set(wishes))
        return {key: {run: {m: 1.0 for m in (*BETTER, "saturation", "nfe")} for run in wanted} for key, wanted in wishes.items()}

    made = {name: entries.RUN_ENTRIES[name](TINY, "digits") for name in ("table1", "table6", "figure9")}
    results = entries.advance(made, collect)
    assert asked == [{"table1", "table6", "figure9"}, {"table1"}] and set(results) == set(made)


# ------------------------------------------------------------------------------------------------
# The command, from the runs to the files
# ------------------------------------------------------------------------------------------------


def test_all_of_it_from_the_runs_to_the_verdicts(tmp_path, monkeypatch):
    """`all` ends in JSON, Markdown and a picture for each entry, and in a verdict for each claim; a second call samples nothing."""
    monkeypatch.setattr(entries, "QUICK", TINY)
    options = ["--quick", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--device", "cpu"]
    reproduce.main(["all", *options])
    for name in reproduce.ENTRIES:
        record = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert record["command"].endswith(" ".join(["all", *options])) and set(record["checkpoints"]) == {"digits"}
        assert record["minutes"] > 0 and record["hardware"] and record["torch"] == str(torch.__version__)
        assert (tmp_path / "out" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert record["title"] in (tmp_path / "out" / f"{name}.md").read_text()
    page = (tmp_path / "out" / "CLAIMS.md").read_text()
    assert all(claim.text in page for claim in claims.CLAIMS) and "not asked" not in page
    monkeypatch.setattr(runs, "compute", lambda *args: pytest.fail("computed again"))
    before = (tmp_path / "out" / "table6.json").read_text()
    reproduce.main(["table6", *options])
    strip = lambda text: {k: v for k, v in json.loads(text).items() if k != "command"}
    assert strip((tmp_path / "out" / "table6.json").read_text()) == strip(before)


def test_two_processes_find_what_one_finds(tmp_path):
    """Under torchrun the runs are shared out, each is computed once, and the numbers are those of one process."""
    records = []
    for name, launcher in (("one", []), ("two", ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"])):
        command = [sys.executable, "-m", *launcher, "experiments.reproduce", "table6", "--quick", "--device", "cpu",
                   "--out", str(tmp_path / name), "--cache", str(tmp_path / name / "cache")]
        done = subprocess.run(command, cwd=RESULTS.parent.parent, env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
        assert len(list((tmp_path / name / "cache").glob("*.json"))) == 4 * len(entries.QUICK.seeds)
        records.append(json.loads((tmp_path / name / "table6.json").read_text())["checkpoints"]["digits"]["rows"])
    for one, two in zip(records[0].values(), records[1].values()):
        for metric, values in one["values"].items():
            assert values == pytest.approx(two["values"][metric], rel=1e-3, abs=1e-3), metric


def test_every_entry_is_named_and_drawn():
    """Each of the paper's tables and figures that the toy can have is an entry, with a title and a description."""
    asked = {*(f"table{n}" for n in range(1, 7)), *(f"figure{n}" for n in (2, 4, 5, 6, 7, 8, 9, 15, 16)), "variants", "suggest"}
    assert set(reproduce.ENTRIES) == set(reproduce.TITLES) == asked
    assert all(entry.__doc__ for entry in reproduce.ENTRIES.values()) and set(inside.LAYOUT) == set(inside.ENTRIES)


def test_bold_marks_only_what_the_interval_supports():
    """A clear winner is bold, two that cannot be told apart are not; of differences, those that the interval sets off from 0."""
    rows = {"CFG": dict(method="cfg", parameters=dict(w=2.0), values=dict(density=[1.0, 1.1, 1.2], recall=[0.5, 0.6, 0.7], saturation=[0.1] * 3, nfe=[2.0] * 3)),
            "ERG": dict(method="erg", parameters=dict(w=2.0, layers=[2, 3]), values=dict(density=[2.0, 2.1, 2.2], recall=[0.6, 0.5, 0.7], saturation=[0.2] * 3, nfe=[2.0] * 3))}
    text = report.table(dict(metrics=["density", "recall"], rows=rows, real=dict(density=[9.0, 9.1])))
    assert [part.split(" ±")[0] for part in text.split("**")[1::2]] == ["2.10"] and "layers 2:4" in text and "9.05 ±" in text
    text = report.table(dict(metrics=["density", "recall"], rows=rows, baseline="CFG"))
    assert [part.split(" ±")[0] for part in text.split("**")[1::2]] == ["+1.000"]


def test_the_pareto_front_by_definition():
    """A point is on the front if no other is at least as good in both coordinates and better in one."""
    points = [(1, 5), (2, 4), (2, 3), (3, 1), (0, 0), (2.5, 4)]
    assert report.pareto_front(points) == [(1, 5), (2.5, 4), (3, 1)]


# ------------------------------------------------------------------------------------------------
# Claims
# ------------------------------------------------------------------------------------------------


def test_verdicts_over_checkpoints():
    """Agreement is a verdict, contradiction is mixed, and undecided ones are counted."""
    assert claims.together(["holds", "holds"]) == "holds" and claims.together(["holds", "does not hold"]) == "mixed"
    assert claims.together(["undecided", "does not hold"]) == "does not hold on 1 of 2" and claims.together(["undecided"]) == "undecided"
    assert judge(0.2, 0.1) == "holds" and judge(-0.2, 0.1) == "does not hold" and judge(0.05, 0.1) == "undecided"


def invented(**rows):
    """A result with the rows' values a seed of one metric, density."""
    return {"rows": {label: dict(values=dict(density=v, frechet=v), method=label) for label, v in rows.items()}}


def test_directions_of_claims():
    """"better" respects the metric, and "worse" is its opposite."""
    result = invented(A=[1.0, 1.1], B=[2.0, 2.1])
    assert claims.beats("A", "B", "frechet")(result)[0] == pytest.approx(1) and claims.loses("A", "B", "frechet")(result)[0] == pytest.approx(-1)
    assert claims.beats("A", "B", "density")(result)[0] == pytest.approx(-1)


def test_claims_about_several_rows():
    """The best of all must beat each; one that is clearly ahead refutes it, one that is close leaves it undecided."""
    low, close, high = [1.0, 1.1, 1.0, 1.1, 1.05], [2.0, 1.9, 2.1, 2.0, 1.95], [2.0, 2.1, 1.9, 2.05, 2.0]
    verdict = lambda test, **rows: test(invented(**rows))[2]
    assert verdict(claims.beats_all("a", "density"), a=high, b=low) == "holds" and verdict(claims.beats_all("b", "density"), a=high, b=low) == "does not hold"
    assert verdict(claims.beats_all("a", "density"), a=high, b=close, c=low) == "undecided"
    assert verdict(claims.one_beats(["a", "b"], "c", "density"), a=low, b=high, c=low) == "holds"
    assert verdict(claims.one_beats(["a", "b"], "c", "density"), a=low, b=low, c=high) == "does not hold"
    assert verdict(claims.beats_both("a", "b", "c", "density"), a=high, b=low, c=low) == "holds"
    assert verdict(claims.beats_both("a", "b", "c", "density"), a=low, b=high, c=low) == "does not hold"
    assert verdict(claims.no_gain("a", "b", "density"), a=high, b=low) == "does not hold" and verdict(claims.no_gain("a", "b", "density"), a=high, b=close) == "holds"


def test_thirds_of_the_layers():
    """Each range of at most three layers belongs to the third in which its centre lies, and to one alone."""
    for depth in (8, 12):
        labels = {f"{a}:{b}": None for a in range(depth) for b in range(a + 1, depth + 1)}
        parts = [set(claims.third(which)(dict(depth=depth, rows=labels))) for which in ("early", "middle", "late")]
        assert sum(map(len, parts)) == len(set().union(*parts)) == 3 * depth - 3
        assert "0:1" in parts[0] and f"{depth // 2 - 1}:{depth // 2 + 1}" in parts[1] and f"{depth - 1}:{depth}" in parts[2]


def test_the_share_of_the_front():
    """It is 1 - 0.5 where ERG + APG dominates, 0 - 0.5 where it is dominated."""
    good, bad = ({m: [v] * 3 for m in ("density", "coverage", "prompt")} for v in (2.0, 1.0))
    rows = lambda own, other: {"rows": {"x": dict(method="erg+apg", values=own), "y": dict(method="apg", values=other)}}
    assert claims.front_share(rows(good, bad))[0] == 0.5 and claims.front_share(rows(bad, good))[0] == -0.5


@pytest.mark.skipif(not RESULTS.is_dir(), reason="no results are committed")
def test_the_committed_pages_follow_from_the_committed_numbers(tmp_path):
    """Every page and CLAIMS.md is what the code makes of the JSON beside it, and every claim has been judged."""
    records = {file.stem: json.loads(file.read_text()) for file in RESULTS.glob("*.json")}
    assert set(records) == set(reproduce.ENTRIES)
    for name, record in records.items():
        text = report.markdown(name, record, (reproduce.ENTRIES[name].__doc__ or "").strip())
        assert (RESULTS / f"{name}.md").read_text() == text, name
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    assert claims.write(tmp_path) == len(claims.CLAIMS)
    assert (tmp_path / "CLAIMS.md").read_text() == (RESULTS / "CLAIMS.md").read_text()
