"""The law of the service: from any prefix of its log a run ends the same, and nothing logged is done again."""

import asyncio
import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest

import wal
from dsec.testing import FakeHost, FakeSandbox, FakeSubstrate, Script
from dsec.types import Command, ExecResult, Output, SandboxId, SandboxSpec
from rollout import journal
from rollout.bench.tasks import Task, task_from_files
from rollout.commands.summary import summarise
from rollout.config import RolloutConfig
from rollout.engine import Sampling
from rollout.engines.testing import EngineFault, MisbehavingEngine
from rollout.errors import EngineError
from rollout.events import InfraFailed
from rollout.jobs import make_job
from rollout.ledger import Ledger
from rollout.main import load_tokenizer
from rollout.record import trajectory_record
from rollout.request import Job
from rollout.service import RolloutService
from rollout.state import Phase
from rollout.testing import Reply, ScriptedEngine
from wal.tokens import TokensAppended

ASKED = Job(request_id="run", sampling=Sampling(seed=1))
CONFIG = RolloutConfig(concurrency=4, log_sync="os")
TOKENIZER = load_tokenizer()
REPLIES = (
    Reply(reasoning="Look.", calls=[("bash", {"command": "ls"}), ("bash", {"command": "cat a"})]),
    Reply(reasoning="Mend it.", calls=[("edit", {"path": "a", "old": "x", "new": "y"})]),
    Reply(reasoning="Good.", content="Done."),
)


def tasks() -> list[Task]:
    files = {
        "task.toml": b"",
        "environment/Dockerfile": b"FROM debian:bookworm-slim\nWORKDIR /app\n",
        "tests/test.sh": b"#!/bin/bash\n",
    }
    return [task_from_files(name, {**files, "instruction.md": name.encode()}) for name in ("one", "two")]


def world(sandbox: FakeSandbox, command: Command) -> ExecResult:
    """Every result depends on all commands before it; `a` holds an x until it was written."""
    if "/tests/test.sh" in command.argv or command.argv[0] in ("mkdir", "tar"):
        return ExecResult(exit_code=0)
    if "reward" in " ".join(command.argv):
        return ExecResult(exit_code=0, stdout=Output(b"reward.txt\n1\n"))
    if "exec cat" in " ".join(command.argv):
        return ExecResult(exit_code=0, stdout=Output(b"x=1\n"))
    return ExecResult(exit_code=0, stdout=Output(f"{len(sandbox.commands)} commands so far".encode()))


def script(_session: str, turn: int) -> Reply:
    return REPLIES[turn]


async def run(
    directory: Path,
    engine: ScriptedEngine | None = None,
    group_size: int = 2,
    answers: Script = world,
    config: RolloutConfig = CONFIG,
) -> tuple[Ledger, int]:
    """Run or resume to the end; the ledger and how many tokens the engine drew in this process."""
    engine = engine or ScriptedEngine(TOKENIZER, script, chunk_tokens_count=5)
    async with RolloutService(directory, engine, FakeSubstrate(answers), TOKENIZER, config) as service:
        if not service.ledger.jobs:
            wanted = tasks()
            await service.submit(make_job(ASKED, wanted, group_size=group_size), wanted)
        await service.start()
        await service.wait("run")
        return service.ledger, engine.drawn_count


def write_prefix(records: Sequence[wal.Record], directory: Path) -> None:
    log = wal.Log.open(directory / "wal")
    for record in records:
        log.append(record.kind, record.payload)
    log.close()


def token_ids(ledger: Ledger) -> dict[str, tuple[int, ...]]:
    return {rollout_id: state.token_ids for rollout_id, state in ledger.rollouts.items()}


async def test_from_every_prefix_of_its_log_a_run_ends_the_same_and_draws_no_logged_token_again(
    tmp_path: Path,
) -> None:
    whole, drawn_whole = await run(tmp_path / "whole", group_size=1)
    records = list(wal.read(tmp_path / "whole/wal"))
    for count in range(len(records) + 1):
        directory = tmp_path / "prefix"
        write_prefix(records[:count], directory)
        logged = sum(
            len(value.token_ids) for _, value in journal.replay(directory / "wal") if isinstance(value, TokensAppended)
        )
        resumed, drawn = await run(directory, group_size=1)
        assert token_ids(resumed) == token_ids(whole), f"after {count} records"
        assert drawn == drawn_whole - logged, f"after {count} records"
        summary = summarise(resumed)
        assert (summary.solved, summary.infra_failures) == (2, 0)
        assert (summary.tokens_regenerated, summary.commands_run_twice) == (0, 0)
        shutil.rmtree(directory)


class MortalSubstrate(FakeSubstrate):
    """Its process can be killed: what is on the host is then out of its reach."""

    is_dead = False

    async def create(self, spec: SandboxSpec, sandbox_id: SandboxId | None = None) -> FakeSandbox:
        made = await super().create(spec, sandbox_id)
        made.__class__ = MortalSandbox
        made.owner = self  # type: ignore[attr-defined]
        return made

    async def open(self) -> None:
        await super().open()
        for sandbox in self.adopted().values():
            sandbox.owner = self  # type: ignore[attr-defined]

    async def close(self) -> None:
        if not self.is_dead:
            await super().close()


class MortalSandbox(FakeSandbox):
    owner: MortalSubstrate

    async def destroy(self) -> None:
        if not self.owner.is_dead:
            await super().destroy()


class LastWords:
    """A log that a number of records reach; with the last one its process dies, before or after that is durable."""

    def __init__(self, commit: wal.GroupCommit, count: int, substrate: MortalSubstrate, *, writes_last: bool) -> None:
        self._commit, self._left, self._substrate, self._writes_last = commit, count, substrate, writes_last

    def has_room(self) -> bool:
        return True

    def admit(self, kind: int, payload: bytes) -> tuple[int, asyncio.Future[None]]:
        self._left -= 1
        if self._left > 0:
            return self._commit.admit(kind, payload)
        self._substrate.is_dead = True
        if self._left < 0 or not self._writes_last:
            raise wal.ClosedError(Path("killed"))
        lsn, durable = self._commit.admit(kind, payload)
        return lsn, asyncio.ensure_future(self._die_behind(durable))

    async def _die_behind(self, durable: asyncio.Future[None]) -> None:
        await durable
        raise wal.ClosedError(Path("killed"))

    async def close(self) -> None:
        await self._commit.close()


async def run_until(count: int, directory: Path, host: FakeHost, *, writes_last: bool = False) -> Ledger:
    """Run or resume on the host, until a process that writes so many records is killed."""
    engine, substrate = ScriptedEngine(TOKENIZER, script, chunk_tokens_count=5), MortalSubstrate(world, host)
    async with RolloutService(directory, engine, substrate, TOKENIZER, CONFIG) as service:
        commit = service.journal._commit
        service.journal._commit = LastWords(commit, count, substrate, writes_last=writes_last)  # type: ignore[assignment]
        with contextlib.suppress(wal.ClosedError):
            if not service.ledger.jobs:
                await service.submit(make_job(ASKED, tasks()[:1]), tasks()[:1])
            await service.start()
            await service.wait("run")
        return service.ledger


@pytest.mark.parametrize("writes_last", [False, True])
async def test_wherever_a_process_is_killed_the_next_one_goes_on_in_the_sandbox_that_lived_on(
    tmp_path: Path, *, writes_last: bool
) -> None:
    whole = await run_until(10_000, tmp_path / "whole", FakeHost())
    assert summarise(whole).solved == 1
    (trajectory,) = whole.trajectories.values()
    for count in range(1, len(list(wal.read(tmp_path / "whole/wal"))) + 1):
        host = FakeHost()
        await run_until(count, tmp_path / f"{count}", host, writes_last=writes_last)
        ended = Ledger.read(tmp_path / f"{count}/wal", TOKENIZER)
        assert not any(map(ended.is_done, ended.rollouts)) or host.sandboxes == {}, "nobody would look for it any more"
        resumed = await run_until(10_000, tmp_path / f"{count}", host)
        assert token_ids(resumed) == token_ids(whole), f"killed at record {count}"
        summary = summarise(resumed)
        assert (summary.tokens_regenerated, summary.commands_replayed, summary.commands_run_twice) == (0, 0, 0)
        (again,) = resumed.trajectories.values()
        assert list(again.entries) == list(trajectory.entries), f"killed at record {count}"
        assert again.incarnation == 1
        assert host.sandboxes == {}


async def test_the_ledger_that_a_service_holds_equals_the_one_that_is_read_back(tmp_path: Path) -> None:
    held, _ = await run(tmp_path)
    read = Ledger.read(tmp_path / "wal", TOKENIZER)
    assert read.rollouts == held.rollouts
    assert read.trajectories == held.trajectories
    assert read.lsns == held.lsns
    for rollout_id in held.rollouts:
        assert trajectory_record(read, rollout_id) == trajectory_record(held, rollout_id)


async def test_a_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    await run(tmp_path)
    before = list(wal.read(tmp_path / "wal"))
    _, drawn = await run(tmp_path)
    assert drawn == 0
    assert list(wal.read(tmp_path / "wal")) == before


class FailingEngine(ScriptedEngine):
    """Fails once a number of tokens was drawn."""

    def __init__(self, tokens_count: int) -> None:
        super().__init__(TOKENIZER, self._reply)
        self._left = tokens_count

    def _reply(self, session: str, turn: int) -> Reply:
        if self.drawn_count >= self._left:
            raise EngineError("the engine's host is gone")
        return script(session, turn)


@pytest.mark.parametrize("tokens_count", [0, 1, 40, 150])
async def test_an_engine_failure_is_not_the_models_and_a_resume_finishes_the_rollout(
    tmp_path: Path, tokens_count: int
) -> None:
    whole, _ = await run(tmp_path / "whole")
    failed, _ = await run(tmp_path / "failed", FailingEngine(tokens_count))
    broken = [state for state in failed.rollouts.values() if state.failure]
    assert broken
    for state in broken:
        assert isinstance(state.failure, InfraFailed)
        assert (state.failure.code, state.judged, state.phase) == ("ENGINE_ERROR", None, Phase.SAMPLE)
        assert trajectory_record(failed, state.opened.rollout_id).reward.value is None
    resumed, _ = await run(tmp_path / "failed")
    assert token_ids(resumed) == token_ids(whole)
    assert summarise(resumed).infra_failures == 0


async def test_a_verdict_or_a_set_up_that_failed_is_tried_again_by_a_resume(tmp_path: Path) -> None:
    def no_reward(sandbox: FakeSandbox, command: Command) -> ExecResult:
        answer = world(sandbox, command)
        return ExecResult(exit_code=0, stdout=Output(b"none\n")) if answer.stdout.head.startswith(b"reward") else answer

    def no_folders(sandbox: FakeSandbox, command: Command) -> ExecResult:
        return ExecResult(exit_code=1) if command.argv[0] == "mkdir" else world(sandbox, command)

    for name, broken, code in (("verdict", no_reward, "VERIFIER_ERROR"), ("set-up", no_folders, "BAD_TASK")):
        failed, _ = await run(tmp_path / name, answers=broken)
        assert {state.failure.code for state in failed.rollouts.values() if state.failure} == {code}
        mended, drawn = await run(tmp_path / name)
        assert {state.judged.reward for state in mended.rollouts.values() if state.judged} == {1.0}
        assert summarise(mended).infra_failures == 0
        assert (drawn == 0) == (name == "verdict")


@pytest.mark.parametrize("fault", get_args(EngineFault))
async def test_what_an_engine_cannot_have_meant_is_never_logged_and_a_resume_finishes_the_rollout(
    tmp_path: Path, fault: EngineFault
) -> None:
    whole, _ = await run(tmp_path / "whole")
    engine = MisbehavingEngine(TOKENIZER, script, fault, chunks_count=7, session="one.0")
    config = CONFIG.model_copy(update={"engine_silence_s": 0.2 if fault == "hang" else 600.0})
    ended, _ = await run(tmp_path / "failed", engine, config=config)
    failed = {i: state.failure.code for i, state in ended.rollouts.items() if state.failure}
    assert failed == {"one.0": "ENGINE_ERROR"}
    assert summarise(ended).solved == 3
    good = token_ids(ended)["one.0"]
    assert 0 < len(good) < len(token_ids(whole)["one.0"])
    mended, _ = await run(tmp_path / "failed")
    assert token_ids(mended) == token_ids(whole)
    assert summarise(mended).infra_failures == 0
