"""The two pictures of exercise 8, failure-a.png and failure-b.png. It holds the answers: not for students.

    python assignment/failures.py      # from the repository's root; a minute on one CPU core
"""
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import solution  # noqa: E402
from toy import sampling  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

CAPTIONS = ["a red seven on blue", "a white two on black", "a white five on green", "a yellow eight on red",
            "a blue three on black", "a white four on green"]


def wrong_half(tau, layers, rows, queries):
    """Ada's mistake: the first half of the rows is tempered, which is the positive's."""
    return solution.rectified(tau, layers, slice(0, rows.start), queries)


@torch.no_grad()
def failure_a(path, weights=(1.0, 2.0, 3.0, 5.0), steps=25):
    """The same noise and captions over w: as it should be, and with the wrong half of the rows."""
    model, *_ = sampling.load_checkpoint(sampling.WEIGHTS / "mnist.pt")
    p, condition = sampling.GUIDANCE["mnist"], model.encode(CAPTIONS)
    noise = torch.randn(len(CAPTIONS), 3, 28, 28, generator=torch.Generator().manual_seed(5))
    figure, axes = plt.subplots(len(weights), 2, figsize=(9, 3.1), layout="constrained")
    programs = {"expected": solution.rectified, "Ada's program": wrong_half}
    for column, (name, rectify) in enumerate(programs.items()):
        for row, w in enumerate(weights):
            velocity = lambda x, t: solution.guided_velocity(
                model, x, t, condition, None, w, p["tau_i"], p["layers"], p["kappa"],
                slice(0, model.side**2), rectify)
            images = solution.sample(velocity, noise, steps).clamp(-1, 1)
            axis = axes[row][column]
            axis.imshow(torch.cat(list(images / 2 + 0.5), dim=2).permute(1, 2, 0))
            axis.set(xticks=[], yticks=[], title=name if row == 0 else "")
            if column == 0:
                axis.set_ylabel(f"w = {w:g}")
    save(figure, path)


@torch.no_grad()
def failure_b(path, layer=7, K=8):
    """The energy over K steps, of descend and of energy_attention, in a layer of the model of the digits."""
    model, *_ = sampling.load_checkpoint(sampling.WEIGHTS / "digits.pt")
    calls, original = [], F.scaled_dot_product_attention
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    condition = model.encode(CAPTIONS[:1])
    try:
        F.scaled_dot_product_attention = lambda q, k, v: calls.append((q, k, v)) or original(q, k, v)
        model(x, torch.tensor([0.5]), condition)
    finally:
        F.scaled_dot_product_attention = original
    q, k, v = calls[layer]
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    for name, step in (("descend(q, k, K=K)", lambda n: solution.descend(q, k, K=n)),
                       ("energy_attention(q, k, v, K=K)", lambda n: solution.energy_attention(q, k, v, K=n))):
        energies = [float(solution.energy(step(n), k).mean()) for n in range(K + 1)]
        axis.plot(energies, marker="o", label=name)
        print(name, *(f"{energy:.2f}" for energy in energies))
    axis.set(xlabel="K", ylabel="mean of energy(state, k)")
    axis.legend()
    save(figure, path)


def save(figure, path):
    """A small PNG of 64 colours."""
    figure.canvas.draw()
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    image.quantize(64).save(path, optimize=True)


if __name__ == "__main__":
    failure_a(HERE / "failure-a.png")
    failure_b(HERE / "failure-b.png")
