"""A sandbox that outlived its process: what the next one does with it, wherever the first one may have died."""

import asyncio
from collections.abc import Callable

import pytest

from dsec import trajectory
from dsec.edge.exec_log import DurableSandbox, Running
from dsec.errors import OutcomeUnknownError, UnreachableError
from dsec.replay import every_key, incarnate
from dsec.testing import FakeHost, FakeProcess, FakeSandbox, FakeSubstrate
from dsec.trajectory import Trajectory
from dsec.types import Command, ExecResult, Output, SandboxSpec

LS = Command(argv=("ls",))
CAT = Command(argv=("cat", "a"))
PWD = Command(argv=("pwd",))


class World:
    """A host on which every result depends on all commands before it, and the log of one session."""

    def __init__(self) -> None:
        self.host = FakeHost()
        self.records: list[trajectory.TrajectoryRecord] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def answer(self, sandbox: FakeSandbox, _command: Command) -> ExecResult:
        seen = ";".join(" ".join(command.argv) for command in sandbox.commands)
        await self.may_answer.wait()
        return ExecResult(exit_code=0, stdout=Output(seen.encode()))

    async def append(self, _kind: int, payload: bytes) -> int:
        self.records.append(trajectory.decode(payload))
        return len(self.records)

    def fold(self) -> Trajectory:
        folded = Trajectory("s")
        for record in self.records:
            folded.apply(record)
        return folded

    async def process(self, is_wanted: Callable[[str], bool] = every_key) -> DurableSandbox:
        """What the next process makes of log and host."""
        substrate, folded = FakeSubstrate(self.answer, self.host), self.fold()
        await substrate.open()
        survivor = substrate.adopted().get(folded.sandbox_id)
        return await incarnate(substrate, SandboxSpec(), folded, self.append, is_wanted, survivor)

    def commands(self) -> list[list[str]]:
        """What each living sandbox was given."""
        return [[command.argv[0] for command in sandbox.commands] for sandbox in self.host.sandboxes.values()]


@pytest.fixture
def world() -> World:
    return World()


async def test_what_has_finished_is_answered_from_the_log_and_nothing_is_replayed(world: World) -> None:
    first = await (await world.process()).exec("a", LS)
    again = await world.process()
    assert await again.exec("a", LS) == first
    assert (await again.exec("b", CAT)).stdout.head == b"ls;cat a"
    assert world.commands() == [["ls", "cat"]]
    assert (world.fold().incarnation, world.fold().replayed_count, world.fold().run_twice_count) == (1, 0, 0)


async def test_a_command_in_flight_is_collected(world: World) -> None:
    world.may_answer.clear()
    running = (await world.process()).begin("a", LS)
    assert running is not None
    await running.started()
    again = await world.process()
    world.may_answer.set()
    assert (await again.exec("a", LS)).stdout.head == b"ls"
    assert world.commands() == [["ls"]]


async def test_a_command_whose_host_agent_no_longer_answers_is_left_for_the_next_process(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unreachable(_process: FakeProcess) -> ExecResult:
        raise UnreachableError("the connection broke")

    world.may_answer.clear()
    sandbox = await world.process()
    monkeypatch.setattr(FakeProcess, "wait", unreachable)
    with pytest.raises(UnreachableError):
        await sandbox.exec("a", LS)
    with pytest.raises(OutcomeUnknownError):
        await sandbox.exec("a", LS)
    monkeypatch.undo()
    again = await world.process()
    world.may_answer.set()
    assert (await again.exec("a", LS)).stdout.head == b"ls"
    assert world.commands() == [["ls"]]


async def test_a_kill_that_comes_while_a_command_is_collected_is_not_lost(world: World) -> None:
    world.may_answer.clear()
    running = (await world.process()).begin("a", LS)
    assert running is not None
    process = await running.started()
    again = await world.process()
    collected = Running("a", running.number, LS, running.digest)
    again._begin(collected, again._perform(collected, process))
    assert collected.kill_early()
    assert (await collected.wait()).exit_code == 137


async def test_one_that_ended_unseen_is_collected_too(world: World) -> None:
    await (await world.process()).exec("a", LS)
    world.records.pop()  # its end
    assert (await (await world.process()).exec("a", LS)).stdout.head == b"ls"
    assert world.commands() == [["ls"]]


async def test_one_that_never_began_runs_now_for_the_first_time(world: World) -> None:
    sandbox = await world.process()
    await sandbox.record(trajectory.CommandStarted("s", 1, "a", LS, 1))
    assert (await (await world.process()).exec("a", LS)).stdout.head == b"ls"
    assert world.commands() == [["ls"]]


async def test_one_whose_end_is_forgotten_is_never_run_again(world: World) -> None:
    sandbox = await world.process()
    await sandbox.exec("a", LS)
    world.records.pop()
    next(iter(world.host.sandboxes.values())).forgotten.add(1)
    again = await world.process()
    with pytest.raises(OutcomeUnknownError):
        await again.exec("a", LS)
    assert world.commands() == [["ls"]]


async def test_commands_after_a_rebuild_are_no_commands_of_the_rebuild(world: World) -> None:
    sandbox = await world.process()
    await sandbox.exec("a", LS)
    await sandbox.exec("b", CAT)
    await sandbox.destroy()
    await world.process()
    again = await world.process()  # adopts what was rebuilt
    assert (await again.exec("c", PWD)).stdout.head == b"ls;cat a;pwd"
    assert world.fold().replayed_count == 2


@pytest.mark.parametrize("lost_records", [1, 2])
async def test_a_rebuild_that_was_not_finished_is_begun_anew(world: World, lost_records: int) -> None:
    sandbox = await world.process()
    await sandbox.exec("a", LS)
    await sandbox.exec("b", CAT)
    await sandbox.destroy()
    await world.process()
    del world.records[-lost_records:]
    again = await world.process()
    assert (await again.exec("c", PWD)).stdout.head == b"ls;cat a;pwd"
    assert world.commands() == [["ls", "cat", "pwd"]]
    assert (world.fold().incarnation, world.fold().run_twice_count) == (3, 0)


async def test_what_never_ran_is_not_missed_in_a_rebuild(world: World) -> None:
    sandbox = await world.process()
    await sandbox.exec("a", LS)
    await sandbox.record(trajectory.CommandStarted("s", 1, "b", CAT, 2))
    await sandbox.record(trajectory.CommandFinished("s", 1, "b", ExecResult(exit_code=137), ran=False))
    await sandbox.destroy()
    rebuilt = await world.process()
    assert (await world.process()).sandbox.id == rebuilt.sandbox.id
    assert world.commands() == [["ls"]]


async def test_a_rebuild_that_differed_is_not_gone_on_with(world: World) -> None:
    sandbox = await world.process()
    await sandbox.exec("a", LS)
    await sandbox.destroy()
    rebuilt = await world.process()
    world.records[-1] = trajectory.CommandReplayed("s", 2, "a", is_equal=False, number=2)
    assert (await world.process()).sandbox.id != rebuilt.sandbox.id
    assert world.commands() == [["ls"]]


async def test_a_sandbox_that_had_more_than_is_wanted_is_not_gone_on_with(world: World) -> None:
    sandbox = await world.process()
    await sandbox.exec("good", LS)
    await sandbox.exec("try/0", CAT)
    again = await world.process(lambda key: key != "try/0")
    assert (await again.exec("try/1", PWD)).stdout.head == b"ls;pwd"
    assert world.commands() == [["ls", "pwd"]]


def test_a_log_from_before_sandboxes_had_names_claims_none() -> None:
    old = trajectory.encode(trajectory.SandboxCreated("s", 1, SandboxSpec())).replace(b"sandbox_id", b"sandbox_ix")
    folded = Trajectory("s")
    folded.apply(trajectory.decode(old))
    assert folded.sandbox_id == ""
