"""Finished rollouts on disk, each written once, when it ends: shards of bounded size beside their manifest.

A shard is an Arrow IPC stream, the form that grows at its end, can be mapped, and is whole after
each batch.  A full shard gets a Parquet file beside it; so does the open one when the writer closes.
Everything here is derived: a directory that is deleted is written again from the log.

Invariants:
1. Data, then manifest: a batch is durable in its shard before the manifest names it.  A crash leaves
   a whole prefix, and the next writer cuts off what the manifest does not name.
2. A rollout that the manifest names is never written again.
3. A shard has one writer: its name begins with the writer's epoch, so whoever was fenced off writes to
   files that nobody names.
4. A shard ends with the batch that reaches a bound; no batch holds more than BATCH_ROWS_MAX rows, nor,
   with more than one, more than BATCH_TOKENS_MAX tokens.

See: docs/formats/shards.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

import wal
from rollout.errors import ResultsError, ShardError
from rollout.export import arrow
from rollout.export.manifest import KIND, MANIFEST, Appended, Manifest, Row, SideChannel, encode, shard_path
from rollout.export.parquet import has_schema, write_parquet
from rollout.export.scratch import sync_directory
from rollout.export.side_channels import Channel, write_channels
from rollout.record import TrajectoryRecord
from wal.format import crc32

BATCH_ROWS_MAX = 16
BATCH_TOKENS_MAX = 1 << 16
_OURS = re.compile(r"\.?[0-9a-f]{8}-\d{8}(-\d{6})?\.(arrows|parquet|safetensors)(\.part)?")
"""Names of what a writer may leave behind; anything else in the directory is somebody else's."""
Channels = Mapping[str, Channel]


class ShardWriter:
    """The one writer of a directory of shards.  Use `ShardWriter.open`; a context manager that closes."""

    def __init__(self, directory: Path, log: wal.Log, manifest: Manifest, rows_max: int, bytes_max: int) -> None:
        self.directory = directory
        self._log, self._rows_max, self._bytes_max = log, rows_max, bytes_max
        self._shard, self._rows = _name(log.epoch, 0), 0
        self._ends: dict[str, int] = {}
        """Bytes of each shard that are named, in the order of the shards."""
        self.side_channels: dict[str, tuple[SideChannel, ...]] = {}
        """Of rollouts that have any."""
        self.rollout_ids: set[str] = set()
        """Everything that is written."""
        for batch in manifest:
            self._rows = len(batch.rows) + (self._rows if batch.shard in self._ends else 0)
            self._shard = batch.shard
            self._ends[batch.shard] = batch.offset + batch.size
            self.rollout_ids.update(row.rollout_id for row in batch.rows)
            self._note_channels(batch.rows)
        self._failure: Exception | None = None

    @classmethod
    def open(
        cls, directory: Path, *, epoch: int | None = None, rows_max: int = 4096, bytes_max: int = 64 << 20
    ) -> Self:
        """Go on with a directory, or begin it; what a crash left behind is settled when this returns.

        With an `epoch` it is taken from any writer of a lower one, as a log is.  wal.LockedError while another writer
        has it, wal.FencedError for an epoch that is over, ShardError if shards are missing or shorter than the manifest
        says, ResultsError if the disk refuses.
        """
        try:
            log = wal.Log.open(directory / MANIFEST, epoch=epoch)
        except wal.StorageError as error:
            raise ResultsError(f"cannot write shards to {directory}: {error}") from error
        except (wal.CorruptError, wal.VersionError) as error:
            raise ShardError(f"{error}; or delete {directory}, it will be written again from the log") from error
        try:
            writer = cls(directory, log, Manifest(directory), rows_max, bytes_max)
            with _told(directory):
                writer._settle()
        except BaseException:
            log.close()
            raise
        return writer

    def append(self, records: Iterable[TrajectoryRecord], channels: Mapping[str, Channels] | None = None) -> int:
        """Write finished rollouts that are not there yet; durable when this returns; how many they were.

        `channels` are arrays too big for a record, by rollout and name; the rows name the files that they go to.
        After a ResultsError the directory is a whole prefix, and must be opened again.
        """
        if self._failure is not None:
            raise ResultsError(f"an earlier write to {self.directory} failed: open it again") from self._failure
        count = 0
        try:
            with _told(self.directory):
                for batch in _batches(records, set(self.rollout_ids)):
                    self._append(batch, channels or {})
                    count += len(batch)
        except (ResultsError, wal.WalError) as error:
            self._failure = error
            raise
        return count

    def close(self) -> None:
        """Write the Parquet file of the open shard, and let go of the directory; closing twice is fine."""
        try:
            if self._failure is None and self._rows:
                with _told(self.directory):
                    self._write_parquet(self._shard)
        finally:
            self._rows = 0
            self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, records: list[TrajectoryRecord], channels: Mapping[str, Channels]) -> None:
        if self._rows >= self._rows_max or self._ends.get(self._shard, 0) >= self._bytes_max:
            self._write_parquet(self._shard)
            self._begin()
        offered = {r.rollout_id: channels[r.rollout_id] for r in records if channels.get(r.rollout_id)}
        if offered:
            written = write_channels(self.directory / f"{self._shard}-{self._rows:06d}.safetensors", offered)
            records = [msgspec.structs.replace(r, side_channels=written.get(r.rollout_id, ())) for r in records]
        end = self._ends.get(self._shard, 0)
        head = b"" if end else arrow.stream_head()
        data = arrow.stream_batch(records)
        _write(shard_path(self.directory, self._shard), end, head + data)
        rows, offset = tuple(map(row_of, records)), end + len(head)
        batch = Appended(shard=self._shard, offset=offset, size=len(data), crc=crc32(data), rows=rows)
        self._log.append(KIND, encode(batch))
        self._log.sync()
        self._ends[self._shard] = offset + len(data)
        self._rows += len(rows)
        self.rollout_ids.update(row.rollout_id for row in rows)
        self._note_channels(rows)

    def _note_channels(self, rows: tuple[Row, ...]) -> None:
        self.side_channels |= {row.rollout_id: row.side_channels for row in rows if row.side_channels}

    def _begin(self) -> None:
        """Another shard, of this writer's epoch."""
        self._shard, self._rows = _name(self._log.epoch, int(self._shard.partition("-")[2]) + 1), 0

    def _write_parquet(self, shard: str) -> None:
        write_parquet(shard_path(self.directory, shard), self._ends[shard])

    def _settle(self) -> None:
        """Cut off and remove what the manifest does not name; make the Parquet files that are missing."""
        uris = {channel.uri for channels in self.side_channels.values() for channel in channels}
        for path in self.directory.iterdir():
            if _OURS.fullmatch(path.name) and path.stem not in self._ends and path.name not in uris:
                path.unlink()
        for shard, size in self._ends.items():
            path = shard_path(self.directory, shard)
            if not path.exists():
                raise ShardError(f"{path} is missing: delete {self.directory}, it will be written again from the log")
            _cut(path, size)
            if shard != self._shard and not path.with_suffix(".parquet").exists():
                self._write_parquet(shard)
        is_ours = self._shard.startswith(f"{self._log.epoch:08x}-")
        if self._rows and not (is_ours and has_schema(shard_path(self.directory, self._shard), arrow.schema())):
            self._write_parquet(self._shard)
            self._begin()  # that one is another writer's, or of another version


def _name(epoch: int, number: int) -> str:
    """Of a shard."""
    return f"{epoch:08x}-{number:08d}"


def row_of(record: TrajectoryRecord) -> Row:
    """The part of a record that is planned by."""
    versions = [run.version for run in record.policy_versions]
    return Row(
        rollout_id=record.rollout_id,
        request_id=record.request_id,
        project=record.project,
        task=record.task,
        group_id=record.group.group_id,
        group_index=record.group.index,
        group_size=record.group.size,
        tokens_count=len(record.token_ids),
        trainable_count=sum(span.length for span in record.spans if span.trainable),
        turns_count=len(record.turns),
        finish_reason=record.finish_reason,
        is_infra_failure=record.infra_failure is not None,
        reward=record.reward.value,
        version_min=min(versions, default=None),
        version_max=max(versions, default=None),
        judged_rollout_id=record.lineage.judged_rollout_id,
        side_channels=record.side_channels,
    )


def _batches(records: Iterable[TrajectoryRecord], seen: set[str]) -> Iterator[list[TrajectoryRecord]]:
    """What was not seen, each once."""
    batch: list[TrajectoryRecord] = []
    tokens_count = 0
    for record in records:
        if record.rollout_id in seen:
            continue
        seen.add(record.rollout_id)
        tokens_count += len(record.token_ids)
        if batch and (len(batch) == BATCH_ROWS_MAX or tokens_count > BATCH_TOKENS_MAX):
            yield batch
            batch, tokens_count = [], len(record.token_ids)
        batch.append(record)
    if batch:
        yield batch


def _write(path: Path, offset: int, data: bytes) -> None:
    """Durable when this returns, and so is the file's name."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        rest = memoryview(data)
        while rest:
            count = os.pwrite(fd, rest, offset)
            rest, offset = rest[count:], offset + count
        os.fdatasync(fd)
    finally:
        os.close(fd)
    if offset == len(data):
        sync_directory(path.parent)


def _cut(path: Path, size: int) -> None:
    """Let a shard end where the manifest says."""
    if (there := path.stat().st_size) < size:
        raise ShardError(
            f"{path} has {there} bytes, the manifest names {size}: delete {path.parent}, "
            "it will be written again from the log"
        )
    if there > size:
        os.truncate(path, size)


@contextmanager
def _told(directory: Path) -> Iterator[None]:
    """What the disk refuses as a ResultsError."""
    try:
        yield
    except (OSError, wal.StorageError, wal.PoisonedError) as error:
        raise ResultsError(
            f"cannot write shards to {directory}: {error}; the log that they come from is whole"
        ) from error
