"""Events and records: what goes into the log comes out of it."""

import asyncio
from pathlib import Path

import msgspec
import pytest

import wal
from dsec.trajectory import CommandFinished, CommandReplayed, CommandStarted, SandboxCreated
from dsec.trajectory import encode as encode_trajectory
from dsec.types import Command, ExecResult, NetworkPolicy, Output, SandboxSpec
from rollout import events, journal, steps
from rollout.bench.tasks import task_from_files
from rollout.engine import Routes, TopLogprobs
from rollout.errors import JournalError, MachineError
from rollout.events import FinishReason, PromptSegment, Spent
from rollout.request import Conversation
from rollout.steps import Row, Step
from rollout.testing import ENGINE, job_of_one
from wal import tokens
from wal.tokens import TokensAppended

TASK = task_from_files(
    "t",
    {
        "task.toml": b"",
        "instruction.md": b"Do it.\n",
        "environment/Dockerfile": b"FROM debian:bookworm-slim\nWORKDIR /app\n",
        "tests/test.sh": b"#!/bin/bash\necho 1 > /logs/verifier/reward.txt\n",
    },
)
EVENTS = [
    events.TaskAdmitted(TASK),
    events.JobSubmitted(job_of_one()),
    events.JobCancelled("run", events.FinishReason.DEADLINE),
    events.JobWorked("run", 1.5),
    events.RolloutOpened("r", "run", "run/t", 0, (PromptSegment("SYSTEM", (0, 5)),), "digest", ENGINE),
    events.RolloutResumed("r", 2, 100),
    events.SandboxPrepared("r", 0.5),
    events.NetworkSwitched("r", "agent", NetworkPolicy()),
    TokensAppended("r", 2, (7, 4095), (-0.5, -1.25), 0),
    events.ToolFinished("r", 0, "out\ufffd\n", None, False, 3, 0.25),
    events.SolutionApplied("r", 1, 0.5),
    events.AgentStopped("r", FinishReason.WALL_CLOCK),
    events.Judged("r", 0.5, {"reward": 0.5}, "d", 0.5),
    events.RolloutFinished("r", FinishReason.STOP, Spent(decode_s=1.0, log_s=3.0, cached_tokens_count=7)),
    events.ConversationAdmitted(Conversation(name="c", digest="d", messages_json='[{"role":"user"}]')),
    events.RolloutsAcknowledged(("r", "s")),
    events.PolicyUpdated(ENGINE, "weights/1"),
    events.Preempted("r", "asked", 1700000000.5, Spent(queue_s=2.0)),
    events.KvBroke("r", 90, "kept"),
    events.TopLogprobsFound("r", 91, (TopLogprobs((7, 70_000), (-0.5, -1.5)), TopLogprobs((9,), (-0.25,)))),
    events.SideChannelsFound("r", 91, 3, ((7, 9),), Routes(88, b"\0\1\2\3"), b"\0\x80"),
    events.TokensForced("r", 91, (7,)),
    events.InfraFailed("r", "SPAWN_FAILED", "host", "why"),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_comes_back_as_it_was(event: events.Event) -> None:
    assert journal.decode(*journal.encode(event)) == event


def test_every_event_type_is_covered_by_the_round_trip() -> None:
    assert {type(event) for event in EVENTS} == set(events.Event.__args__)


@pytest.mark.parametrize(
    "record",
    [
        SandboxCreated("r", 1, SandboxSpec()),
        CommandStarted("r", 1, "call/0/bash", Command(argv=("bash", "-c", "ls"), stdin=b"\xff", env={"A": "b"})),
        CommandFinished("r", 1, "k", ExecResult(exit_code=1, stdout=Output(b"\xff\0", b"t", 9), oom_killed=True)),
        CommandReplayed("r", 2, "k", is_equal=True),
    ],
    ids=lambda record: type(record).__name__,
)
def test_a_trajectory_record_comes_back_as_it_was(record: SandboxCreated) -> None:
    assert journal.decode(3, encode_trajectory(record)) == record


@pytest.mark.parametrize(
    ("kind", "payload"),
    [(2, b"\xff"), (2, b"\x80"), (3, b"\x81\xa4type\xa1x"), (1, b""), (1, b"\x02\0\1\0\0\0\0\0r"), (6, b""), (9, b"")],
)
def test_a_record_of_another_schema_is_a_typed_error(kind: int, payload: bytes) -> None:
    with pytest.raises(JournalError):
        journal.decode(kind, payload)


def test_replay_names_the_record_that_it_cannot_read(tmp_path: Path) -> None:
    log = wal.Log.open(tmp_path)
    log.append(*journal.encode(EVENTS[6]))
    log.append(2, b"\xc1")
    log.sync()
    log.close()
    values = journal.replay(tmp_path)
    assert next(values)[1] == EVENTS[6]
    with pytest.raises(JournalError, match="lsn 2"):
        next(values)


STEP = Step(
    3,
    (
        Row(9, 100, (7, 4095), (-0.5, -1.25)),
        Row(4, 2, (1,), (0.0,)),
    ),
)
STEP_BYTES = (
    "01000000 02000000 0300000000000000 0400000000000000"
    "05000000 00000000  64000000 02000000  02000000 01000000"
    "07000000 ff0f0000 01000000  000000bf 0000a0bf 00000000"
)


def test_a_step_is_these_bytes_for_ever() -> None:
    assert steps.encode(STEP) == bytes.fromhex(STEP_BYTES)
    assert journal.decode(steps.KIND, bytes.fromhex(STEP_BYTES)) == STEP


@pytest.mark.parametrize("cut", range(len(bytes.fromhex(STEP_BYTES))))
def test_a_step_that_is_cut_or_has_more_is_refused(cut: int) -> None:
    whole = bytes.fromhex(STEP_BYTES)
    for payload in (whole[:cut], whole + whole[: cut + 1]):
        with pytest.raises(JournalError):
            journal.decode(steps.KIND, payload)


@pytest.mark.parametrize(
    ("at", "byte"), [(0, 2), (1, 1), (3, 1), (4, 0), (7, 255), (40, 0), (44, 9), (63, 0x7F)], ids=str
)
def test_a_step_with_a_wrong_byte_is_refused(at: int, byte: int) -> None:
    payload = bytearray.fromhex(STEP_BYTES)
    payload[at] = byte
    payload[at - at % 4 + 2] |= 0x80 if at == 63 else 0  # together: no number
    with pytest.raises(JournalError):
        journal.decode(steps.KIND, bytes(payload))


class Told:
    """A journal on a log of its own, and what it folded."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.events: list[tuple[int, events.Event]] = []
        self.failures: list[wal.WalError] = []
        self.journal = journal.Journal(wal.GroupCommit(wal.Log.open(directory)), self.fold, self.failures.append)

    def fold(self, event: events.Event, lsn: int) -> None:
        if event == EVENTS[12]:
            raise MachineError("does not fit")
        self.events.append((lsn, event))

    async def open(self, name: str) -> int:
        return await self.journal.append(
            events.RolloutOpened(name, "run", "run/t", 0, (PromptSegment("SYSTEM", (0, 5)),), "digest", ENGINE)
        )


def drew(name: str, start: int, version: int = 0) -> TokensAppended:
    return TokensAppended(name, start, (start, start + 1), (-0.5, -0.25), version)


async def test_tokens_of_one_turn_of_the_loop_are_one_record(tmp_path: Path) -> None:
    here = Told(tmp_path)
    opened = {name: await here.open(name) for name in "abc"}
    drawn = [drew("a", 2), drew("b", 2), drew("c", 2)]
    futures = [await here.journal.gather(event, opened[event.request]) for event in drawn]
    assert [event for _, event in here.events[3:]] == []  # not durable, so not told
    assert {await future for future in futures} == {4}
    assert here.events[3:] == [(4, event) for event in drawn]
    assert here.journal.last_lsn == 4
    await here.journal.close()
    assert [(record.lsn, event) for record, event in journal.replay(tmp_path)] == here.events


async def test_a_step_ends_where_its_order_or_its_weights_do(tmp_path: Path) -> None:
    here = Told(tmp_path)
    opened = {name: await here.open(name) for name in "ab"}
    drawn = [drew("a", 2), drew("a", 4), drew("b", 2), drew("b", 4, 1)]
    for event in drawn[:3]:
        await here.journal.gather(event, opened[event.request])
    cause = asyncio.ensure_future(here.journal.append(events.KvBroke("b", 4, "kept")))
    await asyncio.sleep(0)
    last = await here.journal.gather(drawn[3], opened["b"])
    assert await cause == 5
    assert await last == 6
    lsns = {3: [drawn[0]], 4: drawn[1:3], 5: [events.KvBroke("b", 4, "kept")], 6: [drawn[3]]}
    assert here.events[2:] == [(lsn, event) for lsn, told in lsns.items() for event in told]
    await here.journal.close()
    assert [(record.lsn, event) for record, event in journal.replay(tmp_path)] == here.events


async def test_a_row_that_cannot_be_written_spoils_no_other(tmp_path: Path) -> None:
    here = Told(tmp_path)
    opened = await here.open("a")
    told = await here.journal.gather(drew("a", 2), opened)
    with pytest.raises(wal.RecordInvalidError):
        await here.journal.gather(TokensAppended("b", 2, (1,), (-1e300,), 0), opened)
    assert await told == 2
    await here.journal.close()


async def test_what_cannot_be_folded_is_told_to_who_appended_it(tmp_path: Path) -> None:
    here = Told(tmp_path)
    with pytest.raises(MachineError):
        await here.journal.append(EVENTS[12])
    assert await here.open("a") == 2
    await here.journal.close()
    assert not here.failures


async def test_who_is_cancelled_hears_of_it_once_the_event_is_told(tmp_path: Path) -> None:
    here = Told(tmp_path)
    appending = asyncio.ensure_future(here.open("a"))
    await asyncio.sleep(0)
    appending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await appending
    assert len(here.events) == 1
    await here.journal.close()


async def test_tokens_that_a_log_lost_are_not_told_and_everybody_hears(tmp_path: Path) -> None:
    here = Told(tmp_path)
    opened = await here.open("a")
    told = await here.journal.gather(drew("a", 2), opened)
    wal.Log.open(tmp_path, epoch=7).close()  # another writer
    with pytest.raises(wal.WalError):
        await told
    assert isinstance(here.failures[0], wal.FencedError)
    after = await here.journal.gather(drew("a", 4), opened)
    with pytest.raises(wal.PoisonedError):
        await after
    assert len(here.events) == 1


def test_likeliest_tokens_as_they_were_logged_by_name_are_read_and_take_half_of_that_now() -> None:
    payload = (
        b"\x84\xa4type\xb2top_logprobs_found\xaarollout_id\xa9job/one.0\xa5start(\xactop_logprobs\x92"
        b"\x82\xa9token_ids\x92\x05\xce\x00\x01\x11p\xa8logprobs\x92\xcb\xbf\xd0\x00\x00\x00\x00\x00\x00\xcb\xbf\xf8\x00"
        b"\x00\x00\x00\x00\x00\x82\xa9token_ids\x91\t\xa8logprobs\x91\xcb\xbf\xc0\x00\x00\x00\x00\x00\x00"
    )
    tops = (TopLogprobs((5, 70_000), (-0.25, -1.5)), TopLogprobs((9,), (-0.125,)))
    assert journal.decode(journal.KIND, payload) == events.TopLogprobsFound("job/one.0", 40, tops)
    many = events.TopLogprobsFound("job/one.0", 40, (TopLogprobs((70_000,) * 5, (-0.25,) * 5),) * 64)
    kind, logged = journal.encode(many)
    assert journal.decode(kind, logged) == many
    assert 2 * len(logged) < len(msgspec.msgpack.encode(many))


@pytest.mark.parametrize("counts", [(1,), (3,), (-1, 3), ()])
def test_likeliest_tokens_whose_counts_do_not_fit_are_refused(counts: tuple[int, ...]) -> None:
    said = {"type": "tops_found", "rollout_id": "r", "start": 0, "counts": counts, "token_ids": bytes(8)}
    with pytest.raises(JournalError, match="2 likeliest tokens"):
        journal.decode(journal.KIND, msgspec.msgpack.encode({**said, "logprobs": bytes(8)}))


def test_a_chunk_of_a_version_before_steps_is_read(tmp_path: Path) -> None:
    with wal.Log.open(tmp_path) as log:
        log.append(*journal.encode(EVENTS[4]))
        log.append(tokens.TOKENS, tokens.encode(drew("r", 2)))
    assert [event for _, event in journal.replay(tmp_path)] == [EVENTS[4], drew("r", 2)]


def test_a_step_of_a_rollout_that_was_never_opened_is_refused(tmp_path: Path) -> None:
    with wal.Log.open(tmp_path) as log:
        log.append(*journal.encode(EVENTS[4]))
        log.append(steps.KIND, steps.encode(STEP))
    with pytest.raises(JournalError, match=r"lsn 2.*before its rollout_opened"):
        list(journal.replay(tmp_path))
