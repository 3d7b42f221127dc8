"""The README keeps its word: its example prints what it says, the files that it names exist, imports run one way."""
import ast
import contextlib
import io
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_prints_what_it_says():
    """The example on somebody else's model runs as written, and prints the lines below it."""
    pytest.importorskip("diffusers", reason="the example uses a model of diffusers")
    code, printed = re.search(r"```python\n(import torch, erg.*?)```\n+```text\n(.*?)```", README, re.S).groups()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})
    assert out.getvalue().split() == printed.split()


def test_it_is_one_page():
    """The README has at most 130 lines of 120 columns."""
    lines = README.splitlines()
    assert len(lines) <= 130 and max(map(len, lines)) <= 120


@pytest.mark.parametrize("page", ["README.md", "PAPER_NOTES.md", "CONTRIBUTING.md"])
def test_the_files_it_names_exist(page):
    """Every file of the tree, and every link to a file, is there, in the other pages too."""
    text = (ROOT / page).read_text()
    tree = re.search(r"## Files\n+```text\n(.*?)```", text, re.S)
    columns = [re.split(" {2,}", line)[0] for line in tree.group(1).splitlines()] if tree else []
    names = [name for column in columns for name in column.split(", ")]
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    assert len(names) >= 8 or page != "README.md"
    for name in names + links:
        assert (ROOT / name).exists(), name


def imported(path):
    """The first names of all modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (name.split(".")[0] for name in names)


@pytest.mark.parametrize("name, more", [("erg.py", set()), ("tiny_dit.py", set()), ("experiments/diagnostics.py", {"erg"})])
def test_what_can_be_copied_imports_torch_and_the_standard_library_alone(name, more):
    """erg.py can be copied: it imports nothing else, and tiny_dit.py knows nothing of it."""
    assert set(imported(ROOT / name)) - {"torch"} - more <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("files, never", [
    ("toy/*.py", {"train_toy", "sample_toy", "experiments"}), ("*.py", {"experiments"}),
    ("experiments/**/*.py", {"sample_toy", "notebooks"})])
def test_imports_run_one_way(files, never):
    """erg, tiny_dit <- toy <- scripts <- experiments: nobody imports what stands to the right."""
    paths = sorted(ROOT.glob(files))
    assert paths and not [(path.name, name) for path in paths for name in imported(path) if name in never]


def test_erg_is_short():
    """erg.py has lines of at most 110 columns, and functions of at most 45 lines."""
    text = (ROOT / "erg.py").read_text()
    assert max(map(len, text.splitlines())) <= 110
    long = {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 45}
    assert not long


def test_the_list_of_models_is_complete():
    """examples/MODELS.md names every class of the zoo, and quotes the error of those that are out of reach."""
    import torch

    import erg
    from zoo import UNREACHABLE, ZOO
    page = (ROOT / "examples/MODELS.md").read_text()
    named = set(re.findall(r"`(\w+)`", page))
    assert set(ZOO) | set(UNREACHABLE) <= named
    untried = set(re.findall(r"`(\w+)`", page.split("Not tried:")[1].splitlines()[0]))
    assert {name for name in named if name.endswith(("Model", "UNet", "Transformer"))} - untried <= set(ZOO) | set(UNREACHABLE)
    assert set(re.findall(r"`(\w+)`", page.split("## Out of reach")[1].split("Not tried")[0])) >= set(UNREACHABLE)
    with pytest.raises(RuntimeError) as error:
        identity = torch.nn.Identity().eval()
        with erg.rectify(identity, tau=0.1, layers=[0]):
            identity(torch.zeros(1))
    assert f"RuntimeError: {error.value}".split() == re.search(r"```text\n(RuntimeError.*?)```", page, re.S).group(1).split()
