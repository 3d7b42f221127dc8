"""One cached sampling run: a checkpoint, a task, a method with its settings, a seed -> a row of metrics.

    run = Run("digits", "text", "erg", dict(w=1.5, tau=0.01, layers=[1], tau_c=0.01), seed=0, images=256, steps=16)
    rows = collect([run])      # computed, or read from the cache; one process, or several under torchrun
    rows[run]["coverage"]

A run's name in the cache is a hash of all that decides its numbers: the settings, the weights' bytes, the seed and
VERSION, which must be raised when code changes what a run computes.
"""
import dataclasses
import functools
import hashlib
import json
import math
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

import erg
import train_toy
from experiments import data, rivals, variants
from experiments.metrics import ball_radii, frechet_distance, precision_recall_density_coverage, saturation

VERSION = 2
ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "out" / "cache"
TASKS = ("text", "class", "unconditional")

# ------------------------------------------------------------------------------------------------
# Methods by name
# ------------------------------------------------------------------------------------------------

class Method(NamedTuple):
    label: str  # in tables
    required: tuple  # parameters
    optional: tuple = ()
    nfe: int = 2  # function evaluations a step


RECTIFIER = ("tau", "layers", "kappa", "alpha", "gamma", "steps")
ERG, CADS = ("tau_c", *RECTIFIER, "negative"), ("tau1", "tau2", "scale")
METHODS = {
    "none": Method("no guidance", (), nfe=1),
    "cfg": Method("CFG", ("w",)),
    "interval": Method("CFG, interval", ("w", "low", "high")),
    "apg": Method("APG", ("w",), ("norm_threshold",)),
    "cads": Method("CADS", ("w",), CADS),
    "pag": Method("PAG*", ("w", "layers")),
    "sag": Method("SAG*", ("w", "layer"), ("sigma",)),
    "seg": Method("SEG*", ("w", "layers"), ("sigma", "cfg"), nfe=3),
    "autoguidance": Method("AutoGuidance", ("w",)),
    "erg": Method("ERG", ("w",), ERG),
    "erg+apg": Method("ERG + APG", ("w",), (*ERG, "norm_threshold")),
    "erg+cads": Method("ERG + CADS", ("w",), (*ERG, *CADS)),
}
COMPARED = tuple(METHODS)  # in Table 1; the others belong to Table 6 and to what goes beyond the paper
METHODS["mechanism"] = Method("", ("w", "mechanism", "layers", "kappa", "negative"), ("tau",))
METHODS["variant"] = Method("", ("w",), (*ERG, "w_end", "until", "renormalize", "taus", "norm_threshold"))


def build(method, parameters, weak=None):
    """What train_toy.generate takes as `settings`, for a method of METHODS; `weak` is AutoGuidance's weak model."""
    if method not in METHODS:
        raise ValueError(f"method={method!r} must be one of {', '.join(METHODS)}")
    required, optional = METHODS[method].required, METHODS[method].optional
    for name in parameters:
        if name not in required + optional:
            raise ValueError(f"{name}={parameters[name]!r} has no effect with method={method!r}, which obeys: "
                             f"{', '.join(required + optional) or 'nothing'}")
    for name in required:
        if name not in parameters:
            raise ValueError(f"{name} is missing for method={method!r}, which needs: {', '.join(required)}")
    if method == "mechanism":
        check_mechanism(parameters)
    p = dict(parameters)
    if method == "none":
        return None
    if method in ("cfg", "interval"):
        return erg.ERG(w=p["w"] if method == "cfg" else rivals.interval(p["w"], p["low"], p["high"]))
    apg = erg.APG(norm_threshold=p.pop("norm_threshold", 5.0)) if method in ("apg", "erg+apg") else None
    cads = {name: p.pop(name) for name in ("tau1", "tau2", "scale") if name in p}
    cads = erg.CADS(**cads) if method in ("cads", "erg+cads") else None
    if method in ("apg", "cads", "erg", "erg+apg", "erg+cads"):
        return erg.ERG(**p, apg=apg, cads=cads)
    return functools.partial(prepare_rival, method, p, weak)


def check_mechanism(p):
    """One clear error for a mechanism, or an option of it, that does not exist or would do nothing."""
    for name, allowed in (("mechanism", ("temperature", "identity", "smoothing")), ("negative", ("null", "same"))):
        if p[name] not in allowed:
            raise ValueError(f"{name}={p[name]!r} must be one of {', '.join(allowed)}")
    if ("tau" in p) != (p["mechanism"] == "temperature"):
        raise ValueError(f"mechanism={p['mechanism']!r} and tau={p.get('tau')!r}: tau goes with the temperature, and with it alone")


def prepare_rival(method, p, weak, model, tokens, null, seed):
    """(condition, guidance) of a method that is not an erg.ERG, for one batch of word numbers (B, L)."""
    p, condition, image = dict(p), model.encoder(tokens), slice(0, model.side**2)
    if method == "pag":
        return condition, rivals.pag(**p, queries=image)
    if method == "seg":
        p["sigma"] = math.inf if p.get("sigma") in (None, "inf") else p["sigma"]
        empty = model.encoder(null) if p.get("cfg", 1) != 1 else None
        return condition, rivals.seg(**p, side=model.side, null=empty)
    if method == "sag":
        return condition, rivals.SAG(**p, side=model.side)
    if method == "autoguidance":
        return condition, rivals.AutoGuidance(**p, weak=weak, condition=weak.encoder(tokens))
    if method == "mechanism":  # Table 6: three ways to weaken the same attention, at the same place
        tau = p.pop("tau", None)
        attention = {"temperature": functools.partial(erg.energy_attention, tau=tau), "identity": rivals.identity_attention,
                     "smoothing": rivals.SmoothedAttention(math.inf, model.side)}[p.pop("mechanism")]
        negative = model.encoder(null) if p.pop("negative") == "null" else None
        return condition, rivals.Rewired(**p, attention=attention, queries=image, negative=negative)
    extra = {name: p.pop(name) for name in ("until", "renormalize") if name in p}
    if "taus" in p:
        extra["taus"] = {int(layer): tau for layer, tau in p.pop("taus")}
    apg = erg.APG(norm_threshold=p.pop("norm_threshold")) if "norm_threshold" in p else None
    if "w_end" in p:
        p["w"] = variants.ramp(p["w"], p.pop("w_end"))
    settings = erg.ERG(**p, apg=apg)
    if not extra:
        return train_toy.prepare(settings, model, tokens, null, seed)
    if settings.tau != 1:
        settings = dataclasses.replace(settings, queries=image)
    condition, negative = settings.encode(model.encoder, tokens, null=null)
    return condition, variants.Variant(settings, negative, **extra)


# ------------------------------------------------------------------------------------------------
# One run
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """All that decides the numbers of a run; parameters hold numbers, strings and lists alone."""

    weights: str  # the name of a file under weights/, without .pt
    task: str  # what the prompt holds: the caption, the class alone, or nothing
    method: str
    parameters: dict
    seed: int
    images: int
    steps: int

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} must be one of {', '.join(TASKS)}")
        build(self.method, self.parameters)  # an unknown name shows now

    @functools.cached_property
    def key(self):
        state = dict(dataclasses.asdict(self), version=VERSION, digest=weights_digest(self.weights))
        if "cads" in self.method:
            state["noise"] = "its own stream"
        if self.method == "autoguidance":
            state["weak"] = weights_digest(f"{self.weights}-early")
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:24]

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return isinstance(other, Run) and self.key == other.key


def weights_file(name):
    return train_toy.WEIGHTS / f"{name}.pt"


@functools.cache
def weights_digest(name):
    return hashlib.sha256(weights_file(name).read_bytes()).hexdigest()


@functools.cache
def checkpoint(name, device="cpu"):
    """(model, classifier, reference features) of a shipped checkpoint; only the model is on `device`."""
    model, classifier, reference, _ = train_toy.load_checkpoint(weights_file(name))
    return model.to(device).requires_grad_(False), classifier.requires_grad_(False), reference


def attribute_words(model):
    """The attributes of a checkpoint's captions: {"digit": words, "ink": ..., "paper": ...} or {"object": words}."""
    if "horse" in model.config.vocabulary:
        return {"object": tuple(data.OBJECTS)}
    return {"digit": tuple(data.DIGITS), "ink": tuple(data.INKS), "paper": tuple(data.PAPERS)}


def draw_prompts(words, task, n, seed):
    """n prompts for a task, and the attributes (n, A) that they were made from; every class as often."""
    generator = torch.Generator().manual_seed(7_000_003 + seed)
    first, *others = words.values()
    labels = torch.arange(n) % len(first)
    labels = labels[torch.randperm(n, generator=generator)]
    if not others:
        captions = [data.caption(first[i]) for i in labels.tolist()]
        attributes = labels[:, None]
    else:
        pairs = torch.tensor([(i, p) for i, ink in enumerate(others[0]) for p, paper in enumerate(others[1]) if ink != paper])
        pair = pairs[torch.randint(len(pairs), (n,), generator=generator)]  # (n, 2)
        captions = [data.caption(first[d], others[0][i], others[1][p]) for d, (i, p) in zip(labels.tolist(), pair.tolist())]
        attributes = torch.cat([labels[:, None], pair], dim=1)
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


def sample_run(run, device="cpu", images=None):
    """The pictures of a run (n, C, S, S), its prompts, and their attributes."""
    model, *_ = checkpoint(run.weights, device)
    weak = checkpoint(f"{run.weights}-early", device)[0] if run.method == "autoguidance" else None
    prompts, attributes = draw_prompts(attribute_words(model), run.task, images or run.images, run.seed)
    settings = build(run.method, run.parameters, weak)
    return train_toy.generate(model, prompts, settings, run.steps, run.seed, batch=64), prompts, attributes


def compute(run, device="cpu"):
    """Sample and measure: a row of numbers, with the evaluations a step and image (nfe), and the seconds taken."""
    began = time.perf_counter()
    model, classifier, _ = checkpoint(run.weights, device)
    weak = [checkpoint(f"{run.weights}-early", device)[0]] if run.method == "autoguidance" else []
    evaluations = []
    counters = [m.register_forward_pre_hook(lambda module, args: evaluations.append(len(args[0]))) for m in (model, *weak)]
    try:
        x, _, attributes = sample_run(run, device)
    finally:
        for counter in counters:
            counter.remove()
    with torch.no_grad():
        features = train_toy.features_of(classifier, x)
        outputs = classifier.heads(features).split(classifier.classes, dim=1)
    row = dict(measure(run.weights, features), saturation=saturation(x),
               nfe=sum(evaluations) / (run.images * run.steps))
    right = torch.stack([y.argmax(1) for y in outputs], dim=1) == attributes  # (n, A)
    if run.task == "text":
        row.update({name: right[:, i].double().mean().item() for i, name in enumerate(attribute_words(model))})
        row["prompt"] = right.all(1).double().mean().item()
    elif run.task == "class":
        row["prompt"] = right[:, 0].double().mean().item()
    return dict(row, seconds=time.perf_counter() - began)


def measure(name, features):
    """Frechet distance and manifold metrics of features to all of a checkpoint's reference."""
    _, _, reference = checkpoint(name)
    return {"frechet": frechet_distance(reference, features),
            **precision_recall_density_coverage(reference, features, real_radius=reference_radii(name))}


@functools.cache
def reference_radii(name):
    return ball_radii(checkpoint(name)[2], 5)


def measure_real(name, seed, images):
    """The same for real images in place of samples: `images` of the reference against the rest of it."""
    _, _, reference = checkpoint(name)
    order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(seed))
    part, rest = reference[order[:images]], reference[order[images:]]
    return {"frechet": frechet_distance(rest, part), **precision_recall_density_coverage(rest, part)}


# ------------------------------------------------------------------------------------------------
# Many runs: cached, in one or several processes
# ------------------------------------------------------------------------------------------------


def read(run, cache):
    """The cached row, or None; a file that was cut short counts as missing."""
    try:
        return json.loads((cache / f"{run.key}.json").read_text())["row"]
    except (OSError, ValueError, KeyError):
        return None


def collect(runs, cache=CACHE, device=None, title="runs"):
    """{run: row} for all runs. What is not in the cache is computed and stored, so that a stopped call goes on.

    Under torchrun every process computes its share; all must call this with the same runs, and share the cache's disk.
    """
    cache, runs = Path(cache), list(dict.fromkeys(runs))
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = device or train_toy.choose_device()
    missing = [[i for i, run in enumerate(runs) if read(run, cache) is None]]
    if world > 1:
        dist.broadcast_object_list(missing)  # the first process has looked for all
    hardware = f"{world} process{'es' if world > 1 else ''} with {train_toy.describe(device)}"
    for i in tqdm(missing[0][rank::world], desc=title, unit="run", disable=rank > 0):
        run = runs[i]
        try:
            row = compute(run, device)
        except (ValueError, RuntimeError) as error:
            raise RuntimeError(f"{run}: {error}") from error
        record = dict(dataclasses.asdict(run), row=dict(row, hardware=hardware, torch=str(torch.__version__)))
        data.write_whole(cache / f"{run.key}.json", lambda file: file.write(json.dumps(record).encode()))
    if world > 1:
        dist.barrier()
    rows = {run: read(run, cache) for run in runs}
    lost = [run for run, row in rows.items() if row is None]
    if lost:
        raise RuntimeError(f"{len(lost)} runs are not in {cache}, which all processes must share, for example {lost[0]}")
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
