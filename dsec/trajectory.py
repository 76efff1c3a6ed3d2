"""What happened in a sandbox, as ordered records over a log: created, started, finished, replayed.

A *session* is the life of one logical sandbox; each real sandbox that carried it is an
*incarnation*, counted from 1.  In a rollout's log the session is the rollout; in an Edge's journal
it is the sandbox, and there is one incarnation.  Each command carries a key that the caller chose,
and a number; the fold of the records answers "did it start?" and "what came of it?".

A fold that lives as long as its sandbox cannot hold every byte that was ever written: without
`keeps_contents` it holds for each command a digest, where its records lie, and the bare result.

Invariants:
1. A key belongs to one command for ever (DivergedError otherwise).
2. `finished` is recorded at most once for a key; its result is what every later asker gets.
3. Within one incarnation a key is applied at most once; `run_twice_count` counts violations.

See: docs/formats/events.md; the DeepSeek-V4 report, 5.2.4 ("trajectory log").
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from dsec.errors import DivergedError
from dsec.types import Command, ExecResult, Output, SandboxId, SandboxSpec

KIND = 3
"""Record kind of the trajectory schema in a log."""

REFUSAL_CHARS_MAX = 512
BRIEF_CHARS_MAX = 2048
"""Of argv and env together: what a fold without contents keeps of a command."""

Append = Callable[[int, bytes], Awaitable[int]]
"""`append(kind, payload)`: returns the record's number once it is durable."""


class SandboxCreated(msgspec.Struct, frozen=True, tag="sandbox_created"):
    """A real sandbox now carries the session; `sandbox_id` is its substrate's name for it."""

    session: str
    incarnation: int
    spec: SandboxSpec
    sandbox_id: SandboxId = SandboxId("")


class CommandStarted(msgspec.Struct, frozen=True, tag="command_started"):
    """Durable before the command runs for the first time on this incarnation; `number` is the sandbox's own."""

    session: str
    incarnation: int
    key: str
    command: Command
    number: int = 0
    at_s: float = 0.0


class CommandFinished(msgspec.Struct, frozen=True, tag="command_finished"):
    """Durable before anyone learns the result; without `ran` it was killed before it began: no replay runs it."""

    session: str
    incarnation: int
    key: str
    result: ExecResult
    at_s: float = 0.0
    ran: bool = True


class CommandRefused(msgspec.Struct, frozen=True, tag="command_refused"):
    """It is certain that the command did not run: the same command may start again under its key."""

    session: str
    incarnation: int
    key: str
    why: str
    at_s: float = 0.0


class CommandUnknown(msgspec.Struct, frozen=True, tag="command_unknown"):
    """The command started, and the sandbox lives, but nobody can say any more how it ended."""

    session: str
    incarnation: int
    key: str
    at_s: float = 0.0


class CommandReplayed(msgspec.Struct, frozen=True, tag="command_replayed"):
    """A finished command was applied again, to a new incarnation, under `number`, and compared with its result."""

    session: str
    incarnation: int
    key: str
    is_equal: bool
    number: int = 0


TrajectoryRecord = SandboxCreated | CommandStarted | CommandFinished | CommandRefused | CommandUnknown | CommandReplayed
Record = Callable[[TrajectoryRecord], Awaitable[None]]
"""Makes a record durable, then folds it; both are done when it returns."""


class _RawCommandStarted(msgspec.Struct, frozen=True, tag="command_started_raw"):
    """CommandStarted in a log, where a text of the command is not UTF-8: those four stand beside it as bytes."""

    rest: CommandStarted
    argv: tuple[bytes, ...]
    cwd: bytes
    env: tuple[tuple[bytes, bytes], ...]
    user: bytes


_encoder = msgspec.msgpack.Encoder(order="sorted")
_decoder: msgspec.msgpack.Decoder[TrajectoryRecord | _RawCommandStarted] = msgspec.msgpack.Decoder(
    TrajectoryRecord | _RawCommandStarted
)


def encode(record: TrajectoryRecord) -> bytes:
    """The payload of a log record of kind KIND (msgpack map, `type` names the struct); equal for equal values."""
    try:
        return _encoder.encode(record)
    except UnicodeEncodeError:
        if not isinstance(record, CommandStarted):
            raise
        return _encoder.encode(_raw(record))


def decode(payload: bytes) -> TrajectoryRecord:
    """Inverse of `encode`; msgspec.DecodeError (a ValueError) if the payload is of another schema."""
    record = _decoder.decode(payload)
    return _cooked(record) if isinstance(record, _RawCommandStarted) else record


def _raw(record: CommandStarted) -> _RawCommandStarted:
    command = record.command
    env = tuple(sorted((os.fsencode(name), os.fsencode(value)) for name, value in command.env.items()))
    bare_command = msgspec.structs.replace(command, argv=(), cwd="", env={}, user="")
    return _RawCommandStarted(
        msgspec.structs.replace(record, command=bare_command),
        tuple(map(os.fsencode, command.argv)),
        os.fsencode(command.cwd),
        env,
        os.fsencode(command.user),
    )


def _cooked(raw: _RawCommandStarted) -> CommandStarted:
    command = msgspec.structs.replace(
        raw.rest.command,
        argv=tuple(map(os.fsdecode, raw.argv)),
        cwd=os.fsdecode(raw.cwd),
        env={os.fsdecode(name): os.fsdecode(value) for name, value in raw.env},
        user=os.fsdecode(raw.user),
    )
    return msgspec.structs.replace(raw.rest, command=command)


def digest_of(command: Command) -> bytes:
    """Sixteen bytes that equal commands share."""
    return hashlib.blake2b(encode(CommandStarted("", 0, "", command)), digest_size=16).digest()


@dataclass(slots=True)
class Entry:
    """One command of a session: what was asked, and what came of it.

    `result` is None until it finished.  In a fold that keeps no contents both are only what a list
    shows, without what the command read and wrote: the records of these lsns have the whole.
    """

    digest: bytes
    command: Command
    number: int = 0
    state: Literal["running", "finished", "refused", "unknown"] = "running"
    result: ExecResult | None = None
    refusal: str = ""
    """Why it did not run, the last time."""
    started_lsn: int = 0
    finished_lsn: int = 0
    ran: bool = True
    incarnation: int = 0
    """The newest one that the command was applied to."""
    applied_count: int = 0
    """How often it was applied to that one (first run or replay)."""
    incarnations_count: int = 0
    """How many it was applied to."""


@dataclass(slots=True)
class Trajectory:
    """The fold of one session's records; entries are in the order in which they first started."""

    session: str
    keeps_contents: bool = True
    incarnation: int = 0
    sandbox_id: SandboxId = field(default=SandboxId(""))
    """Of the newest incarnation."""
    has_diverged: bool = False
    """Whether a replay onto the newest incarnation differed."""
    entries: dict[str, Entry] = field(default_factory=dict)
    replayed_count: int = 0
    run_twice_count: int = 0
    """How many commands were applied more than once to one incarnation (must be 0)."""
    last_number: int = 0

    def apply(self, record: TrajectoryRecord, lsn: int = 0) -> None:
        """Fold one record in.  Raises DivergedError if it contradicts an earlier one."""
        match record:
            case SandboxCreated():
                self.incarnation, self.sandbox_id = record.incarnation, record.sandbox_id
                self.has_diverged = False
            case CommandStarted():
                self._start(record, lsn)
            case CommandFinished():
                entry = self._entry(record.key)
                if entry.state == "finished":
                    raise DivergedError(f"{self.session}: key {record.key!r} finished twice")
                entry.state, entry.finished_lsn, entry.ran = "finished", lsn, record.ran
                entry.result = record.result if self.keeps_contents else bare(record.result)
            case CommandRefused():
                entry = self._entry(record.key)
                entry.state, entry.refusal = "refused", record.why[:REFUSAL_CHARS_MAX]
                entry.applied_count -= 1
            case CommandUnknown():
                self._entry(record.key).state = "unknown"
            case CommandReplayed():
                self._count_application(self._entry(record.key), record.incarnation)
                self.replayed_count += 1
                self.last_number = max(self.last_number, record.number)
                self.has_diverged |= not record.is_equal

    def is_open_here(self, entry: Entry) -> bool:
        """True if the command was applied to this incarnation and has no known end."""
        return entry.state in ("running", "unknown") and entry.incarnation == self.incarnation

    def to_rebuild(self, is_wanted: Callable[[str], bool]) -> dict[str, Entry]:
        """The finished commands that make the state anew, in order: those that ran, and whose key `is_wanted`."""
        return {
            key: entry
            for key, entry in self.entries.items()
            if entry.state == "finished" and entry.ran and is_wanted(key)
        }

    def is_whole(self, is_wanted: Callable[[str], bool]) -> bool:
        """True if the newest incarnation had what a rebuild would give it, with the same results, and nothing else."""
        had = {key for key, entry in self.entries.items() if entry.incarnation == self.incarnation}
        return (
            not self.has_diverged
            and self.to_rebuild(is_wanted).keys() <= had
            and all(is_wanted(key) for key in had if self.entries[key].applied_count > 0)
        )

    def forget_contents(self) -> None:
        """Drop what only a rebuild needs (inputs and outputs); counts and keys stay.  For a closed session."""
        for entry in self.entries.values():
            entry.command = msgspec.structs.replace(entry.command, stdin=b"")
            entry.result = None

    def _start(self, record: CommandStarted, lsn: int) -> None:
        digest = digest_of(record.command)
        entry = self.entries.get(record.key)
        if entry is None:
            entry = self.entries[record.key] = Entry(
                digest, record.command if self.keeps_contents else brief(record.command)
            )
        if entry.digest != digest:
            raise DivergedError(f"{self.session}: key {record.key!r} was used for another command")
        if entry.state != "finished":
            entry.state = "running"
        entry.number, entry.started_lsn = record.number, lsn
        self.last_number = max(self.last_number, record.number)
        self._count_application(entry, record.incarnation)

    def _count_application(self, entry: Entry, incarnation: int) -> None:
        if entry.incarnation != incarnation:
            entry.incarnation, entry.applied_count = incarnation, 0
            entry.incarnations_count += 1
        entry.applied_count += 1
        self.run_twice_count += entry.applied_count == 2

    def _entry(self, key: str) -> Entry:
        try:
            return self.entries[key]
        except KeyError:
            raise DivergedError(f"{self.session}: key {key!r} ended before it started") from None


def brief(command: Command) -> Command:
    """A command as a list shows it: without its input, and with long texts cut."""
    command = msgspec.structs.replace(command, stdin=b"")
    if (
        sum(map(len, command.argv)) + sum(map(len, command.env)) + sum(map(len, command.env.values()))
        <= BRIEF_CHARS_MAX
    ):
        return command
    argv = tuple(text if len(text) <= 64 else text[:64] + "..." for text in command.argv[:16])
    return msgspec.structs.replace(command, argv=argv, env={})


def bare(result: ExecResult) -> ExecResult:
    """A result without what the command wrote; the counts stay."""

    def counted(output: Output) -> Output:
        return Output(dropped_bytes=output.total_bytes)

    return msgspec.structs.replace(result, stdout=counted(result.stdout), stderr=counted(result.stderr))
