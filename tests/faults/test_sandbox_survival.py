"""Sandboxes of a state directory live on without the process that made them, and none is left when nobody comes."""

import asyncio
import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsec.conformance.check import shell
from dsec.edge.config import SubstrateConfig
from dsec.edge.linux import cgroup
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.errors import ResourceExhaustedError, SandboxLostError, SpawnError, StateError
from dsec.types import SandboxId, SandboxSpec

pytestmark = pytest.mark.usefixtures("own_cgroups")

OWNER = """
import asyncio, json, os, signal, sys
from pathlib import Path
from dsec.conformance.check import shell
from dsec.edge.config import SubstrateConfig
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.types import SandboxId, SandboxSpec

def say(**facts):
    print(json.dumps(facts), flush=True)

async def create(count, first=0, spec=SandboxSpec()):
    made = await asyncio.gather(*(substrate.create(spec, SandboxId(f"box-{first + n}")) for n in range(count)))
    for sandbox in made:
        await shell(sandbox, f"echo {sandbox.id} > /root/name; setsid sleep 1000 >/dev/null 2>&1 </dev/null &")
    return made

async def main():
    global substrate
    substrate = ContainerSubstrate(SubstrateConfig(**json.loads(sys.argv[2])), state_dir=Path(sys.argv[1]))
    await substrate.open()
    say(spawner=substrate.spawner.pid, keeper=substrate.keeper.pid, name=substrate.spawner.name,
        adopted={sandbox.id: sandbox.host_pid for sandbox in substrate.adopted().values()})
%s
    await asyncio.Event().wait()

asyncio.run(main())
"""


class Owner:
    """Another process with a substrate of that directory; `body` runs there."""

    def __init__(self, state_dir: Path, body: str, **config: Any) -> None:
        program = OWNER % textwrap.indent(textwrap.dedent(body), "    ")
        arguments = [sys.executable, "-c", program, str(state_dir), json.dumps(config)]
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        self.facts = self.hear()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else {}

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def cgroups_named(name: str) -> list[Path]:
    places = cgroup.parents(cgroup.detect(), SubstrateConfig().cgroup_parent)
    return [parent / name for parent in places if (parent / name).exists()]


def members(name: str) -> set[int]:
    pids: set[int] = set()
    for directory in cgroups_named(name):
        for path, _, _ in os.walk(directory):
            with contextlib.suppress(OSError):
                pids |= {int(pid) for pid in Path(path, "cgroup.procs").read_text().split()}
    return pids


def wait_until_dead(pidfds: list[int], timeout_s: float = 20) -> None:
    for pidfd in pidfds:
        assert select.select([pidfd], [], [], timeout_s)[0], "a process lives on"
        os.close(pidfd)


def slots(name: str) -> set[str]:
    """Those with a sandbox; the cgroups of others may be kept for the next one."""
    tracker = cgroups_named(name)[0]
    return {path.name for path in tracker.glob("s*/") if "populated 1" in (path / "cgroup.events").read_text()}


async def reopen(state_dir: Path, **config: Any) -> ContainerSubstrate:
    substrate = ContainerSubstrate(SubstrateConfig(**config), state_dir=state_dir)
    await substrate.open()
    return substrate


@pytest.fixture
def state_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "state"
    assert not [name for name in os.listdir("/proc/self/fd") if f"{tmp_path}" in _target(name)]


def _target(name: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except OSError:
        return ""


async def test_a_killed_edge_is_followed_by_one_that_goes_on_with_its_sandboxes(state_dir: Path) -> None:
    owner = Owner(state_dir, "say(pids={s.id: s.host_pid for s in await create(3)})")
    made = owner.hear()["pids"]
    before = members(owner.facts["name"])
    owner.kill()
    substrate = await reopen(state_dir)
    assert (substrate.spawner.pid, substrate.spawner.name) == (owner.facts["spawner"], owner.facts["name"])
    adopted = substrate.adopted()
    assert {name: sandbox.host_pid for name, sandbox in adopted.items()} == made
    assert members(owner.facts["name"]) == before
    for name, sandbox in adopted.items():
        result = await shell(sandbox, "cat /root/name; pgrep -c sleep")
        assert result.stdout.data == f"{name}\n1\n".encode()
    with pytest.raises(StateError):
        await substrate.create(SandboxSpec(), SandboxId("box-0"))
    another = await substrate.create(SandboxSpec(), SandboxId("another"))
    assert (await shell(another, "pgrep -c sleep")).stdout.data == b"0\n"
    await substrate.adopted()[SandboxId("box-0")].destroy()
    assert set(substrate.adopted()) == {"box-1", "box-2"}
    assert len(slots(owner.facts["name"])) == 3
    keeper = os.pidfd_open(owner.facts["keeper"])
    await substrate.close()
    wait_until_dead([keeper])
    assert cgroups_named(owner.facts["name"]) == []


async def test_a_sandbox_survives_one_edge_after_another(state_dir: Path) -> None:
    owner = Owner(state_dir, "await create(1); say()")
    owner.hear()
    facts = owner.facts
    for generation in range(1, 4):
        owner.kill()
        owner = Owner(state_dir, f"await create(1, {generation}); say()")
        owner.hear()
        assert len(owner.facts["adopted"]) == generation
        assert [owner.facts[key] for key in ("spawner", "keeper")] == [facts[key] for key in ("spawner", "keeper")]
    owner.kill()
    substrate = await reopen(state_dir)
    names = {(await shell(sandbox, "cat /root/name")).stdout.data for sandbox in substrate.adopted().values()}
    assert names == {f"box-{n}\n".encode() for n in range(4)}
    await substrate.close()


async def test_detaching_leaves_the_sandboxes_to_the_next_open(
    state_dir: Path, descriptors: Callable[[], list[str]]
) -> None:
    def facts_count() -> int:
        return descriptors().count("/memfd:facts (deleted)")

    before = facts_count()
    first = await reopen(state_dir, warm_count=2)
    sandbox = await first.create(SandboxSpec())
    await shell(sandbox, "echo kept > /root/file")
    assert facts_count() == before + 1
    await first.detach()
    assert facts_count() == before, "the keeper has its own"
    with pytest.raises(SandboxLostError):
        await shell(sandbox, "true")
    second = await reopen(state_dir)
    assert list(second.adopted()) == [sandbox.id]
    same = second.adopted()[sandbox.id]
    assert same.host_pid == sandbox.host_pid
    assert (await shell(same, "cat /root/file")).stdout.data == b"kept\n"
    assert len(slots(second.spawner.name)) == 1, "what was made ahead is nobody's"
    await second.close()


async def test_detaching_with_no_sandbox_leaves_nothing(state_dir: Path) -> None:
    substrate = await reopen(state_dir, warm_count=2)
    assert substrate.keeper is not None
    await (await substrate.create(SandboxSpec())).destroy()
    name, pids = substrate.spawner.name, (substrate.spawner.pid, substrate.keeper.pid)
    await substrate.detach()
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
    assert cgroups_named(name) == []


async def test_a_spawner_has_as_many_slots_as_it_was_started_with(state_dir: Path) -> None:
    first = await reopen(state_dir, sandboxes_count_max=2)
    await first.create(SandboxSpec())
    await first.detach()
    second = await reopen(state_dir, sandboxes_count_max=9)
    await second.create(SandboxSpec())
    with pytest.raises(ResourceExhaustedError, match="all 2 sandboxes"):
        await second.create(SandboxSpec())
    await second.detach()
    third = await reopen(state_dir, sandboxes_count_max=1)
    assert len(third.adopted()) == 2
    with pytest.raises(ResourceExhaustedError):
        await third.create(SandboxSpec())
    await third.close()


async def test_a_killed_keeper_is_replaced_and_the_sandboxes_still_survive(state_dir: Path) -> None:
    body = """
    await create(2)
    pid = substrate.keeper.pid
    os.kill(pid, signal.SIGKILL)
    while substrate.keeper.pid == pid or substrate.keeper._healing.locked():  # until the new one has everything
        await asyncio.sleep(0)
    await create(1, 2)
    say(keeper=substrate.keeper.pid)
    """
    owner = Owner(state_dir, body)
    assert owner.hear()["keeper"] != owner.facts["keeper"]
    owner.kill()
    substrate = await reopen(state_dir)
    assert set(substrate.adopted()) == {"box-0", "box-1", "box-2"}
    await substrate.close()


async def test_a_killed_spawner_takes_its_sandboxes_along_and_is_replaced(state_dir: Path) -> None:
    owner = Owner(state_dir, "say(pids=[s.host_pid for s in await create(2)])")
    guests = [os.pidfd_open(pid) for pid in owner.hear()["pids"]]
    owner.kill()
    os.kill(owner.facts["spawner"], signal.SIGKILL)
    wait_until_dead(guests)
    substrate = await reopen(state_dir)
    assert substrate.adopted() == {}
    assert cgroups_named(owner.facts["name"]) == []
    os.kill(substrate.spawner.pid, signal.SIGKILL)
    sandbox = None
    while sandbox is None:
        with contextlib.suppress(SandboxLostError, SpawnError):
            sandbox = await substrate.create(SandboxSpec())
            assert (await shell(sandbox, "echo alive")).stdout.data == b"alive\n"
    await substrate.detach()
    later = await reopen(state_dir)
    assert list(later.adopted()) == [sandbox.id]
    await later.close()


@pytest.mark.parametrize("victims", [("keeper",), ("keeper", "spawner")])
def test_nothing_is_left_when_the_keeper_dies_with_the_edge(state_dir: Path, victims: tuple[str, ...]) -> None:
    owner = Owner(state_dir, "await create(2); say()")
    owner.hear()
    pidfds = [os.pidfd_open(pid) for pid in {owner.facts["spawner"], *members(owner.facts["name"])}]
    os.kill(owner.process.pid, signal.SIGSTOP)  # it must not heal
    for victim in victims:
        os.kill(owner.facts[victim], signal.SIGKILL)
    owner.kill()
    wait_until_dead(pidfds)
    cgroup.sweep(SubstrateConfig().cgroup_parent)
    assert cgroups_named(owner.facts["name"]) == []


def test_nothing_is_left_when_nobody_comes(state_dir: Path) -> None:
    owner = Owner(state_dir, "await create(2); say()", keep_s=1)
    owner.hear()
    pidfds = [os.pidfd_open(owner.facts[role]) for role in ("keeper", "spawner")]
    pidfds += [os.pidfd_open(pid) for pid in members(owner.facts["name"])]
    owner.kill()
    wait_until_dead(pidfds)
    assert cgroups_named(owner.facts["name"]) == []


async def test_a_sandbox_that_was_being_handed_out_when_its_edge_was_killed_is_none(state_dir: Path) -> None:
    """It has become what was asked for, and nobody has been told: it ends with the others that wait."""
    busy = """
    await create(1)
    await substrate._warm.filled()
    waiting = substrate._warm.ready[-1]

    async def stand_still(*_):
        say(pid=waiting.host_pid)
        await asyncio.Event().wait()

    waiting.seat.keep = stand_still
    await create(1, 7, SandboxSpec(hostname="late", memory_bytes=1 << 30))
    """
    owner = Owner(state_dir, busy, warm_count=2)
    guest = os.pidfd_open(owner.hear()["pid"])
    owner.kill()
    wait_until_dead([guest])
    substrate = await reopen(state_dir, warm_count=2)
    assert set(substrate.adopted()) == {"box-0"}
    assert len(slots(substrate.spawner.name)) == 1
    assert len(substrate.seats._free) == substrate.config.sandboxes_count_max - 1
    for _ in range(2):
        sandbox = await substrate.create(SandboxSpec())
        assert (await shell(sandbox, "hostname")).stdout.data == b"sandbox\n"
    await substrate.close()


async def test_an_edge_killed_at_any_moment_leaves_nothing_unknown(state_dir: Path) -> None:
    chance = random.Random(7)
    busy = """
    async def churn(first):
        for n in range(1000):
            mib = 64 + first % 3
            spec = SandboxSpec(hostname=f"h{mib}", memory_bytes=mib << 20, disk_bytes=32 << 20)
            (sandbox,) = await create(1, first + n, spec)
            if n % 2:
                await sandbox.destroy()
    say()
    await asyncio.gather(*(churn(k * 10_000 + os.getpid() * 100_000) for k in range(4)))
    """
    for _ in range(6):
        owner = Owner(state_dir, busy, warm_count=2)
        owner.hear()
        select.select([], [], [], chance.uniform(0.05, 0.5))  # the moment is the point
        owner.kill()
    substrate = await reopen(state_dir)
    for name, sandbox in list(substrate.adopted().items()):
        assert (await shell(sandbox, "cat /root/name || echo cut")).stdout.data in {f"{name}\n".encode(), b"cut\n"}
        assert (await shell(sandbox, "hostname")).stdout.data.decode() == f"{sandbox.spec.hostname}\n"
        assert sandbox.spec.hostname == f"h{sandbox.spec.memory_bytes >> 20}"
    count = len(substrate.adopted())
    assert count > 0
    assert len(slots(substrate.spawner.name)) == count
    assert len(substrate.seats._free) == substrate.config.sandboxes_count_max - count
    await asyncio.gather(*(sandbox.destroy() for sandbox in list(substrate.adopted().values())))
    assert slots(substrate.spawner.name) == set()
    assert set(substrate.keeper._held) == {f"spawner/{substrate.spawner.pid}/{substrate.spawner.name}"}
    name = substrate.spawner.name
    await substrate.close()
    assert cgroups_named(name) == []
