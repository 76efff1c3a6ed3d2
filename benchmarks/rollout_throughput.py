"""What the service costs beside the engine: many rollouts at once, against the same requests made to the engine alone.

The rollouts are conversations (one turn, no environment), so that sampling is the work and everything else is overhead:
scheduling, the log (synced), the machine, the record.  Both sides draw the very same tokens, in turns of this script.
The service is all processor time of the process but that of the engine's own threads (the one that steps, with what
batches and samples there, and its helpers); `share` is that beside the whole.  What of it is for each rollout and not
for its tokens is told by rollouts of one token each.  `--sync` names the policy of the log; bytes are what it grew by.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import threading
import time
from contextlib import suppress
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

EXAMPLE = "example: python benchmarks/rollout_throughput.py --at-once 64 256 --tokens 96 512 --repeats 3"
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
        self.began = self._now()

    def _now(self) -> tuple[float, ...]:
        engine = time.clock_gettime(self._engine)
        for task in Path("/proc/self/task").iterdir():  # a helper that has no name yet has done nothing yet
            with suppress(FileNotFoundError):  # a thread that has ended
                if (task / "comm").read_text() == "engine-helper\n":  # nanoseconds on a processor come first
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


def row_of(
    at_once: int, tokens_max: int, service: list[dict[str, Any]], engine: list[dict[str, Any]], rollout_us: float
) -> dict[str, Any]:
    """Medians over the repeats, and the service beside the engine; `rollout_us`: what one of a single token costs."""

    def middle(runs: list[dict[str, Any]], figure: str, of: str = "tokens") -> float:
        return float(statistics.median(run[figure] / run[of] for run in runs))

    ratios = [s["tokens"] / s["wall_s"] / (e["tokens"] / e["wall_s"]) for s, e in zip(service, engine, strict=True)]
    last = [run["rollout_s"][min(at_once - 1, int(0.99 * at_once))] for run in service]
    tokens = statistics.median(run["tokens"] for run in service) / at_once
    return {
        "at_once": at_once,
        "tokens_max": tokens_max,
        "tokens": tokens,
        "rollouts_per_s": statistics.median(at_once / run["wall_s"] for run in service),
        "tokens_per_s": middle(service, "tokens", "wall_s"),
        "engine_tokens_per_s": middle(engine, "tokens", "wall_s"),
        "ratio": statistics.median(ratios),
        "p99_s": statistics.median(last),
        "cpu_us_per_token": 1e6 * middle(service, "process_s"),
        "service_cpu_us_per_token": 1e6 * middle(service, "beside_s"),
        "service_cpu_us_per_rollout": rollout_us,
        "service_cpu_us_per_token_by_rollouts": rollout_us / tokens,
        "service_cpu_share": middle(service, "beside_s", "process_s"),
        "loop_cpu_us_per_token": 1e6 * middle(service, "loop_s"),
        "log_bytes_per_token": middle(service, "log_bytes"),
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed, the slowest, and what the service costs, over how many run at once."""
    lengths = sorted({row["tokens_max"] for row in rows})

    def columns(name: str, factor: float = 1) -> dict[str, list[float]]:
        return {
            f"at most {length} tokens each": [factor * row[name] for row in rows if row["tokens_max"] == length]
            for length in lengths
        }

    drawn = {
        "tokens/s": columns("tokens_per_s")
        | {f"{label}, the engine alone": values for label, values in columns("engine_tokens_per_s").items()},
        "rollouts/s": columns("rollouts_per_s"),
        "slowest of a hundred (p99), s": columns("p99_s"),
        "service's part of the processor time, %": columns("service_cpu_share", 100),
    }
    at_once = [row["at_once"] for row in rows if row["tokens_max"] == lengths[0]]
    panels(path, "rollouts at once", at_once, drawn, title="what the service costs beside the engine")


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of rollouts at once and each length; those of the longest take the fewest turns."""
    rows = []
    with Progress(console=Console(stderr=True), disable=options.json) as progress:
        bar = progress.add_task("loads", total=len(options.at_once) * len(options.tokens))
        for tokens_max in options.tokens:
            for at_once in options.at_once:
                short = [asyncio.run(of_the_service(at_once, 1, options.sync)) for _ in range(options.repeats)]
                rollout_us = 1e6 * statistics.median(run["beside_s"] / at_once for run in short)
                runs: dict[str, list[dict[str, Any]]] = {"service": [], "engine": []}
                for _ in range(max(1, options.repeats * min(options.tokens) // tokens_max)):
                    runs["service"].append(asyncio.run(of_the_service(at_once, tokens_max, options.sync)))
                    runs["engine"].append(asyncio.run(of_the_engine(at_once, tokens_max)))
                rows.append(row_of(at_once, tokens_max, runs["service"], runs["engine"], rollout_us))
                progress.advance(bar)
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=EXAMPLE)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 16, 64, 256, 512])
    parser.add_argument("--tokens", type=int, nargs="+", default=[TOKENS, 512], help="the most that a rollout samples")
    parser.add_argument("--repeats", type=int, default=3, help="of the shortest; longer ones in proportion fewer")
    parser.add_argument("--sync", default="always", help="when the log is synced: always, interval(MS), os")
    parser.add_argument("--quick", action="store_true", help="1 and 64 at once, one repeat")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--figure", type=Path, help="where to draw the picture")
    options = parser.parse_args()
    if options.quick:
        options.at_once, options.repeats = [1, 64], 1
    rows = measure(options)
    if options.figure is not None:
        draw(rows, options.figure)
    if options.json:
        print(json.dumps({"sync": options.sync, "rows": rows}))
        return
    names = {
        "tokens": ("tokens each", ".0f"),
        "rollouts_per_s": ("rollouts/s", ".1f"),
        "p99_s": ("p99 of a rollout, s", ".2f"),
        "tokens_per_s": ("tokens/s", ",.0f"),
        "engine_tokens_per_s": ("of the engine alone", ",.0f"),
        "ratio": ("ratio", ".2f"),
        "cpu_us_per_token": ("CPU us/token", ".0f"),
        "service_cpu_us_per_token": ("of it the service", ".1f"),
        "service_cpu_us_per_token_by_rollouts": ("of that for the rollout", ".1f"),
        "service_cpu_us_per_rollout": ("us/rollout of 1 token", ".0f"),
        "service_cpu_share": ("the service's share", ".1%"),
        "log_bytes_per_token": ("log B/token", ".1f"),
    }
    title = f"log synced: {options.sync}"
    table = Table("at once, tokens at most", *(f"{row['at_once']}, {row['tokens_max']}" for row in rows), title=title)
    for name, (label, shape) in names.items():
        table.add_row(label, *(format(row[name], shape) for row in rows))
    Console(width=None if Console().is_terminal else 160).print(table)


if __name__ == "__main__":
    main()
