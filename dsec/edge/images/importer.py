"""Images into the store, a layer for each of theirs; what is there already is not made again.

See: docs/formats/layers.md, "Images".
"""

from __future__ import annotations

from pathlib import Path

from dsec.edge.images.archive import read_archive
from dsec.edge.images.erofs import ImageWriter
from dsec.edge.images.facts import Image, check_image_name
from dsec.edge.images.oci import Blob, open_image
from dsec.edge.images.store import LayerStore, Progress
from dsec.edge.images.streams import unpacked
from dsec.edge.images.tree import Node
from dsec.errors import InvalidArgumentError
from dsec.types import LayerId

UNPACKED_BYTES_MAX = 64 << 30


async def import_image(
    store: LayerStore,
    path: Path,
    *,
    name: str = "",
    reference: str = "",
    compressed: bool = False,
    unpacked_bytes_max: int = UNPACKED_BYTES_MAX,
    progress: Progress | None = None,
) -> Image:
    """Make the layers of the image at `path` and name them (by default as the image is named there).

    NotFoundError, InvalidArgumentError (also: a digest that is not right), ResourceExhaustedError (the quota, or
    a layer that unpacks to more than `unpacked_bytes_max`), HostUnfitError.
    """
    layers: list[LayerId] = []
    try:
        with open_image(path, reference, unpacked_bytes_max) as found:
            name = check_image_name(name or _short(found.name) or path.name.partition(".")[0].lower())
            for index, blob in enumerate(found.layers):
                key = f"{blob.diff_id}{' as the lowest' if index == 0 else ''}"
                layer_id = store.made_from(key)
                if layer_id is None:
                    layer_id = await store.add(
                        _Reader(blob, index, unpacked_bytes_max),
                        made_from=key,
                        compressed=compressed,
                        progress=progress,
                    )
                store.acquire([layer_id])
                layers.append(layer_id)
            return await store.tag(Image(name=name, layers=tuple(layers[::-1]), config=found.config, source=str(path)))
    finally:
        store.release(layers)


class _Reader:
    """Reads one layer of an image into a writer and checks what it was."""

    def __init__(self, blob: Blob, index: int, bytes_max: int) -> None:
        self._blob = blob
        self._index = index
        self._bytes_max = bytes_max

    def __call__(self, writer: ImageWriter) -> Node:
        with unpacked(self._blob.section(), self._bytes_max) as stream:
            root = read_archive(stream, writer, is_lowest=self._index == 0)
            if f"sha256:{stream.digest}" != self._blob.diff_id:
                raise InvalidArgumentError(f"layer {self._index} is not {self._blob.diff_id}, as the image says")
            return root


def _short(name: str) -> str:
    """A name without the registry that says nothing."""
    return name.removeprefix("docker.io/").removeprefix("library/")
