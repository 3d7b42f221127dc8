"""The assignment's texts keep their word: the handout and the instructor's page say what the code does."""
import ast
import doctest
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
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


def test_signatures_and_specifications_are_quoted():
    """Each signature of the solution, and each slow function of exercises.py, stands in the handout."""
    source = (FOLDER / "solution.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if getattr(node, "name", None) in adapter.FUNCTIONS:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            assert "\n".join(source.splitlines()[first - 1:node.body[0].lineno - 1]) in HANDOUT, node.name
    for name in [*(name for name in vars(exercises) if name.startswith("slow_")), "dot"]:
        assert inspect.getsource(getattr(exercises, name)).rstrip() in HANDOUT, name
    for number, (_, _, text) in SECTIONS.items():
        assert number == 8 or "**Slow specification" in text and "def slow_" in text, number


@pytest.mark.parametrize("exercise", exercises.EXERCISES, ids=lambda exercise: str(exercise.number))
def test_checks_and_points(exercise):
    """Each exercise has its title, its points, and a table of its checks in order, each with its test."""
    title, points, text = SECTIONS[exercise.number]
    assert title.lower() == exercise.title.lower() and points == exercise.points
    table = rows(text, "| check | points | what it asserts | test |")
    checks = [[check.name, str(check.points), f"`{check.function.__name__}`"] for check in exercise.checks]
    assert [[name, worth, test] for name, worth, _, test in table] == checks
    assert all(asserts for _, _, asserts, _ in table) and "<details><summary>Hint</summary>" in text


def test_points_and_minutes_add_up():
    """80 points by tests and 20 by the rubric; both tables of times are sums, and agree."""
    table = rows(HANDOUT, "| exercise | functions | points | minutes |")
    listed = [[points, name] for name, _, points, _ in table[:-1]]
    assert listed == [[str(points), f"{number}. {title[0].upper()}{title[1:]}"]
                      for number, (title, points, _) in SECTIONS.items()]
    for column in (2, 3):
        assert sum(int(row[column]) for row in table[:-1]) == int(table[-1][column])
    assert int(table[-1][2]) == 100 and sum(exercise.points for exercise in exercises.EXERCISES) == 80
    assert sum(int(points) for _, points, *_ in rows(HANDOUT, "| part | points | full | half | none |")) == 20
    plan = rows(INSTRUCTOR, "| exercise | minutes | lab, session 1 (2 h) | lab, session 2 (2 h) |")
    minutes = {name: minutes for name, minutes, *_ in plan if minutes}
    assert minutes == {name: minutes for name, _, _, minutes in table}
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


def test_every_mistake_is_listed():
    """The table of common mistakes is mistakes.py, in its order; each check in it is one of the exercise."""
    table = rows(INSTRUCTOR, "| exercise | mistake | caught by |")
    assert table == [[str(mistake.exercise), mistake.name, mistake.check] for mistake in MISTAKES]
    assert f"| {len(MISTAKES)} wrong solutions" in INSTRUCTOR
    assert {mistake.exercise for mistake in MISTAKES} == set(range(1, 8))
    assert f"needs {sum(len(exercise.checks) for exercise in exercises.EXERCISES)} times" in INSTRUCTOR
    for number, _, name in table:
        assert name in [check.name for check in exercises.EXERCISES[int(number) - 1].checks]


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
    assert done.stdout.split("\n") == ["ada l,80", "bob-2,0", ""], done.stderr


# The package for Gradescope


@pytest.fixture
def unpacked(tmp_path):
    """An /autograder as Gradescope would have it, in a temporary folder."""
    make_autograder.main(["--seed", "7", "--out", str(tmp_path / "autograder.zip")])
    root = tmp_path / "autograder"
    (root / "submission").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "autograder.zip") as archive:
        names = {info.filename: info.external_attr >> 16 for info in archive.infolist()}
        archive.extractall(root / "source")
    assert names == {"setup.sh": 0o755, "run_autograder": 0o755, "seed": 0o644,
                     "grade.py": 0o644, "exercises.py": 0o644, "adapter.py": 0o644}
    return root


def run_autograder(root):
    """Run it from elsewhere, as Gradescope does; returns results.json and what was printed."""
    environment = {**os.environ, "AUTOGRADER_ROOT": str(root), "AUTOGRADER_PYTHON": sys.executable}
    done = subprocess.run(["bash", str(root / "source/run_autograder")], cwd="/", env=environment, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads((root / "results/results.json").read_text(encoding="utf-8")), done.stdout


@bash
def test_the_autograder_grades_the_solution(unpacked):
    """In an empty folder, with nothing of the repository: 80 of 80, at the packed seed."""
    shutil.copy(FOLDER / "solution.py", unpacked / "submission/my answer.py")
    results, printed = run_autograder(unpacked)
    assert results["score"] == sum(test["max_score"]
                                   for test in results["tests"]) == 80 and "(seed 7)" in printed
    assert len(results["tests"]) == sum(len(exercise.checks) for exercise in exercises.EXERCISES)


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
    """The handout, the starter and the grader, and no answers; either --seed or --students must be given."""
    make_autograder.main(["--students", "--out", str(tmp_path / "students.zip")])
    with zipfile.ZipFile(tmp_path / "students.zip") as archive:
        assert sorted(archive.namelist()) == [f"assignment/{name}" for name in (
            "HANDOUT.md", "adapter.py", "exercises.py", "grade.py", "starter.py")]
    for wrong in ([], ["--seed", "1", "--students"], ["--seed", "-1"]):
        with pytest.raises(SystemExit) as error:
            make_autograder.main(wrong)
        assert error.value.code == 2
