"""Pictures, loss curves and tables; a method has the same colour everywhere.

    draw_grid({"CFG": x, "ERG": y}, captions, "out/digits.png", "the same captions and seeds")
    line = axes.plot(xs, ys, color=colour("ERG, w = 2"))       # a label that starts with a method's
"""
import matplotlib
import torch
from matplotlib.figure import Figure

from toy.files import write_whole
from toy.metrics import evaluate
from toy.sampling import METHODS, generate, prepare

COLOURS = {"real images": "#000000"} | {method.label: method.colour for method in METHODS.values()}


def colour(label):
    """A label's colour: that of the longest name that it starts with; settings of ERG have ERG's."""
    colours = COLOURS | {method.label: method.colour for method in METHODS.values() if method.label}
    named = [name for name in colours if label.startswith(name)]
    return colours[max(named, key=len, default="ERG")]


def draw_grid(rows, columns, path, title):
    """A labelled picture: `rows` maps a label to images (n, C, S, S), `columns` holds n captions."""
    n = len(columns)
    figure = Figure(figsize=(1.05 * n + 1.2, 1.05 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots(len(rows), n, squeeze=False)
    for r, (label, images) in enumerate(rows.items()):
        for c in range(n):
            picture = ((images[c] + 1) / 2).clamp(0, 1).permute(1, 2, 0)  # (S, S, C)
            axes[r, c].imshow(picture.numpy(), interpolation="nearest")
            axes[r, c].set(xticks=[], yticks=[])
            axes[r, c].spines[:].set_visible(False)
            if r == 0:
                caption = columns[c].replace(" on ", "\non ").replace(" of a ", "\nof a ")
                axes[r, c].set_title(caption, fontsize=7)
        axes[r, 0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10)
    figure.suptitle(title, fontsize=9)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=130))


def draw_loss(curve, path, name, log_every=10):
    """The loss curve (steps / log_every, bins), a line a bin of t."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    bins, window = curve.shape[1], max(1, len(curve) // 60)
    for b in range(bins):
        smooth = curve[:len(curve) // window * window, b].unflatten(0, (-1, window)).nanmean(dim=1)
        axes.plot(torch.arange(1, len(smooth) + 1) * window * log_every, smooth, lw=1.3,
                  color=matplotlib.colormaps["viridis"](b / bins),
                  label=f"{b / bins:.2f} to {(b + 1) / bins:.2f}")
    axes.set(xlabel="step", ylabel="squared velocity error", yscale="log",
             title=f"{name}: loss by time t (0 = noise)")
    axes.legend(title="t", fontsize=7, title_fontsize=8, ncols=2)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=130))


def print_table(rows):
    names = list(next(iter(rows.values())))
    print(f"{'':>12}" + "".join(f"{name:>11}" for name in names))
    for method, row in rows.items():
        print(f"{method:>12}" + "".join(f"{row[name]:>11.3f}" for name in names))


def compare(model, classifier, reference, held_out, methods, path, *, samples, steps, seed, title):
    """Sample with each method from the same captions and seeds; draw, print and return what comes out.

    `methods` maps a name in METHODS to its parameters; `held_out` is a test split (data.Images).
    """
    prepared = {METHODS[name].label: prepare(name, **parameters) for name, parameters in methods.items()}
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(held_out), generator=generator)[:samples]
    real, captions, attributes = held_out.batch(rows, generator)
    table, pictures = {"held out": evaluate(real, attributes, classifier, reference)}, {"real": real}
    for label, method in prepared.items():
        pictures[label] = generate(model, captions, method, steps, seed)
        table[label] = evaluate(pictures[label], attributes, classifier, reference)
    draw_grid({label: x[:10] for label, x in pictures.items()}, captions[:10], path,
              f"{held_out.name}: the same captions and seeds, {steps} steps ({title})")
    print_table(table)
    print(f"{len(real)} images a row against {len(reference)} real ones, {steps} steps")
    return table
