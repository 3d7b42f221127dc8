"""Notebook 0: sixty lines that are typed along, the same numbers as erg.py, and a cell for a GPU at toy size."""
import dataclasses
import re
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import erg

ROOT = Path(__file__).resolve().parent.parent
SOURCE = (ROOT / "notebooks/0_from_scratch.py").read_text()
FIRST, LAST = "state = torch.load(", "show({\"no guidance\": path[-1], \"CFG\": cfg,"  # what is typed begins and ends here


def cells():
    """The visible code cells of the source."""
    parts = [part.partition("\n") for part in re.split(r"^# %%", SOURCE, flags=re.M)[1:]]
    return [body for head, _, body in parts if not head.strip()]


def cell(line):
    """The one visible code cell with this line in it."""
    found = [body for body in cells() if line in body]
    assert len(found) == 1, line
    return found[0]


def typed():
    """The cells from loading the weights to the guided sample."""
    starts, ends = ([i for i, body in enumerate(cells()) if line in body] for line in (FIRST, LAST))
    return cells()[starts[0]:ends[0] + 1]


def test_what_is_typed_are_sixty_lines_without_erg():
    """As the title says; blank lines and lines of comment are not counted."""
    lines = [line for body in typed() for line in body.splitlines() if line.strip() and line.lstrip()[0] != "#"]
    assert len(lines) == 60 and "in sixty lines" in SOURCE
    assert not [line for line in lines if re.search(r"\berg\.|import", line)]
    assert max(len(body.strip().splitlines()) for body in typed()) <= 15  # small cells
    before = SOURCE[:SOURCE.index(typed()[-1])]
    assert not re.search(r"^(import erg|from erg)\b", before, re.M)


def test_what_is_said_of_its_parts():
    """So many lines replace attention, so many guide, the imports are six at most."""
    count = lambda text: len([line for line in text.splitlines() if line.strip() and line.lstrip()[0] != "#"])
    replaced, guided = cell("def tempered("), cell("def guided(").split("\n\n\n")[0]
    said = re.search(r"(\d+) replace attention and (\d+) guide", SOURCE.replace("\n#", ""))
    assert [count(replaced), count(guided)] == [int(n) for n in said.groups()]
    assert count(cell("from unittest import mock")) <= 6


@pytest.mark.parametrize("tau", [0.0, 0.01, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("layers, queries", [((2, 3), slice(0, 16)), ([0], slice(None)), (range(6), slice(3, 9))])
def test_the_replaced_attention_is_that_of_rectify(tau, layers, queries, model, inputs):
    """On a model with random weights, other layers, queries and temperatures too; afterwards all is as before."""
    names, plain = dict(F=F, mock=mock), F.scaled_dot_product_attention
    exec(cell("def tempered("), names)
    ordinary = model(*inputs)
    for _ in range(2):  # the numbers begin anew
        with names["tempered"](tau, layers, queries):
            v = model(*inputs)
    assert len(names["calls"]) == 6 and F.scaled_dot_product_attention is plain
    with erg.rectify(model, tau=tau, layers=layers, queries=queries):
        torch.testing.assert_close(v, model(*inputs), rtol=0, atol=1e-10)
    assert (v - ordinary).abs().max() < 1e-10 if tau == 1 else (v - ordinary).abs().max() > 1e-3


def test_guidance_written_out_is_that_of_erg(model, inputs):
    """Before kappa, at it and behind it; with the same caption, another one, and C-ERG's."""
    x, _, condition = inputs
    names = dict(F=F, mock=mock, model=model, condition=condition, image=slice(0, 16))
    exec(cell("def tempered(") + cell("def guided(").split("\n\n\n")[0], names)
    null = model.encode([""] * 4)
    for negative, other in ((None, condition), (null, null)):
        settings = erg.ERG(w=3.0, tau_i=0.01, layers=(2, 3), queries=slice(0, 16), kappa=0.2,
                           negative="same" if negative is None else None)
        for t in (0.0, 5 / 25, 6 / 25, 0.9):
            v = names["guided"](3.0, other)(x, t)
            torch.testing.assert_close(v, erg.Guidance(settings, negative)(model, x, t, condition), rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------------------------
# The last cell: DiT-XL/2 on a GPU
# ------------------------------------------------------------------------------------------------


def last_cell(**names):
    """Run the cell; what it showed."""
    shown = []
    exec(cell("def compare("), dict(torch=torch, erg=erg, show=shown.append) | names)
    return shown


def test_without_a_gpu_it_says_what_it_leaves_out(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not last_cell() and capsys.readouterr().out == "skipped: no GPU\n"


@pytest.mark.parametrize("error", [ImportError("No module named 'diffusers'"), OSError("couldn't connect")])
def test_without_diffusers_or_a_network_too(error, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise error

    pipeline = types.SimpleNamespace(DiTPipeline=types.SimpleNamespace(from_pretrained=refuse))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(__import__("sys").modules, "diffusers", pipeline)
    assert not last_cell() and capsys.readouterr().out == f"skipped: {error}\n"


@pytest.fixture
def case():
    """A DiTPipeline with 28 layers, as DiT-XL/2 has, and random weights."""
    pytest.importorskip("diffusers", reason="diffusers, whose pipeline the last cell runs, is missing")
    import test_pipelines

    with mock.patch.dict(test_pipelines.MODELS["DiT"][1], num_layers=28):
        case = test_pipelines.CASES["DiT"]()
    return dataclasses.replace(case, layers=[12, 13, 14])


@pytest.mark.filterwarnings("ignore")  # of diffusers' schedulers
def test_its_rows_are_the_samplers_written_out(case):
    """CFG, and ERG in layers 12 to 14 where t > 0.3, as in the paper, against attention by hand."""
    import test_pipelines

    settings, names = erg.PRESETS["dit-xl-2"], dict(torch=torch, erg=erg, show=None)
    assert (settings.tau_i, settings.kappa) == (test_pipelines.TAU, test_pipelines.KAPPA)
    exec(cell("def compare(").split("\n\n\n")[0], names)
    settings = dataclasses.replace(settings, w=test_pipelines.W)
    made = names["compare"](case.pipe, [1, 2], test_pipelines.STEPS, settings)
    _, steps = case.run()
    for name, rectified in (("CFG", False), ("ERG", True)):
        images, after = case.by_hand(steps, rectified)
        test_pipelines.close(made[name].double(), 2 * images - 1)
    assert True in after and False in after and (made["CFG"] - made["ERG"]).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore")  # of diffusers' schedulers
def test_the_whole_cell_at_toy_size(case, monkeypatch):
    """With a GPU it loads the pipeline in half precision, and shows eight images under CFG and ERG."""
    import diffusers

    asked = []

    def toy(name, torch_dtype):
        asked.append((name, torch_dtype))
        return types.SimpleNamespace(to=lambda device: asked.append(device) or case.pipe)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(diffusers.DiTPipeline, "from_pretrained", toy)
    shown, = last_cell()
    assert asked == [("facebook/DiT-XL-2-256", torch.float16), "cuda"]
    assert list(shown) == ["CFG", "ERG"] and {images.shape for images in shown.values()} == {(8, 3, 8, 8)}
    assert not torch.equal(shown["CFG"], shown["ERG"])
