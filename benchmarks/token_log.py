"""What the token log costs an engine, and how fast its requests are back after a crash.

Steps: an engine takes 10 ms a step in a thread of its own (it sleeps, as one that waits for a GPU
does).  The event loop awaits the step, appends one token for each running request, and starts the next
step; a task waits until the tokens are durable, as one that sends them out would.  The same loop without
a log takes turns with it; the difference is the log's, the waiting task included.  `step` is how much
later the next step is asked for, on the clock (median over steps); `caller` is processor time of the
loop's thread and `process` of all threads, most of it spent while the engine computes.  Columns are
arrays; one case has lists.  Processors are cold after a pause: `append, hot` is the time of
`TokenLog.append` when it is called over and over, and the baseline `empty handoff` is the same loop with
an empty job for a second thread instead of the log.

Recovery: reading a log and folding it, against reading the bytes of the same files one after the
other, taking turns, from the page cache (warm) and from the disk (cold).  `fold` checks every record
and knows every request's state; `streams` also looks at the tokens of every request.

See: docs/formats/wal_tokens.md, "Costs".
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import statistics
import tempfile
import time
from array import array
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from wal import GroupCommit, Log, SyncPolicy, read, tokens
from wal.fold import TokenFold
from wal.token_log import TokenLog
from wal.token_steps import encode_with, step_head
from wal.tokens import RequestClosed, RequestOpened

STEP_S = 0.010
ROWS = (1, 64, 512)
POLICIES = ("always", "interval(5)", "os")
STEPS = 40
REQUESTS, LENGTH = 1000, 2000
SLOTS = 256
PIECE_BYTES = 1 << 20
Spent = tuple[float, float, float]
"""Seconds of the caller's thread, of the process, and on the clock between one step and the next, of all steps."""


async def engine(log: TokenLog | Executor | None, rows: int, delays_s: list[float], as_lists: bool) -> Spent:
    """Spent by STEPS steps with pauses; `delays_s` gets the time until each step was durable."""
    slots, columns = step_columns(rows, as_lists)
    loop = asyncio.get_running_loop()
    pending, gaps_s = [], []

    async def emit(written: Awaitable[int], start_s: float) -> None:
        await written
        delays_s.append(time.perf_counter() - start_s)

    worker = ThreadPoolExecutor(max_workers=1)
    await loop.run_in_executor(worker, int)
    gc.collect()
    start = time.thread_time(), time.process_time()
    for ids, logprobs in columns:
        await loop.run_in_executor(worker, time.sleep, STEP_S)
        start_s = time.perf_counter()
        if isinstance(log, TokenLog):
            pending.append(asyncio.create_task(emit(log.append(slots, ids, logprobs, 1), start_s)))
        elif log is not None:
            pending.append(asyncio.create_task(emit(loop.run_in_executor(log, int), start_s)))
        gaps_s.append(time.perf_counter() - start_s)
    await loop.run_in_executor(worker, time.sleep, STEP_S)
    end = time.thread_time(), time.process_time()
    await asyncio.gather(*pending)
    worker.shutdown()
    return end[0] - start[0], end[1] - start[1], statistics.median(gaps_s) * STEPS


def step_columns(rows: int, as_lists: bool) -> tuple[Sequence[int], list[tuple[Sequence[int], Sequence[float]]]]:
    """Slots, and ids and logprobs of each step."""
    draw = random.Random(rows)  # noqa: S311  # a benchmark's dice
    ids = [array("I", [draw.randrange(129_280) for _ in range(rows)]) for _ in range(STEPS)]
    logprobs = [array("f", [-draw.random() * 4 for _ in range(rows)]) for _ in range(STEPS)]
    if as_lists:
        return list(range(rows)), [(list(i), list(p)) for i, p in zip(ids, logprobs, strict=True)]
    return array("I", range(rows)), list(zip(ids, logprobs, strict=True))


def run_engine(directory: Path, rows: int, policy: str | None, delays_s: list[float], as_lists: bool) -> Spent:
    """One turn of a contender; `policy` None is the loop without a log, "empty handoff" that with an empty job."""

    async def run() -> Spent:
        if policy is None:
            return await engine(None, rows, delays_s, as_lists)
        if policy == "empty handoff":
            with ThreadPoolExecutor(max_workers=1) as worker:
                return await engine(worker, rows, delays_s, as_lists)
        commit = GroupCommit(Log.open(Path(tempfile.mkdtemp(dir=directory))), SyncPolicy.parse(policy))
        log = TokenLog(commit)
        await asyncio.gather(*(log.open(f"request-{index}") for index in range(rows)))
        spent = await engine(log, rows, delays_s, as_lists)
        await commit.close()
        return spent

    return asyncio.run(run())


def hot_append_us(directory: Path, rows: int, as_lists: bool) -> float:
    """Microseconds of one `TokenLog.append`, called over and over, without its write and its sync."""

    async def run() -> float:
        commit = GroupCommit(Log.open(Path(tempfile.mkdtemp(dir=directory))), SyncPolicy.os())
        log = TokenLog(commit)
        await asyncio.gather(*(log.open(f"request-{index}") for index in range(rows)))
        slots, columns = step_columns(rows, as_lists)
        taken_s = []
        for _ in range(10):
            start_s = time.perf_counter()
            written = [log.append(slots, ids, logprobs, 1) for ids, logprobs in columns]
            taken_s.append((time.perf_counter() - start_s) / STEPS)
            await asyncio.gather(*written)
        await commit.close()
        return min(taken_s) * 1e6

    return asyncio.run(run())


def measure_steps(directory: Path, rounds: int) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Medians over rounds of (with log - without log) a step and quantiles of the time until durable; empty handoff."""
    cases = [(rows, policy, False) for rows in ROWS for policy in POLICIES] + [(ROWS[-1], "interval(5)", True)]
    taken: dict[tuple[int, str, bool], list[Spent]] = {case: [] for case in cases}
    delays: dict[tuple[int, str, bool], list[float]] = {case: [] for case in cases}
    handoffs: list[Spent] = []
    for index in range(rounds + 1):
        bare = run_engine(directory, ROWS[0], None, [], False)
        handoff = run_engine(directory, ROWS[0], "empty handoff", [], False)
        if index:  # round 0 warms up
            handoffs.append((handoff[0] - bare[0], handoff[1] - bare[1], handoff[2] - bare[2]))
        for case in cases:
            found: list[float] = []
            spent = run_engine(directory, *case[:2], found, case[2])
            if index:
                taken[case].append((spent[0] - bare[0], spent[1] - bare[1], spent[2] - bare[2]))
                delays[case] += found
    told = {}
    for case, spents in taken.items():
        rows, policy, as_lists = case
        quantiles = statistics.quantiles(delays[case], n=100)
        told[f"{rows} requests{' as lists' if as_lists else ''}, {policy}"] = {
            **per_step_us(spents),
            "append_hot_us": round(hot_append_us(directory, rows, as_lists), 1),
            "durable_p50_ms": round(quantiles[49] * 1e3, 2),
            "durable_p99_ms": round(quantiles[98] * 1e3, 2),
        }
    return told, per_step_us(handoffs)


def per_step_us(spents: list[Spent]) -> dict[str, float]:
    """Medians in microseconds a step."""
    caller, process, gap = (statistics.median(column) / STEPS * 1e6 for column in zip(*spents, strict=True))
    return {"step_us": round(gap, 1), "caller_us": round(caller, 1), "process_us": round(process, 1)}


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
    """The JSON object: figures (ours), baselines, ratios (share of a 10 ms step; share of the plain read's speed)."""
    steps, handoff = measure_steps(directory, rounds)
    figures: dict[str, Any] = dict(steps)
    ratios: dict[str, Any] = {
        case: {
            "share_of_step": round(row["step_us"] / STEP_S / 1e6, 5),
            "caller_share_of_step": round(row["caller_us"] / STEP_S / 1e6, 5),
        }
        for case, row in figures.items()
    }
    baselines: dict[str, Any] = {"empty handoff": handoff}
    for case, row in measure_recovery(directory, rounds).items():
        baselines[case] = {"size_mb": row["size_mb"], "bytes_mb_per_s": row["bytes_mb_per_s"]}
        figures[case] = {key: value for key, value in row.items() if key not in baselines[case]}
        ratios[case] = {
            f"{key}_share_of_read": round(row[f"{key}_mb_per_s"] / row["bytes_mb_per_s"], 3)
            for key in ("records", "fold", "streams")
        }
    return {"figures": figures, "baselines": baselines, "ratios": ratios}


def tables(told: dict[str, dict[str, Any]]) -> Iterator[Table]:
    """For people."""
    steps = Table(title="token log per engine step of 10 ms", caption="the log's part: with it minus without it")
    for column in (
        "case",
        "step us",
        "% of step",
        "caller us",
        "process us",
        "append, hot us",
        "durable p50 ms",
        "p99 ms",
    ):
        steps.add_column(column, justify="right")
    handoff = told["baselines"]["empty handoff"]
    share = f"{handoff['step_us'] / STEP_S / 1e6:.2%}"
    steps.add_row(
        "an empty handoff", str(handoff["step_us"]), share, str(handoff["caller_us"]), str(handoff["process_us"])
    )
    recovery = Table(title=f"recovery of {REQUESTS} requests, {LENGTH} tokens each on average, MB/s")
    for column in ("log", "MB", "plain read", "records", "fold", "all streams", "fold : read", "streams : read"):
        recovery.add_column(column, justify="right")
    for case, row in told["figures"].items():
        if "step_us" in row:
            share = f"{told['ratios'][case]['share_of_step']:.2%}"
            step_us, *rest = row.values()
            steps.add_row(case, str(step_us), share, *map(str, rest))
        else:
            base, ratio = told["baselines"][case], told["ratios"][case]
            speeds = (base["size_mb"], base["bytes_mb_per_s"], *row.values())
            shares = (ratio["fold_share_of_read"], ratio["streams_share_of_read"])
            recovery.add_row(case, *map(str, speeds), *(f"{share:.0%}" for share in shares))
    yield steps
    yield recovery


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description="Cost of the token log per engine step, and speed of recovery against a plain read.",
        epilog="example: python benchmarks/token_log.py --quick --json > token_log.json",
    )
    parser.add_argument("--quick", action="store_true", help="5 rounds instead of 21 (about a minute)")
    parser.add_argument("--json", action="store_true", help="print one JSON object: figures, baselines, ratios")
    parser.add_argument("--dir", type=Path, help="measure on this disk (default: the temporary directory's)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="token_log.") as directory:
        told = report(Path(directory), 5 if options.quick else 21)
    if options.json:
        print(json.dumps(told))
        return
    console = Console(width=130)
    for table in tables(told):
        console.print(table)


if __name__ == "__main__":
    main()
