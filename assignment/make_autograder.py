"""Pack what grades submissions on Gradescope into autograder.zip, or what students get into assignment.zip.

    python assignment/make_autograder.py --seed 4711    # autograder.zip: the seed of the hidden inputs is in
    it python assignment/make_autograder.py --students     # assignment.zip: handout, starter, grader; nothing
    to hide
"""
import argparse
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
GRADER = ("grade.py", "exercises.py", "adapter.py")
SCRIPTS = ("setup.sh", "run_autograder")
AUTOGRADER = {**{name: f"gradescope/{name}" for name in SCRIPTS}, **{name: name for name in GRADER}}
STUDENTS = {f"assignment/{name}": name for name in ("HANDOUT.md", "starter.py", *GRADER)}


def pack(out, files, **texts):
    """Write a zip file: {name in it: file beside this one}, and texts by name; scripts can be executed."""
    contents = {name: (HERE / path).read_bytes().replace(b"\r\n", b"\n") for name, path in files.items()}
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in [*contents.items(), *texts.items()]:
            info = zipfile.ZipInfo(name)  # no time of today: the same files give the same bytes
            info.create_system = 3  # Unix, wherever this runs
            info.external_attr = (0o755 if name in SCRIPTS else 0o644) << 16
            archive.writestr(info, content, zipfile.ZIP_DEFLATED)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--students", action="store_true", help="pack what students get")
    parser.add_argument("--seed", type=int, help="the hidden seed of the inputs; keep it to yourself")
    parser.add_argument("--out", type=Path, help="the file to write (autograder.zip or assignment.zip)")
    options = parser.parse_args(argv)
    if options.students == (options.seed is not None):
        parser.error("give either --seed N, for the autograder, or --students")
    if options.seed is not None and options.seed < 0:
        parser.error(f"--seed {options.seed} must not be negative")
    out = options.out or Path("assignment.zip" if options.students else "autograder.zip")
    if options.students:
        pack(out, STUDENTS)
    else:
        pack(out, AUTOGRADER, seed=f"{options.seed}\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
