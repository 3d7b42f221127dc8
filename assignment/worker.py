"""The student's side of the grader: a process that runs the student's functions, and that nobody believes.

grade.py starts it and sends calls, one a line of JSON: a function's name and its arguments. What comes back
are numbers, tensors as lists of numbers, and errors as text: never a pickle. No check, no seed and no
expected value is in here. An argument that is a function stays on the other side: to call it is a line, too.
"""
import builtins
import contextlib
import importlib.abc
import json
import os
import re
import sys
import traceback
import types
from pathlib import Path

import torch
import torch.nn.functional as F

import adapter

# ------------------------------------------------------------------------------------------------
# What may travel
# ------------------------------------------------------------------------------------------------

LARGE = 10_000  # numbers in a tensor, or items in a range
DTYPES = {str(kind).removeprefix("torch."): kind for kind in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)}


class Other:
    """What stands for an object that does not travel: its class has the same name, and it prints the same."""

    def __repr__(self):
        return self.text


def encode(x, share=None):
    """x as what JSON can hold. `share` keeps a function or a context on this side, and returns its number."""
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    if isinstance(x, torch.Tensor) and (dtype := str(x.dtype).removeprefix("torch.")) in DTYPES:
        if x.numel() > LARGE:
            raise ValueError(f"a tensor of shape {tuple(x.shape)} is too large")
        return dict(tensor=x.detach().flatten().tolist(), shape=list(x.shape), dtype=dtype)
    for kind in (list, tuple, set, frozenset):
        if isinstance(x, kind):
            return {kind.__name__: [encode(y, share) for y in x]}
    if isinstance(x, (slice, range)):
        return {type(x).__name__: [encode(y) for y in (x.start, x.stop, x.step)]}
    if share and (callable(x) or hasattr(x, "__enter__")):
        return dict(shared=share(x), text=repr(x)[:200])
    return dict(object=type(x).__name__, text=repr(x)[:200])


def decode(x, stand_in=None):
    """The value that `encode` was given; `stand_in(number, text)` is what stands for something shared."""
    if not isinstance(x, dict):
        return x
    if "tensor" in x:
        return torch.tensor(x["tensor"], dtype=DTYPES[x["dtype"]]).reshape(x["shape"])
    for kind in (list, tuple, set, frozenset):
        if kind.__name__ in x:
            return kind(decode(y, stand_in) for y in x[kind.__name__])
    if "slice" in x:
        return slice(*map(decode, x["slice"]))
    if "range" in x:
        numbers = range(*x["range"])
        if len(numbers) > LARGE:
            raise ValueError(f"{numbers} is too long")
        return numbers
    if stand_in and "shared" in x:
        return stand_in(x["shared"], x["text"])
    other = type(str(x["object"]), (Other,), {})()
    other.text = str(x["text"])
    return other


# ------------------------------------------------------------------------------------------------
# The student's file
# ------------------------------------------------------------------------------------------------


class Refuse(importlib.abc.MetaPathFinder):
    """No import of a file that holds answers, under any package."""

    NAMES = ("erg", "exercises", "grade", "mistakes", "solution")

    def find_spec(self, name, path=None, target=None):
        if name.rpartition(".")[2] in self.NAMES:
            raise ImportError(f"the grader does not let a solution import {name}")


def load(path):
    """Import a student's file under a name of its own, with its folder on sys.path: {name: function}."""
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    module = sys.modules["student_file"] = types.ModuleType("student_file")
    module.__file__ = str(path)
    exec(compile(path.read_bytes(), str(path), "exec"), vars(module))  # not from a cache that may be stale
    return adapter.find(module)


class Guard:
    """Remembers what torch was like, so that what one check leaves changed cannot reach the next one."""

    OWNERS = (torch, F, torch.Tensor)

    def __init__(self):
        self.names = [{name: value for name, value in vars(owner).items() if callable(value)}
                      for owner in self.OWNERS]
        self.dtype, self.grad = torch.get_default_dtype(), torch.is_grad_enabled()
        self.attention, self.modes = F.scaled_dot_product_attention, self.open_modes()

    @staticmethod
    def open_modes():
        return len(torch.overrides._get_current_function_mode_stack())

    def restore(self):
        """Put back what was replaced in torch; returns the names of it."""
        changed = []
        if (torch.get_default_dtype(), torch.is_grad_enabled()) != (self.dtype, self.grad):
            torch.set_default_dtype(self.dtype)  # this replaces a name in torch, so it comes first
            torch.set_grad_enabled(self.grad)
            changed.append("the default dtype or the gradient mode")
        for owner, names in zip(self.OWNERS, self.names):
            now = vars(owner)
            for name in [name for name, value in names.items() if now.get(name) is not value]:
                setattr(owner, name, names[name])
                changed.append(f"{owner.__name__}.{name}")
        return changed

    def clean(self):
        """Whether no TorchFunctionMode was left open: that can only be undone by a new process."""
        return self.open_modes() == self.modes


def describe(error, path):
    """An error as text: its classes' names, its message, and the line of the student's that raised it."""
    files = [(frame, Path(frame.filename).resolve())
             for frame in traceback.extract_tb(error.__traceback__)[-400:]]
    ours = {Path(__file__).resolve().parent / name for name in ("worker.py", "adapter.py")}
    theirs = [frame for frame, file in files
              if path.parent in file.parents and file not in ours and "site-packages" not in file.parts]
    frame = theirs[-1] if theirs else None
    where = frame and f"in line {frame.lineno} of {Path(frame.filename).name}: {frame.line}"
    return dict(kinds=[kind.__name__ for kind in type(error).__mro__], message=str(error)[:1000], where=where,
                raised=bool(frame and re.search(r"\braise\b", frame.line or "")))


# ------------------------------------------------------------------------------------------------
# Calls, one after another
# ------------------------------------------------------------------------------------------------


class Missing(Exception):
    """The student's file has no such function."""


class Interruption(Exception):
    """What a model might raise in the middle of a forward."""


class Shared:
    """A function or a context of the grader's, in the hands of the student's code."""

    def __init__(self, side, number, text):
        self.side, self.number, self.text = side, number, text

    def __repr__(self):
        return self.text

    def __call__(self, *args, **kwargs):
        return self.side.ask(self.number, "call", args, kwargs)

    def __enter__(self):
        return self.side.ask(self.number, "enter")

    def __exit__(self, *error):
        self.side.ask(self.number, "exit")


class Side:
    """This side of the pipe: answers calls until the other side closes it."""

    def __init__(self, reader, writer, path):
        self.reader, self.writer, self.path = reader, writer, path
        self.functions, self.contexts, self.guard, self.turn = {}, [], Guard(), 0

    def tell(self, **message):
        self.writer.write(json.dumps(dict(turn=self.turn, **message)) + "\n")
        self.writer.flush()

    def ask(self, number, what, args=(), kwargs=None):
        """Have the grader do something with what it shared."""
        self.tell(ask=what, number=number, args=[encode(x) for x in args],
                  kwargs={name: encode(x) for name, x in (kwargs or {}).items()})
        reply = json.loads(self.reader.readline())
        if "error" in reply:
            kind, message = reply["error"]
            raise getattr(builtins, kind, RuntimeError)(message)
        return self.decode(reply["answer"])

    def decode(self, x):
        return decode(x, lambda number, text: Shared(self, number, text))

    def serve(self):
        for line in self.reader:
            self.turn += 1  # answers are numbered as calls are, so that nothing can be answered beforehand
            try:
                message = self.answer(**json.loads(line))
            except BaseException as error:  # sys.exit and KeyboardInterrupt, too
                message = dict(error=describe(error, self.path))
            self.tell(**message)

    def answer(self, do, name=None, args=(), kwargs=None, inference=False):
        if do == "load":
            self.functions = load(self.path)
            return dict(answer=", ".join(self.guard.restore()))
        if do == "reset":
            self.contexts.clear()
            self.guard.restore()
            return dict(answer=self.guard.clean())
        if do == "same":
            return dict(answer=F.scaled_dot_product_attention is self.guard.attention)
        with torch.inference_mode() if inference else contextlib.nullcontext():
            args = [self.decode(x) for x in args]
            kwargs = {key: self.decode(x) for key, x in (kwargs or {}).items()}
            answer = getattr(self, do)(name, args, kwargs)
            left = [encode(x) if isinstance(x, torch.Tensor) else None for x in [*args, *kwargs.values()]]
            return dict(answer=encode(answer), left=left)

    def call(self, name, args, kwargs):
        if name not in self.functions:
            raise Missing(f"{self.path.name} has no function named {name}")
        return self.functions[name](*args, **kwargs)

    def attend(self, _, args, kwargs):
        """What a model does: it looks the function up."""
        return F.scaled_dot_product_attention(*args, **kwargs)

    def enter(self, _, args, kwargs):
        context = self.call("rectified", args, kwargs)
        type(context).__enter__(context)
        self.contexts.append(context)

    def leave(self, _, args, kwargs):
        """Leave the innermost context, with an error if one is named; returns whether it swallowed that."""
        context, = self.contexts[-1:]
        self.contexts.pop()
        if not args:
            return bool(context.__exit__(None, None, None))
        try:
            raise Interruption(*args)
        except Interruption as error:
            return bool(context.__exit__(type(error), error, error.__traceback__))


def limit_memory(gigabytes):
    """Let an allocation fail that would take this process beyond `gigabytes` more than it has: Linux only."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # elsewhere the time limit has to do
        import resource
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = int(pages * resource.getpagesize() + gigabytes * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def become(user):
    """Give up all rights but those of this user number, for good."""
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)


def main():
    reader, writer = (os.fdopen(os.dup(fd), mode, encoding="ascii") for fd, mode in ((0, "r"), (1, "w")))
    job = json.loads(reader.readline())
    side = Side(reader, writer, Path(job["path"]))
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_RDWR)
    for fd, target in ((0, null), (1, 2 if job["prints"] else null), (2, 2 if job["prints"] else null)):
        os.dup2(target, fd)  # what the student's code prints is dropped
    limit_memory(job["memory"])
    if job["user"] is not None:
        become(job["user"])
    sys.path.remove(str(Path(__file__).resolve().parent))
    del sys.modules["adapter"]  # a student's helper may have this name
    sys.meta_path.insert(0, Refuse())
    side.tell(answer="ready")
    side.serve()


if __name__ == "__main__":
    main()
