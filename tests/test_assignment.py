"""The assignment: its grader gives right solutions all points, and wrong ones the right points."""
import ast
import contextlib
import inspect
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "assignment"
sys.path.insert(0, str(FOLDER))

import adapter  # noqa: E402
import exercises  # noqa: E402
import grade  # noqa: E402
import solution  # noqa: E402
import worker  # noqa: E402
from make_starter import starter  # noqa: E402
from mistakes import MISTAKES  # noqa: E402

SOLUTION = (FOLDER / "solution.py").read_text()
POINTS = [10, 8, 8, 14, 5, 8, 7]
CHECKS = [(exercise.number, check) for exercise in exercises.EXERCISES for check in exercise.checks]


@pytest.fixture(autouse=True)
def same_path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # load() adds the student's folder


def written(folder, text, name="student.py"):
    (folder / name).write_text(text)
    return folder / name


def replaced(text, old, new):
    assert text.count(old) == 1, f"{text.count(old)} times in solution.py: {old}"
    return text.replace(old, new)


def failures(path, *seeds, checks=CHECKS):
    """{(exercise, name of a check): its message} of the checks that a file fails, for each seed.

    The student's side is a thread of this process here, on pipes: much faster than a process each.
    """
    (ours, theirs), (back, forth) = os.pipe(), os.pipe()
    reader, answers = os.fdopen(ours), os.fdopen(forth, "w")
    side = worker.Side(reader, answers, path)
    thread = threading.Thread(target=side.serve, daemon=True)
    thread.start()
    student, found = grade.Student(grade.Channel(os.fdopen(back), os.fdopen(theirs, "w")), timeout=60), []
    student.load()
    for seed in seeds or (0,):
        found.append({})
        for number, check in checks:
            message = exercises.attempt(check, student, seed)
            assert student.reset()
            if message is not None:
                found[-1][number, check.name] = message
    student.channel.writer.close()
    thread.join()
    answers.close()
    return found if seeds else found[0]


def graded(path, *options):
    """(results as JSON, what was printed) of the command line, in this process but for the worker."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert grade.main([str(path), "--json", str(path.parent / "results.json"), *options]) == 0
    return json.loads((path.parent / "results.json").read_text()), out.getvalue()


def lost(results):
    return {test["number"]: test["output"] for test in results["tests"] if test["score"] < test["max_score"]}


# The files


def test_the_starter_is_up_to_date():
    """starter.py is what make_starter.py makes of solution.py, and holds none of it."""
    assert (FOLDER / "starter.py").read_text() == starter(SOLUTION), "run: python assignment/make_starter.py"
    assert "SOLUTION" not in starter(SOLUTION)
    for text in ("# BEGIN SOLUTION\n", "# END SOLUTION\n", "# BEGIN SOLUTION\n# BEGIN SOLUTION\n"):
        with pytest.raises(ValueError, match="SOLUTION"):
            starter(text)


def test_the_assignment_can_be_copied():
    """Beside torch and the standard library its files import one another alone (but for exercise 8)."""
    known = {*sys.stdlib_module_names, "torch", "adapter", "exercises", "worker"}
    for name in ("starter", "exercises", "adapter", "worker", "grade", "make_starter", "mistakes"):
        for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [x.name for x in node.names] if isinstance(node, ast.Import) else [node.module]
                assert {n.split(".")[0] for n in names} <= known, name
    assert "import erg" not in SOLUTION


def test_points_names_and_docstrings():
    """60 checks, a point each; no two of one name; every function says its shapes, and no docstring a hint."""
    assert [len(exercise.checks) for exercise in exercises.EXERCISES] == POINTS and sum(POINTS) == 60
    assert len({check.name for _, check in CHECKS}) == len(CHECKS)
    nodes = [node for node in ast.parse(SOLUTION).body if isinstance(node, ast.FunctionDef)]
    assert {node.name for node in nodes} == {*adapter.FUNCTIONS, "experiment"}
    for node in nodes:
        assert "Shapes: " in ast.get_docstring(node) and "Hint" not in ast.get_docstring(node), node.name


# Right solutions


def test_the_solution_passes(tmp_path):
    """At any seed."""
    seeds = (0, 1, 2, 3, 1234, 2**31)
    assert failures(written(tmp_path, SOLUTION), *seeds) == [{}] * len(seeds)


ANOTHER = SOLUTION + '''

def scores(a, b): return torch.einsum("...sd,...nd->...sn", a, b)

def energy_gradient(xi, X, tau=1.0, alpha=1.0, beta=None):  # in single precision
    kind, xi, X = xi.dtype, xi.float(), X.float()
    b = tau * (1 / math.sqrt(xi.size(-1)) if beta is None else beta)
    return (xi - alpha * torch.einsum("...sn,...nd->...sd", (b * scores(xi, X)).softmax(-1), X)).to(kind)

def energy_attention(q, k, v, tau=1.0, alpha=1.0, gamma=1.0, K=1):
    state = q.clone()
    for _ in range(K):
        weights = torch.softmax(tau * scores(state, k) / q.size(-1) ** 0.5, -1)
        state.copy_((1 - gamma) * state + gamma * alpha * (weights @ v))
    return state.float()

def temperature_for_entropy(q, k, target, entropy=attention_entropy):
    low, high = torch.tensor(1e-6), torch.tensor(1e6)
    if target > entropy(q, k, tau=low).mean() or target < entropy(q, k, tau=high).mean():
        raise ValueError("out of reach")
    for _ in range(100):
        tau = (low * high).sqrt()
        now = entropy(q, k, tau=tau).mean()
        if abs(now - target) < 5e-4:
            return tau
        low, high = (tau, high) if now > target else (low, tau)

class rectified(torch.overrides.TorchFunctionMode):  # exercise 4 by TorchFunctionMode
    def __init__(self, tau, layers, rows=None, queries=None):
        super().__init__()
        self.tau, self.layers, self.n, self.met = tau, list(layers), -1, set()
        self.rows, self.queries = rows, queries

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            names = dict(zip(("query", "key", "value"), args))
            q, k = names.get("query", kwargs.get("query")), names.get("key", kwargs.get("key"))
            if q.size(-2) == k.size(-2):
                self.n += 1
                if self.n in self.layers:
                    self.met.add(self.n)
                    chosen = torch.zeros(len(q), q.size(-2), dtype=torch.bool)
                    chosen[self.rows or slice(None), self.queries or slice(None)] = True
                    q = torch.where(chosen[:, None, :, None], q * self.tau, q)
                    if args:
                        args = (q, *args[1:])
                    else:
                        kwargs = {**kwargs, "query": q}
        return function(*args, **kwargs)

    def __exit__(self, kind, error, trace):
        super().__exit__(kind, error, trace)
        if kind is None and not set(self.layers) <= self.met:
            raise RuntimeError("missed")

def encode(encoder, tokens, tau, layers, rectify=rectified):  # weak first, a list
    with rectify(tau=tau, layers=layers, rows=None, queries=None):
        weak = encoder(tokens)
    if torch.allclose(strong := encoder(tokens), weak):
        raise ValueError("nothing to contrast")
    return [strong, weak]

def guided_velocity(model, x, t, condition, negative, w, tau_i, layers, kappa, queries=None, rectify=rectified):
    B, times = x.size(0), x.new_full((2 * x.size(0),), t)
    negative = condition if negative is None else negative
    if w == 1.0 or (t <= kappa and negative is condition):
        return model(x=x, t=times[:B], condition=condition)
    inputs = dict(x=x.repeat(2, *[1] * (x.dim() - 1)), t=times, condition=torch.cat((condition, negative)))
    if t > kappa:
        with rectify(tau_i, layers, slice(B, None), queries):
            v = model(**inputs)
    else:
        v = model(**inputs)
    return v[B:] + w * (v[:B] - v[B:])

def sample(velocity, noise, steps, trajectory=False):
    if not steps >= 1:
        raise ValueError(steps)
    path = torch.empty(steps + 1, *noise.shape, dtype=noise.dtype)
    path[0] = noise
    times = torch.linspace(0, 1, steps + 1)
    for i in range(steps):
        path[i + 1] = path[i] + (times[i + 1] - times[i]) * velocity(path[i].clone(), t=times[i])
    return path if trajectory else path[-1]
'''


def test_another_right_solution_passes(tmp_path):
    """Other numerics, einsum, a class, keyword calls; exercise 4 by a TorchFunctionMode."""
    assert failures(written(tmp_path, ANOTHER), 0, 1, 2) == [{}] * 3


# Wrong solutions


def test_the_starter_fails_every_check(tmp_path):
    """No point for nothing: every check of the starter fails, and says that it is not written yet."""
    messages = failures(written(tmp_path, starter(SOLUTION)))
    assert len(messages) == len(CHECKS)
    assert all(message.startswith("not written yet: exercise") for message in messages.values())


@pytest.mark.parametrize("body", ["return None", "return args[0]", "return args[0] * 0", "yield"])
def test_doing_nothing_is_worth_nothing(tmp_path, body):
    """Functions that return nothing, their input or zeros get three points at most."""
    text = "import contextlib\n" + "".join(f"def {f}(*args, **kwargs): {body}\n" for f in adapter.FUNCTIONS)
    messages = failures(written(tmp_path, text + "rectified = contextlib.contextmanager(rectified)\n"))
    assert len(messages) >= len(CHECKS) - 3
    assert all(message and "raised Wrong" not in message for message in messages.values())


@pytest.mark.parametrize("seed, mistake", enumerate(MISTAKES), ids=lambda x: getattr(x, "name", None))
def test_mistakes_cost_points_in_their_exercise_alone(tmp_path, seed, mistake):
    """A planted mistake fails the check that it names, at each one's own seed, and none of another exercise."""
    messages = failures(written(tmp_path, replaced(SOLUTION, mistake.old, mistake.new)), seed)[0]
    assert (mistake.exercise, mistake.check) in messages
    assert {number for number, _ in messages} == {mistake.exercise}


EXERCISE = {1: ("energy", "energy_gradient", "descend"), 2: ("energy_attention",),
            3: ("attention_entropy", "temperature_for_entropy"), 4: ("rectified",), 5: ("encode",),
            6: ("guided_velocity",), 7: ("sample",)}
USUAL = {  # for each argument, what somebody who ignores it could write in its place: its default, and these
    "energy": dict(tau=[0.3], alpha=[2.0], beta=[1.0, 3**-0.5]),
    "descend": dict(gamma=[0.5], K=[2, 3], tau=[0.5], alpha=[1.5], beta=[1.0]),
    "energy_attention": dict(tau=[0.0, 0.3], alpha=[0.0, 2.0], gamma=[0.5], K=[2, 3, 4]),
    "attention_entropy": dict(tau=[0.0, 0.3]),
    "temperature_for_entropy": dict(target=[0.5, 0.7], entropy=["attention_entropy"]),
    "rectified": dict(tau=[0.0, 0.3], layers=[[0], [0, 1], [1]],
                      rows=["slice(2, 4)", "slice(1, None)", "slice(1, 3)"],
                      queries=["slice(0, 2)", "slice(0, 3)", "slice(1, 3)"]),
    "encode": dict(tau=[0.1, 0.3], layers=[[0], [1], [0, 1]], rectify=["rectified"]),
    "guided_velocity": dict(t=[0.25, 0.5, 0.75], negative=["condition"], w=[0.0, 1.0, 2.0], tau_i=[0.1],
                            layers=[[0], [1]], kappa=[0.0, 0.25, 0.3, 0.5], rectify=["rectified"],
                            queries=["slice(0, 3)", "slice(0, x.shape[1])"]),
    "sample": dict(steps=[2, 3, 7], trajectory=[True]),
}
USUAL["energy_gradient"] = USUAL["energy"]


@pytest.mark.parametrize("name", adapter.FUNCTIONS)
def test_every_argument_matters(tmp_path, name):
    """Whoever ignores an argument, and writes a usual value in its place, loses a point there, at every seed;
    tensors are replaced by zeros, and functions by those of the student's own."""
    parameters = inspect.signature(getattr(solution, name)).parameters
    checks = [(number, check) for number, check in CHECKS if name in EXERCISE[number]]
    for argument, parameter in parameters.items():
        values = [repr(value) if isinstance(value, (list, float, int)) else value
                  for value in USUAL[name].get(argument, [])]
        if parameter.default is not parameter.empty and not callable(parameter.default):
            values.append(repr(parameter.default))
        if not values:  # a tensor or a model
            values = {"model": ["lambda x, t, condition: x"], "encoder": ["lambda x: x[..., None].double()"],
                      "velocity": ["lambda x, t: x"], "tokens": ["1 + torch.arange(3).expand(2, 3)"]
                      }.get(argument, [f"torch.zeros_like({argument})"])
        for value in values:
            text = SOLUTION + f"""
original = {name}

def {name}(*args, **kwargs):
    import inspect
    bound = inspect.signature(original).bind(*args, **kwargs)
    bound.apply_defaults()
    {', '.join(parameters)}{',' * (len(parameters) == 1)} = bound.arguments.values()
    {argument} = {value}
    return original({', '.join(parameters)})
"""
            for messages in failures(written(tmp_path, text), 0, 1, checks=checks):
                assert messages, f"{name} may ignore {argument}: {value}"


def test_messages_name_input_result_and_place(tmp_path):
    """A failed check tells the call, what came out, what was expected, what to read; an error its line."""
    text = replaced(SOLUTION, "return 0.5 * xi.square()", "return xi.square()")
    text = replaced(text, "    b = tau * (xi.shape[-1] ** -0.5 if beta is None else beta)\n    association",
                    "    b = tau / 0\n    association")
    messages = failures(written(tmp_path, text))
    for part in ("energy(xi, X, beta=", "xi = [[", "X = [[", "returned [", "expected [",
                 "Read again: equation 9"):
        assert part in messages[1, "the energy is that of the loops"]
    message = messages[1, "the gradient is that of the energy"]
    assert "raised ZeroDivisionError" in message and "of student.py: b = tau / 0" in message
    (tmp_path / "other.py").write_text("def energy(xi, X, **settings):\n    raise KeyError('elsewhere')\n")
    messages = failures(written(tmp_path, "from other import energy\n", "two.py"))
    assert "in line 2 of other.py" in messages[1, "the energy is that of the loops"]
    assert messages[7, "the noise is left as it is"] == "two.py has no function named sample"


# The command


def valid_gradescope(results):
    """Whether a dict is in Gradescope's format, as its documentation gives it."""
    assert set(results) <= {"score", "execution_time", "output", "visibility", "stdout_visibility", "tests"}
    for test in results["tests"]:
        assert set(test) <= {"score", "max_score", "status", "name", "number", "output", "tags", "visibility"}
        assert test["status"] == ("passed" if 0 <= test["score"] == test["max_score"] else "failed")
        assert all(isinstance(test[name], str) for name in ("output", "name", "number"))
    assert results["score"] == sum(test["score"] for test in results["tests"])
    return True


def test_the_command_grades_the_solution(tmp_path):
    """As a command, in a process of its own: 60 points, exit status 0, results in Gradescope's format."""
    out = tmp_path / "new/results.json"
    command = [sys.executable, FOLDER / "grade.py", FOLDER / "solution.py", "--json", out]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "60 / 60" in done.stdout and "FAIL" not in done.stdout
    results = json.loads(out.read_text())
    assert valid_gradescope(results) and results["score"] == 60 and len(results["tests"]) == len(CHECKS)


ACCIDENTS = [  # (where, what is put in front of it)
    ("    for _ in range(K):\n        attended", "    if tau == 0:\n        while True: pass\n"
     "    if K == 4: torch.softmax = F.softmax = torch.Tensor.softmax = torch.logsumexp = None\n"),
    ("    p = torch.softmax(tau", "    if tau > 500: __import__('os')._exit(0)\n"),
    ("    low, high = math.log(1e-4)", "    if target < 0: raise KeyboardInterrupt\n"),
    ("    original, count, missing =", "    if layers == [0, 1]: Leak().__enter__()\n"),
    ("    strong = encoder",
     "    if len(tokens[0]) == 1: return encode(encoder, tokens, tau, layers, rectify)\n"),
    ("    B, late = len(x)", "    if w == 0: [0.0] * 10**13\n    print('x' * 10**7, '{\"score\": 80}')\n"),
    ("    x, path = noise, [noise]", "    if trajectory: raise SystemExit('bye')\n"),
]
LEAK = '''
class Leak(torch.overrides.TorchFunctionMode):  # entered, and never left
    def __torch_function__(self, function, types, args=(), kwargs=None):
        answer = function(*args, **(kwargs or {}))
        return 2 * answer if function is F.scaled_dot_product_attention else answer
'''


def test_accidents_cost_the_checks_that_they_happen_in(tmp_path):
    """Endless loops, exits, interrupts, recursion, memory, floods of print, functions of torch that are
    replaced for good, contexts that are never left: each costs its own checks, and no other."""
    text = SOLUTION + LEAK
    for where, what in ACCIDENTS:
        text = replaced(text, where, what + where)
    results, printed = graded(written(tmp_path, text), "--timeout", "3")
    found = {test["name"]: test["output"] for test in results["tests"] if test["score"] == 0}
    expected = {"tau = 0 is the mean of the values": "was stopped after 3 s",
                "weights that vanish are no nan": "os._exit?",
                "an entropy out of reach is a ValueError": "raised KeyboardInterrupt",
                "after the context all is as it was": "and after it",
                "after an exception, too, and it passes through": "and after it",
                "equal encodings are a ValueError": "raised RecursionError",
                "w = 0 is the negative alone": "raised MemoryError",
                "the trajectory has all of x, the noise first": "called sys.exit: bye"}
    assert set(found) == set(expected)
    for name, part in expected.items():
        assert part in found[name], name
    assert valid_gradescope(results) and "xxx" not in printed


FORGERIES = {
    "replaces the checks": """
import gc, sys
for found in [x for x in gc.get_objects() if type(x).__name__ == "Check"]:
    object.__setattr__(found, "function", lambda student, seed: None)
for module in list(sys.modules.values()):
    for exercise in getattr(module, "EXERCISES", []):
        for found in exercise.checks:
            object.__setattr__(found, "function", lambda student, seed: None)
""",
    "imports the checks and replaces them": """
import exercises
for exercise in exercises.EXERCISES:
    for found in exercise.checks:
        object.__setattr__(found, "function", lambda student, seed: None)
""",
    "reports through the stack": """
import os, sys
frame = sys._getframe()
while frame:
    for scope in (frame.f_locals, frame.f_globals):
        for report in (scope.get("report"), getattr(scope.get("self"), "tell", None)):
            for i in range(200) if report else ():
                report(answer=None, left=[], result=f"{1 + i // 20}.{1 + i % 20}", message=None, score=1)
    frame = frame.f_back
for fd in range(20):
    try: os.write(fd, b'{"answer": true, "score": 60}\\n' * 100)
    except OSError: pass
""",
    "outlives the run": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid()
        while True:
            open(RESULTS, "w").write('{"score": 60, "tests": []}')
            time.sleep(0.05)
    os._exit(0)
""",
}


@pytest.mark.skipif(sys.platform != "linux", reason="processes are adopted on Linux alone")
@pytest.mark.parametrize("forgery", FORGERIES)
def test_forgeries_are_worth_nothing(tmp_path, forgery):
    """Without any exercise written: no point, and what is written after the run is written by the grader."""
    out = tmp_path / "results.json"
    text = starter(SOLUTION) + f"RESULTS = {str(out)!r}\n" + FORGERIES[forgery]
    command = [sys.executable, FOLDER / "grade.py", written(tmp_path, text), "--json", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    for seconds in (0, 0.5):
        time.sleep(seconds)
        results = json.loads(out.read_text())
        assert results["score"] == 0 and len(results["tests"]) == len(CHECKS) and done.returncode == 0
    assert "   0 / 60" in done.stdout


@pytest.fixture
def open_folder():
    """A temporary folder that every user may read; pytest's own are for one user."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")
def test_another_user_can_reach_nothing(open_folder):
    """With --user the student's code can neither write results, nor read a secret, nor touch the grader; right
    solutions get their points."""
    out, secret = open_folder / "results.json", written(open_folder, "4711", "secret")
    secret.chmod(0o600)
    text = f"""
import os, signal
def tried(what):
    try: what()
    except PermissionError: return "refused"
raise SystemError([tried(lambda: open({str(out)!r}, "w")), tried(lambda: open({str(secret)!r})),
                   tried(lambda: os.kill(os.getppid(), signal.SIGKILL)), tried(lambda: os.setuid(0)),
                   tried(lambda: open(f"/proc/{{os.getppid()}}/mem", "rb"))])
"""
    results, _ = graded(written(open_folder, text), "--user", "47110", "--only", "7")
    assert results["score"] == 0 and str(["refused"] * 5) in results["output"]
    results, _ = graded(written(open_folder, SOLUTION), "--user", "47110", "--secret", str(secret))
    assert results["score"] == 60


def test_a_secret_draws_other_inputs_for_every_change(tmp_path):
    """The seed follows from the secret and from all files beside the student's, and from nothing else."""
    path, secrets = written(tmp_path, SOLUTION), [FOLDER / "grade.py", FOLDER / "worker.py"]
    seeds = [grade.drawn_from(secret, path) for secret in [*secrets, secrets[0]]]
    written(tmp_path, "answers = {}", "learned_by_heart.py")
    assert seeds[0] == seeds[2] and len({*seeds, grade.drawn_from(secrets[0], path)}) == 3


@pytest.mark.parametrize("name", ["erg", "exercises", "solution", "assignment.mistakes"])
def test_files_with_answers_cannot_be_imported(tmp_path, name):
    text = f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(FOLDER)!r}]\nimport {name}\n"
    results, _ = graded(written(tmp_path, text), "--only", "7")
    assert results["score"] == 0 and f"does not let a solution import {name}" in results["output"]


@pytest.mark.parametrize("text, part", [
    ("while True: pass", "was stopped after 1 s"), ("import sys\nsys.exit('now')", "called sys.exit: now"),
    ("import os\nos._exit(3)", "ended its process with status 3"), ("def energy(:\n", "student.py, line 1"),
    ("import no_such_module_anywhere", "in line 1 of student.py"), ("\x00", "could not be imported")])
def test_files_that_cannot_be_imported(tmp_path, text, part):
    """Nothing is graded, and the reason is given once."""
    seconds = "1" if "while" in text else "20"
    results, printed = graded(written(tmp_path, text), "--timeout", seconds, "--only", "7")
    assert results["score"] == 0 and len(lost(results)) == len(results["tests"]) == 7
    assert part in results["output"] and printed.count(part) == 1


def test_what_import_replaces_is_put_back(tmp_path):
    """A file that patches torch when it is imported is told so, and graded without the patch."""
    text = SOLUTION + "\nF.scaled_dot_product_attention = max\ntorch.set_default_dtype(torch.float64)\n"
    results, printed = graded(written(tmp_path, text), "--only", "2", "4")
    assert results["score"] == 22 and "; this was undone" in printed
    assert "the default dtype" in printed and "torch.nn.functional.scaled_dot_product_attention" in printed


def test_only_seed_and_partial_work(tmp_path, capfd):
    """--only grades what it names; --seed changes the inputs; a missing function costs its own checks; what
    the student's code prints is dropped, or shown on stderr on request."""
    text = replaced(SOLUTION, "def sample(", "def simple(") + "\nprint('hello from the file')\n"
    path, seen = written(tmp_path, replaced(text, "return 0.5 * xi.square()", "return xi.square()")), []
    for seed, *prints in (("0",), ("7", "--prints")):
        results, printed = graded(path, "--only", "1", "7", "--seed", seed, *prints)
        assert {test["number"][0] for test in results["tests"]} == {"1", "7"} and f"(seed {seed})" in printed
        assert all("no function named sample" in why for n, why in lost(results).items() if n[0] == "7")
        assert 0 < results["score"] < 10 and valid_gradescope(results) and "hello" not in printed
        assert ("hello from the file" in capfd.readouterr().err) == bool(prints)
        seen.append(lost(results)["1.1"])
    assert seen[0] != seen[1]


@pytest.mark.parametrize("options", [[], ["missing.py"], ["--only", "8"], ["--seed", "-1"], ["--seed", "x"],
                                     ["--timeout", "0"], ["--memory", "-1"], ["--user", "0"], ["--no-such-option"]])
def test_usage_errors(tmp_path, options, capsys):
    """A wrong command line is exit status 2, with a reason; Gradescope is told of a missing file, too."""
    student = [] if options in ([], ["missing.py"]) else [str(FOLDER / "solution.py")]
    with pytest.raises(SystemExit) as error:
        grade.main([*student, *options, "--json", str(tmp_path / "results.json")])
    assert error.value.code == 2 and "error: " in capsys.readouterr().err
    if options == ["missing.py"]:
        results = json.loads((tmp_path / "results.json").read_text())
        assert valid_gradescope(results) and "missing.py" in results["output"]


# The open experiment


def test_the_pieces_make_a_sampler_of_the_shipped_model():
    """Exercises 2 and 4 to 7 of the solution are what erg.py does, on the shipped digits, to 1e-5: tau in all
    layers of the encoder, and in the denoiser on the image's queries."""
    import erg
    from tiny_dit import tokenize
    from toy import sampling

    student = solution
    q, k, v = torch.randn(3, 2, 3, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    settings = dict(tau=0.3, alpha=0.8, gamma=0.6, K=4)
    torch.testing.assert_close(student.energy_attention(q, k, v, **settings),
                               erg.energy_attention(q, k, v, **settings))
    model, *_ = sampling.load_checkpoint(sampling.WEIGHTS / "digits.pt")
    captions = ["a red seven on blue", "a white two on black"]
    p = dict(w=2.0, tau_i=0.1, layers=range(1, 3), kappa=0.3)
    tokens, patches = tokenize(captions, model.config), slice(0, model.side**2)
    prepared = sampling.guided_by(erg.ERG(**p, tau_c=0.3))
    wanted = sampling.generate(model, captions, prepared, steps=5, seed=3)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        condition, negative = student.encode(model.encoder, tokens, 0.3, range(model.config.text_depth))
        velocity = lambda x, t: student.guided_velocity(model, x, t, condition, negative, **p, queries=patches)
        x = student.sample(velocity, noise, 5)
    torch.testing.assert_close(x.clamp(-1, 1), wanted, rtol=0, atol=1e-5)


def test_the_experiment_runs(tmp_path):
    """The open experiment, on a handful of images: every metric, for every temperature and seed."""
    pytest.importorskip("matplotlib")
    namespace = {}
    exec(compile(SOLUTION, "solution.py", "exec"), namespace)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = namespace["experiment"](seeds=range(2), samples=12, steps=2,
                                          figure=str(tmp_path / "figure.png"))
    assert (tmp_path / "figure.png").stat().st_size > 1000
    assert all(len(values) == 2 for metrics in results.values() for values in metrics.values())
    assert "prompt at tau_c 0.9 minus at 0.01" in out.getvalue()
