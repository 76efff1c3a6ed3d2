"""The Edge crashes, or meets a full disk, at every call that its journal makes to the disk.

The law: whatever was answered holds, every command runs exactly once, a client that asks again gets
to the same end as one that was never interrupted, and nothing is left over.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import wal
from dsec.edge.edge_config import EdgeConfig
from dsec.edge.journal import Known, Ledger, decode
from dsec.edge.service import Edge
from dsec.errors import DsecError, ResourceExhaustedError
from dsec.testing import FakeClock, FakeHost, FakeSandbox, FakeSubstrate
from dsec.types import Command, ExecResult, Output, SandboxId, SandboxSpec
from dsec.views import CreateRequest
from wal.testing import CrashError, FaultyStorage, Landing

CONFIG = EdgeConfig(log_reserve_bytes=0, log_segment_bytes_max=1 << 16, results_bytes_max=0, disk_free_bytes_min=0)


class World:
    """A machine, what ran on it, and which of its Edges is alive."""

    def __init__(self) -> None:
        self.host = FakeHost()
        self.runs: Counter[tuple[str, str]] = Counter()

    def answer(self, sandbox: FakeSandbox, command: Command) -> ExecResult:
        """The result tells how many commands ran in this sandbox before."""
        self.runs[sandbox.id, command.argv[0]] += 1
        return ExecResult(exit_code=0, stdout=Output(f"{command.argv[0]} {len(sandbox.commands)}".encode()))


class Handle:
    """A sandbox as one Edge holds it: once that Edge was killed, no call of it arrives any more."""

    def __init__(self, sandbox: FakeSandbox, substrate: MortalSubstrate) -> None:
        self._sandbox, self._substrate = sandbox, substrate

    def watch(self, on_end: Callable[[], None]) -> None:
        self._sandbox.watch(on_end)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._sandbox, name)
        return self._substrate.while_alive(found) if callable(found) else found


class MortalSubstrate(FakeSubstrate):
    """Calls of a killed Edge hang for ever."""

    def __init__(self, world: World) -> None:
        super().__init__(world.answer, world.host)
        self.is_alive = True

    def while_alive(self, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def guarded(*args: Any) -> Any:
            for _ in range(10):  # slower than the journal, as a real one is
                await asyncio.sleep(0)
            if not self.is_alive:
                await asyncio.Event().wait()
            return await call(*args)

        return guarded

    async def create(self, spec: SandboxSpec, sandbox_id: SandboxId | None = None) -> Any:
        return Handle(await self.while_alive(super().create)(spec, sandbox_id), self)

    def adopted(self) -> Mapping[SandboxId, Any]:
        return {name: Handle(sandbox, self) for name, sandbox in super().adopted().items()}


class Disk(FaultyStorage):
    """Tells the substrate when the machine's process dies."""

    on_crash: Callable[[], None] = staticmethod(lambda: None)

    def meet(self, fault: Any, call: str) -> None:
        if fault == "crash":
            self.on_crash()
        super().meet(fault, call)


class EagerClock(FakeClock):
    """Nobody waits for it."""

    async def wait(self, event: asyncio.Event, timeout_s: float | None) -> None:
        if timeout_s is None:
            await event.wait()
        await asyncio.sleep(0)


class Client:
    """Does one thing after the other; keeps what it was answered; goes on where it was interrupted."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.ids: dict[str, str] = {}

    async def run(self, edge: Edge) -> None:
        for step in self.steps(edge)[len(self.answers) :]:
            while True:
                with contextlib.suppress(ResourceExhaustedError):
                    self.answers.append(await step())
                    break
                await asyncio.sleep(0)

    def steps(self, edge: Edge) -> list[Callable[[], Awaitable[Any]]]:
        async def create(name: str, **how: Any) -> str:
            view = await edge.create(CreateRequest(request_id=name, **how))
            self.ids[name] = view.id
            return view.state

        async def fork() -> int:
            views = await edge.fork(self.ids["box"], 2, CreateRequest(request_id="fork"))
            self.ids |= {f"fork{index}": view.id for index, view in enumerate(views)}
            return len(views)

        async def branch() -> str:
            view = await edge.branch(self.ids["box"], "b", CreateRequest(request_id="branch"))
            self.ids["branch"] = view.id
            return (await edge.exec(view.id, Command(argv=("in branch",)), "x")).stdout.head.decode()

        def run(name: str, key: str) -> Callable[[], Awaitable[str]]:
            async def exec_() -> str:
                return (await edge.exec(self.ids[name], Command(argv=(key,)), key)).stdout.head.decode()

            return exec_

        return [
            lambda: create("box"),
            run("box", "a"),
            run("box", "b"),
            lambda: edge.pause(self.ids["box"]),
            run("box", "c"),
            fork,
            run("fork1", "d"),
            branch,
            lambda: edge.grant_lease("job", 1, 100.0),
            lambda: create("leased", owner="job", epoch=1),
            run("leased", "e"),
            lambda: edge.end_lease("job", 1),
            lambda: edge.cancel("never"),
            lambda: edge.cancel("fork"),
            lambda: edge.destroy(self.ids["branch"]),
            run("box", "f"),
        ]


@contextlib.asynccontextmanager
async def opened(directory: Path, world: World, disk: Disk) -> AsyncIterator[Edge]:
    substrate = MortalSubstrate(world)
    disk.on_crash = lambda: setattr(substrate, "is_alive", False)  # type: ignore[method-assign]
    edge = Edge(directory, substrate, CONFIG, clock=EagerClock(), storage=disk)
    await edge.open()
    yield edge


def disk_from(disk: FaultyStorage, landing: Landing, seed: int) -> Disk:
    after = disk.restart(landing, seed)
    after.__class__ = Disk
    return after  # type: ignore[return-value]


async def end_tasks() -> None:
    """The rest of a killed Edge."""
    rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for _ in range(20):
        for task in rest:
            task.cancel()
        await asyncio.wait(rest, timeout=0) if rest else None
        rest = [task for task in rest if not task.done()]
    assert rest == []


WHOLE = [
    "running",
    "a 1",
    "b 2",
    None,
    "c 3",
    2,
    "d 1",
    "in branch 3",
    None,
    "running",
    "e 1",
    None,
    None,
    None,
    None,
    "f 4",
]


def check_end(world: World, client: Client, edge: Edge) -> None:
    """One box is left, every command ran once, and what the journal folds to is what the Edge holds."""
    assert client.answers == WHOLE
    assert list(world.host.sandboxes) == [client.ids["box"]] == [view.id for view in edge.list()]
    of_client = {
        (client.ids.get(name), key) for name, key in [("box", k) for k in "abcf"] + [("fork1", "d"), ("leased", "e")]
    }
    assert {run: count for run, count in world.runs.items() if run in of_client} == dict.fromkeys(of_client, 1)
    assert edge.status().used["sandboxes_count"] == 1


def folded(directory: Path, disk: Disk) -> Ledger:
    ledger = Ledger(CONFIG.ended_count_max)
    for record in wal.Reader(directory / "log", storage=disk):
        ledger.apply(decode(record.kind, record.payload), record.lsn)
    return ledger


def living(edge: Edge) -> list[Known]:
    return [live.known for live in edge._registry.living()]


async def whole_run(directory: Path) -> list[str]:
    world, client, disk = World(), Client(), Disk()
    async with opened(directory, world, disk) as edge:
        await client.run(edge)
        check_end(world, client, edge)
        held, read = edge._registry.ledger, folded(directory, disk)
        assert (read.sandboxes, read.requests, read.leases) == (held.sandboxes, held.requests, held.leases)
        calls = list(disk.calls)
        await edge.close()
    return calls


async def test_a_run_without_faults_ends_as_it_should(tmp_path: Path) -> None:
    assert len(await whole_run(tmp_path)) > 50


@pytest.mark.parametrize("landing", ["written", "synced", "mixed"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_crash_at_any_call_loses_nothing_that_was_answered_and_runs_nothing_twice(
    tmp_path: Path, landing: Landing
) -> None:
    calls_count = len(await whole_run(tmp_path / "whole"))
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # the crash itself comes up in many places
    for call in range(1, calls_count + 1):
        world, client, disk, directory = World(), Client(), Disk({call: "crash"}), tmp_path / str(call)
        with contextlib.suppress(CrashError, wal.WalError, DsecError):
            async with opened(directory, world, disk) as edge:
                await client.run(edge)
        await end_tasks()
        async with opened(directory, world, disk_from(disk, landing, seed=call)) as edge:
            assert {view.id for view in edge.list()} == set(world.host.sandboxes), call
            ledger = edge._registry.ledger
            assert not {known.requested.request.request_id for known in living(edge)} & ledger.cancelled.keys(), call
            owned = [known for known in living(edge) if known.requested.request.owner != ""]
            assert [known for known in owned if not ledger.lease_of(known)] == [], call
            await client.run(edge)
            check_end(world, client, edge)
            await edge.close()
        assert world.host.sandboxes == {}, call


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO"])
async def test_a_disk_error_at_any_call_is_a_refusal_and_the_edge_works_on(tmp_path: Path, fault: Any) -> None:
    calls = await whole_run(tmp_path / "whole")
    fresh = Disk()
    wal.Log.open(tmp_path / "log", storage=fresh)
    for call in range(len(fresh.calls) + 1, len(calls) + 1):
        world, client, disk = World(), Client(), Disk({call: fault})
        async with opened(tmp_path / str(call), world, disk) as edge:
            await client.run(edge)
            check_end(world, client, edge)
            await edge.close()
        assert world.host.sandboxes == {}, call
