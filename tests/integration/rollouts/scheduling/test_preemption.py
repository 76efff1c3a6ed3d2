"""Rollouts that stop and go on: for higher ones, on request, over restarts and kills; nothing is lost or done twice."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import wal
from dsec.errors import StateError
from rollout.client import AsyncRolloutClient
from rollout.engine import Sampling
from rollout.engines import kv_files
from rollout.engines.embedded.engine import EmbeddedEngine
from rollout.errors import NotFoundError
from rollout.events import Preempted, RolloutResumed
from rollout.ledger import Ledger
from rollout.main import load_tokenizer
from rollout.rpc import calls
from rollout.rpc.grpc_server import start_server
from rollout.rpc.listening import listen_at
from rollout.rpc.listing import standing
from rollout.scheduling import dispatch
from rollout.testing import Reply, ScriptedEngine

DONE = Reply(reasoning="Good.", content="Done.")
LOOK = Reply(reasoning="Look.", calls=[("bash", {"command": "look"})])


def look_once(_session: str, turn: int) -> Reply:
    return DONE if turn else LOOK


async def test_a_higher_priority_takes_the_slot_at_a_token_boundary_and_nothing_is_lost(
    world: Any,
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
    world: Any,
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


async def test_a_rollout_can_be_preempted_at_any_token_and_draws_none_twice(world: Any) -> None:
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


async def test_a_preempted_rollouts_command_runs_on_once_and_its_sandbox_sleeps(world: Any) -> None:
    here = world(look_once)
    async with here.serving() as service:
        await here.submit("job", "one", group_size=2)
        await here.until(lambda: here.tools_count == 2)
        watch = service.watch("job")
        assert sorted(await service.preempt(request_id="job", cause="lunch")) == ["job/one.0", "job/one.1"]
        assert await service.preempt() == []  # they stand
        assert [event.cause async for _, event in watch if isinstance(event, Preempted)] == ["lunch", "lunch"]
        assert [sandbox for sandbox in here.host.sandboxes.values() if not sandbox.is_paused] == []
        here.tool_may_end.set()
        await service.wait("job")
        assert here.ended() == []
        assert sorted(service.resume(request_id="job")) == ["job/one.0", "job/one.1"]
        await service.wait("job")
        assert sorted(here.ended()) == ["job/one.0", "job/one.1"]
        assert here.tools_count == 2
        assert {here.record(i).commands_run_twice for i in here.ended()} == {0}


async def test_a_rollout_that_was_only_just_started_can_be_preempted(world: Any) -> None:
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
    world: Any, tmp_path: Path
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
        again = type(here)(tmp_path / f"prefix{count}", {}, look_once)
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


async def test_a_cancel_in_the_middle_of_a_preemption_ends_the_rollouts(world: Any) -> None:
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


async def test_what_waits_can_be_held_back_and_let_go(world: Any) -> None:
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


async def test_a_restart_takes_up_what_was_preempted(world: Any) -> None:
    here = world(look_once)
    async with here.serving() as service:
        await here.submit("job", "one", group_size=2)
        await here.until(lambda: here.tools_count == 2)
        await service.preempt(cause="worker stops")
        await service.hand_over()
    here.tool_may_end.set()
    async with here.serving() as service:
        await service.wait("job")
        records = [here.record(f"job/one.{index}") for index in range(2)]
        for record in records:
            assert (record.preempt_count, record.commands_replayed, record.commands_run_twice) == (1, 0, 0)
            assert (record.reward.value, [each.cause for each in record.kv_breaks]) == (1.0, ["restored"])
        assert here.tools_count == 2
        assert [e.preempted_s >= 0 for e in here.events if isinstance(e, RolloutResumed)] == [True, True]
    assert Ledger.read(here.directory / "wal", load_tokenizer()).tokens_regenerated.total() == 0


async def test_a_preempted_rollout_can_be_cancelled_and_is_not_resumed_then(world: Any) -> None:
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


async def test_a_client_preempts_and_resumes_by_rollout_by_job_and_all(world: Any) -> None:
    here = world(look_once)
    async with here.serving() as service:
        server = await start_server(service, listen_at("127.0.0.1:0"))
        async with AsyncRolloutClient(f"127.0.0.1:{server.port}") as client:
            for number, target in enumerate(
                ({"rollout_ids": ["j0/one.0"]}, {"request_id": "j1"}, {"everything": True})
            ):
                await here.submit(f"j{number}", "one")
                await here.until(lambda n=number: here.tools_count == n + 1)
                concerned = {f"j{n}/one.0" for n in ((0, 1, 2) if "everything" in target else (number,))}
                assert set(await client.preempt(**target, cause="lunch")) == concerned
                assert {standing(service.ledger, rollout_id) for rollout_id in concerned} == {"preempted"}
                assert set(await client.resume(**target)) == concerned
            with pytest.raises(NotFoundError, match="no rollout 'x'"):
                await client.preempt(rollout_ids=["x"])
            here.tool_may_end.set()
            for number in range(3):
                await service.wait(f"j{number}")
        await server.stop()
        assert [e.cause for e in here.events if isinstance(e, Preempted)] == ["lunch"] * 5
    assert here.tools_count == 3


async def test_of_very_many_rollouts_an_answer_names_no_more_than_fit_a_message(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "NAMED_COUNT_MAX", 2)
    here = world(look_once)
    async with here.serving() as service:
        server = await start_server(service, listen_at("127.0.0.1:0"))
        await here.submit("job", "one", group_size=3)
        await here.until(lambda: here.tools_count == 3)
        async with AsyncRolloutClient(f"127.0.0.1:{server.port}") as client:
            assert len(await client.preempt(everything=True)) == 2
            assert {standing(service.ledger, f"job/one.{index}") for index in range(3)} == {"preempted"}
            here.tool_may_end.set()
            assert len(await client.resume(everything=True)) == 2
        await service.wait("job")
        assert len(here.ended()) == 3
        await server.stop()


async def test_where_no_state_can_be_kept_a_preemption_is_one_all_the_same(world: Any) -> None:
    here = world(look_once)
    here.directory.mkdir()
    (here.directory / "kv").write_text("no directory")
    async with here.serving() as service:
        await here.submit("job", "one")
        await here.until(lambda: here.tools_count == 1)
        assert await service.preempt() == ["job/one.0"]
        here.tool_may_end.set()
        service.resume()
        await service.wait("job")
        assert [each.cause for each in here.record("job/one.0").kv_breaks] == ["rebuilt"]


async def test_a_hanging_engine_does_not_keep_a_rollout_from_being_preempted(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "GRACE_S", 0.01)
    here = world(concurrency=1)
    here.fault = "hang"
    async with here.serving() as service:
        await here.submit("job", "one")
        await here.until(lambda: here.sampled("job/one.0") == 1)
        assert await service.preempt() == ["job/one.0"]
        here.engine.fault = None
        assert service.resume() == ["job/one.0"]
        await service.wait("job")
        assert here.record("job/one.0").finish_reason == "STOP"


async def test_what_the_service_failed_goes_on_when_it_is_resumed(world: Any) -> None:
    here = world()
    here.fault = "early end"
    async with here.serving() as service:
        await here.submit("job", "one", group_size=2)
        await service.wait("job")
        assert {standing(service.ledger, f"job/one.{index}") for index in range(2)} == {"failed"}
        here.engine.fault = None
        assert sorted(service.resume(request_id="job")) == ["job/one.0", "job/one.1"]
        await service.wait("job")
        assert {here.record(i).finish_reason for i in here.ended()} == {"STOP"}


async def test_the_embedded_engine_goes_on_bit_for_bit_after_preemptions(world: Any) -> None:
    """With its state saved and restored, and with states that were lost."""
    here = world()
    here.make_engine = EmbeddedEngine
    asked = {"sampling": Sampling(temperature=1.0, seed=3)}
    async with here.serving() as service:
        await here.ask("job", 24, **asked)
        await service.wait("job")
    other = type(here)(here.directory.with_name("cut"), {}, here.script, make_engine=EmbeddedEngine)
    async with other.serving() as service:
        await other.ask("job", 24, **asked)
        for turn in range(6):
            chunks_count = other.chunks_count()
            await other.until(lambda n=chunks_count: other.chunks_count() > n or len(other.ended()) == 24)
            await service.preempt()
            for path in other.directory.glob("kv/*") if turn % 2 else ():
                path.unlink()
            service.resume()
        await service.wait("job")
        for number in range(24):
            cut, whole = other.record(f"job/{number}.0"), here.record(f"job/{number}.0")
            assert (cut.token_ids, cut.logprobs) == (whole.token_ids, whole.logprobs)
            assert cut.tokens_regenerated == 0
        assert sum(other.record(f"job/{number}.0").preempt_count for number in range(24)) > 0


async def test_a_rollout_that_is_long_in_being_set_down_is_preempted_all_the_same(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "GRACE_S", 0.01)
    here = world(look_once)

    class Slow(ScriptedEngine):
        async def save(self, session: str, path: Path) -> int:
            passed = asyncio.Event()
            asyncio.get_running_loop().call_later(2 * dispatch.GRACE_S, passed.set)
            await passed.wait()
            return await super().save(session, path)

    here.make_engine = lambda: Slow(load_tokenizer(), look_once)
    async with here.serving() as service:
        await here.submit("job", "one")
        await here.until(lambda: here.sampled("job/one.0") == 1)
        assert await service.preempt() == ["job/one.0"]
        assert standing(service.ledger, "job/one.0") == "preempted"
        assert [sandbox.is_paused for sandbox in here.host.sandboxes.values()] == [True]
        here.tool_may_end.set()
        service.resume()
        await service.wait("job")
        assert [each.cause for each in here.record("job/one.0").kv_breaks] == ["restored"]


async def test_an_engine_that_never_ends_saving_keeps_nobody_from_being_preempted(
    world: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kv_files, "SAVE_S_MAX", 0.01)
    here = world(look_once)

    class Stuck(ScriptedEngine):
        async def save(self, _session: str, _path: Path) -> int:
            return await asyncio.get_running_loop().create_future()

    here.make_engine = lambda: Stuck(load_tokenizer(), look_once)
    async with here.serving() as service:
        await here.submit("job", "one")
        await here.until(lambda: here.tools_count == 1)
        assert await service.preempt() == ["job/one.0"]
        assert "job/one.0: its state is not saved, and will be computed again: the engine takes more" in caplog.text
        here.tool_may_end.set()
        service.resume()
        await service.wait("job")
        assert [each.cause for each in here.record("job/one.0").kv_breaks] == ["rebuilt"]
