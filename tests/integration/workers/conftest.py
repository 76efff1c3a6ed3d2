"""A PostgreSQL of the tests' own, and worker processes over one root with a client that asks any of them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest

from rollout.ledger import Ledger
from rollout.main import load_tokenizer
from rollout.pb.v1 import rollout_pb2 as pb
from rollout.pb.v1.rollout_pb2_grpc import RolloutServiceStub
from rollout.record import trajectory_record
from rollout.workers.index import Index
from rollout.workers.testing import Postgres

LEASE_TTL_S = 60  # a loaded machine may hold a worker up for seconds, and it lives
GO_ELSEWHERE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED)
AGAIN_S = 0.05


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def index_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh index in each kind of database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'index.db'}"
    url: str = request.getfixturevalue("postgres").create(f"index_{time.monotonic_ns()}")
    return url


class WorkerProcess:
    """A `dsec serve --root` process and a stub for it."""

    def __init__(self, dsec: Any, root: Path, url: str, worker_id: str, *options: object, **env: str) -> None:
        self.dsec, self.worker_id = dsec, worker_id
        where = ("--root", root, "--worker-id", worker_id, "--listen", "127.0.0.1:0", *options)
        env = {"DSEC_WORKER_LEASE_TTL_S": str(LEASE_TTL_S), "DSEC_EDGE_KEEP_S": "20", **env}
        index = ("--index", url) if url else ()
        self.process: subprocess.Popen[str] = dsec.start("serve", *where, *index, env=env)
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        assert said.startswith("dsec: serving "), self.process.communicate()
        self.address = said.split()[2].rstrip(",")
        self.channel = grpc.insecure_channel(self.address)
        self.stub = RolloutServiceStub(self.channel)  # type: ignore[no-untyped-call]

    def kill(self) -> None:
        """kill -9 of the worker alone: its sandboxes live on."""
        self.process.kill()
        self.process.communicate()

    def stop(self) -> str:
        """SIGTERM; what it said."""
        self.process.terminate()
        _, err = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, err
        return str(err)


class Root:
    """A root, its workers, and what a trainer does with them."""

    def __init__(self, dsec: Any, directory: Path, url: str) -> None:
        self.dsec, self.directory, self.url = dsec, directory, url
        self.workers: list[WorkerProcess] = []
        self.options: tuple[object, ...] = ()

    def start(self, worker_id: str, **env: str) -> WorkerProcess:
        self.workers.append(WorkerProcess(self.dsec, self.directory, self.url, worker_id, *self.options, **env))
        return self.workers[-1]

    def finish(self, request: pb.SubmitRequest, *workers: WorkerProcess) -> set[str]:
        """Ask the workers in turn until one has followed the job to its end; the rollouts that finished."""
        for worker in itertools.cycle(workers):
            try:
                updates = list(worker.stub.Submit(request, timeout=120))
            except grpc.RpcError as error:
                if error.code() not in GO_ELSEWHERE:
                    raise
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.process.wait(AGAIN_S)
            else:
                return {update.rollout_id for update in updates if update.HasField("finished")}
        raise AssertionError

    def look(self) -> Any:
        index = ("--index", self.url) if self.url else ()
        return self.dsec.done("workers", self.directory, "--json", *index).json()

    def until(self, condition: Callable[[Any], bool]) -> Any:
        """What the index says, as `dsec workers` would, once that is so."""

        async def look() -> Any:
            index = Index(self.url)
            await index.open()
            try:
                return msgspec.to_builtins(await index.snapshot())
            finally:
                await index.close()

        while not condition(seen := asyncio.run(look())):
            pass
        return seen

    def show(self) -> dict[str, dict[str, Any]]:
        """Trajectories of all logs."""
        ledgers = [Ledger.read(log, load_tokenizer()) for log in sorted(self.directory.glob("*/wal"))]
        shown = [msgspec.json.encode(trajectory_record(each, name)) for each in ledgers for name in each.rollouts]
        records = {record["rollout_id"]: record for record in map(msgspec.json.decode, shown)}
        assert len(records) == len(shown)
        return records


@pytest.fixture
def root(dsec: Any, tmp_path: Path, index_url: str) -> Iterator[Root]:
    """Workers that are still there at the end are stopped one by one; the last leaves nothing."""
    root = Root(dsec, tmp_path / "root", index_url)
    yield root
    for worker in root.workers:
        if worker.process.returncode is None:
            worker.stop()
        worker.channel.close()
