"""experiments/: runs and their cache, the search, statistics, reports and claims."""
import ast
import dataclasses
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure

from experiments import bench, claims, entries, inside, report, reproduce, runs
from experiments.statistics import difference, estimate, gain, judge, t_quantile, winners
from toy import data
from toy.metrics import BETTER
from toy.sampling import METHODS, prepare

RESULTS = reproduce.RESULTS
TINY = entries.Scale(images={"digits": 8}, sweep={"digits": 8}, steps=2, seeds=(0, 1), search_seeds=(1000,),
                     budget=2, layer_stride=2)


def small_run(method="cfg", parameters=None, seed=0, images=8, steps=2, task="text", weights="digits"):
    parameters = dict(w=1.5) if parameters is None else parameters
    return runs.Run(weights, task, method, parameters, seed, images, steps)


# ---- Statistics --------------------------------------------------------------------------------------------


def test_the_interval_is_students():
    """For 1 to 5 the mean is 3, s = sqrt(2.5), the half width 2.776 s / sqrt(5); Bonferroni's is wider."""
    assert estimate([1, 2, 3, 4, 5]) == pytest.approx((3, 2.77645 * math.sqrt(2.5 / 5)), rel=1e-5)
    assert estimate([1, 2, 3, 4, 5], 10)[1] == pytest.approx(t_quantile(0.9975, 4) * math.sqrt(2.5 / 5))
    assert estimate([2.0, 2.0, 2.0]) == (2.0, 0.0) and estimate([7])[1] == math.inf


def test_quantiles_of_students_t():
    """Tabulated values, and the normal's for many degrees of freedom."""
    table = {(0.975, 1): 12.7062, (0.975, 4): 2.77645, (0.995, 4): 4.60409, (0.95, 9): 1.83311,
             (0.975, 5000): 1.96044}
    for (p, dof), value in table.items():
        assert t_quantile(p, dof) == pytest.approx(value, rel=1e-5)


def test_the_interval_covers_the_mean_in_95_of_100():
    """Over many draws of n normal values the interval covers the mean as often as it says."""
    generator = torch.Generator().manual_seed(0)
    for n in (2, 5, 40):
        draws = torch.randn(4000, n, generator=generator, dtype=torch.float64).tolist()
        covered = sum(abs(mean) <= half for mean, half in map(estimate, draws)) / len(draws)
        assert covered == pytest.approx(0.95, abs=0.012)


def test_pairing_removes_what_seeds_share():
    """A constant gain is found beneath a spread that hides it from unpaired intervals."""
    base = [0.0, 10.0, -7.0, 3.0, 30.0]
    better = [v + 0.1 + 0.001 * i for i, v in enumerate(base)]
    assert difference(better, base)[0] == pytest.approx(0.102)
    verdict = lambda *args: judge(*gain(*args))
    assert verdict(better, base) == "holds" and verdict(base, better) == "does not hold"
    assert verdict(better, base, "lower") == "does not hold" and verdict(base, base) == "undecided"
    pair = {"a": base, "b": better}
    assert winners(pair, "higher") == {"b"} and winners(pair, "lower") == {"a"}
    assert winners(pair | {"c": better}, "higher") == set()


# ---- Methods and runs --------------------------------------------------------------------------------------

PLACE = dict(w=2.0, layers=[1, 2], kappa=0.2, negative="null")
CADS, TEMPERED = dict(w=2.0, tau1=0.2, tau2=0.9, scale=0.25), dict(w=2.0, tau_i=0.5, layers=[1, 2])
CHANGES = [  # method, parameters, and changes of which each must change the pictures
    ("cfg", dict(w=1.5), [dict(w=2.0)]), ("autoguidance", dict(w=1.5, weak="digits-early"), [dict(w=2.0)]),
    ("autoguidance", dict(w=1.5, weak="digits-early"), [dict(weak="digits")]),
    ("interval", dict(w=3.0, low=0.2, high=0.9), [dict(w=2.0), dict(low=0.5), dict(high=0.3)]),
    ("apg", dict(w=3.0), [dict(w=2.0), dict(norm_threshold=0.1)]),
    ("cads", CADS, [dict(w=3.0), dict(tau1=0.6), dict(tau2=0.5), dict(scale=1.0)]),
    ("pag", dict(w=1.5, layers=[1, 2]), [dict(layers=[5]), dict(w=1.2)]),
    ("sag", dict(w=1.5, layer=3, sigma=1.0), [dict(layer=0), dict(sigma=0.5), dict(w=1.1)]),
    ("seg", dict(w=1.5, layers=[1, 2]), [dict(w=2.0), dict(sigma=0.6), dict(cfg=2.0), dict(layers=[6])]),
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
    ("variant", dict(TEMPERED, tau_c=0.1), [
        dict(until=0.5), dict(renormalize=1.0), dict(taus=[[1, 0.01], [4, 0.3]]), dict(w_end=1.0),
        dict(norm_threshold=0.1)]),
]


@pytest.mark.parametrize("method, parameters, changes", CHANGES)
def test_every_parameter_changes_the_pictures(method, parameters, changes):
    """No parameter of a method is without effect on what is sampled from the shipped digits."""
    draw = lambda p: runs.sample_run(small_run(method, p, images=2, steps=4))[0]
    before = draw(parameters)
    for change in changes:
        assert (before - draw(parameters | change)).abs().max() > 1e-4, change


def test_every_parameter_is_tested():
    """The list above has each parameter of each rival."""
    for method in ("interval", "pag", "sag", "seg", "autoguidance", "mechanism"):
        changed = {name for m, _, changes in CHANGES if m == method for change in changes for name in change}
        assert changed == {*METHODS[method].required, *METHODS[method].optional}, method


def test_a_runs_key_follows_all_that_decides_its_numbers(monkeypatch):
    """Each field, the weights' bytes, the code and torch's version give another key; the order of parameters doesn't."""
    keys = [small_run(**change).key for change in (
        {}, dict(method="apg"), dict(parameters=dict(w=2.0)), dict(seed=1), dict(images=9), dict(steps=3),
        dict(task="class"), dict(weights="digits-early"))]
    for place, name, value in ((runs, "code_digest", lambda: "other"), (torch, "__version__", "9.9"), (runs, "BF16", True)):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            keys.append(small_run().key)
    assert len(set(keys)) == len(keys)
    a, b = (small_run("interval", p) for p in (dict(w=2, low=0, high=1), dict(high=1, low=0, w=2)))
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
    assert {"digit", "ink", "paper", "prompt"} <= set(text)
    assert "prompt" in word and "digit" not in word and "prompt" not in empty
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


def test_real_images_score_as_real():
    """Real images against other real images have density 1, and the coverage of two samples of one law,
    1 - prod (N - i) / (N + M - i) over i = 1..k."""
    rows = [runs.measure_real("digits", seed, 256) for seed in range(4)]
    n = len(runs.checkpoint("digits")[2]) - 256
    expected = 1 - math.prod((n - i) / (n + 256 - i) for i in range(1, 6))
    assert sum(row["coverage"] for row in rows) / 4 == pytest.approx(expected, abs=0.03)
    assert sum(row["density"] for row in rows) / 4 == pytest.approx(1, abs=0.1)


# ---- Search ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", runs.TASKS)
@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_every_method_has_the_same_budget(name, task):
    """Each method may try six different settings, all of which it obeys; the ranges of layers differ."""
    for method, grid in entries.grids(name, task).items():
        assert len(grid) == len({json.dumps(p, sort_keys=True) for p in grid}) == entries.FULL.budget, method
        assert all(prepare(method, **parameters) for parameters in grid)
    assert len({tuple(r) for r in entries.layer_ranges(name)}) == 2


def drive(generator, score):
    """Run an entry with invented rows, and list the runs of each round."""
    rounds, rows = [], None
    try:
        while True:
            rounds.append(generator.send(rows))
            rows = {run: score(run) for run in rounds[-1]}
    except StopIteration as stop:
        return rounds, stop.value


def test_the_search_takes_the_best_mean_rank_and_reports_other_seeds():
    """With rows that are best at w = 2, all that tries w = 2 is reported there, on other seeds."""
    def score(run):
        good = -abs(run.parameters.get("w", 1) - 2) + run.seed * 1e-3
        metrics = (*entries.QUALITY, "prompt", "saturation", "nfe")
        return {m: good if BETTER.get(m) == "higher" else -good for m in metrics}

    (tried, shown), result = drive(entries.table1(entries.FULL, "digits"), score)
    assert {run.seed for run in tried} == {1000} and {run.seed for run in shown} == {0, 1, 2, 3, 4}
    assert len(result["rows"]) == 12
    for label, row in result["rows"].items():
        if row["method"] != "none":
            weights = [p["parameters"]["w"] for p in result["search"][label]]
            assert row["parameters"]["w"] == min(weights, key=lambda w: abs(w - 2)), label
    assert min(result["search"]["CFG"], key=lambda row: row["mean_rank"])["parameters"] == {"w": 2.0}


def test_the_rank_correlation():
    """1 and -1 for monotone relations of any shape; scipy's value with ties."""
    values = [3.0, 1.0, 2.0, 5.0, 2.0]
    assert entries.rank_correlation(values, [v**3 for v in values]) == pytest.approx(1)
    assert entries.rank_correlation(values, [-v for v in values]) == pytest.approx(-1)
    scipy = pytest.importorskip("scipy.stats", reason="comes with the test extra")
    other = [1.0, 4.0, 4.0, 2.0, 0.0]
    assert entries.rank_correlation(values, other) == pytest.approx(scipy.spearmanr(values, other).statistic)


def test_a_suggestion_is_placed_in_the_grid():
    """A row's position is its place by mean rank among invented rows; what is not in the grid has none."""
    sign = {m: -1.0 if BETTER[m] == "higher" else 1.0 for m in entries.metrics_of("text")}
    rows = {f"{i}:{i + 1}": dict(values={m: [sign[m] * i] * 2 for m in sign}) for i in range(5)}
    expected = dict(label="1:2", position=2, of=5, best="0:1", best_rank=[1, 1], rank=[2, 2], median_rank=3)
    assert entries.placed(rows, "1:2") == expected and "position" not in entries.placed(rows, None)


def test_entries_share_one_queue():
    """Entries side by side are asked for all their runs of a round at once; each gets its own rows."""
    asked, row = [], {m: 1.0 for m in (*BETTER, "saturation", "nfe")}

    def collect(wishes):
        asked.append(set(wishes))
        return {key: dict.fromkeys(wanted, row) for key, wanted in wishes.items()}

    made = {name: entries.RUN_ENTRIES[name](TINY, "digits") for name in ("table1", "table6", "figure9")}
    results = entries.advance(made, collect)
    assert asked == [{"table1", "table6", "figure9"}, {"table1"}] and set(results) == set(made)


# ---- The command, from the runs to the files ---------------------------------------------------------------


def test_all_of_it_from_the_runs_to_the_verdicts(tmp_path, monkeypatch):
    """`all` ends in three files an entry, and in a verdict for each claim; again, it samples nothing."""
    def coarse(figure, file, write=Figure.savefig, **options):  # the layout takes most of the time
        figure.set_layout_engine("none")
        write(figure, file, **dict(options, dpi=30))

    monkeypatch.setattr(Figure, "savefig", coarse)
    monkeypatch.setattr(entries, "QUICK", TINY)
    monkeypatch.setattr(inside, "STEPS", 2)
    out = tmp_path / "out"
    options = ["--quick", "--out", str(out), "--cache", str(tmp_path / "cache"), "--device", "cpu"]
    reproduce.main(["all", *options])
    for name in reproduce.ENTRIES:
        record = json.loads((out / f"{name}.json").read_text())
        assert record["command"].endswith(" ".join(["all", *options]))
        assert record["minutes"] > 0 and record["hardware"] and record["torch"] == str(torch.__version__)
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert record["title"] in (out / f"{name}.md").read_text()
    page = (out / "CLAIMS.md").read_text()
    assert all(claim.text in page for claim in claims.CLAIMS) and "not asked" not in page
    monkeypatch.setattr(runs, "compute", lambda *args: pytest.fail("computed again"))
    before = json.loads((out / "table6.json").read_text())
    reproduce.main(["table6", *options])
    assert json.loads((out / "table6.json").read_text()) | dict(command=before["command"]) == before


def test_two_processes_find_what_one_finds(tmp_path):
    """Under torchrun the runs are shared out, and the numbers are those of one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m",
               "experiments.reproduce", "table6", "--quick", "--device", "cpu", "--out", str(tmp_path / "out"),
               "--cache", str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=runs.ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"),
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    records = [json.loads(file.read_text()) for file in (tmp_path / "cache").glob("*.json")]
    assert len(records) == 4 * len(entries.QUICK.seeds)
    for record in [r for r in records if r["seed"] == 1][:2]:  # one of each process, or two of one
        fields = {field.name: record[field.name] for field in dataclasses.fields(runs.Run)}
        row = runs.compute(runs.Run(**fields))
        for metric in ("frechet", "density", "recall", "prompt"):
            assert record["row"][metric] == pytest.approx(row[metric], rel=1e-3, abs=1e-3), metric


def test_bold_marks_only_what_the_interval_supports():
    """A clear winner is bold, two that cannot be told apart are not; so with differences."""
    row = lambda density, recall, **p: dict(method="erg", parameters=dict(w=2.0, **p), values=dict(
        density=density, recall=recall, saturation=[0.1] * 3, nfe=[2.0] * 3))
    rows = {"CFG": row([1.0, 1.1, 1.2], [0.5, 0.6, 0.7]),
            "ERG": row([2.0, 2.1, 2.2], [0.6, 0.5, 0.7], layers=[2, 3])}
    bold = lambda text: [part.split(" ±")[0] for part in text.split("**")[1::2]]
    text = report.table(dict(metrics=["density", "recall"], rows=rows, real=dict(density=[9.0, 9.1])))
    assert bold(text) == ["2.10"] and "layers 2:4" in text and "9.05 ±" in text
    assert bold(report.table(dict(metrics=["density", "recall"], rows=rows, baseline="CFG"))) == ["+1.000"]


# ---- Claims ------------------------------------------------------------------------------------------------


def test_verdicts_over_checkpoints():
    """Agreement is a verdict, contradiction is mixed, and undecided ones are counted."""
    cases = {("holds", "holds"): "holds", ("holds", "does not hold"): "mixed", ("undecided",): "undecided",
             ("undecided", "does not hold"): "does not hold on 1 of 2"}
    assert all(claims.together(list(verdicts)) == one for verdicts, one in cases.items())


def test_claims_about_rows():
    """"Better" respects the metric. The best of all must beat each: one clearly ahead refutes it, a close one
    leaves it undecided."""
    low, close, high = [1.0, 1.1, 1.0, 1.1, 1.05], [2.0, 1.9, 2.1, 2.0, 1.95], [2.0, 2.1, 1.9, 2.05, 2.0]

    def ask(test, metric="density", **rows):
        return test({"rows": {label: dict(values={metric: v}) for label, v in rows.items()}}, metric)

    a, b = claims.beats("a", "b"), claims.beats_all("a")
    assert ask(a, a=high, b=low)[0] == -ask(a, "frechet", a=high, b=low)[0] > 0
    assert ask(b, a=high, b=low)[2] == "holds" and ask(b, a=low, b=high, c=low)[2] == "does not hold"
    assert ask(b, a=high, b=close, c=low)[2] == "undecided"
    assert ask(claims.beats_all("a", "c"), a=high, b=close, c=low)[2] == "holds"
    one = claims.one_beats(["a", "b"], "c")
    assert ask(one, a=low, b=high, c=low)[2] == "holds"
    assert ask(one, a=low, b=low, c=high)[2] == "does not hold"
    none = claims.no_gain("a", "b")
    assert ask(none, a=high, b=low)[2] == "does not hold" and ask(none, a=high, b=close)[2] == "holds"


def test_thirds_of_the_layers():
    """Each range of at most three layers belongs to the third that holds its centre, and to one alone."""
    for depth in (8, 12):
        labels = {f"{a}:{b}": None for a in range(depth) for b in range(a + 1, depth + 1)}
        result = dict(depth=depth, rows=labels)
        early, middle, late = (set(claims.third(which)(result)) for which in ("early", "middle", "late"))
        assert len(early) + len(middle) + len(late) == len(early | middle | late) == 3 * depth - 3
        half = depth // 2
        assert "0:1" in early and f"{half - 1}:{half + 1}" in middle and f"{depth - 1}:{depth}" in late


def test_the_share_of_the_front():
    """It is 1 - 0.5 where ERG + APG dominates, 0 - 0.5 where it is dominated."""
    good, bad = ({m: [v] * 3 for m in ("density", "coverage", "prompt")} for v in (2.0, 1.0))
    rows = lambda own, other: {"rows": {"x": dict(method="erg+apg", values=own),
                                        "y": dict(method="apg", values=other)}}
    assert claims.front_share(rows(good, bad))[0] == 0.5 and claims.front_share(rows(bad, good))[0] == -0.5
    points = [(1, 5), (2, 4), (2, 3), (3, 1), (0, 0), (2.5, 4)]
    assert report.pareto_front(points) == [(1, 5), (2.5, 4), (3, 1)]


def test_the_committed_pages_follow_from_the_committed_numbers(tmp_path):
    """Every page and CLAIMS.md is what the code makes of the JSON beside it. All claims have been judged, and
    those that are withdrawn exist."""
    records = {file.stem: json.loads(file.read_text()) for file in RESULTS.glob("*.json")}
    assert (RESULTS / "bench.md").read_text() == bench.page(records.pop("bench"))
    assert set(records) == set(reproduce.ENTRIES)
    for name, record in records.items():
        text = report.markdown(name, record, reproduce.ENTRIES[name].__doc__)
        assert (RESULTS / f"{name}.md").read_text() == text, name
        for result in record["checkpoints"].values():
            for row in result.get("rows", {}).values():
                prepare(row["method"], **row["parameters"])  # names of today
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    assert claims.write(tmp_path) == len(claims.CLAIMS)
    assert set(claims.WITHDRAWN) <= {claim.text for claim in claims.CLAIMS}
    assert (tmp_path / "CLAIMS.md").read_text() == (RESULTS / "CLAIMS.md").read_text()
