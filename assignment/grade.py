"""Grade a student's file: a table of points, and a message for every check that failed.

    python assignment/grade.py my_solution.py                       # 80 points in a few seconds
    python assignment/grade.py my_solution.py --only 2 5 --seed 7   # two exercises, other inputs
    python assignment/grade.py my_solution.py --json results.json   # also as Gradescope's results
    python assignment/grade.py submission/solution.py --gradescope  # the same, where Gradescope looks for it

A process of its own, the worker, imports the file and runs the checks one after another. It reports the
beginning and the result of each through a pipe, in lines that begin with a random token; what the student's
code prints is dropped. If a check takes longer than --timeout seconds, or ends its process, that check fails,
and a new worker goes on with the next one. This stops accidents, not attackers: the student's code runs with
your rights, and could find the token.

Exit status: 0 if it graded, whatever the points; 1 if the worker could not start; 2 for a wrong command line.
"""
import argparse
import contextlib
import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

GRADESCOPE = Path("/autograder/results/results.json")
START = 300  # seconds for a worker to import torch; a cold disk can be slow

# ------------------------------------------------------------------------------------------------
# The worker: imports the student's file, runs the checks
# ------------------------------------------------------------------------------------------------


def work():
    """Read a job from stdin, report through what was stdout."""
    job = json.loads(sys.stdin.readline())
    pipe = os.fdopen(os.dup(1), "w", encoding="ascii")  # processes that the student starts do not inherit it

    def report(**message):
        print(job["token"], json.dumps(message), file=pipe, flush=True)

    sys.dont_write_bytecode = True
    import torch

    from adapter import Guard, load
    from exercises import EXERCISES, attempt, explain

    torch.set_num_threads(1)
    chosen = [exercise for exercise in EXERCISES if job["only"] is None or exercise.number in job["only"]]
    checks = {f"{exercise.number}.{i}": check
              for exercise in chosen for i, check in enumerate(exercise.checks, start=1)}
    report(exercises=[dict(number=exercise.number, title=exercise.title) for exercise in chosen],
           checks=[dict(id=id, name=check.name, points=check.points) for id, check in checks.items()])
    elsewhere = 2 if job["prints"] else os.open(os.devnull, os.O_WRONLY)
    os.dup2(elsewhere, 1)
    os.dup2(elsewhere, 2)
    limit_memory(job["memory"])

    guard = Guard()
    try:
        student = load(job["path"])
    except BaseException as error:  # sys.exit, too
        return report(failed=explain(error, path=job["path"]))
    report(failed=None, changed=guard.restore())
    for id in [id for id in checks if id not in job["done"]]:
        report(check=id)
        message = attempt(checks[id], student, job["seed"])
        guard.restore()
        report(result=id, message=message)
        if not guard.clean():
            return report(restart=True)


def limit_memory(gigabytes):
    """Let an allocation fail that would take this process beyond `gigabytes` more than it has: Linux only."""
    try:
        import resource
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = int(pages * resource.getpagesize() + gigabytes * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (ImportError, OSError, ValueError):
        pass  # elsewhere the time limit has to do


class Worker:
    """A worker process, and the messages that it sends."""

    def __init__(self, job):
        token = secrets.token_hex(16)
        self.process = subprocess.Popen([sys.executable, str(Path(__file__).resolve()), "--worker"],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self.messages = queue.Queue()
        threading.Thread(target=self.listen, args=(token.encode(),), daemon=True).start()
        with contextlib.suppress(OSError), self.process.stdin as stdin:
            stdin.write(json.dumps({**job, "token": token}).encode() + b"\n")

    def listen(self, token):
        for line in self.process.stdout:
            if line.startswith(token + b" "):
                self.messages.put(json.loads(line[len(token):]))
        self.messages.put(None)

    def hear(self, seconds):
        """(message, None), or (None, what went wrong) if none came."""
        try:
            message = self.messages.get(timeout=seconds)
        except queue.Empty:
            return None, f"was stopped after {seconds:g} s: is there a loop that does not end?"
        if message is not None:
            return message, None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        status = self.stop()
        why = "os._exit?" if status >= 0 else "a crash, such as endless recursion or too much memory?"
        return None, f"ended its process with status {status}: {why}"

    def stop(self):
        """End the process, and those that it started."""
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        return self.process.wait()


# ------------------------------------------------------------------------------------------------
# The grader: starts workers until every check has a result
# ------------------------------------------------------------------------------------------------


class CannotStart(Exception):
    """No worker could be started: torch is missing, or the grader's own files are broken."""


def grade(path, seed=0, only=None, timeout=20.0, memory=4.0, prints=False):
    """Grade the file at `path`: {exercises, checks (each with its message, None if it passed), note}."""
    plan, messages, note = None, {}, ""
    while plan is None or len(messages) < len(plan["checks"]):
        worker = Worker(dict(path=str(path), seed=seed, only=only, memory=memory, prints=prints,
                             done=list(messages)))
        try:
            plan, trouble = worker.hear(START)
            if trouble:
                raise CannotStart(f"the grader itself {trouble} Can {sys.executable} import torch?")
            note = follow(worker, [check["id"] for check in plan["checks"]], messages, timeout)
        finally:
            worker.stop()
    checks = [{**check, "message": messages[check["id"]]} for check in plan["checks"]]
    return dict(exercises=plan["exercises"], checks=checks, note=note)


def follow(worker, ids, messages, timeout):
    """Fill in `messages`, one for each id, until the worker ends; returns a note on the import."""
    message, trouble = worker.hear(timeout)
    if trouble or message["failed"]:
        note = (f"importing the file {trouble} It must only define things: run them below `if __name__ ...`"
                if trouble else f"the file could not be imported\n{message['failed']}")
        messages.update({id: note for id in ids if id not in messages})
        return note
    changed = ", ".join(message["changed"])
    note = f"importing the file replaced {changed}; this was undone" if changed else ""
    running = None
    while len(messages) < len(ids):
        message, trouble = worker.hear(timeout)
        if trouble:
            left = [id for id in ids if id not in messages]
            messages[running if running in left else left[0]] = f"this check {trouble}"
            break
        running = message.get("check", running)
        if "result" in message:
            messages.setdefault(message["result"], message["message"])
        if "restart" in message:
            break
    return note


# ------------------------------------------------------------------------------------------------
# What comes out
# ------------------------------------------------------------------------------------------------


def scored(check):
    return check["points"] if check["message"] is None else 0


def total(checks):
    return f"{sum(map(scored, checks)):>4} / {sum(check['points'] for check in checks)}"


def table(report, seed):
    """The report as text."""
    lines = []
    for exercise in report["exercises"]:
        checks = [check for check in report["checks"] if check["id"].startswith(f"{exercise['number']}.")]
        lines.append(f"Exercise {exercise['number']}: {exercise['title']}".ljust(64) + total(checks))
        for check in checks:
            message = check["message"]
            verdict = "ok  " if message is None else "FAIL"
            lines.append(f"  {verdict} {scored(check)}/{check['points']}  {check['name']}")
            if message and message != report["note"]:
                lines += ["            " + line for line in message.splitlines()]
    lines.append("Total".ljust(64) + total(report["checks"]) + f"   (seed {seed})")
    return "\n".join(lines + ["", *report["note"].splitlines()] * bool(report["note"]))


def gradescope(report, seconds):
    """The report in the format of Gradescope's results.json."""
    tests = [dict(name=check["name"], number=check["id"], score=scored(check), max_score=check["points"],
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
    add("--only", type=int, nargs="+", choices=range(1, 8), metavar="N",
        help="these exercises alone, of 1 to 7")
    add("--timeout", type=float, default=20.0, help="seconds for each check, and for importing the file (20)")
    add("--memory", type=float, default=4.0, help="GiB that the student's code may take, on Linux (4)")
    add("--prints", action="store_true", help="show what the student's code prints (on stderr)")
    add("--json", type=Path, metavar="FILE", help="write Gradescope's results there")
    add("--gradescope", action="store_const", dest="json", const=GRADESCOPE,
        help=f"the same as --json {GRADESCOPE}")
    return parser


def main(argv=None):
    parser = arguments()
    options = parser.parse_args(argv)
    if options.timeout <= 0 or options.memory <= 0:
        parser.error(f"--timeout {options.timeout:g} and --memory {options.memory:g} must be above 0")
    if options.seed < 0:
        parser.error(f"--seed {options.seed} must not be negative")
    if not options.student.is_file():
        if options.json:  # else Gradescope would show no reason
            write(options.json, dict(score=0, output=f"there is no file {options.student.name}", tests=[]))
        parser.error(f"there is no file {options.student}")
    began = time.monotonic()
    try:
        report = grade(options.student.resolve(), options.seed, options.only, options.timeout, options.memory,
                       options.prints)
    except CannotStart as error:
        print(error, file=sys.stderr)
        return 1
    print(table(report, options.seed))
    if options.json:
        try:
            write(options.json, gradescope(report, time.monotonic() - began))
        except OSError as error:
            parser.error(f"--json {options.json} cannot be written: {error}")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a student's messages may hold any character
    sys.exit(work() if sys.argv[1:] == ["--worker"] else main())
