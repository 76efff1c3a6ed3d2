"""What a durable append costs: group commit against a plain write + fdatasync a record.

All contenders take turns within each round of one run, on files in the same directory, so that a
noisy neighbour hits all of them; figures are medians over rounds.  The raw baseline writes the bytes
of a whole group at once and syncs once: the limit that group commit can reach.

See: docs/formats/wal.md, "Costs".
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from wal import GroupCommit, Log, Record, read

AWAITERS = (1, 64, 1024)
SIZES = (64, 1024, 16384)
TURNS = 24
KIND = 2


def plain(directory: Path, records_count: int, size_bytes: int, group: int = 1) -> float:
    """Seconds for `records_count` records, `group` of them in each write + fdatasync."""
    payload = os.urandom(size_bytes * group)
    fd = os.open(directory / "plain", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        start_s = time.perf_counter()
        for _ in range(max(1, records_count // group)):
            os.write(fd, payload)
            os.fdatasync(fd)
        return time.perf_counter() - start_s
    finally:
        os.close(fd)


def grouped(directory: Path, records_count: int, size_bytes: int, awaiters: int) -> float:
    """Seconds for `awaiters` tasks that append one record after the other through one GroupCommit."""
    payload = os.urandom(size_bytes)

    async def caller(commit: GroupCommit) -> None:
        for _ in range(records_count // awaiters):
            await commit.append(KIND, payload)

    async def run() -> float:
        commit = GroupCommit(Log.open(Path(tempfile.mkdtemp(dir=directory))))
        start_s = time.perf_counter()
        await asyncio.gather(*(caller(commit) for _ in range(awaiters)))
        spent_s = time.perf_counter() - start_s
        await commit.close()
        return spent_s

    return asyncio.run(run())


def recovery(directory: Path, records_count: int, size_bytes: int) -> tuple[float, float]:
    """(seconds to read all records of a log back, seconds to read its files), both from the page cache."""
    folder = Path(tempfile.mkdtemp(dir=directory))
    with Log.open(folder) as log:
        for _ in range(records_count):
            log.append(KIND, os.urandom(size_bytes))
    start_s = time.perf_counter()
    for path in folder.glob("*.wal"):
        path.read_bytes()
    raw_s = time.perf_counter() - start_s
    start_s = time.perf_counter()
    newest: Record | None = None
    for record in read(folder):
        newest = record
    if newest is None or newest.lsn != records_count:
        raise SystemExit("the log lost records: this measurement is worth nothing")
    return time.perf_counter() - start_s, raw_s


def measure(directory: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds per record of every contender, one entry a round; round 0 only warms up."""
    cases: dict[str, tuple[int, Callable[[int], float]]] = {}
    for size in SIZES:
        cases[f"plain_{size}B"] = (TURNS, lambda count, size=size: plain(directory, count, size))  # type: ignore[misc]
        for awaiters in AWAITERS if size == SIZES[0] else (64,):
            count = TURNS * awaiters
            key = f"{awaiters}x{size}B"

            def run_raw(count: int, size: int = size, group: int = awaiters) -> float:
                return plain(directory, count, size + 24, group)

            def run_grouped(count: int, size: int = size, awaiters: int = awaiters) -> float:
                return grouped(directory, count, size, awaiters)

            cases[f"raw_{key}"] = (count, run_raw)
            cases[f"group_{key}"] = (count, run_grouped)
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for index in range(rounds + 1):
        for name, (count, run) in cases.items():
            spent_s = run(count) / count
            if index:
                taken[name].append(spent_s)
    return taken


def report(directory: Path, rounds: int) -> dict[str, dict[str, object]]:
    """The JSON object: figures (ours), baselines, ratios (ours by baseline; `limit_ratio` of 1 is the disk's)."""
    median_s = {name: statistics.median(values) for name, values in measure(directory, rounds).items()}
    figures: dict[str, object] = {}
    baselines: dict[str, object] = {}
    ratios: dict[str, object] = {}
    for name, value_s in median_s.items():
        contender, _, case = name.partition("_")
        row = {"records_per_s": round(1 / value_s, 1), "us_per_append": round(value_s * 1e6, 1)}
        if contender != "group":
            baselines[name] = row
            continue
        size = case.partition("x")[2]
        figures[case] = row
        ratios[case] = {
            "times_as_fast_as_plain": round(median_s[f"plain_{size}"] / value_s, 2),
            "limit_ratio": round(value_s / median_s[f"raw_{case}"], 2),
        }
    pairs = [recovery(directory, 20_000, 256) for _ in range(rounds)]
    read_s, raw_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    figures["recovery_256B"] = {"records_per_s": round(20_000 / read_s), "mb_per_s": round(20_000 * 280 / read_s / 1e6)}
    baselines["read_bytes_256B"] = {"mb_per_s": round(20_000 * 280 / raw_s / 1e6)}
    ratios["recovery_256B"] = {"share_of_file_read_speed": round(raw_s / read_s, 3)}
    return {"figures": figures, "baselines": baselines, "ratios": ratios}


def table(told: dict[str, dict[str, object]]) -> Table:
    """For people."""
    shown = Table(title="durable appends (callers x payload)", caption="limit ratio 1.0: as fast as the disk syncs")
    for column in ("case", "records/s", "us an append", "x plain loop", "x raw limit"):
        shown.add_column(column, justify="right")
    for case, row in told["figures"].items():
        ratio = told["ratios"][case]
        if isinstance(row, dict) and isinstance(ratio, dict) and "us_per_append" in row:
            values = (row["records_per_s"], row["us_per_append"], ratio["times_as_fast_as_plain"], ratio["limit_ratio"])
            shown.add_row(case, *map(str, values))
    for name, row in told["baselines"].items():
        if isinstance(row, dict) and name.startswith("plain"):
            shown.add_row(name, str(row["records_per_s"]), str(row["us_per_append"]), "1.0", "")
    return shown


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description="Durable appends a second: group commit against a plain write + fdatasync loop.",
        epilog="example: python benchmarks/log_append.py --quick --json > log_append.json",
    )
    parser.add_argument("--quick", action="store_true", help="9 rounds instead of 31 (under a minute)")
    parser.add_argument("--json", action="store_true", help="print one JSON object: figures, baselines, ratios")
    parser.add_argument("--dir", type=Path, help="measure on this disk (default: the temporary directory's)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="log_append.") as directory:
        told = report(Path(directory), 9 if options.quick else 31)
    if options.json:
        print(json.dumps(told))
        return
    console = Console()
    console.print(table(told))
    console.print("recovery:", told["figures"]["recovery_256B"], told["ratios"]["recovery_256B"])


if __name__ == "__main__":
    main()
