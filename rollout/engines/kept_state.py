"""What an engine keeps of a sequence; as a file, written whole or not at all, believed only if every byte is right.

A kept state spares a prefill and nothing else: whatever is wrong with it, the session starts from its
tokens and draws the same.  So reading answers with a state or with the reason why there is none, and
writing does not wait for the disk.

See: docs/formats/engine_state.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

import msgspec

from rollout.errors import EngineError

MAGIC = b"DSECKV1\n"
DIGEST_BYTES = 32
TOKEN_BYTES = 4
FILE_BYTES_MAX = 1 << 30


class KeptState(msgspec.Struct, frozen=True):
    """What a sequence left behind after `tokens` (u32, little-endian): `packed`, the engine's own bytes.

    `weights` are the digests that computed it, newest last: more than one where it was kept over an update.
    """

    build: str
    weights: tuple[str, ...]
    tokens: bytes
    packed: bytearray

    @property
    def tokens_count(self) -> int:
        """Tokens the state has taken in."""
        return len(self.tokens) // TOKEN_BYTES


class NoStateError(EngineError):
    """Why there is no state that can be used."""


def write_state(path: Path, state: KeptState) -> None:
    """Put the file in place, over an older one.  EngineError."""
    try:
        payload = msgspec.msgpack.encode(state)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(handle, "wb") as file:
                file.write(MAGIC + hashlib.sha256(payload).digest())
                file.write(payload)
            os.rename(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except (OSError, MemoryError) as error:
        why = str(error) or "out of memory"
        raise EngineError(f"{path}: the state cannot be saved: {why}; without it, it is computed again") from error


def read_state(path: Path, build: str, weights_digest: str) -> KeptState:
    """The state in the file, if it is whole and this build with these weights goes on from it.  NoStateError."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise NoStateError(error.strerror or str(error)) from error
    except MemoryError as error:
        raise NoStateError("out of memory") from error
    start = len(MAGIC) + DIGEST_BYTES
    payload = memoryview(data)[start:]
    if len(data) > FILE_BYTES_MAX or not data.startswith(MAGIC):
        raise NoStateError("not a saved state")
    if hashlib.sha256(payload).digest() != data[len(MAGIC) : start]:
        raise NoStateError("damaged")
    try:
        state = msgspec.msgpack.decode(payload, type=KeptState)
    except msgspec.MsgspecError as error:
        raise NoStateError(f"not a saved state of this version: {error}") from error
    if state.build != build:
        raise NoStateError(f"saved by build {state.build}, and this is {build}")
    if not state.weights or state.weights[-1] != weights_digest:
        raise NoStateError("saved with other weights")
    if len(state.tokens) % TOKEN_BYTES:
        raise NoStateError("its tokens are cut short")
    return state
