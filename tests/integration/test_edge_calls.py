"""Calls that share a stream: order, cancellation, deadlines, breaks, bounds, and an Edge that knows no such stream."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from dsec.client import calls, connection
from dsec.client.connection import Connection, Patience, connect
from dsec.client.sandbox import AsyncSandbox
from dsec.edge import grpc_server
from dsec.errors import DsecError, InvalidArgumentError, UnreachableError
from dsec.pb.v1 import edge_pb2 as pb
from dsec.pb.v1.edge_pb2_grpc import EdgeStub

NOW = Patience(connect_s=0.0, lost_s=0.0)
RULES = pb.NetworkPolicy(rules=[pb.NetworkRule()] * 257)


def stream_of(connection: Connection) -> calls.Calls:
    stream = connection._calls
    assert stream is not None
    return stream


async def test_short_calls_share_one_stream_and_end_out_of_order(world: Any) -> None:
    await world.start()
    async with await AsyncSandbox.create(url=world.url) as sandbox:
        stream = stream_of(sandbox._connection)
        waits = asyncio.create_task(sandbox.commands.run(["wait"]))
        await world.arrived.get()
        assert (await sandbox.commands.run(["a"])).exit_code == 7
        assert not waits.done()
        assert len(stream._waiting) == 1
        world.proceed.set()
        assert (await waits).exit_code == 7
        assert stream_of(sandbox._connection) is stream
        large = await sandbox.commands.run(["a"], stdin=bytes(connection.SHORT_BYTES_MAX))
        assert large.exit_code == 7


async def test_a_call_cancelled_on_a_shared_stream_disturbs_no_other(world: Any) -> None:
    await world.start()
    async with await AsyncSandbox.create(url=world.url) as sandbox:
        one = asyncio.create_task(sandbox.commands.run(["wait", "1"]))
        two = asyncio.create_task(sandbox.commands.run(["wait", "2"]))
        for _ in range(2):
            await world.arrived.get()
        one.cancel()
        await asyncio.wait([one])
        assert one.cancelled()
        world.proceed.set()
        assert (await two).exit_code == 7
        results = [(view.command.argv[1], view.result) async for view in sandbox.trajectory()]
        assert {name: result.exit_code for name, result in results if result is not None} == {"1": 137, "2": 7}


async def test_a_deadline_abandons_the_call_and_says_that_nobody_answered(world: Any) -> None:
    await world.start()
    async with await AsyncSandbox.create(url=world.url) as sandbox:
        handle = await sandbox.commands.run(["wait"], background=True)
        asked = sandbox._connection.call("Wait", handle.process._reference, timeout_s=0.01, patience=NOW)
        with pytest.raises(UnreachableError, match="Deadline Exceeded"):
            await asked
        assert (await sandbox.view()).state == "running"
        await asyncio.gather(*world.servers[0]._servicer._calls, return_exceptions=True)  # though the command runs on
        world.proceed.set()
        assert (await handle.wait()).exit_code == 7


async def test_an_edge_that_stops_ends_idle_streams_at_once_and_the_next_is_asked_on_a_new_one(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.start()
    sandbox = await AsyncSandbox.create(url=world.url)
    stream = stream_of(sandbox._connection)
    monkeypatch.setattr(grpc_server, "STOP_GRACE_S", 1e6)
    await world.stop()
    await world.start()
    assert (await sandbox.commands.run(["a"])).exit_code == 7
    assert stream.has_ended
    assert stream_of(sandbox._connection) is not stream
    await sandbox.kill()


async def test_what_does_not_fit_on_a_stream_goes_by_itself(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.start()
    monkeypatch.setattr(calls, "CALLS_COUNT_MAX", 1)
    async with await AsyncSandbox.create(url=world.url) as sandbox:
        waits = asyncio.create_task(sandbox.commands.run(["wait"]))
        await world.arrived.get()
        assert not stream_of(sandbox._connection).has_room
        assert (await sandbox.commands.run(["a"])).exit_code == 7
        world.proceed.set()
        assert (await waits).exit_code == 7


async def test_an_edge_without_the_stream_is_asked_call_by_call(tmp_path: Path) -> None:
    async def get_host(_request: pb.GetHostRequest, _context: Any) -> pb.Host:
        return pb.Host(used={"old": 1.0})

    handler = grpc.unary_unary_rpc_method_handler(get_host, pb.GetHostRequest.FromString, pb.Host.SerializeToString)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("dsec.pb.v1.Edge", {"GetHost": handler}),))
    server.add_insecure_port(f"unix:{tmp_path}/old.sock")
    await server.start()
    asked = connect(f"unix:{tmp_path}/old.sock")
    for _ in range(2):
        assert (await asked.call("GetHost", pb.GetHostRequest())).used == {"old": 1.0}
    assert not asked._has_stream
    await asked.close()
    await server.stop(None)


async def test_a_hostile_stream_ends_and_nobody_elses(world: Any) -> None:
    await world.start()
    async with await AsyncSandbox.create(url=world.url) as sandbox:
        options = [("grpc.max_send_message_length", -1)]
        async with grpc.aio.insecure_channel(world.url, options=options) as channel:
            stub: Any = EdgeStub(channel)  # type: ignore[no-untyped-call]
            for request, status in (
                (pb.CallRequest(id=1, method="Exec", request=bytes(41 << 20)), grpc.StatusCode.RESOURCE_EXHAUSTED),
                (pb.CallRequest(id=1, method="Exec", request=b""), grpc.StatusCode.INVALID_ARGUMENT),
            ):
                call = stub.Calls()
                await call.write(pb.CallRequests(requests=[request] * 2))
                with contextlib.suppress(grpc.aio.AioRpcError):
                    while await call.read() is not grpc.aio.EOF:  # type: ignore[attr-defined]
                        pass
                assert await call.code() is status
        assert (await sandbox.commands.run(["a"])).exit_code == 7


@pytest.mark.parametrize(
    ("method", "message", "said"),
    [
        ("Create", pb.CreateRequest(labels={"a": "x" * (1 << 20)}), "the request of Create has 10485"),
        ("UpdateNetwork", pb.UpdateNetworkRequest(policy=RULES), "257 network rules, more than 256"),
        (
            "Exec",
            pb.ExecRequest(command=pb.Command(argv=[b""] * (1 << 18))),
            "262144 arguments and variables",
        ),
    ],
)
async def test_what_holds_millions_is_refused_before_it_is_made(
    world: Any, method: str, message: Message, said: str
) -> None:
    await world.start()
    data = message.SerializeToString()
    async with grpc.aio.insecure_channel(world.url) as channel:
        by_itself = channel.unary_unary(f"/dsec.pb.v1.Edge/{method}")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await by_itself(data)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert said in (refused.value.details() or "")
        stub: Any = EdgeStub(channel)  # type: ignore[no-untyped-call]
        shared = stub.Calls()
        await shared.write(pb.CallRequests(requests=[pb.CallRequest(id=1, method=method, request=data)]))
        (reply,) = (await shared.read()).replies
        assert reply.details == refused.value.details()
        shared.cancel()


async def test_a_loop_that_ends_with_its_connection_open_leaves_the_next_one_nothing(world: Any) -> None:
    await world.start()
    program = f"""
import asyncio, dsec
async def main():
    sandbox = await dsec.AsyncSandbox.create(url={world.url!r})
    waits = asyncio.create_task(sandbox.commands.run(["wait"]))
    print((await sandbox.commands.run(["a"])).exit_code)
for _ in range(3):
    asyncio.run(main())
"""
    pipe = asyncio.subprocess.PIPE
    ran = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=pipe, stderr=pipe)
    assert await ran.communicate() == (b"7\n" * 3, b"")


async def test_an_answer_that_cannot_be_made_is_an_error_and_a_line_in_the_log(
    world: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await world.start()
    monkeypatch.setattr(grpc_server.messages, "host_message", lambda _view: "secret")
    asked = connect(world.url)
    with pytest.raises(DsecError, match=r"^internal error; the server's log has it$"):
        await asked.call("GetHost", pb.GetHostRequest(), timeout_s=None)
    assert "GetHost failed" in caplog.text
    await asked.close()


async def test_a_reader_that_vanished_is_no_line_in_the_log(world: Any, caplog: pytest.LogCaptureFixture) -> None:
    await world.start()
    written = asyncio.Event()

    class Gone:
        async def write(self, _message: pb.CallReplies) -> None:
            written.set()
            raise grpc.aio.InternalError("its reader is gone")

    async def requests() -> AsyncIterator[bytes]:
        call = pb.CallRequest(id=1, method="GetHost")
        yield pb.CallRequests(requests=[call]).SerializeToString()
        await asyncio.Event().wait()

    serving = asyncio.create_task(world.servers[0]._servicer.Calls(requests(), Gone()))
    await written.wait()
    await asyncio.sleep(0)
    serving.cancel()  # as gRPC does for a reader that is gone
    await asyncio.wait([serving])
    gc.collect()  # says of a task whose error nobody looked at
    assert caplog.text == ""


async def test_a_stream_needs_the_token(world: Any) -> None:
    (server,) = await world.start("tcp:127.0.0.1:0", token="0123456789abcdef")
    asked = connect(server.url, "another")
    with pytest.raises(InvalidArgumentError, match="refuses the token"):
        await asked.call("GetHost", pb.GetHostRequest(), patience=NOW)
    await asked.close()
