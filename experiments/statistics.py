"""Means over seeds with 95 % intervals (Student's t), and comparisons that are paired by seed."""
import math

T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def interval(values):
    """(mean, half the width of its 95 % interval) of independent values; the width of a single one is unknown: inf."""
    values = [float(v) for v in values]
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"values={values!r} must be finite numbers, at least one")
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return mean, math.inf
    variance = sum((v - mean)**2 for v in values) / (n - 1)
    quantile = T975[n - 2] if n - 2 < len(T975) else 1.96 + 2.4 / (n - 1)
    return mean, quantile * math.sqrt(variance / n)


def difference(a, b):
    """(mean, half width) of a - b, paired by seed."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values cannot be paired")
    return interval([x - y for x, y in zip(a, b)])


def verdict(a, b, better="higher"):
    """Whether a beats b: "holds" or "does not hold" (b beats a) where the paired interval excludes 0, else "undecided"."""
    mean, half = difference(a, b)
    mean = -mean if better == "lower" else mean
    return "holds" if mean > half else "does not hold" if mean < -half else "undecided"


def winners(values, better):
    """The label whose values (a list a seed) beat every other's beyond the paired interval, as a set of one or none."""
    if len(values) < 2:
        return set()
    order = sorted(values, key=lambda label: sum(values[label]) / len(values[label]), reverse=better == "higher")
    best = order[0]
    return {best} if all(verdict(values[best], values[other], better) == "holds" for other in order[1:]) else set()
