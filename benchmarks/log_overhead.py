"""What the log costs a decode: rollouts with the log synced at every commit, now and then, never, and with no log.

The tokens are the same on all sides, which take turns; `without` keeps everything else of the service (machine, ledger,
watchers) and drops the records.  Overhead is wall time and processor time a token beside `without`, the latter without
the engine's own thread, which does the same on all sides but not in the same time; bytes are what the log grew by a
token, beside the same tokens and logprobs as JSON text.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from plots import bars
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rollout_throughput import PROMPT, SAMPLING, TOKENIZER, TOKENS, Clock

from dsec.testing import FakeSubstrate
from rollout.config import RolloutConfig
from rollout.engines.embedded.engine import EmbeddedEngine
from rollout.generation import drawn_ids
from rollout.jobs import make_job
from rollout.request import Job, Limits, NoReward
from rollout.service import RolloutService

EXAMPLE = "example: python benchmarks/log_overhead.py --at-once 32 --repeats 8"
POLICIES = ("always", "interval(5)", "os", "without")


class Nowhere:
    """A log that forgets."""

    def __init__(self) -> None:
        self.last = 0

    def has_room(self) -> bool:
        """Always."""
        return True

    def admit(self, _kind: int, _payload: bytes) -> tuple[int, asyncio.Future[None]]:
        """The next lsn, and that it is durable."""
        self.last += 1
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        durable.set_result(None)
        return self.last, durable

    async def close(self) -> None:
        """Nothing was opened."""


async def run(policy: str, at_once: int) -> dict[str, Any]:
    """One job of so many rollouts."""
    limits = Limits(turns_count_max=1, turn_tokens_count_max=TOKENS)
    asked = Job(request_id="r", sampling=SAMPLING, limits=limits, reward=NoReward())
    job = make_job(asked, [PROMPT], group_size=at_once)
    config = RolloutConfig(concurrency=at_once, log_sync="os" if policy == "without" else policy)
    with tempfile.TemporaryDirectory() as folder:
        service = RolloutService(Path(folder), EmbeddedEngine(), FakeSubstrate(), TOKENIZER, config)
        async with service:
            if policy == "without":
                await service.journal._commit.close()  # noqa: SLF001 - there is no other way to take it away
                service.journal._commit = Nowhere()  # type: ignore[assignment]  # noqa: SLF001
            await service.start()
            clock = Clock()
            await service.submit(job, [PROMPT])
            await service.wait("r")
            figures: dict[str, Any] = clock.read()
            states = list(service.ledger.rollouts.values())
        size = sum(file.stat().st_size for file in Path(folder, "wal").glob("*.wal"))
    tokens = sum(state.sampled_count for state in states)
    text = sum(len(json.dumps({"ids": drawn_ids(state), "logprobs": state.logprobs})) for state in states)
    return {name: value / tokens for name, value in figures.items()} | {"bytes": size / tokens, "json": text / tokens}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=EXAMPLE)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="two repeats of 8")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--figure", type=Path, help="where to draw the picture")
    options = parser.parse_args()
    if options.quick:
        options.at_once, options.repeats = 8, 2
    runs: dict[str, list[dict[str, Any]]] = {policy: [] for policy in POLICIES}
    with Progress(console=Console(stderr=True), disable=options.json) as progress:
        for number in progress.track(range(options.repeats), description="rounds"):
            first = number % len(POLICIES)  # each comes first, and last, as often as the others
            for policy in (*POLICIES[first:], *POLICIES[:first]):
                runs[policy].append(asyncio.run(run(policy, options.at_once)))
    rows = []
    for policy in POLICIES:
        pairs = list(zip(runs[policy], runs["without"], strict=True))
        rows.append(
            {
                "sync": policy,
                "us_per_token": 1e6 * statistics.median(mine["wall_s"] for mine, _ in pairs),
                "wall_overhead": statistics.median(mine["wall_s"] / other["wall_s"] - 1 for mine, other in pairs),
                "cpu_us_per_token": 1e6 * statistics.median(mine["process_s"] for mine, _ in pairs),
                "cpu_overhead": statistics.median(
                    (mine["beside_s"] - other["beside_s"]) / other["process_s"] for mine, other in pairs
                ),
                "bytes_per_token": 0.0 if policy == "without" else statistics.median(m["bytes"] for m, _ in pairs),
                "json_bytes_per_token": statistics.median(mine["json"] for mine, _ in pairs),
            }
        )
    if options.figure is not None:
        logged = rows[:-1]
        series = {
            "wall time": [100 * row["wall_overhead"] for row in logged],
            "processor time": [100 * row["cpu_overhead"] for row in logged],
        }
        title = f"what the log costs {options.at_once} rollouts at once, by when it is synced"
        places = [row["sync"] for row in logged]
        bars(options.figure, places, series, ylabel="% more than without a log", title=title, is_log=False)
    if options.json:
        print(json.dumps({"at_once": options.at_once, "rows": rows}))
        return
    table = Table(*(name.replace("_", " ") for name in rows[0]), title=f"{options.at_once} rollouts at once")
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:.3g}" for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
