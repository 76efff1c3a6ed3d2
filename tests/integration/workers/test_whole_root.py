"""What is about a whole root reaches all of its workers: new weights, and the place of a new request id."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dsec.testing import FakeSubstrate
from rollout.client import AsyncRolloutClient
from rollout.config import RolloutConfig, WorkerConfig
from rollout.errors import ConflictError, EngineError, NotFoundError
from rollout.events import PolicyUpdated
from rollout.jobs import make_conversation
from rollout.main import load_tokenizer
from rollout.policy import Policy
from rollout.rpc.grpc_server import REQUEST_BYTES_MAX, handlers_of, start_server
from rollout.rpc.listening import listen_at
from rollout.service import RolloutService
from rollout.testing import Reply, ScriptedEngine
from rollout.workers.forward import Router
from rollout.workers.index import Index, sqlite_url
from rollout.workers.partitions import Parts
from rollout.workers.worker import Worker

TOKENIZER = load_tokenizer()
SAID = Reply(reasoning="Be kind.", content="Hello.")
Start = Callable[[str], Any]


class Running:
    """A worker of doubles in this process, and its client."""

    def __init__(self, worker: Worker, engine: ScriptedEngine, client: AsyncRolloutClient) -> None:
        self.worker, self.engine, self.client = worker, engine, client

    async def job(self, request_id: str) -> list[Any]:
        prompts = [make_conversation("one", messages_json=json.dumps([{"role": "user", "content": "Say hello."}]))]
        groups = [group async for group in self.client.rollouts(prompts, request_id=request_id)]
        return [member for group in groups for member in group.trajectories]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """`await start(name)`: one more worker of the root."""
    root = tmp_path / "root"
    async with AsyncExitStack() as stack:

        @asynccontextmanager
        async def serving(name: str) -> AsyncIterator[Running]:
            engine = ScriptedEngine(TOKENIZER, lambda _session, _turn: SAID)
            config = RolloutConfig(concurrency=4, log_sync="os", checkpoints_root=tmp_path)
            parts = Parts(engine, TOKENIZER, config, lambda _directory, _epoch: FakeSubstrate(), False)
            worker = Worker(root, Index(sqlite_url(root)), parts, WorkerConfig(lease_ttl_s=60), name)
            router = Router(handlers_of, REQUEST_BYTES_MAX)
            server = await start_server(None, listen_at("127.0.0.1:0"), [router])
            await worker.open(server.address)
            router.worker = worker
            await server.serve()
            try:
                async with AsyncRolloutClient(server.address) as client:
                    yield Running(worker, engine, client)
            finally:
                await server.stop()
                await worker.close()
                await router.close()

        root.mkdir()
        yield lambda name: stack.enter_async_context(serving(name))


def checkpoint(directory: Path, name: str) -> str:
    (directory / name).mkdir()
    (directory / name / "weights").write_text(name)
    return str(directory / name)


async def test_new_weights_given_to_one_worker_draw_at_all_and_at_those_that_come_later(
    start: Start, tmp_path: Path
) -> None:
    async with asyncio.timeout(120):
        one, two = await start("one"), await start("two")
        info = await one.client.update_policy(checkpoint(tmp_path, "new"), 5)
        assert info == one.engine.info == two.engine.info
        assert await two.client.update_policy(str(tmp_path / "new"), 5) == info
        for running in (one, two):
            (owned,) = running.worker.owned.values()
            assert owned.service.ledger.policy.engine == info
            (member,) = await running.job(f"at-{running.worker.worker_id}")
            assert [each.version for each in member.record.policy_versions] == [5]
        three = await start("three")
        assert three.engine.info == info
        (owned,) = three.worker.owned.values()
        assert owned.service.ledger.policy.engine == info


async def test_who_comes_while_new_weights_are_given_has_them_when_that_is_done(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights take long to load: long enough for a worker to look at the index, and to open a log."""
    async with asyncio.timeout(120):
        one, is_loading, may_load = await start("one"), asyncio.Event(), asyncio.Event()
        update = one.engine.update

        async def update_late(*given: Any) -> Any:
            is_loading.set()
            await may_load.wait()
            return await update(*given)

        monkeypatch.setattr(one.engine, "update", update_late)
        updating = asyncio.create_task(one.client.update_policy(checkpoint(tmp_path, "new"), 5))
        await is_loading.wait()
        two = await start("two")
        may_load.set()
        info = await updating
        assert two.engine.info == info
        (owned,) = two.worker.owned.values()
        assert owned.service.ledger.policy.engine == info


async def test_a_directory_whose_weights_are_gone_is_served_again_with_newer_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def serving() -> AsyncIterator[RolloutService]:
        root = tmp_path / "run"
        config = RolloutConfig(log_sync="os", checkpoints_root=tmp_path)
        engine = ScriptedEngine(TOKENIZER, lambda _session, _turn: SAID)
        parts = Parts(engine, TOKENIZER, config, lambda _directory, _epoch: FakeSubstrate(), False)
        worker = Worker(root, Index(sqlite_url(root)), parts, WorkerConfig(lease_ttl_s=60), "server", is_alone=True)
        await worker.open("nowhere")
        try:
            (owned,) = worker.owned.values()
            yield owned.service
        finally:
            await worker.close()

    async with asyncio.timeout(120):
        async with serving() as service:
            await Policy(service).update(checkpoint(tmp_path, "seven"), 7)
        shutil.rmtree(tmp_path / "seven")
        monkeypatch.setenv("DSEC_NEWER_WEIGHTS", f"7:{checkpoint(tmp_path, 'other')}")  # that would be a mix
        with pytest.raises(EngineError, match=r"seven, weights .* is version 7 .*DSEC_NEWER_WEIGHTS=8:DIR"):
            async with serving():
                pass
        monkeypatch.setenv("DSEC_NEWER_WEIGHTS", f"8:{checkpoint(tmp_path, 'eight')}")
        for _ in range(2):
            async with serving() as service:
                assert service.engine.info.policy_version == 8
                assert service.ledger.policy == PolicyUpdated(service.engine.info, str(tmp_path / "eight"))
                updates_lsn = service.ledger.policy_lsn
        assert updates_lsn == 2  # the second start found it named


async def test_a_question_is_placed_beside_what_it_asks_about(start: Start) -> None:
    async with asyncio.timeout(120):
        one, two = await start("one"), await start("two")
        (member,) = await one.job("asked-about")
        await two.job("elsewhere")
        said = await two.client.quick(member.rollout_id, ["title"], request_id="question")
        index = one.worker._index
        assert isinstance(await two.worker.locate("by-http", creates=False, beside="asked-about"), str)
        assert await index.partition_of("by-http") == await index.partition_of("asked-about")
        assert await index.partition_of("question") == await index.partition_of("asked-about")
        drawn = one.engine.drawn_count
        assert await one.client.quick(member.rollout_id, ["title"], request_id="question") == said
        assert one.engine.drawn_count == drawn
        with pytest.raises(ConflictError, match="another log"):
            await two.client.quick(member.rollout_id, ["title"], request_id="elsewhere")
        with pytest.raises(NotFoundError):
            await two.client.quick("not-yet/copy.0", ["title"], request_id="early")
        (late,) = await one.job("not-yet")
        assert await two.client.quick(late.rollout_id, ["title"], request_id="early")
        await one.client.ack([member.rollout_id])
        while await index.partition_of("asked-about") is not None:  # noqa: ASYNC110  # the index hears in its own time
            await asyncio.sleep(0.01)
        for each in (one, two):
            assert await each.client.quick(member.rollout_id, ["title"], request_id="question") == said
