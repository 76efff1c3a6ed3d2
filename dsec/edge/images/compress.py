"""Compression of a finished image, by mkfs.erofs: it reads the mounted image and writes another.

Worth it for images that are read over a network or kept by the hundred; a plain image is quicker to
make and to read.  mkfs.erofs (1.5) puts the time of the day into its superblock: the same tree compressed
twice is two layers.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
from pathlib import Path

from dsec.edge.linux.mounts import attach_privately, mount_image
from dsec.errors import HostUnfitError

_COMMAND = ("mkfs.erofs", "-zlz4hc", "--preserve-mtime", "-U00000000-0000-0000-0000-000000000000", "--quiet")


def compress(image: int, target: Path) -> None:
    """Write the compressed form of the EROFS image open at `image` over `target`.  HostUnfitError."""
    failures: list[str] = []

    def run() -> None:  # in a thread that ends with it, and so does the mount namespace
        try:
            mount = mount_image(image)
            try:
                attach_privately(mount, Path(place))
            finally:
                os.close(mount)
            done = subprocess.run(
                [*_COMMAND, str(target), place], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                failures.append(f"mkfs.erofs ended with {done.returncode}: {done.stderr[-500:].strip()}")
        except FileNotFoundError:
            failures.append("the program mkfs.erofs is missing (apt-get install erofs-utils)")
        except OSError as error:
            failures.append(f"the layer cannot be mounted: {error.strerror}")

    with tempfile.TemporaryDirectory(prefix="dsec-layer-") as place:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    if failures:
        raise HostUnfitError(failures[0])
