"""experiments/bench.py: what its figures mean. How fast something is, no test asserts."""
import json
import time
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from experiments import bench
from tiny_dit import Config, TinyDiT

OPTIONS = SimpleNamespace(device="cpu", chosen=torch.device("cpu"), dtype=torch.float32, synchronize=lambda: None, seconds=0.0, curves={})


def test_turns_are_taken():
    """Calls are measured in turns; one that sleeps takes at least its own time."""
    order, sleep = [], lambda n: order.append(n) or time.sleep(n / 50)
    spent = bench.turns(OPTIONS, lambda: sleep(1), lambda: sleep(3), least=4)
    assert spent.shape == (4, 2) and order == [1, 1, 3, 3] + 2 * [3, 1, 1, 3]  # each is called twice before
    assert (spent >= torch.tensor([0.02, 0.06])).all()


def test_peak_memory_is_exact():
    """Two tensors that are alive at a time count together, one that is gone does not."""
    def call():
        a = torch.ones(1000, 100)
        b = a + 1
        del a
        return (b * 2).sum()

    assert bench.peak_bytes(OPTIONS, call) == pytest.approx(2 * 400_000, rel=1e-3)


def test_operations_are_counted():
    """The formula has what torch counts in a forward, but for the parts outside of the tokens' own layers."""
    config = Config(image_size=32, width=96, depth=6, vocabulary=("a",))
    model = TinyDiT(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.zeros(2, 3, 32, 32), 0.5, torch.zeros(2, 6, 96))
    assert 2 * bench.flops(config) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("value, goal, expected", [
    (1.02, "≤ 1.02", True), (1.03, "≤ 1.02", False), (1.5, "≥ 1.5", True), (1.4, "≥ 1.5", False),
    (7.0, "", True)])
def test_goals(value, goal, expected):
    """A goal is a bound."""
    assert bench.met(value, goal) is expected


def test_growth_finds_the_exponent(monkeypatch):
    """Times that grow as the square of the work have twice its exponent."""
    monkeypatch.setattr(bench, "turns", lambda o, *calls, least: torch.tensor([[2.0 * call() for call in calls]] * 3))
    monkeypatch.setattr(bench, "step_of", lambda model, n, **settings: lambda: float(n)**2 if n != 2 else model.side**2.0)
    monkeypatch.setattr(bench, "sample", lambda model, x, y, n, guidance: float(n)**2)
    monkeypatch.setattr(bench.erg, "energy_attention", lambda q, k, v, tau, K: float(K)**2)
    model = TinyDiT(Config(vocabulary=("a",)))
    rows = {what.split(",")[0]: value.median().item() for what, value, _ in
            bench.growth(SimpleNamespace(**{**vars(OPTIONS), "quick": False, "digits": model}))}
    assert rows.pop("image tokens") < 1  # linear, where attention's share of the work grows
    assert rows.keys() == {"batch", "K", "sampling steps"} and all(v == pytest.approx(2) for v in rows.values())


def test_a_section_is_written_and_the_others_are_kept(tmp_path):
    """Two calls of a section each leave both in bench.json and in the page; an unknown section is an error."""
    for name in ("memory", "attention"):
        bench.main(sections=[name], quick=True, out=str(tmp_path), device="cpu")
    found, text = json.loads((tmp_path / "bench.json").read_text()), (tmp_path / "bench.md").read_text()
    assert list(found) == ["attention", "memory"] and all(bench.SECTIONS[name].__doc__ in text for name in found)
    assert all(row["quartiles"][0] == pytest.approx(1, abs=0.05) for row in found["memory"]["rows"])
    with pytest.raises(ValueError, match="section='speed'"):
        bench.main(sections=["speed"], quick=True, out=str(tmp_path), device="cpu")
