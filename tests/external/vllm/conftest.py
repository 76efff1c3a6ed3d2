"""Real vLLM servers for tests, each alone in namespaces of its own: what is killed leaves nothing behind."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rollout.engines.vllm.launch import make_launch, tiny_preset
from rollout.engines.vllm.tiny import write_tiny_model

VENV = Path(__file__).parents[3] / ".venv-vllm"
START_S = 400
STOP_S = 60
_APART = ("unshare", "--mount", "--ipc", "--pid", "--fork", "--mount-proc", "sh", "-c")
_LOOK_S = 0.2


class Server:
    """What `dsec engine serve-vllm tiny` starts; it can be killed, stopped in its tracks, and started again."""

    def __init__(self, model: Path, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.model = model
        self._log = folder / "log"
        self._environment = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        self._environment |= dict.fromkeys(("HOME", "TMPDIR"), str(folder))
        self._launch = make_launch(
            tiny_preset(model), device="cpu", port=self.port, python=str(VENV / "bin/python"), more=("--seed=0",)
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns at once; the next one waits for it."""
        inside = f"mount -t tmpfs tmpfs /dev/shm && exec {shlex.join(self._launch.arguments)}"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*_APART, inside],
                env=self._environment | self._launch.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Until it answers."""
        assert self._process is not None
        for _ in range(int(START_S / _LOOK_S)):
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=_LOOK_S):
                    self._slow_down()
                    return
            except (urllib.error.URLError, OSError):
                pass
            try:
                self._process.wait(_LOOK_S)
            except subprocess.TimeoutExpired:
                continue
            break
        pytest.fail(f"vLLM did not start: {self._log.read_text(errors='replace')[-4000:]}")

    def signal(self, number: signal.Signals) -> None:
        """To all of its processes."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def _engine_pids(self) -> list[int]:
        assert self._process is not None
        found = subprocess.run(
            ["pgrep", "-g", str(self._process.pid), "-f", "^VLLM::"], stdout=subprocess.PIPE, check=True
        )
        return [int(pid) for pid in found.stdout.split()]

    def _slow_down(self) -> None:
        """Who computes comes behind who sends and reads: a tiny model draws a whole answer before a busy host looks."""
        for pid in self._engine_pids():
            for thread in os.listdir(f"/proc/{pid}/task"):
                os.setpriority(os.PRIO_PROCESS, int(thread), 19)

    def kill_engine(self) -> None:
        """kill -9 of the process that computes, as for want of memory; the one that listens finds out by itself."""
        os.kill(self._engine_pids()[-1], signal.SIGKILL)

    def kill(self) -> None:
        """kill -9 of the first process of its namespace, and so of all; returns when none is left."""
        if self._process is not None and self._process.poll() is None:
            pid = self._process.pid
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)
            self._process.wait()
        self._process = None


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The Python that has vLLM, once it is installed: `run` began with that."""
    subprocess.run(["bash", str(Path(__file__).parent / "install")], check=True)
    return VENV / "bin/python"


@pytest.fixture(scope="session")
def start_vllm(vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Server]]:
    """Start a server; all of them are killed at the end."""
    servers: list[Server] = []
    model = write_tiny_model(tmp_path_factory.mktemp("tiny"))

    def serving() -> Server:
        servers.append(Server(model, tmp_path_factory.mktemp("vllm")))
        servers[-1].start()
        return servers[-1]

    try:
        yield serving
    finally:
        for server in servers:
            server.kill()


@pytest.fixture(scope="session")
def pair(start_vllm: Callable[[], Server]) -> tuple[Server, Server]:
    """Two servers of the same model; whoever kills the second starts it again, but for the last test."""
    servers = (start_vllm(), start_vllm())
    for server in servers:
        server.wait()
    return servers


@pytest.fixture(scope="session")
def server(pair: tuple[Server, Server]) -> Server:
    """The one that nobody kills."""
    return pair[0]


@pytest.fixture
def serve_dsec(tmp_path: Path) -> Iterator[Callable[..., tuple[str, Path]]]:
    """Starts `dsec serve` over a directory of the test."""
    started: list[subprocess.Popen[str]] = []

    def serving(*urls: str, **environment: str) -> tuple[str, Path]:
        """The address, and where it logs, with engines at these URLs."""
        log = tmp_path / f"log-{len(started)}"
        command = [
            Path(sys.executable).with_name("dsec"),
            "serve",
            "--out",
            tmp_path / "run",
            "--listen",
            "127.0.0.1:0",
        ]
        with log.open("wb") as said:
            process = subprocess.Popen(
                [*command, *(flag for url in urls for flag in ("--engine", url))],
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                start_new_session=True,
            )
        started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("dsec: serving "), log.read_text()
        return line.split()[2].rstrip(","), log

    yield serving
    for process in started:
        process.terminate()
        process.communicate(timeout=STOP_S)
