"""The notebooks: page and source in step, a question before each figure, claims that are asserted."""
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
from toy import sampling  # noqa: E402

NAMES = [path.stem for path in build.SOURCES]
SHORT = dict(os.environ, ERG_QUICK="1", MPLBACKEND="Agg", PYTHONWARNINGS="error::UserWarning")
FOLDED = 'jupyter={"source_hidden": true} cellView="form"'
every_notebook = pytest.mark.parametrize("name", NAMES)


def source(name):
    """The cells of a source: (what stands behind %%, text); the text of markdown is without its #."""
    text = (ROOT / f"notebooks/{name}.py").read_text()
    cells = [part.partition("\n") for part in re.split("^# %%", text, flags=re.M)[1:]]
    return [(head.strip(), re.sub("^# ?", "", body, flags=re.M) if "[markdown]" in head else body)
            for head, _, body in cells]


def prose(name):
    """The markdown cells of a source, as one text."""
    return "\n".join(text for head, text in source(name) if head == "[markdown]")


def code_lines(text):
    """Lines of code: neither blank nor a comment."""
    return [line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def page(name):
    return json.loads((ROOT / f"notebooks/{name}.ipynb").read_text())


def shown(cell):
    """What a page's cell shows: a dictionary of kind and content for each output."""
    return [output["data"] for output in cell.get("outputs", ()) if "data" in output]


# ------------------------------------------------------------------------------------------------
# Sources that are made to be learned from
# ------------------------------------------------------------------------------------------------


@every_notebook
def test_it_is_short_and_begins_with_few_lines(name):
    """Fewer than 1,800 words and 300 lines of code; the first cell is folded, the second has six lines at most."""
    words, code = len(prose(name).split()), [cell for cell in source(name) if cell[0] != "[markdown]"]
    lines = sum(len(code_lines(text)) for _, text in code)
    assert words < 1800 and lines < 300, (words, lines)
    (first, fetch), (second, imports), *_ = code
    assert first == FOLDED and fetch.startswith("# @title Find or fetch the repository\n")
    assert second == "" and len(code_lines(imports)) <= 6
    assert all("import " in line and "import *" not in line for line in code_lines(imports))
    for head, text in code:
        assert head == "" or head == FOLDED and text.startswith("# @title "), head
    for line in (ROOT / f"notebooks/{name}.py").read_text().splitlines():
        assert len(line) <= (120 if line.startswith("#") else 110), line


@every_notebook
def test_each_prediction_is_one_question(name):
    """It is the last paragraph of its cell, and asks for one thing."""
    predictions = [text.strip() for head, text in source(name) if head == "[markdown]" and "**Predict" in text]
    assert len(predictions) >= 4 and "**Predict" not in "".join(t for head, t in source(name) if head != "[markdown]")
    for text in predictions:
        asked = text.split("\n\n")[-1]
        assert asked.startswith("**Predict**: ") and asked.endswith("?") and asked.count("?") == 1, asked
        assert text.count("**Predict") == 1


@every_notebook
def test_sections_are_numbered_and_the_end_has_answers(name):
    """Sections 1, 2, ...; then what did not work, and three things to try, each with an answer that is folded."""
    headings = re.findall("^## (.*)$", prose(name), re.M)
    assert headings[-2:] == ["What did not work", "Three things to try"]
    assert [heading.split(". ")[0] for heading in headings[:-2]] == [str(i + 1) for i in range(len(headings) - 2)]
    end = prose(name).split("## Three things to try")[1]
    tasks = re.split(r"^\d\. ", end, flags=re.M)[1:]
    answer = r"<details><summary>Answer</summary>\n\n(.+?)\s*</details>"
    answers = [re.findall(answer, task, re.S) for task in tasks]
    assert [len(found) for found in answers] == [1, 1, 1]
    assert sum(bool(re.search(r"\d", found[0])) for found in answers) >= 2  # numbers that somebody obtained


def test_all_begin_alike():
    """Five notebooks with the same first lines and the same commit."""
    assert [name[:2] for name in NAMES] == ["0_", "1_", "2_", "3_", "4_"]
    first = [next(text for head, text in source(name) if head == FOLDED) for name in NAMES]
    assert len(set(first)) == 1
    assert re.fullmatch("[0-9a-f]{40}", build.STAMP.search(first[0])[2])


def test_the_vines_have_a_source():
    """The second notebook says whose idea such a world is."""
    assert "2406.02507" in source("2_guidance_in_2d")[0][1] and "Karras" in source("2_guidance_in_2d")[0][1]


# ------------------------------------------------------------------------------------------------
# Pages
# ------------------------------------------------------------------------------------------------


@every_notebook
def test_page_and_source_are_in_step(name):
    """The page has the cells of its source, run in order without errors, warnings or absolute paths."""
    cells = page(name)["cells"]
    texts = [(cell["cell_type"] == "markdown", "".join(cell["source"])) for cell in cells]
    assert texts == [(head == "[markdown]", text.strip()) for head, text in source(name)]
    counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert [cell["metadata"] for cell in cells] == [build.FOLDED if head == FOLDED else {}
                                                    for head, _ in source(name)]
    for output in (output for cell in cells for output in cell.get("outputs", ())):
        assert output["output_type"] != "error" and output.get("name") != "stderr"
        data = output.get("data", {})
        assert build.WIDGET not in data
        for picture in ("image/png", "image/gif"):
            data.pop(picture, None)
        assert not re.search(r"/(home|tmp|root|work|Users)/", json.dumps(output))


@every_notebook
def test_a_prediction_stands_before_each_figure(name):
    """The last text before a figure ends with a prediction; there are claims that are asserted."""
    cells = page(name)["cells"]
    assert len(cells) <= 32 and cells[0]["cell_type"] == "markdown"
    figures = [i for i, cell in enumerate(cells) if any(set(data) & {"image/png", "image/gif"} for data in shown(cell))]
    assert len(figures) >= 4
    for i in figures:
        before = [cell for cell in cells[:i] if cell["cell_type"] == "markdown"][-1]
        assert "**Predict**" in "".join(before["source"]), "".join(cells[i]["source"])[:80]
    asserts = sum(len(re.findall("^ *assert ", "".join(cell["source"]), re.M)) for cell in cells)
    assert asserts >= len(figures)


def test_the_second_page_has_a_small_animation():
    """One GIF of at most a megabyte, with frames."""
    pictures = [data["image/gif"] for cell in page("2_guidance_in_2d")["cells"] for data in shown(cell)
                if "image/gif" in data]
    assert len(pictures) == 1
    gif = base64.b64decode("".join(pictures[0]))
    assert len(gif) < 1e6 and Image.open(io.BytesIO(gif)).n_frames > 30


# ------------------------------------------------------------------------------------------------
# Scripts
# ------------------------------------------------------------------------------------------------


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
    done = subprocess.run([sys.executable, ROOT / "notebooks/4_your_own_model.py"], cwd=ROOT, capture_output=True,
                          text=True, env=dict(SHORT, PYTHONPATH=str(tmp_path)))
    assert done.returncode == 0, done.stderr
    assert "diffusers" in done.stdout


# ------------------------------------------------------------------------------------------------
# A reader elsewhere
# ------------------------------------------------------------------------------------------------


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
        lines = re.sub(f"(?m){build.STAMP.pattern}\n", stamp, source(NAMES[0])[1][1])
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


def test_there_is_a_grid_and_then_sliders_where_they_work(monkeypatch):
    """The grid draws every pair of the first two choices, others in their middle, where sliders begin."""
    drawn, displayed = [], []

    def draw(ax, **values):
        drawn.append(values)

    monkeypatch.setattr(drawing.plt, "show", lambda: None)
    choices = dict(tau=[0.1, 1.0], w=[1, 2, 3], kappa=[0, 0.5, 1])
    grid = [dict(tau=tau, w=w, kappa=0.5) for tau in (0.1, 1.0) for w in (1, 2, 3)]
    figure = drawing.explore(draw, **choices)
    assert drawn == grid
    assert [ax.get_title() for ax in figure.axes[:3]] == ["w = 1", "w = 2", "w = 3"]

    ipywidgets = pytest.importorskip("ipywidgets", reason="the sliders")
    display = pytest.importorskip("IPython.display", reason="the sliders")
    monkeypatch.setattr(display, "display", displayed.append)
    monkeypatch.setattr(drawing, "in_notebook", lambda: True)
    drawn.clear()
    drawing.explore(draw, **choices)
    assert drawn[:6] == grid  # the grid that the text is about, in any case
    sliders, = displayed
    tau, w, kappa = (child for child in sliders.children if isinstance(child, ipywidgets.SelectionSlider))
    assert (tau.value, w.value, kappa.value) == (1.0, 2, 0.5)
    w.value = 3
    sliders.update()
    assert drawn[-1] == dict(tau=1.0, w=3, kappa=0.5)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # not installed: the grid alone
    drawing.explore(draw, **choices)
    assert len(displayed) == 1
    drawing.plt.close("all")


def test_an_animation_is_a_gif_whose_frames_move():
    """A dot goes to the right on a fixed ground, without any notebook; the last frame stays longer."""
    figure, ax = drawing.plt.subplots(figsize=(2, 1), dpi=50)
    ax.set(xlim=(0, 4), ylim=(-1, 1))
    dot, = ax.plot([], [], "o", color="red")

    def update(i):
        dot.set_data([i], [0])
        return [dot]

    data = drawing.gif(figure, update, range(1, 4))
    picture, places, durations = Image.open(io.BytesIO(data)), [], []
    for i in range(picture.n_frames):
        picture.seek(i)
        pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
        pixels = pixels.view(picture.height, picture.width, 3)
        red = (pixels[..., 0] > 200) & (pixels[..., 1:] < 90).all(-1)
        places.append(red.nonzero()[:, 1].float().mean().item())
        durations.append(picture.info["duration"])
        assert (pixels[0, 0] == 255).all()  # white stays white
    assert len(places) == 3 and places[0] + 10 < places[1] < places[2] - 10
    assert durations[2] > 10 * durations[1]


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


def test_a_page_has_no_dead_widgets_and_keeps_what_is_folded(build_one):
    """Of `explore` the grid, of an animation the GIF, of metadata that which folds a cell."""
    code = f"""# %% {FOLDED} editable=true
# @title Set-up
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'notebooks')!r}]
import drawing
assert drawing.in_notebook()

# %% tags=["some"]
_ = drawing.explore(lambda ax, **values: ax.plot([0, 1]), w=[1, 2], tau=[0, 1])

# %%
figure, ax = drawing.plt.subplots()
line, = ax.plot([], [])


def update(i):
    line.set_data([0, i], [0, 1])
    return [line]


_ = drawing.gif(figure, update, range(3))
"""
    page = build_one(code)
    assert [set(data) - {"text/plain"} for cell in page["cells"] for data in shown(cell)] == [{"image/png"},
                                                                                             {"image/gif"}]
    assert [cell["metadata"] for cell in page["cells"]] == [build.FOLDED, {}, {}]
    assert "widgets" not in page["metadata"] and "widget" not in json.dumps(page["cells"][1]["outputs"])


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


@pytest.mark.parametrize("arguments, message", [(["5_none"], "names='5_none' must be of 0_"),
                                                (["--repository", "x"], "has no effect without --stamp")])
def test_unknown_names_and_options_without_effect_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        build.main(arguments)
    assert message in capsys.readouterr().err
