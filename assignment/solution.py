"""Entropy Rectifying Guidance (ERG), arXiv 2504.13987: seven exercises and an open experiment.

HANDOUT.md says what each function does. Copy starter.py to a file of your own and write the bodies; keep the
names and the arguments. Helpers, imports and further files beside yours are welcome. Where one exercise needs
another, it is handed what it needs as an argument: a gap in one costs nothing in the next. How you stand:

    python assignment/grade.py my_solution.py
    python assignment/grade.py my_solution.py --only 2 5

Conventions: t = 0 is noise, t = 1 is data; w = 1 is off. tau multiplies beta = 1/sqrt(d): tau < 1 flattens
attention, tau = 0 is uniform attention. tau = alpha = gamma = K = 1 is ordinary attention.
Shapes: B batch, H heads, S queries, N keys, d (or D) head dimension, L text tokens, W width; "..." is any
number of further dimensions in front, also none.
"""
import contextlib
import math
from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor

# BEGIN SOLUTION
# This is the model solution. make_starter.py makes starter.py from it: students get that one.
# END SOLUTION

# ------------------------------------------------------------------------------------------------
# Exercise 1: the energy and its gradient
# ------------------------------------------------------------------------------------------------


def energy(xi: Tensor, X: Tensor, tau: float = 1.0, alpha: float = 1.0, beta: float | None = None) -> Tensor:
    """The Hopfield energy of every state, with temperature tau > 0 and weight alpha.

    Equation 9:  E(xi) = 1/2 |xi|^2 - alpha * lse(X xi, tau * beta),  lse(z, b) = log(sum_n exp(b * z_n)) / b.
    beta is 1/sqrt(d) if it is None.
    Shapes: states xi (..., S, d), patterns X (..., N, d) -> (..., S).
    """
    # BEGIN SOLUTION
    b = tau * (xi.shape[-1] ** -0.5 if beta is None else beta)
    scores = xi @ X.mT  # (..., S, N)
    lse = torch.logsumexp(b * scores, dim=-1) / b  # (..., S)
    return 0.5 * xi.square().sum(-1) - alpha * lse
    # END SOLUTION


def energy_gradient(xi: Tensor, X: Tensor, tau: float = 1.0, alpha: float = 1.0,
                    beta: float | None = None) -> Tensor:
    """The gradient of `energy` with respect to each state, in closed form: no autograd.

    Shapes: xi (..., S, d), X (..., N, d) -> (..., S, d).
    """
    # BEGIN SOLUTION
    b = tau * (xi.shape[-1] ** -0.5 if beta is None else beta)
    association = torch.softmax(b * (xi @ X.mT), dim=-1)  # (..., S, N)
    return xi - alpha * (association @ X)
    # END SOLUTION


def descend(xi: Tensor, X: Tensor, gamma: float = 1.0, K: int = 1, tau: float = 1.0, alpha: float = 1.0,
            beta: float | None = None) -> Tensor:
    """The states after K steps of gradient descent with step size gamma.

    Below equation 6:  xi <- xi - gamma * grad E(xi).
    Shapes: xi (..., S, d), X (..., N, d) -> (..., S, d). xi itself stays as it is.
    """
    # BEGIN SOLUTION
    for _ in range(K):
        xi = xi - gamma * energy_gradient(xi, X, tau, alpha, beta)
    return xi
    # END SOLUTION


# ------------------------------------------------------------------------------------------------
# Exercise 2: energy attention
# ------------------------------------------------------------------------------------------------


def energy_attention(q: Tensor, k: Tensor, v: Tensor, tau: float = 1.0, alpha: float = 1.0,
                     gamma: float = 1.0, K: int = 1) -> Tensor:
    """Attention as K steps of descent.

    Algorithm 1:  K times  q <- q - gamma * (q - alpha * softmax(tau * beta * q k^T) v),  beta = 1/sqrt(D).
    Shapes: q (B, H, S, D), k and v (B, H, N, D) -> (B, H, S, D). q, k and v themselves stay as they are.
    """
    # BEGIN SOLUTION
    for _ in range(K):
        attended = F.scaled_dot_product_attention(q * tau, k, v)  # (B, H, S, D)
        q = q - gamma * (q - alpha * attended)  # the residual is never tempered
    return q
    # END SOLUTION


# ------------------------------------------------------------------------------------------------
# Exercise 3: temperature and entropy
# ------------------------------------------------------------------------------------------------


def attention_entropy(q: Tensor, k: Tensor, tau: float = 1.0) -> Tensor:
    """The entropy of every query's attention weights, in nats.

    Section 3.1:  p = softmax(tau * beta * q k^T),  beta = 1/sqrt(D);
    entropy = -sum_n p_n * log(p_n),  0 log 0 = 0.
    Shapes: q (B, H, S, D), k (B, H, N, D) -> (B, H, S).
    """
    # BEGIN SOLUTION
    p = torch.softmax(tau * q.shape[-1] ** -0.5 * (q @ k.mT), dim=-1)  # (B, H, S, N)
    return torch.special.entr(p).sum(-1)  # (B, H, S)
    # END SOLUTION


def temperature_for_entropy(q: Tensor, k: Tensor, target: float,
                            entropy: Callable = attention_entropy) -> float:
    """The temperature at which the mean entropy over all queries is `target` nats, to 1e-3.

    Shapes: q (B, H, S, D), k (B, H, N, D), target a number -> a number.
    """
    # BEGIN SOLUTION
    def mean(log_tau):
        return entropy(q, k, math.exp(log_tau)).mean().item()

    low, high = math.log(1e-4), math.log(1e4)
    if not mean(high) <= target <= mean(low):
        raise ValueError(f"target={target} must lie between {mean(high):.3g} and {mean(low):.3g} nats")
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) > target else (low, middle)
    return math.exp(middle)
    # END SOLUTION


# ------------------------------------------------------------------------------------------------
# Exercise 4: intercepting attention
# ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def rectified(tau: float, layers: Collection[int], rows: slice | None = None,
              queries: slice | None = None):
    """Within this context, chosen attention layers of any model run at temperature tau (I-ERG, appendix C).

        with rectified(0.01, layers=range(6, 8), rows=slice(4, 8), queries=slice(0, 16)):
            v = model(x, t, condition)

    Shapes: queries (B, H, S, D), keys and values (B, H, N, D); rows is a slice of B, and queries one of S:
    None is all. Change no tensor in place.
    """
    # BEGIN SOLUTION
    original, count, missing = F.scaled_dot_product_attention, 0, set(layers)

    def attention(query, key, *args, **kwargs):
        nonlocal count
        if query.shape[-2] == key.shape[-2]:
            if count in layers:
                factor = query.new_ones(len(query), 1, query.shape[-2], 1)  # (B, 1, S, 1)
                factor[rows or slice(None), :, queries or slice(None)] = tau
                query = query * factor
                missing.discard(count)
            count += 1
        return original(query, key, *args, **kwargs)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original
    if missing:
        raise RuntimeError(f"layers {sorted(missing)} were never met: this forward made {count} "
                           "self-attention calls")
    # END SOLUTION


# ------------------------------------------------------------------------------------------------
# Exercise 5: a weak encoding of the prompt, C-ERG
# ------------------------------------------------------------------------------------------------


def encode(encoder: Callable, tokens: Tensor, tau: float, layers: Collection[int],
           rectify: Callable = rectified) -> tuple[Tensor, Tensor]:
    """(strong, weak): the encoding of the prompt, and the one with tempered self-attention.

    Section 3.2 and appendix C:  phi_c = Enc(c),
    phi_c^tau = Enc(c) with softmax(tau * beta * q k^T) in `layers`.
    Shapes: tokens (B, L) whole numbers, encoder(tokens) -> (B, L, W); returns two of these.
    """
    # BEGIN SOLUTION
    strong = encoder(tokens)
    with rectify(tau, layers):
        weak = encoder(tokens)
    if torch.equal(strong, weak):
        raise ValueError(f"tau={tau} left the encoding as it was: nothing to contrast")
    return strong, weak
    # END SOLUTION


# ------------------------------------------------------------------------------------------------
# Exercise 6: the guidance update, with kappa
# ------------------------------------------------------------------------------------------------


def guided_velocity(model: Callable, x: Tensor, t: float, condition: Tensor, negative: Tensor | None,
                    w: float,
                    tau_i: float, layers: Collection[int], kappa: float, queries: slice | None = None,
                    rectify: Callable = rectified) -> Tensor:
    """The guided velocity at time t, from one forward.

    Equation 10:  v = w * v_pos + (1 - w) * v_neg,  v_pos = D(x, condition, t),  v_neg = D^xi(x, negative, t).
    Appendix C: D^xi is the rectified model "only if t > kappa", and the plain model before (and at) kappa.
    Shapes: x (B, ...), condition and negative (B, L, W), t a number -> (B, ...). The model takes x, times of
    shape (B,) and a condition, all with B rows, or all with 2B: model(x, times, condition) -> (B, ...) or
    (2B, ...).
    """
    # BEGIN SOLUTION
    B, late = len(x), t > kappa
    if w == 1 or (negative is None and not late):
        return model(x, torch.full((B,), t), condition)
    conditions = torch.cat([condition, condition if negative is None else negative])  # (2B, L, W)
    tempered = rectify(tau_i, layers, rows=slice(B, 2 * B), queries=queries)
    with tempered if late else contextlib.nullcontext():
        v = model(torch.cat([x, x]), torch.full((2 * B,), t), conditions)  # (2B, ...)
    v_pos, v_neg = v.chunk(2)
    return w * v_pos + (1 - w) * v_neg
    # END SOLUTION


# ------------------------------------------------------------------------------------------------
# Exercise 7: the sampler
# ------------------------------------------------------------------------------------------------


def sample(velocity: Callable, noise: Tensor, steps: int, trajectory: bool = False) -> Tensor:
    """From noise at t = 0 to data at t = 1 with Euler's method.

    Section 2.1, flow matching:  x_t = (1 - t) * noise + t * data,  dx/dt = v = data - noise;
    x <- x + v(x, t) / steps.
    Shapes: noise (B, ...), velocity(x (B, ...), t a number) -> (B, ...). Returns x at t = 1, (B, ...), or
    with trajectory=True all of x at t = 0, 1/steps, ..., 1: (steps + 1, B, ...). The noise itself stays as it
    is.
    """
    # BEGIN SOLUTION
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    x, path = noise, [noise]
    for i in range(steps):
        x = x + velocity(x, i / steps) / steps
        path.append(x)
    return torch.stack(path) if trajectory else x
    # END SOLUTION


# ------------------------------------------------------------------------------------------------
# Exercise 9: an open experiment
# ------------------------------------------------------------------------------------------------


def experiment(dataset: str = "digits", seeds: Collection[int] = range(5), samples: int = 160,
               steps: int = 25, figure: str = "experiment.png") -> dict:
    """One question about guidance, answered with your own functions on the shipped weights.

    Shapes: returns {setting: {metric: [one number a seed]}}.
    """
    # BEGIN SOLUTION
    # The question: does a higher tau_c help? From flat (0.01) to nearly off (0.9), with I-ERG as recommended.
    # Hypothesis: a higher tau_c makes the negative more like the positive, so there is less guidance:
    # accuracy falls.
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from experiments.statistics import difference
    from tiny_dit import tokenize
    from toy import data, metrics, sampling

    p, held_out, taus = sampling.GUIDANCE[dataset], data.load(dataset, split="test"), (0.01, 0.1, 0.3, 0.9)
    model, classifier, reference, _ = sampling.load_checkpoint(sampling.WEIGHTS / f"{dataset}.pt")
    results = {tau: {} for tau in taus}
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(held_out), generator=generator)[:samples]
        _, captions, attributes = held_out.batch(rows, generator)
        noise = torch.randn(samples, 3, held_out.size, held_out.size, generator=generator)
        for tau in taus:
            with torch.no_grad():
                condition, negative = encode(model.encoder, tokenize(captions, model.config), tau,
                                             range(model.config.text_depth))
                velocity = lambda x, t: guided_velocity(model, x, t, condition, negative, p["w"], p["tau_i"],
                                                        p["layers"], p["kappa"], slice(0, model.side**2))
                images = sample(velocity, noise, steps).clamp(-1, 1)
            for metric, value in metrics.evaluate(images, attributes, classifier, reference).items():
                results[tau].setdefault(metric, []).append(float(value))

    _, axes = plt.subplots(1, len(results[taus[0]]), figsize=(15, 3), layout="constrained")
    for axis, metric in zip(axes, results[taus[0]]):
        changes = [difference(results[tau][metric], results[taus[0]][metric], len(taus) - 1)
                   for tau in taus[1:]]
        axis.errorbar([f"{tau:g}" for tau in taus[1:]], *zip(*changes), fmt="o", capsize=4)
        axis.axhline(0, color="grey", linewidth=1)
        axis.set(title=metric, xlabel="tau_c", ylabel=f"difference to tau_c = {taus[0]:g}")
        for tau, (mean, half) in zip(taus[1:], changes):
            print(f"{metric:>10} at tau_c {tau:g} minus at {taus[0]:g}: {mean:+.3f} +- {half:.3f} "
                  f"({len(seeds)} seeds)")
    plt.savefig(figure)
    return results
    # END SOLUTION
