"""What a GPU is for: CIFAR-10 weights, rows of 10,000 images, the tests marked gpu, what it costs.

    python -m experiments.gpu dry train --minutes 8 --data-dir data/cifar10
    python -m experiments.gpu samples tests bench                  # of out/gpu/cifar10.pt, if it is there
    python -m experiments.gpu dry train samples tests bench --device cpu --minutes 2       # a rehearsal

Steps run in the order in which they are given, and a step that fails doesn't keep the next from running.
`dry` is the training in small, stopped and resumed, to find what breaks. All is written to --out.
"""
import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

from experiments import runs
from toy import data
from toy.command import Parser, number, place, run
from toy.drawing import draw_grid
from toy.files import write_whole
from toy.sampling import METHODS, choose_device, describe, recommended

ROWS = [("none", {}), ("cfg", dict(w=1.5)), ("i-erg", dict(w=1.5, negative="same")), ("erg", dict(w=1.5)),
        ("cfg", dict(w=2.0)), ("erg", dict(w=2.0))]


def train(o, dry=False):
    """train_toy.py on CIFAR-10, as one would type it."""
    flags = dict(out=o.out, minutes=o.minutes, save_every=2000, device=o.device, data_dir=o.data_dir)
    if dry:
        flags |= dict(out=o.out / "dry", minutes=min(o.minutes, 0.8))
    if dry or o.device == "cpu":
        flags |= dict(samples=12, steps=2, classifier_iterations=2)
    if o.device == "cpu":
        flags |= dict(batch=8, save_every=10)
    typed = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items() if value is not None]
    command = [sys.executable, "train_toy.py", "--dataset=cifar10", *typed]
    for more in ([], ["--resume"])[:1 + dry]:
        subprocess.run([*command, *more], check=True, cwd=runs.ROOT)


def samples(o):
    """Frechet distance and prompt accuracy of --images a row, and ten pictures of each class."""
    own, table, each = o.out / "cifar10", [], max(1, min(10, o.images // 100))
    for name in reversed(data.NAMES):
        weights = str(own) if name == "cifar10" and own.with_suffix(".pt").is_file() else name
        words, sheets = next(iter(runs.attribute_words(runs.checkpoint(weights)[0]).values())), {}
        for method, given in ROWS:
            parameters = {key: list(value) if isinstance(value, range) else value
                          for key, value in recommended(method, name, **given).items()}
            run = runs.Run(weights, "text", method, parameters, 0, o.images, 25)
            row = runs.collect([run], o.out / "cache", o.chosen)[run]
            table.append(dict(dataset=name, method=method, parameters=parameters, images=o.images, **row))
            print(f"{name} {METHODS[method].label} {given}: Frechet distance {row['frechet']:.3f}, "
                  f"prompt accuracy {row['prompt']:.1%}, {row['seconds']:.0f} s", flush=True)
            o.write("samples.json", table)
            few = runs.Run(weights, "class", method, parameters, 0, each * len(words), 25)
            x, attributes = runs.sample_run(few, o.chosen)
            order = attributes[:, 0].sort(stable=True).indices.view(len(words), each)
            sheets[method, given.get("w")] = x[order]  # (classes, each, 3, S, S)
        for (method, w), x in sheets.items():
            draw_grid(dict(zip(words, x)), [""] * each, o.out / f"{name}-{method}{w or ''}.png",
                      f"{name}: {METHODS[method].label} {'' if w is None else f'w = {w}'}")


def tests(o):
    """The tests marked gpu."""
    device = {"ERG_TEST_DEVICE": o.chosen.type}
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu"], check=True, cwd=runs.ROOT,
                   env={**os.environ, **device})


def bench(o):
    """What it costs: the sections that a GPU has a part in."""
    sections = "guidance methods attention memory evaluations training sampling growth".split()
    subprocess.run([sys.executable, "-m", "experiments.bench", *sections, f"--out={o.out}",
                    f"--device={o.device}", *["--quick"] * (o.device == "cpu")], check=True, cwd=runs.ROOT)


STEPS = {"dry": lambda o: train(o, dry=True), "train": train, "samples": samples, "tests": tests,
         "bench": bench}


def arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("steps", nargs="+", choices=STEPS)
    add("--data-dir", type=place, help="folder with CIFAR-10's official files")
    add("--out", default="out/gpu", type=place, help="folder for everything that is written (out/gpu)")
    add("--minutes", type=number(0.001, 1e5), default=8.0, help="of training (8)")
    add("--images", type=number(10, 10**5, int), help="a row of `samples` (10,000; 20 on a CPU)")
    add("--device", choices=("cuda", "cpu"), help="cuda if it is there")
    return parser


def main(**given):
    o = argparse.Namespace(**given)
    o.out, o.chosen, failed = Path(o.out).resolve(), choose_device(o.device), []
    o.device, o.images = o.chosen.type, o.images or (20 if o.chosen.type == "cpu" else 10_000)
    o.data_dir = o.data_dir and Path(o.data_dir).resolve()
    o.write = lambda name, rows: write_whole(o.out / name, lambda file: file.write(json.dumps(
        dict(hardware=describe(o.chosen), torch=str(torch.__version__), rows=rows), indent=1).encode()))
    torch.set_float32_matmul_precision("high")
    for step in o.steps:
        began = time.time()
        try:
            STEPS[step](o)
        except Exception as error:
            if not isinstance(error, subprocess.CalledProcessError):  # which has said what is wrong
                traceback.print_exc()
            failed.append(step)
        how = "failed" if step in failed else "done"
        print(f"== {step}: {how} after {time.time() - began:.0f} s", flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    run(main, arguments())
