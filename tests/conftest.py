"""What several test files share: a tiny model whose every weight matters."""
import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores, and so do those that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tiny_dit import Config, TinyDiT  # noqa: E402
from toy.files import DataError  # noqa: E402

WORDS = ("a", "red", "blue", "seven", "two", "on")


def random_model(seed=0, **settings):
    """A TinyDiT with random weights everywhere, also where adaLN-Zero starts at zero, in float64."""
    torch.manual_seed(seed)
    model = TinyDiT(Config(**{**dict(width=32, heads=4, depth=6, text_depth=3, vocabulary=WORDS), **settings}))
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.constant_(parameter, 2.0)  # attention far from uniform
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[1]**-0.5)
        else:
            torch.nn.init.normal_(parameter, std=0.7)
    return model.double().eval().requires_grad_(False)


@pytest.fixture
def model():
    return random_model()


@pytest.fixture
def inputs(model):
    """x (4, 3, 8, 8), t (4,), condition (4, L, W)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.full((4,), 0.6), model.encode(["a red seven", "a blue two on red", "seven", ""])


def check(call, words):
    """One error, of a kind that the scripts report in a line, which holds each of the words (apart by "|")."""
    with pytest.raises((ValueError, RuntimeError, DataError)) as error:
        call()
    assert all(word in str(error.value) for word in words.split("|")), str(error.value)
    assert not isinstance(error.value, NotImplementedError)


@pytest.fixture
def afresh():
    """Nothing that an earlier test compiled, and more than the usual 8 graphs for one function."""
    torch._dynamo.reset()
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    with torch._dynamo.config.patch({limit: 64}):
        yield
    torch._dynamo.reset()


def pytest_ignore_collect(collection_path, config):
    """`-m gpu` looks at the one file that has such tests: a machine with a GPU may lack what the others import."""
    other = collection_path.suffix == ".py" and collection_path.name != "test_gpu.py"
    return True if other and config.getoption("markexpr") == "gpu" else None
