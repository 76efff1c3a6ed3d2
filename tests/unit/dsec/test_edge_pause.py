"""Pause and resume at the Edge: who asks meanwhile, who goes away, and what the journal says then."""

import asyncio
from typing import Any

import pytest

from dsec.errors import DsecError, HostUnfitError, ResourceExhaustedError, UnreachableError
from dsec.testing import FakeSandbox
from tests.unit.dsec.test_edge_exec import LS, World, made


class Slow:
    """Makes a change of a sandbox wait for the test."""

    def __init__(self, sandbox: FakeSandbox, change: str) -> None:
        self.begun, self.may_go_on = asyncio.Event(), asyncio.Event()
        at_once = getattr(sandbox, change)

        async def slow() -> None:
            self.begun.set()
            await self.may_go_on.wait()
            await at_once()

        setattr(sandbox, change, slow)


@pytest.fixture
def world(hosts: Any) -> World:
    hosts.script = World()
    return hosts.script


async def test_pause_stops_and_any_request_resumes(hosts: Any, world: World) -> None:
    edge, box = await made(hosts)
    await edge.start(box, LS, "k")
    await edge.pause(box)
    await edge.pause(box)
    sandbox = hosts.sandbox(box)
    assert (edge.get(box).state, sandbox.is_paused) == ("paused", True)
    assert [view.key for view in edge.commands(box)] == ["k"]
    assert sandbox.is_paused
    await hosts.kill(edge)
    edge = await hosts.edge()
    assert (edge.get(box).state, sandbox.is_paused) == ("paused", True)
    world.may_end.set()
    assert (await edge.wait(box, "k")).exit_code == 1
    assert (edge.get(box).state, sandbox.is_paused) == ("running", False)
    await edge.pause(box)
    assert (await edge.exec(box, LS, "k")).exit_code == 1
    assert sandbox.is_paused
    await edge.exec(box, LS, "k2")
    assert not sandbox.is_paused
    await edge.resume(box)


async def test_who_asks_while_a_paused_sandbox_of_an_earlier_edge_wakes_waits_for_its_commands(
    hosts: Any, world: World
) -> None:
    edge, box = await made(hosts)
    await edge.start(box, LS, "a")
    await edge.start(box, LS, "b")
    await edge.pause(box)
    await hosts.kill(edge)
    edge = await hosts.edge()
    slow = Slow(hosts.sandbox(box), "resume")
    first = asyncio.create_task(edge.exec(box, LS, "a"))
    await slow.begun.wait()
    others = [asyncio.create_task(ask) for ask in (edge.exec(box, LS, "b"), edge.wait(box, "a"), edge.kill(box, "b"))]
    await asyncio.sleep(0)
    slow.may_go_on.set()
    await others.pop()
    world.may_end.set()
    assert [(await ask).exit_code for ask in (first, *others)] == [2, 137, 2]
    assert world.runs == ["ls", "ls"]


async def test_a_command_in_a_sandbox_that_cannot_go_on_now_is_not_said_not_to_have_run(
    hosts: Any, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> None:
        raise ResourceExhaustedError("Docker: no")

    edge, box = await made(hosts)
    await edge.start(box, LS, "k")
    await edge.pause(box)
    monkeypatch.setattr(hosts.sandbox(box), "resume", fail)
    for ask in (edge.exec(box, LS, "k"), edge.wait(box, "k"), edge.kill(box, "k"), edge.start(box, LS, "k")):
        with pytest.raises(UnreachableError, match="cannot go on now"):
            await ask
    assert edge.get(box).state == "paused"
    with pytest.raises(ResourceExhaustedError):  # this one has not
        await edge.exec(box, LS, "k2")
    monkeypatch.undo()
    world.may_end.set()
    assert (await edge.exec(box, LS, "k")).exit_code == 1
    assert (await edge.exec(box, LS, "k2")).exit_code == 2
    assert world.runs == ["ls", "ls"]


@pytest.mark.parametrize("change", ["pause", "resume"])
async def test_a_caller_that_goes_away_leaves_the_sandbox_as_the_journal_says(
    hosts: Any, world: World, change: str
) -> None:
    edge, box = await made(hosts)
    sandbox = hosts.sandbox(box)
    if change == "resume":
        await edge.pause(box)
    slow = Slow(sandbox, change)
    asked = asyncio.create_task(getattr(edge, change)(box))
    await slow.begun.wait()
    asked.cancel()
    await asyncio.sleep(0)
    slow.may_go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert (edge.get(box).state, sandbox.is_paused) == (("paused", True) if change == "pause" else ("running", False))


@pytest.mark.parametrize("error", [ResourceExhaustedError, HostUnfitError])
async def test_a_sandbox_that_cannot_be_paused_runs_on(hosts: Any, error: type[DsecError]) -> None:
    edge, box = await made(hosts)

    async def refuse() -> None:
        raise error("not now")

    hosts.sandbox(box).pause = refuse
    with pytest.raises(error):
        await edge.pause(box)
    assert edge.get(box).state == "running"
