"""The figures of the paper that look inside the model or at its pictures: 5, 6, 7, 15 and 16. Seconds each.

An entry is a function of a Scale, a checkpoint's name and a device. It returns plain numbers, and what is drawn.
"""
import time

import torch

import erg
from experiments import diagnostics, entries, report, runs
from experiments.statistics import estimate
from tiny_dit import sample


def row(label, values, digits=4):
    mean, half = estimate(values)
    return f"| {label} | {mean:.{digits}f} | " + ("" if len(values) == 1 else f"± {half:.{digits}f}") + " |"


# ------------------------------------------------------------------------------------------------
# Figures 5, 6 and 7
# ------------------------------------------------------------------------------------------------


def figure5(scale, name, device):
    """Variances of the first velocity over 20 noises and prompts (eqs. 13 and 14), for the null prompt and for C-ERG's
    weak encoding: each point of the histograms is a pixel and channel."""
    means, pixels = {}, {}
    for seed in scale.seeds:
        model, noise, prompts, condition, null = runs.small_batch(name, 20, seed, device)
        weak = erg.encode(model.encode, prompts, tau=entries.recipe(name).tau_c)[1]
        for kind, v in diagnostics.velocity_variances(model, noise, condition, null, weak).items():
            means.setdefault(kind, []).append(v.mean().item())
            pixels.setdefault(kind, []).extend(v.flatten().tolist() if seed == scale.seeds[0] else [])
    lines = ["Mean over pixels, over seeds (20 noises and prompts each):", "", "| variance | mean | 95 % |", "|---|---|---|",
             *(row(kind, values) for kind, values in means.items())]
    return dict(values=means, summary="\n".join(lines)), pixels


def draw5(figure, axes, drawn):
    colours = {"null": report.COLOURS["CFG"], "weak": report.COLOURS["C-ERG"]}
    for line, (name, pixels) in zip(axes, drawn.items()):
        for ax, kind in zip(line, ("marginal", "conditional")):
            for which, label in (("null", "null prompt (CFG)"), ("weak", "weak encoding (C-ERG)")):
                ax.hist(pixels[f"{kind} {which}"], bins=30, alpha=0.6, color=colours[which], label=label)
            ax.set_title(f"{name}: {kind} variance", fontsize=8)
        line[0].legend(fontsize=7, frameon=False)
        line[0].set_ylabel("pixels", fontsize=8)


def figure6(scale, name, device):
    """Parts of the difference v_pos - v_neg parallel and orthogonal to v_pos along the sampling path, for CFG and for
    I-ERG under the same prompt (kappa = 0, so that all of it is seen). Root mean square over pixels and samples."""
    n, steps, curves = min(32, scale.sweep[entries.dataset(name)]), 25, {}
    for seed in scale.seeds:
        model, noise, _, condition, null = runs.small_batch(name, n, seed, device)
        r = entries.recipe(name)
        settings = {"CFG": (erg.ERG(w=r.w), null),
                    "I-ERG": (erg.ERG(w=r.w, tau=r.tau_i, layers=range(*r.layers), kappa=0.0, negative="same",
                                      queries=slice(0, model.side**2)), None)}
        for method, (chosen, negative) in settings.items():
            t, parallel, orthogonal = diagnostics.difference_norms(model, noise, condition, chosen, negative, steps)
            for part, values in (("parallel", parallel), ("orthogonal", orthogonal)):
                curves.setdefault(f"{method} {part}", []).append(values.tolist())
    at = lambda kind, a, b: [sum(c[int(a * steps):int(b * steps)]) / (int(b * steps) - int(a * steps)) for c in curves[kind]]
    lines = ["| part | early, 0.04 <= t < 0.2 | middle, 0.4 <= t < 0.6 | late, 0.8 <= t < 1 |", "|---|---|---|---|"]
    spans = ((0.04, 0.2), (0.4, 0.6), (0.8, 1.0))
    lines += [f"| {kind} | " + " | ".join(report.number(*estimate(at(kind, *span))) for span in spans) + " |" for kind in curves]
    return dict(t=t.tolist(), values=curves, parts={kind: [at(kind, *span) for span in spans] for kind in curves},
                summary="\n".join(lines)), dict(t=t.tolist(), curves=curves)


def band(ax, x, seeds, style, color, label):
    """A line of means over seeds, with its 95 % band."""
    means, halves = zip(*(estimate(values) for values in zip(*seeds)))
    ax.plot(x, means, style, ms=3, lw=1.4, color=color, label=label)
    if len(seeds) > 1:
        ax.fill_between(x, [m - h for m, h in zip(means, halves)], [m + h for m, h in zip(means, halves)], color=color, alpha=0.2, lw=0)


def draw6(figure, axes, drawn):
    for line, (name, result) in zip(axes, drawn.items()):
        for ax, part in zip(line, ("parallel", "orthogonal")):
            for method, style in (("CFG", "-"), ("I-ERG", "--")):
                band(ax, result["t"], result["curves"][f"{method} {part}"], style, report.COLOURS[method], method)
            ax.set_title(f"{name}: {part} part", fontsize=8)
            ax.set_xlabel("t (0 = noise)", fontsize=8)
            ax.set_ylim(0)
        line[0].legend(fontsize=7, frameon=False)


def figure7(scale, name, device):
    """Share of attention rows whose largest probability exceeds 0.95, and the entropy of rows over its largest possible
    value, for each layer, on the unguided path."""
    n, times, steps, values = min(32, scale.sweep[entries.dataset(name)]), (0.1, 0.3, 0.6), 20, {}
    for seed in scale.seeds:
        model, noise, _, condition, _ = runs.small_batch(name, n, seed, device)
        path = sample(model, noise, condition, steps, trajectory=True)
        for t in times:
            layers = diagnostics.attention_certainty(model, path[round(t * steps)], torch.full((n,), t, device=device), condition)
            for kind in ("certain", "relative_entropy"):
                values.setdefault(f"{kind} at t = {t:g}", []).append([getattr(layer, kind) for layer in layers])
    at = {kind: [estimate(v) for v in zip(*seeds)] for kind, seeds in values.items()}
    depth = len(at["certain at t = 0.3"])
    lines = ["| layer | " + " | ".join(map(str, range(depth))) + " |", "|---" * (depth + 1) + "|",
             *(f"| {title} | " + " | ".join(report.number(*v) for v in at[f"{kind} at t = 0.3"]) + " |"
               for kind, title in (("certain", "share above 0.95"), ("relative_entropy", "relative entropy"))), "", "At t = 0.3, mean ± half the 95 % interval over seeds."]
    return dict(values=values, summary="\n".join(lines)), values


def draw7(figure, axes, drawn):
    for line, (name, values) in zip(axes, drawn.items()):
        for ax, kind, title in zip(line, ("certain", "relative_entropy"), ("share of rows above 0.95", "entropy / log(tokens)")):
            for t, c in ((0.1, "#56B4E9"), (0.3, "#D55E00"), (0.6, "#3B3B6D")):
                seeds = values[f"{kind} at t = {t:g}"]
                band(ax, range(len(seeds[0])), seeds, "o-", c, f"t = {t:g}")
            ax.set_title(f"{name}: {title}", fontsize=8)
            ax.set_xlabel("layer", fontsize=8)
            ax.set_ylim(0)
        line[0].legend(fontsize=7, frameon=False)


# ------------------------------------------------------------------------------------------------
# Figures 15 and 16: pictures
# ------------------------------------------------------------------------------------------------


def pictures(scale, name, device, task, cells, count):
    """{label: images (count, C, S, S)} of the same seeds, and how far each is from no guidance (root mean square)."""
    images = {label: runs.sample_run(runs.Run(name, task, method, p, 0, count, 25), device)[0] for label, (method, p) in cells.items()}
    plain = runs.sample_run(runs.Run(name, task, "none", {}, 0, count, 25), device)[0]
    return images, plain, {label: (x - plain).square().mean().sqrt().item() for label, x in images.items()}


def figure15(scale, name, device):
    """Unconditional samples of the same seeds under I-ERG (w = 3), for kappa (rows) and tau_i (columns)."""
    cells = {(kappa, tau): ("erg", entries.i_erg(name, w=3.0, tau=tau, kappa=kappa, negative="same"))
             for kappa in (0.0, 0.2, 0.4, 0.6, 0.8) for tau in (0.01, 0.2, 0.5, 0.8)}
    images, plain, distance = pictures(scale, name, device, "unconditional", cells, 4)
    text = ["Root mean square distance of the pictures from those without guidance (pixels in [-1, 1]):", "",
            "| kappa | " + " | ".join(f"tau_i = {tau:g}" for tau in (0.01, 0.2, 0.5, 0.8)) + " |", "|---|---|---|---|---|"]
    text += [f"| {kappa:g} | " + " | ".join(f"{distance[kappa, tau]:.3f}" for tau in (0.01, 0.2, 0.5, 0.8)) + " |" for kappa in (0.0, 0.2, 0.4, 0.6, 0.8)]
    values = {f"kappa = {k:g}, tau_i = {t:g}": v for (k, t), v in distance.items()}
    return dict(distance=values, summary="\n".join(text)), (images, plain)


def tiled(x):
    """Images (n, C, S, S) side by side in pairs of rows: (S', S'', C) in [0, 1]."""
    half = (len(x) + 1) // 2
    rows = [torch.cat(list(part), dim=-1) for part in x.split(half)]
    return ((torch.cat(rows, dim=-2) + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy()


def show(ax, x, title=None, ylabel=None):
    ax.imshow(tiled(x), interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if title:
        ax.set_title(title, fontsize=7)
    if ylabel:
        ax.set_ylabel(ylabel, fontsize=7)


def draw15(figure, axes, drawn):
    for block, (name, (images, plain)) in enumerate(drawn.items()):
        for i, kappa in enumerate((0.8, 0.6, 0.4, 0.2, 0.0)):
            for j, tau in enumerate((0.8, 0.5, 0.2, 0.01)):
                show(axes[5 * block + i, j + 1], images[kappa, tau], f"tau_i = {tau:g}" if i == 0 else None)
            ax = axes[5 * block + i, 0]
            show(ax, plain, f"{name}: no guidance" if i == 0 else None, f"kappa = {kappa:g}")


def figure16(scale, name, device):
    """Class-conditional samples of the same seeds under I-ERG (w = 3, the same prompt) in three layers at a time."""
    n = entries.depth(name)
    cells = {f"layers {a}:{a + 3}": ("erg", entries.i_erg(name, w=3.0, layers=list(range(a, a + 3)), negative="same")) for a in range(n - 2)}
    images, plain, distance = pictures(scale, name, device, "class", cells, 12)
    spread = {label: runs.saturation(x) for label, x in {"no guidance": plain, **images}.items()}
    text = ["| layers | distance from no guidance | saturation |", "|---|---|---|", f"| no guidance | 0 | {spread['no guidance']:.3f} |"]
    text += [f"| {label} | {distance[label]:.3f} | {spread[label]:.3f} |" for label in cells]
    return dict(distance=distance, saturation=spread, summary="\n".join(text)), {"no guidance": plain, **images}


def draw16(figure, axes, drawn):
    for column, (name, images) in enumerate(drawn.items()):
        for i, (label, x) in enumerate(images.items()):
            show(axes[i, column], x, name if i == 0 else None, label)
        for ax in axes[len(images):, column]:  # another checkpoint has more layers
            ax.set_axis_off()


ENTRIES = dict(figure5=figure5, figure6=figure6, figure7=figure7, figure15=figure15, figure16=figure16)
LAYOUT = {  # drawing function, and the grid of panels for what is drawn: rows, columns, width and height of a panel
    "figure5": (draw5, lambda drawn: (len(drawn), 2, 3.2, 2.2)), "figure6": (draw6, lambda drawn: (len(drawn), 2, 3.2, 2.2)),
    "figure7": (draw7, lambda drawn: (len(drawn), 2, 3.2, 2.2)), "figure15": (draw15, lambda drawn: (5 * len(drawn), 5, 1.5, 1.6)),
    "figure16": (draw16, lambda drawn: (max(map(len, drawn.values())), len(drawn), 4.2, 1.5)),
}


def run(name, record, scale, weights, device):
    """One entry on all checkpoints: (the completed record, the figure)."""
    began, drawn = time.perf_counter(), {}
    record["checkpoints"] = {}
    for checkpoint in weights:
        record["checkpoints"][checkpoint], drawn[checkpoint] = ENTRIES[name](scale, checkpoint, device)
    record["minutes"] = (time.perf_counter() - began) / 60
    draw, layout = LAYOUT[name]
    figure, axes = report.canvas(*layout(drawn))
    draw(figure, axes, drawn)
    figure.suptitle(record["title"], fontsize=9)
    return record, figure
