"""Kills and full disks, for which the tests have no time. Not collected by pytest; on Linux, and as root for the disks.

    python tests/soak.py                                  # 20 of each: some 3 minutes on an idle core
    python tests/soak.py --kills 5 --fills 0 --seed 7

A kill -9 hits a small training at a random moment: in the classifier, in training, while a file is written, in the
table. A full disk is a small tmpfs with room for a random part of what a training writes. Each time all files must be
whole, the training goes on (with --resume where there is something to resume), and ends bit for bit as one that
nothing disturbed.
"""
import argparse
import collections
import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_toy  # noqa: E402
from toy import drawing, files  # noqa: E402

OPTIONS = dict(iterations=60, batch=16, samples=12, classifier_iterations=20, steps=3, save_every=10, device="cpu")
PHASES = {"classifier": (train_toy, "train_classifier"), "training": (train_toy, "train"), "writing": (files, "write_whole"),
          "table": (train_toy, "compare")}
FORK = multiprocessing.get_context("fork")  # no start of Python, and no import, for each training


def job(out, resume, sender):
    """A training in a process of its own; sends when a phase begins and ends, and at last an error or "done"."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    torch.set_num_threads(1)
    drawing.draw_grid = train_toy.draw_loss = lambda *given: None
    digits = train_toy.RECIPES["digits"]
    train_toy.RECIPES["digits"] = dataclasses.replace(digits, model={**digits.model, "depth": 2, "width": 32})
    for phase, (module, name) in PHASES.items():
        def tell(*given, phase=phase, work=getattr(module, name), **named):
            sender.send((phase, time.time()))
            result = work(*given, **named)
            sender.send((f"{phase} ends", time.time()))
            return result
        setattr(module, name, tell)
    try:
        train_toy.main(out=str(out), resume=resume, **OPTIONS)
        sender.send(("done", time.time()))
    except (files.DiskFull, files.DataError) as error:
        sender.send((str(error), time.time()))


def train(out, kill=None):
    """Run a training, on from what `out` holds, to its end or to kill = (phase, which one, seconds); its messages."""
    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=job, args=(out, (out / "digits-training.pt").exists(), sender))
    child.start()
    sender.close()
    messages, left = [], kill and kill[1]
    while True:
        try:
            messages.append(receiver.recv())
        except EOFError:
            child.join()
            return messages
        if kill and messages[-1][0] == kill[0] and (left := left - 1) == 0:
            time.sleep(kill[2])
            child.kill()


def result(out):
    """All that a training ends in, but for its times."""
    found = {}
    for path in sorted(out.glob("*.pt")):
        with files.load(path, "a whole file") as state:
            found[path.name] = {name: y for name, y in state.items() if name not in ("seconds", "notes")}
    return found, json.loads((out / "digits.json").read_text())["table"] if (out / "digits.json").exists() else None


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))
    if isinstance(a, (dict, list, tuple)):
        pairs = [(a[key], b.get(key)) for key in a] if isinstance(a, dict) else zip(a, b)
        return len(a) == len(b) and all(equal(x, y) for x, y in pairs)
    return a == b


def finish(out, expected):
    """Whether all files are whole, and the training that goes on ends as expected, with nothing left behind."""
    result(out)
    messages = train(out)
    assert messages[-1][0] == "done", messages[-1]
    same = equal(result(out), expected) and not list(out.glob("*.part"))
    print("." if same else "F", end="", flush=True)
    return same


def kills(number, folder, phases, expected, dice):
    rows = collections.defaultdict(list)
    for i in range(number):
        out, phase = folder / f"kill{i}", list(PHASES)[i % len(PHASES)]
        which = dice.randrange(len(phases[phase]))
        train(out, (phase, which + 1, dice.uniform(0, phases[phase][which])))
        rows[f"killed in {phase}"].append((len(list(out.glob("*.part"))), finish(out, expected)))
        shutil.rmtree(out)
    return rows


def fills(number, folder, expected, size, dice):
    rows, disk = collections.defaultdict(list), folder / "disk"
    disk.mkdir()
    for i in range(number):
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={4 * size}", "tmpfs", disk], capture_output=True, text=True)
        if mounted.returncode:
            print(f"no full disks: {mounted.stderr.strip()}")
            break
        try:
            room = dice.randrange(size)
            (disk / "full").write_bytes(bytes(shutil.disk_usage(disk).free - room))
            error = train(disk / "out")[-1][0]
            (disk / "full").unlink()
            said = "no space for" in error and "bytes" in error or "No space left" in error
            rows["disk full" if said else f"disk full: {error}"].append((0, finish(disk / "out", expected) and said))
        finally:
            subprocess.run(["umount", disk], check=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name, default in (("kills", 20), ("fills", 20), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options, began = parser.parse_args(), time.time()
    dice = random.Random(options.seed)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and the disk is unmounted
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "undisturbed"
        messages = train(out)
        assert messages[-1][0] == "done", messages[-1]
        expected, size = result(out), sum(path.stat().st_size for path in out.iterdir())
        phases = {phase: [b - a for a, b in zip(*([t for name, t in messages if name == wanted] for wanted in (phase, f"{phase} ends")))]
                  for phase in PHASES}
        rows = kills(options.kills, Path(folder), phases, expected, dice) | fills(options.fills, Path(folder), expected, size, dice)
    print(f"\n{'':24}{'times':>8}{'left a temporary':>18}{'identical in the end':>22}")
    for name, found in rows.items():
        print(f"{name:24}{len(found):>8}{sum(left for left, _ in found):>18}{sum(same for _, same in found):>22}")
    print(f"{time.time() - began:.0f} s, seed {options.seed}, {size / 1e6:.1f} MB a training")
    sys.exit(not all(same for found in rows.values() for _, same in found))


if __name__ == "__main__":
    main()
