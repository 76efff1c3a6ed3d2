"""What the token log costs an engine per step.

An engine takes 10 ms a step in a thread of its own (it sleeps, as one that waits for a GPU
does).  The event loop awaits the step, appends one token for each running request, and starts the next
step; a task waits until the tokens are durable, as one that sends them out would.  The same loop without
a log takes turns with it; the difference is the log's.  `step` is how much later the next step is asked
for, on the clock (median over steps, without the making of the waiting task); `caller` is processor time
of the loop's thread and `process` of all threads, the waiting task included, most of it spent while the
engine computes.  Columns are
arrays; one case has lists.  Processors are cold after a pause: `append, hot` is the time of
`TokenLog.append` when it is called over and over, and the baseline `empty handoff` is the same loop with
an empty job for a second thread instead of the log.

See: docs/formats/wal_tokens.md, "Costs".
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import statistics
import tempfile
import time
from array import array
from collections.abc import Awaitable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from wal import GroupCommit, Log, SyncPolicy
from wal.token_log import TokenLog

STEP_S = 0.010
ROWS = (1, 64, 512)
POLICIES = ("always", "interval(5)", "os")
STEPS = 40
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
        written: Awaitable[int] | None = None
        if isinstance(log, TokenLog):
            written = log.append(slots, ids, logprobs, 1)
        elif log is not None:
            written = loop.run_in_executor(log, int)
        gaps_s.append(time.perf_counter() - start_s)
        if written is not None:
            pending.append(asyncio.create_task(emit(written, start_s)))
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


def report(directory: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """The JSON object: figures (ours), baselines, ratios (share of a 10 ms step)."""
    figures, handoff = measure_steps(directory, rounds)
    ratios = {
        case: {
            "share_of_step": round(row["step_us"] / STEP_S / 1e6, 5),
            "caller_share_of_step": round(row["caller_us"] / STEP_S / 1e6, 5),
        }
        for case, row in figures.items()
    }
    return {"figures": dict(figures), "baselines": {"empty handoff": handoff}, "ratios": ratios}


def table(told: dict[str, dict[str, Any]]) -> Table:
    """For people."""
    shown = Table(title="token log per engine step of 10 ms", caption="the log's part: with it minus without it")
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
        shown.add_column(column, justify="right")
    for case, row in {"an empty handoff": told["baselines"]["empty handoff"], **told["figures"]}.items():
        step_us, *rest = row.values()
        shown.add_row(case, str(step_us), f"{step_us / STEP_S / 1e6:.2%}", *map(str, rest))
    return shown


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description="Cost of the token log per engine step of 10 ms.",
        epilog="example: python benchmarks/token_log.py --quick --json > token_log.json",
    )
    parser.add_argument("--quick", action="store_true", help="5 rounds instead of 21 (under a minute)")
    parser.add_argument("--json", action="store_true", help="print one JSON object: figures, baselines, ratios")
    parser.add_argument("--dir", type=Path, help="measure on this disk (default: the temporary directory's)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="token_log.") as directory:
        told = report(Path(directory), 5 if options.quick else 21)
    if options.json:
        print(json.dumps(told))
        return
    Console(width=130).print(table(told))


if __name__ == "__main__":
    main()
