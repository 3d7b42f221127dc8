"""What each table and figure of the paper runs on a checkpoint of the toy.

An entry is a generator function of a Scale and a checkpoint's name. It yields lists of runs, is sent their rows, and
returns a dictionary of plain numbers, which report.py turns into Markdown and a figure. So the driver can put the
runs of several entries into one queue. Entries that need no such runs, but a look inside the model, are in inside.py.
"""
import dataclasses
import statistics

import torch

import erg
import train_toy
from experiments import diagnostics
from experiments.metrics import mean_ranks
from experiments.runs import COMPARED, METHODS, Run, checkpoint, measure_real, small_batch
from tiny_dit import sample, tokenize

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


FULL = Scale(images={"digits": 160, "mnist": 112, "cifar10": 512}, sweep={"digits": 80, "mnist": 80, "cifar10": 256},
             steps=16, seeds=(0, 1, 2, 3, 4), search_seeds=(1000,), budget=6, layer_stride=1)
QUICK = Scale(images={"digits": 64, "mnist": 24, "cifar10": 24}, sweep={"digits": 48, "mnist": 24, "cifar10": 24},
              steps=8, seeds=(0, 1, 2), search_seeds=(1000,), budget=3, layer_stride=2)

# ------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------


def depth(name):
    return checkpoint(name)[0].config.depth


def dataset(name):
    """The data set of a checkpoint: "digits" of "digits-early"."""
    return name.removesuffix("-early")


def recipe(name):
    return train_toy.RECIPES[dataset(name)]


def layer_ranges(name):
    """Two candidate ranges of layers: the recipe's, and the middle third (narrowed if it is the same)."""
    first, last = recipe(name).layers
    n = depth(name)
    middle = (round(n / 3), round(2 * n / 3))
    if middle == (first, last):
        middle = (first + 1, last - 1)
    return [list(range(first, last)), list(range(*middle))]


def i_erg(name, **changes):
    """The recipe's I-ERG, in the terms of runs.METHODS."""
    r = recipe(name)
    return dict(dict(w=r.w, tau=r.tau_i, layers=list(range(*r.layers)), kappa=r.kappa), **changes)


def full_erg(name, **changes):
    return i_erg(name, **dict(dict(tau_c=recipe(name).tau_c), **changes))


def grids(name, task):
    """{method: the settings it may try}, six for each, the more usual ones first; for a task of runs.TASKS."""
    own, middle = layer_ranges(name)
    small = (1.5, 1.25, 2.0)  # of methods whose weak prediction is far from the strong one
    late, early = dict(tau1=0.8, tau2=1.0, scale=0.25), dict(tau1=0.6, tau2=0.9, scale=0.25)  # when CADS' noise ends
    layered = [dict(w=w, layers=layers) for w in small for layers in (own, middle)]
    found = {
        "cfg": [dict(w=w) for w in (1.5, 2.0, 1.25, 2.5, 3.0, 4.0)],
        "interval": [dict(w=w, low=low, high=high) for w, low, high in (
            (2.0, 0.0, 0.5), (2.0, 0.2, 0.8), (3.0, 0.0, 0.5), (1.5, 0.2, 0.8), (4.0, 0.0, 0.5), (3.0, 0.2, 0.8))],
        "apg": [dict(w=w, norm_threshold=r) for w, r in ((1.5, 5.0), (2.0, 5.0), (3.0, 5.0), (4.0, 5.0), (2.0, 2.0), (3.0, 2.0))],
        "cads": [dict(w=w, **end) for w, end in ((1.5, late), (2.0, late), (3.0, late), (4.0, late), (2.0, early), (3.0, early))],
        "pag": layered,
        "sag": [dict(w=w, layer=middle[len(middle) // 2], sigma=sigma) for w in (1.25, 1.1, 1.5) for sigma in (1.0, 2.0)],
        "seg": [dict(p, **(dict(cfg=1.5) if task != "unconditional" else {})) for p in layered],
        "autoguidance": [dict(w=w) for w in (1.5, 1.25, 1.75, 2.0, 2.5, 3.0)],
        "erg": [full_erg(name, w=w, layers=layers) for w, layers in (
            (1.5, own), (2.0, own), (1.25, own), (2.5, own), (3.0, own), (1.5, middle))],
        "erg+apg": [full_erg(name, w=w, layers=layers) for w, layers in (
            (1.5, own), (2.0, own), (3.0, own), (4.0, own), (1.5, middle), (2.0, middle))],
        "erg+cads": [full_erg(name, w=w, **end) for w, end in ((1.5, late), (2.0, late), (1.25, late), (2.5, late), (3.0, late), (2.0, early))],
    }
    if task == "unconditional":
        found["erg"] = [i_erg(name, **p, negative="same") for p in layered]
    if task == "class":  # the paper's class-conditional I-ERG has the null prompt in the negative, or the same one
        found["erg"] = [i_erg(name, w=w, negative=negative) for w in small for negative in ("null", "same")]
    return found


TABLES = {1: ("text", COMPARED), 2: ("unconditional", ["none", "sag", "pag", "seg", "autoguidance", "erg"]),
          3: ("class", ["none", "cfg", "pag", "sag", "seg", "erg"])}


def metrics_of(task):
    return QUALITY if task == "unconditional" else (*QUALITY, "prompt")


# ------------------------------------------------------------------------------------------------
# Rows over seeds
# ------------------------------------------------------------------------------------------------


def over_seeds(scale, name, task, settings, images):
    """Runs of {label: (method, parameters)} at every reported seed -> {label: {"values": {metric: a list a seed}, ...}}."""
    runs = {label: [Run(name, task, method, parameters, seed, images, scale.steps) for seed in scale.seeds]
            for label, (method, parameters) in settings.items()}
    rows = yield [run for group in runs.values() for run in group]
    result = {}
    for label, (method, parameters) in settings.items():
        group = [rows[run] for run in runs[label]]
        result[label] = dict(method=method, parameters=parameters,
                             values={metric: [row[metric] for row in group] for metric in group[0] if metric not in ABOUT})
    return result


def search(scale, name, task, methods):
    """Each method's best setting by mean rank (App. A.1) on the search seeds: {label: (method, parameters)}, and all that was tried."""
    candidates = {method: [{}] if method == "none" else grids(name, task)[method][:scale.budget] for method in methods}
    images = scale.images[dataset(name)]
    runs = {(method, i): [Run(name, task, method, p, seed, images, scale.steps) for seed in scale.search_seeds]
            for method, settings in candidates.items() if len(settings) > 1 for i, p in enumerate(settings)}
    rows = yield [run for group in runs.values() for run in group]
    chosen, tried = {}, {}
    for method, settings in candidates.items():
        label = "I-ERG" if method == "erg" and task != "text" else METHODS[method].label
        if len(settings) == 1:
            chosen[label] = (method, settings[0])
            continue
        means = [{m: sum(rows[run][m] for run in runs[method, i]) / len(scale.search_seeds) for m in metrics_of(task)}
                 for i in range(len(settings))]
        ranks = mean_ranks(means, metrics_of(task))
        chosen[label] = (method, settings[min(range(len(settings)), key=ranks.__getitem__)])
        tried[label] = [dict(parameters=p, mean_rank=rank, **row) for p, rank, row in zip(settings, ranks, means)]
    return chosen, tried


def real_images(scale, name, images):
    """What as many real images would get: {metric: a value a seed}."""
    rows = [measure_real(name, seed, images) for seed in scale.seeds]
    return {m: [row[m] for row in rows] for m in QUALITY}


def main_table(scale, name, number):
    """Tables 1 to 3: every method at its best setting."""
    task, methods = TABLES[number]
    chosen, tried = yield from search(scale, name, task, methods)
    rows = yield from over_seeds(scale, name, task, chosen, scale.images[dataset(name)])
    images = scale.images[dataset(name)]
    return dict(task=task, metrics=metrics_of(task), images=images, rows=rows, real=real_images(scale, name, images), search=tried)


def table1(scale, name):
    """Text-to-image: all methods, each at its best setting."""
    return (yield from main_table(scale, name, 1))


def table2(scale, name):
    """Unconditional generation, from the empty prompt."""
    return (yield from main_table(scale, name, 2))


def table3(scale, name):
    """Class-conditional generation: the prompt is the class alone ("a seven")."""
    return (yield from main_table(scale, name, 3))


def fixed_table(scale, name, settings, images=None, task="text", **more):
    images = images or scale.images[dataset(name)]
    rows = yield from over_seeds(scale, name, task, settings, images)
    return dict(task=task, metrics=metrics_of(task), images=images, rows=rows, real=real_images(scale, name, images), **more)


def table4(scale, name):
    """Steps K and step size gamma of I-ERG's energy attention, as differences from K = gamma = 1."""
    settings = {"K = 1, gamma = 1": ("erg", full_erg(name))}
    for steps, gamma in ((1, 1.5), (1, 0.5), (10, 0.1)):
        settings[f"K = {steps}, gamma = {gamma:g}"] = ("erg", full_erg(name, steps=steps, gamma=gamma))
    return (yield from fixed_table(scale, name, settings, baseline="K = 1, gamma = 1"))


ALPHA = 0.7  # the paper's Table 5 does not say which alpha it used


def table5(scale, name):
    """Components: CFG, C-ERG, then I-ERG, then the weight alpha, all at the same w."""
    w, r = recipe(name).w, recipe(name)
    settings = {"CFG": ("cfg", dict(w=w)), "C-ERG": ("erg", dict(w=w, tau_c=r.tau_c)), "C-ERG + I-ERG": ("erg", full_erg(name)),
                f"C-ERG + I-ERG, alpha = {ALPHA:g}": ("erg", full_erg(name, alpha=ALPHA)), "no guidance": ("none", {}),
                "I-ERG (null)": ("erg", i_erg(name, negative="null")), "I-ERG (same)": ("erg", i_erg(name, negative="same"))}
    return (yield from fixed_table(scale, name, settings))


def table6(scale, name):
    """Three mechanisms at the same place (layers, kappa, w), the negative under the same prompt, so that nothing else guides:
    temperature 0.2, identity mapping, energy smoothing."""
    place = dict(w=recipe(name).w, layers=list(range(*recipe(name).layers)), kappa=recipe(name).kappa, negative="same")
    settings = {"no guidance": ("none", {}), "energy smoothing": ("mechanism", dict(place, mechanism="smoothing")),
                "identity mapping": ("mechanism", dict(place, mechanism="identity")),
                "temperature reduction": ("mechanism", dict(place, mechanism="temperature", tau=0.2))}
    return (yield from fixed_table(scale, name, settings))


# ------------------------------------------------------------------------------------------------
# Figures that need many runs
# ------------------------------------------------------------------------------------------------


def figure2(scale, name):
    """Pareto fronts of quality, diversity and consistency: as many settings of APG (w, norm threshold) as of ERG + APG
    (w; tau, alpha and gamma)."""
    settings = {}
    for w in (1.5, 2.0, 3.0, 4.0)[:max(2, scale.budget - 2)]:
        for r in (5.0, 2.0):
            settings[f"APG, w = {w:g}, r = {r:g}"] = ("apg", dict(w=w, norm_threshold=r))
        settings[f"ERG + APG, w = {w:g}"] = ("erg+apg", full_erg(name, w=w))
        changed = dict(tau=0.3, alpha=ALPHA, gamma=1.5)
        settings[f"ERG + APG, w = {w:g}, tau = 0.3, alpha = {ALPHA:g}, gamma = 1.5"] = ("erg+apg", full_erg(name, w=w, **changed))
    return (yield from fixed_table(scale, name, settings, scale.sweep[dataset(name)]))


BATCH = (24, 77)  # samples and seed of the diagnostics
TAU_C = (0.01, 0.1, 0.3, 3.0, 10.0)


def figure4(scale, name):
    """C-ERG alone: tau_c by w, with CFG at the same w, and no guidance, which is tau_c = 1."""
    settings = {"no guidance": ("none", {})}
    for w in (1.5, 2.5):
        settings[f"CFG, w = {w:g}"] = ("cfg", dict(w=w))
        for tau_c in TAU_C:
            settings[f"C-ERG, w = {w:g}, tau_c = {tau_c:g}"] = ("erg", dict(w=w, tau_c=tau_c))
    result = yield from fixed_table(scale, name, settings, scale.sweep[dataset(name)])
    return dict(result, changes=encoding_changes(name), certain=encoder_certainty(name))


@torch.no_grad()
def encoding_changes(name):
    """How far tau_c, or the null prompt, moves the caption's encoding and the first velocity, relative to their norms."""
    model, noise, prompts, condition, null = small_batch(name, *BATCH)
    v = model(noise, 0.0, condition)
    weak = {f"{tau_c:g}": erg.encode(model.encode, prompts, tau=tau_c)[1] for tau_c in TAU_C} | {"null prompt": null}
    norm = lambda x: torch.linalg.vector_norm(x)
    return {label: [(norm(w - condition) / norm(condition)).item(), (norm(model(noise, 0.0, w) - v) / norm(v)).item()] for label, w in weak.items()}


@torch.no_grad()
def encoder_certainty(name):
    """Entropy over log(tokens) of the caption encoder's attention, by layer."""
    model, _, prompts, _, _ = small_batch(name, *BATCH)
    return [layer.relative_entropy for layer in diagnostics.attention_certainty(model.encoder, tokenize(prompts, model.config))]


def figure8(scale, name):
    """I-ERG on every range of layers [start, end), the negative under the same prompt."""
    n = depth(name)
    settings = {"no guidance": ("none", {})}
    for start in range(0, n, scale.layer_stride):
        for end in range(start + scale.layer_stride, n + 1, scale.layer_stride):
            settings[f"{start}:{end}"] = ("erg", i_erg(name, layers=list(range(start, end)), negative="same"))
    return (yield from fixed_table(scale, name, settings, scale.sweep[dataset(name)], depth=n))


KAPPAS = (0.0, 0.2, 0.4, 0.6, 0.8)


def figure9(scale, name):
    """ERG over kappa; kappa = 1 leaves C-ERG alone."""
    settings = {"no guidance": ("none", {}), **{f"kappa = {kappa:g}": ("erg", full_erg(name, kappa=kappa)) for kappa in KAPPAS}}
    settings["kappa = 1"] = ("erg", dict(w=recipe(name).w, tau_c=recipe(name).tau_c))
    return (yield from fixed_table(scale, name, settings, scale.sweep[dataset(name)]))


# ------------------------------------------------------------------------------------------------
# Beyond the paper
# ------------------------------------------------------------------------------------------------


def variants(scale, name):
    """What might mend ERG's weak point, as differences from ERG, paired by seed; all at the recipe's w."""
    w, n, base = recipe(name).w, depth(name), full_erg(name)
    chosen = base["layers"]
    beside = [layer for layer in (chosen[0] - 1, chosen[-1] + 1) if 0 <= layer < n]
    by_layer = [[layer, base["tau"]] for layer in chosen] + [[layer, 0.5] for layer in beside]
    settings = {
        "ERG": ("erg", base), "no guidance": ("none", {}), "CFG": ("cfg", dict(w=w)), "ERG + APG": ("erg+apg", base),
        "w rises from 1": ("variant", dict(base, w=1.0, w_end=2 * w - 1)),
        "w falls to 1": ("variant", dict(base, w=2 * w - 1, w_end=1.0)),
        "window, until t = 0.6": ("variant", dict(base, until=0.6)),
        "late, from t = 0.6": ("erg", dict(base, kappa=0.6)),
        "renormalized": ("variant", dict(base, renormalize=1.0)),
        "milder, tau = 0.3": ("erg", dict(base, tau=0.3)),
        "w falls to 1, tau = 0.3": ("variant", dict(base, w=2 * w - 1, w_end=1.0, tau=0.3)),
        "CFG, w falls to 1": ("variant", dict(w=2 * w - 1, w_end=1.0)),
        "C-ERG alone": ("erg", dict(w=w, tau_c=base["tau_c"])),
        "tau by layer, 0.5 beside": ("variant", dict({k: v for k, v in base.items() if k != "layers"}, taus=by_layer)),
        "tau = 0.3 in all layers": ("erg", dict(base, tau=0.3, layers=list(range(n)))),
    }
    return (yield from fixed_table(scale, name, settings, baseline="ERG"))


def suggest(scale, name):
    """Layers and kappa from the diagnostics, ranked among the whole grids of figures 8 and 9 by mean rank over the metrics."""
    layers = yield from figure8(scale, name)
    kappas = yield from figure9(scale, name)
    hints = suggestions(name)
    ranges = {label: row for label, row in layers["rows"].items() if ":" in label}
    thresholds = {label: row for label, row in kappas["rows"].items() if "=" in label and label != "kappa = 1"}
    nearest = min(KAPPAS, key=lambda k: abs(k - hints["kappa"])) if hints["kappa"] is not None else None
    r = recipe(name)
    n = depth(name)
    asked = {"our rule (fading effect)": hints["fading"], "B.4's rule (middle regime of certainty)": hints["middle regime"],
             "the middle third": f"{round(n / 3)}:{round(2 * n / 3)}", "the recipe (found by hand)": f"{r.layers[0]}:{r.layers[1]}"}
    found = {rule: placed(ranges, label) for rule, label in asked.items()}
    found["B.2's rule for kappa"] = placed(thresholds, None if nearest is None else f"kappa = {nearest:g}")
    ranks = {label: sum(values) / len(values) for label, values in seed_ranks(ranges).items()}
    features = {"effect at t = 0.9": lambda label: hints["effects"][label][1], "its growth from t = 0.3": lambda label: hints["effects"][label][1] / hints["effects"][label][0],
                "effect at t = 0.3": lambda label: hints["effects"][label][0], "number of layers": lambda label: len(range(*map(int, label.split(":")))),
                "share of certain rows": lambda label: statistics.mean(hints["certain"][slice(*map(int, label.split(":")))])}
    correlations = {what: rank_correlation([feature(label) for label in ranks], list(ranks.values())) for what, feature in features.items()}
    return dict(placed=found, evidence=hints, depth=n, images=scale.sweep[dataset(name)], ranks=ranks, correlations=correlations)


def rank_correlation(a, b):
    """Spearman's: the correlation of ranks, ties sharing the mean of theirs."""
    ranks = lambda values: torch.tensor([sum(v < u for v in values) + sum(v == u for v in values) / 2 for u in values], dtype=torch.float64)
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


def seed_ranks(rows):
    """{label: its mean rank over the metrics, a number a seed}."""
    labels, metrics = list(rows), metrics_of("text")
    seeds = range(len(rows[labels[0]]["values"]["recall"]))
    by_seed = [mean_ranks([{m: rows[label]["values"][m][s] for m in metrics} for label in labels], metrics) for s in seeds]
    return {label: [ranks[i] for ranks in by_seed] for i, label in enumerate(labels)}


def placed(rows, label):
    """Where a row stands among all rows: its position by mean rank, and the mean ranks of itself, the best and the median."""
    ranks = seed_ranks(rows)
    mean = {name: sum(values) / len(values) for name, values in ranks.items()}
    order = sorted(mean, key=mean.get)
    result = dict(label=label, of=len(order), best=order[0], best_rank=ranks[order[0]], median_rank=statistics.median(mean.values()))
    return result if label not in mean else dict(result, position=order.index(label) + 1, rank=ranks[label])


def suggestions(name):
    """What the rules suggest for a checkpoint, and their evidence, from one small batch."""
    model, noise, _, condition, null = small_batch(name, *BATCH)
    batch = len(noise)
    effects = diagnostics.layer_effects(model, noise, condition, queries=slice(0, model.side**2))
    path = sample(model, noise, condition, 20, trajectory=True)
    certainty = diagnostics.attention_certainty(model, path[6], torch.full((batch,), 0.3), condition)
    t, parallel, orthogonal = diagnostics.difference_norms(model, noise, condition, erg.ERG(w=recipe(name).w), null)
    text = lambda layers: f"{layers.start}:{layers.stop}" if layers else None
    return dict(fading=text(diagnostics.fading_layers(effects)), kappa=diagnostics.parallel_end(t, parallel, orthogonal),
                effects={text(e.layers): [e.early, e.late] for e in effects}, certain=[layer.certain for layer in certainty],
                t=t.tolist(), parallel=parallel.tolist(), orthogonal=orthogonal.tolist(),
                **{"middle regime": text(diagnostics.middle_regime(certainty))})


RUN_ENTRIES = dict(table1=table1, table2=table2, table3=table3, table4=table4, table5=table5, table6=table6, figure2=figure2,
                   figure4=figure4, figure8=figure8, figure9=figure9, variants=variants,
                   suggest=suggest)


def advance(entries, collect):
    """Run generators side by side, so that what they wish for in a round is one queue. {key: generator} -> {key: result}.

    collect({key: runs}) returns {key: {run: row}}.
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
