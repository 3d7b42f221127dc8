"""What a GPU is for: CIFAR-10 weights, rows of 10,000 images, the tests marked gpu, timings.

    python -m experiments.gpu dry train --minutes 8 --data-dir data/cifar10
    python -m experiments.gpu samples tests times                  # of out/gpu/cifar10.pt, if it is there
    python -m experiments.gpu dry train samples tests times --device cpu --minutes 2       # a rehearsal

Steps run in the order in which they are given, and a step that fails doesn't keep the next from running.
`dry` is the training in small, stopped and resumed, to find what breaks. All is written to --out.
"""
import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import erg
from experiments import runs
from tiny_dit import TinyDiT, flow_matching_loss
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


def seconds(device, *calls, tries=15):
    """Medians of the seconds that calls take, in turns."""
    spent = torch.zeros(tries, len(calls))
    for i in range(-3, tries):
        for j, call in enumerate(calls):
            device.type == "cuda" and torch.cuda.synchronize()
            began = time.perf_counter()
            call()
            device.type == "cuda" and torch.cuda.synchronize()
            spent[i, j] = time.perf_counter() - began
    return spent.median(dim=0).values.tolist()


@torch.no_grad()
def times(o):
    """The matrix rate and a training step's share of it; ERG against CFG; energy attention against SDPA."""
    device, cpu, found = o.chosen, o.chosen.type == "cpu", []
    dtype = torch.float32 if cpu else torch.bfloat16

    def say(what, **numbers):
        found.append(dict(what=what, **numbers))
        print(what, ", ".join(f"{key} {value:.4g}" for key, value in numbers.items()), flush=True)
        o.write("times.json", found)

    a = torch.randn(*[512 if cpu else 8192] * 2, device=device, dtype=torch.bfloat16)
    rate = 2 * len(a)**3 / seconds(device, lambda: a @ a)[0]
    sizes = {name: runs.checkpoint(name)[0].config for name in ("digits", "cifar10")}
    sizes["DiT-XL/2"] = dataclasses.replace(sizes["cifar10"], width=1152, depth=28, heads=16)
    model = TinyDiT(sizes["cifar10"])
    math_kernel = sdpa_kernel(SDPBackend.MATH)  # the products of the others are not counted everywhere
    with torch.enable_grad(), math_kernel, FlopCounterMode(display=False) as counter:
        flow_matching_loss(model, torch.zeros(1, 3, 32, 32), model.encode(["a horse"]), torch.ones(1) / 2,
                           torch.zeros(1, 3, 32, 32)).mean().backward()
    record = o.out / "cifar10.json"
    speed = json.loads(record.read_text())["images_per_second"] if record.is_file() else math.nan
    say("bf16 matrix product", tflops=rate / 1e12)
    say("CIFAR-10 training step", gflop_an_image=counter.get_total_flops() / 1e9, images_per_second=speed,
        share_of_the_rate=speed * counter.get_total_flops() / rate)
    for name, config in list(sizes.items())[:2 if cpu else 3]:
        model = TinyDiT(config).to(device, dtype).eval()
        middle = len(model.blocks) // 2
        for batch in (1, 8) if cpu else (1, 8, 64, 256)[:4 - (name == "DiT-XL/2")]:
            side = model.config.image_size
            x = torch.randn(batch, 3, side, side, device=device, dtype=dtype)
            y, null = model.encode(["a"] * batch), model.encode([""])
            i_erg = dict(tau_i=0.01, layers=[middle, middle + 1], queries=slice(0, model.side**2))
            steps = [erg.Guidance(erg.ERG(w=2.0, **settings), null) for settings in (i_erg, {})]
            calls, peak = [lambda g=g: g(model, x, 0.5, y) for g in steps], [math.nan, math.nan]
            erg_s, cfg_s = seconds(device, *calls, tries=3 if cpu else 15)
            for i, call in enumerate(calls if not cpu else ()):
                torch.cuda.reset_peak_memory_stats()
                call()
                peak[i] = torch.cuda.max_memory_allocated()
            say(f"{name}, batch {batch}: ERG step / CFG step", ratio=erg_s / cfg_s, cfg_ms=1000 * cfg_s,
                peak_memory=peak[0] / peak[1])
    for n in (64, 256) if cpu else (64, 256, 1024, 4096, 16384):
        q, k, v = torch.randn(3, 4, 16, n, 64, device=device, dtype=dtype)
        plain, once, thrice = seconds(device, lambda: F.scaled_dot_product_attention(q, k, v),
                                      lambda: erg.energy_attention(q, k, v, tau=0.01),
                                      lambda: erg.energy_attention(q, k, v, tau=0.01, gamma=0.5, K=3))
        say(f"energy attention / SDPA, N = {n}", K_1=once / plain, K_3=thrice / plain, sdpa_ms=1000 * plain)


STEPS = {"dry": lambda o: train(o, dry=True), "train": train, "samples": samples, "tests": tests,
         "times": times}


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
