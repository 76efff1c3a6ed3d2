"""Laws of the Edge's journal: every record comes back, and any prefix folds, within its bounds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsec import trajectory
from dsec.edge import journal
from dsec.edge.journal import (
    EdgeOpened,
    JournalRecord,
    LeaseEnded,
    LeaseGranted,
    Ledger,
    NetworkUpdated,
    RequestCancelled,
    SandboxEnded,
    SandboxPaused,
    SandboxReady,
    SandboxRequested,
    SandboxResumed,
    SnapshotTaken,
)
from dsec.lifecycle import EndReason, State
from dsec.trajectory import CommandFinished, CommandRefused, CommandStarted, CommandUnknown
from dsec.types import Command, ExecResult, LayerId, NetworkPolicy, SandboxId, SandboxSpec
from dsec.views import CreateRequest

KEPT = 3
BYTES = st.text(st.characters(codec="utf-8"), max_size=5) | st.binary(max_size=5).map(
    lambda data: data.decode(errors="surrogateescape")
)
COMMANDS = st.builds(
    Command,
    argv=st.lists(BYTES, min_size=1, max_size=3).map(tuple),
    env=st.dictionaries(BYTES, BYTES, max_size=2),
    cwd=BYTES,
    user=BYTES,
    stdin=st.binary(max_size=8),
)


@given(COMMANDS)
def test_a_command_comes_back_from_the_log_whatever_its_bytes(command: Command) -> None:
    record = CommandStarted("s", 1, "k", command, 1, 2.0)
    assert journal.decode(*journal.encode(record)) == record


@given(COMMANDS, st.randoms())
def test_equal_commands_have_one_digest_whatever_the_order_of_their_variables(command: Command, random: Any) -> None:
    names = list(command.env)
    random.shuffle(names)
    again = msgspec.structs.replace(command, env={name: command.env[name] for name in names})
    assert trajectory.digest_of(command) == trajectory.digest_of(again)
    other = msgspec.structs.replace(command, stdin=command.stdin + b"x")
    assert trajectory.digest_of(command) != trajectory.digest_of(other)


def test_a_record_of_another_schema_is_refused() -> None:
    with pytest.raises(msgspec.DecodeError):
        journal.decode(2, b"\x80")
    with pytest.raises(msgspec.DecodeError):
        journal.decode(journal.KIND, msgspec.msgpack.encode({"type": "no_such_record"}))


class Writer:
    """Writes what an Edge could write, as chance will have it."""

    def __init__(self, choose: Callable[[int], int]) -> None:
        self.choose = choose
        self.records: list[JournalRecord] = []
        self.live: dict[SandboxId, State] = {}
        self.running: list[tuple[SandboxId, str]] = []
        self.made_count = 0
        self.time_s = 0.0

    def write(self) -> None:
        self.time_s += 1
        steps = [self.request, self.lease, self.cancel, self.open]
        if self.live:
            steps += [self.change, self.command, self.end]
        steps[self.choose(len(steps))]()

    def some(self) -> SandboxId:
        return list(self.live)[self.choose(len(self.live))]

    def open(self) -> None:
        self.records.append(EdgeOpened("boot", 0.0, self.time_s) if self.choose(2) else fold(self.records).carried())

    def request(self) -> None:
        self.made_count += 1
        sandbox_id = SandboxId(f"s{self.made_count}")
        request = CreateRequest(request_id=f"r{self.made_count // 2}", owner="abc"[self.choose(3)])
        self.records.append(
            SandboxRequested(sandbox_id=sandbox_id, request=request, spec=SandboxSpec(), at_s=self.time_s)
        )
        self.live[sandbox_id] = State.CREATING

    def change(self) -> None:
        sandbox_id, now = self.some(), self.time_s
        if self.live[sandbox_id] is State.CREATING:
            self.records.append(SandboxReady((sandbox_id,), now))
            self.live[sandbox_id] = State.RUNNING
            return
        options: list[JournalRecord] = [
            SandboxPaused(sandbox_id, now),
            SandboxResumed(sandbox_id, now),
            SnapshotTaken(sandbox_id, LayerId("sha256:0"), None, now),
            NetworkUpdated(sandbox_id, NetworkPolicy(), now),
        ]
        self.records.append(options[self.choose(len(options))])

    def command(self) -> None:
        if self.running and self.choose(2):
            sandbox_id, key = self.running.pop(self.choose(len(self.running)))
            ends: list[JournalRecord] = [
                CommandFinished(sandbox_id, 1, key, ExecResult(exit_code=0), self.time_s),
                CommandRefused(sandbox_id, 1, key, "why", self.time_s),
                CommandUnknown(sandbox_id, 1, key, self.time_s),
            ]
            self.records.append(ends[self.choose(3)])
            return
        sandbox_id, key = self.some(), f"k{len(self.records)}"
        self.records.append(CommandStarted(sandbox_id, 1, key, Command(argv=("x",)), len(self.records), self.time_s))
        self.running.append((sandbox_id, key))

    def end(self) -> None:
        sandbox_id = self.some()
        del self.live[sandbox_id]
        reason = list(EndReason)[self.choose(len(EndReason))]
        self.records.append(SandboxEnded(sandbox_id, reason, self.time_s))

    def lease(self) -> None:
        owner, epoch = "abc"[self.choose(3)], len(self.records)
        granted = LeaseGranted(owner, epoch, self.time_s + 5)
        self.records.append(granted if self.choose(2) else LeaseEnded(owner, epoch, self.time_s))

    def cancel(self) -> None:
        self.records.append(RequestCancelled(f"r{self.choose(20)}", self.time_s))


def fold(records: list[JournalRecord]) -> Ledger:
    ledger = Ledger(KEPT)
    for lsn, record in enumerate(records, 1):
        ledger.apply(journal.decode(*journal.encode(record)), lsn)
    return ledger


@given(st.lists(st.integers(0, 1 << 16), min_size=3, max_size=400))
def test_any_prefix_of_a_journal_folds_to_what_its_writer_held_within_its_bounds(choices: list[int]) -> None:
    drawn = iter(choices)
    writer, held = Writer(lambda count: next(drawn) % count), Ledger(KEPT)
    while True:
        try:
            writer.write()
        except StopIteration:
            break
        for record in writer.records[held.lsn :]:
            held.apply(record, held.lsn + 1)
        living = {name: held.sandboxes[name].state for name in writer.live}
        assert living.keys() == {name for name, known in held.sandboxes.items() if not known.is_ended}
        assert {name for name, state in living.items() if state is State.CREATING} == {
            name for name, state in writer.live.items() if state is State.CREATING
        }
        assert len(held.sandboxes) <= len(living) + KEPT
        assert len(held.cancelled) <= KEPT
        assert {name for made in held.requests.values() for name in made} <= held.sandboxes.keys()
    read = fold(writer.records)
    assert (read.sandboxes, read.requests, read.leases, read.cancelled, read.ended) == (
        held.sandboxes, held.requests, held.leases, held.cancelled, held.ended,
    )  # fmt: skip


@given(st.lists(st.integers(0, 1 << 16), min_size=3, max_size=300), st.integers(0, 1 << 16))
def test_what_is_carried_is_all_that_a_dropped_beginning_takes_along_but_what_ended(
    choices: list[int], cut: int
) -> None:
    drawn = iter(choices)
    writer = Writer(lambda count: next(drawn) % count)
    with contextlib.suppress(StopIteration):
        while True:
            writer.write()
    records = [record for record in writer.records if not isinstance(record, SandboxRequested)]
    at = cut % (len(records) + 1)
    whole = fold(records)
    rest = fold([fold(records[:at]).carried(), *records[at:]])
    assert (rest.leases, list(rest.cancelled), rest.opened) == (whole.leases, list(whole.cancelled), whole.opened)
