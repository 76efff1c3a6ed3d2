"""Keyed, durable commands of the Edge: once for each key, whoever asks, whatever was killed."""

import asyncio
from typing import Any, ClassVar

import pytest

from dsec.edge.history import read_trajectory
from dsec.errors import (
    DivergedError,
    InvalidArgumentError,
    NotFoundError,
    OutcomeUnknownError,
    OutOfRangeError,
    ResourceExhaustedError,
    SandboxLostError,
    UnreachableError,
)
from dsec.testing import FakeProcess, FakeSandbox, FakeSubstrate
from dsec.types import Command, ExecResult, Output, SandboxId, SandboxSpec, TtySize
from dsec.views import CreateRequest

LS = Command(argv=("ls",))
CAT = Command(argv=("cat",), keep_stdin_open=True)


class World:
    """A script in which commands wait for the test, and say how many ran."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.runs: list[str] = []

    async def __call__(self, _sandbox: FakeSandbox, command: Command) -> ExecResult:
        self.runs.append(command.argv[0])
        if command.argv[0] != "now":
            await self.may_end.wait()
        return ExecResult(exit_code=len(self.runs), stdout=Output(b"0123456789"))


@pytest.fixture
def world(hosts: Any) -> World:
    hosts.script = World()
    return hosts.script


async def made(hosts: Any, **config: Any) -> tuple[Any, str]:
    edge = await hosts.edge(**config)
    return edge, (await edge.create(CreateRequest())).id


class SlowToStart(FakeSandbox):
    """Whoever wants something waits for the test: at the step that its command names."""

    may_go_on: ClassVar[asyncio.Event]
    waiting: ClassVar[list[str]]

    async def resume(self) -> None:
        if self.is_paused:
            self.waiting.append("wake")
            await self.may_go_on.wait()
        await super().resume()

    async def start(self, command: Command, number: int | None = None) -> FakeProcess:
        if command.argv[0] == "unsent":
            self.waiting.append("unsent")
            await self.may_go_on.wait()
        process = await super().start(command, number)
        if command.argv[0] == "sent":
            self.waiting.append("sent")
            await self.may_go_on.wait()
        return process


class SlowSubstrate(FakeSubstrate):
    async def create(self, spec: SandboxSpec, sandbox_id: SandboxId | None = None) -> FakeSandbox:
        sandbox = await super().create(spec, sandbox_id)
        sandbox.__class__ = SlowToStart
        return sandbox


@pytest.mark.parametrize("where", ["wake", "unsent", "sent"])
async def test_a_command_that_waits_for_its_start_is_killed_at_once_and_never_runs(
    hosts: Any, world: World, where: str
) -> None:
    SlowToStart.may_go_on, SlowToStart.waiting = asyncio.Event(), []
    edge = await hosts.edge(SlowSubstrate(hosts.answer, hosts.host))
    box = (await edge.create(CreateRequest())).id
    await edge.exec(box, Command(argv=("now",)), "before")
    if where == "wake":
        await edge.pause(box)
    command = Command(argv=(where,))
    starting = asyncio.create_task(edge.start(box, command, "k"))
    await hosts.until(lambda: SlowToStart.waiting == [where])
    await edge.kill(box, "k")
    result = await edge.exec(box, command, "k")
    assert (result.exit_code, result.stdout.total_bytes) == (137, 0)
    assert (await starting).state == ("finished" if where != "sent" else "running")
    SlowToStart.may_go_on.set()
    await edge.kill(box, "k")
    assert await edge.exec(box, command, "k") == result
    await edge.exec(box, Command(argv=("now",)), "after")
    assert world.runs == ["now", *(["sent"] if where == "sent" else []), "now"]
    await hosts.kill(edge)
    edge = await hosts.edge()
    assert await edge.exec(box, command, "k") == result
    if where != "sent":  # what never ran is no past to run again
        world.runs.clear()
        await edge.branch(box, "after")
        assert world.runs == ["now", "now"]


async def test_a_command_that_is_killed_before_it_is_written_down_never_runs(hosts: Any, world: World) -> None:
    edge, box = await made(hosts)
    running = asyncio.create_task(edge.exec(box, LS, "k"))
    await hosts.until(lambda: edge._registry.find(box).durable.running)
    await edge.kill(box, "k")
    assert (await running).exit_code == 137
    assert world.runs == []


async def test_twenty_callers_of_one_key_make_one_command_and_get_one_result(hosts: Any, world: World) -> None:
    edge, box = await made(hosts)
    callers = [asyncio.create_task(edge.exec(box, LS, "k")) for _ in range(20)]
    await hosts.until(lambda: world.runs)
    late = asyncio.create_task(edge.wait(box, "k"))
    world.may_end.set()
    assert {result.exit_code for result in await asyncio.gather(*callers, late)} == {1}
    assert (await edge.exec(box, LS, "k")).exit_code == 1
    assert world.runs == ["ls"]


async def test_a_used_key_with_another_command_is_refused_at_every_stage(hosts: Any, world: World) -> None:
    edge, box = await made(hosts)
    running = asyncio.create_task(edge.exec(box, LS, "k"))
    await hosts.until(lambda: world.runs)
    with pytest.raises(DivergedError, match="'k'"):
        await edge.exec(box, CAT, "k")
    world.may_end.set()
    await running
    with pytest.raises(DivergedError, match="'k'"):
        await edge.start(box, CAT, "k")
    await edge.destroy(box)
    with pytest.raises(DivergedError, match="'k'"):
        await edge.exec(box, CAT, "k")


async def test_a_caller_that_goes_away_leaves_its_command_and_the_next_one_gets_the_result(
    hosts: Any, world: World
) -> None:
    edge, box = await made(hosts)
    caller = asyncio.create_task(edge.exec(box, LS, "k"))
    await hosts.until(lambda: world.runs)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    world.may_end.set()
    assert (await edge.exec(box, LS, "k")).exit_code == 1
    assert world.runs == ["ls"]


async def test_a_command_of_a_killed_edge_runs_on_and_the_next_edge_has_its_result(hosts: Any, world: World) -> None:
    edge, box = await made(hosts)
    await edge.start(box, LS, "k")
    await hosts.kill(edge)
    edge = await hosts.edge()
    assert edge.get(box).state == "running"
    assert [(view.key, view.state) for view in edge.commands(box)] == [("k", "running")]
    waiting = asyncio.create_task(edge.exec(box, LS, "k"))
    world.may_end.set()
    assert (await waiting).exit_code == 1
    assert world.runs == ["ls"]


async def test_a_command_that_ended_while_no_edge_was_there_is_collected(hosts: Any, world: World) -> None:
    edge, box = await made(hosts)
    await edge.start(box, LS, "k")
    await hosts.kill(edge)
    world.may_end.set()
    await hosts.sandbox(box).processes[1].wait()
    assert (await (await hosts.edge()).wait(box, "k")).exit_code == 1


async def test_a_command_that_was_written_down_but_never_reached_the_sandbox_runs_for_the_first_time(
    hosts: Any, world: World
) -> None:
    world.may_end.set()
    edge, box = await made(hosts)
    await edge.start(box, LS, "k")
    await edge.wait(box, "k")
    sandbox = hosts.sandbox(box)
    sandbox.start = never  # the Edge is killed between its journal and the sandbox
    caller = asyncio.create_task(edge.exec(box, Command(argv=("late",)), "late"))
    await hosts.until(lambda: "late" in [view.key for view in edge.commands(box)])
    await hosts.kill(edge)
    with pytest.raises(UnreachableError, match="late"):
        await caller
    del sandbox.start
    edge = await hosts.edge()
    assert (await edge.wait(box, "late")).exit_code == 2
    assert world.runs == ["ls", "late"]


async def never(*_: Any) -> None:
    await asyncio.Event().wait()


async def test_a_command_whose_end_the_sandbox_forgot_is_unknown_for_ever_and_never_runs_again(
    hosts: Any, world: World
) -> None:
    edge, box = await made(hosts)
    await edge.start(box, LS, "k")
    await hosts.kill(edge)
    hosts.sandbox(box).forgotten.add(1)
    for _ in range(2):
        edge = await hosts.edge()
        for ask in (edge.exec(box, LS, "k"), edge.wait(box, "k"), edge.kill(box, "k")):
            with pytest.raises(OutcomeUnknownError):
                await ask
        assert [entry.state async for entry in edge.trajectory(box)] == ["unknown"]
        await hosts.kill(edge)
    assert world.runs == ["ls"]
    await hosts.edge()


async def test_a_command_without_a_key_gets_its_number_for_one(hosts: Any, world: World) -> None:
    edge, box = await made(hosts)
    view = await edge.start(box, LS)
    assert (view.key, view.number, view.state) == ("#1", 1, "running")
    assert (await edge.start(box, LS)).key == "#2"
    with pytest.raises(InvalidArgumentError, match="#"):
        await edge.exec(box, LS, "#7")
    world.may_end.set()
    assert (await edge.exec(box, LS, "#1")).exit_code == 2


async def test_commands_are_driven_by_their_key(hosts: Any, world: World) -> None:
    edge, box = await made(hosts)
    await edge.start(box, CAT, "cat")
    await edge.start(box, Command(argv=("top",), tty=TtySize()), "top")
    cat, top = hosts.sandbox(box).processes.values()
    await edge.write_stdin(box, "cat", b"hello")
    await edge.close_stdin(box, "cat")
    await edge.resize(box, "top", 50, 100)
    await edge.signal(box, "top", 28)
    assert (cat.stdin, cat.is_stdin_closed, top.size, top.signals) == (b"hello", True, TtySize(50, 100), [28])
    with pytest.raises(InvalidArgumentError):
        await edge.resize(box, "cat", 1, 1)
    with pytest.raises(InvalidArgumentError):
        await edge.signal(box, "top", 65)
    await edge.kill(box, "cat")
    assert (await edge.wait(box, "cat")).exit_code == 137
    await edge.kill(box, "cat")
    with pytest.raises(NotFoundError):
        await edge.kill(box, "dog")
    with pytest.raises(NotFoundError):
        await edge.wait(box, "dog")


async def test_a_sandbox_that_dies_under_a_command_is_lost_and_its_finished_keys_stay(hosts: Any, world: World) -> None:
    edge, box = await made(hosts)
    done = await edge.exec(box, Command(argv=("now",)), "done")
    waiting = asyncio.create_task(edge.exec(box, LS, "k"))
    await hosts.until(lambda: len(world.runs) == 2)
    hosts.sandbox(box).die()
    with pytest.raises(SandboxLostError):
        await waiting
    await edge._registry.settle()
    assert (edge.get(box).state, edge.get(box).reason) == ("ended", "lost")
    assert edge.status().used["sandboxes_count"] == 0
    assert await edge.exec(box, Command(argv=("now",)), "done") == done
    assert await edge.wait(box, "done") == done
    assert await edge.read_output(box, "done", "stdout", 7, 2) == b"78"
    with pytest.raises(OutcomeUnknownError):
        await edge.exec(box, LS, "k")
    with pytest.raises(SandboxLostError, match="lost"):
        await edge.exec(box, LS, "new")


async def test_results_are_bounded_in_memory_and_read_back_from_the_journal(hosts: Any, world: World) -> None:
    world.may_end.set()
    edge, box = await made(hosts, results_bytes_max=0)
    results = [await edge.exec(box, LS, f"k{n}") for n in range(5)]
    assert edge._registry.history._kept == {}
    assert [await edge.exec(box, LS, f"k{n}") for n in range(5)] == results
    views = edge.commands(box)
    assert [view.number for view in views] == [1, 2, 3, 4, 5]
    assert [view.result.stdout for view in views if view.result] == [Output(dropped_bytes=10)] * 5


async def test_output_beyond_the_inline_bound_is_cut_in_the_record_and_the_whole_is_read_by_offset(
    hosts: Any, world: World
) -> None:
    world.may_end.set()
    edge, box = await made(hosts, inline_bytes_max=4)
    result = await edge.exec(box, LS, "k")
    assert result.stdout == Output(head=b"01", tail=b"89", dropped_bytes=6)
    assert await edge.read_output(box, "k", "stdout", 0, 100) == b"01"
    assert await edge.read_output(box, "k", "stdout", 9, 100) == b"9"
    assert await edge.read_output(box, "k", "stdout", 10, 100) == b""
    with pytest.raises(OutOfRangeError):
        await edge.read_output(box, "k", "stdout", 2, 100)
    with pytest.raises(InvalidArgumentError):
        await edge.read_output(box, "k", "stdout", -1, 100)


async def test_bounds_on_commands_are_refusals_that_name_the_sandbox(hosts: Any, world: World) -> None:
    edge, box = await made(hosts, commands_running_count_max=2, commands_count_max=3)
    await edge.start(box, LS, "a")
    await edge.start(box, LS, "b")
    with pytest.raises(ResourceExhaustedError, match="2 commands under way"):
        await edge.exec(box, LS, "c")
    world.may_end.set()
    await edge.wait(box, "a")
    await edge.wait(box, "b")
    await edge.exec(box, LS, "c")
    with pytest.raises(ResourceExhaustedError, match="has had 3 commands"):
        await edge.exec(box, LS, "d")
    assert await edge.exec(box, LS, "a") == await edge.wait(box, "a")


@pytest.mark.parametrize("key", ["a" * 257, "a\0b", "\n", "\udc80", "é" * 129])
async def test_a_key_that_cannot_be_written_down_is_refused(hosts: Any, world: World, key: str) -> None:
    edge, box = await made(hosts)
    with pytest.raises(InvalidArgumentError, match="key"):
        await edge.exec(box, LS, key)


async def test_bytes_that_are_no_text_survive_the_journal(hosts: Any, world: World) -> None:
    world.may_end.set()
    edge, box = await made(hosts)
    command = Command(argv=("\udcff\udc80", "x"), env={"A": "\udcfe"}, cwd="/\udcfd")
    first = await edge.exec(box, command, "k")
    await hosts.kill(edge)
    edge = await hosts.edge()
    assert await edge.exec(box, command, "k") == first
    assert [entry.command async for entry in edge.trajectory(box)] == [command]


async def test_a_trajectory_outlives_its_sandbox_and_can_be_read_without_an_edge(hosts: Any, world: World) -> None:
    edge, box = await made(hosts)
    await edge.exec(box, Command(argv=("now",)), "a")
    await edge.start(box, LS, "b")
    await edge.destroy(box)
    seen = [(entry.key, entry.state) async for entry in edge.trajectory(box)]
    assert seen == [("a", "finished"), ("b", "unknown")]
    assert [(entry.key, entry.state) for entry in read_trajectory(hosts.directory, box)] == seen
    with pytest.raises(NotFoundError):
        list(read_trajectory(hosts.directory, "no such"))


async def test_a_sandbox_that_dies_while_nothing_runs_in_it_is_seen_at_once(hosts: Any) -> None:
    edge, box = await made(hosts)
    hosts.sandbox(box).die()
    assert await hosts.gone(edge, box) == "lost"
    assert edge.status().used["sandboxes_count"] == 0
