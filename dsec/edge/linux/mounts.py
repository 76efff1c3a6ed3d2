"""The kernel's mount calls that Python has no names for: detached mounts of image files.

A detached mount is a descriptor and nothing else: it is in nobody's mount table, nothing can be hidden
below it, and it is gone with its last descriptor, however the process ends.

See: fsopen(2), fsconfig(2), fsmount(2), move_mount(2).
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT = 429, 430, 431, 432  # the same numbers on every architecture
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_RDONLY_NOSUID_NODEV_NOEXEC = 1 | 2 | 4 | 8
_MOVE_MOUNT_F_EMPTY_PATH = 4
_AT_FDCWD = -100
_CLONE_NEWNS = 0x20000
_MS_REC_PRIVATE = 0x4000 | 0x40000

_libc = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: int | bytes | None) -> int:
    converted = [ctypes.c_long(value) if isinstance(value, int) else ctypes.c_char_p(value) for value in arguments]
    result = _libc.syscall(ctypes.c_long(number), *converted)
    return int(_checked(result))


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def mount_image(image: int) -> int:
    """Mount the EROFS image open at `image`, read only: the detached mount, which names its root directory.

    OSError: EINVAL for no image, ENOTBLK before Linux 6.12 and on file systems that cannot back a mount.
    """
    context = _call(_FSOPEN, b"erofs", _FSOPEN_CLOEXEC)
    try:
        _call(_FSCONFIG, context, _FSCONFIG_SET_STRING, b"source", f"/proc/self/fd/{image}".encode(), 0)
        _call(_FSCONFIG, context, _FSCONFIG_SET_FLAG, b"ro", None, 0)
        _call(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _call(_FSMOUNT, context, _FSMOUNT_CLOEXEC, _RDONLY_NOSUID_NODEV_NOEXEC)
    finally:
        os.close(context)


def attach_privately(mount: int, target: Path) -> None:
    """Give the calling thread a mount namespace of its own, in which the detached mount lies at `target`.

    For a thread that ends soon, and programs that it starts: the namespace goes with the last of them.
    """
    _checked(_libc.unshare(_CLONE_NEWNS))
    _checked(_libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC_PRIVATE), None))
    _call(_MOVE_MOUNT, mount, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)
