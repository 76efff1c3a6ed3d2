"""The sandbox port over an Edge of this process: `EdgeSubstrate`, the twin of `dsec.client.substrate.RemoteSubstrate`.

What goes through it is in the Edge's journal, so whoever opens an Edge on the same directory after this
process was killed finds its sandboxes and commands, as after the kill of `dsec edge serve`.

See: dsec/sandbox.py, dsec/edge/service.py, docs/adr/0010-the-edge-in-process.md.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Mapping
from typing import TypeVar

from dsec.edge.service import Edge
from dsec.errors import InvalidArgumentError, NotFoundError, SandboxLostError
from dsec.keyed import complete, find_command, fresh_name, key_of
from dsec.types import Command, ExecResult, LayerId, NetworkPolicy, SandboxId, SandboxSpec, Stream
from dsec.views import CreateRequest

T = TypeVar("T")


class EdgeProcess:
    """A command that was started through the Edge.  Implements `dsec.sandbox.Process`."""

    def __init__(self, edge: Edge, sandbox_id: SandboxId, key: str, number: int, command: Command) -> None:
        self._edge = edge
        self._at = sandbox_id, key
        self._number = number
        self._command = command

    @property
    def number(self) -> int:
        """See `dsec.sandbox.Process.number`."""
        return self._number

    async def wait(self) -> ExecResult:
        """See `dsec.sandbox.Process.wait`."""
        return await complete(await self._edge.wait(*self._at), self, self._command)

    async def kill(self) -> None:
        """See `dsec.sandbox.Process.kill`."""
        await self._edge.kill(*self._at)

    async def signal(self, number: int) -> None:
        """See `dsec.sandbox.Process.signal`."""
        await self._edge.signal(*self._at, number)

    async def write_stdin(self, data: bytes) -> None:
        """See `dsec.sandbox.Process.write_stdin`."""
        await self._edge.write_stdin(*self._at, data)

    async def close_stdin(self) -> None:
        """See `dsec.sandbox.Process.close_stdin`."""
        await self._edge.close_stdin(*self._at)

    async def resize(self, rows: int, columns: int) -> None:
        """See `dsec.sandbox.Process.resize`."""
        await self._edge.resize(*self._at, rows, columns)

    async def read_output(self, stream: Stream, offset: int, bytes_max: int) -> bytes:
        """See `dsec.sandbox.Process.read_output`."""
        return await self._edge.read_output(*self._at, stream, offset, bytes_max)


class EdgeSandbox:
    """A sandbox of the Edge.  Implements `dsec.sandbox.Sandbox`."""

    def __init__(self, edge: Edge, sandbox_id: SandboxId) -> None:
        self._edge = edge
        self._id = sandbox_id

    @property
    def id(self) -> SandboxId:
        """Names its Edge's sandbox for ever."""
        return self._id

    async def exec(self, command: Command) -> ExecResult:
        """See `dsec.sandbox.Sandbox.exec`."""
        key = fresh_name()
        result = await self._unless_cancelled(key, self._edge.exec(self._id, command, key))
        return await complete(result, EdgeProcess(self._edge, self._id, key, 0, command), command)

    async def start(self, command: Command, number: int | None = None) -> EdgeProcess:
        """See `dsec.sandbox.Sandbox.start`."""
        key = key_of(number)
        view = await self._unless_cancelled(key, self._edge.start(self._id, command, key))
        return EdgeProcess(self._edge, self._id, key, view.number if number is None else number, command)

    async def resume_process(self, number: int, command: Command) -> EdgeProcess | None:
        """See `dsec.sandbox.Sandbox.resume_process`."""
        view = find_command(self._edge.commands(self._id), number)
        return None if view is None else EdgeProcess(self._edge, self._id, view.key, number, command)

    async def pause(self) -> None:
        """See `dsec.sandbox.Sandbox.pause`."""
        await self._edge.pause(self._id)

    async def resume(self) -> None:
        """See `dsec.sandbox.Sandbox.resume`."""
        await self._edge.resume(self._id)

    async def snapshot(self) -> LayerId:
        """See `dsec.sandbox.Sandbox.snapshot`."""
        return await self._edge.snapshot(self._id)

    async def update_network(self, policy: NetworkPolicy) -> None:
        """See `dsec.sandbox.Sandbox.update_network`."""
        await self._edge.update_network(self._id, policy)

    async def destroy(self) -> None:
        """See `dsec.sandbox.Sandbox.destroy`."""
        await self._edge.destroy(self._id)

    async def _unless_cancelled(self, key: str, beginning: Awaitable[T]) -> T:
        """Begin a command; if its caller gives up meanwhile, kill it, if it began at all."""
        try:
            return await beginning
        except asyncio.CancelledError:
            with contextlib.suppress(NotFoundError, SandboxLostError):
                await asyncio.shield(self._edge.kill(self._id, key))
            raise


class EdgeSubstrate:
    """All sandboxes of an Edge in this process.  Implements `dsec.sandbox.Substrate`."""

    def __init__(self, edge: Edge) -> None:
        """The Edge is opened and closed with the substrate."""
        self.edge = edge
        self._adopted: dict[SandboxId, EdgeSandbox] = {}

    async def open(self) -> None:
        """See `dsec.sandbox.Substrate.open`.  Raises as `Edge.open`."""
        await self.edge.open()
        self._adopted = {view.id: EdgeSandbox(self.edge, view.id) for view in self.edge.list()}

    async def create(self, spec: SandboxSpec, sandbox_id: SandboxId | None = None) -> EdgeSandbox:
        """See `dsec.sandbox.Substrate.create`; the Edge alone gives ids."""
        if sandbox_id is not None:
            raise InvalidArgumentError("an Edge gives its sandboxes their ids: leave sandbox_id out")
        view = await self.edge.create(CreateRequest(spec=spec))
        return EdgeSandbox(self.edge, view.id)

    def adopted(self) -> Mapping[SandboxId, EdgeSandbox]:
        """What lived at `open`."""
        return self._adopted

    async def detach(self) -> None:
        """See `dsec.sandbox.Substrate.detach`."""
        await self.edge.detach()

    async def close(self) -> None:
        """See `dsec.sandbox.Substrate.close`.  Safe to call twice."""
        await self.edge.close()
