"""Side channels of rollouts that have ended, out of their log: rows that were durable before their tokens were.

No ledger holds them.  They are read from the log when a rollout goes to a shard, and once more by whoever
writes the shards anew.  Of rows that a crash had told twice the later ones hold, and a row counts only if a
token that was drawn over it was logged, too.

See: docs/formats/events.md, "side_channels_found"; docs/formats/shards.md, "Side channels".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

import wal
from rollout import journal
from rollout.engine import EngineInfo
from rollout.events import SideChannelsFound
from rollout.export.exporter import Ended
from rollout.export.side_channels import DTYPES, Channel

_TAG = SideChannelsFound.__struct_config__.tag.encode()  # type: ignore[union-attr]
_TAG_END = 40
"""Bytes of a payload that hold its tag."""


class Layout(NamedTuple):
    """What decides how wide the rows are."""

    dtype: str
    layer_ids: tuple[int, ...]
    top_k: int
    hidden_dim: int


def layout_of(ended: Ended) -> Layout | None:
    """That of a rollout's newest engine; None if its job asked for no side channels."""
    if not ended.returns:
        return None
    info = ended.engines[-1][1]
    hidden_dim = info.hidden_dim if "hidden" in ended.returns else 0
    if "routes" not in ended.returns or info.routing is None:
        return Layout("U8", (), 0, hidden_dim)
    return Layout("U8" if info.routing.width == 1 else "U16", info.routing.layer_ids, info.routing.top_k, hidden_dim)


def read_rows(log: Path, batch: list[Ended]) -> dict[str, Mapping[str, Channel]]:
    """The channels of rollouts, by rollout and name.  wal.WalError, JournalError."""
    rows = {ended.record.rollout_id: _Rows(ended, layout) for ended in batch if (layout := layout_of(ended))}
    if not rows:
        return {}
    ranges = [ended.record.wal for ended in batch if ended.record.rollout_id in rows]
    last_lsn = max(each.last_lsn for each in ranges)
    for record in wal.Reader(log, after_lsn=min(each.first_lsn for each in ranges) - 1):
        if record.lsn > last_lsn:
            break
        if record.kind == journal.KIND and _TAG in record.payload[:_TAG_END]:
            event = journal.decode(record.kind, record.payload)
            if isinstance(event, SideChannelsFound) and event.rollout_id in rows:
                rows[event.rollout_id].add(event)
    return {rollout_id: each.channels() for rollout_id, each in rows.items()}


class _Rows:
    """The arrays of one rollout."""

    def __init__(self, ended: Ended, layout: Layout) -> None:
        self._layout, self._engines = layout, ended.engines
        self._count = len(ended.record.token_ids)
        sampled = [i for s in ended.record.spans if s.trainable for i in range(s.start, s.start + s.length)]
        self._row_of = np.full(self._count, -1)
        self._row_of[sampled] = np.arange(len(sampled))
        self._routes = np.zeros((self._count, len(layout.layer_ids), layout.top_k), DTYPES[layout.dtype])
        self._is_valid, self._versions = np.zeros(self._count, "u1"), np.zeros(self._count, DTYPES["U32"])
        self._hidden = np.zeros((len(sampled), layout.hidden_dim), DTYPES["BF16"])

    def add(self, event: SideChannelsFound) -> None:
        """Take in what was told; rows of another layout, from before an engine was replaced, are left out."""
        info = next(info for at, info in reversed(self._engines) if at <= event.start)
        layout = self._layout
        if event.routes is not None and _is_alike(info, layout):
            told = np.frombuffer(event.routes.expert_ids, DTYPES[layout.dtype]).reshape(-1, *self._routes.shape[1:])
            start, end = event.routes.start, min(event.routes.start + len(told), self._count - 1)
            self._routes[start:end], self._is_valid[start:end] = told[: end - start], 1
            self._versions[start:end] = event.policy_version
        if event.hidden and info.hidden_dim == layout.hidden_dim:
            hidden = np.frombuffer(event.hidden, DTYPES["BF16"]).reshape(-1, layout.hidden_dim)
            row_of = self._row_of[event.start : event.start + len(hidden)]
            self._hidden[row_of[row_of >= 0]] = hidden[: len(row_of)][row_of >= 0]

    def channels(self) -> dict[str, Channel]:
        """By name."""
        channels = {}
        if self._layout.layer_ids:
            channels["routes"] = Channel(self._routes, self._layout.dtype, self._layout.layer_ids)
            channels["routes_valid"] = Channel(self._is_valid, "U8")
            channels["routes_version"] = Channel(self._versions, "U32")
        if self._layout.hidden_dim:
            channels["hidden"] = Channel(self._hidden, "BF16")
        return channels


def _is_alike(info: EngineInfo, layout: Layout) -> bool:
    routing = info.routing
    return routing is not None and (routing.layer_ids, routing.top_k) == (layout.layer_ids, layout.top_k)
