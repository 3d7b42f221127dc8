"""Files: written whole or not at all, read whole or not at all.

    write_whole("out/table.json", lambda file: file.write(text.encode()))
    save("out/digits.pt", {"model": model.state_dict()})
    with load("out/digits.pt", "weights") as state:           # whatever is wrong in here names the file
        model.load_state_dict(state["model"])
"""
import contextlib
import errno
import io
import os
import re
import shutil
import tempfile
import zipfile
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class DataError(Exception):
    """A file or folder that is missing, damaged or out of reach; the message says what to do."""


class DiskFull(Exception):
    """There is no space for a file; its older version is whole."""


# ---- Writing -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def temporary(path):
    """(new, target): an empty file, deleted in the end, beside `target`, which is `path` behind all links.

    DataError where `path` cannot be written. What dead processes left in the folder is deleted.
    """
    try:
        target = Path(os.path.realpath(path))
        regular(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        for old in target.parent.glob(".*.part"):
            named = re.fullmatch(r"\..+\.(\d+)\.[^.]+\.part", old.name)  # .NAME.PROCESS.RANDOM.part
            if named and not alive(int(named[1])):
                old.unlink(missing_ok=True)
        handle, new = tempfile.mkstemp(".part", f".{target.name}.{os.getpid()}.", target.parent)
        os.close(handle)
    except OSError as error:
        raise DataError(f"cannot write {path} ({error.strerror or error}); "
                        "choose another place (--out, or --data-dir for downloads)") from error
    try:
        yield new, target
    finally:
        Path(new).unlink(missing_ok=True)


def regular(path):
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("it is not a regular file")


def alive(process):
    try:
        if fcntl:  # on Windows kill does not only ask
            os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def writable(*paths):
    """DataError unless each of the files can be written."""
    for path in paths:
        with temporary(path):
            pass


def write_whole(path, write):
    """Call `write(file)` and give `path` what it wrote: all of it appears, or nothing."""
    with temporary(path) as (new, target):
        content = io.BytesIO()
        write(content)
        try:
            with open(new, "wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            free = shutil.disk_usage(target.parent).free
            raise DiskFull(f"no space for {path}: it needs {len(content.getbuffer()):,} bytes, and {free:,} "
                           "are free; its older version, if there is one, is whole") from error
        os.chmod(new, 0o644)
        os.replace(new, target)


@contextlib.contextmanager
def locked(path):
    """Inside `with`, this process alone holds `path`, a file with its number; the lock dies with it."""
    writable(path)
    with open(path, "a+") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), str(os.getpid()).encode())
        except BlockingIOError:
            file.seek(0)
            raise DataError(f"process {file.read()} is at work there and holds {path}; wait for it, "
                            "or choose another folder with --out") from None
        except OSError:  # a disk that is full, or that has no locks
            pass
        yield


# ---- Checkpoints -------------------------------------------------------------------------------------------


def not_finite(value, name="it"):
    """The names of the tensors in `value` that hold NaN or infinity, which a loss curve alone may."""
    if isinstance(value, torch.Tensor):
        return [] if value.isfinite().all() else [name]
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, part in inner if key != "curve" for found in not_finite(part, key)]


def save(path, state):
    """Write a dict of tensors, numbers, strings, lists and dicts, for `load`."""
    if names := not_finite(state):
        raise FloatingPointError(f"{names[0]} holds NaN or infinity; {path} is not written")
    write_whole(path, lambda file: torch.save(state, file))


@contextlib.contextmanager
def load(path, expected, device="cpu"):
    """`with load(path, "weights") as state`: what `save` wrote; every fault, there and here, is a DataError.

    torch.save writes a zip archive with a check sum (CRC-32) of each part, which torch.load does not look at.
    """
    held = ""
    try:
        regular(path)
        content = io.BytesIO(Path(path).read_bytes())
        with zipfile.ZipFile(content) as parts:
            if parts.testzip() or any(part.external_attr & 16 for part in parts.infolist()):
                raise ValueError("it is damaged: a check sum is wrong")
        content.seek(0)
        state = torch.load(content, map_location=device, weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
        held = f"; it holds {', '.join(map(str, state)) or 'nothing'}"
        if names := not_finite(state):
            raise ValueError(f"{names[0]} holds NaN or infinity")
        yield state
    except DataError:
        raise
    except Exception as error:
        missing = isinstance(error, KeyError)
        reason = f"{error} is missing" if missing else getattr(error, "strerror", None) or error
        reason = " ".join(str(reason).split())[:200]
        raise DataError(f"cannot read {path} ({reason}{held}); expected {expected}") from error
