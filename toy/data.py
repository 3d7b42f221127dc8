"""The toy data sets: real images, captions made of a few words, and safe downloads.

    images = load("digits")                       # shipped with the repository
    images = load("mnist", "data/mnist")          # downloaded when missing
    x, captions, attributes = images.batch(rows, generator)   # coloured anew at each call

`digits` and `mnist` are handwriting, coloured at load time: "a red seven on blue".
`cifar10` has captions such as "a photo of a horse".
"""
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import http.client
import os
import shutil
import tarfile
import time
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from toy.files import DataError, write_whole

DIGITS = "zero one two three four five six seven eight nine".split()
OBJECTS = "airplane automobile bird cat deer dog frog horse ship truck".split()
INKS = {"red": (1.0, 0.2, 0.15), "green": (0.2, 0.85, 0.3), "blue": (0.3, 0.5, 1.0),
        "yellow": (1.0, 0.9, 0.2), "purple": (0.75, 0.3, 1.0), "white": (1.0, 1.0, 1.0)}
PAPERS = {"black": (0.0, 0.0, 0.0), "red": (0.35, 0.0, 0.0), "green": (0.0, 0.25, 0.0),
          "blue": (0.0, 0.0, 0.4)}
# Dark papers: bright ones would dominate the loss, and the digits would be learned late.

SHIPPED = Path(__file__).resolve().parent.parent / "data"
SIZES = {"digits": 8, "mnist": 28, "cifar10": 32}  # pixels a side
NAMES = tuple(SIZES)
RECORDS = 10_000  # images in each of CIFAR-10's files
LEAST_RATE = 20_000  # bytes a second: a download may take what this allows, and `timeout` more

# ------------------------------------------------------------------------------------------------
# Images with captions
# ------------------------------------------------------------------------------------------------


@dataclass
class Images:
    """A data set in memory: grey handwriting (n, S, S) or colour photographs (n, 3, S, S), uint8."""

    name: str
    pixels: torch.Tensor
    labels: torch.Tensor  # (n,) int64
    attributes: dict  # attribute name -> its words, in the order of the class numbers

    def __len__(self):
        return len(self.labels)

    @property
    def size(self):
        return self.pixels.shape[-1]

    @property
    def vocabulary(self):
        """Every word that a caption of this data set can hold."""
        words = "a photo of" if self.name == "cifar10" else "a on"
        return tuple(dict.fromkeys(words.split() + [w for names in self.attributes.values() for w in names]))

    def to(self, device):
        return dataclasses.replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def draw(self, rows, generator=None):
        """Images (B, 3, S, S) in [-1, 1] and attributes (B, A), on the device of the pixels and `generator`.

        Handwriting gets a random ink and paper from `generator`, never the same word for both.
        """
        labels = self.labels[rows]
        if self.name == "cifar10":
            return self.pixels[rows].float() / 127.5 - 1, labels[:, None]
        inks, papers, pairs = palette(labels.device)
        chosen = torch.randint(len(pairs), labels.shape, generator=generator, device=labels.device)
        pair = pairs[chosen]  # (B, 2)
        ink, paper = inks[pair[:, 0], :, None, None], papers[pair[:, 1], :, None, None]  # each (B, 3, 1, 1)
        grey = self.pixels[rows][:, None].float() / 255  # (B, 1, S, S)
        return 2 * (paper + grey * (ink - paper)) - 1, torch.cat([labels[:, None], pair], dim=1)

    def captions(self, attributes):
        """The captions of attributes (B, A): a list of B strings."""
        names = list(self.attributes.values())
        return [caption(*(words[n] for words, n in zip(names, row))) for row in attributes.tolist()]

    def batch(self, rows, generator=None):
        """Images (B, 3, S, S), their B captions, their attributes (B, A): `draw` with captions."""
        x, attributes = self.draw(rows, generator)
        return x, self.captions(attributes), attributes


@functools.cache
def palette(device):
    """Colours of inks (6, 3) and papers (4, 3), and the pairs of their numbers (n, 2) that are allowed."""
    pairs = [(i, p) for i, ink in enumerate(INKS) for p, paper in enumerate(PAPERS) if ink != paper]
    return tuple(torch.tensor(y, device=device) for y in (list(INKS.values()), list(PAPERS.values()), pairs))


def caption(word, ink=None, paper=None):
    """The full caption: "a red seven on blue", or "a photo of a horse"."""
    return f"a {ink} {word} on {paper}" if ink else f"a photo of a {word}"


def check_name(allowed, **given):
    """An error unless every given name is one of those that are allowed."""
    for what, name in given.items():
        if name not in list(allowed):
            raise ValueError(f"{what}={name!r} must be one of {', '.join(allowed)}")


def load(name, folder=None, split="train"):
    """The data set `name` as Images; `split` is "train" or "test".

    `folder` holds the official files, and is where they are downloaded to if they are missing
    (default: data/<name> beside this package). `digits` ships with the repository; every fifth
    image is its test split. Raises ValueError for an unknown name or split, DataError otherwise.
    """
    check_name(NAMES, dataset=name)
    check_name(("train", "test"), split=split)
    folder = Path(folder) if folder else SHIPPED / name
    handwriting = {"digit": tuple(DIGITS), "ink": tuple(INKS), "paper": tuple(PAPERS)}
    if name == "digits":
        path = SHIPPED / "digits.npz"
        with reading(path, "take it from the repository"), np.load(path, allow_pickle=False) as pack:
            pixels, labels = pack["images"].astype(np.float32) * (255 / 16), pack["labels"]
        chosen = (np.arange(len(labels)) % 5 == 0) == (split == "test")
        return Images(name, torch.from_numpy(pixels[chosen].round().astype(np.uint8)),
                      torch.from_numpy(labels[chosen].astype(np.int64)), handwriting)
    if name == "mnist":
        prefix = "train" if split == "train" else "t10k"
        files = [fetch(f"{prefix}-{kind}-ubyte.gz", folder, MNIST) for kind in ("images-idx3", "labels-idx1")]
        pixels, labels = (read_idx(file) for file in files)
        fit = len(pixels) > 0 and pixels.shape[1:] == (28, 28) and labels.shape == pixels.shape[:1]
        if not fit or (labels > 9).any():
            raise DataError(f"{files[0]} and {files[1].name} are not images of 28 x 28 pixels with a label "
                            "from 0 to 9 for each; delete both, and they are downloaded again")
        return Images(name, torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64)), handwriting)
    records = np.concatenate([read_records(file) for file in cifar10_files(folder, split)])
    return Images(name, torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32)),
                  torch.from_numpy(records[:, 0].astype(np.int64)), {"object": tuple(OBJECTS)})


# ------------------------------------------------------------------------------------------------
# File formats: no pickles, and every length is checked
# ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(path, remedy="delete it, and it is downloaded again"):
    """Context in which a data file is read: whatever is wrong with it is one DataError."""
    try:
        yield
    except (ValueError, EOFError, OSError, LookupError, zlib.error, tarfile.TarError,
            zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged ({error}); {remedy}") from error


def read_idx(path):
    """A gzipped IDX file of bytes (the format of MNIST) as an array."""
    with reading(path):
        raw = gzip.decompress(Path(path).read_bytes())
        dimensions = raw[3]
        if raw[:3] != b"\0\0\x08" or dimensions not in (1, 3):
            raise ValueError("it does not start as an IDX file of bytes does")
        shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", dimensions, offset=4))
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()


def read_records(path):
    """CIFAR-10's binary records: (n, 3073) uint8, the label and then 3 x 32 x 32 pixels."""
    with reading(path, "delete it, and it is unpacked again"):
        raw = np.fromfile(path, np.uint8)
        if len(raw) != 3073 * RECORDS or raw.reshape(-1, 3073)[:, 0].max() > 9:
            raise ValueError(f"{len(raw):,} bytes, not {RECORDS:,} records of 3,073 with labels from 0 to 9")
        return raw.reshape(-1, 3073)


def cifar10_files(folder, split):
    """Paths of the binary batches; downloads and unpacks them first if they are missing."""
    inner = folder / "cifar-10-batches-bin"
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    if not all(os.path.isfile(inner / name) for name in names):
        archive = fetch("cifar-10-binary.tar.gz", folder, CIFAR10)
        with reading(archive), tarfile.open(archive, "r:gz") as tar:
            for member in tar:  # names are taken from our list, so nothing leaves `inner`
                name = Path(member.name).name
                if member.isfile() and (name in names) and member.name == f"cifar-10-batches-bin/{name}":
                    packed = tar.extractfile(member)
                    write_whole(inner / name, lambda out: shutil.copyfileobj(packed, out))
            missing = [name for name in names if not (inner / name).is_file()]
            if missing:
                raise ValueError(f"it does not hold cifar-10-batches-bin/{missing[0]}")
    return [inner / name for name in names]


# ------------------------------------------------------------------------------------------------
# Downloads: several mirrors, progress, timeout, checksum, atomic rename
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Mirrors (folders on the web, tried in turn) and the MD5 sums that their publishers give."""

    mirrors: tuple
    md5: dict


MNIST = Source(
    mirrors=("https://ossci-datasets.s3.amazonaws.com/mnist/",
             "https://storage.googleapis.com/cvdf-datasets/mnist/",
             "http://yann.lecun.com/exdb/mnist/"),
    md5={"train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
         "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
         "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
         "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c"})
CIFAR10 = Source(
    mirrors=("https://www.cs.toronto.edu/~kriz/", "https://cave.cs.toronto.edu/kriz/"),
    md5={"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"})


def fetch(name, folder, source, timeout=30):
    """The path of folder/name; if it is not there, downloaded from the first mirror that delivers it.

    A file that is already there is taken as it is. A download counts only if its MD5 sum is right.
    Raises DataError, with every mirror's fault, when none works; then nothing is left behind.
    """
    path, faults = Path(folder) / name, []
    if os.path.isfile(path):  # False, too, where looking is not allowed
        return path
    if os.path.isdir(path):
        raise DataError(f"{path} is a folder, and should be a file; remove it, and the file is downloaded")
    for mirror in source.mirrors:
        try:
            write_whole(path, lambda file: download(mirror + name, file, source.md5[name], timeout))
            return path
        except (OSError, http.client.HTTPException, ValueError) as error:
            # no network, timeout, HTTP errors, a broken connection, a reply that is not HTTP, a wrong sum
            faults.append(f"{mirror + name}: {getattr(error, 'reason', None) or error}")
    raise DataError(f"could not download {name}:\n  " + "\n  ".join(faults) +
                    f"\nPut the file into {path.parent} by hand, or name its folder with --data-dir.")


def download(url, file, md5, timeout):
    """Write the body of `url` into `file`, with a progress bar; OSError if it is slow, cut short or wrong."""
    digest, received, began = hashlib.md5(), 0, time.monotonic()
    with urllib.request.urlopen(url, timeout=timeout) as reply:
        expected = int(reply.headers.get("Content-Length") or 0)
        with tqdm(total=expected or None, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[-1]) as bar:
            while chunk := reply.read1(1 << 16):  # what has come, not all of it
                file.write(chunk)
                digest.update(chunk)
                received += len(chunk)
                bar.update(len(chunk))
                seconds = time.monotonic() - began
                if received < LEAST_RATE * (seconds - timeout):
                    raise OSError(f"only {received:,} bytes came in {seconds:.0f} seconds")
    if expected and received != expected:
        raise OSError(f"it ended after {received:,} of {expected:,} bytes")
    if digest.hexdigest() != md5:
        raise OSError(f"its MD5 sum is {digest.hexdigest()} and should be {md5}")
