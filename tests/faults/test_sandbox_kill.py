"""Whoever is killed, and however, nothing of a sandbox stays on the host."""

import asyncio
import contextlib
import gc
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dsec.conformance.check import shell
from dsec.edge.config import SubstrateConfig
from dsec.edge.edge_config import EdgeConfig
from dsec.edge.linux import cgroup
from dsec.edge.local import EdgeSubstrate
from dsec.edge.service import Edge
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.errors import ResourceExhaustedError, SandboxLostError, SpawnError
from dsec.types import SandboxId, SandboxSpec

pytestmark = pytest.mark.usefixtures("own_cgroups")

OWNER = """
import asyncio, os, sys, time
from dsec.conformance.check import shell
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.types import SandboxSpec

async def main():
    substrate = ContainerSubstrate()
    await substrate.open()
    sandboxes = [await substrate.create(SandboxSpec()) for _ in range(3)]
    for sandbox in sandboxes:
        await shell(sandbox, "setsid sleep 1000 & sleep 1000 &")
    exec(sys.argv[1])
    print(substrate.spawner.name, substrate.spawner.pid, *(s.host_pid for s in sandboxes), flush=True)
    await asyncio.gather(*(shell(s, "sleep 1000", timeout_s=1000) for s in sandboxes))

asyncio.run(main())
"""


def cgroups_named(name: str) -> list[Path]:
    places = cgroup.parents(cgroup.detect(), SubstrateConfig().cgroup_parent)
    return [parent / name for parent in places if (parent / name).exists()]


def members(directories: list[Path]) -> set[int]:
    pids: set[int] = set()
    for directory in directories:
        for path, _, _ in os.walk(directory):
            pids |= {int(pid) for pid in Path(path, "cgroup.procs").read_text().split()}
    return pids


def wait_until_dead(pidfds: list[int], timeout_s: float = 20) -> None:
    """A pidfd becomes readable when its process has ended."""
    for pidfd in pidfds:
        assert select.select([pidfd], [], [], timeout_s)[0], "a process lives on"
        os.close(pidfd)


class Owner:
    """Another Python process that owns three busy sandboxes."""

    def __init__(self, also: str = "") -> None:
        self.process = subprocess.Popen([sys.executable, "-c", OWNER, also], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        self.name, self.spawner_pid = words[0], int(words[1])
        self.pidfds = [os.pidfd_open(pid) for pid in {*map(int, words[1:]), *members(cgroups_named(self.name))}]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def owner() -> Iterator[Owner]:
    another = Owner()
    yield another
    another.kill()


def test_killing_the_owner_ends_its_sandboxes_and_their_cgroups(owner: Owner) -> None:
    assert len(owner.pidfds) >= 1 + 3 + 6
    owner.kill()
    wait_until_dead(owner.pidfds)
    assert cgroups_named(owner.name) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_spawner_that_is_asked_to_end_takes_everything_along(owner: Owner, number: signal.Signals) -> None:
    os.kill(owner.spawner_pid, number)
    wait_until_dead(owner.pidfds)
    assert cgroups_named(owner.name) == []


async def test_after_a_kill_of_the_whole_tree_the_next_open_sweeps_and_spares_the_living(owner: Owner) -> None:
    living = ContainerSubstrate()
    await living.open()
    sandbox = await living.create(SandboxSpec())
    os.kill(owner.spawner_pid, signal.SIGSTOP)  # it cannot clean up: the kill hits all at one moment
    owner.process.kill()
    os.kill(owner.spawner_pid, signal.SIGKILL)
    owner.process.wait()
    wait_until_dead(owner.pidfds)
    assert cgroups_named(owner.name), "the case needs leftovers"
    later = ContainerSubstrate()
    await later.open()
    assert cgroups_named(owner.name) == []
    assert (await shell(sandbox, "echo alive")).stdout.data == b"alive\n"
    await later.close()
    await living.close()
    assert cgroup.sweep(SubstrateConfig().cgroup_parent) == 0


async def test_sandboxes_that_a_killed_spawner_was_making_are_made_by_the_next() -> None:
    substrate = ContainerSubstrate()
    await substrate.open()
    dying, free_count = substrate.spawner, substrate.seats.free_count
    os.kill(dying.pid, signal.SIGSTOP)
    making = [asyncio.create_task(substrate.create(SandboxSpec(), SandboxId(f"made-{n}"))) for n in range(4)]
    while substrate.seats.free_count > free_count - 4:  # noqa: ASYNC110 - no event tells it
        await asyncio.sleep(0)
    os.kill(dying.pid, signal.SIGKILL)
    made = await asyncio.gather(*making)
    assert [sandbox.id for sandbox in made] == [f"made-{n}" for n in range(4)]
    assert [(await shell(each, "echo alive")).stdout.data for each in made] == [b"alive\n"] * 4
    await substrate.close()
    assert cgroups_named(dying.name) == []


async def test_a_killed_spawner_loses_its_sandboxes_and_is_replaced() -> None:
    substrate = ContainerSubstrate()
    await substrate.open()
    sandbox = await substrate.create(SandboxSpec())
    running = asyncio.create_task(shell(sandbox, "sleep 1000", timeout_s=1000))
    name = substrate.spawner.name
    await shell(sandbox, "until pgrep sleep; do :; done")
    pidfds = [os.pidfd_open(pid) for pid in members(cgroups_named(name))]
    assert len(pidfds) >= 2
    os.kill(substrate.spawner.pid, signal.SIGKILL)
    with pytest.raises(SandboxLostError):
        await running
    with pytest.raises(SandboxLostError):
        await shell(sandbox, "true")
    wait_until_dead(pidfds)
    others = await asyncio.gather(*(substrate.create(SandboxSpec()) for _ in range(4)))
    assert cgroups_named(name) == []
    for other in others:
        assert (await shell(other, "pgrep -c sleep")).stdout.data == b"0\n"
    await sandbox.destroy()
    assert (await shell(others[0], "echo alive")).stdout.data == b"alive\n"
    await substrate.close()
    with pytest.raises(SpawnError):
        await substrate.create(SandboxSpec())


def test_a_forked_child_of_the_owner_does_not_keep_its_sandboxes_alive() -> None:
    owner = Owner("os.fork() or time.sleep(1000)")
    main_thread = Path(f"/proc/{owner.process.pid}/task/{owner.process.pid}")
    (child,) = {int(pid) for pid in (main_thread / "children").read_text().split()} - {owner.spawner_pid}
    owner.kill()
    wait_until_dead(owner.pidfds)
    assert cgroups_named(owner.name) == []
    os.kill(child, signal.SIGKILL)


async def test_a_killed_guest_is_a_lost_sandbox_and_its_slot_is_used_again() -> None:
    substrate = ContainerSubstrate(SubstrateConfig(sandboxes_count_max=1))
    await substrate.open()
    sandbox = await substrate.create(SandboxSpec())
    with pytest.raises(ResourceExhaustedError):
        await substrate.create(SandboxSpec())
    running = asyncio.create_task(shell(sandbox, "sleep 1000", timeout_s=1000))
    await shell(sandbox, "until pgrep sleep; do :; done")
    os.kill(sandbox.host_pid, signal.SIGKILL)
    with pytest.raises(SandboxLostError):
        await running
    await sandbox.destroy()
    again = await substrate.create(SandboxSpec())
    assert (await shell(again, "pgrep -c sleep")).stdout.data == b"0\n"
    await substrate.close()


async def test_creates_cancelled_at_any_moment_leave_nothing(descriptors: Callable[[], list[str]]) -> None:
    chance = random.Random(5)
    substrate = ContainerSubstrate()
    await substrate.open()
    before = descriptors()
    loop = asyncio.get_running_loop()
    for _ in range(60):
        task = asyncio.create_task(substrate.create(SandboxSpec()))
        loop.call_later(chance.uniform(0, 0.006), task.cancel)
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        if not isinstance(outcome, BaseException):
            await outcome.destroy()
    await asyncio.gather(*(sandbox.destroy() for sandbox in list(substrate._sandboxes.values())))
    places = cgroups_named(substrate.spawner.name)
    assert members(places) == set()
    assert len(after := descriptors()) == len(before), (before, after)
    await substrate.close()


async def test_many_sandboxes_later_the_host_is_as_before(tmp_path: Path) -> None:
    def descriptors(pid: int) -> list[str]:
        found = []
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # the one of the listing
                found.append(os.readlink(f"/proc/{pid}/fd/{number}"))
        return found

    def census() -> dict[str, int]:
        """What our processes and the host hold for sandboxes, and the files but for the journal."""
        pids = {"edge": os.getpid(), "keeper": keeper_pid, "spawner": containers.spawner.pid}
        files = {f"descriptors of the {role}": len(descriptors(pid)) for role, pid in pids.items()}
        mounts = Path(f"/proc/{containers.spawner.pid}/mountinfo").read_text().splitlines()
        return files | {
            "processes": len(members(cgroups_named(name))),
            "mounts": len(mounts),
            "networks": sum(link.startswith("net:") for pid in pids.values() for link in descriptors(pid)),
            "cgroups": cgroup_count(),
            "files": sum(path.parent.name != "log" for path in tmp_path.rglob("*")),
        }  # fmt: skip

    def cgroup_count() -> int:
        return sum(1 for place in cgroups_named(name) for _ in place.glob("**/"))

    gc.collect()  # what tests before left to it would go in the midst of the count
    containers = ContainerSubstrate(state_dir=tmp_path / "state")
    substrate = EdgeSubstrate(Edge(tmp_path / "edge", containers, EdgeConfig(log_sync="os")))
    await substrate.open()
    assert containers.keeper is not None
    name, keeper_pid = containers.spawner.name, containers.keeper.pid
    kept = len(descriptors(keeper_pid))
    counts = []
    for _ in range(25):
        sandboxes = await asyncio.gather(*(substrate.create(SandboxSpec()) for _ in range(20)))
        await asyncio.gather(*(shell(sandbox, "sleep 100 & echo x > /tmp/x") for sandbox in sandboxes))
        await asyncio.gather(*(sandbox.destroy() for sandbox in sandboxes))
        async with asyncio.timeout(60):
            while len(descriptors(keeper_pid)) != kept:  # noqa: ASYNC110 - it has still to read what it was told
                await asyncio.sleep(0.002)
        # cgroups, user and network namespaces of the first twenty are kept for those that follow
        counts.append(census())
    print(counts[0])
    assert counts[1:] == counts[:1] * 24
    await substrate.close()
    assert cgroup_count() == 0


async def test_closing_ends_running_commands() -> None:
    substrate = ContainerSubstrate()
    await substrate.open()
    sandbox = await substrate.create(SandboxSpec())
    running = asyncio.create_task(shell(sandbox, "sleep 1000", timeout_s=1000))
    await shell(sandbox, "until pgrep sleep; do :; done")
    await asyncio.gather(substrate.close(), substrate.close())
    with pytest.raises(SandboxLostError):
        await running
