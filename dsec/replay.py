"""The sandbox that a trajectory describes: the one that lived on, or a fresh one, the logged commands applied again.

Files are never copied from a log: the state of a sandbox is what its commands made of the base, so the same
commands on the same base make it again, and the comparison of each result is the proof.  The first
difference is a DivergedError; going on would hand the model a world that its past did not happen in.

See: docs/architecture.md, "Recovery"; docs/adr/0003-rebuild-by-compared-replay.md.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from dsec.edge.exec_log import DurableSandbox
from dsec.errors import DivergedError
from dsec.sandbox import Sandbox, Substrate
from dsec.trajectory import KIND, Append, CommandReplayed, Record, SandboxCreated, Trajectory, TrajectoryRecord, encode
from dsec.types import ExecResult, Output, SandboxSpec
from wal import settled

Enter = Callable[[DurableSandbox, str], Awaitable[None]]
"""Awaited before the command of a key is applied again; what it raises ends the rebuild."""


def every_key(_key: str) -> bool:
    """Replay everything."""
    return True


async def enter_nothing(_sandbox: DurableSandbox, _key: str) -> None:
    """An `Enter` where every command runs in the same surroundings."""


def folding(append: Append, trajectory: Trajectory) -> Record:
    """Records that are appended and then folded into one trajectory; a cancellation waits for both."""

    async def append_and_fold(record: TrajectoryRecord) -> None:
        trajectory.apply(record, await append(KIND, encode(record)))

    return lambda record: settled(append_and_fold(record))


async def incarnate(
    substrate: Substrate,
    spec: SandboxSpec,
    trajectory: Trajectory,
    append: Append,
    is_wanted: Callable[[str], bool] = every_key,
    survivor: Sandbox | None = None,
    enter: Enter = enter_nothing,
) -> DurableSandbox:
    """A sandbox in the state that the trajectory describes: the survivor, a fresh one, or one that is rebuilt.

    The survivor is the newest incarnation, left by an earlier process; its commands go on.  One whose own rebuild was
    never finished is destroyed.  A rebuild is a compared replay of the finished commands
    whose key `is_wanted`, in the order in which they started.  Raises DivergedError at the first result that
    differs (the new sandbox is destroyed), and what `Substrate.create` and `enter` raise.
    """
    record = folding(append, trajectory)
    if survivor is not None and not trajectory.is_whole(is_wanted):
        await survivor.destroy()
        survivor = None
    sandbox = DurableSandbox(survivor or await substrate.create(spec), trajectory, record)
    try:
        if survivor is not None:
            await sandbox.attach()
        else:
            created = SandboxCreated(trajectory.session, trajectory.incarnation + 1, spec, sandbox.sandbox.id)
            await record(created)
            await _replay(sandbox, is_wanted, enter)
    except BaseException:
        await sandbox.destroy()
        raise
    return sandbox


async def _replay(sandbox: DurableSandbox, is_wanted: Callable[[str], bool], enter: Enter) -> None:
    trajectory = sandbox.trajectory
    for key, entry in trajectory.to_rebuild(is_wanted).items():
        if (logged := entry.result) is None:
            raise DivergedError(f"{trajectory.session}: the result of {key!r} was let go, and cannot be compared")
        await enter(sandbox, key)
        number = sandbox.take_number()
        again = await (await sandbox.sandbox.start(entry.command, number)).wait()
        difference = first_difference(logged, again)
        is_equal = difference is None
        await sandbox.record(CommandReplayed(trajectory.session, trajectory.incarnation, key, is_equal, number))
        if not is_equal:
            raise DivergedError(f"{trajectory.session}: replay of {key!r} differs from the log: {difference}")


def first_difference(logged: ExecResult, again: ExecResult) -> str | None:
    """What a command can see of its own past: exit code and output; None if equal.

    Durations differ by nature.  Of a command that was killed by its timeout only that fact is
    compared: how far it came is a matter of speed.
    """
    if logged.timed_out != again.timed_out:
        return f"timed_out was {logged.timed_out}, is {again.timed_out}"
    if logged.timed_out:
        return None
    if logged.exit_code != again.exit_code:
        return f"exit code was {logged.exit_code}, is {again.exit_code}"
    return _output_difference("stdout", logged.stdout, again.stdout) or _output_difference(
        "stderr", logged.stderr, again.stderr
    )


def _output_difference(name: str, logged: Output, again: Output) -> str | None:
    if logged == again:
        return None
    old, new = logged.data, again.data
    offset = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    near = slice(max(0, offset - 20), offset + 20)
    return f"{name} at byte {offset}: was {old[near]!r}, is {new[near]!r}"
