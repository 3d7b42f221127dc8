"""The paper's claims, one by one, judged on the results of reproduce.py: holds, does not hold, undecided.

A claim compares two rows (or groups of rows) of a table. It holds on a checkpoint if the 95 % interval of the
difference, paired by seed, lies on the paper's side of 0, does not hold if it lies on the other side, and is
undecided otherwise. Over all checkpoints it is "mixed" where they disagree.
"""
import dataclasses
import json
from collections.abc import Callable

from experiments import data
from experiments.metrics import BETTER
from experiments.report import TITLES, number
from experiments.statistics import difference, interval


@dataclasses.dataclass(frozen=True)
class Claim:
    group: str
    text: str
    paper: str  # where, and its numbers
    entry: str  # whose results decide
    test: Callable  # result of a checkpoint -> (mean, half width) of a number that the claim says is positive


def gain(a, b, metric):
    """(mean, half width) of how much better a is than b; each is a list of values a seed."""
    mean, half = difference(a, b)
    return (mean if BETTER.get(metric, "higher") == "higher" else -mean), half


def beats(a, b, metric):
    """Row a is better than row b in a metric."""
    return lambda result: gain(values(result, a, metric), values(result, b, metric), metric)


def values(result, label, metric):
    return result["rows"][label]["values"][metric]


def mean_of(result, labels, metric):
    """Values a seed, averaged over rows."""
    return [sum(v) / len(labels) for v in zip(*(values(result, label, metric) for label in labels))]


def loses(a, b, metric):
    """Row a is worse than row b in a metric, as the paper admits."""
    return lambda result: (lambda mean, half: (-mean, half))(*beats(a, b, metric)(result))


def best_row(result, labels, metric):
    sign = 1 if BETTER[metric] == "higher" else -1
    return max(labels, key=lambda label: sign * interval(values(result, label, metric))[0])


def beats_best(a, metric, *excluded):
    """Row a is better than the best other row that is not excluded."""
    def test(result):
        others = [label for label in result["rows"] if label not in (a, "real images", *excluded)]
        return gain(values(result, a, metric), values(result, best_row(result, others, metric), metric), metric)
    return test


def c_erg(w, tau_c):
    return f"C-ERG, w = {w:g}, tau_c = {tau_c:g}"


def thirds(result, which):
    """Ranges of layers that lie in one third of the model: "early", "middle" or "late"."""
    n = result["depth"]
    low, high = {"early": (0, n / 3), "middle": (n / 3, 2 * n / 3), "late": (2 * n / 3, n)}[which]
    found = [label for label in result["rows"] if ":" in label
             and low <= (int(label.split(":")[0]) + int(label.split(":")[1])) / 2 <= high and int(label.split(":")[1]) - int(label.split(":")[0]) <= 3]
    return found


def third_beats(a, b, metric):
    return lambda result: gain(mean_of(result, thirds(result, a), metric), mean_of(result, thirds(result, b), metric), metric)


def share_above(kind, layers):
    """Share of certain rows at t = 0.3, a value a seed, averaged over some layers of the n."""
    return lambda result: [sum(row[i] for i in layers(len(row))) / len(layers(len(row))) for row in result["values"][kind]]


def certainty_gap(result):
    """How much more often outer layers are certain than the middle third, at t = 0.3."""
    outer = share_above("certain at t = 0.3", lambda n: [i for i in range(n) if not round(n / 3) <= i < round(2 * n / 3)])(result)
    middle = share_above("certain at t = 0.3", lambda n: list(range(round(n / 3), round(2 * n / 3))))(result)
    return difference(outer, middle)


def parts(kind, span):
    return lambda result: result["parts"][kind][span]


EARLY, MIDDLE, LATE = 0, 1, 2  # of figure 6


def keeps(result):
    """By how much I-ERG's orthogonal part keeps more of its early norm than CFG's, in the middle of the path."""
    share = lambda kind: [m / e for m, e in zip(result["parts"][kind][MIDDLE], result["parts"][kind][EARLY])]
    return difference(share("I-ERG orthogonal"), share("CFG orthogonal"))


def falls(method):
    return lambda result: difference(result["parts"][f"{method} parallel"][EARLY], result["parts"][f"{method} parallel"][MIDDLE])


def minus(f, g):
    return lambda result: difference(f(result), g(result))


K1 = "K = 1, gamma = 1"
HOT, COLD = 10.0, 0.01
CLAIMS = [
    *[Claim("ERG against CFG", f"ERG raises {m} over CFG", f"Table 1: {n}", "table1", beats("ERG", "CFG", m))
      for m, n in (("density", "98.24 to 120.25"), ("coverage", "71.12 to 73.21"), ("precision", "65.71 to 70.92"), ("prompt", "VQAScore 70.15 to 73.96"))],
    *[Claim("ERG against CFG", f"ERG alone is behind CFG in {m}", f"Table 1: {n}", "table1", loses("ERG", "CFG", m))
      for m, n in (("frechet", "FID 12.81 to 13.62"), ("recall", "43.95 to 41.43"))],
    *[Claim("ERG against CFG", f"with APG, ERG is ahead of CFG in {m}", f"Table 1: {n}", "table1", beats("ERG + APG", "CFG", m))
      for m, n in (("frechet", "FID 12.81 to 11.37"), ("recall", "43.95 to 50.25"))],
    *[Claim("Combinations", f"ERG + APG improves on APG in {m}", f"Table 1 and Figure 2: {n}", "table1", beats("ERG + APG", "APG", m))
      for m, n in (("density", "104.07 to 115.08"), ("coverage", "73.06 to 80.50"), ("prompt", "VQAScore 72.47 to 73.55"))],
    Claim("Combinations", "ERG + CADS has the highest density of all", "Table 1: 128.54, next 120.25", "table1", beats_best("ERG + CADS", "density")),
    *[Claim("Other methods", f"ERG has more density than {m}", f"Table 1: 120.25 against {n}", "table1", beats("ERG", m, "density"))
      for m, n in (("PAG*", "107.21"), ("SAG*", "103.58"), ("SEG*", "87.77"), ("AutoGuidance", "87.02"))],
    *[Claim("Unconditional", f"I-ERG improves {m} over no guidance", f"Table 2: {n}", "table2", beats("I-ERG", "no guidance", m))
      for m, n in (("frechet", "FID 101.50 to 36.25"), ("precision", "13.50 to 68.87"), ("recall", "38.22 to 57.15"), ("density", "8.99 to 55.84"), ("coverage", "3.63 to 51.59"))],
    *[Claim("Unconditional", f"I-ERG is the best of all methods in {m}", f"Table 2: {n}", "table2", beats_best("I-ERG", m))
      for m, n in (("frechet", "36.25, next 37.75"), ("precision", "68.87, next 49.97"), ("coverage", "51.59, next 34.79"))],
    *[Claim("Class-conditional", f"I-ERG raises {m} over CFG", f"Table 3, 512 pixels: {n}", "table3", beats("I-ERG", "CFG", m))
      for m, n in (("density", "146.97 to 163.63"), ("precision", "81.39 to 84.39"), ("frechet", "FID 5.65 to 4.56"), ("recall", "49.06 to 52.92"))],
    *[Claim("Components", f"C-ERG raises {m} over CFG", f"Table 5: {n}", "table5", beats("C-ERG", "CFG", m))
      for m, n in (("density", "98.24 to 109.52"), ("coverage", "71.12 to 72.06"), ("prompt", "CLIPScore 26.45 to 26.73"))],
    *[Claim("Components", f"I-ERG on top raises {m}", f"Table 5: {n}", "table5", beats("C-ERG + I-ERG", "C-ERG", m))
      for m, n in (("density", "109.52 to 120.25"), ("coverage", "72.06 to 73.21"))],
    *[Claim("Components", f"the weight alpha on top raises {m}", f"Table 5: {n}", "table5", beats("C-ERG + I-ERG, alpha = 0.7", "C-ERG + I-ERG", m))
      for m, n in (("density", "120.25 to 123.65"), ("coverage", "73.21 to 74.07"))],
    *[Claim("Components", f"C-ERG alone improves {m} over no guidance", "implied by Figure 4", "table5", beats("C-ERG", "no guidance", m)) for m in ("density", "coverage", "prompt")],
    *[Claim("Components", f"I-ERG alone (same condition) improves {m} over no guidance", "implied by Table 2", "table5", beats("I-ERG (same)", "no guidance", m))
      for m in ("frechet", "density", "coverage", "recall", "prompt")],
    *[Claim("Mechanisms", f"temperature beats {other} in {m}", f"Table 6: {n}", "table6", beats("temperature reduction", other, m))
      for other, m, n in (("identity mapping", "frechet", "FID 16.62 to 14.43"), ("identity mapping", "density", "111.83 to 114.50"), ("identity mapping", "coverage", "70.76 to 71.44"),
                          ("energy smoothing", "frechet", "FID 15.06 to 14.43"), ("energy smoothing", "density", "102.82 to 114.50"), ("energy smoothing", "coverage", "69.45 to 71.44"))],
    *[Claim("Temperature of the encoder", f"tau_c = {t:g} raises {m} over tau_c = 1 (w = 2.5)", "Figure 4: gains on both sides of 1", "figure4", beats(c_erg(2.5, t), "no guidance", m))
      for t in (COLD, HOT) for m in ("density", "coverage", "prompt")],
    Claim("Temperature of the encoder", "low tau_c is better for consistency than high (w = 2.5)", "Figure 4: lower temperatures yield the best CLIPScore", "figure4", beats(c_erg(2.5, COLD), c_erg(2.5, HOT), "prompt")),
    *[Claim("Temperature of the encoder", f"high tau_c is better for {m} than low (w = 2.5)", "Figure 4: higher temperatures are best for coverage and FID", "figure4", beats(c_erg(2.5, HOT), c_erg(2.5, COLD), m))
      for m in ("coverage", "frechet")],
    *[Claim("Temperature of the encoder", f"recall falls when tau_c leaves 1, at tau_c = {t:g} (w = 2.5)", "Figure 4", "figure4", loses(c_erg(2.5, t), "no guidance", "recall")) for t in (COLD, HOT)],
    *[Claim("Steps", f"K = 10, gamma = 0.1 does not pay in {m}", f"Table 4: {n}", "table4", loses("K = 10, gamma = 0.1", K1, m)) for m, n in (("density", "-2.88"), ("coverage", "-1.1"), ("frechet", "FID +0.94"))],
    *[Claim("Steps", f"gamma = 1.5 raises {m}", f"Table 4: {n}", "table4", beats("K = 1, gamma = 1.5", K1, m)) for m, n in (("density", "+3.4"), ("coverage", "+0.86"), ("precision", "+1.02"))],
    *[Claim("Layers", f"middle layers are better than {other} ones in {m}", "Figure 8: best in the middle, harmful with later layers", "figure8", third_beats("middle", other, m))
      for other in ("early", "late") for m in ("frechet", "density", "coverage")],
    Claim("Layers", "outer layers are more certain than the middle ones", "Figure 7: over 25 % and up to 40 % of rows above 0.95 outside, few inside", "figure7", certainty_gap),
    *[Claim("Kappa", f"kappa = 0 is better than kappa = 0.8 in {m}", "Figure 9 and B.5", "figure9", beats("kappa = 0", "kappa = 0.8", m)) for m in ("precision", "density")],
    *[Claim("Kappa", f"kappa = 0.8 is better than kappa = 0 in {m}", "Figure 9 and B.5", "figure9", beats("kappa = 0.8", "kappa = 0", m)) for m in ("frechet", "recall")],
    *[Claim("Kappa", f"kappa = 0.4 is better than both ends together in {m}", "Figure 9: consistency and coverage are best in the middle", "figure9",
            lambda result, m=m: gain(values(result, "kappa = 0.4", m), mean_of(result, ["kappa = 0", "kappa = 0.8"], m), m)) for m in ("coverage", "prompt")],
    Claim("Inside", "C-ERG's negative varies more over noises and prompts than the null prompt's (marginal variance)", "Figure 5", "figure5", lambda r: difference(r["values"]["marginal weak"], r["values"]["marginal null"])),
    Claim("Inside", "C-ERG's negative is closer to the positive (conditional variance)", "Figure 5", "figure5", lambda r: difference(r["values"]["conditional null"], r["values"]["conditional weak"])),
    Claim("Inside", "CFG's parallel difference dies out by the middle of the path", "Figure 6", "figure6", falls("CFG")),
    Claim("Inside", "so does I-ERG's", "Figure 6: similar trends", "figure6", falls("I-ERG")),
    Claim("Inside", "I-ERG's orthogonal difference stays while CFG's falls", "Figure 6", "figure6", keeps),
]


def judge(mean, half):
    return "holds" if mean > half else "does not hold" if mean < -half else "undecided"


def together(verdicts):
    """One verdict of several checkpoints: what they agree on, "mixed" if they contradict each other."""
    decided = set(verdicts) - {"undecided"}
    if len(decided) == 2:
        return "mixed"
    if not decided:
        return "undecided"
    verdict, = decided
    return verdict if len(verdicts) == verdicts.count(verdict) else f"{verdict} (on {verdicts.count(verdict)} of {len(verdicts)})"


def write(out):
    """Judge every claim whose results are in `out`, and write CLAIMS.md there; returns how many were judged."""
    results = {claim.entry: None for claim in CLAIMS}
    for entry in results:
        file = out / f"{entry}.json"
        if file.is_file():
            results[entry] = json.loads(file.read_text())
    rows, missing, tally = [], [], {}
    names = sorted({name for r in results.values() if r for name in r["checkpoints"]}, key=lambda n: data.NAMES.index(n) if n in data.NAMES else 9)
    group = None
    for claim in CLAIMS:
        record = results[claim.entry]
        if record is None:
            missing.append(claim)
            continue
        if claim.group != group:
            group = claim.group
            rows.append(f"| **{group}** |" + " |" * (len(names) + 2))
        cells, verdicts = [], []
        for name in names:
            if name not in record["checkpoints"]:
                cells.append("not run")
                continue
            mean, half = claim.test(record["checkpoints"][name])
            verdicts.append(judge(mean, half))
            cells.append(f"{number(mean, half, signed=True)}, {verdicts[-1]}")
        verdict = together(verdicts)
        tally[verdict.split(" (")[0]] = tally.get(verdict.split(" (")[0], 0) + 1
        rows.append(f"| {claim.text.replace('frechet', TITLES['frechet'])} | {claim.paper} | " + " | ".join(cells) + f" | **{verdict}** |")
    text = [INTRODUCTION, "", ", ".join(f"{n} {verdict}" for verdict, n in sorted(tally.items(), key=lambda item: -item[1])) + ".", "",
            "| claim | paper | " + " | ".join(names) + " | verdict |", "|---" * (len(names) + 3) + "|", *rows, ""]
    if missing:
        text += ["Not judged, because these entries have not been run: " + ", ".join(sorted({c.entry for c in missing})) + ".", ""]
    text += [WHY] if WHY else []
    data.write_whole(out / "CLAIMS.md", lambda file: file.write("\n".join(text).encode()))
    return sum(tally.values())


INTRODUCTION = """# The paper's claims on the toy

Made by `python -m experiments.reproduce claims` from the results in this folder. Each number is a difference in the
direction of the claim (positive: as the paper says), mean ± half the 95 % interval over seeds, paired by seed. It holds
where the interval lies above 0, does not hold where it lies below, and is undecided otherwise. With so many claims at
95 %, expect a few of the decided ones to be wrong by chance. "(on 1 of 2)": the other checkpoint is undecided. Prompt
accuracy stands in for CLIPScore and VQAScore."""
WHY = ""
