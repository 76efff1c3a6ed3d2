"""How long a rollout stands still when its process is killed, and what is then done again, against starting anew.

A log is written whose only rollout has sampled up to a given length, in mid-turn.  Then, again and again: a
process is started on it, goes on, and is stopped as soon as one *new* token is durable: by SIGKILL (`killed`: the KV
cache is computed again from the logged tokens) or by a preemption (`preempted`: the cache is saved and restored).
`restarted` is what a service does that has no log of tokens (or only of turns, or only in memory): it draws the lost
tokens of the turn again.  Times are of one machine's clock, from the start of the process: loading Python and this
package, folding the log, loading the checkpoint, and from there to the first new token, prefill included.  The
temperature is so high that the model seldom ends its turn; a restart that it does end is tried with the next seed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dsec.testing import FakeSubstrate
from rollout.config import RolloutConfig
from rollout.engine import EngineInfo, Sampling
from rollout.engines.embedded.engine import EmbeddedEngine
from rollout.events import Event, RolloutFinished, RolloutOpened, RolloutResumed
from rollout.jobs import make_conversation, make_job
from rollout.main import load_tokenizer
from rollout.request import Job, Limits, NoReward
from rollout.service import RolloutService
from rollout.testing import Reply, ScriptedEngine, reply_ids
from wal.tokens import TokensAppended

EXAMPLE = "example: python benchmarks/recovery.py --lengths 250 500 1000 1500 --repeats 20"
CONFIG = RolloutConfig(concurrency=1)
MESSAGES = '[{"role": "user", "content": "Tell me a story."}]'
WAYS = ("killed", "preempted", "restarted")
SEEDS_COUNT_MAX = 50
STAGES = ("python", "log", "engine", "first token")


class AsTheEngine(ScriptedEngine):
    """The double under the embedded engine's name: it writes the log that the real one goes on with."""

    as_info: EngineInfo

    @property
    def info(self) -> EngineInfo:
        """The embedded engine's."""
        return self.as_info


def job_of(seed: int) -> tuple[Job, Any]:
    """One story."""
    prompt = make_conversation("story", messages_json=MESSAGES)
    limits = Limits(turns_count_max=1, turn_tokens_count_max=2000)
    asked = Job(request_id="story", sampling=Sampling(temperature=10.0, seed=seed), limits=limits, reward=NoReward())
    return make_job(asked, [prompt]), prompt


async def write_log(directory: Path, length: int) -> int:
    """A log in which the rollout's context is `length` tokens long, in mid-turn; returns how many were sampled."""
    tokenizer, engine = load_tokenizer(), EmbeddedEngine()
    await engine.open()
    info = engine.info
    await engine.close()
    words = Reply(reasoning="one two three four five six seven eight nine ten " * 400)
    assert len(reply_ids(words, tokenizer)) > length
    double = AsTheEngine(tokenizer, lambda _session, _turn: words, chunk_tokens_count=1)
    double.as_info = info
    done, sampled = asyncio.Event(), 0

    def observe(event: Event) -> None:
        nonlocal sampled
        if isinstance(event, TokensAppended):
            sampled += len(event.token_ids)
            if event.start + len(event.token_ids) >= length:
                done.set()

    async with RolloutService(directory, double, FakeSubstrate(), tokenizer, CONFIG, observe=observe) as service:
        await service.start()
        job, prompt = job_of(seed=1)
        await service.submit(job, [prompt])
        await done.wait()
    return sampled


async def work(directory: Path, ends: str, lost_count: int, seed: int) -> None:
    """One process: go on, say when a token that nobody had seen before is durable, and end as asked."""
    stamps: dict[str, float] = {"python": time.monotonic()}
    over, seen = asyncio.Event(), 0

    def observe(event: Event) -> None:
        nonlocal seen
        match event:
            case RolloutOpened() | RolloutResumed():
                stamps["engine"] = time.monotonic()
            case TokensAppended():
                seen += len(event.token_ids)
                if seen > lost_count and not over.is_set():
                    stamps["first token"] = time.monotonic()
                    over.set()
                    print(json.dumps(stamps), flush=True)
                    if ends == "by a kill":
                        os.kill(os.getpid(), signal.SIGKILL)
            case RolloutFinished():
                over.set()

    tokenizer, engine = load_tokenizer(), EmbeddedEngine()
    async with RolloutService(directory, engine, FakeSubstrate(), tokenizer, CONFIG, observe=observe) as service:
        stamps["log"] = time.monotonic()
        await service.start()
        if not service.ledger.jobs:
            job, prompt = job_of(seed)
            await service.submit(job, [prompt])
        await over.wait()
        if ends == "by a preemption":
            await service.preempt()


def timed(directory: Path, ends: str, lost_count: int = 0, seed: int = 1) -> dict[str, float] | None:
    """Seconds of each stage of one process; None if the model ended its turn before."""
    began = time.monotonic()
    argv = [sys.executable, __file__, "--work", str(directory), ends, str(lost_count), str(seed)]
    keeps_bytecode = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    ran = subprocess.run(argv, check=False, capture_output=True, text=True, env=keeps_bytecode)
    if ran.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"a process failed:\n{ran.stderr}")
    if not ran.stdout:
        return None
    stamps = [began, *(json.loads(ran.stdout)[stage] for stage in STAGES)]
    return {stage: stamps[n + 1] - stamps[n] for n, stage in enumerate(STAGES)}


def once(how: str, log: Path, scratch: Path, sampled: int) -> dict[str, float] | None:
    """One recovery of a copy of the log."""
    shutil.rmtree(scratch, ignore_errors=True)
    if how == "restarted":
        for seed in range(1, SEEDS_COUNT_MAX):
            if (stages := timed(scratch, "by a kill", sampled, seed)) is not None:
                return stages
            shutil.rmtree(scratch)
        return None
    shutil.copytree(log, scratch)
    if how == "preempted":
        timed(scratch, "by a preemption")
    return timed(scratch, "by a kill")


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each length and way to go on, the ways taking turns."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True), disable=options.json) as bar:
        task = bar.add_task("recoveries", total=len(options.lengths) * options.repeats * len(WAYS))
        for length in options.lengths:
            log, scratch = Path(folder) / f"{length}", Path(folder) / "scratch"
            sampled = asyncio.run(write_log(log, length))
            times: dict[str, list[dict[str, float]]] = {how: [] for how in WAYS}
            for _ in range(options.repeats):
                for how in WAYS:
                    if (stages := once(how, log, scratch, sampled)) is not None:
                        times[how].append(stages)
                    bar.advance(task)
            rows += [row_of(how, length, sampled, each) for how, each in times.items() if each]
    return rows


def row_of(how: str, length: int, sampled: int, times: list[dict[str, float]]) -> dict[str, Any]:
    """Medians; the whole also at its worst."""
    whole = sorted(sum(stages.values()) for stages in times)
    return {
        "how": how,
        "length": length,
        "tokens_drawn_again": sampled if how == "restarted" else 0,
        "runs": len(times),
        "p50_s": statistics.median(whole),
        "max_s": whole[-1],
        **{f"{stage}_s": statistics.median(each[stage] for each in times) for stage in STAGES},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=EXAMPLE)
    parser.add_argument("--lengths", type=int, nargs="+", default=[250, 500, 1000, 1500])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="two lengths, three times")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--figure", type=Path, help="where to draw the picture")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        directory, ends, lost_count, seed = options.work
        asyncio.run(work(Path(directory), ends, int(lost_count), int(seed)))
        return
    if options.quick:
        options.lengths, options.repeats = [250, 1500], 3
    rows = measure(options)
    if options.figure is not None:
        draw(rows, options.figure)
    if options.json:
        print(json.dumps({"rows": rows}))
        return
    table = Table("", "context", "drawn again", "runs", "p50, s", "max, s", *STAGES)
    for row in rows:
        shown = [f"{row[name]:.2f}" for name in ("p50_s", "max_s", *(f"{stage}_s" for stage in STAGES))]
        table.add_row(row["how"], str(row["length"]), str(row["tokens_drawn_again"]), str(row["runs"]), *shown)
    Console().print(table)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds against the length of the context, a line for each way to go on."""
    import matplotlib.pyplot as plt

    plot, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    colours = {"killed": "#1b9e77", "preempted": "#7570b3", "restarted": "#d95f02"}
    for how, colour in colours.items():
        mine = [row for row in rows if row["how"] == how]
        axes.plot([row["length"] for row in mine], [row["p50_s"] for row in mine], "o-", color=colour, label=how)
    axes.set(
        xlabel="context when the process was killed, tokens",
        ylabel="to the first new token, s (median)",
        ylim=(0, None),
    )
    axes.grid(visible=True, alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    plot.savefig(path)


if __name__ == "__main__":
    main()
