"""Grade a student's file: a table of points, and a message for every check that failed.

    python assignment/grade.py my_solution.py                       # 60 points in a few seconds
    python assignment/grade.py my_solution.py --only 2 5 --seed 7   # two exercises, other inputs
    python assignment/grade.py my_solution.py --json results.json   # also as Gradescope's results

The checks run here: inputs, expected values, comparison and points are in this process. The student's
functions run in another one, worker.py, which is sent calls and sends back numbers. A check that takes longer
than --timeout seconds, or ends that process, fails, and a new process goes on with the next one. At the end
the process and all that it started are killed, and waited for, before the results are written.

With --user N (for root alone) the student's code runs as that user, and so cannot write what you can write,
read what is yours alone, or touch this process. INSTRUCTOR.md says what is protected without it.

Exit status: 0 if it graded, whatever the points; 1 if the worker could not start; 2 for a wrong command line.
"""
import argparse
import contextlib
import ctypes
import functools
import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from adapter import FUNCTIONS
from exercises import EXERCISES, Gone, StudentError, Wrong, attempt, explain
from worker import decode, encode

START = 300  # seconds for a worker to import torch; a cold disk can be slow
LINE = 2**22  # characters of one message
ENDED, LATE = "ended its process", "was stopped"

# ------------------------------------------------------------------------------------------------
# The student's functions, which run elsewhere
# ------------------------------------------------------------------------------------------------


class Channel:
    """Messages to and from a worker, as lines of JSON."""

    def __init__(self, reader, writer):
        self.reader, self.writer, self.lines = reader, writer, queue.Queue(maxsize=4)
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        with contextlib.suppress(OSError, ValueError):  # closed
            while (line := self.reader.readline(LINE)).endswith("\n"):
                self.lines.put(line)
        self.lines.put(None)

    def send(self, **message):
        with contextlib.suppress(OSError):  # if it is gone, nothing will come back
            self.writer.write(json.dumps(message) + "\n")
            self.writer.flush()

    def receive(self, end):
        """The next message, a dict; Gone if none comes until the time `end`."""
        try:
            line = self.lines.get(timeout=max(0, end - time.monotonic()))
        except queue.Empty:
            line = ""
        if line is None:
            self.lines.put(None)  # for whoever asks again
            raise Gone(ENDED)
        if time.monotonic() > end:
            raise Gone(LATE)
        try:
            if isinstance(message := json.loads(line), dict):
                return message
        except (ValueError, RecursionError):
            pass
        raise Gone("wrote into the grader's pipe")


class Student:
    """A student's functions as attributes: each call is a message. `doing` is what is told of a check."""

    def __init__(self, channel, timeout):
        self.channel, self.timeout, self.doing, self.end = channel, timeout, "", 0.0
        self.shared, self.turn = [], 0
        self.attend, self.same = functools.partial(self.request, "attend", None), lambda: self.request("same")

    def __getattr__(self, name):
        if name not in FUNCTIONS:
            raise AttributeError(name)
        return functools.partial(Context, self) if name == "rectified" else functools.partial(
            self.request, "call", name)

    def begin(self):
        """From here on, `timeout` seconds are left."""
        self.doing, self.end = "", time.monotonic() + self.timeout

    def load(self):
        """Import the file; returns what this replaced in torch."""
        self.begin()
        return str(self.request("load"))

    def reset(self):
        """After a check, put torch back. False if that needs a new process."""
        self.begin()
        with contextlib.suppress(Gone, StudentError):
            return self.request("reset") is True

    def request(self, do, name=None, *args, **kwargs):
        """Have the other side do something; functions among the arguments are called here, when it asks."""
        self.shared, self.turn, refused = [], self.turn + 1, None
        self.channel.send(do=do, name=name, args=[encode(x, self.share) for x in args],
                          kwargs={key: encode(x, self.share) for key, x in kwargs.items()},
                          inference=torch.is_inference_mode_enabled())
        try:
            while "ask" in (message := self.receive()):
                try:
                    self.channel.send(answer=encode(self.asked(**message), self.share))
                except Wrong as error:  # the verdict stands, whatever the student's code makes of this error
                    refused = refused or error
                    self.channel.send(error=["RuntimeError", "the grader refused this call"])
                except Exception as error:
                    self.channel.send(error=[type(error).__name__, str(error)])
            if refused:
                raise refused
            if "error" in message:
                raise StudentError(**message["error"])
            for x, left in zip([*args, *kwargs.values()], message.get("left", [])):
                if left is not None and not torch.equal(x, left := decode(left)):
                    x.copy_(left)  # it was changed in place
            return decode(message["answer"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError) as error:
            raise Gone("answered with something that the grader cannot read") from error

    def receive(self):
        message = self.channel.receive(self.end)
        if message.pop("turn", None) != self.turn:
            raise Gone("wrote into the grader's pipe")
        return message

    def share(self, x):
        self.shared.append(x)
        return len(self.shared) - 1

    def asked(self, ask, number, args, kwargs):
        x, args = self.shared[number], [decode(y) for y in args]
        if ask == "call":
            return x(*args, **{name: decode(y) for name, y in kwargs.items()})
        x.__enter__() if ask == "enter" else x.__exit__(None, None, None)


class Context:
    """The student's `rectified`, entered and left on the other side."""

    def __init__(self, student, *args, **kwargs):
        self.student, self.args, self.kwargs = student, args, kwargs

    def __enter__(self):
        self.student.request("enter", None, *self.args, **self.kwargs)

    def __exit__(self, kind, error, trace):
        if kind is not Gone:
            return self.student.request("leave", None, *([] if error is None else [str(error)])) is True


# ------------------------------------------------------------------------------------------------
# Their process
# ------------------------------------------------------------------------------------------------


class CannotStart(Exception):
    """No worker could be started: the grader's own files are broken, or the user cannot be changed."""


class Worker:
    """A process that runs a student's file; on leaving the context it is dead, with all that it started."""

    def __init__(self, path, memory, prints, user):
        adopt()
        self.before = children()
        self.process = subprocess.Popen([sys.executable, str(Path(__file__).resolve().parent / "worker.py")],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="ascii",
                                        start_new_session=True)
        self.channel = Channel(self.process.stdout, self.process.stdin)
        self.channel.send(path=str(path), memory=memory, prints=prints, user=user)

    def __enter__(self):
        try:
            self.channel.receive(time.monotonic() + START)
        except Gone as error:
            self.stop()
            raise CannotStart(f"the grader's own process {error} Can {sys.executable} import torch? "
                              "Does --user have the right to read it?") from error
        return self

    def __exit__(self, *error):
        self.stop()

    def why(self, gone, timeout):
        """Why nothing came back, for the student; the process is stopped."""
        if str(gone) == ENDED:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=5)
        status = self.stop()
        return {ENDED: f"ended its process with status {status}: " + (
                    "os._exit?" if status >= 0 else "a crash, such as endless recursion or too much memory?"),
                LATE: f"was stopped after {timeout:g} s: is there a loop that does not end?"
                }.get(str(gone), str(gone))

    def stop(self):
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        status = self.process.wait()
        while left := children() - self.before:  # those of another group: adopted when their parent died
            for child in left:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        return status


def adopt():
    """Become the parent of processes whose own parent ended (Linux only), so that none outlives the run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def children():
    """The numbers of this process's children (Linux only)."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text(errors="replace").rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(path.parent.name))
    return found


# ------------------------------------------------------------------------------------------------
# The grader: starts workers until every check has a result
# ------------------------------------------------------------------------------------------------


def grade(path, seed=0, only=None, timeout=20.0, memory=4.0, prints=False, user=None):
    """Grade the file at `path`: {exercises, checks (each with its message, None if it passed), note}."""
    chosen = [exercise for exercise in EXERCISES if only is None or exercise.number in only]
    checks = {f"{exercise.number}.{i}": check
              for exercise in chosen for i, check in enumerate(exercise.checks, start=1)}
    messages, note = {}, ""
    while left := [id for id in checks if id not in messages]:
        with Worker(path, memory, prints, user) as worker:
            student = Student(worker.channel, timeout)
            try:
                changed = student.load()
                note = f"importing the file replaced {changed}; this was undone" if changed else ""
            except (Gone, StudentError) as error:
                if isinstance(error, StudentError):
                    note = f"the file could not be imported\n{explain(error)}"
                else:
                    note = (f"importing the file {worker.why(error, timeout)} It must only define things: "
                            "run them below `if __name__ ...`")
                messages.update(dict.fromkeys(left, note))
            for id in [id for id in left if id not in messages]:
                try:
                    messages[id] = attempt(checks[id], student, seed)
                except Gone as error:
                    accident = str(error) in (ENDED, LATE)  # else somebody tries to speak for the grader
                    for failed in [id] if accident else left:
                        messages.setdefault(failed, f"this check {worker.why(error, timeout)}")
                if len(messages) == len(checks) or not student.reset():
                    break
    return dict(exercises=[dict(number=exercise.number, title=exercise.title) for exercise in chosen],
                checks=[dict(id=id, name=check.name, message=messages[id]) for id, check in checks.items()],
                note=note)


def drawn_from(secret, student):
    """A seed from a secret file and all files beside the student's: others for every change, and no luck."""
    digest = hashlib.sha256(secret.read_bytes())
    for path in sorted(path for path in student.parent.rglob("*") if path.is_file()):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest()[:4], "big")


# ------------------------------------------------------------------------------------------------
# What comes out
# ------------------------------------------------------------------------------------------------


def total(checks):
    return f"{sum(check['message'] is None for check in checks):>4} / {len(checks)}"


def table(report, seed):
    """The report as text."""
    lines = []
    for exercise in report["exercises"]:
        checks = [check for check in report["checks"] if check["id"].startswith(f"{exercise['number']}.")]
        lines.append(f"Exercise {exercise['number']}: {exercise['title']}".ljust(64) + total(checks))
        for check in checks:
            lines.append(f"  {'ok  ' if check['message'] is None else 'FAIL'}  {check['name']}")
            if check["message"] and check["message"] != report["note"]:
                lines += ["            " + line for line in check["message"].splitlines()]
    lines.append("Total".ljust(64) + total(report["checks"]) + f"   (seed {seed})")
    return "\n".join(lines + ["", *report["note"].splitlines()] * bool(report["note"]))


def gradescope(report, seconds):
    """The report in the format of Gradescope's results.json."""
    tests = [dict(name=check["name"], number=check["id"], score=int(check["message"] is None), max_score=1,
                  status="passed" if check["message"] is None else "failed", output=check["message"] or "",
                  visibility="visible", tags=[f"exercise {check['id'].split('.')[0]}"])
             for check in report["checks"]]
    return dict(score=sum(test["score"] for test in tests), output=report["note"], visibility="visible",
                stdout_visibility="hidden", execution_time=round(seconds, 2), tests=tests)


def write(path, results):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1), encoding="utf-8")


def arguments():
    parser = argparse.ArgumentParser(usage="%(prog)s student.py [options]",
                                     description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("student", type=Path, help="the student's file")
    add("--seed", type=int, default=0, help="draws the inputs; hidden tests are the same with other seeds")
    add("--secret", type=Path, metavar="FILE",
        help="draw the seed from this file and from those beside the student's: new inputs for every change")
    add("--only", type=int, nargs="+", choices=range(1, 8), metavar="N",
        help="these exercises alone, of 1 to 7")
    add("--timeout", type=float, default=20.0, help="seconds for each check, and for importing the file (20)")
    add("--memory", type=float, default=4.0, help="GiB that the student's code may take, on Linux (4)")
    add("--user", type=int, metavar="N", help="run the student's code as the user of this number; needs root")
    add("--prints", action="store_true", help="show what the student's code prints (on stderr)")
    add("--json", type=Path, metavar="FILE", help="write Gradescope's results there")
    return parser


def main(argv=None):
    parser = arguments()
    options = parser.parse_args(argv)
    if options.timeout <= 0 or options.memory <= 0:
        parser.error(f"--timeout {options.timeout:g} and --memory {options.memory:g} must be above 0")
    if options.seed < 0:
        parser.error(f"--seed {options.seed} must not be negative")
    if options.user is not None and (options.user <= 0 or not hasattr(os, "geteuid") or os.geteuid() != 0):
        parser.error(f"--user {options.user} must be above 0, and needs root")
    if not options.student.is_file():
        if options.json:  # else Gradescope would show no reason
            write(options.json, dict(score=0, output=f"there is no file {options.student.name}", tests=[]))
        parser.error(f"there is no file {options.student}")
    began, student = time.monotonic(), options.student.resolve()
    seed = drawn_from(options.secret, student) if options.secret else options.seed
    try:
        report = grade(student, seed, options.only, options.timeout, options.memory, options.prints,
                       options.user)
    except CannotStart as error:
        print(error, file=sys.stderr)
        return 1
    print(table(report, seed))
    if options.json:
        try:
            write(options.json, gradescope(report, time.monotonic() - began))
        except OSError as error:
            parser.error(f"--json {options.json} cannot be written: {error}")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a student's messages may hold any character
    sys.exit(main())
