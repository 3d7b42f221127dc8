"""Does the order of CFG and ERG in density hold with fewer images, or with more neighbours?

    python -m experiments.stability --data data        # a quarter of an hour on two cores

It samples the reported rows of the shipped models again (experiments/results/evidence.json), and writes
stability.md. Density (Naeem et al., 2020) counts the balls of real images that a generated one lies in, over
k; a ball reaches to the k-th neighbour among real images. So both numbers decide how large the balls are.
"""
import itertools
import json
import time
from pathlib import Path

from experiments import runs
from experiments.evidence import RESULTS
from toy.command import Parser, place, run
from toy.files import write_whole
from toy.metrics import features_of, frechet_distance, precision_recall_density_coverage
from toy.sampling import choose_device, describe

IMAGES, NEIGHBOURS, LABELS = (250, 500, 1000, 2000), (3, 5, 10), ("CFG", "C-ERG", "ERG")


def tables(name, rows, device):
    """Markdown for an image set: ERG - CFG and C-ERG - CFG, and real against real images."""
    n, features = max(IMAGES), {}
    for label in LABELS:
        method, parameters = (rows[label][key] for key in ("method", "parameters"))
        x, _ = runs.sample_run(runs.Run(name, "text", method, parameters, [0, 1, 2, 3], n, 16), device)
        features[label] = features_of(runs.checkpoint(name, device)[1], x).double()
    real, again = (runs.real_features(name, n, which, device)[0] for which in ("reference", "again"))
    heads = " | ".join(f"k = {k}" for k in NEIGHBOURS)
    lines = [f"## {name}", "", f"| | {heads} |", "|---|---|---|---|"]
    for label, size in itertools.product(LABELS[1:], IMAGES):
        cells = []
        for k in NEIGHBOURS:
            density = lambda real, fake: precision_recall_density_coverage(real, fake, k)["density"]
            gaps = [density(r, ours) - density(r, cfg) for r, ours, cfg
                    in zip(*(y.split(size) for y in (real, features[label], features["CFG"])))]
            cells.append(f"{sum(gaps) / len(gaps):+.3f}")
        lines.append(f"| {label} - CFG, {size:,} images | {' | '.join(cells)} |")
    levels = []
    for size in IMAGES:
        pairs = [frechet_distance(r, a) for r, a in zip(real.split(size), again.split(size))]  # all classes
        levels.append(f"{sum(pairs) / len(pairs):.3f} ({size:,})")
    return [*lines, "", f"Frechet distance of other real images, not extrapolated: {', '.join(levels)}.", ""]


def arguments():
    parser = Parser(__doc__)
    parser.add_argument("--data", type=place, help="folder with mnist/, downloaded when missing (data)")
    parser.add_argument("--out", type=place, help="folder to write to (experiments/results)")
    return parser


def main(data, out):
    began, device, runs.DATA = time.perf_counter(), choose_device(), data
    studies, lines = json.loads((RESULTS / "evidence.json").read_text())["studies"], []
    for name in ("mnist", "digits"):
        study, = (s for s in studies if (s["task"], s["weights"]) == ("text", name))
        lines += tables(name, study["rows"], device)
    head = f"""\
# Density by the number of images and neighbours

`python -m experiments.stability`, {(time.perf_counter() - began) / 60:.0f} minutes on {describe(device)}.

Differences in density, each method with full captions at the settings of [evidence.md](evidence.md). As many
real images as generated ones; smaller numbers are means over disjoint parts of the same images.
"""
    path = Path(out or RESULTS) / "stability.md"
    write_whole(path, lambda file: file.write("\n".join([head, *lines]).encode()))
    print(path)


if __name__ == "__main__":
    run(main, arguments())
