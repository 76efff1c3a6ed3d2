"""Sandboxes as Docker containers: Docker makes the place, our guest is its pid 1.

For hosts where the native spawner may not run.  Docker Engine gives namespaces, root file system, limits,
freezing and snapshots (`docker commit`); commands do not go through `docker exec` but over the guest's own
socket, as in a native sandbox: the same timing, terminals, users, output and adoption, in a thirtieth
of the time.  What Docker cannot give is in `DOCKER_LACKS` and in docs/threat_model.md, "Docker".

The Edge listens on a socket that is bound into one container, takes one connection and closes it:
pid 1 has connected before any command exists.

Invariants:
    1. A container whose connection is gone has ended: its pid 1 exits, and Docker removes it (`auto_remove`).
    2. A create that fails or is cancelled leaves no container.

See: dsec/native/docker.c, dsec/native/supervisor.c, dsec/edge/substrates/docker_image.py, docker_layers.py beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import docker
from docker.errors import DockerException, ImageNotFound, NotFound

from dsec.edge import spool
from dsec.edge.capture import READ_BYTES_MAX
from dsec.edge.commands import check_spec, name_sandbox
from dsec.edge.config import DockerConfig
from dsec.edge.keeper import Keeper
from dsec.edge.network.gateway import Gateway
from dsec.edge.substrates import docker_image
from dsec.edge.substrates.adoption import KeptSandbox, sort_kept
from dsec.edge.substrates.docker_engine import FAILURES, Engine
from dsec.edge.substrates.docker_layers import DockerLayers
from dsec.edge.substrates.docker_sandbox import DockerSandbox
from dsec.edge.substrates.streams import Keeping
from dsec.errors import (
    DsecError,
    HostUnfitError,
    ResourceExhaustedError,
    SpawnError,
    StateError,
)
from dsec.sandbox import Hold
from dsec.types import Command, Composition, Feature, LayerId, SandboxId, SandboxSpec

DOCKER_LACKS: frozenset[Feature] = frozenset({"disk_quota", "own_mounts", "user_namespace"})
"""What Docker cannot promise everywhere; docs/threat_model.md says where it does."""

_OWNER = "dsec.owner"  # label of a container: the process with which it ends, as `_identity` says it
_CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "SETUID", "SETGID", "SETFCAP")
_MASKED = (
    "acpi", "asound", "buddyinfo", "bus", "cgroups", "cmdline", "config.gz", "diskstats", "fs", "interrupts", "irq",
    "kallsyms", "kcore", "key-users", "keys", "latency_stats", "locks", "mdstat", "modules", "mtrr", "partitions",
    "pressure", "sched_debug", "schedstat", "scsi", "softirqs", "swaps", "sysrq-trigger", "timer_list", "timer_stats",
    "vmstat", "zoneinfo", "sys/kernel/random/boot_id",
)  # fmt: skip
"""Of /proc: what native sandboxes hide (rootfs.c), and what Docker does."""
_OWN_COUNT = 2  # processes: pid 1, and the supervisor of a command


class DockerSubstrate:
    """Containers of a Docker daemon on this host.  Implements `dsec.sandbox.Substrate`.

    With a `state_dir` sandboxes outlive this process, as those of `ContainerSubstrate` do.
    """

    def __init__(self, config: DockerConfig | None = None, *, state_dir: Path | None = None) -> None:
        self._config = config or DockerConfig()
        self._state_dir = state_dir
        self._scratch = bytearray(READ_BYTES_MAX)
        self.gateway = Gateway()
        self.keeper: Keeper | None = None
        self.directory = Path()
        self._engine: Engine | None = None
        self._image = ""
        self._layers: DockerLayers | None = None
        self._has_quota = False
        self._sandboxes: dict[SandboxId, DockerSandbox] = {}
        self._adopted: dict[SandboxId, DockerSandbox] = {}
        self._creates = asyncio.Semaphore(self._config.creates_in_flight_max)

    @property
    def config(self) -> DockerConfig:
        """Its bounds."""
        return self._config

    @property
    def engine(self) -> Engine:
        """The daemon.  SpawnError before `open` and after `close`."""
        if self._engine is None:
            raise SpawnError("the substrate is not open")
        return self._engine

    @property
    def layers(self) -> DockerLayers:
        """Its images.  SpawnError before `open`."""
        if self._layers is None:
            raise SpawnError("the substrate is not open")
        return self._layers

    def keeping(self, sandbox_id: SandboxId) -> Keeping:
        """See `DockerHost`."""
        if self._state_dir is None:
            return Keeping(sandbox_id, self._scratch)
        place, config = self._state_dir / "spool" / sandbox_id, self._config
        files = spool.Spool(place, config.spool_bytes_max, config.spool_sandbox_bytes_max)
        return Keeping(sandbox_id, self._scratch, self.keeper, files)

    # -- open and close --------------------------------------------------------------------------

    async def open(self) -> None:
        """See `dsec.sandbox.Substrate.open`.  Proves itself by one sandbox that runs one command."""
        try:
            self._engine = await asyncio.to_thread(Engine, self._config)
        except FAILURES as error:
            raise HostUnfitError(f"cannot reach Docker ({error}): start dockerd, or set DOCKER_HOST") from error
        try:
            self._make_directory()
            if self._state_dir is not None:
                path = self._state_dir / "keeper.sock"
                self.keeper = await Keeper.open(self._config.binary_path, path, self._config.keep_s)
                await self._adopt(self.keeper)
                await asyncio.to_thread(spool.sweep, self._state_dir / "spool", set(self._sandboxes))
            await self._sweep()
            self._image = self._config.image or await self._make_image()
            self._layers = DockerLayers(self._engine, self._image, self._config.layers_count_max)
            self._has_quota = await self._probe_quota()
            await self._prove()
        except BaseException as error:
            await self.detach()
            if isinstance(error, (DsecError, *FAILURES)):
                raise HostUnfitError(f"Docker cannot be used: {error}") from error
            raise

    def _make_directory(self) -> None:
        if self._state_dir is None:
            for left in Path(tempfile.gettempdir()).glob("dsec-docker-*"):
                if not _is_alive(left.name.split("-")[2]):
                    shutil.rmtree(left, ignore_errors=True)
            self.directory = Path(tempfile.mkdtemp(prefix=f"dsec-docker-{_identity(os.getpid())}-"))
            return
        self.directory = self._state_dir / "docker"
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in self.directory.iterdir():
            left.unlink()

    async def _adopt(self, keeper: Keeper) -> None:
        kept = sort_kept(keeper.kept)
        left = kept.strays | kept.layers | kept.spawners
        for one in kept.sandboxes:
            if not await self._take_over(one):
                left |= one.descriptors()
        await self.gateway.adopt(keeper, left, self._adopted.keys())
        for key, fd in left.items():
            await keeper.drop(key)
            os.close(fd)

    async def _take_over(self, kept: KeptSandbox) -> bool:
        """Whether it is ours now: its container runs, with the pid 1 that the socket belongs to."""
        sandbox = DockerSandbox(self, kept.id, kept.spec)
        try:
            found = await self.engine.call(self.engine.api.inspect_container, sandbox.name)
        except NotFound:
            return False
        if found["State"]["Pid"] != kept.host_pid:
            return False
        self._sandboxes[kept.id] = self._adopted[kept.id] = sandbox
        with contextlib.suppress(DsecError):  # it is destroyed then, and says so to who asks for it
            await sandbox.take_over(kept)
        return True

    async def _sweep(self) -> None:
        """Remove containers that never ran because their Edge died; those that run end by themselves."""
        filters = {"label": _OWNER, "status": ["created", "exited", "dead"]}
        for container in await self.engine.call(self.engine.api.containers, all=True, filters=filters):
            if not _is_alive(container["Labels"][_OWNER]):
                await self.engine.remove(container["Id"])

    async def _make_image(self) -> str:
        files = await self.engine.call(docker_image.host_files)
        name = f"dsec-host:{docker_image.digest_of(files)}"
        try:
            await self.engine.call(self.engine.api.inspect_image, name)
        except ImageNotFound:
            with tempfile.TemporaryFile() as archive:
                await self.engine.call(docker_image.write_archive, files, archive)
                archive.seek(0)
                pieces = iter(partial(archive.read, 1 << 20), b"")  # a file would be sent without the marks of chunks
                await self.engine.call(self.engine.api.import_image_from_stream, pieces, *name.split(":"))
        return name

    async def _probe_quota(self) -> bool:
        """Whether the storage driver bounds the writable layer (overlay2 on xfs with pquota, btrfs, zfs)."""
        api = self.engine.api
        try:
            config = api.create_host_config(storage_opt={"size": "1g"}, network_mode="none")
            made = await self.engine.call(api.create_container, self._image, ["/bin/true"], host_config=config)
        except DockerException:
            return False
        await self.engine.remove(made["Id"])
        return True

    async def _prove(self) -> None:
        sandbox = await self.create(SandboxSpec())
        result = await sandbox.exec(Command(argv=("/bin/true",)))
        await sandbox.destroy()
        if result.exit_code != 0:
            raise HostUnfitError(f"/bin/true ended with {result.exit_code} in a sandbox of Docker")

    def adopted(self) -> Mapping[SandboxId, DockerSandbox]:
        """See `dsec.sandbox.Substrate.adopted`."""
        return self._adopted

    async def detach(self) -> None:
        """See `dsec.sandbox.Substrate.detach`: with a `state_dir`, what was given out lives on."""
        if self.keeper is None:
            await self.close()
            return
        for sandbox in self._sandboxes.values():
            sandbox.detach()
        self._sandboxes.clear()
        await self._stop()

    async def close(self) -> None:
        """See `dsec.sandbox.Substrate.close`.  Safe to call twice."""
        await asyncio.gather(*(sandbox.destroy() for sandbox in list(self._sandboxes.values())))
        await self._stop()

    async def _stop(self) -> None:
        await self.gateway.close()
        self._adopted.clear()
        keeper, engine, self.keeper, self._engine = self.keeper, self._engine, None, None
        if keeper is not None:
            await keeper.close()
        if engine is not None:
            await asyncio.to_thread(engine.close)
            with contextlib.suppress(OSError):
                self.directory.rmdir()

    # -- sandboxes -------------------------------------------------------------------------------

    async def create(self, spec: SandboxSpec, sandbox_id: SandboxId | None = None) -> DockerSandbox:
        """See `dsec.sandbox.Substrate.create`.  StateError for an id that is in use."""
        check_spec(spec)
        name = name_sandbox(sandbox_id)
        if name in self._sandboxes:
            raise StateError(f"there is a sandbox {name} already")
        if len(self._sandboxes) >= self._config.sandboxes_count_max:
            raise ResourceExhaustedError(f"all {self._config.sandboxes_count_max} sandboxes of this host are in use")
        sandbox = self._sandboxes[name] = DockerSandbox(self, name, spec)
        try:
            async with self._creates, asyncio.timeout(self._config.create_timeout_s):
                await sandbox.set_up()
        except BaseException as error:
            sandbox.give_up("it was not made")
            if isinstance(error, TimeoutError):
                raise SpawnError(f"the sandbox was not ready within {self._config.create_timeout_s} s") from error
            raise
        return sandbox

    async def make(self, name: str, spec: SandboxSpec, control: Path) -> None:
        """Create and start a container whose pid 1 connects to `control`."""
        api = self.engine.api
        config = api.create_host_config(
            mounts=[_bind(self.config.binary_path, "/.dsec/init"), _bind(control, "/.dsec/edge")],
            mem_limit=spec.memory_bytes, memswap_limit=spec.memory_bytes, nano_cpus=int(spec.cpu_cores * 1e9),
            cpu_shares=max(2, spec.cpu_weight * 1024 // 100), pids_limit=spec.pids_count_max + _OWN_COUNT,
            network_mode="none", ipc_mode="private", cgroupns="private", shm_size=spec.disk_bytes,
            cap_drop=["ALL"], cap_add=list(_CAPABILITIES), security_opt=["no-new-privileges"],
            sysctls={"net.ipv4.ip_unprivileged_port_start": "0"}, auto_remove=True,
            storage_opt={"size": str(spec.disk_bytes)} if self._has_quota else None,
            log_config=docker.types.LogConfig(type="none"),
        )  # fmt: skip
        config["MaskedPaths"] = [f"/proc/{name}" for name in _MASKED]
        try:
            async with self.layers.image_of(spec) as image:
                await self.engine.call(
                    api.create_container, image, ["guest", "/.dsec/edge"], name=name, entrypoint=["/.dsec/init"],
                    hostname=spec.hostname, host_config=config, user="0:0", working_dir="/", environment={},
                    labels={_OWNER: _identity(self.keeper.pid if self.keeper else os.getpid())},
                )  # fmt: skip
            await self.engine.call(api.start, name)
        except FAILURES as error:
            raise SpawnError(f"Docker made no sandbox: {error}") from error

    async def end_of(self, name: str) -> str:
        """See `DockerHost`."""
        state = (await self.engine.tell(self.engine.api.inspect_container, name))["State"]
        return "" if state["Running"] else f"exit code {state['ExitCode']}, {state['Error'] or 'no error'}"

    async def pause(self, name: str) -> None:
        """See `DockerHost`."""
        await self.engine.tell(self.engine.api.pause, name)

    async def resume(self, name: str) -> None:
        """See `DockerHost`.  One that runs is well: a call that failed here may have been carried out there."""
        try:
            await self.engine.tell(self.engine.api.unpause, name)
        except ResourceExhaustedError:
            if (await self.engine.tell(self.engine.api.inspect_container, name))["State"]["Paused"]:
                raise

    async def commit(self, name: str, spec: SandboxSpec) -> LayerId:
        """See `DockerHost`: an image."""
        return await self.layers.commit(name, spec)

    async def composed(self, references: Sequence[str]) -> Composition:
        """See `dsec.sandbox.Layered`."""
        return await self.layers.composed(references)

    def holding(self) -> AbstractContextManager[Hold]:
        """See `dsec.sandbox.Layered`."""
        return self.layers.holding()

    async def forget(self, sandbox: DockerSandbox) -> None:
        """Remove the container; what Docker refuses ends by itself, and is swept later."""
        if self._engine is not None:
            with contextlib.suppress(*FAILURES):
                await self._engine.remove(sandbox.name)
        self._sandboxes.pop(sandbox.id, None)
        self._adopted.pop(sandbox.id, None)


def _bind(source: Path, target: str) -> docker.types.Mount:
    """Where the source is gone: an error (`binds` would make a directory in its place)."""
    return docker.types.Mount(target, str(source), type="bind", read_only=True)


def _identity(pid: int) -> str:
    """A process: its pid and when it started, so that a later one of the same pid is another."""
    try:
        return f"{pid}.{Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    except OSError:
        return ""


def _is_alive(identity: str) -> bool:
    pid = identity.partition(".")[0]
    return pid.isdecimal() and _identity(int(pid)) == identity
