"""The paper's claims, one by one, judged on the results of reproduce.py: holds, does not hold, undecided.

A claim is a number that should be positive, a value a seed. It holds on a checkpoint where the 95 %
interval lies above 0, does not hold where it lies below, and is undecided otherwise. Over all checkpoints
it is "mixed" where they disagree.
"""
import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from experiments.report import TITLES, number, pareto_front
from experiments.statistics import difference, gain, judge
from toy import data
from toy.files import write_whole
from toy.metrics import BETTER

# ---- Tests: (the result of a checkpoint, a metric) -> (mean, half width), or (mean, half width, verdict) ---


def values(result, label, metric):
    return result["rows"][label]["values"][metric]


def better(result, a, b, metric, comparisons=1):
    """(mean, half width) of the gain of row a over row b."""
    return gain(values(result, a, metric), values(result, b, metric), BETTER[metric], comparisons)


def verdict(gains, holds=all, fails=any):
    """One verdict of several gains."""
    found = [judge(*g) for g in gains]
    if holds(v == "holds" for v in found):
        return "holds"
    return "does not hold" if fails(v == "does not hold" for v in found) else "undecided"


def beats(a, b):
    """Row a is better than row b in a metric."""
    return lambda result, metric: better(result, a, b, metric)


def beats_all(a, *others):
    """Row a is better than each of the others, or of all rows. Not so, if one is ahead (Bonferroni)."""
    def test(result, metric):
        rows = others or [label for label in result["rows"] if label != a]
        gains, strict = ([better(result, a, b, metric, n) for b in rows] for n in (1, len(rows)))
        found = verdict(gains)
        return (*min(gains), found if found == "holds" else verdict(strict, holds=lambda _: False))
    return test


def one_beats(labels, b):
    """The best of some rows is better than row b, with Bonferroni's interval; not so, if b beats them all."""
    def test(result, metric):
        gains = [better(result, a, b, metric, len(labels)) for a in labels]
        return (*max(gains, key=lambda g: g[0] - g[1]), verdict(gains, any, all))  # the most certain of them
    return test


def no_gain(a, b):
    """Row a is not better than row b beyond the interval: few samples show that easily."""
    def test(result, metric):
        mean, half = better(result, a, b, metric)
        return mean, half, "does not hold" if mean > half else "holds"
    return test


def group_beats(these, those):
    """The mean of some rows is better than that of others; each a list of labels or a function."""
    def test(result, metric):
        groups = [group(result) if callable(group) else group for group in (these, those)]
        means = [[sum(v) / len(v) for v in zip(*(values(result, label, metric) for label in group))]
                 for group in groups]
        return gain(*means, BETTER[metric]) if all(groups) else None
    return test


def third(which):
    """Labels of the ranges of at most three layers whose centre lies in one third of the model."""
    def labels(result):
        n, chosen = result["depth"], []
        for label in result["rows"]:
            if ":" in label:
                start, end = map(int, label.split(":"))
                place = min(2, int(3 * (start + end) / 2 / n))
                if end - start <= 3 and place == ("early", "middle", "late").index(which):
                    chosen.append(label)
        return chosen
    return labels


def certainty_gap(result):
    """By how much over 5 of 100 the outer layers are more often certain than the middle third (t = 0.3)."""
    seeds = result["values"]["certain at t = 0.3"]
    n = len(seeds[0])
    inside = range(round(n / 3), round(2 * n / 3))
    outside = [i for i in range(n) if i not in inside]
    mean = lambda row, layers: sum(row[i] for i in layers) / len(layers)
    return difference([mean(row, outside) for row in seeds], [mean(row, inside) + 0.05 for row in seeds])


def below(kind, share):
    """A part of the difference (figure 6) falls below a share of its early size by the middle of the path."""
    def test(result):
        early, middle, _ = result["parts"][kind]
        return difference([share * v for v in early], middle)
    return test


def above(kind, share):
    fall = below(kind, share)
    return lambda result: (-fall(result)[0], fall(result)[1])


def front_share(result):
    """Share of ERG + APG in the points of the Pareto fronts, less one half: it has half of all points."""
    seeds = range(len(next(iter(result["rows"].values()))["values"]["density"]))
    shares = []
    for seed in seeds:
        own = total = 0
        for x, y in (("density", "coverage"), ("density", "prompt"), ("coverage", "prompt")):
            points = [(row["values"][x][seed], row["values"][y][seed], row["method"] == "erg+apg")
                      for row in result["rows"].values()]
            front = pareto_front(points)
            own, total = own + sum(p[2] for p in front), total + len(front)
        shares.append(own / total)
    return difference(shares, [0.5] * len(shares))


# ---- The claims --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Claim:
    group: str
    text: str
    paper: str  # where, and its numbers
    entry: str  # whose results decide
    test: Callable  # of the result; None where it cannot be asked


def group(title, entry, where, *rows):
    """A claim for each metric of each row: its text ({} is the metric), its test, the paper's numbers."""
    return [Claim(title, text.format(TITLES.get(m, m)), f"{where}{paper}", entry, partial(test, metric=m))
            for text, test, numbers in rows for m, paper in numbers.items()]


def alike(paper, *metrics):
    return dict.fromkeys(metrics, paper)


def c_erg(w, tau_c):
    return f"C-ERG, w = {w:g}, tau_c = {tau_c:g}"


NONE, COLD, HOT = "no guidance", c_erg(2.5, 0.01), c_erg(2.5, 10.0)
MILD, EXTREME = [c_erg(2.5, tau_c) for tau_c in (0.1, 0.3, 3.0)], [COLD, HOT]
ONE_STEP, TEN_STEPS, LONG_STEP = "K = 1, gamma = 1", "K = 10, gamma = 0.1", "K = 1, gamma = 1.5"
CLAIMS = [
    *group("ERG and CFG", "table1", "Table 1: ",
        ("ERG improves {} over CFG", beats("ERG", "CFG"), dict(
            density="98.24 to 120.25", coverage="71.12 to 73.21", precision="65.71 to 70.92",
            prompt="VQAScore 70.15 to 73.96")),
        ("ERG alone is behind CFG in {}", beats("CFG", "ERG"), dict(
            frechet="FID 12.81 to 13.62", recall="43.95 to 41.43")),
        ("with APG, ERG is ahead of CFG in {}", beats("ERG + APG", "CFG"), dict(
            frechet="FID 12.81 to 11.37", recall="43.95 to 50.25"))),
    Claim("ERG and CFG", "ERG's pictures are less saturated than CFG's", "App. B.1 and F, in words", "table1",
          lambda r: difference(values(r, "CFG", "saturation"), values(r, "ERG", "saturation"))),
    Claim("ERG and CFG", "ERG costs no more evaluations than CFG", "Table 1: NFE 2 and 2", "table1",
          lambda r: difference([v + 1e-9 for v in values(r, "CFG", "nfe")], values(r, "ERG", "nfe"))),
    *group("Combinations", "table1", "Table 1: ",
        ("ERG + APG improves on APG in {}", beats("ERG + APG", "APG"), dict(
            frechet="FID 11.88 to 11.37", density="104.07 to 115.08", coverage="73.06 to 80.50",
            prompt="VQAScore 72.47 to 73.55")),
        ("ERG + APG is the best of all methods in {}", beats_all("ERG + APG"), dict(
            frechet="11.37, next 11.68", recall="50.25, next 47.98", coverage="80.50, next 76.23")),
        ("ERG + CADS has the highest {} of all", beats_all("ERG + CADS"), dict(
            density="128.54, next 120.25"))),
    Claim("Combinations", "ERG + APG holds more than half of the Pareto fronts", "Figure 2: all of them",
          "figure2", front_share),
    *group("Combinations", "table1", "Table 1: 120.25 against ", *[
        (f"ERG has more {{}} than {other}", beats("ERG", other), dict(density=paper))
        for other, paper in (("APG", "104.07"), ("CADS", "101.01"), ("PAG*", "107.21"), ("SAG*", "103.58"),
                             ("SEG*", "87.77"), ("AutoGuidance", "87.02"))]),
    *group("Unconditional", "table2", "Table 2: ",
        ("I-ERG improves {} over no guidance", beats("I-ERG", NONE), dict(
            frechet="FID 101.50 to 36.25", precision="13.50 to 68.87", recall="38.22 to 57.15",
            density="8.99 to 55.84", coverage="3.63 to 51.59")),
        ("I-ERG is the best of all methods in {}", beats_all("I-ERG"), dict(
            frechet="36.25, next 37.75", precision="68.87, next 49.97", density="55.84, next 55.56",
            coverage="51.59, next 34.79")),
        ("PAG* is ahead of I-ERG in {}", beats("PAG*", "I-ERG"), dict(recall="62.86 against 57.15"))),
    *group("Class-conditional", "table3", "Table 3: ",
        ("I-ERG improves {} over CFG", beats("I-ERG", "CFG"), dict(
            density="127.03 to 141.96 (256), 146.97 to 163.63 (512)",
            precision="76.63 to 80.51, 81.39 to 84.39", frechet="FID 3.67 to 3.67, 5.65 to 4.56",
            recall="55.70 to 54.03, 49.06 to 52.92", coverage="85.81 to 86.72, 86.70 to 86.13"))),
    *group("Components", "table5", "Table 5: ",
        ("C-ERG improves {} over CFG", beats("C-ERG", "CFG"), dict(
            density="98.24 to 109.52", coverage="71.12 to 72.06", prompt="CLIPScore 26.45 to 26.73")),
        ("I-ERG on top of C-ERG improves {}", beats("C-ERG + I-ERG", "C-ERG"), dict(
            density="109.52 to 120.25", coverage="72.06 to 73.21", prompt="CLIPScore 26.73 to 26.86")),
        ("the weight alpha on top (0.7 here; the paper does not give it) improves {}",
         beats("C-ERG + I-ERG, alpha = 0.7", "C-ERG + I-ERG"), dict(
            density="120.25 to 123.65", coverage="73.21 to 74.07"))),
    *group("Components", "table5", "implied by ",
        ("C-ERG alone improves {} over no guidance", beats("C-ERG", NONE),
         alike("Figure 4", "density", "coverage", "prompt")),
        ("I-ERG alone, under the same prompt, improves {} over no guidance", beats("I-ERG (same)", NONE),
         alike("Table 2", "frechet", "density", "coverage", "recall", "prompt"))),
    *group("Mechanisms", "table6", "Table 6: ",
        ("temperature beats identity mapping in {}", beats("temperature reduction", "identity mapping"), dict(
            frechet="FID 16.62 to 14.43", density="111.83 to 114.50", coverage="70.76 to 71.44")),
        ("temperature beats energy smoothing in {}", beats("temperature reduction", "energy smoothing"), dict(
            frechet="FID 15.06 to 14.43", density="102.82 to 114.50", coverage="69.45 to 71.44"))),
    *group("Temperature of the encoder", "figure4", "Figure 4",
        *[(f"tau_c = {tau_c} improves {{}} over tau_c = 1 (w = 2.5)", beats(row, NONE),
           alike(": gains on both sides of 1", "density", "precision", "coverage", "prompt"))
          for tau_c, row in ((0.01, COLD), (10, HOT))],
        *[(f"tau_c = {tau_c} costs {{}} against tau_c = 1 (w = 2.5)", beats(NONE, row), alike("", "recall"))
          for tau_c, row in ((0.01, COLD), (10, HOT))],
        ("low tau_c is better for {} than high (w = 2.5)", beats(COLD, HOT), dict(
            prompt=": lower temperatures yield the best CLIPScore")),
        ("high tau_c is better for {} than low (w = 2.5)", beats(HOT, COLD),
         alike(": higher temperatures are best for coverage and FID", "coverage", "frechet")),
        ("intermediate tau_c have a better {} than extreme ones (w = 2.5)", group_beats(MILD, EXTREME),
         alike(", in words", "frechet")),
        *[(f"with the right tau_c, C-ERG improves {{}} over CFG at w = {w:g}",
           one_beats([c_erg(w, tau_c) for tau_c in (0.01, 0.1, 0.3, 3.0, 10.0)], f"CFG, w = {w:g}"),
           alike(": all metrics, any w", "frechet", "density", "coverage", "prompt")) for w in (1.5, 2.5)]),
    *group("Steps", "table4", "Table 4: ",
        ("ten steps (gamma = 0.1) bring no significant gain in {}", no_gain(TEN_STEPS, ONE_STEP), dict(
            density="-2.88", coverage="-1.1", frechet="FID +0.94",
            precision="+5.37, though the text finds no significant gains")),
        ("gamma = 1.5 improves {}", beats(LONG_STEP, ONE_STEP), dict(
            density="+3.4", coverage="+0.86", precision="+1.02"))),
    *group("Layers", "figure8", "Figure 8",
        *[(f"middle layers are better than {other} ones in {{}}", group_beats(third("middle"), third(other)),
           alike(": best in the middle, harmful with later layers", "frechet", "density", "coverage"))
          for other in ("early", "late")],
        ("late layers are harmful: worse than no guidance in {}", group_beats([NONE], third("late")),
         alike("", "frechet", "density"))),
    Claim("Layers", "outer layers are more often certain than the middle ones, by 5 points of 100 at least",
          "Figure 7: over 25 % and up to 40 % of rows above 0.95 outside, few inside", "figure7",
          certainty_gap),
    *group("Kappa", "figure9", "Figure 9",
        ("kappa = 0 is better than kappa = 0.8 in {}", beats("kappa = 0", "kappa = 0.8"),
         alike("", "precision", "density")),
        ("kappa = 0.8 is better than kappa = 0 in {}", beats("kappa = 0.8", "kappa = 0"),
         alike("", "frechet", "recall")),
        ("kappa = 0.4 is better than both 0 and 0.8 in {}",
         beats_all("kappa = 0.4", "kappa = 0", "kappa = 0.8"),
         alike(": best in the middle", "coverage", "prompt"))),
    Claim("Inside", "C-ERG's negative varies more over noises and prompts than the null prompt's",
          "Figure 5: marginal variance", "figure5",
          lambda r: difference(r["values"]["marginal weak"], r["values"]["marginal null"])),
    Claim("Inside", "C-ERG's negative is closer to the positive", "Figure 5: conditional variance", "figure5",
          lambda r: difference(r["values"]["conditional null"], r["values"]["conditional weak"])),
    Claim("Inside", "CFG's parallel difference is below a quarter of its early size by mid-path",
          "Figure 6: a sharp decline towards zero", "figure6", below("CFG parallel", 0.25)),
    Claim("Inside", "so is I-ERG's", "Figure 6: similar trends", "figure6", below("I-ERG parallel", 0.25)),
    Claim("Inside", "CFG's orthogonal difference has halved by mid-path", "Figure 6: quickly decreases",
          "figure6", below("CFG orthogonal", 0.5)),
    Claim("Inside", "I-ERG's orthogonal difference keeps 80 % of its early size",
          "Figure 6: keeps a steady norm", "figure6", above("I-ERG orthogonal", 0.8)),
]

CHOICE = "w was chosen on 112 images of one seed; at equal w, I-ERG is behind CFG in 5 of 6 cells"
COUNTS = ("112 to 160 generated images were held against 1,437 to 5,000 real ones; with equally many, recall "
          "falls with guidance")
WITHDRAWN = {  # the texts of claims whose verdicts were artefacts of the measurement: why
    "I-ERG improves Frechet distance over CFG": CHOICE, "I-ERG improves recall over no guidance": COUNTS,
    "I-ERG alone, under the same prompt, improves recall over no guidance": COUNTS,
    "tau_c = 0.01 costs recall against tau_c = 1 (w = 2.5)": COUNTS,
    "tau_c = 10 costs recall against tau_c = 1 (w = 2.5)": COUNTS,
}

# ---- The page ----------------------------------------------------------------------------------------------


def together(verdicts):
    """One verdict of several checkpoints: what they agree on, "mixed" if they contradict each other."""
    decided = set(verdicts) - {"undecided"}
    if len(decided) > 1:
        return "mixed"
    found = decided.pop() if decided else "undecided"
    agree = verdicts.count(found)
    return found if agree == len(verdicts) else f"{found} on {agree} of {len(verdicts)}"


def line(claim, results):
    """A claim's row of the page and its verdict, or None if unasked; `results` is {checkpoint: result}."""
    found = [claim.test(result) if result else None for result in results.values()]
    if not any(found):
        return None
    found = [(*f, judge(*f)) if f and len(f) == 2 else f for f in found]  # mean, half width, verdict
    if claim.text in WITHDRAWN:
        cells, decided = ["" for _ in found], "withdrawn"
    else:
        cells = [f"{number(*f[:2], signed=True)}, {f[2]}" if f else "not asked" for f in found]
        decided = together([f[2] for f in found if f])
    return f"| {' | '.join((claim.text, claim.paper, *cells))} | **{decided}** |", decided


def write(out, explained=True):
    """Judge every claim whose results are in `out`, and write CLAIMS.md there; returns how many there are.

    `explained` says at the top what the committed results are, and appends why.md, which is about them.
    """
    files = {claim.entry: out / f"{claim.entry}.json" for claim in CLAIMS}
    records = {entry: json.loads(file.read_text()) for entry, file in files.items() if file.is_file()}
    order = {checkpoint: i for i, checkpoint in enumerate(data.NAMES)}
    checkpoints = {c for record in records.values() for c in record["checkpoints"]}
    checkpoints = sorted(checkpoints, key=lambda c: (order.get(c, 9), c))
    lines, tally, title = [], Counter(), None
    for claim in CLAIMS:
        found = records.get(claim.entry, {"checkpoints": {}})["checkpoints"]
        judged = line(claim, {c: found.get(c) for c in checkpoints})
        if judged is None:
            continue
        if claim.group != title:
            title = claim.group
            lines.append(f"| **{title}** |" + " |" * (len(checkpoints) + 2))
        lines.append(judged[0])
        tally[judged[1]] += 1
    by_reason = {why: [text for text in WITHDRAWN if WITHDRAWN[text] == why] for why in WITHDRAWN.values()}
    counts = "; ".join(f"**{decided}**: {n}" for decided, n in tally.most_common())
    page = ["# The paper's claims on the toy", "", *([EARLIER, ""] if explained else []), INTRODUCTION, "",
            *(f"Withdrawn: {'; '.join(texts)}. Why: {why}.\n" for why, texts in by_reason.items()),
            f"{counts}; of {tally.total()}.", "", f"| claim | paper | {' | '.join(checkpoints)} | verdict |",
            "|---" * (len(checkpoints) + 3) + "|", *lines, ""]
    if explained:
        page += [Path(__file__).with_name("why.md").read_text().strip(), ""]
    write_whole(out / "CLAIMS.md", lambda file: file.write("\n".join(page).encode()))
    return tally.total()


EARLIER = """**These are the results of the earlier, small measurement**: five seeds of 80 to 160 images,
settings chosen on one seed. Two findings were artefacts, and are withdrawn below. Other numbers of recall
have the same unequal counts of images: read them with the same caution."""
INTRODUCTION = """Made by `python -m experiments.reproduce claims` from the results in this folder, whose
pages say how each was sampled. Each number is a difference in the direction of the claim (positive: as
the paper says), paired by seed, mean ± half the 95 % interval over seeds. A claim holds where the
interval lies above 0, does not hold where it lies below, and is undecided otherwise; where several rows
are compared at once, see `experiments/claims.py`. With so many claims at 95 %, expect a few of the
decided ones to be wrong by chance. Density and coverage are not independent at these sample sizes, so
that a claim about one and the same claim about the other count almost as one. Prompt accuracy stands in
for CLIPScore and VQAScore."""
