"""`AsyncSandbox`: a sandbox as a Python program uses it, over gRPC to an Edge.

    async with await AsyncSandbox.create() as sandbox:
        result = await sandbox.commands.run("echo hello")

See: dsec/client/blocking.py for the same without `await`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self, TypedDict, Unpack

import msgspec

from dsec import messages
from dsec.client.commands import AsyncCommands, AsyncPty, check_options, explains
from dsec.client.connection import Connection, Patience, connect
from dsec.client.policy import parse_policy
from dsec.client.substrate import RemoteSandbox, create_remote
from dsec.errors import SandboxLostError
from dsec.files import Files
from dsec.pb.v1 import edge_pb2 as pb
from dsec.types import Defaults, LayerId, NetworkPolicy, SandboxId, SandboxSpec
from dsec.views import CommandView, CreateRequest, SandboxView

BUSY_S = 30.0
"""How long a create waits for room on a full host."""
IDLE_TIMEOUT_S = 3600.0
"""A sandbox that a program forgot, or could not end, ends by itself; `dsec create`, by hand, makes it for ever."""
Network = NetworkPolicy | Iterable[str]
"""An allowlist, or its rules as text (`api.example.com:443`, `*.example.org`, `10.0.0.0/8:80,443`)."""


class LifeOptions(TypedDict, total=False):
    """How long a sandbox lives, and how it is found.

    timeout_s: its whole lifetime (default: None, for ever)
    idle_timeout_s: how long it may go without a command (default: 3600; None: for ever)
    envs: variables of its commands; of a fork or a branch, of those that this object runs (default: its origin's)
    metadata: labels to find it by, with `list` (default: none)
    owner, epoch: the lease that it lives under (default: none)
    request_id: the same one gives the same sandbox, also after a crash (default: a fresh one)
    """

    timeout_s: float | None
    idle_timeout_s: float | None
    envs: Mapping[str, str]
    metadata: Mapping[str, str]
    owner: str
    epoch: int
    request_id: str


class CreateOptions(LifeOptions, total=False):
    """Options of a fresh sandbox.

    layers: layers or images over the base, the topmost first (default: none)
    cwd, user: where commands run and as whom, NAME[:GROUP] (default: as the image says, else / and root)
    cpu: cores (default: 1)
    memory_bytes: the pages of its disk included (default: 512 MiB)
    disk_bytes: what may be written (default: three quarters of the memory)
    network: where it may connect to: api.example.com:443, *.example.org, 10.0.0.0/8:80,443 (default: nowhere)
    """

    layers: Sequence[str]
    cwd: str
    user: str
    cpu: float
    memory_bytes: int
    disk_bytes: int
    network: Network


def make_request(options: CreateOptions, base: str = "host") -> CreateRequest:
    """The request for a fresh sandbox.  TypeError for an option that is none."""
    check_options(options, CreateOptions)
    layers = [*options.get("layers", ()), *([] if base in ("host", "") else [base])]
    spec = SandboxSpec(
        base="host" if base == "host" else "",
        layers=tuple(map(LayerId, layers)),
        network=parse_policy(options.get("network", ())),
        defaults=Defaults(env=dict(options.get("envs", {})), cwd=options.get("cwd", ""), user=options.get("user", "")),
    )
    limits: dict[str, float | int] = {}
    if "cpu" in options:
        limits["cpu_cores"] = options["cpu"]
    if "memory_bytes" in options:
        limits |= {"memory_bytes": options["memory_bytes"], "disk_bytes": options["memory_bytes"] * 3 // 4}
    if "disk_bytes" in options:
        limits["disk_bytes"] = options["disk_bytes"]
    return msgspec.structs.replace(_request_of(options), spec=msgspec.structs.replace(spec, **limits))


def make_heir_request(options: LifeOptions) -> CreateRequest:
    """The request for a sandbox that is made of what its origin is.  TypeError for an option that is none."""
    check_options(options, LifeOptions)
    return _request_of(options)


def _request_of(options: LifeOptions) -> CreateRequest:
    return CreateRequest(
        request_id=options.get("request_id", ""),
        labels=dict(options.get("metadata", {})),
        owner=options.get("owner", ""),
        epoch=options.get("epoch", 0),
        idle_timeout_s=options.get("idle_timeout_s", IDLE_TIMEOUT_S),
        lifetime_s=options.get("timeout_s"),
    )


class AsyncSandbox:
    """One sandbox; made by `create` and `connect`, ended by `kill` or at the end of `async with`."""

    def __init__(self, connection: Connection, sandbox_id: SandboxId, envs: Mapping[str, str] | None = None) -> None:
        self._connection = connection
        self._is_closed = False
        self.remote = RemoteSandbox(connection, sandbox_id)
        self.commands = AsyncCommands(self.remote, envs or {})
        self.files = Files(self.remote)
        self.pty = AsyncPty(self.commands, self.remote)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    @classmethod
    @explains(CreateOptions, LifeOptions)
    async def create(
        cls, base: str = "host", *, url: str = "", token: str = "", **options: Unpack[CreateOptions]
    ) -> Self:
        """A fresh sandbox of the Edge at `url` (default: DSEC_API_URL, else this host's Edge), ready for commands.

        `base` is "host", a layer with an operating system, or the name of an image that has one or lies over "host".
        ResourceExhaustedError when the host has been full for `BUSY_S`, UnreachableError, InvalidArgumentError,
        NotFoundError (a layer that is not there).  Cancelled, it leaves none.
        """
        request = make_request(options, base)
        connection = connect(url, token)
        try:
            remote = await create_remote(connection, request, Patience(busy_s=BUSY_S))
        except BaseException:
            await connection.close()
            raise
        return cls(connection, remote.id)

    @classmethod
    async def connect(
        cls, sandbox_id: str, *, url: str = "", token: str = "", envs: Mapping[str, str] | None = None
    ) -> Self:
        """A sandbox that lives.  NotFoundError, SandboxLostError."""
        sandbox = cls(connect(url, token), SandboxId(sandbox_id), envs)
        try:
            view = await sandbox.view()
            if view.reason:
                raise SandboxLostError(f"sandbox {sandbox_id} has ended: {view.reason}")
        except BaseException:
            await sandbox.close()
            raise
        return sandbox

    @classmethod
    async def list(
        cls, metadata: Mapping[str, str] | None = None, *, url: str = "", token: str = ""
    ) -> list[SandboxView]:
        """Living sandboxes that have all of `metadata`."""
        connection = connect(url, token)
        try:
            replies = connection.stream("List", pb.ListRequest(labels=metadata or {}))
            return [messages.sandbox_of(reply) async for reply in replies]
        finally:
            await connection.close()

    @property
    def id(self) -> SandboxId:
        """Names it for ever."""
        return self.remote.id

    async def view(self) -> SandboxView:
        """Its state, limits and labels."""
        return await self.remote.view()

    async def kill(self) -> None:
        """End it, and all that runs in it; safe to call twice."""
        if not self._is_closed:
            await self.remote.destroy()
            await self.close()

    async def close(self) -> None:
        """Let it live, and disconnect; safe to call twice."""
        if not self._is_closed:
            self._is_closed = True
            await self._connection.close()

    async def pause(self) -> None:
        """Stop all that runs in it and give its memory back; the next command resumes it."""
        await self.remote.pause()

    async def resume(self) -> None:
        """Let it go on."""
        await self.remote.resume()

    async def snapshot(self, name: str = "") -> LayerId:
        """What was written in it, as a layer: `create(layers=[layer])` goes on from there.

        With a name it becomes an image, together with what it lies over and how commands run there; without one it
        goes when room is needed.  Not repeated: if the connection breaks, UnreachableError, and there may be a layer.
        """
        return await self.remote.snapshot(name)

    @explains(LifeOptions)
    async def fork(self, count: int = 1, **options: Unpack[LifeOptions]) -> Sequence[Self]:
        """Sandboxes that go on from what was written in this one: all of them, or none and an error."""
        forks = await self.remote.fork(count, make_heir_request(options))
        envs = {**self.commands.envs, **options.get("envs", {})}
        return [type(self)(self._connection.use(), sandbox_id, envs) for sandbox_id in forks]

    @explains(LifeOptions)
    async def branch(self, key: str, **options: Unpack[LifeOptions]) -> Self:
        """A sandbox in the state after the command that was run under `key`; works after this one's end, too.

        Made from the newest snapshot before it and a replay whose every result is compared.  DivergedError.
        """
        sandbox_id = await self.remote.branch(key, make_heir_request(options))
        return type(self)(self._connection.use(), sandbox_id, {**self.commands.envs, **options.get("envs", {})})

    async def update_network(self, network: Network) -> None:
        """Replace its allowlist; connections that it no longer allows are closed."""
        await self.remote.update_network(parse_policy(network))

    async def trajectory(self) -> AsyncIterator[CommandView]:
        """Every command and what came of it, in order; it outlives the sandbox."""
        async for info in self._connection.stream("GetTrajectory", pb.SandboxRef(sandbox_id=self.id)):
            yield messages.info_of(info)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.kill()
