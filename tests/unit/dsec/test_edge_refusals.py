"""What frees a key for the same command, and what leaves its outcome unknown."""

import asyncio
from typing import Any

import pytest

from dsec.errors import (
    DivergedError,
    HostUnfitError,
    InvalidArgumentError,
    NotFoundError,
    OutcomeUnknownError,
    OutOfRangeError,
    ResourceExhaustedError,
)
from tests.unit.dsec.test_edge_exec import CAT, LS, World, made


@pytest.fixture
def world(hosts: Any) -> World:
    hosts.script = World()
    return hosts.script


async def test_a_refused_command_frees_its_key_for_the_same_command(hosts: Any, world: World) -> None:
    edge, box = await made(hosts)
    sandbox = hosts.sandbox(box)

    async def refuse(*_: Any) -> None:
        raise ResourceExhaustedError("no pipes")

    sandbox.start = refuse
    with pytest.raises(ResourceExhaustedError):
        await edge.exec(box, LS, "k")
    assert edge.commands(box) == []
    del sandbox.start
    world.may_end.set()
    with pytest.raises(DivergedError):
        await edge.exec(box, CAT, "k")
    assert (await edge.exec(box, LS, "k")).exit_code == 1
    assert [(view.key, view.number) for view in edge.commands(box)] == [("k", 2)]


@pytest.mark.parametrize(
    "error",
    [
        ResourceExhaustedError("no room for its terminal"),
        OutOfRangeError("its output has made room"),
        HostUnfitError("no keeper lasts"),
        InvalidArgumentError("another token"),
        OSError("the disk is gone"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_failure_after_the_start_is_no_refusal(hosts: Any, world: World, error: Exception) -> None:
    edge, box = await made(hosts)
    await edge.start(box, LS, "k")
    asked = asyncio.create_task(edge.exec(box, LS, "k"))
    await asyncio.sleep(0)
    hosts.sandbox(box).processes[1].lose(error)
    with pytest.raises(OutcomeUnknownError, match=str(error)):
        await asked
    with pytest.raises(OutcomeUnknownError):
        await edge.exec(box, LS, "k")
    assert [(view.key, view.state) for view in edge.commands(box)] == [("k", "unknown")]
    assert world.runs == ["ls"]


async def test_only_a_sandbox_that_knows_nothing_of_a_command_makes_a_failure_a_refusal(
    hosts: Any, world: World
) -> None:
    edge, box = await made(hosts)
    sandbox = hosts.sandbox(box)

    async def cannot_tell(*_: Any) -> None:
        raise NotFoundError("no such sandbox")

    await edge.start(box, LS, "lost")
    sandbox.resume_process = cannot_tell
    sandbox.processes[1].lose(InvalidArgumentError("no such directory"))
    with pytest.raises(OutcomeUnknownError, match="whether"):
        await edge.wait(box, "lost")
    del sandbox.resume_process

    await edge.start(box, LS, "refused")
    sandbox.processes.pop(2).lose(InvalidArgumentError("no such directory"))
    with pytest.raises(InvalidArgumentError, match="directory"):
        await edge.wait(box, "refused")
    world.may_end.set()
    assert (await edge.exec(box, LS, "refused")).exit_code == 3
    assert [(view.key, view.number, view.state) for view in edge.commands(box)] == [
        ("lost", 1, "unknown"),
        ("refused", 3, "finished"),
    ]
