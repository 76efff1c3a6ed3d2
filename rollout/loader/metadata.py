"""What is known of all rollouts without their tokens: one column for each fact, in memory as a whole.

It is read from the manifests of one or more directories, about a hundred bytes a rollout here, so that
choosing, shuffling and packing a whole training set touches no shard.

See: docs/formats/shards.md.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    shard: int
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

    def __init__(self, manifests: Sequence[tuple[Path, Manifest]], counts: Sequence[int] | None) -> None:
        """The first `counts[i]` rollouts of each manifest; None: all of them."""
        self.groups, self.tasks, self.projects, self.finish_reasons = Names(), Names(), Names(), Names()
        self.rollout_ids: list[str] = []
        self.places: list[Place] = []
        self.side_channels: dict[int, tuple[SideChannel, ...]] = {}
        self.counts: list[int] = []
        """Rollouts of each directory: given to `Dataset.open` elsewhere, they make the same dataset there."""
        facts: list[tuple[Any, ...]] = []
        for index, (directory, manifest) in enumerate(manifests):
            self._add(directory, manifest, None if counts is None else counts[index], facts)
        columns = np.array(facts, dtype=_FACTS)
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

    def _add(self, directory: Path, manifest: Manifest, count: int | None, facts: list[tuple[Any, ...]]) -> None:
        heads: dict[int, int] = {}
        begin, log = len(facts), manifest.log_id.hex()
        for batch in manifest.batches:
            head_bytes = heads.setdefault(batch.shard, batch.offset)
            place = Place(directory, batch.shard, batch.offset, batch.size, batch.crc, head_bytes)
            self.places.append(place)
            for row_of_place, row in enumerate(batch.rows):
                if len(facts) - begin == count:
                    break
                if row.side_channels:
                    self.side_channels[len(facts)] = row.side_channels
                self.rollout_ids.append(row.rollout_id)
                facts.append(self._facts(log, row, len(self.places) - 1, row_of_place))
        self.counts.append(len(facts) - begin)
        if count is not None and self.counts[-1] < count:
            raise ShardError(
                f"{directory} has {self.counts[-1]} rollouts, {count} were asked for: is it an older copy?"
            )

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


def read_metadata(directories: Sequence[Path], counts: Sequence[int] | None) -> Metadata:
    """The metadata of directories of shards.  ShardError; RequestError for one that is given twice."""
    if counts is not None and len(counts) != len(directories):
        raise RequestError(f"{len(counts)} counts for {len(directories)} directories")
    manifests = [(directory, Manifest.read(directory)) for directory in directories]
    seen: dict[bytes, Path] = {}
    for directory, manifest in manifests:
        if (other := seen.setdefault(manifest.log_id, directory)) is not directory:
            raise RequestError(f"{directory} is {other}, or a copy of it: give one of them")
    return Metadata(manifests, counts)


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
