"""Snapshots, forks and branches: what a sandbox goes on from."""

import asyncio
from typing import Any

import pytest

from dsec.errors import (
    DivergedError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    SpawnError,
    StateError,
)
from dsec.testing import FakeSandbox, FakeSubstrate
from dsec.types import Command, ExecResult, Output, SandboxId, SandboxSpec
from dsec.views import CreateRequest


def run(name: str) -> Command:
    return Command(argv=(name,))


def history(sandbox: FakeSandbox, _command: Command) -> ExecResult:
    """A world in which every result tells all commands of the sandbox's past, layers included."""
    below = [c for layer in reversed(sandbox.spec.layers) for c in LAYERS[layer]]
    return ExecResult(exit_code=0, stdout=Output(" ".join(c.argv[0] for c in below + sandbox.commands).encode()))


LAYERS: dict[Any, list[Command]] = {}


@pytest.fixture(autouse=True)
def _world(hosts: Any) -> None:
    hosts.script = history
    LAYERS.clear()
    hosts.host.layers = LAYERS


async def test_a_fork_goes_on_from_what_was_written_and_apart(hosts: Any) -> None:
    edge = await hosts.edge()
    origin = await edge.create(CreateRequest())
    await edge.exec(origin.id, run("a"))
    one, two = await edge.fork(origin.id, 2, CreateRequest(labels={"x": "y"}))
    assert one.spec.layers == two.spec.layers
    assert len(one.spec.layers) == 1
    assert one.labels == {"x": "y"}
    assert (await edge.exec(one.id, run("b"))).stdout.head == b"a b"
    assert (await edge.exec(two.id, run("c"))).stdout.head == b"a c"
    assert (await edge.exec(origin.id, run("d"))).stdout.head == b"a d"


async def test_a_paused_sandbox_is_snapshot_and_stays_paused(hosts: Any) -> None:
    edge = await hosts.edge()
    origin = await edge.create(CreateRequest())
    await edge.pause(origin.id)
    assert (await edge.snapshot(origin.id)).startswith("sha256:")
    assert edge.get(origin.id).state == "paused"


async def test_a_repeated_fork_gives_the_same_sandboxes_also_after_a_kill(hosts: Any) -> None:
    edge = await hosts.edge()
    origin = await edge.create(CreateRequest())
    views = await edge.fork(origin.id, 3, CreateRequest(request_id="f"))
    assert await edge.fork(origin.id, 3, CreateRequest(request_id="f")) == views
    await hosts.kill(edge)
    edge = await hosts.edge()
    assert await edge.fork(origin.id, 3, CreateRequest(request_id="f")) == views
    with pytest.raises(DivergedError):
        await edge.fork(origin.id, 2, CreateRequest(request_id="f"))
    with pytest.raises(DivergedError):
        await edge.create(CreateRequest(request_id="f"))
    await edge.cancel("f")
    assert edge.list() == [origin]


async def test_a_fork_is_all_or_none(hosts: Any) -> None:
    class Third(FakeSubstrate):
        async def create(self, spec: SandboxSpec, sandbox_id: SandboxId | None = None) -> FakeSandbox:
            if len(self.sandboxes) == 3:
                raise SpawnError("step clone: EAGAIN")
            return await super().create(spec, sandbox_id)

    edge = await hosts.edge(Third(hosts.script, hosts.host))
    origin = await edge.create(CreateRequest())
    with pytest.raises(SpawnError):
        await edge.fork(origin.id, 5)
    assert edge.list() == [origin]
    assert list(hosts.host.sandboxes) == [origin.id]
    assert edge.status().used["sandboxes_count"] == 1


async def test_a_fork_that_does_not_fit_takes_no_snapshot(hosts: Any) -> None:
    edge = await hosts.edge(sandboxes_count_max=3)
    origin = await edge.create(CreateRequest())
    with pytest.raises(ResourceExhaustedError, match="can never fit"):
        await edge.fork(origin.id, 4)
    assert hosts.host.layers == {}
    for count in (0, -1, 10_000):
        with pytest.raises(InvalidArgumentError):
            await edge.fork(origin.id, count)


async def test_a_branch_is_the_state_after_a_command_and_its_past_is_compared(hosts: Any) -> None:
    edge = await hosts.edge()
    origin = await edge.create(CreateRequest())
    for name in "abcd":
        await edge.exec(origin.id, run(name), name)
    branch = await edge.branch(origin.id, "b", CreateRequest(request_id="br"))
    assert (await edge.exec(branch.id, run("x"))).stdout.head == b"a b x"
    assert [view.key for view in edge.commands(branch.id)] == ["a", "b", "#3"]
    assert (await edge.branch(origin.id, "b", CreateRequest(request_id="br"))).id == branch.id
    await edge.destroy(origin.id)
    late = await edge.branch(origin.id, "d")
    assert (await edge.exec(late.id, run("y"))).stdout.head == b"a b c d y"
    with pytest.raises(NotFoundError):
        await edge.branch(origin.id, "no such key")


async def test_a_branch_begins_at_the_newest_snapshot_before_its_command(hosts: Any) -> None:
    edge = await hosts.edge()
    origin = await edge.create(CreateRequest())
    for name in "abcd":
        await edge.exec(origin.id, run(name), name)
        if name in "bd":
            await edge.snapshot(origin.id)
    branch = await edge.branch(origin.id, "c")
    assert [c.argv[0] for c in hosts.sandbox(branch.id).commands] == ["c"]
    assert (await edge.exec(branch.id, run("x"))).stdout.head == b"a b c x"
    whole = await edge.branch(origin.id, "d")
    assert hosts.sandbox(whole.id).commands == []


async def test_a_branch_that_differs_from_its_past_is_a_typed_error_and_leaves_nothing(hosts: Any) -> None:
    edge = await hosts.edge()
    origin = await edge.create(CreateRequest())
    await edge.exec(origin.id, run("a"), "a")
    hosts.script = lambda _sandbox, _command: ExecResult(exit_code=1)
    with pytest.raises(DivergedError, match="exit code was 0, is 1"):
        await edge.branch(origin.id, "a")
    assert list(hosts.host.sandboxes) == [origin.id]


async def test_commands_that_overlapped_or_read_from_their_client_are_no_past_to_branch_from(hosts: Any) -> None:
    may_end = asyncio.Event()

    async def slow(_sandbox: FakeSandbox, command: Command) -> ExecResult:
        if command.argv[0] == "slow":
            await may_end.wait()
        return ExecResult(exit_code=0)

    hosts.script = slow
    edge = await hosts.edge()
    origin = await edge.create(CreateRequest())
    await edge.exec(origin.id, Command(argv=("cat",), keep_stdin_open=True), "cat")
    await edge.start(origin.id, run("slow"), "slow")
    await edge.exec(origin.id, run("b"), "b")
    with pytest.raises(StateError, match="'slow'"):
        await edge.branch(origin.id, "b")
    with pytest.raises(StateError, match="read from its client"):
        await edge.branch(origin.id, "cat")
    may_end.set()
    await edge.wait(origin.id, "slow")
    with pytest.raises(StateError, match="'slow'"):
        await edge.branch(origin.id, "b")
    assert [view.id for view in edge.list()] == [origin.id]


async def test_a_branch_takes_the_newest_snapshot_that_is_still_there(hosts: Any) -> None:
    edge = await hosts.edge()
    origin = await edge.create(CreateRequest())
    layers = []
    for name in "abc":
        await edge.exec(origin.id, run(name), name)
        layers.append(await edge.snapshot(origin.id))
    for gone, again in ((layers[2], ["c"]), (layers[1], ["b", "c"]), (layers[0], ["a", "b", "c"])):
        del hosts.host.layers[gone]
        branch = await edge.branch(origin.id, "c")
        assert [c.argv[0] for c in hosts.sandbox(branch.id).commands] == again


@pytest.mark.parametrize("what", ["fork", "branch"])
async def test_no_layer_goes_between_its_choice_and_the_birth_of_what_is_made_of_it(hosts: Any, what: str) -> None:
    class Crowded(FakeSubstrate):
        async def create(self, spec: SandboxSpec, sandbox_id: SandboxId | None = None) -> FakeSandbox:
            self.host.make_room()
            return await super().create(spec, sandbox_id)

    edge = await hosts.edge(Crowded(hosts.script, hosts.host))
    origin = await edge.create(CreateRequest())
    await edge.exec(origin.id, run("a"), "a")
    await edge.snapshot(origin.id)
    made = [await edge.branch(origin.id, "a")] if what == "branch" else await edge.fork(origin.id, 2)
    assert {view.spec.layers for view in made} == {tuple(hosts.host.layers)}
    hosts.host.make_room()
    assert hosts.host.layers == {}
