"""How fast the requests of a token log are back after a crash.

Reading a log and folding it, against reading the bytes of the same files one after the other, taking
turns, from the page cache (warm) and from the disk (cold).  `fold` checks every record and knows every
request's state, with its tokens in memory; `streams` also lays out the tokens of every request.

See: docs/formats/wal_tokens.md, "Costs".
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from wal import Log, read, tokens
from wal.fold import TokenFold
from wal.token_steps import encode_with, step_head
from wal.tokens import RequestClosed, RequestOpened

REQUESTS, LENGTH = 1000, 2000
SLOTS = 256
PIECE_BYTES = 1 << 20


class Schedule:
    """Engine steps of a log to recover: which slots run, and who opens and closes between the steps."""

    def __init__(self, directory: Path) -> None:
        self.log = Log.open(directory)
        self.lengths: dict[int, int] = {}
        self.draw = random.Random(7)  # noqa: S311  # a benchmark's dice
        self.opened_count = 0

    def open(self, slot: int) -> None:
        """The next request takes a free slot."""
        self.log.append(tokens.TOKENS, tokens.encode(RequestOpened(f"request-{self.opened_count}", slot)))
        self.opened_count += 1
        self.lengths[slot] = 0

    def close(self, slot: int) -> None:
        """The slot's request is done."""
        self.log.append(tokens.TOKENS, tokens.encode(RequestClosed(slot, "stop")))
        del self.lengths[slot]

    def step(self, slots: list[int]) -> None:
        """One token for each of these rows."""
        rows = len(slots)
        ids = array("I", [self.draw.randrange(129_280)]) * rows
        base = sum(self.lengths[slot] for slot in slots)
        head = step_head(slots, [(rows, 1)])
        self.log.append(tokens.TOKENS, encode_with(head, base, ids, array("f", [-0.5]) * rows))
        for slot in slots:
            self.lengths[slot] += 1


def write_together(directory: Path) -> None:
    """All requests run from the first step to the last."""
    schedule = Schedule(directory)
    for slot in range(REQUESTS):
        schedule.open(slot)
    for _ in range(LENGTH):
        schedule.step(list(range(REQUESTS)))
    schedule.log.close()


def write_batching(directory: Path, *, keeps_rows: bool) -> None:
    """SLOTS of the requests run at a time, each to a length of its own; the next one takes a free slot.

    `keeps_rows`: the newcomer takes the row of the one that left; else rows move up and it comes last.
    """
    schedule = Schedule(directory)
    running: list[int] = []
    left: dict[int, int] = {}
    while schedule.opened_count < REQUESTS or running:
        for slot in [slot for slot in running if not left[slot]]:
            schedule.close(slot)
            if schedule.opened_count < REQUESTS and keeps_rows:
                schedule.open(slot)
                left[slot] = schedule.draw.randint(1, 2 * LENGTH)
            else:
                running.remove(slot)
        for slot in range(SLOTS):
            if schedule.opened_count < REQUESTS and slot not in schedule.lengths:
                schedule.open(slot)
                running.append(slot)
                left[slot] = schedule.draw.randint(1, 2 * LENGTH)
        if running:
            schedule.step(running)
        for slot in running:
            left[slot] -= 1
    schedule.log.close()


LOGS: dict[str, Callable[[Path], None]] = {
    "together": write_together,
    "batching": lambda directory: write_batching(directory, keeps_rows=True),
    "batching, rows move up": lambda directory: write_batching(directory, keeps_rows=False),
}


def segments(directory: Path) -> Iterator[Path]:
    """The files of a log in order."""
    return iter(sorted(directory.glob("*.wal")))


def read_bytes(directory: Path) -> int:
    """The plain sequential read."""
    buffer, count = bytearray(PIECE_BYTES), 0
    for path in segments(directory):
        with path.open("rb", buffering=0) as file:
            while got := file.readinto(buffer):
                count += got
    return count


def read_records(directory: Path) -> int:
    """The log's own read: frames and checksums."""
    return sum(1 for _ in read(directory))


def fold_log(directory: Path) -> TokenFold:
    """Read and fold."""
    fold = TokenFold()
    for record in read(directory):
        fold.add(record)
    return fold


def fold_streams(directory: Path) -> None:
    """Read, fold, and look at every stream."""
    fold = fold_log(directory)
    found = sum(len(stream.token_ids) + len(stream.logprobs) for stream in fold.streams.values())
    if found != 2 * sum(stream.length for stream in fold.streams.values()) or len(fold.streams) != REQUESTS:
        raise SystemExit("the log lost tokens: this measurement is worth nothing")


def forget(directory: Path) -> None:
    """Drop the files from the page cache."""
    for path in segments(directory):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


CONTENDERS: dict[str, Callable[[Path], Any]] = {
    "bytes": read_bytes,
    "records": read_records,
    "fold": fold_log,
    "streams": fold_streams,
}


def measure_recovery(directory: Path, rounds: int) -> dict[str, dict[str, float]]:
    """MB/s of every contender for every log, warm and cold; medians over rounds."""
    told = {}
    for name, write in LOGS.items():
        folder = Path(tempfile.mkdtemp(dir=directory))
        write(folder)
        os.sync()
        size_mb = sum(path.stat().st_size for path in segments(folder)) / 1e6
        for state in ("warm", "cold"):
            taken: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
            for _ in range(rounds):
                for contender, run in CONTENDERS.items():
                    if state == "cold":
                        forget(folder)
                    gc.collect()
                    start_s = time.perf_counter()
                    run(folder)
                    taken[contender].append(time.perf_counter() - start_s)
            row = {f"{key}_mb_per_s": round(size_mb / statistics.median(values)) for key, values in taken.items()}
            told[f"{name}, {state}"] = {"size_mb": round(size_mb, 1), **row}
    return told


def report(directory: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """The JSON object: figures (ours), baselines, ratios (share of the plain read's speed)."""
    figures: dict[str, Any] = {}
    baselines: dict[str, Any] = {}
    ratios: dict[str, Any] = {}
    for case, row in measure_recovery(directory, rounds).items():
        baselines[case] = {"size_mb": row["size_mb"], "bytes_mb_per_s": row["bytes_mb_per_s"]}
        figures[case] = {key: value for key, value in row.items() if key not in baselines[case]}
        ratios[case] = {
            f"{key}_share_of_read": round(row[f"{key}_mb_per_s"] / row["bytes_mb_per_s"], 3)
            for key in ("records", "fold", "streams")
        }
    return {"figures": figures, "baselines": baselines, "ratios": ratios}


def table(told: dict[str, dict[str, Any]]) -> Table:
    """For people."""
    shown = Table(title=f"recovery of {REQUESTS} requests, {LENGTH} tokens each on average, MB/s")
    for column in ("log", "MB", "plain read", "records", "fold", "all streams", "fold : read", "streams : read"):
        shown.add_column(column, justify="right")
    for case, row in told["figures"].items():
        base, ratio = told["baselines"][case], told["ratios"][case]
        speeds = (base["size_mb"], base["bytes_mb_per_s"], *row.values())
        shares = (ratio["fold_share_of_read"], ratio["streams_share_of_read"])
        shown.add_row(case, *map(str, speeds), *(f"{share:.0%}" for share in shares))
    return shown


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description="Speed of recovering a token log against a plain read of its files.",
        epilog="example: python benchmarks/token_recovery.py --quick --json > token_recovery.json",
    )
    parser.add_argument("--quick", action="store_true", help="5 rounds instead of 21 (under a minute)")
    parser.add_argument("--json", action="store_true", help="print one JSON object: figures, baselines, ratios")
    parser.add_argument("--dir", type=Path, help="measure on this disk (default: the temporary directory's)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="token_recovery.") as directory:
        told = report(Path(directory), 5 if options.quick else 21)
    if options.json:
        print(json.dumps(told))
        return
    Console(width=130).print(table(told))


if __name__ == "__main__":
    main()
