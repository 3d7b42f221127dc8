"""Write starter.py from solution.py: every solution becomes a NotImplementedError.

    python assignment/make_starter.py [--out FILE]
"""
import argparse
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent


def starter(source):
    """solution.py as text -> starter.py as text, without what stands between BEGIN and END SOLUTION."""
    lines, exercise, function, inside = [], None, None, False
    for line in source.splitlines():
        if match := re.match(r"# Exercise (\d+)", line):
            exercise = match[1]
        if not inside and (match := re.match(r"def (\w+)", line)):
            function = match[1]
        marker = line.strip()
        if marker == "# BEGIN SOLUTION":
            if inside:
                raise ValueError("# BEGIN SOLUTION twice, without # END SOLUTION between them")
            inside = True
            indent = line[:len(line) - len(line.lstrip())]
            if indent:  # of a function; at the left margin it is a note to instructors
                lines.append(f'{indent}raise NotImplementedError("exercise {exercise}: {function}")')
        elif marker == "# END SOLUTION":
            if not inside:
                raise ValueError("# END SOLUTION without # BEGIN SOLUTION")
            inside = False
        elif not inside:
            lines.append(line)
    if inside:
        raise ValueError("# BEGIN SOLUTION without # END SOLUTION")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "starter.py")
    options = parser.parse_args()
    options.out.write_text(starter((HERE / "solution.py").read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {options.out}")
