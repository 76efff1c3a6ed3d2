"""What tests of other people's programs need: a Docker daemon of our own, and a service that speaks HTTP beside them.

The daemon has no network, and all of it is below one directory and one cgroup.
"""

import asyncio
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from dsec.testing import FakeSubstrate
from rollout.config import RolloutConfig
from rollout.dialects.http_server import listen, start_http_server
from rollout.engine import Engine
from rollout.events import Event, RolloutFinished
from rollout.main import load_tokenizer
from rollout.rpc.listening import listen_at
from rollout.service import RolloutService
from rollout.state import State

STOP_S = 60
T = TypeVar("T")


@dataclass
class Served:
    """A service in a thread of its own; its ledger, and `ended`, may be read while no call runs."""

    url: str
    service: RolloutService
    loop: asyncio.AbstractEventLoop
    ended: list[State]
    """Rollouts in the order of their ends, also those that the service forgot since."""

    def ask(self, work: Coroutine[Any, Any, T]) -> T:
        """What a coroutine gives, in the service's thread."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(STOP_S)


Serve = Callable[..., AbstractContextManager[Served]]


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """`with serve(engine, token, **bounds) as served`: for clients that block."""

    @contextmanager
    def serving(engine: Engine, token: str = "", **bounds: int) -> Iterator[Served]:
        ready: Future[Served] = Future()
        stopping = asyncio.Event()

        async def run() -> None:
            config = RolloutConfig(log_sync="os", **bounds)
            ended: list[State] = []

            def see(event: Event) -> None:
                if isinstance(event, RolloutFinished):
                    ended.append(service.ledger.rollouts[event.rollout_id])

            service = RolloutService(tmp_path / "log", engine, FakeSubstrate(), load_tokenizer(), config, observe=see)
            async with service:
                await service.start()

                async def find(_request_id: str, **_options: Any) -> RolloutService:
                    return service

                server = start_http_server(find, listen(listen_at("127.0.0.1:0")), token)
                ready.set_result(Served(f"http://127.0.0.1:{server.port}", service, loop, ended))
                await stopping.wait()
                await server.stop()

        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
        thread.start()
        try:
            yield ready.result(STOP_S)
        finally:
            loop.call_soon_threadsafe(stopping.set)
            thread.join(STOP_S)
            loop.close()

    return serving


@pytest.fixture(scope="session")
def docker_url() -> Iterator[str]:
    """Start dockerd and stop it; gives its address.  Skipped where it is not installed; CI installs it."""
    if shutil.which("dockerd") is None:
        pytest.skip("dockerd is not installed (Debian: apt-get install docker.io)")
    place = Path(tempfile.mkdtemp(prefix="dsec-dockerd-"))  # short: sockets lie below it
    url = f"unix://{place}/sock"
    command = ["dockerd", "--iptables=false", "--ip-forward=false", "--ip-masq=false", "--bridge=none"]
    command += [f"--data-root={place}/root", f"--exec-root={place}/run", f"--pidfile={place}/pid", "-H", url]
    command += [f"--cgroup-parent=/{place.name}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, text=True, start_new_session=True, **pipes) as daemon:
        try:
            said = []
            while "API listen on" not in "".join(said[-1:]):
                said.append(daemon.stdout.readline())
                assert said[-1], "".join(said)
            drain = threading.Thread(target=daemon.stdout.read)
            drain.start()
            yield url
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(STOP_S)
            drain.join(STOP_S)
    left = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mount in sorted((mount for mount in left if mount.startswith(str(place))), reverse=True):
        subprocess.run(["umount", "-l", mount], check=True)
    shutil.rmtree(place)
    for parent in Path("/sys/fs/cgroup").glob(f"**/{place.name}"):
        parent.rmdir()
