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
Needs PyTorch 2.6 or newer and nothing else. MIT licence.
"""
import contextlib
import dataclasses
import functools
import itertools
import math
import numbers
import operator
import re
import sys
import threading
import types
import warnings
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
    ok = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or value < low or (strict and value == low):
        above = "" if low == -math.inf else f" {'greater than' if strict else 'at least'} {low:g}"
        raise ValueError(f"{name}={value!r} must be a finite Python number{above}")


def hopfield_energy(xi, X, *, beta=None, tau=1.0, alpha=1.0):
    """E(xi) = 1/2 |xi|^2 - alpha * lse(X xi, tau * beta), with lse(z, b) = log(sum exp(b z)) / b (eq. 9).

    States xi (..., S, d), patterns X (..., N, d) -> energies (..., S). beta defaults to 1/sqrt(d).
    tau must be positive: the energy is unbounded as tau -> 0, though its gradient is not.
    """
    _number("tau", tau, 0, strict=True)
    b = tau * (xi.shape[-1] ** -0.5 if beta is None else beta)
    return 0.5 * xi.square().sum(-1) - alpha * torch.logsumexp(b * (xi @ X.mT), dim=-1) / b


def hopfield_step(xi, X, *, beta=None, tau=1.0, alpha=1.0, gamma=1.0):
    """One descent step, xi - gamma * (xi - alpha * softmax(tau * beta * xi X^T) X) (eq. 6 of eq. 9).

    xi (..., S, d), X (..., N, d) -> (..., S, d). With gamma = 1 and alpha >= 0 the energy never rises (CCCP).
    """
    _number("tau", tau, 0)
    b = tau * (xi.shape[-1] ** -0.5 if beta is None else beta)
    association = torch.softmax(b * (xi @ X.mT), dim=-1)  # (..., S, N)
    return xi - gamma * (xi - alpha * (association @ X))


# ------------------------------------------------------------------------------------------------
# 2. Energy attention (Algorithm 1)
# ------------------------------------------------------------------------------------------------


def _check_energy(tau, alpha, gamma, steps):
    if torch.compiler.is_compiling():
        return  # checked before; Dynamo cannot trace all of this
    if not isinstance(tau, Tensor):
        _number("tau", tau, 0)
    _number("alpha", alpha)
    _number("gamma", gamma, 0, strict=True)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps={steps!r} must be a whole number, at least 1 (the paper's K)")


def _check_slice(name, part, length):
    """An error if the slice `part` reaches beyond `length`, selects nothing, or runs backwards."""
    _check_is_slice(name, part)
    beyond = any(end is not None and not -length <= end <= length for end in (part.start, part.stop))
    if beyond or not range(length)[part] or (part.step or 1) < 1:
        raise ValueError(f"{name}={part} does not fit the {length} {name} of an attention call "
                         "(erg.attention_calls lists them)")


def _check_is_slice(name, part):
    ends = (part.start, part.stop, part.step) if isinstance(part, slice) else ("",)
    if not all(end is None or isinstance(end, int) for end in ends):
        raise TypeError(f"{name}={part!r} must be a slice of whole numbers")


def _check_tau(tau, rows, q):
    """An error if the tensor tau does not fit `rows` rows of q."""
    if tau.shape not in ((), (rows,)) or not tau.is_floating_point() or tau.device != q.device:
        raise ValueError(f"tau is a tensor of shape {tuple(tau.shape)}, {tau.dtype}, on {tau.device}; it must be a number, "
                         f"or floating-point of shape ({rows},) on {q.device}, where the queries are")


def _fill(view, value):
    """Set a view to a number or a tensor without a copy from the host, which a CUDA graph would refuse."""
    return view.copy_(value) if isinstance(value, Tensor) else view.fill_(value)


def _temper(q, tau, queries):
    """What q (B, H, S, D) is multiplied with: tau at the chosen queries, 1 elsewhere."""
    if isinstance(tau, Tensor):
        _check_tau(tau, len(q), q)
        tau = tau.to(q).reshape(-1, *[1] * (q.dim() - 1))  # (B, 1, 1, 1)
    if queries is None:
        return tau
    _check_slice("queries", queries, q.shape[-2])
    factor = q.new_ones(len(tau) if isinstance(tau, Tensor) else 1, *[1] * (q.dim() - 3), q.shape[-2], 1)
    _fill(factor[..., queries, :], tau)
    return factor  # (B or 1, 1, S, 1)


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
    if isinstance(tau, Tensor) or queries is not None or tau == 0:  # scale = 0 would meet a causal mask's -inf as nan
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
#
# The method is in sections 1, 2 and 4 to 6. This one finds the attention calls in models that know
# nothing of it: a _Rule says which calls and what to do, a _Pass counts them in one forward, an
# _Attachment ties both to a module, compiled or not. `rectify` and `attention_calls` are at its end.
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionCall:
    """One call of scaled_dot_product_attention in a forward pass."""

    kind: str  # "self" (as many queries as keys) or "cross"
    number: int  # among the calls of its kind: what `layers` means
    module: str  # the innermost module that was running; "" is the model itself
    query: tuple  # shape, (B, H, S, D)
    key: tuple  # shape, (B, H, N, D)


class AttentionCalls(list):
    """A model's attention calls in order, as AttentionCall; str() is a table of them."""

    unreached = 0  # calls of F.multi_head_attention_forward (nn.MultiheadAttention), which rectify cannot reach

    def __str__(self):
        rows = [("kind", "number", "module", "heads", "queries", "keys")]
        for c in self:
            heads = c.query[-3] if len(c.query) > 3 else 1
            rows.append((c.kind, str(c.number), c.module or "(the model)", str(heads), str(c.query[-2]), str(c.key[-2])))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(cell.ljust(width) if i in (0, 2) else cell.rjust(width)
                           for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows]
        if any(c.kind == "self" for c in self):
            lines.append(f"middle third of self-attention: {self.middle_third()}")
        if self.unreached or not self:
            lines.append(f"out of reach: {self.unreached} calls of nn.MultiheadAttention" if self.unreached else
                         "out of reach: nothing here calls F.scaled_dot_product_attention")
        return "\n".join(lines)

    def middle_third(self, kind="self"):
        """The middle third of the layers, as a range: where to begin without a better rule (section 4.3).

        Where more than half of the calls have equally many queries, only these count: not a text encoder's
        own layers in front of the joint ones.
        """
        numbers = [c.number for c in self if c.kind == kind]
        if not numbers:
            raise ValueError(f"kind={kind!r}: none of the {len(self)} attention calls is of this kind")
        lengths = [c.query[-2] for c in self if c.kind == kind]
        usual = max(lengths, key=lengths.count)
        if 2 * lengths.count(usual) > len(lengths):
            numbers = [n for n, length in zip(numbers, lengths) if length == usual]
        n = len(numbers)
        first = round(n / 3) if n > 2 else 0
        return range(numbers[first], numbers[n - first - 1] + 1)


def _layers(name, layers):
    """Layer numbers as a frozenset; None stands for all."""
    if layers is None:
        return None
    try:
        given = layers if isinstance(layers, Collection) else ()  # an iterator would be used up
        chosen = frozenset(-1 if isinstance(n, bool) else operator.index(n) for n in given)
    except TypeError:
        chosen = frozenset()
    if not chosen or min(chosen) < 0:
        raise ValueError(f"{name}={layers!r} must hold layer numbers, none negative, for example range(6, 8)")
    return chosen


def _runs(layers):
    """Layer numbers as (low, high) pairs of contiguous runs: comparisons, which Dynamo need not specialize on."""
    if layers is None:
        return ((0, math.inf),)
    starts, ends = sorted(n for n in layers if n - 1 not in layers), sorted(n + 1 for n in layers if n + 1 not in layers)
    return tuple(zip(starts, ends))


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
    batch: int | None = None

    def __post_init__(self):
        _check_energy(1.0 if self.tau is None else self.tau, self.alpha, self.gamma, self.steps)
        if isinstance(self.tau, Tensor) and self.tau.device.type == "cpu" and not (self.tau.isfinite() & (self.tau >= 0)).all():
            raise ValueError(f"tau={self.tau} must be finite and at least 0")
        energy = self.tau is not None or (self.alpha, self.gamma, self.steps) != (1, 1, 1)
        if energy == (self.attention is not None):
            raise ValueError("give either tau, alpha, gamma or steps, or an attention function: "
                             + ("both are given" if energy else "nothing is given that would change attention"))
        if self.kind not in ("self", "cross", "all"):
            raise ValueError(f"kind={self.kind!r} must be 'self', 'cross' or 'all'")
        object.__setattr__(self, "layers", _layers("layers", self.layers))
        object.__setattr__(self, "runs", _runs(self.layers))
        for name in ("rows", "queries"):
            if getattr(self, name) is not None:
                _check_is_slice(name, getattr(self, name))
        if self.queries is not None and self.tau is None and self.attention is None:
            raise ValueError(f"queries={self.queries} has no effect without tau")

    def chooses(self, kind, number):
        return kind == self.kind and any(low <= number < high for low, high in self.runs)

    def attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        """The rectified answer to one call of scaled_dot_product_attention."""
        if dropout_p:
            raise ValueError(f"dropout_p={dropout_p} in a rectified attention call: put the model in evaluation mode")
        options = dict(attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
        if self.rows is None:
            return self.rectified(query, key, value, **options)
        if query.dim() != 4:
            raise ValueError(f"rows={self.rows} needs queries of shape (B, H, S, D), not {tuple(query.shape)}")
        _check_slice("rows", self.rows, len(query))
        rows = self.rows
        if self.attention is None and (self.alpha, self.gamma, self.steps) == (1, 1, 1):  # one call for all rows
            tau = query.new_ones(len(query))
            if isinstance(self.tau, Tensor):
                _check_tau(self.tau, len(tau[rows]), query)
            _fill(tau[rows], self.tau)
            return energy_attention(query, key, value, tau=tau, queries=self.queries, **options)
        if any(mode.forward_pass.rule and mode.forward_pass.rule.rows is not None for mode in _outer_contexts()):
            raise ValueError(f"rows={self.rows} with alpha, gamma, steps or attention is computed on these rows alone, so "
                             "an outer context cannot tell its own rows: make it the outer one")
        plain = F.scaled_dot_product_attention(query, key, value, **options)
        if attn_mask is not None and attn_mask.dim() == 4 and len(attn_mask) > 1:
            options["attn_mask"] = attn_mask[rows]
        key, value = (x if len(x) == 1 else x[rows] for x in (key, value))
        part = self.rectified(query[rows], key, value, **options)
        return plain.index_copy(0, torch.arange(len(query), device=query.device)[rows], part.to(plain.dtype))

    def rectified(self, q, k, v, **options):
        if self.attention is None:
            return energy_attention(q, k, v, tau=1.0 if self.tau is None else self.tau, alpha=self.alpha,
                                    gamma=self.gamma, steps=self.steps, queries=self.queries, **options)
        out = self.attention(q, k, v, **options)
        wanted = ((*q.shape[:-1], v.shape[-1]), q.dtype, q.device)
        if (tuple(out.shape), out.dtype, out.device) != wanted and not torch.is_autocast_enabled(q.device.type):
            raise ValueError(f"attention={self.attention!r} returned {tuple(out.shape)}, {out.dtype}, on {out.device}; it must "
                             f"be {wanted[0]}, {q.dtype}, on {q.device}, as the queries")
        if self.queries is None:
            if _outer_contexts():  # they number this call only if they see one
                F.scaled_dot_product_attention(q, k, v, **options)
            return out
        _check_slice("queries", self.queries, q.shape[-2])
        chosen = torch.arange(q.shape[-2], device=q.device)[self.queries]
        return F.scaled_dot_product_attention(q, k, v, **options).index_copy(-2, chosen, out[..., self.queries, :])


class _Intercept(torch.overrides.TorchFunctionMode):
    """While entered, hands every call of scaled_dot_product_attention to a _Pass; all else goes its way."""

    def __init__(self, forward_pass):
        super().__init__()
        self.forward_pass = forward_pass

    def __torch_function__(self, function, _, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return self.forward_pass.answer(*args, **(kwargs or {}))
        if function is F.multi_head_attention_forward:
            self.forward_pass.unreached += 1
        if torch.compiler.is_compiling() and function.__name__ in _PYTHON_METHODS and isinstance(args[0], Tensor):
            return getattr(args[0], function.__name__)(*args[1:], **(kwargs or {}))  # Dynamo would fail at its super()
        return function(*args, **(kwargs or {}))


_PYTHON_METHODS = frozenset(name for name, method in vars(Tensor).items() if isinstance(method, types.FunctionType))


def _outer_contexts():
    """The rectifying contexts around the one that is answering a call (its own mode is off meanwhile)."""
    return [mode for mode in torch.overrides._get_current_function_mode_stack() if isinstance(mode, _Intercept)]


_thread = threading.local()  # .call: the model's call that is being answered, so that nested contexts count it once


class _Call:
    """Stands for one attention call of the model."""


class _Pass:
    """One forward pass: numbers its attention calls and rectifies the chosen ones. No rule: only lists them."""

    def __init__(self, rule=None):
        self.rule, self.full, self.intercepting, self.within_part = rule, True, False, 0
        self.paused = False  # the model was entered again before this pass ended
        self.batches = {rule.batch} if rule and rule.batch is not None else set()  # rows that calls may have; empty: any
        self.rows = []  # rows that rectified calls had
        self.calls, self.owners, self.counts = [], [], {"self": 0, "cross": 0, "all": 0}
        self.last, self.chosen = None, False
        self.unreached = 0  # calls of F.multi_head_attention_forward, within which no mode sees anything

    def answer(self, *args, **kwargs):
        """Answer one call of scaled_dot_product_attention."""
        _refuse_recomputation()
        if self.paused:
            return F.scaled_dot_product_attention(*args, **kwargs)
        if _runs_a_compiled_graph():
            with torch._C.DisableTorchFunction():  # nor is it a call for outer contexts
                return F.scaled_dot_product_attention(*args, **kwargs)
        outer = getattr(_thread, "call", None)
        if outer is None or outer is not self.last:  # else it is a further step of an inner context, counted before
            self.chosen = self.count(*args, **kwargs)
        self.last = _thread.call = outer or _Call()
        try:
            if self.chosen:
                if self.batches:
                    self.note_rows(*args, **kwargs)
                return self.rule.attend(*args, **kwargs)
            return F.scaled_dot_product_attention(*args, **kwargs)
        finally:
            _thread.call = outer

    def count(self, query, key, *args, **kwargs):
        """Number this call; whether it is of a chosen layer."""
        kind = "self" if query.shape[-2] == key.shape[-2] else "cross"
        number, position = self.counts[kind], self.counts["all"]
        self.counts[kind], self.counts["all"] = number + 1, position + 1
        if self.full and not torch.compiler.is_compiling():
            self.calls.append((kind, number, tuple(query.shape), tuple(key.shape)))
            self.owners.append((*_running_module(), self.within_part > 0))
        return self.rule is not None and (self.rule.chooses(kind, number) or self.rule.chooses("all", position))

    def note_rows(self, query, *args, **kwargs):
        self.rows.append(len(query))
        if not torch.compiler.is_compiling():
            self.check_rows(self.batches)

    def check_rows(self, batches):
        """An error if the rows of a rectified call are not samples: `batches` are the numbers of rows that may be."""
        for rows in set(self.rows) - batches if batches else ():
            raise ValueError(f"an attention call has {rows} rows where {sorted(batches)} were expected: the model folds "
                             "space or time into the batch, or goes through it in a loop, so that rows would be others; or "
                             "guidance is off, or the number of images another. Use two passes, one plain and one rectified "
                             "without rows (batched=False), or give batch if these rows are right")

    def done(self):
        """Whether no chosen layer is still to come."""
        return self.counts[self.rule.kind] >= self.rule.runs[-1][1]

    def check(self):
        """After the forward: an error unless every chosen layer was rectified."""
        count, layers = self.counts[self.rule.kind], self.rule.layers
        if count == 0 or not (layers is None or self.done()):
            kind, cure = self.rule.kind, ""
            if count == 0:
                cure = (". Attention that runs elsewhere cannot be reached: load transformers models with attn_implementation="
                        "'sdpa' (or give erg.encode their query projections), choose PyTorch's native back end, and replace "
                        "nn.MultiheadAttention and nn.TransformerEncoder by modules that call it")
            missed = min(n for n in layers or {0} if n >= count)
            raise RuntimeError(f"layers={layers and sorted(layers)[-9:]}: no attention call {missed} was rectified, because this "
                               f"forward made {count} attention calls of kind {kind!r} through F.scaled_dot_product_attention "
                               f"(numbered from 0; erg.attention_calls lists them, also those of another kind){cure}")


def _running_module():
    """The innermost nn.Module that was called and has not returned, and whether torch.compile is further out."""
    frame, owner = sys._getframe(2), None
    while frame is not None and "get_dynamic_layer_stack_depth" not in frame.f_code.co_names:  # torch.compile's wrapper
        if owner is None and frame.f_code is nn.Module._call_impl.__code__:
            owner = frame.f_locals["self"]
        frame = frame.f_back
    return owner, frame is not None


def _runs_a_compiled_graph():
    """Whether the caller is a graph that Dynamo made, run by torch.compile's debugging back end "eager".

    The interception was traced into it; every other back end makes no torch calls that could be seen again.
    """
    frame = None if torch.compiler.is_compiling() else sys._getframe(3)
    if frame is None or not frame.f_code.co_filename.startswith("<eval_with_key>"):
        return False
    while frame is not None and not any(name.startswith("__compiled_fn") for name in frame.f_code.co_names):
        frame = frame.f_back
    return frame is not None


def _refuse_recomputation():
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError("a rectified forward is computed again during backward(), which cannot be numbered: "
                           "turn activation checkpointing off")


_attending = weakref.WeakKeyDictionary()  # model -> {kind of arguments: classes of its modules that attend}
_calls_within = weakref.WeakKeyDictionary()  # compiled part of a model -> {kind: attention calls that it makes}
_open = weakref.WeakKeyDictionary()  # model -> the threads that have contexts on it
_around = weakref.WeakKeyDictionary()  # module -> what open contexts do around its call, the outermost context first


def _given(x):
    """What a forward is given, but for the numbers: a model may attend elsewhere with an image, or with a switch."""
    if isinstance(x, Tensor):
        return x.shape
    if isinstance(x, (list, tuple)):
        return type(x), *map(_given, x)
    if isinstance(x, Mapping):
        return type(x), *((name, _given(y)) for name, y in x.items())
    return x if isinstance(x, (bool, str)) else type(x)


def _lengths(x):
    """The first dimensions of all tensors in x, and the lengths of its lists."""
    if isinstance(x, Tensor):
        return {len(x)} if x.dim() else set()
    inner = x.values() if isinstance(x, Mapping) else x if isinstance(x, (list, tuple)) else ()
    return ({len(x)} if isinstance(x, list) else set()).union(*map(_lengths, inner))


def _uncompiled(module):
    """What a call of a compiled module would be without its compiler; None for a module that is not compiled."""
    call = module._compiled_call_impl
    if getattr(call, "compiled", call) is not None:
        return module._call_impl
    return module._orig_mod if "_orig_mod" in module._modules else getattr(module.forward, "_torchdynamo_orig_callable", None)


def _surround(module, opened, around):
    """Call `around(run, *args, **kwargs)` for each call of a module, run(*args, **kwargs); returns what removes it."""
    if not _around.get(module):
        pairs, compiled = _around.setdefault(module, []), module._compiled_call_impl

        def call(*args, **kwargs):
            run = compiled or module._call_impl
            for _, around in tuple(pairs):  # the first is the innermost
                run = functools.partial(around, run)
            return run(*args, **kwargs)

        call.compiled = compiled
        vars(module)["_compiled_call_impl"] = call  # setattr of a compiled module would reach the one behind it
    pairs, entry = _around[module], (opened, around)
    pairs.insert(0, entry)
    pairs.sort(key=lambda entry: -entry[0])  # the context opened last is the innermost

    def remove():
        pairs.remove(entry)
        kept = hasattr(module._compiled_call_impl, "compiled")  # else it was compiled meanwhile
        if not pairs and kept:
            vars(module)["_compiled_call_impl"] = module._compiled_call_impl.compiled
        return kept

    return remove


class _Attachment:
    """A rule at work on a module: one _Pass for each of its forwards, in the thread that opened the context.

    To intercept every torch call of a forward costs 1.6 microseconds a call. So that is done only in a
    model's first forward, which shows the classes of the modules that attend; later ones with arguments
    alike intercept only while a module of these classes runs, and only until all chosen layers are done.
    Compiled parts of the model (blocks) run uncompiled in that first forward, which shows how many calls each
    makes. Later each has a numbering of its own, so that equal blocks share at most two graphs.
    """

    opened = itertools.count()

    def __init__(self, model, rule, when):
        self.model, self.rule, self.when, self.thread = model, rule, when, threading.get_ident()
        self.number, self.passes, self.removals, self.followed = next(self.opened), [], [], set()
        self.forwards, self.rectified = 0, 0  # the latter are those for which `when` was true
        parts, inside = [], set()  # compiled parts; all that they hold
        for module in model.modules() if _uncompiled(model) is None else ():
            if module is not model and module not in inside and _uncompiled(module) is not None:
                parts.append(module)
                inside.update(module.modules())
        self.outside = dict.fromkeys(module for module in model.modules() if module not in inside)  # an ordered set
        self.classes = frozenset(map(type, self.outside))
        if any(self.thread in _open.get(module, ()) for module in model.modules() if module is not model):
            raise ValueError(f"a part of {type(model).__name__} has an open context: open that of the whole first")
        _open.setdefault(model, []).append(self.thread)
        self.surround(model, self.forward)
        for part in parts:
            self.surround(part, functools.partial(self.part, part))
        self.follow()

    def surround(self, module, around):
        def mine(run, /, *args, **kwargs):
            if torch.compiler.is_compiling():
                raise RuntimeError("a rectified module is compiled together with what surrounds it: give rectify the module "
                                   "that torch.compile returned, or call .compile() on it before")
            return (around if threading.get_ident() == self.thread else _plain)(run, *args, **kwargs)

        self.removals.append(_surround(module, self.number, mine))

    def forward(self, run, /, *args, **kwargs):
        self.forwards += 1
        if self.when is not None and not self.when(*args, **kwargs):
            this = None
        else:
            this = _Pass(self.rule)
            self.rectified += 1
            if self.rule.rows is not None and not this.batches:
                this.batches = _lengths((args, kwargs))
            given = self.classes, _given((args, kwargs))
            this.full = given not in _attending.get(self.model, {}) or self.follow()
        for outer in filter(None, self.passes[-1:]):
            outer.paused = True
        self.passes.append(this)
        try:
            output = self.intercept(this, this and this.full, run, *args, **kwargs)
        finally:
            self.passes.pop()
            for outer in filter(None, self.passes[-1:]):
                outer.paused = False
        if this is not None:
            if this.full and not self.passes:
                self.learn(this, given)
            this.check()
            this.check_rows(this.batches)
            if this.rows and self.rule.batch is None:
                this.check_rows(_lengths(output))
        return output

    def attention(self, run, /, *args, **kwargs):
        if not self.passes:
            _refuse_recomputation()
        this = self.passes[-1] if self.passes else None
        really = this is not None and not this.full and not this.intercepting and not this.done()
        return self.intercept(this, really, run, *args, **kwargs)

    def part(self, part, run, /, *args, **kwargs):
        """A compiled part has a pass of its own, which starts at 0, over the layers that are chosen in it."""
        this = self.passes[-1] if self.passes else None
        if this is None:
            return run(*args, **kwargs)
        before, local, within = dict(this.counts), None, _calls_within.get(part)
        if this.full:
            this.within_part += 1
            with _eager, torch.compiler.set_stance("force_eager"):
                output = run(*args, **kwargs)
            this.within_part -= 1
        elif this.intercepting or within is None:
            output = self.intercept(this, not this.intercepting, run, *args, **kwargs)
        else:
            base = this.counts[self.rule.kind]
            chosen = [n for n in range(within[self.rule.kind]) if self.rule.chooses(self.rule.kind, base + n)]
            local = _Pass(dataclasses.replace(self.rule, layers=chosen) if chosen else self.rule)
            local.batches = this.batches
            output = self.intercept(local, bool(chosen), run, *args, **kwargs)
            this.counts = {kind: before[kind] + n for kind, n in within.items()}
            this.rows += local.rows
        if local is None:
            made = {kind: this.counts[kind] - n for kind, n in before.items()}
        else:
            made = local.counts if chosen else within  # what an unchosen part did nobody saw
        if _calls_within.setdefault(part, made) != made:
            raise RuntimeError(f"a compiled {type(part).__name__} made {made} attention calls, and "
                               f"{_calls_within[part]} before: compile the whole model instead")
        return output

    def intercept(self, this, really, run, /, *args, **kwargs):
        if not really:
            return run(*args, **kwargs)
        this.intercepting = True
        try:
            with _Intercept(this):
                return run(*args, **kwargs)
        finally:
            this.intercepting = False

    def learn(self, this, given):
        seen_all = len(this.owners) == this.counts["all"] > 0
        if seen_all and all(inside or (owner in self.outside and not compiled) for owner, compiled, inside in this.owners):
            _attending.setdefault(self.model, {})[given] = {type(owner) for owner, *_ in this.owners}
            self.follow()

    def follow(self):
        """Surround the modules that attend; whether some were not yet, which in a forward under way may be too late."""
        classes = set().union(*_attending.get(self.model, {}).values())
        new = [module for module in self.outside if type(module) in classes and module not in self.followed]
        for module in new:
            self.followed.add(module)
            self.surround(module, self.attention)
        return bool(new)

    def close(self):
        _open[self.model].remove(self.thread)
        if not all([remove() for remove in self.removals]):
            raise RuntimeError("a rectified module was compiled in the context: compile it before")


def _plain(run, /, *args, **kwargs):
    return run(*args, **kwargs)


_eager = threading.RLock()  # torch.compiler's stance holds for all threads


def _refuse_training(model):
    if isinstance(model, nn.Module) and model.training:
        raise ValueError(f"{type(model).__name__} is in training mode, where dropout would add to what rectifying "
                         "changes: call its eval() first")


@contextlib.contextmanager
def rectify(model=None, *, tau=None, alpha=1.0, gamma=1.0, steps=1, layers=None, rows=None, queries=None,
            attention=None, when=None, kind="self", batch=None):
    """Context in which a model's attention is replaced by `energy_attention` in some layers (I-ERG, C-ERG).

    It reaches every model that calls F.scaled_dot_product_attention, after QK-norm and rotary embedding.
    Given a module, it acts inside that module's forwards only, and numbers the layers anew at each one;
    without one, the whole context is one forward.

    tau, alpha, gamma, steps: as in `energy_attention`; tau may be a tensor, one entry a (chosen) row.
    layers: a collection of layer numbers among the calls of `kind`: "self" (as many queries as keys), "cross",
        or "all" in their order; None is all of them. `attention_calls` lists a model's calls. "all" is for
        models that give their queries other tokens' keys, too, or whose text is as long as the image.
    rows, queries: slices of the batch and of the queries; the others keep ordinary attention. As in
        Listing 2, `queries` restricts tau alone; alpha, gamma and steps act on all tokens of the rows.
    attention: a function (q, k, v, **options of SDPA) -> out in place of `energy_attention`, for other
        weak models such as PAG or SEG; `queries` then says which of its outputs are used.
    when: a function of the arguments of the model's forward; where it returns False, that forward is
        ordinary. This is kappa inside somebody else's sampling loop. A warning if it never returned True.
    batch: the rows that every rectified call must have; an error if the model folds space or time into them.
        By default, with `rows` and a model: the first dimension of some of its arguments, and of its output.

    The model is left as it was, also after an exception. Contexts nest, that of a model around
    those of its parts; of two on one module the inner one is applied first. All this holds in the thread that
    opened the context, and for inference: gradients flow, but activation checkpointing would repeat a forward
    without its context.
    The model may be compiled, with torch.compile(model) or model.compile(), before the context is opened; or
    its blocks, each of which must then attend as often in every forward with arguments alike.
    Raises ValueError for a model in training mode, and RuntimeError when a forward ends without having met
    every chosen layer, or when the context ends without a forward: nothing is ever silently left out.
    """
    rule = _Rule(tau, alpha, gamma, steps, layers, rows, queries, attention, kind, batch)
    _refuse_training(model)
    if model is None:
        if when is not None:
            raise ValueError("when=... is asked at the start of a module's forward: give the module, too")
        this = _Pass(rule)
        with _Intercept(this):
            yield
        this.check()
        this.check_rows(this.batches)
        return
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} must be a torch.nn.Module, or None to rectify all that runs in the context")
    attachment = _Attachment(model, rule, when)
    try:
        yield
    finally:
        attachment.close()
    if not attachment.forwards:
        raise RuntimeError(f"{type(model).__name__} was rectified, but its forward never ran in the context: "
                           "is it the module that the sampler calls?")
    if not attachment.rectified:
        warnings.warn(f"when=... was true in none of {attachment.forwards} forwards: nothing was rectified", stacklevel=3)


def second_forward(after):
    """A `when` for samplers that run the model twice a step, the negative second: true where after(timestep) is.

    For pipelines of diffusers without a batch of both (Flux, Qwen-Image, Wan); timestep is the largest that the
    model is given, a number in its own units: after(timestep) is false for the first steps. Make a new one for
    each context.
    """
    last = None

    def when(*args, timestep, **kwargs):
        nonlocal last
        now = timestep.max().item()
        last = None if now == last else now
        return last is None and after(now)

    return when


def attention_calls(function, *args, **kwargs):
    """Run function(*args, **kwargs) once, and list its attention calls in order: print the result for a table.

    Compiled modules run uncompiled here. Returns AttentionCalls, a list of AttentionCall.
    """
    this, function = _Pass(), getattr(function, "_orig_mod", function)  # of a compiled module, the module itself
    with _Intercept(this), torch.no_grad(), _eager, torch.compiler.set_stance("force_eager"):
        function(*args, **kwargs)
    names = {m: name for name, m in function.named_modules()} if isinstance(function, nn.Module) else {}
    calls = AttentionCalls(AttentionCall(kind, number, names.get(owner, type(owner).__name__), query, key)
                           for (owner, *_), (kind, number, query, key) in zip(this.owners, this.calls))
    calls.unreached = this.unreached
    return calls


# ------------------------------------------------------------------------------------------------
# 4. C-ERG: a weak encoding of the prompt (section 3.2, Listing 1)
# ------------------------------------------------------------------------------------------------


def encode(encoder, *args, tau, layers=None, projections=None, **kwargs):
    """(encoding, weak encoding): encoder(*args, **kwargs), and again with tempered self-attention.

    The weak one is all that the encoder returns, pooled vectors included. The encoder is reached through
    scaled_dot_product_attention in its `layers` (None: all). For one that computes attention otherwise,
    give instead its query `projections`, a list of modules whose output is multiplied by tau (Listing 1);
    one that yields keys or values, too, would temper them as well, and does not qualify.
    An additive mask (T5's position bias) stays untempered either way.
    Raises ValueError if QK-norm follows a projection and would undo it, and RuntimeError if the weak
    encoding comes out equal to the other one.
    """
    _refuse_training(encoder)
    if projections is None:
        strong = encoder(*args, **kwargs)
        with rectify(encoder if isinstance(encoder, nn.Module) else None, tau=tau, layers=layers):
            weak = encoder(*args, **kwargs)
    else:
        projections = _check_projections(encoder, projections, tau, layers)
        strong = encoder(*args, **kwargs)
        fired = set()

        def temper(module, inputs, output):
            fired.add(module)
            return output * tau

        handles = [p.register_forward_hook(temper) for p in projections]
        try:
            weak = encoder(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        if len(fired) < len(projections):
            raise RuntimeError(f"{len(projections) - len(fired)} of {len(projections)} projections did not run when the "
                               "encoder did: are they its own?")
    pairs = [(a, b) for a, b in zip(pytree.tree_leaves(strong), pytree.tree_leaves(weak)) if isinstance(a, Tensor)]
    if tau != 1 and pairs and all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs):
        raise RuntimeError(f"tau={tau} left the encoding as it was: something after the chosen queries undoes the scale "
                           "(normalization, linear attention), their attention does not reach the output, or the text is one token")
    return strong, weak


def _check_projections(encoder, projections, tau, layers):
    """The projections as a list, or an error."""
    if layers is not None:
        raise ValueError(f"layers={layers!r} has no effect with projections: list the projections of these layers")
    _number("tau", tau, 0)
    projections = list(projections) if not isinstance(projections, (nn.Module, str)) else [None]
    if not projections or len(set(projections)) < len(projections) or not all(isinstance(p, nn.Module) for p in projections):
        raise ValueError("projections must be a list of modules of the encoder, none twice, for example "
                         "[layer.self_attn.q_proj for layer in encoder.layers[2:6]]")
    for projection in projections:
        for parent in encoder.modules() if isinstance(encoder, nn.Module) else ():
            children = dict(parent.named_children())
            pattern = r"(^|_)(q|qk|query)_?(layer_?)?(norm|ln)|(norm|ln)_?(q|query)"
            norms = [name for name, child in children.items() if re.search(pattern, name) and child is not projection]
            if norms and any(child is projection for child in children.values()):
                raise ValueError(f"projections: {type(parent).__name__} normalizes its queries ({norms[0]}) after the "
                                 "projection, which undoes tau; leave projections out, and load the encoder with "
                                 "scaled_dot_product_attention (attn_implementation='sdpa'), or list its query norms")
    return projections


# ------------------------------------------------------------------------------------------------
# 5. Guidance (section 3.3), APG and CADS (appendix D)
# ------------------------------------------------------------------------------------------------


def guide(v_pos, v_neg, w):
    """w * v_pos + (1 - w) * v_neg (eq. 10).

    Velocity, noise, data and score are affine in each other with x_t fixed, and the weights sum to 1, so
    it is the same guidance for models that predict any of them.
    """
    return v_pos + (w - 1) * (v_pos - v_neg)  # rounds less in half precision, and w = 1 is exactly v_pos


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
    unit = onto / torch.linalg.vector_norm(onto, dim=dims, keepdim=True).clamp_min(1e-12)
    parallel = (v * unit).sum(dims, keepdim=True) * unit
    return parallel, v - parallel


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
            if y.dim() < 2 or not y.is_floating_point():
                return y  # lengths, masks
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
        _number("tau", self.tau, 0)
        _number("tau_c", self.tau_c, 0)
        _check_energy(self.tau, self.alpha, self.gamma, self.steps)
        if not isinstance(self.batched, bool):
            raise TypeError(f"batched={self.batched!r} must be True or False")
        kappa = 0 if self.kappa is None else self.kappa
        if isinstance(kappa, bool) or not isinstance(kappa, numbers.Real) or not 0 <= kappa <= 1:
            raise ValueError(f"kappa={self.kappa!r} must be a number between 0 and 1")
        for name, kind in (("queries", slice), ("apg", APG), ("cads", CADS)):
            if not isinstance(getattr(self, name), (kind, type(None))):
                raise TypeError(f"{name}={getattr(self, name)!r} must be an erg.{kind.__name__} or None" if kind is not slice
                                else f"{name}={getattr(self, name)!r} must be a slice or None")
        if self.negative not in (None, "null", "same"):
            raise ValueError(f"negative={self.negative!r} must be 'null' or 'same'")
        _layers("layers", self.layers)
        by_name = isinstance(self.layers_c, Mapping)
        if by_name and not self.layers_c:
            raise ValueError("layers_c={} names no text encoder; None is all layers")
        for name, layers in self.layers_c.items() if by_name else [(None, self.layers_c)]:
            _layers(f"layers_c[{name!r}]" if by_name else "layers_c", layers)
        for name in ("layers", "kappa", "queries"):
            if getattr(self, name) is not None and not self.rectifies:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect: tau = alpha = gamma = steps = 1 "
                                 "leaves the denoiser as it is")
        if self.queries is not None and self.tau == 1:
            raise ValueError(f"queries={self.queries!r} has no effect with tau=1")
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
        stands for the condition itself, with negative="same". `null` is the null prompt in the encoder's terms,
        or a mapping of all of its keyword arguments; it is not used with C-ERG. `name` picks from a layers_c by encoder.
        """
        by_name = isinstance(self.layers_c, Mapping)
        if by_name != (name is not None) or (by_name and name not in self.layers_c):
            raise ValueError(f"name={name!r} must be one of {', '.join(self.layers_c)}" if by_name else
                             f"name={name!r} has no effect: layers_c is not given by encoder")
        if self.tau_c != 1:
            layers = self.layers_c[name] if by_name else self.layers_c
            return encode(encoder, *args, tau=self.tau_c, layers=layers, **kwargs)
        if self.negative != "same" and null is None:
            raise ValueError("null=None: without C-ERG the negative's condition is that of the null prompt; "
                             "give it, or choose negative='same'")
        condition = encoder(*args, **kwargs)
        if self.negative == "same":
            return condition, None
        return condition, encoder(**null) if isinstance(null, Mapping) else encoder(null, **kwargs)


class Guidance:
    """One sampling run under `settings`: guidance(model, x, t, condition) -> v (eq. 10), for t in [0, 1).

    model(x, t, condition) -> velocity, x (B, ...), t (B,); condition a tensor (B, ...), nested tuples, lists
    or dicts of them, or None for an unconditional model. `negative` is the negative's condition, nested
    likewise; None stands for the same condition. eq. 10 and kappa hold as well for a model that predicts
    noise or data (`guide`); APG is computed as for a velocity. Make a new one for each run: it carries APG's
    momentum. There is no second evaluation where w = 1, or where the negative equals the positive.
    """

    def __init__(self, settings, negative=None, generator=None):
        if not isinstance(settings, ERG):
            raise TypeError(f"settings={settings!r} must be an erg.ERG")
        if negative is None and settings.negative != "same":
            raise ValueError("negative=None: the negative's condition is missing, the weak encoding or that of the null "
                             "prompt (see ERG.encode); choose negative='same' in the settings to do without")
        if negative is not None and settings.negative == "same":
            raise ValueError("a negative condition has no effect with negative='same'")
        self.settings, self.negative, self.generator, self.running = settings, negative, generator, 0.0

    def __call__(self, model, x, t, condition=None):
        s = self.settings
        if isinstance(t, Tensor) and t.numel() != 1:
            raise ValueError(f"t has the shape {tuple(t.shape)}; it must be one number, the same for all samples")
        t = float(t)
        if not 0 <= t <= 1:
            raise ValueError(f"t={t} must lie between 0 (noise) and 1 (data)")
        if s.rectifies:
            _refuse_training(model)
        if condition is None and (self.negative is not None or s.cads is not None):
            raise ValueError("condition=None leaves nothing to contrast with the negative's condition, or to anneal")
        w = s.w(t) if callable(s.w) else s.w
        _number("w", w)
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
        wide = torch.promote_types(v_pos.dtype, torch.float32)  # x1 - x cancels near t = 1
        y, v_pos, v_neg = x.to(wide), v_pos.to(wide), v_neg.to(wide)
        x1, self.running = s.apg.update(y + (1 - t) * v_pos, y + (1 - t) * v_neg, w, self.running)
        return ((x1 - y) / (1 - t)).to(x.dtype)

    def rectifies_at(self, t):
        """Whether I-ERG acts at t: strictly after kappa."""
        kappa = 0.2 if self.settings.kappa is None else self.settings.kappa
        return self.settings.rectifies and t > kappa + 1e-6  # so that kappa in float32 does not exceed itself

    def predictions(self, model, x, t, positive, negative, rectified):
        """v_pos and v_neg, in one pass of 2B rows or in two."""
        s, B = self.settings, len(x)

        def rectify_rows(**rows):
            if not rectified:
                return contextlib.nullcontext()
            return rectify(model if isinstance(model, nn.Module) else None, tau=s.tau, alpha=s.alpha, gamma=s.gamma,
                           steps=s.steps, layers=s.layers, queries=s.queries, **rows)

        negative = _match(negative, positive, x, s.batched)
        if s.batched:
            both = torch.cat([x, x])
            conditions = pytree.tree_map(lambda p, n: torch.cat([p, n]) if isinstance(p, Tensor) else p, positive, negative)
            with rectify_rows(rows=slice(B, 2 * B), batch=2 * B):
                v = model(both, _times(t, both), conditions)
            return v.chunk(2)
        v_pos = model(x, _times(t, x), positive)
        with rectify_rows():
            return v_pos, model(x, _times(t, x), negative)


def _match(negative, positive, x, batched):
    """The negative's condition, one row (the null prompt's) repeated for all of the positive's; an error if they differ in kind."""
    def one(n, p):
        if not isinstance(n, Tensor) or not isinstance(p, Tensor):
            if isinstance(n, Tensor) or isinstance(p, Tensor) or (batched and n is not p and n != p):
                n, p = (f"a tensor of shape {tuple(y.shape)}" if isinstance(y, Tensor) else repr(y) for y in (n, p))
                raise ValueError(f"the negative's condition has {n} where the condition has {p}: they must both be tensors, "
                                 "or equal; with batched=False they may be two values")
            return n
        if batched and (not p.dim() or len(p) != len(x)):
            raise ValueError(f"the condition has a tensor of shape {tuple(p.shape)} where x has {len(x)} rows: one pass takes "
                             "one row a sample; batched=False takes others")
        n = n.expand(len(p), *n.shape[1:]) if n.dim() and p.dim() and len(n) == 1 else n
        same = (n.dtype, n.device) == (p.dtype, p.device) and (n.shape == p.shape or not batched)
        if not same or (p.is_floating_point() and p.device != x.device):
            raise ValueError(f"the negative's condition has {tuple(n.shape)}, {n.dtype}, on {n.device} where the condition "
                             f"has {tuple(p.shape)}, {p.dtype}, on {p.device}, and x is on {x.device}: they must agree"
                             + ("; for other lengths, batched=False" if n.shape != p.shape else ""))
        return n

    if pytree.tree_structure(negative) != pytree.tree_structure(positive):
        raise ValueError("the negative's condition is not nested as the condition is: "
                         f"{pytree.tree_structure(negative)} and {pytree.tree_structure(positive)}")
    return pytree.tree_map(one, negative, positive)


def _times(t, x):
    return torch.full((len(x),), t, dtype=torch.float32, device=x.device)


# Table 7. It gives no w: 5.0 for SD3 is from appendix E, the others from Table 6 and figures 12 and 16. Where text
# tokens take part in the attention (the first and the last), add queries=slice(...) of the image tokens: Listing 2.
PRESETS = {
    "mmdit-text-to-image": ERG(w=5.0, tau=0.01, layers=range(10, 17), kappa=0.4, tau_c=0.01, gamma=1.5,
                               layers_c={"llama3": range(0, 32), "t5": range(0, 24)}),
    "mmdit-unconditional": ERG(w=3.0, tau=0.01, layers=range(10, 17), kappa=0.2, negative="same"),
    "dit-xl-2": ERG(w=5.0, tau=0.01, layers=range(12, 15), kappa=0.3, negative="null"),
    "sd3-medium": ERG(w=5.0, tau=0.01, layers=range(6, 8), kappa=0.2, tau_c=0.1,
                      layers_c={"openclip-vit-g": range(1, 31), "clip-vit-l": range(1, 10), "t5-xxl": range(1, 22)}),
}
