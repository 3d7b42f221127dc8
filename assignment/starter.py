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


# ------------------------------------------------------------------------------------------------
# Exercise 1: the energy and its gradient
# ------------------------------------------------------------------------------------------------


def energy(xi: Tensor, X: Tensor, tau: float = 1.0, alpha: float = 1.0, beta: float | None = None) -> Tensor:
    """The Hopfield energy of every state, with temperature tau > 0 and weight alpha.

    Equation 9:  E(xi) = 1/2 |xi|^2 - alpha * lse(X xi, tau * beta),  lse(z, b) = log(sum_n exp(b * z_n)) / b.
    beta is 1/sqrt(d) if it is None.
    Shapes: states xi (..., S, d), patterns X (..., N, d) -> (..., S).
    """
    raise NotImplementedError("exercise 1: energy")


def energy_gradient(xi: Tensor, X: Tensor, tau: float = 1.0, alpha: float = 1.0,
                    beta: float | None = None) -> Tensor:
    """The gradient of `energy` with respect to each state, in closed form: no autograd.

    Shapes: xi (..., S, d), X (..., N, d) -> (..., S, d).
    """
    raise NotImplementedError("exercise 1: energy_gradient")


def descend(xi: Tensor, X: Tensor, gamma: float = 1.0, K: int = 1, tau: float = 1.0, alpha: float = 1.0,
            beta: float | None = None) -> Tensor:
    """The states after K steps of gradient descent with step size gamma.

    Below equation 6:  xi <- xi - gamma * grad E(xi).
    Shapes: xi (..., S, d), X (..., N, d) -> (..., S, d). xi itself stays as it is.
    """
    raise NotImplementedError("exercise 1: descend")


# ------------------------------------------------------------------------------------------------
# Exercise 2: energy attention
# ------------------------------------------------------------------------------------------------


def energy_attention(q: Tensor, k: Tensor, v: Tensor, tau: float = 1.0, alpha: float = 1.0,
                     gamma: float = 1.0, K: int = 1) -> Tensor:
    """Attention as K steps of descent.

    Algorithm 1:  K times  q <- q - gamma * (q - alpha * softmax(tau * beta * q k^T) v),  beta = 1/sqrt(D).
    Shapes: q (B, H, S, D), k and v (B, H, N, D) -> (B, H, S, D). q, k and v themselves stay as they are.
    """
    raise NotImplementedError("exercise 2: energy_attention")


# ------------------------------------------------------------------------------------------------
# Exercise 3: temperature and entropy
# ------------------------------------------------------------------------------------------------


def attention_entropy(q: Tensor, k: Tensor, tau: float = 1.0) -> Tensor:
    """The entropy of every query's attention weights, in nats.

    Section 3.1:  p = softmax(tau * beta * q k^T),  beta = 1/sqrt(D);
    entropy = -sum_n p_n * log(p_n),  0 log 0 = 0.
    Shapes: q (B, H, S, D), k (B, H, N, D) -> (B, H, S).
    """
    raise NotImplementedError("exercise 3: attention_entropy")


def temperature_for_entropy(q: Tensor, k: Tensor, target: float,
                            entropy: Callable = attention_entropy) -> float:
    """The temperature at which the mean entropy over all queries is `target` nats, to 1e-3.

    Shapes: q (B, H, S, D), k (B, H, N, D), target a number -> a number.
    """
    raise NotImplementedError("exercise 3: temperature_for_entropy")


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
    raise NotImplementedError("exercise 4: rectified")


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
    raise NotImplementedError("exercise 5: encode")


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
    raise NotImplementedError("exercise 6: guided_velocity")


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
    raise NotImplementedError("exercise 7: sample")


# ------------------------------------------------------------------------------------------------
# Exercise 9: an open experiment
# ------------------------------------------------------------------------------------------------


def experiment(dataset: str = "digits", seeds: Collection[int] = range(5), samples: int = 160,
               steps: int = 25, figure: str = "experiment.png") -> dict:
    """One question about guidance, answered with your own functions on the shipped weights.

    Shapes: returns {setting: {metric: [one number a seed]}}.
    """
    raise NotImplementedError("exercise 9: experiment")
