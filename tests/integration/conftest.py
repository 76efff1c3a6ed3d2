"""What the integration tests share: the installed command, tasks, and a look at what is left behind.

Every process started here has a session of its own and makes its cgroups below one directory of
ours, so that "nothing is left" can be asked of these runs alone.  (A spawner shares the command's
stderr, so a command whose output has ended has no spawner any more.)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dsec.edge import service
from dsec.edge.edge_config import EdgeConfig
from dsec.edge.grpc_server import Server, start_server
from dsec.edge.linux import cgroup
from dsec.listen import Certificate, make_listen
from dsec.testing import FakeHost, FakeSandbox, FakeSubstrate
from dsec.types import Command, ExecResult, Output
from rollout.engine import Sampled, SampleRequest

ROOT = Path(__file__).resolve().parents[2]
COMMAND = str(Path(sys.executable).with_name("dsec"))
LEFT_S_MAX = 30.0
LOOK_AGAIN_S = 0.1

TASK_TOML = 'schema_version = "1.0"\n[agent]\ntimeout_sec = 60\n[verifier]\ntimeout_sec = 20\n'
TEST_SH = """mkdir -p /logs/verifier
if [ "$(cat /app/done.txt 2>/dev/null)" = yes ]; then echo 1; else echo 0; fi > /logs/verifier/reward.txt
"""


@dataclass
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


def wait_for_an_end(pids: list[int]) -> None:
    """Until one of these ends, or a moment: a cgroup goes later than all in it, without a word."""
    with contextlib.ExitStack() as stack:
        fds = []
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                fds.append(os.pidfd_open(pid))
                stack.callback(os.close, fds[-1])
        select.select(fds, [], [], LOOK_AGAIN_S)


@dataclass
class Dsec:
    """Runs the command as a user does."""

    cgroup_parent: str
    path: str = COMMAND
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def sessions(self) -> set[int]:
        return {process.pid for process in self.started}

    def start(self, *arguments: object, command: str = COMMAND, **options: Any) -> subprocess.Popen[str]:
        env = {**os.environ, "DSEC_EDGE_CGROUP_PARENT": self.cgroup_parent, "COLUMNS": "200", **options.pop("env", {})}
        process = subprocess.Popen(
            [command, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=env,
            **options,
        )
        self.started.append(process)
        return process

    def __call__(self, *arguments: object, **options: Any) -> Ran:
        process = self.start(*arguments, **options)
        try:
            out, err = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            self.kill(process)
            raise
        return Ran(process.returncode, out, err)

    def done(self, *arguments: object, **options: Any) -> Ran:
        """Run what must end well."""
        ran = self(*arguments, **options)
        assert ran.code == 0, ran.out + ran.err
        return ran

    def show(self, directory: Path) -> dict[str, dict[str, Any]]:
        """Trajectories by rollout id."""
        return {record["rollout_id"]: record for record in self.done("show", directory, "--json").lines()}

    def kill(self, process: subprocess.Popen[str]) -> None:
        """kill -9 the whole tree: the command, its spawner, and every sandbox."""
        self._kill({process.pid})
        process.communicate()

    def _kill(self, sessions: set[int]) -> None:
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first: nobody tidies up after another
            for pid in [*self.processes(sessions), *self.guests()]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def processes(self, sessions: set[int]) -> list[int]:
        """Living processes of the given sessions, and their descendants (a spawner has its own session)."""
        found: set[int] = set()
        for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()):
            with contextlib.suppress(OSError):
                state, parent, _, session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
                if state not in "ZX" and (int(session) in sessions or int(parent) in found):
                    found.add(pid)
        return sorted(found)

    def cgroups(self) -> list[Path]:
        """Cgroups that runs of ours made and that are still there."""
        return [
            path for parent in cgroup.parents(cgroup.detect(), self.cgroup_parent) for path in parent.glob("dsec-*")
        ]

    def guests(self) -> list[int]:
        """Processes in those cgroups."""
        pids: set[int] = set()
        for path in self.cgroups():
            for members in path.rglob("cgroup.procs"):
                with contextlib.suppress(OSError):
                    pids |= {int(pid) for pid in members.read_text().split()}
        return sorted(pids)

    def left(self) -> list[object]:
        """What is still there once the dying had time to die."""
        deadline = time.monotonic() + LEFT_S_MAX
        while (found := [*self.processes(self.sessions), *self.cgroups()]) and time.monotonic() < deadline:
            wait_for_an_end([*self.processes(self.sessions), *self.guests()])
        return found

    def end(self) -> None:
        """Kill what still lives, and remove its cgroups: what one test left must fail no other."""
        self._kill(self.sessions)
        for path in self.cgroups():
            cgroup.remove_tree(path)
        for process in self.started:
            with process:  # closes its pipes, and waits for it
                pass
        self.started.clear()  # a number may be another's by now


@pytest.fixture(scope="session")
def session_dsec(cgroup_parent: str) -> Iterator[Dsec]:
    """For fixtures that outlive one test."""
    command = Dsec(cgroup_parent)
    yield command
    command.end()


@pytest.fixture
def dsec(cgroup_parent: str) -> Iterator[Dsec]:
    """The command; after the test, no process and no cgroup of its runs may be there."""
    command = Dsec(cgroup_parent)
    yield command
    try:
        assert command.left() == []
    finally:
        command.end()


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four generated tasks in which the model calls tools, one of them (`unclear`) beyond what it knows."""
    folder = tmp_path_factory.mktemp("tasks")
    generate = [sys.executable, "-m", "training.curriculum", folder / "all", "--count", "16", "--seed", "5"]
    subprocess.run([*map(str, generate)], cwd=ROOT, check=True, capture_output=True)
    chosen = folder / "chosen"
    chosen.mkdir()
    for name in ("copy-5-000", "sort-5-000", "bug-5-000"):
        (folder / "all" / name).rename(chosen / name)
    make_task(chosen / "unclear", instruction="Say what you would do first in this folder, then do some of it.")
    return chosen


def make_task(folder: Path, *, instruction: str = "Write yes to done.txt.", test_sh: str = TEST_SH) -> Path:
    """A small task of ours; solved if /app/done.txt holds `yes`."""
    for name, text in {
        "task.toml": TASK_TOML,
        "instruction.md": instruction + "\n",
        "environment/Dockerfile": "FROM debian:bookworm-slim\nWORKDIR /app\n",
        "tests/test.sh": test_sh,
        "solution/solve.sh": "echo yes > /app/done.txt\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(name="make_task")
def make_task_fixture() -> Any:
    return make_task


@pytest.fixture(scope="session")
def pausing() -> Callable[..., Any]:
    """The engine given; it pauses once so many sessions drew `count` tokens, before what is to be stopped has ended."""

    def make(engine: Any, count: int, sessions_count: int = 1) -> Any:
        sample, drawn, is_due = engine.sample, Counter[str](), True

        async def sample_some(request: SampleRequest) -> AsyncGenerator[Sampled, None]:
            nonlocal is_due
            async with contextlib.aclosing(sample(request)) as chunks:
                async for chunk in chunks:
                    drawn[request.session] += len(chunk.token_ids)
                    if is_due and sum(each >= count for each in drawn.values()) == sessions_count:
                        is_due = False
                        await engine.pause("keep")
                    yield chunk

        engine.sample = sample_some
        return engine

    return make


@pytest.fixture(scope="session")
def finished(session_dsec: Dsec, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: groups of two at temperature 1, seed 3.  Read only."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    options = ("--group-size", 2, "--temperature", 1, "--seed", 3, "--concurrency", 4, "--turns-max", 6)
    session_dsec.done("run", tasks, "--out", directory, *options)
    assert session_dsec.left() == []
    return directory


class Edge:
    """A `dsec edge serve` process, and the commands that are meant for it."""

    def __init__(self, dsec: Any, directory: Path, **env: str) -> None:
        self.dsec = dsec
        self.directory = directory
        self.url = f"unix:{directory}/run/edge.sock"
        self.env = {"DSEC_API_URL": self.url, "DSEC_EDGE_KEEP_S": "20", "DSEC_EDGE_INLINE_BYTES_MAX": "4096", **env}
        self.start()

    def start(self, *options: str) -> None:
        where = ("--directory", self.directory / "state", "--listen", self.url)
        self.process: subprocess.Popen[str] = self.dsec.start(
            "edge", "serve", *where, "--json", "--destroy-on-exit", *options, env=self.env
        )
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        assert said, self.process.communicate()
        self.ready = json.loads(said)

    def kill(self) -> None:
        """kill -9 of the Edge alone: what keeps its sandboxes is not told."""
        self.process.kill()
        self.process.communicate()

    def stop(self) -> None:
        self.process.terminate()
        _, err = self.process.communicate(timeout=120)
        assert (self.process.returncode, err) == (0, "dsec: nothing is left\n")

    def begin(self, *arguments: object, **options: Any) -> subprocess.Popen[str]:
        process: subprocess.Popen[str] = self.dsec.start(*arguments, env=self.env, **options)
        return process

    def __call__(self, *arguments: object, **options: Any) -> Any:
        return self.dsec(*arguments, env=self.env, **options)

    def done(self, *arguments: object, **options: Any) -> str:
        out: str = self.dsec.done(*arguments, env=self.env, **options).out
        return out

    def raw(self, *arguments: object, stdin: bytes = b"") -> bytes:
        """Stdout of a command that must end well, as bytes."""
        environment = {**os.environ, **self.env}
        return subprocess.run(
            [self.dsec.path, *map(str, arguments)], env=environment, input=stdin, check=True, stdout=subprocess.PIPE
        ).stdout


@pytest.fixture(scope="session")
def edge_process() -> type[Edge]:
    return Edge


class World:
    """A host, its Edge, and the server in front of it; each can end and come back."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.url = f"unix:{directory}/run/edge.sock"
        self.host = FakeHost()
        self.runs: list[Command] = []
        self.proceed = asyncio.Event()
        self.arrived: asyncio.Queue[Command] = asyncio.Queue()
        self.config = EdgeConfig(log_sync="os", sandboxes_count_max=8, create_wait_s=0.0)

    async def script(self, _sandbox: FakeSandbox, command: Command) -> ExecResult:
        """`wait`: ends when told to; `flood N`: writes N bytes; all else ends at once."""
        self.runs.append(command)
        self.arrived.put_nowait(command)
        if command.argv[0] == "wait":
            await self.proceed.wait()
        if command.argv[0] == "flood":
            return ExecResult(exit_code=0, stdout=Output(bytes(range(256)) * (int(command.argv[1]) // 256)))
        return ExecResult(exit_code=7, stdout=Output(b"out\xff"), stderr=Output(b"err"))

    async def start(self, *urls: str, token: str = "", certificate: Certificate | None = None) -> list[Server]:
        self.edge = service.Edge(self.directory / "state", FakeSubstrate(self.script, self.host), self.config)
        await self.edge.open()
        listens = [make_listen(url, token, certificate) for url in urls or (self.url,)]
        self.servers = [await start_server(self.edge, listen) for listen in listens]
        return self.servers

    async def stop(self) -> None:
        for server in self.servers:
            await server.stop()
        await self.edge.detach()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    yield world
    await world.stop()


@pytest.fixture(scope="module")
def edge(session_dsec: Any, edge_process: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One Edge for the tests of a file that leave it alone."""
    edge = edge_process(session_dsec, tmp_path_factory.mktemp("edge"))
    yield edge
    try:
        edge.stop()
        assert session_dsec.left() == []
    finally:
        session_dsec.end()


@pytest.fixture
def sandbox(edge: Any) -> Iterator[str]:
    """One of its sandboxes."""
    sandbox_id = edge.done("create").strip()
    yield sandbox_id
    edge.done("rm", sandbox_id)
