"""Laws of the log, with drawn values."""

import contextlib
import struct
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from wal import CorruptError, Log, Reader, tokens
from wal.testing import FaultyStorage

DIRECTORY = Path("/log")
F32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def token_records(draw: st.DrawFn) -> tokens.TokensAppended:
    pairs = draw(st.lists(st.tuples(st.integers(0, 2**32 - 1), F32), min_size=1, max_size=20))
    return tokens.TokensAppended(
        draw(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)),
        draw(st.integers(0, 2**64 - 1)),
        tuple(token for token, _ in pairs),
        tuple(logprob for _, logprob in pairs),
        draw(st.integers(0, 2**64 - 1)),
    )


@given(token_records())
def test_decoded_tokens_are_the_encoded_ones(record: tokens.TokensAppended) -> None:
    decoded = tokens.decode(tokens.encode(record))
    assert decoded == record
    assert struct.pack("<d", decoded.logprobs[0]) == struct.pack("<d", record.logprobs[0])


@given(st.binary(max_size=200))
def test_any_bytes_are_tokens_or_a_typed_error(data: bytes) -> None:
    try:
        record = tokens.decode(data)
    except tokens.RecordInvalidError:
        return
    assert tokens.encode(record) == data


STEPS = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 255), st.binary(max_size=700)),
        st.sampled_from(["sync", "flush", "reopen"]),
    ),
    max_size=30,
)


@given(STEPS, st.integers(49, 2000), st.integers(0, 2**32))
@settings(max_examples=200)
def test_whatever_lands_of_a_write_the_synced_records_come_back(
    steps: list[tuple[int, bytes] | str], segment_bytes_max: int, seed: int
) -> None:
    """Power is lost at the end of a drawn run, and a drawn mix of sectors has reached the disk."""
    disk = FaultyStorage()
    log = Log.open(DIRECTORY, storage=disk, segment_bytes_max=segment_bytes_max)
    appended: list[tuple[int, bytes]] = []
    for step in steps:
        if isinstance(step, tuple):
            log.append(*step)
            appended.append(step)
        elif step == "reopen":
            log.close()
            log = Log.open(DIRECTORY, storage=disk, segment_bytes_max=segment_bytes_max)
        else:
            getattr(log, step)()
    durable = log.durable_lsn
    log.flush()
    after = disk.restart("mixed", seed)
    Log.open(DIRECTORY, storage=after).close()
    found = [(record.kind, record.payload) for record in Reader(DIRECTORY, storage=after)]
    assert found == appended[: len(found)]
    assert len(found) >= durable


@given(st.lists(st.binary(max_size=60), max_size=8), st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255))))
def test_damage_gives_a_prefix_or_an_error_never_another_record(
    payloads: list[bytes], damage: list[tuple[int, int]]
) -> None:
    disk = FaultyStorage()
    with Log.open(DIRECTORY, storage=disk) as log:
        for payload in payloads:
            log.append(1, payload)
    path = DIRECTORY / "0000000000000001-00000000.wal"
    size = len(disk.read(path))
    for offset, byte in damage:
        disk.open(path, offset % size).write(bytes([byte]))
    found = []
    with contextlib.suppress(CorruptError):
        found.extend(record.payload for record in Reader(DIRECTORY, storage=disk))
    assert found == payloads[: len(found)]
