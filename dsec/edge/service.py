"""The Edge: the sandboxes of one host, and everything that may be asked about them.

One Edge owns one directory (its journal) and one substrate.  What it knows is the fold of the journal
(`journal.Ledger`); what it holds besides is the living: handles, running commands, deadlines.
gRPC, the command line and a caller in the same process all use this class.

Invariants:
1. A sandbox is in the journal before the substrate is asked for it, and nobody has its id before it is ready.
2. A command is in the journal before it runs, and its result before anybody learns it.
3. Whatever kills this process, the next Edge on the directory goes on from the journal.

See: docs/architecture.md, "Edge"; docs/lifecycle.md; docs/formats/edge_journal.md.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import msgspec

import wal
from dsec.edge.clock import Clock, HostClock
from dsec.edge.creation import Creation
from dsec.edge.edge_config import EdgeConfig
from dsec.edge.exec_log import slice_of
from dsec.edge.journal import NetworkDecided
from dsec.edge.leases import Leases
from dsec.edge.live import check_key
from dsec.edge.network.decisions import Decision
from dsec.edge.network.gateway import Networked
from dsec.edge.recovery import recover
from dsec.edge.registry import Registry
from dsec.errors import DivergedError, HostUnfitError, InvalidArgumentError, OutcomeUnknownError, SandboxLostError
from dsec.lifecycle import EndReason
from dsec.sandbox import Process, Substrate
from dsec.trajectory import digest_of
from dsec.types import Command, ExecResult, LayerId, NetworkPolicy, Stream
from dsec.views import CommandView, CreateRequest, HostView, SandboxView


class Edge:
    """See the module; every method may be called from one event loop only."""

    def __init__(
        self,
        directory: Path,
        substrate: Substrate,
        config: EdgeConfig | None = None,
        *,
        clock: Clock | None = None,
        storage: wal.Storage | None = None,
    ) -> None:
        """The substrate is opened and closed by the Edge; `storage` is the journal's disk."""
        self.directory = directory
        self.config = config or EdgeConfig()
        self._resources = AsyncExitStack()
        self._is_closing = False
        self._registry = Registry(directory, substrate, self.config, clock or HostClock(), storage)
        self._leases = Leases(self._registry)
        self._creation = Creation(self._registry, self._leases)
        if isinstance(substrate, Networked):
            substrate.gateway.on_decision = self.note_network

    async def open(self) -> None:
        """Lock and fold the journal, start the substrate, take over what lived on.

        Raises StateError (another Edge has the directory), wal.CorruptError, HostUnfitError.
        """
        registry = self._registry
        _make_directory(self.directory)
        async with AsyncExitStack() as stack:
            await registry.log.open()
            stack.push_async_callback(registry.log.close)
            stack.callback(registry.history.close)
            await registry.substrate.open()
            stack.push_async_callback(self._leave_substrate)
            stack.push_async_callback(registry.abandon)
            stack.push_async_callback(self._leases.deadlines.stop)
            await recover(registry, self._leases)
            registry.start()
            self._leases.start()
            stack.push_async_callback(self._creation.close)
            self._resources = stack.pop_all()

    async def detach(self) -> None:
        """Stop, and leave every sandbox and command to the next Edge; safe to call twice."""
        await self._resources.aclose()

    async def close(self) -> None:
        """Destroy every sandbox and stop; safe to call twice."""
        self._is_closing = True
        await self._creation.close()
        for live in [*self._registry.live.values()]:
            self._registry.end(live, EndReason.DESTROYED, "the Edge was closed")
        await self._registry.settle()
        await self._resources.aclose()

    async def _leave_substrate(self) -> None:
        substrate = self._registry.substrate
        await (substrate.close() if self._is_closing else substrate.detach())

    async def create(self, request: CreateRequest) -> SandboxView:
        """A fresh sandbox, ready for commands; the same one for the same request id.

        Raises InvalidArgumentError, DivergedError (the request id was used for something else),
        StateError (cancelled; no live lease), ResourceExhaustedError, and what `Substrate.create` raises.
        """
        return await self._creation.create(request)

    async def fork(self, sandbox_id: str, count: int, request: CreateRequest | None = None) -> list[SandboxView]:
        """Sandboxes that go on from what this one has written, all or none; the request's spec is not used."""
        return await self._creation.fork(self._registry.find(sandbox_id), count, request or CreateRequest())

    async def branch(self, sandbox_id: str, key: str, request: CreateRequest | None = None) -> SandboxView:
        """A sandbox in the state after a command of this one, which may have ended; see `Creation.branch`."""
        return await self._creation.branch(self._registry.known(sandbox_id), key, request or CreateRequest())

    async def cancel(self, request_id: str) -> None:
        """Whatever was, is being or will be made under this request id shall not be."""
        await self._creation.cancel(request_id)

    async def destroy(self, sandbox_id: str) -> None:
        """End a sandbox; done when nothing of it is left.  NotFoundError; one that has ended is fine."""
        known = self._registry.known(sandbox_id)
        if (live := self._registry.live.get(known.id)) is not None:
            await asyncio.shield(self._registry.end(live, EndReason.DESTROYED))

    async def pause(self, sandbox_id: str) -> None:
        """Stop every process in it and give memory back; the next request for it resumes it."""
        await self._registry.find(sandbox_id).pause(self._registry.now())

    async def resume(self, sandbox_id: str) -> None:
        """Let a paused sandbox go on."""
        await self._registry.find(sandbox_id).resume()

    async def snapshot(self, sandbox_id: str) -> LayerId:
        """What was written in it, as a layer."""
        return await self._registry.find(sandbox_id).snapshot()

    async def update_network(self, sandbox_id: str, policy: NetworkPolicy) -> None:
        """Replace the allowlist."""
        await self._registry.find(sandbox_id).update_network(policy)

    def note_network(self, decision: Decision) -> None:
        """Write a decision of the network's gateway into the journal."""
        self._registry.note(NetworkDecided(**msgspec.structs.asdict(decision)))

    def get(self, sandbox_id: str) -> SandboxView:
        """One sandbox, also one that has ended.  NotFoundError."""
        return self._registry.view(self._registry.known(sandbox_id))

    async def exec(self, sandbox_id: str, command: Command, key: str = "") -> ExecResult:
        """Run a command to its end, once for each key; a key that finished is answered from the journal.

        A caller that is cancelled leaves the command running.  Raises NotFoundError, DivergedError (the
        key belongs to another command), OutcomeUnknownError, ResourceExhaustedError (nothing ran),
        SandboxLostError, InvalidArgumentError.
        """
        if self._registry.known(sandbox_id).id not in self._registry.live:
            return await self._past_result(sandbox_id, key, command)
        return await self._registry.find(sandbox_id).exec(command, key)

    async def start(self, sandbox_id: str, command: Command, key: str = "") -> CommandView:
        """Start a command and return when it runs; raises as `exec`."""
        return await self._registry.find(sandbox_id).start(command, key)

    async def wait(self, sandbox_id: str, key: str) -> ExecResult:
        """The result of a command, when it has ended."""
        check_key(key)
        if self._registry.known(sandbox_id).id not in self._registry.live:
            return await self._past_result(sandbox_id, key)
        return await self._registry.find(sandbox_id).wait(key)

    async def kill(self, sandbox_id: str, key: str) -> None:
        """Kill a command's whole tree; one that has ended is fine, and one that waits for its start never runs."""
        await self._registry.find(sandbox_id).kill(key)

    async def signal(self, sandbox_id: str, key: str, number: int) -> None:
        """Send a signal to a command's process group."""
        if (process := await self._process(sandbox_id, key)) is not None:
            await process.signal(number)

    async def write_stdin(self, sandbox_id: str, key: str, data: bytes) -> None:
        """Send more input; returns when it is in the pipe."""
        if (process := await self._process(sandbox_id, key)) is not None:
            await process.write_stdin(data)

    async def close_stdin(self, sandbox_id: str, key: str) -> None:
        """The command sees end of file."""
        if (process := await self._process(sandbox_id, key)) is not None:
            await process.close_stdin()

    async def resize(self, sandbox_id: str, key: str, rows: int, columns: int) -> None:
        """Change the size of a command's terminal."""
        if (process := await self._process(sandbox_id, key)) is not None:
            await process.resize(rows, columns)

    async def _process(self, sandbox_id: str, key: str) -> Process | None:
        return await self._registry.find(sandbox_id).process(key)

    async def read_output(self, sandbox_id: str, key: str, stream: Stream, offset: int, bytes_max: int) -> bytes:
        """Output from an offset on: waits for the first byte there; b"" at the end.  OutOfRangeError."""
        if offset < 0 or bytes_max < 1:
            raise InvalidArgumentError(f"offset {offset} or bytes_max {bytes_max} is out of range")
        if self._registry.known(sandbox_id).id not in self._registry.live:
            result = await self._past_result(sandbox_id, key)
            return slice_of(result.stdout if stream == "stdout" else result.stderr, offset, bytes_max)
        live = self._registry.find(sandbox_id)
        return await live.read_output(key, stream, offset, bytes_max, self._registry.ended_processes)

    def commands(self, sandbox_id: str) -> list[CommandView]:
        """Every command of a living sandbox in the order of their numbers, without what they read and wrote."""
        return self._registry.find(sandbox_id).commands()

    def trajectory(self, sandbox_id: str) -> AsyncGenerator[CommandView, None]:
        """The commands of a sandbox as the journal has them, also of one that has ended; see `read_trajectory`.

        NotFoundError also for one that ended longer ago than the Edge remembers (`ended_count_max`): whoever asked
        for names that there never were would else have the whole journal read.  Close it (`aclosing`): readers are few.
        """
        return self._registry.history.trajectory(self._registry.known(sandbox_id))

    async def _past_result(self, sandbox_id: str, key: str, command: Command | None = None) -> ExecResult:
        """The result of a command of a sandbox that has ended.

        SandboxLostError if it was never begun, OutcomeUnknownError if its end is not known, DivergedError.
        """
        entry = await self._past_entry(sandbox_id, key) if key else None
        if entry is None:
            known = self._registry.known(sandbox_id)
            why = ": ".join(filter(None, (known.reason, known.message)))
            raise SandboxLostError(f"sandbox {sandbox_id} has ended ({why})")
        if command is not None and digest_of(entry.command) != digest_of(command):
            raise DivergedError(f"{sandbox_id}: key {key!r} was used for another command")
        if entry.result is None:
            raise OutcomeUnknownError(f"{sandbox_id} ended before the end of {key!r} was known")
        return entry.result

    async def _past_entry(self, sandbox_id: str, key: str) -> CommandView | None:
        async with aclosing(self.trajectory(sandbox_id)) as entries:
            async for entry in entries:
                if entry.key == key:
                    return entry
        return None

    async def grant_lease(self, owner: str, epoch: int, ttl_s: float) -> None:
        """Grant or renew a lease; a higher epoch ends the ones before."""
        await self._leases.grant(owner, epoch, ttl_s)

    async def end_lease(self, owner: str, epoch: int) -> None:
        """End a lease and exactly its sandboxes."""
        await self._leases.end(owner, epoch)

    def status(self) -> HostView:
        """What is used of each bound, and the sandboxes by state."""
        admission = self._registry.admission
        states = Counter(str(live.state) for live in self._registry.live.values())
        disk = os.statvfs(self.directory)
        total = admission.total | {"disk_bytes": float(disk.f_blocks * disk.f_frsize)}
        used = admission.used | {"disk_bytes": float((disk.f_blocks - disk.f_bavail) * disk.f_frsize)}
        return HostView(used=used, total=total, sandboxes=dict(states))

    def list(self, labels: Mapping[str, str] | None = None) -> list[SandboxView]:
        """Living sandboxes that have all these labels, in the order of their creation."""
        wanted = (labels or {}).items()
        return [
            self._registry.view(live.known)
            for live in self._registry.living()
            if wanted <= live.known.requested.request.labels.items()
        ]


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise HostUnfitError(f"cannot use {directory} as an Edge's directory: {error.strerror}") from error
