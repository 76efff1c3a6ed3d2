"""Workers in this process, with doubles for engine and sandboxes, in states that real ones are in for moments."""

from __future__ import annotations

import asyncio
import sqlite3
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest

from dsec.testing import FakeSubstrate
from rollout.config import RolloutConfig, WorkerConfig
from rollout.engine import Sampled, SampleRequest
from rollout.main import load_tokenizer
from rollout.pb.v1 import rollout_pb2 as pb
from rollout.pb.v1.rollout_pb2_grpc import RolloutServiceStub
from rollout.rpc.grpc_server import REQUEST_BYTES_MAX, handlers_of, start_server
from rollout.rpc.listening import listen_at
from rollout.testing import Reply, ScriptedEngine
from rollout.workers import index as index_of_workers
from rollout.workers import worker as worker_module
from rollout.workers.forward import Router
from rollout.workers.index import Index, sqlite_url
from rollout.workers.partitions import Parts
from rollout.workers.worker import Worker

TOKENIZER = load_tokenizer()
AGAIN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED)


class Engine(ScriptedEngine):
    """Reaches a token boundary, when it is asked to, once the gate is open."""

    def __init__(self) -> None:
        super().__init__(TOKENIZER, lambda _session, _turn: Reply(content="Well. " * 100))
        self.has_drawn, self.is_asked, self.gate = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.gate.set()

    async def sample(self, request: SampleRequest) -> AsyncGenerator[Sampled, None]:
        async with aclosing(super().sample(request)) as chunks:
            async for chunk in chunks:
                yield chunk
                self.has_drawn.set()

    async def preempt(self, session: str) -> None:
        self.is_asked.set()
        await self.gate.wait()
        await super().preempt(session)


class Served:
    """A worker behind a port."""

    def __init__(self, worker: Worker, engine: Engine, server: Any, router: Router) -> None:
        self.worker, self.engine = worker, engine
        self._server, self._router = server, router
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.port}")
        self.stub = RolloutServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def stop(self) -> None:
        await self._server.stop()
        await self.worker.close()
        await self._router.close()
        await self._channel.close()

    async def submit(self, request_id: str, size: int = 1, policy: pb.PolicyRule | None = None) -> set[str]:
        """Asked until the job has ended; the ends that came."""
        prompt = pb.Conversation(name=f"of-{request_id}", messages_json='[{"role": "user", "content": "Hi."}]')
        request = pb.SubmitRequest(request_id=request_id, conversations=[prompt], group_size=size, policy=policy)
        request.reward.MergeFrom(pb.Reward(none=pb.NoReward()))
        while True:
            try:
                updates = [update async for update in self.stub.Submit(request)]
            except grpc.aio.AioRpcError as error:
                if error.code() not in AGAIN:
                    raise
            else:
                assert not [update for update in updates if update.HasField("infra_failed")], updates
                return {update.finished.finish_reason for update in updates if update.HasField("finished")}

    async def update_alone(self, checkpoint: Path, policy_version: int) -> None:
        """As between the changes of one worker and another."""
        await self.worker._parts.lent.update(checkpoint, policy_version)

    async def turns(self, count: int = 2) -> None:
        """So many looks at the index, unless the worker fails."""
        for _ in range(count):
            seen = self.worker.snapshot
            while self.worker.snapshot is seen:
                failed = asyncio.ensure_future(self.worker.failed())
                await asyncio.wait([failed], timeout=0.02)
                if failed.done():
                    failed.result()
                failed.cancel()


Start = Callable[[str], Awaitable[Served]]


@pytest.fixture
async def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Start]:
    """`await start(worker_id)`, over one root; what is still there at the end is stopped.

    The root is in memory: on a disk that other tests keep busy, one sync may take as long as a lease does here.
    """
    monkeypatch.setattr(index_of_workers, "CALL_S", 0.5)
    memory = tempfile.TemporaryDirectory(dir="/dev/shm")
    (tmp_path / "root").symlink_to(memory.name)
    running: list[Served] = []

    async def start_(worker_id: str) -> Served:
        root, engine = tmp_path / "root", Engine()
        router = Router(handlers_of, REQUEST_BYTES_MAX)
        server = await start_server(None, listen_at("127.0.0.1:0"), [router])
        bounds = RolloutConfig(log_sync="os", checkpoints_root=tmp_path)
        parts = Parts(engine, TOKENIZER, bounds, lambda _directory, _number: FakeSubstrate(), has_served_edge=False)
        config = WorkerConfig(lease_ttl_s=1.5, grace_s=5)
        worker = Worker(root, Index(sqlite_url(root)), parts, config, worker_id)
        try:
            await worker.open(f"127.0.0.1:{server.port}")
        except BaseException:
            await server.stop()  # it must not outlive the loop of its test
            raise
        router.worker = worker
        await server.serve()
        running.append(Served(worker, engine, server, router))
        return running[-1]

    yield start_
    for each in running:
        await each.stop()
    memory.cleanup()


class Held:
    """The index of a root, out of everybody's reach."""

    def __init__(self, root: Path) -> None:
        self.database = sqlite3.connect(root / "index.db", isolation_level=None, timeout=30)
        self.database.execute("BEGIN IMMEDIATE")

    def release(self) -> None:
        self.database.execute("ROLLBACK")
        self.database.close()


async def drawing(served: Served, request_id: str, policy: pb.PolicyRule | None = None) -> asyncio.Task[set[str]]:
    """A job that has drawn tokens, of an engine that then stands still."""
    task = asyncio.create_task(served.submit(request_id, policy=policy))
    await served.engine.has_drawn.wait()
    await served.engine.pause("keep")
    return task


def checkpoint_of(folder: Path, weights: str = "others") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "weights").write_text(weights)
    return folder


def versions(served: Served, request_id: str) -> list[int]:
    """That drew, in order."""
    (state,) = (
        state
        for owned in served.worker.owned.values()
        for state in owned.service.ledger.rollouts.values()
        if state.opened.request_id == request_id
    )
    return [version for _, version in state.versions]


async def test_answers_of_several_logs_are_one_and_their_numbers_are_added(start: Start) -> None:
    first, second = await start("a"), await start("b")
    await first.submit("one", size=3)
    await second.submit("two", size=2)
    ids = [f"{job}/of-{job}.{n}" for job, count in (("one", 3), ("two", 2)) for n in range(count)]
    assert (await first.stub.Ack(pb.AckRequest(rollout_ids=ids))).acknowledged_count == len(ids)


async def test_a_partition_that_is_handed_over_slowly_is_not_opened_again_before_that_is_done(
    start: Start, tmp_path: Path
) -> None:
    served = await start("a")
    job = await drawing(served, "job")
    served.engine.gate.clear()
    held = Held(tmp_path / "root")
    await served.engine.is_asked.wait()  # its lease ran out
    held.release()
    await served.turns()
    served.engine.gate.set()
    await served.engine.resume()
    assert await job == {"STOP"}


async def test_who_owns_nothing_says_so_rather_than_ok(start: Start, tmp_path: Path) -> None:
    served = await start("a")
    job = await drawing(served, "job")
    held = Held(tmp_path / "root")
    await served.engine.is_asked.wait()  # its lease ran out
    everything = {
        "UpdatePolicy": pb.UpdatePolicyRequest(checkpoint=str(tmp_path), policy_version=1),
        "Preempt": pb.PreemptRequest(everything=True),
        "Resume": pb.ResumeRequest(everything=True),
    }
    for name, request in everything.items():
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(served.stub, name)(request)
        said = "cannot be used now" if name == "UpdatePolicy" else "owns no partition"
        assert (caught.value.code(), said in caught.value.details()) == (grpc.StatusCode.UNAVAILABLE, True)
    held.release()
    await served.engine.resume()
    assert await job == {"STOP"}


async def test_a_log_whose_worker_had_older_weights_goes_on_with_newer_ones(start: Start, tmp_path: Path) -> None:
    first, second = await start("a"), await start("b")
    job = await drawing(first, "job")
    await second.update_alone(checkpoint_of(tmp_path / "v3"), 3)
    job.cancel()
    await first.worker.close()
    assert await second.submit("job") == {"STOP"}
    assert versions(second, "job") == [0, 3]
    for owned in second.worker.owned.values():
        assert owned.service.ledger.policy.engine.policy_version == 3


async def test_newer_weights_that_come_with_a_log_end_what_they_leave_too_far_behind(
    start: Start, tmp_path: Path
) -> None:
    first, second = await start("a"), await start("b")
    job = await drawing(second, "job", pb.PolicyRule(max_lag=1))
    await first.update_alone(checkpoint_of(tmp_path / "v3"), 3)
    await first.worker.close()
    assert await job == {"STALE"}


@pytest.mark.parametrize("what", ["gone", "others"])
async def test_a_log_whose_weights_are_not_there_waits_for_newer_ones_and_ends_nobody(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(worker_module, "AGAIN_S", 0.2)
    first, second = await start("a"), await start("b")
    job = await drawing(first, "job")
    folder = checkpoint_of(tmp_path / "newest", "of 3")
    await first.update_alone(folder, 3)
    if what == "gone":
        (folder / "weights").unlink()
    else:
        checkpoint_of(folder, "of 4")
    job.cancel()
    await first.worker.close()
    await second.turns(4)
    assert await second.submit("another") == {"STOP"}
    newer = str(checkpoint_of(tmp_path / "v4"))
    await second.stub.UpdatePolicy(pb.UpdatePolicyRequest(checkpoint=newer, policy_version=4))
    assert await second.submit("job") == {"STOP"}
    assert versions(second, "job")[-1] == 4


async def test_logs_are_found_again_when_the_index_was_emptied(start: Start, tmp_path: Path) -> None:
    served = await start("a")
    job = await drawing(served, "job")
    with sqlite3.connect(tmp_path / "root/index.db", timeout=30) as database:
        for table in ("workers", "partitions", "jobs", "rollouts"):
            database.execute(f"DELETE FROM {table}")
    await served.turns(4)
    await served.engine.resume()
    assert await job == {"STOP"}


async def test_a_lease_that_was_emptied_is_taken_again_whichever_of_two_tasks_sees_it_first(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await start("a")
    index = served.worker._index
    both, joined = asyncio.Barrier(2), asyncio.Event()

    async def renew(*lease: Any) -> bool:
        if await Index.renew(index, *lease):
            return True
        if await both.wait():  # it looks who is there once the other has joined
            await joined.wait()
        return False

    async def join(*lease: Any) -> None:
        await Index.join(index, *lease)
        joined.set()

    monkeypatch.setattr(index, "renew", renew)
    monkeypatch.setattr(index, "join", join)
    with sqlite3.connect(tmp_path / "root/index.db", timeout=30) as database:
        database.execute("DELETE FROM workers")
    await joined.wait()
    await served.turns()
    assert await served.submit("job") == {"STOP"}
