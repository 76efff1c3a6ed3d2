"""What the journal tells of the past, and what asking for it may cost others."""

import asyncio
import threading
import tracemalloc
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

import wal
from dsec.edge.history import History, read_trajectory
from dsec.edge.journal import JournalRecord, Ledger, SandboxEnded, SandboxRequested, encode
from dsec.errors import NotFoundError, ResourceExhaustedError, StateError
from dsec.lifecycle import EndReason
from dsec.trajectory import CommandFinished, CommandStarted
from dsec.types import Command, ExecResult, Output, SandboxId, SandboxSpec
from dsec.views import CreateRequest

BOX = SandboxId("sb-1")
LS = Command(argv=("ls",))
REQUESTED = SandboxRequested(sandbox_id=BOX, request=CreateRequest(), spec=SandboxSpec(), at_s=1.0)
STARTED = CommandStarted(BOX, 1, "k", LS, 1)
FINISHED = CommandFinished(BOX, 1, "k", ExecResult(exit_code=0))


async def test_a_name_that_was_never_given_is_refused_without_a_look_at_the_journal(hosts: Any) -> None:
    edge = await hosts.edge(ended_count_max=1)
    for _ in range(3):
        await edge.destroy((await edge.create(CreateRequest())).id)
    log = hosts.directory / "log"
    away = log.rename(hosts.directory / "away")
    for name in ("sb-0123456789abcdef", "", "\udc80", "a" * 100_000):
        with pytest.raises(NotFoundError):
            await anext(edge.trajectory(name))
    away.rename(log)


async def test_a_flood_of_questions_about_the_past_is_bounded_and_holds_up_nobody_else(hosts: Any) -> None:
    edge = await hosts.edge(scans_count_max=8, results_bytes_max=0)
    old, box = [(await edge.create(CreateRequest())).id for _ in range(2)]
    await edge.exec(old, LS, "k")
    await edge.destroy(old)
    may_read = threading.Event()
    edge._registry.history._scans.submit(may_read.wait)
    flood = [asyncio.create_task(edge.wait(old, "k")) for _ in range(8)]
    await hosts.until(lambda: edge._registry.history._scans_count == 8)
    with pytest.raises(ResourceExhaustedError, match="8 others"):
        await edge.wait(old, "k")
    with pytest.raises(ResourceExhaustedError):
        await edge.branch(old, "k")
    assert (await edge.exec(box, LS, "mine")).exit_code == 0
    assert (await edge.exec(box, LS, "mine")).exit_code == 0  # read back by its lsn
    await edge.snapshot(box)
    assert [asked for asked in flood if asked.done()] == []
    may_read.set()
    assert {result.exit_code for result in await asyncio.gather(*flood)} == {0}
    assert (await edge.wait(old, "k")).exit_code == 0


async def test_a_slow_reader_of_the_past_holds_little_of_it_and_counts_as_one_until_its_end(hosts: Any) -> None:
    edge = await hosts.edge(scans_count_max=1, results_bytes_max=0)
    box = (await edge.create(CreateRequest())).id
    hosts.script = lambda _box, _command: ExecResult(exit_code=0, stdout=Output(bytes(1 << 20)))
    for number in range(32):
        await edge.exec(box, LS, f"{number}")
    tracemalloc.start()
    async with aclosing(edge.trajectory(box)) as entries:
        assert (await anext(entries)).key == "0"
        held_bytes, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held_bytes < 16 << 20
        with pytest.raises(ResourceExhaustedError, match="1 others"):
            await anext(edge.trajectory(box))
    assert [entry.key async for entry in edge.trajectory(box)] == [f"{number}" for number in range(32)]


async def test_what_ended_is_read_to_its_own_end_only(hosts: Any) -> None:
    edge = await hosts.edge()
    old, box = [(await edge.create(CreateRequest())).id for _ in range(2)]
    await edge.exec(old, LS, "k")
    await edge.destroy(old)
    last_lsn = edge._registry.log.lsn
    await edge.exec(box, LS, "later")
    assert edge._registry.known(old).last_lsn == last_lsn
    assert [entry.key async for entry in edge.trajectory(old)] == ["k"]


def written(directory: Path, records: list[JournalRecord], lost_count: int = 0) -> Ledger:
    """What an Edge held that wrote these; the first of them are not in its journal any more."""
    ledger = Ledger(10)
    log = wal.Log.open(directory / "log")
    for lsn, record in enumerate(records, start=1):
        ledger.apply(record, lsn)
        if lsn > lost_count:
            log.append(*encode(record))
    log.close()
    return ledger


async def test_an_end_without_its_start_is_a_damaged_journal(tmp_path: Path) -> None:
    known = written(tmp_path, [REQUESTED, STARTED]).sandboxes[BOX]
    log = wal.Log.open(tmp_path / "log")
    log.append(*encode(CommandFinished(BOX, 1, "other", ExecResult(exit_code=0))))
    log.close()
    with pytest.raises(StateError, match="'other' of sb-1 and no start"):
        await History(tmp_path, 0, 1).past(known, "k")


async def test_a_past_whose_beginning_was_dropped_is_not_told_in_part(tmp_path: Path) -> None:
    records = [REQUESTED, STARTED, FINISHED, SandboxEnded(BOX, EndReason.DESTROYED, 2.0)]
    known = written(tmp_path, records, lost_count=2).sandboxes[BOX]
    with pytest.raises(NotFoundError, match="beginning of sb-1"):
        await History(tmp_path, 0, 1).past(known, "k")
    with pytest.raises(NotFoundError, match="beginning of sb-1"):
        list(read_trajectory(tmp_path, BOX))
