"""The network of each phase when sandboxes are lost: a command that runs again has the one that it had."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import wal
from dsec.testing import FakeSandbox, FakeSubstrate
from dsec.types import Command, ExecResult, NetworkPolicy, Output
from rollout.bench.tasks import Task, task_from_files
from rollout.config import RolloutConfig
from rollout.environment.network import Networks, parse_rules
from rollout.machine import State
from rollout.main import load_tokenizer
from rollout.request import Group, Job
from rollout.service import RolloutService
from rollout.testing import Reply, ScriptedEngine

TOKENIZER = load_tokenizer()
CONFIG = RolloutConfig(
    concurrency=1, log_sync="os", setup_network="s.example", agent_network="a.example", verifier_network="v.example"
)
ALL = Networks(setup=parse_rules(["s.example"]), agent=parse_rules(["a.example"]), verifier=parse_rules(["v.example"]))
NAMES = {ALL.setup: "s", ALL.agent: "a", ALL.verifier: "v", NetworkPolicy(): "-"}
ONCE = ["s: build it", "-: look", "-: mend", "-: rm -rf", "v: /tests/test.sh"]
WORDS = ("build it", "look", "mend", "rm -rf", "/tests/test.sh")
"""What the commands of interest say: one of the set-up, two of the agent, the verifier's first, and the tests."""


def make_task(*open_phases: str) -> Task:
    tables = {"setup": "environment", "agent": "agent", "verifier": "verifier"}
    toml = "".join(
        f'[{table}]\nnetwork_mode = "allowlist"\nallowed_hosts = {[f"{phase[0]}.example"] * (phase in open_phases)}\n'
        for phase, table in tables.items()
    )
    files = {
        "task.toml": toml.encode(),
        "instruction.md": b"Do it.\n",
        "environment/Dockerfile": b"FROM debian:bookworm-slim\nWORKDIR /app\nRUN build it\n",
        "tests/test.sh": b"#!/bin/bash\n",
    }
    return task_from_files("t", files)


class World:
    """Answers commands, and keeps what ran under which network; a sandbox dies once of each word in `deadly`."""

    def __init__(self, *deadly: str) -> None:
        self.seen: list[str] = []
        self.deadly = list(deadly)

    def __call__(self, sandbox: FakeSandbox, command: Command) -> ExecResult:
        said = " ".join(command.argv)
        word = next((word for word in WORDS if word in said), "")
        if word:
            self.seen.append(f"{NAMES[sandbox.spec.network]}: {word}")
        if word in self.deadly:
            self.deadly.remove(word)
            sandbox.die()
        return ExecResult(exit_code=0, stdout=Output(b"reward.txt\n1\n" if "reward" in said else b""))


def script(_session: str, turn: int) -> Reply:
    replies: Sequence[Reply] = (
        Reply(calls=[("bash", {"command": "look"})]),
        Reply(calls=[("bash", {"command": "mend"})]),
        Reply(content="Done."),
    )
    return replies[turn]


async def run(directory: Path, world: World, task: Task) -> State:
    engine = ScriptedEngine(TOKENIZER, script, chunk_tokens_count=50)
    async with RolloutService(directory, engine, FakeSubstrate(world), TOKENIZER, CONFIG) as service:
        if not service.ledger.jobs:
            group = Group(group_id="t", task="t", task_digest=task.digest, size=1)
            await service.submit(Job(request_id="run", groups=(group,)), [task])
        await service.start()
        await service.wait("run")
        return service.ledger.rollouts["t.0"]


async def test_each_command_has_the_network_of_its_phase(tmp_path: Path) -> None:
    world = World()
    state = await run(tmp_path, world, make_task("setup", "agent", "verifier"))
    assert state.judged is not None
    assert world.seen == ["s: build it", "a: look", "a: mend", "a: rm -rf", "v: /tests/test.sh"]


async def test_a_rebuilt_sandbox_is_switched_as_the_lost_one_was(tmp_path: Path) -> None:
    world = World("mend")
    state = await run(tmp_path, world, make_task("setup", "verifier"))
    assert state.judged is not None
    assert world.seen == [*ONCE[:3], *ONCE]


async def test_a_set_up_that_lost_its_sandbox_is_done_again_with_its_network(tmp_path: Path) -> None:
    world = World("build it")
    state = await run(tmp_path, world, make_task("setup", "verifier"))
    assert state.judged is not None
    assert world.seen == [ONCE[0], *ONCE]


async def test_what_an_agent_with_a_network_did_is_never_done_again(tmp_path: Path) -> None:
    world, task = World("mend"), make_task("agent")
    for _ in range(2):
        state = await run(tmp_path, world, task)
        assert state.judged is None
        assert state.failure is not None
        assert (state.failure.code, "not run again" in state.failure.message) == ("FAILED_PRECONDITION", True)
        assert [seen for seen in world.seen if seen != "-: build it"] == ["a: look", "a: mend"]


async def test_a_verdict_with_a_network_that_was_lost_is_begun_anew_by_the_next_process(tmp_path: Path) -> None:
    world, task = World("/tests/test.sh"), make_task("verifier")
    once = ["-: build it", *ONCE[1:]]
    state = await run(tmp_path, world, task)
    assert (state.judged, state.judge_try, world.seen) == (None, 1, [*once, *once[:4]])
    state = await run(tmp_path, world, task)
    assert state.judged is not None
    assert world.seen[len(once) + 4 :] == once


async def test_from_any_prefix_of_its_log_a_rollout_goes_on_with_the_network_of_each_phase(tmp_path: Path) -> None:
    task = make_task("setup", "verifier")
    await run(tmp_path / "whole", World(), task)
    records = list(wal.read(tmp_path / "whole/wal"))
    for count in range(len(records) + 1):
        world, directory = World(), tmp_path / str(count)
        with contextlib.closing(wal.Log.open(directory / "wal")) as log:
            for record in records[:count]:
                log.append(record.kind, record.payload)
        state = await run(directory, world, task)
        if state.failure is not None:  # the tests had begun, with a network, on the sandbox that was lost
            assert "not run again" in state.failure.message
            state = await run(directory, world, task)
        assert state.judged is not None
        assert set(world.seen) <= set(ONCE)
