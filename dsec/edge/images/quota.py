"""What a store removes when it is full, and what never: the policy over one shelf.

The layer that was used longest ago goes first.  Never: a layer that a process holds, one that an image is
made of, one that a layer still here was made over.  All of it under the shelf's lock.

See: docs/formats/layers.md, "Quota".
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable

from dsec.edge.images.shelf import Shelf
from dsec.errors import ResourceExhaustedError
from dsec.types import LayerId


def make_room(shelf: Shelf, bytes_max: int, keep: Iterable[LayerId] = ()) -> None:
    """Evict until layers and unfinished files take no more than that.  ResourceExhaustedError if it is not to be."""
    if shelf.used_bytes() <= bytes_max:
        return
    evict(shelf, lambda: shelf.used_bytes() <= bytes_max, frozenset(keep))
    if (used := shelf.used_bytes()) > bytes_max:
        raise ResourceExhaustedError(
            f"the layers that must stay, and those being made, take {used} of {bytes_max} bytes: "
            "remove images (dsec image rm), or raise the quota"
        )


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
