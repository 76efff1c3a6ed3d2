"""What the service costs beside the engine: many rollouts at once, against the same requests made to the engine alone.

The rollouts are conversations (one turn, no environment), so that sampling is the work and everything else is overhead:
scheduling, the log (synced), the machine, the record.  Both sides draw the very same tokens, in turns of this script.
What the service costs is the processor time of the process without that of the engine's own threads, less the same of
the engine alone (its asyncio face); `share` is that beside all processor time.  Part of it is for each rollout and not
for each token: see with `--tokens`.  `--sync` names the policy of the log; bytes are what the log grew by.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from plots import panels
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dsec.testing import FakeSubstrate
from rollout import context
from rollout.config import RolloutConfig
from rollout.engine import SampleRequest, Sampling
from rollout.engines.embedded.engine import EmbeddedEngine
from rollout.events import Event, RolloutFinished, RolloutOpened
from rollout.jobs import make_conversation, make_job
from rollout.machine import stream_key
from rollout.main import load_tokenizer
from rollout.request import Job, Limits, NoReward
from rollout.service import RolloutService
from toolcall_dsl import V4

EXAMPLE = "example: python benchmarks/rollout_throughput.py --at-once 1 16 64 256 512 --repeats 3"
PROMPT = make_conversation("story", messages_json='[{"role": "user", "content": "Tell me a story."}]')
SAMPLING = Sampling(temperature=10.0, seed=1)
TOKENIZER = load_tokenizer()
TOKENS = 96


class Clock:
    """Seconds since it was made: of the wall; of processors the loop's, the engine's and helpers', all threads'."""

    def __init__(self) -> None:
        """The engine is open."""
        threads = [thread for thread in threading.enumerate() if thread.name == "embedded-engine"]
        self._engine = time.pthread_getcpuclockid(threads[0].ident or 0)
        tasks = Path("/proc/self/task").iterdir()
        self._helpers = [task for task in tasks if (task / "comm").read_text() == "engine-helper\n"]
        self.began = self._now()

    def _now(self) -> tuple[float, ...]:
        engine = time.clock_gettime(self._engine)
        for task in self._helpers:  # nanoseconds on a processor come first
            engine += int((task / "schedstat").read_text().split()[0]) / 1e9
        return time.monotonic(), time.thread_time(), engine, time.process_time()

    def read(self) -> dict[str, float]:
        """All of them, and what of the process was not the engine."""
        wall, loop, engine, process = (now - began for now, began in zip(self._now(), self.began, strict=True))
        return {"wall_s": wall, "loop_s": loop, "engine_s": engine, "process_s": process, "beside_s": process - engine}


async def of_the_service(at_once: int, tokens_count: int, sync: str) -> dict[str, Any]:
    """`at_once` rollouts through the service."""
    began: dict[str, float] = {}
    took: list[float] = []

    def observe(event: Event) -> None:
        if isinstance(event, RolloutOpened):
            began[event.rollout_id] = time.monotonic()
        elif isinstance(event, RolloutFinished):
            took.append(time.monotonic() - began[event.rollout_id])

    limits = Limits(turns_count_max=1, turn_tokens_count_max=tokens_count)
    job = make_job(
        Job(request_id="r", sampling=SAMPLING, limits=limits, reward=NoReward()), [PROMPT], group_size=at_once
    )
    config = RolloutConfig(concurrency=at_once, log_sync=sync)
    with tempfile.TemporaryDirectory() as folder:
        engine, substrate = EmbeddedEngine(), FakeSubstrate()
        async with RolloutService(Path(folder), engine, substrate, TOKENIZER, config, observe=observe) as service:
            await service.start()
            clock = Clock()
            await service.submit(job, [PROMPT])
            await service.wait("r")
            figures: dict[str, Any] = clock.read()
            tokens = sum(state.sampled_count for state in service.ledger.rollouts.values())
        size = sum(file.stat().st_size for file in Path(folder, "wal").glob("*.wal"))
    figures |= {"tokens": tokens, "rollout_s": sorted(took), "log_bytes": size}
    return figures


async def of_the_engine(at_once: int, tokens_count: int) -> dict[str, Any]:
    """The same requests, made to the engine."""
    prompt = tuple(t for s in context.conversation_prompt(PROMPT, TOKENIZER, "high") for t in s.token_ids)
    engine, took = EmbeddedEngine(), []

    async def one(name: str) -> int:
        began, count = time.monotonic(), 0
        request = SampleRequest(
            session=name,
            token_ids=prompt,
            sampling=SAMPLING,
            stream_key=stream_key(name),
            tokens_count_max=tokens_count,
            stop_ids=frozenset({TOKENIZER.control(V4.eos)}),
        )
        async for chunk in engine.sample(request):
            count += len(chunk.token_ids)
        await engine.release(name)
        took.append(time.monotonic() - began)
        return count

    await engine.open()
    clock = Clock()
    counts = await asyncio.gather(*(one(f"story.{n}") for n in range(at_once)))
    figures: dict[str, Any] = clock.read()
    await engine.close()
    return {**figures, "tokens": sum(counts), "rollout_s": sorted(took), "log_bytes": 0}


def row_of(at_once: int, service: list[dict[str, Any]], engine: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the repeats, and the service beside the engine."""

    def middle(runs: list[dict[str, Any]], figure: str) -> float:
        return float(statistics.median(run[figure] for run in runs))

    def per_token(runs: list[dict[str, Any]], figure: str) -> float:
        return float(statistics.median(run[figure] / run["tokens"] for run in runs))

    ratios = [s["tokens"] / s["wall_s"] / (e["tokens"] / e["wall_s"]) for s, e in zip(service, engine, strict=True)]
    beside = [s["beside_s"] / s["tokens"] - e["beside_s"] / e["tokens"] for s, e in zip(service, engine, strict=True)]
    shares = [mine / run["process_s"] * run["tokens"] for mine, run in zip(beside, service, strict=True)]
    last = [run["rollout_s"][min(len(run["rollout_s"]) - 1, int(0.99 * len(run["rollout_s"])))] for run in service]
    return {
        "at_once": at_once,
        "tokens": middle(service, "tokens"),
        "rollouts_per_s": statistics.median(at_once / run["wall_s"] for run in service),
        "tokens_per_s": statistics.median(run["tokens"] / run["wall_s"] for run in service),
        "engine_tokens_per_s": statistics.median(run["tokens"] / run["wall_s"] for run in engine),
        "ratio": statistics.median(ratios),
        "p99_s": statistics.median(last),
        "cpu_us_per_token": 1e6 * per_token(service, "process_s"),
        "engine_cpu_us_per_token": 1e6 * per_token(engine, "process_s"),
        "service_cpu_us_per_token": 1e6 * statistics.median(beside),
        "service_cpu_share": statistics.median(shares),
        "loop_cpu_us_per_token": 1e6 * per_token(service, "loop_s"),
        "log_bytes_per_token": statistics.median(run["log_bytes"] / run["tokens"] for run in service),
    }


def draw(rows: list[dict[str, Any]], path: Path, tokens_count: int) -> None:
    """Speed, the slowest, and what the service costs, over how many run at once."""

    def column(name: str, factor: float = 1) -> list[float]:
        return [factor * row[name] for row in rows]

    drawn = {
        "tokens/s": {"the service": column("tokens_per_s"), "the engine alone": column("engine_tokens_per_s")},
        "rollouts/s": {"the service": column("rollouts_per_s")},
        "slowest of a hundred (p99), s": {"the service": column("p99_s")},
        "service's part of the processor time, %": {"the service": column("service_cpu_share", 100)},
    }
    panels(path, "rollouts at once", column("at_once"), drawn, title=f"rollouts of at most {tokens_count} tokens")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=EXAMPLE)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 16, 64, 256, 512])
    parser.add_argument("--tokens", type=int, default=TOKENS, help="the most that a rollout samples")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sync", default="always", help="when the log is synced: always, interval(MS), os")
    parser.add_argument("--quick", action="store_true", help="1 and 64 at once, one repeat")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--figure", type=Path, help="where to draw the picture")
    options = parser.parse_args()
    if options.quick:
        options.at_once, options.repeats = [1, 64], 1
    rows = []
    with Progress(console=Console(stderr=True), disable=options.json) as progress:
        bar = progress.add_task("rounds", total=len(options.at_once) * options.repeats)
        for at_once in options.at_once:
            runs: dict[str, list[dict[str, Any]]] = {"service": [], "engine": []}
            for _ in range(options.repeats):
                runs["service"].append(asyncio.run(of_the_service(at_once, options.tokens, options.sync)))
                runs["engine"].append(asyncio.run(of_the_engine(at_once, options.tokens)))
                progress.advance(bar)
            rows.append(row_of(at_once, runs["service"], runs["engine"]))
    if options.figure is not None:
        draw(rows, options.figure, options.tokens)
    if options.json:
        print(json.dumps({"sync": options.sync, "tokens": options.tokens, "rows": rows}))
        return
    names = {
        "rollouts_per_s": "rollouts/s",
        "p99_s": "p99, s",
        "tokens_per_s": "tokens/s",
        "engine_tokens_per_s": "engine alone",
        "ratio": "ratio",
        "cpu_us_per_token": "CPU us/token",
        "service_cpu_us_per_token": "of it the service",
        "service_cpu_share": "share",
        "loop_cpu_us_per_token": "loop us/token",
        "log_bytes_per_token": "log B/token",
    }
    title = f"at most {options.tokens} tokens each, log synced: {options.sync}"
    table = Table("at once", *(str(row["at_once"]) for row in rows), title=title)
    for name, label in names.items():
        table.add_row(label, *(f"{row[name]:,.2f}" for row in rows))
    Console().print(table)


if __name__ == "__main__":
    main()
