"""Pack what grades submissions on Gradescope into autograder.zip, or what students get into assignment.zip.

    python assignment/make_autograder.py --secret "any words"   # autograder.zip: inputs depend on the words
    python assignment/make_autograder.py --students             # assignment.zip: handout, starter, grader
"""
import argparse
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
GRADER = ("grade.py", "exercises.py", "worker.py", "adapter.py")
SCRIPTS = ("setup.sh", "run_autograder")
AUTOGRADER = {**{name: f"gradescope/{name}" for name in SCRIPTS}, **{name: name for name in GRADER}}
STUDENTS = {f"assignment/{name}": name
            for name in ("HANDOUT.md", "starter.py", "failure-a.png", "failure-b.png", *GRADER)}
BASE_IMAGE = "Ubuntu 22.04"  # its Python is 3.10, the oldest that will do


def pack(out, files, **texts):
    """Write a zip file: {name in it: file beside this one}, and texts by name; scripts can be executed."""
    contents = {name: (HERE / path).read_bytes() for name, path in files.items()}
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in [*contents.items(), *texts.items()]:
            if name in SCRIPTS:
                content = content.replace(b"\r\n", b"\n")
            info = zipfile.ZipInfo(name)  # no time of today: the same files give the same bytes
            info.create_system = 3  # Unix, wherever this runs
            info.external_attr = (0o755 if name in SCRIPTS else 0o644) << 16
            archive.writestr(info, content, zipfile.ZIP_DEFLATED)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--students", action="store_true", help="pack what students get")
    parser.add_argument("--secret", help="any words, from which hidden inputs are drawn; keep them secret")
    parser.add_argument("--out", type=Path, help="the file to write (autograder.zip or assignment.zip)")
    options = parser.parse_args(argv)
    if options.students == bool(options.secret):
        parser.error("give either --secret WORDS, for the autograder, or --students")
    out = options.out or Path("assignment.zip" if options.students else "autograder.zip")
    if options.students:
        pack(out, STUDENTS)
    else:
        pack(out, AUTOGRADER, secret=options.secret)
        print(f"On Gradescope, choose the base image {BASE_IMAGE}, or a newer one.")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
