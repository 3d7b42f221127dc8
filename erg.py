"""Entropy Rectifying Guidance (ERG), arXiv 2504.13987, in one file to read and to copy.

Guidance contrasts a strong prediction with a weak one: v = w * v_pos + (1 - w) * v_neg. ERG gets the
weak one from the same model, by changing the energy that its attention descends: in a few layers of
the denoiser where t > kappa (I-ERG), and in the text encoder at all t (C-ERG).

    import erg
    settings = erg.ERG(w=3.0, tau=0.01, layers=range(6, 8), kappa=0.2, tau_c=0.1)
    condition, negative = settings.encode(text_encoder, tokens)    # C-ERG
    guidance = erg.Guidance(settings, negative)
    for i in range(50):
        x = x + guidance(model, x, i / 50, condition) / 50         # model(x, t, condition) -> v

or, inside somebody else's sampler: `with erg.rectify(model, tau=0.01, layers={6, 7}, rows=...): ...`

Conventions: t = 0 is noise, t = 1 is data; x_t = (1 - t) * noise + t * data; v = data - noise.
w = 1 is off. tau multiplies beta = 1/sqrt(d): tau < 1 flattens attention, tau > 1 sharpens it, and
tau = 0 is uniform attention, not "off". alpha = gamma = tau = K = 1 is ordinary attention (`steps` is
the paper's K). Layers are range(l_min, l_max), l_max exclusive, numbered among self-attention calls.

Shapes: B batch, H heads, S queries, N keys, D = d head dimension.
Needs PyTorch 2.5 or newer and nothing else. MIT licence. Version 0.1.0.
"""
import contextlib
import math
import re
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__version__ = "0.1.0"

# ------------------------------------------------------------------------------------------------
# 1. The energy (section 3.1)
# ------------------------------------------------------------------------------------------------


def _number(name, value, low=-math.inf, strict=False):
    """Raise one clear error unless `value` is a finite number above `low`."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or value < low or (strict and value == low):
        above = "" if low == -math.inf else f" {'greater than' if strict else 'at least'} {low:g}"
        raise ValueError(f"{name}={value!r} must be a finite number{above}")


def hopfield_energy(xi, X, *, beta=None, tau=1.0, alpha=1.0):
    """E(xi) = 1/2 |xi|^2 - alpha * lse(X xi, tau * beta), with lse(z, b) = log(sum exp(b z)) / b (eq. 9).

    States xi (..., S, d), patterns X (..., N, d) -> energies (..., S). beta defaults to 1/sqrt(d).
    tau must be positive: the energy grows without bound as tau -> 0, though its gradient does not.
    """
    _number("tau", tau, 0, strict=True)
    b = tau * (xi.shape[-1] ** -0.5 if beta is None else beta)
    return 0.5 * xi.square().sum(-1) - alpha * torch.logsumexp(b * (xi @ X.mT), dim=-1) / b


def hopfield_step(xi, X, *, beta=None, tau=1.0, alpha=1.0, gamma=1.0):
    """One descent step, xi - gamma * (xi - alpha * softmax(tau * beta * xi X^T) X) (eq. 6 of eq. 9).

    xi (..., S, d), X (..., N, d) -> (..., S, d). With gamma = 1 the energy never rises (CCCP).
    """
    _number("tau", tau, 0)
    b = tau * (xi.shape[-1] ** -0.5 if beta is None else beta)
    association = torch.softmax(b * (xi @ X.mT), dim=-1)  # (..., S, N)
    return xi - gamma * (xi - alpha * (association @ X))


# ------------------------------------------------------------------------------------------------
# 2. Energy attention (Algorithm 1)
# ------------------------------------------------------------------------------------------------


def _check_energy(tau, alpha, gamma, steps):
    if not isinstance(tau, Tensor):
        _number("tau", tau, 0)
    _number("alpha", alpha)
    _number("gamma", gamma, 0, strict=True)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps={steps!r} must be a whole number, at least 1 (the paper's K)")


def _check_slice(name, part, length):
    """An error if the slice `part` reaches beyond `length`, selects nothing, or runs backwards."""
    if not isinstance(part, slice):
        raise TypeError(f"{name}={part!r} must be a slice")
    beyond = any(end is not None and not -length <= end <= length for end in (part.start, part.stop))
    if beyond or not range(length)[part] or (part.step or 1) < 1:
        raise ValueError(f"{name}={part} does not fit a dimension of {length}")


def _temper(q, tau, queries):
    """What q (B, H, S, D) is multiplied with: tau at the chosen queries, 1 elsewhere."""
    if isinstance(tau, Tensor):
        if tau.dim() > 1 or (tau.dim() == 1 and len(tau) != len(q)):
            raise ValueError(f"tau has the shape {tuple(tau.shape)}; it must be a number or of shape ({len(q)},)")
        tau = tau.to(q).reshape(-1, *[1] * (q.dim() - 1))  # (B, 1, 1, 1)
    if queries is None:
        return tau
    _check_slice("queries", queries, q.shape[-2])
    chosen = torch.zeros(q.shape[-2], 1, dtype=torch.bool, device=q.device)  # (S, 1)
    chosen[queries] = True
    return torch.where(chosen, torch.as_tensor(tau, dtype=q.dtype, device=q.device), 1.0)


def energy_attention(q, k, v, *, tau=1.0, alpha=1.0, gamma=1.0, steps=1, queries=None,
                     attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    """`steps` times q <- q - gamma * (q - alpha * softmax(tau * beta * q k^T) v) (Algorithm 1).

    q (B, H, S, D), k, v (B, H, N, D) -> (B, H, S, D). tau is a number, or (B,) for one a sample.
    `queries`, a slice of S, restricts tau, and only tau, to these queries (Listing 2: the image tokens).
    beta is `scale`, 1/sqrt(D) by default; masks (boolean or additive) are not tempered; both as in
    F.scaled_dot_product_attention, which each step calls once: no S x N matrix is kept, and
    tau = alpha = gamma = steps = 1 is bit-identical to it. v must be as wide as q unless gamma = steps = 1.
    """
    _check_energy(tau, alpha, gamma, steps)
    if (gamma != 1 or steps > 1) and v.shape[-1] != q.shape[-1]:
        raise ValueError(f"v is {v.shape[-1]} wide and q {q.shape[-1]}: they must agree unless gamma = steps = 1")
    factor = None
    if isinstance(tau, Tensor) or queries is not None:
        factor = _temper(q, tau, queries)
    elif tau != 1:  # a plain number is free of charge: it goes into the kernel's scale
        scale = tau * (q.shape[-1] ** -0.5 if scale is None else scale)
    for _ in range(steps):
        attended = F.scaled_dot_product_attention(q if factor is None else q * factor, k, v, attn_mask=attn_mask,
                                                  is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
        attended = attended if alpha == 1 else alpha * attended
        q = attended if gamma == 1 else q - gamma * (q - attended)  # the residual is never tempered
    return q


# ------------------------------------------------------------------------------------------------
# 3. Rectifying the attention of any model
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionCall:
    """One call of scaled_dot_product_attention in a forward pass."""

    kind: str  # "self" (as many queries as keys) or "cross"
    number: int  # among the calls of its kind: what `layers` means
    module: str  # the innermost module that was running; "" is the model itself
    query: tuple  # shape, (B, H, S, D)
    key: tuple  # shape, (B, H, N, D)

    def __str__(self):
        return f"{self.kind:>5} {self.number:>3}  {self.module:<36} query {self.query}  key {self.key}"


def _layers(name, layers):
    if layers is None:
        return None
    if not isinstance(layers, Collection) or isinstance(layers, (str, bytes)) or not len(layers) \
            or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in layers):
        raise ValueError(f"{name}={layers!r} must be a collection of layer numbers, at least one and none negative, "
                         "for example range(6, 8)")
    return frozenset(layers)


@dataclass(frozen=True)
class _Rule:
    """What `rectify` was asked for, validated."""

    tau: object = None
    alpha: float = 1.0
    gamma: float = 1.0
    steps: int = 1
    layers: Collection | None = None
    rows: slice | None = None
    queries: slice | None = None
    attention: Callable | None = None
    kind: str = "self"

    def __post_init__(self):
        _check_energy(1.0 if self.tau is None else self.tau, self.alpha, self.gamma, self.steps)
        energy = self.tau is not None or (self.alpha, self.gamma, self.steps) != (1, 1, 1)
        if energy == (self.attention is not None):
            raise ValueError("give either tau, alpha, gamma or steps, or an attention function: "
                             + ("both are given" if energy else "nothing is given that would change attention"))
        if self.kind not in ("self", "cross"):
            raise ValueError(f"kind={self.kind!r} must be 'self' or 'cross'")
        object.__setattr__(self, "layers", _layers("layers", self.layers))
        for name in ("rows", "queries"):
            if not isinstance(getattr(self, name), (slice, type(None))):
                raise TypeError(f"{name}={getattr(self, name)!r} must be a slice")

    def chooses(self, kind, number):
        return kind == self.kind and (self.layers is None or number in self.layers)

    def attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        """The rectified answer to one call of scaled_dot_product_attention."""
        if dropout_p:
            raise ValueError(f"dropout_p={dropout_p} in a rectified attention call: put the model in evaluation mode")
        options = dict(attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
        if self.rows is None:
            return self.rectified(query, key, value, **options)
        if query.dim() != 4:
            raise ValueError(f"rows={self.rows} needs queries of shape (B, H, S, D), not {tuple(query.shape)}")
        rows = self.rows
        _check_slice("rows", rows, len(query))
        if self.attention is None and (self.alpha, self.gamma, self.steps) == (1, 1, 1):  # one call for all rows
            tau = torch.ones(len(query), device=query.device, dtype=query.dtype)
            tau[rows] = self.tau.to(tau) if isinstance(self.tau, Tensor) else self.tau
            return energy_attention(query, key, value, tau=tau, queries=self.queries, **options)
        plain = F.scaled_dot_product_attention(query, key, value, **options)
        if attn_mask is not None and attn_mask.dim() == 4 and len(attn_mask) > 1:
            options["attn_mask"] = attn_mask[rows]
        part = self.rectified(query[rows], key[rows], value[rows], **options)
        return plain.index_copy(0, torch.arange(len(query), device=query.device)[rows], part)

    def rectified(self, q, k, v, **options):
        if self.attention is None:
            return energy_attention(q, k, v, tau=1.0 if self.tau is None else self.tau, alpha=self.alpha,
                                    gamma=self.gamma, steps=self.steps, queries=self.queries, **options)
        out = self.attention(q, k, v, **options)
        if self.queries is None:
            return out
        _check_slice("queries", self.queries, q.shape[-2])
        chosen = torch.arange(q.shape[-2], device=q.device)[self.queries]
        return F.scaled_dot_product_attention(q, k, v, **options).index_copy(-2, chosen, out[..., self.queries, :])


class _Intercept(torch.overrides.TorchFunctionMode):
    """While entered, hands every call of scaled_dot_product_attention to a _Pass; all else goes its way."""

    def __init__(self, forward_pass, module=None):
        super().__init__()
        self.forward_pass, self.module = forward_pass, module

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return self.forward_pass.answer(self.module, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


_thread = threading.local()  # .call: the model's call that is being answered, so that nested contexts count it once


class _Pass:
    """One forward pass: numbers its attention calls and rectifies the chosen ones. No rule: only lists them."""

    def __init__(self, rule=None, expected=None):
        self.rule, self.expected = rule, expected  # expected: attending module -> iterator of (kind, number), or None
        self.calls, self.owners, self.counts = [], [], {"self": 0, "cross": 0}
        self.last, self.chosen, self.done = None, False, set()
        self.paused = False  # the model was entered again before this pass ended

    def answer(self, module, *args, **kwargs):
        """Answer a call that `module` made (None: not known)."""
        _refuse_recomputation()
        if self.paused:
            return F.scaled_dot_product_attention(*args, **kwargs)
        outer = getattr(_thread, "call", None)
        if outer is None or outer is not self.last:  # else it is a further step of an inner context, counted before
            self.chosen = self.count(module, *args, **kwargs)
        self.last = _thread.call = outer or object()
        try:
            if self.chosen:
                return self.rule.attend(*args, **kwargs)
            return F.scaled_dot_product_attention(*args, **kwargs)
        finally:
            _thread.call = outer

    def count(self, module, query, key, *args, **kwargs):
        """Number this call; whether it is of a chosen layer."""
        kind = "self" if query.shape[-2] == key.shape[-2] else "cross"
        if self.expected is not None:
            expected, number = next(self.expected[module], (None, None))
            if expected != kind:
                raise RuntimeError(_CHANGED)
        else:
            number = self.counts[kind]
            self.counts[kind] += 1
            if not torch.compiler.is_compiling():
                self.calls.append((kind, number, tuple(query.shape), tuple(key.shape)))
                self.owners.append(_running_module())
        chosen = self.rule is not None and self.rule.chooses(kind, number)
        if chosen:
            self.done.add(number)
        return chosen

    def check(self):
        """After the forward: an error unless every chosen layer was rectified."""
        if self.expected is not None:
            if any(next(calls, None) for calls in self.expected.values()):
                raise RuntimeError(_CHANGED)
            return
        layers = self.rule.layers
        missed = sorted(layers - self.done) if layers is not None else [] if self.done else ["0"]
        if missed:
            raise RuntimeError(
                f"layers={layers and sorted(layers)}: no attention call {missed[0]} was rectified, because this forward "
                f"made {self.counts[self.rule.kind]} {self.rule.kind}-attention calls through F.scaled_dot_product_"
                "attention (numbered from 0; erg.attention_calls lists them). Attention that runs elsewhere cannot be "
                "reached: load transformers models with attn_implementation='sdpa', choose PyTorch's native back end, "
                "and replace nn.MultiheadAttention and nn.TransformerEncoder by modules that call it")


_CHANGED = ("the attention calls of this forward differ from those by which the model's layers were numbered; the "
            "numbers are forgotten: run it again")


def _running_module():
    """The innermost nn.Module whose code is running."""
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            return module
        frame = frame.f_back


def _refuse_recomputation():
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError("a rectified forward is computed again during backward(), which cannot be numbered: "
                           "turn activation checkpointing off")


_plans = weakref.WeakKeyDictionary()  # model -> [(module name, kind, number), ...], learned in a full pass


class _Attachment:
    """A rule at work on a module: one _Pass for each of its forwards, in the thread that opened the context.

    To intercept every torch call of a forward costs 1.6 microseconds a call. So that is done only in a
    model's first forward, which shows the modules that attend; later ones intercept in these alone.
    """

    def __init__(self, model, rule, when):
        self.model, self.rule, self.when, self.thread = model, rule, when, threading.get_ident()
        self.passes, self.forwards, self.handles = [], 0, []  # passes under way: the last is the innermost
        self.attending = None  # module with a chosen call -> all its (kind, number) in order, once the plan is known
        self.around(model, self.forward)
        self.follow_plan()

    def around(self, module, context):
        """Run the module's forwards inside `context(module, args, kwargs)`."""
        stacks = []

        def enter(module, args, kwargs):
            if threading.get_ident() == self.thread:
                stacks.append((contextlib.ExitStack(), sys.exc_info()[1]))
                stacks[-1][0].enter_context(context(module, args, kwargs))

        def leave(module, *ignored):
            if threading.get_ident() == self.thread and stacks:
                stack, before = stacks.pop()
                stack.__exit__(*(sys.exc_info() if sys.exc_info()[1] is not before else (None, None, None)))

        self.handles += [module.register_forward_pre_hook(enter, with_kwargs=True),  # last to enter, first to leave
                         module.register_forward_hook(leave, always_call=True, prepend=True)]

    @contextlib.contextmanager
    def forward(self, module, args, kwargs):
        self.forwards += 1
        active = self.when is None or self.when(*args, **kwargs)
        expected = self.attending and {module: iter(calls) for module, calls in self.attending.items()}
        this, before = _Pass(self.rule, expected if active else None), self.passes[-1:]
        self.passes.append(this)
        for other in before:
            other.paused = True
        try:
            with _Intercept(this) if active and not expected else contextlib.nullcontext():
                yield
            if active:
                this.check()
        except BaseException:
            _plans.pop(self.model, None)  # it may be what went wrong, and is soon learned anew
            raise
        finally:
            self.passes.pop()
            for other in before:
                other.paused = False
        if active:
            self.learn_plan(this)

    @contextlib.contextmanager
    def attention(self, module, args, kwargs):
        if not self.passes:
            _refuse_recomputation()
        this = self.passes[-1] if self.passes else None
        with _Intercept(this, module) if this and this.expected else contextlib.nullcontext():
            yield

    def learn_plan(self, this):
        names = {module: name for name, module in self.model.named_modules()}
        if this.expected is None and not self.passes and this.calls and names.keys() >= set(this.owners):
            _plans[self.model] = [(names[owner], *call[:2]) for owner, call in zip(this.owners, this.calls)]
            self.follow_plan()

    def follow_plan(self):
        plan = _plans.get(self.model, ())
        chosen = [name for name, *call in plan if self.rule.chooses(*call)]
        if chosen and (self.rule.layers is None or len(chosen) == len(self.rule.layers)):  # else a full pass will tell
            modules = dict(self.model.named_modules())
            self.attending = {modules[name]: [call for other, *call in plan if other == name] for name in chosen}
            for module in self.attending:
                self.around(module, self.attention)


@contextlib.contextmanager
def rectify(model=None, *, tau=None, alpha=1.0, gamma=1.0, steps=1, layers=None, rows=None, queries=None,
            attention=None, when=None, kind="self"):
    """Context in which a model's attention is replaced by `energy_attention` in some layers (I-ERG, C-ERG).

    It reaches every model that calls F.scaled_dot_product_attention, after QK-norm and rotary embedding.
    Given a module, it acts inside that module's forwards only, and numbers the layers anew at each one;
    without one, the whole context is one forward.

    tau, alpha, gamma, steps: as in `energy_attention`; tau may be a tensor, one entry a (chosen) row.
    layers: a collection of layer numbers among the calls of `kind`, "self" (as many queries as keys) or
        "cross"; None is all of them. `attention_calls` lists a model's calls.
    rows, queries: slices of the batch and of the queries; the others keep ordinary attention. As in
        Listing 2, `queries` restricts tau alone; alpha, gamma and steps act on all tokens of the rows.
    attention: a function (q, k, v, **options of SDPA) -> out in place of `energy_attention`, for other
        weak models such as PAG or SEG; `queries` then says which of its outputs are used.
    when: a function of the arguments of the model's forward; where it returns False, that forward is
        ordinary. This is kappa inside somebody else's sampling loop.

    The model is left as it was, also after an exception; contexts nest (the inner one is applied first).
    Raises RuntimeError when a forward ends without having met every chosen layer, or when the context
    ends without a forward: nothing is ever silently left out.
    """
    rule = _Rule(tau, alpha, gamma, steps, layers, rows, queries, attention, kind)
    if model is None:
        if when is not None:
            raise ValueError("when=... is asked at the start of a module's forward: give the module, too")
        this = _Pass(rule)
        with _Intercept(this):
            yield
        this.check()
        return
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} must be a torch.nn.Module, or None to rectify all that runs in the context")
    attachment = _Attachment(model, rule, when)
    try:
        yield
    finally:
        for handle in attachment.handles:
            handle.remove()
    if not attachment.forwards:
        raise RuntimeError(f"{type(model).__name__} was rectified, but its forward never ran in the context: "
                           "is it the module that the sampler calls?")


def attention_calls(function, *args, **kwargs):
    """Run function(*args, **kwargs) once, and list its attention calls in order, as AttentionCall."""
    this = _Pass()
    with _Intercept(this), torch.no_grad():
        function(*args, **kwargs)
    names = {m: name for name, m in function.named_modules()} if isinstance(function, nn.Module) else {}
    return [AttentionCall(kind, number, names.get(owner, type(owner).__name__), query, key)
            for owner, (kind, number, query, key) in zip(this.owners, this.calls)]


# ------------------------------------------------------------------------------------------------
# 4. C-ERG: a weak encoding of the prompt (section 3.2, Listing 1)
# ------------------------------------------------------------------------------------------------


def encode(encoder, *args, tau, layers=None, projections=None, **kwargs):
    """(encoding, weak encoding): encoder(*args, **kwargs), and again with tempered self-attention.

    The weak one is all that the encoder returns, pooled vectors included. The encoder is reached through
    scaled_dot_product_attention in its `layers` (None: all). For one that computes attention otherwise,
    give instead its query `projections`, a list of modules whose output is multiplied by tau (Listing 1).
    An additive mask (T5's position bias) stays untempered either way.
    Raises ValueError if QK-norm follows a projection and would undo it, and RuntimeError if the weak
    encoding comes out equal to the other one.
    """
    strong = encoder(*args, **kwargs)
    if projections is None:
        with rectify(encoder if isinstance(encoder, nn.Module) else None, tau=tau, layers=layers):
            weak = encoder(*args, **kwargs)
    else:
        if layers is not None:
            raise ValueError(f"layers={layers!r} has no effect with projections: list the projections of these layers")
        _number("tau", tau, 0)
        _refuse_qk_norm(encoder, projections)
        handles = [p.register_forward_hook(lambda module, inputs, output: output * tau) for p in projections]
        try:
            weak = encoder(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
    if tau != 1 and all(torch.allclose(a, b, rtol=1e-5, atol=1e-6)
                        for a, b in zip(pytree.tree_leaves(strong), pytree.tree_leaves(weak)) if isinstance(a, Tensor)):
        raise RuntimeError(f"tau={tau} left the encoding as it was: something after the chosen queries undoes the scale "
                           "(normalization, linear attention), or their attention does not reach the output")
    return strong, weak


def _refuse_qk_norm(encoder, projections):
    modules = list(encoder.modules()) if isinstance(encoder, nn.Module) else []
    for projection in projections:
        for parent in modules:
            children = dict(parent.named_children())
            norms = [name for name in children if re.search(r"(^|_)(q|qk|query)_?(layer)?_?norm|norm_?(q|query)", name)]
            if norms and any(child is projection for child in children.values()):
                raise ValueError(f"projections: {type(parent).__name__} normalizes its queries ({norms[0]}) after the "
                                 "projection, which undoes tau; leave projections out, and load the encoder with "
                                 "scaled_dot_product_attention (attn_implementation='sdpa')")


# ------------------------------------------------------------------------------------------------
# 5. Guidance (section 3.3), APG and CADS (appendix D)
# ------------------------------------------------------------------------------------------------


def guide(v_pos, v_neg, w):
    """w * v_pos + (1 - w) * v_neg (eq. 10).

    Velocity, noise, data and score are affine in each other with x_t fixed, and the weights sum to 1, so
    it is the same guidance for models that predict any of them.
    """
    return w * v_pos + (1 - w) * v_neg


@dataclass(frozen=True)
class APG:
    """Adaptive projected guidance (Sadat et al., arXiv 2410.02416), with the paper's settings as defaults."""

    momentum: float = -0.5  # of the difference, over steps
    eta: float = 0.0  # share of the parallel part that is kept
    norm_threshold: float = 5.0  # largest norm of the difference, per sample; 0 is no limit

    def __post_init__(self):
        _number("momentum", self.momentum)
        _number("eta", self.eta)
        _number("norm_threshold", self.norm_threshold, 0)

    def update(self, x1_pos, x1_neg, w, running=0.0):
        """Guide predictions of the data (B, ...): momentum, clip, project on x1_pos. Returns (x1, new running).

        Unlike eq. 10 this depends on the space: norms and projections belong to predictions of the data.
        """
        running = x1_pos - x1_neg + self.momentum * running
        dims = tuple(range(1, x1_pos.dim()))  # all but the batch
        difference = running
        if self.norm_threshold > 0:
            norm = torch.linalg.vector_norm(running, dim=dims, keepdim=True)
            difference = running * (self.norm_threshold / norm.clamp_min(1e-12)).clamp(max=1)
        parallel, orthogonal = project(difference, x1_pos)
        return x1_pos + (w - 1) * (orthogonal + self.eta * parallel), running


def project(v, onto):
    """v (B, ...) as its part parallel to `onto` and the orthogonal rest, per sample over all other dimensions."""
    dims = tuple(range(1, v.dim()))
    unit = onto.double() / torch.linalg.vector_norm(onto.double(), dim=dims, keepdim=True).clamp_min(1e-12)
    parallel = (v.double() * unit).sum(dims, keepdim=True) * unit
    return parallel.to(v), (v.double() - parallel).to(v)


@dataclass(frozen=True)
class CADS:
    """Condition-annealed sampling (Sadat et al., arXiv 2310.17347): noise on the positive condition, early on."""

    tau1: float = 0.6  # in CADS' own time, 1 - t: no noise below tau1,
    tau2: float = 0.9  # nothing but noise above tau2
    scale: float = 0.25  # s
    psi: float = 1.0  # 1 rescales to the condition's own mean and deviation, 0 does not

    def __post_init__(self):
        if not 0 <= self.tau1 < self.tau2 <= 1:
            raise ValueError(f"tau1={self.tau1!r}, tau2={self.tau2!r} must satisfy 0 <= tau1 < tau2 <= 1")
        _number("scale", self.scale, 0, strict=True)
        if not 0 <= self.psi <= 1:
            raise ValueError(f"psi={self.psi!r} must lie between 0 and 1")

    def anneal(self, condition, t, generator=None):
        """sqrt(g) * condition + scale * sqrt(1 - g) * noise, rescaled, at time t (0 is noise); g falls from 1 to 0.

        Mean and deviation are each sample's own, so that a sample does not depend on its batch.
        """
        g = min(1.0, max(0.0, (self.tau2 - (1 - t)) / (self.tau2 - self.tau1)))
        if g == 1:
            return condition

        def one(y):
            noise = torch.randn(y.shape, generator=generator, device=generator.device if generator else y.device)
            noisy = math.sqrt(g) * y + self.scale * math.sqrt(1 - g) * noise.to(y)
            dims = tuple(range(1, y.dim()))
            std, mean = torch.std_mean(noisy, dims, keepdim=True)
            target_std, target_mean = torch.std_mean(y, dims, keepdim=True)
            rescaled = (noisy - mean) / std.clamp_min(1e-12) * target_std + target_mean
            return self.psi * rescaled + (1 - self.psi) * noisy

        return pytree.tree_map_only(Tensor, one, condition)


# ------------------------------------------------------------------------------------------------
# 6. Settings, and one step of guided sampling
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ERG:
    """All settings of the method. Only what differs from ordinary guidance need be given; ERG(w=3) is CFG."""

    w: float | Callable  # guidance weight, a number or a function of t; 1 is off
    tau: float = 1.0  # I-ERG: temperature in the denoiser
    layers: Collection | None = None  # I-ERG: range(l_min, l_max); None is all self-attention
    kappa: float | None = None  # I-ERG acts where t > kappa; 0.2 if not given
    tau_c: float = 1.0  # C-ERG: temperature in the text encoder
    layers_c: Collection | Mapping | None = None  # C-ERG: layers, or {name of a text encoder: its layers}
    alpha: float = 1.0  # I-ERG: weight of the matching term
    gamma: float = 1.0  # I-ERG: step size
    steps: int = 1  # I-ERG: K
    queries: slice | None = None  # I-ERG: the image tokens in joint attention; None is all tokens
    negative: str | None = None  # without C-ERG, the negative's condition: "null" (default) or "same"
    batched: bool = True  # positive and negative in one pass of 2B rows; False: two passes, less memory
    apg: APG | None = None
    cads: CADS | None = None

    def __post_init__(self):
        if not callable(self.w):
            _number("w", self.w)
        _check_energy(self.tau, self.alpha, self.gamma, self.steps)
        _number("tau_c", self.tau_c, 0)
        if self.kappa is not None and not 0 <= self.kappa <= 1:
            raise ValueError(f"kappa={self.kappa!r} must lie between 0 and 1")
        if self.negative not in (None, "null", "same"):
            raise ValueError(f"negative={self.negative!r} must be 'null' or 'same'")
        _layers("layers", self.layers)
        for name, layers in self.layers_c.items() if isinstance(self.layers_c, Mapping) else [("layers_c", self.layers_c)]:
            _layers(name, layers)
        for name in ("layers", "kappa", "queries"):
            if getattr(self, name) is not None and not self.rectifies:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect: tau = alpha = gamma = steps = 1 "
                                 "leaves the denoiser as it is")
        if self.layers_c is not None and self.tau_c == 1:
            raise ValueError(f"layers_c={self.layers_c!r} has no effect with tau_c=1")
        if self.negative is not None and self.tau_c != 1:
            raise ValueError(f"negative={self.negative!r} has no effect with tau_c={self.tau_c}: the weak encoding "
                             "is the negative's condition")
        if self.negative == "same" and not self.rectifies and self.cads is None:
            raise ValueError("negative='same' without I-ERG makes the negative equal to the positive: no guidance")

    @property
    def rectifies(self):
        """Whether the denoiser's attention is changed at all (I-ERG)."""
        return (self.tau, self.alpha, self.gamma, self.steps) != (1, 1, 1, 1)

    def encode(self, encoder, *args, null=None, name=None, **kwargs):
        """(condition, the negative's condition) for encoder(*args, **kwargs), once before sampling.

        The negative's is the weak encoding with C-ERG, encoder(null, **kwargs) without it, and None, which
        stands for the condition itself, with negative="same". `name` picks from a layers_c by encoder.
        """
        if self.tau_c != 1:
            layers = self.layers_c[name] if isinstance(self.layers_c, Mapping) else self.layers_c
            return encode(encoder, *args, tau=self.tau_c, layers=layers, **kwargs)
        if self.negative != "same" and null is None:
            raise ValueError("null=None: without C-ERG the negative's condition is that of the null prompt; "
                             "give it, or choose negative='same'")
        return encoder(*args, **kwargs), None if self.negative == "same" else encoder(null, **kwargs)


class Guidance:
    """One sampling run under `settings`: guidance(model, x, t, condition) -> v (eq. 10), for t in [0, 1).

    model(x, t, condition) -> velocity, x (B, ...), t (B,); condition a tensor (B, ...), nested tuples, lists
    or dicts of them, or None for an unconditional model. `negative` is the negative's condition, nested
    likewise; None stands for the same condition. eq. 10 and kappa hold as well for a model that predicts
    noise or data (`guide`); APG is computed as for a velocity. Make a new one for each run: it carries APG's
    momentum. There is no second evaluation where w = 1, or where
    the negative equals the positive.
    """

    def __init__(self, settings, negative=None, generator=None):
        if not isinstance(settings, ERG):
            raise TypeError(f"settings={settings!r} must be an erg.ERG")
        if negative is None and not settings.rectifies and settings.cads is None:
            raise ValueError("negative=None: without I-ERG the negative needs a condition of its own, such as that of "
                             "the null prompt")
        self.settings, self.negative, self.generator, self.running = settings, negative, generator, 0.0

    def __call__(self, model, x, t, condition=None):
        s, t = self.settings, float(t)
        w = s.w(t) if callable(s.w) else s.w
        positive = condition if s.cads is None else s.cads.anneal(condition, t, self.generator)
        negative = condition if self.negative is None else self.negative
        rectified = self.rectifies_at(t)
        if w == 1 or (negative is positive and not rectified):
            return model(x, _times(t, x), positive)
        v_pos, v_neg = self.predictions(model, x, t, positive, negative, rectified)
        if s.apg is None:
            return guide(v_pos, v_neg, w)
        if t >= 1:
            raise ValueError(f"t={t} must be less than 1 with APG, which divides by 1 - t")
        x1, self.running = s.apg.update(x + (1 - t) * v_pos, x + (1 - t) * v_neg, w, self.running)
        return (x1 - x) / (1 - t)

    def rectifies_at(self, t):
        """Whether I-ERG acts at t: strictly after kappa."""
        return self.settings.rectifies and t > (0.2 if self.settings.kappa is None else self.settings.kappa)

    def predictions(self, model, x, t, positive, negative, rectified):
        """v_pos and v_neg, in one pass of 2B rows or in two."""
        s, B = self.settings, len(x)

        def rectify_rows(rows):
            if not rectified:
                return contextlib.nullcontext()
            return rectify(model if isinstance(model, nn.Module) else None, tau=s.tau, alpha=s.alpha, gamma=s.gamma,
                           steps=s.steps, layers=s.layers, rows=rows, queries=s.queries)

        if s.batched:
            both = torch.cat([x, x])
            with rectify_rows(slice(B, 2 * B)):
                v = model(both, _times(t, both), pytree.tree_map(_stack, positive, negative))
            return v.chunk(2)
        v_pos = model(x, _times(t, x), positive)
        with rectify_rows(None):
            return v_pos, model(x, _times(t, x), negative)


def _stack(positive, negative):
    return None if positive is None else torch.cat([positive, negative])


def _times(t, x):
    return torch.full((len(x),), t, dtype=torch.float32, device=x.device)


# Table 7. It gives no w: 5.0 for SD3 is from appendix E, the others from Table 6 and figures 12 and 16.
PRESETS = {
    "mmdit-text-to-image": ERG(w=5.0, tau=0.01, layers=range(10, 17), kappa=0.4, tau_c=0.01, gamma=1.5,
                               layers_c={"llama3": range(0, 32), "t5": range(0, 24)}),
    "mmdit-unconditional": ERG(w=3.0, tau=0.01, layers=range(10, 17), kappa=0.2, negative="same"),
    "dit-xl-2": ERG(w=5.0, tau=0.01, layers=range(12, 15), kappa=0.3, negative="null"),
    "sd3-medium": ERG(w=5.0, tau=0.01, layers=range(6, 8), kappa=0.2, tau_c=0.1,
                      layers_c={"openclip-vit-g": range(1, 31), "clip-vit-l": range(1, 10), "t5-xxl": range(1, 22)}),
}
