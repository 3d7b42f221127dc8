"""Uncertainty: the jackknife by blocks, tests for pairs, and what many tests at once need.

Images are numbered, and fall into blocks. A number is computed of all of them, and without each block in
turn. Both methods of a comparison share blocks, seeds and prompts, so their common noise drops out.
"""
import functools
import math


@functools.cache
def t_below(x, dof):
    """P(T < x) for Student's t with `dof` degrees of freedom, by Simpson's rule."""
    if not dof >= 1 or math.isnan(x):
        raise ValueError(f"x={x!r} must be a number, and dof={dof!r} at least 1")
    # with x = sqrt(dof) tan(a), the density becomes a power of the cosine, and the range finite
    constant = math.exp(math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2)) / math.sqrt(math.pi)
    n, h = 2000, math.atan(x / math.sqrt(dof)) / 2000
    weight = lambda i: 1 if i in (0, n) else 4 if i % 2 else 2
    return 0.5 + constant * h / 3 * sum(weight(i) * math.cos(i * h)**(dof - 1) for i in range(n + 1))


@functools.cache
def t_quantile(p, dof):
    """The p-quantile (1/2 < p < 1) of Student's t, by bisection."""
    if not 0.5 < p < 1:
        raise ValueError(f"p={p!r} must lie between 0.5 and 1")
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_below(middle, dof) < p else (low, middle)
    return low


def jackknife(value, without):
    """(value without its bias of order 1/n, standard error), from the values `without` each block in turn.

    For a Frechet distance the corrected value estimates that of infinitely many images. Efron, 1982.
    """
    g, mean = len(without), sum(without) / len(without)
    if g < 2 or not all(map(math.isfinite, (value, *without))):
        raise ValueError(f"value={value!r}, without={without!r} must be finite, and the blocks at least 2")
    return g * value - (g - 1) * mean, math.sqrt((g - 1) / g * sum((v - mean)**2 for v in without))


def half_width(error, dof):
    """Half of the 95 % interval of a number with a standard error."""
    return t_quantile(0.975, dof) * error


def difference(a, b, comparisons=1):
    """(mean, half width of the 95 % interval) of a - b, lists of independent numbers, paired by place.

    With several `comparisons` the interval is Bonferroni's, which covers all of them together.
    """
    values = [float(x - y) for x, y in zip(a, b, strict=True)]
    n, mean = len(values), sum(values) / max(1, len(values))
    if n < 2 or not all(map(math.isfinite, values)):
        raise ValueError(f"a={a!r}, b={b!r} must be finite numbers, at least 2 pairs")
    variance = sum((v - mean)**2 for v in values) / (n - 1)
    return mean, t_quantile(1 - 0.025 / comparisons, n - 1) * math.sqrt(variance / n)


def two_sided(mean, error, dof):
    """p of the hypothesis that the mean is 0."""
    if error == 0:
        return float(mean == 0)
    return max(0.0, 2 * (1 - t_below(abs(mean) / error, dof)))  # the quadrature errs by 1e-13


def equivalence(mean, error, dof, margin):
    """Two one-sided tests (Schuirmann, 1987): p of the hypothesis that |mean| is at least `margin`."""
    if not margin > 0:
        raise ValueError(f"margin={margin!r} must be above 0")
    if error == 0:
        return float(abs(mean) >= margin)
    return max(1 - t_below((margin - mean) / error, dof), 1 - t_below((margin + mean) / error, dof))


def mcnemar(a, b):
    """Exact p of the hypothesis that a and b (equally many True or False, paired) are right equally often."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} answers cannot be paired")
    first, second = sum(x > y for x, y in zip(a, b)), sum(y > x for x, y in zip(a, b))
    n = first + second
    tail = sum(math.comb(n, i) for i in range(min(first, second) + 1))
    return min(1.0, 2 * tail / 2**n)


def benjamini_hochberg(p):
    """Adjusted p-values, in the order given: at most 5 % of those below 0.05 are false, on average."""
    order, adjusted, least = sorted(range(len(p)), key=lambda i: p[i]), [1.0] * len(p), 1.0
    for rank in range(len(p), 0, -1):
        i = order[rank - 1]
        least = min(least, p[i] * len(p) / rank)
        adjusted[i] = least
    return adjusted
