"""What may be asked about the images of a store: by the command line of its host, and by clients of its Edge.

An archive from a client is taken in piece by piece, counted into the store's quota, and only then read, as an
archive of this host would be.  Nothing is left of one that did not come to its end.

See: docs/formats/layers.md, "Images".
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import msgspec

from dsec.edge.config import SANDBOX_LAYERS_COUNT_MAX
from dsec.edge.images import quota
from dsec.edge.images.importer import import_image
from dsec.edge.images.shelf import in_thread
from dsec.edge.images.store import CHECK_BYTES, LayerStore
from dsec.errors import InvalidArgumentError, ResourceExhaustedError
from dsec.images import Image, ImageConfig, Layer, check_image_name, is_layer_id
from dsec.types import LayerId
from dsec.views import ImportOptions, SandboxView

UPLOADS_COUNT_MAX = 4
UPLOAD_BYTES_MAX = 64 << 30
PIECE_WAIT_S = 120.0
DISK_FREE_BYTES_MIN = 256 << 20
SOURCE_CHARS_MAX = 4096


class Images:
    """The images of an open store."""

    def __init__(self, store: LayerStore, *, upload_bytes_max: int = UPLOAD_BYTES_MAX) -> None:
        self._store = store
        self._upload_bytes_max = upload_bytes_max
        self._uploads_count = 0

    async def images(self) -> list[Image]:
        """Every image, sorted by name."""
        found = await in_thread(self._store.images)
        return [found[name] for name in sorted(found)]

    async def layers(self) -> list[Layer]:
        """Every layer, the one of this host that was used longest ago first."""
        found = await in_thread(self._store.layers)
        return [Layer(id=layer_id, **msgspec.structs.asdict(facts)) for layer_id, facts in found.items()]

    async def tag(self, name: str, references: Sequence[str]) -> Image:
        """Name what lies over each other, the topmost first: images by name, layers by id.  NotFoundError."""
        if not references:
            raise InvalidArgumentError(f"image {name!r:.100} would be made of nothing")
        if len(references) > SANDBOX_LAYERS_COUNT_MAX:
            raise InvalidArgumentError(f"{len(references)} images and layers: at most {SANDBOX_LAYERS_COUNT_MAX}")
        return await self._store.tag(await in_thread(self._store.compose, name, references))

    async def snapshot(self, name: str, take: Callable[[], Awaitable[LayerId]], origin: SandboxView) -> LayerId:
        """Take a snapshot, and name it together with all that it lies over, and how commands run there."""
        check_image_name(name)
        spec = origin.spec
        config = ImageConfig(env=spec.defaults.env, workdir=spec.defaults.cwd or "/", user=spec.defaults.user)
        with self._store.holding():
            layer = await take()
            layers, source = (layer, *spec.layers), f"snapshot of {origin.id}"
            await self._store.tag(Image(name=name, layers=layers, base=spec.base, config=config, source=source))
            return layer

    async def remove(self, reference: str) -> None:
        """Forget an image by name, or remove a layer by id.  NotFoundError, StateError (it must stay)."""
        if is_layer_id(reference):
            await self._store.remove(LayerId(reference))
        else:
            await self._store.untag(reference)

    async def collect(self) -> list[LayerId]:
        """Remove every layer that no image, no other layer and no sandbox needs; the removed ones."""
        return await self._store.collect()

    async def receive(self, options: ImportOptions, pieces: AsyncIterator[bytes]) -> Image:
        """An image from the bytes of an archive.

        Raises as `import_image`, and ResourceExhaustedError (too many at once, too large, the disk),
        InvalidArgumentError (no piece came for long).
        """
        if len(options.source) > SOURCE_CHARS_MAX:
            raise InvalidArgumentError(f"source has more than {SOURCE_CHARS_MAX} characters")
        if self._uploads_count >= UPLOADS_COUNT_MAX:
            raise ResourceExhaustedError(f"{UPLOADS_COUNT_MAX} images are being imported already")
        self._uploads_count += 1
        try:
            with self._store.shelf.temporary() as (file, path):
                await self._write(file, pieces)
                options = msgspec.structs.replace(options, source=options.source or "an upload")
                return await import_image(self._store, path, options)
        finally:
            self._uploads_count -= 1

    async def _write(self, file: int, pieces: AsyncIterator[bytes]) -> None:
        total = unchecked = 0
        while (piece := await _next(pieces)) is not None:
            total += len(piece)
            unchecked += len(piece)
            if total > self._upload_bytes_max:
                raise ResourceExhaustedError(f"the archive has more than {self._upload_bytes_max} bytes")
            await in_thread(_write_all, file, piece)
            if unchecked >= CHECK_BYTES:
                unchecked = 0
                await in_thread(self._make_room, file)

    def _make_room(self, file: int) -> None:
        disk = os.fstatvfs(file)
        if disk.f_bavail * disk.f_frsize < DISK_FREE_BYTES_MIN:
            raise ResourceExhaustedError(f"the disk of the layers has less than {DISK_FREE_BYTES_MIN} bytes left")
        with self._store.shelf.changing():
            quota.make_room(self._store.shelf, self._store.bytes_max)


async def _next(pieces: AsyncIterator[bytes]) -> bytes | None:
    try:
        async with asyncio.timeout(PIECE_WAIT_S):
            return await anext(pieces, None)
    except TimeoutError:
        raise InvalidArgumentError(f"nothing of the archive came for {PIECE_WAIT_S:g} s") from None


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
