"""Docker's API beside the event loop, and what `dsec doctor` asks of a daemon that serves here."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import docker
from docker.errors import DockerException, ImageNotFound, NotFound

from dsec.edge.config import DockerConfig
from dsec.edge.linux.host import Finding
from dsec.errors import HostUnfitError, ResourceExhaustedError

FAILURES = (DockerException, OSError)  # those of requests are OSErrors
_T = TypeVar("_T")


class Engine:
    """Docker's API without blocking the loop.  A call that was begun goes on when its waiter is cancelled."""

    def __init__(self, config: DockerConfig) -> None:
        threads = config.creates_in_flight_max + 4
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="docker")
        url = config.url or os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
        if not url.startswith("unix://"):
            raise HostUnfitError(f"{url!r} is not the socket of a Docker daemon on this host (unix:///...)")
        with socket.socket(socket.AF_UNIX) as probe:  # Docker's client would leave its socket open
            probe.connect(url.removeprefix("unix://"))
        self.api = docker.APIClient(base_url=url, version="auto", timeout=config.call_timeout_s, max_pool_size=threads)

    async def call(self, function: Callable[..., _T], *arguments: Any, **named: Any) -> _T:
        """Run a blocking function in one of our threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *arguments, **named))

    async def tell(self, function: Callable[..., _T], *arguments: Any, **named: Any) -> _T:
        """As `call`.  ResourceExhaustedError, with Docker's reason."""
        try:
            return await self.call(function, *arguments, **named)
        except FAILURES as error:
            raise ResourceExhaustedError(f"Docker: {error}") from error

    async def find_image(self, reference: str) -> dict[str, Any] | None:
        """What Docker says of an image.  ResourceExhaustedError."""
        try:
            found: dict[str, Any] = await self.call(self.api.inspect_image, reference)
        except ImageNotFound:
            return None
        except FAILURES as error:
            raise ResourceExhaustedError(f"Docker: {error}") from error
        return found

    def close(self) -> None:
        """Wait for what runs, then drop the connections."""
        self._threads.shutdown()
        self.api.close()

    async def remove(self, name: str) -> None:
        """End a container and wait until nothing of it is left; one that is not there is well."""
        with contextlib.suppress(NotFound):
            try:
                await self.call(self.api.remove_container, name, v=True, force=True)
            except NotFound:
                raise
            except FAILURES:  # it is being removed already: its pid 1 saw the end of the connection
                await self.call(self.api.wait, name, condition="removed")


def check_docker(config: DockerConfig | None = None) -> list[Finding]:
    """What a daemon that serves this host does for its containers; nothing where there is none."""
    try:
        engine = Engine(config or DockerConfig())
    except (HostUnfitError, *FAILURES):
        return []
    try:
        options = engine.api.info().get("SecurityOptions") or []
    finally:
        engine.close()
    is_remapped = any(option.startswith("name=userns") for option in options)
    shared = "inotify instances and watches, pending signals, locked memory"
    detail = (
        f"root of its containers is a user of its own here; containers share that one's {shared}"
        if is_remapped
        else f"root of its containers is this host's root: they share its {shared}"
    )
    remedy = 'for sandboxes of --substrate docker: "userns-remap": "default" in /etc/docker/daemon.json'
    return [Finding("docker users", is_remapped, detail, remedy, optional=True)]
