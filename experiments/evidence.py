"""ERG against CFG, its parts and its rivals, on real image sets: choose on some seeds, report on others.

    python -m experiments.evidence --quick                     # the shipped digits, few images: 5 minutes
    python -m experiments.evidence trainings                   # into out/trainings: hours; minutes on a GPU
    torchrun --standalone --nproc_per_node 2 -m experiments.evidence --bf16      # all that has weights
    python -m experiments.evidence page                        # pages and figures again, from the numbers

It writes evidence.json, evidence.md and frontiers-SET.png into --out, and the verdicts into CLAIMS.md. Runs
are cached under out/cache: a call that was stopped goes on where it was.
"""
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from matplotlib.figure import Figure

from experiments import claims, runs
from experiments.runs import Run, value
from experiments.statistics import half_width, jackknife
from toy import data
from toy.command import Parser, place, run
from toy.data import reading
from toy.drawing import colour
from toy.files import writable, write_whole
from toy.sampling import TRAININGS, WEIGHTS, choose_device, weights_file

RESULTS = Path(__file__).resolve().parent / "results"
TASKS = {"text": "full captions", "class": "the class alone", "unconditional": "no caption",
         "no dropout": "full captions, trained without caption dropout",
         "weak": "full captions, a quarter of the training"}
SEEDS = {"digits": 3, "mnist": 2, "cifar10": 1}  # trainings of each kind
METRICS = ("frechet", *runs.MANIFOLD, "prompt")


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is sampled."""

    images: int  # of a reported row
    search: int  # of a row that chooses w,
    variants: int  # and of one that chooses layers, or another second parameter, at w = probe
    steps: int
    weights: tuple = (1.1, 1.25, 1.5, 2.0, 3.0)
    probe: float = 1.25
    seeds: tuple = (0, 1, 2, 3)
    search_seeds: tuple = (1000, 1001)
    more: tuple = (None, 0)  # a checkpoint and task with more images

    def images_of(self, study):
        return self.more[1] if study[2:] + study[1:2] == self.more[0] else self.images


FULL = Scale(2000, 640, 480, 16, more=(("mnist", "text"), 4000))
QUICK = Scale(160, 80, 80, 4, (1.25, 2.0), seeds=(0, 1))

# ---- What is compared --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """A method, what is fixed, and the second parameters among which the search chooses."""

    method: str
    fixed: dict = dataclasses.field(default_factory=dict)
    variants: tuple = ({},)
    like: str | None = None  # take the variant that this row has chosen,
    w_of: str | None = None  # and its w


TEMPERED = dict(tau_i=0.01, kappa=0.2)
SAME = dict(TEMPERED, negative="same")
TAU_I, TAU_C, KAPPA = (0.01, 0.1, 0.3, 1.0), (0.01, 0.1, 0.3), (0.0, 0.2, 0.6)  # of mild ERG


def windows(depth):
    """Pairs of neighbouring layers, from the first to the last third."""
    return tuple(dict(layers=[a, a + 1]) for a in range(0, depth - 3, max(1, depth // 5)))


def rows_of(task, name, mild):
    """{label: Row} for a task on a checkpoint; `mild` is mild ERG's tau_i, tau_c and kappa, once chosen."""
    depth, photographs = runs.checkpoint(name)[0].config.depth, runs.dataset(name) == "cifar10"
    layers = windows(depth)
    third = lambda i: list(range(round(i * depth / 3), round((i + 1) * depth / 3)))
    weaker = []
    for part in ("early", "quarter"):
        try:
            weaker.append(dict(weak=weights_file(f"{name}-{part}").stem))
        except ValueError:  # this training kept none
            pass
    auto = {"AutoGuidance": Row("autoguidance", variants=tuple(weaker))} if weaker else {}
    pag, seg = Row("pag", variants=layers), Row("seg", variants=layers)
    none, cfg, same = Row("none"), Row("cfg"), Row("i-erg", SAME, layers)
    erg = Row("erg", dict(TEMPERED, tau_c=0.01), layers)
    if task == "unconditional":
        beside = {} if photographs else {"PAG*": pag, "SEG*": seg}
        return {"no guidance": none, **beside, "I-ERG": same}
    if task == "class":
        return {"no guidance": none, "CFG": cfg, "PAG*": pag, "SEG*": seg, "I-ERG": same,
                "I-ERG, null prompt": Row("i-erg", dict(TEMPERED, negative="null"), layers)}
    rows = {"no guidance": none, "CFG": cfg, "C-ERG": Row("c-erg", dict(tau_c=0.01)), "I-ERG": same,
            "ERG": erg}
    if mild:
        own = dict(tau_c=mild["tau_c"])
        rows["mild ERG"] = Row("c-erg", own) if mild["tau_i"] == 1 else Row("erg", mild, like="ERG")
    if task == "no dropout":
        tries = lambda name, *values: tuple({name: y} for y in values)
        rows |= {"ICG": Row("icg"), "TSG*": Row("tsg", variants=tries("scale", 0.5, 1.0, 2.0)),
                 "Self-Guidance": Row("self-guidance", variants=tries("shift", 0.05, 0.1, 0.2)),
                 "S2*": Row("s2", variants=tries("drop", 1, 2)), "PAG*": pag, "SEG*": seg, **auto,
                 "C-ERG, tau_c = 0.3": Row("c-erg", dict(tau_c=0.3))}
    if task == "text" and not photographs:
        place = dict(kappa=0.2, negative="same")
        replaced = lambda kind, **more: Row("mechanism", dict(place, mechanism=kind, **more), like="I-ERG")
        thresholds = tuple(dict(norm_threshold=r) for r in (5.0, 2.0))
        rows |= {"APG": Row("apg", variants=thresholds),
                 "ERG + APG": Row("erg+apg", dict(erg.fixed, norm_threshold=5.0), like="ERG"),
                 "temperature 0.2": replaced("temperature", tau_i=0.2),
                 "identity": replaced("identity"),
                 "smoothing": replaced("smoothing"),
                 "I-ERG, K = 10": Row("i-erg", dict(SAME, K=10, gamma=0.1), like="I-ERG", w_of="I-ERG"),
                 "I-ERG, middle third": Row("i-erg", dict(SAME, layers=third(1))),
                 "I-ERG, last third": Row("i-erg", dict(SAME, layers=third(2))),
                 "ERG, kappa = 0": Row("erg", dict(erg.fixed, kappa=0.0), like="ERG"),
                 "ERG, kappa = 0.6": Row("erg", dict(erg.fixed, kappa=0.6), like="ERG"),
                 "C-ERG, tau_c = 10": Row("c-erg", dict(tau_c=10.0))}
    return rows


def studies_of(sets):
    """(image set, task, checkpoint) of all whose weights are there."""
    found = []
    for name in sets:
        usual = [name, *(f"{name}-{seed}" for seed in range(1, SEEDS[name]))]
        kinds = {task: usual for task in ("text", "class", "unconditional")}
        kinds["no dropout"] = [f"{name}-full-{seed}" for seed in range(SEEDS[name])]
        kinds["weak"] = [f"{training}-quarter" for training in usual]
        for task, names in kinds.items():
            if (name, task) == ("cifar10", "class"):  # its captions hold nothing else
                continue
            for training in names:
                try:
                    weights_file(training)
                except ValueError:
                    continue
                found.append((name, task, training))
    return found


# ---- Choose, then report -----------------------------------------------------------------------------------


def prompt_of(task):
    return task if task in runs.TASKS else "text"


def choose(studies, plans, scale, collect):
    """{study: {label: (best variant, best w, the whole search)}}: variants first, then w."""
    def run(study, row, variant, w, images):
        parameters = row.fixed | variant | ({} if row.method == "none" else dict(w=w))
        return Run(study[2], prompt_of(study[1]), row.method, parameters, list(scale.search_seeds), images,
                   scale.steps, blocks=False)

    tried = {(s, label): [run(s, row, v, scale.probe, scale.variants) for v in row.variants]
             for s in studies for label, row in plans[s].items() if len(row.variants) > 1 and not row.like}
    rows, variant = collect([r for group in tried.values() for r in group], "layers and the like"), {}
    best = lambda group: min(range(len(group)), key=lambda i: value(rows[group[i]], "frechet"))
    for (s, label), group in tried.items():
        variant[s, label] = plans[s][label].variants[best(group)]
    for s in studies:
        for label, row in plans[s].items():
            variant.setdefault((s, label), variant.get((s, row.like), {}) | row.variants[0])
    grid = {(s, label): [run(s, row, variant[s, label], w, scale.search)
                         for w in (scale.weights if row.method != "none" else (1.0,))]
            for s in studies for label, row in plans[s].items() if not row.w_of}
    rows = collect([r for group in grid.values() for r in group], "w")
    chosen = {s: {} for s in studies}
    for (s, label), group in grid.items():
        search = [[r.parameters.get("w", 1.0), *(value(rows[r], m) for m in METRICS if m in rows[r])]
                  for r in group]
        chosen[s][label] = (variant[s, label], group[best(group)].parameters.get("w", 1.0), search)
    for s in studies:
        for label, row in plans[s].items():
            if row.w_of:
                chosen[s][label] = (variant[s, label], chosen[s][row.w_of][1], [])
    return chosen


def choose_mild(scale, collect):
    """tau_i, tau_c and kappa of mild ERG: successive halving on the digits' search seeds."""
    study = ("digits", "text", "digits")
    row = rows_of(*study[1:], None)["ERG"]
    layers = choose([study], {study: {"ERG": row}}, scale, collect)[study]["ERG"][0]
    settings = [dict(tau_i=i, tau_c=c, kappa=k) for i in TAU_I for c in TAU_C
                for k in (KAPPA if i != 1 else KAPPA[:1])]
    table = []
    for weights, images, keep in (((1.5,), scale.variants, 9), ((1.25, 1.5, 2.0), scale.search, 1)):
        group = {}
        for i, p in enumerate(settings):
            method, own = ("c-erg", dict(tau_c=p["tau_c"])) if p["tau_i"] == 1 else ("erg", p | layers)
            for w in weights:
                group[i, w] = Run("digits", "text", method, dict(own, w=w), list(scale.search_seeds), images,
                                  scale.steps, blocks=False)
        rows = collect(list(group.values()), "mild ERG")
        score = [min(value(rows[group[i, w]], "frechet") for w in weights) for i in range(len(settings))]
        order = sorted(range(len(settings)), key=score.__getitem__)
        table.append([[settings[i], score[i]] for i in order])
        settings = [settings[i] for i in order[:keep]]
    return settings[0], table


def report(studies, plans, chosen, scale, collect):
    """The studies with their rows, on seeds that the search has not seen."""
    wanted = {}
    for s in studies:
        for label, row in plans[s].items():
            variant, w, _ = chosen[s][label]
            parameters = row.fixed | variant | ({} if row.method == "none" else dict(w=w))
            wanted[s, label] = Run(s[2], prompt_of(s[1]), row.method, parameters, list(scale.seeds),
                                   scale.images_of(s), scale.steps)
    rows, result = collect(list(wanted.values()), "report"), []
    for s in studies:
        found = {}
        for label in plans[s]:
            run = wanted[s, label]
            if run in rows:
                row = {m: y for m, y in rows[run].items() if m in (*METRICS, "right", "nfe", "seconds")}
                found[label] = dict(method=run.method, parameters=run.parameters, row=row)
        search = {label: points for label, (_, _, points) in chosen[s].items() if points}
        digest = runs.weights_digest(s[2])[:12]
        result.append(dict(set=s[0], task=s[1], weights=s[2], sha256=digest, rows=found, search=search))
    return result


def rounded(y):
    """Numbers of at most five digits, so that the file stays small; strings as they are."""
    if isinstance(y, float):
        return float(f"{y:.5g}")
    return {k: rounded(v) for k, v in y.items()} if isinstance(y, dict) else [rounded(v) for v in y] if \
        isinstance(y, list | tuple) else y


# ---- Pages -------------------------------------------------------------------------------------------------


def estimates(studies, label, metric):
    """(mean over trainings, half of its 95 % interval) of a row, or None."""
    rows = [s["rows"][label]["row"] for s in studies]
    if metric not in rows[0]:
        return None
    pairs = [jackknife(row[metric][0], row[metric][1:]) for row in rows]
    means = [c if metric == "frechet" else row[metric][0] for (c, _), row in zip(pairs, rows)]
    error = sum(e * e for _, e in pairs)**0.5 / len(pairs)
    return sum(means) / len(means), half_width(error, 19 * len(pairs))


def table(studies, real):
    """One task on one image set: a row a method, trainings averaged."""
    labels = [label for label in studies[0]["rows"] if all(label in s["rows"] for s in studies)]
    wide = [m for m in METRICS if m != "prompt" or studies[0]["task"] != "unconditional"]
    lines = [f"| | w | {' | '.join(wide)} | Frechet by training |", "|---" * (len(wide) + 3) + "|"]
    for label in labels:
        cells = ["{:.3f} ± {:.3f}".format(*estimates(studies, label, m)) for m in wide]
        by = ", ".join(f"{value(s['rows'][label]['row'], 'frechet'):.2f}" for s in studies)
        given = [s["rows"][label]["parameters"] for s in studies]
        ws = ", ".join(f"{p['w']:g}" if "w" in p else "" for p in given)
        lines.append(f"| {label} | {ws if given[0] else ''} | {' | '.join(cells)} | {by} |")
    error = lambda values: half_width(jackknife(values[0], values[1:])[1], 19)
    means = [f"{value(real, m):.3f} ± {error(real[m]):.3f}" if m in real else "" for m in wide]
    return [*lines, f"| other real images | | {' | '.join(means)} | |"]


def markdown(record):
    (name, task), n = FULL.more
    more = f"{n:,} of {name}, {TASKS[task]}"
    lines = ["# Evidence", "", f"`{record['command']}`, {record['minutes']:.0f} process minutes in all: "
             f"{record['hardware']}; torch {record['torch']}.", "",
             f"""\
The rules and the verdicts are in [CLAIMS.md](../CLAIMS.md). All tables here are exploratory.
{record['images']:,} images a row (but {more}), {record['steps']} Euler steps,
± half of the 95 % interval. The Frechet distance is extrapolated to infinitely many images. The last row
holds other real images against the same reference: their distance should be 0, and what it is shows how far
to trust the extrapolation.

The pictures are of the search seeds ({FULL.search} images a row), averaged over trainings; large: each at its
best w. Precision and recall of so few images are higher than in the tables.""", ""]
    lines += [f"![Frontiers on {name}](frontiers-{name}.png)\n" for name in sorted(record["real"])]
    if record.get("mild"):
        lines += [f"Mild ERG: {', '.join(f'{k} = {v:g}' for k, v in record['mild'].items())}, chosen on the "
                  "digits' search seeds.", ""]
    for name in claims.SETS:
        for task, title in TASKS.items():
            there = [s for s in record["studies"] if (s["set"], s["task"]) == (name, task)]
            if there:
                made = ", ".join(f"{s['weights']} ({s['sha256']})" for s in there)
                lines += [f"## {name}: {title}", "", f"Weights: {made}.", ""]
                if any(s["rows"] for s in there):
                    lines += [*table(there, record["real"][name]), "", second(there), ""]
                lines += [searched(there), ""]
    return "\n".join(lines)


def searched(studies):
    """The Frechet distance of every method on the search seeds, at its best w, averaged over trainings."""
    best = {label: [min(point[1] for point in s["search"][label]) for s in studies]
            for label in studies[0]["search"] if all(label in s["search"] for s in studies)}
    means = sorted((sum(values) / len(values), label) for label, values in best.items())
    return "On the search seeds: " + ", ".join(f"{label} {mean:.3f}" for mean, label in means) + "."


def second(studies):
    """The second parameters that the search chose, by training."""
    own = {}
    for label in studies[0]["rows"]:
        found = []
        for s in studies:
            p = s["rows"].get(label, {"parameters": {}})["parameters"]
            others = ("weak", "scale", "shift", "drop", "norm_threshold")
            parts = [f"layers {p['layers'][0]}:{p['layers'][-1] + 1}"] if "layers" in p else []
            found.append(" ".join(parts + [f"{k} = {p[k]}" for k in others if k in p]))
        if any(found):
            own[label] = ", ".join(found)
    return "Chosen: " + "; ".join(f"{label} {text}" for label, text in own.items()) + "." if own else ""


SHOWN = ("CFG", "AutoGuidance", "ICG", "Self-Guidance", "S2*", "PAG*", "SEG*", "C-ERG", "I-ERG", "ERG")


def draw(record, name):
    """Frontiers on an image set: all w of each method on the search seeds, and its best one (large)."""
    groups = {task: [s for s in record["studies"] if (s["set"], s["task"]) == (name, task)]
              for task in ("text", "no dropout", "unconditional")}
    groups = {task: there for task, there in groups.items() if there}
    figure = Figure(figsize=(4.2 * max(1, len(groups)), 7), layout="constrained")
    for column, (task, there) in enumerate(groups.items()):
        for line, (x, y) in enumerate((("recall" if task == "unconditional" else "prompt", "frechet"),
                                       ("recall", "precision"))):
            ax = figure.add_subplot(2, len(groups), line * len(groups) + column + 1)
            mean = lambda label, m: [sum(v) / len(v) for v in zip(
                *([point[1 + METRICS.index(m)] for point in s["search"][label]] for s in there))]
            for label in (label for label in SHOWN if all(label in s["search"] for s in there)):
                xs, ys, frechet = mean(label, x), mean(label, y), mean(label, "frechet")
                best = frechet.index(min(frechet))
                ours = "ERG" in label
                ax.plot(xs, ys, "o-", ms=2.5, lw=2 if ours else 1, color=colour(label), alpha=0.8)
                ax.plot(xs[best], ys[best], "*" if ours else "D", ms=13 if ours else 6, color=colour(label),
                        mec="white", mew=0.5, label=label)
            none = mean("no guidance", x)[0], mean("no guidance", y)[0]
            ax.plot(*none, "ks", ms=7, label="no guidance")
            if y == "frechet":
                ax.set_ylim(-0.1 * none[1], 1.6 * none[1])
            ax.set_xlim(0.97 * none[0] if x == "prompt" else None)
            ax.set_xlabel({"prompt": "prompt accuracy", "recall": "recall"}[x])
            ax.set_ylabel({"frechet": "Frechet distance", "precision": "precision"}[y])
            ax.set_title(f"{name}: {TASKS[task]}" if line == 0 else "", fontsize=9)
            if line == 0:
                ax.legend(fontsize=7, frameon=False)
    return figure


def write(out, record):
    for name, text in (("evidence.json", json.dumps(record) + "\n"), ("evidence.md", markdown(record))):
        write_whole(out / name, lambda file: file.write(text.encode()))
    for name in record["real"]:
        figure = draw(record, name)
        write_whole(out / f"frontiers-{name}.png", lambda file: figure.savefig(file, format="png", dpi=90))
    target = RESULTS.parent if out == RESULTS else out
    write_whole(target / "CLAIMS.md", lambda file: file.write(claims.page(record["studies"]).encode()))


# ---- The command -------------------------------------------------------------------------------------------


def train_more(sets, data_dir, device):
    """What train_toy.py makes with other seeds, and without caption dropout; what is there stays."""
    for name in sets:
        more = {f"{name}-{seed}": [f"--seed={seed}"] for seed in range(1, SEEDS[name])}
        more |= {f"{name}-full-{seed}": [f"--seed={seed}", "--full-captions"] for seed in range(SEEDS[name])}
        for label, flags in more.items():
            if (TRAININGS / f"{label}.pt").is_file():
                continue
            folder = TRAININGS / label
            given = [] if name == "digits" or data_dir is None else [f"--data-dir={Path(data_dir) / name}"]
            given += [f"--device={device}"] if device else []
            command = [sys.executable, "train_toy.py", f"--dataset={name}", f"--out={folder}", *flags, *given]
            subprocess.run([*command, "--samples=100", "--steps=8"], check=True, cwd=runs.ROOT)
            for part in ("-early", "-quarter", ""):
                shutil.copy(folder / f"{name}{part}.pt", TRAININGS / f"{label}{part}.pt")


def arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("step", nargs="?", default="sample", choices=("sample", "trainings", "page"), help="to do (sample)")
    add("--finished", action="store_true", help="report what is in the cache, and sample nothing for it")
    add("--quick", action="store_true", help="the shipped digits, few images: a try of it all, not a result")
    add("--sets", nargs="+", choices=data.NAMES, default=list(data.NAMES), help="image sets (all)")
    add("--data", type=place, help="folder with mnist/ and cifar10/, downloaded when missing (data)")
    add("--out", type=place, help="folder to write to (experiments/results; --quick: out/quick)")
    add("--cache", default=str(runs.CACHE), type=place, help="folder of the finished runs (out/cache)")
    add("--device", choices=("cuda", "mps", "cpu"), help="chosen automatically when not given")
    add("--bf16", action="store_true", help="sample in bfloat16, for processors that are faster with it")
    return parser


def main(step, finished, quick, sets, data, out, cache, device, bf16):
    out = Path(out or (runs.ROOT / "out" / "quick" if quick else RESULTS)).resolve()
    if step == "page":
        with reading(out / "evidence.json", "make it with `python -m experiments.evidence`"):
            record = json.loads((out / "evidence.json").read_text())
        return write(out, record)
    if step == "trainings":
        return train_more(sets, data, device)
    writable(Path(cache) / "row", *(out / name for name in ("evidence.json", "evidence.md")))
    if "LOCAL_RANK" in os.environ and torch.cuda.device_count():  # several processes may share a GPU
        os.environ["LOCAL_RANK"] = str(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    scale, chosen_device = QUICK if quick else FULL, choose_device(device)
    runs.BF16, runs.DATA = bf16, data
    if chosen_device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    runs.start_processes(chosen_device)
    used = {}

    def collect(wanted, title):
        if finished and title == "report":
            wanted = [run for run in wanted if runs.read(run, Path(cache))]
        rows = runs.collect(wanted, cache, chosen_device, title)
        used.update(rows)
        return rows

    studies = [s for s in studies_of(["digits"] if quick else sets)
               if not quick or (WEIGHTS / f"{s[2]}.pt").is_file()]
    mild, halving = choose_mild(scale, collect)
    plans = {s: rows_of(s[1], s[2], mild) for s in studies}
    result = report(studies, plans, choose(studies, plans, scale, collect), scale, collect)
    names = {name for name, *_ in studies}
    real = {name: runs.measure_real(name, scale.images, chosen_device) for name in names}
    if not dist.is_initialized() or dist.get_rank() == 0:
        world = int(os.environ.get("WORLD_SIZE", 1))
        launcher = "python" if world == 1 else f"torchrun --standalone --nproc_per_node {world}"
        record = dict(command=f"{launcher} -m experiments.evidence {shlex.join(sys.argv[1:])}".strip(),
                      hardware="; ".join(sorted({row["hardware"] for row in used.values()})),
                      torch="; ".join(sorted({row["torch"] for row in used.values()})),
                      minutes=sum(row["seconds"] for row in used.values()) / 60, steps=scale.steps,
                      images=scale.images, mild=mild, halving=halving, real=real, studies=result)
        write(out, rounded(record))
        print(f"{len(used)} runs, {record['minutes']:.1f} minutes of sampling -> {out}/evidence.md")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main, arguments(), stopped="stopped; what is finished is cached, and the same command goes on")
