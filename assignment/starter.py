"""Entropy Rectifying Guidance (ERG), arXiv 2504.13987: seven exercises and an open experiment.

Copy starter.py to a file of your own and write the bodies; keep the names and the arguments. Helpers, imports
and further files beside yours are welcome. Where one exercise builds on another, it is handed what it needs
as an argument: a gap in one costs nothing in the next. How you stand:

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
# Exercise 1: the energy and its gradient (12 points)
# ------------------------------------------------------------------------------------------------


def energy(xi: Tensor, X: Tensor, tau: float = 1.0, alpha: float = 1.0, beta: float | None = None) -> Tensor:
    """The Hopfield energy of every state, with temperature tau > 0 and weight alpha.

    Equation 9:  E(xi) = 1/2 |xi|^2 - alpha * lse(X xi, tau * beta),  lse(z, b) = log(sum_n exp(b * z_n)) / b.
    (The paper's LogSumExp, below equation 4, leaves out the b inside the exponential; with it, equation 6 is
    the gradient.)

    Recipe: scores of every state with every pattern; their lse at b = tau * beta; half the squared length of
    the state minus alpha times the lse. beta is 1/sqrt(d) if it is None.
    Shapes: states xi (..., S, d), patterns X (..., N, d) -> (..., S).
    Hint: scores of a thousand must not overflow: torch.logsumexp.
    """
    raise NotImplementedError("exercise 1: energy")


def energy_gradient(xi: Tensor, X: Tensor, tau: float = 1.0, alpha: float = 1.0,
                    beta: float | None = None) -> Tensor:
    """The gradient of `energy` with respect to each state, in closed form: no autograd.

    Equation 6, of the energy of equation 9:  grad E = xi - alpha * softmax(tau * beta * xi X^T) X.

    Recipe: differentiate equation 9 on paper, and write down what comes out. The temperature in front of the
    logarithm cancels the one that comes down from the exponent.
    Shapes: xi (..., S, d), X (..., N, d) -> (..., S, d).
    Hint: the softmax runs over the patterns.
    """
    raise NotImplementedError("exercise 1: energy_gradient")


def descend(xi: Tensor, X: Tensor, gamma: float = 1.0, K: int = 1, tau: float = 1.0, alpha: float = 1.0,
            beta: float | None = None) -> Tensor:
    """The states after K steps of gradient descent with step size gamma.

    Below equation 6:  xi <- xi - gamma * grad E(xi).

    Recipe: a loop. With gamma = 1 and alpha >= 0 the energy never rises (the concave-convex procedure).
    Shapes: xi (..., S, d), X (..., N, d) -> (..., S, d). xi itself stays as it is.
    Hint: three lines.
    """
    raise NotImplementedError("exercise 1: descend")


# ------------------------------------------------------------------------------------------------
# Exercise 2: energy attention (14 points)
# ------------------------------------------------------------------------------------------------


def energy_attention(q: Tensor, k: Tensor, v: Tensor, tau: float = 1.0, alpha: float = 1.0,
                     gamma: float = 1.0, K: int = 1) -> Tensor:
    """Attention as K steps of descent.

    Algorithm 1:  K times  q <- q - gamma * (q - alpha * softmax(tau * beta * q k^T) v),  beta = 1/sqrt(D).

    Recipe: exercise 1, with the values in the place of the patterns that the softmax weighs. The temperature
    stands inside the softmax, in every step, and nowhere else (the paper's Listing 2 scales q itself, once:
    not the same). All four numbers at 1 are F.scaled_dot_product_attention; tau = 0 is the mean of the
    values.
    Shapes: q (B, H, S, D), k and v (B, H, N, D) -> (B, H, S, D). q, k and v themselves stay as they are.
    Hint: softmax(beta * (tau * q) k^T) is one call of F.scaled_dot_product_attention; which q do the other
    terms need?
    """
    raise NotImplementedError("exercise 2: energy_attention")


# ------------------------------------------------------------------------------------------------
# Exercise 3: temperature and entropy (10 points)
# ------------------------------------------------------------------------------------------------


def attention_entropy(q: Tensor, k: Tensor, tau: float = 1.0) -> Tensor:
    """The entropy of every query's attention weights, in nats.

    Section 3.1:  p = softmax(tau * beta * q k^T),  beta = 1/sqrt(D);
    entropy = -sum_n p_n * log(p_n),  0 log 0 = 0.

    Recipe: the weights, then their entropy. It is log(N) at tau = 0 and falls as tau rises.
    Shapes: q (B, H, S, D), k (B, H, N, D) -> (B, H, S).
    Hint: at a large tau most weights are exactly 0, and 0 * log(0) is nan in floating point:
    torch.special.entr.
    """
    raise NotImplementedError("exercise 3: attention_entropy")


def temperature_for_entropy(q: Tensor, k: Tensor, target: float,
                            entropy: Callable = attention_entropy) -> float:
    """The temperature at which the mean entropy over all queries is `target` nats, to 1e-3.

    Recipe: the mean of entropy(q, k, tau) falls as tau rises, so bisect: start from tau between 1e-4 and 1e4,
    halve the interval of log(tau) until it is small. Raise ValueError if the target lies outside of what
    these two ends reach. Call `entropy`, not attention_entropy: the grader hands in its own.
    Shapes: q (B, H, S, D), k (B, H, N, D), target a number -> a number.
    Hint: which half to keep: if the entropy at the middle is still too high, tau must rise.
    """
    raise NotImplementedError("exercise 3: temperature_for_entropy")


# ------------------------------------------------------------------------------------------------
# Exercise 4: intercepting attention (16 points)
# ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def rectified(tau: float, layers: Collection[int], rows: slice | None = None):
    """Within this context, chosen attention layers of any model run at temperature tau (I-ERG, appendix C).

        with rectified(0.01, layers=range(6, 8), rows=slice(4, 8)):
            v = model(x, t, condition)

    Recipe: while the context is open, calls of F.scaled_dot_product_attention come to you. Number those with
    as many queries as keys (self-attention) from 0, anew in each context: one context is one forward. If the
    number is in `layers`, temper the queries of the batch rows in `rows` (None: of all), and hand the call on
    to the function that was there before you, with everything else that it was given: masks, is_causal,
    scale. All other calls, among them cross-attention, are handed on as they are, and not numbered. At the
    end put everything back, also after an exception, which passes through. If the forward ended well but a
    chosen layer was never met, raise RuntimeError: otherwise a wrong layer number would silently do nothing.
    Contexts nest: the inner one hands on to the outer one.
    Shapes: queries (B, H, S, D), keys and values (B, H, N, D); rows is a slice of B. Change no tensor in
    place.
    Hint: replace torch.nn.functional.scaled_dot_product_attention (models call it as
    F.scaled_dot_product_attention, so they find yours) and put it back in a `finally`. A
    torch.overrides.TorchFunctionMode does as well.
    """
    raise NotImplementedError("exercise 4: rectified")


# ------------------------------------------------------------------------------------------------
# Exercise 5: a weak encoding of the prompt, C-ERG (8 points)
# ------------------------------------------------------------------------------------------------


def encode(encoder: Callable, tokens: Tensor, tau: float, layers: Collection[int],
           rectify: Callable = rectified) -> tuple[Tensor, Tensor]:
    """(strong, weak): the encoding of the prompt, and the one with tempered self-attention.

    Section 3.2 and appendix C:  phi_c = Enc(c),
    phi_c^tau = Enc(c) with softmax(tau * beta * q k^T) in `layers`.

    Recipe: run the encoder once as it is and once within rectify(tau, layers). Raise ValueError if both
    encodings are equal, for guidance would have nothing to contrast. Use `rectify`, not `rectified`: the
    grader hands in its own.
    Shapes: tokens (B, L) whole numbers, encoder(tokens) -> (B, L, W); returns two of these.
    Hint: one context is one forward, so only one run of the encoder belongs in it.
    """
    raise NotImplementedError("exercise 5: encode")


# ------------------------------------------------------------------------------------------------
# Exercise 6: the guidance update, with kappa (12 points)
# ------------------------------------------------------------------------------------------------


def guided_velocity(model: Callable, x: Tensor, t: float, condition: Tensor, negative: Tensor | None,
                    w: float,
                    tau_i: float, layers: Collection[int], kappa: float,
                    rectify: Callable = rectified) -> Tensor:
    """The guided velocity at time t, from one forward.

    Equation 10:  v = w * v_pos + (1 - w) * v_neg,  v_pos = D(x, condition, t),  v_neg = D^xi(x, negative, t).
    Appendix C: D^xi is the rectified model "only if t > kappa", and the plain model before (and at) kappa.

    Recipe: one forward of 2B rows, the positive ones first, within rectify(tau_i, layers, rows=...) so that
    only the negative rows are tempered; or outside of it, unless t > kappa. Then equation 10. `negative` is
    the weak encoding of exercise 5; None stands for `condition` itself, and then up to kappa the negative
    equals the positive: one plain forward of B rows is all you need. So it is for w = 1, at any t. Use
    `rectify`, not `rectified`: the grader hands in its own.
    Shapes: x (B, ...), condition and negative (B, L, W), t a number -> (B, ...). The model takes x, times of
    shape (B,) and a condition, all with B rows, or all with 2B: model(x, times, condition) -> (B, ...) or
    (2B, ...).
    Hint: torch.cat along the batch, torch.full for the times, .chunk(2) for the answer.
    """
    raise NotImplementedError("exercise 6: guided_velocity")


# ------------------------------------------------------------------------------------------------
# Exercise 7: the sampler (8 points)
# ------------------------------------------------------------------------------------------------


def sample(velocity: Callable, noise: Tensor, steps: int, trajectory: bool = False) -> Tensor:
    """From noise at t = 0 to data at t = 1 with Euler's method.

    Section 2.1, flow matching:  x_t = (1 - t) * noise + t * data,  dx/dt = v = data - noise;
    x <- x + v(x, t) / steps.

    Recipe: `steps` equal steps; velocity(x, t) is called at t = 0, 1/steps, 2/steps, ..., never at t = 1.
    Raise ValueError if steps is less than 1.
    Shapes: noise (B, ...), velocity(x (B, ...), t a number) -> (B, ...). Returns x at t = 1, (B, ...), or
    with trajectory=True all of x at t = 0, 1/steps, ..., 1: (steps + 1, B, ...). The noise itself stays as it
    is.
    Hint: torch.stack; and x += ... would change tensors that you have already put into the list.
    """
    raise NotImplementedError("exercise 7: sample")


# ------------------------------------------------------------------------------------------------
# Exercise 8: an open experiment (20 points, by rubric; no test)
# ------------------------------------------------------------------------------------------------


def experiment(dataset: str = "digits", seeds: Collection[int] = range(5), samples: int = 160,
               steps: int = 25, figure: str = "experiment.png") -> dict:
    """One question about guidance, answered with your own functions on the shipped weights.

    Recipe: choose a question and write your hypothesis down first. Then vary one setting and hold all else
    fixed, also the captions and the noise of each seed, so that differences can be paired by seed. For every
    setting and seed: condition, negative = encode(model.encoder, tokens, ...); sample with guided_velocity;
    toy.metrics.evaluate. Report the mean difference to a baseline with its 95 % interval, draw one figure,
    and say what follows. "No effect that this many seeds could show" is a result.
    Shapes: returns {setting: {metric: [one number a seed]}}.
    Hint: import toy within this function, and call it from the repository's folder; the grader needs neither.
    """
    raise NotImplementedError("exercise 8: experiment")
