"""Following jobs with `rollout.client`: groups, suffixes, durability, and servers that come and go."""

from __future__ import annotations

import asyncio
import math
from array import array
from pathlib import Path
from typing import Any

import pytest

from dsec.errors import OutOfRangeError
from rollout import steps
from rollout.client import AsyncRolloutClient, Trajectory, Update
from rollout.errors import NotFoundError
from rollout.record import trajectory_record
from rollout.request import JudgeReward
from rollout.testing import Reply

PATIENCE_S = 60
SILENT = Reply(content="I would rather not say.")
EVERYTHING: tuple[Any, ...] = ("live_tokens", "tokens", "logprobs", "text")


async def test_groups_come_whole_with_the_records_that_the_service_has(setting: Any) -> None:
    groups = await setting.groups("one", "two", group_size=3)
    assert sorted(group.group_id for group in groups) == ["job/one", "job/two"]
    for group in groups:
        assert [member.rollout_id for member in group.trajectories] == [f"{group.group_id}.{n}" for n in range(3)]
        assert group.rewards == (None, None, None)
        assert group.missing_reasons == {0: "STOP", 1: "STOP", 2: "STOP"}  # nobody judges: unset, and it says so
        for trajectory in group.trajectories:
            got = await setting.client.get(trajectory.rollout_id)
            assert got.record == trajectory_record(setting.service.ledger, trajectory.rollout_id)
            assert trajectory.record.token_ids == got.record.token_ids
            check_arrays(trajectory)


def check_arrays(trajectory: Trajectory) -> None:
    record, ids = trajectory.record, trajectory.token_ids
    assert (ids.typecode, trajectory.logprobs.typecode, trajectory.loss_mask.typecode) == ("I", "f", "B")
    assert ids == array("I", record.token_ids)
    assert [not math.isnan(value) for value in trajectory.logprobs] == [bool(m) for m in trajectory.loss_mask]
    assert sum(trajectory.loss_mask) == record.tokens_sampled > 0


def check_order(updates: list[Update]) -> None:
    """In the order of the log, and nothing twice: rollouts share an event only where it is tokens of theirs."""
    numbers = [update.event for update in updates]
    assert numbers == sorted(numbers)
    assert len({(update.event, update.rollout_id) for update in updates}) == len(updates)
    alone = [update.event for update in updates if update.what != "tokens"]
    assert len(set(alone)) == len(alone)


async def test_attach_from_every_event_gives_exactly_the_suffix(setting: Any) -> None:
    updates = await setting.job()
    numbers = [update.event for update in updates]
    check_order(updates)
    assert {update.what for update in updates} == {"opened", "tokens", "finished"}
    for number in range(numbers[-1] + 2):
        attached = [update async for update in setting.client.attach("job", number, EVERYTHING)]
        assert attached == [update for update in updates if update.event >= number]
    for rollout_id in sorted({update.rollout_id for update in updates}):
        life = [update async for update in setting.client.replay(rollout_id, fields=EVERYTHING)]
        assert life == [update for update in updates if update.rollout_id == rollout_id]
        assert [u async for u in setting.client.replay(rollout_id, life[3].event, EVERYTHING)] == life[3:]
    with pytest.raises(OutOfRangeError, match="the log ends with event"):
        _ = [update async for update in setting.client.attach("job", numbers[-1] + 1000)]


async def test_who_attaches_while_it_runs_sees_what_who_was_there_sees(setting: Any) -> None:
    """Attached at every moment of a job's life; each sees all of it, once and in order."""
    seen: list[list[Update]] = []
    listeners: list[asyncio.Task[list[Update]]] = []
    first: list[Update] = []

    async def listen() -> list[Update]:
        return [update async for update in setting.client.attach("job", 0, EVERYTHING)]

    prompts = [setting.ask("one"), setting.ask("two")]
    async for update in setting.client.submit(prompts, group_size=2, request_id="job", fields=EVERYTHING):
        first.append(update)
        if len(first) % 3 == 0:
            listeners.append(asyncio.create_task(listen()))
    seen = await asyncio.gather(*listeners)
    assert len(seen) > 5
    assert [updates for updates in seen if updates != first] == []


async def test_tokens_are_streamed_only_once_they_are_durable(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    may_sync = asyncio.Event()
    admit, held = setting.service.journal._commit.admit, asyncio.Event()

    async def behind(durable: asyncio.Future[None]) -> None:
        await durable
        held.set()
        await may_sync.wait()

    def hold(kind: int, payload: bytes) -> tuple[int, asyncio.Future[None]]:
        lsn, durable = admit(kind, payload)
        return lsn, asyncio.ensure_future(behind(durable)) if kind == steps.KIND else durable

    monkeypatch.setattr(setting.service.journal._commit, "admit", hold)
    streamed: list[Update] = []

    async def listen() -> None:
        async for update in setting.client.submit([setting.ask()], request_id="job", fields=EVERYTHING):
            streamed.append(update)  # noqa: PERF401 - looked at while it goes on

    listener = asyncio.create_task(listen())
    await held.wait()
    # The record is in the file, and nobody was told that it is durable: not the stream, not who attaches now.
    attached = setting.client.attach("job", 0, EVERYTHING)
    assert (await anext(attached)).what == "opened"
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(attached), 0.2)
    assert [update.what for update in streamed] == ["opened"]
    may_sync.set()
    await listener
    assert streamed[1].what == "tokens"


async def test_a_group_says_why_members_are_missing_and_each_group_is_told_once(setting: Any) -> None:
    await setting.client.pause_engine("keep")
    asking = asyncio.create_task(setting.groups("one", "two", group_size=2))
    await setting.until(lambda: len(setting.service.ledger.rollouts) == 4)
    assert await setting.client.cancel("job") == 4
    groups = await asking
    assert {group.group_id: dict(group.missing_reasons) for group in groups} == {
        f"job/{name}": {0: "CANCELLED", 1: "CANCELLED"} for name in ("one", "two")
    }
    assert await setting.client.cancel("job") == 0
    with pytest.raises(NotFoundError, match="no job 'nothing'"):
        await setting.client.cancel("nothing")


async def test_a_server_that_comes_and_goes_is_not_noticed(serving: Any, tmp_path: Path) -> None:
    """Restarted at each third update under a running loop: nothing lost, nothing twice."""
    updates: list[Update] = []
    port, restarts = 0, 0
    client_: AsyncRolloutClient | None = None
    stream: Any = None
    async with asyncio.timeout(3 * PATIENCE_S):
        while True:
            async with serving(tmp_path / "run", port) as setting:
                port = int(setting.address.rsplit(":", 1)[1])
                if client_ is None:
                    client_ = AsyncRolloutClient(setting.address, patience_s=PATIENCE_S)
                    prompts = [setting.ask("one"), setting.ask("two")]
                    stream = client_.submit(prompts, group_size=2, request_id="job", fields=EVERYTHING)
                seen = len(updates)
                async for update in stream:
                    updates.append(update)
                    if len(updates) == seen + 3 and restarts < 8:
                        break
                else:
                    break
                await setting.engine.pause("abort")
                restarts += 1
    assert client_ is not None
    await client_.close()
    assert restarts == 8
    check_order(updates)
    drawn: dict[str, list[int]] = {}
    for update in updates:
        if update.what == "tokens":
            drawn.setdefault(update.rollout_id, []).extend(update.fields["token_ids"])
    ended = {update.rollout_id: update.trajectory for update in updates if update.trajectory}
    assert len(ended) == 4
    for rollout_id, trajectory in ended.items():
        sampled = [token for token, own in zip(trajectory.token_ids, trajectory.loss_mask, strict=True) if own]
        assert drawn[rollout_id] == sampled
    assert sorted(update.group["group_id"] for update in updates if update.group) == ["job/one", "job/two"]


async def test_a_group_with_a_member_that_the_service_failed_says_so_and_is_whole_after_a_restart(
    serving: Any, tmp_path: Path
) -> None:
    async with asyncio.timeout(3 * PATIENCE_S):
        async with serving(tmp_path / "run") as setting:
            await setting.client.pause_engine()
            asking = asyncio.create_task(setting.groups("one", group_size=2))
            await setting.until(lambda: len(setting.service.ledger.rollouts) == 2)
            await setting.engine.close()  # as an engine that dies
            (group,) = await asking
            assert group.members == (None, None)
            assert group.missing_reasons == {0: "ENGINE_ERROR", 1: "ENGINE_ERROR"}
            updates = [update async for update in setting.client.attach("job")]
            assert [update.what for update in updates] == ["opened", "opened", "infra_failed", "infra_failed"]
            assert [update.group is not None for update in updates] == [False, False, False, True]
            assert updates[-1].fields["fault"] == "peer"
            states = [each.state async for each in setting.client.list()]
            assert states == ["failed", "failed"]
        async with serving(tmp_path / "run") as setting:
            (group,) = await setting.groups("one", group_size=2)
            assert [member is not None and member.finish_reason for member in group.members] == ["STOP", "STOP"]
            updates = [update async for update in setting.client.attach("job")]
            assert [update.event for update in updates if update.group] == [updates[-1].event]


async def test_a_loop_waits_for_rollouts_that_were_preempted(setting: Any) -> None:
    await setting.client.pause_engine()
    asking = asyncio.create_task(setting.groups("one", "two", group_size=2))
    await setting.until(lambda: len(setting.service.ledger.rollouts) == 4)
    assert len(await setting.client.preempt(request_id="job", cause="lunch")) == 4
    await setting.client.resume_engine()
    updates = [update async for update in setting.client.attach("job")]  # ends: nothing runs
    assert [update.fields["cause"] for update in updates if update.what == "preempted"] == ["lunch"] * 4
    assert {each.state async for each in setting.client.list()} == {"preempted"}
    assert not asking.done()
    assert len(await setting.client.resume(request_id="job")) == 4
    groups = await asking
    assert sorted(group.group_id for group in groups) == ["job/one", "job/two"]
    assert {member.record.preempt_count for group in groups for member in group.trajectories} == {1}


async def test_judges_are_groups_of_their_own_and_none_of_the_prompts(setting: Any) -> None:
    reward = JudgeReward(rubric="Was it kind?", samples_count=2, attempts_max=2)
    groups = await setting.groups("one", "judge", group_size=2, reward=reward)
    assert sorted(group.group_id for group in groups) == ["job/judge", "job/one"]
    for group in groups:
        assert group.is_whole
        assert group.rewards == (0.75, 0.75)
        assert [member.rollout_id for member in group.trajectories] == [f"{group.group_id}.{n}" for n in range(2)]
    assert await setting.client.ack(member.rollout_id for group in groups for member in group.trajectories) == 4
    assert [each async for each in setting.client.list()] == []


async def test_a_judge_that_gives_no_verdict_leaves_the_reward_unset_and_the_groups_whole(
    serving: Any, tmp_path: Path
) -> None:
    async with serving(tmp_path / "run", judge=SILENT) as setting:
        groups = await setting.groups("one", "two", reward=JudgeReward(rubric="Was it kind?", attempts_max=2))
        missing = {group.group_id: dict(group.missing_reasons) for group in groups}
        assert missing == {"job/one": {0: "JUDGE_UNAVAILABLE"}, "job/two": {0: "JUDGE_UNAVAILABLE"}}
        assert [len(group.trajectories) for group in groups] == [1, 1]
