"""Layers and images of this host: made, named, held, and evicted when they need too much room.

A layer's file is written under another name, mounted, compared, synced, and only then renamed to its
digest; a crash leaves nothing but a temporary file, which the next `open` of anybody removes.
Processes share a store: names change under one lock, a writer holds a lock on its temporary file and whoever
uses a layer a shared one on the layer's file, so all of them fall with the process.  A second directory,
`shared`, is only read: its layers are used where they lie.

Invariants:
    1. A name in `layers/` is the digest of the whole file behind it, which was mounted and compared.
    2. A layer that is held, is part of an image, or is a parent of another layer is never removed.

See: docs/formats/layers.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from msgspec.structs import replace

from dsec.edge.commands import check_config
from dsec.edge.images import quota
from dsec.edge.images.compress import compress
from dsec.edge.images.directory import DirectoryReader
from dsec.edge.images.erofs import ImageWriter
from dsec.edge.images.shelf import Shelf, descriptor_id, file_id, in_thread
from dsec.edge.images.tree import Node, below, hide_missing
from dsec.edge.images.verify import verify
from dsec.errors import HostUnfitError, NotFoundError, StateError
from dsec.images import Image, LayerFacts, check_image_name, is_layer_id, over_each_other
from dsec.sandbox import Hold
from dsec.types import Composition, LayerId

BYTES_MAX = 1 << 42
Read = Callable[[ImageWriter], Node]
Progress = Callable[[int], None]
"""Called with the count of bytes that were written since the last call."""


class LayerStore:
    """The layers below `directory`, of at most `bytes_max` bytes in all, and those of `shared`.

    Nothing is written that leaves less than `disk_free_bytes_min` of the disk.
    """

    def __init__(
        self, directory: Path, bytes_max: int = BYTES_MAX, *, shared: Path | None = None, disk_free_bytes_min: int = 0
    ) -> None:
        self.shelf = Shelf(directory)
        self._shared = Shelf(shared) if shared is not None else None
        self._bounds = quota.Bounds(bytes_max, disk_free_bytes_min)
        self._held: dict[LayerId, tuple[int, int]] = {}
        self._blocks: list[list[LayerId]] = []  # what each block of `holding` holds

    async def open(self) -> None:
        """Make the directory and remove what dead processes left unfinished.  HostUnfitError."""

        def prepare() -> None:
            self.shelf.make()
            with self.shelf.changing():
                self.shelf.sweep()

        await in_thread(prepare)

    def close(self) -> None:
        """Let go of every layer."""
        for fd, _ in self._held.values():
            os.close(fd)
        self._held.clear()

    # -- looking ---------------------------------------------------------------------------------

    def _find(self, layer_id: LayerId) -> Shelf:
        for shelf in (self.shelf, self._shared):
            if shelf is not None and shelf.has(layer_id):
                return shelf
        raise NotFoundError(f"there is no layer {layer_id}")

    def path(self, layer_id: LayerId) -> Path:
        """The layer's file.  NotFoundError; InvalidArgumentError for what is no id."""
        return self._find(layer_id).path(layer_id)

    def facts(self, layer_id: LayerId) -> LayerFacts:
        """What is known of the layer.  NotFoundError."""
        return self._find(layer_id).facts(layer_id)

    def layers(self) -> dict[LayerId, LayerFacts]:
        """Every layer, the one of this host that was used longest ago first."""
        return {**(self._shared.layers() if self._shared else {}), **self.shelf.layers()}

    def made_from(self, source: str) -> LayerId | None:
        """The layer that was made from exactly this source, if it is here."""
        return next((layer_id for layer_id, facts in self.layers().items() if facts.made_from == source), None)

    def images(self) -> dict[str, Image]:
        """Every image by name; one of this host goes before a shared one."""
        return {**(self._shared.images() if self._shared else {}), **self.shelf.images()}

    def image(self, name: str) -> Image:
        """The image of that name (`:latest` where it has no tag).  NotFoundError."""
        for shelf in (self.shelf, self._shared):
            if shelf is not None and (found := shelf.image(check_image_name(name))) is not None:
                return found
        raise NotFoundError(f"there is no image {name}; dsec image ls names them")

    def resolve(self, reference: str) -> Image:
        """The image that a name, or the id of one layer, stands for.  NotFoundError."""
        if not is_layer_id(reference):
            return self.image(reference)
        layer_id = LayerId(reference)
        return Image(name="", layers=(layer_id, *self.facts(layer_id).parents))

    async def composed(self, references: Sequence[str]) -> Composition:
        """See `dsec.sandbox.Layered`; an id stands for itself, whatever it was made over."""
        found = [
            Image(name="", layers=(LayerId(one),)) if is_layer_id(one) else await in_thread(self.image, one)
            for one in references
        ]
        whole = over_each_other(found)
        return Composition(layers=whole.layers, base=whole.base, defaults=whole.config.defaults)

    def compose(self, name: str, references: Iterable[str]) -> Image:
        """An image of others and of layers, the topmost first; how it runs is theirs, the topmost's before the others'.

        NotFoundError.
        """
        found = [self.resolve(reference) for reference in references]
        return replace(over_each_other(found), name=name, source=" ".join(image.name for image in found))

    async def check(self, layer_ids: Iterable[LayerId]) -> None:
        """Read layers again.  HostUnfitError if one is no longer what its name says."""
        for layer_id in layer_ids:
            path = self.path(layer_id)
            if await in_thread(file_id, path) != layer_id:
                raise HostUnfitError(f"{path} was changed: it is no longer what it is called")

    async def publish(self, image: Image) -> None:
        """Copy an image's layers, and its name if it has one, to the shared directory.

        NotFoundError; StateError if there is no such directory.
        """
        if self._shared is None:
            raise StateError("there is no shared directory to publish to (DSEC_IMAGES_SHARED)")
        for layer_id in image.layers:
            await in_thread(self._shared.receive, self._find(layer_id), layer_id)
        if image.name:
            await in_thread(self._shared.put_image, image)

    # -- holding ---------------------------------------------------------------------------------

    def acquire(self, layer_ids: Iterable[LayerId]) -> None:
        """Hold these layers, all or none: they stay until as many releases.  NotFoundError."""
        taken: list[LayerId] = []
        try:
            for layer_id in layer_ids:
                fd, count = self._held.get(layer_id) or (self._hold(layer_id), 0)
                self._held[layer_id] = (fd, count + 1)
                taken.append(layer_id)
        except BaseException:
            self.release(taken)
            raise

    def release(self, layer_ids: Iterable[LayerId]) -> None:
        """Give back what was acquired."""
        for layer_id in layer_ids:
            fd, count = self._held.pop(layer_id)
            if count > 1:
                self._held[layer_id] = (fd, count - 1)
            else:
                os.close(fd)

    @contextlib.contextmanager
    def holding(self) -> Iterator[Hold]:
        """See `dsec.sandbox.Layered`."""
        block: list[LayerId] = []

        async def hold(layer_ids: Sequence[LayerId]) -> None:
            self.acquire(layer_ids)
            block.extend(layer_ids)

        self._blocks.append(block)
        try:
            yield hold
        finally:
            self._blocks = [other for other in self._blocks if other is not block]
            self.release(block)

    def descriptor(self, layer_id: LayerId) -> int:
        """The open file of a held layer; it is the store's.  A copy of it holds the layer for as long as it is open."""
        return self._held[layer_id][0]

    def _hold(self, layer_id: LayerId) -> int:
        shelf = self._find(layer_id)
        try:
            fd = os.open(shelf.path(layer_id), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise NotFoundError(f"there is no layer {layer_id} any more") from error
        except OSError as error:
            raise HostUnfitError(f"layer {layer_id} cannot be opened: {error}") from error
        try:
            if shelf is self.shelf:
                fcntl.flock(fd, fcntl.LOCK_SH)
                if os.fstat(fd).st_nlink == 0:
                    raise NotFoundError(f"there is no layer {layer_id} any more")
                shelf.touch(layer_id)
            else:  # one read from far away instead of one for each inode that is looked up
                start = shelf.facts(layer_id).metadata_offset
                os.posix_fadvise(fd, start, 0, os.POSIX_FADV_WILLNEED)
        except BaseException:
            os.close(fd)
            raise
        return fd

    # -- making ----------------------------------------------------------------------------------

    async def add_directory(
        self,
        path: Path,
        *,
        at: str = "/",
        made_from: str = "directory",
        parents: tuple[LayerId, ...] = (),
        compressed: bool = False,
        progress: Progress | None = None,
    ) -> LayerId:
        """A layer of what is in a directory of one file system; in the layer it is `at`.

        InvalidArgumentError, ResourceExhaustedError (the quota, the disk), HostUnfitError (it cannot
        be mounted and compared here).
        """
        return await self.add(
            lambda writer: below(os.fsencode(at), DirectoryReader(writer).read(path)),
            made_from=made_from,
            parents=parents,
            compressed=compressed,
            progress=progress,
        )

    async def pack(
        self, disk: Path, first_uid: int, *, parents: tuple[LayerId, ...] = (), beneath: Sequence[str] = ()
    ) -> LayerId:
        """A layer of the upper directory of a sandbox, which is frozen until this returns, cancelled or not.

        `first_uid` on the disk is 0 in the layer.  What of the paths `beneath` is not on the disk was removed: it
        is hidden where the layer lies over them.  Raises as `add_directory` does.
        """

        def read(writer: ImageWriter) -> Node:
            root = DirectoryReader(writer, first_uid).read(disk)
            hide_missing(root, beneath)
            return root

        return await self.add(read, made_from="snapshot", parents=parents)

    def incoming(self) -> quota.Incoming:
        """A file to be filled with what is read once, and then gone."""
        return quota.incoming(self.shelf, self._bounds)

    def staging(self) -> contextlib.AbstractContextManager[Path]:
        """A directory on the store's disk to put a tree together in; gone afterwards, also if we die."""
        return self.shelf.staging()

    async def add(
        self,
        read: Read,
        *,
        made_from: str,
        parents: tuple[LayerId, ...] = (),
        compressed: bool = False,
        progress: Progress | None = None,
    ) -> LayerId:
        """A layer of whatever `read` writes, in a thread; cancelling waits until the thread has stopped."""
        stopped = threading.Event()
        measured = quota.meter(self.shelf, self._bounds, parents)

        def step(count: int) -> None:
            if stopped.is_set():
                raise StateError("the layer is no longer wanted")
            measured(count)
            if progress is not None:
                progress(count)

        build = functools.partial(self._build, read, made_from, parents, step, compressed=compressed)
        task = asyncio.ensure_future(in_thread(build))
        try:
            layer_id, held = await asyncio.shield(task)
        except asyncio.CancelledError:
            stopped.set()
            await asyncio.wait([task])
            if not task.cancelled() and task.exception() is None:
                os.close(task.result()[1])
            raise
        for block in self._blocks:
            self.acquire([layer_id])
            block.append(layer_id)
        os.close(held)
        return layer_id

    def _build(
        self, read: Read, made_from: str, parents: tuple[LayerId, ...], step: Progress, *, compressed: bool
    ) -> tuple[LayerId, int]:
        """The layer, and its file, whose lock holds it."""
        bytes_max = self._bounds.bytes_max
        with self.shelf.temporary() as (file, path):
            with (
                self.shelf.temporary() as (spool, _),
                contextlib.closing(ImageWriter(file, bytes_max=bytes_max, step=step, spool=spool)) as writer,
            ):
                root = read(writer)
                written = writer.finish(root)
            verify(file, root)
            facts = LayerFacts(
                size_bytes=written.size_bytes,
                metadata_offset=written.metadata_offset,
                entries_count=written.entries_count,
                content_bytes=written.content_bytes,
                created_at_s=time.time(),
                made_from=made_from,
                parents=parents,
            )
            if not compressed:
                return self._name(file, path, facts)
            with self.shelf.temporary() as (smaller, smaller_path):
                compress(file, smaller_path)
                verify(smaller, root)
                facts = replace(facts, size_bytes=os.fstat(smaller).st_size, metadata_offset=-1)
                return self._name(smaller, smaller_path, facts)

    def _name(self, file: int, path: Path, facts: LayerFacts) -> tuple[LayerId, int]:
        layer_id = descriptor_id(file)
        with self.shelf.changing():
            quota.make_room(self.shelf, self._bounds, facts.parents)
            self.shelf.put(path, layer_id, facts)
            fcntl.flock(file, fcntl.LOCK_SH)  # it is no unfinished file any more
            return layer_id, self._hold(layer_id)

    # -- images ----------------------------------------------------------------------------------

    async def tag(self, image: Image) -> Image:
        """Name layers; an older image of that name loses it.  NotFoundError (a layer), InvalidArgumentError."""
        check_config(image.config)
        named = replace(image, name=check_image_name(image.name), created_at_s=image.created_at_s or time.time())

        def put() -> None:
            with self.shelf.changing():
                for layer_id in named.layers:
                    self._find(layer_id)
                self.shelf.put_image(named)

        await in_thread(put)
        return named

    async def untag(self, name: str) -> None:
        """Forget the name; the layers stay until the room is needed.  NotFoundError."""

        def remove() -> None:
            with self.shelf.changing():
                if not self.shelf.remove_image(check_image_name(name)):
                    raise NotFoundError(f"there is no image {name} of this host; dsec image ls names them")

        await in_thread(remove)

    # -- removing --------------------------------------------------------------------------------

    async def remove(self, layer_id: LayerId) -> None:
        """Remove one layer of this host.  NotFoundError; StateError, with the reason, if it must stay."""

        def remove() -> None:
            with self.shelf.changing():
                if not self.shelf.has(layer_id):
                    raise NotFoundError(f"there is no layer {layer_id} on this host")
                reason = quota.needed(self.shelf).get(layer_id)
                if reason is None and not quota.remove_unheld(self.shelf, layer_id):
                    reason = "a sandbox or a host agent uses it"
                if reason is not None:
                    raise StateError(f"layer {layer_id} must stay: {reason}")

        await in_thread(remove)

    async def collect(self) -> list[LayerId]:
        """Remove every layer that nothing needs, and what dead processes left; the removed layers."""

        def collect() -> list[LayerId]:
            with self.shelf.changing():
                self.shelf.sweep()
                return quota.evict(self.shelf, lambda: False)

        return await in_thread(collect)
