"""What is known of all rollouts without their tokens: one column for each fact, in memory as a whole.

It is read from the manifests of one or more directories, so that choosing, shuffling and packing a
whole training set touches no shard.

See: docs/formats/shards.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rollout.errors import RequestError, ShardError
from rollout.export.manifest import Manifest, Row, SideChannel

NO_VERSION = -1
Column = np.ndarray[Any, np.dtype[Any]]


class Place(NamedTuple):
    """A record batch: bytes `offset` to `offset + size` of a shard, and where the shard's first batch begins."""

    directory: Path
    shard: str
    offset: int
    size: int
    crc: int
    head_bytes: int


class Names:
    """Texts that many rows share, as numbers."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._codes: dict[str, int] = {}

    def code(self, text: str) -> int:
        """The number of a text."""
        code = self._codes.setdefault(text, len(self.texts))
        if code == len(self.texts):
            self.texts.append(text)
        return code


class Metadata:
    """Columns of equal length; row i is the same rollout in all of them.

    `reward` is f64 with NaN where it is unset (every reward that was given is finite), `version_min` and `version_max`
    are i64 with NO_VERSION where nothing was sampled; `task`, `project`, `finish_reason` (and `group`) are numbers of
    `tasks`, `projects`, `finish_reasons` (and `groups`: a group's name holds its log's and its job's).
    """

    def __init__(self, directories: Sequence[Path], counts: Sequence[int] | None) -> None:
        """Read the first `counts[i]` rollouts of each directory; None: all of them.

        ShardError; RequestError for a directory that is given twice.
        """
        if counts is not None and len(counts) != len(directories):
            raise RequestError(f"{len(counts)} counts for {len(directories)} directories")
        self.groups, self.tasks, self.projects, self.finish_reasons = Names(), Names(), Names(), Names()
        self.rollout_ids: list[str] = []
        self.places: list[Place] = []
        self.side_channels: dict[int, tuple[SideChannel, ...]] = {}
        self.counts: list[int] = []
        """Rollouts of each directory: given to `Dataset.open` elsewhere, they make the same dataset there."""
        parts = [np.empty(0, _FACTS)]
        logs: dict[bytes, Path] = {}
        for index, directory in enumerate(directories):
            manifest, begin = Manifest(directory), len(self)
            facts = self._rows(manifest, None if counts is None else begin + counts[index])
            while len(part := np.fromiter(islice(facts, _ROWS_AT_ONCE), _FACTS)):
                parts.append(part)
            self.counts.append(len(self) - begin)
            if counts is not None and (there := self.counts[-1]) < counts[index]:
                raise ShardError(f"{directory} has {there} rollouts, {counts[index]} were asked for: an older copy?")
            if manifest.log_id and (other := logs.setdefault(manifest.log_id, directory)) is not directory:
                raise RequestError(f"{directory} is {other}, or a copy of it: give one of them")
        columns = np.concatenate(parts)
        self.tokens_count, self.trainable_count = columns["tokens_count"], columns["trainable_count"]
        self.turns_count = columns["turns_count"]
        self.reward, self.is_infra_failure = columns["reward"], columns["is_infra_failure"]
        self.version_min, self.version_max = columns["version_min"], columns["version_max"]
        self.finish_reason, self.task, self.project = columns["finish_reason"], columns["task"], columns["project"]
        self.group, self.group_index, self.group_size = columns["group"], columns["group_index"], columns["group_size"]
        self.is_judge = columns["is_judge"]
        self.place, self.row_of_place = columns["place"], columns["row"]

    def __len__(self) -> int:
        return len(self.rollout_ids)

    def name(self, row: int) -> str:
        """The rollout's name across all logs."""
        return f"{self.groups.texts[self.group[row]]}/{self.rollout_ids[row]}"

    def _rows(self, manifest: Manifest, end: int | None) -> Iterator[tuple[Any, ...]]:
        """Take rows over until there are `end`; what goes into the columns."""
        heads: dict[str, int] = {}
        for batch in manifest:
            head_bytes = heads.setdefault(batch.shard, batch.offset)
            place = Place(manifest.directory, batch.shard, batch.offset, batch.size, batch.crc, head_bytes)
            self.places.append(place)
            log = manifest.log_id.hex()
            for row_of_place, row in enumerate(batch.rows):
                if len(self) == end:
                    return
                if row.side_channels:
                    self.side_channels[len(self)] = row.side_channels
                self.rollout_ids.append(row.rollout_id)
                yield self._facts(log, row, len(self.places) - 1, row_of_place)

    def _facts(self, log: str, row: Row, place: int, row_of_place: int) -> tuple[Any, ...]:
        return (
            row.tokens_count,
            row.trainable_count,
            row.turns_count,
            np.nan if row.reward is None else row.reward,
            row.is_infra_failure,
            NO_VERSION if row.version_min is None else row.version_min,
            NO_VERSION if row.version_max is None else row.version_max,
            self.finish_reasons.code(row.finish_reason or ""),
            self.tasks.code(row.task),
            self.projects.code(row.project),
            self.groups.code(f"{log}/{row.request_id}/{row.group_id}"),
            row.group_index,
            row.group_size,
            bool(row.judged_rollout_id),
            place,
            row_of_place,
        )


_ROWS_AT_ONCE = 1 << 14
_FACTS = np.dtype(
    [
        ("tokens_count", "i8"),
        ("trainable_count", "i8"),
        ("turns_count", "i4"),
        ("reward", "f8"),
        ("is_infra_failure", "?"),
        ("version_min", "i8"),
        ("version_max", "i8"),
        ("finish_reason", "i2"),
        ("task", "i4"),
        ("project", "i4"),
        ("group", "i4"),
        ("group_index", "i4"),
        ("group_size", "i4"),
        ("is_judge", "?"),
        ("place", "i4"),
        ("row", "i4"),
    ]
)
