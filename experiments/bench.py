"""What guidance, training and sampling cost: ratios of things that take turns in one run.

    python -m experiments.bench                        # all but `learning`; --quick: under three minutes
    python -m experiments.bench guidance growth        # some sections; the others' results are kept
    python -m experiments.bench learning --data-dir data/mnist        # MNIST after 4, 8 and 16 minutes

It writes bench.json, bench.md and bench.png to --out. A figure is the median over turns, with quartiles.
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
from torch import nn

import erg
import train_toy
from experiments import runs
from tiny_dit import Config, TinyDiT, flow_matching_loss, sample
from toy import data
from toy.command import Parser, place, run
from toy.files import write_whole
from toy.sampling import METHODS, WEIGHTS, choose_device, describe, load_checkpoint, prepare, recommended

LAYERS = range(2, 4)  # that ERG and its rivals act in here; how many they are decides the cost
XL = dict(image_size=32, channels=4, width=1152, depth=28, heads=16)  # DiT-XL/2
B4 = dict(image_size=32, channels=4, patch=4, width=768, depth=12, heads=12)  # DiT-B/4

# ---- Measuring ---------------------------------------------------------------------------------------------


def turns(o, *calls, least=5):
    """Seconds that calls take, (turns, calls): in turns, for o.seconds and at least `least` times."""
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
        rows.append([spent(call, repeats) for call in calls])
    return torch.tensor(rows, dtype=torch.float64)


def peak_bytes(o, call):
    """The most memory that tensors made in the call take at a time."""
    if o.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return torch.tensor(changes).cumsum(0).max().item()


def flops(config, tokens=None):
    """Operations of the blocks in one image's forward: matrix products, and the two of attention."""
    T = tokens or (config.image_size // config.patch)**2 + config.caption_length
    return config.depth * (24 * T * config.width**2 + 4 * T**2 * config.width)


def build(o, **sizes):
    """A model of random weights, none of them zero."""
    torch.manual_seed(0)
    model = TinyDiT(Config(vocabulary=("a",), **sizes)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    return model.to(o.chosen, torch.bfloat16 if o.device == "cuda" else torch.float32)


def draw(model, batch):
    """Noise (B, C, S, S), a condition (B, L, W) and the null prompt's."""
    c, like = model.config, model.patch_in.weight
    noise = torch.randn(batch, c.channels, c.image_size, c.image_size, device=like.device, dtype=like.dtype)
    return noise, model.encode([c.vocabulary[0]] * batch), model.encode([""] * batch)


def step_of(model, batch, **settings):
    """A call that makes a step of guidance."""
    x, y, null = draw(model, batch)
    guidance = erg.Guidance(erg.ERG(w=2.0, **settings), None if "negative" in settings else null)
    return lambda: guidance(model, x, 0.5, y)


def i_erg(model, **more):
    middle = len(model.blocks) // 2
    return dict(tau_i=0.01, layers=[middle, middle + 1], queries=slice(0, model.side**2), **more)


# ---- Guidance ----------------------------------------------------------------------------------------------


def guidance(o):
    """A step of ERG over one of CFG (K = 1)"""
    models = {"digits": o.digits, "MNIST": o.mnist, "DiT-B/4-sized": build(o, **B4)}
    models |= {"DiT-XL/2-sized": build(o, **XL)} if o.device == "cuda" else {}
    for name, model in models.items():
        for batch in (1, 8, 64)[:1 if o.quick and "DiT" in name else 3]:
            spent = turns(o, step_of(model, batch), step_of(model, batch, **i_erg(model)))
            ms = 1000 * spent[:, 0].median().item()
            ratio = spent[:, 1] / spent[:, 0]
            yield f"{name}, batch {batch} (CFG {ms:,.1f} ms)", ratio, "≤ 1.02" if ms >= 10 else "≤ 1.05"


def methods(o):
    """A sampling run over one of CFG (MNIST, batch 16, 8 steps)"""
    x, y, null = draw(o.mnist, 16)
    tokens = torch.zeros(16, o.mnist.config.caption_length, dtype=torch.long, device=o.chosen)

    def four(model, x, t, y):
        """Both conditions plain, then both rectified; half of it is not used."""
        given = torch.cat([x, x]), torch.full((32,), t, device=x.device), torch.cat([y, null])
        v = model(*given)[:16]
        with erg.rectify(model, tau=0.01, queries=slice(0, model.side**2), layers=LAYERS):
            return erg.guide(v, model(*given)[16:], 2.0)

    names, calls = [], []
    for name, more in dict(cfg={}, none=None, erg=recommended("erg", "mnist"), pag=dict(layers=LAYERS),
                           seg=dict(layers=LAYERS), sag=dict(layer=2)).items():
        chosen = {} if more is None else {**more, "w": 2.0}
        condition, guided = prepare(name, **chosen)(o.mnist, tokens, tokens, 0)
        names.append(METHODS[name].label)
        calls.append(lambda c=condition, g=guided: sample(o.mnist, x, c, 8, g))
    spent = turns(o, *calls, lambda: sample(o.mnist, x, y, 8, four))
    for i, name in enumerate([*names, "ERG in four evaluations, as in EMAG's repository"]):
        yield name, spent[:, i] / spent[:, 0], "≤ 1.02" if name == "ERG" else ""


def attention(o):
    """energy_attention over F.scaled_dot_product_attention"""
    for n in (64, 256, 1024, 4096, 16384)[:4 if o.quick else 5]:
        q, k, v = torch.randn(3, 1, 4, n, 64, device=o.chosen)
        plain = lambda: F.scaled_dot_product_attention(q, k, v)
        spent = turns(o, plain, lambda: erg.energy_attention(q, k, v, tau=0.01))
        yield f"K = 1, N = {n:,}", spent[:, 1] / spent[:, 0], "≤ 1.02"
    q, k, v = torch.randn(3, 1, 4, 1024, 64, device=o.chosen)
    many = [2, 3, 5, 10]
    spent = turns(o, plain, *(lambda K=K: erg.energy_attention(q, k, v, tau=0.01, K=K) for K in many))
    for i, K in enumerate(many, 1):
        yield f"K = {K}, N = 1,024: over K", spent[:, i] / spent[:, 0] / K, "1 ± 0.05"


def memory(o):
    """Peak memory of a step: ERG over CFG, and growth"""
    sides, peaks = (8, 16, 32, 64)[:3 if o.quick else 4], []
    for side in sides:
        model = build(o, image_size=2 * side, width=64, depth=3, heads=2)
        cfg, ours = (peak_bytes(o, step_of(model, 2, **more)) for more in ({}, i_erg(model)))
        peaks.append(ours)
        yield f"N = {side**2:,}", torch.tensor([ours / cfg]), "≤ 1.01"
    growth = peaks[-1] / peaks[-2] / (sides[-1] / sides[-2])**2
    yield f"N = {sides[-2]**2:,} to {sides[-1]**2:,}, over linear", torch.tensor([growth]), "1 ± 0.05"


def evaluations(o):
    """A run of unconditional I-ERG over the time of its evaluations without guidance"""
    x, _, null = draw(o.mnist, 64)
    for kappa in (0.2, 0.6):
        settings = erg.ERG(w=2.0, negative="same", kappa=kappa, **i_erg(o.mnist))
        acts = sum(erg.Guidance(settings).rectifies_at(i / 20) for i in range(20)) / 20
        spent = turns(o, lambda: sample(o.mnist, x, null, 20),
                      lambda: sample(o.mnist, x, null, 20, erg.Guidance(settings)), least=3)
        yield (f"kappa = {kappa}: {1 + acts:g} evaluations a step",
               spent[:, 1] / spent[:, 0] / (1 + acts), "1 ± 0.03")


# ---- Training and sampling ---------------------------------------------------------------------------------


class PlainAttention(nn.Module):
    """Three projections and a softmax written out, as in many tutorials."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.q_norm, self.k_norm = (nn.RMSNorm(width // heads, eps=1e-6) for _ in range(2))

    def forward(self, x):  # (B, T, W)
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, D)
        q, k, v = self.q_norm(split(self.q(x))), self.k_norm(split(self.k(x))), split(self.v(x))
        weights = (q @ k.transpose(-2, -1) / q.shape[-1]**0.5).softmax(-1)  # (B, H, T, T)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class OneByOne(torch.utils.data.Dataset):
    """Pictures and captions, one at a time, for a DataLoader."""

    def __init__(self, images, tables):
        self.images, self.tokens = images, tables[0]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        x, attributes = self.images.draw(torch.tensor([row]))
        return x[0], self.tokens[tuple(attributes.T)][0]


def plain_training(images, tables, config, batch, device):
    """A call that makes a training step in the usual style: eager, AdamW, a DataLoader with two workers."""
    model = TinyDiT(config)
    for block in [*model.blocks, *model.encoder.blocks]:
        block.attention = PlainAttention(config.width, config.heads)
    model.to(device)
    average = torch.optim.swa_utils.AveragedModel(model, avg_fn=lambda old, new, _: 0.995 * old + 0.005 * new)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    loader = torch.utils.data.DataLoader(OneByOne(images, tables), batch, shuffle=True, drop_last=True,
                                         num_workers=2, persistent_workers=True)
    batches = (given for _ in iter(int, 1) for given in loader)  # without end

    def step():
        x, tokens = (part.to(device) for part in next(batches))
        t, noise = torch.rand(len(x), device=device), torch.randn_like(x)
        loss = flow_matching_loss(model, x, model.encoder(tokens), t, noise).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)

    return step


def training(o):
    """A training step: share of the matrix rate; time of a usual implementation over train_toy.py's"""
    cuda = o.device == "cuda"
    side, kind = (8192, torch.bfloat16) if cuda else (2048, torch.float32)
    matrix = torch.randn(side, side, device=o.chosen, dtype=kind)
    for name in data.NAMES if cuda else ("digits", "mnist"):
        recipe, words = train_toy.RECIPES[name], runs.attribute_words(runs.checkpoint(name)[0])
        shape = (2048, *[3] * (name == "cifar10"), *[data.SIZES[name]] * 2)  # random pictures cost the same
        images = data.Images(name, torch.randint(256, shape).byte(), torch.randint(10, (2048,)), words)
        config, moved = Config(vocabulary=images.vocabulary, **recipe.model), images.to(o.chosen)
        tables = train_toy.caption_tables(images, config)
        plain = plain_training(images, tables, config, recipe.batch, o.chosen)
        tables, ours = [table.to(o.chosen) for table in tables], train_toy.Training(config, 1e-3, 0, o.chosen)

        def step(loss):
            batch = train_toy.draw_batch(moved, tables, recipe, recipe.batch, 0, ours.step)
            ours.update(loss, batch, 1e-3, 0.99)

        loss = train_toy.Loss(ours.model)
        kinds = {"eager": loss} if o.quick else {"eager": loss, "compiled": torch.compile(loss)}
        spent = turns(o, lambda: matrix @ matrix, plain, *(lambda f=f: step(f) for f in kinds.values()))
        rate, work = 2 * side**3 / spent[:, 0], 3 * recipe.batch * flops(config)
        for i, how in enumerate(kinds, 2):
            speed = recipe.batch / spent[:, i].median().item()
            yield f"{name}, {how}: share", work / spent[:, i] / rate, "≥ 0.4" if cuda else "≥ 0.5"
            yield f"{name}, {how}: usual over ours", spent[:, 1] / spent[:, i], "≥ 1.5"
            yield f"{name}, {how}: images/s", torch.tensor([speed]), ""


def sampling(o):
    """Images a second with CFG, over those of batches of 64 in float32 (MNIST)"""
    def run(batch, half):
        call = step_of(o.mnist, batch)
        with torch.autocast(o.device, torch.bfloat16, enabled=half):
            call()

    kinds = [(batch, half) for half in (False, True) for batch in (64, 128, 256)]
    spent = turns(o, *(lambda kind=kind: run(*kind) for kind in kinds))
    for i, (batch, half) in enumerate(kinds):
        yield f"batch {batch}, {'bf16' if half else 'f32'}", batch / 64 * spent[:, 0] / spent[:, i], ""


# ---- Whole commands ----------------------------------------------------------------------------------------


def command(*typed, processes=0, threads=None):
    """Seconds that a command of this repository takes, in one Python or in processes of torchrun."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *several * (processes > 0), *map(str, typed)], cwd=runs.ROOT,
                          capture_output=True, text=True,
                          env=os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {}))
    if done.returncode:
        raise RuntimeError(f"{typed} failed: {done.stderr[-500:]}")
    return time.perf_counter() - began


def trained(*typed, dataset="digits", **how):
    """(seconds, notes) of a training."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = command("train_toy.py", "--dataset", dataset, "--out", folder, *typed, **how)
        return seconds, json.loads((Path(folder) / f"{dataset}.json").read_text())


def processes(o):
    """Training with two gloo processes, images a second over one process with a thread"""
    flags = ("--batch", 256, "--iterations", 10 if o.quick else 30, "--classifier-iterations", 2,
             "--samples", 6, "--steps", 1, "--device", "cpu")
    speeds = torch.tensor([[trained(*flags, processes=n, threads=1)[1]["images_per_second"] for n in (1, 2)]
                           for _ in range(1 if o.quick else 3)])
    yield "digits, batch 256", speeds[:, 1] / speeds[:, 0], "≥ 1.7"


def waiting(o):
    """What a user waits for, in seconds"""
    with tempfile.TemporaryDirectory() as folder:
        lines = [("-c", "import torch"), ("-c", "import torch, erg"),
                 ("sample_toy.py", "--prompt", "a red seven", "--count", 1, "--out", folder)]
        spent = torch.tensor([[command(*line) for line in lines] for _ in range(2 if o.quick else 7)])
    yield "import torch", spent[:, 0], ""
    yield "import erg, on top of it", spent[:, 1] - spent[:, 0], "≤ 0.03"
    yield "a picture from shipped weights, torch included", spent[:, 2], "≤ 4"
    if not o.quick:
        seconds, notes = trained()
        share = notes["table"]["no guidance"]["prompt"]
        yield f"python train_toy.py (unguided prompt accuracy {share:.1%})", torch.tensor([seconds]), "≤ 150"


def learning(o):
    """MNIST after some minutes of training: Frechet distance without guidance, over the shipped model's"""
    more = ("--data-dir", o.data_dir) if o.data_dir else ()
    notes = {f"{minutes} minutes in all": trained("--minutes", minutes, *more, dataset="mnist")[1]
             for minutes in (4, 8, 16)}
    shipped = load_checkpoint(WEIGHTS / "mnist.pt")[3]
    notes[f"shipped, {shipped['training_minutes']} minutes of training"] = shipped
    for name, note in notes.items():
        row, own = note["table"]["no guidance"], shipped["table"]["no guidance"]["frechet"]
        yield f"{name}: prompt accuracy {row['prompt']:.1%}", torch.tensor([row["frechet"] / own]), ""


# ---- Growth ------------------------------------------------------------------------------------------------


def growth(o):
    """Exponents of time over those of the work, from a quarter of the largest size on"""
    def grow(name, sizes, calls, work):
        seconds = turns(o, *calls, least=3).median(dim=0).values.tolist()
        o.curves[name] = dict(sizes=sizes, seconds=seconds, work=[work(n) for n in sizes])
        first = max(i for i, n in enumerate(sizes) if 4 * n <= sizes[-1])
        grown = math.log(sizes[-1] / sizes[first])
        found, expected = (math.log(y[-1] / y[first]) / grown for y in (seconds, o.curves[name]["work"]))
        return f"{name}: {found:.2f} over {expected:.2f}", torch.tensor([found / expected]), "1 ± 0.1"

    models = [build(o, image_size=2 * n, width=64, depth=3, heads=2)
              for n in (8, 16, 32, 64)[:3 if o.quick else 4]]
    yield grow("image tokens", [m.side**2 for m in models], [step_of(m, 2, **i_erg(m)) for m in models],
               lambda n: flops(models[0].config, n + 6))
    sizes = [1, 4, 16, 64, *[256, 512][:2 * (not o.quick)]]
    yield grow("batch", sizes, [step_of(o.digits, n, **i_erg(o.digits)) for n in sizes], float)
    q, k, v = torch.randn(3, 1, 4, 1024, 64, device=o.chosen)
    sizes = [1, 2, 5, 10]
    yield grow("K", sizes, [lambda K=K: erg.energy_attention(q, k, v, tau=0.1, K=K) for K in sizes], float)
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
                                    processes, waiting, learning, growth)}


def estimate():
    """What large models would cost, from the rates of a training of CIFAR-10 on one H100."""
    rate, best = 102, 0.4 * 791  # TFLOP/s in bf16: measured, and 40 % of a matrix product's
    xl, sd3 = (Config(vocabulary=("a",), **sizes) for sizes in (XL, dict(width=1536, depth=24, heads=24)))
    image, picture = 3 * flops(xl) / 1e12, flops(sd3, 4096 + 333) / 1e12
    days, seconds = 7e6 * 256 * image / 8 / rate / 86400, 2 * 28 * picture / rate
    return f"""## What large models would cost

Worked out, not measured, from a training step of the CIFAR-10 model on one H100: 102 TFLOP/s, 13 % of the
matrix rate ([weights](../../weights/README.md#cifar-10)), and for 40 % of that rate.

- ImageNet at 256 pixels on 8 GPUs: training DiT-XL/2 takes {image:.2f} TFLOP an image. The 7 million
  steps of 256 images of its paper take {days:.0f} or {days * rate / best:.0f} days. To change: latents in
  place of pixels, images read from disk, Muon's products shared among the GPUs; and NCCL was never run.
- Stable Diffusion 3 (medium) at 1,024 pixels: {picture:.1f} TFLOP an evaluation of 4,429 tokens. A step has
  two, with CFG or ERG: 28 steps take {seconds:.1f} or {seconds * rate / best:.1f} s. ERG adds a
  product of the queries in a few layers, and one more encoding of the prompt. Nothing to change:
  `erg.rectify` runs in the pipeline.
"""


def met(value, goal):
    """Whether a value is as "≤ 1.02", "≥ 2", "1 ± 0.05" or "" says."""
    sign, limit = goal.split(" ", 1) if goal else ("", "")
    if sign == "1":
        return abs(value - 1) <= float(limit[2:])
    return not sign or (value <= float(limit) if sign == "≤" else value >= float(limit))


def page(found):
    """bench.md from what bench.json holds."""
    lines = ["# What it costs", "", "`python -m experiments.bench`: medians over turns of what is compared,",
             "and quartiles. Bold figures miss their goal.", ""]
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
    return "\n".join([*lines, "![Measured times, and lines as the work grows](bench.png)", "", estimate()])


def arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; all but learning if none")
    add("--quick", action="store_true", help="fewer sizes and turns: a try, not a result")
    add("--data-dir", type=place, help="for learning: folder with MNIST's files, downloaded when missing")
    add("--out", type=place, help="folder to write to (experiments/results; --quick: out/quick)")
    add("--device", choices=("cuda", "cpu"), help="cuda if it is there")
    return parser


def main(**given):
    o = argparse.Namespace(**given)
    for name in o.sections:
        data.check_name(SECTIONS, section=name)
    out = Path(o.out or runs.ROOT / ("out/quick" if o.quick else "experiments/results"))
    o.chosen, o.curves, o.seconds = choose_device(o.device), {}, 0.3 if o.quick else 5.0
    o.device = o.chosen.type
    o.synchronize = torch.cuda.synchronize if o.device == "cuda" else lambda: None
    o.digits, o.mnist = (runs.checkpoint(name, o.chosen)[0] for name in ("digits", "mnist"))
    found = {}
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((out / "bench.json").read_text())
    for name in o.sections or [name for name in SECTIONS if name != "learning"]:
        print(f"\n{SECTIONS[name].__doc__}", flush=True)
        rows = []
        with torch.set_grad_enabled(name == "training"):
            for what, values, goal in SECTIONS[name](o):
                values = values.double()
                spread = values.quantile(torch.tensor([0.5, 0.25, 0.75]).double()).tolist()
                rows.append(dict(what=what, quartiles=spread, turns=len(values), goal=goal))
                middle, low, high = spread
                print(f"  {what:60} {middle:9.3f}  ({low:.3f} to {high:.3f})  {goal}", flush=True)
        found[name] = dict(hardware=describe(o.chosen), torch=f"torch {torch.__version__}",
                           date=time.strftime("%Y-%m-%d"), rows=rows, curves=o.curves)
        found = {name: found[name] for name in SECTIONS if name in found}
        write_whole(out / "bench.json", lambda file: file.write(json.dumps(found, indent=1).encode()))
        write_whole(out / "bench.md", lambda file: file.write(page(found).encode()))
        if o.curves:
            draw_growth(o.curves, out / "bench.png")
            o.curves = {}
    print(f"\nWritten: {out / 'bench'}.*")


if __name__ == "__main__":
    run(main, arguments())
