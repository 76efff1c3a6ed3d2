"""One engine step of all running requests as one record: columns, no names.

An engine makes a token for each of its hundreds of requests every few milliseconds, so this record is
the one that must be cheap: slots stand for request ids, and a step whose requests and versions are
those of the step before differs from it only in `base` and in the two token columns, which is what
lets a writer reuse the head (`StepHead`) and a reader take thousands of steps in one go.

     0  1  type (3)
     1  1  flags: bit 0: the counts column is there
     2  2  version runs v, 1 .. 65535
     4  4  rows n, 1 or more
     8  4  tokens t
    12  4  zero
    16  8  base: sum of the rows' stream lengths before this step
    24 12v version runs: rows u32, policy version u64; neighbours differ
     .. 4n slots, u32, distinct
     .. 4n counts, u32, each 1 or more; only if one is not 1, else t = n
     .. 4t token ids, u32
     .. 4t logprobs, f32, finite

See: docs/formats/wal_tokens.md, "Type 3: an engine step".
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from wal.token_columns import U32_MAX, check_u64, f32_bytes, invalid, is_finite, u32_array, u32_bytes
from wal.token_records import STEP_APPENDED, need_head, need_size, need_zero

VERSION_RUNS_MAX = (1 << 16) - 1
HEAD_BYTES = 24
BASE_OFFSET = 16
_FRONT = struct.Struct("<BBHIII")
BASE = struct.Struct("<Q")
_RUN = struct.Struct("<IQ")
_HAS_COUNTS = 1


@dataclass(frozen=True, slots=True)
class StepAppended:
    """One engine step: row i is the request in `slots[i]`, which got `counts[i]` tokens (None: one each).

    `token_ids` and `logprobs` hold the rows' tokens one row after the other; `version_runs` says
    which policy version sampled the rows, as (rows, version) from the first row on; `base` is the sum
    of the rows' stream lengths before the step.  Columns may be any sequences or buffers; `decode`
    gives tuples, logprobs as f32 holds them, and counts of None where each is 1.
    """

    base: int
    version_runs: Sequence[tuple[int, int]]
    slots: Sequence[int]
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    counts: Sequence[int] | None = None


class StepHead(NamedTuple):
    """All of a step record but `base` and the token columns: the same for each step of the same requests."""

    front: bytes
    """Bytes 0 to 15."""
    layout: bytes
    """Bytes 24 to the token ids: version runs, slots, counts."""
    rows_count: int
    tokens_count: int


class StepLayout(NamedTuple):
    """A step payload taken apart as far as its layout; offsets are into the payload."""

    version_runs: tuple[tuple[int, int], ...]
    slots: Sequence[int]
    members: set[int]
    """The slots, as a set."""
    counts: Sequence[int] | None
    base: int
    ids_at: int
    logprobs_at: int
    tokens_count: int


def encode_step(record: StepAppended) -> bytes:
    """The payload of a StepAppended.  RecordInvalidError names the field that breaks its rule."""
    head = step_head(record.slots, record.version_runs, record.counts)
    check_u64(record.base, "base")
    return encode_with(head, record.base, record.token_ids, record.logprobs)


def step_head(
    slots: Sequence[int], version_runs: Sequence[tuple[int, int]], counts: Sequence[int] | None = None
) -> StepHead:
    """The head for steps of these rows.  RecordInvalidError."""
    rows_count, slot_bytes = len(slots), u32_bytes(slots, "slots")
    if not 0 < rows_count <= U32_MAX:
        raise invalid("slots", "must hold at least one row")
    _check_distinct(set(u32_array(slot_bytes)), rows_count)
    _check_runs(version_runs, rows_count)
    tokens_count, flags, count_bytes = rows_count, 0, b""
    if counts is not None:
        if len(counts) != rows_count:
            raise invalid("counts", f"must be as many as the {rows_count} slots, are {len(counts)}")
        count_bytes = u32_bytes(counts, "counts")
        listed = u32_array(count_bytes)
        if not min(listed):
            raise invalid("counts", "must be 1 or more")
        tokens_count = sum(listed)
        if tokens_count > U32_MAX:
            raise invalid("counts", f"must sum to at most 2**32-1, sum to {tokens_count}")
        if tokens_count == rows_count:
            count_bytes = b""
        else:
            flags = _HAS_COUNTS
    front = _FRONT.pack(STEP_APPENDED, flags, len(version_runs), rows_count, tokens_count, 0)
    runs = b"".join(itertools.starmap(_RUN.pack, version_runs))
    return StepHead(front, runs + slot_bytes + count_bytes, rows_count, tokens_count)


def encode_with(head: StepHead, base: int, token_ids: Sequence[int], logprobs: Sequence[float]) -> bytes:
    """The payload of a step with this head; `base` is a u64.  RecordInvalidError."""
    for field, column in (("token_ids", token_ids), ("logprobs", logprobs)):
        if len(column) != head.tokens_count:
            raise invalid(field, f"must be as many as the {head.tokens_count} tokens of the step, are {len(column)}")
    ids, chances = u32_bytes(token_ids, "token_ids"), f32_bytes(logprobs, "logprobs")
    return b"".join((head.front, BASE.pack(base), head.layout, ids, chances))


def decode_step(payload: bytes) -> StepAppended:
    """The StepAppended in a payload of type 3.  RecordInvalidError."""
    layout = decode_layout(payload)
    count = layout.tokens_count
    return StepAppended(
        layout.base,
        layout.version_runs,
        tuple(layout.slots),
        struct.unpack_from(f"<{count}I", payload, layout.ids_at),
        struct.unpack_from(f"<{count}f", payload, layout.logprobs_at),
        None if layout.counts is None else tuple(layout.counts),
    )


def decode_layout(payload: bytes) -> StepLayout:
    """A payload of type 3, checked whole, without its token columns as numbers.  RecordInvalidError."""
    need_head(payload, HEAD_BYTES)
    _, flags, runs_count, rows_count, tokens_count, zero = _FRONT.unpack_from(payload)
    if flags & ~_HAS_COUNTS:
        raise invalid("flags", f"must be 0 or 1, are {flags}")
    need_zero(zero, "bytes 12 to 15")
    slots_at = HEAD_BYTES + _RUN.size * runs_count
    counts_at = slots_at + 4 * rows_count
    ids_at = counts_at + 4 * rows_count * flags
    need_size(payload, ids_at + 8 * tokens_count)
    if not rows_count:
        raise invalid("slots", "must hold at least one row")
    version_runs = tuple(_RUN.iter_unpack(payload[HEAD_BYTES:slots_at]))
    _check_runs(version_runs, rows_count)
    slots = u32_array(payload[slots_at:counts_at])
    members = set(slots)
    _check_distinct(members, rows_count)
    counts = u32_array(payload[counts_at:ids_at]) if flags else None
    if counts is not None and not min(counts):
        raise invalid("counts", "must be 1 or more")
    if tokens_count != (sum(counts) if counts else rows_count):
        raise invalid("tokens count", f"is {tokens_count}, not the sum of the rows' counts")
    if counts and tokens_count == rows_count:
        raise invalid("counts", "must be left out where each is 1")
    logprobs_at = ids_at + 4 * tokens_count
    if not is_finite(payload, logprobs_at):
        raise invalid("logprobs", "must be finite")
    base: int = BASE.unpack_from(payload, BASE_OFFSET)[0]
    return StepLayout(version_runs, slots, members, counts, base, ids_at, logprobs_at, tokens_count)


def version_runs_of(versions: Sequence[int]) -> list[tuple[int, int]]:
    """(rows, version) runs of one version a row."""
    return [(sum(1 for _ in rows), version) for version, rows in itertools.groupby(versions)]


def _check_distinct(members: set[int], rows_count: int) -> None:
    if len(members) != rows_count:
        raise invalid("slots", "must be distinct")


def _check_runs(version_runs: Sequence[tuple[int, int]], rows_count: int) -> None:
    if not 0 < len(version_runs) <= VERSION_RUNS_MAX:
        raise invalid("version_runs", f"must be 1..{VERSION_RUNS_MAX}, are {len(version_runs)}")
    told = 0
    newest: int | None = None
    for rows, version in version_runs:
        check_u64(version, "policy version")
        if not isinstance(rows, int) or rows < 1:
            raise invalid("version_runs", "must have 1 or more rows each")
        if version == newest:
            raise invalid("version_runs", "must differ from their neighbours")
        told, newest = told + rows, version
    if told != rows_count:
        raise invalid("version_runs", f"must cover the {rows_count} slots, cover {told}")
