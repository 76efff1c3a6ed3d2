"""A service whose model and sandboxes do as a test says, a step at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dsec.testing import FakeHost, FakeSandbox, FakeSubstrate
from dsec.types import Command, ExecResult, Output
from rollout.bench.tasks import Task, task_from_files
from rollout.config import RolloutConfig
from rollout.engines.testing import EngineFault, MisbehavingEngine
from rollout.events import Event, RolloutFinished
from rollout.jobs import make_conversation, make_job
from rollout.main import load_tokenizer
from rollout.record import TrajectoryRecord, trajectory_record
from rollout.request import Job, NoReward
from rollout.service import RolloutService
from rollout.testing import Reply
from wal.tokens import TokensAppended

TOKENIZER = load_tokenizer()
PATIENCE_S = 60
DONE = Reply(reasoning="Good.", content="Done.")


def task(name: str) -> Task:
    files = {
        "task.toml": b"",
        "instruction.md": name.encode(),
        "environment/Dockerfile": b"FROM debian:bookworm-slim\nWORKDIR /app\n",
        "tests/test.sh": b"#!/bin/bash\n",
    }
    return task_from_files(name, files)


@dataclass
class World:
    """A service whose model and sandboxes do as a test says; `events` is what became durable, in order."""

    directory: Path
    config: dict[str, Any]
    script: Callable[[str, int], Reply] = lambda _session, _turn: DONE
    fault: EngineFault | None = None
    make_engine: Callable[[], Any] | None = None
    host: FakeHost = field(default_factory=FakeHost)
    events: list[Event] = field(default_factory=list)
    tool_may_end: asyncio.Event = field(default_factory=asyncio.Event)
    tools_count: int = 0
    happened: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, _sandbox: FakeSandbox, command: Command) -> ExecResult:
        said = " ".join(command.argv)
        if said == "bash -c look":
            self.tools_count += 1
            self.happened.set()
            await self.tool_may_end.wait()
            return ExecResult(exit_code=0, stdout=Output(b"seen"))
        return ExecResult(exit_code=0, stdout=Output(b"reward.txt\n1\n" if "reward" in said else b""))

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[RolloutService]:
        make_double = partial(MisbehavingEngine, TOKENIZER, self.script, self.fault)
        self.engine = (self.make_engine or make_double)()
        config = RolloutConfig(**{"log_sync": "os", **self.config})
        substrate = FakeSubstrate(self.answer, self.host)
        async with (
            asyncio.timeout(PATIENCE_S),
            RolloutService(self.directory, self.engine, substrate, TOKENIZER, config, observe=self.see) as service,
        ):
            self.service = service
            await service.start()
            yield service

    def see(self, event: Event) -> None:
        self.events.append(event)
        self.happened.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.happened.clear()
            await self.happened.wait()

    async def submit(self, request_id: str, *names: str, group_size: int = 1, **asked: Any) -> None:
        tasks = [task(name) for name in names]
        prefix = f"{request_id}/"
        job = make_job(Job(request_id=request_id, **asked), tasks, group_size=group_size, group_prefix=prefix)
        await self.service.submit(job, tasks)

    async def ask(self, request_id: str, count: int, **asked: Any) -> None:
        """Conversations: no sandbox, no reward."""
        prompts = [
            make_conversation(str(number), messages_json='[{"role": "user", "content": "Go."}]')
            for number in range(count)
        ]
        job = make_job(Job(request_id=request_id, reward=NoReward(), **asked), prompts, group_prefix=f"{request_id}/")
        await self.service.submit(job, prompts)

    def record(self, rollout_id: str) -> TrajectoryRecord:
        return trajectory_record(self.service.ledger, rollout_id)

    def ended(self) -> list[str]:
        return [event.rollout_id for event in self.events if isinstance(event, RolloutFinished)]

    def chunks_count(self) -> int:
        return sum(isinstance(event, TokensAppended) for event in self.events)

    def sampled(self, rollout_id: str) -> int:
        return sum(len(e.token_ids) for e in self.events if isinstance(e, TokensAppended) and e.request == rollout_id)


@pytest.fixture
def world(tmp_path: Path) -> Callable[..., World]:
    def make(script: Callable[[str, int], Reply] = lambda _session, _turn: DONE, **config: Any) -> World:
        return World(tmp_path / "run", config, script)

    return make
