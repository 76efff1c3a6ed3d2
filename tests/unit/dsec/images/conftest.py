"""Trees, images and mounts to look at; every mount is detached and goes with its descriptor."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dsec.edge.images import content
from dsec.edge.images.erofs import ImageWriter, Written
from dsec.edge.images.store import LayerStore
from dsec.edge.images.tree import Data, Node
from dsec.edge.images.verify import verify
from dsec.edge.linux.mounts import mount_image

Shown = dict[str, tuple[object, ...]]


@pytest.fixture
def image(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "layer.erofs", os.O_RDWR | os.O_CREAT | os.O_EXCL)
    yield fd
    os.close(fd)


@pytest.fixture
def write(image: int) -> Callable[..., Written]:
    """Write an image of what `make(writer)` gives, and have it verified."""

    def write(make: Callable[[ImageWriter], Node], bytes_max: int = 1 << 40) -> Written:
        with contextlib.closing(ImageWriter(image, bytes_max=bytes_max)) as writer:
            root = make(writer)
            written = writer.finish(root)
        verify(image, root)
        return written

    return write


@pytest.fixture
async def store(tmp_path: Path) -> Iterator[LayerStore]:
    made = LayerStore(tmp_path / "store")
    await made.open()
    yield made
    made.close()


def file_of(writer: ImageWriter, data: bytes, **fields: object) -> Node:
    return Node(stat.S_IFREG | 0o644, data=data_of(writer, data), **fields)


def data_of(writer: ImageWriter, data: bytes) -> Data:
    view = memoryview(data)

    def read(count: int) -> bytes:
        nonlocal view
        taken, view = view[:count], view[count:]
        return bytes(taken)

    return writer.write_data(content.of_stream(read, len(data)), len(data))


@pytest.fixture
def regular() -> Callable[..., Node]:
    return file_of


@pytest.fixture
def mounted() -> Iterator[Callable[[Path | int], Path]]:
    """The root of an image, as a path that is good for as long as the test runs."""
    with contextlib.ExitStack() as stack:

        def mount(image: Path | int) -> Path:
            fd = os.open(image, os.O_RDONLY) if isinstance(image, Path) else image
            root = mount_image(fd)
            stack.callback(os.close, root)
            if isinstance(image, Path):
                os.close(fd)
            return Path(f"/proc/self/fd/{root}")

        yield mount


@pytest.fixture
def show() -> Callable[[Path], Shown]:
    """What a program sees of a tree: kind and mode, owner, and content, target or device."""

    def show(root: Path) -> Shown:
        found: Shown = {}
        for directory, names, files in os.walk(f"{root}/"):
            for name in names + files:
                path = os.path.join(directory, name)
                status = os.lstat(path)
                what: object = None
                if stat.S_ISREG(status.st_mode):
                    what = Path(path).read_bytes()
                elif stat.S_ISLNK(status.st_mode):
                    what = os.readlink(path)
                elif stat.S_ISCHR(status.st_mode):
                    what = status.st_rdev
                found[os.path.relpath(path, root)] = (stat.filemode(status.st_mode), status.st_uid, status.st_gid, what)
        return found

    return show


class Tar:
    """A tar archive in the making."""

    def __init__(self, **options: object) -> None:
        self._bytes = io.BytesIO()
        self._tar = tarfile.TarFile(fileobj=self._bytes, mode="w", format=tarfile.PAX_FORMAT, **options)

    def add(self, name: str, data: bytes = b"", *, kind: bytes = tarfile.REGTYPE, **fields: object) -> Tar:
        member = tarfile.TarInfo(name)
        member.type, member.size = kind, len(data)
        for field, value in fields.items():
            setattr(member, field, value)
        self._tar.addfile(member, io.BytesIO(data))
        return self

    def bytes(self) -> bytes:
        self._tar.close()
        return self._bytes.getvalue()


@pytest.fixture
def tar() -> type[Tar]:
    return Tar


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., Path]:
    """A directory with one file, made by its content."""

    def make(text: str, size: int = 0) -> Path:
        path = tmp_path / f"source-{text}"
        path.mkdir()
        (path / "file").write_text(text)
        (path / "ballast").write_bytes(os.urandom(size))
        os.utime(path, (1, 1))
        return path

    return make
