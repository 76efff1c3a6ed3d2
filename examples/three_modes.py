"""Non-think, High and Max on one bundled task, in this process (root; no server needed), and what each of them cost.

    python examples/three_modes.py [TASK] [DIRECTORY] [--group-size 4] [--seed 7]

The modes differ in their prompts and in their budgets (`rollout/modes.py`).  Run it again with the same directory, and
the logs answer at once; another task, size or seed needs another directory.  The embedded checkpoint was taught High
alone.  Without thinking it loses its way where a task has more than one step; Max's effort text, which it never saw,
changes nothing: it thinks a dozen tokens a turn in either mode, and never comes near a budget.
"""

import argparse
import asyncio
import sys
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from rollout.batch import run_in_process
from rollout.errors import ConflictError
from rollout.modes import limits_of
from rollout.record import TrajectoryRecord
from rollout.request import Limits, Thinking
from toolcall_dsl import SpanKind

MODES: dict[Thinking, str] = {"none": "Non-think", "high": "High", "max": "Max"}


def tokens(record: TrajectoryRecord, *kinds: SpanKind) -> int:
    """How many of the rollout's tokens are of these kinds."""
    return sum(span.length for span in record.spans if span.kind in kinds)


def row(name: str, limits: Limits, records: list[TrajectoryRecord]) -> list[str]:
    """A mode: its budgets, and the means of its rollouts."""
    thought = mean(tokens(record, SpanKind.SAMPLED_THINK) for record in records)
    said = mean(tokens(record, SpanKind.SAMPLED_CALL, SpanKind.SAMPLED_TEXT) for record in records)
    ends = sorted({str(record.finish_reason) for record in records})
    return [
        name,
        f"{limits.thinking_tokens_count_max} of {limits.turn_tokens_count_max}",
        str(min(span.start for span in records[0].spans if span.kind.startswith("SAMPLED"))),
        f"{thought:.0f}",
        f"{said:.0f}",
        f"{mean(len(record.turns) for record in records):.1f}",
        f"{mean(len(record.tool_calls) for record in records):.1f}",
        f"{sum(record.reward.value or 0 for record in records):.0f} of {len(records)}",
        ", ".join(ends),
    ]


async def main(options: argparse.Namespace) -> None:
    """Roll the task out in each mode, one after the other."""
    columns = ("mode", "may think", "prompt", "thought", "said", "turns", "calls", "solved", "ended by")
    table = Table(*columns, title=f"{options.task}, tokens and turns: means of {options.group_size}")
    for mode, name in MODES.items():
        limits = limits_of(mode, turns_count_max=8)
        asked = {"group_size": options.group_size, "temperature": 1.0, "seed": options.seed}
        rolled_out = run_in_process(options.directory / mode, [options.task], thinking=mode, limits=limits, **asked)
        try:
            records = [record async for record in rolled_out]
        except ConflictError:
            sys.exit(f"{options.directory} holds the logs of another task, size or seed: name another DIRECTORY")
        if not records:
            sys.exit(f"{name}: the service failed every rollout; dsec show {options.directory / mode} says how")
        table.add_row(*row(name, limits, records))
    Console(width=110).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", default="bug-1-000", help="a bundled task")
    parser.add_argument("directory", nargs="?", type=Path, default=Path("runs/three-modes"), help="for the logs")
    parser.add_argument("--group-size", type=int, default=4, help="rollouts of each mode")
    parser.add_argument("--seed", type=int, default=7)
    sys.tracebacklimit = 0  # what cannot be asked for is said in a sentence
    asyncio.run(main(parser.parse_args()))
