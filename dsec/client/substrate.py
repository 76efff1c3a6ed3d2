"""The sandbox port over gRPC: `RemoteSubstrate`, the same thing to a caller as a substrate of the host.

Every command gets a key, so that a call whose connection broke is made again and runs nothing twice.

See: dsec/sandbox.py, proto/dsec/pb/v1/edge.proto.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec

from dsec import messages
from dsec.client.connection import Connection, Patience, Retry, connect
from dsec.errors import (
    InvalidArgumentError,
    NotFoundError,
    SandboxLostError,
    UnreachableError,
)
from dsec.keyed import complete, find_command, fresh_name, key_of
from dsec.pb.v1 import edge_pb2 as pb
from dsec.types import (
    Command,
    ExecResult,
    LayerId,
    NetworkPolicy,
    SandboxId,
    SandboxSpec,
    Stream,
)
from dsec.views import CommandView, CreateRequest, SandboxView
from dsec.wire import READ_BYTES_MAX

STDIN_BYTES_MAX = 1 << 20
"""Of input in one message."""
SHORT_OUTPUT_BYTES_MAX = 1 << 20
"""Of each stream in a result that others may have to wait for."""
ABANDON_S = 2.0
"""How long somebody who gives up waits for an Edge that is away."""
SLOW_CALL_TIMEOUT_S = 600.0
"""For calls that the Edge may queue, or that pack a disk."""


class RemoteProcess:
    """A command that was started through an Edge.  Implements `dsec.sandbox.Process`."""

    def __init__(self, connection: Connection, sandbox_id: str, key: str, number: int, command: Command) -> None:
        self._connection = connection
        self._reference = pb.CommandRef(sandbox_id=sandbox_id, key=key)
        self._number = number
        self.command = command

    @property
    def key(self) -> str:
        """Under which the Edge knows it."""
        return self._reference.key

    @property
    def number(self) -> int:
        """See `dsec.sandbox.Process.number`."""
        return self._number

    async def wait(self) -> ExecResult:
        """See `dsec.sandbox.Process.wait`."""
        is_short = self.command.output_bytes_max <= SHORT_OUTPUT_BYTES_MAX
        reply = await self._connection.call("Wait", self._reference, timeout_s=None, is_short=is_short)
        return await complete(messages.result_of(reply), self, self.command)

    async def follow(self) -> AsyncIterator[tuple[Stream, bytes] | ExecResult]:
        """Output as it comes, then the result; goes on at the same byte after a broken connection."""
        offsets: dict[Stream, int] = {"stdout": 0, "stderr": 0}
        retry = Retry(self._connection, Patience())
        while True:
            seen = dict(offsets)
            request = pb.AttachRequest(
                sandbox_id=self._reference.sandbox_id,
                key=self.key,
                stdout_offset=offsets["stdout"],
                stderr_offset=offsets["stderr"],
            )
            try:
                async for event in self._connection.stream("Attach", request):
                    if event.HasField("result"):
                        yield await complete(messages.result_of(event.result), self, self.command)
                        return
                    stream = messages.STREAMS[event.chunk.stream]
                    offsets[stream] = event.chunk.offset + len(event.chunk.data)
                    yield stream, event.chunk.data
                raise UnreachableError("the Edge ended the output without a result")
            except UnreachableError as error:
                if offsets != seen:
                    retry = Retry(self._connection, Patience())
                await retry.wait_or_raise(error)

    async def read_output(self, stream: Stream, offset: int, bytes_max: int) -> bytes:
        """See `dsec.sandbox.Process.read_output`."""
        request = pb.ReadOutputRequest(
            sandbox_id=self._reference.sandbox_id,
            key=self.key,
            stream=messages.STREAM_NUMBERS[stream],
            offset=offset,
            bytes_max=min(bytes_max, READ_BYTES_MAX),
        )
        data: bytes = (await self._connection.call("ReadOutput", request, timeout_s=None, is_short=False)).data
        return data

    async def kill(self) -> None:
        """See `dsec.sandbox.Process.kill`."""
        await self._connection.call("Kill", self._reference)

    async def signal(self, number: int) -> None:
        """See `dsec.sandbox.Process.signal`.  Not repeated: UnreachableError if the connection breaks."""
        if number < 0:
            raise InvalidArgumentError(f"signal {number} is not in [1, 64]")
        request = pb.SignalRequest(sandbox_id=self._reference.sandbox_id, key=self.key, number=number)
        await self._connection.call("Signal", request, is_repeatable=False)

    async def write_stdin(self, data: bytes) -> None:
        """See `dsec.sandbox.Process.write_stdin`.  Not repeated: UnreachableError if the connection breaks."""
        for start in range(0, len(data) or 1, STDIN_BYTES_MAX):
            piece = data[start : start + STDIN_BYTES_MAX]
            request = pb.WriteStdinRequest(sandbox_id=self._reference.sandbox_id, key=self.key, data=piece)
            await self._connection.call("WriteStdin", request, timeout_s=None, is_repeatable=False)

    async def close_stdin(self) -> None:
        """See `dsec.sandbox.Process.close_stdin`."""
        await self._connection.call("CloseStdin", self._reference)

    async def resize(self, rows: int, columns: int) -> None:
        """See `dsec.sandbox.Process.resize`."""
        if not (0 < rows < 1 << 16 and 0 < columns < 1 << 16):
            raise InvalidArgumentError(f"a terminal of {rows} x {columns} characters cannot be")
        request = pb.ResizeRequest(
            sandbox_id=self._reference.sandbox_id, key=self.key, size=pb.TtySize(rows=rows, columns=columns)
        )
        await self._connection.call("Resize", request)


class RemoteSandbox:
    """A sandbox of an Edge.  Implements `dsec.sandbox.Sandbox`; `key` arguments are its own."""

    def __init__(self, connection: Connection, sandbox_id: SandboxId, patience: Patience = Patience()) -> None:  # noqa: B008 - frozen
        self._connection = connection
        self._id = sandbox_id
        self._patience = patience

    @property
    def id(self) -> SandboxId:
        """Names its Edge's sandbox for ever."""
        return self._id

    @property
    def _reference(self) -> pb.SandboxRef:
        return pb.SandboxRef(sandbox_id=self._id)

    async def exec(self, command: Command, key: str = "") -> ExecResult:
        """See `dsec.sandbox.Sandbox.exec`.  The same key gives the same result for ever; runs once."""
        request = self._request(command, key)
        is_short = command.output_bytes_max <= SHORT_OUTPUT_BYTES_MAX
        reply = await self._unless_cancelled("Exec", request, None, is_short=is_short)
        process = RemoteProcess(self._connection, self._id, request.key, 0, command)
        return await complete(messages.result_of(reply), process, command)

    async def start(self, command: Command, number: int | None = None, key: str = "") -> RemoteProcess:
        """See `dsec.sandbox.Sandbox.start`."""
        request = self._request(command, key or key_of(number))
        info = await self._unless_cancelled("Start", request, SLOW_CALL_TIMEOUT_S)
        return RemoteProcess(self._connection, self._id, info.key, info.number if number is None else number, command)

    async def resume_process(self, number: int, command: Command) -> RemoteProcess | None:
        """See `dsec.sandbox.Sandbox.resume_process`."""
        view = find_command(await self.commands(), number)
        return None if view is None else RemoteProcess(self._connection, self._id, view.key, number, command)

    async def process(self, key: str) -> RemoteProcess:
        """The command that was started under `key`, or with the number of `#number`.  NotFoundError."""
        for view in await self.commands():
            if key in (view.key, f"#{view.number}"):
                return RemoteProcess(self._connection, self._id, view.key, view.number, view.command)
        raise NotFoundError(f"sandbox {self._id} has no command {key!r}")

    async def commands(self) -> list[CommandView]:
        """Every command of the sandbox, without what it read and wrote."""
        return [messages.info_of(info) async for info in self._connection.stream("ListCommands", self._reference)]

    async def view(self) -> SandboxView:
        """The sandbox as the Edge knows it."""
        return messages.sandbox_of(await self._connection.call("Get", self._reference))

    async def pause(self) -> None:
        """See `dsec.sandbox.Sandbox.pause`."""
        await self._connection.call("Pause", self._reference)

    async def resume(self) -> None:
        """See `dsec.sandbox.Sandbox.resume`."""
        await self._connection.call("Resume", self._reference)

    async def snapshot(self, name: str = "") -> LayerId:
        """See `dsec.sandbox.Sandbox.snapshot`.  With a name, that and what it lies over become an image.

        Not repeated: if the connection breaks, UnreachableError, and there may be a layer.
        """
        request = pb.SnapshotRequest(sandbox_id=self._id, name=name)
        reply = await self._connection.call("Snapshot", request, timeout_s=SLOW_CALL_TIMEOUT_S, is_repeatable=False)
        return LayerId(reply.layer_id)

    async def fork(self, count: int, options: CreateRequest) -> list[SandboxId]:
        """Sandboxes that go on from what was written in this one; all of them, or an error."""
        request = pb.ForkRequest(sandbox_id=self._id, count=count, create=messages.create_message(options))
        reply = await self._connection.call("Fork", request, timeout_s=SLOW_CALL_TIMEOUT_S, patience=self._patience)
        return [SandboxId(sandbox.id) for sandbox in reply.sandboxes]

    async def branch(self, key: str, options: CreateRequest) -> SandboxId:
        """A sandbox in the state after the command `key` of this one, which may have ended.  DivergedError."""
        request = pb.BranchRequest(sandbox_id=self._id, key=key, create=messages.create_message(options))
        reply = await self._connection.call("Branch", request, timeout_s=None, patience=self._patience)
        return SandboxId(reply.id)

    async def update_network(self, policy: NetworkPolicy) -> None:
        """See `dsec.sandbox.Sandbox.update_network`."""
        request = pb.UpdateNetworkRequest(sandbox_id=self._id, policy=messages.policy_message(policy))
        await self._connection.call("UpdateNetwork", request)

    async def destroy(self) -> None:
        """See `dsec.sandbox.Sandbox.destroy`."""
        await self._connection.call("Destroy", self._reference)

    def _request(self, command: Command, key: str) -> pb.ExecRequest:
        message = messages.command_message(command)
        return pb.ExecRequest(sandbox_id=self._id, key=key or fresh_name(), command=message)

    async def _unless_cancelled(
        self, name: str, request: pb.ExecRequest, timeout_s: float | None, *, is_short: bool = True
    ) -> Any:
        """Begin a command; if its caller gives up meanwhile, kill it."""
        try:
            return await self._connection.call(
                name, request, timeout_s=timeout_s, is_short=is_short, patience=self._patience
            )
        except asyncio.CancelledError:
            await asyncio.shield(self._abandon(request.key))
            raise

    async def _abandon(self, key: str) -> None:
        """Kill what nobody waits for any more, if it began at all, and there still is an Edge to ask."""
        with contextlib.suppress(NotFoundError, SandboxLostError, UnreachableError):
            reference = pb.CommandRef(sandbox_id=self._id, key=key)
            await self._connection.call("Kill", reference, patience=Patience(lost_s=ABANDON_S))


async def create_remote(
    connection: Connection,
    request: CreateRequest,
    patience: Patience = Patience(),  # noqa: B008 - frozen
) -> RemoteSandbox:
    """Make a sandbox; if the caller gives up meanwhile, none is left."""
    if not request.request_id:
        request = msgspec.structs.replace(request, request_id=fresh_name())
    message = messages.create_message(request)
    try:
        reply = await connection.call("Create", message, timeout_s=SLOW_CALL_TIMEOUT_S, patience=patience)
    except asyncio.CancelledError:
        await asyncio.shield(_cancel(connection, request.request_id))
        raise
    return RemoteSandbox(connection, SandboxId(reply.id), patience)


async def _cancel(connection: Connection, request_id: str) -> None:
    with contextlib.suppress(UnreachableError):
        await connection.call("Cancel", pb.CancelRequest(request_id=request_id), patience=Patience(lost_s=ABANDON_S))


class RemoteSubstrate:
    """The sandboxes of an Edge that have `labels`.  Implements `dsec.sandbox.Substrate`."""

    def __init__(self, url: str = "", token: str = "", labels: Mapping[str, str] | None = None) -> None:
        self._url = url
        self._token = token
        self._labels = dict(labels or {"substrate": fresh_name()})
        self._connection: Connection | None = None
        self._adopted: dict[SandboxId, RemoteSandbox] = {}

    @property
    def connection(self) -> Connection:
        """The open connection.  UnreachableError before `open` and after `close`."""
        if self._connection is None:
            raise UnreachableError("the substrate is not open")
        return self._connection

    async def open(self) -> None:
        """Connect, and find what is there already.  UnreachableError."""
        self._connection = connect(self._url, self._token)
        await self.connection.call("GetHost", pb.GetHostRequest())
        self._adopted = {view.id: RemoteSandbox(self.connection, view.id) for view in await self._list()}

    async def create(self, spec: SandboxSpec, sandbox_id: SandboxId | None = None) -> RemoteSandbox:
        """See `dsec.sandbox.Substrate.create`; the Edge alone gives ids."""
        if sandbox_id is not None:
            raise InvalidArgumentError("an Edge gives its sandboxes their ids: leave sandbox_id out")
        return await create_remote(self.connection, CreateRequest(spec=spec, labels=self._labels))

    def adopted(self) -> Mapping[SandboxId, RemoteSandbox]:
        """What was there at `open`."""
        return self._adopted

    async def detach(self) -> None:
        """Disconnect; the Edge keeps the sandboxes."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def close(self) -> None:
        """Destroy what has our labels, and disconnect.  Safe to call twice."""
        if self._connection is not None:
            for view in await self._list():
                await RemoteSandbox(self.connection, view.id).destroy()
            await self.detach()

    async def _list(self) -> list[SandboxView]:
        replies = self.connection.stream("List", pb.ListRequest(labels=self._labels))
        return [messages.sandbox_of(message) async for message in replies]
