"""Rollouts that are ended from outside: nothing of them begins again while their ends are logged."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import wal
from dsec.testing import FakeSandbox
from rollout import journal
from rollout.events import FinishReason, JobCancelled, RolloutOpened, RolloutResumed
from rollout.request import PolicyRule
from rollout.testing import Reply

DONE = Reply(reasoning="Good.", content="Done.")
LOOK = Reply(reasoning="Look.", calls=[("bash", {"command": "look"})])


def look_once(_session: str, turn: int) -> Reply:
    return DONE if turn else LOOK


def hold_destroy(monkeypatch: pytest.MonkeyPatch) -> tuple[asyncio.Event, asyncio.Event]:
    """From now on an end of a sandbox begins, and goes on when it may."""
    destroy, is_ending, may_end = FakeSandbox.destroy, asyncio.Event(), asyncio.Event()

    async def destroy_late(sandbox: FakeSandbox) -> None:
        is_ending.set()
        await may_end.wait()
        await destroy(sandbox)

    monkeypatch.setattr(FakeSandbox, "destroy", destroy_late)
    return is_ending, may_end


async def test_rollouts_that_end_together_do_not_begin_in_the_room_that_one_of_them_leaves(world: Any) -> None:
    here = world(look_once, sandboxes_count_max=1)
    async with here.serving() as service:
        await here.submit("job", "one", "two")
        await here.until(lambda: here.tools_count == 1)
        await service.preempt(["job/one.0"])
        await here.until(lambda: here.tools_count == 2)
        service.resume(["job/one.0"])  # it waits for the room that job/two.0 has
        assert await service.finish("job", ["job/two.0", "job/one.0"], FinishReason.STALE) == 2
        assert not [event for event in here.events if isinstance(event, RolloutResumed)]
        assert (service.dispatcher.count, here.host.sandboxes) == (0, {})


async def test_a_rollout_that_is_being_ended_is_not_resumed(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    here = world(look_once)
    async with here.serving() as service:
        await here.submit("job", "one", group_size=2)
        await here.until(lambda: here.tools_count == 2)
        await service.preempt()
        is_ending, may_end = hold_destroy(monkeypatch)
        ending = asyncio.create_task(service.finish("job", ["job/one.0"], FinishReason.STALE))
        await is_ending.wait()
        here.tool_may_end.set()
        assert service.resume() == ["job/one.1"]
        may_end.set()
        assert await ending == 1
        await service.wait("job")
        assert [here.record(f"job/one.{index}").finish_reason for index in range(2)] == ["STALE", "STOP"]
        assert [event.rollout_id for event in here.events if isinstance(event, RolloutResumed)] == ["job/one.1"]


async def test_an_end_that_takes_its_time_keeps_no_other_job_waiting(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = world(look_once)
    async with here.serving() as service:
        await here.submit("slow", "one")
        await here.until(lambda: here.tools_count == 1)
        is_ending, may_end = hold_destroy(monkeypatch)
        ending = asyncio.create_task(service.cancel("slow"))
        await is_ending.wait()
        await here.ask("quick", 2)
        await service.wait("quick")
        assert await service.retention.acknowledge(["quick/0.0", "quick/1.0"]) == 2
        assert "quick" not in service.ledger.jobs
        again = asyncio.create_task(service.cancel("slow"))  # two ends of one job do not meet
        may_end.set()
        assert (await ending, await again) == (1, 0)


async def test_a_job_that_is_acknowledged_while_its_end_is_said_again_is_forgotten_in_peace(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deadline, or a second Cancel, may come to a job that has just ended."""
    here = world()
    async with here.serving() as service:
        await here.ask("job", 3)
        await service.wait("job")
        rollout_ids = [f"job/{number}.0" for number in range(3)]
        acknowledging = asyncio.create_task(service.retention.acknowledge(rollout_ids))
        ending = asyncio.create_task(service.cancel("job"))
        assert (await acknowledging, await ending) == (3, 0)
        assert service.ledger.jobs == {}
        ending = [asyncio.create_task(service.finish("job", rollout_ids, FinishReason.DEADLINE)) for _ in range(2)]
        assert await asyncio.gather(*ending) == [0, 0]


async def test_what_waits_for_weights_and_is_being_ended_does_not_wait_again(world: Any) -> None:
    here = world()
    async with here.serving() as service:
        await here.ask("job", 300, policy=PolicyRule(min_version=1))
        ending = asyncio.create_task(service.cancel("job"))
        await here.until(lambda: any(isinstance(event, RolloutOpened) for event in here.events))
        assert "job/299.0" not in service.ledger.rollouts  # they end in batches
        assert service.resume(["job/299.0"]) == []
        assert await ending == 300
        await service.wait("job")


async def test_a_deadline_that_a_crash_cut_short_is_no_cancel_after_it(world: Any, tmp_path: Path) -> None:
    here = world(look_once)
    async with here.serving() as service:
        await here.submit("job", "one", group_size=2)
        await here.until(lambda: here.tools_count == 2)
        rollout_ids = [f"job/one.{index}" for index in range(2)]
        assert await service.finish("job", rollout_ids, FinishReason.DEADLINE) == 2
    with wal.Log.open(tmp_path / "cut") as log:  # as it stood when the process was killed
        for record in wal.read(here.directory / "wal"):
            log.append(record.kind, record.payload)
            if isinstance(journal.decode(record.kind, record.payload), JobCancelled):
                break
    (here.directory / "wal").rename(tmp_path / "whole")
    (tmp_path / "cut").rename(here.directory / "wal")
    async with here.serving():
        assert [here.record(each).finish_reason for each in rollout_ids] == ["DEADLINE"] * 2
