"""Commands that need not run again: answered from the log, and applied again to rebuild a sandbox that was lost.

    python benchmarks/fast_forward.py [--commands 500] [--quick] [--json]

A session of commands runs in a sandbox, each logged *started* and *finished* (synced).  Then the same keys are asked
for again (what a rollout does that goes on in a living sandbox), and the sandbox is destroyed and the session rebuilt
in a fresh one, every result compared with the log.  `work` is how long a command computes; the baseline is running
them.  In the end a file that every command appends to must have a line for each command: none ran twice.  Needs root.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from plots import bars
from rich.console import Console
from rich.table import Table

from dsec.edge.config import SubstrateConfig
from dsec.edge.exec_log import DurableSandbox
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.replay import incarnate
from dsec.trajectory import Trajectory
from dsec.types import Command, SandboxSpec
from wal import GroupCommit, Log

EXAMPLE = "example: python benchmarks/fast_forward.py --commands 500 --work-ms 0 20"
ENV = {"PATH": "/usr/bin:/bin"}
SPEC = SandboxSpec()


def command(number: int, work_ms: float) -> Command:
    """Computes for a while, appends a line, and says how many lines there are."""
    spin = f"timeout {work_ms / 1000} yes > /dev/null; " if work_ms else ""
    return Command(argv=("/bin/bash", "-c", f"{spin}echo {number} >> /tmp/lines; wc -l < /tmp/lines"), env=ENV)


async def run_all(sandbox: DurableSandbox, count: int, work_ms: float) -> float:
    """Every command in order, under its key; returns commands a second."""
    began = time.perf_counter()
    for number in range(count):
        result = await sandbox.exec(f"call-{number}", command(number, work_ms))
        assert result.stdout.data == f"{number + 1}\n".encode()
    return count / (time.perf_counter() - began)


async def lines(sandbox: DurableSandbox) -> int:
    """How many commands this sandbox has seen."""
    result = await sandbox.sandbox.exec(Command(argv=("/bin/bash", "-c", "wc -l < /tmp/lines"), env=ENV))
    return int(result.stdout.data)


async def measure(substrate: ContainerSubstrate, count: int, work_ms: float) -> dict[str, Any]:
    """One session."""
    with tempfile.TemporaryDirectory() as folder:
        async with GroupCommit(Log.open(Path(folder))) as commit:
            trajectory = Trajectory("session")
            first = await incarnate(substrate, SPEC, trajectory, commit.append)
            run = await run_all(first, count, work_ms)
            answered = await run_all(first, count, work_ms)
            seen = await lines(first)
            await first.destroy()
            began = time.perf_counter()
            second = await incarnate(substrate, SPEC, trajectory, commit.append)
            rebuilt = count / (time.perf_counter() - began)
            seen_again = await lines(second)
            await second.destroy()
    return {
        "work_ms": work_ms,
        "commands": count,
        "run_per_s": run,
        "answered_per_s": answered,
        "rebuilt_per_s": rebuilt,
        "run_twice": trajectory.run_twice_count + (seen - count) + (seen_again - count),
        "replayed_and_equal": trajectory.replayed_count,
    }


async def measure_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each length of work."""
    substrate = ContainerSubstrate(SubstrateConfig())
    await substrate.open()
    try:
        return [await measure(substrate, options.commands, work_ms) for work_ms in options.work_ms]
    finally:
        await substrate.close()


def main() -> int:
    """Measure, print, and fail if a command ran twice."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=EXAMPLE)
    parser.add_argument("--commands", type=int, default=500)
    parser.add_argument("--work-ms", type=float, nargs="+", default=[0, 20])
    parser.add_argument("--quick", action="store_true", help="50 commands")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--figure", type=Path, help="where to draw the picture")
    options = parser.parse_args()
    if options.quick:
        options.commands = 50
    rows = asyncio.run(measure_all(options))
    if options.figure is not None:
        names = {"run_per_s": "run", "answered_per_s": "answered from the log", "rebuilt_per_s": "applied again"}
        series = {label: [row[name] for row in rows] for name, label in names.items()}
        places = [f"commands of {row['work_ms']:g} ms" for row in rows]
        bars(options.figure, places, series, ylabel="commands/s", title="commands that a log has", is_log=True)
    if options.json:
        print(json.dumps({"rows": rows}))
    else:
        table = Table(*(name.replace("_", " ") for name in rows[0]))
        for row in rows:
            table.add_row(*(f"{value:,.0f}" for value in row.values()))
        Console().print(table)
    return 1 if any(row["run_twice"] for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
