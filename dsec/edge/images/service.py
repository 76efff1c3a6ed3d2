"""What may be asked about the images of a store: by the command line of its host, and by clients of its Edge.

An archive from a client is taken in piece by piece, counted into the store's quota, and only then read, as an
archive of this host would be.  Nothing is left of one that did not come to its end.

See: docs/formats/layers.md, "Images".
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import msgspec

from dsec.edge.config import SANDBOX_LAYERS_COUNT_MAX
from dsec.edge.images.importer import import_image
from dsec.edge.images.shelf import in_thread
from dsec.edge.images.store import LayerStore
from dsec.errors import InvalidArgumentError, ResourceExhaustedError
from dsec.images import Image, ImageConfig, Layer, check_image_name, is_layer_id
from dsec.types import LayerId
from dsec.views import ImportOptions, SandboxView
from wal import settled

UPLOADS_COUNT_MAX = 4
UPLOAD_BYTES_MAX = 64 << 30
UPLOAD_WAIT_S = 120.0
UPLOAD_BYTES_S_MIN = 64 << 10
SOURCE_CHARS_MAX = 4096


class Images:
    """The images of an open store.

    An upload that is slower than UPLOAD_BYTES_S_MIN may make us wait for `upload_wait_s` more than that takes.
    """

    def __init__(
        self,
        store: LayerStore,
        *,
        upload_bytes_max: int = UPLOAD_BYTES_MAX,
        upload_wait_s: float = UPLOAD_WAIT_S,
    ) -> None:
        self._store = store
        self._upload_wait_s = upload_wait_s
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
        InvalidArgumentError (it comes too slowly).
        """
        if len(options.source) > SOURCE_CHARS_MAX:
            raise InvalidArgumentError(f"source has more than {SOURCE_CHARS_MAX} characters")
        if self._uploads_count >= UPLOADS_COUNT_MAX:
            raise ResourceExhaustedError(f"{UPLOADS_COUNT_MAX} images are being imported already")
        self._uploads_count += 1
        try:
            with contextlib.ExitStack() as stack:
                append, path = await settled(in_thread(stack.enter_context, self._store.incoming()))
                await self._take_in(append, pieces)
                options = msgspec.structs.replace(options, source=options.source or "an upload")
                return await import_image(self._store, path, options)
        finally:
            self._uploads_count -= 1

    async def _take_in(self, append: Callable[[bytes], None], pieces: AsyncIterator[bytes]) -> None:
        total, patience_s = 0, self._upload_wait_s
        now = asyncio.get_running_loop().time
        while True:
            asked_at_s = now()
            try:
                async with asyncio.timeout(patience_s):
                    piece = await anext(pieces, None)
            except TimeoutError:
                raise InvalidArgumentError(
                    f"the archive comes too slowly: {total} bytes, then {self._upload_wait_s:g} s below "
                    f"{UPLOAD_BYTES_S_MIN} bytes a second; send it over a faster way"
                ) from None
            if piece is None:
                return
            total += len(piece)
            if total > self._upload_bytes_max:
                raise ResourceExhaustedError(f"the archive has more than {self._upload_bytes_max} bytes")
            patience_s += len(piece) / UPLOAD_BYTES_S_MIN - (now() - asked_at_s)
            patience_s = min(patience_s, self._upload_wait_s)
            await settled(in_thread(append, piece))  # it writes to a file that is closed after
