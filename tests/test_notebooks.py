"""The notebooks: page and source in step, a question before each figure, asserts that hold."""
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
from toy import sampling  # noqa: E402

NAMES = [path.stem for path in build.SOURCES]
SHORT = dict(os.environ, ERG_QUICK="1", MPLBACKEND="Agg", PYTHONWARNINGS="error::UserWarning")
every_notebook = pytest.mark.parametrize("name", NAMES)


def cells(name):
    """The cells of a page: (kind, text, outputs)."""
    page = json.loads((ROOT / f"notebooks/{name}.ipynb").read_text())
    return [(cell["cell_type"], "".join(cell["source"]), cell.get("outputs", ())) for cell in page["cells"]]


def bootstrap(name):
    """The lines of a source that find or fetch the repository, without their stamp."""
    source = (ROOT / f"notebooks/{name}.py").read_text()
    lines = re.search(r"# The repository around.*?^sys\.path\[:0\][^\n]*\n", source, re.S | re.M).group()
    return build.STAMP.sub("REPOSITORY, COMMIT", lines)


@every_notebook
def test_page_and_source_are_in_step(name):
    """The page has the cells of its source, run in order without errors, warnings or absolute paths."""
    jupytext = pytest.importorskip("jupytext", reason="reads the notebooks' sources")
    source = jupytext.read(ROOT / f"notebooks/{name}.py", fmt="py:percent")
    assert [(c.cell_type, c.source) for c in source.cells] == [(kind, text) for kind, text, _ in cells(name)]
    page = json.loads((ROOT / f"notebooks/{name}.ipynb").read_text())
    counts = [cell["execution_count"] for cell in page["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    for output in (output for *_, outputs in cells(name) for output in outputs):
        assert output["output_type"] != "error" and output.get("name") != "stderr"
        output.get("data", {}).pop("image/png", None)
        assert not re.search(r"/(home|tmp|root|work|Users)/", json.dumps(output))


@every_notebook
def test_it_is_made_to_be_learned_from(name):
    """A question before each figure, claims that are asserted, failures and things to try at the end."""
    page = cells(name)
    assert len(page) <= 22 and page[0][0] == "markdown"
    figures = [i for i, (*_, outputs) in enumerate(page)
               if any("image/png" in o.get("data", {}) for o in outputs)]
    assert len(figures) >= 4
    for i in figures:
        assert page[i - 1][0] == "markdown" and "?" in page[i - 1][1], page[i][1]
    assert sum(len(re.findall(r"^ *assert ", text, re.M)) for _, text, _ in page) >= len(figures)
    end = "".join(text for _, text, _ in page[-3:])
    assert "## What did not work" in end
    assert len(re.findall(r"^\d\. ", end.split("## Three things to try")[1], re.M)) == 3


@every_notebook
def test_the_source_runs_in_short(name):
    """As a script, small, every assert of it holds."""
    if name.startswith("4"):
        pytest.importorskip("diffusers", reason="the fourth notebook runs a pipeline")
    done = subprocess.run([sys.executable, ROOT / f"notebooks/{name}.py"], cwd=ROOT, env=SHORT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_fourth_runs_without_diffusers(tmp_path):
    """Where diffusers is not installed, it says what it leaves out, and does the rest."""
    (tmp_path / "diffusers.py").write_text("raise ImportError('not installed')")
    done = subprocess.run([sys.executable, ROOT / f"notebooks/{NAMES[3]}.py"], cwd=ROOT, capture_output=True,
                          text=True, env=dict(SHORT, PYTHONPATH=str(tmp_path)))
    assert done.returncode == 0, done.stderr
    assert "diffusers" in done.stdout


# ------------------------------------------------------------------------------------------------
# A reader elsewhere
# ------------------------------------------------------------------------------------------------


def test_all_begin_alike():
    """Four notebooks with the same first lines and the same commit."""
    assert len(NAMES) == 4 and len({bootstrap(name) for name in NAMES}) == 1
    stamps = {build.STAMP.search((ROOT / f"notebooks/{name}.py").read_text()).groups() for name in NAMES}
    assert len(stamps) == 1 and re.fullmatch("[0-9a-f]{40}", stamps.pop()[1])


def test_elsewhere_the_repository_is_fetched_at_the_same_commit(tmp_path):
    """Where erg is not there, the first cell fetches it, at the commit of the notebook."""
    origin, folder = tmp_path / "origin", tmp_path / "colab"
    folder.mkdir()
    (origin / "notebooks").mkdir(parents=True)
    (origin / "notebooks/drawing.py").write_text("")

    def git(*command):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", "-C", str(origin), *identity, *command], check=True,
                              capture_output=True, text=True).stdout.strip()

    def start(where, repository="", commit=""):
        stamp = f"REPOSITORY, COMMIT = {str(repository)!r}, {commit!r}\n"
        lines = bootstrap(NAMES[0]).replace("REPOSITORY, COMMIT\n", stamp)
        return subprocess.run([sys.executable, "-I", "-c", f"{lines}\nimport erg; print(erg.__file__, "
                               "erg.mark)"],
                              cwd=where, capture_output=True, text=True)

    git("init", "--quiet")
    commits = []
    for mark in ("old", "new"):
        (origin / "erg.py").write_text(f"mark = {mark!r}")
        git("add", ".")
        git("commit", "--quiet", "-m", mark)
        commits.append(git("rev-parse", "HEAD"))
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
    """The grid draws every pair of the first two choices, others in their middle, where sliders begin."""
    drawn = []

    def draw(ax, **values):
        drawn.append(values)

    monkeypatch.setattr(drawing.plt, "show", lambda: None)
    figure = drawing.explore(draw, tau=[0.1, 1.0], w=[1, 2, 3], kappa=[0, 0.5, 1])
    assert drawn == [dict(tau=tau, w=w, kappa=0.5) for tau in (0.1, 1.0) for w in (1, 2, 3)]
    assert [ax.get_title() for ax in figure.axes[:3]] == ["w = 1", "w = 2", "w = 3"]
    ipywidgets = pytest.importorskip("ipywidgets", reason="the sliders")
    monkeypatch.setattr(drawing, "sliders_work", lambda: True)
    sliders = drawing.explore(draw, tau=[0.1, 1.0, 2.0], w=[1, 2, 3])
    tau, w = (child for child in sliders.children if isinstance(child, ipywidgets.SelectionSlider))
    assert (tau.value, w.value) == (1.0, 2)
    w.value = 3
    sliders.update()
    assert drawn[-1] == dict(tau=1.0, w=3)
    drawing.plt.close("all")


@pytest.fixture
def build_one(tmp_path, monkeypatch):
    """A function that builds a notebook with this source, and returns its page."""
    for name in ("jupytext", "nbclient", "ipykernel", "ipywidgets"):
        pytest.importorskip(name, reason="the extra `notebooks`")
    monkeypatch.setattr(build, "HERE", tmp_path)

    def build_page(source):
        (tmp_path / "1_small.py").write_text(source)
        try:
            build.run(tmp_path / "1_small.py", timeout=60)
        except TimeoutError:  # once in a while a kernel's answer is lost on a busy machine
            build.run(tmp_path / "1_small.py", timeout=60)
        return json.loads((tmp_path / "1_small.ipynb").read_text())
    return build_page


@pytest.mark.parametrize("grid, shown",
                         [("1", "image/png"), ("", "application/vnd.jupyter.widget-view+json")])
def test_a_kernel_shows_sliders_unless_told_not_to(grid, shown, build_one, monkeypatch):
    """In a notebook's kernel with ipywidgets there are sliders; a build asks for the grid."""
    monkeypatch.setenv("ERG_GRID", grid)
    page = build_one(f"# %%\nimport sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'notebooks')!r}]\n"
                     "import drawing\ndrawing.explore(lambda ax, **values: ax.plot([0, 1]), w=[1, 2], "
                     "tau=[0, 1]);\n")
    assert [set(output["data"]) - {"text/plain"} for output in page["cells"][0]["outputs"]] == [{shown}]


def test_a_build_runs_the_source_and_repeats_itself(build_one):
    """What was shown is stored, a second build writes the same page, and a failed assert is an error."""
    source = "# %% [markdown]\n# # Small\n\n# %%\nx = 6 * 7\nprint(x)\n"
    page = build_one(source)
    assert page["cells"][1]["outputs"] == [{"name": "stdout", "output_type": "stream", "text": ["42\n"]}]
    assert build_one(source) == page
    with pytest.raises(Exception, match="AssertionError"):
        build_one("# %%\nassert 6 * 7 == 41\n")


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


def test_the_animation_shows_what_generate_samples(tmp_path, capsys):
    """Each row ends in the images of its method; the frames go from noise to these, and back."""
    animate.main(["--steps", "3", "--out", str(tmp_path / "a.gif")])
    model, *_ = sampling.load_checkpoint(sampling.WEIGHTS / "mnist.pt")
    paths = animate.trajectories(model, w=2.0, steps=3, seed=3)
    assert paths.shape == (4, 3, 10, 3, 28, 28)
    for row, name in enumerate(animate.ROWS):
        p = sampling.recommended(name, "mnist", w=None if name == "none" else 2.0)
        images = sampling.generate(model, animate.CAPTIONS, sampling.prepare(name, **p), 3, 3)
        torch.testing.assert_close(paths[-1, row].clamp(-1, 1), images)
    assert Image.open(tmp_path / "a.gif").n_frames == 6  # four states, and two of them on the way back
    assert "digits right" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [(["5_none"], "names='5_none' must be of 1_"),
                                                (["--repository", "x"], "has no effect without --stamp")])
def test_unknown_names_and_options_without_effect_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        build.main(arguments)
    assert message in capsys.readouterr().err
