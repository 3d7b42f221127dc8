"""The graded checks: for each exercise a slow specification in plain loops, then what must be true of yours.

A check is a function (student, seed) that raises Wrong with a message: what was computed, on what, what was
expected, and what to read again. Its inputs are drawn from the seed, in float64 and rounded to two decimals,
so that you can type them in. A difference of 1e-5 is not an error. EXERCISES is the list of all checks, one
point each; grade.py runs them. `student.energy(...)` runs in another process (worker.py), and so does
`student.attend(...)`, which stands for a model's call of F.scaled_dot_product_attention.
"""
import contextlib
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Check:
    name: str
    function: Callable  # (student, seed); raises Wrong


@dataclass(frozen=True)
class Exercise:
    number: int
    title: str
    checks: list = field(default_factory=list)


EXERCISES = [Exercise(number, title) for number, title in enumerate(
    ["The energy and its gradient", "Energy attention", "Temperature and entropy", "Intercepting attention",
     "A weak encoding of the prompt (C-ERG)", "The guidance update, with kappa", "The sampler"], start=1)]


def check(exercise, name):
    """Adds the function below it to the checks of an exercise."""
    def add(function):
        EXERCISES[exercise - 1].checks.append(Check(name, function))
        return function
    return add


# ------------------------------------------------------------------------------------------------
# Tools: inputs from a seed, comparisons that explain themselves
# ------------------------------------------------------------------------------------------------


class Wrong(AssertionError):
    """A check failed; the message is for the student."""


class Gone(Exception):
    """The process of the student's code ended, or was too slow, or sent what nobody can read."""


class StudentError(Exception):
    """The student's code raised an error: as worker.describe tells it."""

    def __init__(self, kinds, message, where, raised):
        super().__init__(str(message)[:1000])
        self.kinds, self.where = [str(kind) for kind in kinds] or ["Exception"], where and str(where)[:500]
        self.raised = bool(raised) and not self.unwritten  # by a `raise` of their own

    @property
    def unwritten(self):
        return "NotImplementedError" in self.kinds

    @property
    def told(self):
        kind = self.kinds[0]
        return f"called sys.exit: {self}" if kind == "SystemExit" else f"raised {kind}: {self}"


def wrong(told, what, read):
    """Raise Wrong: how it was computed, what came out and what was expected, and where to read."""
    raise Wrong(f"{told}\n{what}\nRead again: {read}")


def draw(seed, *shapes, scale=1.0):
    """One tensor a shape, standard normal times scale, float64, rounded to two decimals."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [(x * scale * 100).round() / 100 for x in drawn]


def number(seed, low, high):
    """A number from the seed, rounded to two decimals."""
    return round(random.Random(seed).uniform(low, high), 2)


def show(x):
    """A value on one line: tensors as nested lists, large ones cut."""
    if isinstance(x, (list, tuple)):
        return f"[{', '.join(map(show, x))}]"[:200]
    if not isinstance(x, torch.Tensor):
        return repr(x)[:200]
    if x.numel() > 24:
        first = ", ".join(f"{y:.4g}" for y in x.flatten()[:6].tolist())
        return f"[{first}, ...] of shape {tuple(x.shape)}"

    def text(y):
        return "[" + ", ".join(map(text, y)) + "]" if isinstance(y, list) else f"{y:.6g}"

    return text(x.detach().tolist())


class Named:
    """Something that prints as its name."""

    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return self.name


def listed(inputs):
    """{name: value}, one a line."""
    return "\n".join(f"  {name} = {show(value)}" for name, value in inputs.items())


def call(name, inputs, **options):
    """How a call of a student's function is told: the line of Python, then its inputs."""
    arguments = [*inputs, *(f"{key}={show(value)}" for key, value in options.items())]
    return f"{name}({', '.join(arguments)}) with\n{listed(inputs)}"


def has_shape(told, computed, shape, read="the shapes in the docstring", verb="returned"):
    """Raise Wrong unless `computed` is a tensor of this shape."""
    if not isinstance(computed, torch.Tensor):
        kind = type(computed).__name__
        wrong(told, f"{verb} {show(computed)}, a {kind}; expected a tensor of shape {tuple(shape)}", read)
    if computed.shape != shape:
        wrong(told, f"{verb} a tensor of shape {tuple(computed.shape)}; expected {tuple(shape)}", read)


def agree(told, computed, expected, read, verb="returned", tolerance=1e-5):
    """Raise Wrong unless `computed` is a tensor like `expected`; `told` says how it was computed."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    has_shape(told, computed, expected.shape, read, verb)
    computed = computed.detach().to("cpu", torch.float64)
    differ = ~((computed - expected).abs() <= tolerance * (1 + expected.abs()))  # also where it is nan
    if differ.any():
        where = tuple(differ.nonzero()[0].tolist())
        place = f" at {list(where)}: {computed[where]:.6g} is not {expected[where]:.6g}" if where else ""
        wrong(told, f"{verb} {show(computed)}\nexpected {show(expected)}\n"
              f"{int(differ.sum())} of {differ.numel()} numbers differ{place}", read)


def expect(student, name, inputs, expected, read, where="", **options):
    """Call a student's function, options by name, and compare; `where` is told in front."""
    student.doing = where + call(name, inputs, **options)
    agree(student.doing, getattr(student, name)(*inputs.values(), **options), expected, read)


@contextlib.contextmanager
def expect_error(kind, told, read):
    """Raise Wrong unless the block raises an error of this kind (an unwritten exercise does not count)."""
    try:
        yield
    except StudentError as error:
        if error.unwritten or "Missing" in error.kinds:
            raise
        if kind.__name__ not in error.kinds:
            wrong(told, f"{error.told}; expected {kind.__name__}", read)
    else:
        wrong(told, f"raised nothing; expected {kind.__name__}", read)


def unchanged(told, before, after):
    """Raise Wrong if an input, {name: tensor}, is not what it was."""
    for name in before:
        if not torch.equal(before[name], after[name]):
            wrong(told, f"changed its input {name} in place, to {show(after[name])}",
                  "the shapes in the docstring: whoever passed it still needs it")


def attempt(check, student, seed):
    """Run one check: None if it passed, else the message for the student; Gone if a new process is due."""
    student.begin()
    try:
        check.function(student, seed)
    except Gone:
        raise
    except Wrong as error:
        return str(error)
    except StudentError as error:
        return explain(error, student.doing)
    except Exception as error:  # an answer of a strange kind
        return f"{student.doing}\ngave {type(error).__name__}: {error}"[:1000]
    return None


def explain(error, doing=""):
    """An error of a student's code as a message, with the line that raised it."""
    if "Missing" in error.kinds:
        return str(error)
    if error.unwritten:
        return f"not written yet: {error}"
    lines = [doing, error.told[:1000], error.where]
    if error.raised and doing:
        lines.append("Read again: the recipe, on this error: it is a `raise` of your own, and none is due")
    return "\n".join(filter(None, lines))


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


# ------------------------------------------------------------------------------------------------
# Exercise 1: the energy and its gradient
# ------------------------------------------------------------------------------------------------


def slow_energy(state, patterns, tau, alpha, beta):
    """Equation 9 for one state, a list of d numbers, and a list of N patterns."""
    b = tau * beta
    lse = math.log(sum(math.exp(b * dot(pattern, state)) for pattern in patterns)) / b
    return 0.5 * dot(state, state) - alpha * lse


def slow_gradient(state, patterns, tau, alpha, beta, h=1e-5):
    """The gradient of slow_energy by its definition: nudge one coordinate at a time."""
    gradient = []
    for i in range(len(state)):
        up = [x + h * (i == j) for j, x in enumerate(state)]
        down = [x - h * (i == j) for j, x in enumerate(state)]
        rise = slow_energy(up, patterns, tau, alpha, beta) - slow_energy(down, patterns, tau, alpha, beta)
        gradient.append(rise / (2 * h))
    return gradient


def slow_descend(state, patterns, gamma, K, tau, alpha, beta):
    """Gradient descent on slow_energy."""
    for _ in range(K):
        gradient = slow_gradient(state, patterns, tau, alpha, beta)
        state = [x - gamma * g for x, g in zip(state, gradient)]
    return state


def of_each(function, xi, X, *settings):
    """function(state, patterns, *settings) of every state in xi (S, d), with the patterns X (N, d)."""
    return [function(state, X.tolist(), *settings) for state in xi.tolist()]


@check(1, "the energy is that of the loops")
def energy_by_loops(student, seed):
    xi, X = draw(seed, (2, 3), (4, 3))
    beta = number(seed, 0.3, 0.9)
    expect(student, "energy", dict(xi=xi, X=X), of_each(slow_energy, xi, X, 1, 1, beta),
           "equation 9: which of its terms has the 1/2, and where, in two places, does b = tau * beta stand?",
           beta=beta)


@check(1, "tau and alpha stand where equation 9 has them")
def energy_tau_alpha(student, seed):
    xi, X = draw(seed + 1, (2, 3), (4, 3))
    tau, alpha, beta = number(seed, 0.1, 0.5), number(seed, 1.5, 3.0), number(seed, 0.5, 0.9)
    expect(student, "energy", dict(xi=xi, X=X), of_each(slow_energy, xi, X, tau, 1, beta),
           "equation 9: tau multiplies beta, and b = tau * beta stands in lse(z, b) twice",
           tau=tau, beta=beta)
    expect(student, "energy", dict(xi=xi, X=X), of_each(slow_energy, xi, X, tau, alpha, beta),
           "equation 9: alpha weighs one of the two terms", tau=tau, alpha=alpha, beta=beta)


@check(1, "beta is 1/sqrt(d) by default")
def energy_default_beta(student, seed):
    xi, X = draw(seed + 2, (2, 4), (3, 4))
    expect(student, "energy", dict(xi=xi, X=X), of_each(slow_energy, xi, X, 1, 1, 4**-0.5),
           "the footnote of Algorithm 1. d is the length of one state, here 4")


@check(1, "the energy of large scores does not overflow")
def energy_large(student, seed):
    scale = 100.0 * (1 + seed % 5)
    xi, X = torch.tensor([[scale, 0.0]]).double(), torch.tensor([[scale, 0.0], [0.0, scale]]).double()
    expect(student, "energy", dict(xi=xi, X=X), [0.5 * scale**2 - scale**2],
           "lse: exp(1000) is infinite in floating point. One score is far above the rest: so lse is it",
           beta=1.0)


@check(1, "the gradient is that of the energy")
def gradient_by_nudging(student, seed):
    xi, X = draw(seed + 3, (2, 3), (4, 3))
    read = "equation 6: it is the derivative of equation 9 with respect to xi, here measured by nudging xi"
    expect(student, "energy_gradient", dict(xi=xi, X=X), of_each(slow_gradient, xi, X, 1, 1, 3**-0.5), read)
    tau, alpha, beta = number(seed, 0.2, 0.6), number(seed, 1.5, 3.0), number(seed, 0.5, 0.9)
    expect(student, "energy_gradient", dict(xi=xi, X=X), of_each(slow_gradient, xi, X, tau, alpha, beta),
           read, tau=tau, alpha=alpha, beta=beta)


@check(1, "the gradient is in closed form, without autograd")
def gradient_closed_form(student, seed):
    with torch.inference_mode():
        xi, X = draw(seed + 4, (2, 3), (4, 3))
        expect(student, "energy_gradient", dict(xi=xi, X=X), of_each(slow_gradient, xi, X, 1, 1, 3**-0.5),
               "equation 6 is a formula, and needs no autograd",
               where="in torch.inference_mode(), where autograd is "
               "off: ")


@check(1, "descend takes K steps of size gamma")
def descend_by_loops(student, seed):
    xi, X = draw(seed + 5, (2, 3), (4, 3))
    before, gamma, tau = xi.clone(), number(seed, 0.2, 0.7), number(seed, 0.4, 0.8)
    expect(student, "descend", dict(xi=xi, X=X), of_each(slow_descend, xi, X, gamma, 3, tau, 1.5, 3**-0.5),
           "the update below equation 6: every step needs the gradient at the state where it starts",
           gamma=gamma, K=3, tau=tau, alpha=1.5)
    unchanged(student.doing, dict(xi=before), dict(xi=xi))


@check(1, "descend takes beta, and as many steps as K says")
def descend_beta(student, seed):
    xi, X = draw(seed + 8, (2, 3), (4, 3))
    beta, K, alpha = number(seed, 1.0, 1.5), 4 + seed % 3, number(seed, 0.5, 0.9)
    expect(student, "descend", dict(xi=xi, X=X), of_each(slow_descend, xi, X, 0.3, K, 1, alpha, beta),
           "the update below equation 6: its gradient is that of the energy with the beta that was given",
           gamma=0.3, K=K, alpha=alpha, beta=beta)


@check(1, "with gamma = 1 the energy never rises")
def energy_never_rises(student, seed):
    xi, X = draw(seed + 6, (3, 2), (4, 2), scale=2)
    energies = []
    for K in (1, 2, 3, 4):
        student.doing = call("descend", dict(xi=xi, X=X), gamma=1.0, K=K)
        states = student.descend(xi.clone(), X, gamma=1.0, K=K)
        has_shape(student.doing, states, xi.shape)
        energies.append(of_each(slow_energy, states, X, 1, 1, 2**-0.5))
    energies.insert(0, of_each(slow_energy, xi, X, 1, 1, 2**-0.5))
    stuck = sum(energies[-1]) > sum(energies[0]) - 1e-3  # one state alone may begin in its minimum
    for i, path in enumerate(zip(*energies)):
        if stuck or any(b > a + 1e-6 for a, b in zip(path, path[1:])):
            wrong(f"{student.doing}\nand with fewer steps", f"the energy of state {i} after 0 to 4 steps is "
                  f"{', '.join(f'{e:.4g}' for e in path)}; it must fall and never rise",
                  "section 2.3, the sign of the update below equation 6")


@check(1, "dimensions in front are a batch")
def energy_batch(student, seed):
    xi, X = draw(seed + 7, (2, 2, 3, 4), (2, 2, 5, 4))
    for name, slow in (("energy", slow_energy), ("energy_gradient", slow_gradient)):
        expected = [[of_each(slow, xi[i, j], X[i, j], 1, 1, 0.5) for j in range(2)] for i in range(2)]
        expect(student, name, dict(xi=xi, X=X), expected,
               "the shapes in the docstring. Here xi is (2, 2, 3, 4) and X (2, 2, 5, 4): .T turns all around")


# ------------------------------------------------------------------------------------------------
# Exercise 2: energy attention
# ------------------------------------------------------------------------------------------------


def slow_attention(query, keys, values, tau=1.0):
    """softmax(tau * beta * q k^T) v for one query, a list of D numbers."""
    beta = len(query) ** -0.5
    weights = [math.exp(tau * beta * dot(query, key)) for key in keys]
    return [dot(weights, column) / sum(weights) for column in zip(*values)]


def slow_energy_attention(query, keys, values, tau, alpha, gamma, K):
    """Algorithm 1 for one query."""
    for _ in range(K):
        attended = slow_attention(query, keys, values, tau)
        query = [x - gamma * (x - alpha * a) for x, a in zip(query, attended)]
    return query


def of_each_query(function, q, k, v, *settings):
    """function(query, keys, values, *settings) of every query: q (B, H, S, D), k and v (B, H, N, D)."""
    B, H, S, _ = q.shape
    q, k, v = q.tolist(), k.tolist(), v.tolist()
    return [[[function(q[b][h][s], k[b][h], v[b][h], *settings) for s in range(S)]
             for h in range(H)] for b in range(B)]


def expect_algorithm_1(student, seed, read, tau=1.0, alpha=1.0, gamma=1.0, K=1):
    """energy_attention on small tensors against the loops."""
    q, k, v = draw(seed, (1, 1, 2, 2), (1, 1, 3, 2), (1, 1, 3, 2))
    expected = of_each_query(slow_energy_attention, q, k, v, tau, alpha, gamma, K)
    options = dict(tau=tau, alpha=alpha, gamma=gamma, K=K)
    expect(student, "energy_attention", dict(q=q, k=k, v=v), expected, read,
           **{name: value for name, value in options.items() if value != 1})


@check(2, "with all four numbers at 1 it is ordinary attention")
def attention_ordinary(student, seed):
    expect_algorithm_1(student, seed,
                       "Algorithm 1: with gamma = 1 the old query drops out; and its footnote: what is "
                       "beta?")
    q, k, v = draw(seed, (2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 8))
    expect(student, "energy_attention", dict(q=q, k=k, v=v), of_each_query(slow_attention, q, k, v),
           "the shapes in the docstring; this must equal F.scaled_dot_product_attention(q, k, v)")


@check(2, "tau = 0 is the mean of the values")
def attention_uniform(student, seed):
    q, k, v = draw(seed + 1, (1, 1, 2, 2), (1, 1, 3, 2), (1, 1, 3, 2))
    expect(student, "energy_attention", dict(q=q, k=k, v=v), v.mean(-2, keepdim=True).expand_as(q),
           "Algorithm 1: what is softmax(0)? Uniform attention, and not 'off'", tau=0.0)


@check(2, "tau stands inside the softmax")
def attention_tau(student, seed):
    read = "Algorithm 1: what does tau multiply? tau < 1 flattens, tau > 1 sharpens"
    expect_algorithm_1(student, seed + 2, read, tau=number(seed, 0.1, 0.5))
    expect_algorithm_1(student, seed + 2, read, tau=number(seed, 2.0, 4.0))


@check(2, "alpha weighs the attended values alone")
def attention_alpha(student, seed):
    read = "Algorithm 1: alpha weighs one of the two terms in the brackets; alpha = 0 leaves (1 - gamma) * q"
    expect_algorithm_1(student, seed + 3, read, alpha=0.0, gamma=0.5)
    expect_algorithm_1(student, seed + 3, read, alpha=number(seed, 1.5, 3.0), gamma=number(seed, 0.3, 0.8))


@check(2, "with gamma below 1 the old query stays in part, untempered")
def attention_residual(student, seed):
    read = "Algorithm 1: where does tau stand, and which of the three Q have none? (Listing 2 differs here)"
    expect_algorithm_1(student, seed + 4, read, gamma=number(seed, 0.3, 0.8))
    expect_algorithm_1(student, seed + 4, read, tau=number(seed, 0.1, 0.4), gamma=number(seed, 0.3, 0.8))


@check(2, "K steps are K passes through the loop")
def attention_steps(student, seed):
    read = "Algorithm 1: each step starts from the query of the one before; keys, values and tau stay"
    expect_algorithm_1(student, seed + 5, read, K=2 + seed % 2)
    expect_algorithm_1(student, seed + 5, read, tau=number(seed, 0.2, 0.6), alpha=number(seed, 1.2, 2.0),
                       gamma=number(seed, 0.4, 0.8), K=4)


@check(2, "large scores do not overflow")
def attention_large(student, seed):
    q = 200 * (1 + seed % 5) * torch.eye(2, dtype=torch.float64)[None, None]
    v, = draw(seed, (1, 1, 2, 2))
    expect(student, "energy_attention", dict(q=q, k=q, v=v), v,
           "softmax: exp(1000) is infinite in floating point. Each query fits one key alone here")


@check(2, "q, k and v are left as they are")
def attention_inputs(student, seed):
    inputs = dict(zip("qkv", draw(seed + 6, (1, 1, 2, 2), (1, 1, 3, 2), (1, 1, 3, 2))))
    before = {name: x.clone() for name, x in inputs.items()}
    student.doing = call("energy_attention", inputs, tau=0.5, gamma=0.5, K=2)
    answer = student.energy_attention(*inputs.values(), tau=0.5, gamma=0.5, K=2)
    unchanged(student.doing, before, inputs)
    has_shape(student.doing, answer, (1, 1, 2, 2))


# ------------------------------------------------------------------------------------------------
# Exercise 3: temperature and entropy
# ------------------------------------------------------------------------------------------------


def slow_entropy(query, keys, tau):
    """The entropy, in nats, of one query's attention weights."""
    scores = [tau * len(query) ** -0.5 * dot(query, key) for key in keys]
    weights = [math.exp(score - max(scores)) for score in scores]
    p = [weight / sum(weights) for weight in weights]
    return -sum(x * math.log(x) for x in p if x > 0)


def entropies(q, k, tau):
    """slow_entropy of every query: q (B, H, S, D), k (B, H, N, D) -> (B, H, S)."""
    values = of_each_query(lambda query, keys, _: slow_entropy(query, keys, float(tau)), q, k, k)
    return torch.tensor(values).double()


@check(3, "the entropy is that of the loops")
def entropy_by_loops(student, seed):
    q, k = draw(seed, (1, 1, 3, 2), (1, 1, 4, 2))
    expect(student, "attention_entropy", dict(q=q, k=k), entropies(q, k, 1),
           "the equation in the docstring; in nats the logarithm is the natural one")
    q, k = draw(seed, (2, 3, 4, 8), (2, 3, 5, 8))
    expect(student, "attention_entropy", dict(q=q, k=k), entropies(q, k, 1),
           "the shapes in the docstring: one number a query")


@check(3, "at tau = 0 it is log(N)")
def entropy_uniform(student, seed):
    N = 3 + seed % 4
    q, k = draw(seed + 1, (1, 1, 2, 2), (1, 1, N, 2))
    expect(student, "attention_entropy", dict(q=q, k=k), torch.full((1, 1, 2), math.log(N)),
           f"section 3.1: tau = 0 is uniform attention, here over {N} keys", tau=0.0)


@check(3, "weights that vanish are no nan")
def entropy_of_zeros(student, seed):
    q = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]]).double()
    k = torch.tensor([[[[3.0, 1.0], [1.0, 3.0], [-2.0, -2.0]]]]).double()[:, :, torch.randperm(
        3, generator=torch.Generator().manual_seed(seed))]
    expect(student, "attention_entropy", dict(q=q, k=k), torch.zeros(1, 1, 2),
           "one weight is 1 here and the others are 0 in floating point: what is the limit of p log p at 0?",
           tau=1000.0 * (2 + seed % 3))


@check(3, "tau multiplies beta = 1/sqrt(D)")
def entropy_tau(student, seed):
    q, k = draw(seed + 2, (1, 1, 2, 4), (1, 1, 3, 4))
    for tau in (number(seed, 0.2, 0.5), number(seed, 2.0, 4.0)):
        expect(student, "attention_entropy", dict(q=q, k=k), entropies(q, k, tau),
               "the footnote of Algorithm 1", tau=tau)


@check(3, "the entropy falls as tau rises")
def entropy_monotone(student, seed):
    q, k = draw(seed + 3, (1, 1, 2, 3), (1, 1, 4, 3))
    taus, values = [0.0, 0.1, 0.5, 1.0, 2.0, 5.0], []
    for tau in taus:
        student.doing = call("attention_entropy", dict(q=q, k=k), tau=tau)
        entropy = student.attention_entropy(q, k, tau=tau)
        has_shape(student.doing, entropy, (1, 1, 2))
        values.append(float(entropy.mean()))
    if not all(a > b for a, b in zip(values, values[1:])):
        wrong(f"{student.doing}\nand with smaller tau", f"the mean entropies at tau = {taus} are "
              f"{[round(value, 4) for value in values]}; each must be below the one before",
              "section 3.1: tau 'controls the sharpness of the softmax'")


def expect_temperature(student, q, k, target, read, entropy=entropies, told="the grader's"):
    student.doing = call("temperature_for_entropy", dict(q=q, k=k), target=round(target, 4),
                         entropy=Named(told))
    tau = student.temperature_for_entropy(q, k, target, entropy=entropy)
    if not isinstance(tau, (int, float, torch.Tensor)):
        wrong(student.doing, f"returned {show(tau)}; expected a number", read)
    tau = float(tau)
    reached = float(entropy(q, k, tau).mean()) if 0 <= tau < math.inf else math.nan
    if not abs(reached - target) <= 1e-3:
        wrong(student.doing, f"returned tau = {tau:.6g}, at which the mean entropy is {reached:.4f}; "
              f"expected {target:.4f}", read)


@check(3, "the temperature meets its target entropy")
def temperature_meets_target(student, seed):
    q, k = draw(seed + 4, (1, 1, 3, 3), (1, 1, 4, 3))
    for share in (0.9, 0.5, 0.2):
        expect_temperature(student, q, k, share * math.log(4),
                           "the recipe: is the mean taken over all queries, and the right half kept?")
    q, k = draw(seed + 5, (1, 2, 3, 2), (1, 2, 4, 2), scale=0.2)
    expect_temperature(student, q, k, 0.5 * math.log(4),
                       "the recipe: these scores are small, so tau must be large; how far do you search?")


@check(3, "the entropy that was handed in is the one that is met")
def temperature_uses_entropy(student, seed):
    q, k = draw(seed + 7, (1, 1, 3, 3), (1, 1, 4, 3))
    expect_temperature(student, q, k, 0.6 * math.log(4),
                       "the recipe: 'call the function that comes as the argument entropy'",
                       lambda q, k, tau: entropies(q, k, 3 * tau), "the grader's, here that at 3 * tau")


@check(3, "an entropy out of reach is a ValueError")
def temperature_out_of_reach(student, seed):
    q, k = draw(seed + 6, (1, 1, 2, 2), (1, 1, 3, 2))
    for target in (number(seed, 1.2, 2.0), -number(seed, 0.1, 1.0)):
        student.doing = call("temperature_for_entropy", dict(q=q, k=k), target=target)
        read = "the recipe: an entropy lies between 0 and log(N), here log(3) = 1.0986"
        with expect_error(ValueError, student.doing, read):
            student.temperature_for_entropy(q, k, target, entropy=entropies)


# ------------------------------------------------------------------------------------------------
# Exercise 4: intercepting attention
# ------------------------------------------------------------------------------------------------


def slow_rectified(n, q, k, v, tau, layers, rows=None, queries=None):
    """The answer to self-attention call n of a forward, one query at a time: q, k, v (B, H, S, D)."""
    B, H, S, _ = q.shape
    answer = torch.empty_like(v)
    for b in range(B):
        for s in range(S):
            row, query = rows is None or b in range(B)[rows], queries is None or s in range(S)[queries]
            factor = tau if n in layers and row and query else 1.0
            for h in range(H):
                one = slow_attention(q[b, h, s].tolist(), k[b, h].tolist(), v[b, h].tolist(), factor)
                answer[b, h, s] = torch.tensor(one)
    return answer


def forward_of(seed, keys, rows=1, heads=1, queries=2):
    """A "model": the q, k, v of its attention calls, each with 2 queries and as many keys as `keys` says."""
    return [draw(100 * seed + i, *[(rows, heads, length, 2) for length in (queries, N, N)], scale=1.5)
            for i, N in enumerate(keys)]


def run(student, calls):
    """A forward: F.scaled_dot_product_attention for each call, as models do, on copies."""
    return [student.attend(q.clone(), k.clone(), v.clone()) for q, k, v in calls]


def told_context(tau, layers, **slices):
    options = dict(layers=layers, **slices)
    return f"with rectified({tau}, {', '.join(f'{name}={value}' for name, value in options.items())}):"


def told_forward(calls):
    n = len(calls)
    return f"a forward of {n} attention call{'s' * (n > 1)}, on a batch of {len(calls[0][0])}"


def compare_forward(told, calls, answers, temperature, read):
    """Raise Wrong unless query s of row b of call n has temperature(n, b, s); n is None if it is cross."""
    n = -1
    for i, ((q, k, v), answer) in enumerate(zip(calls, answers)):
        cross = q.shape[-2] != k.shape[-2]
        n += not cross
        kind = "cross-attention" if cross else f"self-attention {n}"
        has_shape(f"{told}\nattention call {i} ({kind})", answer, q.shape, read)
        for b, s in itertools.product(range(len(q)), range(q.shape[-2])):
            tau = temperature(None if cross else n, b, s)
            expected, plain = (
                [slow_attention(query, keys, values, factor) for query, keys, values
                 in zip(q[b, :, s].tolist(), k[b].tolist(), v[b].tolist())] for factor in (tau, 1.0))
            untouched = " (it was answered at 1.0)" * (tau != 1.0 and alike(answer[b, :, s], plain))
            agree(f"{told}\nattention call {i} ({kind}), query {s} of row {b}, must be answered at "
                  f"temperature {tau}{untouched}\n" + listed(dict(q=q[b, :, s], k=k[b], v=v[b])),
                  answer[b, :, s], expected, read)


def alike(computed, expected):
    """Whether `agree` would find nothing wrong."""
    with contextlib.suppress(Wrong):
        agree("", computed, expected, "")
        return True
    return False


def expect_forward(student, calls, tau, layers, read, **slices):
    """A forward within the student's context; `slices` are rows and queries, those that there are."""
    student.doing = f"{told_context(tau, layers, **slices)} {told_forward(calls)}"
    with student.rectified(tau, layers, **slices):
        answers = run(student, calls)

    def temperature(n, b, s):
        B, _, S, _ = calls[0][0].shape
        rows, queries = slices.get("rows") or slice(None), slices.get("queries") or slice(None)
        return tau if n in layers and b in range(B)[rows] and s in range(S)[queries] else 1.0

    compare_forward(student.doing, calls, answers, temperature, read)


def expect_plain(student, calls, read):
    """Raise Wrong unless attention is what it was."""
    told = student.doing
    compare_forward(f"{told}\nand after it {told_forward(calls)}", calls, run(student, calls),
                    lambda n, b, s: 1.0, read)
    if not student.same():
        wrong(told, "F.scaled_dot_product_attention is not the function that it was before", read)


@check(4, "an attention call is answered at temperature tau")
def rectified_single(student, seed):
    read = "section 3.1: tau multiplies beta; in code, scaling the queries by tau does it"
    expect_forward(student, forward_of(seed, (2,)), number(seed, 0.1, 0.4), [0], read)
    expect_forward(student, forward_of(seed, (2,)), 0.0, [0],
                   "section 3.1: tau = 0 is uniform attention, not 'off'")


@check(4, "the chosen layers run at temperature tau, the others at 1")
def rectified_layers(student, seed):
    read = "appendix C: 'attention blocks between l_min and l_max'; layers are numbered from 0"
    tau = number(seed, 0.1, 0.4)
    expect_forward(student, forward_of(seed, (2, 2, 2, 2)), tau, range(1, 3), read)
    expect_forward(student, forward_of(seed + 1, (2, 2, 2, 2)), tau, {0, 3}, read)


@check(4, "cross-attention is left alone and not counted")
def rectified_cross(student, seed):
    expect_forward(student, forward_of(seed + 3, (2, 3, 2, 3, 2)), number(seed, 0.1, 0.4), {1},
                   "the recipe: self-attention has as many queries as keys; only it is tempered, and counted")


@check(4, "only the rows of the slice are tempered")
def rectified_rows(student, seed):
    read = "section 3.1: only 'the negative/unconditional prediction part' is rectified: rows of the slice"
    tau = number(seed, 0.1, 0.4)
    expect_forward(student, forward_of(seed + 4, (2, 2), rows=4), tau, {0}, read, rows=slice(2, 4))
    expect_forward(student, forward_of(seed + 5, (2, 2), rows=4, heads=2), tau, {1}, read, rows=slice(1, 3))
    expect_forward(student, forward_of(seed + 5, (2, 2), rows=3), tau, {0, 1}, read, rows=slice(None, 1))


@check(4, "only the queries of the slice are tempered")
def rectified_queries(student, seed):
    read = "the recipe: in joint attention the image's queries are tempered, and those of the text are not"
    tau = number(seed, 0.1, 0.4)
    for i, (queries, layer) in enumerate([(slice(0, 3), 0), (slice(1, 3), 1), (slice(2, None), 0)]):
        calls = forward_of(seed + 14 + i, (4, 4), heads=1 + i % 2, queries=4)
        expect_forward(student, calls, tau, {layer}, read, queries=queries)


@check(4, "with rows and queries, these queries of these rows are tempered")
def rectified_rows_and_queries(student, seed):
    expect_forward(student, forward_of(seed + 17, (3,), rows=3, queries=3), number(seed, 0.1, 0.4), [0],
                   "the recipe: a query is tempered if its row and itself are chosen",
                   rows=slice(1, 3), queries=slice(0, 2))


@check(4, "masks are passed on, untempered")
def rectified_mask(student, seed):
    tau, calls = number(seed, 0.1, 0.4), forward_of(seed + 6, (2,))
    bias = draw(seed, (2, 2))[0] + torch.tensor([[2.0, -2.0], [0.0, 1.0]]).double()
    read = "the recipe: tau belongs to q k^T, and a mask that is added to it is passed on as it is"
    for by_name in (True, False):
        expect_masked(student, calls, bias, tau, [0], [tau], read, by_name)


@check(4, "calls that are left alone keep their mask")
def rectified_mask_elsewhere(student, seed):
    tau, calls = number(seed, 0.1, 0.4), forward_of(seed + 18, (2, 3, 2))
    bias = draw(seed + 1, (2, 3))[0] + torch.tensor([[2.0, -2.0, 0.0], [0.0, 1.0, -1.0]]).double()
    expect_masked(student, calls, bias, tau, [1], [1.0, 1.0, tau],
                  "the recipe: the call is handed on 'with everything else that it was given'")


def expect_masked(student, calls, bias, tau, layers, factors, read, by_name=True):
    """A forward with an additive mask in every call; `factors` are the temperatures of the calls."""
    student.doing = f"{told_context(tau, layers)} {told_forward(calls)}, each with an additive mask"
    with student.rectified(tau, layers):
        answers = []
        for q, k, v in calls:
            mask = bias[:, :k.shape[-2]].clone()
            answers.append(student.attend(q.clone(), k, v, attn_mask=mask) if by_name else
                           student.attend(q.clone(), k, v, mask))
    for i, ((q, k, v), answer, factor) in enumerate(zip(calls, answers, factors)):
        mask = bias[:, :k.shape[-2]]
        told = f"F.scaled_dot_product_attention(q, k, v, {'attn_mask=' * by_name}mask)"
        agree(f"{student.doing}\ncall {i}, {told}, must be answered at temperature {factor}\n"
              + listed(dict(q=q, k=k, v=v, mask=mask)), answer,
              slow_masked(q, k, v, factor * 2**-0.5, mask), read)


def slow_masked(q, k, v, factor, bias):
    """softmax(factor * q k^T + bias) v for q, k, v of one row and one head."""
    answer = []
    for query, added in zip(q[0, 0].tolist(), bias.tolist()):
        weights = [math.exp(factor * dot(query, key) + extra) for key, extra in zip(k[0, 0].tolist(), added)]
        answer.append([dot(weights, column) / sum(weights) for column in zip(*v[0, 0].tolist())])
    return [[answer]]


@check(4, "scale and is_causal are passed on, and all may come by name")
def rectified_options(student, seed):
    (q, k, v), = forward_of(seed + 7, (2,))
    tau, scale = number(seed, 0.1, 0.4), number(seed, 1.0, 2.0)
    causal, inputs = torch.tensor([[0.0, -math.inf], [0.0, 0.0]]), dict(q=q, k=k, v=v)
    read = "the recipe: the call is handed on 'with everything else that it was given'"
    for args, options, expected in (
            ((q, k, v), dict(scale=scale), slow_masked(q, k, v, tau * scale, torch.zeros(2, 2))),
            ((q, k, v), dict(is_causal=True), slow_masked(q, k, v, tau * 2**-0.5, causal)),
            ((), dict(query=q, key=k, value=v), slow_masked(q, k, v, tau * 2**-0.5, torch.zeros(2, 2)))):
        told = ", ".join([*"qkv"][:len(args)] + [f"{n}={n[0] if n in ('query', 'key', 'value') else x}"
                                                  for n, x in options.items()])
        student.doing = (f"{told_context(tau, [0])} F.scaled_dot_product_attention({told}) with\n"
                         + listed(inputs))
        with student.rectified(tau, [0]):
            answer = student.attend(*args, **options)
        agree(student.doing, answer, expected, read)


@check(4, "after the context all is as it was")
def rectified_restores(student, seed):
    calls, tau = forward_of(seed + 8, (2, 2), rows=2), number(seed, 0.1, 0.4)
    before = [[x.clone() for x in call] for call in calls]
    student.doing = f"{told_context(tau, [0, 1])} {told_forward(calls)}"
    plain = run(student, calls)
    with student.rectified(tau, [0, 1]):
        require_effect(student.doing, plain, [student.attend(*call) for call in calls])
    for old, new in zip(before, calls):
        unchanged(student.doing, dict(zip("qkv", old)), dict(zip("qkv", new)))
    expect_plain(student, calls, "the recipe: at the end put everything back")


def require_effect(told, plain, answers):
    """Raise Wrong if a context changed nothing: then there is nothing to put back."""
    if all(torch.equal(a, b) for a, b in zip(plain, answers)):
        wrong(told, "was answered as outside of the context: there was nothing to put back",
              "the recipe: which attribute of which module do models look up?")


class Interruption(Exception):
    """What a model might raise in the middle of a forward."""


@check(4, "after an exception, too, and it passes through")
def rectified_exception(student, seed):
    calls, tau = forward_of(seed + 9, (2, 2)), number(seed, 0.1, 0.4)
    student.doing = f"{told_context(tau, [0, 1])} a forward that raises an error after its first call"
    try:
        plain = run(student, calls[:1])
        with student.rectified(tau, [0, 1]):
            require_effect(student.doing, plain, run(student, calls[:1]))
            raise Interruption("this is the model's own error")
    except Interruption:
        pass
    except StudentError as error:
        if not isinstance(error.__context__, Interruption):
            raise
        wrong(student.doing, f"{error.told}, in place of the error of the model",
              "the recipe: an exception 'passes through'; is the test for missed layers skipped then?")
    else:
        wrong(student.doing, "lost its error: the context swallowed it", "the recipe: 'which passes through'")
    expect_plain(student, calls,
                 "the recipe: 'also after an exception'; which statement of Python is for that?")


@check(4, "a chosen layer that is never met is a RuntimeError")
def rectified_missed(student, seed):
    calls = forward_of(seed + 10, (2, 2, 3))
    for layers in ({7 + seed % 3}, {0, 2}):
        student.doing = f"{told_context(0.1, layers)} a forward of self-attention 0, 1 and a cross-attention"
        context = student.rectified(0.1, layers)
        context.__enter__()  # neither this nor the forward may raise
        run(student, calls)
        read = "the recipe: every chosen layer must have been met when the forward ends"
        with expect_error(RuntimeError, student.doing, read):
            context.__exit__(None, None, None)


@check(4, "contexts nest")
def rectified_nested(student, seed):
    calls = forward_of(seed + 11, (2, 2, 2))
    outer, inner = number(seed, 0.1, 0.2), number(seed, 0.3, 0.4)
    student.doing = (f"{told_context(outer, [0, 2])}\n    {told_context(inner, [1])} the first two calls\n"
                     "    then the third")
    with student.rectified(outer, [0, 2]):
        with student.rectified(inner, [1]):
            answers = run(student, calls[:2])
        answers += run(student, calls[2:])
    compare_forward(student.doing, calls, answers, lambda n, b, s: (outer, inner, outer)[n],
                    "the recipe: the inner context hands its calls on to the outer one, and puts it back")
    expect_plain(student, calls, "the recipe: what was there before you, when you came?")


@check(4, "each context counts anew")
def rectified_anew(student, seed):
    tau, read = number(seed, 0.1, 0.4), "the recipe: 'anew in each context'"
    expect_forward(student, forward_of(seed + 12, (2, 2)), tau, [0], read)
    expect_forward(student, forward_of(seed + 13, (2, 2, 2)), tau, [0], read)


# ------------------------------------------------------------------------------------------------
# Exercises 5 and 6: a model whose attention is reached by the grader's own context
# ------------------------------------------------------------------------------------------------


class ToyModel:
    """Two attention layers that `Rectify` can temper; keeps a list of what each forward was given."""

    def __init__(self, seed, settings=None):
        angle = 3 * draw(seed, (2, 3))[0]  # rotations: attention is neither uniform nor saturated
        rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1)
        self.weights, self.settings, self.forwards = 1.5 * rotation.unflatten(-1, (2, 2)), settings, []

    def attend(self, tokens):  # (B, T, 2)
        for n in range(2):
            q, k, v = (tokens[:, None] @ w for w in self.weights[n])  # each (B, 1, T, 2)
            tokens = tokens + slow_rectified(n, q, k, v, *self.settings or (1.0, ()))[:, 0]
        return tokens


class ToyEncoder(ToyModel):
    """Tokens (B, L), whole numbers -> their encodings (B, L, 2)."""

    def __call__(self, tokens):
        self.forwards.append((tokens, self.settings))
        return self.attend(torch.stack([tokens.double().cos(), tokens.double().sin()], dim=-1))


class ToyDenoiser(ToyModel):
    """x (B, S, 2), t (B,), condition (B, L, 2) -> v (B, S, 2): image and text tokens in joint attention."""

    def __call__(self, x, t, condition):
        if getattr(t, "shape", None) != (len(x),) or len(condition) != len(x):
            wrong("guided_velocity", f"called the model with x of shape {tuple(x.shape)}, condition of shape "
                  f"{tuple(condition.shape)} and t = {show(t)}; all need as many rows: t is ({len(x)},)",
                  "the shapes in the docstring")
        self.forwards.append((len(x), condition))
        tokens = torch.cat([x, condition], dim=1) + t.to(x)[:, None, None]
        return self.attend(tokens)[:, :x.shape[1]]


class Rectify:
    """What the grader hands in as `rectify`: it acts on a ToyModel alone, and keeps a list of its uses."""

    def __init__(self, model):
        self.model, self.calls, self.uses = model, 0, []

    def __call__(self, tau, layers, rows=None, queries=None):
        self.calls += 1
        return self.context(tau, layers, rows, queries)

    @contextlib.contextmanager
    def context(self, *settings):
        self.uses.append(settings)
        before, self.model.settings = self.model.settings, settings
        try:
            yield
        finally:
            self.model.settings = before

    def never_used(self):
        """What is wrong if no context was entered, else None."""
        if not self.calls:
            return "never called the `rectify` that it was given (`rectified` does not reach this model)"
        return None if self.uses else "called `rectify`, but never entered it: it acts in a `with` block"


def slow_encode(plain, tempered, tokens):
    """The two encodings, by two encoders: one as it is, one with the temperature built in."""
    return plain(tokens), tempered(tokens)


def encodings(student, seed, L=3, tau=None):
    """Call encode; returns how it is told, the two encodings, those expected, encoder and context."""
    encoder, layers, generator = ToyEncoder(seed), [seed % 2], torch.Generator().manual_seed(seed)
    tokens = torch.stack([1 + torch.randperm(5, generator=generator)[:L] for _ in range(2)])  # no two alike
    tau = number(seed, 0.1, 0.4) if tau is None else tau
    student.doing = call("encode", dict(encoder=Named("a toy encoder of two layers"), tokens=tokens),
                         tau=tau, layers=layers, rectify=Named("the grader's"))
    expected = slow_encode(ToyEncoder(seed), ToyEncoder(seed, settings=(tau, layers)), tokens)
    rectify = Rectify(encoder)
    try:
        answer = student.encode(encoder, tokens, tau, layers, rectify=rectify)
    except StudentError as error:
        if torch.allclose(*expected) or not error.raised:
            raise
        wrong(student.doing, f"{error.told}\nuntil then it "
              f"{misused(encoder, rectify) or 'ran the encoder as it should, and the encodings differ'}",
              ONE_OF_TWO)
    if not isinstance(answer, (tuple, list)) or len(answer) != 2:
        wrong(student.doing, f"returned {show(answer)}, a {type(answer).__name__}; expected two encodings, "
              "(strong, weak)", "the docstring")
    return student.doing, answer, expected, encoder, rectify


ONE_OF_TWO = "the recipe, and the hint: one context is one forward; one of the two runs is in it"


def misused(encoder, rectify):
    """What is wrong with the runs of the encoder, else None."""
    runs = ["rectified" if settings else "plain" for _, settings in encoder.forwards]
    told = f"ran the encoder {len(runs)} times: {', '.join(runs)}; expected a plain run and a rectified one"
    return rectify.never_used() or (told if sorted(runs) != ["plain", "rectified"] else None)


@check(5, "the strong encoding is the encoder's own")
def encode_strong(student, seed):
    told, (strong, _), expected, encoder, _ = encodings(student, seed)
    if encoder.forwards and all(settings for _, settings in encoder.forwards):
        wrong(told, "ran the encoder within the context alone; the strong encoding is made outside of it",
              ONE_OF_TWO)
    agree(f"the first of {told}", strong, expected[0],
          "section 3.2: phi_c = Enc(c), and the order of the two in the docstring")


@check(5, "the weak encoding is that within the context")
def encode_weak(student, seed):
    told, (_, weak), expected, encoder, rectify = encodings(student, seed + 1)
    if unused := rectify.never_used():
        wrong(told, unused, ONE_OF_TWO)
    agree(f"the second of {told}", weak, expected[1],
          "section 3.2: phi_c^tau = Enc(c) with the tempered layers, "
          "and the order of the two in the docstring")


@check(5, "rectify gets tau and layers, and acts on all rows and queries")
def encode_settings(student, seed):
    told, *_, rectify = encodings(student, seed + 2)
    wanted = (number(seed + 2, 0.1, 0.4), [(seed + 2) % 2], None, None)
    uses = [(tau, list(layers), *slices) for tau, layers, *slices in rectify.uses]
    if unused := rectify.never_used():
        wrong(told, unused, ONE_OF_TWO)
    if uses != [wanted]:
        wrong(told, f"called rectify with (tau, layers, rows, queries) = {uses}; expected one call with "
              f"{wanted}", "the recipe")


@check(5, "the encoder runs twice, once of it in the context")
def encode_runs(student, seed):
    told, *_, encoder, rectify = encodings(student, seed + 3)
    if problem := misused(encoder, rectify):
        wrong(told, problem, ONE_OF_TWO)


@check(5, "equal encodings are a ValueError")
def encode_equal(student, seed):
    for L, tau, why in ((3, 1.0, "tau = 1 changes nothing"),
                        (1, 0.1, "one token attends to itself, whatever tau is")):
        read = f"the recipe: {why}, so that both encodings are equal here"
        student.doing = f"encode(...) on a text of {L} tokens with tau={tau}"
        with expect_error(ValueError, student.doing, read):
            encodings(student, seed + 4, L=L, tau=tau)


def slow_guided_velocity(plain, rectified, x, t, condition, negative, w, kappa):
    """Equation 10 by two models: one as it is, one with the temperature built in, used only after kappa."""
    times = torch.full((len(x),), t)
    v_pos = plain(x, times, condition)
    v_neg = (rectified if t > kappa else plain)(x, times, condition if negative is None else negative)
    return w * v_pos + (1 - w) * v_neg


def expect_guided(student, seed, late, read, w=None, has_negative=True, queries=None):
    """guided_velocity against two forwards, at a time after kappa, before it, or (late=None) at it.

    Returns the model's forwards, their number of rows, and the conditions.
    """
    B, kappa = 1 + seed % 3, number(seed, 0.1, 0.25) if late else number(seed, 0.6, 0.8)
    t = kappa if late is None else round(kappa + number(seed + 1, 0.05, 0.15) * (1 if late else -1), 2)
    x, condition, negative = draw(seed, (B, 3, 2), (B, 2, 2), (B, 2, 2), scale=0.5)
    negative, w = negative if has_negative else None, number(seed, 1.5, 4.0) if w is None else w
    model, layers, tau_i = ToyDenoiser(seed), [seed % 2], number(seed, 0.05, 0.2)
    inputs = dict(model=Named("a toy denoiser of two layers"), x=x, t=t, condition=condition,
                  negative=negative)
    settings = dict(w=w, tau_i=tau_i, layers=layers, kappa=kappa)
    if queries is not None:
        settings["queries"] = queries
    student.doing = call("guided_velocity", inputs, **settings, rectify=Named("the grader's"))
    models = ToyDenoiser(seed), ToyDenoiser(seed, settings=(tau_i, layers, None, queries))
    expected, v_pos, v_neg = (slow_guided_velocity(*models, x, t, condition, negative, weight, kappa)
                              for weight in (w, 1, 0))
    rectify = Rectify(model)
    answer = student.guided_velocity(model, x, t, condition, negative, **settings, rectify=rectify)
    if rectify.calls and not rectify.uses and t > kappa and w != 1:
        wrong(student.doing, rectify.never_used(), "the recipe: the forward belongs in the context")
    agree(f"{student.doing}\n(where v_pos is {show(v_pos)}, and v_neg {show(v_neg)})", answer, expected, read)
    return model.forwards, B, condition, negative


def expect_rows(student, forwards, rows, read):
    found = [n for n, _ in forwards]
    if found != [rows]:
        wrong(student.doing, f"ran the model {len(found)} times, with {found} rows; expected one run, with "
              f"{rows}", read)


@check(6, "after kappa it is equation 10, the negative rectified")
def guided_late(student, seed):
    for i in range(3):  # B is 1, 2 and 3
        expect_guided(student, seed + i, True, "equation 10: the weights are w and 1 - w; v_neg is the "
                      "rectified model with the negative's condition, v_pos neither")


@check(6, "one forward of 2B rows, the positive ones first")
def guided_batched(student, seed):
    forwards, B, condition, negative = expect_guided(student, seed + 3, True, "equation 10")
    expect_rows(student, forwards, 2 * B, f"the recipe: B is {B} here")
    agree(student.doing, forwards[0][1], torch.cat([condition, negative]),
          "the recipe: 'the positive ones first'", verb="called the model with the conditions")


@check(6, "up to and at kappa the negative is not rectified")
def guided_early(student, seed):
    read = "appendix C: I-ERG is 'only applied if t > kappa', C-ERG 'for all timesteps'"
    expect_guided(student, seed + 4, False, read)
    expect_guided(student, seed + 5, None, read)


@check(6, "w = 1 is one plain forward of B rows")
def guided_off(student, seed):
    forwards, B, *_ = expect_guided(student, seed + 6, True, "equation 10 with w = 1", w=1.0)
    expect_rows(student, forwards, B, f"the recipe: the negative has no weight with w = 1; B is {B} here")


@check(6, "without a negative it is the same condition, rectified after kappa")
def guided_same(student, seed):
    expect_guided(student, seed + 7, True,
                  "the recipe: None stands for the condition itself, and after kappa "
                  "the negative rows are rectified as ever", has_negative=False)


@check(6, "without a negative and up to kappa it is one plain forward of B rows")
def guided_same_early(student, seed):
    forwards, B, *_ = expect_guided(student, seed + 8, None, "equation 10 with v_neg = v_pos",
                                    has_negative=False)
    expect_rows(student, forwards, B, f"the recipe: the negative equals the positive here; B is {B}")


@check(6, "w = 0 is the negative alone")
def guided_negative(student, seed):
    expect_guided(student, seed + 9, True, "equation 10: the weights are w and 1 - w", w=0.0)


@check(6, "queries are handed to rectify")
def guided_queries(student, seed):
    expect_guided(student, seed + 10, True, "the recipe: of the negative rows, `queries` alone are tempered: "
                  "those of the image", queries=slice(0, 3))
    expect_guided(student, seed + 11, True, "the recipe: `queries` is what the caller says",
                  queries=slice(2, 4))


# ------------------------------------------------------------------------------------------------
# Exercise 7: the sampler. Most of these velocities have a flow in closed form
# ------------------------------------------------------------------------------------------------


def slow_sample(velocity, x, steps, done=0):
    """The path of one number, from t = done/steps on: where it is, then one step, and the path from there."""
    if done == steps:
        return [x]  # at t = 1
    return [x] + slow_sample(velocity, x + velocity(x, done / steps) / steps, steps, done + 1)


def expect_sample(student, told, velocity, noise, expected, read, **options):
    """sample against a closed form; `told` is the velocity as it is shown."""
    student.doing = call("sample", dict(velocity=Named(f"lambda x, t: {told}"), noise=noise), **options)
    agree(student.doing, student.sample(velocity, noise, **options), expected, read)


@check(7, "a constant velocity is exact")
def sample_constant(student, seed):
    noise, v = draw(seed, (2, 1, 3), (2, 1, 3))
    expect_sample(student, show(v), lambda x, t: v, noise, noise + v,
                  "section 2.1: v = data - noise, so x moves by v in total", steps=2 + seed % 4)


@check(7, "a flow to one point ends in the point")
def sample_point(student, seed):
    noise, point = draw(seed + 1, (2, 3), (3,))

    def velocity(x, t):
        if not isinstance(t, (int, float)) and getattr(t, "shape", None) != ():
            wrong(student.doing, f"called velocity with t = {show(t)}; expected a number",
                  "the shapes in the docstring")
        return (point - x) / (1 - t)

    for steps in (1, 2, 7):
        expect_sample(student, f"({show(point)} - x) / (1 - t)", velocity, noise, point.expand_as(noise),
                      "section 2.1: with one data point, x_t = (1 - t) * noise + t * point is straight, and "
                      "Euler's method follows it exactly", steps=steps)


@check(7, "the velocity is asked for at t = 0, 1/steps, ..., never at 1")
def sample_times(student, seed):
    noise, steps, times = draw(seed + 2, (1, 2))[0], 3 + seed % 3, []

    def velocity(x, t):
        times.append(float(t))
        return torch.zeros_like(x)

    student.doing = call("sample", dict(velocity=Named("lambda x, t: 0 * x"), noise=noise), steps=steps)
    student.sample(velocity, noise, steps)
    agree(student.doing, torch.tensor(times), [i / steps for i in range(steps)],
          "the recipe: t = 0 is noise; a step starts at t and ends at t + 1/steps",
          verb="called velocity at t =")


@check(7, "the trajectory has all of x, the noise first")
def sample_trajectory(student, seed):
    noise, rate = draw(seed + 3, (2, 1))[0], number(seed, 0.5, 1.5)

    def velocity(x, t):
        return rate * x + t

    paths = [slow_sample(velocity, x, 3) for x in noise.flatten().tolist()]
    path = torch.tensor(paths).T[..., None]  # (4, B, 1)
    expect_sample(student, f"{rate} * x + t", velocity, noise, path,
                  "the docstring: x at t = 0, 1/steps, ..., 1, of shape (steps + 1, B, ...); here the first "
                  f"step goes from x to x + ({rate} * x + 0)/3, the second adds 1/3 to the velocity",
                  steps=3, trajectory=True)


@check(7, "the error falls as 1/steps")
def sample_converges(student, seed):
    noise, rate, errors = torch.ones(1, 1).double(), number(seed, 0.5, 1.5), []
    for steps in (50, 100):
        student.doing = call("sample", dict(velocity=Named(f"lambda x, t: {rate} * x"), noise=noise),
                             steps=steps)
        x = student.sample(lambda x, t: rate * x, noise.clone(), steps)
        has_shape(student.doing, x, (1, 1))
        errors.append(abs(float(x) - math.exp(rate)))
    if not (1.9 < errors[0] / max(errors[1], 1e-12) < 2.1 and errors[1] < 0.1):
        wrong(student.doing,
              f"is {errors[1]:.3g} away from exp({rate}), and with 50 steps {errors[0]:.3g}; expected "
              "half the error with twice the steps (Euler's method is of first order)",
              "the equation in the docstring")


@check(7, "the noise is left as it is")
def sample_noise(student, seed):
    noise = draw(seed + 4, (2, 3))[0]
    before = noise.clone()
    student.doing = call("sample", dict(velocity=Named("lambda x, t: x + 1"), noise=noise), steps=2)
    x = student.sample(lambda x, t: x + 1, noise, 2)
    unchanged(student.doing, dict(noise=before), dict(noise=noise))
    has_shape(student.doing, x, noise.shape)
    if torch.equal(x, noise):
        wrong(student.doing, f"returned {show(x)}: nothing moved", "the docstring")


@check(7, "less than one step is a ValueError")
def sample_steps(student, seed):
    noise = draw(seed + 5, (1, 2))[0]
    for steps in (0, -1 - seed % 3):
        student.doing = call("sample", dict(velocity=Named("lambda x, t: x"), noise=noise), steps=steps)
        with expect_error(ValueError, student.doing, "the recipe"):
            student.sample(lambda x, t: x, noise, steps)
