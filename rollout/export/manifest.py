"""The manifest of a directory of shards: which rollouts are there, where, and what a trainer plans by.

It is a log (`wal/`), so it is checksummed, has one writer, and any prefix of it that a crash leaves
is whole; a batch of rows is named only after it is durable.  It holds everything that choosing,
shuffling and packing need, and no token.

Invariants:
1. The shards hold every batch that the manifest names; what lies behind the last one is nobody's.
2. No rollout is in it twice.

See: docs/formats/shards.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

import wal
from rollout.errors import ShardError

MANIFEST = "manifest"
KIND = 5
"""Record kind of `Appended`."""


class SideChannel(msgspec.Struct, frozen=True, kw_only=True):
    """A big array of its own file: rows `row_range` of the rollout in the tensor `name` of `uri`."""

    name: str
    uri: str
    dtype: str
    shape: tuple[int, ...]
    layer_ids: tuple[int, ...]
    row_range: tuple[int, int]
    sha256: str


class Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is known of a rollout without its tokens.

    `trainable_count` counts tokens under the loss mask; versions are those of the oldest and the newest of the sampled
    tokens (None: there are none).  `reward` None is unset, which is not 0.
    """

    rollout_id: str
    request_id: str
    project: str = ""
    task: str
    group_id: str
    group_index: int
    group_size: int
    tokens_count: int
    trainable_count: int
    turns_count: int
    finish_reason: str | None = None
    is_infra_failure: bool = False
    reward: float | None = None
    version_min: int | None = None
    version_max: int | None = None
    judged_rollout_id: str = ""
    side_channels: tuple[SideChannel, ...] = ()


class Appended(msgspec.Struct, frozen=True, kw_only=True):
    """One record batch: bytes `offset` to `offset + size` of the shard of that name, and its rows in order."""

    shard: str
    offset: int
    size: int
    crc: int
    rows: tuple[Row, ...]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Appended)


def encode(batch: Appended) -> bytes:
    """The payload of a manifest's record."""
    return _encoder.encode(batch)


class Manifest:
    """One pass over the manifest of a directory of shards, also beside its writer."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log_id = b""
        """Of the manifest, once a batch was read: the same for ever, wherever the directory is copied to."""

    def __iter__(self) -> Iterator[Appended]:
        """The batches in the order in which they were written.  ShardError if there is none, or it is damaged."""
        path = self.directory / MANIFEST
        if not path.is_dir():
            raise ShardError(f"{self.directory} holds no shards: run `dsec export RUN` and give RUN/shards")
        reader = wal.Reader(path)
        try:
            for record in reader:
                if record.kind != KIND:
                    raise ShardError(f"{path}: record {record.lsn} is of kind {record.kind}, not {KIND}")
                if not self.log_id and reader.header:
                    self.log_id = reader.header.log_id
                yield _decoder.decode(record.payload)
        except (wal.WalError, msgspec.MsgspecError) as error:
            raise ShardError(f"the manifest of {self.directory} cannot be read: {error}") from error


def shard_path(directory: Path, shard: str) -> Path:
    """Where a shard lies: an Arrow IPC stream."""
    return directory / f"{shard}.arrows"
