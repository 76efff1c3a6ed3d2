"""What a durable append costs: group commit beside SQLite, a plain loop, and the limits of disk and event loop.

All contenders take turns within each round of one run, on files in the same directory, so that a
noisy neighbour hits all of them; figures are medians over rounds.

- `plain`: write + fdatasync for each record.
- `raw`: the bytes of a whole group in one write + fdatasync: the disk's limit.
- `wake`: as many tasks that only wait for a shared wake-up, no log: the event loop's own cost.
- `sqlite`: the same tasks; each wake-up is one transaction of all their records (WAL mode,
  synchronous=FULL), on the event loop: the best group commit that can be built over it by hand.

See: docs/formats/wal.md, "Costs".
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from wal import GroupCommit, Log, read

CASES = ((1, 64), (1, 6144), (64, 64), (64, 1024), (64, 16384), (1024, 64))
"""(awaiters, payload bytes); 6 KiB is one engine step of 512 requests."""
TURNS = 24
KIND = 2
RECOVERIES = ((20_000, 256), (4_000, 12_000))
"""(records, payload bytes) that are read back."""


def plain(directory: Path, turns: int, size_bytes: int) -> float:
    """Seconds for `turns` times a write + fdatasync."""
    payload = os.urandom(size_bytes)
    fd = os.open(directory / "plain", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        start_s = time.perf_counter()
        for _ in range(turns):
            os.write(fd, payload)
            os.fdatasync(fd)
        return time.perf_counter() - start_s
    finally:
        os.close(fd)


async def _callers(append: Callable[[int, bytes], Awaitable[object]], turns: int, awaiters: int, size: int) -> float:
    payload = os.urandom(size)

    async def caller() -> None:
        for _ in range(turns):
            await append(KIND, payload)

    start_s = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(awaiters)))
    return time.perf_counter() - start_s


def grouped(directory: Path, turns: int, awaiters: int, size_bytes: int) -> float:
    """Seconds for `awaiters` tasks that append one record after the other through one GroupCommit."""

    async def run() -> float:
        commit = GroupCommit(Log.open(Path(tempfile.mkdtemp(dir=directory))))
        await commit.append(KIND, b"the first commit learns the disk's pace")
        spent_s = await _callers(commit.append, turns, awaiters, size_bytes)
        await commit.close()
        return spent_s

    return asyncio.run(run())


class Wake:
    """Tasks that wait for a shared wake-up; `commit` gets what they appended, just before."""

    def __init__(self, commit: Callable[[list[tuple[int, bytes]]], None]) -> None:
        self._commit = commit
        self._rows: list[tuple[int, bytes]] = []
        self._waiting: list[asyncio.Future[None]] = []

    async def append(self, kind: int, payload: bytes) -> None:
        """Wait for the group that this record falls into."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        self._rows.append((kind, payload))
        self._waiting.append(done)
        if len(self._waiting) == 1:
            loop.call_soon(self._wake)
        await done

    def _wake(self) -> None:
        rows, waiting, self._rows, self._waiting = self._rows, self._waiting, [], []
        self._commit(rows)
        for done in waiting:
            done.set_result(None)


def woken(turns: int, awaiters: int, size_bytes: int) -> float:
    """Seconds for the same tasks when there is nothing to do but to wake them."""
    return asyncio.run(_callers(Wake(lambda rows: None).append, turns, awaiters, size_bytes))


def sqlite(directory: Path, turns: int, awaiters: int, size_bytes: int) -> float:
    """Seconds for the same tasks when each group is one transaction of SQLite."""
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        base = sqlite3.connect(Path(folder) / "log.sqlite", isolation_level=None)
        base.execute("PRAGMA journal_mode=WAL")
        base.execute("PRAGMA synchronous=FULL")
        base.execute("CREATE TABLE log (lsn INTEGER PRIMARY KEY, kind INTEGER, payload BLOB)")

        def commit(rows: list[tuple[int, bytes]]) -> None:
            base.execute("BEGIN")
            base.executemany("INSERT INTO log (kind, payload) VALUES (?, ?)", rows)
            base.execute("COMMIT")

        spent_s = asyncio.run(_callers(Wake(commit).append, turns, awaiters, size_bytes))
        base.close()
        return spent_s


def measure(directory: Path, rounds: int) -> dict[tuple[int, int], dict[str, float]]:
    """Median seconds of one group (a record of each awaiter) by contender; round 0 only warms up."""
    taken: dict[tuple[int, int], dict[str, list[float]]] = {case: {} for case in CASES}
    for index in range(rounds + 1):
        for awaiters, size in CASES:
            spent_s = {
                "plain": plain(directory, TURNS, size) * awaiters,
                "sqlite": sqlite(directory, TURNS, awaiters, size),
                "raw": plain(directory, TURNS, (size + 24) * awaiters),
                "wake": woken(TURNS, awaiters, size),
                "group": grouped(directory, TURNS, awaiters, size),
            }
            for name, value in spent_s.items() if index else ():
                taken[awaiters, size].setdefault(name, []).append(value / TURNS)
    return {
        case: {name: statistics.median(values) for name, values in columns.items()} for case, columns in taken.items()
    }


def _timed(action: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    action()
    return time.perf_counter() - start_s


def recovery(directory: Path, records_count: int, size_bytes: int, rounds: int) -> dict[str, float]:
    """MB/s of reading a log's records, and of reading its files in pieces; from the page cache and the disk."""
    folder = Path(tempfile.mkdtemp(dir=directory))
    with Log.open(folder) as log:
        for _ in range(records_count):
            log.append(KIND, os.urandom(size_bytes))
    paths = sorted(folder.glob("*.wal"))
    total_mb = sum(path.stat().st_size for path in paths) / 1e6
    piece = bytearray(1 << 20)

    def forget() -> None:
        for path in paths:
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)

    def read_files() -> None:
        for path in paths:
            with path.open("rb", buffering=0) as file:
                while file.readinto(piece):
                    pass

    def read_records() -> None:
        if sum(1 for _ in read(folder)) != records_count:
            raise SystemExit("the log lost records: this measurement is worth nothing")

    taken: dict[str, list[float]] = {name: [] for name in ("files_warm", "log_warm", "files_cold", "log_cold")}
    for _ in range(rounds + 1):
        for name, values in taken.items():
            if name.endswith("cold"):
                forget()
            values.append(_timed(read_files if name.startswith("files") else read_records))
    return {name: total_mb / statistics.median(values[1:]) for name, values in taken.items()}


def report(directory: Path, rounds: int) -> dict[str, dict[str, object]]:
    """The JSON object: figures (ours), baselines, ratios (ours by baseline)."""
    figures: dict[str, object] = {}
    baselines: dict[str, object] = {}
    ratios: dict[str, object] = {}
    for (awaiters, size), group_s in measure(directory, rounds).items():
        case = f"{awaiters}x{size}B"
        for name, value in group_s.items():
            row = {
                "records_per_s": round(awaiters / value),
                "mb_per_s": round(awaiters * size / value / 1e6, 2),
                "us_per_append": round(value / awaiters * 1e6, 1),
            }
            (figures if name == "group" else baselines)[case if name == "group" else f"{name}_{case}"] = row
        ours = group_s["group"]
        ratios[case] = {
            "times_as_fast_as_plain": round(group_s["plain"] / ours, 2),
            "times_as_fast_as_sqlite": round(group_s["sqlite"] / ours, 2),
            "time_over_raw": round(ours / group_s["raw"], 2),
            "time_over_raw_and_wake": round(ours / (group_s["raw"] + group_s["wake"]), 2),
        }
    for records_count, size in RECOVERIES:
        case = f"recovery_{size}B"
        told = recovery(directory, records_count, size, rounds)
        figures[case] = {name: round(value) for name, value in told.items() if name.startswith("log")}
        baselines[case] = {name: round(value) for name, value in told.items() if name.startswith("files")}
        ratios[case] = {
            f"share_of_sequential_read_{heat}": round(told[f"log_{heat}"] / told[f"files_{heat}"], 3)
            for heat in ("warm", "cold")
        }
    return {"figures": figures, "baselines": baselines, "ratios": ratios}


def tables(told: dict[str, dict[str, object]]) -> list[Table]:
    """For people."""
    appends = Table(title="durable appends (awaiters x payload)", caption="raw: the disk's limit for the same groups")
    for column in ("case", "records/s", "MB/s", "us", "x plain", "x SQLite", "/ raw", "/ raw+wake"):
        appends.add_column(column, justify="right")
    reads = Table(title="recovery", caption="share of a sequential read of the same files")
    for column in ("case", "MB/s cached", "share", "MB/s from disk", "share"):
        reads.add_column(column, justify="right")
    for case, row in told["figures"].items():
        ratio = told["ratios"][case]
        if isinstance(row, dict) and isinstance(ratio, dict):
            shares = list(ratio.values())
            if "us_per_append" in row:
                appends.add_row(case, *map(str, (*row.values(), *shares)))
            else:
                reads.add_row(case, *map(str, (row["log_warm"], shares[0], row["log_cold"], shares[1])))
    return [appends, reads]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description="Durable appends: group commit beside SQLite, a plain write + fdatasync loop and the disk's limit.",
        epilog="example: python benchmarks/log_append.py --quick --json > log_append.json",
    )
    parser.add_argument("--quick", action="store_true", help="9 rounds instead of 31 (about a minute)")
    parser.add_argument("--json", action="store_true", help="print one JSON object: figures, baselines, ratios")
    parser.add_argument("--dir", type=Path, help="measure on this disk (default: the temporary directory's)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="log_append.") as directory:
        told = report(Path(directory), 9 if options.quick else 31)
    if options.json:
        print(json.dumps(told))
        return
    console = Console()
    for table in tables(told):
        console.print(table)


if __name__ == "__main__":
    main()
