"""Events and records: what goes into the log comes out of it."""

from pathlib import Path

import pytest

import wal
from dsec.trajectory import CommandFinished, CommandReplayed, CommandStarted, SandboxCreated
from dsec.trajectory import encode as encode_trajectory
from dsec.types import Command, ExecResult, NetworkPolicy, Output, SandboxSpec
from rollout import events, journal
from rollout.bench.tasks import task_from_files
from rollout.engine import Routes, TopLogprobs
from rollout.errors import JournalError
from rollout.events import FinishReason, PromptSegment, Spent
from rollout.request import Conversation
from rollout.testing import ENGINE, job_of_one
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
    events.JobCancelled("run"),
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
    events.TopLogprobsFound("r", 91, (TopLogprobs((7, 9), (-0.5, -1.5)),)),
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
    [(2, b"\xff"), (2, b"\x80"), (3, b"\x81\xa4type\xa1x"), (1, b""), (1, b"\x02\0\1\0\0\0\0\0r"), (9, b"")],
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
