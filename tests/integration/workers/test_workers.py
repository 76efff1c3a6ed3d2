"""Workers over one root as a trainer meets them: killed, stopped, frozen, cut off from their index; nothing is lost."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from dsec.testing import FakeSubstrate
from rollout.config import RolloutConfig, WorkerConfig
from rollout.main import load_tokenizer
from rollout.pb.v1 import rollout_pb2 as pb
from rollout.pb.v1.rollout_pb2_grpc import RolloutServiceStub
from rollout.testing import Reply, ScriptedEngine
from rollout.workers.index import Index
from rollout.workers.leases import RENEWALS_PER_TTL
from rollout.workers.partitions import Parts
from rollout.workers.worker import Worker

TOKENIZER = load_tokenizer()
SAMPLED = pb.Sampling(temperature=1.0, seed=3)
SHORT_LEASE = {"DSEC_WORKER_LEASE_TTL_S": "3"}  # of those whose lease is to lapse
ON_SQLITE, ON_POSTGRES = (
    pytest.mark.parametrize("index_url", [name], indirect=True) for name in ("sqlite", "postgresql")
)


def folder_of(path: Path) -> pb.TaskFolder:
    files = {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    return pb.TaskFolder(name=path.name, files=files)


def request_of(tasks: Path) -> pb.SubmitRequest:
    """Six rollouts that call tools, some for a while."""
    folders = [folder_of(tasks / name) for name in ("copy-5-000", "bug-5-000", "unclear")]
    limits = pb.Limits(turns_count_max=6)
    mask = [pb.FIELD_LIVE_TOKENS]
    return pb.SubmitRequest(
        request_id="job", tasks=folders, group_size=2, sampling=SAMPLED, limits=limits, return_mask=mask
    )


@pytest.fixture
def request_(tasks: Path) -> pb.SubmitRequest:
    return request_of(tasks)


@pytest.fixture(scope="session")
def untouched(session_dsec: Any, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """The tokens of the same rollouts in a run that nothing happens to: noise depends on seed, id and position."""
    directory = tmp_path_factory.mktemp("untouched") / "server"
    process = session_dsec.start("serve", "--out", directory, "--listen", "127.0.0.1:0")
    address = process.stdout.readline().split()[2].rstrip(",")
    request = request_of(tasks)
    with grpc.insecure_channel(address) as channel:
        stub = RolloutServiceStub(channel)  # type: ignore[no-untyped-call]
        list(stub.Submit(request, timeout=120))
    process.terminate()
    process.communicate(timeout=120)
    return tokens_of(session_dsec.show(directory))


def tokens_of(records: dict[str, dict[str, Any]]) -> dict[str, list[int]]:
    return {rollout_id: record["token_ids"] for rollout_id, record in records.items()}


def begun(worker: Any, request: pb.SubmitRequest) -> Iterator[pb.Update]:
    """Submitted to the worker, whose rollouts now sample; the stream."""
    stream = worker.stub.Submit(request, timeout=120)
    sampled = 0
    while sampled < 12:
        sampled += next(stream).HasField("tokens")
    return stream  # type: ignore[no-any-return]


def check(root: Any, untouched: dict[str, list[int]]) -> dict[str, dict[str, Any]]:
    """Every rollout has ended as in the run that nothing happened to, and nothing was done twice."""
    records: dict[str, dict[str, Any]] = root.show()
    assert tokens_of(records) == untouched
    for record in records.values():
        assert record["finish_reason"] is not None
        assert record["infra_failure"] is None
        assert (record["tokens_regenerated"], record["commands_run_twice"]) == (0, 0)
    return records


def epochs(seen: Any) -> list[int]:
    return sorted(partition["epoch"] for partition in seen["partitions"])


@pytest.fixture
def served_edge(root: Any, edge_process: Any, dsec: Any, tmp_path: Path) -> Iterator[Any]:
    """An Edge that the workers share; each has one of its own otherwise."""
    served = edge_process(dsec, tmp_path / "edge")
    root.options = ("--edge", served.url)
    yield served
    for worker in root.workers:
        if worker.process.returncode is None:
            worker.stop()
    assert json.loads(served.done("ps", "--json")) == []
    served.stop()


@ON_SQLITE
def test_what_a_killed_worker_ran_is_ended_by_another(
    root: Any, request_: pb.SubmitRequest, untouched: dict[str, list[int]]
) -> None:
    first, second = root.start("a", **SHORT_LEASE), root.start("b")
    assert epochs(root.look()) == [1, 1]
    begun(first, request_)
    first.kill()
    assert root.finish(request_, second) == set(untouched)
    records = check(root, untouched)
    assert max(record["lineage"]["attempt"] for record in records.values()) == 2
    assert sum(record["commands_replayed"] for record in records.values()) == 0  # its sandboxes lived on
    seen = root.look()
    assert epochs(seen) == [1, 2]
    assert {partition["owner"].partition("#")[0] for partition in seen["partitions"]} == {"b"}


@ON_POSTGRES
def test_a_stopped_worker_hands_over_at_once(
    root: Any, request_: pb.SubmitRequest, untouched: dict[str, list[int]]
) -> None:
    first, second = root.start("a", DSEC_WORKER_LEASE_TTL_S="600"), root.start("b")
    stream = begun(first, request_)
    first.stop()
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert root.finish(request_, second) == set(untouched)  # long before the lease would have lapsed
    records = check(root, untouched)
    assert sum(record["commands_replayed"] for record in records.values()) == 0
    assert [worker["worker_id"] for worker in root.look()["workers"]] == ["b"]


@ON_SQLITE
def test_when_all_were_killed_a_new_worker_goes_on(
    root: Any, request_: pb.SubmitRequest, untouched: dict[str, list[int]]
) -> None:
    first, second = (root.start(name, **SHORT_LEASE) for name in "ab")
    begun(first, request_)
    second.kill()
    first.kill()
    third = root.start("c")
    assert root.finish(request_, third) == set(untouched)
    check(root, untouched)


@ON_SQLITE
def test_a_killed_worker_that_comes_back_waits_for_no_lease(
    root: Any, request_: pb.SubmitRequest, untouched: dict[str, list[int]]
) -> None:
    first = root.start("a", DSEC_WORKER_LEASE_TTL_S="600")
    begun(first, request_)
    first.kill()
    again = root.start("a", DSEC_WORKER_LEASE_TTL_S="600")
    assert root.finish(request_, again) == set(untouched)
    check(root, untouched)


@ON_POSTGRES
def test_a_frozen_worker_is_fenced_when_it_wakes(
    root: Any, request_: pb.SubmitRequest, untouched: dict[str, list[int]]
) -> None:
    first, second = root.start("a", **SHORT_LEASE), root.start("b")
    stream = begun(first, request_)
    first.process.send_signal(signal.SIGSTOP)
    assert root.finish(request_, second) == set(untouched)
    before = check(root, untouched)
    first.process.send_signal(signal.SIGCONT)
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED)
    root.until(lambda seen: len({partition["owner"] for partition in seen["partitions"]}) == 2)  # it has a share again
    assert check(root, untouched) == before
    assert root.finish(request_, first) == set(untouched)


@ON_POSTGRES
def test_one_request_at_two_workers_is_one_job(root: Any, request_: pb.SubmitRequest) -> None:
    workers = [root.start("a"), root.start("b")]
    streams = [worker.stub.Submit(request_, timeout=120) for worker in workers for _ in range(3)]
    finished = [{update.rollout_id for update in stream if update.HasField("finished")} for stream in streams]
    assert finished == [set(root.show())] * 6
    changed = pb.SubmitRequest.FromString(request_.SerializeToString())
    changed.sampling.seed = 4
    for worker in workers:
        with pytest.raises(grpc.RpcError) as caught:
            list(worker.stub.Submit(changed, timeout=60))
        assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS


@ON_SQLITE
def test_a_call_to_any_worker_reaches_who_has_the_job(root: Any, request_: pb.SubmitRequest) -> None:
    first, second = root.start("a"), root.start("b")
    stream = begun(first, request_)
    rollout_id = "job/copy-5-000.0"
    (record,) = second.stub.Get(pb.GetRequest(rollout_id=rollout_id), timeout=60)
    assert record.rollout_id == rollout_id
    following = second.stub.Attach(pb.AttachRequest(request_id="job"), timeout=60)
    assert next(following).event > 0
    assert second.stub.Cancel(pb.CancelRequest(request_id="job"), timeout=60).cancelled_count > 0
    for each in (stream, following):
        assert {update.finished.finish_reason for update in each if update.HasField("finished")} >= {"CANCELLED"}
    for worker in (first, second):
        for call, message in (
            (worker.stub.Cancel, pb.CancelRequest(request_id="nothing")),
            (worker.stub.Cancel, pb.CancelRequest(request_id="\x00/" * 100)),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call(message, timeout=60)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@ON_POSTGRES
def test_rollouts_of_several_workers_are_listed_stopped_and_resumed_at_any_of_them(
    root: Any, request_: pb.SubmitRequest
) -> None:
    workers = [root.start("a"), root.start("b")]
    request_.limits.turns_count_max = 1000
    jobs = {}
    for worker, request_id in zip(workers, ("one", "two"), strict=True):
        request_.request_id = request_id
        jobs[request_id] = pb.SubmitRequest.FromString(request_.SerializeToString())
        begun(worker, jobs[request_id])
    ids = sorted(f"{job}/{task.name}.{index}" for job in jobs for task in request_.tasks for index in range(2))
    for worker in workers:
        token, listed = "", []
        while not listed or token:
            page = worker.stub.List(pb.ListRequest(page_size=4, page_token=token), timeout=60)
            listed += [each.rollout_id for each in page.rollouts]
            token = page.next_page_token
        assert sorted(listed) == ids
    long = [f"{job}/unclear.{index}" for job in jobs for index in range(2)]
    target = {"rollouts": pb.RolloutIds(rollout_ids=long)}
    stopped = workers[0].stub.Preempt(pb.PreemptRequest(**target), timeout=60)
    assert sorted(stopped.rollout_ids) == long
    resumed = workers[1].stub.Resume(pb.ResumeRequest(**target), timeout=60)
    assert sorted(resumed.rollout_ids) == long
    with pytest.raises(grpc.RpcError) as caught:
        workers[0].stub.List(pb.ListRequest(page_token="nobody|1"), timeout=60)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    for worker, job in zip(reversed(workers), jobs, strict=True):
        worker.stub.Cancel(pb.CancelRequest(request_id=job), timeout=60)


@ON_SQLITE
def test_a_worker_id_is_one_process(root: Any) -> None:
    root.start("a")
    index = ("--index", root.url)
    ran = root.dsec("serve", "--root", root.directory, "--worker-id", "a", "--listen", "127.0.0.1:0", *index)
    assert (ran.code, "worker 'a' of" in ran.err, "--worker-id" in ran.err) == (2, True, True), ran.err


@ON_SQLITE
def test_the_index_is_made_again_from_the_logs(
    root: Any, request_: pb.SubmitRequest, untouched: dict[str, list[int]], tmp_path: Path
) -> None:
    first = root.start("a")
    assert root.finish(request_, first) == set(untouched)
    first.stop()
    root.url = f"sqlite:///{tmp_path / 'other.db'}"
    ran = root.dsec.done("index", "rebuild", root.directory, "--index", root.url)
    assert ran.out == "dsec: 1 logs, 6 rollouts\n"
    seen = root.look()
    assert (seen["workers"], epochs(seen)) == ([], [1])
    second, third = root.start("b"), root.start("c")
    assert root.finish(request_, third) == root.finish(request_, second) == set(untouched)
    check(root, untouched)


@ON_POSTGRES
def test_a_database_that_is_killed_in_mid_run_costs_nothing(
    root: Any, postgres: Any, request_: pb.SubmitRequest, untouched: dict[str, list[int]]
) -> None:
    first = root.start("a")
    stream = begun(first, request_)
    postgres.kill()
    try:
        assert {update.rollout_id for update in stream if update.HasField("finished")} == set(untouched)
        other = pb.SubmitRequest(request_id="other", tasks=request_.tasks)
        with pytest.raises(grpc.RpcError) as caught:
            list(first.stub.Submit(other, timeout=60))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "the index" in caught.value.details()
    finally:
        postgres.start()
    records = check(root, untouched)
    assert {record["lineage"]["attempt"] for record in records.values()} == {1}


@ON_SQLITE
def test_a_worker_whose_disk_is_full_says_so_and_ends_and_with_more_room_goes_on(
    root: Any, request_: pb.SubmitRequest, untouched: dict[str, list[int]]
) -> None:
    root.directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "none", root.directory], check=True)
    try:
        first = root.start("a")
        stream = first.stub.Submit(request_, timeout=120)
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        _, err = first.process.communicate(timeout=120)
        assert first.process.returncode == 3
        assert "No space left on device (ENOSPC); acknowledged records are safe; free some space" in err
        subprocess.run(["mount", "-o", "remount,size=24m", root.directory], check=True)
        again = root.start("a")
        assert root.finish(request_, again) == set(untouched)
        check(root, untouched)
        again.stop()
    finally:
        subprocess.run(["umount", "--lazy", root.directory], check=True)


@ON_POSTGRES
def test_without_its_database_and_its_edge_a_worker_stops_when_its_lease_ends_and_then_goes_on(
    root: Any, postgres: Any, served_edge: Any, request_: pb.SubmitRequest, untouched: dict[str, list[int]]
) -> None:
    request_.limits.turns_count_max = 1000  # beyond the lease
    first = root.start("a", DSEC_WORKER_LEASE_TTL_S="1.5")
    stream = begun(first, request_)
    served_edge.process.send_signal(signal.SIGSTOP)  # so that what the worker lets go of takes its time
    postgres.kill()
    try:
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        postgres.start()
    root.until(lambda seen: seen["workers"][0]["lease_s"] > 0)  # its own again, and not yet let go of
    served_edge.process.send_signal(signal.SIGCONT)
    assert root.finish(request_, first) == set(untouched)
    records = root.show()
    assert max(record["lineage"]["attempt"] for record in records.values()) >= 2
    assert {record["commands_run_twice"] for record in records.values()} == {0}


@ON_SQLITE
async def test_a_lease_is_kept_while_a_partition_takes_longer_than_it_to_open(index_url: str, tmp_path: Path) -> None:
    may_open, opening = asyncio.Event(), asyncio.Event()

    class SlowSubstrate(FakeSubstrate):
        async def open(self) -> None:
            opening.set()
            await may_open.wait()
            await super().open()

    parts = Parts(
        ScriptedEngine(TOKENIZER, lambda _session, _turn: Reply()),
        TOKENIZER,
        RolloutConfig(),
        lambda _directory, _number: SlowSubstrate(),
        has_served_edge=False,
    )
    worker = Worker(tmp_path / "root", Index(index_url), parts, WorkerConfig(lease_ttl_s=1), "a")
    starting = asyncio.create_task(worker.open("127.0.0.1:1"))
    await opening.wait()
    index, renewals, left_s = Index(index_url), 0, 0.0
    while renewals <= RENEWALS_PER_TTL:
        ((told,)) = (await index.snapshot()).workers
        assert told.lease_s > 0
        renewals, left_s = renewals + (told.lease_s > left_s), told.lease_s
    await index.close()
    may_open.set()
    await starting
    assert await worker.close()
