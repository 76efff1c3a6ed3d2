"""What happened in a sandbox, as ordered records over a log: created, started, finished, replayed.

A *session* is the life of one logical sandbox; each real sandbox that carried it is an
*incarnation*, counted from 1.  Commands of a session run one after another and carry a key that
the caller chose; the fold of the records answers "did it start?" and "what came of it?".

Invariants:
1. A key belongs to one command for ever (DivergedError otherwise).
2. `finished` is recorded at most once for a key; its result is what every later asker gets.
3. Within one incarnation a key is applied at most once; `run_twice_count` counts violations.

See: docs/formats/events.md; the DeepSeek-V4 report, 5.2.4 ("trajectory log").
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import msgspec

from dsec.errors import DivergedError
from dsec.types import Command, ExecResult, SandboxSpec

KIND = 3
"""Record kind of the trajectory schema in a log."""

Append = Callable[[int, bytes], Awaitable[int]]
"""`append(kind, payload)`: returns the record's number once it is durable."""


class SandboxCreated(msgspec.Struct, frozen=True, tag="sandbox_created"):
    """A real sandbox now carries the session."""

    session: str
    incarnation: int
    spec: SandboxSpec


class CommandStarted(msgspec.Struct, frozen=True, tag="command_started"):
    """Durable before the command runs for the first time on this incarnation."""

    session: str
    incarnation: int
    key: str
    command: Command


class CommandFinished(msgspec.Struct, frozen=True, tag="command_finished"):
    """Durable before anyone learns the result."""

    session: str
    incarnation: int
    key: str
    result: ExecResult


class CommandReplayed(msgspec.Struct, frozen=True, tag="command_replayed"):
    """A finished command was applied again, to a new incarnation, and compared with its result."""

    session: str
    incarnation: int
    key: str
    is_equal: bool


TrajectoryRecord = SandboxCreated | CommandStarted | CommandFinished | CommandReplayed

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[TrajectoryRecord] = msgspec.msgpack.Decoder(TrajectoryRecord)


def encode(record: TrajectoryRecord) -> bytes:
    """The payload of a log record of kind KIND (msgpack map, `type` names the struct)."""
    return _encoder.encode(record)


def decode(payload: bytes) -> TrajectoryRecord:
    """Inverse of `encode`; msgspec.DecodeError (a ValueError) if the payload is of another schema."""
    return _decoder.decode(payload)


@dataclass(slots=True)
class Entry:
    """One command of a session: what was asked, what came of it (None: not known to have ended)."""

    command: Command
    result: ExecResult | None = None
    applied: dict[int, int] = field(default_factory=dict)
    """Incarnation -> how often the command was applied to it."""

    def count_application(self, incarnation: int) -> None:
        """Note that the command was applied (first run or replay) to an incarnation."""
        self.applied[incarnation] = self.applied.get(incarnation, 0) + 1


@dataclass(slots=True)
class Trajectory:
    """The fold of one session's records; entries are in the order in which they first started."""

    session: str
    incarnation: int = 0
    entries: dict[str, Entry] = field(default_factory=dict)
    replayed_count: int = 0

    @property
    def run_twice_count(self) -> int:
        """How many commands were applied more than once to one incarnation (must be 0)."""
        return sum(n > 1 for entry in self.entries.values() for n in entry.applied.values())

    def apply(self, record: TrajectoryRecord) -> None:
        """Fold one record in.  Raises DivergedError if it contradicts an earlier one."""
        match record:
            case SandboxCreated():
                self.incarnation = record.incarnation
            case CommandStarted():
                entry = self.entries.setdefault(record.key, Entry(record.command))
                if entry.command != record.command:
                    raise DivergedError(f"{self.session}: key {record.key!r} was used for another command")
                entry.count_application(record.incarnation)
            case CommandFinished():
                entry = self._entry(record.key)
                if entry.result is not None:
                    raise DivergedError(f"{self.session}: key {record.key!r} finished twice")
                entry.result = record.result
            case CommandReplayed():
                self._entry(record.key).count_application(record.incarnation)
                self.replayed_count += 1

    def forget_contents(self) -> None:
        """Drop what only a rebuild needs (inputs and outputs); counts and keys stay.  For a closed session."""
        for entry in self.entries.values():
            entry.command = msgspec.structs.replace(entry.command, stdin=b"")
            entry.result = None

    def _entry(self, key: str) -> Entry:
        try:
            return self.entries[key]
        except KeyError:
            raise DivergedError(f"{self.session}: key {key!r} ended before it started") from None
