"""Means over seeds with 95 % intervals (Student's t), and comparisons that are paired by seed."""
import functools
import math


@functools.cache
def t_quantile(p, dof):
    """The p-quantile (p > 1/2) of Student's t with `dof` degrees of freedom: Simpson's rule and bisection."""
    if not 0.5 < p < 1 or dof < 1:
        raise ValueError(f"p={p!r} must lie between 0.5 and 1, and dof={dof!r} be at least 1")
    # with x = sqrt(dof) tan(a), the density becomes a power of the cosine, and the range finite
    constant = math.exp(math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2)) / math.sqrt(math.pi)

    def above_half(angle, n=400):
        h = angle / n
        weight = lambda i: 1 if i in (0, n) else 4 if i % 2 else 2
        return constant * h / 3 * sum(weight(i) * math.cos(i * h)**(dof - 1) for i in range(n + 1))

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if above_half(middle) < p - 0.5 else (low, middle)
    return math.sqrt(dof) * math.tan(low)


def estimate(values, comparisons=1):
    """(mean, half the width of its 95 % interval) of independent values; of a single one the width is inf.

    With several `comparisons` the interval is Bonferroni's, which covers all of them together.
    """
    values = [float(v) for v in values]
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"values={values!r} must be finite numbers, at least one")
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return mean, math.inf
    variance = sum((v - mean)**2 for v in values) / (n - 1)
    return mean, t_quantile(1 - 0.025 / comparisons, n - 1) * math.sqrt(variance / n)


def difference(a, b, comparisons=1):
    """(mean, half width) of a - b, paired by seed."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values cannot be paired")
    return estimate([x - y for x, y in zip(a, b)], comparisons)


def gain(a, b, better="higher", comparisons=1):
    """(mean, half width) of how much better a is than b, paired by seed."""
    return difference(b, a, comparisons) if better == "lower" else difference(a, b, comparisons)


def judge(mean, half):
    """The verdict on a claim that a number is positive: does the interval lie above 0, or below?"""
    return "holds" if mean > half else "does not hold" if mean < -half else "undecided"


def winners(values, better):
    """The label whose values (a list a seed) beat every other's beyond the interval, as a set of 0 or 1."""
    if len(values) < 2:
        return set()
    mean = lambda label: sum(values[label]) / len(values[label])
    best = max(values, key=mean) if better == "higher" else min(values, key=mean)
    others = [label for label in values if label != best]
    won = all(judge(*gain(values[best], values[other], better)) == "holds" for other in others)
    return {best} if won else set()
