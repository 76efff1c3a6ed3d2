"""What many rollouts were sampled at once, as one record: the schema of kind 6.

An engine hands out tokens for all requests that it steps, so their chunks become durable together, and share one
frame.  A row names its rollout by the lsn of its `rollout_opened`, which costs 4 bytes where a name costs 10 to 60, and
says at which position it starts: whoever reads from the middle of a log needs nothing but the names.

Invariants:
1. `decode(encode(step)) == step`, logprobs as f32.

See: docs/formats/events.md, "Tokens".
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator, Mapping

import msgspec

from wal.token_columns import f32_array, f32_bytes, invalid, is_finite, u32_array, u32_bytes
from wal.tokens import TokensAppended

KIND = 6
VERSION = 1
_HEAD = struct.Struct("<BBHIQQ")
"""Version, 3 bytes of zeros, rows, policy version, lsn of the oldest `rollout_opened`."""
_ROW_BYTES = 12


class Row(msgspec.Struct, frozen=True):
    """Tokens of the rollout that the record `opened_lsn` opened, the first of them at position `start`."""

    opened_lsn: int
    start: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class Step(msgspec.Struct, frozen=True, tag="step"):
    """Tokens of one or more rollouts, drawn with one version of the weights."""

    policy_version: int
    rows: tuple[Row, ...]


class StepWriter:
    """The rows of a record that is being gathered; each is checked when it comes, so none spoils another's."""

    def __init__(self, policy_version: int) -> None:
        """Nothing yet."""
        self.policy_version = policy_version
        self.events: dict[str, TokensAppended] = {}
        """By rollout; one row each."""
        self._opened: list[int] = []
        self._starts: list[int] = []
        self._counts: list[int] = []
        self._ids: list[bytes] = []
        self._logprobs: list[bytes] = []
        self.size_bytes = 0

    def takes(self, event: TokensAppended) -> bool:
        """Whether the record can have these tokens, too."""
        return event.policy_version == self.policy_version and event.request not in self.events

    def add(self, event: TokensAppended, opened_lsn: int) -> None:
        """Add a row.  RecordInvalidError: an id is no u32, or a logprob no finite f32; nothing was added."""
        ids, logprobs = u32_bytes(event.token_ids, "token_ids"), f32_bytes(event.logprobs, "logprobs")
        if not 0 < len(ids) == len(logprobs):
            raise invalid("logprobs", "must be one for each token, and at least one")
        self.events[event.request] = event
        self._opened.append(opened_lsn)
        self._starts.append(event.start)
        self._counts.append(len(event.token_ids))
        self._ids.append(ids)
        self._logprobs.append(logprobs)
        self.size_bytes += _ROW_BYTES + 2 * len(ids)

    def payload(self) -> bytes:
        """The record."""
        first = min(self._opened)
        head = _HEAD.pack(VERSION, 0, 0, len(self._opened), self.policy_version, first)
        offsets = u32_bytes([lsn - first for lsn in self._opened], "opened")
        columns = (offsets, u32_bytes(self._starts, "start"), u32_bytes(self._counts, "count"))
        return b"".join((head, *columns, *self._ids, *self._logprobs))


def encode(step: Step) -> bytes:
    """The payload of a step.  RecordInvalidError."""
    writer = StepWriter(step.policy_version)
    for number, row in enumerate(step.rows):
        event = TokensAppended(str(number), row.start, row.token_ids, row.logprobs, step.policy_version)
        writer.add(event, row.opened_lsn)
    return writer.payload()


def decode(payload: bytes) -> Step:
    """The step in a payload of kind 6.  RecordInvalidError."""
    if len(payload) < _HEAD.size:
        raise invalid("step", f"has {len(payload)} bytes, and its head {_HEAD.size}")
    version, zero, zeros, rows_count, policy_version, first = _HEAD.unpack_from(payload)
    if (version, zero, zeros) != (VERSION, 0, 0):
        raise invalid("step", f"is of version {version}, this program reads {VERSION}")
    ids_at = _HEAD.size + _ROW_BYTES * rows_count
    if not rows_count or len(payload) < ids_at:
        raise invalid("step", f"has {len(payload)} bytes, too few for {rows_count} rows")
    table = u32_array(payload[_HEAD.size : ids_at])
    offsets, starts, counts = (table[n * rows_count : (n + 1) * rows_count] for n in range(3))
    logprobs_at = ids_at + 4 * sum(counts)
    if not min(counts) or len(payload) != 2 * logprobs_at - ids_at:
        raise invalid("step", f"has {len(payload)} bytes, and its rows ask for {2 * logprobs_at - ids_at}")
    if not is_finite(payload, logprobs_at):
        raise invalid("logprobs", "must be finite")
    ids, logprobs = u32_array(payload[ids_at:logprobs_at]), f32_array(payload[logprobs_at:])
    return Step(policy_version, tuple(_rows(first, zip(offsets, starts, counts, strict=True), ids, logprobs)))


def _rows(first: int, table: Iterable[tuple[int, int, int]], ids: array[int], logprobs: array[float]) -> Iterator[Row]:
    at = 0
    for offset, start, count in table:
        yield Row(first + offset, start, tuple(ids[at : at + count]), tuple(logprobs[at : at + count]))
        at += count


def chunks(step: Step, names: Mapping[int, str]) -> Iterator[TokensAppended]:
    """The rows as events, of the rollouts that `names` has by the lsn of their `rollout_opened`."""
    for row in step.rows:
        if (name := names.get(row.opened_lsn)) is not None:
            yield TokensAppended(name, row.start, row.token_ids, row.logprobs, step.policy_version)
