"""The README keeps its word: its example prints what it says, and the files that it names exist."""
import contextlib
import io
import re
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


def test_the_files_it_names_exist():
    """Every file of the tree, and every link to a file, is there."""
    tree = re.search(r"## Files\n+```text\n(.*?)```", README, re.S).group(1)
    names = [line.split()[0] for line in tree.splitlines() if line.strip()]
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert len(names) >= 8
    for name in names + links:
        assert (ROOT / name).exists(), name


def test_erg_imports_torch_and_the_standard_library_alone():
    """erg.py can be copied: it imports nothing else, and tiny_dit.py knows nothing of it."""
    import ast
    import sys

    def imported(path):
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                yield from (name.split(".")[0] for name in names)

    assert set(imported("erg.py")) - {"torch"} <= set(sys.stdlib_module_names)
    assert set(imported("tiny_dit.py")) - {"torch"} <= set(sys.stdlib_module_names)
    assert set(imported("experiments/diagnostics.py")) - {"torch", "erg"} <= set(sys.stdlib_module_names)


def test_its_table_is_an_excerpt_of_the_results():
    """Every number of the table of methods stands in the committed Table 1, in the row of the same method."""
    page = (ROOT / "experiments/results/table1.md").read_text().replace("**", "")
    rows = [line for line in README.splitlines() if line.startswith("| ") and "±" in line]
    assert len(rows) >= 8
    for row in rows:
        label, *cells = (cell.strip() for cell in row.strip("| ").replace("**", "").split(" | "))
        same = " ".join(line for line in page.splitlines() if line.startswith(f"| {label} |"))
        assert same and all(f"| {cell} |" in same for cell in cells), row


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
