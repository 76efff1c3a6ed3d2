"""Runs as shards: `dsec export`, and a service that writes rollouts as they end."""

from __future__ import annotations

import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from dsec.testing import FakeSubstrate
from dsec.types import ExecResult, Output
from rollout.bench.tasks import BUNDLED, Task, task_from_files
from rollout.config import RolloutConfig
from rollout.engine import Sampling
from rollout.errors import ShardError
from rollout.export.exporter import ended_rollout, export
from rollout.export.manifest import Manifest
from rollout.jobs import make_job
from rollout.ledger import Ledger
from rollout.loader import Dataset
from rollout.main import load_tokenizer
from rollout.request import Job
from rollout.service import RolloutService
from rollout.testing import Reply, ScriptedEngine

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TOKENIZER = load_tokenizer()
ROLLOUTS_COUNT = 24


def tasks() -> list[Task]:
    files = {
        "task.toml": b"",
        "environment/Dockerfile": b"FROM debian:bookworm-slim\nWORKDIR /app\n",
        "tests/test.sh": b"#!/bin/bash\n",
    }
    return [task_from_files(name, {**files, "instruction.md": name.encode()}) for name in ("one", "two")]


def script(_session: str, turn: int) -> Reply:
    return [Reply(reasoning="Look.", calls=[("bash", {"command": "ls"})]), Reply(content="Done.")][turn]


def world(_sandbox: object, command: Any) -> ExecResult:
    return ExecResult(exit_code=0, stdout=Output(b"reward.txt\n1\n" if "reward" in " ".join(command.argv) else b"x\n"))


async def serve(directory: Path, group_size: int, *, exports: bool = True, obstacle: str = "") -> None:
    """Run a job of two groups to its end; with or without an exporter beside it, or one with something in its way."""
    engine = ScriptedEngine(TOKENIZER, script, chunk_tokens_count=5)
    config = RolloutConfig(concurrency=3, log_sync="os", exports_shards=exports)
    async with RolloutService(directory, engine, FakeSubstrate(world), TOKENIZER, config) as service:
        await service.start()
        if obstacle:
            (directory / obstacle).mkdir()
        wanted = tasks()
        asked = Job(request_id="run", sampling=Sampling(seed=1))
        await service.submit(make_job(asked, wanted, group_size=group_size), wanted)
        await service.wait("run")


def table(directory: Path) -> pa.Table:
    """All rows, by rollout; Parquet and Arrow say the same."""
    streams = []
    for path in sorted(directory.glob("*.arrows")):
        with pa.memory_map(str(path)) as source:
            streams.append(pa.ipc.open_stream(source).read_all())
        assert parquet.read_table(path.with_suffix(".parquet")).equals(streams[-1])
    return pa.concat_tables(streams).sort_by("rollout_id")


async def test_rollouts_are_written_as_they_end_and_again_from_the_log_they_are_equal(tmp_path: Path) -> None:
    await serve(tmp_path / "run", 3)
    ledger = Ledger.read(tmp_path / "run/wal", TOKENIZER)
    written = table(tmp_path / "run/shards")
    assert written["rollout_id"].to_pylist() == sorted(ledger.rollouts)
    assert export(tmp_path / "run/wal", ledger, tmp_path / "run/shards") == 0
    assert export(tmp_path / "run/wal", ledger, tmp_path / "again") == 6
    assert table(tmp_path / "again").equals(written)
    assert len(list(Manifest(tmp_path / "run/shards"))) <= 6


async def test_what_a_crash_kept_from_the_shards_is_written_by_the_next_start(tmp_path: Path) -> None:
    await serve(tmp_path / "run", 2, exports=False)
    assert not (tmp_path / "run/shards").exists()
    await serve(tmp_path / "run", 2)
    ledger = Ledger.read(tmp_path / "run/wal", TOKENIZER)
    assert table(tmp_path / "run/shards")["rollout_id"].to_pylist() == sorted(ledger.rollouts)
    dataset = Dataset.open(tmp_path / "run/shards")
    assert dataset.metadata.reward.tolist() == [1.0] * 4


async def test_a_disk_that_refuses_stops_the_shards_and_not_the_service(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await serve(tmp_path / "run", 1, obstacle="shards/00000000-00000000.arrows")
    ledger = Ledger.read(tmp_path / "run/wal", TOKENIZER)
    assert "cannot write shards" in caplog.text
    assert "written by the next start" in caplog.text
    (tmp_path / "run/shards/00000000-00000000.arrows").rmdir()
    assert export(tmp_path / "run/wal", ledger, tmp_path / "run/shards") == 2
    assert ended_rollout(ledger, min(ledger.rollouts)).record.group.missing_reasons == {}


def test_the_command_adds_what_has_ended_and_the_example_packs_it(dsec: Any, tmp_path: Path) -> None:
    dsec.done("run", "copy-1-000", "--group-size", 4, "--temperature", 1, "--out", tmp_path / "run")
    assert dsec.done("export", tmp_path / "run").out == f"4 rollouts written to {tmp_path}/run/shards\n"
    assert dsec.done("export", tmp_path / "run").out == f"0 rollouts written to {tmp_path}/run/shards\n"
    ran = dsec.done(EXAMPLES / "pack_for_training.py", tmp_path / "run/shards", command=sys.executable)
    first, *steps = ran.out.splitlines()
    assert first == "4 rollouts, 1 sequences, dropped: none"
    assert len(steps) == 1
    assert steps[0].startswith("step 0: ")
    for command in ("export", "show", "log"):
        refused = dsec(command, tmp_path)
        assert (refused.code, refused.out) == (2, "")
        assert f"is no run but holds some, give one of them: {tmp_path / 'run'}" in refused.err
    assert "holds no run: there is no " in dsec("export", tmp_path / "run/nothing").err


def test_the_example_says_why_it_packs_nothing(dsec: Any, tmp_path: Path) -> None:
    dsec.done("run", "copy-1-000", "--out", tmp_path / "run")
    dsec.done("export", tmp_path / "run")
    ran = dsec(EXAMPLES / "pack_for_training.py", tmp_path / "run/shards", command=sys.executable)
    assert (ran.code, ran.out) == (1, "1 rollouts, 0 sequences, dropped: 1 as SMALL_GROUP\n")
    assert "needs a run with --group-size 2 or more" in ran.err
    ran = dsec(EXAMPLES / "pack_for_training.py", tmp_path / "run", command=sys.executable)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == f"{tmp_path}/run holds no shards: run `dsec export RUN` and give RUN/shards\n"
    assert "dsec export runs/groups" in dsec(EXAMPLES / "pack_for_training.py", command=sys.executable).err


def test_shards_of_a_run_that_was_killed_are_those_of_its_log(dsec: Any, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    for folder in sorted(path for path in BUNDLED.iterdir() if path.is_dir())[:ROLLOUTS_COUNT]:
        shutil.copytree(folder, tmp_path / "tasks" / folder.name)
    asked = ("run", tmp_path / "tasks", "--resume", "--temperature", 1, "--out", tmp_path / "run")
    env = {"DSEC_EXPORTS_SHARDS": "1"}
    for wanted in (2, 9):
        running = dsec.start(*asked, env=env)
        while written(tmp_path / "run/shards") < wanted:
            with suppress(subprocess.TimeoutExpired):
                running.wait(0.05)
                raise AssertionError(running.communicate())
        dsec.kill(running)
    dsec.done(*asked, env=env)
    before = table(tmp_path / "run/shards")
    assert before.num_rows == ROLLOUTS_COUNT
    said = dsec.done("export", tmp_path / "run", "--out", tmp_path / "again").out
    assert said.startswith(f"{ROLLOUTS_COUNT} rollouts written")
    assert table(tmp_path / "again").equals(before)


def written(directory: Path) -> int:
    """Rollouts that the manifest names so far."""
    with suppress(ShardError):
        return sum(len(batch.rows) for batch in Manifest(directory))
    return 0
