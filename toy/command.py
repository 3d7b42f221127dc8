"""The command line: options are checked before the first work, and errors leave through one door.

    parser = Parser(__doc__)
    parser.add_argument("--steps", default=25, type=number(1, 1000, int), help="Euler steps (25)")
    parser.options(dict(steps=1.5))            # ValueError: argument --steps: 1.5 must be a whole number ...
    run(main, parser)                          # main(**options) of the command line
"""
import argparse
import contextlib
import os
import re
import sys
import traceback

from toy.files import DataError

SEED = 2**32 - 1  # the largest


def number(low, high, kind=float):
    """The type of an option: a number from `low` to `high`."""
    def read(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        whole = "whole " if kind is int else ""
        raise argparse.ArgumentTypeError(f"{text} must be a {whole}number from {low:,} to {high:,}")
    return read


def place(text):
    """The type of an option: the name of a file or folder."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} must be the name of a file or folder")
    return text


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ValueErrors, and which takes options from Python, too."""

    def __init__(self, doc):
        super().__init__(description=doc.split("\n\n")[0], allow_abbrev=False)

    def error(self, message):
        raise ValueError(f"{message} (see --help)")

    def options(self, given):
        """The options of main(**given), each checked as if it had been typed."""
        words = []
        for name, value in given.items():
            flag = name.replace("_", "-")
            if value is not None and value != self.get_default(name):
                words.append({True: f"--{flag}", False: f"--no-{flag}"}[value] if isinstance(value, bool)
                             else f"--{flag}={value}")
        return self.parse_args(words)


def run(main, parser, stopped="stopped"):
    """main(**options) of the command line; exit code 2: the user's error, 130: Ctrl-C, 1: any other error."""
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if os.environ.get("ERG_DEBUG"):
            traceback.print_exc()
        users = isinstance(error, (ValueError, DataError))
        flags = "|".join(action.dest for action in parser._actions)
        typed = re.sub(rf"\b({flags})=", lambda name: f"--{name[1].replace('_', '-')} ", str(error))
        if not users:
            typed = f"{type(error).__name__}: {' '.join(typed.split())} (ERG_DEBUG=1 shows where)"
        print(f"error: {typed}", file=sys.stderr)
        sys.exit(2 if users else 1)
