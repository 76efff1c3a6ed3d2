"""Durable exec: what is in the log before a command runs, and who answers when it is asked again."""

import pytest

from dsec import trajectory
from dsec.edge.exec_log import DurableSandbox
from dsec.errors import DivergedError, OutcomeUnknownError
from dsec.replay import first_difference, incarnate
from dsec.testing import FakeSandbox, FakeSubstrate
from dsec.trajectory import CommandFinished, CommandReplayed, CommandStarted, SandboxCreated, Trajectory
from dsec.types import Command, ExecResult, Output, SandboxSpec

LS = Command(argv=("ls",))
CAT = Command(argv=("cat", "a"))


class Log:
    """Records in memory; `events` tells in which order records became durable and commands ran."""

    def __init__(self) -> None:
        self.records: list[trajectory.TrajectoryRecord] = []
        self.events: list[str] = []

    async def append(self, kind: int, payload: bytes) -> int:
        assert kind == trajectory.KIND
        record = trajectory.decode(payload)
        self.records.append(record)
        self.events.append(type(record).__name__)
        return len(self.records)

    def fold(self) -> Trajectory:
        folded = Trajectory("s")
        for record in self.records:
            folded.apply(record)
        return folded

    def world(self, sandbox: FakeSandbox, command: Command) -> ExecResult:
        """A world in which every result depends on all commands before it."""
        self.events.append("run " + " ".join(command.argv))
        seen = ";".join(" ".join(c.argv) for c in sandbox.commands)
        return ExecResult(exit_code=len(sandbox.commands), stdout=Output(seen.encode()), duration_s=1.5)


@pytest.fixture
def log() -> Log:
    return Log()


async def opened(log: Log) -> tuple[DurableSandbox, FakeSubstrate]:
    substrate = FakeSubstrate(log.world)
    await substrate.open()
    return await incarnate(substrate, SandboxSpec(), log.fold(), log.append), substrate


async def test_started_is_durable_before_the_command_runs_and_finished_before_anyone_learns(log: Log) -> None:
    sandbox, _ = await opened(log)
    await sandbox.exec("k", LS)
    assert log.events == ["SandboxCreated", "CommandStarted", "run ls", "CommandFinished"]
    started = log.records[1]
    assert isinstance(started, CommandStarted)
    assert (started.key, started.command, started.number) == ("k", LS, 1)


async def test_a_finished_key_is_answered_from_the_log(log: Log) -> None:
    sandbox, substrate = await opened(log)
    first = await sandbox.exec("k", LS)
    assert await sandbox.exec("k", LS) == first
    assert len(substrate.sandboxes[0].commands) == 1


async def test_a_used_key_with_another_command_is_refused_and_runs_nothing(log: Log) -> None:
    sandbox, substrate = await opened(log)
    await sandbox.exec("k", LS)
    with pytest.raises(DivergedError, match="'k'"):
        await sandbox.exec("k", CAT)
    assert len(substrate.sandboxes[0].commands) == 1


async def test_a_command_that_started_on_this_sandbox_without_a_known_end_is_never_run_on_it_again(log: Log) -> None:
    sandbox, substrate = await opened(log)
    await sandbox.record(CommandStarted("s", 1, "k", LS))
    with pytest.raises(OutcomeUnknownError, match="end is unknown"):
        await sandbox.exec("k", LS)
    assert substrate.sandboxes[0].commands == []


async def test_a_lost_sandbox_is_rebuilt_by_its_commands_and_then_runs_the_one_in_flight_for_the_first_time(
    log: Log,
) -> None:
    sandbox, _ = await opened(log)
    await sandbox.exec("a", LS)
    second = await sandbox.exec("b", CAT)
    await sandbox.record(CommandStarted("s", 1, "c", LS))

    rebuilt, substrate = await opened(log)
    assert [c.argv for c in substrate.sandboxes[0].commands] == [("ls",), ("cat", "a")]
    result = await rebuilt.exec("c", LS)
    assert result.stdout.head == b"ls;cat a;ls"
    assert (await rebuilt.exec("b", CAT)) == second
    folded = log.fold()
    assert (folded.incarnation, folded.replayed_count, folded.run_twice_count) == (2, 2, 0)


async def test_a_replay_that_differs_is_a_typed_error_and_leaves_no_sandbox(log: Log) -> None:
    sandbox, _ = await opened(log)
    await sandbox.exec("a", LS)
    substrate = FakeSubstrate(lambda _sandbox, _command: ExecResult(exit_code=1, stdout=Output(b"lz")))
    await substrate.open()
    with pytest.raises(DivergedError, match=r"'a'.*stdout at byte 1"):
        await incarnate(substrate, SandboxSpec(), log.fold(), log.append)
    assert substrate.sandboxes[0].is_destroyed
    assert log.records[-1] == CommandReplayed("s", 2, "a", is_equal=False, number=2)


def test_a_command_applied_twice_to_one_incarnation_is_counted() -> None:
    folded = Trajectory("s")
    for record in (
        SandboxCreated("s", 1, SandboxSpec()),
        CommandStarted("s", 1, "k", LS),
        CommandStarted("s", 1, "k", LS),
        CommandFinished("s", 1, "k", ExecResult(exit_code=0)),
        SandboxCreated("s", 2, SandboxSpec()),
        CommandReplayed("s", 2, "k", is_equal=True),
    ):
        folded.apply(record)
    assert (folded.run_twice_count, folded.replayed_count) == (1, 1)


def test_a_log_in_which_a_key_ends_twice_or_before_its_start_is_refused() -> None:
    folded = Trajectory("s")
    with pytest.raises(DivergedError, match="before it started"):
        folded.apply(CommandFinished("s", 1, "k", ExecResult(exit_code=0)))
    folded.apply(CommandStarted("s", 1, "k", LS))
    folded.apply(CommandFinished("s", 1, "k", ExecResult(exit_code=0)))
    with pytest.raises(DivergedError, match="finished twice"):
        folded.apply(CommandFinished("s", 1, "k", ExecResult(exit_code=0)))


@pytest.mark.parametrize(
    ("logged", "again", "difference"),
    [
        (ExecResult(exit_code=0, duration_s=1.0), ExecResult(exit_code=0, duration_s=9.0), None),
        (ExecResult(exit_code=0), ExecResult(exit_code=1), "exit code was 0, is 1"),
        (ExecResult(exit_code=137, timed_out=True), ExecResult(exit_code=0), "timed_out was True, is False"),
        (
            ExecResult(exit_code=137, timed_out=True, stdout=Output(b"ab")),
            ExecResult(exit_code=137, timed_out=True, stdout=Output(b"abc")),
            None,
        ),
        (
            ExecResult(exit_code=0, stderr=Output(b"same, then x")),
            ExecResult(exit_code=0, stderr=Output(b"same, then y")),
            "stderr at byte 11: was b'same, then x', is b'same, then y'",
        ),
        (
            ExecResult(exit_code=0, stdout=Output(b"a", b"z", 5)),
            ExecResult(exit_code=0, stdout=Output(b"a", b"z", 6)),
            "stdout at byte 2: was b'az', is b'az'",
        ),
    ],
)
def test_a_comparison_sees_what_a_command_can_see_of_its_past(
    logged: ExecResult, again: ExecResult, difference: str | None
) -> None:
    assert first_difference(logged, again) == difference
