"""What may be written to a store, what it removes to make room, and what never: the policy over one shelf.

Whatever grows there is measured while it does.  The layer that was used longest ago goes first.  Never: a layer that
a process holds, one that an image is made of, one that a layer still here was made over.  All of it under the shelf's
lock.

See: docs/formats/layers.md, "Quota".
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec

from dsec.edge.admission import free_bytes_above_floor
from dsec.edge.images.erofs import write_all
from dsec.edge.images.shelf import Shelf
from dsec.errors import ResourceExhaustedError
from dsec.types import LayerId

CHECK_BYTES = 16 << 20
Incoming = AbstractContextManager[tuple[Callable[[bytes], None], Path]]
"""A temporary file: what appends to it (ResourceExhaustedError), and its path."""


class Bounds(msgspec.Struct, frozen=True):
    """What layers and unfinished files may take, and what stays free of their disk (or a twentieth of it, if less)."""

    bytes_max: int
    disk_free_bytes_min: int


def meter(shelf: Shelf, bounds: Bounds, keep: Iterable[LayerId] = ()) -> Callable[[int], None]:
    """To be told of every count of bytes that is written: it makes room every CHECK_BYTES.  ResourceExhaustedError."""
    unchecked = 0

    def written(count: int) -> None:
        nonlocal unchecked
        unchecked += count
        if unchecked > CHECK_BYTES:
            unchecked = 0
            with shelf.changing():
                make_room(shelf, bounds, keep)

    return written


@contextlib.contextmanager
def incoming(shelf: Shelf, bounds: Bounds) -> Iterator[tuple[Callable[[bytes], None], Path]]:
    """What appends to a temporary file as long as there is room, and the file's path."""
    measured, size = meter(shelf, bounds), 0
    with shelf.temporary() as (file, path):

        def append(data: bytes) -> None:
            nonlocal size
            write_all(file, data, size)
            size += len(data)
            measured(len(data))

        yield append, path


def make_room(shelf: Shelf, bounds: Bounds, keep: Iterable[LayerId] = ()) -> None:
    """Evict until the bounds hold.  ResourceExhaustedError, with the one that is passed, if that is not to be."""
    if not _passed(shelf, bounds):
        return
    evict(shelf, lambda: not _passed(shelf, bounds), frozenset(keep))
    if passed := _passed(shelf, bounds):
        raise ResourceExhaustedError(passed)


def _passed(shelf: Shelf, bounds: Bounds) -> str:
    if (used := shelf.used_bytes()) > bounds.bytes_max:
        return (
            f"the layers that must stay, and those being made, take {used} of {bounds.bytes_max} bytes: "
            "remove images (dsec image rm), or raise the quota"
        )
    if (above := free_bytes_above_floor(shelf.scratch, bounds.disk_free_bytes_min)) < 0:
        return f"disk of {shelf.scratch}: {-above} bytes less are free than disk_free_bytes_min wants; free some"
    return ""


def evict(shelf: Shelf, is_enough: Callable[[], bool], keep: frozenset[LayerId] = frozenset()) -> list[LayerId]:
    """Remove what nothing needs until it is enough; a parent becomes free with its last child."""
    removed: list[LayerId] = []
    tried = set(keep)
    while not is_enough():
        must_stay = needed(shelf)
        candidate = next((layer for layer in shelf.layers() if layer not in must_stay and layer not in tried), None)
        if candidate is None:
            break
        tried.add(candidate)
        if remove_unheld(shelf, candidate):
            removed.append(candidate)
    return removed


def needed(shelf: Shelf) -> dict[LayerId, str]:
    """Layers that an image or another layer is made of, with the reason to say."""
    reasons: dict[LayerId, str] = {}
    for layer_id, facts in shelf.layers().items():
        reasons.update(dict.fromkeys(facts.parents, f"layer {layer_id} was made over it"))
    for image in shelf.images().values():
        reasons.update(dict.fromkeys(image.layers, f"image {image.name} is made of it"))
    return reasons


def remove_unheld(shelf: Shelf, layer_id: LayerId) -> bool:
    """Remove a layer that no process holds; False if one does."""
    try:
        fd = os.open(shelf.path(layer_id), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shelf.remove(layer_id)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True
