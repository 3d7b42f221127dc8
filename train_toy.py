"""Train a tiny text-to-image flow on real images, then compare no guidance, CFG and ERG on it.

    python train_toy.py                                          # the shipped digits: 3 minutes, 2 CPU cores
    python train_toy.py --dataset mnist --data-dir data/mnist    # downloaded when missing
    python train_toy.py --dataset cifar10 --minutes 18           # as many iterations as fit, on a GPU
    python train_toy.py --dataset mnist --resume                 # go on where it was stopped
    torchrun --standalone --nproc_per_node 2 train_toy.py --dataset cifar10    # two GPUs, same global batch

It writes under --out: DATASET.pt (the averaged model in half precision, its classifier and reference
features), weak models beside it (DATASET-early.pt, -quarter.pt and -half.pt: the same after 1/16, 1/4 and
1/2 of the training), DATASET-training.pt (everything that --resume needs), DATASET.png, DATASET-loss.png,
DATASET.json. DATASET.pt is there from the first save on. sample_toy.py samples from it.

Conventions: t = 0 is noise, t = 1 is data. Shapes: B batch, L words, A attributes, S image side.
"""
import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from tiny_dit import Config, TinyDiT, drop_words, flow_matching_loss, tokenize
from toy import data, files
from toy.command import SEED, Parser, number, place, run
from toy.drawing import compare, draw_loss
from toy.metrics import AttributeClassifier, features_of, train_classifier
from toy.sampling import choose_device, describe, export, recommended

BINS = 8  # of t, for the loss curve
LOG_EVERY = 10  # steps; only then is the loss read, and the GPU waited for
WEAK = {"early": 16, "quarter": 4, "half": 2}  # the average is kept after so small a part of the training
NULL, CLASS_ALONE = 0.1, 0.1  # shares of the captions that are empty, and "a seven" or "a horse"
WRITTEN = ("-training.pt", ".pt", *(f"-{name}.pt" for name in WEAK), ".json", ".png", "-loss.png")
FROM_RECIPE = ("iterations", "batch", "lr", "ema", "samples", "classifier_iterations")
KEPT = ("dataset", "minutes", "iterations", "batch", "lr", "ema", "seed", "full_captions")  # of a resume


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is particular to a data set: the model's size, the training's length."""

    model: dict  # arguments of tiny_dit.Config
    iterations: int
    batch: int
    lr: float
    samples: int  # images for the table
    t_mean: float = 0.0  # of the logit of t in training: below 0 puts more of it on noisy images
    ema: float = 0.995  # decay of the averaged weights
    flips: bool = False  # mirror half of the images: handwriting has a handedness
    full_captions: bool = False  # drop no caption and no word: the null prompt then means nothing
    classifier: str = "plain"  # or "residual"
    classifier_iterations: int = 1000


RECIPES = {
    "digits": Recipe(dict(image_size=8, patch=2, width=96, depth=8, heads=4), iterations=600, batch=64,
                     lr=1e-2, samples=360),
    "mnist": Recipe(dict(image_size=28, patch=4, width=96, depth=8, heads=4), iterations=6000, batch=64,
                    lr=1e-2, samples=1000, t_mean=-0.6),
    "cifar10": Recipe(dict(image_size=32, patch=2, width=192, depth=10, heads=6, text_depth=1),
                      iterations=32_000, batch=512, lr=1e-3, samples=2000, ema=0.9995, flips=True,
                      classifier="residual", classifier_iterations=6000),
}

# ------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------


def caption_tables(images, config):
    """Word numbers of all captions, by attributes (classes, ..., L), and of "a CLASS" (classes, L)."""
    words = list(images.attributes.values())
    numbers = torch.cartesian_prod(*(torch.arange(len(w)) for w in words)).view(-1, len(words))
    full = tokenize(images.captions(numbers), config).unflatten(0, [len(w) for w in words])
    short = tokenize([f"a {word}" for word in words[0]], config)
    return full.to(images.labels.device), short.to(images.labels.device)


def draw_batch(images, tables, recipe, batch, seed, step):
    """Everything random in step `step`, a function of the seed and the step alone, on the images' device.

    So a resumed run sees the same batches, and so do several processes, each of which takes its part.
    Returns x (B, 3, S, S), tokens (B, L), t (B,) and noise (B, 3, S, S).
    """
    full, short = tables
    device = images.labels.device
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
    uniform = lambda: torch.rand(batch, 1, generator=generator, device=device)
    rows = torch.randint(len(images), (batch,), generator=generator, device=device)
    x, attributes = images.draw(rows, generator)
    if recipe.flips:
        x = torch.where(uniform()[:, :, None, None] < 0.5, x.flip(3), x)
    tokens = full[tuple(attributes.T)]  # (B, L)
    if not recipe.full_captions:
        null = NULL / (1 - CLASS_ALONE)  # before the class words take the place of some
        tokens = drop_words(tokens, caption=null, generator=generator)
        tokens = torch.where(uniform() < CLASS_ALONE, short[attributes[:, 0]], tokens)
    normal = torch.randn(batch, generator=generator, device=device)
    t = (recipe.t_mean + normal).sigmoid()  # logit-normal (Esser et al., 2024)
    return x, tokens, t, torch.randn(x.shape, generator=generator, device=device)


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def main_process():
    return not dist.is_initialized() or dist.get_rank() == 0


def agreed(number, device):
    """The largest `number` of all processes: they must stop, or change their schedule, at the same step."""
    if not dist.is_initialized():
        return number
    number = torch.tensor(float(number), device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number.item())


def learning_rate(step, iterations, lr, warmup=100):
    """Linear warm-up, then constant, then a linear decay over the last 40 %."""
    return lr * min(1.0, (step + 1) / warmup) * min(1.0, (1 - step / iterations) / 0.4)


def optimizers(model, lr):
    """Muon for the matrices of attention and MLPs, AdamW for all else, at one learning rate.

    Muon (Jordan et al., 2024) steps roughly along the orthogonal matrix that is nearest to the momentum. On
    the digits it needs half of AdamW's steps. Its rate is scaled to AdamW's updates (Liu et al., arXiv
    2502.16982). Three steps of Newton and Schulz do as well there as the usual five, and cost less.
    """
    blocks = [*model.encoder.blocks, *model.blocks]
    matrices = [layer.weight for block in blocks for part in (block.attention, block.mlp)
                for layer in part.modules() if isinstance(layer, nn.Linear)]
    chosen = set(matrices)
    others = [parameter for parameter in model.parameters() if parameter not in chosen]
    return [torch.optim.Muon(matrices, lr, weight_decay=0.0, ns_steps=3, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


class Loss(nn.Module):
    """Model and loss in one module, as DistributedDataParallel and torch.compile want it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, tokens, t, noise):
        return flow_matching_loss(self.model, x, self.model.encoder(tokens), t, noise)  # (B,)


class Interrupt:
    """Inside `with`, Ctrl-C, SIGTERM and a closed terminal only set `.stop`: a step is never cut in two."""

    def __enter__(self):
        self.stop, self.before = False, {}
        with contextlib.suppress(ValueError):  # not the main thread: signals stay as they are
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                sent = getattr(signal, name, None)  # Windows lacks SIGHUP, and nohup ignores it
                if sent and signal.getsignal(sent) != signal.SIG_IGN:
                    self.before[sent] = signal.signal(sent, self.ask)
        return self

    def ask(self, number, frame):
        if self.stop:  # a second time: at once
            raise KeyboardInterrupt
        self.stop = True

    def __exit__(self, *error):
        for sent, handler in self.before.items():
            signal.signal(sent, handler)


class Training:
    """All that changes in a training: what is saved, and taken up again."""

    def __init__(self, config, lr, seed, device):
        torch.manual_seed(seed)
        self.model = TinyDiT(config).to(device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizers = optimizers(self.model, lr)
        self.device, self.step, self.iterations, self.seconds = device, 0, None, 0.0
        self.weak = {}  # averages on the way: name in WEAK -> state
        self.curve = torch.zeros(0, BINS)  # mean loss by bin of t, NaN where a bin was empty
        self.bins = torch.zeros(2, BINS, device=device)  # sums and counts since the last line of the curve

    def state(self):
        return dict(step=self.step, iterations=self.iterations, seconds=self.seconds, weak=self.weak,
                    curve=self.curve, model=self.model.state_dict(), average=self.average.state_dict(),
                    optimizers=[optimizer.state_dict() for optimizer in self.optimizers])

    def restore(self, state):
        for part, saved in zip((self.model, self.average, *self.optimizers),
                               (state["model"], state["average"], *state["optimizers"]), strict=True):
            part.load_state_dict(saved)
        for name in ("step", "iterations", "seconds", "weak", "curve"):
            setattr(self, name, state[name])

    def update(self, loss_of, batch, lr, ema):
        """One step of the model and of its average, on the losses of a batch."""
        cuda = self.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext():
            losses = loss_of(*batch)  # (B,)
        self.model.zero_grad(set_to_none=True)
        losses.mean().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        self.step += 1
        rate = min(ema, self.step / (self.step + 9))  # a short memory at first
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - rate)
            _, _, t, _ = batch
            counted = torch.stack([losses.float(), torch.ones_like(t)])  # (2, B)
            self.bins.index_add_(1, (t * BINS).long().clamp_max(BINS - 1), counted)

    def keep_weak(self):
        """Keep the average if a part of the training is over that WEAK names."""
        for name, part in WEAK.items():
            if self.iterations and name not in self.weak and self.step >= max(1, self.iterations // part):
                self.weak[name] = {key: value.clone() for key, value in self.average.state_dict().items()}

    def read_loss(self):
        """Add a line to the loss curve; returns the mean loss since the last one."""
        if dist.is_initialized():
            dist.all_reduce(self.bins)
        sums, counts = self.bins.to("cpu", copy=True)
        self.bins.zero_()
        self.curve = torch.cat([self.curve, (sums / counts)[None]])
        return (sums.sum() / counts.sum()).item()


def fit_iterations(run, marks, deadline, batch):
    """The number of iterations that fit until the deadline, or None while the speed is not known.

    `marks` gets the (time, step) of each line of the loss curve. The speed is that of the last 5 % of the
    time. What is before the second mark, with the compilation, does not count.
    """
    now = time.time()
    marks.append((now, run.step))
    left, window, iterations = deadline - now, 0.05 * (deadline - marks[0][0]), 0
    past = [mark for mark in marks[1:] if now - mark[0] > window]
    if left <= 0:
        iterations = run.step
    elif past:
        began, first = past[-1]
        speed = (run.step - first) / (now - began)
        iterations = run.step + max(1, int(0.97 * speed * left))  # 3 % are for saves
        if run.iterations is None and main_process():
            measured = f"{speed * batch:,.0f} images/s, and {left / 60:.1f} minutes are left"
            tqdm.write(f"{measured}: about {iterations:,} iterations in all")
    return agreed(iterations, run.device) or None


def train(run, loss_of, batches, save, options):
    """Train until `run.iterations`, or until Ctrl-C; returns whether it was stopped.

    `batches(step)` is this process's part of a batch; `save()` is called now and then, and at the end.
    """
    marks, boxed, began, stop = [], run.iterations is None, time.time() - run.seconds, False
    bar = tqdm(total=run.iterations, initial=run.step, desc=options.dataset, unit="step",
               disable=not main_process(), mininterval=1.0 if sys.stderr.isatty() else 15.0)
    with Interrupt() as interrupt, bar:
        while run.step != run.iterations and not stop:
            lr = learning_rate(run.step, run.iterations or math.inf, options.lr)
            run.update(loss_of, batches(run.step), lr, options.ema)
            bar.update()
            if run.step % LOG_EVERY == 0 or run.step == run.iterations:
                loss = run.read_loss()
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                if not math.isfinite(loss):
                    raise FloatingPointError(f"the loss is {loss} at step {run.step}; "
                                             f"try a smaller --lr than {options.lr}")
                if boxed and run.step < 0.6 * (run.iterations or math.inf):  # then the decay begins
                    run.iterations = fit_iterations(run, marks, options.deadline, options.batch)
                    bar.total = run.iterations
                stop = bool(agreed(interrupt.stop, run.device))
            run.keep_weak()
            run.seconds = time.time() - began
            due = options.save_every and run.step % options.save_every == 0
            if stop or due or run.step == run.iterations:
                save()
    return stop


# ------------------------------------------------------------------------------------------------
# The job: train, compare, write
# ------------------------------------------------------------------------------------------------


class Job:
    """A training with its classifier: what is loaded at its start, and written now and then."""

    def __init__(self, options, device):
        self.options = options
        self.recipe = dataclasses.replace(RECIPES[options.dataset], full_captions=options.full_captions)
        self.folder, self.device = Path(options.out), device
        self.path = self.folder / f"{options.dataset}-training.pt"
        if main_process():
            files.writable(*(self.folder / (options.dataset + end) for end in WRITTEN))
        self.images, self.held_out = (data.load(options.dataset, options.data_dir, split)
                                      for split in ("train", "test"))
        config = Config(vocabulary=self.images.vocabulary, **self.recipe.model)
        self.settings = dict(config=dataclasses.asdict(config), t_mean=self.recipe.t_mean,
                             **{name: getattr(options, name) for name in KEPT})
        self.run = Training(config, options.lr, options.seed, device)
        self.run.iterations = options.iterations
        if not options.resume:
            if device.type == "cpu" and main_process():
                self.forecast()
            self.judge(None)
            return
        expected = "the state of a training: start without --resume, or name its folder with --out"
        with files.load(self.path, expected) as state:
            for name, new in self.settings.items():
                if new != (old := state["settings"][name]):
                    raise files.DataError(f"--resume: {self.path} was trained with {name} {old!r}, "
                                          f"not {new!r}; give the same settings")
            self.run.restore(state)
            self.judge(state["judge"])

    def forecast(self):
        """Say how long it takes on this CPU; with --minutes, let the classifier take at most an eighth."""
        o, seconds = self.options, []
        tables = caption_tables(self.images, self.run.model.config)
        batch = draw_batch(self.images, tables, self.recipe, 16, o.seed, 0)
        for work in (lambda: Loss(self.run.model)(*batch).mean().backward(),
                     lambda: train_classifier(self.images, self.recipe.classifier, 1)):
            for _ in range(2):  # the first call is slower
                began = time.time()
                work()
            seconds.append(time.time() - began)
        self.run.model.zero_grad(set_to_none=True)
        if o.minutes and "classifier_iterations" not in o.given:
            most = max(1, int(60 * o.minutes / 8 / seconds[1]))
            o.classifier_iterations = min(o.classifier_iterations, most)
        steps = o.batch / 16 * (o.iterations or 0)
        hours = (seconds[0] * steps + seconds[1] * o.classifier_iterations) / 3600
        if hours > 3:
            print(f"This takes about {hours:,.0f} hours on {describe(self.device)}. "
                  f"The recipe of {o.dataset} is meant for a GPU; --minutes sets a limit")
        elif o.iterations:
            print(f"This takes about {60 * hours:.0f} minutes on {describe(self.device)}")

    def judge(self, kept):
        """The classifier, and its features of 5,000 training images, which the metrics compare with."""
        if not main_process():
            return
        o, images = self.options, self.images
        device = "cpu" if self.device.type == "mps" else self.device  # mps lacks its pooling
        if kept:
            classes = [len(words) for words in images.attributes.values()]
            self.classifier = AttributeClassifier(classes, self.recipe.classifier).to(device).eval()
            self.classifier.load_state_dict(kept["classifier"])
            self.reference = kept["reference"]
            return
        self.classifier = train_classifier(images, self.recipe.classifier, o.classifier_iterations, o.seed,
                                           device)
        generator = torch.Generator().manual_seed(o.seed)
        real, *_ = images.batch(torch.randperm(len(images), generator=generator)[:5000], generator)
        self.reference = features_of(self.classifier, real)
        test = self.held_out.draw(torch.arange(len(self.held_out)), generator)
        print(f"the classifier recognizes {self.classifier.accuracy(*test)[-1]:.1%} of the test images")

    def train(self):
        """Returns whether it was stopped."""
        o, images = self.options, self.images.to(self.device)
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        part = slice(rank * o.batch // world, (rank + 1) * o.batch // world)
        tables = caption_tables(images, self.run.model.config)
        loss_of = Loss(self.run.model)
        if world > 1:
            ids = None if self.device.index is None else [self.device.index]
            loss_of = nn.parallel.DistributedDataParallel(loss_of, device_ids=ids)
        loss_of = torch.compile(loss_of) if o.compile else loss_of

        def batches(step):
            return [y[part] for y in draw_batch(images, tables, self.recipe, o.batch, o.seed, step)]

        return train(self.run, loss_of, batches, self.save, o)

    def save(self):
        """Everything that --resume needs, and the averaged weights so far."""
        if main_process():
            kept = dict(classifier=self.classifier.state_dict(), reference=self.reference)
            state = dict(settings=self.settings, judge=kept, **self.run.state())
            files.save(self.path, state)
            self.export({})

    def export(self, table):
        """The averaged weights, and the weak ones that there are, with how they were made."""
        given = {name: value for name, value in self.options.given.items() if name not in ("data_dir", "out")}
        run, last = self.run, self.run.curve[-max(10, len(self.run.curve) // 10):]
        notes = dict(options=given, step=run.step, iterations=run.iterations,
                     training_minutes=round(run.seconds / 60, 1),
                     images_per_second=round(run.step * self.options.batch / run.seconds),
                     compiled=bool(self.options.compile),
                     loss_by_t=[round(x, 4) for x in last.nanmean(0).nan_to_num(-1).tolist()],  # -1: no image
                     hardware=describe(self.device), torch=str(torch.__version__), table=table)
        model = copy.deepcopy(self.run.average)
        for name, state in [*self.run.weak.items(), (None, self.run.average.state_dict())]:
            model.load_state_dict(state)
            path = self.folder / f"{self.options.dataset}{f'-{name}' if name else ''}.pt"
            export(path, model, self.classifier, self.reference, notes)
        text = json.dumps(notes, indent=1).encode()
        files.write_whole(self.folder / f"{self.options.dataset}.json", lambda file: file.write(text))


def train_and_compare(options, device):
    """Train, then sample with no guidance, CFG and ERG; returns the table as a dict."""
    job = Job(options, device)
    stopped, minutes = job.train(), f"{job.run.seconds / 60:.1f} minutes"
    if not main_process():
        return {}
    if stopped:
        print(f"\nStopped and saved after {minutes}. To go on, give the same command with --resume")
        raise KeyboardInterrupt
    draw_loss(job.run.curve, job.folder / f"{options.dataset}-loss.png", options.dataset, LOG_EVERY)
    methods = {name: recommended(name, options.dataset) for name in ("none", "cfg", "erg")}
    table = compare(job.run.average.eval(), job.classifier, job.reference, job.held_out, methods,
                    job.folder / f"{options.dataset}.png", samples=options.samples, steps=options.steps,
                    seed=options.seed, title=f"{minutes} of training")
    job.export(table)
    print(f"{(time.time() - options.began) / 60:.1f} minutes in all, {describe(job.device)}. "
          f"Written: {job.folder / options.dataset}*")
    return table


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--dataset", default="digits", choices=data.NAMES, help="images to train on (digits)")
    add("--data-dir", type=place, help="folder with the official files, downloaded when missing")
    add("--out", default="out", type=place, help="folder for everything that is written (out)")
    add("--resume", action="store_true", help="go on from the last save under --out")
    add("--seed", default=0, type=number(0, SEED, int), help="of the training and of the samples (0)")
    add("--full-captions", action="store_true", help="drop no caption and no word: no null prompt is learned")
    add("--device", choices=("cuda", "mps", "cpu"), help="chosen automatically when not given")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the step (where it pays)")
    add("--save-every", default=1000, type=number(0, 10**9, int),
        help="steps between saves; 0: only at the end (1000)")
    add("--steps", default=25, type=number(1, 1000, int), help="Euler steps of the sampler (25)")
    add("--minutes", type=number(0.001, 1e5), help="train so long, start included, in place of --iterations")
    group = parser.add_argument_group("what is not given comes from the data set's recipe")
    add = group.add_argument
    add("--iterations", type=number(1, 10**9, int), help="training steps")
    add("--batch", type=number(1, 10**5, int), help="images a step, over all processes together")
    add("--lr", type=number(1e-9, 10), help="peak learning rate")
    add("--ema", type=number(0, 0.999999), help="decay of the averaged weights")
    add("--samples", type=number(6, 10**5, int), help="images a row of the table; its metrics need 6")
    add("--classifier-iterations", type=number(1, 10**6, int), help="steps of the attribute classifier")
    return parser


def check(options, world):
    """An error for what does not go together, before anything runs."""
    if options.minutes and options.given.get("iterations"):
        raise ValueError(f"minutes={options.minutes} and iterations={options.iterations} exclude each other")
    if options.save_every % LOG_EVERY:
        raise ValueError(f"save_every={options.save_every} must be a multiple of {LOG_EVERY}, or 0")
    if options.batch % world:
        raise ValueError(f"batch={options.batch} must be a multiple of the {world} processes")
    if options.data_dir and options.dataset == "digits":
        raise ValueError(f"data_dir={options.data_dir!r} has no effect with dataset='digits'")


def compile_pays(options, device):
    """On a GPU, and in long trainings on a CPU with a working C++ compiler: steps are 1.2 times as fast."""
    if device.type == "cpu" and ((options.minutes or 0) > 10 or (options.iterations or 0) > 2000):
        with contextlib.suppress(Exception):  # no compiler, or no Python.h
            return torch.compile(torch.sin)(torch.zeros(1)).item() == 0
    return device.type == "cuda"


def main(**given):
    """Run as the command line does: `main(iterations=20, out="out")`; returns the table."""
    parser, world = arguments(), int(os.environ.get("WORLD_SIZE", 1))
    options = parser.options(given)
    options.given = {name: y for name, y in vars(options).items() if y != parser.get_default(name)}
    options.began = time.time()
    for name in FROM_RECIPE:
        if getattr(options, name) is None and not (name == "iterations" and options.minutes):
            setattr(options, name, getattr(RECIPES[options.dataset], name))
    check(options, world)
    options.deadline = options.began + 60 * (options.minutes or 0)
    device = choose_device(options.device)
    if options.compile is None:
        options.compile = (world == 1 or device.type == "cuda") and compile_pays(options, device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        lock = Path(options.out) / f".{options.dataset}.lock"
        with files.locked(lock) if main_process() else contextlib.nullcontext():
            return train_and_compare(options, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run(main, arguments())
