"""Bit equality: rollouts whose process is killed after every k-th token, against the same rollouts never killed.

For each k, one process after another goes on with the same log and kills itself with SIGKILL as soon as k tokens that
nobody had seen before are durable, until all have ended; the engine draws a token a step then, and many a step for
those never killed.  Compared are token ids, the bits of the logprobs, and how each ended; counted are kills, tokens
drawn again, and the prompt and logged tokens that were fed to the model again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from plots import panels
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dsec.testing import FakeSubstrate
from rollout.config import RolloutConfig
from rollout.engine import Sampling
from rollout.engines.embedded import batching
from rollout.engines.embedded.engine import EmbeddedEngine
from rollout.events import Event
from rollout.generation import drawn_ids
from rollout.jobs import make_conversation, make_job
from rollout.ledger import Ledger
from rollout.main import load_tokenizer
from rollout.request import Job, Limits, NoReward
from rollout.service import RolloutService
from wal.tokens import TokensAppended

EXAMPLE = "example: python benchmarks/kill_every.py --tokens 1 2 3 5 8 13 21 --rollouts 4"
JOB = "story"
PROMPT = make_conversation(JOB, messages_json='[{"role": "user", "content": "Tell me a story."}]')
LIMITS = Limits(turns_count_max=1, turn_tokens_count_max=64)
SAMPLING = Sampling(temperature=2.0, seed=1)


async def work(directory: Path, rollouts: int, kill_after: int) -> None:
    """One process: go on with what the log has, and die after so many new tokens (0: never)."""
    left = kill_after

    def observe(event: Event) -> None:
        nonlocal left
        if kill_after and isinstance(event, TokensAppended):
            left -= len(event.token_ids)
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    config = RolloutConfig(concurrency=rollouts)
    engine = EmbeddedEngine(limits=batching.Limits(rounds_max=1) if kill_after else None)
    service = RolloutService(directory, engine, FakeSubstrate(), load_tokenizer(), config, observe=observe)
    async with service:
        await service.start()
        asked = Job(request_id=JOB, sampling=SAMPLING, limits=LIMITS, reward=NoReward(), parse_policy="tolerant")
        await service.submit(make_job(asked, [PROMPT], group_size=rollouts), [PROMPT])
        await service.wait(JOB)


def to_the_end(directory: Path, rollouts: int, kill_after: int) -> int:
    """Process after process until all is done; returns how many were killed."""
    kills = 0
    while True:
        argv = [sys.executable, __file__, "--work", str(directory), str(rollouts), str(kill_after)]
        ended = subprocess.run(argv, check=False, stderr=subprocess.PIPE)
        if ended.returncode == 0:
            return kills
        if ended.returncode != -signal.SIGKILL:
            raise SystemExit(f"a worker failed:\n{ended.stderr.decode()}")
        kills += 1


def outcomes(ledger: Ledger) -> dict[str, tuple[object, ...]]:
    """What must be equal to the last bit, of each rollout."""
    return {
        name: (drawn_ids(state), struct.pack(f"<{len(state.logprobs)}f", *state.logprobs), state.reason)
        for name, state in ledger.rollouts.items()
    }


def row_of(kill_after: int, kills: int, ledger: Ledger, never: dict[str, tuple[object, ...]]) -> dict[str, Any]:
    """What came of one k."""
    mine = outcomes(ledger)
    return {
        "kill_after_tokens": kill_after,
        "kills": kills,
        "rollouts": len(never),
        "tokens": sum(state.sampled_count for state in ledger.rollouts.values()),
        "equal_in_every_bit": sum(mine.get(name) == outcome for name, outcome in never.items()),
        "tokens_drawn_again": ledger.tokens_regenerated.total(),
        "tokens_fed_again": sum(sum(state.resumed_at) for state in ledger.rollouts.values()),
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """What is equal, and what each way of killing cost, over k."""
    drawn = {
        "of all bits equal, %": {"": [100 * row["equal_in_every_bit"] / row["rollouts"] for row in rows]},
        "kills": {"": [row["kills"] for row in rows]},
        "tokens, beside those drawn": {
            "fed again": [row["tokens_fed_again"] for row in rows],
            "drawn again": [row["tokens_drawn_again"] for row in rows],
        },
    }
    over = [row["kill_after_tokens"] for row in rows]
    panels(path, "killed after every k-th token", over, drawn, title=f"{rows[0]['rollouts']} rollouts at once")


def main() -> int:
    """Run, print, and fail if a single bit differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=EXAMPLE)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 3, 5, 8, 13, 21, 34], help="each k")
    parser.add_argument("--rollouts", type=int, default=4, help="at once, in one process")
    parser.add_argument("--quick", action="store_true", help="k of 8 and 32")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--figure", type=Path, help="where to draw the picture")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        directory, rollouts, kill_after = options.work
        asyncio.run(work(Path(directory), int(rollouts), int(kill_after)))
        return 0
    if options.quick:
        options.tokens = [8, 32]
    rows: list[dict[str, Any]] = []
    never: dict[str, tuple[object, ...]] = {}
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True), disable=options.json) as bar:
        task = bar.add_task("kills", total=1 + len(options.tokens))
        for kill_after in (0, *options.tokens):
            directory = Path(folder) / str(kill_after)
            kills = to_the_end(directory, options.rollouts, kill_after)
            ledger = Ledger.read(directory / "wal", load_tokenizer())
            if kill_after == 0:
                never = outcomes(ledger)
            rows.append(row_of(kill_after, kills, ledger, never))
            bar.advance(task)
    if options.figure is not None:
        draw(rows[1:], options.figure)
    if options.json:
        print(json.dumps({"rows": rows}))
    else:
        table = Table(*(name.replace("_", " ") for name in rows[0]))
        for row in rows:
            table.add_row(*map(str, row.values()))
        Console().print(table)
    good = all(row["equal_in_every_bit"] == row["rollouts"] and not row["tokens_drawn_again"] for row in rows)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
