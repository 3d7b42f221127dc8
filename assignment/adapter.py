"""How the grader reaches a student's functions: the one file to edit if they live elsewhere than in one file.

    student = load("my_solution.py")
    student.energy(xi, X)                # AssertionError with a plain message if there is no such function
"""
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F

FUNCTIONS = ("energy", "energy_gradient", "descend", "energy_attention", "attention_entropy",
             "temperature_for_entropy", "rectified", "encode", "guided_velocity", "sample")


def find(module):
    """{name: function} of a student's file, of those that it has.

    Edit this for other names or for a package beside the file, for example
    `from my_package import hopfield`, and then `found["energy"] = hopfield.compute_energy`.
    """
    found = {name: getattr(module, name, None) for name in FUNCTIONS}
    return {name: function for name, function in found.items() if callable(function)}


class Student:
    """A student's functions as attributes; `doing` is what the running check does, for its message."""

    def __init__(self, functions, path):
        self.functions, self.path, self.doing = functions, str(path), ""

    def __getattr__(self, name):
        if name not in FUNCTIONS:
            raise AttributeError(name)
        if name not in self.functions:
            raise AssertionError(f"{Path(self.path).name} has no function named {name}")
        return self.functions[name]


def load(path):
    """Import a student's file under a name of its own, with its folder on sys.path."""
    path = Path(path).resolve()
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    module = sys.modules["student_file"] = types.ModuleType("student_file")
    module.__file__ = str(path)
    exec(compile(path.read_bytes(), str(path), "exec"), vars(module))  # not from a cache that may be stale
    return Student(find(module), path)


class Guard:
    """Remembers what torch was like, so that what one check leaves changed cannot reach the next one."""

    OWNERS = (torch, F, torch.Tensor)

    def __init__(self):
        self.names = [{name: value for name,
                       value in vars(owner).items() if callable(value)} for owner in self.OWNERS]
        self.dtype, self.grad = torch.get_default_dtype(), torch.is_grad_enabled()
        self.modes = self.open_modes()

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
