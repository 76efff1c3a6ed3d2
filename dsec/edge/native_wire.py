"""Messages to and from the C side, as `dsec/native/protocol.h` lays them out.

Only layout lives here: no socket, no policy.  Both ends run on one little-endian machine and are
built together, so a message that does not parse (MalformedMessageError) means that the other end is broken.

See: dsec/native/protocol.h.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Sequence
from enum import IntEnum

import msgspec

from dsec.types import SandboxSpec

PROTOCOL_VERSION = 4
NO_SLOT = 0xFFFFFFFF
PACKET_BYTES_MAX = 65536
PACKET_FDS_MAX = 4
INLINE_BODY_BYTES_MAX = 32768
ERRNO_MAX = 4095
KEPT_COUNT_MAX = 32768
KEY_BYTES_MAX = 255
ENDED_COUNT_MAX = 128
UIDS_PER_SLOT = 65664

EXEC_HAS_STDIN, EXEC_MERGE_STDERR, EXEC_BODY_IN_FD, EXEC_KILL_OTHERS, EXEC_TTY = 1, 2, 4, 8, 16
INIT_KEPT = 1
CREATE_HOST_USR = 1
DESTROY_NETWORK = 1
EXIT_TIMED_OUT, EXIT_OOM_KILLED = 1, 2
FD_DISK = 6


class MalformedMessageError(ValueError):
    """A message that the other end, in its right mind, would not send."""


class MessageType(IntEnum):
    """First field of every message."""

    INIT = 1
    CREATE = 2
    DESTROY = 3
    INITED = 4
    FAILED = 5
    CREATED = 6
    GONE = 7
    READY = 8
    EXEC = 9
    KILL = 10
    EXITED = 11
    REFUSED = 12
    MOUNT = 13
    UNMOUNT = 14
    SYNC = 15
    MOUNTED = 16
    UNMOUNTED = 17
    MOUNT_FAILED = 18
    ALIVE = 19
    SYNCED = 20
    TTY = 21
    RUNNING = 22
    SIGNAL = 23
    EXTEND = 24
    PUT = 25
    DROP = 26
    LIST = 27
    KEPT = 28
    ATTACH = 29
    ATTACHED = 30


class Stage(IntEnum):
    """Where a command that did not start was refused."""

    REQUEST = 1
    GROUP = 2
    FORK = 3
    CWD = 4
    EXEC = 5
    ALONE = 6
    CROWDED = 7
    COMMANDS = 8
    USER = 9
    TTY = 10


class Operation(IntEnum):
    """What to do with a path of a cgroup hierarchy."""

    MKDIR = 1
    WRITE = 2
    WRITE_IF_PRESENT = 3
    CHOWN = 4
    RESTORE = 5


class CgroupOperation(msgspec.Struct, frozen=True):
    """One step of making a sandbox's cgroups; `path` is relative to hierarchy number `hierarchy`."""

    operation: Operation
    hierarchy: int
    path: str
    value: str = ""


class CgroupPlan(msgspec.Struct, frozen=True):
    """The cgroups of one sandbox; groups are directories of hierarchy 0."""

    guest_group: str
    command_group: str
    oom_hierarchy: int
    oom_file: str
    operations: tuple[CgroupOperation, ...]


def encode_u32(*values: int) -> bytes:
    """Little-endian 32 bit numbers, one after the other."""
    return struct.pack(f"<{len(values)}I", *values)


def encode_u64(value: int) -> bytes:
    """A little-endian 64 bit number."""
    return struct.pack("<Q", value)


def encode_string(text: str | bytes) -> bytes:
    """A string as the C side reads it without copying: length, bytes, one zero byte."""
    data = text if isinstance(text, bytes) else os.fsencode(text)
    return len(data).to_bytes(4, "little") + data + b"\0"


def encode_strings(texts: Iterable[str | bytes]) -> bytes:
    """A counted list of strings."""
    parts = [encode_string(text) for text in texts]
    return encode_u32(len(parts)) + b"".join(parts)


def encode_init(hierarchies: Iterable[tuple[str, str]], slots_count: int, flags: int = 0) -> bytes:
    """INIT; each hierarchy is (parent directory, our directory's name)."""
    pairs = [encode_string(parent) + encode_string(name) for parent, name in hierarchies]
    return encode_u32(MessageType.INIT, flags, slots_count, len(pairs)) + b"".join(pairs)


def encode_create(slot: int, spec: SandboxSpec, layers: Sequence[int], plan: CgroupPlan) -> bytes:
    """CREATE; `layers` are the spec's, by the numbers under which they are mounted."""
    head = encode_u32(MessageType.CREATE, slot) + struct.pack("<Q", spec.disk_bytes)
    names = b"".join(map(encode_string, (spec.hostname, plan.guest_group, plan.command_group)))
    oom = encode_u32(plan.oom_hierarchy) + encode_string(plan.oom_file)
    below = encode_u32(CREATE_HOST_USR * (spec.base == "host"), len(layers), *layers)
    return head + names + oom + below + _encode_operations(plan)


def encode_attach(slot: int, spec: SandboxSpec, plan: CgroupPlan) -> bytes:
    """ATTACH: what of the spec is not said by its base and layers."""
    head = encode_u32(MessageType.ATTACH, slot) + struct.pack("<Q", spec.disk_bytes)
    return head + encode_string(spec.hostname) + _encode_operations(plan)


def _encode_operations(plan: CgroupPlan) -> bytes:
    steps = [
        encode_u32(step.operation, step.hierarchy) + encode_string(step.path) + encode_string(step.value)
        for step in plan.operations
    ]
    return encode_u32(len(steps)) + b"".join(steps)


def encode_exec_body(
    timeout_ms: int, size: tuple[int, int], cwd: bytes, user: bytes, argv: Iterable[bytes], env: Iterable[bytes]
) -> bytes:
    """The body of EXEC; it travels inline or in a memfd.  `size` is that of the terminal: rows, columns."""
    head = struct.pack("<QII", timeout_ms, *size) + encode_string(cwd) + encode_string(user)
    return head + encode_strings(argv) + encode_strings(env)


class MessageReader:
    """Fields of one message, in order."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._offset = 0

    @property
    def is_at_end(self) -> bool:
        """Whether every field was read."""
        return self._offset >= len(self._data)

    def u32(self) -> int:
        """The next number."""
        return self._number(4)

    def u64(self) -> int:
        """The next number of twice the size."""
        return self._number(8)

    def _number(self, size: int) -> int:
        start, self._offset = self._offset, self._offset + size
        if self._offset > len(self._data):
            raise MalformedMessageError("a number runs past the end of its message")
        return int.from_bytes(self._data[start : self._offset], "little")

    def errno(self) -> int:
        """The next number, which the kernel gave as an error."""
        value = self.u32()
        if value > ERRNO_MAX:
            raise MalformedMessageError(f"{value} is no error number")
        return value

    def string(self) -> str:
        """The next string."""
        length = self.u32()
        start, self._offset = self._offset, self._offset + length + 1
        if self._offset > len(self._data):
            raise MalformedMessageError("a string runs past the end of its message")
        return os.fsdecode(self._data[start : start + length])
