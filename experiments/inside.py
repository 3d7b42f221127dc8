"""The figures of the paper that look inside the model or at its pictures: 5, 6, 7, 15 and 16. Seconds each.

An entry is a function of a Scale, a checkpoint's name and a device. It returns numbers, and what to draw.
"""
import statistics
import time

import torch

import erg
from experiments import diagnostics, entries, report, runs
from experiments.statistics import estimate
from tiny_dit import sample
from toy.metrics import saturation

# ---- Figures 5, 6 and 7 ------------------------------------------------------------------------------------


def figure5(scale, name, device):
    """Variances of the first velocity over 20 noises and prompts (eqs. 13 and 14), for the null prompt and
    for C-ERG's weak encoding: each point of the histograms is a pixel and channel."""
    means, pixels = {}, {}
    for seed in scale.seeds:
        model, noise, prompts, condition, null = runs.small_batch(name, 20, seed, device)
        weak = erg.encode(model.encode, prompts, tau=entries.recipe(name)["tau_c"])[1]
        for kind, v in diagnostics.velocity_variances(model, noise, condition, null, weak).items():
            means.setdefault(kind, []).append(v.mean().item())
            pixels.setdefault(kind, v.flatten().tolist())  # of the first seed
    lines = ["Mean over pixels, over seeds (20 noises and prompts each):", "", "| variance | mean | 95 % |",
             "|---|---|---|", *("| {} | {:.4f} | ± {:.4f} |".format(kind, *estimate(values))
                                for kind, values in means.items())]
    return dict(values=means, summary="\n".join(lines)), pixels


def draw5(axes, drawn):
    colours = {"null": report.colour("CFG"), "weak": report.colour("C-ERG")}
    for line, (name, pixels) in zip(axes, drawn.items()):
        for ax, kind in zip(line, ("marginal", "conditional")):
            for which, label in (("null", "null prompt (CFG)"), ("weak", "weak encoding (C-ERG)")):
                ax.hist(pixels[f"{kind} {which}"], bins=30, alpha=0.6, color=colours[which], label=label)
            ax.set_title(f"{name}: {kind} variance", fontsize=8)
        line[0].legend(fontsize=7, frameon=False)
        line[0].set_ylabel("pixels", fontsize=8)


SPANS = {"early": (1, 5), "middle": (10, 15), "late": (20, 25)}  # of figure 6's 25 steps


def figure6(scale, name, device):
    """Parts of the difference v_pos - v_neg parallel and orthogonal to v_pos along the sampling path, for CFG
    and for I-ERG under the same prompt (kappa = 0, so that all of it is seen). Root mean square over pixels
    and samples."""
    n, r, curves = min(32, scale.sweep[entries.dataset(name)]), entries.recipe(name), {}
    for seed in scale.seeds:
        model, noise, _, condition, null = runs.small_batch(name, n, seed, device)
        i_erg = erg.ERG(w=r["w"], tau_i=r["tau_i"], layers=r["layers"], kappa=0.0, negative="same",
                        queries=slice(0, model.side**2))
        for method, settings, negative in (("CFG", erg.ERG(w=r["w"]), null), ("I-ERG", i_erg, None)):
            t, *parts = diagnostics.difference_norms(model, noise, condition, settings, negative, steps=25)
            for part, values in zip(("parallel", "orthogonal"), parts):
                curves.setdefault(f"{method} {part}", []).append(values.tolist())
    parts = {kind: [[statistics.mean(curve[slice(*span)]) for curve in seeds] for span in SPANS.values()]
             for kind, seeds in curves.items()}
    lines = ["| part | early, 0.04 <= t < 0.2 | middle, 0.4 <= t < 0.6 | late, 0.8 <= t < 1 |",
             "|---|---|---|---|"]
    lines += [f"| {kind} | {' | '.join(report.number(*estimate(values)) for values in spans)} |"
              for kind, spans in parts.items()]
    drawn = dict(t=t.tolist(), values=curves)
    return dict(drawn, parts=parts, summary="\n".join(lines)), drawn


def band(ax, x, seeds, *look):
    report.band(ax, x, *zip(*(estimate(values) for values in zip(*seeds))), *look)


def draw6(axes, drawn):
    for line, (name, result) in zip(axes, drawn.items()):
        for ax, part in zip(line, ("parallel", "orthogonal")):
            for method, style in (("CFG", "-"), ("I-ERG", "--")):
                seeds = result["values"][f"{method} {part}"]
                band(ax, result["t"], seeds, style, report.colour(method), method)
            ax.set_title(f"{name}: {part} part", fontsize=8)
            ax.set_xlabel("t (0 = noise)", fontsize=8)
            ax.set_ylim(0)
        line[0].legend(fontsize=7, frameon=False)


KINDS = {"certain": "share of rows above 0.95", "relative_entropy": "entropy / log(tokens)"}


def figure7(scale, name, device):
    """Share of attention rows whose largest probability exceeds 0.95, and the entropy of rows over its
    largest possible value, for each layer, on the unguided path."""
    n, steps, values = min(32, scale.sweep[entries.dataset(name)]), 20, {}
    for seed in scale.seeds:
        model, noise, _, condition, _ = runs.small_batch(name, n, seed, device)
        path = sample(model, noise, condition, steps, trajectory=True)
        for t in (0.1, 0.3, 0.6):
            times = torch.full((n,), t, device=device)
            layers = diagnostics.attention_certainty(model, path[round(t * steps)], times, condition)
            for kind in KINDS:
                row = [getattr(layer, kind) for layer in layers]
                values.setdefault(f"{kind} at t = {t:g}", []).append(row)
    depth = len(layers)
    lines = ["| layer | " + " | ".join(map(str, range(depth))) + " |", "|---" * (depth + 1) + "|"]
    for kind, title in (("certain", "share above 0.95"), ("relative_entropy", "relative entropy")):
        found = [report.number(*estimate(layer)) for layer in zip(*values[f"{kind} at t = 0.3"])]
        lines.append(f"| {title} | {' | '.join(found)} |")
    lines += ["", "At t = 0.3, mean ± half the 95 % interval over seeds."]
    return dict(values=values, summary="\n".join(lines)), values


def draw7(axes, drawn):
    for line, (name, values) in zip(axes, drawn.items()):
        for ax, (kind, title) in zip(line, KINDS.items()):
            for t, c in ((0.1, "#56B4E9"), (0.3, "#D55E00"), (0.6, "#3B3B6D")):
                seeds = values[f"{kind} at t = {t:g}"]
                band(ax, range(len(seeds[0])), seeds, "o-", c, f"t = {t:g}")
            ax.set_title(f"{name}: {title}", fontsize=8)
            ax.set_xlabel("layer", fontsize=8)
            ax.set_ylim(0)
        line[0].legend(fontsize=7, frameon=False)


# ---- Figures 15 and 16: pictures ---------------------------------------------------------------------------


def pictures(name, device, task, cells, count):
    """Of the same seeds: {label: images (count, C, S, S)}, images without guidance, and {label: distance}.

    The distance from no guidance is the root mean square.
    """
    draw = lambda method, p: runs.sample_run(runs.Run(name, task, method, p, 0, count, STEPS), device)[0]
    images, plain = {label: draw(*cell) for label, cell in cells.items()}, draw("none", {})
    return images, plain, {label: (x - plain).square().mean().sqrt().item() for label, x in images.items()}


GRID_KAPPA, GRID_TAU, STEPS = (0.0, 0.2, 0.4, 0.6, 0.8), (0.01, 0.2, 0.5, 0.8), 25


def figure15(scale, name, device):
    """Unconditional samples of the same seeds under I-ERG (w = 3), for kappa (rows) and tau_i (columns)."""
    cells = {(kappa, tau_i): entries.i_erg(name, w=3.0, tau_i=tau_i, kappa=kappa, negative="same")
             for kappa in GRID_KAPPA for tau_i in GRID_TAU}
    images, plain, distance = pictures(name, device, "unconditional", cells, 4)
    text = ["Root mean square distance of the pictures from those without guidance (pixels in [-1, 1]):", "",
            f"| kappa | {' | '.join(f'tau_i = {tau_i:g}' for tau_i in GRID_TAU)} |", "|---|---|---|---|---|"]
    for kappa in GRID_KAPPA:
        text.append(f"| {kappa:g} | {' | '.join(f'{distance[kappa, tau_i]:.3f}' for tau_i in GRID_TAU)} |")
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
    ax.set_title(title or "", fontsize=7)
    ax.set_ylabel(ylabel or "", fontsize=7)


def draw15(axes, drawn):
    for block, (name, (images, plain)) in enumerate(drawn.items()):
        for i, kappa in enumerate(reversed(GRID_KAPPA)):
            for j, tau_i in enumerate(reversed(GRID_TAU)):
                show(axes[5 * block + i, j + 1], images[kappa, tau_i], None if i else f"tau_i = {tau_i:g}")
            ax = axes[5 * block + i, 0]
            show(ax, plain, f"{name}: no guidance" if i == 0 else None, f"kappa = {kappa:g}")


def figure16(scale, name, device):
    """Class-conditional samples of the same seeds under I-ERG (w = 3, the same prompt) in three layers at a
    time."""
    cells = {f"layers {a}:{a + 3}": entries.i_erg(name, w=3.0, layers=list(range(a, a + 3)), negative="same")
             for a in range(entries.depth(name) - 2)}
    images, plain, distance = pictures(name, device, "class", cells, 12)
    images = {"no guidance": plain, **images}
    spread = {label: saturation(x) for label, x in images.items()}
    text = ["| layers | distance from no guidance | saturation |", "|---|---|---|",
            f"| no guidance | 0 | {spread['no guidance']:.3f} |"]
    text += [f"| {label} | {distance[label]:.3f} | {spread[label]:.3f} |" for label in cells]
    return dict(distance=distance, saturation=spread, summary="\n".join(text)), images


def draw16(axes, drawn):
    for column, (name, images) in enumerate(drawn.items()):
        for i, (label, x) in enumerate(images.items()):
            show(axes[i, column], x, name if i == 0 else None, label)
        for ax in axes[len(images):, column]:  # another checkpoint has more layers
            ax.set_axis_off()


ENTRIES = dict(figure5=figure5, figure6=figure6, figure7=figure7, figure15=figure15, figure16=figure16)
PANELS = lambda drawn: (len(drawn), 2, 3.2, 2.2)
LAYOUT = {  # drawing function, and the grid of panels: rows, columns, width and height of a panel
    "figure5": (draw5, PANELS), "figure6": (draw6, PANELS), "figure7": (draw7, PANELS),
    "figure15": (draw15, lambda drawn: (5 * len(drawn), 5, 1.5, 1.6)),
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
    draw(axes, drawn)
    figure.suptitle(record["title"], fontsize=9)
    return record, figure
