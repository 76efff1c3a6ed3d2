"""One directory of layers and images: its names, its lock, its temporary files.

Every record appears by a rename after its bytes are durable.  Nothing here decides what may go; that
is the store's.

See: docs/formats/layers.md, "Files of a store".
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import shutil
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

import msgspec

from dsec.edge.images import content
from dsec.edge.images.erofs import write_all
from dsec.edge.images.streams import Section
from dsec.errors import HostUnfitError, ResourceExhaustedError
from dsec.images import Image, LayerFacts, check_layer_id
from dsec.types import LayerId

UNLOCKED_S_MAX = 86_400
P = ParamSpec("P")
T = TypeVar("T")


class Shelf:
    """The files of one store directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._layers = directory / "layers" / "sha256"
        self._images = directory / "images"
        self._temporary = directory / "tmp"

    @property
    def scratch(self) -> Path:
        """Where nameless files may be made, on the same disk."""
        return self._temporary

    def make(self) -> None:
        """Make what is missing; only root looks inside, since layers hold what other users may not read."""
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in (self._layers, self._images, self._temporary):
            path.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the lock under which names appear and go; others wait."""
        fd = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    # -- layers ----------------------------------------------------------------------------------

    def path(self, layer_id: LayerId) -> Path:
        """Where the layer's file is, or would be.  InvalidArgumentError for what is no id."""
        return self._layers / f"{check_layer_id(layer_id).partition(':')[2]}.erofs"

    def has(self, layer_id: LayerId) -> bool:
        """True if the layer is here."""
        return self.path(layer_id).is_file()

    def layers(self) -> dict[LayerId, LayerFacts]:
        """Every layer with its facts, the one that was used longest ago first."""
        found = []
        for path in self._layers.glob("*.json"):
            with contextlib.suppress(OSError, msgspec.DecodeError):  # going, or written by hand
                if path.with_suffix(".erofs").is_file():
                    facts = msgspec.json.decode(path.read_bytes(), type=LayerFacts)
                    found.append((path.stat().st_mtime_ns, LayerId(f"sha256:{path.stem}"), facts))
        return {layer_id: facts for _, layer_id, facts in sorted(found, key=lambda item: item[:2])}

    def facts(self, layer_id: LayerId) -> LayerFacts:
        """Of one layer.  OSError if it is not here."""
        return msgspec.json.decode(self.path(layer_id).with_suffix(".json").read_bytes(), type=LayerFacts)

    def touch(self, layer_id: LayerId) -> None:
        """It is used now; a shelf that cannot be written keeps its old order."""
        with contextlib.suppress(OSError):
            os.utime(self.path(layer_id).with_suffix(".json"))

    def put(self, temporary: Path, layer_id: LayerId, facts: LayerFacts) -> None:
        """Give a durable temporary file its name, under the lock; one that is here already stays."""
        target = self.path(layer_id)
        if target.exists():
            self.touch(layer_id)
            return
        self._write(target.with_suffix(".json"), msgspec.json.encode(facts))
        os.chmod(temporary, 0o400)
        os.rename(temporary, target)
        _sync_directory(self._layers)

    def receive(self, source: Shelf, layer_id: LayerId) -> None:
        """Copy a layer of another shelf here, without any lock: a rename is enough for those who only read.

        HostUnfitError if what arrived is not the layer.
        """
        if self.has(layer_id):
            return
        self.make()
        path = self._temporary / f"{uuid.uuid4().hex}.copy"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with source.path(layer_id).open("rb") as original:
                size = os.fstat(original.fileno()).st_size
                for offset, block in content.of_file(original.fileno(), size):
                    write_all(fd, block, offset)
                os.ftruncate(fd, size)
            os.fsync(fd)
            if descriptor_id(fd) != layer_id:
                raise HostUnfitError(f"layer {layer_id} did not arrive whole in {self._directory}")
            self.put(path, layer_id, source.facts(layer_id))
        finally:
            os.close(fd)
            path.unlink(missing_ok=True)

    def remove(self, layer_id: LayerId) -> None:
        """Remove a layer, under the lock: first the file that makes it one."""
        self.path(layer_id).unlink(missing_ok=True)
        self.path(layer_id).with_suffix(".json").unlink(missing_ok=True)

    # -- images ----------------------------------------------------------------------------------

    def images(self) -> dict[str, Image]:
        """Every image by name."""
        found = map(_read_image, sorted(self._images.glob("*.json")))
        return {image.name: image for image in found if image is not None}

    def image(self, name: str) -> Image | None:
        """The image of that name, if there is one."""
        return _read_image(self._image_path(name))

    def put_image(self, image: Image) -> None:
        """Name an image, under the lock; an older one of that name loses it."""
        self._write(self._image_path(image.name), msgspec.json.encode(image))

    def remove_image(self, name: str) -> bool:
        """Forget a name, under the lock; False if there was none."""
        try:
            self._image_path(name).unlink()
        except FileNotFoundError:
            return False
        return True

    def _image_path(self, name: str) -> Path:
        return self._images / f"{urllib.parse.quote(name, safe='')}.json"

    # -- temporary files -------------------------------------------------------------------------

    @contextlib.contextmanager
    def temporary(self) -> Iterator[tuple[int, Path]]:
        """A new file that is locked while it is in use, and gone afterwards unless it was renamed."""
        path = self._temporary / f"{uuid.uuid4().hex}.part"
        with self.changing():  # nobody sweeps between the creation and the lock
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            yield fd, path
        finally:
            path.unlink(missing_ok=True)
            os.close(fd)

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A new directory that is gone afterwards, or when its maker is dead."""
        with self.temporary() as (_, path):
            directory = path.with_suffix(".tree")
            directory.mkdir(mode=0o755)
            try:
                yield directory
            finally:
                shutil.rmtree(directory)

    def sweep(self) -> int:
        """Remove what dead writers left, under the lock: temporary files, and facts of layers that never came."""
        count = 0
        for path in self._temporary.iterdir():
            if _is_abandoned(path):
                shutil.rmtree(path.with_suffix(".tree"), ignore_errors=True)
                path.unlink(missing_ok=True)
                count += 1
        for path in self._layers.glob("*.json"):
            if not path.with_suffix(".erofs").exists():
                path.unlink(missing_ok=True)
                count += 1
        return count

    def used_bytes(self) -> int:
        """What layers and unfinished files take on the disk."""
        total = 0
        for directory in (self._layers, self._temporary):
            for entry in os.scandir(directory):
                with contextlib.suppress(FileNotFoundError):
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
        return total

    def _write(self, target: Path, data: bytes) -> None:
        with self._record() as (fd, path):
            write_all(fd, data, 0)
            os.fsync(fd)
            os.rename(path, target)
        _sync_directory(target.parent)

    @contextlib.contextmanager
    def _record(self) -> Iterator[tuple[int, Path]]:
        path = self._temporary / f"{uuid.uuid4().hex}.record"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            yield fd, path
        finally:
            path.unlink(missing_ok=True)
            os.close(fd)


def descriptor_id(fd: int) -> LayerId:
    """The layer that an open file is."""
    return LayerId("sha256:" + Section(fd, 0, os.fstat(fd).st_size).digest("sha256"))


def file_id(path: Path) -> LayerId:
    """The layer that a file is."""
    with path.open("rb") as file:
        return descriptor_id(file.fileno())


def _read_image(path: Path) -> Image | None:
    with contextlib.suppress(OSError, msgspec.DecodeError):  # going, or written by hand
        return msgspec.json.decode(path.read_bytes(), type=Image)
    return None


def _is_abandoned(path: Path) -> bool:
    """True for a temporary file whose writer is dead; for one without a lock that is after a day."""
    if path.suffix != ".part":
        with contextlib.suppress(OSError):
            return path.is_file() and time.time() - path.stat().st_mtime > UNLOCKED_S_MAX
        return False
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


async def in_thread(work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Run what touches the disk beside the loop.  ResourceExhaustedError for a full one, else HostUnfitError."""
    try:
        return await asyncio.to_thread(work, *arguments, **options)
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise ResourceExhaustedError(f"no room for layers: {error.strerror}") from error
        raise HostUnfitError(f"the store of layers does not work: {error}") from error
