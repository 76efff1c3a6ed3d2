"""What layers need of this host, tried out where that leaves nothing behind.

All of it is optional: sandboxes over the host's own /usr need none.
"""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from dsec.edge.images.config import ImagesConfig
from dsec.edge.images.erofs import ImageWriter
from dsec.edge.images.tree import directory
from dsec.edge.linux.host import Finding
from dsec.edge.linux.mounts import mount_image
from dsec.errors import DsecError

_PROGRAMS = {
    "debootstrap": ("debootstrap", "for dsec image build debian"),
    "mkfs.erofs": ("erofs-utils", "for compressed layers"),
    "zstd": ("zstd", "for images with zstd layers"),
}


def check_images(config: ImagesConfig | None = None) -> list[Finding]:
    """Every check, in the order in which one would mend them.  Leaves nothing behind."""
    found = [_mounting((config or ImagesConfig()).directory)]
    for program, (package, purpose) in _PROGRAMS.items():
        place = shutil.which(program)
        remedy = f"apt-get install {package}, {purpose}"
        found.append(Finding(program, place is not None, place or "not on PATH", remedy, optional=True))
    return found


def _mounting(wanted: Path) -> Finding:
    """Mount an empty layer from a nameless file on the file system of the store."""
    # os.path.isdir takes what we may not look into for no directory, Path.is_dir fails there
    place = next(path for path in (wanted, *wanted.absolute().parents) if os.path.isdir(path))
    remedy = (
        "layers need EROFS mounts of files (Linux 6.12, CONFIG_EROFS_FS_BACKED_BY_FILE; modprobe erofs), and a "
        "DSEC_IMAGES_DIRECTORY on ext4, xfs, btrfs or the like, not on tmpfs or overlayfs"
    )
    try:
        file = os.open(place, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            writer = ImageWriter(file, bytes_max=1 << 20)
            writer.finish(directory())
            writer.close()
            os.close(mount_image(file))
        finally:
            os.close(file)
    except (OSError, DsecError) as error:
        return Finding("layers", False, f"{place}, Linux {platform.release()}: {error}", remedy, optional=True)
    return Finding("layers", True, f"mounted one from {place}", remedy, optional=True)
