"""Do the tests notice a wrong formula? Plant faults one at a time, run the tests that matter, list the survivors.

    python tests/mutate.py                          # 150 faults, the sample of seed 0
    python tests/mutate.py --only erg.py --faults 1000 --jobs 2
    python tests/mutate.py --list                   # which faults, without running anything

Faults come from the syntax tree of the functions in TARGETS: an operator, comparison, constant, sign or name is
changed, operands or arguments are swapped, a condition is negated, a keyword argument or a call is dropped. Code that
only checks and raises is left out; so are guards against division by zero, seeds, defaults and sizes of chunks. A fault
is written into a temporary copy of the tracked files, never into this one. A hang counts as caught. The sample depends
on the text of each fault alone, so it stays the same where the code does. The status is 0 if 97 % are caught and all survivors are explained.
"""
import argparse
import ast
import copy
import os
import queue
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGETS = [  # file, functions (a class stands for its methods), tests: the quickest that is likely to fail comes first
    ("erg.py", "hopfield_energy hopfield_step energy_attention _temper", "test_energy.py test_rectify.py"),
    ("erg.py", "guide project encode _tempered APG ERG.rectifies ERG.encode ERG.kappa Guidance _match",
     "test_guidance.py test_rectify.py"),
    ("erg.py", "_Rectifier.chooses _Rectifier.answer AttentionCalls.middle_third", "test_rectify.py test_guidance.py"),
    ("tiny_dit.py", "tokenize drop_words Attention mlp TextBlock CaptionEncoder modulate JointBlock frequencies TinyDiT "
     "flow_matching_loss sample",
     "test_tiny_dit.py test_guidance.py 'test_sample_toy.py::test_shipped_weights_draw_what_the_prompt_says[digits]'"),
    ("train_toy.py", "caption_tables draw_batch learning_rate Loss Training fit_iterations", "test_train_toy.py -k "
     "'learning_rate or batches or speed or adams or ema or bites or whole or resume or two_processes'"),
    ("toy/metrics.py", "frechet_distance distances ball_radii precision_recall_density_coverage "
     "AttributeClassifier.accuracy shift_and_flip", "test_metrics.py"),
    ("toy/sampling.py", "CADS guided_by generate", "test_sample_toy.py -k 'not mnist and not cifar10'"),
    ("experiments/rivals.py", "identity_attention gaussian_kernel gaussian_blur SmoothedAttention Rewired Contrast "
     "evaluate_together self_guidance tsg s2 make_icg make_seg make_autoguidance make_mechanism", "test_rivals.py"),
    ("experiments/statistics.py", "t_below t_quantile jackknife two_sided equivalence mcnemar benjamini_hochberg difference",
     "test_evidence.py -k 'student or paired or jackknife or scipys'"),
    ("experiments/claims.py", "paired chosen judge verdict verdicts", "test_evidence.py -k 'verdicts or gains or claims'"),
]
EQUIVALENT = {  # file, function: old -> new, and why no test can tell
    "experiments/rivals.py, SmoothedAttention.__call__: image.transpose(-1, -2).unflatten -> image.transpose(-1, 2).unflatten":
    "of four dimensions, 2 is -2",
    "erg.py, Guidance.predictions: model(x, times[:B], matched) -> model(x, times[B:], matched)": "all times are the same",
    "train_toy.py, fit_iterations: [mark for mark in marks[1:] if now - mark[0] > window] -> "
    "[mark for mark in marks[1:] if (now - mark[0] >= window)]": "no time is the window to the last bit",
    "toy/metrics.py, shift_and_flip: torch.rand(B, 1, generator=generator, device=device) < 0.5 -> "
    "(torch.rand(B, 1, generator=generator, device=device) <= 0.5)": "one number in 2**24 is 0.5",
}
PAIRS = """Add Sub, Mult Div, Lt LtE, Gt GtE, Eq NotEq, Is IsNot, In NotIn, And Or, BitAnd BitOr, min max, amin amax, any all,
 sum mean, sin cos, clamp_min clamp_max, zeros ones, rand randn, sqrt square, v_pos v_neg, real fake, rows columns, shift scale"""
OTHER = dict(FloorDiv="Mult", Mod="FloorDiv", Pow="Mult", exp="log", ceil="floor", argmax="argmin")
OTHER |= {a: b for pair in PAIRS.split(",") for a, b in (pair.split(), pair.split()[::-1])}
Fault = namedtuple("Fault", "file line text source tests")  # text is "function: old -> new", source the whole file


def other(operator):
    return getattr(ast, OTHER.get(type(operator).__name__, ""), lambda: None)()


def variants(node, parent):
    """Wrong versions of a node, as source text."""
    def changed(**fields):
        new = copy.copy(node)
        vars(new).update(fields)
        return ast.unparse(new)

    if node is getattr(parent, "test", None) or node in getattr(parent, "ifs", ()):
        yield f"not ({ast.unparse(node)})"
    match node:
        case ast.BinOp(op=ast.MatMult()):
            yield changed(left=node.right, right=node.left)
        case ast.BinOp() | ast.AugAssign() | ast.BoolOp() if other(node.op):
            yield changed(op=other(node.op))
        case ast.Compare(ops=ops):
            yield from (changed(ops=[*ops[:i], other(op), *ops[i + 1:]]) for i, op in enumerate(ops))
        case ast.UnaryOp():
            yield ast.unparse(node.operand)
        case ast.Constant(value=bool() | int() | float() as value) if not 0 < value < 1e-5:
            yield str(not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else 2 * value or 1.0)
        case ast.Attribute(attr="T" | "mT"):
            yield ast.unparse(node.value)
        case ast.Attribute(attr=name) if name in OTHER:
            yield changed(attr=OTHER[name])
        case ast.Name(id=name, ctx=ast.Load()) if name in OTHER:
            yield OTHER[name]
        case ast.Slice() if node.lower or node.upper:
            yield changed(lower=node.upper, upper=node.lower)
        case ast.Call(args=args, keywords=named):
            for i, keyword in enumerate(named):
                if keyword.arg not in ("device", "eps"):  # the tests have one device
                    yield changed(keywords=named[:i] + named[i + 1:])
            for i in range(len(args) - 1):
                symmetric = re.search("(min|max|promote_types|transpose|zip|isinstance|getattr)$", ast.unparse(node.func))
                if not symmetric and not isinstance(args[i + 1], ast.Starred):
                    yield changed(args=[*args[:i], args[i + 1], args[i], *args[i + 2:]])
        case ast.Expr(value=ast.Call()):
            yield "pass"
    match node:
        case ast.BinOp(left=ast.Constant(value=1), op=ast.Sub()):
            yield ast.unparse(node.right)  # w in the place of 1 - w, and the reverse
        case ast.BinOp(left=ast.Name(id="w" | "t" | "s" | "g" as name), op=ast.Mult()):
            yield f"(1 - {name}) * {ast.unparse(node.right)}"


def inside(node):
    """(node, its parents from the outside in) of all code below a node that computes something."""
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            raises = isinstance(child, ast.If) and not child.orelse and isinstance(child.body[0], ast.Raise)
            checks = isinstance(child, ast.Expr) and re.match(r"(erg\.|data\.)?_?(check|require|super)", ast.unparse(child))
            free = isinstance(child, (ast.Call, ast.Assign)) and re.search(r"^chunk = |manual_seed\(.*\)$", ast.unparse(child))
            text = isinstance(child, (ast.Raise, ast.JoinedStr)) or field in ("annotation", "returns", "decorator_list", "defaults")
            if isinstance(child, ast.AST) and not (raises or checks or text or free):
                yield child, [node]
                yield from ((below, [node, *parents]) for below, parents in inside(child))


def find_faults(file, names, tests):
    """All faults of the named functions."""
    source, found, missing = (ROOT / file).read_bytes(), {}, set(names.split())
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    span = lambda node: (starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset)
    for top in ast.parse(source).body:
        for part in top.body if isinstance(top, ast.ClassDef) else [top]:
            name = getattr(part, "name", None) or ast.unparse(getattr(part, "target", ast.Name("")))
            labels = [name] if part is top else [f"{top.name}.{name}", top.name]
            chosen = not set(names.split()).isdisjoint(labels) and name != "__post_init__"  # which checks
            missing -= set(labels)
            for node, parents in inside(part) if chosen and isinstance(part, (ast.FunctionDef, ast.AnnAssign)) else ():
                start, end = span(node) if hasattr(node, "lineno") else (0, 0)
                for new in variants(node, parents[-1]):
                    bare = isinstance(node, (ast.Call, ast.Slice, ast.stmt)) or source[start - 1:start] + source[end:end + 1] == b"()"
                    new = new if bare or " " not in new else f"({new})"
                    wide = [span(p) for p in [node, *parents[::-1]] if isinstance(p, (ast.expr, ast.keyword, ast.AnnAssign))]
                    line = starts[node.lineno - 1], starts[node.end_lineno]
                    first, last = next(((a, b) for a, b in wide if b - a > 24), line)
                    after = source[first:start] + new.encode() + source[end:last]
                    text = " -> ".join(" ".join(part.decode().split()) for part in (source[first:last], after))
                    whole = source[:first] + after + source[last:]
                    found[whole] = Fault(file, node.lineno, f"{labels[0]}: {text}", whole, tests)
    if missing:
        raise SystemExit(f"{file} has no {', '.join(sorted(missing))}: correct TARGETS")
    return list(found.values())


def passes(folder, tests, limit):
    """Whether the tests pass in that copy of the tree, within `limit` seconds."""
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")  # stale bytecode would hide faults
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *shlex.split(tests)]
    process = subprocess.Popen(command, cwd=folder / "tests", env=environment, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        return process.wait(limit) == 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that tests started
        return process.wait() == 0


def main(options):
    faults = [fault for row in TARGETS if options.only in (None, row[0]) for fault in find_faults(*row)]
    faults.sort(key=lambda fault: random.Random(f"{options.seed} {fault.file} {fault.text}").random())
    total, faults = len(faults), sorted(faults[:options.faults], key=lambda fault: (fault.file, fault.line))
    if options.list:
        print(*(f"{fault.file}:{fault.line}: {fault.text}" for fault in faults), sep="\n")
        return 0
    began, copies, survivors, usual = time.time(), queue.SimpleQueue(), [], {}
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    def survives(fault):
        place = copies.get()
        (place / fault.file).write_bytes(fault.source)
        passed = passes(place, fault.tests, 60 + 5 * usual[fault.tests])
        shutil.copy(ROOT / fault.file, place / fault.file)
        copies.put(place)
        return passed

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        for place in (Path(folder, str(job)) for job in range(options.jobs)):
            for name in tracked.split("\0")[:-1]:
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, place / name)
            copies.put(place)
        for tests in {fault.tests for fault in faults}:
            start = time.time()
            if not passes(place, tests, 1800):
                raise SystemExit(f"this fails without a fault: cd tests && python -m pytest {tests}")
            usual[tests] = time.time() - start
        for done, (fault, survived) in enumerate(zip(faults, pool.map(survives, faults)), start=1):
            if survived:
                survivors.append(fault)
                print(f"{fault.file}:{fault.line}: {fault.text}\n    "
                      f"{EQUIVALENT.get(f'{fault.file}, {fault.text}', 'NOT EXPLAINED')}", flush=True)
            if done % 25 == 0:
                print(f"{done} of {len(faults)} after {(time.time() - began) / 60:.0f} minutes", flush=True)
    print(f"\n{'file':24} planted  caught  survived")
    for file in [*dict.fromkeys(fault.file for fault in faults), ""]:
        planted, lived = (sum(file in ("", fault.file) for fault in group) for group in (faults, survivors))
        print(f"{file or f'all, of {total:,}':24} {planted:7}  {planted - lived:6}  {lived:8}")
    share, unknown = 1 - len(survivors) / len(faults), [f for f in survivors if f"{f.file}, {f.text}" not in EQUIVALENT]
    print(f"{share:.1%} caught, {len(unknown)} survivors not explained, {(time.time() - began) / 60:.0f} minutes")
    return int(share < 0.97 or len(unknown) > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=150, help="how many, at most (default 150)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample, if there are more")
    parser.add_argument("--only", choices=sorted({row[0] for row in TARGETS}), help="faults in this file alone")
    parser.add_argument("--jobs", type=int, default=1, help="faults that are tested at a time")
    parser.add_argument("--list", action="store_true", help="show the faults, and run nothing")
    sys.exit(main(parser.parse_args()))
