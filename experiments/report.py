"""Markdown and figures from the results of entries.py: everything here is drawn from plain numbers."""
import math

from matplotlib.figure import Figure

from experiments.statistics import difference, estimate, judge, winners
from toy import drawing
from toy.metrics import BETTER

TITLES = {"frechet": "Frechet distance", "prompt": "prompt accuracy"}
ARROW = {"higher": "↑", "lower": "↓"}
DRAWN_AS = {"C-ERG + I-ERG": "ERG", "temperature reduction": "I-ERG", "identity mapping": "PAG*",
            "energy smoothing": "SEG*"}


def colour(label):
    """A label's colour, as in toy.drawing; labels of Tables 5 and 6 have that of the method that they are."""
    return drawing.colour(next((name for start, name in DRAWN_AS.items() if label.startswith(start)), label))


def heading(metric):
    return f"{TITLES.get(metric, metric)} {ARROW[BETTER[metric]]}"


def number(mean, half, signed=False):
    """"1.23 ± 0.45", with two digits of the half width, or the mean alone if that is unknown or tiny."""
    known = 1e-6 < half < math.inf
    digits = min(4, max(1, 1 - math.floor(math.log10(half)))) if known else 3
    text = f"{mean:+.{digits}f}" if signed else f"{mean:.{digits}f}"
    return f"{text} ± {half:.{digits}f}" if known else text


def setting_text(parameters):
    """Parameters as a reader would type them: "w = 1.5, layers 2:4"."""
    parts = []
    for name, value in parameters.items():
        if name == "layers":
            contiguous = value == list(range(value[0], value[-1] + 1))
            parts.append(f"layers {value[0]}:{value[-1] + 1}" if contiguous else f"layers {value}")
        elif name == "taus":
            parts.append("tau_i by layer")
        else:
            parts.append(f"{name} = {value:g}" if isinstance(value, (int, float)) else f"{name} = {value}")
    return ", ".join(parts)


# ---- Markdown ----------------------------------------------------------------------------------------------


def cells(row, result, best):
    """(metric, text) of a row: its means, or differences from the baseline; bold where that is decided."""
    baseline = result["rows"].get(result.get("baseline"))
    for metric, values in row["values"].items():
        if metric == "nfe":
            yield metric, f"{estimate(values)[0]:.2f}"
        elif baseline and row is not baseline:
            change = difference(values, baseline["values"][metric])
            text = number(*change, signed=True)
            yield metric, f"**{text}**" if metric in best and judge(*change) != "undecided" else text
        else:
            text = number(*estimate(values))
            yield metric, f"**{text}**" if row in best.get(metric, ()) else text


def table(result):
    """A table of means and intervals over seeds, or of differences from the baseline, in Markdown."""
    metrics, rows, best = result["metrics"], result["rows"], {}
    for m in metrics:
        won = winners({label: row["values"][m] for label, row in rows.items()}, BETTER[m])
        best[m] = [] if "baseline" in result else [rows[label] for label in won]
    extra = [m for m in ("saturation", "nfe") if all(m in row["values"] for row in rows.values())]
    line = lambda *texts: f"| {' | '.join(texts)} |"
    shown = [*metrics, *extra]
    lines = [line("", *map(heading, metrics), *extra, "settings"), "|---" * (len(shown) + 2) + "|"]
    if "real" in result:
        real = {m: number(*estimate(values)) for m, values in result["real"].items()}
        lines.append(line("*real images*", *(real.get(m, "") for m in shown), ""))
    for label, row in rows.items():
        found = dict(cells(row, result, best))
        lines.append(line(label, *(found[m] for m in shown), setting_text(row["parameters"])))
    return "\n".join(lines)


def searched(result):
    """What was tried for each method, in one line each; a best w at the end of what was tried is marked."""
    lines = []
    for label, tried in result.get("search", {}).items():
        order = sorted(tried, key=lambda row: row["mean_rank"])
        weights = [row["parameters"]["w"] for row in tried]
        edge = order[0]["parameters"]["w"] in (min(weights), max(weights)) and len(set(weights)) > 1
        texts = [f"{setting_text(row['parameters'])} (mean rank {row['mean_rank']:.1f})" for row in order]
        lines.append(f"- {label}{' (best w at the edge of its grid)' if edge else ''}: {'; '.join(texts)}")
    return "\n".join(lines)


def placed(result):
    """The table of where suggested layers and kappa stand in the whole grid."""
    lines = ["| rule | suggests | position in the grid | its mean rank | best of the grid | its mean rank "
             "| median mean rank |", "|---" * 7 + "|"]
    for rule, p in result["placed"].items():
        own = f"{p['position']} of {p['of']} | {number(*estimate(p['rank']))}" if "position" in p else "- | -"
        lines.append(f"| {rule} | {p['label'] or 'nothing'} | {own} | {p['best']} "
                     f"| {number(*estimate(p['best_rank']))} | {p['median_rank']:.1f} |")
    at = result["evidence"]["kappa"]
    when = "never" if at is None else f"from t = {at:.2f} on"
    found = ", ".join(f"{what} {rho:+.2f}" for what, rho in result["correlations"].items())
    return "\n".join([
        *lines, "", f"Rank correlation (Spearman) with the mean rank over all ranges: {found}.", "",
        f"CFG's parallel difference is below a tenth of its peak {when}; the suggestion for kappa is the "
        "nearest of the grid. Mean ranks are over the six metrics, ± half the 95 % interval over seeds; the "
        "grid of ranges is figure 8's, that of kappa figure 9's."])


RUNS_TEXT = """{steps} Euler steps; {seeds} seeds of {images} images each; mean ± half the 95 % interval over
seeds (Student's t). {bold}
Frechet distances of so few images are biased upwards, less for samples with less diversity; coverage, with
far fewer images than the {reference} real ones, is close to a function of density; recall is near its
ceiling. The row of real images is what a perfect model would get."""
SEARCH_TEXT = """Each method could try {budget} settings, and is shown with the one of the best mean rank
(App. A.1) on another seed ({seeds}). The recipe's layers, which PAG*, SEG* and ERG may all use, and ERG's
tau_i and kappa come from an earlier scan by hand, which is a head start for these methods.

<details><summary>All settings that were tried, best mean rank first</summary>

{tried}

</details>
"""


def runs_text(checkpoint, result, scale):
    bold = "Bold: better than every other row beyond the 95 % interval of the difference, paired by seed."
    if "baseline" in result:
        bold = f"Rows are differences from {result['baseline']}, paired by seed; bold where they exclude 0."
    return RUNS_TEXT.format(steps=scale["steps"], seeds=len(scale["seeds"]), images=result["images"],
                            bold=bold, reference="1,437" if checkpoint.startswith("digits") else "5,000")


def changes(result):
    """Figure 4's second table."""
    return ["What the negative's encoding is, against the caption's own (24 prompts; norms relative to the "
            "caption's):", "",
            "| tau_c | change of the encoding | change of the first velocity |", "|---|---|---|",
            *(f"| {label} | {a:.3f} | {b:.3f} |" for label, (a, b) in result["changes"].items()), "",
            "Entropy of the encoder's attention over its largest possible value, by layer: "
            + ", ".join(f"{e:.2f}" for e in result["certain"]) + ".", ""]


def markdown(name, record, text):
    """The page of one entry: what it is, how it was made, and a section for each checkpoint."""
    scale, text = record["scale"], " ".join(text.split())
    lines = [f"# {record['title']}", "", text, "", f"![{name}]({name}.png)", "",
             f"`{record['command']}` · {record['minutes']:.1f} minutes of sampling, summed over processes · "
             f"{record['hardware']} · torch {record['torch']} · SHA-256 of the weights: "
             f"{', '.join(f'{name}.pt {start}...' for name, start in record['weights'].items())}", ""]
    for checkpoint, result in record["checkpoints"].items():
        lines += [f"## {checkpoint}", ""]
        if "rows" in result:
            lines += [runs_text(checkpoint, result, scale), "", table(result), ""]
        if result.get("search"):
            seeds = ", ".join(map(str, scale["search_seeds"]))
            lines.append(SEARCH_TEXT.format(budget=scale["budget"], seeds=seeds, tried=searched(result)))
        if "changes" in result:
            lines += changes(result)
        if "placed" in result:
            lines += [placed(result), ""]
        if "summary" in result:
            lines += [result["summary"], ""]
    return "\n".join(lines).rstrip() + "\n"


# ---- Figures -----------------------------------------------------------------------------------------------


def canvas(rows, columns, width, height):
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=7)
    return figure, axes


def around(result, label, metric):
    """Mean of a row, and half the 95 % interval of its difference from the mean of all rows, paired by seed.

    So bars that do not meet tell rows apart. The intervals of the rows themselves would hide that: they hold
    what seeds share.
    """
    values = result["rows"][label]["values"][metric]
    seeds = zip(*(row["values"][metric] for row in result["rows"].values()))
    return sum(values) / len(values), difference(values, [sum(seed) / len(seed) for seed in seeds])[1]


BARS = "bars and bands: 95 % interval of the difference from the mean of all rows, paired by seed"


def dots(record):
    """A row of panels a checkpoint, a panel a metric: a dot and a bar for each label; dotted: real images."""
    results = record["checkpoints"]
    metrics = next(iter(results.values()))["metrics"]
    height = max(1.6, 0.22 * max(len(r["rows"]) for r in results.values()) + 0.7)
    figure, axes = canvas(len(results), len(metrics), 1.9, height)
    for line, (name, result) in zip(axes, results.items()):
        labels = list(result["rows"])
        for ax, metric in zip(line, metrics):
            for i, label in enumerate(labels):
                mean, half = around(result, label, metric)
                ax.errorbar(mean, -i, xerr=None if math.isinf(half) else half, fmt="o", ms=4, lw=1.2,
                            capsize=2, color=colour(label))
            if metric in result["real"]:
                ax.axvline(estimate(result["real"][metric])[0], ls=":", lw=0.9, color="black")
            names = labels if ax is line[0] else [""] * len(labels)
            ax.set_yticks([-i for i in range(len(labels))], names, fontsize=7)
            ax.set_title(heading(metric), fontsize=8)
            ax.grid(axis="x", lw=0.3)
        line[0].set_ylabel(name, fontsize=9)
    return figure


CURVES = ("#D55E00", "#7B3294", "#0072B2")


def band(ax, x, means, halves, style, color, label):
    """A line of means with its 95 % band, unless that is unknown."""
    ax.plot(x, means, style, ms=3, lw=1.4, color=color, label=label)
    if not any(map(math.isinf, halves)):
        low, high = ([m + sign * h for m, h in zip(means, halves)] for sign in (-1, 1))
        ax.fill_between(x, low, high, color=color, alpha=0.2, lw=0)


def series(record, curves, xlabel, logx=False):
    """Lines with bands over a parameter, and levels.

    `curves(result)` -> ({name: [(x, label of the row)]}, {name of a level: label of the row}).
    """
    results = record["checkpoints"]
    metrics = next(iter(results.values()))["metrics"]
    figure, axes = canvas(len(results), len(metrics), 2.3, 2.3)
    for line, (name, result) in zip(axes, results.items()):
        lines, levels = curves(result)
        for ax, metric in zip(line, metrics):
            for i, (curve, points) in enumerate(lines.items()):
                xs, labels = zip(*points)
                values = [around(result, label, metric) for label in labels]
                band(ax, xs, *zip(*values), "o-", CURVES[i % 3], curve)
            colours = ("#7f7f7f", *CURVES)  # the first level is no guidance, the others go with the curves
            for i, (level, label) in enumerate(levels.items()):
                ax.axhline(around(result, label, metric)[0], ls=("--", ":", "-.")[i % 3], lw=1,
                           color=colours[i], label=level)
            ax.set_title(heading(metric), fontsize=8)
            ax.set_xlabel(xlabel, fontsize=8)
            if logx:
                ax.set_xscale("log")
        line[0].set_ylabel(name, fontsize=9)
    figure.legend(*axes[0, -1].get_legend_handles_labels(), fontsize=7, frameon=False, loc="outside right")
    return figure


def pareto_front(points):
    """Those of (x, y, ...) that no other exceeds in both coordinates, by x."""
    front = [p for p in points if not any(q[0] >= p[0] and q[1] >= p[1] and q[:2] != p[:2] for q in points)]
    return sorted(front)


def figure2(record):
    pairs = [("density", "coverage"), ("density", "prompt"), ("coverage", "prompt")]
    figure, axes = canvas(len(record["checkpoints"]), 3, 3.2, 2.8)
    for line, (name, result) in zip(axes, record["checkpoints"].items()):
        weights = sorted({row["parameters"]["w"] for row in result["rows"].values()})
        for ax, (mx, my) in zip(line, pairs):
            points, named = [], set()
            for label, row in result["rows"].items():
                (x, hx), (y, hy) = around(result, label, mx), around(result, label, my)
                points.append((x, y))
                own, w = row["method"] == "apg", row["parameters"]["w"]
                c = ("#56B4E9", "#009E73", "#E69F00", "#D55E00")[weights.index(w) % 4]
                short = f"{'APG' if own else 'ERG + APG'}, w = {w:g}"
                bars = {} if math.isinf(hx) else dict(xerr=hx, yerr=hy)
                look = dict(fmt="X", ms=8, mec="black") if own else dict(fmt="o", ms=5, mec=c)
                ax.errorbar(x, y, **bars, **look, lw=0.5, color=c, label=None if short in named else short)
                named.add(short)
            front = pareto_front(points)
            ax.plot([p[0] for p in front], [p[1] for p in front], "--", lw=1, color="black")
            ax.set_xlabel(mx, fontsize=8)
            ax.set_ylabel((f"{name}: " if ax is line[0] else "") + TITLES.get(my, my), fontsize=8)
    figure.legend(*axes[0, -1].get_legend_handles_labels(), fontsize=7, frameon=False, loc="outside right")
    return figure


def figure4(record):
    def curves(result):
        lines, levels = {}, {"no guidance (tau_c = 1)": "no guidance"}
        for label, row in result["rows"].items():
            w = row["parameters"].get("w")
            if label.startswith("C-ERG"):
                lines.setdefault(f"C-ERG, w = {w:g}", []).append((row["parameters"]["tau_c"], label))
            elif label.startswith("CFG"):
                levels[label] = label
        return {name: sorted([*points, (1.0, "no guidance")]) for name, points in lines.items()}, levels
    return series(record, curves, "tau_c", logx=True)


def figure9(record):
    def curves(result):
        points = [(float(label.split("=")[1]), label) for label in result["rows"] if "=" in label]
        return {"ERG": points}, {"no guidance": "no guidance"}
    return series(record, curves, "kappa (1: C-ERG alone)")


def figure8(record):
    """Maps of the gain over no guidance, by first and last layer; a dot where the interval excludes 0."""
    results = record["checkpoints"]
    metrics = next(iter(results.values()))["metrics"]
    figure, axes = canvas(len(results), len(metrics), 2.3, 2.2)
    for line, (name, result) in zip(axes, results.items()):
        n, plain = result["depth"], result["rows"]["no guidance"]["values"]
        for ax, metric in zip(line, metrics):
            grid = [[math.nan] * n for _ in range(n)]
            for label, row in result["rows"].items():
                if ":" in label:
                    start, end = map(int, label.split(":"))
                    mean, half = difference(row["values"][metric], plain[metric])
                    grid[end - 1][start] = mean if BETTER[metric] == "higher" else -mean
                    if judge(mean, half) != "undecided":
                        ax.plot(start, end - 1, ".", ms=2.5, color="black")
            limit = max(abs(v) for row in grid for v in row if not math.isnan(v)) or 1
            image = ax.imshow(grid, cmap="RdBu", vmin=-limit, vmax=limit, origin="lower")
            figure.colorbar(image, ax=ax, shrink=0.7).ax.tick_params(labelsize=6)
            ax.set_title(f"{TITLES.get(metric, metric)}: gain", fontsize=8)
            ax.set_xlabel("first layer", fontsize=7)
            ax.set_ylabel((f"{name}: " if ax is line[0] else "") + "last layer", fontsize=7)
    return figure


def suggest(record):
    """The evidence: early and late effect of each range; certainty; the parts of CFG's difference."""
    results = record["checkpoints"]
    figure, axes = canvas(len(results), 3, 3.4, 2.7)
    for line, (name, result) in zip(axes, results.items()):
        evidence, ranks = result["evidence"], result["ranks"]
        labels = [label for label in evidence["effects"] if label in ranks]
        early, late = zip(*(evidence["effects"][label] for label in labels))
        points = line[0].scatter(early, late, s=22, cmap="viridis_r", c=[ranks[label] for label in labels])
        figure.colorbar(points, ax=line[0]).set_label("mean rank (low is good)", fontsize=7)
        for label in {evidence["fading"], *sorted(labels, key=ranks.get)[:2]}:
            line[0].annotate(label, evidence["effects"][label], fontsize=7, xytext=(3, 3),
                             textcoords="offset points")
        sizes = [v for pair in evidence["effects"].values() for v in pair]
        line[0].plot([min(sizes), max(sizes)], [min(sizes), max(sizes)], ":", lw=0.8, color="black")
        line[0].set(xscale="log", yscale="log")
        line[0].set_xlabel("effect at t = 0.3", fontsize=8)
        line[0].set_ylabel(f"{name}: effect at t = 0.9", fontsize=8)
        line[0].set_title("below the line: fading ranges", fontsize=8)
        line[1].bar(range(len(evidence["certain"])), evidence["certain"], color="#56B4E9")
        line[1].set_xlabel("layer", fontsize=8)
        line[1].set_title("share of certain rows, t = 0.3", fontsize=8)
        for part, style in (("parallel", "-"), ("orthogonal", "--")):
            line[2].plot(evidence["t"], evidence[part], style, color=colour("CFG"), label=part)
        if evidence["kappa"] is not None:
            line[2].axvline(evidence["kappa"], lw=0.8, color="black")
        line[2].set_title("CFG's difference; line: B.2's kappa", fontsize=8)
        line[2].set_xlabel("t (0 = noise)", fontsize=8)
        line[2].legend(fontsize=7, frameon=False)
    return figure


FIGURES = dict(suggest=suggest, figure2=figure2, figure4=figure4, figure8=figure8, figure9=figure9)


def draw(name, record):
    """The figure of an entry whose result has rows."""
    figure = FIGURES.get(name, dots)(record)
    figure.suptitle(record["title"] + ("" if name in ("suggest", "figure8") else f" ({BARS})"), fontsize=9)
    return figure


