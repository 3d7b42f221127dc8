"""The assignment's texts keep their word: the handout and the instructor's page say what the code does."""
import doctest
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "assignment"
sys.path.insert(0, str(FOLDER))

import adapter  # noqa: E402
import exercises  # noqa: E402
import make_autograder  # noqa: E402
import solution  # noqa: E402
from mistakes import MISTAKES  # noqa: E402

HANDOUT = (FOLDER / "HANDOUT.md").read_text(encoding="utf-8")
INSTRUCTOR = (FOLDER / "INSTRUCTOR.md").read_text(encoding="utf-8")
SECTIONS = {int(number): (title, int(points), text) for number, title, points, text in re.findall(
    r"^## Exercise (\d): (.*?) \((\d+) points.*?\)\n(.*?)(?=^## |\Z)", HANDOUT, re.M | re.S)}
bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


def rows(text, header):
    """The cells of the table that begins with this header, a list a row."""
    table = re.search(rf"^{re.escape(header)}\n\|[-|]+\|\n((?:\|.*\n?)*)", text, re.M).group(1)
    return [[cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in table.splitlines()]


# The handout


def test_each_exercise_is_stated_once():
    """A recipe, an example and a folded hint; one slow specification, quoted; no signature, no table of checks."""
    for number in range(1, 8):
        text = SECTIONS[number][2]
        assert text.count("**Recipe.**") == text.count("<details><summary>Hint</summary>") == 1, number
    quoted = re.findall(r"^def (slow_\w+)", HANDOUT, re.M)
    assert quoted == ["slow_rectified"]
    assert inspect.getsource(exercises.slow_rectified).rstrip() in SECTIONS[4][2]
    assert not any(f"def {name}(" in HANDOUT for name in adapter.FUNCTIONS)
    assert not any(check.name in HANDOUT for exercise in exercises.EXERCISES for check in exercise.checks)
    assert len(HANDOUT.split()) < 3800


@pytest.mark.parametrize("exercise", exercises.EXERCISES, ids=lambda exercise: str(exercise.number))
def test_points(exercise):
    """Each exercise has its title, and as many points as checks."""
    title, points, _ = SECTIONS[exercise.number]
    assert title.lower() == exercise.title.lower() and points == len(exercise.checks)


def test_points_and_minutes_add_up():
    """60 points by tests and 40 by two rubrics; both tables of times are sums, and agree."""
    table = rows(HANDOUT, "| exercise | points | minutes |")
    listed = [[points, name] for name, points, _ in table[:-1]]
    assert listed == [[str(points), f"{number}. {title[0].upper()}{title[1:]}"]
                      for number, (title, points, _) in SECTIONS.items()]
    for column in (1, 2):
        assert sum(int(row[column]) for row in table[:-1]) == int(table[-1][column])
    assert int(table[-1][1]) == 100 and sum(len(exercise.checks) for exercise in exercises.EXERCISES) == 60
    for number in (8, 9):
        rubric = rows(SECTIONS[number][2], "| part | points | full | half | none |")
        assert sum(int(points) for _, points, *_ in rubric) == SECTIONS[number][1]
    plan = rows(INSTRUCTOR, "| exercise | minutes | lab, session 1 (2 h) | lab, session 2 (2 h) |")
    minutes = {name: minutes for name, minutes, *_ in plan if minutes}
    assert minutes == {name: minutes for name, _, minutes in table}
    for column in (2, 3):
        assert sum(int(re.search(r"\d+",
                                 row[column] + " 0").group()) for row in plan[:-1]) == int(plan[-1][column])


def test_worked_examples():
    """What the handout prints is what the solution computes, in each of the seven exercises."""
    for number in range(1, 8):
        parser, names = doctest.DocTestParser(), dict(vars(solution))
        examples, out = parser.get_doctest(SECTIONS[number][2], names, str(number), None, 0), []
        results = doctest.DocTestRunner(verbose=False).run(examples, out=out.append)
        assert results.attempted >= 2 and results.failed == 0, "".join(out)


@pytest.mark.parametrize("text", [HANDOUT, INSTRUCTOR], ids=["handout", "instructor"])
def test_links_exist(text):
    """Every link to a file leads to one, and every link into a page to a heading of it."""
    for link in [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]:
        name, _, anchor = link.partition("#")
        assert (FOLDER / name).exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)", (FOLDER / name).read_text(encoding="utf-8"), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ",
                                                                              "-") for heading in headings]


# The instructor's page


def test_numbers_of_mistakes_and_checks():
    """The page says how many wrong solutions there are, in every exercise, and how many checks."""
    assert f"| {len(MISTAKES)} wrong solutions" in INSTRUCTOR
    assert {mistake.exercise for mistake in MISTAKES} == set(range(1, 8))
    assert f"needs {sum(len(exercise.checks) for exercise in exercises.EXERCISES)} times" in INSTRUCTOR


def test_the_numbers_of_the_model_answer_belong_to_its_settings():
    """The quoted experiment is what the solution runs by default (it takes minutes, and is not run)."""
    defaults = {name: p.default for name, p in inspect.signature(solution.experiment).parameters.items()}
    assert (defaults["samples"], defaults["steps"], list(defaults["seeds"])) == (160, 25, [0, 1, 2, 3, 4])
    assert "160 images, 25 steps, seeds 0 to 4" in INSTRUCTOR
    assert "(0.01, 0.1, 0.3, 0.9)" in inspect.getsource(solution.experiment)
    assert "tau_c of 0.01, 0.1, 0.3 and 0.9" in INSTRUCTOR
    assert len(rows(INSTRUCTOR, "| | tau_c 0.1 | tau_c 0.3 | tau_c 0.9 |")) == 6


@bash
def test_marking_a_folder(tmp_path):
    """The loop of the instructor's page, with one seed, and its summary, give each student's lowest score."""
    for name in ("submissions", "bin"):
        (tmp_path / name).mkdir()
    (tmp_path / "assignment").symlink_to(FOLDER)
    shutil.copy(FOLDER / "solution.py", tmp_path / "submissions" / "ada l.py")
    (tmp_path / "submissions" / "bob-2.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "bin/python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "bin/python").chmod(0o755)
    blocks = re.findall(r"```bash\n(.*?)```", INSTRUCTOR, re.S)
    loop, = (block for block in blocks if "submissions/*.py; do" in block)
    summary, = (block for block in blocks if "marks.get" in block)
    assert "for seed in 11 12 13; do" in loop
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", loop.replace("11 12 13", "11") + summary], cwd=tmp_path,
                          env=environment, text=True, capture_output=True)
    assert done.stdout.split("\n") == ["ada l,60", "bob-2,0", ""], done.stderr


# The package for Gradescope


@pytest.fixture
def unpacked(tmp_path, capsys):
    """An /autograder as Gradescope would have it, in a temporary folder that other users may read."""
    make_autograder.main(["--secret", "some words", "--out", str(tmp_path / "autograder.zip")])
    assert "choose the base image Ubuntu 22.04" in capsys.readouterr().out
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        root = Path(folder) / "autograder"
        (root / "submission").mkdir(parents=True)
        with zipfile.ZipFile(tmp_path / "autograder.zip") as archive:
            names = {info.filename: info.external_attr >> 16 for info in archive.infolist()}
            archive.extractall(root / "source")
        assert names == {"setup.sh": 0o755, "run_autograder": 0o755, "secret": 0o644, "grade.py": 0o644,
                         "exercises.py": 0o644, "worker.py": 0o644, "adapter.py": 0o644}
        yield root


def run_autograder(root):
    """Run it from elsewhere, as Gradescope does; returns results.json and what was printed."""
    environment = {**os.environ, "AUTOGRADER_ROOT": str(root), "AUTOGRADER_PYTHON": sys.executable}
    done = subprocess.run(["bash", str(root / "source/run_autograder")], cwd="/", env=environment, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads((root / "results/results.json").read_text(encoding="utf-8")), done.stdout


@bash
def test_the_autograder_grades_the_solution(unpacked):
    """In an empty folder, with nothing of the repository: 60 of 60, at a seed that changes with the file."""
    shutil.copy(FOLDER / "solution.py", unpacked / "submission/my answer.py")
    seeds = []
    for _ in range(2):
        results, printed = run_autograder(unpacked)
        assert results["score"] == sum(test["max_score"] for test in results["tests"]) == 60
        seeds.append(re.search(r"\(seed \d+\)", printed).group())
        with (unpacked / "submission/my answer.py").open("a") as file:
            file.write("\n")
    assert seeds[0] != seeds[1]


@bash
def test_the_autograder_says_what_is_missing(unpacked):
    """Two files neither of which is student.py, a grader that does not start: 0, with the reason."""
    for name in "ab":
        (unpacked / f"submission/{name}.py").write_text("")
    results, _ = run_autograder(unpacked)
    assert results["score"] == 0 and "there is no file student.py" in results["output"]
    (unpacked / "results/results.json").unlink()
    (unpacked / "source/grade.py").write_text("import nothing_of_this_name\n")
    results, printed = run_autograder(unpacked)
    assert results["score"] == 0 and "tell your instructor" in results["output"] and "status 1" in printed


def test_what_students_get(tmp_path):
    """The handout, the starter and the grader, every file that the handout has a link to, and no answers;
    either --secret or --students must be given."""
    make_autograder.main(["--students", "--out", str(tmp_path / "students.zip")])
    with zipfile.ZipFile(tmp_path / "students.zip") as archive:
        assert sorted(archive.namelist()) == [f"assignment/{name}" for name in (
            "HANDOUT.md", "adapter.py", "exercises.py", "failure-a.png", "failure-b.png", "grade.py",
            "starter.py", "worker.py")]
        archive.extractall(tmp_path)
    for link in re.findall(r"\]\(([^)]+)\)", HANDOUT):
        assert link.startswith("http") or (tmp_path / "assignment" / link).is_file(), link
    for name in "ab":
        picture = f"failure-{name}.png"
        assert (tmp_path / "assignment" / picture).read_bytes() == (FOLDER / picture).read_bytes()
    for wrong in ([], ["--secret", "1", "--students"], ["--secret", ""]):
        with pytest.raises(SystemExit) as error:
            make_autograder.main(wrong)
        assert error.value.code == 2
