"""Who runs when, on a service of doubles: groups, shares, priorities, preemption, and ends that come early."""

from __future__ import annotations

import asyncio
import contextlib
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import wal
from dsec.errors import ResourceExhaustedError, StateError
from dsec.testing import FakeHost, FakeSandbox, FakeSubstrate
from dsec.types import Command, ExecResult, Output
from rollout.bench.tasks import Task, task_from_files
from rollout.config import RolloutConfig
from rollout.errors import NotFoundError, RequestError
from rollout.events import Event, Preempted, RolloutFinished, RolloutOpened, RolloutResumed
from rollout.jobs import make_conversation, make_job
from rollout.ledger import Ledger
from rollout.main import load_tokenizer
from rollout.record import TrajectoryRecord, trajectory_record
from rollout.request import EarlyStop, Job, NoReward
from rollout.service import RolloutService
from rollout.testing import Reply, ScriptedEngine
from wal.tokens import TokensAppended

TOKENIZER = load_tokenizer()
PATIENCE_S = 30
DONE = Reply(reasoning="Good.", content="Done.")
LOOK = Reply(reasoning="Look.", calls=[("bash", {"command": "look"})])


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
        self.engine = ScriptedEngine(TOKENIZER, self.script)
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

    def sampled(self, rollout_id: str) -> int:
        return sum(len(e.token_ids) for e in self.events if isinstance(e, TokensAppended) and e.request == rollout_id)


@pytest.fixture
def world(tmp_path: Path) -> Callable[..., World]:
    def make(script: Callable[[str, int], Reply] = lambda _session, _turn: DONE, **config: Any) -> World:
        return World(tmp_path / "run", config, script)

    return make


def look_once(_session: str, turn: int) -> Reply:
    return DONE if turn else LOOK


async def test_a_group_starts_whole_or_waits(world: Callable[..., World]) -> None:
    here = world(look_once, sandboxes_count_max=3)
    async with here.serving() as service:
        await here.submit("job", "one", "two", group_size=2)
        await here.until(lambda: here.tools_count == 2)
        assert {e.rollout_id for e in here.events if isinstance(e, RolloutOpened)} == {"job/one.0", "job/one.1"}
        await here.submit("single", "three")
        await here.until(lambda: here.tools_count == 3)  # there is room for one, and it passes the group of two
        here.tool_may_end.set()
        await service.wait("job")
        await service.wait("single")
    assert len(here.ended()) == 5


async def test_a_group_that_can_never_start_is_refused_with_the_numbers(world: Callable[..., World]) -> None:
    here = world(sandboxes_count_max=2, tokens_count_max=4096)
    async with here.serving() as service:
        with pytest.raises(
            RequestError, match=r"3 rollouts of 'job/one' need 3 sandboxes and 6144 tokens.*has 2 and 4096"
        ):
            await here.submit("job", "one", group_size=3)
        assert service.ledger.jobs == {}


async def test_ten_thousand_rollouts_wait_as_rows_and_a_full_queue_says_try_again(world: Callable[..., World]) -> None:
    here = world(look_once, sandboxes_count_max=50, queued_count_max=10_000)
    async with here.serving() as service:
        await here.submit("first", "held", group_size=50)
        await here.until(lambda: here.tools_count == 50)
        tasks_count = len(asyncio.all_tasks())
        tracemalloc.start()
        await here.submit("many", *(f"t{number}" for number in range(200)), group_size=50)
        kept_bytes, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(asyncio.all_tasks()) <= tasks_count
        assert service.running_count == 10_050
        assert kept_bytes / 10_000 < 2048, "bytes for each rollout that waits, its share of the tasks' files included"
        with pytest.raises(
            ResourceExhaustedError, match="10000 rollouts are queued, 1 more would exceed 10000"
        ) as full:
            await here.submit("more", "x")
        assert full.value.retryable


async def test_projects_get_tokens_by_their_weights_whoever_came_first(world: Callable[..., World]) -> None:
    here = world(concurrency=2, tokens_count_max=8 * 2048, project_weights={"big": 3.0})
    async with here.serving() as service:
        await here.ask("a", 120, project="small")
        await here.ask("b", 120, project="big")
        await here.until(lambda: len(here.ended()) >= 120)
        shares = Counter(request.split("/")[0] for request in here.ended()[:120])
        assert 80 <= shares["b"] <= 100, shares
        await service.wait("a")
        await service.wait("b")


async def test_a_tool_that_waits_leaves_the_slot_to_others(world: Callable[..., World]) -> None:
    """An engine with one slot, and a tool that ends only after another rollout's turn."""
    here = world(lambda session, turn: look_once(session, turn) if session.startswith("a/") else DONE, concurrency=1)
    async with here.serving() as service:
        await here.submit("a", "one")
        await here.until(lambda: here.tools_count == 1)
        await here.submit("b", "two")
        await service.wait("b")
        here.tool_may_end.set()
        await service.wait("a")
    assert here.ended() == ["b/two.0", "a/one.0"]


async def test_a_higher_priority_takes_the_slot_at_a_token_boundary_and_nothing_is_lost(
    world: Callable[..., World],
) -> None:
    here = world(concurrency=1)
    async with here.serving() as service:
        await here.ask("low", 1)
        await here.until(lambda: here.sampled("low/0.0") == 2)
        await service.engine.pause("keep")  # in mid-turn, until there is somebody to make room for
        await here.ask("high", 1, priority=1)
        await service.engine.resume()
        await service.wait("low")
        assert here.ended() == ["high/0.0", "low/0.0"]
        low, high = here.record("low/0.0"), here.record("high/0.0")
        assert low.token_ids == high.token_ids
        assert (low.preempt_count, low.tokens_regenerated) == (0, 0)
        assert here.engine.drawn_count == low.tokens_sampled + high.tokens_sampled


async def test_a_higher_priority_takes_the_room_of_lower_ones_which_go_on_where_they_stood(
    world: Callable[..., World],
) -> None:
    here = world(look_once, sandboxes_count_max=1)
    async with here.serving() as service:
        await here.submit("low", "one")
        await here.until(lambda: here.sampled("low/one.0") == 3)
        await here.submit("lower", "three", priority=-1)
        await here.submit("high", "two", priority=1)
        here.tool_may_end.set()
        await service.wait("low")
        await service.wait("lower")
        assert here.ended() == ["high/two.0", "low/one.0", "lower/three.0"]
        low, lower = here.record("low/one.0"), here.record("lower/three.0")
        assert (low.preempt_count, low.commands_replayed, low.tokens_regenerated) == (1, 0, 0)
        assert low.tokens_sampled == lower.tokens_sampled
        assert [e.cause for e in here.events if isinstance(e, Preempted)] == ["priority"]
        assert [each.cause for each in low.kv_breaks] == ["restored"]
        assert here.engine.drawn_count == sum(here.record(i).tokens_sampled for i in here.ended())
    assert list((here.directory / "kv").iterdir()) == []


async def test_a_rollout_can_be_preempted_at_any_token_and_draws_none_twice(world: Callable[..., World]) -> None:
    here = world(lambda _session, turn: DONE)
    async with here.serving() as service:
        await here.submit("whole", "one")
        await service.wait("whole")
        whole = here.record("whole/one.0")
        for count in range(1, whole.tokens_sampled):
            job, rollout_id = f"cut{count}", f"cut{count}/one.0"
            await here.submit(job, "one")
            await here.until(lambda i=rollout_id, n=count: here.sampled(i) == n)
            stopped = await service.preempt([rollout_id])
            await service.wait(job)
            stood_at = service.ledger.rollouts[rollout_id].tokens_count
            assert service.resume([rollout_id]) == stopped
            await service.wait(job)
            cut = here.record(rollout_id)
            assert (cut.token_ids, cut.tokens_regenerated, cut.reward.value) == (whole.token_ids, 0, 1.0)
            assert cut.preempt_count == len(stopped)
            assert cut.lineage.resumed_from == ((stood_at,) if stopped else ())
        assert here.engine.drawn_count == whole.tokens_sampled * whole.tokens_sampled


async def test_a_preempted_rollouts_command_runs_on_once_and_its_sandbox_sleeps(world: Callable[..., World]) -> None:
    here = world(look_once)
    async with here.serving() as service:
        await here.submit("job", "one", group_size=2)
        await here.until(lambda: here.tools_count == 2)
        watch = service.watch("job")
        assert sorted(await service.preempt(request_id="job", cause="lunch")) == ["job/one.0", "job/one.1"]
        assert await service.preempt() == []  # they stand
        assert [event.cause async for _, event in watch if isinstance(event, Preempted)] == ["lunch", "lunch"]
        assert all(sandbox.is_paused for sandbox in here.host.sandboxes.values())
        here.tool_may_end.set()
        await service.wait("job")
        assert here.ended() == []
        assert sorted(service.resume(request_id="job")) == ["job/one.0", "job/one.1"]
        await service.wait("job")
        assert sorted(here.ended()) == ["job/one.0", "job/one.1"]
        assert here.tools_count == 2
        assert {here.record(i).commands_run_twice for i in here.ended()} == {0}


async def test_a_rollout_that_was_only_just_started_can_be_preempted(world: Callable[..., World]) -> None:
    here = world()
    async with here.serving() as service:
        await here.submit("job", "one", group_size=3)
        assert len(await service.preempt()) == 3
        assert here.ended() == []
        assert len(service.resume()) == 3
        await service.wait("job")
        assert {here.record(i).tokens_regenerated for i in here.ended()} == {0}
        assert len(here.ended()) == 3


async def test_from_every_prefix_of_a_log_with_a_preemption_the_rollout_ends_the_same(
    world: Callable[..., World], tmp_path: Path
) -> None:
    """Killed before, in the middle of, and after a preemption, in a turn and in a tool call."""
    here = world(look_once)
    async with here.serving() as service:
        await here.submit("job", "one")
        for stands in (lambda: here.sampled("job/one.0") == 2, lambda: here.tools_count == 1):
            await here.until(stands)
            await service.preempt()
            service.resume()
        here.tool_may_end.set()
        await service.wait("job")
        whole = here.record("job/one.0")
    records = list(wal.read(here.directory / "wal"))
    assert whole.preempt_count == 2
    for count in range(1, len(records)):
        again = World(tmp_path / f"prefix{count}", {}, look_once)
        again.tool_may_end.set()
        log = wal.Log.open(again.directory / "wal")
        for record in records[:count]:
            log.append(record.kind, record.payload)
        log.close()
        async with again.serving() as service:
            if "job" in service.ledger.jobs:
                await service.wait("job")
                resumed = again.record("job/one.0")
                assert (resumed.token_ids, resumed.reward.value) == (whole.token_ids, 1.0), f"after {count} records"
                assert (resumed.tokens_regenerated, resumed.commands_run_twice) == (0, 0), f"after {count} records"


async def test_a_cancel_in_the_middle_of_a_preemption_ends_the_rollouts(world: Callable[..., World]) -> None:
    here = world(look_once)
    async with here.serving() as service:
        await here.submit("job", "one", group_size=4)
        await here.until(lambda: here.tools_count >= 2)
        preemption = asyncio.create_task(service.preempt())
        await asyncio.sleep(0)
        assert await service.cancel("job") == 4
        await preemption
        await service.wait("job")
        assert {here.record(f"job/one.{index}").finish_reason for index in range(4)} == {"CANCELLED"}
        assert (here.host.sandboxes, service.dispatcher.count) == ({}, 0)


async def test_what_waits_can_be_held_back_and_let_go(world: Callable[..., World]) -> None:
    here = world(look_once, sandboxes_count_max=2)
    async with here.serving() as service:
        await here.submit("first", "one", group_size=2)
        await here.submit("second", "two", group_size=2)
        await here.until(lambda: here.tools_count == 2)
        assert sorted(await service.preempt(["second/two.1"])) == ["second/two.0", "second/two.1"]  # a group is one
        here.tool_may_end.set()
        await service.wait("first")
        await service.wait("second")
        assert sorted(here.ended()) == ["first/one.0", "first/one.1"]
        assert sorted(service.resume()) == ["second/two.0", "second/two.1"]
        await service.wait("second")
        assert len(here.ended()) == 4


async def test_a_restart_takes_up_what_was_preempted(world: Callable[..., World]) -> None:
    here = world(look_once)
    async with here.serving() as service:
        await here.submit("job", "one", group_size=2)
        await here.until(lambda: here.tools_count == 2)
        await service.preempt(cause="worker stops")
        service.hand_over()
    here.tool_may_end.set()
    async with here.serving() as service:
        await service.wait("job")
        records = [here.record(f"job/one.{index}") for index in range(2)]
        for record in records:
            assert (record.preempt_count, record.commands_replayed, record.commands_run_twice) == (1, 0, 0)
            assert (record.reward.value, [each.cause for each in record.kv_breaks]) == (1.0, ["restored"])
        assert here.tools_count == 2
        assert [e.preempted_s >= 0 for e in here.events if isinstance(e, RolloutResumed)] == [True, True]
    assert Ledger.read(here.directory / "wal", TOKENIZER).tokens_regenerated.total() == 0


async def test_a_preempted_rollout_can_be_cancelled_and_is_not_resumed_then(world: Callable[..., World]) -> None:
    here = world(look_once)
    async with here.serving() as service:
        await here.submit("job", "one", group_size=2)
        await here.until(lambda: here.tools_count == 2)
        await service.preempt()
        assert await service.cancel("job") == 2
        assert here.host.sandboxes == {}
        assert {here.record(i).finish_reason for i in here.ended()} == {"CANCELLED"}
        with pytest.raises(StateError, match="was cancelled"):
            service.resume(request_id="job")
        assert (service.resume(), await service.preempt()) == ([], [])
        for nobody in ("job/one.2", "job/one", "x"):
            with pytest.raises(NotFoundError, match=f"no rollout '{nobody}'"):
                await service.preempt([nobody])
        assert service.dispatcher.count == 0


async def test_stragglers_end_once_enough_of_their_group_is_usable(world: Callable[..., World]) -> None:
    def script(session: str, turn: int) -> Reply:
        return look_once(session, turn) if session[-1] in "23" else DONE

    here = world(script)
    async with here.serving() as service:
        await here.submit("job", "one", group_size=4, early_stop=EarlyStop(min_usable=2))
        await service.wait("job")
        records = [here.record(f"job/one.{index}") for index in range(4)]
        assert [record.finish_reason for record in records] == ["STOP", "STOP", "STRAGGLER", "STRAGGLER"]
        assert records[0].group.missing_reasons == {2: "STRAGGLER", 3: "STRAGGLER"}
        assert [record.reward.value for record in records] == [1.0, 1.0, None, None]
        assert here.host.sandboxes == {}


async def test_a_grace_lets_those_end_that_need_no_more_than_it(world: Callable[..., World]) -> None:
    here = world(lambda session, turn: look_once(session, turn) if session[-1] == "1" else DONE)
    async with here.serving() as service:
        await here.submit("job", "one", group_size=2, early_stop=EarlyStop(min_usable=1, grace_s=1000.0))
        await here.until(lambda: here.ended() == ["job/one.0"])
        here.tool_may_end.set()
        await service.wait("job")
        assert here.record("job/one.1").finish_reason == "STOP"


async def test_a_job_ends_at_its_deadline_also_what_never_began_and_after_a_restart(
    world: Callable[..., World],
) -> None:
    here = world(look_once, sandboxes_count_max=1)
    async with here.serving():
        await here.submit("job", "one", "two", deadline_s=0.2)
        await here.until(lambda: len(here.ended()) == 2)
        assert {here.record(i).finish_reason for i in here.ended()} == {"CANCELLED"}
        assert here.service.ledger.cancelled == {"job"}
        await here.submit("late", "three", deadline_s=0.01)
    async with here.serving() as service:
        await service.wait("late")
        assert here.record("late/three.0").finish_reason == "CANCELLED"
