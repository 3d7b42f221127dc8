"""Section 4 of erg.py: reaching the attention of models that know nothing of it."""
import contextlib
import copy
import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import erg

same = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-12)
example = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
X = example(2, 3, 5, 4)  # (B, H, S, D)


def run(function, inputs, *contexts):
    """function(*inputs) inside rectify contexts, each a pair of its module (or None) and its settings."""
    with contextlib.ExitStack() as stack:
        for module, settings in contexts:
            stack.enter_context(erg.rectify(module, **settings))
        return function(*inputs)


class Text(nn.Module):
    """Attention and a shortcut: what `chain` computes by hand."""

    def forward(self, x):
        return x + F.scaled_dot_product_attention(x, x, x)


def chain(x, taus):
    """What modules of Text make of x one after the other, tempered by taus."""
    for tau in taus:
        x = x + erg.energy_attention(x, x, x, tau=tau)
    return x


class Loop(nn.Module):
    """Attends to one sample after the other, as diffusers' Mochi does; or to pairs of rows, as video models do."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def forward(self, x, *_):  # (B, H, S, D)
        if self.rows == "one by one":
            return torch.cat([F.scaled_dot_product_attention(row, row, row) for row in x.split(1)])
        y = x.unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1)  # (2 B, H, S / 2, D)
        return F.scaled_dot_product_attention(y, y, y).unflatten(0, (-1, 2)).transpose(1, 2).flatten(2, 3)


class Joint(nn.Module):
    """Self-attention over x, then cross-attention to y, then self-attention, in one forward of functions."""

    def forward(self, x, y):  # (B, H, S, D), (B, H, N, D)
        x = x + F.scaled_dot_product_attention(x, x, x)
        x = x + F.scaled_dot_product_attention(query=x, key=y, value=y)
        return x + F.scaled_dot_product_attention(x, x, x)


def by_hand(model, layers, rows, queries, **settings):
    """A copy of the model whose chosen blocks compute energy attention themselves, with no interception."""
    class Hand(type(model.blocks[0].attention)):
        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            q, k = self.q_norm(q), self.k_norm(k)
            plain = F.scaled_dot_product_attention(q, k, v)
            part = erg.energy_attention(q[rows], k[rows], v[rows], queries=queries, **settings)
            out = plain.clone()
            out[rows] = part
            return self.out(out.transpose(1, 2).flatten(2))

    changed = copy.deepcopy(model)
    for number in layers:
        changed.blocks[number].attention.__class__ = Hand
    return changed


@pytest.mark.parametrize("scoped", [True, False])
@pytest.mark.parametrize("rows", [None, slice(1, 3)])
def test_tau_one_is_bit_identical(model, inputs, scoped, rows):
    """tau = 1 leaves every bit of the output as it is, also on repeated forwards."""
    for _ in range(3):
        assert torch.equal(run(model, inputs, (model if scoped else None, dict(tau=1.0, rows=rows))), model(*inputs))


@pytest.mark.parametrize("scoped", [True, False])
@pytest.mark.parametrize("settings", [dict(tau=0.01), dict(tau=0.1, alpha=0.7), dict(tau=2.0, gamma=0.5, K=3)])
@pytest.mark.parametrize("rows", [slice(None), slice(2, 4)])
@pytest.mark.parametrize("queries", [None, slice(0, 16)])
def test_equal_to_a_model_changed_by_hand(model, inputs, scoped, settings, rows, queries):
    """Layers, rows and queries give what attention by hand gives, gradients too; other rows keep every bit."""
    plain, x = model(*inputs), inputs[0].clone().requires_grad_()
    expected = by_hand(model, {1, 4}, rows, queries, **settings)(x, *inputs[1:])
    given = dict(layers={1, 4}, rows=None if rows == slice(None) else rows, queries=queries, **settings)
    for _ in range(2):
        result = run(model, (x, *inputs[1:]), (model if scoped else None, given))
        same(result, expected)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (result, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-9)
    moved = (result - plain).flatten(1).norm(dim=1)
    assert (moved[rows] > 1e-3).all() and (rows == slice(None) or torch.equal(result[:2], plain[:2]))


def test_every_layer_bites(model, inputs):
    """Each layer number changes the output, each in its own way, and None is all of them."""
    results = [run(model, inputs, (model, dict(tau=0.1, layers=layers))) for layers in [*([n] for n in range(6)), None]]
    results.append(model(*inputs))
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(results) for b in results[:i])
    assert torch.equal(run(model, inputs, (model, dict(tau=0.1, layers=range(6)))), results[6])


def test_attention_calls_lists_numbers_shapes_and_modules(model, inputs):
    """attention_calls names each call's kind, number, owner and shapes, in order."""
    calls = erg.attention_calls(model, *inputs)
    assert [(c.kind, c.number, c.module) for c in calls] == [("self", n, f"blocks.{n}.attention") for n in range(6)]
    assert all(c.query == c.key == (4, 4, 22, 8) for c in calls)  # 16 image and 6 caption tokens
    calls, x, y = erg.attention_calls(Joint(), X, example(2, 3, 7, 4)), (2, 3, 5, 4), (2, 3, 7, 4)
    assert [tuple(call) for call in calls] == [
        ("self", 0, "(the model)", x, x), ("cross", 0, "(the model)", x, y), ("self", 1, "(the model)", x, x)]
    assert str(calls).splitlines() == ["kind   number  module       heads  queries  keys",
                                       "self        0  (the model)      3        5     5",
                                       "cross       0  (the model)      3        5     7",
                                       "self        1  (the model)      3        5     5",
                                       "middle third of self-attention: range(0, 2)"]


@pytest.mark.parametrize("length", [7, 5])  # 5: as long as x
def test_self_and_cross_attention_are_numbered_apart(length):
    """"self" is the default, "cross" reaches the others, "all" numbers them in their order, whatever their lengths."""
    y, model, attend = example(2, 3, length, 4), Joint().eval(), F.scaled_dot_product_attention
    first = X + attend(X, X, X)
    second = first + attend(first, y, y)
    weak, mean = first + erg.energy_attention(first, y, y, tau=0.1), first + y.mean(2, keepdim=True)
    for scope in (model, None):
        under = lambda **settings: run(model, (X, y), (scope, settings))
        same(under(tau=0.1, layers=[1], kind="all"), weak + attend(weak, weak, weak))
        if length == 7:
            same(under(tau=0.0, layers=[1]), second + second.mean(2, keepdim=True))
            same(under(tau=0.0, kind="cross"), mean + attend(mean, mean, mean))
    assert [c.kind for c in erg.attention_calls(model, X, y)] == ["self", "cross" if length == 7 else "self", "self"]
    with pytest.raises(RuntimeError, match="layer 3 was not rectified.* 3 times"):
        under(tau=0.1, layers=[3], kind="all")


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["body", "forward"])
def test_the_model_and_torch_are_left_as_they_were(model, inputs, error, where):
    """Afterwards outputs, state and functions are what they were; also after an exception or an interrupt. A copy is ordinary."""
    plain, before = model(*inputs), {name: value.clone() for name, value in model.state_dict().items()}

    def spoil(*_):
        raise error

    for _ in range(2):
        hook = model.blocks[3].attention.out.register_forward_hook(spoil) if where == "forward" else None
        with pytest.raises(error), erg.rectify(model, tau=0.1, layers=[1]):
            twin = copy.deepcopy(model)
            model(*inputs)
            assert torch.equal(twin(*inputs), plain)
            spoil()
        _ = hook and hook.remove()
        assert F.scaled_dot_product_attention is erg._plain and not erg._open and not erg._thread.active
        assert F.multi_head_attention_forward is erg._plain_multi_head and torch.backends.mha.get_fastpath_enabled()
        assert torch.equal(model(*inputs), plain) and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("scoped", [(True, True), (True, False), (False, True), (False, False)])
def test_contexts_nest(model, inputs, scoped):
    """Two contexts at once act like both by hand, whatever layers, steps and rows they share."""
    outer, inner = (model if s else None for s in scoped)
    late, steps = dict(tau=0.5, layers=[5]), dict(tau=0.2, gamma=0.5, K=3, layers=[2])
    under = lambda *contexts: run(model, inputs, *contexts)
    for _ in range(3):
        same(under((outer, dict(tau=0.5, layers=[1, 2])), (inner, dict(tau=0.2, layers=[2, 4]))),
             under(*((model, dict(tau=tau, layers=[n])) for n, tau in ((1, 0.5), (2, 0.1), (4, 0.2)))))
        same(under((outer, late), (inner, steps)), under((model, steps), (model, late)))  # three steps are one layer
    result = under((model, dict(tau=0.5, rows=slice(0, 1))), (model, dict(tau=0.2, rows=slice(2, 4))))
    same(result, under((model, dict(tau=torch.tensor([0.5, 1.0, 0.2, 0.2], dtype=torch.float64)))))
    result = under((model, dict(tau=0.5, layers=[2], rows=slice(0, 1))), (model, dict(steps, rows=slice(2, 4))))
    same(result[:1], under((model, dict(tau=0.5, layers=[2])))[:1])
    same(result[2:], under((model, steps))[2:])


def test_the_context_opened_last_is_applied_first():
    """Of the contexts of a model and of its child the one opened last answers first, through the other one."""
    model, first, second = nn.Sequential(Text(), Text()).eval(), dict(tau=0.5, gamma=0.7, K=2), dict(tau=0.2, gamma=0.8, K=2)
    y = q = chain(X, [1])
    for _ in range(2):  # the inner one's two steps, each through the outer one, whose beta is the inner's tau * beta
        q = q - 0.8 * (q - erg.energy_attention(q, y, y, scale=0.2 * q.shape[-1]**-0.5, **first))
    whole, child = (model, 1), (model[1], 0)
    for (outer, n), (inner, m) in ((whole, child), (child, whole)):
        same(run(model, (X,), (outer, dict(first, layers=[n])), (inner, dict(second, layers=[m]))), y + q)
    same(model(X), chain(X, [1, 1]))


def test_threads_do_not_mix(model, inputs):
    """A context acts in its own thread alone, and each counts its own layers."""
    work = lambda layer: run(model, inputs, (None, dict(tau=0.1, layers=[layer]))) if layer else model(*inputs)
    layers = (1, 4, None)
    expected = [work(layer) for layer in layers]
    with ThreadPoolExecutor(3) as pool, erg.rectify(model, tau=0.5, layers=[2]):
        model(*inputs)
        futures = [pool.submit(lambda layer=layer: [work(layer) for _ in range(30)]) for layer in layers]
        results = [future.result() for future in futures]
    assert all(torch.equal(result, one) for one, made in zip(expected, results) for result in made)


def test_a_model_inside_itself():
    """A forward entered again before it ended has its own numbers, and the outer one's go on where they were."""
    class Nested(nn.Module):
        def forward(self, x, depth=0):  # attention 0, then itself once, then attention 1
            x = chain(x, [1])
            return chain(x + self(x, depth=1) if depth == 0 else x, [1])

    for layer, taus in ((0, (0.1, 1.0)), (1, (1.0, 0.1))):
        x = chain(X, taus[:1])
        model = Nested().eval()
        for _ in range(2):
            with erg.rectify(model, tau=0.1, layers=[layer]):
                same(model(X), chain(x + chain(x, taus), taus[1:]))


def values(q, k, v, **options):
    """Identity attention (PAG), which calls no attention function."""
    return v


def test_another_attention_function(model, inputs):
    """`attention` replaces energy attention for chosen queries and rows, and counts as one call to an outer context."""
    class Identity(type(model.blocks[0].attention)):
        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
            out[2:, :, :16] = v[2:, :, :16]
            return self.out(out.transpose(1, 2).flatten(2))

    expected = copy.deepcopy(model)
    expected.blocks[3].attention.__class__ = Identity
    for _ in range(2):
        with erg.rectify(model, attention=values, layers=[3], rows=slice(2, 4), queries=slice(0, 16)):
            same(model(*inputs), expected(*inputs))
    outer, pag = dict(tau=0.1, layers=[1]), (model, dict(attention=values, layers=[0]))
    same(run(model, inputs, (None, outer), pag), run(model, inputs, pag, (model, outer)))


@pytest.mark.parametrize("part", [{}, dict(queries=slice(3)), dict(rows=slice(1)), dict(queries=slice(3), rows=slice(1))])
def test_an_attention_function_under_autocast(part):
    """Under autocast an attention function may return that type, for all as for chosen rows and queries."""
    model, x = nn.Sequential(Text(), Text()).eval(), X.float()
    attend = lambda *args, **options: erg.energy_attention(*args, tau=0.1, **options).bfloat16()
    expected = run(model, (x,), (model, dict(tau=0.1, layers=[1], **part)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = run(model, (x,), (model, dict(attention=attend, layers=[1], **part)))
    torch.testing.assert_close(result, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("shape", [(4, 1, 5, 5), (5, 5), (1, 2, 5, 5)])
def test_masks_follow_their_rows(shape):
    """A mask with a batch dimension is cut with the rows; one without is shared."""
    x, mask, settings = example(4, 2, 5, 8), example(*shape), dict(tau=0.3, gamma=0.5, K=2)
    attend = lambda: F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
    result = run(attend, (), (None, dict(rows=slice(1, 3), **settings)))
    same(result[1:3], erg.energy_attention(x, x, x, attn_mask=mask, **settings)[1:3])
    same(result[[0, 3]], attend()[[0, 3]])


@pytest.mark.parametrize("settings", [dict(layers=[2]), dict(layers=[2], gamma=0.5, K=2)])
def test_tau_per_row(model, inputs, settings):
    """A tensor with an entry of tau for each chosen row does what the numbers do, also with gamma and K."""
    result = run(model, inputs, (model, dict(tau=torch.tensor([0.01, 3.0]), rows=slice(1, 3), **settings)))
    for row, tau in ((1, 0.01), (2, 3.0)):
        alone = run(model, inputs, (model, dict(tau=tau, **settings)))
        torch.testing.assert_close(result[row], alone[row], rtol=0, atol=1e-6)
    assert torch.equal(result[[0, 3]], model(*inputs)[[0, 3]])


def test_when_is_kappa_inside_another_sampler(model, inputs):
    """`when` sees the forward's arguments; where it is False the forward is ordinary; a `when` that is never true warns."""
    x, _, condition = inputs
    at = lambda t: model(x, torch.full((4,), t), condition)
    for _ in range(2):
        with erg.rectify(model, tau=0.1, layers=[2], when=lambda x, t, condition: t[0] > 0.5):
            early, late = at(0.5), at(0.51)
        assert torch.equal(early, at(0.5)) and (late - at(0.51)).abs().max() > 1e-3
    plain = at(0.5)
    with pytest.warns(UserWarning, match="true in none of 2 forwards"):
        with erg.rectify(model, tau=0.1, when=lambda *args: False):
            assert torch.equal(at(0.5), plain) and torch.equal(at(0.5), plain)


def test_only_inside_the_given_module(model, inputs):
    """Given a module, attention elsewhere in the context is ordinary."""
    elsewhere = lambda: (F.scaled_dot_product_attention(X, X, X), model.encoder.blocks[0].attention(inputs[2]))
    plain = elsewhere()
    with erg.rectify(model, tau=0.0):
        assert all(map(torch.equal, elsewhere(), plain))
        model(*inputs)
        assert all(map(torch.equal, elsewhere(), plain))


def test_layers_are_numbered_as_they_run():
    """Layer n is the n-th attention call of each forward, also when blocks are skipped; once, a warning speaks of caches."""
    class Skipping(nn.Module):
        def forward(self, x, used):
            return chain(x, [1] * used)

    model = Skipping().eval()
    for used in (3, 6, 2):
        same(run(model, (X, used), (model, dict(tau=0.1, layers=[1]))), chain(X, [1, 0.1] + [1] * (used - 2)))
    with pytest.raises(RuntimeError, match="layer 2 was not rectified.* 2 of kind 'self'"):
        run(model, (X, 2), (model, dict(tau=0.1, layers=[2])))
    with pytest.warns(UserWarning, match="made 4 attention calls of kind 'self', and others made 2.*cache") as warned:
        with erg.rectify(model, tau=0.1, layers=[1]):
            for used in (2, 4, 2, 4):
                same(model(X, used), chain(X, [1, 0.1] + [1] * (used - 2)))
    assert len(warned) == 1


def test_the_middle_third():
    """The middle third of a model's layers leaves out a text encoder's own; a tie leaves out none; no layer is an error."""
    def calls(*lengths):
        kinds = ["self" if queries == keys else "cross" for queries, keys in lengths]
        return erg.AttentionCalls(erg.AttentionCall(kind, kinds[:i].count(kind), "m", (1, 2, queries, 8), (1, 2, keys, 8))
                                  for i, (kind, (queries, keys)) in enumerate(zip(kinds, lengths)))

    assert calls(*[(9, 9)] * 8).middle_third() == range(3, 5)  # the range that the suggestions' table ranks
    for n in range(3, 60):
        assert calls(*[(9, 9)] * n).middle_third() == range(round(n / 3), round(2 * n / 3))
    assert calls((9, 9)).middle_third() == range(0, 1)
    assert calls(*[(4, 4)] * 2, *[(9, 9), (9, 4)] * 6).middle_third() == range(4, 6)
    assert calls(*[(4, 4)] * 3, *[(9, 9)] * 3).middle_third() == range(2, 4)
    assert calls((9, 9), (9, 4), (9, 4), (9, 4)).middle_third("cross") == range(1, 2)
    with pytest.raises(ValueError, match="kind='self' must be that of one of the 1 attention calls"):
        calls((9, 4)).middle_third()
    assert "middle third" not in str(calls((9, 4)))


def test_names_of_arguments_and_hooks_of_the_user():
    """Arguments may have the names that erg.py uses itself, and a user's hooks run as they do without a context."""
    model, seen = nn.Sequential(Text(), Text()).eval(), []
    model.forward = lambda x, **added: nn.Sequential.forward(model, x) + sum(added.values())
    for where in (model, model[1]):
        for register in (where.register_forward_pre_hook, where.register_forward_hook):
            for each in (False, True):
                register(lambda *given, note=(str(register), each): seen.append((note, len(given))), with_kwargs=each)
    names = dict.fromkeys("run this really part around module model args kwargs query".split(), 1)
    same(model(X, **names), chain(X, [1, 1]) + 10)
    for _ in range(3):
        with erg.rectify(model, tau=0.1, layers=[1], when=lambda x, **given: given == names):
            same(model(X, **names), chain(X, [1, 0.1]) + 10)
    assert len(seen) == 4 * 8 and seen == 4 * seen[:8]


# Nothing is silently left out


def test_layers_that_were_not_met(model, inputs):
    """A layer that the model does not have is an error with the number of calls, which tells caches from other kernels."""
    eager, cached = lambda x: torch.softmax(x @ x.mT, -1) @ x, lambda x: F.scaled_dot_product_attention(x[:, :, :1], x, x)
    nothing, missed = nn.Sequential(Text()).eval(), "layer 6 was not rectified.* 6 times, 6 of kind 'self'"
    nothing.forward = lambda x: (nothing[0](x), None)[1]  # no output
    for scoped, layers, function, args, message in (
            (model, [2, 6], model, inputs, missed), (None, [2, 6], model, inputs, missed),
            (nothing, [1], nothing, (X,), "layer 1 was not"), (None, None, eager, (X,), "sdpa"),
            (None, None, cached, (X,), "use_cache=False"),
            (None, None, torch.jit.trace(model, inputs, check_trace=False), inputs, "torch.jit")):
        for _ in range(2):
            with pytest.raises(RuntimeError, match=message), erg.rectify(scoped, tau=0.1, layers=layers):
                function(*args)
    with pytest.raises(RuntimeError, match="was not called in the context"), erg.rectify(copy.deepcopy(model), tau=0.1):
        model(*inputs)


def test_rows_and_queries_beyond_the_tensors(model, inputs):
    """Rows beyond the batch raise, and leave the model as it was; training mode is listed all the same."""
    plain = model(*inputs)
    with pytest.raises(ValueError, match="rows"), erg.rectify(model, tau=0.1, rows=slice(2, 8)):
        model(*inputs)
    assert torch.equal(model(*inputs), plain)
    calls, counting = [], lambda *given, **options: calls.append(given) or F.scaled_dot_product_attention(*given, **options)
    with erg.rectify(attention=counting), erg.rectify(tau=0.1, rows=slice(1, 2), batch=2):
        F.scaled_dot_product_attention(X, X[:1], X[:1])  # keys of one row serve all, in one call
    assert len(calls) == 1
    assert len(erg.attention_calls(model.train(), *inputs)) == 6


@pytest.mark.parametrize("rows, seen", [("one by one", 1), ("folded", 8)])
def test_rows_that_are_not_samples_are_refused(rows, seen):
    """`rows` of a model whose attention has other rows than its arguments is an error; two passes need no rows."""
    model, x, settings = Loop(rows).eval(), example(4, 2, 6, 8), dict(w=2.0, tau_i=0.1, negative="same")
    with pytest.raises(ValueError, match=rf"has {seen} rows where \[4\] were expected.*rows"):
        run(model, (x,), (model, dict(tau=0.1, rows=slice(0, 1))))
    weak = run(model, (x,), (model, dict(tau=0.1)))
    assert (weak - model(x)).abs().max() > 1e-3
    message = "does not fit the 1 rows" if seen == 1 else r"has 16 rows where \[8\] were expected.*batched=False"
    with pytest.raises(ValueError, match=message):
        erg.Guidance(erg.ERG(**settings))(model, x, 0.5)
    same(erg.Guidance(erg.ERG(**settings, batched=False))(model, x, 0.5), 2 * model(x) - weak)


# Where the function is called by another way


def test_modules_of_torch_are_reached():
    """nn.MultiheadAttention without weights and nn.TransformerEncoder give what attention by hand gives."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, dropout=0.0, batch_first=True), 2).eval().double()
    x = example(2, 5, 16)
    attention = encoder.layers[1].self_attn

    def by_hand(self, x, *_, **__):
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return self.out_proj(erg.energy_attention(q, k, v, tau=0.1).transpose(1, 2).flatten(2))

    with torch.no_grad():
        plain = attention(x, x, x, need_weights=False)[0]
        without = functools.partial(attention, need_weights=False)
        same(run(without, (x, x, x), (attention, dict(tau=0.1)))[0], by_hand(attention, x))
        result = run(encoder, (x,), (encoder, dict(tau=0.1, layers=[1])))
        attention.forward = lambda q, *_, **__: (by_hand(attention, q), None)
        encoder.layers[1].activation_relu_or_gelu = 0  # so that its fast path is not taken
        same(result, encoder(x))
        del attention.forward
        assert torch.backends.mha.get_fastpath_enabled() and (plain - by_hand(attention, x)).abs().max() > 1e-3


def test_attention_with_weights_is_out_of_reach():
    """nn.MultiheadAttention with weights is an error, also where layers=None and other attention was reached."""
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0] + F.scaled_dot_product_attention(x, x, x)

    model, x = Half().eval(), torch.randn(2, 5, 16)
    for module, args in ((model, (x,)), (model.attention, (x, x, x))):
        with pytest.raises(RuntimeError, match="was not rectified.*need_weights=True"), erg.rectify(module, tau=0.1):
            module(*args)
        assert "out of reach" in str(erg.attention_calls(module, *args))
    with erg.rectify(model, tau=0.1, layers=[0]):  # what was chosen is reached
        assert (model(x) - Half.forward(model, x)).abs().max() > 0


def test_a_name_imported_from_torch_is_reached(tmp_path, monkeypatch):
    """A file that says `from torch.nn.functional import scaled_dot_product_attention` is reached by its own name for it."""
    (tmp_path / "by_name.py").write_text("""from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa


class Model(nn.Module):
    def forward(self, x):
        return x + sdpa(x, x, x)
""")
    monkeypatch.syspath_prepend(tmp_path)
    run(Text(), (X,), (None, dict(tau=0.1)))  # the modules that were loaded before are looked through
    import by_name
    model = by_name.Model().eval()
    for module in (model, None):
        same(run(model, (X,), (module, dict(tau=0.1))), chain(X, [0.1]))
    same(model(X), chain(X, [1]))
    assert by_name.sdpa is F.scaled_dot_product_attention is erg._plain
    assert len(erg.attention_calls(model, X)) == 1


def test_methods_that_do_not_call_the_model():
    """A method that calls `forward` itself is an error that says what to do: rectify without the model around it."""
    class Sampler(Text):
        def forward_with_cfg(self, x):
            return self.forward(x)

    sampler = Sampler().eval()
    with pytest.raises(RuntimeError, match="without the model around each call"), erg.rectify(sampler, tau=0.1):
        sampler.forward_with_cfg(X)
    with erg.rectify(tau=0.1):
        result = sampler.forward_with_cfg(X)
    same(result, chain(X, [0.1]))


def test_another_replacement_of_the_function_is_kept(monkeypatch):
    """What a user puts in the place of the function before a context is used in it, and is there after it."""
    plain, calls, model = F.scaled_dot_product_attention, [], nn.Sequential(Text(), Text()).eval()
    kernel = lambda *args, **kwargs: calls.append(args) or plain(*args, **kwargs)
    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    result = run(model, (X,), (model, dict(tau=0.1, layers=[1])))
    assert len(calls) == 2 and F.scaled_dot_product_attention is kernel
    same(result, chain(X, [1, 0.1]))


# What others do meanwhile


def test_contexts_of_two_threads_overlap():
    """Contexts on one model that close in another order than they opened leave nothing behind, in any thread."""
    model, results, opened, closed = Text().eval(), [], threading.Event(), threading.Event()

    def other():
        with erg.rectify(model, tau=0.5):
            opened.set()
            closed.wait(10)
            results.append(model(X))

    thread = threading.Thread(target=other)
    with erg.rectify(model, tau=0.1):
        thread.start()
        opened.wait(10)
        same(model(X), chain(X, [0.1]))
    closed.set()
    thread.join()
    same(results[0], chain(X, [0.5]))
    same(model(X), chain(X, [1]))
    assert F.scaled_dot_product_attention is erg._plain and not erg._open


def test_a_forward_that_is_replaced_in_the_context():
    """Offloading replaces a model's forward, and puts another one back, while it is rectified: it stays so."""
    model = Text().eval()
    with erg.rectify(model, tau=0.1):
        same(model(X), chain(X, [0.1]))
        model.forward = lambda x, own=model.forward: own(x)
        same(model(X), chain(X, [0.1]))
        del model.forward
        same(model(X), chain(X, [0.1]))
    same(model(X), chain(X, [1]))


def test_functions_of_the_user():
    """A user's kernel is used, and takes what is no tensor by name; a patch undone after the context does no harm."""
    plain = F.scaled_dot_product_attention
    try:
        F.scaled_dot_product_attention = lambda q, k, v, **options: plain(q, k, v, **options)
        same(run(Text(), (X,), (None, dict(tau=0.1))), chain(X, [0.1]))
        F.scaled_dot_product_attention = plain
        same(run(Text(), (X,), (None, dict(tau=0.1))), chain(X, [0.1]))
        F.scaled_dot_product_attention = erg._attend  # as a patch leaves it that was begun inside the context
        same(Text()(X), chain(X, [1]))
        same(run(Text(), (X,), (None, dict(tau=0.1))), chain(X, [0.1]))
    finally:
        F.scaled_dot_product_attention = plain


def test_whole_numbers_of_numpy(model, inputs):
    """numpy's whole numbers are whole numbers."""
    import numpy as np
    with erg.rectify(model, tau=np.float64(0.1), layers=[1, 2], K=2, gamma=0.5, rows=slice(1, 3)):
        expected = model(*inputs)
    rows = slice(np.int64(1), np.int64(3))
    with erg.rectify(model, tau=np.float64(0.1), layers=np.arange(1, 3), K=np.int64(2), gamma=0.5, rows=rows):
        assert torch.equal(model(*inputs), expected)
