"""How many sandboxes a host holds, what each costs, and whether anything is left behind.

    python benchmarks/density.py [--quick] [--json] [--count N] [--hold-s S]
    python benchmarks/density.py --cycles 10000

The first form fills the host with idle sandboxes (4,000; 200 with --quick), and measures on the way: creates a
second with 100 alive, with N, and with 100 again; memory by several accounts; one command in each sandbox after
holding all of them; pause and resume of up to 1,000; and fork(100) of a sandbox that wrote 50 MiB.  The second form
makes and destroys, and counts what a host counts before and after.  All through an Edge in this process: it
journals, and its sandboxes could outlive it.  Needs root.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from contenders import Result, Value, rate, render, spread

from dsec.edge.config import SubstrateConfig
from dsec.edge.edge_config import EdgeConfig
from dsec.edge.images.store import LayerStore
from dsec.edge.linux import cgroup
from dsec.edge.local import EdgeSandbox, EdgeSubstrate
from dsec.edge.service import Edge
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.types import Command, SandboxSpec

TRUE = Command(argv=("/bin/true",))
FEW = 100
WINDOW_COUNT = 100
WINDOWS = 4
CREATES_IN_FLIGHT = 8
EXECS_IN_FLIGHT = 16
PAUSES_COUNT_MAX = 1000
FORKS_COUNT = 100
FORKS_READ_COUNT = 10
UPPER_MIB = 50
WRITE_UPPER = f"for i in $(seq {UPPER_MIB}); do head -c 1M /dev/urandom > /srv/$i; done && cat /srv/* | sha256sum"
READ_UPPER = "cat /srv/* | sha256sum"


class Host:
    """An Edge in a temporary directory, and those of its sandboxes that live.

    It promises memory and process ids as often as it is asked to: the benchmark looks for the real bound.
    """

    def __init__(self, directory: Path, count: int) -> None:
        self.directory = directory
        count_max = count + WINDOW_COUNT + FORKS_COUNT + 1
        self.layers = LayerStore(directory / "layers")
        containers = ContainerSubstrate(
            SubstrateConfig(sandboxes_count_max=count_max), layers=self.layers, state_dir=directory / "state"
        )
        config = EdgeConfig(sandboxes_count_max=count_max, memory_overcommit=1000, pids_overcommit=1000)
        self.substrate = EdgeSubstrate(Edge(directory / "edge", containers, config))
        self.alive: list[EdgeSandbox] = []

    async def open(self) -> None:
        """Start, and warm up: the first sandboxes pay for what the others find."""
        await self.layers.open()
        await self.substrate.open()
        await self.window()

    async def close(self) -> None:
        """Destroy all."""
        await self.substrate.close()
        self.layers.close()

    async def fill(self, count: int) -> float:
        """Have so many alive; creates (or destroys) a second on the way."""
        missing = count - len(self.alive)
        if missing < 0:
            ending, self.alive = self.alive[count:], self.alive[:count]
            return await rate(-missing, CREATES_IN_FLIGHT, lambda index: ending[index].destroy())

        async def add(_: int) -> None:
            self.alive.append(await self.substrate.create(SandboxSpec()))

        return await rate(missing, CREATES_IN_FLIGHT, add) if missing else 0.0

    async def window(self) -> float:
        """Creates a second, on top of what is there; the new ones are destroyed again."""
        before = len(self.alive)
        found = await self.fill(before + WINDOW_COUNT)
        await self.fill(before)
        return found


def read_numbers(path: str, column: int = 1) -> dict[str, int]:
    """`name value` or `Name: value kB` lines, or another column of a table."""
    rows = (line.replace(":", " ").split() for line in Path(path).read_text().splitlines())
    return {row[0]: int(row[column]) for row in rows if len(row) > column and row[column].isdigit()}


def processes_of_ours() -> dict[int, str]:
    """Pids of this process and all below it: `python`, or the role of the native binary."""
    parents: dict[int, int] = {}
    roles: dict[int, str] = {}
    binary = os.fsencode(SubstrateConfig().binary_path)
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = Path(entry, "stat").read_text()
            arguments = Path(entry, "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        pid = int(entry.name)
        parents[pid] = int(stat.rpartition(")")[2].split()[1])
        roles[pid] = arguments[1].decode() if arguments[0] == binary else "other"
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    guests = {pid for pid in ours if roles.get(parents[pid]) == "spawner"}
    return {pid: "python" if pid == os.getpid() else "guests" if pid in guests else roles[pid] for pid in ours}


def memory_kib() -> dict[str, int]:
    """By several accounts, which overlap: the host's, and the shares that processes of ours have."""
    host = read_numbers("/proc/meminfo")
    found = {"host": host["MemTotal"] - host["MemAvailable"], "slab": host["Slab"], "page_tables": host["PageTables"]}
    for pid, role in processes_of_ours().items():
        try:
            share = read_numbers(f"/proc/{pid}/smaps_rollup")["Pss"]
        except OSError:
            continue
        found[role] = found.get(role, 0) + share
    return found


async def creation(host: Host, count: int) -> dict[str, Value]:
    """Creates a second with few and with `count` alive, and memory for each of those between.

    The first sandbox of a slot makes what the later ones use again.  That is in the rate on the way up, while each
    other rate is the best of some windows of the same slots.
    """
    await host.fill(FEW)
    at_few = [await host.window() for _ in range(WINDOWS)]
    before = await asyncio.to_thread(memory_kib)
    on_the_way = await host.fill(count)
    after = await asyncio.to_thread(memory_kib)
    at_count = [await host.window() for _ in range(WINDOWS)]
    await host.fill(FEW)
    at_few += [await host.window() for _ in range(WINDOWS)]
    refill = await host.fill(count)
    return {
        "creates_per_s_on_the_way": on_the_way,
        "creates_per_s_on_the_way_again": refill,
        **{f"kib_a_sandbox_{name}": (after[name] - before.get(name, 0)) / (count - FEW) for name in after},
        f"creates_per_s_at_{FEW}": max(at_few),
        f"creates_per_s_at_{count}": max(at_count),
        "creates_per_s_kept": max(at_count) / max(at_few),
    }


async def holding(host: Host, hold_s: float) -> dict[str, Value]:
    """All are held, and then each runs a command."""
    await asyncio.sleep(hold_s)
    answered: list[float] = []

    async def ask(index: int) -> None:
        started = time.perf_counter()
        if (await host.alive[index].exec(TRUE)).exit_code == 0:
            answered.append(time.perf_counter() - started)

    execs_per_s = await rate(len(host.alive), EXECS_IN_FLIGHT, ask)
    failed = len(host.alive) - len(answered)
    return {"exec_in_each_after_holding": spread(answered, failed), "execs_per_s_over_all": execs_per_s}


async def pausing(host: Host) -> dict[str, Value]:
    """Pause many, then resume them by a command."""
    chosen = host.alive[:PAUSES_COUNT_MAX]
    before = await asyncio.to_thread(memory_kib)
    figures: dict[str, Value] = {}

    async def timed(name: str, work: str) -> None:
        seconds: list[float] = []

        async def one(index: int) -> None:
            started = time.perf_counter()
            await (chosen[index].exec(TRUE) if work == "exec" else getattr(chosen[index], work)())
            seconds.append(time.perf_counter() - started)

        figures[f"{name}s_per_s"] = await rate(len(chosen), EXECS_IN_FLIGHT, one)
        figures[name] = spread(seconds)

    await timed("pause", "pause")
    after = await asyncio.to_thread(memory_kib)
    figures["kib_given_back_a_pause"] = (before["host"] - after["host"]) / len(chosen)
    await timed("resume", "resume")
    await timed("pause", "pause")
    await timed("resume_by_exec", "exec")
    return figures


async def forking(host: Host) -> dict[str, Value]:
    """A snapshot of a sandbox that wrote much, then many that go on from it, some of which read it all."""
    edge = host.substrate.edge
    source = await host.substrate.create(SandboxSpec())
    written = await source.exec(Command(argv=("/bin/bash", "-c", WRITE_UPPER), env={"PATH": "/usr/bin"}, timeout_s=60))
    started = time.perf_counter()
    await source.snapshot()
    snapshot_s = time.perf_counter() - started
    started = time.perf_counter()
    forks = [EdgeSandbox(edge, view.id) for view in await edge.fork(source.id, FORKS_COUNT)]
    fork_s = time.perf_counter() - started
    read = Command(argv=("/bin/bash", "-c", READ_UPPER), env={"PATH": "/usr/bin"}, timeout_s=60)
    results = [await one.exec(read) for one in forks[:FORKS_READ_COUNT]]
    equal = sum(result.stdout == written.stdout for result in results)
    await asyncio.gather(source.destroy(), *(one.destroy() for one in forks))
    return {
        f"snapshot_of_{UPPER_MIB}_mib_s": snapshot_s,
        f"fork_{FORKS_COUNT}_s": fork_s,
        "forks_equal_to_their_source": equal / FORKS_READ_COUNT,
    }


async def fill_host(count: int, hold_s: float) -> dict[str, Value]:
    """Everything but the cycles."""
    with tempfile.TemporaryDirectory(prefix="dsec-density-") as place:
        host = Host(Path(place), count)
        await host.open()
        try:
            figures = await creation(host, count)
            figures |= await holding(host, hold_s)
            figures |= await pausing(host)
            figures["destroys_per_s"] = await host.fill(0)
            figures |= await forking(host)
        finally:
            await host.close()
        return figures


def count_things(directory: Path) -> dict[str, float]:
    """What could be left behind, as the host counts it."""
    ours = processes_of_ours()
    fds = dict.fromkeys(("python", "spawner", "keeper"), 0)
    for pid, role in ours.items():
        if role in fds:
            fds[role] += len(os.listdir(f"/proc/{pid}/fd"))
    networks = set()
    for entry in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            networks.add(os.readlink(entry))
        except OSError:
            continue
    mounts = {f"mounts_{role}": _count_lines(f"/proc/{pid}/mountinfo") for pid, role in ours.items() if role in fds}
    parents = cgroup.parents(cgroup.detect(), SubstrateConfig().cgroup_parent)
    owned = [parent / cgroup.owner_name(pid) for pid, role in ours.items() if role == "spawner" for parent in parents]
    cgroups = sum(len(folders) for place in owned for _, folders, _ in os.walk(place))
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {
        "processes": len(ours),
        **{f"fds_{role}": count for role, count in fds.items()},
        **mounts,
        "cgroups": cgroups,
        "networks": len(networks),
        "files": len(files),
        "file_kib": sum(path.stat().st_blocks for path in files) / 2,
        "network_objects": read_numbers("/proc/slabinfo").get("net_namespace", 0),
        "memory_cgroups": read_numbers("/proc/cgroups", 2).get("memory", 0),
    }


def _count_lines(path: str) -> int:
    return len(Path(path).read_text().splitlines())


async def cycle(count: int) -> dict[str, Value]:
    """`count` times: make, run one command, destroy; and what is there before and after."""
    with tempfile.TemporaryDirectory(prefix="dsec-density-") as place:
        host = Host(Path(place), CREATES_IN_FLIGHT)
        await host.open()

        async def one(_: int) -> None:
            sandbox = await host.substrate.create(SandboxSpec())
            await sandbox.exec(TRUE)
            await sandbox.destroy()

        await rate(WINDOW_COUNT, CREATES_IN_FLIGHT, one)
        before, memory_before = count_things(host.directory), memory_kib()
        cycles_per_s = await rate(count, CREATES_IN_FLIGHT, one)
        after, memory_after = count_things(host.directory), memory_kib()
        await host.close()
    figures: dict[str, Value] = {"cycles": float(count), "cycles_per_s": cycles_per_s}
    for name, value in after.items():
        figures[f"more_{name}"] = float(value - before[name])
    for name in ("python", "spawner", "keeper", "slab"):
        figures[f"more_{name}_kib"] = float(memory_after.get(name, 0) - memory_before.get(name, 0))
    return figures


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description="Many sandboxes on one host.",
        epilog="example: python benchmarks/density.py --quick --json | python -m json.tool",
    )
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--count", type=int, help="sandboxes (200 with --quick, else 4000)")
    parser.add_argument("--hold-s", type=float, help="seconds that all of them are held (2 with --quick, else 60)")
    parser.add_argument("--cycles", type=int, help="make and destroy so many instead, and count what is left")
    arguments = parser.parse_args()
    count = arguments.count or (200 if arguments.quick else 4000)
    hold_s = arguments.hold_s if arguments.hold_s is not None else (2.0 if arguments.quick else 60.0)
    if count <= FEW:
        sys.exit(f"--count must be above {FEW}")
    figures = asyncio.run(cycle(arguments.cycles) if arguments.cycles else fill_host(count, hold_s))
    facts = {"sandboxes": str(arguments.cycles or count)}
    result: Result = {"figures": figures, "baselines": {}, "ratios": {}, "facts": facts}
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        render("density", result)


if __name__ == "__main__":
    main()
