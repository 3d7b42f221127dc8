"""From noise to digit under no guidance, CFG and ERG: the same captions and noise, as an animated picture.

    python notebooks/animate.py                     # writes notebooks/cfg_and_erg.gif: 10 s on one CPU core
    python notebooks/animate.py --w 3 --seed 7 --out out/other.gif

Every frame is one Euler step of the shipped MNIST model and shows x_t, clipped; t = 0 is noise, t = 1 is
data. The bar shows t, and where ERG's part in the denoiser begins (kappa). Seed 3 is not typical: it was
chosen because the five, the six, the seven and the nine come out broken without guidance, while most unguided
pictures of full captions are sound. It says nothing about CFG against ERG: experiments/CLAIMS.md does.
"""
import argparse
import sys
import textwrap
import time
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from tiny_dit import sample, tokenize  # noqa: E402
from toy.data import DIGITS  # noqa: E402
from toy.sampling import METHODS, WEIGHTS, load_checkpoint, prepare, recommended  # noqa: E402

ROWS = ("none", "cfg", "erg")  # of METHODS
PAIRS = ["red {} on blue", "white {} on green", "yellow {} on black", "green {} on red", "purple {} on black"]
CAPTIONS = ["a " + PAIRS[i % len(PAIRS)].format(digit) for i, digit in enumerate(DIGITS)]  # a column each
ZOOM = 2  # of a pixel of the model; the rest in pixels of the page
GAP, LEFT, TOP, BOTTOM, RIGHT = 13, 108, 58, 58, 12
INK, PALE = "#333333", "#d0d0d0"


def font(size, bold=False):
    """A font that comes with matplotlib."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}", size)


@torch.no_grad()
def trajectories(model, w, steps, seed):
    """x_t at t = 0, 1 / steps, ..., 1 under each method: (steps + 1, rows, columns, C, S, S)."""
    config, n, paths = model.config, len(CAPTIONS), []
    shape = (n, config.channels, config.image_size, config.image_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    tokens, null = tokenize(CAPTIONS, config), tokenize([""], config).expand(n, -1)
    for name in ROWS:
        parameters = recommended(name, "mnist", w=None if name == "none" else w)
        condition, guidance = prepare(name, **parameters)(model, tokens, null, seed)
        paths.append(sample(model, noise, condition, steps, guidance, trajectory=True))
    return torch.stack(paths, dim=1)


def page(side):
    """What all frames share, and the pictures' corners: (rows, columns) of (x, y)."""
    pitch, rows, columns = side + GAP, len(ROWS), len(CAPTIONS)
    corners = [[(LEFT + c * pitch, TOP + r * pitch) for c in range(columns)] for r in range(rows)]
    size = LEFT + columns * pitch - GAP + RIGHT, TOP + rows * pitch - GAP + BOTTOM
    empty = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(empty)
    for caption, (x, y) in zip(CAPTIONS, corners[0]):
        text = textwrap.fill(caption, 9)
        draw.multiline_text((x + side / 2, y - 8), text, INK, font(9), anchor="md", align="center", spacing=3)
    for name, ((x, y), *_) in zip(ROWS, corners):
        label, colour = METHODS[name].label, METHODS[name].colour
        draw.text((x - 14, y + side / 2), label, colour, font(12, bold=True), anchor="rm")
    return empty, corners


def frame(empty, corners, images, t, kappa):
    """One frame: images (rows, columns, C, S, S) at t."""
    picture = empty.copy()
    draw = ImageDraw.Draw(picture)
    pixels = ((images + 1) / 2).clamp(0, 1).mul(255).round().byte().movedim(2, -1)  # (rows, columns, S, S, C)
    for row, line in zip(pixels, corners):
        for tile, corner in zip(row, line):
            tile = Image.fromarray(tile.numpy())
            picture.paste(tile.resize((ZOOM * tile.width, ZOOM * tile.height), Image.Resampling.NEAREST),
                          corner)
    left, right, y = LEFT, picture.width - RIGHT, picture.height - 34
    x, switch = (left + s * (right - left) for s in (t, kappa))
    bar = Image.new("RGB", (4 * picture.width, 4 * 16), "white")  # four times too large, for smooth edges
    lines = ImageDraw.Draw(bar)
    first, then = METHODS["c-erg"].colour, METHODS["erg"].colour
    parts = (left, right, PALE), (left, min(x, switch), first), (switch, x, then)
    for start, end, colour in parts:
        if end > start:
            lines.rectangle((4 * start, 27, 4 * end, 36), colour)
    lines.rectangle((4 * switch - 2, 4, 4 * switch + 2, 60), INK)
    lines.ellipse((4 * x - 24, 8, 4 * x + 24, 56), INK)
    picture.paste(bar.resize((picture.width, 16), Image.Resampling.LANCZOS), (0, y - 8))
    draw.text((left - 14, y), f"t = {t:.2f}", INK, font(11), anchor="rm")
    draw.text((left, y + 12), "noise", INK, font(10), anchor="la")
    draw.text((right, y + 12), "data", INK, font(10), anchor="ra")
    says = f"kappa = {kappa:g}: ERG now flattens attention in the denoiser, too"
    draw.text((switch, y + 12), says, INK, font(10), anchor="la")
    return picture


def write(frames, path):
    """The frames in 128 colours, a pause on the last, and quickly back to the first, so that it loops."""
    fixed = ["#ffffff", "#000000", INK, PALE, *(METHODS[name].colour for name in (*ROWS, "c-erg"))]  # 8
    colours = [value for name in fixed for value in ImageColor.getrgb(name)]
    for image, number in ((frames[-1], 64), (frames[len(frames) // 3], 56)):  # of the digits, of the noise
        colours += image.quantize(number, method=Image.Quantize.MAXCOVERAGE).getpalette()[:3 * number]
    palette = Image.new("P", (1, 1))
    palette.putpalette(colours)
    frames = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in frames]
    back = frames[-2:0:-max(1, len(frames) // 6)]
    forth = [60 + 40 * i // len(frames) for i in range(len(frames) - 2)]  # milliseconds
    durations = [400, *forth, 3000, *[60] * len(back)]
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:] + back, duration=durations, loop=0,
                   optimize=True)
    return len(durations)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS / "mnist.pt", help="of a model of MNIST")
    parser.add_argument("--w", type=float, default=2.0, help="guidance weight; 1 is off")
    parser.add_argument("--seed", type=int, default=3, help="of the noise")
    parser.add_argument("--steps", type=int, default=40, help="Euler steps, a frame each")
    parser.add_argument("--out", type=Path, default=HERE / "cfg_and_erg.gif", help="the picture to write")
    options = parser.parse_args(argv)
    began, kappa = time.time(), recommended("erg", "mnist")["kappa"]
    model, classifier, *_ = load_checkpoint(options.weights)
    images = trajectories(model, options.w, options.steps, options.seed)
    empty, corners = page(ZOOM * model.config.image_size)
    frames = [frame(empty, corners, x, i / options.steps, kappa) for i, x in enumerate(images)]
    count = write(frames, options.out)
    for name, x in zip(ROWS, images[-1]):
        right = classifier(x)[0].argmax(1) == torch.arange(len(DIGITS))
        print(f"{METHODS[name].label}: {right.sum()} of {len(DIGITS)} digits right")
    size = options.out.stat().st_size / 1e6
    print(f"{options.out}: {count} frames of {frames[0].size}, {size:.2f} MB, {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
