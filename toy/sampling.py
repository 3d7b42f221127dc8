"""Sampling with any method, from any checkpoint.

    model, classifier, reference, notes = load_checkpoint(WEIGHTS / "digits.pt")
    parameters = recommended("erg", "digits", w=2.0)           # the data set's settings, with another w
    images = generate(model, ["a red seven on blue"], prepare("erg", **parameters), steps=25)

`METHODS` is the one table of methods. Parameters have the paper's symbols: w, tau_i, tau_c, alpha, gamma, K,
kappa, layers. Conventions: t = 0 is noise, t = 1 is data; w = 1 is no guidance. See erg.py.
"""
import dataclasses
import math
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import erg
from tiny_dit import Config, TinyDiT, sample, tokenize
from toy import data, files
from toy.metrics import AttributeClassifier

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
TRAININGS = WEIGHTS.parent / "out" / "trainings"  # more of them: python -m experiments.evidence trainings

GUIDANCE = {
    "digits": dict(w=1.5, tau_i=0.01, tau_c=0.01, kappa=0.2, layers=range(1, 2)),
    "mnist": dict(w=1.5, tau_i=0.01, tau_c=0.01, kappa=0.2, layers=range(2, 4)),
    "cifar10": dict(w=1.5, tau_i=0.01, tau_c=0.01, kappa=0.2, layers=range(3, 5)),
}

# ------------------------------------------------------------------------------------------------
# Devices and checkpoints
# ------------------------------------------------------------------------------------------------


def choose_device(name=None):
    """The device of that name, or the fastest that is there; ValueError for one that is not."""
    gpus, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if name is None:
        several = int(os.environ.get("WORLD_SIZE", 1)) > 1  # which mps does not support
        name = "cuda" if gpus else "mps" if mps and not several else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    there = ["cpu", *["mps"] * mps, *["cuda"] * (gpus > 0), *(f"cuda:{i}" for i in range(gpus))]
    if name not in there:
        raise ValueError(f"device={name!r} is not there; this computer has: {', '.join(there)}")
    return torch.device(name)


def describe(device):
    """The hardware, for the record of a run."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}"


def weights_file(name):
    """The file of a checkpoint's name: under weights/, or out/trainings/."""
    files = {file.stem: file for folder in (TRAININGS, WEIGHTS) for file in folder.glob("*.pt")}
    data.check_name(sorted(files), weights=name)
    return files[name]


def half(state):
    return {name: value.cpu().half() if value.is_floating_point() else value.cpu()
            for name, value in state.items()}


def export(path, model, classifier, reference, notes):
    """Write what users need in half precision, and how it was made."""
    files.save(path, dict(config=dataclasses.asdict(model.config), model=half(model.state_dict()),
                          classes=classifier.classes, network=classifier.network,
                          classifier=half(classifier.state_dict()), reference=reference.half(), notes=notes))


def load_checkpoint(path, device="cpu"):
    """A file written by `export` -> (model, classifier, reference features (n, F), notes), in float32."""
    shipped = ", ".join(sorted(file.stem for file in WEIGHTS.glob("*.pt"))) or "none"
    with files.load(path, f"weights of train_toy.py, or one of weights/: {shipped}", device) as state:
        model = TinyDiT(Config(**state["config"])).to(device)
        model.load_state_dict(state["model"])
        classifier = AttributeClassifier(state["classes"], state.get("network", "plain")).to(device)
        classifier.load_state_dict(state["classifier"])
        return model.eval(), classifier.eval(), state["reference"].float().cpu(), state["notes"]


# ------------------------------------------------------------------------------------------------
# CADS, which anneals the condition before guidance sees it
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CADS:
    """Condition-annealed sampling (Sadat et al., arXiv 2310.17347): noise on the condition, early on."""

    tau1: float = 0.6  # in CADS' own time, 1 - t: no noise below tau1,
    tau2: float = 0.9  # nothing but noise above tau2
    scale: float = 0.25  # s
    psi: float = 1.0  # 1 rescales to the condition's own mean and deviation, 0 does not

    def __post_init__(self):
        erg.check_numbers(low=0, high=1, tau1=self.tau1, tau2=self.tau2, psi=self.psi)
        erg.check_numbers(above=0, scale=self.scale)
        erg.check_numbers(above=self.tau1, tau2=self.tau2)

    def anneal(self, y, t, generators=None):
        """sqrt(g) * y + scale * sqrt(1 - g) * noise, rescaled, for a condition y (B, L, W) at time t.

        g rises from 0 to 1 with t. Mean, deviation and noise are each sample's own: batches do not matter.
        """
        g = min(1.0, max(0.0, (self.tau2 - (1 - t)) / (self.tau2 - self.tau1)))
        if g == 1:
            return y
        noise = torch.randn_like(y) if generators is None else \
            torch.stack([torch.randn(y.shape[1:], generator=generator) for generator in generators])
        noisy = math.sqrt(g) * y + self.scale * math.sqrt(1 - g) * noise.to(y)
        dims = tuple(range(1, y.dim()))
        std, mean = torch.std_mean(noisy, dims, keepdim=True)
        target_std, target_mean = torch.std_mean(y, dims, keepdim=True)
        rescaled = (noisy - mean) / std.clamp_min(1e-12) * target_std + target_mean
        return self.psi * rescaled + (1 - self.psi) * noisy


# ------------------------------------------------------------------------------------------------
# Methods
# ------------------------------------------------------------------------------------------------


def guided_by(settings, cads=None):
    """What `generate` asks for each batch, for an erg.ERG: a function that returns (condition, guidance)."""
    def condition_and_guidance(model, tokens, null, seed):
        s = settings
        if s.tau_i != 1 and s.queries is None:
            s = dataclasses.replace(s, queries=slice(0, model.side**2))  # tau on image tokens: Listing 2
        condition, negative = s.encode(model.encoder, tokens, null=null)
        if cads is None:
            return condition, erg.Guidance(s, negative)
        if s.negative == "same":  # as the prompt says it, not as CADS anneals it
            s, negative = dataclasses.replace(s, negative="null"), condition
        guidance = erg.Guidance(s, negative)
        generators = [torch.Generator().manual_seed((seed + row) % 2**32) for row in range(len(tokens))]
        return condition, lambda model, x, t, y: guidance(model, x, t, cads.anneal(y, t, generators))
    return condition_and_guidance


def build_none():
    return lambda model, tokens, null, seed: (model.encoder(tokens), None)


def build_erg(**p):
    return guided_by(erg.ERG(**p))


def build_apg(norm_threshold=5.0, **p):
    return guided_by(erg.ERG(**p, apg=erg.APG(norm_threshold=norm_threshold)))


def build_cads(**p):
    cads = CADS(**{name: p.pop(name) for name in ANNEALING if name in p})
    return guided_by(erg.ERG(**p), cads)


@dataclass(frozen=True)
class Method:
    """A row of METHODS. `build(**parameters)` returns a function (model, tokens (B, L), null (B, L), seed).

    It returns condition and guidance of a batch; guidance None is the model alone. Sample i has seed + i.
    """

    label: str  # in tables
    colour: str  # in figures, told apart by the colour-blind (Okabe and Ito's palette)
    build: Callable
    required: tuple = ()
    optional: tuple = ()
    nfe: int = 2  # function evaluations a step


I_ERG, ANNEALING = ("tau_i", "alpha", "gamma", "K", "kappa", "layers", "negative"), ("tau1", "tau2", "scale")
ERG = ("tau_c", *I_ERG)
METHODS = {
    "none": Method("no guidance", "#7f7f7f", build_none, nfe=1),
    "cfg": Method("CFG", "#0072B2", build_erg, ("w",)),
    "apg": Method("APG", "#009E73", build_apg, ("w",), ("norm_threshold",)),
    "cads": Method("CADS", "#8DA0CB", build_cads, ("w",), ANNEALING),
    "c-erg": Method("C-ERG", "#E69F00", build_erg, ("w", "tau_c")),
    "i-erg": Method("I-ERG", "#CC79A7", build_erg, ("w",), I_ERG),
    "erg": Method("ERG", "#D55E00", build_erg, ("w",), ERG),
    "erg+apg": Method("ERG + APG", "#A50F15", build_apg, ("w",), (*ERG, "norm_threshold")),
    "erg+cads": Method("ERG + CADS", "#FB6A4A", build_cads, ("w",), (*ERG, *ANNEALING)),
}


def prepare(method, **parameters):
    """The method with its parameters, as `generate` takes it.

    Raises ValueError for an unknown method, for a parameter that it ignores, and for one that it lacks.
    """
    data.check_name(METHODS, method=method)
    row = METHODS[method]
    obeyed = (*row.required, *row.optional)
    for name, value in parameters.items():
        if name not in obeyed:
            raise ValueError(f"{name}={value!r} has no effect with method={method!r}, "
                             f"which obeys: {', '.join(obeyed) or 'nothing'}")
    missing = [name for name in row.required if name not in parameters]
    if missing:
        raise ValueError(f"{missing[0]} is missing for method={method!r}, "
                         f"which needs: {', '.join(row.required)}")
    return row.build(**parameters)


def recommended(method, dataset, **given):
    """Parameters of a method: those of `given` that are not None, the others from GUIDANCE."""
    data.check_name(METHODS, method=method)
    data.check_name(GUIDANCE, dataset=dataset)
    obeyed = METHODS[method].required + METHODS[method].optional
    chosen = {name: value for name, value in GUIDANCE[dataset].items() if name in obeyed}
    return chosen | {name: value for name, value in given.items() if value is not None}


@torch.no_grad()
def generate(model, captions, prepared=None, steps=25, seed=0, batch=128):
    """Images (n, C, S, S) in [-1, 1] for n captions; the same seed gives every method the same noise.

    `prepared` comes from `prepare`; None is no guidance.
    """
    erg.check_numbers(whole=True, low=1, batch=batch)
    erg.check_numbers(whole=True, low=0, high=2**63 - 1, seed=seed)
    config, device = model.config, model.positions.device
    prepared = prepared or build_none()
    shape = (len(captions), config.channels, config.image_size, config.image_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    tokens, null = tokenize(captions, config), tokenize([""], config)
    images = []
    for i in range(0, len(captions), batch):
        part = tokens[i:i + batch].to(device)  # (B, L)
        first = 1_000_000_007 + 1_000_003 * seed + i  # CADS' noise is another stream than the images'
        condition, guidance = prepared(model, part, null.expand(len(part), -1).to(device), first)
        x = sample(model, noise[i:i + batch].to(device), condition, steps, guidance)  # (B, C, S, S)
        images.append(x.clamp(-1, 1).cpu())
    return torch.cat(images)
