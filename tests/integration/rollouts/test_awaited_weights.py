"""Rollouts that wait for weights, and groups that do not wait for their last members: over gRPC."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from rollout.errors import NotFoundError
from rollout.record import TrajectoryRecord
from rollout.request import CallableReward, EarlyStop, Limits, PolicyRule
from rollout.testing import Reply

NEXT = PolicyRule(min_version=1)


def checkpoint(directory: Path, name: str = "new") -> str:
    (directory / name).mkdir()
    (directory / name / "weights").write_text(name)
    return str(directory / name)


async def states(setting: Any, **wanted: Any) -> list[str]:
    return [each.state async for each in setting.client.list(**wanted)]


async def waiting(setting: Any, **asked: Any) -> asyncio.Task[Any]:
    """A group of two that waits for version 1."""
    asking = asyncio.create_task(setting.groups("one", group_size=2, policy=NEXT, **asked))
    await setting.until(lambda: "job" in setting.service.ledger.jobs)
    await setting.job("other")  # while the engine draws for whoever does not wait
    assert await states(setting, request_id="job") == ["awaiting_weights"] * 2
    return asking


def versions(group: Any) -> list[list[int]]:
    return [[run.version for run in member.record.policy_versions] for member in group.trajectories]


async def test_a_job_waits_until_its_weights_are_there(setting: Any, tmp_path: Path) -> None:
    async with asyncio.timeout(60):
        asking = await waiting(setting)
        assert len(await states(setting, states=["awaiting_weights"])) == 2
        await setting.client.update_policy(checkpoint(tmp_path), 1)
        (group,) = await asking
        assert versions(group) == [[1], [1]]
        assert await states(setting) == ["ended"] * 8


async def test_a_restart_waits_on_and_later_weights_do_as_well(serving: Any, tmp_path: Path) -> None:
    async with asyncio.timeout(60):
        async with serving(tmp_path / "run") as setting:
            (await waiting(setting)).cancel()
        async with serving(tmp_path / "run") as setting:
            assert await states(setting, request_id="job") == ["awaiting_weights"] * 2
            await setting.client.update_policy(checkpoint(tmp_path), 4)
            (group,) = await setting.groups("one", group_size=2, policy=NEXT)
            assert versions(group) == [[4], [4]]


async def test_what_waits_for_weights_can_be_stopped_resumed_and_cancelled(setting: Any, tmp_path: Path) -> None:
    async with asyncio.timeout(60):
        asking = await waiting(setting)
        assert sorted(await setting.client.preempt(request_id="job")) == ["job/one.0", "job/one.1"]
        assert await setting.client.preempt(request_id="job") == ()
        assert sorted(await setting.client.resume(request_id="job")) == ["job/one.0", "job/one.1"]
        await setting.client.preempt(request_id="job")
        await setting.client.update_policy(checkpoint(tmp_path), 1)
        await setting.job("more")
        assert await states(setting, request_id="job") == ["queued"] * 2  # nobody said Resume
        await setting.client.resume(request_id="job")
        (group,) = await asking
        assert versions(group) == [[1], [1]]
        late = asyncio.create_task(setting.groups("two", request_id="late", policy=PolicyRule(min_version=2)))
        await setting.until(lambda: "late" in setting.service.ledger.jobs)
        assert await setting.client.cancel("late") == 1
        (group,) = await late
        assert group.missing_reasons == {0: "CANCELLED"}
        with pytest.raises(NotFoundError):
            await setting.client.cancel("nobody")


async def test_a_group_stops_early_and_says_who_is_missing(serving: Any, tmp_path: Path) -> None:
    """Two slots: when the first two of four have ended, the others have begun, and are given no time."""
    config = {"reply": Reply(content="word " * 200), "concurrency": 2, "reward_callables": [f"{__name__}:full_marks"]}
    async with asyncio.timeout(60), serving(tmp_path / "run", **config) as setting:
        (group,) = await setting.groups(
            "one",
            group_size=4,
            limits=Limits(turn_tokens_count_max=1000),
            reward=CallableReward(f"{__name__}:full_marks"),
            early_stop=EarlyStop(min_usable=2),
        )
        assert group.rewards == (1.0, 1.0, None, None)
        assert group.missing_reasons == {2: "STRAGGLER", 3: "STRAGGLER"}
        assert [each.finish_reason for each in group.trajectories] == ["STOP", "STOP", "STRAGGLER", "STRAGGLER"]


def full_marks(_record: TrajectoryRecord) -> float:
    return 1.0
