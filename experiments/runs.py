"""One cached sampling run: a checkpoint, a task, a method with its settings, a seed -> a row of metrics.

    run = Run("digits", "text", "cfg", dict(w=1.5), seed=0, images=256, steps=16)
    rows = collect([run])      # computed, or read from the cache; one process, or several under torchrun
    rows[run]["coverage"]

A run's name in the cache is a hash of all that decides its numbers: settings, weights, SOURCES and torch's
version. Its file is what `record` makes of the run and its row. One that differs is computed again.
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
from experiments import rivals, variants  # noqa: F401  (their rows join toy.sampling.METHODS)
from tiny_dit import TinyDiT
from toy import data
from toy.files import write_whole
from toy.metrics import (ball_radii, features_of, frechet_distance, precision_recall_density_coverage,
                         saturation)
from toy.sampling import WEIGHTS, choose_device, describe, generate, load_checkpoint, prepare

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "out" / "cache"
BF16 = False  # sample in bfloat16: --bf16 of the command line
SOURCES = ("erg.py", "tiny_dit.py", "toy/data.py", "toy/files.py", "toy/metrics.py",  # what a run executes
           "toy/sampling.py", "experiments/rivals.py", "experiments/variants.py", "experiments/runs.py")
TASKS = ("text", "class", "unconditional")

# ---- One run -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """All that decides the numbers of a run; parameters hold numbers, strings and lists alone."""

    weights: str  # a file without its .pt: a name under weights/, or a whole path
    task: str  # what the prompt holds: the caption, the class alone, or nothing
    method: str
    parameters: dict
    seed: int
    images: int
    steps: int

    def __post_init__(self):
        data.check_name(TASKS, task=self.task)
        erg.check_numbers(whole=True, low=1, images=self.images, steps=self.steps)
        prepare(self.method, **self.parameters)  # an unknown name shows now

    @functools.cached_property
    def key(self):
        names = [self.weights, self.parameters.get("weak", self.weights)]  # AutoGuidance has a second model
        state = [dataclasses.asdict(self), code_digest(), str(torch.__version__), BF16]
        state += map(weights_digest, names)
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
    if not (WEIGHTS / f"{name}.pt").is_file():
        data.check_name(sorted(file.stem for file in WEIGHTS.glob("*.pt")), weights=name)
    return hashlib.sha256((WEIGHTS / f"{name}.pt").read_bytes()).hexdigest()


@functools.cache
def checkpoint(name, device="cpu"):
    """(model, classifier, reference features) of a shipped checkpoint on `device`; mps lacks float64."""
    model, classifier, reference, _ = load_checkpoint(WEIGHTS / f"{name}.pt", device)
    exact = "cpu" if torch.device(device).type == "mps" else device
    return model.requires_grad_(False), classifier.to(exact).requires_grad_(False), reference.to(exact)


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
    """The pictures of a run (n, C, S, S), and the attributes (n, A) of its prompts."""
    model, *_ = checkpoint(run.weights, device)
    prompts, attributes = draw_prompts(attribute_words(model), run.task, run.images, run.seed)
    prepared = prepare(run.method, **run.parameters)
    kind = torch.device(device).type
    with torch.autocast(kind, torch.bfloat16, enabled=BF16):
        x = generate(model, prompts, prepared, run.steps, run.seed, 2000 if kind == "cuda" else 64)
    return x, attributes


def compute(run, device="cpu"):
    """Sample and measure: a row of numbers, evaluations a step and image (nfe) and seconds among them."""
    began, evaluations = time.perf_counter(), []
    model, classifier, reference = checkpoint(run.weights, device)

    def count(module, args):
        if isinstance(module, TinyDiT):
            evaluations.append(len(args[0]))

    counter = register_module_forward_pre_hook(count)  # AutoGuidance's weak model counts, too
    try:
        x, attributes = sample_run(run, device)
    finally:
        counter.remove()
    with torch.no_grad():
        features = features_of(classifier, x).to(reference.device)
        outputs = classifier.heads(features).split(classifier.classes, dim=1)
    radius = reference_radii(run.weights, device)
    row = {"frechet": frechet_distance(reference, features),
           **precision_recall_density_coverage(reference, features, real_radius=radius),
           "saturation": saturation(x), "nfe": sum(evaluations) / (run.images * run.steps)}
    right = torch.stack([y.argmax(1).cpu() for y in outputs], dim=1) == attributes  # (n, A)
    if run.task == "text":
        row.update(zip(attribute_words(model), right.double().mean(0).tolist()))
        row["prompt"] = right.all(1).double().mean().item()
    elif run.task == "class":
        row["prompt"] = right[:, 0].double().mean().item()
    return dict(row, seconds=time.perf_counter() - began)


@functools.cache
def reference_radii(name, device):
    return ball_radii(checkpoint(name, device)[2], 5)


def measure_real(name, seed, images):
    """Metrics of real images in place of samples: `images` of the reference against the rest of it."""
    _, _, reference = checkpoint(name)
    order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(seed))
    part, rest = reference[order[:images]], reference[order[images:]]
    return {"frechet": frechet_distance(rest, part), **precision_recall_density_coverage(rest, part)}


# ---- Many runs: cached, in one or several processes --------------------------------------------------------


def record(run, row):
    """A file of the cache: settings, row, and a digest of both; ValueError if a number is not finite."""
    digest = hashlib.sha256(f"{run.key} {json.dumps(row, allow_nan=False)}".encode()).hexdigest()
    return json.dumps(dict(dataclasses.asdict(run), row=row, digest=digest))


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
    hardware = f"{world} process{'es' if world > 1 else ''} with {describe(device)}"
    for i in tqdm(missing[0][rank::world], desc=title, unit="run", disable=rank > 0):
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
        else:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
        dist.init_process_group("gloo", timeout=timedelta(hours=12))
