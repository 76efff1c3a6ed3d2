"""The three calls over a service of doubles, where a test can hold a step still: cancels, slow clients, broken logs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from dsec.testing import FakeSandbox, FakeSubstrate
from dsec.types import Command, ExecResult, Output
from rollout.commands.summary import summarise
from rollout.config import RolloutConfig
from rollout.events import FinishReason
from rollout.ledger import Ledger
from rollout.main import load_tokenizer
from rollout.pb.v1 import rollout_pb2 as pb
from rollout.pb.v1.rollout_pb2_grpc import RolloutServiceStub
from rollout.rpc.grpc_server import start_server
from rollout.rpc.listening import listen_at
from rollout.service import RolloutService
from rollout.testing import Reply, ScriptedEngine

TOKENIZER = load_tokenizer()
PATIENCE_S = 60


class HeldSandbox(FakeSandbox):
    """A sandbox whose end waits for the test."""

    may_end: asyncio.Event

    async def destroy(self) -> None:
        await self.may_end.wait()
        await super().destroy()


@dataclass
class World:
    """Commands wait for `may_run`; the ends of sandboxes wait for `may_end`."""

    may_run: asyncio.Event = field(default_factory=asyncio.Event)
    may_end: asyncio.Event = field(default_factory=asyncio.Event)
    commands_count: int = 0

    async def answer(self, _sandbox: FakeSandbox, command: Command) -> ExecResult:
        self.commands_count += 1
        await self.may_run.wait()
        is_reward = "reward" in " ".join(command.argv)
        return ExecResult(exit_code=0, stdout=Output(b"reward.txt\n1\n" if is_reward else b""))


class HeldSubstrate(FakeSubstrate):
    """Makes such sandboxes."""

    def __init__(self, world: World) -> None:
        super().__init__(world.answer)
        self.world = world

    async def create(self, spec: Any) -> FakeSandbox:
        made = await super().create(spec)
        made.__class__ = HeldSandbox
        made.may_end = self.world.may_end  # type: ignore[attr-defined]
        return made


@dataclass
class Setting:
    service: RolloutService
    world: World
    rollouts: RolloutServiceStub


@contextlib.asynccontextmanager
async def serving(directory: Path, **config: Any) -> AsyncIterator[Setting]:
    world = World()
    engine = ScriptedEngine(TOKENIZER, lambda _session, _turn: Reply(reasoning="Hm.", content="Done."))
    config = {"sandboxes_count_max": 2, "log_sync": "os", **config}
    service = RolloutService(directory, engine, HeldSubstrate(world), TOKENIZER, RolloutConfig(**config))
    async with service:
        await service.start()
        server = await start_server(service, listen_at("127.0.0.1:0"))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            try:
                yield Setting(service, world, RolloutServiceStub(channel))  # type: ignore[no-untyped-call]
            finally:
                world.may_run.set()
                world.may_end.set()
                await server.stop()


@pytest.fixture
def request_(make_task: Callable[..., Path], tmp_path: Path) -> pb.SubmitRequest:
    """A rollout of each of five small tasks; two run at once."""
    folder = make_task(tmp_path / "task")
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return pb.SubmitRequest(
        request_id="job", tasks=[pb.TaskFolder(name=f"task{number}", files=files) for number in range(5)]
    )


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for is what a user would see, not an event
            await asyncio.sleep(0.002)


async def submitted(setting: Setting, request: pb.SubmitRequest) -> asyncio.Task[list[pb.Update]]:
    """A submit that listens; two rollouts are in their first command."""

    async def listen() -> list[pb.Update]:
        return [update async for update in setting.rollouts.Submit(request)]

    listener = asyncio.create_task(listen())
    await until(lambda: setting.world.commands_count == 2)
    return listener


def ends(updates: list[pb.Update]) -> dict[str, str]:
    return {update.rollout_id: update.finished.finish_reason for update in updates if update.HasField("finished")}


ALL_CANCELLED = {f"job/task{number}.0": "CANCELLED" for number in range(5)}


async def test_a_cancel_whose_client_goes_away_is_carried_out_to_its_end(
    request_: pb.SubmitRequest, tmp_path: Path
) -> None:
    async with serving(tmp_path / "run") as setting:
        listener = await submitted(setting, request_)
        call = setting.rollouts.Cancel(pb.CancelRequest(request_id="job"))
        await until(lambda: setting.service.ledger.cancelled.keys() == {"job"})
        call.cancel()
        attached = asyncio.create_task(_listen(setting, request_))
        setting.world.may_end.set()
        assert ends(await asyncio.wait_for(listener, PATIENCE_S)) == ALL_CANCELLED
        assert ends(await asyncio.wait_for(attached, PATIENCE_S)) == ALL_CANCELLED
        assert setting.service.running_count == 0
        reply = await setting.rollouts.Cancel(pb.CancelRequest(request_id="job"), timeout=PATIENCE_S)
        assert reply.cancelled_count == 0


async def test_members_of_a_cancelled_job_that_never_began_are_reported_too(
    request_: pb.SubmitRequest, tmp_path: Path
) -> None:
    async with serving(tmp_path / "run") as setting:
        setting.world.may_end.set()
        listener = await submitted(setting, request_)
        reply = await setting.rollouts.Cancel(pb.CancelRequest(request_id="job"), timeout=PATIENCE_S)
        assert reply.cancelled_count == 5
        updates = await asyncio.wait_for(listener, PATIENCE_S)
        assert ends(updates) == ALL_CANCELLED
        assert sorted(u.rollout_id for u in updates if u.HasField("opened")) == list(ALL_CANCELLED)
        assert ends(await _listen(setting, request_)) == ALL_CANCELLED
        (last,) = [
            part
            async for part in setting.rollouts.Get(
                pb.GetRequest(rollout_id="job/task4.0", return_mask=[pb.FIELD_TOKENS])
            )
        ]
        assert (last.finish_reason, last.reward.HasField("value"), last.tokens_sampled) == ("CANCELLED", False, 0)
        assert len(last.token_ids) > 0
    rows = summarise(Ledger.read(tmp_path / "run/wal", TOKENIZER)).per_task
    assert [(row.rollouts, row.finished, row.finish_reasons, row.reward_mean) for row in rows] == [
        (1, 1, {"CANCELLED": 1}, None)
    ] * 5


async def test_a_cancel_that_a_crash_cut_short_is_finished_by_the_next_start(
    request_: pb.SubmitRequest, tmp_path: Path
) -> None:
    async with serving(tmp_path / "run") as setting:
        listener = await submitted(setting, request_)
        cancel = asyncio.ensure_future(setting.rollouts.Cancel(pb.CancelRequest(request_id="job")))
        await until(lambda: setting.service.ledger.cancelled.keys() == {"job"})
        await setting.service.journal.close()  # nothing is written any more: as after a kill
        setting.world.may_end.set()
        with pytest.raises(grpc.RpcError) as caught:
            await cancel
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        listener.cancel()
    async with serving(tmp_path / "run") as setting:
        assert ends(await _listen(setting, request_)) == ALL_CANCELLED
        assert {state.finished.reason for state in setting.service.ledger.rollouts.values() if state.finished} == {
            FinishReason.CANCELLED
        }


async def test_a_watcher_that_falls_behind_is_told_to_attach_again_and_keeps_nothing(
    request_: pb.SubmitRequest, tmp_path: Path
) -> None:
    async with serving(tmp_path / "run", watch_events_count_max=1) as setting:
        setting.world.may_end.set()
        listener = await submitted(setting, request_)
        setting.world.may_run.set()  # two rollouts go on at once: more than one event comes between two reads
        with pytest.raises(grpc.RpcError) as caught:
            await asyncio.wait_for(listener, PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "fell more than 1 events behind: attach again" in str(caught.value.details())
        await asyncio.wait_for(setting.service.wait("job"), PATIENCE_S)
        assert setting.service.watchers.count == 0
        assert len(ends(await _listen(setting, request_))) == 5


async def test_a_client_that_goes_away_leaves_no_queue(request_: pb.SubmitRequest, tmp_path: Path) -> None:
    async with serving(tmp_path / "run") as setting:
        listener = await submitted(setting, request_)
        assert setting.service.watchers.count == 1
        listener.cancel()
        await until(lambda: setting.service.watchers.count == 0)
        watch = setting.service.watch("job")  # never iterated
        assert setting.service.watchers.count == 1
        await watch.aclose()
        assert setting.service.watchers.count == 0


async def test_a_field_of_a_later_protocol_changes_nothing(request_: pb.SubmitRequest, tmp_path: Path) -> None:
    later = pb.SubmitRequest.FromString(request_.SerializeToString() + b"\xfa\x3f\x03new")  # field 1023
    assert later != request_
    async with serving(tmp_path / "run") as setting:
        setting.world.may_run.set()
        setting.world.may_end.set()
        first = [update async for update in setting.rollouts.Submit(later)]
        assert len(ends(first)) == 5
        assert first == await _listen(setting, request_)  # no other request under its id


@pytest.mark.parametrize("call", ["Submit", "Get", "Cancel"])
async def test_what_nobody_foresaw_is_internal_without_its_text_and_in_the_servers_log(
    request_: pb.SubmitRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    async with serving(tmp_path / "run") as setting:
        setting.service.ledger = None  # type: ignore[assignment]  # a bug
        calls: dict[str, Callable[[], Any]] = {
            "Submit": lambda: setting.rollouts.Submit(request_).read(),
            "Get": lambda: setting.rollouts.Get(pb.GetRequest(rollout_id="job/task0.0")).read(),
            "Cancel": lambda: setting.rollouts.Cancel(pb.CancelRequest(request_id="job")),
        }
        with caplog.at_level(logging.ERROR), pytest.raises(grpc.RpcError) as caught:
            await calls[call]()
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert caught.value.details() == "internal error; the server's log has it"
        assert "NoneType" in caplog.text
        assert f"{call} failed" in caplog.text


async def _listen(setting: Setting, request: pb.SubmitRequest) -> list[pb.Update]:
    async with asyncio.timeout(PATIENCE_S):
        return [update async for update in setting.rollouts.Submit(request)]
