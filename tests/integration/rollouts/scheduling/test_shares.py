"""Who runs when: groups, shares, slots, and ends that come early."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections import Counter
from typing import Any

import pytest

from dsec.errors import ResourceExhaustedError
from rollout.errors import RequestError
from rollout.events import RolloutOpened
from rollout.request import EarlyStop
from rollout.testing import ENGINE, Reply

DONE = Reply(reasoning="Good.", content="Done.")
LOOK = Reply(reasoning="Look.", calls=[("bash", {"command": "look"})])


def look_once(_session: str, turn: int) -> Reply:
    return DONE if turn else LOOK


async def test_a_group_starts_whole_or_waits(world: Any) -> None:
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


async def test_a_group_that_can_never_start_is_refused_with_the_numbers(world: Any) -> None:
    here = world(sandboxes_count_max=2, tokens_count_max=4096)
    async with here.serving() as service:
        with pytest.raises(
            RequestError, match=r"3 rollouts of 'job/one' need 3 sandboxes and 6144 tokens.*has 2 and 4096"
        ):
            await here.submit("job", "one", group_size=3)
        assert service.ledger.jobs == {}


async def test_a_service_that_would_take_contexts_that_its_engine_cannot_hold_does_not_start(world: Any) -> None:
    here = world(context_tokens_count_max=ENGINE.context_tokens_max + 1)
    with pytest.raises(RequestError, match=r"COUNT_MAX is 1048577, and a context of the engine scripted holds 1048576"):
        async with here.serving():
            pass


async def test_ten_thousand_rollouts_wait_as_rows_and_a_full_queue_says_try_again(world: Any) -> None:
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


async def test_projects_get_tokens_by_their_weights_whoever_came_first(world: Any) -> None:
    here = world(concurrency=2, tokens_count_max=8 * 2048, project_weights={"big": 3.0})
    async with here.serving() as service:
        await here.ask("a", 120, project="small")
        await here.ask("b", 120, project="big")
        await here.until(lambda: len(here.ended()) >= 120)
        shares = Counter(request.split("/")[0] for request in here.ended()[:120])
        assert 80 <= shares["b"] <= 100, shares
        await service.wait("a")
        await service.wait("b")


async def test_a_tool_that_waits_leaves_the_slot_to_others(world: Any) -> None:
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


async def test_stragglers_end_once_enough_of_their_group_is_usable(world: Any) -> None:
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


async def test_a_grace_lets_those_end_that_need_no_more_than_it(world: Any) -> None:
    here = world(lambda session, turn: look_once(session, turn) if session[-1] == "1" else DONE)
    async with here.serving() as service:
        await here.submit("job", "one", group_size=2, early_stop=EarlyStop(min_usable=1, grace_s=1000.0))
        await here.until(lambda: here.ended() == ["job/one.0"])
        here.tool_may_end.set()
        await service.wait("job")
        assert here.record("job/one.1").finish_reason == "STOP"


async def test_a_job_ends_at_its_deadline_also_what_never_began_and_after_a_restart(
    world: Any,
) -> None:
    here = world(look_once, sandboxes_count_max=1)
    async with here.serving():
        await here.submit("job", "one", "two", deadline_s=0.2)
        await here.until(lambda: len(here.ended()) == 2)
        assert {here.record(i).finish_reason for i in here.ended()} == {"DEADLINE"}
        assert here.service.ledger.cancelled == {"job": "DEADLINE"}
        await here.submit("late", "three", deadline_s=0.01)
    async with here.serving() as service:
        await service.wait("late")
        assert here.record("late/three.0").finish_reason == "DEADLINE"
