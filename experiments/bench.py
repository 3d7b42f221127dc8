"""What guidance, training and sampling cost, as ratios of things that are measured in turns.

    python -m experiments.bench                        # all; --quick: under three minutes
    python -m experiments.bench guidance growth        # some sections; the others' results are kept

It writes bench.json, bench.md and bench.png to --out. In a turn each contestant is measured once; a figure
is the median over turns, with quartiles.
Shapes: B batch, N image tokens, T all tokens, W width, H heads, D head dimension.
"""
import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import erg
import train_toy
from experiments import runs
from tiny_dit import Config, TinyDiT, sample
from toy import data
from toy.command import Parser, place, run
from toy.files import write_whole
from toy.sampling import METHODS, choose_device, describe, prepare, recommended

XL = dict(image_size=32, channels=4, width=1152, depth=28, heads=16)  # DiT-XL/2
B4 = dict(image_size=32, channels=4, patch=4, width=768, depth=12, heads=12)  # DiT-B/4

# ---- Measuring ---------------------------------------------------------------------------------------------


def turns(o, *calls, least=5):
    """Seconds that each call takes in each turn, (turns, calls), for o.seconds and at least `least` turns."""
    def spent(call, repeats=1):
        o.synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        o.synchronize()
        return (time.perf_counter() - began) / repeats

    first = [min(spent(call), spent(call)) for call in calls]  # the first time is slower
    repeats = max(1, int(0.005 / min(first)))  # so many that a turn takes 5 ms
    rows, began = [], time.perf_counter()
    while len(rows) < least or time.perf_counter() - began < o.seconds:
        order = range(len(calls)) if len(rows) % 2 else reversed(range(len(calls)))  # nobody is always second
        row = {i: spent(calls[i], repeats) for i in order}
        rows.append([row[i] for i in range(len(calls))])
    return torch.tensor(rows, dtype=torch.float64)


def peak_bytes(o, call):
    """The most memory that tensors made in the call take at a time."""
    call()
    if o.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        call()
        return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return torch.tensor(changes).cumsum(0).max().item()


def flops(config, tokens=None):
    """Operations of all blocks in an image's forward: linear layers, and the two products of attention."""
    L = config.caption_length
    T = tokens or (config.image_size // config.patch)**2 + L
    block = lambda n: 24 * n * config.width**2 + 4 * n**2 * config.width
    return config.depth * block(T) + config.text_depth * block(L)


def build(o, **sizes):
    """A model of random weights, none of them zero."""
    torch.manual_seed(0)
    model = TinyDiT(Config(vocabulary=("a",), **sizes)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    return model.to(o.chosen, o.dtype)


def draw(model, batch):
    """Noise (B, C, S, S), a condition (B, L, W) and the null prompt's."""
    c, like = model.config, model.patch_in.weight
    noise = torch.randn(batch, c.channels, c.image_size, c.image_size, device=like.device, dtype=like.dtype)
    return noise, model.encode([c.vocabulary[0]] * batch), model.encode([""] * batch)


def step_of(model, batch, **settings):
    """A call that makes a step of guidance: CFG without settings."""
    x, y, null = draw(model, batch)
    guided = erg.Guidance(erg.ERG(w=2.0, **settings), null)
    return lambda: guided(model, x, 0.5, y)


def i_erg(model):
    """Settings of I-ERG in two layers in the middle."""
    middle = len(model.blocks) // 2
    return dict(tau_i=0.01, layers=[middle, middle + 1], queries=slice(0, model.side**2))


# ---- Guidance ----------------------------------------------------------------------------------------------


def guidance(o):
    """Time of a step with ERG, divided by that of a step with CFG (K = 1)"""
    models = {"digits": o.digits, "MNIST": o.mnist, "DiT-B/4-sized": build(o, **B4)}
    models |= {"DiT-XL/2-sized": build(o, **XL)} if o.device == "cuda" else {}
    for name, model in models.items():
        for batch in (1, 8, 64)[:1 if o.quick and "DiT" in name else 3]:
            spent = turns(o, step_of(model, batch), step_of(model, batch, **i_erg(model)))
            ms = 1000 * spent[:, 0].median().item()
            ratio = spent[:, 1] / spent[:, 0]
            yield f"{name}, batch {batch} (CFG {ms:,.1f} ms)", ratio, "≤ 1.02" if ms >= 10 else "≤ 1.05"


def methods(o):
    """Time of a sampling run, divided by that of CFG (MNIST, batch 16, 8 steps)"""
    x, y, null = draw(o.mnist, 16)
    tokens = torch.zeros(16, o.mnist.config.caption_length, dtype=torch.long, device=o.chosen)

    layers = range(2, 4)

    def four(model, x, t, y):
        """Both conditions plain, then both rectified, at all t; half of it is not used."""
        given = torch.cat([x, x]), torch.full((32,), t, device=x.device), torch.cat([y, null])
        v = model(*given)[:16]
        with erg.rectify(model, tau=0.01, queries=slice(0, model.side**2), layers=layers):
            return erg.guide(v, model(*given)[16:], 2.0)

    names, calls = [], []
    for name, more in dict(cfg={}, none=None, erg=recommended("erg", "mnist"), pag=dict(layers=layers),
                           seg=dict(layers=layers)).items():
        chosen = {} if more is None else {**more, "w": 2.0}
        condition, guided = prepare(name, **chosen)(o.mnist, tokens, tokens, 0)
        names.append(METHODS[name].label)
        calls.append(lambda c=condition, g=guided: sample(o.mnist, x, c, 8, g))
    spent = turns(o, *calls, lambda: sample(o.mnist, x, y, 8, four))
    for i, name in enumerate([*names, "ERG by evaluating all rows twice"]):
        yield name, spent[:, i] / spent[:, 0], "≤ 1.02" if name == "ERG" else ""


def attention(o):
    """Time of energy_attention, divided by that of F.scaled_dot_product_attention"""
    plain = lambda: F.scaled_dot_product_attention(q, k, v)
    for n in (64, 256, 1024, 4096, 16384)[:4 if o.quick else 5]:
        q, k, v = torch.randn(3, 1, 4, n, 64, device=o.chosen, dtype=o.dtype)
        spent = turns(o, plain, lambda: erg.energy_attention(q, k, v, tau=0.01))
        yield f"K = 1, N = {n:,}", spent[:, 1] / spent[:, 0], "≤ 1.02"
    q, k, v = torch.randn(3, 1, 4, 1024, 64, device=o.chosen, dtype=o.dtype)
    many = [2, 3, 5, 10]
    spent = turns(o, plain, *(lambda K=K: erg.energy_attention(q, k, v, tau=0.01, K=K) for K in many))
    for i, K in enumerate(many, 1):
        yield f"K = {K}, N = 1,024: divided by K, too", spent[:, i] / spent[:, 0] / K, "≤ 1.05"


def memory(o):
    """Peak memory of a step with ERG, divided by that with CFG; its growth, divided by that of N"""
    sides, peaks = (8, 16, 32, 64)[:3 if o.quick else 4], []
    for side in sides:
        model = build(o, image_size=2 * side, width=64, depth=3, heads=2)
        cfg, ours = (peak_bytes(o, step_of(model, 2, **more)) for more in ({}, i_erg(model)))
        peaks.append(ours)
        yield f"N = {side**2:,}", torch.tensor([ours / cfg]), "≤ 1.01"
    growth = peaks[-1] / peaks[-2] / (sides[-1] / sides[-2])**2
    yield f"growth from N = {sides[-2]**2:,} to {sides[-1]**2:,}", torch.tensor([growth]), "≤ 1.05"


def evaluations(o):
    """Time of an evaluation in unconditional I-ERG, divided by that of one without guidance (batch 16)"""
    x, _, null = draw(o.mnist, 16)
    for kappa in (0.2, 0.6):
        settings = erg.ERG(w=2.0, negative="same", kappa=kappa, **i_erg(o.mnist))
        acts = sum(erg.Guidance(settings).rectifies_at(i / 20) for i in range(20)) / 20
        spent = turns(o, lambda: sample(o.mnist, x, null, 20),
                      lambda: sample(o.mnist, x, null, 20, erg.Guidance(settings)), least=3)
        share = spent[:, 1] / spent[:, 0] / (1 + acts)
        yield f"kappa = {kappa}: {1 + acts:g} evaluations a step", share, "≤ 1.03"


# ---- Training and sampling ---------------------------------------------------------------------------------


def training(o):
    """Speed of a training step with Muon, which needs half of AdamW's steps"""
    cuda = o.device == "cuda"
    side = 8192 if cuda else 2048
    matrix = torch.randn(side, side, device=o.chosen, dtype=o.dtype)
    for name in data.NAMES if cuda else ("digits", "mnist"):
        recipe, words = train_toy.RECIPES[name], runs.attribute_words(runs.checkpoint(name)[0])
        shape = (20_000, *[3] * (name == "cifar10"), *[data.SIZES[name]] * 2)  # random pictures cost the same
        images = data.Images(name, torch.randint(256, shape).byte(), torch.randint(10, shape[:1]), words)
        config, moved = Config(vocabulary=images.vocabulary, **recipe.model), images.to(o.chosen)
        tables = train_toy.caption_tables(images, config)
        ours = train_toy.Training(config, 1e-3, 0, o.chosen)
        on_device = [table.to(o.chosen) for table in tables]

        def step(loss):
            batch = train_toy.draw_batch(moved, on_device, recipe, recipe.batch, 0, ours.step)
            ours.update(loss, batch, 1e-3, 0.99)

        calls = {"eager": train_toy.Loss(ours.model)}
        long = argparse.Namespace(minutes=None, iterations=10**6)
        if not o.quick and train_toy.compile_pays(long, o.chosen):
            calls["compiled"] = torch.compile(calls["eager"])
        calls = {how: lambda f=f: step(f) for how, f in calls.items()}
        spent = turns(o, lambda: matrix @ matrix, *calls.values())
        rate, work = 2 * side**3 / spent[:, 0], 3 * recipe.batch * flops(config)
        for i, how in enumerate(calls, 1):
            share = work / spent[:, i] / rate
            yield f"{name}, {how}: share of a matrix product's speed", share, "≥ 0.4" if cuda else "≥ 0.5"
            yield f"{name}, {how}: images a second", recipe.batch / spent[:, i], ""


def sampling(o):
    """Images a second with CFG on MNIST, divided by those in batches of 64 in float32"""
    def half(call):
        with torch.autocast(o.device, torch.bfloat16):
            call()

    sizes = (64, 128, 256)
    calls = [step_of(o.mnist, batch) for batch in sizes]
    spent = turns(o, *calls, *(lambda call=call: half(call) for call in calls))
    for i, batch in enumerate([*sizes, *sizes]):
        name = f"batch {batch}, {'bf16' if i > 2 else 'f32'}"
        yield name, batch / 64 * spent[:, 0] / spent[:, i], ""


# ---- Whole commands ----------------------------------------------------------------------------------------


def command(*typed, processes=0, threads=None):
    """(seconds, output) of a command of this repository, in one Python or in processes of torchrun."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *several * (processes > 0), *map(str, typed)], cwd=runs.ROOT,
                          capture_output=True, text=True,
                          env=os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {}))
    if done.returncode:
        raise RuntimeError(f"{typed} failed: {done.stderr[-500:]}")
    return time.perf_counter() - began, done.stdout


def processes(o):
    """Images a second in training with two gloo processes, divided by those of one, each with one thread"""
    flags = ("--batch", 256, "--iterations", 10 if o.quick else 30, "--classifier-iterations", 2,
             "--samples", 6, "--steps", 1, "--device", "cpu")
    speeds = []
    with tempfile.TemporaryDirectory() as folder:
        for n in (1, 2) * (1 if o.quick else 3):
            command("train_toy.py", "--out", folder, *flags, processes=n, threads=1)
            speeds.append(json.loads((Path(folder) / "digits.json").read_text())["images_per_second"])
    speeds = torch.tensor(speeds).view(-1, 2)
    yield "digits, batch 256", speeds[:, 1] / speeds[:, 0], "≥ 1.7"


def waiting(o):
    """What a user waits for, in seconds"""
    code = "import time, torch; began = time.perf_counter(); import erg; print(time.perf_counter() - began)"
    tries = 2 if o.quick else 7
    with tempfile.TemporaryDirectory() as folder:
        picture = ("sample_toy.py", "--prompt", "seven", "--count", 1, "--out", folder, "--device", o.device)
        command(*picture)  # the first one reads from a cold disk
        imports = torch.tensor([float(command("-c", code)[1]) for _ in range(tries)])
        pictures = torch.tensor([command(*picture)[0] for _ in range(tries)])
        yield "import erg, behind import torch", imports, "≤ 0.03"
        yield "a picture from shipped weights, torch included", pictures, "≤ 4"
        if not o.quick:
            seconds, _ = command("train_toy.py", "--out", folder, "--device", o.device)
            table = json.loads((Path(folder) / "digits.json").read_text())["table"]
            share = table["no guidance"]["prompt"]
            yield f"python train_toy.py (prompt accuracy {share:.1%})", torch.tensor([seconds]), "≤ 150"


# ---- Growth ------------------------------------------------------------------------------------------------


def growth(o):
    """Exponent of the time in a size, divided by that of the operations, between two sizes far apart"""
    def grow(name, sizes, calls, work):
        spent = turns(o, *calls, least=3)
        seconds = spent.median(dim=0).values.tolist()
        o.curves[name] = dict(sizes=sizes, seconds=seconds, work=[work(n) for n in sizes])
        first = max(i for i, n in enumerate(sizes) if 4 * n <= sizes[-1])
        grown = math.log(sizes[-1] / sizes[first])
        expected = math.log(work(sizes[-1]) / work(sizes[first])) / grown
        found = (spent[:, -1] / spent[:, first]).log() / grown
        name = f"{name}, {sizes[first]:,} to {sizes[-1]:,}: expected {expected:.2f}"
        return name, found / expected, "≤ 1.1"

    models = [build(o, image_size=2 * n, width=64, depth=3, heads=2)
              for n in (8, 16, 32, 64)[:3 if o.quick else 4]]
    yield grow("image tokens", [m.side**2 for m in models], [step_of(m, 2, **i_erg(m)) for m in models],
               lambda n: flops(models[0].config, n + 6))
    sizes = [1, 4, 16, 64, 512][:4 if o.quick else 5]
    yield grow("batch", sizes, [step_of(o.digits, n, **i_erg(o.digits)) for n in sizes], float)
    q, k, v = torch.randn(3, 1, 4, 1024, 64, device=o.chosen, dtype=o.dtype)
    sizes = [1, 2, 5, 10]
    calls = [lambda K=K: erg.energy_attention(q, k, v, tau=0.1, K=K) for K in sizes]
    yield grow("K", sizes, calls, float)
    x, y, null = draw(o.digits, 8)
    settings, sizes = erg.ERG(w=2.0, **i_erg(o.digits)), [1, 4, 20] if o.quick else [1, 4, 20, 100]
    yield grow("sampling steps", sizes,
               [lambda n=n: sample(o.digits, x, y, n, erg.Guidance(settings, null)) for n in sizes], float)


def draw_growth(curves, path):
    figure = Figure(figsize=(10, 2.7), layout="constrained")
    for axes, (name, curve) in zip(figure.subplots(1, len(curves)), curves.items()):
        sizes, seconds, work = (torch.tensor(curve[key]) for key in ("sizes", "seconds", "work"))
        line = 1000 * work / work[-1] * seconds[-1]
        axes.loglog(sizes, line, color="#999999", lw=1, label="as the work grows")
        axes.loglog(sizes, 1000 * seconds, "o-", color="#D55E00", ms=4, label="measured")
        axes.set(xlabel=name, xticks=sizes.tolist(), xticklabels=[f"{n:,}" for n in sizes.tolist()])
        axes.minorticks_off()
    figure.axes[0].set_ylabel("milliseconds")
    figure.axes[0].legend(fontsize=7)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=130))


# ---- The page ----------------------------------------------------------------------------------------------

SECTIONS = {f.__name__: f for f in (guidance, methods, attention, memory, evaluations, training, sampling,
                                    processes, waiting, growth)}


def estimate():
    """What large models would cost, from the rates of a training of CIFAR-10 on one H100."""
    rate, best = 102, 0.4 * 791  # TFLOP/s in bf16: measured, and 40 % of a matrix product's
    xl, sd3 = (Config(vocabulary=("a",), **sizes) for sizes in (XL, dict(width=1536, depth=24, heads=24)))
    image, picture = 3 * flops(xl) / 1e12, flops(sd3, 4096 + 333) / 1e12
    days, seconds = 7e6 * 256 * image / 8 / rate / 86400, 2 * 28 * picture / rate
    return f"""## What large models would cost

Worked out, not measured. On one H100 a training step of the CIFAR-10 model, with AdamW, ran at 102 TFLOP/s,
13 % of a matrix product's ([weights](../../weights/README.md#cifar-10)). Larger models should come closer to
40 %.

- ImageNet at 256 pixels on 8 GPUs: training DiT-XL/2 takes {image:.2f} TFLOP an image. The 7 million steps of
  256 images of its paper take {days:.0f} days at 13 %, and {days * rate / best:.0f} at 40 %. To be changed:
  latents in place of pixels, images read from disk, and Muon's products shared among the GPUs. NCCL was never
  run.
- Stable Diffusion 3 (medium) at 1,024 pixels: {picture:.1f} TFLOP an evaluation of 4,429 tokens. A step has
  two, with CFG or ERG: 28 steps take {seconds:.1f} s at 13 %, and {seconds * rate / best:.1f} s at 40 %. ERG
  multiplies the queries of a few layers by tau, and encodes the prompt weakly in place of the null prompt.
  Nothing must change: `erg.rectify` runs in the pipeline.
"""


def met(value, goal):
    """Whether a value is as "≤ 1.02", "≥ 2" or "" says."""
    sign, _, limit = goal.partition(" ")
    return not sign or (value <= float(limit) if sign == "≤" else value >= float(limit))


def page(found):
    """bench.md from what bench.json holds."""
    lines = ["# What it costs", "",
             "`python -m experiments.bench`. In a turn, each contestant is measured once.",
             "A figure is the median over turns, with quartiles; without them it is one run, or exact.",
             "Bold figures miss their goal. A step below 10 ms is mostly Python, and has a wider goal.", ""]
    show = lambda x: f"{x:,.0f}" if x >= 100 else f"{x:.2f}" if x >= 1.2 else f"{x:.3f}"
    for name, section in found.items():
        where = ", ".join(section[key] for key in ("hardware", "torch", "date"))
        lines += [f"**{SECTIONS[name].__doc__}** ({where})", ""]
        lines += ["| | median | quartiles | goal |", "|---|---|---|---|"]
        for row in section["rows"]:
            middle, low, high = map(show, row["quartiles"])
            middle = middle if met(row["quartiles"][0], row["goal"]) else f"**{middle}**"
            between = f"{low} to {high}" if row["turns"] > 1 else ""
            lines.append(f"| {row['what']} | {middle} | {between} | {row['goal']} |")
        lines.append("")
    if "growth" in found:
        lines += ["![Measured times, and lines as the work grows](bench.png)", ""]
    return "\n".join([*lines, estimate()])


def arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; all if none")
    add("--quick", action="store_true", help="fewer sizes and turns: a try, not a result")
    add("--out", type=place, help="folder to write to (experiments/results; --quick: out/quick)")
    add("--device", choices=("cuda", "cpu"), help="cuda if it is there")
    return parser


def main(**given):
    o = argparse.Namespace(**given)
    for name in o.sections:
        data.check_name(SECTIONS, section=name)
    out = Path(o.out or runs.ROOT / ("out/quick" if o.quick else "experiments/results"))
    o.chosen = choose_device(o.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    o.seconds = 0.3 if o.quick else 5.0
    o.device, o.dtype = o.chosen.type, torch.bfloat16 if o.chosen.type == "cuda" else torch.float32
    torch.set_float32_matmul_precision("high")  # as train_toy.py on CUDA
    o.synchronize = torch.cuda.synchronize if o.device == "cuda" else lambda: None
    o.digits, o.mnist = (runs.checkpoint(name, o.chosen)[0] for name in ("digits", "mnist"))
    found = {}
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((out / "bench.json").read_text())
    for name in o.sections or SECTIONS:
        print(f"\n{SECTIONS[name].__doc__}", flush=True)
        rows, o.curves = [], {}
        with torch.set_grad_enabled(name == "training"):
            for what, values, goal in SECTIONS[name](o):
                values = values.double()
                spread = values.quantile(torch.tensor([0.5, 0.25, 0.75]).double()).tolist()
                rows.append(dict(what=what, quartiles=spread, turns=len(values), goal=goal))
                middle, low, high = spread
                print(f"  {what:60} {middle:9.3f}  ({low:.3f} to {high:.3f})  {goal}", flush=True)
        found[name] = dict(hardware=describe(o.chosen), torch=f"torch {torch.__version__}",
                           date=time.strftime("%Y-%m-%d") + ", quick" * o.quick, rows=rows, curves=o.curves)
        found = {name: found[name] for name in SECTIONS if name in found}
        write_whole(out / "bench.json", lambda file: file.write(json.dumps(found, indent=1).encode()))
        write_whole(out / "bench.md", lambda file: file.write(page(found).encode()))
        if o.curves:
            draw_growth(o.curves, out / "bench.png")
    print(f"\nWritten: {out / 'bench'}.*")


if __name__ == "__main__":
    run(main, arguments())
