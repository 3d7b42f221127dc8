"""The data loader: captions and colours, the official file formats, downloads from a local server, hostile archives."""
import contextlib
import gzip
import hashlib
import io
import pickle
import signal
import socket
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from toy import data, files

BODY = bytes(range(256)) * 1000
RECORDS = np.random.default_rng(0).integers(0, 256, (12, 3073), np.uint8)
RECORDS[:, 0] = np.arange(12) % 10
BATCHES = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
INNER = "cifar-10-batches-bin"


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Files of CIFAR-10 hold two images here."""
    monkeypatch.setattr(data, "RECORDS", 2)


def http(body, length=None, status="200 OK"):
    """The bytes of a whole HTTP reply, with a wrong Content-Length if `length` is given."""
    length = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n".encode() + body


@pytest.fixture
def web(monkeypatch):
    """A server on 127.0.0.1: `replies` maps paths to raw replies (None hangs) or to functions of the connection, `asked` lists the paths requested; nobody listens at `dead`."""
    replies, asked, closing = {}, [], threading.Event()

    def answer(handler):
        asked.append(handler.path)
        reply = replies.get(handler.path, http(b"", status="404 Not Found"))
        with contextlib.suppress(OSError):
            closing.wait(20) if reply is None else reply(handler.wfile, closing) if callable(reply) else handler.wfile.write(reply)

    handler = type("Handler", (BaseHTTPRequestHandler,), {"do_GET": answer, "log_message": lambda *words: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url, dead = (f"http://127.0.0.1:{port}/" for port in (server.server_port, taken.getsockname()[1]))
        yield SimpleNamespace(url=url, dead=dead, replies=replies, asked=asked)
    closing.set()
    server.shutdown()
    server.server_close()


def source(*mirrors, name="file.bin", body=BODY):
    """A Source of one file with the MD5 sum of `body`."""
    return data.Source(mirrors, {name: hashlib.md5(body).hexdigest()})


def idx(array):
    """A gzipped IDX file of bytes."""
    header = b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return gzip.compress(header + array.astype(np.uint8).tobytes())


def tar_gz(*members):
    """A tar.gz of (name, content) pairs; a content that is a str makes a symlink to it."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in members:
            entry, link = tarfile.TarInfo(name), isinstance(content, str)
            entry.type, entry.linkname = (tarfile.SYMTYPE, content) if link else (tarfile.REGTYPE, "")
            entry.size = 0 if link else len(content)
            tar.addfile(entry, None if link else io.BytesIO(content))
    return packed.getvalue()


def batches(names=BATCHES):
    """Archive members: two CIFAR-10 records for each batch."""
    return [(f"{INNER}/{name}", RECORDS[2 * i:2 * i + 2].tobytes()) for i, name in enumerate(names)]


ARCHIVE = tar_gz(*batches(), (f"{INNER}/batches.meta.txt", b"airplane"))
GOOD = idx(RECORDS[:, 1:785].reshape(-1, 28, 28))
RAW = gzip.decompress(GOOD)


def tree(folder):
    """Every path under `folder`, hidden ones too."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_the_next_mirror_is_used(web, tmp_path):
    """A dead mirror, a 404 and other bytes are passed over; the download is whole, alone in its new folder, and made once."""
    web.replies.update({"/b/file.bin": http(b"something else"), "/c/file.bin": http(BODY)})
    folder, mirrors = tmp_path / "new" / "folder", source(web.dead, web.url + "a/", web.url + "b/", web.url + "c/")
    for content in (BODY, b"mine"):  # a file that is there is taken as it is
        assert data.fetch("file.bin", folder, mirrors).read_bytes() == content and tree(folder) == ["file.bin"]
        assert web.asked == ["/a/file.bin", "/b/file.bin", "/c/file.bin"]
        (folder / "file.bin").write_bytes(b"mine")


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    """Ctrl-C while a file is written leaves its older version, and no temporary file."""
    (tmp_path / "file.bin").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        files.write_whole(tmp_path / "file.bin", lambda file: file.write(b"half") and signal.raise_signal(signal.SIGINT))
    assert tree(tmp_path) == ["file.bin"] and (tmp_path / "file.bin").read_bytes() == b"old"


def test_simultaneous_downloads_do_not_disturb_each_other(web, tmp_path, monkeypatch):
    """Four downloads of one file at the same moment all succeed, and leave one whole file."""
    together, download = threading.Barrier(4, timeout=10), data.download
    monkeypatch.setattr(data, "download", lambda *given: (together.wait(), download(*given), together.wait()))
    web.replies["/file.bin"] = http(BODY)
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: data.fetch("file.bin", tmp_path, source(web.url)), range(4)))
    assert len(set(paths)) == 1 and paths[0].read_bytes() == BODY and tree(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("split, prefix", [("train", "train"), ("test", "t10k")])
def test_mnist_round_trip(web, tmp_path, monkeypatch, split, prefix):
    """Pixels and labels in the official MNIST format come back exactly, and the second time without the network."""
    pixels, labels = RECORDS[:, 1:785].reshape(-1, 28, 28), RECORDS[:, 0]
    files = {f"{prefix}-images-idx3-ubyte.gz": GOOD, f"{prefix}-labels-idx1-ubyte.gz": idx(labels)}
    web.replies.update({f"/{name}": http(body) for name, body in files.items()})
    sums = {name: hashlib.md5(body).hexdigest() for name, body in files.items()}
    monkeypatch.setattr(data, "MNIST", data.Source((web.url,), sums))
    for _ in range(2):
        images = data.load("mnist", tmp_path, split)
        assert np.array_equal(images.pixels, pixels) and images.labels.tolist() == labels.tolist()
        assert (len(images), images.size, images.labels.dtype) == (12, 28, torch.int64) and len(web.asked) == 2
    assert tree(tmp_path) == sorted(files)


@pytest.mark.parametrize("split, part", [("train", slice(5)), ("test", slice(5, None))])
def test_cifar10_round_trip(web, tmp_path, monkeypatch, split, part):
    """Pixels and labels of the official archive come back exactly; only the batches asked for are unpacked."""
    web.replies["/cifar-10-binary.tar.gz"] = http(ARCHIVE)
    monkeypatch.setattr(data, "CIFAR10", source(web.url, name="cifar-10-binary.tar.gz", body=ARCHIVE))
    expected = RECORDS.reshape(6, 2, -1)[part].reshape(-1, 3073)
    for _ in range(2):
        images = data.load("cifar10", tmp_path, split)
        assert np.array_equal(images.pixels.flatten(1), expected[:, 1:]) and images.pixels.shape[1:] == (3, 32, 32)
        assert images.labels.tolist() == expected[:, 0].tolist() and len(web.asked) == 1
        x, captions, attributes = images.batch(torch.tensor([1, 0]))
        assert torch.equal(((x + 1) * 127.5).round(), images.pixels[[1, 0]].float())
        assert captions == [f"a photo of a {data.OBJECTS[n]}" for n in attributes[:, 0]]
        assert set(" ".join(captions).split()) <= set(images.vocabulary)
    assert tree(tmp_path) == sorted(["cifar-10-binary.tar.gz", INNER] + [f"{INNER}/{name}" for name in BATCHES[part]])


def test_a_hostile_archive_stays_inside(tmp_path):
    """Members that climb, are absolute, are links or go through links change nothing outside the folder."""
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir(), folder.mkdir()
    (outside / "mine.bin").write_bytes(b"mine")
    evil = [("../evil.bin", b"!"), (f"{outside}/evil.bin", b"!"), (f"../{INNER}/test_batch.bin", b"!"),
            (f"{outside}/test_batch.bin", b"!"), (f"{INNER}/../../test_batch.bin", b"!"),
            (f"{INNER}/test_batch.bin", f"{outside}/mine.bin"), (INNER, str(outside)), ("link", str(outside)),
            ("link/test_batch.bin", b"!")]
    (folder / "cifar-10-binary.tar.gz").write_bytes(tar_gz(*evil))
    with pytest.raises(files.DataError, match="test_batch.bin"):
        data.load("cifar10", folder, "test")
    assert tree(folder) == ["cifar-10-binary.tar.gz"]
    (folder / "cifar-10-binary.tar.gz").write_bytes(tar_gz(*evil, *batches(), *evil))
    assert data.load("cifar10", folder, "test").labels.tolist() == RECORDS[10:, 0].tolist()
    assert tree(folder) == [INNER, f"{INNER}/test_batch.bin", "cifar-10-binary.tar.gz"]
    assert tree(outside) == ["mine.bin"] and (outside / "mine.bin").read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "outside"]


def test_no_pickle_is_loaded(tmp_path, monkeypatch):
    """No loader unpickles anything, and a digits file that holds a pickle is refused."""
    for split, prefix in (("train", "train"), ("test", "t10k")):
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(GOOD)
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(idx(RECORDS[:, 0]))
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(ARCHIVE)
    np.savez(tmp_path / "digits.npz", images=np.array([{}], object), labels=np.zeros(1))
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *given, **named: pytest.fail("a pickle was loaded"))
    assert all(len(data.load(name, tmp_path, split)) for name in data.NAMES for split in ("train", "test"))
    monkeypatch.setattr(data, "SHIPPED", tmp_path)
    with pytest.raises(files.DataError, match="pickle"):
        data.load("digits")


def test_digits_are_whole_and_disjoint():
    """The two splits hold 1,797 images of 8 x 8 pixels from 0 to 255, of every class, and none of them twice."""
    splits = [data.load("digits", split=split) for split in ("train", "test")]
    assert [len(images) for images in splits] == [1437, 360] and all(images.size == 8 for images in splits)
    assert all(images.pixels.min() == 0 and images.pixels.max() == 255 for images in splits)
    assert all(images.labels.unique().tolist() == list(range(10)) for images in splits)
    train, test = ({image.numpy().tobytes() for image in images.pixels} for images in splits)
    assert len(train) + len(test) == 1797 and not train & test


def test_colours_captions_and_attributes_agree():
    """Blank pixels have the paper's colour and full ones the ink's, exactly as the caption and attributes say."""
    images = data.load("digits")
    draw = lambda seed: images.batch(torch.arange(len(images)), torch.Generator().manual_seed(seed))
    x, captions, attributes = draw(0)
    assert torch.equal(x, draw(0)[0]) and captions == draw(0)[1] != draw(1)[1]  # they follow the generator
    assert x.shape == (len(images), 3, 8, 8) and x.min() >= -1 and x.max() <= 1
    assert set(" ".join(captions).split()) == set(images.vocabulary)
    assert torch.equal(attributes[:, 0], images.labels)
    seen = set()
    for picture, grey, words, numbers in zip(x, images.pixels, captions, attributes.tolist()):
        digit, ink, paper = (names[n] for names, n in zip(images.attributes.values(), numbers))
        assert words == f"a {ink} {digit} on {paper}" and ink != paper
        ink_colour, paper_colour = (2 * torch.tensor(colour) - 1 for colour in (data.INKS[ink], data.PAPERS[paper]))
        assert grey[0, 0] == 0 and torch.equal(picture[:, 0, 0], paper_colour)
        assert torch.equal(picture[:, grey == 0], paper_colour[:, None].expand(3, int((grey == 0).sum())))
        assert torch.equal(picture[:, grey == 255], ink_colour[:, None].expand(3, int((grey == 255).sum())))
        between = paper_colour[:, None, None] + (ink_colour - paper_colour)[:, None, None] * grey / 255
        assert torch.allclose(picture, between, atol=1e-6)
        seen.add((ink, paper))
    assert len(seen) == sum(ink != paper for ink in data.INKS for paper in data.PAPERS)
