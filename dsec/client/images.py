"""`AsyncImages`: the images of an Edge, for whoever is not on its host.

    async with AsyncImages() as images:
        await images.import_archive(Path("python.tar"), ImportOptions(name="python:3.12"))

See: docs/formats/layers.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from dsec import messages
from dsec.client.connection import connect
from dsec.client.substrate import SLOW_CALL_TIMEOUT_S
from dsec.errors import InvalidArgumentError
from dsec.files import pack_directory
from dsec.images import Image, Layer
from dsec.pb.v1 import edge_pb2 as pb
from dsec.types import LayerId
from dsec.views import ImportOptions

PIECE_BYTES = 2 << 20


class AsyncImages:
    """Images and layers of the Edge at `url` (default: DSEC_API_URL, else this host's Edge)."""

    def __init__(self, url: str = "", token: str = "") -> None:
        self._connection = connect(url, token)

    async def images(self) -> list[Image]:
        """Every image, sorted by name."""
        replies = self._connection.stream("ListImages", pb.ListImagesRequest())
        return [messages.image_of(reply) async for reply in replies]

    async def layers(self) -> list[Layer]:
        """Every layer, the one of the host that was used longest ago first."""
        replies = self._connection.stream("ListLayers", pb.ListLayersRequest())
        return [messages.layer_of(reply) async for reply in replies]

    async def import_archive(
        self,
        source: Path | AsyncIterator[bytes],
        options: ImportOptions = ImportOptions(),  # noqa: B008 - frozen
        *,
        progress: Callable[[int], None] = lambda _count: None,
    ) -> Image:
        """An image from an OCI layout or what `docker save` wrote: a tar, its bytes, or a directory of this machine.

        Not repeated when the connection breaks: import it again, what has arrived whole is not made again.  `progress`
        gets the count of bytes that arrived since the last call.  InvalidArgumentError, NotFoundError (`reference`),
        ResourceExhaustedError (the quota, the disk, too many at once).
        """
        if isinstance(source, Path) and not options.source:
            options = msgspec.structs.replace(options, source=str(source))
        first = pb.ImportImageRequest(options=messages.import_message(options))
        if isinstance(source, Path):
            source = pack_directory(source) if source.is_dir() else _read(source)

        async def requests(pieces: AsyncIterator[bytes]) -> AsyncGenerator[pb.ImportImageRequest]:
            yield first
            async for piece in pieces:
                for at in range(0, len(piece), PIECE_BYTES):
                    yield pb.ImportImageRequest(data=piece[at : at + PIECE_BYTES])

        received = 0
        async with aclosing(requests(source)) as sent:
            async for reply in self._connection.exchange("ImportImage", sent):
                if reply.HasField("image"):
                    return messages.image_of(reply.image)
                progress(reply.received_bytes - received)
                received = reply.received_bytes
        raise AssertionError("the last word is the image")

    async def tag(self, name: str, references: Sequence[str]) -> Image:
        """Name what lies over each other, the topmost first: images by name, layers by id.  NotFoundError."""
        try:
            request = pb.TagImageRequest(name=name, references=references)
        except ValueError as error:
            raise InvalidArgumentError(f"no name of an image or a layer: {error}") from error
        return messages.image_of(await self._connection.call("TagImage", request))

    async def remove(self, reference: str) -> None:
        """Forget an image by name, or remove a layer by id.  NotFoundError, StateError (it must stay)."""
        request = pb.RemoveImageRequest(reference=reference)
        await self._connection.call("RemoveImage", request, is_repeatable=False)

    async def collect(self) -> list[LayerId]:
        """Remove every layer that no image, no other layer and no sandbox needs; the removed ones."""
        reply = await self._connection.call("CollectLayers", pb.CollectLayersRequest(), timeout_s=SLOW_CALL_TIMEOUT_S)
        return [LayerId(layer_id) for layer_id in reply.layer_ids]

    async def close(self) -> None:
        """Disconnect."""
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def _read(path: Path) -> AsyncIterator[bytes]:
    try:
        with path.open("rb") as file:
            while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
                yield piece
    except OSError as error:
        raise InvalidArgumentError(f"cannot read {path}: {error.strerror}") from error
