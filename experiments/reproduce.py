"""Every table and figure of the paper, on the toy, from the shipped weights.

    python -m experiments.reproduce table1              # one entry, on every checkpoint that is shipped
    python -m experiments.reproduce all --quick         # all of them in minutes, on the digits
    torchrun --standalone --nproc_per_node 2 -m experiments.reproduce all     # several processes or GPUs
    python -m experiments.reproduce claims              # the verdicts, from the results that are there

Each entry writes NAME.json, NAME.md and NAME.png into --out. Runs are cached by content under out/cache: a
call that was stopped goes on where it was, and entries share what they have in common.
"""
import itertools
import json
import os
import shlex
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from experiments import claims, entries, inside, report, runs
from toy import data, files
from toy.command import Parser, place, run
from toy.sampling import WEIGHTS, choose_device, describe

RESULTS = Path(__file__).resolve().parent / "results"
ENTRIES = {**entries.RUN_ENTRIES, **inside.ENTRIES}
TITLES = {
    "table1": "Table 1: text-to-image", "table2": "Table 2: unconditional",
    "table3": "Table 3: class-conditional", "table4": "Table 4: steps K and step size gamma",
    "table5": "Table 5: components", "table6": "Table 6: mechanisms", "figure2": "Figure 2: Pareto fronts",
    "figure4": "Figure 4: tau_c by w", "figure5": "Figure 5: variances of the first velocity",
    "figure6": "Figure 6: parallel and orthogonal differences",
    "figure7": "Figure 7: certainty of attention by layer", "figure8": "Figure 8: range of layers",
    "figure9": "Figure 9: kappa", "figure15": "Figure 15: kappa by tau_i",
    "figure16": "Figure 16: ranges of layers, in pictures",
    "variants": "Beyond the paper: what might mend the Frechet distance",
    "suggest": "Beyond the paper: layers and kappa without a search",
}


def arguments():
    shipped = sorted(file.stem for file in WEIGHTS.glob("*.pt"))
    parser = Parser(__doc__)
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", help=f"one or more of {', '.join(ENTRIES)}, claims, or all")
    add("--quick", action="store_true", help="digits, few images, three seeds: a try of it all, not a result")
    add("--weights", nargs="+", metavar="CHECKPOINT", help=f"of {', '.join(shipped)}")
    add("--out", type=place,
        help="folder to write to (experiments/results; --quick: out/quick, --weights: out/results)")
    add("--cache", default=str(runs.CACHE), type=place, help="folder of the finished runs (out/cache)")
    add("--device", choices=("cuda", "mps", "cpu"), help="chosen automatically when not given")
    add("--bf16", action="store_true", help="sample in bfloat16, for processors that are faster with it")
    return parser


def chosen_weights(options):
    """The checkpoints to run on; a clear error for one that is not there."""
    shipped = sorted(file.stem for file in WEIGHTS.glob("*.pt"))
    complete = [name for name in data.NAMES if f"{name}-early" in shipped]
    names = options.weights or (["digits"] if options.quick else complete)
    if not names:
        raise ValueError(f"there are no weights under {WEIGHTS}; train some with train_toy.py")
    for name in names:
        if name not in shipped:
            raise ValueError(f"--weights {name} must be one of {', '.join(shipped)}")
        compares = {"all", "table1", "table2"} & set(options.names)
        if compares and f"{name}-early" not in shipped:
            raise ValueError(f"--weights {name}: {', '.join(sorted(compares))} need {name}-early.pt for "
                             "AutoGuidance, which is not there")
    return names


def command(argv):
    """The command that repeats this run, as one would type it."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    launcher = "python" if world == 1 else f"torchrun --standalone --nproc_per_node {world}"
    return f"{launcher} -m experiments.reproduce {shlex.join(argv)}"


def write(out, name, record, figure):
    """NAME.json, .md and .png, each whole or not at all."""
    page, numbers = report.markdown(name, record, ENTRIES[name].__doc__), json.dumps(record, indent=1) + "\n"
    files.write_whole(out / f"{name}.json", lambda file: file.write(numbers.encode()))
    files.write_whole(out / f"{name}.md", lambda file: file.write(page.encode()))
    files.write_whole(out / f"{name}.png", lambda file: figure.savefig(file, format="png", dpi=110))


def sample_entries(names, weights, scale, cache, device):
    """Run what the entries wish for. Returns {(entry, checkpoint): result}, and {the same: its rows}."""
    used, rounds = {}, itertools.count(1)

    def collect(wishes):
        wanted = [run for runs_of_entry in wishes.values() for run in runs_of_entry]
        rows = runs.collect(wanted, cache, device, title=f"round {next(rounds)}")
        for key, runs_of_entry in wishes.items():
            used.setdefault(key, {}).update({run: rows[run] for run in runs_of_entry})
        return {key: {run: rows[run] for run in runs_of_entry} for key, runs_of_entry in wishes.items()}

    generators = {(name, checkpoint): entries.RUN_ENTRIES[name](scale, checkpoint)
                  for name in names if name in entries.RUN_ENTRIES for checkpoint in weights}
    return entries.advance(generators, collect), used


def main(argv):
    options = arguments().parse_args(argv)
    known = [*ENTRIES, "claims", "all"]
    for name in options.names:
        if name not in known:
            raise ValueError(f"NAME={name!r} must be one of {', '.join(known)}")
    weights = chosen_weights(options)
    partial = runs.ROOT / "out" / ("quick" if options.quick else "results")
    out = Path(options.out or (partial if options.quick or options.weights else RESULTS))
    files.writable(Path(options.cache) / "row", *(out / name for name in options.names))
    scale = entries.QUICK if options.quick else entries.FULL
    names = [name for name in ENTRIES if name in options.names or "all" in options.names]
    device, runs.BF16 = choose_device(options.device), options.bf16
    runs.start_processes(device)
    results, used = sample_entries(names, weights, scale, options.cache, device)
    first = not dist.is_initialized() or dist.get_rank() == 0
    about = {name: getattr(scale, name) for name in ("steps", "seeds", "search_seeds", "budget")}
    digests = {name: runs.weights_digest(name)[:12] for name in weights}
    for name in names if first else []:
        record = dict(name=name, title=TITLES[name], command=command(argv), scale=about,
                      weights=digests)
        if name in entries.RUN_ENTRIES:
            record["checkpoints"] = {w: results[name, w] for w in weights}
            rows = {run: row for w in weights for run, row in used[name, w].items()}.values()
            record["minutes"] = sum(row["seconds"] for row in rows) / 60
            for what in ("hardware", "torch"):  # of the runs: this call may have found all in the cache
                record[what] = "; ".join(sorted({row[what] for row in rows}))
            figure = report.draw(name, record)
        else:
            record.update(hardware=f"1 process with {describe(device)}", torch=str(torch.__version__))
            record, figure = inside.run(name, record, scale, weights, device)
        write(out, name, record, figure)
        print(f"{TITLES[name]}: {record['minutes']:.1f} minutes of sampling -> {out / name}.md", flush=True)
    if first and ({"claims", "all"} & set(options.names)):
        print(f"{claims.write(out, explained=out == RESULTS)} claims -> {out / 'CLAIMS.md'}")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    run(lambda **_: main(sys.argv[1:]), arguments(),
        stopped="stopped; what is finished is cached, and the same command goes on")
