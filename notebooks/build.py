"""Run the notebooks' sources (NAME.py) and write them, with their figures, to NAME.ipynb.

    python notebooks/build.py                 # all, in full: about 3 minutes on two CPU cores
    python notebooks/build.py 3_transformer   # one
    python notebooks/build.py --stamp --repository https://...    # what a reader elsewhere (Colab) fetches

The stamp is in the first cell: the repository's address, and the commit of the code that it ran with.
"""
import argparse
import base64
import io
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = sorted(HERE.glob("[0-9]_*.py"))
CODE = ["erg.py", "tiny_dit.py", "toy", "experiments", "examples", "weights", "data", "notebooks/drawing.py"]
FOLDED = {"jupyter": {"source_hidden": True}, "cellView": "form"}  # for JupyterLab, and for Colab
WIDGET = "application/vnd.jupyter.widget-view+json"
STAMP = re.compile(r'^REPOSITORY, COMMIT = "(.*)", "(.*)"$', re.M)


def stamp(sources, repository):
    """Write the repository's address, if one is given, and the commit of the code into the first cells."""
    def git(*command):
        return subprocess.run(["git", *command, "--", *CODE], cwd=HERE.parent, capture_output=True, text=True,
                              check=True).stdout.strip()

    if git("status", "--porcelain"):
        sys.exit(f"error: --stamp: commit the changes of {', '.join(CODE)} first")
    commit = git("log", "-1", "--format=%H")
    for path in sources:
        line = lambda m: f'REPOSITORY, COMMIT = "{m[1] if repository is None else repository}", "{commit}"'
        path.write_text(STAMP.sub(line, path.read_text(), count=1))


def smaller(png):
    """A picture (base64) in at most 256 colours, a third of the size."""
    from PIL import Image

    out, picture = io.BytesIO(), Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def run(path, timeout=600):
    """Execute one source, each cell in `timeout` seconds, and write its notebook; returns the seconds it took."""
    import jupytext
    from nbclient import NotebookClient

    notebook = jupytext.read(path, fmt="py:percent")
    began = time.time()
    NotebookClient(notebook, timeout=timeout, kernel_name="python3", coalesce_streams=True,
                   resources={"metadata": {"path": str(HERE)}}).execute()
    seconds = time.time() - began
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    for i, cell in enumerate(notebook.cells):
        folded = "cellView" in cell.metadata  # all else goes, times too: a build without changes changes nothing
        cell.metadata, cell["id"] = dict(FOLDED) if folded else {}, f"cell-{i}"
        if cell.cell_type == "code":  # sliders without a kernel are dead
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", ())]
        for shown in (output["data"] for output in cell.get("outputs", ()) if "data" in output):
            if "image/png" in shown:
                shown["image/png"] = smaller(shown["image/png"])
    jupytext.write(notebook, path.with_suffix(".ipynb"))
    return seconds


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(path.stem for path in SOURCES)}; default: "
                        "all")
    parser.add_argument("--stamp", action="store_true", help="note the commit of the code in the first cells")
    parser.add_argument("--repository", help="the address to fetch it from, with --stamp")
    options = parser.parse_args(argv)
    unknown = set(options.names) - {path.stem for path in SOURCES}
    if unknown:
        parser.error(f"names={min(unknown)!r} must be of {', '.join(path.stem for path in SOURCES)}")
    if options.repository is not None and not options.stamp:
        parser.error(f"repository={options.repository!r} has no effect without --stamp")
    chosen = [path for path in SOURCES if not options.names or path.stem in options.names]
    if options.stamp:
        stamp(SOURCES, options.repository)
    for path in chosen:
        print(f"{path.stem}: {run(path):.0f} s", flush=True)


if __name__ == "__main__":
    main()
