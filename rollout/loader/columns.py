"""The heavy columns of rollouts out of their shards: what is packed, and nothing else, checked as it is read.

A batch is read, not mapped: a shard that was cut short under a mapping is a SIGBUS, here it is an
error that names file and row.

See: docs/formats/shards.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import compute

from rollout.errors import ShardError
from rollout.export.manifest import shard_path
from rollout.loader.metadata import NO_VERSION, Column, Metadata, Place
from wal.format import crc32

_WANTED = ("rollout_id", "token_ids", "logprobs", "spans", "policy_versions")


class Tokens(NamedTuple):
    """The per-token fields of one rollout, views of its batch; good until the next is asked for."""

    row: int
    token_ids: Column
    logprobs: Column
    """f32, 0 where the token was not sampled."""
    loss_mask: Column
    versions: Column
    """i32, NO_VERSION where the token was not sampled."""


def read_tokens(metadata: Metadata, rows: Sequence[int]) -> Iterator[Tokens]:
    """The tokens of rows, in the order of the shards; each batch is read once, one at a time.  ShardError."""
    order = sorted(rows, key=lambda row: (int(metadata.place[row]), int(metadata.row_of_place[row])))
    at: int | None = None
    for row in order:
        if metadata.place[row] != at:
            at = int(metadata.place[row])
            batch = _Batch(metadata.places[at])
        index = int(metadata.row_of_place[row])
        yield batch.tokens(row, index, metadata.rollout_ids[row], int(metadata.tokens_count[row]))


def read_numbers(metadata: Metadata, row: int, names: Sequence[str]) -> list[Column]:
    """Fields of one rollout that are lists of numbers, each as an array.  ShardError."""
    place = metadata.places[int(metadata.place[row])]
    batch, index = _read(_where(place), place, ["rollout_id", *names]), int(metadata.row_of_place[row])
    if index >= len(batch["rollout_id"]) or batch["rollout_id"][index].as_py() != metadata.rollout_ids[row]:
        raise ShardError(f"{_where(place)}, row {index}: it is not {metadata.rollout_ids[row]}")
    columns = [_list(batch[name]) for name in names]
    return [values[offsets[index] : offsets[index + 1]] for values, offsets in columns]


def _where(place: Place) -> str:
    return f"{shard_path(place.directory, place.shard)} at byte {place.offset}"


class _Batch:
    """One record batch, decoded."""

    def __init__(self, place: Place) -> None:
        self.where = _where(place)
        batch = _read(self.where, place, _WANTED)
        self.rollout_ids = batch["rollout_id"].to_pylist()
        self.token_ids, self.token_ends = _list(batch["token_ids"])
        logprobs = batch["logprobs"]
        self.logprobs = np.asarray(compute.fill_null(logprobs.values, 0.0))
        self.logprob_ends = np.asarray(logprobs.offsets)
        spans = batch["spans"]
        self.span_ends = np.asarray(spans.offsets)
        self.starts, self.lengths = _numbers(spans.values, "start"), _numbers(spans.values, "length")
        self.trainable = np.asarray(compute.fill_null(spans.values.field("trainable"), False))
        runs = batch["policy_versions"]
        self.run_ends = np.asarray(runs.offsets)
        self.runs = np.stack([_numbers(runs.values, name) for name in ("start", "length", "version")], axis=1)

    def tokens(self, row: int, index: int, rollout_id: str, count: int) -> Tokens:
        """One row; ShardError unless its fields fit each other and the manifest."""
        where = f"{self.where}, row {index} ({rollout_id})"
        if index >= len(self.rollout_ids) or self.rollout_ids[index] != rollout_id:
            raise ShardError(f"{where}: another rollout stands there")
        ids = self.token_ids[self.token_ends[index] : self.token_ends[index + 1]]
        logprobs = self.logprobs[self.logprob_ends[index] : self.logprob_ends[index + 1]]
        spans = slice(self.span_ends[index], self.span_ends[index + 1])
        starts, lengths = self.starts[spans], self.lengths[spans]
        if len(ids) != count or len(logprobs) != count:
            raise ShardError(f"{where}: {len(ids)} tokens and {len(logprobs)} logprobs, the manifest says {count}")
        if (lengths < 0).any() or lengths.sum() != count or not np.array_equal(starts, np.cumsum(lengths) - lengths):
            raise ShardError(f"{where}: its spans do not cover its {count} tokens once each")
        versions = np.full(count, NO_VERSION, "i4")
        runs = slice(self.run_ends[index], self.run_ends[index + 1])
        for start, length, version in self.runs[runs].tolist():
            if not 0 <= start <= start + length <= count or not 0 <= version < 1 << 31:
                raise ShardError(f"{where}: version {version} of tokens {start} to {start + length} of {count}")
            versions[start : start + length] = version
        return Tokens(row, ids, logprobs, np.repeat(self.trainable[spans], lengths), versions)


def _read(where: str, place: Place, wanted: Sequence[str]) -> dict[str, Any]:
    """Columns of a batch; every byte of it was checked."""
    path = shard_path(place.directory, place.shard)
    data = bytearray(place.head_bytes + place.size)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            view = memoryview(data)
            count = os.preadv(fd, [view[: place.head_bytes]], 0)
            count += _fill(fd, view[place.head_bytes :], place.offset)
        finally:
            os.close(fd)
    except OSError as error:
        raise ShardError(f"cannot read {where}: {error.strerror}") from error
    if count != len(data) or crc32(view[place.head_bytes :]) != place.crc:
        raise ShardError(f"{where}: its {place.size} bytes are not those that were written")
    try:
        layout = pa.ipc.read_schema(pa.py_buffer(view[: place.head_bytes]))
        columns = [layout.get_field_index(name) for name in wanted]
        with pa.ipc.open_stream(pa.py_buffer(data), options=pa.ipc.IpcReadOptions(included_fields=columns)) as stream:
            batch = stream.read_next_batch()
        batch.validate(full=True)
        return {name: batch.column(name) for name in wanted}
    except (pa.ArrowException, OSError, KeyError, StopIteration) as error:
        raise ShardError(f"{where}: it is no batch of rollouts: {error}") from error


def _fill(fd: int, view: memoryview, offset: int) -> int:
    done = 0
    while done < len(view) and (count := os.preadv(fd, [view[done:]], offset + done)):
        done += count
    return done


def _list(column: Any) -> tuple[Column, Column]:
    return np.asarray(column.values), np.asarray(column.offsets)


def _numbers(structs: Any, name: str) -> Column:
    return np.asarray(structs.field(name)).astype("i8")
