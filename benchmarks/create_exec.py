"""What a sandbox and a command in it cost, beside `crun` and a plain subprocess.

    python benchmarks/create_exec.py [--quick] [--json]

Contenders take turns in every round, so that a noisy machine is noisy for all; compare ratios first,
and minima before means.  `crun` gets the same base (/usr read only, a tmpfs to write to) but no
overlay, no user namespace, no seccomp and no cpu limit: its figures are flattered.  Needs root; crun
is left out, with a word, where it is not installed.

See: docs/threat_model.md for what a sandbox does in that time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TypedDict, TypeVar

from rich.console import Console
from rich.table import Table

from dsec.edge.config import SubstrateConfig
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.edge.substrates.container_sandbox import ContainerSandbox
from dsec.types import Command, SandboxSpec

TRUE = Command(argv=("/bin/true",))
T = TypeVar("T")
APART = "DSEC_BENCHMARK_APART"
CRUN_MISSING = "crun is not installed: apt-get install crun"


async def run_program(*argv: str) -> None:
    """A subprocess that must end well."""
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    if await process.wait() != 0:
        raise RuntimeError(f"{' '.join(argv)} ended with {process.returncode}")


class Crun:
    """Containers by the crun command line, on a bundle in a temporary directory."""

    def __init__(self, bundle: Path) -> None:
        self._bundle = bundle
        self._count = 0
        for name in ("usr", "proc", "dev", "tmp"):
            (bundle / "rootfs" / name).mkdir(parents=True)
        for name in ("bin", "lib", "lib64", "sbin"):
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
        name = f"dsec-bench-{self._count}"
        await self._crun("run", "-d", "--bundle", str(self._bundle), name)
        return name

    async def exec(self, name: str) -> None:
        """Run /bin/true in it."""
        await self._crun("exec", name, "/bin/true")

    async def destroy(self, name: str) -> None:
        """Kill and remove it."""
        await self._crun("delete", "-f", name)

    async def _crun(self, *argv: str) -> None:
        await run_program("crun", "--cgroup-manager=cgroupfs", *argv)


class Figures:
    """Seconds by (contender, operation)."""

    def __init__(self) -> None:
        self.samples: dict[tuple[str, str], list[float]] = {}

    async def time(self, contender: str, operation: str, work: Awaitable[T]) -> T:
        """Await `work` and keep how long it took."""
        started = time.perf_counter()
        result = await work
        self.samples.setdefault((contender, operation), []).append(time.perf_counter() - started)
        return result

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """Milliseconds: p50, p95 and minimum."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for (contender, operation), seconds in self.samples.items():
            ordered = sorted(seconds)
            found.setdefault(operation, {})[contender] = {
                "p50_ms": statistics.median(ordered) * 1e3,
                "p95_ms": ordered[int(len(ordered) * 0.95)] * 1e3,
                "min_ms": ordered[0] * 1e3,
                "count": len(ordered),
            }
        return found


async def take_turns(substrate: ContainerSubstrate, crun: Crun | None, rounds: int, figures: Figures) -> None:
    """One sandbox at a time."""
    for _ in range(rounds):
        started = time.perf_counter()
        sandbox = await figures.time("dsec", "create", substrate.create(SandboxSpec()))
        await sandbox.exec(TRUE)
        figures.samples.setdefault(("dsec", "create_and_first_exec"), []).append(time.perf_counter() - started)
        for _ in range(4):
            await figures.time("dsec", "exec", sandbox.exec(TRUE))
            await figures.time("subprocess", "exec", run_program("/bin/true"))
        await figures.time("dsec", "destroy", sandbox.destroy())
        if crun is not None:
            started = time.perf_counter()
            name = await figures.time("crun", "create", crun.create())
            await crun.exec(name)
            figures.samples.setdefault(("crun", "create_and_first_exec"), []).append(time.perf_counter() - started)
            await figures.time("crun", "exec", crun.exec(name))
            await figures.time("crun", "destroy", crun.destroy(name))


async def rate(count: int, in_flight: int, work: Callable[[int], Awaitable[object]]) -> float:
    """Calls a second of `count` calls, `in_flight` at a time."""
    gate = asyncio.Semaphore(in_flight)

    async def one(index: int) -> None:
        async with gate:
            await work(index)

    started = time.perf_counter()
    await asyncio.gather(*(one(index) for index in range(count)))
    return count / (time.perf_counter() - started)


async def burst(substrate: ContainerSubstrate, crun: Crun | None, count: int) -> dict[str, dict[str, float]]:
    """Many at once: creates to the first command done, commands 16 in flight, destroys."""

    async def born(_: int) -> None:
        sandbox = await substrate.create(SandboxSpec())
        sandboxes.append(sandbox)
        await sandbox.exec(TRUE)

    sandboxes: list[ContainerSandbox] = []
    found = {"creates_per_s": {"dsec": await rate(count, count, born)}}
    found["execs_per_s_16_in_flight"] = {
        "dsec": await rate(count * 4, 16, lambda index: sandboxes[index % count].exec(TRUE)),
        "subprocess": await rate(count * 4, 16, lambda _: run_program("/bin/true")),
    }
    found["destroys_per_s"] = {"dsec": await rate(count, count, lambda index: sandboxes[index].destroy())}
    if crun is not None:
        few = max(4, count // 4)
        names: list[str] = []

        async def born_by_crun(_: int) -> None:
            name = await crun.create()
            names.append(name)
            await crun.exec(name)

        found["creates_per_s"]["crun"] = await rate(few, 8, born_by_crun)
        found["execs_per_s_16_in_flight"]["crun"] = await rate(few * 2, 16, lambda i: crun.exec(names[i % few]))
        found["destroys_per_s"]["crun"] = await rate(few, 8, lambda index: crun.destroy(names[index]))
    return found


Value = dict[str, float] | float


def split(by_operation: Mapping[str, Mapping[str, Value]]) -> tuple[dict[str, Value], dict[str, dict[str, Value]]]:
    """What is ours by operation, and what is not by contender and operation."""
    ours: dict[str, Value] = {}
    others: dict[str, dict[str, Value]] = {}
    for operation, by_contender in by_operation.items():
        for contender, value in by_contender.items():
            place = ours if contender == "dsec" else others.setdefault(contender, {})
            place[operation] = value
    return ours, others


def ratios(single: dict[str, dict[str, dict[str, float]]], many: dict[str, dict[str, float]]) -> dict[str, float]:
    """How many times faster than the baselines (below 1: slower); medians."""
    found = {}
    for operation, by_contender in single.items():
        for other in ("crun", "subprocess"):
            if other in by_contender:
                ours = by_contender["dsec"]["p50_ms"]
                found[f"{operation}_p50_vs_{other}"] = by_contender[other]["p50_ms"] / ours
    for operation, rates in many.items():
        for other in ("crun", "subprocess"):
            if other in rates:
                found[f"{operation}_vs_{other}"] = rates["dsec"] / rates[other]
    return found


class Result(TypedDict):
    """The object that --json prints: milliseconds one at a time, calls a second at once."""

    figures: dict[str, Value]
    baselines: dict[str, dict[str, Value]]
    ratios: dict[str, float]
    facts: dict[str, str]


async def measure(rounds: int, burst_count: int) -> Result:
    """All figures as one object."""
    substrate = ContainerSubstrate(SubstrateConfig(sandboxes_count_max=max(256, burst_count)))
    await substrate.open()
    figures = Figures()
    with tempfile.TemporaryDirectory() as bundle:
        crun = Crun(Path(bundle)) if shutil.which("crun") else None
        await take_turns(substrate, crun, rounds, figures)
        many = await burst(substrate, crun, burst_count)
    await substrate.close()
    single = figures.summary()
    ours, others = split({**single, **many})
    note = "memory and pids cgroups" if crun is not None else CRUN_MISSING
    return {"figures": ours, "baselines": others, "ratios": ratios(single, many), "facts": {"crun": note}}


def render(result: Result, console: Console) -> None:
    """A table for people."""
    table = Table(title="create, exec, destroy")
    for column in ("operation", "contender", "p50", "p95", "min"):
        table.add_column(column, justify="left" if column in ("operation", "contender") else "right")
    contenders = {"dsec": result["figures"], **result["baselines"]}
    for operation in result["figures"]:
        for contender, values in contenders.items():
            value = values.get(operation)
            if isinstance(value, dict):
                table.add_row(operation, contender, *(f"{value[key]:.2f} ms" for key in ("p50_ms", "p95_ms", "min_ms")))
            elif value is not None:
                table.add_row(operation, contender, f"{value:.0f} /s", "", "")
    console.print(table)
    console.print(f"crun: {result['facts']['crun']}")
    for name, ratio in result["ratios"].items():
        console.print(f"{name}: {ratio:.2f}")


def run_apart() -> int:
    """Run this program again where crun agrees to work, and give its exit code.

    crun refuses hosts with cgroup2 beside v1, so cgroup2 is mounted elsewhere in a mount namespace of
    our own: there all contenders run, and the host sees nothing of it.
    """
    script = 'mount -t cgroup2 none "$0" && umount /sys/fs/cgroup/unified && exec "$@"'
    with tempfile.TemporaryDirectory() as place:
        again = ["unshare", "--mount", "sh", "-c", script, place, sys.executable, *sys.argv]
        return subprocess.run(again, env={**os.environ, APART: "1"}, check=False).returncode


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description="Cost of sandboxes and of commands in them.",
        epilog="example: python benchmarks/create_exec.py --quick --json | python -m json.tool",
    )
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--rounds", type=int, help="rounds of the turn-taking part (40 with --quick, else 200)")
    arguments = parser.parse_args()
    if shutil.which("crun") and os.path.ismount("/sys/fs/cgroup/unified") and APART not in os.environ:
        sys.exit(run_apart())
    rounds = arguments.rounds or (40 if arguments.quick else 200)
    result = asyncio.run(measure(rounds, 64 if arguments.quick else 200))
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        render(result, Console())


if __name__ == "__main__":
    main()
