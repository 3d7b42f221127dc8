"""Markdown and figures from the results of entries.py: everything here is drawn from plain numbers.

Colours are the same for a method everywhere, and told apart by the colour-blind (Okabe and Ito's palette).
"""
import math

from experiments.metrics import BETTER
from experiments.statistics import difference, estimate, judge, winners

COLOURS = {"real images": "#000000", "no guidance": "#7f7f7f", "CFG": "#0072B2", "CFG, interval": "#56B4E9", "APG": "#009E73",
           "CADS": "#8DA0CB", "PAG*": "#B79F00", "SAG*": "#A65628", "SEG*": "#66A61E", "AutoGuidance": "#3B3B6D",
           "C-ERG": "#E69F00", "I-ERG": "#CC79A7", "ERG": "#D55E00", "ERG + APG": "#A50F15", "ERG + CADS": "#FB6A4A"}
COLOURS.update({"C-ERG + I-ERG": COLOURS["ERG"], "temperature reduction": COLOURS["I-ERG"], "identity mapping": COLOURS["PAG*"],
                "energy smoothing": COLOURS["SEG*"]})
TITLES = {"frechet": "Frechet distance", "prompt": "prompt accuracy"}
ARROW = {"higher": "↑", "lower": "↓"}


def colour(label):
    """A label's colour: its method's, by the longest name that it starts with; settings of ERG have ERG's."""
    named = [name for name in COLOURS if label.startswith(name)]
    return COLOURS[max(named, key=len, default="ERG")]


def number(mean, half, signed=False):
    """"1.23 ± 0.45", with two digits of the half width, or the mean alone where it is unknown or next to zero."""
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
            parts.append("tau by layer")
        else:
            parts.append(f"{name} = {value:g}" if isinstance(value, (int, float)) else f"{name} = {value}")
    return ", ".join(parts)


# ------------------------------------------------------------------------------------------------
# Markdown
# ------------------------------------------------------------------------------------------------


def table(result):
    """A table of means and intervals over seeds, or of differences from the baseline, in Markdown."""
    metrics, rows, baseline = result["metrics"], result["rows"], result.get("baseline")
    extra = [m for m in ("saturation", "nfe") if all(m in row["values"] for row in rows.values())]
    lines = ["| | " + " | ".join(f"{TITLES.get(m, m)} {ARROW[BETTER[m]]}" for m in metrics)
             + "".join(f" | {m}" for m in extra) + " | settings |",
             "|---" * (len(metrics) + len(extra) + 2) + "|"]
    if "real" in result:
        cells = [number(*estimate(result["real"][m])) if m in result["real"] else "" for m in [*metrics, *extra]]
        lines.append("| *real images* | " + " | ".join(cells) + " | |")
    best = {m: set() if baseline else winners({label: row["values"][m] for label, row in rows.items()}, BETTER[m]) for m in metrics}
    for label, row in rows.items():
        cells = []
        for m in [*metrics, *extra]:
            values = row["values"][m]
            if m == "nfe":
                cells.append(f"{estimate(values)[0]:.2f}")
            elif baseline and label != baseline:
                change = difference(values, rows[baseline]["values"][m])
                text = number(*change, signed=True)
                cells.append(f"**{text}**" if m in metrics and judge(*change) != "undecided" else text)
            else:
                text = number(*estimate(values))
                cells.append(f"**{text}**" if label in best.get(m, ()) else text)
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {setting_text(row['parameters'])} |")
    return "\n".join(lines)


def searched(result):
    """What was tried for each method, in one line each; a best w at the end of what was tried is marked."""
    lines = []
    for label, tried in result.get("search", {}).items():
        order = sorted(tried, key=lambda row: row["mean_rank"])
        weights = [row["parameters"]["w"] for row in tried]
        edge = order[0]["parameters"]["w"] in (min(weights), max(weights)) and len(set(weights)) > 1
        lines.append(f"- {label}{' (best w at the edge of its grid)' if edge else ''}: "
                     + "; ".join(f"{setting_text(row['parameters'])} (mean rank {row['mean_rank']:.1f})" for row in order))
    return "\n".join(lines)


def placed(result):
    """The table of where suggested layers and kappa stand in the whole grid."""
    lines = ["| rule | suggests | position in the grid | its mean rank | best of the grid | its mean rank | median mean rank |", "|---" * 7 + "|"]
    for rule, p in result["placed"].items():
        own = f"{p['position']} of {p['of']} | {number(*estimate(p['rank']))}" if "position" in p else "- | -"
        lines.append(f"| {rule} | {p['label'] or 'nothing'} | {own} | {p['best']} | {number(*estimate(p['best_rank']))} | {p['median_rank']:.1f} |")
    at = result["evidence"]["kappa"]
    lines += ["", "Rank correlation (Spearman) with the mean rank over all ranges: "
              + ", ".join(f"{what} {rho:+.2f}" for what, rho in result["correlations"].items()) + "."]
    return "\n".join([*lines, "", "CFG's parallel difference is below a tenth of its peak " + ("never" if at is None else f"from t = {at:.2f} on")
                      + "; the suggestion for kappa is the nearest of the grid. Mean ranks are over the six metrics, ± half the 95 % interval over "
                      "seeds; the grid of ranges is figure 8's, that of kappa figure 9's."])


RUNS_TEXT = """{steps} Euler steps; {seeds} seeds of {images} images each; mean ± half the 95 % interval over seeds (Student's t). {bold}
Frechet distances of so few images are biased upwards, less for samples with less diversity; coverage, with far fewer
images than the {reference} real ones, is close to a function of density; recall is near its ceiling. The row of real
images is what a perfect model would get."""
BOLD = "Bold: better than every other row beyond the 95 % interval of the difference, paired by seed."
BOLD_DIFFERENCES = "Rows are differences from {baseline}, paired by seed; bold where the interval excludes 0."
REFERENCE = {"digits": "1,437"}


def markdown(name, record, text):
    """The page of one entry: what it is, how it was made, and a section for each checkpoint."""
    scale, text = record["scale"], " ".join(text.split())
    lines = [f"# {record['title']}", "", text, "", f"![{name}]({name}.png)", "",
             f"`{record['command']}` · {record['minutes']:.1f} minutes of sampling, summed over processes · "
             f"{record['hardware']} · torch {record['torch']}", ""]
    for checkpoint, result in record["checkpoints"].items():
        lines += [f"## {checkpoint}", ""]
        if "rows" in result:
            baseline = result.get("baseline")
            lines += [RUNS_TEXT.format(steps=scale["steps"], seeds=len(scale["seeds"]), images=result["images"],
                                       reference=REFERENCE.get(checkpoint.removesuffix("-early"), "5,000"),
                                       bold=BOLD_DIFFERENCES.format(baseline=baseline) if baseline else BOLD), "", table(result), ""]
        if result.get("search"):
            seeds = ", ".join(map(str, scale["search_seeds"]))
            lines += [f"Each method could try {scale['budget']} settings, and is shown with the one of the best mean rank (App. A.1) on another "
                      f"seed ({seeds}). The recipe's layers, which PAG*, SEG* and ERG may all use, and ERG's tau and kappa come from an earlier "
                      "scan by hand, which is a head start for these methods.", "",
                      "<details><summary>All settings that were tried, best mean rank first</summary>", "", searched(result), "", "</details>", ""]
        if "changes" in result:
            lines += ["What the negative's encoding is, against the caption's own (24 prompts; norms relative to the caption's):", "",
                      "| tau_c | change of the encoding | change of the first velocity |", "|---|---|---|",
                      *(f"| {label} | {a:.3f} | {b:.3f} |" for label, (a, b) in result["changes"].items()), "",
                      "Entropy of the encoder's attention over its largest possible value, by layer: "
                      + ", ".join(f"{e:.2f}" for e in result["certain"]) + ".", ""]
        if "placed" in result:
            lines += [placed(result), ""]
        if "summary" in result:
            lines += [result["summary"], ""]
    return "\n".join(lines).rstrip() + "\n"


# ------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------


def canvas(rows, columns, width, height):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=7)
    return figure, axes


def around(result, label, metric):
    """Mean of a row, and half the 95 % interval of its difference from the mean of all rows, paired by seed.

    So bars that do not meet tell rows apart, which the intervals of the rows themselves, full of what seeds share, would hide.
    """
    values = result["rows"][label]["values"][metric]
    seeds = zip(*(row["values"][metric] for row in result["rows"].values()))
    return sum(values) / len(values), difference(values, [sum(seed) / len(seed) for seed in seeds])[1]


BARS = "bars and bands: 95 % interval of the difference from the mean of all rows, paired by seed"


def dots(record):
    """A row of panels for each checkpoint, a panel a metric: a dot and a bar for each label; dotted: real images."""
    results = record["checkpoints"]
    metrics = next(iter(results.values()))["metrics"]
    height = max(1.6, 0.22 * max(len(r["rows"]) for r in results.values()) + 0.7)
    figure, axes = canvas(len(results), len(metrics), 1.9, height)
    for line, (name, result) in zip(axes, results.items()):
        labels = list(result["rows"])
        for ax, metric in zip(line, metrics):
            for i, label in enumerate(labels):
                mean, half = around(result, label, metric)
                ax.errorbar(mean, -i, xerr=None if math.isinf(half) else half, fmt="o", ms=4, lw=1.2, capsize=2, color=colour(label))
            if metric in result["real"]:
                ax.axvline(estimate(result["real"][metric])[0], ls=":", lw=0.9, color="black")
            ax.set_yticks([-i for i in range(len(labels))], labels if ax is line[0] else [""] * len(labels), fontsize=7)
            ax.set_title(f"{TITLES.get(metric, metric)} {ARROW[BETTER[metric]]}", fontsize=8)
            ax.grid(axis="x", lw=0.3)
        line[0].set_ylabel(name, fontsize=9)
    return figure


CURVES = ("#D55E00", "#7B3294", "#0072B2")


def series(record, curves, xlabel, logx=False):
    """Lines with bands over a parameter. `curves(result)` -> ({name: [(x, label of the row)]}, {name: label of a level})."""
    results = record["checkpoints"]
    metrics = next(iter(results.values()))["metrics"]
    figure, axes = canvas(len(results), len(metrics), 2.3, 2.3)
    for line, (name, result) in zip(axes, results.items()):
        lines, levels = curves(result)
        for ax, metric in zip(line, metrics):
            value = lambda label: around(result, label, metric)
            for i, (curve, points) in enumerate(lines.items()):
                xs, (means, halves) = [x for x, _ in points], zip(*(value(label) for _, label in points))
                c = CURVES[i % 3]
                ax.plot(xs, means, "o-", ms=3, lw=1.3, color=c, label=curve)
                if not any(map(math.isinf, halves)):
                    ax.fill_between(xs, [m - h for m, h in zip(means, halves)], [m + h for m, h in zip(means, halves)], color=c, alpha=0.15, lw=0)
            for i, (level, label) in enumerate(levels.items()):  # the first is no guidance, the others go with the curves
                ax.axhline(value(label)[0], ls=("--", ":", "-.")[i % 3], lw=1, color="#7f7f7f" if i == 0 else CURVES[i - 1], label=level)
            ax.set_title(f"{TITLES.get(metric, metric)} {ARROW[BETTER[metric]]}", fontsize=8)
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
                known = not math.isinf(hx)
                ax.errorbar(x, y, xerr=hx if known else None, yerr=hy if known else None, fmt="X" if own else "o", ms=8 if own else 5,
                            lw=0.5, color=c, mec="black" if own else c, label=None if short in named else short)
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
        return {"ERG": [(float(label.split("=")[1]), label) for label in result["rows"] if "=" in label]}, {"no guidance": "no guidance"}
    return series(record, curves, "kappa (1: C-ERG alone)")


def figure8(record):
    """Maps over the first and last layer of the range, as gains over no guidance; a dot where the interval excludes 0."""
    results = record["checkpoints"]
    metrics = next(iter(results.values()))["metrics"]
    figure, axes = canvas(len(results), len(metrics), 2.3, 2.2)
    for line, (name, result) in zip(axes, results.items()):
        n = result["depth"]
        for ax, metric in zip(line, metrics):
            grid = [[math.nan] * n for _ in range(n)]
            for label, row in result["rows"].items():
                if ":" in label:
                    start, end = map(int, label.split(":"))
                    mean, half = difference(row["values"][metric], result["rows"]["no guidance"]["values"][metric])
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
    """The evidence: early and late effect of each range, coloured by its mean rank; certainty; the parts of CFG's difference."""
    results = record["checkpoints"]
    figure, axes = canvas(len(results), 3, 3.4, 2.7)
    for line, (name, result) in zip(axes, results.items()):
        evidence, ranks = result["evidence"], result["ranks"]
        labels = [label for label in evidence["effects"] if label in ranks]
        points = line[0].scatter(*zip(*(evidence["effects"][label] for label in labels)), c=[ranks[label] for label in labels], cmap="viridis_r", s=22)
        figure.colorbar(points, ax=line[0]).set_label("mean rank (low is good)", fontsize=7)
        for label in {evidence["fading"], *sorted(labels, key=ranks.get)[:2]}:
            line[0].annotate(label, evidence["effects"][label], fontsize=7, xytext=(3, 3), textcoords="offset points")
        end = max(v for pair in evidence["effects"].values() for v in pair)
        low = min(v for pair in evidence["effects"].values() for v in pair)
        line[0].plot([low, end], [low, end], ":", lw=0.8, color="black")
        line[0].set(xscale="log", yscale="log")
        line[0].set_xlabel("effect at t = 0.3", fontsize=8)
        line[0].set_ylabel(f"{name}: effect at t = 0.9", fontsize=8)
        line[0].set_title("below the line: fading ranges", fontsize=8)
        line[1].bar(range(len(evidence["certain"])), evidence["certain"], color="#56B4E9")
        line[1].set_xlabel("layer", fontsize=8)
        line[1].set_title("share of certain rows, t = 0.3", fontsize=8)
        for part, style in (("parallel", "-"), ("orthogonal", "--")):
            line[2].plot(evidence["t"], evidence[part], style, color=COLOURS["CFG"], label=part)
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


