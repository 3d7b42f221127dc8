"""Train a tiny text-to-image flow on real images, then compare no guidance, CFG and ERG on it.

    python train_toy.py                                          # the shipped digits: 4 minutes, 2 CPU cores
    python train_toy.py --dataset mnist --data-dir data/mnist    # downloaded when missing
    python train_toy.py --dataset mnist --resume                 # go on where it was stopped
    torchrun --standalone --nproc_per_node 2 train_toy.py --dataset cifar10   # several GPUs, same global batch
    python train_toy.py --prompt "a red seven on blue" --method erg --w 2   # sample from shipped weights
    python train_toy.py --dataset mnist --compare                # all methods on them, in one table

Training writes under --out: DATASET.pt (the averaged model in half precision, its classifier and
reference features), DATASET-early.pt (the same after 1/16 of the training, a weak model),
DATASET-training.pt (everything that --resume needs), DATASET.png, DATASET-loss.png, DATASET.json.

Conventions: t = 0 is noise, t = 1 is data; w = 1 is no guidance. See erg.py.
"""
import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import erg
from experiments import data
from experiments.metrics import frechet_distance, precision_recall_density_coverage
from tiny_dit import Config, TinyDiT, drop_words, flow_matching_loss, sample, tokenize

WEIGHTS = Path(__file__).resolve().parent / "weights"
BINS = 8  # of t, for the loss curve


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is particular to a data set: the model's size, the training's length, the settings of guidance."""

    model: dict  # arguments of tiny_dit.Config
    iterations: int
    batch: int
    lr: float
    t_mean: float  # of the logit of t in training: below 0 puts more of it on noisy images
    samples: int  # images for the table
    w: float
    tau_i: float
    tau_c: float
    kappa: float
    layers: tuple  # l_min, l_max (exclusive)


RECIPES = {
    "digits": Recipe(dict(image_size=8, patch=2, width=96, depth=8, heads=4), iterations=1100, batch=64, lr=2e-3,
                     t_mean=0.0, samples=360, w=1.5, tau_i=0.01, tau_c=0.01, kappa=0.2, layers=(1, 2)),
    "mnist": Recipe(dict(image_size=28, patch=4, width=96, depth=8, heads=4), iterations=14_000, batch=64, lr=2e-3,
                    t_mean=-0.6, samples=1000, w=1.5, tau_i=0.01, tau_c=0.01, kappa=0.2, layers=(2, 4)),
    "cifar10": Recipe(dict(image_size=32, patch=2, width=384, depth=12, heads=6), iterations=100_000, batch=256,
                      lr=5e-4, t_mean=0.0, samples=2000, w=2.0, tau_i=0.01, tau_c=0.01, kappa=0.2, layers=(4, 8)),
}

# ------------------------------------------------------------------------------------------------
# Attribute classifier: prompt accuracy, and features for the metrics
# ------------------------------------------------------------------------------------------------


class AttributeClassifier(nn.Module):
    """A small convolutional network with one head an attribute.

    `features` are its last hidden layer, each normalized to variance 1 over the training images, so that a
    Frechet distance is in units of standard deviations.
    """

    def __init__(self, classes, hidden=64):
        super().__init__()
        self.classes = tuple(classes)
        layers, channels = [], 3
        for width in (32, 64, 64):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            channels = width
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(3), nn.Flatten(),
                                      nn.Linear(9 * channels, hidden), nn.BatchNorm1d(hidden, affine=False))
        self.heads = nn.Sequential(nn.ReLU(), nn.Linear(hidden, sum(classes)))

    def forward(self, x):  # (B, 3, S, S) -> A tensors (B, classes)
        return self.heads(self.features(x)).split(self.classes, dim=1)

    def accuracy(self, x, attributes):
        """Share of images whose attributes are recognized, an entry an attribute, and "prompt": all at once."""
        right = (torch.stack([y.argmax(1) for y in self(x)], dim=1) == attributes).cpu()  # (B, A)
        return right.double().mean(0).tolist() + [right.all(1).double().mean().item()]


def train_classifier(images, iterations, batch=128, lr=3e-3, seed=0, device="cpu"):
    """Fit an AttributeClassifier to `images` (data.Images); returned in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AttributeClassifier([len(words) for words in images.attributes.values()]).to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    for i in tqdm(range(iterations), desc="classifier", leave=False, disable=not main_process()):
        optimizer.param_groups[0]["lr"] = lr * (1 - i / iterations)
        x, _, attributes = images.batch(torch.randint(len(images), (batch,), generator=generator), generator)
        outputs = model(x.to(device))
        loss = sum(F.cross_entropy(y, attributes[:, k].to(device)) for k, y in enumerate(outputs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def main_process():
    return not dist.is_initialized() or dist.get_rank() == 0


def learning_rate(step, iterations, lr, schedule, warmup=100):
    """Linear warm-up, then a cosine, or constant with a linear decay over the last 40 %."""
    done = step / iterations
    decay = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else min(1.0, (1 - done) / 0.4)
    return lr * min(1.0, (step + 1) / warmup) * decay


def draw_batch(images, config, batch, t_mean, seed, step):
    """Everything random in step `step`, a function of the seed and the step alone.

    So a resumed run sees the same batches, and so do several processes, each of which takes its part.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    x, captions, _ = images.batch(torch.randint(len(images), (batch,), generator=generator), generator)
    tokens = drop_words(tokenize(captions, config), generator=generator)
    t = (t_mean + torch.randn(batch, generator=generator)).sigmoid()  # logit-normal (Esser et al., 2024)
    return x, tokens, t, torch.randn(x.shape, generator=generator)


class Loss(nn.Module):
    """Model and loss in one module, as DistributedDataParallel and torch.compile want it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, tokens, t, noise):
        return flow_matching_loss(self.model, x, self.model.encoder(tokens), t, noise)  # (B,)


class Interrupt:
    """Inside `with`, Ctrl-C and SIGTERM only set `.stop`, so that a step is never cut in two."""

    def __enter__(self):
        self.stop, self.before = False, {}
        with contextlib.suppress(ValueError):  # not the main thread: signals stay as they are
            self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        if self.stop:  # a second time: at once
            raise KeyboardInterrupt
        self.stop = True

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def save_atomically(state, path):
    data.write_whole(path, lambda file: torch.save(state, file))


def train(images, recipe, out, *, iterations, batch, lr, schedule, ema, clip, seed, device, compile, resume,
          save_every, log_every=10):
    """Train, and return (averaged model, early averaged model, loss curve, seconds, stopped).

    The loss curve is (iterations / log_every, BINS): mean loss by bin of t, NaN where a bin was empty.
    """
    config = Config(vocabulary=images.vocabulary, **recipe.model)
    torch.manual_seed(seed)
    model = TinyDiT(config).to(device)
    average = TinyDiT(config).to(device).requires_grad_(False)
    average.load_state_dict(model.state_dict())
    early = {}
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=device.type == "cuda")
    settings = dict(dataset=images.name, iterations=iterations, batch=batch, lr=lr, schedule=schedule, ema=ema,
                    clip=clip, t_mean=recipe.t_mean, seed=seed, config=dataclasses.asdict(config))
    path, start, seconds, curve = out / f"{images.name}-training.pt", 0, 0.0, torch.zeros(0, BINS)
    if resume:
        state = load_training_state(path, settings)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds, curve, early = state["step"], state["seconds"], state["curve"], state["early"]

    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    loss_of = Loss(model)
    if world > 1:
        loss_of = nn.parallel.DistributedDataParallel(loss_of, device_ids=[device.index] if device.index is not None else None)
    if compile:
        loss_of = torch.compile(loss_of)
    part = slice(rank * batch // world, (rank + 1) * batch // world)
    bins = torch.zeros(2, BINS, device=device)  # sums and counts since the last log
    began, stop = time.time() - seconds, False

    def save(step):
        if main_process():
            save_atomically(dict(settings=settings, step=step, seconds=time.time() - began, curve=curve, early=early,
                                 model=model.state_dict(), average=average.state_dict(),
                                 optimizer=optimizer.state_dict()), path)

    bar = tqdm(total=iterations * batch, initial=start * batch, unit="img", unit_scale=True, desc=images.name,
               disable=not main_process(), mininterval=1.0)
    with Interrupt() as interrupt, bar:
        for step in range(start, iterations):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, iterations, lr, schedule)
            x, tokens, t, noise = (y[part].to(device)
                                   for y in draw_batch(images, config, batch, recipe.t_mean, seed, step))
            with torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext():
                losses = loss_of(x, tokens, t, noise)
            optimizer.zero_grad(set_to_none=True)
            losses.mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            rate = min(ema, (step + 1) / (step + 10))  # a short memory at first
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - rate)
                which = (t * BINS).long().clamp_max(BINS - 1)
                bins.index_add_(1, which, torch.stack([losses.float(), torch.ones_like(t)]))
            done = step + 1
            if done % log_every == 0 or done == iterations:
                if world > 1:
                    dist.all_reduce(bins)
                curve = torch.cat([curve, (bins[0] / bins[1]).cpu()[None]])
                total = (bins[0].sum() / bins[1].sum()).item()
                bins.zero_()
                bar.set_postfix(loss=f"{total:.4f}", refresh=False)
                if not math.isfinite(total):
                    raise FloatingPointError(f"the loss is {total} at step {done}; try a smaller --lr than {lr}")
                stop = agreed(interrupt.stop, device)
            bar.update(batch)
            if done == max(1, iterations // 16):
                early = {name: value.clone() for name, value in average.state_dict().items()}
            if stop or done == iterations or (save_every and done % save_every == 0 and done % log_every == 0):
                save(done)
            if stop:
                break
    weak = TinyDiT(config).to(device)
    weak.load_state_dict(early or average.state_dict())
    return average.eval(), weak.eval(), curve, time.time() - began, stop


def agreed(stop, device):
    """Whether any process was asked to stop: all must leave the loop at the same step."""
    if not dist.is_initialized():
        return stop
    flag = torch.tensor(float(stop), device=device)
    dist.all_reduce(flag)
    return flag.item() > 0


def load_training_state(path, settings):
    """The state to resume from; a clear error when there is none, or when it belongs to other settings."""
    if not path.is_file():
        raise FileNotFoundError(f"--resume: {path} does not exist; start without --resume, or name its folder with --out "
                                "(several machines need a shared one)")
    state = torch.load(path, map_location="cpu", weights_only=True)
    changed = {name: (old, settings[name]) for name, old in state["settings"].items() if old != settings[name]}
    if changed:
        name, (old, new) = next(iter(changed.items()))
        raise ValueError(f"--resume: {path} was trained with {name}={old!r}, not {new!r}; give the same settings")
    return state


# ------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------


def half(state):
    return {name: value.half() if value.is_floating_point() else value for name, value in state.items()}


def export(path, model, classifier, reference, notes):
    """Write what users need, in half precision: model, classifier, reference features, and how it was made."""
    save_atomically(dict(config=dataclasses.asdict(model.config), model=half(model.state_dict()),
                         classes=classifier.classes, classifier=half(classifier.state_dict()),
                         reference=reference.half(), notes=notes), path)


def load_checkpoint(path, device="cpu"):
    """A file written by `export` -> (model, classifier, reference features (n, F), notes), in float32."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint={str(path)!r} does not exist; train one with train_toy.py, "
                                f"or use one of: {', '.join(sorted(map(str, WEIGHTS.glob('*.pt')))) or 'none shipped'}")
    state = torch.load(path, map_location=device, weights_only=True)
    if "config" not in state:
        raise ValueError(f"checkpoint={str(path)!r} holds a training state, not weights; use the file without '-training'")
    model = TinyDiT(Config(**state["config"])).to(device)
    model.load_state_dict(state["model"])
    classifier = AttributeClassifier(state["classes"]).to(device)
    classifier.load_state_dict(state["classifier"])
    return model.eval(), classifier.eval(), state["reference"].float(), state["notes"]


# ------------------------------------------------------------------------------------------------
# Sampling, with any guidance
# ------------------------------------------------------------------------------------------------

RECTIFIER_FLAGS = ("tau_i", "alpha", "gamma", "K", "kappa", "layers")
METHODS = {  # method -> the flags that it obeys
    "none": (),
    "cfg": ("w",),
    "c-erg": ("w", "tau_c"),
    "i-erg": ("w", *RECTIFIER_FLAGS, "negative"),
    "erg": ("w", "tau_c", *RECTIFIER_FLAGS),
    "erg+apg": ("w", "tau_c", *RECTIFIER_FLAGS),
    "erg+cads": ("w", "tau_c", *RECTIFIER_FLAGS),
}


def guidance_settings(method, recipe, **flags):
    """The erg.ERG of a method, or None for "none". Flags that are None take the recipe's value.

    Raises ValueError for an unknown method, and for a flag that the method would ignore.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} must be one of {', '.join(METHODS)}")
    given = {name: value for name, value in flags.items() if value is not None}
    for name, value in given.items():
        if name not in METHODS[method]:
            obeyed = ", ".join(METHODS[method]) or "no flag of guidance"
            raise ValueError(f"{name}={value!r} has no effect with method={method!r}, which obeys: {obeyed}")
    if method == "none":
        return None
    chosen = {name: given.get(name, getattr(recipe, name, None)) for name in METHODS[method]}
    names = {"tau_i": "tau", "K": "steps"}
    chosen = {names.get(name, name): value for name, value in chosen.items() if value is not None}
    if "layers" in chosen:
        first, end = chosen["layers"]
        depth = Config(vocabulary=("a",), **recipe.model).depth
        if end > depth:
            raise ValueError(f"layers={first}:{end} must end at {depth} or before: the model has {depth} layers")
        chosen["layers"] = range(first, end)
    return erg.ERG(**chosen, apg=erg.APG() if method == "erg+apg" else None,
                   cads=erg.CADS() if method == "erg+cads" else None)


def prepare(settings, model, tokens, null, seed):
    """(condition, guidance) for one batch of word numbers (B, L) under an erg.ERG, or None for no guidance."""
    if settings is None:
        return model.encoder(tokens), None
    if settings.tau != 1 and settings.queries is None:
        settings = dataclasses.replace(settings, queries=slice(0, model.side**2))  # tau on image tokens: Listing 2
    condition, negative = settings.encode(model.encoder, tokens, null=null)
    generator = torch.Generator().manual_seed(1_000_000_007 + seed)  # CADS' noise: another stream than the images'
    return condition, erg.Guidance(settings, negative, generator=generator)


@torch.no_grad()
def generate(model, captions, settings=None, steps=25, seed=0, batch=128):
    """Images (n, C, S, S) in [-1, 1] for n captions; the same seed gives every method the same noise.

    `settings` is an erg.ERG, None for no guidance, or for any other method a function of
    (model, tokens (B, L), null (B, L), seed) that returns the condition and the guidance, as `prepare` does.
    """
    config, device = model.config, model.positions.device
    prepared = settings if callable(settings) else functools.partial(prepare, settings)
    shape = (len(captions), config.channels, config.image_size, config.image_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    tokens, null = tokenize(captions, config), tokenize([""], config)
    images = []
    for i in range(0, len(captions), batch):
        part = tokens[i:i + batch].to(device)
        condition, guidance = prepared(model, part, null.expand(len(part), -1).to(device), seed + i)
        images.append(sample(model, noise[i:i + batch].to(device), condition, steps, guidance).clamp(-1, 1).cpu())
    return torch.cat(images)


@torch.no_grad()
def features_of(classifier, x, batch=512):
    device = next(classifier.parameters()).device
    return torch.cat([classifier.features(part.to(device)).cpu() for part in x.split(batch)])


def evaluate(x, attributes, classifier, reference):
    """One row of the table: metrics of images x (n, C, S, S) against reference features."""
    with torch.no_grad():
        device = next(classifier.parameters()).device
        *_, prompt = classifier.accuracy(x.to(device), attributes.to(device))
    fake = features_of(classifier, x)
    return {"frechet": frechet_distance(reference, fake), **precision_recall_density_coverage(reference, fake),
            "prompt": prompt}


def print_table(rows):
    names = list(next(iter(rows.values())))
    print(f"{'':>12}" + "".join(f"{name:>11}" for name in names))
    for method, row in rows.items():
        print(f"{method:>12}" + "".join(f"{row[name]:>11.3f}" for name in names))


def draw_grid(rows, columns, path, title):
    """A labelled picture: `rows` maps a label to images (n, C, S, S), `columns` holds n captions."""
    from matplotlib.figure import Figure
    n = len(columns)
    figure = Figure(figsize=(1.05 * n + 1.2, 1.05 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots(len(rows), n, squeeze=False)
    for r, (label, images) in enumerate(rows.items()):
        for c in range(n):
            axes[r, c].imshow(((images[c] + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            axes[r, c].set(xticks=[], yticks=[])
            axes[r, c].spines[:].set_visible(False)
            if r == 0:
                axes[r, c].set_title(columns[c].replace(" on ", "\non ").replace(" of a ", "\nof a "), fontsize=7)
        axes[r, 0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10)
    figure.suptitle(title, fontsize=9)
    data.write_whole(path, lambda file: figure.savefig(file, format="png", dpi=130))


def draw_loss(curve, path, name, log_every=10):
    """The loss curve, a line a bin of t."""
    import matplotlib
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    window = max(1, len(curve) // 60)
    for b in range(BINS):
        smooth = curve[:len(curve) // window * window, b].unflatten(0, (-1, window)).nanmean(dim=1)
        axes.plot(torch.arange(1, len(smooth) + 1) * window * log_every, smooth, lw=1.3,
                  color=matplotlib.colormaps["viridis"](b / BINS), label=f"{b / BINS:.2f} to {(b + 1) / BINS:.2f}")
    axes.set(xlabel="step", ylabel="squared velocity error", yscale="log", title=f"{name}: loss by time t (0 = noise)")
    axes.legend(title="t", fontsize=7, title_fontsize=8, ncols=2)
    data.write_whole(path, lambda file: figure.savefig(file, format="png", dpi=130))


# ------------------------------------------------------------------------------------------------
# The two jobs: train and compare, or sample a prompt
# ------------------------------------------------------------------------------------------------


def choose_device(name=None):
    if name is None:
        several = int(os.environ.get("WORLD_SIZE", 1)) > 1  # which mps does not support
        name = "cuda" if torch.cuda.is_available() else \
            "mps" if torch.backends.mps.is_available() and not several else "cpu"
    if name == "cuda" and dist.is_available() and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    return torch.device(name)


def describe(device):
    """The hardware, for the record of a run."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}"


def train_and_compare(options):
    """Train a model and its classifier, sample with no guidance, CFG and ERG; returns the table as a dict."""
    recipe, out, device = RECIPES[options.dataset], Path(options.out), choose_device(options.device)
    batch, world = options.batch or recipe.batch, int(os.environ.get("WORLD_SIZE", 1))
    if batch % world:
        raise ValueError(f"batch={batch} must be a multiple of the {world} processes")
    for method in ("cfg", "erg"):  # faults in them show now, not after the training
        method_settings(method, options)
    save_atomically({}, out / ".writable")  # and so does an unwritable folder
    (out / ".writable").unlink(missing_ok=True)
    if world > 1 and dist.get_rank() > 0:
        dist.barrier()  # the first process downloads what is missing
    images, held_out = (data.load(options.dataset, options.data_dir, split) for split in ("train", "test"))
    if world > 1 and dist.get_rank() == 0:
        dist.barrier()
    model, weak, curve, seconds, stopped = train(
        images, recipe, out, iterations=options.iterations or recipe.iterations, batch=batch, lr=options.lr or recipe.lr,
        schedule=options.schedule, ema=options.ema, clip=options.clip, seed=options.seed, device=device,
        compile=options.compile, resume=options.resume, save_every=options.save_every)
    is_main = main_process()
    if world > 1:
        dist.destroy_process_group()
    if stopped:
        if is_main:
            again = options.command + ("" if options.resume else " --resume")
            print(f"\nStopped and saved after {seconds / 60:.1f} minutes. To go on: {again}")
        raise KeyboardInterrupt
    if not is_main:
        return {}
    draw_loss(curve, out / f"{images.name}-loss.png", images.name)

    classifier = train_classifier(images, options.classifier_iterations, seed=options.seed,
                                  device="cpu" if device.type == "mps" else device)  # mps lacks its pooling
    generator = torch.Generator().manual_seed(options.seed)
    real, *_ = images.batch(torch.randperm(len(images), generator=generator)[:5000], generator)
    reference = features_of(classifier, real)
    rows = compare(model, classifier, reference, held_out, ("none", "cfg", "erg"), options,
                   f"{seconds / 60:.1f} minutes of training")
    notes = dict(command=options.command, training_minutes=round(seconds / 60, 1), hardware=describe(device),
                 torch=str(torch.__version__), table=rows)
    export(out / f"{images.name}.pt", model, classifier, reference, notes)
    export(out / f"{images.name}-early.pt", weak, classifier, reference, notes)
    data.write_whole(out / f"{images.name}.json", lambda file: file.write(json.dumps(notes, indent=1).encode()))
    print(f"{(time.time() - options.began) / 60:.1f} minutes in all, {describe(device)}. Written: {out}/{images.name}*")
    return rows


def method_settings(method, options):
    """The settings of a method under the command line's flags of guidance, as far as it obeys them; layers are checked."""
    recipe = RECIPES[options.dataset]
    return guidance_settings(method, recipe, **{name: getattr(options, name) for name in METHODS[method]})


def compare(model, classifier, reference, held_out, methods, options, title):
    """Sample with each method from the same captions and seeds; draw and print what comes out, return the table."""
    recipe, generator = RECIPES[held_out.name], torch.Generator().manual_seed(options.seed)
    n = options.samples or recipe.samples
    real, captions, attributes = held_out.batch(torch.randperm(len(held_out), generator=generator)[:n], generator)
    rows, pictures = {"held out": evaluate(real, attributes, classifier, reference)}, {"real": real}
    for method in methods:
        settings = method_settings(method, options)
        label = {"none": "no guidance", "i-erg": "I-ERG", "c-erg": "C-ERG"}.get(method, method.upper())
        pictures[label] = generate(model, captions, settings, options.steps, options.seed)
        rows[label] = evaluate(pictures[label], attributes, classifier, reference)
    w = recipe.w if options.w is None else options.w
    draw_grid({label: x[:10] for label, x in pictures.items()}, captions[:10], Path(options.out) / f"{held_out.name}.png",
              f"{held_out.name}: the same captions and seeds, w = {w:g}, {options.steps} steps ({title})")
    print_table(rows)
    print(f"{len(real)} images a row against {len(reference)} real ones, w = {w:g}, {options.steps} steps")
    return rows


def compare_checkpoint(options):
    """The table and picture of all methods, or one, from a checkpoint, without training; returns the table."""
    device = choose_device(options.device)
    path = find_checkpoint(options)
    model, classifier, reference, _ = load_checkpoint(path, device)
    held_out = data.load(options.dataset, options.data_dir, "test")
    if held_out.vocabulary != model.config.vocabulary or held_out.size != model.config.image_size:
        raise ValueError(f"checkpoint={str(path)!r} was not trained on dataset={options.dataset!r}")
    rows = compare(model, classifier, reference, held_out, [options.method] if options.method else METHODS, options, path.name)
    print(f"{(time.time() - options.began) / 60:.1f} minutes, {describe(device)}. "
          f"Picture: {Path(options.out) / options.dataset}.png")
    return rows


def find_checkpoint(options):
    """--checkpoint, or the newest that fits --dataset: OUT/DATASET.pt, then weights/DATASET.pt."""
    if options.checkpoint:
        return Path(options.checkpoint)
    own, shipped = (folder / f"{options.dataset}.pt" for folder in (Path(options.out), WEIGHTS))
    return own if own.is_file() else shipped


def sample_prompt(options):
    """Sample --count images of a prompt from a checkpoint, and write them as a picture; returns them."""
    device = choose_device(options.device)
    path, method, count = find_checkpoint(options), options.method or "erg", options.count or 8
    model, *_ = load_checkpoint(path, device)
    name = "cifar10" if "horse" in model.config.vocabulary else "digits" if model.config.image_size == 8 else "mnist"
    flags = {flag: getattr(options, flag) for flag in ("w", "tau_c", "negative", *RECTIFIER_FLAGS)}
    settings = guidance_settings(method, RECIPES[name], **flags)
    if not options.prompt.split() and (method in ("cfg", "c-erg")):
        raise ValueError(f"method={method!r} has no effect with an empty prompt; use i-erg")
    images = generate(model, [options.prompt] * count, settings, options.steps, options.seed)
    file = Path(options.picture or Path(options.out) / f"{method}.png")
    given = ", ".join(f"{flag} = {value}" for flag, value in flags.items() if value is not None)
    draw_grid({method: images}, [f"seed {options.seed}"] + [""] * (count - 1), file,
              f"“{options.prompt}”" + (f", {given}" if given else ""))
    print(f"{path}: {count} images of {options.prompt!r} with {settings or 'no guidance'} -> {file}")
    return images


def layer_range(text):
    """"3:6" -> (3, 6): layers 3, 4 and 5."""
    first, colon, last = text.partition(":")
    if not (colon and first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise argparse.ArgumentTypeError(f"layers={text!r} must be FIRST:END with FIRST < END, for example 3:6")
    return int(first), int(last)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="digits", choices=data.NAMES, help="images to train on, or whose weights to sample from")
    add("--out", default="out", help="folder for everything that is written")
    add("--seed", default=0, type=int, help="of the training, or of the samples")
    add("--device", choices=("cuda", "mps", "cpu"), help="chosen automatically when not given")
    add("--steps", default=25, type=int, help="Euler steps of the sampler")
    group = parser.add_argument_group("training (what is not given comes from the data set's recipe)")
    add = group.add_argument
    add("--data-dir", help="folder with the official files; they are downloaded there when missing")
    add("--iterations", type=int, help="training steps")
    add("--batch", type=int, help="images a step, over all processes together")
    add("--lr", type=float, help="peak learning rate")
    add("--schedule", default="linear", choices=("linear", "cosine"), help="decay: linear over the last 40 %%, or cosine")
    add("--ema", default=0.995, type=float, help="decay of the averaged weights")
    add("--clip", default=1.0, type=float, help="largest gradient norm")
    add("--compile", action="store_true", help="torch.compile the training step")
    add("--save-every", default=500, type=int, help="steps between checkpoints, a multiple of 10; 0: only at the end")
    add("--resume", action="store_true", help="go on from the last checkpoint under --out")
    add("--samples", type=int, help="images a row of the table")
    add("--classifier-iterations", default=1000, type=int, help="training steps of the attribute classifier")
    group = parser.add_argument_group("one prompt, without training")
    add = group.add_argument
    add("--prompt", help='for example "a red seven on blue"; "" is unconditional')
    add("--count", type=int, help="images: 8 if not given")
    add("--picture", help="file to write: OUT/METHOD.png if not given")
    group = parser.add_argument_group("all methods, without training")
    group.add_argument("--compare", action="store_true", help="the table and picture of all methods (or --method), from a checkpoint")
    group = parser.add_argument_group("guidance (what is not given comes from the data set's recipe)")
    add = group.add_argument
    add("--method", choices=METHODS, help="with --prompt (erg if not given) or --compare (all if not given)")
    add("--checkpoint", help="with --prompt or --compare: weights; otherwise OUT/DATASET.pt, then weights/DATASET.pt")
    add("--w", type=float, help="guidance weight; 1 is off")
    add("--tau-i", type=float, help="I-ERG: temperature in the denoiser; below 1 flattens attention")
    add("--tau-c", type=float, help="C-ERG: temperature in the caption encoder")
    add("--alpha", type=float, help="weight of the matching term in the energy")
    add("--gamma", type=float, help="step size of energy attention")
    add("--K", type=int, help="steps of energy attention")
    add("--kappa", type=float, help="I-ERG acts where t > kappa")
    add("--layers", type=layer_range, help="I-ERG's layers, for example 3:6 for 3, 4 and 5")
    add("--negative", choices=("null", "same"), help="condition of I-ERG's negative")
    return parser


def refuse_unused(parser, options):
    """An error for a flag that was given and would do nothing in this mode."""
    mode = "--prompt" if options.prompt is not None else "--compare" if options.compare else "training"
    unused = {"--prompt": ["compare", "data_dir", "samples"], "--compare": ["count", "picture"],
              "training": ["method", "count", "picture", "checkpoint", "negative"]}[mode]
    if mode != "training":
        unused += ["iterations", "batch", "lr", "schedule", "ema", "clip", "compile", "save_every", "resume",
                   "classifier_iterations"]
    for name in unused:
        if getattr(options, name) != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} has no effect with {mode}")
    if options.dataset == "digits" and options.data_dir is not None:
        raise ValueError(f"--data-dir {options.data_dir} has no effect with --dataset digits, which is shipped")


def check_numbers(options):
    """An error for a number out of range, before anything runs."""
    for name in ("iterations", "batch", "lr", "steps", "count", "clip", "classifier_iterations"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value!r} must be greater than 0")
    if not 0 <= options.ema < 1:
        raise ValueError(f"ema={options.ema!r} must be at least 0 and less than 1")
    if options.save_every < 0 or options.save_every % 10:
        raise ValueError(f"save_every={options.save_every!r} must be a multiple of 10, or 0")
    if options.samples is not None and options.samples < 6:
        raise ValueError(f"samples={options.samples!r} must be at least 6: the metrics look at 5 neighbours")


def main(argv=None, **options):
    """Run as the command line does: `main(iterations=20, out="out")`; returns the table, or the images."""
    parser = arguments()
    values = parser.parse_args([] if argv is None else argv)
    for name, value in options.items():
        if not hasattr(values, name):
            raise TypeError(f"main() has no option {name!r}; the options are: {', '.join(sorted(vars(values)))}")
        setattr(values, name, value)
    refuse_unused(parser, values)
    check_numbers(values)
    for name, value in options.items():
        text = ":".join(map(str, value)) if isinstance(value, tuple) else str(value)
        argv = [*(argv or []), "--" + name.replace("_", "-"), *([] if value is True else [text])]
    launcher = ["python"] if int(os.environ.get("WORLD_SIZE", 1)) == 1 else ["torchrun", "..."]
    values.began, values.command = time.time(), shlex.join([*launcher, "train_toy.py", *(argv or [])])
    if values.prompt is not None or values.compare:
        return compare_checkpoint(values) if values.compare else sample_prompt(values)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        device = choose_device(values.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        return train_and_compare(values)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:  # what was trained is saved
        sys.exit(130)
    except (data.DataError, ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
