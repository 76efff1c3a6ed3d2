"""`dsec serve` as a trainer has it: real processes, real sockets, kill -9, and clients that go away."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from rollout.bench.tasks import BUNDLED
from rollout.client import Group, RolloutClient
from rollout.engine import Sampling
from rollout.pb.v1 import rollout_pb2 as pb
from rollout.pb.v1.rollout_pb2_grpc import RolloutServiceStub
from rollout.request import Limits

EVERYTHING = (pb.FIELD_LIVE_TOKENS, pb.FIELD_TOKENS, pb.FIELD_LOGPROBS, pb.FIELD_TEXT)
LIFE = ("opened", "sandbox_prepared", "tokens", "tool_answered", "judged", "finished")


MANY = 16
"""Rollouts of a task that are still at work when somebody who has read of them kills their server."""


class Server:
    """A `dsec serve` process over `directory`, and a channel to it."""

    def __init__(self, dsec: Any, directory: Path, listen: str = "127.0.0.1:0", **options: Any) -> None:
        self.dsec = dsec
        command = ("serve", "--out", directory, "--listen", listen)
        self.process: subprocess.Popen[str] = dsec.start(*command, **options)
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        assert said.startswith("dsec: serving 127.0.0.1:"), self.process.communicate()
        self.address = said.split()[2].rstrip(",")
        self.taken_up = int(said.split(", ")[2].split()[0])
        self.channel = grpc.insecure_channel(self.address)
        self.rollouts = RolloutServiceStub(self.channel)  # type: ignore[no-untyped-call]
        self.health = health_pb2_grpc.HealthStub(self.channel)

    def is_serving(self) -> bool:
        reply = self.health.Check(health_pb2.HealthCheckRequest(), timeout=60)
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def submit(self, request: pb.SubmitRequest) -> list[pb.Update]:
        return list(self.rollouts.Submit(request, timeout=60))

    def stop(self) -> None:
        self.channel.close()
        self.process.terminate()
        _, err = self.process.communicate(timeout=120)
        assert (self.process.returncode, err.startswith("dsec: stopped, "), err.count("\n")) == (0, True, 1), err

    def kill(self) -> None:
        self.channel.close()
        self.dsec.kill(self.process)


@pytest.fixture
def serve(dsec: Any, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers over one directory, one after another; stops what still runs."""
    started: list[Server] = []

    def start(**options: Any) -> Server:
        started.append(Server(dsec, tmp_path / "server", **options))
        return started[-1]

    yield start
    for server in started:
        if server.process.returncode is None:
            server.stop()


def folder_of(path: Path) -> pb.TaskFolder:
    files = {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    return pb.TaskFolder(name=path.name, files=files)


def group(folder: Path, request_id: str = "job", **fields: Any) -> pb.SubmitRequest:
    """Two rollouts each of a task that is solved and of one that goes on for a while."""
    return pb.SubmitRequest(
        **{
            "request_id": request_id,
            "tasks": [folder_of(folder / "copy-5-000"), folder_of(folder / "unclear")],
            "group_size": 2,
            "sampling": pb.Sampling(temperature=1.0, seed=3),
            "limits": pb.Limits(turns_count_max=6),
            "return_mask": EVERYTHING,
            **fields,
        }
    )


def finished_of(updates: list[pb.Update]) -> dict[str, pb.Trajectory]:
    return {update.rollout_id: update.finished for update in updates if update.HasField("finished")}


def tokens_of(updates: list[pb.Update]) -> dict[str, list[int]]:
    return {rollout_id: list(record.token_ids) for rollout_id, record in finished_of(updates).items()}


@contextlib.contextmanager
def refused(status: grpc.StatusCode, *said: str) -> Iterator[None]:
    with pytest.raises(grpc.RpcError) as caught:
        yield
    assert caught.value.code() is status
    assert [text for text in said if text not in caught.value.details()] == [], caught.value.details()


def check_stream(updates: list[pb.Update]) -> None:
    """The updates of one rollout stand in the order of its life and add up to its trajectory."""
    kinds = [str(update.WhichOneof("what")) for update in updates]
    assert kinds[0] == "opened"
    assert kinds[-2:] == ["judged", "finished"]
    assert set(kinds) <= set(LIFE)
    record, position = updates[-1].finished, updates[0].opened.prompt_tokens_count
    answered = [update.tool_answered for update in updates if update.HasField("tool_answered")]
    assert [call.call_index for call in answered] == list(range(len(record.tool_calls)))
    assert [call.exit_code for call in answered] == [call.exit for call in record.tool_calls]
    sampled = 0
    for update in updates:
        if update.HasField("tokens"):
            start, ids = update.tokens.start, list(update.tokens.token_ids)
            assert start >= position
            assert list(record.token_ids[start : start + len(ids)]) == ids
            assert list(record.logprobs[start : start + len(ids)]) == pytest.approx(list(update.tokens.logprobs))
            position, sampled = start + len(ids), sampled + len(ids)
    assert sampled == record.tokens_sampled == sum(not math.isnan(value) for value in record.logprobs)
    assert sum(span.length for span in record.spans) == len(record.token_ids) == len(record.logprobs)
    assert updates[-2].judged.reward == record.reward.value


def test_a_group_is_streamed_in_order_and_a_second_submit_attaches_to_it(serve: Any, tasks: Path) -> None:
    server = serve()
    updates = server.submit(group(tasks))
    rollouts = ["job/copy-5-000.0", "job/copy-5-000.1", "job/unclear.0", "job/unclear.1"]
    assert sorted(finished_of(updates)) == rollouts
    for rollout_id in rollouts:
        check_stream([update for update in updates if update.rollout_id == rollout_id])
    assert finished_of(updates)["job/copy-5-000.1"].group.index == 1
    assert server.submit(group(tasks)) == updates
    with refused(grpc.StatusCode.ALREADY_EXISTS, "request 'job' was submitted before with other contents: sampling"):
        server.submit(group(tasks, sampling=pb.Sampling(temperature=1.0, seed=4)))


def test_get_returns_what_the_mask_asks_for(serve: Any, tasks: Path) -> None:
    server = serve()
    bundled = min(path.name for path in BUNDLED.iterdir() if path.is_dir())
    request = pb.SubmitRequest(request_id="b", bundled_tasks=[bundled], return_mask=[pb.FIELD_UNSPECIFIED])
    updates = server.submit(request)
    assert {update.WhichOneof("what") for update in updates} == set(LIFE) - {"tokens"}
    assert [update for update in updates if update.tool_answered.observation] == []
    rollout_id = f"b/{bundled}.0"

    def get(*mask: int) -> pb.Trajectory:
        (record,) = server.rollouts.Get(pb.GetRequest(rollout_id=rollout_id, return_mask=mask))
        return record

    whole, bare = get(*EVERYTHING), get()
    assert (bare.task, bare.finish_reason, bare.reward.HasField("value")) == (bundled, "STOP", True)
    big = {"token_ids", "spans", "logprobs", "turns", "tool_calls"}
    named = {
        pb.FIELD_TOKENS: {"token_ids", "spans"},
        pb.FIELD_LOGPROBS: {"logprobs"},
        pb.FIELD_TEXT: {"turns", "tool_calls"},
    }
    assert {field for field in big if len(getattr(whole, field))} == big
    assert {field for field in big if len(getattr(bare, field))} == set()
    for mask, fields in named.items():
        assert {field for field in big if len(getattr(get(mask), field))} == fields
    with refused(grpc.StatusCode.NOT_FOUND, "no rollout 'b/nothing.0'"):
        list(server.rollouts.Get(pb.GetRequest(rollout_id="b/nothing.0")))
    with refused(grpc.StatusCode.NOT_FOUND, "no job 'nothing'"):
        server.rollouts.Cancel(pb.CancelRequest(request_id="nothing"))


def test_bad_requests_are_refused_with_the_reason_and_leave_nothing(serve: Any, tasks: Path) -> None:
    server, good = serve(), folder_of(tasks / "unclear")
    no_test = pb.TaskFolder(name="t", files={n: data for n, data in good.files.items() if n != "tests/test.sh"})
    outside = pb.TaskFolder(name="t", files={**good.files, "../out": b""})
    for said, fields in {
        "tests/test.sh: missing: a task is a folder": {"tasks": [no_test]},
        "'../out': not a plain relative path": {"tasks": [outside]},
        "the name 'a/b': use letters": {"tasks": [pb.TaskFolder(name="a/b", files=good.files)]},
        "no bundled task nosuch": {"tasks": [], "bundled_tasks": ["nosuch"]},
        "a job needs at least one task": {"tasks": []},
        "task names must differ within a job: unclear": {"tasks": [good, good]},
        "group_size is 5000, must be 1 to 1024": {"group_size": 5000},
        "temperature is -1.0, must be 0 (greedy) or 0.001 to 10": {"sampling": pb.Sampling(temperature=-1)},
        "top_p is 2.0": {"sampling": pb.Sampling(top_p=2)},
        "tool_timeout_s is -1.0, must be above 0": {"limits": pb.Limits(tool_timeout_s=-1)},
        "context_tokens_count_max is 9000000": {"limits": pb.Limits(context_tokens_count_max=9_000_000)},
        "request_id '': use 1 to 128": {"request_id": ""},
        "thinking: 9 is not known to this server": {"thinking": 9},
    }.items():
        with refused(grpc.StatusCode.INVALID_ARGUMENT, said):
            server.submit(group(tasks, **fields))
    with refused(grpc.StatusCode.NOT_FOUND, "no job 'job'"):
        server.rollouts.Cancel(pb.CancelRequest(request_id="job"))


def test_a_cancelled_job_ends_and_stays_ended(serve: Any, tasks: Path) -> None:
    server = serve()
    long = group(tasks, limits=pb.Limits(turns_count_max=1000), tasks=[folder_of(tasks / "bug-5-000")], group_size=3)
    updates = []
    for update in server.rollouts.Submit(long, timeout=60):
        updates.append(update)
        if update.HasField("tokens") and sum(u.HasField("tokens") for u in updates) == 10:
            with ThreadPoolExecutor() as pool:  # two at once must not end a rollout twice
                replies = list(pool.map(server.rollouts.Cancel, [pb.CancelRequest(request_id="job")] * 2))
            assert sorted(reply.cancelled_count for reply in replies) == [0, 3]
    ended = finished_of(updates)
    assert {record.finish_reason for record in ended.values()} == {"CANCELLED"}
    assert len(ended) == 3
    for record in ended.values():
        assert not record.reward.HasField("value")
        assert sum(span.length for span in record.spans) == len(record.token_ids) == len(record.logprobs)
    server.kill()
    server = serve()
    assert server.taken_up == 0
    assert tokens_of(server.submit(long)) == tokens_of(updates)


def test_a_verifier_that_fails_is_told_apart_from_a_wrong_answer(serve: Any, make_task: Any, tmp_path: Path) -> None:
    server, task = serve(), make_task(tmp_path / "broken", test_sh="true\n")
    request = pb.SubmitRequest(request_id="job", tasks=[folder_of(task)], agent=pb.AGENT_ORACLE)
    for updates in (server.submit(request), server.submit(request)):
        last = updates[-1]
        assert (last.WhichOneof("what"), last.infra_failed.code) == ("infra_failed", "VERIFIER_ERROR")
        assert "no reward: test.sh must write" in last.infra_failed.message
    (record,) = server.rollouts.Get(pb.GetRequest(rollout_id="job/broken.0"))
    assert (record.reward.HasField("value"), record.finish_reason, record.infra_failure.code) == (
        False,
        "",
        "VERIFIER_ERROR",
    )


def test_after_a_kill_a_restarted_server_finishes_with_equal_tokens(serve: Any, tasks: Path, dsec: Any) -> None:
    server = serve()
    seen: list[pb.Update] = []
    with contextlib.suppress(grpc.RpcError):
        for update in server.rollouts.Submit(group(tasks, "killed", group_size=MANY), timeout=60):
            seen.append(update)
            if sum(update.HasField("tokens") for update in seen) == 2:
                server.kill()
    assert server.process.returncode == -9
    assert not all(f"killed/unclear.{index}" in finished_of(seen) for index in (0, 1))
    server = serve()
    assert server.taken_up > 0
    updates = server.submit(group(tasks, "killed", group_size=MANY))
    assert len(finished_of(updates)) == 2 * MANY
    ids = tokens_of(updates)
    for update in seen:  # what a client saw before the kill is what stands
        if update.HasField("tokens"):
            start, streamed = update.tokens.start, list(update.tokens.token_ids)
            assert ids[update.rollout_id][start : start + len(streamed)] == streamed
    assert [record for record in finished_of(updates).values() if record.commands_run_twice != 0] == []
    # Noise is keyed by the group's name: the same request on a fresh directory gives the same.
    fresh = Server(dsec, Path(server.process.args[3]).with_name("fresh"))  # type: ignore[index]
    assert tokens_of(fresh.submit(group(tasks, "killed", group_size=MANY))) == ids
    fresh.stop()


def test_a_clients_loop_notices_nothing_of_servers_that_are_killed(serve: Any, tasks: Path) -> None:
    server = serve()
    address, job = server.address, group(tasks, "killed", group_size=MANY)
    prompts = [tasks / task.name for task in job.tasks]
    asked = {"group_size": MANY, "sampling": Sampling(temperature=1.0, seed=3), "limits": Limits(turns_count_max=6)}

    def program() -> list[Group]:
        with RolloutClient(address) as client:
            return list(client.rollouts(prompts, request_id="killed", **asked))

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(program)
        assert next(server.rollouts.Submit(job, timeout=60)).HasField("opened")  # the same job: whoever comes first
        told = []
        for _ in range(3):
            known = server.rollouts.List(pb.ListRequest(request_id="killed")).rollouts
            now = pb.AttachRequest(request_id="killed", from_event=max(each.last_event for each in known) + 1)
            now.return_mask.append(pb.FIELD_LIVE_TOKENS)
            tokens = (update for update in server.rollouts.Attach(now, timeout=60) if update.HasField("tokens"))
            told.append(len(list(islice(tokens, 2))))  # fewer: all have ended, and only the asking is cut off
            server.kill()
            server = serve(listen=address)
        groups = running.result(timeout=120)
    assert told[0] == 2
    updates = server.submit(job)
    assert sorted(each.group_id for each in groups) == ["killed/copy-5-000", "killed/unclear"]
    members = {member.rollout_id: member for each in groups for member in each.trajectories}
    assert {name: list(member.token_ids) for name, member in members.items()} == tokens_of(updates)
    again = [(member.record.tokens_regenerated, member.record.commands_run_twice) for member in members.values()]
    assert [each for each in again if each != (0, 0)] == []
    numbers = [update.event for update in updates if update.is_last]
    assert numbers == sorted(set(numbers))
    assert [each for each in groups if not each.is_whole] == []


def test_a_client_that_goes_away_leaves_the_job_running(serve: Any, tasks: Path) -> None:
    server = serve()
    call = server.rollouts.Submit(group(tasks), timeout=60)
    assert next(call).HasField("opened")
    call.cancel()
    assert len(finished_of(server.submit(group(tasks)))) == 4


def test_many_submits_at_once_are_all_served(serve: Any, tasks: Path) -> None:
    server = serve()
    small = [folder_of(tasks / "copy-5-000")]
    requests = [group(tasks, f"job-{n % 12}", tasks=small, agent=pb.AGENT_ORACLE) for n in range(24)]
    with ThreadPoolExecutor(24) as pool:
        streams = list(pool.map(server.submit, requests))
    for request, updates in zip(requests, streams, strict=True):
        assert sorted(finished_of(updates)) == [f"{request.request_id}/copy-5-000.{index}" for index in (0, 1)]
        assert {record.reward.value for record in finished_of(updates).values()} == {1}
    server.stop()
    assert len(server.dsec.show(Path(server.process.args[3]))) == 24  # type: ignore[index]


def test_health_and_reflection_are_served(serve: Any) -> None:
    server = serve()
    for name in ("", "rollout.pb.v1.RolloutService"):
        status = server.health.Check(health_pb2.HealthCheckRequest(service=name)).status
        assert status == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
    (reply,) = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = {service.name for service in reply.list_services_response.service}
    assert {"rollout.pb.v1.RolloutService", "grpc.health.v1.Health"} <= names


def test_noise_on_the_port_and_idle_connections_do_not_disturb_the_service(serve: Any, tasks: Path) -> None:
    server = serve()
    host, port = server.address.split(":")
    with contextlib.ExitStack() as open_ones:
        for number in range(100):
            idle = open_ones.enter_context(socket.create_connection((host, int(port)), timeout=60))
            if number % 2:
                idle.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[: number // 2])
        for noise in (b"\0" * 1000, b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 64, b"\xff"):
            with socket.create_connection((host, int(port)), timeout=60) as noisy, contextlib.suppress(ConnectionError):
                noisy.sendall(noise)
                with contextlib.suppress(OSError):  # not connected: thrown out by now
                    noisy.shutdown(socket.SHUT_WR)
                while noisy.recv(4096):
                    pass
        assert server.is_serving()
        small = group(tasks, tasks=[folder_of(tasks / "copy-5-000")], agent=pb.AGENT_ORACLE)
        assert {record.reward.value for record in finished_of(server.submit(small)).values()} == {1}


def test_the_service_answers_while_a_request_is_checked(serve: Any, tasks: Path, tmp_path: Path) -> None:
    """The check asks dpkg about what a task installs: here, one that answers when the test says so."""
    asked, answer = tmp_path / "asked", tmp_path / "answer"
    os.mkfifo(asked)
    os.mkfifo(answer)
    (tmp_path / "bin").mkdir()
    slow = tmp_path / "bin/dpkg-query"
    slow.write_text(f"#!/bin/sh\necho > {asked}; cat {answer}\n")
    slow.chmod(0o755)
    server = serve(env={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"})
    task = folder_of(tasks / "copy-5-000")
    task.files["environment/Dockerfile"] += b"RUN apt-get update && apt-get install -y dsec-no-such-package\n"
    with ThreadPoolExecutor() as pool:
        submitted = pool.submit(server.submit, group(tasks, tasks=[task]))
        assert asked.read_text() == "\n"
        try:
            assert server.is_serving()
        finally:
            answer.write_text("")
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "needs dsec-no-such-package on this host"):
            submitted.result()


def test_a_signal_is_told_to_health_checks_before_the_server_stops(serve: Any, tasks: Path) -> None:
    server = serve()
    seen = server.health.Watch(health_pb2.HealthCheckRequest())
    assert next(seen).status == health_pb2.HealthCheckResponse.SERVING
    stream = server.rollouts.Submit(group(tasks, limits=pb.Limits(turns_count_max=1000)), timeout=60)
    assert next(stream).HasField("opened")
    server.process.terminate()
    assert next(seen).status == health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE  # which says: try again
    server.stop()
    assert serve().taken_up > 0
