"""Letting go of the journal's beginning, so that an Edge that runs for years has a bounded log.

A sandbox holds its records, and all behind them, while it lives.  Of what ended, as much history is kept as
`log_bytes_max` allows; then the oldest segments go, and with them the trajectories in them.  What belongs to
no sandbox (the clock's anchor, leases, tombstones) is small, so it is written again, in one record, before
a segment goes.

Invariants:
1. The fold of what is left is the state that the Edge holds, but for sandboxes that ended.

See: wal/retention.py, docs/formats/wal_retention.md, docs/formats/edge_journal.md.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

import wal
from dsec import trajectory
from dsec.edge.edge_log import LOG, EdgeLog
from dsec.edge.history import names_of
from dsec.edge.journal import KIND, Ledger, decode
from dsec.types import SandboxId
from wal.pins import pin
from wal.retention import Retention, RetentionPolicy, RetentionReport

LOOK_S = 60.0
PIN = "carried"
_log = logging.getLogger(__name__)


class _Sandboxes:
    """To retention, a request is a sandbox; it is released when it has ended.  See wal.requests.Requests."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def requests_of(self, record: wal.Record) -> Sequence[str]:
        """The sandboxes that the record is about."""
        return names_of(decode(record.kind, record.payload)) if record.kind in (KIND, trajectory.KIND) else ()

    def is_released(self, request: str) -> bool:
        """Ended, or forgotten since."""
        known = self._ledger.sandboxes.get(SandboxId(request))
        return known is None or known.is_ended


class JournalRetention:
    """Retention passes of one journal, one at a time."""

    def __init__(self, directory: Path, ledger: Ledger, log: EdgeLog, bytes_max: int) -> None:
        """`directory` is the Edge's."""
        self._directory = directory / LOG
        self._ledger = ledger
        self._log = log
        self._bytes_max = bytes_max
        self._retention = Retention(self._directory, _Sandboxes(ledger), RetentionPolicy(keep_bytes_max=bytes_max))

    @property
    def is_due(self) -> bool:
        """Whether the log is above its bound."""
        return sum(path.stat().st_size for path in self._directory.glob("*.wal")) > self._bytes_max

    async def run_pass(self) -> RetentionReport | None:
        """Let go of what may go; None if the disk did not allow it, and then the next pass will."""
        try:
            # What is not folded yet lies at or behind this lsn, so whoever begins there misses nothing.
            await asyncio.to_thread(pin, self._directory, PIN, self._log.lsn + 1)
            await self._log.append(self._ledger.carried())
            await asyncio.to_thread(self._retention.catch_up)
            return await asyncio.to_thread(self._retention.run_pass)
        except wal.StorageError as error:
            _log.warning("the journal's beginning could not be dropped: %s", error)
            return None
