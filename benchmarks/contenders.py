"""Whom the sandboxes are measured against, and how times become figures; shared by the benchmarks beside it.

`crun` and Docker get the same base (/usr read only, a tmpfs to write to) and the same limits, but no
overlay, no user namespace, no layer and, for `crun`, no seccomp: their figures are flattered.  Docker runs on a
daemon of its own, in a temporary directory, that ends with the benchmark.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Protocol, TypedDict, TypeVar

from rich.console import Console
from rich.table import Table

T = TypeVar("T")
APART = "DSEC_BENCHMARK_APART"
DOCKER_START_S = 30.0
LINKS = ("bin", "lib", "lib64", "sbin")
DIRECTORIES = ("usr", "proc", "dev", "tmp")


async def run_program(*argv: str) -> bytes:
    """What a subprocess writes to stdout; it must end well."""
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    stdout, _ = await process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)} ended with {process.returncode}")
    return stdout


class Contender(Protocol):
    """Something that makes containers; `creates_in_flight` at a time is what it does best at."""

    creates_in_flight: int

    async def create(self) -> str:
        """A fresh container that waits for commands; its name."""
        ...

    async def exec(self, name: str, *argv: str) -> bytes:
        """What a command in it writes to stdout."""
        ...

    async def destroy(self, name: str) -> None:
        """Kill and remove it."""
        ...


class Crun:
    """Containers by the crun command line, on a bundle in a temporary directory."""

    creates_in_flight = 8

    def __init__(self, bundle: Path) -> None:
        self._bundle = bundle
        self._count = 0
        for name in DIRECTORIES:
            (bundle / "rootfs" / name).mkdir(parents=True)
        for name in LINKS:
            (bundle / "rootfs" / name).symlink_to(f"usr/{name}")
        subprocess.run(["crun", "spec"], cwd=bundle, check=True)
        config = json.loads((bundle / "config.json").read_text())
        config["process"] |= {"terminal": False, "args": ["/usr/bin/sleep", "1000"]}
        mounts = [m for m in config["mounts"] if m["destination"] in ("/proc", "/dev", "/dev/pts", "/dev/shm")]  # noqa: S108
        mounts.append({"destination": "/usr", "type": "bind", "source": "/usr", "options": ["bind", "ro"]})
        mounts.append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["size=384m"]})  # noqa: S108
        config["mounts"] = mounts
        config["linux"]["resources"] = {"memory": {"limit": 512 << 20}, "pids": {"limit": 256}}
        (bundle / "config.json").write_text(json.dumps(config))

    async def create(self) -> str:
        """Run a container in the background and give its name."""
        self._count += 1
        name = f"dsec-bench-{os.getpid()}-{self._count}"
        await self._crun("run", "-d", "--bundle", str(self._bundle), name)
        return name

    async def exec(self, name: str, *argv: str) -> bytes:
        """Run a program in it."""
        return await self._crun("exec", name, *argv)

    async def destroy(self, name: str) -> None:
        """Kill and remove it."""
        await self._crun("delete", "-f", name)

    async def _crun(self, *argv: str) -> bytes:
        # not to a pipe of ours: the container of `run -d` would hold it open
        if argv[0] == "run":
            argv = ("sh", "-c", 'exec crun --cgroup-manager=cgroupfs "$@" > /dev/null', "crun", *argv)
            return await run_program(*argv)
        return await run_program("crun", "--cgroup-manager=cgroupfs", *argv)


class Docker:
    """Containers by the docker command line."""

    creates_in_flight = 8

    def __init__(self, address: str) -> None:
        self._docker = ("docker", "--host", address)

    async def create(self) -> str:
        """Run a container in the background and give its id."""
        limits = (
            "--network=none",
            "--memory=512m",
            "--pids-limit=256",
            "--tmpfs=/tmp:size=384m",
            "--volume=/usr:/usr:ro",
        )
        written = await run_program(*self._docker, "run", "--detach", *limits, "dsec-bench", "/usr/bin/sleep", "1000")
        return written.decode().strip()

    async def exec(self, name: str, *argv: str) -> bytes:
        """Run a program in it."""
        return await run_program(*self._docker, "exec", name, *argv)

    async def destroy(self, name: str) -> None:
        """Kill and remove it."""
        await run_program(*self._docker, "rm", "--force", name)

    async def prepare(self) -> None:
        """Make the image, directories and links: /usr is the host's.  RuntimeError if the daemon does not start."""
        ends_at = time.monotonic() + DOCKER_START_S
        while True:
            try:
                await run_program(*self._docker, "version")
                break
            except RuntimeError:
                if time.monotonic() > ends_at:
                    raise
                await asyncio.sleep(0.2)
        with tempfile.NamedTemporaryFile(suffix=".tar") as image:
            image.write(_empty_root())
            image.flush()
            await run_program(*self._docker, "import", image.name, "dsec-bench")


def _empty_root() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name in DIRECTORIES:
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
        for name in LINKS:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, f"usr/{name}"
            archive.addfile(entry)
    return made.getvalue()


@contextlib.asynccontextmanager
async def docker_daemon() -> AsyncIterator[Docker]:
    """A Docker daemon of our own, with its containers gone at the end.  RuntimeError."""
    with tempfile.TemporaryDirectory(prefix="dsec-docker-", ignore_cleanup_errors=True) as place:
        address = f"unix://{place}/docker.sock"
        daemon = await asyncio.create_subprocess_exec(
            "dockerd", f"--data-root={place}/data", f"--exec-root={place}/exec", f"--pidfile={place}/pid",
            f"--host={address}", "--bridge=none", "--iptables=false", "--ip6tables=false",
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        docker = Docker(address)
        try:
            await docker.prepare()
            yield docker
        finally:
            with contextlib.suppress(ProcessLookupError):
                daemon.terminate()
            await daemon.wait()


@contextlib.asynccontextmanager
async def edge_process(**settings: int) -> AsyncIterator[str]:
    """An Edge with nothing in it, in a process of its own: its URL.  `settings` are names and values of DSEC_EDGE_*."""
    with tempfile.TemporaryDirectory(prefix="dsec-edge-") as place:
        url = f"unix:{place}/edge.sock"
        serve = ("edge", "serve", "--directory", f"{place}/state", "--listen", url, "--destroy-on-exit")
        edge = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "from rollout.cli import main; main()", *serve, stdout=subprocess.PIPE,
            env=os.environ | {f"DSEC_EDGE_{name.upper()}": str(value) for name, value in settings.items()},
        )  # fmt: skip
        try:
            if edge.stdout is None or not await edge.stdout.readline():
                raise RuntimeError("the Edge does not start")
            yield url
        finally:
            edge.terminate()
            await edge.wait()


@contextlib.asynccontextmanager
async def contenders(*, without: str = "") -> AsyncIterator[tuple[dict[str, Contender], dict[str, str]]]:
    """Those that this machine has, less those named in `without`; and a word on each."""
    found: dict[str, Contender] = {}
    facts: dict[str, str] = {}
    async with contextlib.AsyncExitStack() as stack:
        for name, program, package in (("crun", "crun", "crun"), ("docker", "dockerd", "docker.io")):
            if name in without.split(","):
                facts[name] = "left out"
            elif shutil.which(program) is None:
                facts[name] = f"not installed: apt-get install {package}"
            elif name == "crun":
                bundle = stack.enter_context(tempfile.TemporaryDirectory(prefix="dsec-crun-"))
                found[name], facts[name] = Crun(Path(bundle)), "memory and pids cgroups, no user namespace, no seccomp"
            else:
                try:
                    found[name] = await stack.enter_async_context(docker_daemon())
                    facts[name] = "a daemon of its own, network none, no user namespace"
                except RuntimeError as error:
                    facts[name] = f"its daemon does not start here: {error}"
        yield found, facts


class Spread(TypedDict):
    """Of seconds measured, as milliseconds; `success` is the share that ended well."""

    p50_ms: float
    p95_ms: float
    p99_ms: float
    min_ms: float
    count: int
    success: float


Value = Spread | float


class Figures:
    """Seconds by (contender, operation), and how many failed."""

    def __init__(self) -> None:
        self._samples: dict[tuple[str, str], list[float]] = {}
        self._failures: dict[tuple[str, str], int] = {}

    def add(self, contender: str, operation: str, seconds: float) -> None:
        """One that ended well."""
        self._samples.setdefault((contender, operation), []).append(seconds)

    async def time(self, contender: str, operation: str, work: Awaitable[T]) -> T:
        """Await `work` and keep how long it took."""
        started = time.perf_counter()
        try:
            result = await work
        except Exception:
            self._failures[contender, operation] = self._failures.get((contender, operation), 0) + 1
            raise
        self.add(contender, operation, time.perf_counter() - started)
        return result

    def summary(self) -> dict[str, dict[str, Value]]:
        """By operation and contender."""
        found: dict[str, dict[str, Value]] = {}
        for (contender, operation), seconds in self._samples.items():
            failed = self._failures.get((contender, operation), 0)
            found.setdefault(operation, {})[contender] = spread(seconds, failed)
        return found


def spread(seconds: list[float], failed: int = 0) -> Spread:
    """Quantiles of at least one measurement."""
    ordered = sorted(seconds)
    return {
        "p50_ms": statistics.median(ordered) * 1e3,
        "p95_ms": ordered[int(len(ordered) * 0.95)] * 1e3,
        "p99_ms": ordered[int(len(ordered) * 0.99)] * 1e3,
        "min_ms": ordered[0] * 1e3,
        "count": len(ordered),
        "success": len(ordered) / (len(ordered) + failed),
    }


async def rate(count: int, in_flight: int, work: Callable[[int], Awaitable[object]]) -> float:
    """Calls a second of `count` calls, `in_flight` at a time."""
    gate = asyncio.Semaphore(in_flight)

    async def one(index: int) -> None:
        async with gate:
            await work(index)

    started = time.perf_counter()
    await asyncio.gather(*(one(index) for index in range(count)))
    return count / (time.perf_counter() - started)


def split(by_operation: dict[str, dict[str, Value]]) -> tuple[dict[str, Value], dict[str, dict[str, Value]]]:
    """What is ours by operation, and what is not by contender and operation."""
    ours: dict[str, Value] = {}
    others: dict[str, dict[str, Value]] = {}
    for operation, by_contender in by_operation.items():
        for contender, value in by_contender.items():
            place = ours if contender == "dsec" else others.setdefault(contender, {})
            place[operation] = value
    return ours, others


def ratios(by_operation: dict[str, dict[str, Value]]) -> dict[str, float]:
    """How many times better than each contender (below 1: worse), by medians and by rates."""
    found = {}
    for operation, by_contender in by_operation.items():
        for other, theirs in by_contender.items():
            ours = by_contender.get("dsec")
            if other == "dsec" or ours is None:
                continue
            if isinstance(ours, dict) and isinstance(theirs, dict):
                found[f"{operation}_p50_vs_{other}"] = theirs["p50_ms"] / ours["p50_ms"]
            elif isinstance(ours, float) and isinstance(theirs, float):
                found[f"{operation}_vs_{other}"] = ours / theirs
    return found


class Result(TypedDict):
    """The object that --json prints: milliseconds one at a time, calls a second at once."""

    figures: dict[str, Value]
    baselines: dict[str, dict[str, Value]]
    ratios: dict[str, float]
    facts: dict[str, str]


def render(title: str, result: Result) -> None:
    """A table for people."""
    console = Console()
    table = Table("", "p50", "p95", "p99", "min", "success", title=title, caption="milliseconds, or a count or rate")
    for column in table.columns[1:]:
        column.justify = "right"
    contestants = {"dsec": result["figures"], **result["baselines"]}
    for operation in dict.fromkeys(operation for values in contestants.values() for operation in values):
        found = {name: values[operation] for name, values in contestants.items() if operation in values}
        if [*found] == ["dsec"]:
            table.add_row(operation, *_cells(found["dsec"]))
            continue
        table.add_section()
        table.add_row(f"[bold]{operation}")
        for contender, value in found.items():
            table.add_row(f"  {contender}", *_cells(value))
        table.add_section()
    console.print(table)
    for facts in (result["facts"], {name: f"{ratio:.2f}" for name, ratio in result["ratios"].items()}):
        for name, fact in facts.items():
            console.print(f"{name}: {fact}", highlight=False)


def _cells(value: Value) -> list[str]:
    if isinstance(value, float):
        return [f"{value:.2f}"]
    times = (value["p50_ms"], value["p95_ms"], value["p99_ms"], value["min_ms"])
    return [*(f"{time:.2f}" for time in times), f"{value['success']:.1%}"]


def run_apart() -> None:
    """Run this program again where crun agrees to work, and exit as it does; nothing where that is no matter.

    crun refuses hosts with cgroup2 beside v1, so cgroup2 is mounted elsewhere in a mount namespace of
    our own: there all contenders run, and the host sees nothing of it.
    """
    if shutil.which("crun") is None or not os.path.ismount("/sys/fs/cgroup/unified") or APART in os.environ:
        return
    script = 'mount -t cgroup2 none "$0" && umount /sys/fs/cgroup/unified && exec "$@"'
    with tempfile.TemporaryDirectory() as place:
        again = ["unshare", "--mount", "sh", "-c", script, place, sys.executable, *sys.argv]
        sys.exit(subprocess.run(again, env={**os.environ, APART: "1"}, check=False).returncode)
