"""What the notebooks' figures share: one look, labels at the lines, pictures, sliders or a grid.

Colours are those of toy/drawing.py. Labels stand at what they name, so that a figure is readable in grey,
too.
"""
import os

import matplotlib.pyplot as plt
import torch

from toy.drawing import COLOURS

COLOURS = COLOURS | {"AutoGuidance": "#3B3B6D"}  # the toy does not have it
QUICK = bool(os.environ.get("ERG_QUICK"))  # fewer samples and steps, for a test that the notebook runs

__all__ = ["COLOURS", "QUICK", "explore", "label", "pictures", "style"]


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


def sliders_work():
    """Whether ipywidgets and a notebook's kernel are there; ERG_GRID=1 says no, for pages."""
    if os.environ.get("ERG_GRID"):
        return False
    try:
        import ipywidgets  # noqa: F401
        from IPython import get_ipython
    except ImportError:
        return False
    return getattr(get_ipython(), "kernel", None) is not None


def explore(draw, size=1.9, **choices):
    """Call draw(ax, **values) for values of `choices` (lists): by sliders where they work, else in a grid.

    The grid has a row for each value of the first choice, a column for each of the second; others stay in
    their middle. Returns the figure of the grid, or the sliders.
    """
    middle = {name: values[len(values) // 2] for name, values in choices.items()}
    if sliders_work():
        from IPython.display import display
        from ipywidgets import SelectionSlider, interactive

        def show(**values):
            draw(plt.subplots(figsize=(5, 5))[1], **values)
            plt.show()

        slider = lambda name: SelectionSlider(options=choices[name], value=middle[name], description=name,
                                              continuous_update=False)
        sliders = interactive(show, **{name: slider(name) for name in choices})
        display(sliders)
        return sliders
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
    return figure
