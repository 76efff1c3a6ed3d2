"""Logs of a root as the index lists them: which there are, what a row says of a rollout, and a worker's own name.

See: rollout/index.py.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rollout.errors import RequestError
from rollout.index import RolloutRow
from rollout.ledger import Ledger
from toolcall_dsl import Tokenizer
from wal import format as wal_format

WORKERS = "workers"


def find_logs(root: Path) -> Iterator[tuple[str, Path]]:
    """Partitions under a root, by name, and their logs.  RequestError if the root is one itself."""
    if (root / "wal").is_dir():
        raise RequestError(f"{root} is a run directory itself: serve it with --out, or give a root that holds several")
    for log in sorted(root.glob("*/wal")):
        yield log.parent.name, log


def newest_epoch(log: Path) -> int:
    """The highest epoch that a log directory has seen."""
    names = [(wal_format.parse_name(name), wal_format.parse_lock_name(name)) for name in os.listdir(log)]
    return max((segment[1] if segment else lock or 0 for segment, lock in names), default=0)


def rows_of_log(name: str, log: Path, tokenizer: Tokenizer) -> tuple[list[str], list[RolloutRow]]:
    """What a log says: its jobs, and how its rollouts stand.  wal.CorruptError, JournalError."""
    ledger = Ledger.read(log, tokenizer)
    return list(ledger.jobs), [row_of(ledger, name, rollout_id) for rollout_id in ledger.rollouts]


def row_of(ledger: Ledger, partition: str, rollout_id: str) -> RolloutRow:
    """A rollout as it stands."""
    state = ledger.rollouts[rollout_id]
    finished, opened = state.finished, state.opened
    if finished is not None:
        standing = "DONE"
    elif state.failure is not None:
        standing = "FAILED"
    else:
        standing = "PREEMPTED" if state.preempted is not None else "RUNNING"
    return RolloutRow(
        rollout_id=rollout_id,
        request_id=opened.request_id,
        partition=partition,
        task=next(group.task for group in state.job.groups if group.group_id == opened.group_id),
        state=standing,
        finish_reason=finished.reason if finished is not None else "",
        reward=state.judged.reward if state.judged is not None else None,
    )


def hold_name(root: Path, worker_id: str) -> IO[str]:
    """Hold a worker id on this root until the file is closed or this process ends.  RequestError, OSError.

    Whoever gets it knows that an earlier process of that name is dead.
    """
    (root / WORKERS).mkdir(exist_ok=True)
    file = (root / WORKERS / f"{worker_id}.lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read(20).strip()
        file.close()
        raise RequestError(
            f"worker {worker_id!r} of {root} is process {holder} already: stop that, or give another --worker-id"
        ) from error
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file
