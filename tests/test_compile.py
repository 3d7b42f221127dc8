"""Rectified models under torch.compile and CUDA graphs: the same numbers, no graph break, no needless compilation."""
import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import erg
from conftest import random_model
from test_rectify import Loop, Text, chain, example, run, same

pytestmark = [pytest.mark.usefixtures("afresh"), pytest.mark.filterwarnings("ignore:parts of .* are compiled on their own")]
WHOLE, PARTS = ["torch.compile(model)"], ["block.compile()", "torch.compile(block)"]
X = example(4, 3, 5, 4)


class Graphs:
    """A back end that counts the graphs that it is given, and runs them like "aot_eager"."""

    def __init__(self):
        self.count, self.backend = 0, torch._dynamo.lookup_backend("aot_eager")

    def __call__(self, graph, inputs, **kwargs):
        self.count += 1
        return self.backend(graph, inputs, **kwargs)


class Blocks(nn.Sequential):
    """Blocks of attention and nothing else, which compile in a moment."""

    blocks = property(lambda self: self)

    def forward(self, x, t=None, condition=None):
        return super().forward(x)


@pytest.fixture
def texts():
    return Blocks(*(Text() for _ in range(3))).eval()


@pytest.fixture
def model():
    """Fewer layers than elsewhere: each takes a second to compile."""
    return random_model(depth=2)


def compiled(model, how, graphs):
    """A copy of the model, compiled as a whole or block by block. fullgraph: an error instead of a graph break."""
    model = copy.deepcopy(model)
    if how == "torch.compile(model)":
        return torch.compile(model, backend=graphs, fullgraph=True)
    for i, block in enumerate(model.blocks if how in PARTS else ()):
        if how == "block.compile()":
            block.compile(backend=graphs, fullgraph=True)
        else:
            model.blocks[i] = torch.compile(block, backend=graphs, fullgraph=True)
    return model


def uniform(q, k, v, **options):
    return v.mean(-2, keepdim=True).expand(*q.shape)


@pytest.mark.parametrize("small, how", [*((True, how) for how in WHOLE + PARTS), (False, WHOLE[0])])
def test_compiled_models_give_the_same_without_graph_breaks(texts, model, inputs, small, how):
    """Plain and rectified forwards of a compiled model agree with the eager ones; contexts opened again compile nothing."""
    model, inputs, graphs, counts = texts if small else model, (X,) if small else inputs, Graphs(), []
    fast, plain = compiled(model, how, graphs), model(*inputs)
    same(fast(*inputs), plain)
    assert graphs.count == 1
    every = (dict(tau=0.1, layers=[0, 1], rows=slice(2, 4)), dict(tau=2.0, alpha=0.7, gamma=0.5, K=2, layers=[0, 1]),
             dict(tau=0.2, layers=[1], queries=slice(0, 4)), dict(attention=uniform, layers=[1], rows=slice(0, 2)),
             dict(tau=torch.tensor([0.01, 3.0]), layers=[1], rows=slice(1, 3)))
    for settings in every if small else every[:2]:
        expected = run(model, inputs, (model, settings))
        assert (expected - plain).abs().max() > 1e-3
        for _ in range(3):
            same(run(fast, inputs, (fast, settings)), expected)
            counts.append(graphs.count)
            same(fast(*inputs), plain)
        assert graphs.count == counts[-3]
    blocks = len(model.blocks) if how in PARTS else 1
    assert graphs.count <= 1 + 2 * 5 * blocks  # one for each setting; a second where a number is made dynamic


@pytest.mark.filterwarnings("ignore:when=... was true in none")
@pytest.mark.parametrize("how", WHOLE + PARTS)
def test_kappa_under_compile(texts, how):
    """`when` is asked outside of the graph: forwards before kappa are the plain ones."""
    graphs = Graphs()
    fast = compiled(texts, how, graphs)
    for t in (0.1, 0.5, 0.2, 0.6):
        with erg.rectify(fast, tau=0.1, layers=[2], when=lambda x, t, c: t[0] > 0.3):
            same(fast(X, torch.full((4,), t), None), chain(X, [1, 1, 0.1 if t > 0.3 else 1]))
    assert how in PARTS or graphs.count == 2


@pytest.mark.parametrize("how, backend", [*((how, "aot_eager") for how in WHOLE + PARTS), (WHOLE[0], "eager")])
def test_nested_contexts_under_compile(texts, how, backend):
    """The inner of two contexts is applied first, once, also if a back end runs a graph's torch calls in the open."""
    fast, outer, inner = compiled(texts, how, backend), dict(tau=0.5, gamma=0.5), dict(tau=0.2, gamma=0.8, K=2)
    nested = lambda model, a, b: run(model, (X,), (model, dict(outer, layers=a)), (model, dict(inner, layers=b)))
    other = run(texts, (X,), (texts, dict(inner, layers=[1])), (texts, dict(outer, layers=[1])))
    assert (nested(texts, [1], [1]) - other).abs().max() > 1e-6  # the order matters
    for layers in (([0, 1], [1, 2]), ([0], [1]), ([1], [1]), ([2], [1])):
        for _ in range(2):
            same(nested(fast, *layers), nested(texts, *layers))
    if backend == "eager":  # all that runs in a context is one forward
        for n, taus in 2 * ((0, [0.5, 0.1, 1]), (1, [1, 0.05, 1]), (2, [1, 0.1, 0.5])):
            same(run(fast, (X,), (None, dict(tau=0.5, layers=[n])), (fast, dict(tau=0.1, layers=[1]))), chain(X, taus))
    same(fast(X), texts(X))


@pytest.mark.parametrize("how", PARTS)
def test_contexts_of_a_model_and_of_its_compiled_block(how):
    """A context of a compiled block inside that of its model acts in every forward, and the model's warns."""
    fast = compiled(Blocks(*(nn.Sequential(Text()) for _ in range(3))).eval(), how, "aot_eager")
    if how == "block.compile()":  # which does not see the block's own hooks
        with pytest.raises(ValueError, match="compiled in place.*use torch.compile"), erg.rectify(fast[2], tau=0.2):
            raise AssertionError("the body must not run")
        return
    for _ in range(3):
        with pytest.warns(UserWarning, match="parts of Blocks are compiled on their own.*recompile_limit"):
            result = run(fast, (X,), (fast, dict(tau=0.5, layers=[1])), (fast[2], dict(tau=0.2)))
        same(result, chain(X, [1, 0.5, 0.2]))


def test_the_default_back_end(texts):
    """Inductor tempers once, too."""
    fast = compiled(texts, WHOLE[0], "inductor")
    for _ in range(2):
        same(run(fast, (X,), (fast, dict(tau=0.1, layers=[1]))), chain(X, [1, 0.1, 1]))
        same(fast(X), texts(X))


@pytest.mark.parametrize("how", WHOLE + PARTS)
def test_errors_leave_a_compiled_model_as_it_was(texts, how):
    """Layers out of range, a body that fails, another thread: one error or none, and the plain model afterwards."""
    fast, plain = compiled(texts, how, "aot_eager"), texts(X)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="layer 6 was not rectified"):
            run(fast, (X,), (fast, dict(tau=0.1, layers=[2, 6])))
        with pytest.raises(KeyError), erg.rectify(fast, tau=0.1, layers=[2]):
            raise {}[fast(X)]
    with pytest.raises(Exception, match="4 dimensions|4 dims|at least|shape|unpack"):  # the model's own
        run(fast, (X[0, 0, 0],), (fast, dict(tau=0.1, layers=[2])))
    same(fast(X), plain)
    with ThreadPoolExecutor(1) as pool, erg.rectify(fast, tau=0.1, layers=[2]):
        fast(X)
        if how in WHOLE:  # the limit of graphs that the fixture raises holds in this thread alone
            same(pool.submit(fast, X).result(), plain)
    assert F.scaled_dot_product_attention is erg._plain


def test_attention_calls_of_compiled_models(model, inputs):
    """Compiled models are listed like others, and nothing is compiled for it."""
    graphs, expected = Graphs(), erg.attention_calls(model, *inputs)
    for how in [*WHOLE, "block.compile()"]:
        assert erg.attention_calls(compiled(model, how, graphs), *inputs) == expected
    assert graphs.count == 0


@pytest.mark.parametrize("settings", [dict(tau=0.1), dict(tau=0.0, queries=slice(1, 4)), dict(alpha=0.5, gamma=0.7, K=3)])
def test_energy_attention_compiles(settings):
    """A model that calls energy_attention itself compiles without a graph break."""
    q, k, v = example(3, 2, 4, 5, 8).unbind()
    fast = torch.compile(erg.energy_attention, backend="aot_eager", fullgraph=True)
    same(fast(q, k, v, **settings), erg.energy_attention(q, k, v, **settings))


def test_a_new_tensor_tau_compiles_nothing(texts):
    """Another float tau compiles again; another 0-dimensional tensor does not."""
    graphs, counts = Graphs(), []
    fast = compiled(texts, WHOLE[0], graphs)
    for tau in (0.1, 0.2, torch.tensor(0.1), torch.tensor(0.2), torch.tensor(0.3)):
        same(run(fast, (X,), (fast, dict(tau=tau, layers=[2]))), chain(X, [1, 1, tau]))
        counts.append(graphs.count)
    assert counts[1] > counts[0] and counts[2] == counts[3] == counts[4]


@pytest.mark.parametrize("how", WHOLE + PARTS)
def test_rows_that_are_not_samples_are_refused_under_compile(how):
    """A compiled model that folds space into the batch is refused as an eager one is, by rectify and by Guidance."""
    x, settings = example(4, 2, 6, 8), erg.ERG(w=2.0, tau_i=0.1, negative="same")
    fast = compiled(Blocks(Loop("folded")).eval(), how, "aot_eager")
    for scoped in (True, False):
        run(fast, (x,), (fast, dict(tau=0.1)))
        with pytest.raises(ValueError, match=r"has 8 rows where \[4\] were expected"):
            run(fast, (x,), (fast if scoped else None, dict(tau=0.1, rows=slice(2, 4), batch=None if scoped else 4)))
        with pytest.raises(ValueError, match=r"has 16 rows where \[8\] were expected.*batched=False"):
            erg.Guidance(settings)(fast if scoped else lambda *args: fast(*args), x, 0.5)


# CUDA graphs


class Waits(TorchDispatchMode):
    """Counts operations that a CUDA graph cannot capture: those that wait for the device, or copy from the host."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("_local_scalar_dense", "_to_copy", "lift_fresh", "nonzero", "equal"):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [
    dict(tau=0.1), dict(tau=0.0), dict(tau=0.1, rows=slice(2, 4)), dict(tau=0.1, queries=slice(0, 16), rows=slice(2, 4)),
    dict(tau=torch.tensor([0.1, 0.2], dtype=torch.float64), rows=slice(2, 4)),
    dict(alpha=0.7, gamma=0.5, K=2, rows=slice(2, 4)), dict(attention=uniform, rows=slice(0, 2), queries=slice(0, 16))])
def test_nothing_that_a_cuda_graph_refuses(model, inputs, settings):
    """A rectified forward waits for the device and copies from the host no more often than a plain one."""
    with Waits() as plain:
        model(*inputs)
    with erg.rectify(model, layers=[1], **settings):
        for _ in range(2):
            with Waits() as rectified:
                model(*inputs)
            assert rectified.names == plain.names


def test_a_model_that_was_compiled_in_place():
    """Guidance and rectify without a model are right for one; rectify with it is an error that says what to do."""
    fast, plain = Blocks(Text(), Text()).eval(), Blocks(Text(), Text()).eval()
    fast.compile(backend="aot_eager", fullgraph=True)
    fast(X)
    with erg.rectify(tau=0.1, layers=[1]):
        result = fast(X)
    same(result, chain(X, [1, 0.1]))
    guidance = erg.Guidance(erg.ERG(w=2.0, tau_i=0.1, negative="same"))
    same(guidance(fast, X, 0.5), guidance(plain, X, 0.5))
    with pytest.raises(ValueError, match="use torch.compile.model., and give rectify what it returns"):
        with erg.rectify(fast, tau=0.1):
            raise AssertionError("the body must not run")


def test_attention_inside_other_modules_of_torch_is_numbered():
    """nn.MultiheadAttention in a compiled model has its number among the other calls."""
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 1, batch_first=True)

        def forward(self, x):  # (B, S, 4)
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return (x[:, None] + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]))[:, 0]

    torch.manual_seed(0)
    model, x = Mixed().eval().double().requires_grad_(False), example(2, 5, 4)
    fast = torch.compile(model, backend="aot_eager")
    for layers in ([0], [1], [0, 1], None, [0]):
        with erg.rectify(model, tau=0.1, layers=layers):
            expected = model(x)
        with erg.rectify(fast, tau=0.1, layers=layers):
            same(fast(x), expected)
    same(fast(x), model(x))
