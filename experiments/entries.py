"""What each table and figure of the paper runs on a checkpoint of the toy.

An entry is a generator function of a Scale and a checkpoint's name. It yields lists of runs, is sent their
rows, and returns a dictionary of plain numbers, which report.py turns into Markdown and a figure. So the runs
of several entries can be put into one queue. Entries that look inside the model are in inside.py.
"""
import dataclasses
import statistics

import torch

import erg
from experiments import diagnostics
from experiments.runs import Run, checkpoint, measure_real, small_batch
from tiny_dit import sample, tokenize
from toy.metrics import mean_ranks
from toy.sampling import GUIDANCE, METHODS

ABOUT = ("seconds", "hardware", "torch")  # of a row: how it was made
QUALITY = ("frechet", "precision", "recall", "density", "coverage")


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is sampled."""

    images: dict  # a seed, by data set: in the tables
    sweep: dict  # and in the figures
    steps: int
    seeds: tuple  # of what is reported
    search_seeds: tuple  # of the choice of parameters
    budget: int  # settings that each method may try
    layer_stride: int  # of the layer grid


FULL = Scale(images={"digits": 160, "mnist": 112, "cifar10": 512},
             sweep={"digits": 80, "mnist": 80, "cifar10": 256},
             steps=16, seeds=(0, 1, 2, 3, 4), search_seeds=(1000,), budget=6, layer_stride=1)
QUICK = Scale(images={"digits": 64, "mnist": 24, "cifar10": 24},
              sweep={"digits": 48, "mnist": 24, "cifar10": 24},
              steps=8, seeds=(0, 1, 2), search_seeds=(1000,), budget=3, layer_stride=2)

# ---- Settings ----------------------------------------------------------------------------------------------


def depth(name):
    return checkpoint(name)[0].config.depth


def dataset(name):
    """The data set of a checkpoint: "digits" of "digits-early"."""
    return name.removesuffix("-early")


def recipe(name):
    return GUIDANCE[dataset(name)]


def layer_ranges(name):
    """Two candidate ranges of layers: the recipe's, and the middle third (narrowed if it is the same)."""
    own, n = recipe(name)["layers"], depth(name)
    middle = range(round(n / 3), round(2 * n / 3))
    return [list(own), list(middle[1:-1] if middle == own else middle)]


def c_erg(name, **changes):
    """The recipe's C-ERG; a method and its parameters, as Run takes them."""
    return "c-erg", {k: recipe(name)[k] for k in ("w", "tau_c")} | changes


def i_erg(name, **changes):
    own = {k: recipe(name)[k] for k in ("w", "tau_i", "kappa")}
    return "i-erg", own | dict(layers=list(recipe(name)["layers"])) | changes


def full_erg(name, method="erg", **changes):
    return method, i_erg(name)[1] | c_erg(name)[1] | changes


def grids(name, task):
    """{method: the settings it may try} for a task of runs.TASKS: six each, the more usual ones first."""
    own, middle = layer_ranges(name)
    small = (1.5, 1.25, 2.0)  # of methods whose weak prediction is far from the strong one
    late, early = dict(tau1=0.8, tau2=1.0, scale=0.25), dict(tau1=0.6, tau2=0.9, scale=0.25)  # of CADS' noise
    layered = [dict(w=w, layers=layers) for w in small for layers in (own, middle)]
    combine = {} if task == "unconditional" else dict(cfg=1.5)
    ours = lambda weights, **changes: [full_erg(name, w=w, **changes)[1] for w in weights]
    found = {
        "cfg": [dict(w=w) for w in (1.5, 2.0, 1.25, 2.5, 3.0, 4.0)],
        "interval": [dict(w=w, low=low, high=high) for w, low, high in (
            (2.0, 0.0, 0.5), (2.0, 0.2, 0.8), (3.0, 0.0, 0.5), (1.5, 0.2, 0.8),
            (4.0, 0.0, 0.5), (3.0, 0.2, 0.8))],
        "apg": [dict(w=w, norm_threshold=r) for w, r in (
            (1.5, 5.0), (2.0, 5.0), (3.0, 5.0), (4.0, 5.0), (2.0, 2.0), (3.0, 2.0))],
        "cads": [dict(w=w, **end) for w, end in (
            (1.5, late), (2.0, late), (3.0, late), (4.0, late), (2.0, early), (3.0, early))],
        "pag": layered,
        "sag": [dict(w=w, layer=middle[len(middle) // 2], sigma=sigma)
                for w in (1.25, 1.1, 1.5) for sigma in (1.0, 2.0)],
        "seg": [dict(p, **combine) for p in layered],
        "autoguidance": [dict(w=w, weak=f"{name}-early") for w in (1.5, 1.25, 1.75, 2.0, 2.5, 3.0)],
        "erg": ours((1.5, 2.0, 1.25, 2.5, 3.0)) + ours((1.5,), layers=middle),
        "erg+apg": ours((1.5, 2.0, 3.0, 4.0)) + ours((1.5, 2.0), layers=middle),
        "erg+cads": ours((1.5, 2.0, 1.25, 2.5, 3.0), **late) + ours((2.0,), **early),
        "i-erg": [i_erg(name, **p, negative="same")[1] for p in layered],
    }
    if task == "class":  # the paper's class-conditional I-ERG: the negative has the null prompt or the same
        found["i-erg"] = [i_erg(name, w=w, negative=which)[1] for w in small for which in ("null", "same")]
    return found


def metrics_of(task):
    return QUALITY if task == "unconditional" else (*QUALITY, "prompt")


# ---- Rows over seeds ---------------------------------------------------------------------------------------


def over_seeds(scale, name, task, settings, images):
    """Runs at every reported seed of settings, {label: (method, parameters)}.

    Returns {label: {"method": ..., "parameters": ..., "values": {metric: a list, one value a seed}}}.
    """
    runs = {label: [Run(name, task, method, p, seed, images, scale.steps) for seed in scale.seeds]
            for label, (method, p) in settings.items()}
    rows = yield [run for group in runs.values() for run in group]
    result = {}
    for label, (method, p) in settings.items():
        group = [rows[run] for run in runs[label]]
        values = {metric: [row[metric] for row in group] for metric in group[0] if metric not in ABOUT}
        result[label] = dict(method=method, parameters=p, values=values)
    return result


def search(scale, name, task, methods):
    """Each method's best setting by mean rank (App. A.1) on the search seeds.

    Returns {label: (method, parameters)}, and {label: all that was tried}.
    """
    grid, metrics, images = grids(name, task), metrics_of(task), scale.images[dataset(name)]
    seeds = scale.search_seeds
    runs = {method: [[Run(name, task, method, p, seed, images, scale.steps) for seed in seeds]
                     for p in grid[method][:scale.budget]] for method in methods if method in grid}
    rows = yield [run for groups in runs.values() for group in groups for run in group]
    chosen, tried = {METHODS[method].label: (method, {}) for method in methods}, {}
    for method, groups in runs.items():
        means = [{m: statistics.mean(rows[run][m] for run in group) for m in metrics} for group in groups]
        ranks, label = mean_ranks(means, metrics), METHODS[method].label
        tried[label] = [dict(parameters=group[0].parameters, mean_rank=rank, **row)
                        for group, rank, row in zip(groups, ranks, means)]
        chosen[label] = (method, groups[ranks.index(min(ranks))][0].parameters)
    return chosen, tried


def fixed_table(scale, name, settings, images=None, task="text", **more):
    """The rows of given settings, beside what as many real images would get."""
    images = images or scale.images[dataset(name)]
    rows = yield from over_seeds(scale, name, task, settings, images)
    found = [measure_real(name, seed, images) for seed in scale.seeds]
    real = {m: [row[m] for row in found] for m in QUALITY}
    return dict(task=task, metrics=metrics_of(task), images=images, rows=rows, real=real, **more)


def main_table(scale, name, task, *methods):
    """Tables 1 to 3: every method at its best setting."""
    chosen, tried = yield from search(scale, name, task, methods)
    return (yield from fixed_table(scale, name, chosen, task=task, search=tried))


def table1(scale, name):
    """Text-to-image: all methods, each at its best setting."""
    return (yield from main_table(scale, name, "text", "none", "cfg", "interval", "apg", "cads", "pag", "sag",
                                  "seg", "autoguidance", "erg", "erg+apg", "erg+cads"))


def table2(scale, name):
    """Unconditional generation, from the empty prompt."""
    return (yield from main_table(scale, name, "unconditional", "none", "sag", "pag", "seg", "autoguidance",
                                  "i-erg"))


def table3(scale, name):
    """Class-conditional generation: the prompt is the class alone ("a seven")."""
    return (yield from main_table(scale, name, "class", "none", "cfg", "pag", "sag", "seg", "i-erg"))


def table4(scale, name):
    """Steps K and step size gamma of I-ERG's energy attention, as differences from K = gamma = 1."""
    settings = {f"K = {K}, gamma = {gamma:g}": full_erg(name, K=K, gamma=gamma)
                for K, gamma in ((1, 1.0), (1, 1.5), (1, 0.5), (10, 0.1))}
    return (yield from fixed_table(scale, name, settings, baseline="K = 1, gamma = 1"))


ALPHA = 0.7  # the paper's Table 5 does not say which alpha it used


def table5(scale, name):
    """Components: CFG, C-ERG, then I-ERG, then the weight alpha, all at the same w."""
    settings = {"CFG": ("cfg", dict(w=recipe(name)["w"])), "C-ERG": c_erg(name),
                "C-ERG + I-ERG": full_erg(name),
                f"C-ERG + I-ERG, alpha = {ALPHA:g}": full_erg(name, alpha=ALPHA), "no guidance": ("none", {}),
                "I-ERG (null)": i_erg(name, negative="null"), "I-ERG (same)": i_erg(name, negative="same")}
    return (yield from fixed_table(scale, name, settings))


def table6(scale, name):
    """Three mechanisms at the same place (layers, kappa, w), the negative under the same prompt, so that
    nothing else guides: temperature 0.2, identity mapping, energy smoothing."""
    own = i_erg(name, negative="same")[1]
    place = {k: own[k] for k in ("w", "layers", "kappa", "negative")}
    settings = {"no guidance": ("none", {}),
                "energy smoothing": ("mechanism", dict(place, mechanism="smoothing")),
                "identity mapping": ("mechanism", dict(place, mechanism="identity")),
                "temperature reduction": ("mechanism", dict(place, mechanism="temperature", tau_i=0.2))}
    return (yield from fixed_table(scale, name, settings))


# ---- Figures that need many runs ---------------------------------------------------------------------------


def figure2(scale, name):
    """Pareto fronts of quality, diversity and consistency: as many settings of APG (w, norm threshold) as of
    ERG + APG (w; tau_i, alpha and gamma)."""
    settings, changed = {}, dict(tau_i=0.3, alpha=ALPHA, gamma=1.5)
    text = ", ".join(f"{symbol} = {value:g}" for symbol, value in changed.items())
    for w in (1.5, 2.0, 3.0, 4.0)[:max(2, scale.budget - 2)]:
        for r in (5.0, 2.0):
            settings[f"APG, w = {w:g}, r = {r:g}"] = ("apg", dict(w=w, norm_threshold=r))
        settings[f"ERG + APG, w = {w:g}"] = full_erg(name, "erg+apg", w=w)
        settings[f"ERG + APG, w = {w:g}, {text}"] = full_erg(name, "erg+apg", w=w, **changed)
    return (yield from fixed_table(scale, name, settings, scale.sweep[dataset(name)]))


BATCH = (24, 77)  # samples and seed of the diagnostics
TAU_C = (0.01, 0.1, 0.3, 3.0, 10.0)


def figure4(scale, name):
    """C-ERG alone: tau_c by w, with CFG at the same w, and no guidance, which is tau_c = 1."""
    settings = {"no guidance": ("none", {})}
    for w in (1.5, 2.5):
        settings[f"CFG, w = {w:g}"] = ("cfg", dict(w=w))
        for tau_c in TAU_C:
            settings[f"C-ERG, w = {w:g}, tau_c = {tau_c:g}"] = c_erg(name, w=w, tau_c=tau_c)
    result = yield from fixed_table(scale, name, settings, scale.sweep[dataset(name)])
    return dict(result, changes=encoding_changes(name), certain=encoder_certainty(name))


@torch.no_grad()
def encoding_changes(name):
    """How far tau_c, or the null prompt, moves the encoding and the first velocity, as a share of each."""
    model, noise, prompts, condition, null = small_batch(name, *BATCH)
    v = model(noise, 0.0, condition)
    weak = {f"{tau_c:g}": erg.encode(model.encode, prompts, tau=tau_c)[1] for tau_c in TAU_C}
    weak["null prompt"] = null
    change = lambda x, y: (torch.linalg.vector_norm(x - y) / torch.linalg.vector_norm(y)).item()
    return {label: [change(w, condition), change(model(noise, 0.0, w), v)] for label, w in weak.items()}


@torch.no_grad()
def encoder_certainty(name):
    """Entropy over log(tokens) of the caption encoder's attention, by layer."""
    model, _, prompts, _, _ = small_batch(name, *BATCH)
    layers = diagnostics.attention_certainty(model.encoder, tokenize(prompts, model.config))
    return [layer.relative_entropy for layer in layers]


def figure8(scale, name):
    """I-ERG on every range of layers [start, end), the negative under the same prompt."""
    n = depth(name)
    settings = {"no guidance": ("none", {})}
    for start in range(0, n, scale.layer_stride):
        for end in range(start + scale.layer_stride, n + 1, scale.layer_stride):
            settings[f"{start}:{end}"] = i_erg(name, layers=list(range(start, end)), negative="same")
    return (yield from fixed_table(scale, name, settings, scale.sweep[dataset(name)], depth=n))


KAPPAS = (0.0, 0.2, 0.4, 0.6, 0.8)


def figure9(scale, name):
    """ERG over kappa; kappa = 1 leaves C-ERG alone."""
    settings = {"no guidance": ("none", {})}
    settings |= {f"kappa = {kappa:g}": full_erg(name, kappa=kappa) for kappa in KAPPAS}
    settings["kappa = 1"] = c_erg(name)
    return (yield from fixed_table(scale, name, settings, scale.sweep[dataset(name)]))


# ---- Beyond the paper --------------------------------------------------------------------------------------


def variants(scale, name):
    """What might mend ERG's weak point, as differences from ERG, paired by seed; all at the recipe's w."""
    w, n, base = recipe(name)["w"], depth(name), full_erg(name)[1]
    chosen = base["layers"]
    beside = [layer for layer in (chosen[0] - 1, chosen[-1] + 1) if 0 <= layer < n]
    by_layer = [[layer, base["tau_i"]] for layer in chosen] + [[layer, 0.5] for layer in beside]
    falling, layerless = dict(w=2 * w - 1, w_end=1.0), {k: v for k, v in base.items() if k != "layers"}
    variant = lambda **changes: ("variant", base | changes)
    settings = {
        "ERG": ("erg", base), "no guidance": ("none", {}), "CFG": ("cfg", dict(w=w)),
        "ERG + APG": ("erg+apg", base),
        "w rises from 1": variant(w=1.0, w_end=2 * w - 1), "w falls to 1": variant(**falling),
        "window, until t = 0.6": variant(until=0.6), "late, from t = 0.6": full_erg(name, kappa=0.6),
        "renormalized": variant(renormalize=1.0), "milder, tau_i = 0.3": full_erg(name, tau_i=0.3),
        "w falls to 1, tau_i = 0.3": variant(**falling, tau_i=0.3),
        "CFG, w falls to 1": ("variant", falling), "C-ERG alone": c_erg(name),
        "tau_i by layer, 0.5 beside": ("variant", layerless | dict(taus=by_layer)),
        "tau_i = 0.3 in all layers": full_erg(name, tau_i=0.3, layers=list(range(n))),
    }
    return (yield from fixed_table(scale, name, settings, baseline="ERG"))


def suggest(scale, name):
    """Layers and kappa from the diagnostics, ranked among the whole grids of figures 8 and 9 by mean rank
    over the metrics."""
    layers = yield from figure8(scale, name)
    kappas = yield from figure9(scale, name)
    hints, n, own = suggestions(name), depth(name), recipe(name)["layers"]
    ranges = {label: row for label, row in layers["rows"].items() if ":" in label}
    thresholds = {f"kappa = {kappa:g}": kappas["rows"][f"kappa = {kappa:g}"] for kappa in KAPPAS}
    nearest = None
    if hints["kappa"] is not None:
        nearest = f"kappa = {min(KAPPAS, key=lambda kappa: abs(kappa - hints['kappa'])):g}"
    asked = {"our rule (fading effect)": hints["fading"],
             "B.4's rule (middle regime of certainty)": hints["middle regime"],
             "the middle third": f"{round(n / 3)}:{round(2 * n / 3)}",
             "the recipe (found by hand)": f"{own.start}:{own.stop}"}
    found = {rule: placed(ranges, label) for rule, label in asked.items()}
    found["B.2's rule for kappa"] = placed(thresholds, nearest)
    ranks = {label: statistics.mean(values) for label, values in seed_ranks(ranges).items()}
    features = {"effect at t = 0.9": [], "its growth from t = 0.3": [], "effect at t = 0.3": [],
                "number of layers": [], "share of certain rows": []}
    for label in ranks:
        (early, late), part = hints["effects"][label], slice(*map(int, label.split(":")))
        row = (late, late / early, early, part.stop - part.start, statistics.mean(hints["certain"][part]))
        for values, value in zip(features.values(), row):
            values.append(value)
    correlations = {what: rank_correlation(values, list(ranks.values())) for what, values in features.items()}
    return dict(placed=found, evidence=hints, depth=n, images=scale.sweep[dataset(name)], ranks=ranks,
                correlations=correlations)


def rank_correlation(a, b):
    """Spearman's: the correlation of ranks, ties sharing the mean of theirs."""
    rank = lambda values, u: sum(v < u for v in values) + sum(v == u for v in values) / 2
    ranks = torch.tensor([[rank(values, u) for u in values] for values in (a, b)], dtype=torch.float64)
    return torch.corrcoef(ranks)[0, 1].item()


def seed_ranks(rows):
    """{label: its mean rank over the metrics, a number a seed}."""
    metrics = metrics_of("text")
    at_seed = lambda s: [{m: row["values"][m][s] for m in metrics} for row in rows.values()]
    seeds = range(len(next(iter(rows.values()))["values"]["recall"]))
    by_seed = [mean_ranks(at_seed(s), metrics) for s in seeds]
    return {label: list(ranks) for label, ranks in zip(rows, zip(*by_seed))}


def placed(rows, label):
    """Where a row stands among all rows by mean rank, beside the best and the median of them."""
    ranks = seed_ranks(rows)
    mean = {name: statistics.mean(values) for name, values in ranks.items()}
    order = sorted(mean, key=mean.get)
    result = dict(label=label, of=len(order), best=order[0], best_rank=ranks[order[0]],
                  median_rank=statistics.median(mean.values()))
    return result if label not in mean else dict(result, position=order.index(label) + 1, rank=ranks[label])


def suggestions(name):
    """What the rules suggest for a checkpoint, and their evidence, from one small batch."""
    model, noise, _, condition, null = small_batch(name, *BATCH)
    effects = diagnostics.layer_effects(model, noise, condition, queries=slice(0, model.side**2))
    path = sample(model, noise, condition, 20, trajectory=True)
    certainty = diagnostics.attention_certainty(model, path[6], torch.full((len(noise),), 0.3), condition)
    cfg = erg.ERG(w=recipe(name)["w"])
    t, parallel, orthogonal = diagnostics.difference_norms(model, noise, condition, cfg, null)
    text = lambda layers: f"{layers.start}:{layers.stop}" if layers else None
    return {"fading": text(diagnostics.fading_layers(effects)),
            "middle regime": text(diagnostics.middle_regime(certainty)),
            "kappa": diagnostics.parallel_end(t, parallel, orthogonal),
            "effects": {text(e.layers): [e.early, e.late] for e in effects},
            "certain": [layer.certain for layer in certainty],
            "t": t.tolist(), "parallel": parallel.tolist(), "orthogonal": orthogonal.tolist()}


RUN_ENTRIES = {entry.__name__: entry for entry in (
    table1, table2, table3, table4, table5, table6, figure2, figure4, figure8, figure9, variants, suggest)}


def advance(entries, collect):
    """Run generators, {key: generator}, side by side: what they wish for in a round is one queue.

    collect({key: runs}) returns {key: {run: row}}. Returns {key: result}.
    """
    results, waiting = {}, {}

    def step(key, rows):
        try:
            waiting[key] = entries[key].send(rows)
        except StopIteration as stop:
            waiting.pop(key, None)
            results[key] = stop.value

    for key in entries:
        step(key, None)
    while waiting:
        for key, rows in collect(dict(waiting)).items():
            step(key, rows)
    return results
