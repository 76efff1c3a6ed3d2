"""The Edge behind gRPC: the real service over the double, real sockets, broken connections, hostile peers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest

from dsec.client.connection import Patience, connect
from dsec.client.host import end_lease, grant_lease, host_view
from dsec.client.sandbox import AsyncSandbox
from dsec.client.substrate import RemoteSandbox, RemoteSubstrate, create_remote
from dsec.errors import (
    DivergedError,
    DsecError,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
    ResourceExhaustedError,
    SandboxLostError,
    StateError,
    UnreachableError,
)
from dsec.pb.v1 import edge_pb2 as pb
from dsec.types import PATH, Command, LayerId, SandboxSpec, TtySize
from dsec.views import CreateRequest

TOKEN = "0123456789abcdef"
NOW = Patience(connect_s=0.0, lost_s=0.0)


@pytest.fixture
async def sandbox(world: Any) -> AsyncIterator[AsyncSandbox]:
    await world.start()
    sandbox = await AsyncSandbox.create(url=world.url, metadata={"job": "7"}, memory_bytes=64 << 20)
    yield sandbox
    await sandbox.close()


async def test_what_is_asked_after_the_end_is_the_callers_error(world: Any, sandbox: AsyncSandbox) -> None:
    handle = await sandbox.commands.run(["wait"], background=True)
    waits = asyncio.create_task(sandbox.commands.run(["wait"], key="k"))
    while len(world.runs) < 2:
        await world.arrived.get()
    await sandbox.close()
    for asked in (
        waits,
        handle.wait(),
        sandbox.commands.run("true"),
        sandbox.snapshot(),
        sandbox.fork(),
        sandbox.view(),
    ):
        with pytest.raises(StateError, match="was closed here"):
            await asked
    with pytest.raises(StateError, match="was closed here"):
        [view async for view in sandbox.trajectory()]
    await sandbox.kill()
    again = await AsyncSandbox.connect(sandbox.id, url=world.url)
    world.proceed.set()
    assert (await again.commands.run(["wait"], key="k")).exit_code == 7  # it went on
    await again.kill()


async def test_what_a_command_did_comes_back_as_it_was(world: Any, sandbox: AsyncSandbox) -> None:
    command = Command(
        argv=("cat", "a b", "\udcff"),
        cwd="/tmp/\udcfe",
        env={"A": "\udc80"},
        stdin=b"\0\xff",
        timeout_s=2.5,
        output_bytes_max=10,
        merge_stderr=True,
        kill_others=True,
        user="1:2",
    )
    result = await sandbox.remote.exec(command, "k")
    assert (result.exit_code, result.stdout.data, result.stderr.data) == (7, b"out\xff", b"err")
    ran = world.runs[0]
    assert ran.env == {"PATH": PATH, "LANG": "C.UTF-8", "HOME": "/", **command.env}
    assert msgspec.structs.replace(ran, output_bytes_max=10, env=command.env) == command
    views = [view async for view in sandbox.trajectory()]
    assert [(view.key, view.number, view.command, view.state, view.result) for view in views] == [
        ("k", 1, command, "finished", result)
    ]


async def test_a_sandbox_is_made_as_it_was_asked_for_and_found_by_its_labels(world: Any, sandbox: AsyncSandbox) -> None:
    view = await sandbox.view()
    assert view == world.edge.get(sandbox.id)
    assert (view.spec.memory_bytes, view.spec.disk_bytes, view.labels) == (64 << 20, 48 << 20, {"job": "7"})
    assert [found.id for found in await AsyncSandbox.list({"job": "7"}, url=world.url)] == [sandbox.id]
    assert await AsyncSandbox.list({"job": "8"}, url=world.url) == []
    with pytest.raises(NotFoundError, match="no sandbox"):
        await AsyncSandbox.connect("sb-none", url=world.url)
    await sandbox.remote.destroy()
    with pytest.raises(SandboxLostError, match="destroyed"):
        await AsyncSandbox.connect(sandbox.id, url=world.url)


async def test_every_verb_of_the_lifecycle_arrives(world: Any, sandbox: AsyncSandbox) -> None:
    await sandbox.pause()
    assert (await sandbox.view()).state == "paused"
    await sandbox.resume()
    await sandbox.update_network(["api.example.com:443", "10.0.0.0/8:80,81", "*.example.org"])
    rules = (await sandbox.view()).spec.network.rules
    assert [(rule.host, rule.cidr, rule.ports) for rule in rules] == [
        ("api.example.com", "", (443,)),
        ("", "10.0.0.0/8", (80, 81)),
        ("*.example.org", "", ()),
    ]
    await sandbox.commands.run(["a"], key="a")
    layer = await sandbox.snapshot()
    forks = await sandbox.fork(2)
    assert [(await fork.view()).spec.layers for fork in forks] == [(layer,)] * 2
    branch = await sandbox.branch("a")
    assert branch.id not in {sandbox.id, *(fork.id for fork in forks)}
    for one in (branch, *forks):
        await one.kill()
    assert [view.id for view in await AsyncSandbox.list(url=world.url)] == [sandbox.id]


async def test_leases_and_the_host_are_reached(world: Any) -> None:
    await world.start()
    await grant_lease("trainer", 1, 60.0, url=world.url)
    async with await AsyncSandbox.create(url=world.url, owner="trainer", epoch=1) as sandbox:
        assert (await host_view(world.url)).sandboxes == {"running": 1}
        with pytest.raises(StateError):
            await grant_lease("trainer", 0, 60.0, url=world.url)
        await end_lease("trainer", 1, url=world.url)
        assert (await sandbox.view()).reason == "lease_lapsed"


async def test_refusals_arrive_as_the_errors_that_the_service_raised(world: Any, sandbox: AsyncSandbox) -> None:
    run = sandbox.commands.run
    await run(["a"], key="k")
    with pytest.raises(DivergedError, match="'k' was used for another command"):
        await run(["b"], key="k")
    with pytest.raises(InvalidArgumentError, match="argv is empty"):
        await run([])
    with pytest.raises(InvalidArgumentError, match="not an absolute path"):
        await run(["a"], cwd="x" * 100_000)  # the sentence is cut: no header may be that long
    with pytest.raises(InvalidArgumentError, match="cannot be encoded"):
        await run(["\ud800"])
    with pytest.raises(InvalidArgumentError, match="larger than max"):
        await run(["a"], stdin=bytes(41 << 20))
    with pytest.raises(NotFoundError):
        await sandbox.commands.connect("nobody")
    flood = await run(["flood", str(1 << 20)], background=True, output_bytes_max=1000)
    with pytest.raises(OutOfRangeError):
        await flood.read_output(offset=100_000)
    for _ in range(7):
        await AsyncSandbox.create(url=world.url)
    with pytest.raises(ResourceExhaustedError, match="sandboxes_count"):
        await create_remote(connect(world.url), CreateRequest())


async def test_a_bug_of_the_server_tells_the_client_nothing(
    world: Any, sandbox: AsyncSandbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_sandbox_id: str) -> None:
        raise KeyError("secret")

    monkeypatch.setattr(world.edge, "get", broken)
    with pytest.raises(DsecError, match="internal error") as caught:
        await sandbox.view()
    assert "secret" not in str(caught.value)
    assert "secret" in caplog.text


async def test_the_same_key_asks_again_after_a_broken_connection_and_nothing_runs_twice(
    world: Any, sandbox: AsyncSandbox
) -> None:
    running = asyncio.create_task(sandbox.commands.run(["wait"], key="k"))
    followed = asyncio.create_task(sandbox.commands.run(["wait", "too"], on_stdout=lambda _text: None))
    await world.arrived.get()
    await world.arrived.get()
    await world.stop()
    assert not running.done()
    await world.start()
    world.proceed.set()
    assert (await running).exit_code == (await followed).exit_code == 7
    assert len(world.runs) == 2


async def test_a_snapshot_is_taken_once_whatever_becomes_of_the_connection(world: Any, sandbox: AsyncSandbox) -> None:
    live = world.edge._registry.find(sandbox.id)
    taken, take, may_end = [], live.sandbox.snapshot, asyncio.Event()

    async def snapshot() -> LayerId:
        taken.append(await take())
        world.arrived.put_nowait(Command(argv=("snapshot",)))
        await may_end.wait()
        return taken[-1]

    live.sandbox.snapshot = snapshot
    asked = asyncio.create_task(sandbox.snapshot())
    await world.arrived.get()
    await world.stop()
    await world.start()
    may_end.set()
    with pytest.raises(UnreachableError):
        await asked
    assert len(world.host.layers) == len(taken) == 1
    assert await sandbox.snapshot() in world.host.layers


async def test_a_reader_of_the_past_that_goes_away_makes_room_for_the_next(world: Any, sandbox: AsyncSandbox) -> None:
    world.config = world.config.model_copy(update={"scans_count_max": 1})
    await world.stop()
    await world.start()
    await sandbox.commands.run(["a"])
    async with aclosing(sandbox._connection.stream("GetTrajectory", pb.SandboxRef(sandbox_id=sandbox.id))) as views:
        assert (await anext(views)).number == 1
    while world.edge._registry.history._scans_count:  # noqa: ASYNC110  the server hears of it when it does
        await asyncio.sleep(0)
    assert len([view async for view in sandbox.trajectory()]) == 1


async def test_a_client_that_dies_in_mid_call_leaves_its_command_running(world: Any, sandbox: AsyncSandbox) -> None:
    async with grpc.aio.insecure_channel(f"unix:{world.url.removeprefix('unix:')}") as channel:
        stub = type(sandbox._connection)(world.url, "").stub.__class__(channel)
        command = pb.Command(argv=[b"wait"])
        call = stub.Exec(pb.ExecRequest(sandbox_id=sandbox.id, key="k", command=command))
        await world.arrived.get()
    with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
        await call
    world.proceed.set()
    assert (await (await sandbox.commands.connect("k")).wait()).exit_code == 7
    assert len(world.runs) == 1


async def test_a_cancelled_run_kills_its_command(world: Any, sandbox: AsyncSandbox) -> None:
    for options in ({}, {"on_stdout": lambda _text: None}):
        running = asyncio.create_task(sandbox.commands.run(["wait"], **options))  # type: ignore[call-overload]
        await world.arrived.get()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    results = [view.result async for view in sandbox.trajectory()]
    assert [result.exit_code for result in results if result is not None] == [137, 137]


async def test_a_cancelled_create_leaves_no_sandbox(world: Any) -> None:
    await world.start()
    connection = connect(world.url)
    await connection.call("GetHost", pb.GetHostRequest())
    for turns in range(12):
        creating = asyncio.create_task(create_remote(connection, CreateRequest()))
        for _ in range(turns):
            await asyncio.sleep(0)
        creating.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await creating).destroy()
    assert world.edge.list() == []
    assert world.host.sandboxes == {}
    await connection.close()


async def test_output_that_was_not_kept_is_told(world: Any, sandbox: AsyncSandbox) -> None:
    world.config = world.config.model_copy(update={"inline_bytes_max": 1000})
    await world.stop()
    await world.start()
    whole = bytes(range(256)) * 4096
    result = await sandbox.commands.run(["flood", str(len(whole))])
    assert (result.stdout_bytes, result.raw.stdout.total_bytes) == (whole[:500] + whole[-500:], len(whole))
    assert result.is_truncated
    assert "[1047576 bytes left out]" in result.stdout
    handle = await sandbox.commands.connect(result.key)
    assert b"".join([event[1] async for event in handle.follow() if isinstance(event, tuple)]) == result.stdout_bytes


async def test_input_signals_and_sizes_reach_the_process(world: Any, sandbox: AsyncSandbox) -> None:
    pty = await sandbox.pty.create(["wait"], rows=10, columns=20)
    await pty.send_stdin("typed")
    await pty.resize(30, 40)
    await pty.send_signal(28)
    await pty.close_stdin()
    process = world.host.sandboxes[sandbox.id].processes[pty.pid]
    assert (process.stdin, process.is_stdin_closed) == (b"typed", True)
    assert (process.size, process.signals) == (TtySize(30, 40), [28])
    with pytest.raises(InvalidArgumentError):
        await pty.send_signal(65)
    with pytest.raises(InvalidArgumentError):
        await pty.resize(0, 1 << 20)
    await pty.kill()
    assert (await pty.wait()).exit_code == 137
    plain = await sandbox.commands.run(["wait"], background=True)
    with pytest.raises(InvalidArgumentError, match="keep_stdin_open"):
        await plain.send_stdin("x")


async def test_the_port_over_the_wire_forgets_nothing(world: Any) -> None:
    await world.start()
    substrate = RemoteSubstrate(world.url, labels={"trainer": "1"})
    await substrate.open()
    sandbox = await substrate.create(SandboxSpec())
    await sandbox.start(Command(argv=("a",)), number=5)
    process = await sandbox.resume_process(5, Command(argv=("a",)))
    assert process is not None
    assert (await process.wait()).exit_code == 7
    assert await sandbox.resume_process(6, Command(argv=("a",))) is None
    await substrate.detach()
    await substrate.open()
    assert list(substrate.adopted()) == [sandbox.id]
    other = RemoteSubstrate(world.url)
    await other.open()
    await other.create(SandboxSpec())
    await other.close()
    await other.close()
    assert [view.id for view in world.edge.list()] == [sandbox.id]
    await substrate.close()
    assert world.edge.list() == []
    with pytest.raises(UnreachableError, match="not open"):
        await substrate.create(SandboxSpec())


async def test_a_reader_that_stops_reading_stalls_nobody(world: Any, sandbox: AsyncSandbox) -> None:
    handle = await sandbox.commands.run(["flood", str(8 << 20)], background=True, output_bytes_max=64 << 20)
    readers = [handle.follow() for _ in range(4)]
    for reader in readers:
        await anext(reader)
    assert (await sandbox.commands.run(["a"])).exit_code == 7
    assert (await handle.wait()).exit_code == 0
    for reader in readers:
        await reader.aclose()  # type: ignore[attr-defined]


async def test_where_no_edge_answers_the_client_says_so_and_does_not_wait_for_ever(tmp_path: Path) -> None:
    connection = connect(f"unix:{tmp_path}/none.sock")
    with pytest.raises(UnreachableError, match="dsec edge serve"):
        await connection.call("GetHost", pb.GetHostRequest(), patience=NOW)
    await connection.close()


async def test_a_call_that_is_not_exact_to_repeat_is_not_repeated(
    world: Any, sandbox: AsyncSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = await sandbox.commands.run(["wait"], background=True, stdin=True)
    process = world.host.sandboxes[sandbox.id].processes[handle.pid]
    is_stuck = asyncio.Event()

    async def write_and_stick(data: bytes) -> None:
        process.stdin += data
        is_stuck.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(process, "write_stdin", write_and_stick)
    sending = asyncio.create_task(handle.send_stdin("once"))
    await is_stuck.wait()
    await world.stop()
    with pytest.raises(UnreachableError):
        await sending
    monkeypatch.undo()
    sending = asyncio.create_task(handle.send_stdin(", then"))
    await world.start()
    await sending
    assert process.stdin == b"once, then"


async def test_a_full_host_is_waited_for_as_long_as_the_caller_wants(world: Any) -> None:
    world.config = world.config.model_copy(update={"sandboxes_count_max": 1})
    await world.start()
    first = await AsyncSandbox.create(url=world.url)
    connection = connect(world.url)
    waiting = asyncio.create_task(create_remote(connection, CreateRequest(), Patience(busy_s=30.0)))
    with pytest.raises(ResourceExhaustedError):
        await create_remote(connection, CreateRequest())
    assert not waiting.done()
    await first.kill()
    assert isinstance(await waiting, RemoteSandbox)
    await connection.close()
