"""Entropy Rectifying Guidance (ERG), arXiv 2504.13987, in one file to read and to copy.

Guidance contrasts a strong prediction with a weak one: v = w * v_pos + (1 - w) * v_neg. ERG gets the weak one
from the same model, by changing the energy that its attention descends: in a few layers of the denoiser where
t > kappa (I-ERG), and in the text encoder at all t (C-ERG).

    import erg
    settings = erg.ERG(w=3.0, tau_i=0.01, layers=range(6, 8), kappa=0.2, tau_c=0.1)
    condition, negative = settings.encode(text_encoder, tokens)    # C-ERG
    guidance = erg.Guidance(settings, negative)
    for i in range(50):
        x = x + guidance(model, x, i / 50, condition) / 50         # model(x, t, condition) -> v

Inside somebody else's sampler: `with erg.rectify(model, tau=0.01, layers={6, 7}, rows=...): ...`

Conventions: t = 0 is noise, t = 1 is data; x_t = (1 - t) * noise + t * data; v = data - noise. w = 1 is off.
tau multiplies beta = 1/sqrt(d): tau < 1 flattens attention, tau > 1 sharpens it, and tau = 0 is uniform
attention, not "off". tau = alpha = gamma = K = 1 is ordinary attention. Layers are range(l_min, l_max), l_max
exclusive, numbered among the self-attention calls.

Shapes: B batch, H heads, S queries, N keys, D = d head dimension.
Needs PyTorch 2.6 or newer and nothing else. MIT licence.
"""
import contextlib
import functools
import itertools
import math
import numbers
import sys
import threading
import types
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__version__ = "0.2.0"

# ---- 1. The energy (section 3.1) ---------------------------------------------------------------------------


def hopfield_energy(xi, X, *, beta=None, tau=1.0, alpha=1.0):
    """E(xi) = 1/2 |xi|^2 - alpha * lse(X xi, tau * beta), with lse(z, b) = log(sum exp(b z)) / b (eq. 9).

    The paper's lse (eq. 4) leaves out the inner b. Without it, eq. 6 is not the gradient.
    States xi (..., S, d), patterns X (..., N, d) -> energies (..., S). beta is 1/sqrt(d) if not given.
    tau must be positive: the energy is unbounded as tau -> 0, though its gradient is not.
    """
    beta = xi.shape[-1] ** -0.5 if beta is None else beta
    check_numbers(above=0, beta=beta, tau=tau)
    check_numbers(alpha=alpha)
    b = tau * beta
    return 0.5 * xi.square().sum(-1) - alpha * torch.logsumexp(b * (xi @ X.mT), dim=-1) / b


def hopfield_step(xi, X, *, beta=None, tau=1.0, alpha=1.0, gamma=1.0):
    """One step of descent, xi - gamma * (xi - alpha * softmax(tau * beta * xi X^T) X) (eq. 6, for eq. 9).

    xi (..., S, d), X (..., N, d) -> (..., S, d). With gamma = 1 and alpha >= 0 the energy never rises (CCCP).
    """
    beta = xi.shape[-1] ** -0.5 if beta is None else beta
    check_numbers(low=0, beta=beta, tau=tau)
    check_numbers(alpha=alpha, gamma=gamma)
    association = torch.softmax(tau * beta * (xi @ X.mT), dim=-1)  # (..., S, N)
    return xi - gamma * (xi - alpha * (association @ X))


# ---- 2. Energy attention (Algorithm 1) ---------------------------------------------------------------------


def energy_attention(q, k, v, *, tau=1.0, alpha=1.0, gamma=1.0, K=1, queries=None,
                     attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    """K times q <- q - gamma * (q - alpha * softmax(tau * beta * q k^T) v) (Algorithm 1).

    q (B, H, S, D), k, v (B, H, N, D) -> (B, H, S, D). tau is a number, or a tensor (B,), one a sample.
    `queries` is a slice of S: it restricts tau, and only tau, to these queries (Listing 2: the image tokens).
    beta is `scale`, 1/sqrt(D) by default. Masks, boolean or additive, are not tempered. Each step is one call
    of F.scaled_dot_product_attention, so no S x N matrix is kept. With tau = alpha = gamma = K = 1 it is
    that function, bit for bit.

    Algorithm 1 pulls queries towards the values, `hopfield_step` towards the keys: the same if v = k.
    Listing 2 scales q once, so its residual is tempered, too: the same only for gamma = K = 1.
    Raises ValueError for a number out of range, and if v is not as wide as q unless gamma = K = 1.
    """
    _check_energy(tau, alpha, gamma, K)
    if (gamma != 1 or K > 1) and v.shape[-1] != q.shape[-1]:
        raise ValueError(f"v is {v.shape[-1]} wide and q {q.shape[-1]}: they must agree unless gamma = K = 1")
    tempers = isinstance(tau, Tensor) or queries is not None or tau == 0  # scale = 0 and a mask make NaN
    if not tempers and tau != 1:  # a plain number costs nothing: it goes into the kernel's scale
        scale = tau * (q.shape[-1] ** -0.5 if scale is None else scale)
    options = dict(attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    for _ in range(K):
        tempered = _temper(q, tau, queries=queries) if tempers else q
        attended = F.scaled_dot_product_attention(tempered, k, v, **options)
        attended = attended if alpha == 1 else alpha * attended  # (B, H, S, D)
        q = attended if gamma == 1 else q - gamma * (q - attended)  # the residual is not tempered
    return q


def _temper(q, tau, rows=None, queries=None):
    """q with tau multiplied into the chosen rows and queries."""
    _check_slice("rows", rows, len(q))
    _check_slice("queries", queries, q.shape[-2])
    q = q.clone()
    chosen = q[rows or slice(None), ..., queries or slice(None), :]
    if isinstance(tau, Tensor):
        if tau.shape not in ((), (len(chosen),)):
            raise ValueError(f"tau is {tuple(tau.shape)}; it must be a number or ({len(chosen)},), one a row")
        tau = tau.reshape(-1, *[1] * (q.dim() - 1)).to(q)  # (B, 1, 1, 1)
    chosen *= tau
    return q


# ---- 3. The guidance update (section 3.3) ------------------------------------------------------------------


def guide(v_pos, v_neg, w):
    """w * v_pos + (1 - w) * v_neg, on every channel (eq. 10).

    Velocity, noise, data and score are affine in each other with x_t fixed, and the weights sum to 1. So it
    is the same guidance for models that predict any of them. Raises ValueError if the two shapes differ.
    """
    if v_pos.shape != v_neg.shape:
        raise ValueError(f"v_neg is {tuple(v_neg.shape)}; it must be {tuple(v_pos.shape)}, as v_pos is")
    return v_pos + (w - 1) * (v_pos - v_neg)  # rounds less in half precision, and w = 1 is exactly v_pos


def project(v, onto):
    """v (B, ...) as its part parallel to `onto` and the orthogonal rest, per sample over all dimensions."""
    dims = tuple(range(1, v.dim()))
    unit = onto / torch.linalg.vector_norm(onto, dim=dims, keepdim=True).clamp_min(1e-12)
    parallel = (v * unit).sum(dims, keepdim=True) * unit
    return parallel, v - parallel


# ---- 4. Rectifying the attention of any model --------------------------------------------------------------
#
# While a context is open, `_attend` stands in the place of F.scaled_dot_product_attention. It numbers the
# calls of each forward, and has the chosen ones answered by energy attention. So queries are reached after
# QK-norm and rotary embedding, where the paper tempers them, in models that know nothing of it.


class _Thread(threading.local):
    def __init__(self):
        self.active = ()  # rectifiers whose forwards are under way in this thread, the oldest context first
        self.outer = None  # during an answer: those of them that still have to answer its calls


_thread = _Thread()
_lock = threading.RLock()
_open = []  # an entry for each open context, of any thread; the first one says what to put back
_plain, _plain_multi_head = F.scaled_dot_product_attention, F.multi_head_attention_forward


def _attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Stands in the place of F.scaled_dot_product_attention."""
    outer = chosen = _thread.outer
    if outer is None:  # a call of the model, not a step of an answer
        chosen = tuple([rectifier for rectifier in _thread.active if rectifier.chooses(query, key)])
    options = dict(attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    if not chosen:
        return _plain(query, key, value, dropout_p=dropout_p, **options)
    _require(not dropout_p, "dropout_p", dropout_p, "0 in a rectified call: call the model's eval() first")
    try:
        _thread.outer = chosen[:-1]
        return chosen[-1].answer(query, key, value, **options)
    finally:
        _thread.outer = outer


def _multi_head(*args, **kwargs):
    """Stands in the place of F.multi_head_attention_forward, which may write attention out (need_weights)."""
    for rectifier in _thread.active if kwargs.get("need_weights", True) else ():
        rectifier.counts[-1]["missed"] += 1
    return _plain_multi_head(*args, **kwargs)


_disabled = functools.cache(lambda function: torch.compiler.disable(function))


@functools.lru_cache(maxsize=1)
def _holders(function, modules):
    """Globals of modules that imported the function by name. `modules`, their number, renews the cache."""
    spaces = [vars(m) for name, m in list(sys.modules.items())
              if isinstance(m, types.ModuleType) and name.partition(".")[0] != "torch"]
    return [space for space in spaces if any(value is function for value in list(space.values()))]


@contextlib.contextmanager
def _replaced():
    """Context in which `_attend` is where the function was."""
    global _plain, _plain_multi_head
    with _lock:
        places = []
        if not _open:
            if F.scaled_dot_product_attention is not _attend:  # it is after a patch that was undone too late
                _plain = F.scaled_dot_product_attention
            _plain_multi_head, ours = F.multi_head_attention_forward, _multi_head
            if "torch._dynamo" in sys.modules:  # which would make one call of it, and hide the attention
                ours = _disabled(_multi_head)
            places = [(vars(F), "scaled_dot_product_attention", _plain, _attend),
                      (vars(F), "multi_head_attention_forward", _plain_multi_head, ours)]
            for space in [vars(sys.modules["__main__"]), *_holders(_plain, len(sys.modules))]:
                places += [(space, name, _plain, _attend) for name, value in list(space.items())
                           if value is _plain and name != "_plain"]
        _open.append((places, torch.backends.mha.get_fastpath_enabled()))
        torch.backends.mha.set_fastpath_enabled(False)  # nn.MultiheadAttention's calls no attention function
        for space, name, _, ours in places:
            space[name] = ours
    try:
        yield
    finally:
        with _lock:
            places, fastpath = _open[0]
            if len(_open) == 1:
                torch.backends.mha.set_fastpath_enabled(fastpath)
                for space, name, plain, ours in places:
                    if space.get(name) is ours:  # else somebody has replaced it meanwhile
                        space[name] = plain
            _open.pop()


class _Rectifier:
    """What a context changes, and how many attention calls the forward under way has made."""

    opened = itertools.count()

    def __init__(self, tau=None, alpha=1.0, gamma=1.0, K=1, layers=None, rows=None, queries=None,
                 attention=None, when=None, kind="self", batch=None):
        if (tau is None and alpha == gamma == K == 1) == (attention is None):
            raise ValueError("give tau, alpha, gamma or K, or an attention function, and not both")
        if queries is not None and tau is None and attention is None:
            raise ValueError(f"queries={queries} has no effect without tau")
        _require(kind in ("self", "cross", "all"), "kind", kind, "'self', 'cross' or 'all'")
        _require(attention is None or callable(attention), "attention", attention, "a function, or None")
        _require(when is None or callable(when), "when", when, "a function, or None")
        check_numbers(whole=True, low=1, batch=1 if batch is None else batch)
        self.tau, self.alpha, self.gamma, self.K = 1.0 if tau is None else tau, alpha, gamma, K
        _check_energy(self.tau, alpha, gamma, K)
        _check_slice("rows", rows)
        _check_slice("queries", queries)
        self.layers, self.rows, self.queries = _layers("layers", layers), rows, queries
        self.attention, self.when, self.kind, self.batch = attention, when, kind, batch
        self.number, self.thread = next(self.opened), threading.get_ident()
        self.counts = []  # of each forward under way: a model may run inside itself
        self.ran = self.rectified = 0  # forwards that began, and those that were not ordinary
        self.calls = set()  # how many attention calls forwards made

    def begin(self, ordinary=False):
        """A forward begins."""
        self.counts.append(dict(self=0, cross=0, all=0, missed=0, ordinary=ordinary, rows=[]))
        self.ran, self.rectified = self.ran + 1, self.rectified + (not ordinary)
        _thread.active = tuple(sorted({*_thread.active, self}, key=lambda rectifier: rectifier.number))

    def end(self):
        if self.counts:
            self.counts.pop()
        if not self.counts:
            _thread.active = tuple([rectifier for rectifier in _thread.active if rectifier is not self])

    @contextlib.contextmanager
    def forward(self):
        """All that runs in this context is one forward."""
        with _replaced():
            try:
                self.begin()
                yield
                self.check()
            finally:
                self.end()

    @contextlib.contextmanager
    def attached(self, model):
        """Each call of `model` in this context is a forward."""
        def mine(hook):
            def on_this(module, *given):  # a deep copy of the model keeps the hooks
                if module is model and threading.get_ident() == self.thread:
                    hook(*given)
            return on_this

        ordinary = lambda args, kwargs: self.when is not None and not self.when(*args, **kwargs)
        begin = mine(lambda *given: self.begin(ordinary(*given)))
        check = mine(lambda args, kwargs, output: self.check((args, kwargs), output))
        end = mine(lambda args, kwargs, output: self.end())
        hooks = [model.register_forward_pre_hook(begin, with_kwargs=True),
                 model.register_forward_hook(check, with_kwargs=True),
                 model.register_forward_hook(end, with_kwargs=True, always_call=True)]
        try:
            with _replaced():
                yield
        finally:
            for hook in hooks:
                hook.remove()
            while self.counts:  # torch skips hooks after a KeyboardInterrupt
                self.end()

    def chooses(self, query, key):
        """Count an attention call. Returns whether it is to be rectified."""
        counts, kind = self.counts[-1], "self" if query.shape[-2] == key.shape[-2] else "cross"
        number = counts[self.kind]
        counts[kind] += 1
        counts["all"] += 1
        if self.kind not in (kind, "all") or not (self.layers is None or number in self.layers):
            return False
        counts["rows"].append(max(len(query), len(key)))
        return not counts["ordinary"]

    def answer(self, q, k, v, **options):
        """The rectified answer to one call of F.scaled_dot_product_attention."""
        tau, rows, queries = self.tau, self.rows, self.queries
        if self.attention is not None:
            out = self.attention(q, k, v, **options)
            good = isinstance(out, Tensor) and out.shape[-2:] == (q.shape[-2], v.shape[-1])
            _require(good and len(out) >= len(q), "attention(q, k, v)", out, "a tensor like q, as wide as v")
        elif rows is not None and self.alpha == self.gamma == self.K == 1:  # one call for all rows
            return F.scaled_dot_product_attention(_temper(q, tau, rows, queries), k, v, **options)
        else:
            if rows is not None and isinstance(tau, Tensor) and tau.dim():  # an entry for each chosen row
                tau = q.new_ones(len(q)).slice_scatter(tau.to(q), 0, *_ends(rows, len(q)))
            out = energy_attention(q, k, v, tau=tau, alpha=self.alpha, gamma=self.gamma, K=self.K,
                                   queries=queries, **options)
            queries = None  # they restrict tau alone
        if rows is not None or queries is not None:
            plain = F.scaled_dot_product_attention(q, k, v, **options)
            for name, part, dim in (("queries", queries, q.dim() - 2), ("rows", rows, 0)):
                if part is not None:
                    _check_slice(name, part, q.shape[dim])
                    chosen = out[(slice(None),) * dim + (part,)].to(plain.dtype)
                    out = plain.slice_scatter(chosen, dim, *_ends(part, q.shape[dim]))
        return out

    def check(self, given=None, output=None):
        """After a forward: an error unless every chosen layer was rectified, and its rows were samples."""
        counts, layers = self.counts[-1], self.layers
        if counts["ordinary"]:
            return
        count = counts[self.kind]
        missing = [number for number in layers or {0} if number >= count]  # layers=None: at least one
        if missing or (layers is None and counts["missed"]):
            what = f"layer {min(missing)}" if missing else "a call of nn.MultiheadAttention"
            raise RuntimeError(f"{what} was not rectified. {_why_missed(counts, self.kind)}")
        if layers is not None and len(self.calls) == 1 and count not in self.calls:  # once
            warnings.warn(f"a forward made {count} attention calls of kind {self.kind!r}, and others made "
                          f"{min(self.calls)}: does a cache skip blocks? The numbers shift", stacklevel=2)
        self.calls.add(count)
        allowed = [{self.batch}] if self.batch is not None else [_lengths(given), _lengths(output)]
        for rows in counts["rows"] if self.rows is not None or self.batch is not None else ():
            if any(lengths and rows not in lengths for lengths in allowed):
                raise ValueError(f"a call has {rows} rows where {sorted(set.union(*allowed))} were expected: "
                                 "does the model fold space or time into the batch? Use two passes, one "
                                 "plain and one rectified without rows (batched=False), or give batch")


def _why_missed(counts, kind):
    """The hint for whoever chose a layer that was not met."""
    text = (f"This forward called F.scaled_dot_product_attention {counts['all']} times, {counts['self']} of "
            f"kind 'self' and {counts['cross']} of kind 'cross' (erg.attention_calls lists them).")
    if counts["all"] and not counts[kind]:
        text += (" Calls with other keys than queries are 'cross': attention to other tokens (kind='cross'), "
                 "or a cache of keys (use_cache=False).")
    elif counts["missed"] or not counts["all"]:
        text += (" Out of reach are kernels such as flash-attn, attention written out, torch.jit, and "
                 "nn.MultiheadAttention with need_weights=True. Choose the model's sdpa or native back end "
                 "(transformers: attn_implementation='sdpa'), or give erg.encode the query projections.")
    return text


@contextlib.contextmanager
def rectify(model=None, *, tau=None, alpha=1.0, gamma=1.0, K=1, layers=None, rows=None, queries=None,
            attention=None, when=None, kind="self", batch=None):
    """Context in which a model's attention is `energy_attention` in some layers (I-ERG, C-ERG).

    It acts in the forwards of `model`, and numbers the layers anew in each. Without a model, all that runs in
    the context is one forward.

    tau, alpha, gamma, K: as in `energy_attention`; tau may be a tensor with an entry for each (chosen) row.
    layers: a collection of numbers among the attention calls of `kind`; None is all. See `attention_calls`.
    kind: "self" (as many queries as keys), "cross" (the others), or "all".
    rows, queries: slices of the batch and of the queries; the rest keeps ordinary attention. As in Listing 2,
        `queries` restricts tau alone: alpha, gamma and K act on all tokens of the rows.
    attention: a function (q, k, v, **options of SDPA) -> out instead of `energy_attention`, for other weak
        models such as PAG or SEG; `queries` then says which of its outputs are used.
    when: a function of the arguments of the model's forward. Where it returns False, that forward is
        ordinary: this is kappa inside somebody else's sampling loop.
    batch: the rows that every rectified call must have. By default, with `rows`: the first dimension of some
        argument of the model, and of its output.

    Contexts nest; the one opened last is applied first. Other threads see ordinary attention. The model and
    torch are left as they were, also after an exception. It is for inference: activation checkpointing
    repeats a forward outside of the context. After torch.compile, give what it returned. Plain and rectified
    forwards have a graph each; another float tau or other layers compile again, a 0-dimensional tensor tau
    does not. A reference to F.scaled_dot_product_attention in a closure or a default is out of reach.

    Raises ValueError for settings out of range or without effect. Raises RuntimeError when a forward ends
    without having met every chosen layer, or the context without a forward. Warns if `when` was never true.
    """
    rectifier = _Rectifier(tau, alpha, gamma, K, layers, rows, queries, attention, when, kind, batch)
    _require(model is not None or when is None, "when", when, "None without a model, whose forwards ask it")
    if model is not None:
        _check_model(model)
    with rectifier.forward() if model is None else rectifier.attached(model):
        yield
    if not rectifier.ran:
        raise RuntimeError(f"{type(model).__name__} was not called in the context. Is it the module that the "
                           "sampler calls, as model(...)? For code that calls model.forward(...) or another "
                           "method, open erg.rectify(...) without the model around each call")
    if not rectifier.rectified:
        warnings.warn(f"when=... was true in none of {rectifier.ran} forwards: nothing changed", stacklevel=3)


class AttentionCall(NamedTuple):
    """One call of F.scaled_dot_product_attention in a forward pass."""

    kind: str  # "self" (as many queries as keys) or "cross"
    number: int  # among the calls of its kind: what `layers` means
    module: str  # the innermost module that was running
    query: tuple  # shape, (B, H, S, D)
    key: tuple  # shape, (B, H, N, D)


class AttentionCalls(list):
    """A model's attention calls in order, as AttentionCall; str() is a table of them."""

    missed = 0  # calls of nn.MultiheadAttention with need_weights=True, which are out of reach

    def __str__(self):
        width = max([len(call.module) for call in self] + [6])
        line = "{:5}  {:>6}  {:" + str(width) + "}  {:>5}  {:>7}  {:>4}"
        lines = [line.format("kind", "number", "module", "heads", "queries", "keys")]
        for kind, number, module, query, key in self:
            heads = query[-3] if len(query) > 3 else 1
            lines.append(line.format(kind, number, module, heads, query[-2], key[-2]))
        if any(call.kind == "self" for call in self):
            lines.append(f"middle third of self-attention: {self.middle_third()}")
        if self.missed or not self:
            lines.append(f"out of reach: {self.missed or 'all'} attention, which calls another function")
        return "\n".join(lines)

    def middle_third(self, kind="self"):
        """The middle third of the layers, as a range: where to begin without a better rule (section 4.3).

        If more than half of the calls have equally many queries, only these count: not a text encoder's own.
        """
        lengths = {call.number: call.query[-2] for call in self if call.kind == kind}
        _require(lengths, "kind", kind, f"that of one of the {len(self)} attention calls")
        usual = [n for n in lengths if 2 * list(lengths.values()).count(lengths[n]) > len(lengths)]
        chosen = usual or list(lengths)
        first = round(len(chosen) / 3) if len(chosen) > 2 else 0
        return range(chosen[first], chosen[-1 - first] + 1)


def attention_calls(function, *args, **kwargs):
    """Run function(*args, **kwargs) once, and list its attention calls: print the result for a table.

    Compiled modules run uncompiled here. Returns AttentionCalls, a list of AttentionCall.
    """
    function = getattr(function, "_orig_mod", function)  # of a compiled module, the module itself
    names = {m: name for name, m in function.named_modules()} if isinstance(function, nn.Module) else {}
    calls, running = AttentionCalls(), [None]

    def note(q, k, v, **options):
        kind = "self" if q.shape[-2] == k.shape[-2] else "cross"
        module = names.get(running[-1], type(running[-1]).__name__) or "(the model)"
        number = sum(call.kind == kind for call in calls)
        calls.append(AttentionCall(kind, number, module, tuple(q.shape), tuple(k.shape)))
        return F.scaled_dot_product_attention(q, k, v, **options)

    rectifier = _Rectifier(attention=note, kind="all")
    rectifier.check = lambda: setattr(calls, "missed", rectifier.counts[-1]["missed"])  # nothing need be met
    enter, leave = lambda module, _: running.append(module), lambda *_: running.pop() and None
    hooks = [nn.modules.module.register_module_forward_pre_hook(enter),
             nn.modules.module.register_module_forward_hook(leave, always_call=True)]
    try:
        with rectifier.forward(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            function(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


# ---- 5. C-ERG: a weak encoding of the prompt (section 3.2) -------------------------------------------------


def encode(encoder, *args, tau, layers=None, projections=None, **kwargs):
    """(encoding, weak encoding): encoder(*args, **kwargs), and again with tempered attention (Listing 1).

    The weak encoding is all that the encoder returns, pooled vectors included. An additive mask, such as T5's
    position bias, is not tempered. `layers` are numbers among the encoder's attention calls; None is all.
    An encoder that does not call F.scaled_dot_product_attention is reached by `projections`: a list of its
    modules that make the queries. Their output is multiplied by tau.

    Raises RuntimeError if the weak encoding comes out equal to the other one, for example because QK-norm
    follows a projection and undoes tau.
    """
    _check_evaluation(encoder)
    if projections is not None and layers is not None:
        raise ValueError(f"layers={layers!r} has no effect with projections: list those of these layers")
    strong = encoder(*args, **kwargs)
    with rectify(tau=tau, layers=layers) if projections is None else _tempered(projections, tau):
        weak = encoder(*args, **kwargs)
    pairs = [(a, b) for a, b in zip(pytree.tree_leaves(strong), pytree.tree_leaves(weak))
             if isinstance(a, Tensor) and a.is_floating_point()]
    least = (1e-4 if projections is None else 5e-3) * min(1, abs(1 - tau))  # a norm's eps leaves 1e-3
    if tau != 1 and pairs and not any((a - b).norm() >= least * a.norm() for a, b in pairs):
        raise RuntimeError(f"tau={tau} left the encoding as it was: a norm of the queries or linear "
                           "attention undoes it, the attention does not reach the output, or it is one token")
    return strong, weak


@contextlib.contextmanager
def _tempered(projections, tau):
    """Context in which the output of each of these modules is multiplied by tau."""
    check_numbers(low=0, tau=tau)
    good = isinstance(projections, Collection) and projections and \
        all(isinstance(projection, nn.Module) for projection in projections)
    _require(good, "projections", projections, "a list of modules of the encoder: what makes the queries")
    ran = set()
    temper = lambda module, inputs, output: ran.add(module) or output * tau
    hooks = [projection.register_forward_hook(temper) for projection in set(projections)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if len(ran) < len(hooks):
        raise RuntimeError(f"{len(hooks) - len(ran)} of {len(hooks)} projections did not run with the "
                           "encoder: are they its own?")


# ---- 6. Settings, and one step of guided sampling ----------------------------------------------------------


@dataclass(frozen=True)
class APG:
    """Adaptive projected guidance (Sadat et al., arXiv 2410.02416); the defaults are those of appendix D."""

    momentum: float = -0.5  # of the difference, over steps
    eta: float = 0.0  # share of the parallel part that is kept
    norm_threshold: float = 5.0  # largest norm of the difference, per sample; 0 is no limit

    def __post_init__(self):
        check_numbers(momentum=self.momentum, eta=self.eta)
        check_numbers(low=0, norm_threshold=self.norm_threshold)

    def update(self, x1_pos, x1_neg, w, running=0.0):
        """Guide predictions of the data (B, ...): momentum, clip, project on x1_pos (appendix D).

        Returns (x1, new running). Unlike eq. 10 it depends on the space: norms are those of the data.
        """
        running = x1_pos - x1_neg + self.momentum * running
        norm = torch.linalg.vector_norm(running, dim=tuple(range(1, running.dim())), keepdim=True)
        difference = running * ((self.norm_threshold or math.inf) / norm.clamp_min(1e-12)).clamp(max=1)
        parallel, orthogonal = project(difference, x1_pos)
        return x1_pos + (w - 1) * (orthogonal + self.eta * parallel), running


@dataclass(frozen=True)
class ERG:
    """All settings of the method. Give only what differs from ordinary guidance: ERG(w=3) is CFG."""

    w: float | Callable  # guidance weight, a number or a function of t; 1 is off
    tau_i: float = 1.0  # I-ERG: temperature in the denoiser
    layers: Collection | None = None  # I-ERG: range(l_min, l_max); None is all self-attention
    kappa: float = 0.2  # I-ERG acts where t > kappa
    tau_c: float = 1.0  # C-ERG: temperature in the text encoder
    layers_c: Collection | Mapping | None = None  # C-ERG: layers, or {name of a text encoder: its layers}
    alpha: float = 1.0  # I-ERG: weight of the matching term
    gamma: float = 1.0  # I-ERG: step size
    K: int = 1  # I-ERG: number of steps
    queries: slice | None = None  # I-ERG: the image tokens in joint attention; None is all tokens
    negative: str | None = None  # without C-ERG: "null" (default) or "same" prompt (sec. 3.1 and 3.3)
    batched: bool = True  # positive and negative in one pass of 2B rows; False: two passes, less memory
    apg: APG | None = None

    def __post_init__(self):
        check_numbers(w=1.0 if callable(self.w) else self.w)
        check_numbers(low=0, tau_i=self.tau_i, tau_c=self.tau_c)
        check_numbers(low=0, high=1, kappa=self.kappa)
        _check_energy(self.tau_i, self.alpha, self.gamma, self.K)
        _check_slice("queries", self.queries)
        _layers("layers", self.layers)
        by_name = isinstance(self.layers_c, Mapping) and self.layers_c
        for layers in self.layers_c.values() if by_name else [self.layers_c]:
            _layers("layers_c", layers)
        _require(self.negative in (None, "null", "same"), "negative", self.negative, "'null' or 'same'")
        _require(isinstance(self.apg, APG | None), "apg", self.apg, "an erg.APG, or None")
        if self.negative == "same" and (not self.rectifies or self.kappa == 1):
            raise ValueError("negative='same' without I-ERG, or with kappa=1, is no guidance: both are equal")
        denoiser = "tau_i = alpha = gamma = K = 1 leaves the denoiser as it is"
        idle = {} if self.rectifies else dict(layers=denoiser, kappa=denoiser, queries=denoiser)
        if self.tau_i == 1:
            idle["queries"] = "it restricts tau_i, which is 1"
        idle |= (dict(layers_c="tau_c = 1 leaves the text encoder as it is") if self.tau_c == 1 else
                 dict(negative="with tau_c the weak encoding is the negative's condition"))
        for name, why in idle.items():
            if getattr(self, name) != getattr(ERG, name):
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect: {why}")

    @property
    def rectifies(self):
        """Whether the denoiser's attention is changed at all (I-ERG)."""
        return not self.tau_i == self.alpha == self.gamma == self.K == 1

    def encode(self, encoder, *args, null=None, name=None, **kwargs):
        """(condition, negative) for encoder(*args, **kwargs), once before sampling.

        With C-ERG the negative is the weak encoding. Without it, the negative is encoder(null, **kwargs), or
        None if negative="same". `null` is the null prompt in the encoder's terms, or a mapping of all of its
        keyword arguments. `name` picks from a layers_c by encoder.
        """
        layers = self.layers_c
        if isinstance(layers, Mapping) != (name is not None) or (name is not None and name not in layers):
            raise ValueError(f"name={name!r} must be a name in layers_c={layers!r}, and None if it has none")
        if self.tau_c != 1:
            return encode(encoder, *args, tau=self.tau_c, layers=layers[name] if name else layers, **kwargs)
        if self.negative == "same":
            return encoder(*args, **kwargs), None
        _require(null is not None, "null", null, "the null prompt, where there is neither C-ERG nor 'same'")
        weak = encoder(**null) if isinstance(null, Mapping) else encoder(null, **kwargs)
        return encoder(*args, **kwargs), weak


class Guidance:
    """One sampling run under `settings`: guidance(model, x, t, condition) -> v (eq. 10), for t in [0, 1).

    model(x, t, condition) -> velocity, with x (B, ...) and t (B,). The condition is a tensor (B, ...), nested
    tuples, lists or dicts of them, or None for an unconditional model. `negative` is the negative's one,
    nested likewise; None stands for the same condition. The positive rows come first.

    There is no second evaluation where w = 1, or where the negative equals the positive. eq. 10 and kappa
    hold for a model that predicts noise or data, too (`guide`); APG is computed as for a velocity. Make a new
    object for each run: it carries APG's momentum.
    """

    def __init__(self, settings, negative=None):
        _require(isinstance(settings, ERG), "settings", settings, "an erg.ERG")
        _require((negative is None) == (settings.negative == "same"), "negative", negative,
                 "the negative's condition, as ERG.encode makes it, or None if the settings have 'same'")
        s, self.settings, self.negative, self.running = settings, settings, negative, 0.0
        self.rectifier = _Rectifier(s.tau_i, s.alpha, s.gamma, s.K, s.layers, queries=s.queries)

    def __call__(self, model, x, t, condition=None):
        s, t = self.settings, float(t)  # one time, the same for all samples
        w = s.w(t) if callable(s.w) else s.w
        check_numbers(w=w)
        check_numbers(low=0, high=1, t=t)
        given = condition is not None or self.negative is None
        _require(given, "condition", condition, "given, to be contrasted with the negative's condition")
        negative, rectified = condition if self.negative is None else self.negative, self.rectifies_at(t)
        if w == 1 or (negative is condition and not rectified):
            return _evaluate(model, x, t, condition)
        v_pos, v_neg = self.predictions(model, x, t, condition, negative, rectified)
        if s.apg is None:
            return guide(v_pos, v_neg, w)
        _require(t < 1, "t", t, "less than 1 with APG, which divides by 1 - t")
        wide = torch.promote_types(v_pos.dtype, torch.float32)  # x1 - x cancels near t = 1
        y, v_pos, v_neg = x.to(wide), v_pos.to(wide), v_neg.to(wide)
        x1, self.running = s.apg.update(y + (1 - t) * v_pos, y + (1 - t) * v_neg, w, self.running)
        return ((x1 - y) / (1 - t)).to(x.dtype)

    def rectifies_at(self, t):
        """Whether I-ERG acts at t: strictly after kappa."""
        return self.settings.rectifies and t > self.settings.kappa + 1e-6  # float32's kappa included

    def predictions(self, model, x, t, positive, negative, rectified):
        """v_pos and v_neg (B, ...), in one pass of 2B rows or in two."""
        B, batched, context = len(x), self.settings.batched, contextlib.nullcontext()
        if rectified:
            _check_evaluation(model)
            self.rectifier.rows, self.rectifier.batch = (slice(B, 2 * B), 2 * B) if batched else (None, None)
            context = self.rectifier.forward()
        matched = pytree.tree_map(functools.partial(_match, B if batched else None), positive, negative)
        if batched:
            with context:
                return _evaluate(model, torch.cat([x, x]), t, matched).chunk(2)
        v_pos = _evaluate(model, x, t, positive)
        with context:
            return v_pos, _evaluate(model, x, t, matched)


def _evaluate(model, x, t, condition):
    """model(x, t, condition) for x (B, ...) and one time t."""
    v = model(x, x.new_full((len(x),), t, dtype=torch.float32), condition)
    _require(isinstance(v, Tensor) and v.shape[:1] == x.shape[:1], "model(x, t, c)", v, "a tensor like x")
    return v


def _match(batch, positive, negative):
    """The negative's condition, or with `batch` rows in one pass both conditions (2 * batch, ...)."""
    tensors = isinstance(positive, Tensor) and isinstance(negative, Tensor)
    if tensors and negative.shape[:1] == (1,):  # a null prompt for all rows
        negative = negative.expand(*positive.shape[:1], *negative.shape[1:])
    if batch is None or (not tensors and type(positive) is type(negative) and positive == negative):
        return negative
    if tensors and (positive.shape, positive.dtype) == (negative.shape, negative.dtype) and \
            positive.shape[:1] == (batch,):
        return torch.cat([positive, negative])
    raise ValueError(f"the condition has {_say(positive)} and the negative's has {_say(negative)}: one pass "
                     f"needs two alike, with a row for each of {batch} samples; batched=False takes others")


# ---- 7. Checks of what users give --------------------------------------------------------------------------


_say = lambda y: f"{tuple(y.shape)}, {y.dtype}" if isinstance(y, Tensor) else f"{y!r:.60}"


def _require(good, name, value, allowed):
    if not good:
        raise ValueError(f"{name}={_say(value)} must be {allowed}")


def check_numbers(low=-math.inf, high=math.inf, above=-math.inf, whole=False, **values):
    """An error unless every value is a finite number in [low, high] and greater than `above`."""
    kind, words = (numbers.Integral, "whole") if whole else (numbers.Real, "finite Python")
    for name, value in values.items() if not torch.compiler.is_compiling() else ():  # checked before
        number = isinstance(value, kind) and not isinstance(value, bool) and -math.inf < value < math.inf
        if not number or not low <= value <= high or not value > above:
            limits = {"at least": low, "at most": high, "greater than": above}
            text = "".join(f", {word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit))
            raise ValueError(f"{name}={value!r} must be a {words} number{text}")


def _check_energy(tau, alpha, gamma, K):
    if not isinstance(tau, Tensor):
        check_numbers(low=0, tau=tau)
    elif tau.is_complex() or tau.device.type == "cpu" and not torch.compiler.is_compiling() and \
            not (tau.isfinite() & (tau >= 0)).all():  # a GPU's would be waited for
        raise ValueError(f"tau={tau} must be finite real numbers, at least 0")
    check_numbers(alpha=alpha)
    check_numbers(above=0, gamma=gamma)
    check_numbers(whole=True, low=1, K=K)


def _check_slice(name, part, length=None):
    """An error unless `part` is None, or a slice that selects something of `length` and nothing beyond."""
    ends = (part.start, part.stop, part.step) if isinstance(part, slice) else (part,)
    whole = all(n is None or (isinstance(n, numbers.Integral) and len(ends) == 3) for n in ends)
    _require(whole and (ends[-1] is None or ends[-1] > 0), name, part, "a slice of whole numbers, step > 0")
    fits = None in (part, length) or (max(abs(n or 0) for n in ends[:2]) <= length and range(length)[part])
    if not fits:
        raise ValueError(f"{name}={part} does not fit the {length} {name} of an attention call "
                         "(erg.attention_calls lists them)")


def _ends(part, length):
    """`part.indices(length)`, which torch.compile cannot trace in torch 2.11."""
    chosen = range(length)[part]
    return chosen.start, chosen.stop, chosen.step


def _layers(name, layers):
    """Layer numbers as a frozenset; None stands for all."""
    if layers is None:
        return None
    whole = lambda n: isinstance(n, numbers.Integral) and not isinstance(n, bool) and n >= 0
    good = isinstance(layers, Collection) and len(layers) and all(map(whole, layers))
    _require(good, name, layers, "a collection of layer numbers, for example range(6, 8)")
    return frozenset(layers)


def _lengths(x):
    """First dimensions of all tensors in x, and lengths of its lists: what may be a number of samples."""
    if isinstance(x, Tensor):
        return {len(x)} if x.dim() else set()
    inner = x.values() if isinstance(x, Mapping) else x if isinstance(x, (list, tuple)) else ()
    return ({len(x)} if isinstance(x, list) else set()).union(*map(_lengths, inner))


def _check_evaluation(model):
    if isinstance(model, nn.Module) and model.training:
        raise ValueError(f"{type(model).__name__} is in training mode, where dropout acts: call its eval()")


def _check_model(model):
    """An error for a model that cannot be rectified, a warning for one that is compiled block by block."""
    _require(isinstance(model, nn.Module), "model", model, "a torch.nn.Module, or None for all in a context")
    _check_evaluation(model)
    root, name = getattr(model, "_orig_mod", model), type(model).__name__
    if root is model and model._compiled_call_impl is not None:
        raise ValueError(f"{name} was compiled in place, by {name}.compile(), which does not see hooks: use "
                         "torch.compile(model), and give rectify what it returns")
    parts = list(root.modules())[1:]
    if any(part._compiled_call_impl is not None or hasattr(part, "_orig_mod") for part in parts):
        warnings.warn(f"parts of {name} are compiled on their own, and each rectified layer needs a graph: "
                      "raise torch._dynamo.config.recompile_limit, or compile the whole model", stacklevel=4)


# Table 7, which gives no w: SD3's is from appendix E, the others are from Table 6 and figures 12 and 16.
# Where text takes part in the attention (all but DiT), add queries=slice(...) of the image tokens.
PRESETS = {
    "mmdit-text-to-image": ERG(w=5.0, tau_i=0.01, layers=range(10, 17), kappa=0.4, tau_c=0.01, gamma=1.5,
                               layers_c={"llama3": range(0, 32), "t5": range(0, 24)}),
    "mmdit-unconditional": ERG(w=3.0, tau_i=0.01, layers=range(10, 17), kappa=0.2, negative="same"),
    "dit-xl-2": ERG(w=5.0, tau_i=0.01, layers=range(12, 15), kappa=0.3, negative="null"),
    "sd3-medium": ERG(w=5.0, tau_i=0.01, layers=range(6, 8), kappa=0.2, tau_c=0.1,
                      layers_c={"openclip-vit-g": range(1, 31), "clip-vit-l": range(1, 10),
                                "t5-xxl": range(1, 22)}),
}
