"""The paper's claims, one by one, judged on the results of reproduce.py: holds, does not hold, undecided.

A claim is a number that should be positive, a value a seed. It holds on a checkpoint where the 95 % interval lies above
0, does not hold where it lies below, and is undecided otherwise. Over all checkpoints it is "mixed" where they disagree.
"""
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from experiments import data
from experiments.metrics import BETTER
from experiments.report import TITLES, number, pareto_front
from experiments.statistics import difference, gain, judge

# ------------------------------------------------------------------------------------------------
# Tests: the result of a checkpoint -> (mean, half width), or (mean, half width, verdict)
# ------------------------------------------------------------------------------------------------


def values(result, label, metric):
    return result["rows"][label]["values"][metric]


def beats(a, b, metric, sign=1):
    """Row a is better than row b in a metric; with sign = -1, worse."""
    def test(result):
        mean, half = gain(values(result, a, metric), values(result, b, metric), BETTER[metric])
        return sign * mean, half
    return test


def loses(a, b, metric):
    return beats(a, b, metric, sign=-1)


def beats_all(a, metric):
    """Row a is better than each other row. Not so, if one of them beats it, with Bonferroni's interval for so many."""
    def test(result):
        others = [label for label in result["rows"] if label != a]
        gains = [gain(values(result, a, metric), values(result, label, metric), BETTER[metric]) for label in others]
        strict = [gain(values(result, a, metric), values(result, label, metric), BETTER[metric], len(others)) for label in others]
        verdict = "holds" if all(judge(*g) == "holds" for g in gains) else \
            "does not hold" if any(judge(*g) == "does not hold" for g in strict) else "undecided"
        return (*min(gains), verdict)  # against the best of them
    return test


def one_beats(labels, b, metric):
    """The best of some rows is better than row b, with Bonferroni's interval for so many; not so, if b beats them all."""
    def test(result):
        gains = [gain(values(result, a, metric), values(result, b(result) if callable(b) else b, metric), BETTER[metric], len(labels)) for a in labels]
        mean, half = max(gains, key=lambda g: g[0] - g[1])  # the most certain of them
        verdict = "holds" if any(judge(*g) == "holds" for g in gains) else \
            "does not hold" if all(judge(*g) == "does not hold" for g in gains) else "undecided"
        return mean, half, verdict
    return test


def no_gain(a, b, metric):
    """Row a is not better than row b beyond the interval: the absence of a gain, which a small sample shows easily."""
    def test(result):
        mean, half = gain(values(result, a, metric), values(result, b, metric), BETTER[metric])
        return mean, half, "does not hold" if mean > half else "holds"
    return test


def average(result, labels, metric):
    """A value a seed, averaged over rows."""
    return [sum(v) / len(labels) for v in zip(*(values(result, label, metric) for label in labels))]


def group_beats(these, those, metric):
    """The mean of some rows is better than that of others; each a list of labels, or a function of the result."""
    def test(result):
        a, b = (group(result) if callable(group) else group for group in (these, those))
        return gain(average(result, a, metric), average(result, b, metric), BETTER[metric]) if a and b else None
    return test


def beats_both(a, b, c, metric):
    """Row a is better than b and than c: the smaller of the two gains."""
    def test(result):
        gains = [gain(values(result, a, metric), values(result, other, metric), BETTER[metric]) for other in (b, c)]
        verdicts = [judge(*g) for g in gains]
        return (*min(gains), "does not hold" if "does not hold" in verdicts else "undecided" if "undecided" in verdicts else "holds")
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
    """By how much more than 5 points of 100 the outer layers are more often certain than the middle third, at t = 0.3."""
    seeds = result["values"]["certain at t = 0.3"]
    n = len(seeds[0])
    inside = range(round(n / 3), round(2 * n / 3))
    mean = lambda row, layers: sum(row[i] for i in layers) / len(layers)
    return difference([mean(row, [i for i in range(n) if i not in inside]) for row in seeds], [mean(row, inside) + 0.05 for row in seeds])


EARLY, MIDDLE = 0, 1  # spans of figure 6


def below(kind, share):
    """A part of the difference falls below a share of its early size by the middle of the path."""
    return lambda result: difference([share * v for v in result["parts"][kind][EARLY]], result["parts"][kind][MIDDLE])


def above(kind, share):
    return lambda result: difference(result["parts"][kind][MIDDLE], [share * v for v in result["parts"][kind][EARLY]])


def front_share(result):
    """Share of ERG + APG among the points of the three Pareto fronts, less one half: it has half of all points."""
    seeds = range(len(next(iter(result["rows"].values()))["values"]["density"]))
    shares = []
    for seed in seeds:
        own = total = 0
        for x, y in (("density", "coverage"), ("density", "prompt"), ("coverage", "prompt")):
            points = [(row["values"][x][seed], row["values"][y][seed], row["method"] == "erg+apg") for row in result["rows"].values()]
            front = pareto_front(points)
            own, total = own + sum(p[2] for p in front), total + len(front)
        shares.append(own / total)
    return difference(shares, [0.5] * len(shares))


# ------------------------------------------------------------------------------------------------
# The claims
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Claim:
    group: str
    text: str
    paper: str  # where, and its numbers
    entry: str  # whose results decide
    test: Callable  # None where it cannot be asked


def name(metric):
    return TITLES.get(metric, metric)


def several(group, text, entry, test, cases):
    """One claim for each case (metric, the paper's numbers); {} in the text is the metric."""
    return [Claim(group, text.format(name(m)), paper, entry, test(m)) for m, paper in cases]


def c_erg(w, tau_c):
    return f"C-ERG, w = {w:g}, tau_c = {tau_c:g}"


TAUS = (0.01, 0.1, 0.3, 3.0, 10.0)
COLD, HOT = 0.01, 10.0
ONE_STEP, TEN_STEPS, LONG_STEP = "K = 1, gamma = 1", "K = 10, gamma = 0.1", "K = 1, gamma = 1.5"
ALPHA = "C-ERG + I-ERG, alpha = 0.7"
CLAIMS = [
    *several("ERG and CFG", "ERG improves {} over CFG", "table1", lambda m: beats("ERG", "CFG", m), [
        ("density", "Table 1: 98.24 to 120.25"), ("coverage", "Table 1: 71.12 to 73.21"), ("precision", "Table 1: 65.71 to 70.92"), ("prompt", "Table 1: VQAScore 70.15 to 73.96")]),
    *several("ERG and CFG", "ERG alone is behind CFG in {}", "table1", lambda m: loses("ERG", "CFG", m), [
        ("frechet", "Table 1: FID 12.81 to 13.62"), ("recall", "Table 1: 43.95 to 41.43")]),
    *several("ERG and CFG", "with APG, ERG is ahead of CFG in {}", "table1", lambda m: beats("ERG + APG", "CFG", m), [
        ("frechet", "Table 1: FID 12.81 to 11.37"), ("recall", "Table 1: 43.95 to 50.25")]),
    Claim("ERG and CFG", "ERG's pictures are less saturated than CFG's", "App. B.1 and F, in words", "table1",
          lambda r: difference(values(r, "CFG", "saturation"), values(r, "ERG", "saturation"))),
    Claim("ERG and CFG", "ERG costs no more evaluations than CFG", "Table 1: NFE 2 and 2", "table1",
          lambda r: difference([v + 1e-9 for v in values(r, "CFG", "nfe")], values(r, "ERG", "nfe"))),

    *several("Combinations", "ERG + APG improves on APG in {}", "table1", lambda m: beats("ERG + APG", "APG", m), [
        ("frechet", "Table 1: FID 11.88 to 11.37"), ("density", "Table 1: 104.07 to 115.08"), ("coverage", "Table 1: 73.06 to 80.50"), ("prompt", "Table 1: VQAScore 72.47 to 73.55")]),
    *several("Combinations", "ERG + APG is the best of all methods in {}", "table1", lambda m: beats_all("ERG + APG", m), [
        ("frechet", "Table 1: 11.37, next 11.68"), ("recall", "Table 1: 50.25, next 47.98"), ("coverage", "Table 1: 80.50, next 76.23")]),
    Claim("Combinations", "ERG + CADS has the highest density of all", "Table 1: 128.54, next 120.25", "table1", beats_all("ERG + CADS", "density")),
    Claim("Combinations", "ERG + APG holds more than half of the Pareto fronts", "Figure 2: all of them", "figure2", front_share),
    *[Claim("Combinations", f"ERG has more density than {other}", f"Table 1: 120.25 against {paper}", "table1", beats("ERG", other, "density"))
      for other, paper in (("APG", "104.07"), ("CADS", "101.01"), ("PAG*", "107.21"), ("SAG*", "103.58"), ("SEG*", "87.77"), ("AutoGuidance", "87.02"))],

    *several("Unconditional", "I-ERG improves {} over no guidance", "table2", lambda m: beats("I-ERG", "no guidance", m), [
        ("frechet", "Table 2: FID 101.50 to 36.25"), ("precision", "Table 2: 13.50 to 68.87"), ("recall", "Table 2: 38.22 to 57.15"), ("density", "Table 2: 8.99 to 55.84"), ("coverage", "Table 2: 3.63 to 51.59")]),
    *several("Unconditional", "I-ERG is the best of all methods in {}", "table2", lambda m: beats_all("I-ERG", m), [
        ("frechet", "Table 2: 36.25, next 37.75"), ("precision", "Table 2: 68.87, next 49.97"), ("density", "Table 2: 55.84, next 55.56"), ("coverage", "Table 2: 51.59, next 34.79")]),
    Claim("Unconditional", "PAG* is ahead of I-ERG in recall", "Table 2: 62.86 against 57.15", "table2", beats("PAG*", "I-ERG", "recall")),

    *several("Class-conditional", "I-ERG improves {} over CFG", "table3", lambda m: beats("I-ERG", "CFG", m), [
        ("density", "Table 3: 127.03 to 141.96 (256), 146.97 to 163.63 (512)"), ("precision", "Table 3: 76.63 to 80.51, 81.39 to 84.39"),
        ("frechet", "Table 3: FID 3.67 to 3.67, 5.65 to 4.56"), ("recall", "Table 3: 55.70 to 54.03, 49.06 to 52.92"), ("coverage", "Table 3: 85.81 to 86.72, 86.70 to 86.13")]),

    *several("Components", "C-ERG improves {} over CFG", "table5", lambda m: beats("C-ERG", "CFG", m), [
        ("density", "Table 5: 98.24 to 109.52"), ("coverage", "Table 5: 71.12 to 72.06"), ("prompt", "Table 5: CLIPScore 26.45 to 26.73")]),
    *several("Components", "I-ERG on top of C-ERG improves {}", "table5", lambda m: beats("C-ERG + I-ERG", "C-ERG", m), [
        ("density", "Table 5: 109.52 to 120.25"), ("coverage", "Table 5: 72.06 to 73.21"), ("prompt", "Table 5: CLIPScore 26.73 to 26.86")]),
    *several("Components", "the weight alpha on top (0.7 here; the paper does not give it) improves {}", "table5", lambda m: beats(ALPHA, "C-ERG + I-ERG", m), [
        ("density", "Table 5: 120.25 to 123.65"), ("coverage", "Table 5: 73.21 to 74.07")]),
    *several("Components", "C-ERG alone improves {} over no guidance", "table5", lambda m: beats("C-ERG", "no guidance", m),
             [(m, "implied by Figure 4") for m in ("density", "coverage", "prompt")]),
    *several("Components", "I-ERG alone, under the same prompt, improves {} over no guidance", "table5", lambda m: beats("I-ERG (same)", "no guidance", m),
             [(m, "implied by Table 2") for m in ("frechet", "density", "coverage", "recall", "prompt")]),

    *[Claim("Mechanisms", f"temperature beats {other} in {name(m)}", f"Table 6: {paper}", "table6", beats("temperature reduction", other, m))
      for other, m, paper in (("identity mapping", "frechet", "FID 16.62 to 14.43"), ("identity mapping", "density", "111.83 to 114.50"), ("identity mapping", "coverage", "70.76 to 71.44"),
                              ("energy smoothing", "frechet", "FID 15.06 to 14.43"), ("energy smoothing", "density", "102.82 to 114.50"), ("energy smoothing", "coverage", "69.45 to 71.44"))],

    *[Claim("Temperature of the encoder", f"tau_c = {t:g} improves {name(m)} over tau_c = 1 (w = 2.5)", "Figure 4: gains on both sides of 1", "figure4", beats(c_erg(2.5, t), "no guidance", m))
      for t in (COLD, HOT) for m in ("density", "precision", "coverage", "prompt")],
    *[Claim("Temperature of the encoder", f"tau_c = {t:g} costs recall against tau_c = 1 (w = 2.5)", "Figure 4", "figure4", loses(c_erg(2.5, t), "no guidance", "recall")) for t in (COLD, HOT)],
    Claim("Temperature of the encoder", "low tau_c is better for prompt accuracy than high (w = 2.5)", "Figure 4: lower temperatures yield the best CLIPScore", "figure4", beats(c_erg(2.5, COLD), c_erg(2.5, HOT), "prompt")),
    *several("Temperature of the encoder", "high tau_c is better for {} than low (w = 2.5)", "figure4", lambda m: beats(c_erg(2.5, HOT), c_erg(2.5, COLD), m),
             [(m, "Figure 4: higher temperatures are best for coverage and FID") for m in ("coverage", "frechet")]),
    Claim("Temperature of the encoder", "intermediate tau_c have a better Frechet distance than extreme ones (w = 2.5)", "Figure 4, in words", "figure4",
          group_beats([c_erg(2.5, t) for t in (0.1, 0.3, 3.0)], [c_erg(2.5, t) for t in (COLD, HOT)], "frechet")),
    *[Claim("Temperature of the encoder", f"with the right tau_c, C-ERG improves {name(m)} over CFG at w = {w:g}", "Figure 4: all metrics, any w", "figure4",
            one_beats([c_erg(w, t) for t in TAUS], f"CFG, w = {w:g}", m)) for w in (1.5, 2.5) for m in ("frechet", "density", "coverage", "prompt")],

    *several("Steps", "ten steps (gamma = 0.1) bring no significant gain in {}", "table4", lambda m: no_gain(TEN_STEPS, ONE_STEP, m), [
        ("density", "Table 4: -2.88"), ("coverage", "Table 4: -1.1"), ("frechet", "Table 4: FID +0.94"), ("precision", "Table 4: +5.37, though the text finds no significant gains")]),
    *several("Steps", "gamma = 1.5 improves {}", "table4", lambda m: beats(LONG_STEP, ONE_STEP, m), [
        ("density", "Table 4: +3.4"), ("coverage", "Table 4: +0.86"), ("precision", "Table 4: +1.02")]),

    *[Claim("Layers", f"middle layers are better than {other} ones in {name(m)}", "Figure 8: best in the middle, harmful with later layers", "figure8", group_beats(third("middle"), third(other), m))
      for other in ("early", "late") for m in ("frechet", "density", "coverage")],
    *several("Layers", "late layers are harmful: worse than no guidance in {}", "figure8", lambda m: group_beats(lambda r: ["no guidance"], third("late"), m),
             [(m, "Figure 8") for m in ("frechet", "density")]),
    Claim("Layers", "outer layers are more often certain than the middle ones, by 5 points of 100 at least", "Figure 7: over 25 % and up to 40 % of rows above 0.95 outside, few inside", "figure7", certainty_gap),

    *several("Kappa", "kappa = 0 is better than kappa = 0.8 in {}", "figure9", lambda m: beats("kappa = 0", "kappa = 0.8", m), [(m, "Figure 9") for m in ("precision", "density")]),
    *several("Kappa", "kappa = 0.8 is better than kappa = 0 in {}", "figure9", lambda m: beats("kappa = 0.8", "kappa = 0", m), [(m, "Figure 9") for m in ("frechet", "recall")]),
    *several("Kappa", "kappa = 0.4 is better than both 0 and 0.8 in {}", "figure9", lambda m: beats_both("kappa = 0.4", "kappa = 0", "kappa = 0.8", m),
             [(m, "Figure 9: best in the middle") for m in ("coverage", "prompt")]),

    Claim("Inside", "C-ERG's negative varies more over noises and prompts than the null prompt's", "Figure 5: marginal variance", "figure5", lambda r: difference(r["values"]["marginal weak"], r["values"]["marginal null"])),
    Claim("Inside", "C-ERG's negative is closer to the positive", "Figure 5: conditional variance", "figure5", lambda r: difference(r["values"]["conditional null"], r["values"]["conditional weak"])),
    Claim("Inside", "CFG's parallel difference is below a quarter of its early size by mid-path", "Figure 6: a sharp decline towards zero", "figure6", below("CFG parallel", 0.25)),
    Claim("Inside", "so is I-ERG's", "Figure 6: similar trends", "figure6", below("I-ERG parallel", 0.25)),
    Claim("Inside", "CFG's orthogonal difference has halved by mid-path", "Figure 6: quickly decreases", "figure6", below("CFG orthogonal", 0.5)),
    Claim("Inside", "I-ERG's orthogonal difference keeps 80 % of its early size", "Figure 6: keeps a steady norm", "figure6", above("I-ERG orthogonal", 0.8)),
]

# ------------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------------


def together(verdicts):
    """One verdict of several checkpoints: what they agree on, "mixed" if they contradict each other."""
    decided = set(verdicts) - {"undecided"}
    if len(decided) > 1:
        return "mixed"
    verdict = decided.pop() if decided else "undecided"
    return verdict if verdicts.count(verdict) == len(verdicts) else f"{verdict} on {verdicts.count(verdict)} of {len(verdicts)}"


def asked(claim, result):
    """(mean, half width, verdict) of a claim on a checkpoint, or None where it cannot be asked."""
    found = claim.test(result)
    return found if found is None or len(found) == 3 else (*found, judge(*found))


def write(out, explained=True):
    """Judge every claim whose results are in `out`, and write CLAIMS.md there; returns how many were judged.

    `explained` appends why.md, which is about the committed results.
    """
    files = {claim.entry: out / f"{claim.entry}.json" for claim in CLAIMS}
    records = {entry: json.loads(file.read_text()) for entry, file in files.items() if file.is_file()}
    order = {checkpoint: i for i, checkpoint in enumerate(data.NAMES)}
    checkpoints = sorted({c for record in records.values() for c in record["checkpoints"]}, key=lambda c: (order.get(c, 9), c))
    lines, tally, group = [], {}, None
    for claim in CLAIMS:
        results = records.get(claim.entry, {"checkpoints": {}})["checkpoints"]
        found = {c: asked(claim, results[c]) if c in results else None for c in checkpoints}
        judged = [f[2] for f in found.values() if f]
        if not judged:
            continue
        if claim.group != group:
            group = claim.group
            lines.append(f"| **{group}** |" + " |" * (len(checkpoints) + 2))
        verdict = together(judged)
        tally[verdict] = tally.get(verdict, 0) + 1
        cells = [f"{number(*f[:2], signed=True)}, {f[2]}" if f else "not asked" for f in found.values()]
        lines.append(f"| {claim.text} | {claim.paper} | " + " | ".join(cells) + f" | **{verdict}** |")
    count = sum(tally.values())
    page = [INTRODUCTION, "", "; ".join(f"**{verdict}**: {n}" for verdict, n in sorted(tally.items(), key=lambda item: -item[1])) + f"; of {count}.", "",
            "| claim | paper | " + " | ".join(checkpoints) + " | verdict |", "|---" * (len(checkpoints) + 3) + "|", *lines, ""]
    if explained:
        page += [Path(__file__).with_name("why.md").read_text().strip(), ""]
    data.write_whole(out / "CLAIMS.md", lambda file: file.write("\n".join(page).encode()))
    return count


INTRODUCTION = """# The paper's claims on the toy

Made by `python -m experiments.reproduce claims` from the results in this folder, whose pages say how each was sampled.
Each number is a difference in the direction of the claim (positive: as the paper says), paired by seed, mean ± half the
95 % interval over seeds. A claim holds where the interval lies above 0, does not hold where it lies below, and is
undecided otherwise; where several rows are compared at once, see `experiments/claims.py`. With so many claims at 95 %,
expect a few of the decided ones to be wrong by chance. Density and coverage are not independent at these sample sizes,
so that a claim about one and the same claim about the other count almost as one. Prompt accuracy stands in for CLIPScore
and VQAScore."""
