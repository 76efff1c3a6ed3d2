"""A task's network in set-up, agent and verifier: in real sandboxes, also over a kill between the phases.

Run as a program it is a run that kills itself with its first event of a kind.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest

from rollout.bench.tasks import Task, task_from_files
from rollout.config import RolloutConfig
from rollout.environment.edge import RunEdge, substrate_config
from rollout.errors import TaskError
from rollout.events import NetworkSwitched, RolloutEvent
from rollout.machine import State
from rollout.main import load_tokenizer
from rollout.request import Group, Job
from rollout.service import RolloutService
from rollout.testing import Reply, ScriptedEngine

Agent = Literal["model", "oracle", "nop"]
FETCH = b"""
import sys, urllib.request
try:
    print(urllib.request.urlopen(sys.argv[1], timeout=20).read().decode())
except OSError:
    print(0)
"""
CHEAT = """export http_proxy=http://127.0.0.1:3128
(while :; do python3 fetch.py $URL/lingering; done) >/dev/null 2>&1 &
python3 fetch.py $URL/agent > agent.txt
"""
"""An agent that asks the proxy of the set-up, and leaves something running that waits for the verifier's network."""
TESTS = b"""
printf '{"reward": 1, "setup": %s, "agent": %s, "verifier": %s}' \\
    "$(cat setup.txt)" "$(cat agent.txt || echo 0)" "$(python3 fetch.py $URL/verifier)" > /logs/verifier/reward.json
"""


def make_task(port: int) -> Task:
    """A task whose set-up and tests may fetch a page (which says 1) of this host, and whose agent may not."""
    where = f'["127.0.0.1/32:{port}", "localhost:{port}"]'
    toml = f"""
[environment]
network_mode = "allowlist"
allowed_hosts = {where}
env = {{URL = "http://localhost:{port}"}}
[agent]
network_mode = "no-network"
"""
    dockerfile = f"""FROM debian:bookworm-slim
WORKDIR /app
COPY fetch.py .
RUN python3 fetch.py http://localhost:{port}/setup > setup.txt
"""
    return task_from_files(
        "fetch",
        {
            "task.toml": toml.encode(),
            "instruction.md": b"Fetch the page.\n",
            "environment/Dockerfile": dockerfile.encode(),
            "environment/fetch.py": FETCH,
            "tests/test.sh": TESTS,
            "solution/solve.sh": CHEAT.encode(),
        },
    )


def script(_session: str, turn: int) -> Reply:
    return Reply(calls=[("bash", {"command": CHEAT})]) if turn == 0 else Reply(content="Done.")


def job_of(task: Task, agent: Agent = "model") -> Job:
    return Job(
        request_id="run", groups=(Group(group_id="fetch", task="fetch", task_digest=task.digest, size=1),), agent=agent
    )


def make_service(directory: Path, port: int, *, is_allowed: bool = True) -> RolloutService:
    rules = f"localhost:{port} 127.0.0.1/32:{port}" if is_allowed else ""
    config = RolloutConfig(concurrency=1, setup_network=rules, verifier_network=rules)
    tokenizer = load_tokenizer()
    edge = RunEdge(directory / "edge", substrate_config(1))
    return RolloutService(directory, ScriptedEngine(tokenizer, script, chunk_tokens_count=8), edge, tokenizer, config)


async def run(directory: Path, port: int, agent: Agent = "model", kill_at: str = "") -> tuple[State, list[str]]:
    """Run or resume to the end; the state, and the phases that were switched to in this process."""
    switched: list[str] = []

    async def follow(events: AsyncIterator[tuple[int, RolloutEvent]]) -> None:
        async for _, event in events:
            name = f"to {event.phase}" if isinstance(event, NetworkSwitched) else type(event).__name__
            if name == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if isinstance(event, NetworkSwitched):
                switched.append(event.phase)

    async with make_service(directory, port) as service:
        if not service.ledger.jobs:
            task = make_task(port)
            await service.submit(job_of(task, agent), [task])
        async with asyncio.TaskGroup() as group:
            await service.start()
            group.create_task(follow(service.watch("run")))
            await service.wait("run")
        return service.ledger.rollouts["fetch.0"], switched


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[int, list[str]]]:
    """A page of this host's loopback: its port, and the paths that were asked for."""
    asked: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        asked.append(head.split()[1].decode())
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: close\r\n\r\n1")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], asked


def decisions(directory: Path) -> list[tuple[str, bool]]:
    lines = (directory / "network.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    return [(line["host"], line["allowed"]) for line in told if not line["is_end"]]


@pytest.mark.parametrize("agent", ["model", "oracle", "nop"])
async def test_a_task_reaches_in_each_phase_what_it_asked_for_and_no_more(tmp_path: Path, agent: Agent) -> None:
    async with serving() as (port, asked):
        state, switched = await run(tmp_path, port, agent)
    assert state.judged is not None, state.failure
    assert state.judged.components == {"reward": 1, "setup": 1, "agent": 0, "verifier": 1}
    assert switched == ["setup", "agent", "verifier"]
    assert asked == ["/setup", "/verifier"]
    told = decisions(tmp_path)
    assert (told[0], told[-1]) == (("localhost", True), ("localhost", True))
    assert set(told[1:-1]) == (set() if agent == "nop" else {("localhost", False)})


@pytest.mark.parametrize("kill_at", ["to setup", "to agent", "SandboxPrepared", "to verifier"])
async def test_a_run_killed_between_two_phases_goes_on_in_the_network_of_the_next(tmp_path: Path, kill_at: str) -> None:
    async with serving() as (port, asked):
        killed = await asyncio.create_subprocess_exec(sys.executable, __file__, tmp_path, str(port), kill_at)
        assert await killed.wait() == -signal.SIGKILL
        state, switched = await run(tmp_path, port)
    assert state.judged is not None, state.failure
    assert state.judged.components == {"reward": 1, "setup": 1, "agent": 0, "verifier": 1}
    assert switched[-1] == "verifier"
    assert sorted(asked) == ["/setup", "/verifier"]


async def test_a_task_that_asks_for_more_than_the_operator_allows_is_refused_before_anything_runs(
    tmp_path: Path,
) -> None:
    task = make_task(8080)
    async with make_service(tmp_path, 8080, is_allowed=False) as service:
        with pytest.raises(TaskError, match=r"fetch: the setup network: .*localhost:8080.*DSEC_SETUP_NETWORK"):
            await service.submit(job_of(task), [task])
        assert not service.ledger.jobs


async def test_a_run_that_is_resumed_where_less_is_allowed_stands_still(tmp_path: Path) -> None:
    task = make_task(8080)
    async with make_service(tmp_path, 8080) as service:
        await service.submit(job_of(task), [task])
    async with make_service(tmp_path, 8080, is_allowed=False) as service:
        await service.start()
        await service.wait("run")
        state = service.ledger.rollouts["fetch.0"]
    assert state.failure is not None
    assert "DSEC_SETUP_NETWORK" in state.failure.message
    assert state.judged is None


async def test_a_network_that_cannot_be_switched_ends_the_rollout_before_its_agent_runs(tmp_path: Path) -> None:
    take_the_port = "import os, socket; s = socket.create_server(('127.0.0.1', 3128)); os.fork() or s.accept()"
    files = {
        "task.toml": b'[agent]\nnetwork_mode = "allowlist"\nallowed_hosts = ["a.example"]\n',
        "instruction.md": b"Fetch the page.\n",
        "environment/Dockerfile": f'FROM debian:bookworm-slim\nRUN python3 -c "{take_the_port}"\n'.encode(),
        "tests/test.sh": TESTS,
    }
    task, config = task_from_files("fetch", files), RolloutConfig(concurrency=1, agent_network="a.example")
    tokenizer = load_tokenizer()
    engine, edge = ScriptedEngine(tokenizer, script), RunEdge(tmp_path / "edge", substrate_config(1))
    async with RolloutService(tmp_path, engine, edge, tokenizer, config) as service:
        await service.submit(job_of(task), [task])
        await service.start()
        await service.wait("run")
        state = service.ledger.rollouts["fetch.0"]
        assert edge.edge.list() == []
    assert state.failure is not None
    assert "3128" in state.failure.message
    assert (state.sampled_count, state.judged) == (0, None)


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1]), int(sys.argv[2]), kill_at=sys.argv[3]))
