"""Images into the store, a layer for each of theirs; what is there already is not made again.

See: docs/formats/layers.md, "Images".
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from dsec.edge.commands import check_config
from dsec.edge.images.archive import read_archive
from dsec.edge.images.erofs import ImageWriter
from dsec.edge.images.oci import Blob, open_image
from dsec.edge.images.shelf import in_thread
from dsec.edge.images.store import LayerStore, Progress
from dsec.edge.images.streams import unpacked
from dsec.edge.images.tree import Node
from dsec.errors import InvalidArgumentError
from dsec.images import Image, check_image_name
from dsec.types import LayerId
from dsec.views import ImportOptions
from wal import settled

UNPACKED_BYTES_MAX = 64 << 30


async def import_image(
    store: LayerStore,
    path: Path,
    options: ImportOptions = ImportOptions(),  # noqa: B008 - frozen
    *,
    unpacked_bytes_max: int = UNPACKED_BYTES_MAX,
    progress: Progress | None = None,
) -> Image:
    """Make the layers of the image at `path` and name them.

    NotFoundError, InvalidArgumentError (also: a digest that is not right, commands that cannot run so),
    ResourceExhaustedError (the quota, the disk, or new layers that unpack to more than `unpacked_bytes_max` together),
    HostUnfitError.
    """
    layers: list[LayerId] = []
    left_bytes = unpacked_bytes_max
    source = options.source or str(path)
    with contextlib.ExitStack() as stack:
        stack.callback(store.release, layers)
        opened = open_image(path, options.reference, unpacked_bytes_max, store.incoming, source)
        found = await settled(in_thread(stack.enter_context, opened))  # it reads all of it, for its digests
        check_config(found.config)
        name = check_image_name(options.name or _short(found.name) or Path(source).name.partition(".")[0].lower())
        for index, blob in enumerate(found.layers):
            key = f"{blob.diff_id}{' as the lowest' if index == 0 else ''}"
            layer_id = await in_thread(store.made_from, key)
            if layer_id is None:
                reader = _Reader(blob, index, left_bytes)
                layer_id = await store.add(reader, made_from=key, compressed=options.compressed, progress=progress)
                left_bytes -= reader.read_bytes
            store.acquire([layer_id])
            layers.append(layer_id)
        return await store.tag(Image(name=name, layers=tuple(layers[::-1]), config=found.config, source=source))


class _Reader:
    """Reads one layer of an image into a writer and checks what it was."""

    def __init__(self, blob: Blob, index: int, bytes_max: int) -> None:
        self._blob = blob
        self._index = index
        self._bytes_max = bytes_max
        self.read_bytes = 0

    def __call__(self, writer: ImageWriter) -> Node:
        with unpacked(self._blob.section(), self._bytes_max) as stream:
            root = read_archive(stream, writer, is_lowest=self._index == 0)
            self.read_bytes = stream.position
            if f"sha256:{stream.digest}" != self._blob.diff_id:
                raise InvalidArgumentError(f"layer {self._index} is not {self._blob.diff_id}, as the image says")
            return root


def _short(name: str) -> str:
    """A name without the registry that says nothing."""
    return name.removeprefix("docker.io/").removeprefix("library/")
