"""The notebooks: page and source in step, executed in order, a question before each figure, and every assert holds."""
import base64
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))

import animate  # noqa: E402
import build  # noqa: E402
import drawing  # noqa: E402
import train_toy  # noqa: E402

NAMES = [path.stem for path in build.SOURCES]
SHORT = dict(os.environ, ERG_QUICK="1", MPLBACKEND="Agg", PYTHONWARNINGS="error::UserWarning")


def page(name):
    return json.loads((ROOT / f"notebooks/{name}.ipynb").read_text())


def text(cell):
    return "".join(cell["source"])


def has_figure(cell):
    return any("image/png" in output.get("data", {}) for output in cell["outputs"])


def bootstrap(name):
    """The lines of a source that find or fetch the repository, without their stamp."""
    source = (ROOT / f"notebooks/{name}.py").read_text()
    return build.STAMP.sub("REPOSITORY, COMMIT", re.search(r"# The repository around.*?^sys\.path\[:0\][^\n]*\n", source, re.S | re.M).group())


def test_there_are_four():
    assert len(NAMES) == 4


@pytest.mark.parametrize("name", NAMES)
def test_page_and_source_are_in_step(name):
    """The executed page has the cells of its source, character by character."""
    jupytext = pytest.importorskip("jupytext", reason="reads the notebooks' sources")
    source = jupytext.read(ROOT / f"notebooks/{name}.py", fmt="py:percent")
    assert [(c.cell_type, c.source) for c in source.cells] == [(c["cell_type"], text(c)) for c in page(name)["cells"]]


@pytest.mark.parametrize("name", NAMES)
def test_the_page_was_executed_in_order(name):
    """Every code cell ran once, from top to bottom, without an error or a warning, and shows no path of a machine."""
    code = [cell for cell in page(name)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for output in (output for cell in code for output in cell["outputs"]):
        assert output["output_type"] != "error" and output.get("name") != "stderr"
        assert not re.search(r"/(home|tmp|root|work|Users)/", json.dumps({**output, "data": {k: v for k, v in output.get("data", {}).items() if k != "image/png"}}))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_made_to_be_learned_from(name):
    """About 20 cells; a question before each figure, claims that are asserted, failures and things to try at the end."""
    cells = page(name)["cells"]
    assert len(cells) <= 22 and cells[0]["cell_type"] == "markdown"
    figures = [i for i, cell in enumerate(cells) if cell["cell_type"] == "code" and has_figure(cell)]
    assert len(figures) >= 4
    for i in figures:
        assert cells[i - 1]["cell_type"] == "markdown" and "?" in text(cells[i - 1]), text(cells[i])
    claims = sum(len(re.findall(r"^ *assert ", text(cell), re.M)) for cell in cells if cell["cell_type"] == "code")
    assert claims >= len(figures)
    end = "".join(text(cell) for cell in cells[-3:])
    assert "## What did not work" in end
    assert len(re.findall(r"^\d\. ", end.split("## Three things to try")[1], re.M)) == 3


@pytest.mark.parametrize("name", NAMES)
def test_the_source_runs_in_short(name):
    """As a script, small, every assert of it holds."""
    if name.startswith("4"):
        pytest.importorskip("diffusers", reason="the fourth notebook runs a pipeline")
    done = subprocess.run([sys.executable, ROOT / f"notebooks/{name}.py"], cwd=ROOT, env=SHORT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_fourth_runs_without_diffusers(tmp_path):
    """Where diffusers is not installed, it says what it leaves out, and does the rest."""
    (tmp_path / "diffusers.py").write_text("raise ImportError('not installed')")
    done = subprocess.run([sys.executable, ROOT / f"notebooks/{NAMES[3]}.py"], cwd=ROOT, capture_output=True, text=True,
                          env=dict(SHORT, PYTHONPATH=str(tmp_path)))
    assert done.returncode == 0, done.stderr
    assert "diffusers" in done.stdout


# ------------------------------------------------------------------------------------------------
# A reader elsewhere
# ------------------------------------------------------------------------------------------------


def test_all_begin_alike():
    """The same lines, and the same commit, of which the page says what its source says."""
    assert len({bootstrap(name) for name in NAMES}) == 1
    stamps = {build.STAMP.search((ROOT / f"notebooks/{name}.py").read_text()).groups() for name in NAMES}
    assert len(stamps) == 1 and re.fullmatch("[0-9a-f]{40}", stamps.pop()[1])


def start(folder, repository="", commit=""):
    """Run the first lines of the notebooks in an empty folder, and print where erg came from."""
    lines = bootstrap(NAMES[0]).replace("REPOSITORY, COMMIT\n", f"REPOSITORY, COMMIT = {str(repository)!r}, {commit!r}\n")
    return subprocess.run([sys.executable, "-I", "-c", f"{lines}\nimport erg; print(erg.__file__, erg.mark)"], cwd=folder, capture_output=True, text=True)


def test_elsewhere_the_repository_is_fetched_at_the_same_commit(tmp_path):
    """Where erg is not there, the first cell fetches it: not the newest, but the commit of the notebook. A second time it is there."""
    origin, folder = tmp_path / "origin", tmp_path / "colab"
    folder.mkdir()
    (origin / "notebooks").mkdir(parents=True)
    (origin / "notebooks/drawing.py").write_text("")
    git = ["git", "-C", str(origin), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "init", "--quiet", str(origin)], check=True)
    commits = []
    for mark in ("old", "new"):
        (origin / "erg.py").write_text(f"mark = {mark!r}")
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "--quiet", "-m", mark], check=True)
        commits.append(subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip())
    nowhere = start(folder)
    assert nowhere.returncode != 0 and "set REPOSITORY" in nowhere.stderr
    fetched = start(folder, origin, commits[0])
    assert fetched.stdout.split() == [str(folder / "erg-guidance/erg.py"), "old"], fetched.stderr
    assert start(folder).stdout == fetched.stdout
    assert start(origin / "notebooks").stdout.split() == [str(origin / "erg.py"), "new"]


# ------------------------------------------------------------------------------------------------
# What the notebooks are made with
# ------------------------------------------------------------------------------------------------


def test_sliders_where_they_work_and_a_grid_where_not(monkeypatch):
    """The grid draws every pair of the first two choices once, others in their middle; sliders begin in the middle of all."""
    drawn = []

    def draw(ax, **values):
        drawn.append(values)

    monkeypatch.setattr(drawing.plt, "show", lambda: None)
    with drawing.plt.rc_context():
        drawing.style()
        figure = drawing.explore(draw, tau=[0.1, 1.0], w=[1, 2, 3], kappa=[0, 0.5, 1])
    assert drawn == [dict(tau=tau, w=w, kappa=0.5) for tau in (0.1, 1.0) for w in (1, 2, 3)]
    assert [ax.get_title(loc="left") for ax in figure.axes[:3]] == ["w = 1", "w = 2", "w = 3"]
    assert len(drawing.explore(draw, tau=[0.1, 1.0]).axes) == 2
    ipywidgets = pytest.importorskip("ipywidgets", reason="the sliders")
    monkeypatch.setattr(drawing, "sliders_work", lambda: True)
    sliders = drawing.explore(draw, tau=[0.1, 1.0, 2.0], w=[1, 2, 3])
    tau, w = (child for child in sliders.children if isinstance(child, ipywidgets.SelectionSlider))
    assert (tau.value, w.value) == (1.0, 2)
    drawn.clear()
    w.value = 3
    sliders.update()
    assert drawn[-1] == dict(tau=1.0, w=3)
    drawing.plt.close("all")


@pytest.mark.parametrize("grid, shown", [("1", "image/png"), ("", "application/vnd.jupyter.widget-view+json")])
def test_a_kernel_shows_sliders_unless_told_not_to(grid, shown, tmp_path, monkeypatch):
    """In a notebook's kernel with ipywidgets there are sliders; a build asks for the grid."""
    for name in ("jupytext", "nbclient", "ipykernel", "ipywidgets"):
        pytest.importorskip(name, reason="the extra `notebooks`")
    monkeypatch.setenv("ERG_GRID", grid)
    monkeypatch.setattr(build, "HERE", tmp_path)
    (tmp_path / "1_small.py").write_text(f"# %%\nimport sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'notebooks')!r}]\n"
                                         "import drawing\ndrawing.explore(lambda ax, **values: ax.plot([0, 1]), w=[1, 2], tau=[0, 1]);\n")
    build.run(tmp_path / "1_small.py")
    outputs = json.loads((tmp_path / "1_small.ipynb").read_text())["cells"][0]["outputs"]
    assert [set(output["data"]) - {"text/plain"} for output in outputs] == [{shown}]


def test_pictures_lie_where_they_should():
    """The sheet holds every image at its place, in [0, 1], on white."""
    images = torch.linspace(-1, 1, 5 * 3 * 4 * 4).reshape(5, 3, 4, 4)
    ax = drawing.plt.figure().subplots()
    drawing.pictures(ax, images, columns=3)
    sheet = torch.as_tensor(ax.images[0].get_array())
    assert sheet.shape == (9, 14, 3)
    torch.testing.assert_close(sheet[5:9, 5:9], (images[4].permute(1, 2, 0) + 1) / 2)
    assert (sheet[4] == 1).all() and (sheet[5:, 10:] == 1).all()
    drawing.plt.close("all")


def test_a_build_runs_the_source_and_repeats_itself(tmp_path, monkeypatch):
    """build.run executes in a kernel, stores what was shown, and writes the same file again; a failed assert is an error."""
    client = pytest.importorskip("nbclient", reason="runs notebooks")
    for name in ("jupytext", "ipykernel"):
        pytest.importorskip(name, reason="the extra `notebooks`")
    monkeypatch.setattr(build, "HERE", tmp_path)
    source = tmp_path / "1_small.py"
    source.write_text("# %% [markdown]\n# # Small\n\n# %%\nx = 6 * 7\nprint(x)\n")
    build.run(source)
    first = (tmp_path / "1_small.ipynb").read_text()
    assert json.loads(first)["cells"][1]["outputs"] == [{"name": "stdout", "output_type": "stream", "text": ["42\n"]}]
    build.run(source)
    assert (tmp_path / "1_small.ipynb").read_text() == first
    source.write_text("# %%\nassert 6 * 7 == 41\n")
    with pytest.raises(client.exceptions.CellExecutionError):
        build.run(source)


def test_smaller_pictures_look_the_same():
    """At most 256 colours: a smooth picture in fewer bytes, no pixel off by more than a few of 255 levels."""
    levels = torch.arange(256, dtype=torch.uint8)
    smooth = torch.stack([levels.expand(256, 256), levels.expand(256, 256).T, torch.full((256, 256), 128)], dim=-1).numpy().astype("uint8")
    noise = torch.randint(0, 6, smooth.shape, generator=torch.Generator().manual_seed(0)).numpy().astype("uint8")
    original = Image.fromarray(smooth // 2 + noise)
    buffer = io.BytesIO()
    original.save(buffer, "PNG")
    small = base64.b64decode(build.smaller(base64.b64encode(buffer.getvalue())))
    again = torch.as_tensor(list(Image.open(io.BytesIO(small)).convert("RGB").tobytes()))
    difference = (again - torch.as_tensor(list(original.tobytes()))).abs().double()
    assert len(small) < len(buffer.getvalue()) / 2 and difference.mean() < 4


def test_the_animation_shows_what_train_toy_samples(tmp_path, capsys):
    """Each row ends in the images of its method; the frames go from noise to these, and back; every option is obeyed."""
    animate.main(["--steps", "3", "--out", str(tmp_path / "a.gif")])
    model, *_ = train_toy.load_checkpoint(animate.WEIGHTS / "mnist.pt")
    paths = animate.trajectories(model, train_toy.RECIPES["mnist"], w=2.0, steps=3, seed=3)
    assert paths.shape == (4, 3, 10, 3, 28, 28)
    for row, method in enumerate(animate.METHODS.values()):
        settings = train_toy.guidance_settings(method, train_toy.RECIPES["mnist"], w=None if method == "none" else 2.0)
        torch.testing.assert_close(paths[-1, row].clamp(-1, 1), train_toy.generate(model, animate.CAPTIONS, settings, 3, 3))
    first = (tmp_path / "a.gif").read_bytes()
    assert Image.open(tmp_path / "a.gif").n_frames == 6  # four states, and two of them on the way back
    for option in (["--w", "3"], ["--seed", "4"], ["--steps", "4"], ["--weights", str(animate.WEIGHTS / "mnist-early.pt")]):
        animate.main(["--steps", "3", "--out", str(tmp_path / "b.gif"), *option])
        assert (tmp_path / "b.gif").read_bytes() != first, option
    assert "digits right" in capsys.readouterr().out


def test_unknown_names_and_options_without_effect_are_refused(capsys):
    """One line that names the argument, its value and what is allowed."""
    for arguments, message in ((["5_none"], "names='5_none' must be of 1_"), (["--repository", "x"], "has no effect without --stamp")):
        with pytest.raises(SystemExit):
            build.main(arguments)
        assert message in capsys.readouterr().err
