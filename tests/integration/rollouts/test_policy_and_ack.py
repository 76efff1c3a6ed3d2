"""Weights that change under running rollouts, and acknowledgements that let the log go; over restarts."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

import wal
import wal.__main__ as wal_cli
from dsec.errors import StateError
from dsec.testing import FakeSubstrate
from rollout.errors import ConflictError, EngineError, JournalError, NotFoundError, RequestError
from rollout.events import Event, JobSubmitted
from rollout.export.shards import ShardWriter
from rollout.ledger import Ledger
from rollout.policy import Policy
from rollout.request import Limits, PolicyRule
from rollout.testing import Reply
from rollout.workers.partitions import Parts
from wal.retention import Retention

LONG = Reply(content="word " * 200)
LIMITS = Limits(turn_tokens_count_max=1000)


def checkpoint(directory: Path, name: str) -> str:
    folder = directory / name
    folder.mkdir()
    (folder / "weights").write_text(name)
    return str(folder)


@pytest.fixture
def begun(pausing: Any) -> Any:
    """`await begun(setting)`: a group of two that has drawn some tokens and stands, for its engine is paused."""

    async def begin(setting: Any, **asked: Any) -> asyncio.Task[Any]:
        pausing(setting.engine, 4, sessions_count=2)
        asking = asyncio.create_task(setting.groups("one", group_size=2, limits=LIMITS, **asked))
        states = setting.service.ledger.rollouts
        await setting.until(lambda: len(states) == 2 and all(state.sampled_count > 3 for state in states.values()))
        await setting.client.pause_engine()
        return asking

    return begin


@pytest.mark.parametrize(("on_update", "cause"), [("keep", "kept"), ("cut", "rebuilt"), ("pin", None)])
async def test_new_weights_under_a_rollout_are_recorded(
    serving: Any, begun: Any, tmp_path: Path, on_update: Any, cause: str | None
) -> None:
    async with asyncio.timeout(60), serving(tmp_path / "run", reply=LONG) as setting:
        asking = await begun(setting, policy=PolicyRule(on_update=on_update))
        new = checkpoint(tmp_path, "new")
        info = await setting.client.update_policy(new, 5)
        assert (info.policy_version, info) == (5, setting.engine.info)
        assert await setting.client.update_policy(new, 5) == info  # again changes nothing
        await setting.client.resume_engine()
        ((group,)) = await asking
        for trajectory in group.trajectories:
            record = trajectory.record
            assert [each.version for each in record.policy_versions] == ([0] if on_update == "pin" else [0, 5])
            assert [each.cause for each in record.kv_breaks] == ([cause] if cause else [])
        with pytest.raises(RequestError, match="policy_version is 4: it must grow"):
            await setting.client.update_policy(checkpoint(tmp_path, "old"), 4)
        for nowhere in ("", ".", "/no/such/path", "/a\0b", "/" + "x" * 5000):
            with pytest.raises(RequestError, match="no such absolute path"):
                await setting.client.update_policy(nowhere, 6)
        with pytest.raises(RequestError, match="give the folder of the weights, not a file in it"):
            await setting.client.update_policy(f"{new}/weights", 6)
        with pytest.raises(EngineError):  # at once: whether to ask again is the trainer's to say
            await setting.client.update_policy(str(tmp_path), 6)
        assert setting.engine.info == info


async def test_weights_come_from_below_the_operators_root_whatever_links_say(serving: Any, tmp_path: Path) -> None:
    root, outside = tmp_path / "root", Path(checkpoint(tmp_path, "outside"))
    (root / "inside").mkdir(parents=True)
    (root / "link").symlink_to(outside)
    (root / "inside/weights").symlink_to(outside / "weights")
    (root / "ring").symlink_to(root / "ring")
    (root / "latest").symlink_to(checkpoint(root, "real"))
    async with asyncio.timeout(60), serving(tmp_path / "run", checkpoints_root=root) as setting:
        for where in (outside, root / "link", root / "inside", root / "ring", root / "../outside", root / "none"):
            with pytest.raises(RequestError, match="no such absolute path below DSEC_CHECKPOINTS_ROOT"):
                await setting.client.update_policy(str(where), 1)
        await setting.client.update_policy(str(root / "latest"), 1)
        assert setting.service.ledger.policy.checkpoint == str(root / "real")
    async with asyncio.timeout(60), serving(tmp_path / "other", checkpoints_root=None) as setting:
        with pytest.raises(RequestError, match="takes no weights"):
            await setting.client.update_policy(str(root / "real"), 1)


async def test_what_falls_too_far_behind_ends_as_stale_and_the_rest_goes_on(
    serving: Any, begun: Any, tmp_path: Path
) -> None:
    async with asyncio.timeout(60), serving(tmp_path / "run", reply=LONG) as setting:
        asking = await begun(setting, policy=PolicyRule(max_lag=1))
        await setting.client.update_policy(checkpoint(tmp_path, "one"), 1)
        assert not asking.done()
        await setting.client.update_policy(checkpoint(tmp_path, "two"), 2)
        (group,) = await asking
        assert group.missing_reasons == {0: "STALE", 1: "STALE"}
        assert [trajectory for trajectory in group.trajectories if trajectory.record.tokens_sampled <= 3] == []


async def test_a_restart_draws_with_the_weights_that_the_log_names(serving: Any, begun: Any, tmp_path: Path) -> None:
    async with asyncio.timeout(60):
        async with serving(tmp_path / "run", reply=LONG) as setting:
            asking = await begun(setting)
            info = await setting.client.update_policy(checkpoint(tmp_path, "new"), 3)
            asking.cancel()
        async with serving(tmp_path / "run", reply=LONG) as setting:
            assert setting.engine.info == info
            (group,) = await setting.groups("one", group_size=2, limits=LIMITS)
            for trajectory in group.trajectories:
                assert [each.version for each in trajectory.record.policy_versions] == [0, 3]


async def test_an_acknowledged_job_is_forgotten_here_and_after_a_restart(serving: Any, tmp_path: Path) -> None:
    async with asyncio.timeout(60):
        async with serving(tmp_path / "run") as setting:
            await setting.job("done")
            await setting.job("kept")
            ids = [each.rollout_id async for each in setting.client.list(request_id="done")]
            assert await setting.client.ack(ids[:4]) == 4
            assert await setting.client.ack([*ids[:4], "unknown"]) == 0
            left = [each.rollout_id async for each in setting.client.list(request_id="done", unacknowledged_only=True)]
            assert left == ids[4:]
            assert (await setting.client.get(ids[0])).rollout_id == ids[0]
            assert await setting.client.ack(ids) == 2
            assert await setting.client.ack(ids) == 0
            for call in (setting.client.get(ids[0]), setting.client.cancel("done")):
                with pytest.raises(NotFoundError):
                    await call
            assert [each.request_id async for each in setting.client.list()] == ["kept"] * 6
            with pytest.raises(ConflictError, match="request_id 'done' was another's"):
                await setting.job("done")
        async with serving(tmp_path / "run") as setting:
            assert setting.service.ledger.jobs.keys() == {"kept"}
            assert len(setting.service.ledger.rollouts) == 6
            with pytest.raises(ConflictError, match="request_id 'done' was another's"):
                await setting.job("done")
            # The prompts went with the job, and are logged anew for one that names them.
            await setting.job("later")
            assert setting.service.ledger.jobs.keys() == {"kept", "later"}


async def test_a_prompt_does_not_go_while_a_job_that_names_it_is_let_in(
    serving: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with asyncio.timeout(60):
        async with serving(tmp_path / "run") as setting:
            await setting.job("first")
            record, is_checked, may_be_logged = setting.service._record, asyncio.Event(), asyncio.Event()

            async def record_late(event: Event) -> None:
                if isinstance(event, JobSubmitted):
                    is_checked.set()
                    await may_be_logged.wait()
                await record(event)

            monkeypatch.setattr(setting.service, "_record", record_late)
            asking = asyncio.create_task(setting.job("next"))
            await is_checked.wait()  # its prompts are in the log: those of the first
            ids = [each.rollout_id async for each in setting.client.list(request_id="first")]
            acking = asyncio.create_task(setting.client.ack(ids))
            await asyncio.wait({acking}, timeout=0.3)
            may_be_logged.set()
            await asyncio.gather(asking, acking)
        async with serving(tmp_path / "run") as setting:
            assert setting.service.ledger.jobs.keys() == {"next"}


async def test_what_has_not_ended_cannot_be_acknowledged(serving: Any, begun: Any, tmp_path: Path) -> None:
    async with asyncio.timeout(60), serving(tmp_path / "run", reply=LONG) as setting:
        asking = await begun(setting)
        with pytest.raises(StateError, match=r"not ended yet: job/one.0, job/one.1 \(2 in all\)"):
            await setting.client.ack(["job/one.0", "job/one.1"])
        await setting.client.resume_engine()
        (group,) = await asking
        assert await setting.client.ack(each.rollout_id for each in group.trajectories) == 2


@pytest.mark.parametrize("error", [JournalError("lsn 7 is odd"), ZeroDivisionError("a bug")])
async def test_a_pass_over_the_log_that_fails_is_told_and_the_next_is_begun(
    setting: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    passes: list[str] = []

    def fail(_: Any) -> None:
        passes.append("begun")
        raise error

    monkeypatch.setattr(Retention, "run_pass", fail)
    for request_id in ("first", "second"):
        updates = await setting.job(request_id)
        await setting.client.ack(update.rollout_id for update in updates if update.trajectory is not None)
        await setting.until(setting.service.retention.is_idle)
    assert passes == ["begun", "begun"]

    def told() -> list[logging.LogRecord]:
        return [record for record in caplog.records if record.message == f"the log keeps what could go: {error}"]

    await setting.until(lambda: len(told()) == 2)
    assert [record.exc_info is None for record in told()] == [isinstance(error, JournalError)] * 2  # else it is a bug


async def test_the_log_stays_small_while_jobs_come_are_acknowledged_and_go(
    serving: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each job overlaps the next one and asks the same prompts; at the end, and at each restart, all is there."""
    open_log = wal.Log.open
    monkeypatch.setattr(wal.Log, "open", lambda where, **given: open_log(where, **given, segment_bytes_max=10_000))
    log = tmp_path / "run/wal"
    async with asyncio.timeout(120):
        for start in range(0, 40, 10):
            async with serving(tmp_path / "run") as setting:
                if not start:
                    await setting.client.update_policy(checkpoint(tmp_path, "new"), 1)
                for number in range(start, start + 10):
                    await setting.job(f"job-{number}")
                    if number:
                        ids = [each.rollout_id async for each in setting.client.list(request_id=f"job-{number - 1}")]
                        assert await setting.client.ack(ids) == 6
                        await setting.until(setting.service.retention.is_idle)
                held = setting.service.ledger
                assert held.jobs.keys() == {f"job-{start + 9}"}
            again = Ledger.read(log, held.tokenizer)
            assert (again.jobs, again.rollouts, again.lsns) == (held.jobs, held.rollouts, held.lsns)
            assert (again.conversations, again.policy) == (held.conversations, held.policy)
            assert again.used == held.used
            assert again.is_cut
    assert len(list(log.glob("*.wal"))) <= 6
    async with serving(tmp_path / "run") as setting:
        used = setting.service.ledger.used
        assert "job-38" in used
        assert "job-0" not in used  # nothing of it is left: the id is as good as any
        assert len(await setting.job("job-0")) > 0
    assert wal_cli.main([str(log), "--verify"]) == 0


async def test_what_is_acknowledged_at_once_is_in_the_shards_too(serving: Any, tmp_path: Path) -> None:
    async with asyncio.timeout(60), serving(tmp_path / "run", exports_shards=True) as setting:
        for number in range(5):
            groups = await setting.groups("one", "two", group_size=4, request_id=f"job-{number}")
            ids = [member.rollout_id for group in groups for member in group.trajectories]
            assert await setting.client.ack(ids) == 8
        assert setting.service.ledger.rollouts == {}
    with ShardWriter.open(tmp_path / "run/shards") as written:
        assert len(set(written.rollout_ids)) == 40


async def test_services_that_share_an_engine_all_know_its_weights(setting: Any, tmp_path: Path) -> None:
    engine, tokenizer = setting.engine, setting.service.tokenizer
    parts = Parts(engine, tokenizer, setting.service.config, lambda _directory, _epoch: FakeSubstrate(), False)
    async with asyncio.timeout(60), AsyncExitStack() as stack:
        services = []
        for name in ("a", "b"):
            service = parts.service(tmp_path / name, FakeSubstrate(), 1, lambda _event: None)
            services.append(await stack.enter_async_context(service))
            await service.start()
        info, _ = await Policy(services[0]).update(checkpoint(tmp_path, "new"), 7)
        assert [service.ledger.policy.engine for service in services] == [info, info]
        await stack.aclose()
        assert engine.info == info
    for name in ("a", "b"):
        assert Ledger.read(tmp_path / name / "wal", tokenizer).policy.engine == info
