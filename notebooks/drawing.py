"""What the notebooks' figures share: one look, labels at the lines, pictures, a grid with sliders, a GIF.

Colours are those of toy/drawing.py. Labels stand at what they name, so that a figure is readable in grey,
too.
"""
import io
import os
import sys
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, PowerNorm

import erg
from toy.drawing import COLOURS

COLOURS = COLOURS | {"AutoGuidance": "#3B3B6D"}  # the toy does not have it
QUICK = bool(os.environ.get("ERG_QUICK"))  # fewer samples and steps, for a test that the notebook runs


def style():
    """The look of all figures."""
    plt.rcParams.update({
        "figure.dpi": 110, "figure.constrained_layout.use": True, "font.size": 9, "axes.titlesize": 10,
        "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
        "axes.edgecolor": "#444444", "axes.labelcolor": "#333333", "xtick.color": "#444444",
        "ytick.color": "#444444", "lines.linewidth": 1.8, "legend.frameon": False,
        "image.interpolation": "nearest", "image.cmap": "cividis"})


def label(ax, x, y, text, color="#222222", **options):
    """Text at data coordinates, in the colour of what it names, on a white outline."""
    import matplotlib.patheffects as effects
    outline = [effects.withStroke(linewidth=2.5, foreground="white")]
    look = dict(color=color, fontweight="bold", fontsize=9, path_effects=outline, va="center")
    return ax.text(x, y, text, **{**look, **options})


def pictures(ax, images, columns=None, title=None):
    """Images (n, C, S, S) in [-1, 1] in one axes, `columns` (default: all) to a row, thin gaps between."""
    n, channels, height, width = images.shape
    columns = columns or n
    rows = -(-n // columns)
    gap = max(1, height // 14)
    sheet = torch.ones(rows * (height + gap) - gap, columns * (width + gap) - gap, 3)
    for i, image in enumerate(((images.detach().float() + 1) / 2).clamp(0, 1)):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[top:top + height, left:left + width] = image.expand(3, -1, -1).permute(1, 2, 0)
    ax.imshow(sheet.numpy(), interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if title:
        ax.set_title(title)


def in_notebook():
    """Whether a notebook's kernel runs this; a script needs no IPython."""
    shell = sys.modules.get("IPython")
    return getattr(shell and shell.get_ipython(), "kernel", None) is not None


def explore(draw, size=1.9, **choices):
    """Call draw(ax, **values) for values of `choices` (lists): in a grid, then by sliders where they work.

    The grid has a row for each value of the first choice, a column for each of the second; others stay in
    their middle, where the sliders begin. Returns the figure of the grid.
    """
    middle = {name: values[len(values) // 2] for name, values in choices.items()}
    (down, rows), *rest = choices.items()
    across, columns = rest[0] if rest else (None, [None])
    figure, axes = plt.subplots(len(rows), len(columns), squeeze=False,
                                figsize=(size * len(columns) + 0.8, size * len(rows) + 0.4))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            draw(axes[i, j], **{**middle, down: row, **({across: column} if rest else {})})
            axes[i, j].set_title(f"{across} = {column}" if rest and i == 0 else "")
            axes[i, j].set_ylabel(f"{down} = {row}" if j == 0 else "")
    plt.show()
    if in_notebook():
        sliders(draw, choices, middle)
    return figure


def sliders(draw, choices, middle):
    """Show a slider for each choice, and the drawing of their values; build.py leaves them out of pages."""
    try:
        from ipywidgets import SelectionSlider, interactive
    except ImportError:
        return
    from IPython.display import display

    def show(**values):
        draw(plt.subplots(figsize=(5, 5))[1], **values)
        plt.show()

    display(interactive(show, **{name: SelectionSlider(options=values, value=middle[name], description=name,
                                                       continuous_update=False)
                                 for name, values in choices.items()}))


def gif(figure, update, frames, colours=64):
    """Show a figure as an animated GIF, and return its bytes; it stands still at the end.

    update(i), for i of `frames`, sets a frame and returns what has moved: these artists alone are drawn anew.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    plt.close(figure)
    canvas, pages = FigureCanvasAgg(figure), []
    for artist in update(frames[0]):
        artist.set_animated(True)  # so that it is not part of the background
    canvas.draw()
    background = canvas.copy_from_bbox(figure.bbox)
    for i in frames:
        canvas.restore_region(background)
        for artist in update(i):
            artist.draw(canvas.get_renderer())
        pages.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]))
    chosen, palette = [], Image.new("P", (1, 1))
    for _, colour in sorted(pages[-1].getcolors(1 << 24), reverse=True):  # the most frequent, if new
        if all(max(abs(a - b) for a, b in zip(colour, other)) > 8 for other in chosen):
            chosen.append(colour)
    palette.putpalette([value for colour in chosen[:colours] for value in colour])
    pages = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages]
    file = io.BytesIO()
    pages[0].save(file, "GIF", save_all=True, append_images=pages[1:], loop=0, optimize=True,
                  duration=[600, *[70] * (len(pages) - 2), 3000])
    if in_notebook():
        from IPython.display import Image as Picture, display
        display(Picture(data=file.getvalue(), format="gif"))
    return file.getvalue()


# ---- Notebook 0 --------------------------------------------------------------------------------------------


def show(rows, captions=()):
    """Show rows of pictures {name: images (n, C, S, S)} under their captions."""
    figure, ax = plt.subplots(figsize=(9, 0.97 * len(rows) + 0.5), layout="constrained")
    sheet(ax, rows, captions)
    plt.show()


# ---- Notebook 1 --------------------------------------------------------------------------------------------

SHADES = plt.get_cmap("viridis")([0.1, 0.42, 0.74])
STATE = dict(color="#FF7F3F", markeredgecolor="white", markeredgewidth=0.5, zorder=4)  # states on a map
RING = dict(s=180, facecolor="none", edgecolor="#FF7F3F", linewidth=2.2, zorder=4)  # where states rest


def landscape(ax, X, arrows=0, names="ABCDEF", size=9, **energy):
    """A round map of the energy (dark is low) with the patterns X; arrows are 0.22 of a step."""
    side = torch.linspace(-4.6, 4.6, 161)
    plane = torch.cartesian_prod(side, side)  # (161 * 161, 2)
    height = erg.hopfield_energy(plane, X, **energy)
    height, top = height - height.min(), (height - height.min())[plane.norm(dim=1) < 4.6].max()
    filled = ax.contourf(side, side, height.view(161, 161).T, levels=top * torch.linspace(0, 1, 22) ** 1.6,
                         norm=PowerNorm(0.55, 0, top), cmap="viridis", extend="max")
    filled.set_clip_path(plt.Circle((0, 0), 4.6, transform=ax.transData))
    if arrows:
        xi = torch.cartesian_prod(*[torch.linspace(-4.4, 4.4, arrows)] * 2)
        xi = xi[xi.norm(dim=1) < 4.45]
        step = 0.22 * (erg.hopfield_step(xi, X, **energy) - xi)
        ax.quiver(*xi.T, *step.T, color="white", alpha=0.75, angles="xy", scale_units="xy", scale=1,
                  width=0.0032)
    ax.scatter(*X.T, s=4 * size, color="white", edgecolor="black", zorder=3)
    for name, x in zip(names, X):
        label(ax, *(1.24 * x), name, fontsize=size, ha="center")
    ax.set(xticks=[], yticks=[], aspect="equal", xlim=(-4.65, 4.65), ylim=(-4.65, 4.65))
    ax.spines[:].set_visible(False)


def over_tau(ax, ticks, **settings):
    """A logarithmic axis of tau."""
    ax.set(xscale="log", xlabel="tau", xticks=ticks, xticklabels=ticks, **settings)
    ax.minorticks_off()


def tree(ax, taus, direction, held):
    """The direction (taus, N) of the valley of each pattern over tau, coloured by what the valley holds."""
    for name, angle, colour in zip("ABCDEF", direction.T, held.T):
        points = torch.stack([taus, angle], dim=1)
        line = LineCollection(torch.stack([points[:-1], points[1:]], dim=1), array=colour[:-1].numpy(),
                              cmap="viridis_r", clim=(0.2, 6), lw=4, capstyle="round")
        ax.add_collection(line)
        label(ax, 10.8, angle[0], name, fontsize=11)
    over_tau(ax, [0.1, 1, 5], xlim=(0.05, 10), ylim=(40, 360), yticks=[90, 180, 270, 360],
             ylabel="direction of the valley (degrees)", title="The valleys merge as tau falls")
    bar = ax.figure.colorbar(line, ax=ax, label="patterns held: exp(entropy)", pad=0.04, ticks=[1, 2, 3, 6])
    bar.ax.set_ylim(1, 6)


def digit_rows(rows, mean, contrast, wrong):
    """Each row of states as 8 x 8 pictures, with frames around the columns `wrong` of the last row."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(8.8, 5.0))
    figure.get_layout_engine().set(h_pad=0.01, hspace=0.03)
    for ax, (name, states) in zip(axes, rows.items()):
        pictures(ax, 2 * (mean + contrast * states).view(-1, 1, 8, 8) - 1)
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
    for column in wrong.nonzero()[:, 0].tolist():
        frame = dict(fill=False, color="#FF7F3F", lw=2.5, clip_on=False)
        axes[-1].add_patch(plt.Rectangle((9 * column - 0.5, -0.5), 8, 8, **frame))
    axes[0].set_title("Lower half hidden (left five) or noise (right five), then ten steps; orange: the "
                      "wrong memory")


# ---- Notebook 2 --------------------------------------------------------------------------------------------

WHOLE, DETAIL = (-0.75, 1.45, -0.4, 2.15), (0.45, 1.45, 0.35, 1.35)  # boxes: a vine, and a shoot of it
INK = LinearSegmentedColormap.from_list("ink", ["#e3d0a4", "#8d93a8", "#31456f", "#00204c"])


class Paper:
    """Where the real samples of class 0 lie, and those of the other vines, as light paper to draw on."""

    def __init__(self, log_density, edge):
        self.log_density, self.edge, self.seen = log_density, edge, {}

    def densities(self, box, n=60 if QUICK else 260):
        if box not in self.seen:
            x, y = torch.linspace(*box[:2], n), torch.linspace(*box[2:], n)
            points = torch.cartesian_prod(y, x).flip(1).split(4000)
            layers = [torch.cat([self.log_density(p, condition=c)[0] for p in points]) for c in (2, 1, 0)]
            self.seen[box] = x, y, [layer.view(n, n) for layer in layers]
        return self.seen[box]

    def __call__(self, ax, box, others=("#efefef", "#e6e6e6"), own=("#efe3c8", "#e3d0a4")):
        x, y, layers = self.densities(box)
        for density, colours in zip(layers, (others, others, own)):
            ax.contourf(x, y, density, [self.edge, 0.2, 1e3], colors=colours)
        ax.set(xlim=box[:2], ylim=box[2:], xticks=[], yticks=[], aspect="equal")
        ax.spines[:].set_visible(False)


def names(ax, places):
    """Labels of methods in their colours, at places (x, y)."""
    for method, place in places.items():
        label(ax, *place, method, COLOURS[method])


def cosines(times, cos, best, sizes):
    """Cosine and best weight of each weak prediction over t; in grey, the size of the model's mistake."""
    figure, axes = plt.subplots(3, 3, figsize=(11, 5.6), sharex=True, sharey="row", height_ratios=(3, 0.2, 2))
    heights = (1.12, 0.66, -0.64), (1.12, -0.55, 0.66), (1.04, -0.62, 0.56)
    for (top, strip, bottom), (name, size), places in zip(axes.T, sizes.items(), heights):
        top.axhline(0, color="#cccccc", lw=0.8)
        bottom.axhline(1, color="#cccccc", lw=0.8)
        for method in ("CFG", "AutoGuidance", "ERG"):
            top.plot(times, cos[name[0], method], color=COLOURS[method])
            bottom.plot(times, best[name[0], method], color=COLOURS[method])
        names(top, dict(zip(("AutoGuidance", "ERG", "CFG"), zip((0.45, 0.42, 0.45), places))))
        strip.imshow(size[None].numpy(), extent=(0.1, 0.98, 0, 1), aspect="auto", cmap="Greys", vmin=0)
        strip.set_axis_off()
        top.set(title=f"model {name}", ylim=(-1, 1.2), yticks=[-1, 0, 1])
        bottom.set(ylim=(0.5, 2.6), yticks=[1, 2], xlabel="t", xticks=[0.1, 0.5, 0.9], xlim=(0.1, 0.98))
    axes[0, 0].set_ylabel("cos(mistake, weak - strong)")
    axes[2, 0].set_ylabel("best weight $w^*$")
    axes[1, 0].text(0.11, 0.5, "size of the mistake", va="center", fontsize=8, color="#444444")


def moving(paper, paths, kappa, every):
    """A GIF of the first 400 points of each method's path (steps + 1, B, 2), a frame for `every` steps."""
    figure, axes = plt.subplots(1, 4, figsize=(9, 3.1))
    figure.get_layout_engine().set(rect=(0, 0.07, 1, 0.93))
    clock, dots = figure.text(0.01, 0.02, ""), {}
    for ax, method in zip(axes, ("no guidance", "CFG", "AutoGuidance", "ERG")):
        paper(ax, WHOLE)
        ax.set_title(method, color=COLOURS[method], loc="center", fontweight="bold")
        dots[method], = ax.plot([], [], ".", ms=3.2, mew=0, color=COLOURS[method])
    steps = len(paths["ERG"]) - 1

    def update(step):
        for method, line in dots.items():
            line.set_data(*paths[method][step, :400].T)
        clock.set_text(f"t = {step / steps:.2f}" + ": ERG guides, too" * (step / steps > kappa))
        return [*dots.values(), clock]

    return gif(figure, update, range(0, steps + 1, every))


# ---- Notebook 3 --------------------------------------------------------------------------------------------


def sheet(ax, rows, captions=(), notes=()):
    """Rows of pictures: names at the left in their method's colour, captions above, notes at the right."""
    images = torch.stack(list(rows.values()))  # (rows, n, C, S, S)
    n, side = images.shape[1], images.shape[-1]
    pitch, centre = side + max(1, side // 14), side / 2 - 0.5
    pictures(ax, images.flatten(0, 1), columns=n)
    for i, name in enumerate(rows):
        method = next((m for m in ("no guidance", "CFG", "I-ERG", "C-ERG", "ERG") if name.startswith(m)),
                      "real images")
        ax.text(-0.18 * side, i * pitch + centre, name, ha="right", va="center", fontsize=10,
                color=COLOURS[method])
    for i, note in enumerate(notes):
        ax.text((n + 0.05) * pitch, i * pitch + centre, note, va="center", fontsize=9, color="#666666")
    for i, caption in enumerate(captions):
        text = textwrap.fill(caption, 9)
        ax.text(i * pitch + centre, -0.15 * side, text, ha="center", va="bottom", fontsize=8)


def heat(ax, ratio, title, rows, columns):
    """Ratios (R, C) as squares, blue below 1 and red above, on a logarithmic scale."""
    logs = ratio.log2()
    top = logs.abs().max()
    ax.imshow(logs.numpy(), cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto")
    for (i, j), value in zip(torch.cartesian_prod(*map(torch.arange, ratio.shape)).tolist(), logs.flatten()):
        ax.text(j, i, f"{ratio[i, j]:.2f}", ha="center", va="center", fontsize=8,
                color="white" if abs(value) > 0.6 * top else "#222222")
    ax.set(title=title, xticks=range(len(columns)), xticklabels=columns, yticks=range(len(rows)),
           yticklabels=rows)
    ax.spines[:].set_visible(False)


def over_w(ax, ws, curves):
    """Curves {name: (trainings, len(ws))} over w, from w = 1, no guidance: means bold, trainings thin."""
    for name, values in curves.items():
        colour = COLOURS[name.split(",")[0]]
        ax.plot(ws, values.T, color=colour, lw=0.6, alpha=0.6)
        ax.plot(ws, values.mean(0), "o-", ms=3, color=colour, lw=2.2, label=name)
    ax.axhline(values[:, 0].mean(), color=COLOURS["no guidance"], ls="--", lw=1.2)
    ax.set(xlabel="w", xlim=(0.95, 3.1), xticks=[1, 1.5, 2, 3])


# ---- Notebook 4 --------------------------------------------------------------------------------------------

FADE = LinearSegmentedColormap.from_list("fade", ["#ecc6da", COLOURS["I-ERG"], "#4a1238"])
FADE = FADE.with_extremes(under="#ececec")


def attention_rows(shown):
    """Patterns of attention {name: (pattern (S, N), its entropy)}, side by side."""
    figure, axes = plt.subplots(1, len(shown), figsize=(9.6, 1.8))
    for ax, (name, (pattern, nats)) in zip(axes, shown.items()):
        ax.imshow(pattern, norm=PowerNorm(0.6, 0, 0.35))
        ax.set(xticks=[], yticks=[], xlabel=f"{nats:.2f} nats", title=name)
        ax.spines[:].set_visible(False)
    plt.show()


def triangles(effects, framed):
    """The effects of all ranges of layers early and late, in per cent, with one range framed."""
    n = 1 + max(e.layers[-1] for e in effects)
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.5))
    for ax, when, then in zip(axes, ("early", "late"), (0.3, 0.9)):
        square = torch.full((n, n), torch.nan)
        for e in effects:
            change = square[e.layers[0], e.layers[-1]] = 100 * getattr(e, when)
            ax.text(e.layers[-1], e.layers[0], f"{change:.0f}", ha="center", va="center", size=12,
                    color="wk"[change > 35])
        ax.imshow(square, vmin=0, vmax=70)
        for colour, lw in (("white", 7), (COLOURS["ERG"], 3)):
            ax.add_patch(plt.Rectangle((framed[-1] - 0.5, framed[0] - 0.5), 1, 1, fill=False, lw=lw, ec=colour))
        ax.set(xticks=range(n), xticklabels=range(1, n + 1), yticks=range(n), xlabel="l_max", ylabel="l_min",
               title=f"{when}, t = {then}: change of the prediction in %")
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
    label(ax, -0.3, 4.5, "framed: the\nmiddle third", COLOURS["ERG"], fontsize=11)
    plt.show()


def scored_rows(rows, score, heads):
    """Rows of ten 8 x 8 digits {name: (10, 1, 8, 8)}, and beside each its three numbers under their heads."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(10, len(rows)))
    for ax, (name, images) in zip(axes, rows.items()):
        pictures(ax, images)
        label(ax, -3, 3.5, name, COLOURS[name], ha="right", fontsize=11)
        for at, text, head in zip((96, 109, 122), "{:.0%} {:.2f} {:.2f}".format(*score[name]).split(), heads):
            label(ax, at, 3.5, text, fontweight="normal", fontsize=11, ha="center")
            label(ax, at, -2, head if ax is axes[0] else "", "#666666", fontweight="normal", ha="center",
                  va="bottom")
    plt.show()


def stripes(panels, names, top, border, ticks, xlabel="", images=()):
    """Panels {title: change (rows, steps)}: a square for each, grey where nothing changed; images beside them.

    The dashed line at `border` is t = kappa; ticks are (places, names).
    """
    columns, height = 1 + bool(images), 0.55 * len(names) * len(panels) + 0.6 * (len(panels) - 1) + 0.7
    figure, axes = plt.subplots(len(panels), columns, squeeze=False, figsize=(9.6, height),
                                width_ratios=[1.7, 1][:columns])
    for line, (title, change) in enumerate(panels.items()):
        ax = axes[line, 0]
        ax.pcolormesh(change, cmap=FADE, vmin=1e-12, vmax=top, edgecolor="white", linewidth=1.5)
        ax.axvline(border, color="#222222", lw=1.2, ls=(0, (4, 3)))
        ax.set(yticks=torch.arange(len(names)) + 0.5, yticklabels=names, xticks=[], title=title)
        ax.invert_yaxis()
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        if images:
            pictures(axes[line, 1], images[line])
    ax.set_xticks(*ticks)
    ax.set_xlabel(xlabel)
    plt.show()


def silent_hook(taus, after, hook, marks):
    """How far erg.rectify and a hook before QK-norm move the prediction, over tau, with marks at some tau."""
    figure, ax = plt.subplots(figsize=(8, 4.4))
    for y, colour, beside in ((after, COLOURS["I-ERG"], 0.35), (hook, "#555555", 4)):
        ax.loglog(taus, y, color=colour, lw=3)
        for i in marks:
            ax.plot(taus[i], y[i], "o", color=colour, ms=8)
            label(ax, taus[i], y[i] * beside, f"{100 * y[i]:.2g}%", colour, ha="center", fontsize=10)
    label(ax, 0.7, 0.9, "erg.rectify, after QK-norm", COLOURS["I-ERG"], fontsize=11)
    label(ax, 3e-3, 2e-4, "hook on the query\nprojection, before it", "#555555", fontsize=11)
    ax.set(xlim=(1, 1e-4), ylim=(3e-8, 2), xlabel=r"$\tau$", ylabel="change of the prediction",
           title="QK-norm undoes the hook; what is left comes from its eps")
    plt.show()
