"""What the time of a rollout was spent on, and what of it counts against its agent."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from rollout import runner
from rollout.events import FinishReason
from rollout.request import Limits
from rollout.testing import Reply

DONE = Reply(reasoning="Good.", content="Done.")
LOOK = Reply(reasoning="Look.", calls=[("bash", {"command": "look"})])
WORK = Limits(wall_clock_s=30.0)


class Clock:
    """The runner's, which a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: self.now, time=time.time))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


async def test_who_is_ended_by_others_tells_what_its_time_was_spent_on(world: Any, clock: Clock) -> None:
    here = world(lambda _session, _turn: LOOK)
    async with here.serving() as service:
        await here.submit("job", "one")
        await here.until(lambda: here.tools_count == 1)
        clock.now += 7.0
        await service.finish("job", ["job/one.0"], FinishReason.STRAGGLER)
        assert here.record("job/one.0").timing.environment_s == 7.0


async def test_the_wait_to_be_started_is_time_in_the_queue(world: Any) -> None:
    here = world(lambda _session, turn: DONE if turn else LOOK, sandboxes_count_max=1)
    async with here.serving() as service:
        await here.submit("first", "one")
        await here.until(lambda: here.tools_count == 1)
        await here.submit("second", "two")
        here.tool_may_end.set()
        await service.wait("second")
        first, second = here.record("first/one.0").timing, here.record("second/two.0").timing
        assert second.queue_s > first.judge_s > 0


async def test_an_agents_time_goes_on_where_it_stood_before_a_preemption(world: Any, clock: Clock) -> None:
    here = world(lambda _session, _turn: LOOK)
    async with here.serving() as service:
        await here.submit("job", "one", limits=WORK)
        for count in (1, 2):
            await here.until(lambda n=count: here.tools_count == n)
            clock.now += 20.0
            if count == 1:
                await service.preempt()
                service.resume()
            here.tool_may_end.set()
        await service.wait("job")
        record = here.record("job/one.0")
        assert (record.finish_reason, record.preempt_count, len(record.tool_calls)) == ("WALL_CLOCK", 1, 2)


async def test_waiting_for_the_engine_does_not_use_up_an_agents_time(world: Any, clock: Clock) -> None:
    here = world(concurrency=1)
    async with here.serving() as service:
        await here.submit("first", "one")
        await here.until(lambda: here.sampled("first/one.0") > 0)
        await service.engine.pause("keep")
        await here.submit("second", "two", limits=WORK)
        while "second/two.0" not in service.dispatcher._waiting:  # noqa: ASYNC110 - no event says so
            await asyncio.sleep(0)
        clock.now += 100.0
        await service.engine.resume()
        await service.wait("second")
        assert here.record("second/two.0").finish_reason == "STOP"
