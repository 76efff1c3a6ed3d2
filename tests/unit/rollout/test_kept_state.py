"""A state as a file: what may be read back, and every reason why not."""

import hashlib
from pathlib import Path

import msgspec
import pytest

from rollout.engines.kept_state import MAGIC, KeptState, NoStateError, read_state, write_state

STATE = KeptState("build", ("old", "new"), b"\1\0\0\0\2\0\0\0", bytearray(b"packed"))


def forge(path: Path, payload: bytes) -> None:
    """A file whose checksum is right."""
    path.write_bytes(MAGIC + hashlib.sha256(payload).digest() + payload)


def test_a_state_comes_back_as_it_was_written_over_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "s.kv"
    write_state(path, msgspec.structs.replace(STATE, packed=bytearray(b"older and longer")))
    write_state(path, STATE)
    assert read_state(path, "build", "new") == STATE
    assert STATE.tokens_count == 2
    assert list(tmp_path.iterdir()) == [path]


def test_every_single_bit_counts(tmp_path: Path) -> None:
    path = tmp_path / "s.kv"
    write_state(path, STATE)
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
        with pytest.raises(NoStateError):
            read_state(path, "build", "new")


def test_every_cut_counts(tmp_path: Path) -> None:
    path = tmp_path / "s.kv"
    write_state(path, STATE)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(NoStateError):
            read_state(path, "build", "new")


@pytest.mark.parametrize(
    ("build", "weights", "why"),
    [("other", "new", "saved by build build, and this is other"), ("build", "old", "saved with other weights")],
)
def test_a_state_of_another_build_or_other_weights_is_refused(
    tmp_path: Path, build: str, weights: str, why: str
) -> None:
    write_state(tmp_path / "s.kv", STATE)
    with pytest.raises(NoStateError, match=why):
        read_state(tmp_path / "s.kv", build, weights)


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b"", "not a saved state of this version"),
        (b"\xc1", "not a saved state of this version"),
        (msgspec.msgpack.encode({"build": "build"}), "not a saved state of this version"),
        (msgspec.msgpack.encode(msgspec.structs.replace(STATE, weights=())), "other weights"),
        (msgspec.msgpack.encode(msgspec.structs.replace(STATE, tokens=b"\1\0\0")), "cut short"),
    ],
)
def test_a_forged_file_is_refused(tmp_path: Path, payload: bytes, why: str) -> None:
    forge(tmp_path / "s.kv", payload)
    with pytest.raises(NoStateError, match=why):
        read_state(tmp_path / "s.kv", "build", "new")
