"""One cached run: a checkpoint, a task, a method with its settings, seeds -> a row of metrics.

    run = Run("digits", "text", "cfg", dict(w=1.5), seeds=[0, 1], images=400, steps=16)
    rows = collect([run])      # computed, or read from the cache; one process, or several under torchrun
    value(rows[run], "frechet")

A metric is a list: its value, then its value without each of BLOCKS parts of the images (see statistics.py).
Real images are as many as generated ones, held out from model and classifier, every class as often.
A run's name in the cache is a hash of all that decides its numbers: settings, weights and SOURCES.
"""
import ast
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.modules.module import register_module_forward_pre_hook
from tqdm import tqdm

import erg
from experiments import rivals  # noqa: F401  (its rows join toy.sampling.METHODS)
from experiments.statistics import jackknife
from tiny_dit import TinyDiT
from toy import data
from toy.files import write_whole
from toy.metrics import distances, features_of, frechet_distance
from toy.sampling import choose_device, describe, generate, load_checkpoint, prepare, weights_file

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "out" / "cache"
BF16 = False  # sample in bfloat16: --bf16 of the command line; a row says so, and its name does not
DATA = None  # the folder with mnist/ and cifar10/: --data
SOURCES = ("erg.py", "tiny_dit.py", "toy/data.py", "toy/files.py", "toy/metrics.py",  # what a run executes
           "toy/sampling.py", "experiments/rivals.py", "experiments/runs.py", "experiments/statistics.py")
TASKS = ("text", "class", "unconditional")
BLOCKS, NEIGHBOURS, ALL = 20, 3, -1  # ALL: no block is left out
MANIFOLD = ("precision", "recall", "density", "coverage")

# ---- One run -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """All that decides the numbers of a run; parameters hold numbers, strings and lists alone."""

    weights: str  # a name under weights/ or out/trainings/, without .pt
    task: str  # what the prompt holds: the caption, the class alone, or nothing
    method: str
    parameters: dict
    seeds: list
    images: int  # of all seeds together
    steps: int
    blocks: bool = True  # without each block, too, for all metrics; False: for the Frechet distance alone

    def __post_init__(self):
        data.check_name(TASKS, task=self.task)
        erg.check_numbers(whole=True, low=1, images=self.images, steps=self.steps)
        if self.images % (BLOCKS * len(self.seeds)):
            raise ValueError(f"images={self.images} must be a multiple of {BLOCKS} times {len(self.seeds)}, "
                             "the numbers of blocks and seeds")
        prepare(self.method, **self.parameters)  # an unknown name shows now

    @functools.cached_property
    def key(self):
        names = [self.weights, self.parameters.get("weak", self.weights), dataset(self.weights)]
        state = [dataclasses.asdict(self), code_digest(), *map(weights_digest, names)]
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:24]

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return isinstance(other, Run) and self.key == other.key


@functools.cache
def code_digest(root=ROOT):
    parsed = [ast.dump(ast.parse((root / name).read_bytes())) for name in SOURCES]  # comments do not count
    return hashlib.sha256("".join(parsed).encode()).hexdigest()


@functools.cache
def weights_digest(name):
    return hashlib.sha256(weights_file(name).read_bytes()).hexdigest()


def dataset(name):
    """The image set of a checkpoint: "mnist" of "mnist-full-0"."""
    return name.split("-")[0]


@functools.cache
def checkpoint(name, device="cpu"):
    """(model, classifier) of a checkpoint on `device`; mps lacks the classifier's pooling and float64."""
    model, classifier, *_ = load_checkpoint(weights_file(name), device)
    exact = "cpu" if torch.device(device).type == "mps" else device
    return model.requires_grad_(False), classifier.to(exact).requires_grad_(False)


def attribute_words(model):
    """The attributes of a checkpoint's captions: {"digit": its words, ...} or {"object": its words}."""
    if "horse" in model.config.vocabulary:
        return {"object": tuple(data.OBJECTS)}
    return {"digit": tuple(data.DIGITS), "ink": tuple(data.INKS), "paper": tuple(data.PAPERS)}


def draw_prompts(words, task, n, seed):
    """n prompts for a task, and the attributes (n, A) that they were made from; every class as often."""
    generator = torch.Generator().manual_seed(7_000_003 + seed)
    first, *others = words.values()
    labels = torch.arange(n) % len(first)
    labels = labels[torch.randperm(n, generator=generator)]
    attributes = labels[:, None]
    if others:
        inks, papers = others
        pairs = [(i, p) for i in range(len(inks)) for p in range(len(papers)) if inks[i] != papers[p]]
        pair = torch.tensor(pairs)[torch.randint(len(pairs), (n,), generator=generator)]  # (n, 2)
        attributes = torch.cat([attributes, pair], dim=1)
    spell = lambda row: data.caption(*(names[i] for names, i in zip(words.values(), row)))
    captions = [spell(row) for row in attributes.tolist()]
    if task == "class":
        captions = [f"a {first[i]}" for i in labels.tolist()]
    elif task == "unconditional":
        captions = [""] * n
    return captions, attributes


def small_batch(name, n, seed, device="cpu"):
    """model, noise (n, C, S, S), n captions, their encodings, and the null prompt's: for the diagnostics."""
    model = checkpoint(name, device)[0]
    prompts, _ = draw_prompts(attribute_words(model), "text", n, seed)
    shape = (n, model.config.channels, model.config.image_size, model.config.image_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    with torch.no_grad():
        return model, noise, prompts, model.encode(prompts), model.encode([""] * n)


def sample_run(run, device="cpu"):
    """The pictures of a run (n, C, S, S), and the attributes (n, A) of its prompts: seed after seed."""
    model, _ = checkpoint(run.weights, device)
    words, kind = attribute_words(model), torch.device(device).type
    prepared, n = prepare(run.method, **run.parameters), run.images // len(run.seeds)
    drawn = [draw_prompts(words, run.task, n, seed) for seed in run.seeds]
    with torch.autocast(kind, torch.bfloat16, enabled=BF16):
        x = [generate(model, prompts, prepared, run.steps, seed, 2000 if kind == "cuda" else 64)
             for seed, (prompts, _) in zip(run.seeds, drawn)]
    return torch.cat(x), torch.cat([attributes for _, attributes in drawn])


# ---- Real images, and metrics with their blocks ------------------------------------------------------------


@functools.cache
def real_features(name, n, which="reference", device="cpu"):
    """Features (n, F) and block numbers (n,) of real images, by the shipped classifier of an image set.

    "reference" is the first n of the test split, every class as often. "again" is another n: of the test
    split where it has so many, else of the training split. Handwriting that is too little is coloured anew.
    """
    source = data.load(name, DATA and Path(DATA) / name, "test")
    start = 0 if which == "reference" else n
    if start + n > len(source) and which == "again":
        source, start = data.load(name, DATA and Path(DATA) / name, "train"), 0
    generator = torch.Generator().manual_seed(len(which))
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
    one_hot = torch.nn.functional.one_hot(source.labels[order])
    number = (one_hot.cumsum(0) * one_hot).sum(1)  # of an image among those of its class
    order = order[number.argsort(stable=True)]
    rows = order.repeat(-(-(start + n) // len(order)))[start:start + n]
    x, _ = source.draw(rows, generator)
    return features_of(checkpoint(name, device)[1], x).double().to(device), (rows % BLOCKS).to(device)


@functools.cache
def reference_radii(name, n, device):
    """Distances to the k-th neighbour among real images: {ALL, or the block that is left out: (n',)}."""
    real, block = real_features(name, n, "reference", device)
    between = distances(real, real)
    keep = {b: block != b for b in (ALL, *range(BLOCKS))}
    return {b: between[rows][:, rows].kthvalue(NEIGHBOURS + 1).values for b, rows in keep.items()}


def measure(fake, block, name, blocks=True):
    """{metric: [value, value without block 0, ...]} of features (n, F) against as many real images."""
    n, device = len(fake), fake.device
    real, real_block = real_features(name, n, "reference", device)
    parts = {b: (real_block != b, block != b) for b in (ALL, *range(BLOCKS))}
    row = {"frechet": [frechet_distance(real[r], fake[f]) for r, f in parts.values()]}
    radii, between, own = reference_radii(name, n, device), distances(real, fake), distances(fake, fake)
    for b, (r, f) in list(parts.items())[:None if blocks else 1]:
        distance, radius = between[r][:, f], own[f][:, f].kthvalue(NEIGHBOURS + 1).values
        inside = distance < radii[b][:, None]  # a generated image lies in the ball of a real one
        balls = inside.double().sum(0) / NEIGHBOURS
        found = (inside.any(0), (distance < radius).any(1), balls, inside.any(1))
        for metric, y in zip(MANIFOLD, found):
            row.setdefault(metric, []).append(y.double().mean().item())
    return row


def measure_real(name, n, device="cpu"):
    """The row of other real images: what no method can be expected to beat."""
    return measure(*real_features(name, n, "again", device), name)


def value(row, metric):
    """A metric of a row; the Frechet distance is extrapolated to infinitely many images."""
    return jackknife(row[metric][0], row[metric][1:])[0] if metric == "frechet" else row[metric][0]


def compute(run, device="cpu"):
    """Sample and measure: a row of metrics, evaluations a step and image (nfe), and seconds."""
    began, evaluations, name = time.perf_counter(), [], dataset(run.weights)

    def count(module, args):
        if isinstance(module, TinyDiT):
            evaluations.append(len(args[0]))

    counter = register_module_forward_pre_hook(count)  # AutoGuidance's weak model counts, too
    try:
        x, attributes = sample_run(run, device)
    finally:
        counter.remove()
    classifier = checkpoint(name, device)[1]  # one judge for all trainings of an image set
    exact = next(classifier.parameters()).device
    features = features_of(classifier, x).to(exact)
    block = torch.arange(len(x), device=exact) % BLOCKS
    row = measure(features.double(), block, name, run.blocks)
    outputs = classifier.heads(features).split(classifier.classes, dim=1)
    right = torch.stack([y.argmax(1).cpu() for y in outputs], dim=1) == attributes  # (n, A)
    if run.task != "unconditional":
        right = right.all(1) if run.task == "text" else right[:, 0]
        row["prompt"] = [right.double().mean().item(),
                         *(right[block.cpu() != b].double().mean().item() for b in range(BLOCKS))]
        row["right"] = "".join("01"[y] for y in right.tolist())
    return dict(row, nfe=sum(evaluations) / (run.images * run.steps), seconds=time.perf_counter() - began)


# ---- Many runs: cached, in one or several processes --------------------------------------------------------


def record(run, row):
    """A file of the cache: settings, row, and a digest of both; ValueError if a number is not finite."""
    numbers = json.dumps(row, allow_nan=False, sort_keys=True)
    digest = hashlib.sha256(f"{run.key} {numbers}".encode()).hexdigest()
    return json.dumps(dict(dataclasses.asdict(run), row=row, digest=digest), sort_keys=True)


def read(run, cache):
    """The cached row, or None. A file that is not what `record` makes of the run is named and passed over."""
    path = cache / f"{run.key}.json"
    if os.path.lexists(path):
        with contextlib.suppress(ValueError, TypeError, LookupError, RecursionError):
            text = path.read_text()
            row = json.loads(text)["row"]
            if text == record(run, row):
                return row
        print(f"{path} is damaged, or another run's: it is computed again", file=sys.stderr)
    return None


def collect(runs, cache=CACHE, device=None, title="runs"):
    """{run: row} for all runs. What is not in the cache is computed and stored: a stopped call goes on.

    Under torchrun every process computes its share; all must call this with the same runs, and share the
    cache's disk.
    """
    cache, runs = Path(cache), list(dict.fromkeys(runs))
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = device or choose_device()
    missing = [[i for i, run in enumerate(runs) if read(run, cache) is None] if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(missing)  # the first process has looked for all
    hardware = f"{world} process{'es' * (world > 1)} with {describe(device)}{', bfloat16' * BF16}"
    for i in tqdm(missing[0][rank::world], desc=title, unit="run", disable=rank > 0, mininterval=5):
        run = runs[i]
        try:
            text = record(run, dict(compute(run, device), hardware=hardware, torch=str(torch.__version__)))
        except (ValueError, RuntimeError) as error:
            raise RuntimeError(f"{run}: {error}") from error
        write_whole(cache / f"{run.key}.json", lambda file: file.write(text.encode()))
    if world > 1:
        dist.barrier()
    rows = {run: read(run, cache) for run in runs}
    lost = [run for run, row in rows.items() if row is None]
    if lost:
        raise RuntimeError(f"{len(lost)} runs are not in {cache}, which all processes must share, "
                           f"for example {lost[0]}")
    return rows


def start_processes(device):
    """Join the other processes of torchrun, if there are any, and share the processor's cores with them."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
        dist.init_process_group("gloo", timeout=timedelta(hours=12))
