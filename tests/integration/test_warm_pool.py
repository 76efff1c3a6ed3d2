"""What serves one sandbox after another: nothing tells those made ahead, or in used cgroups, from those made afresh."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from dsec.conformance.check import shell
from dsec.edge.config import SubstrateConfig
from dsec.edge.images.store import LayerStore
from dsec.edge.linux import cgroup
from dsec.edge.native_wire import Operation
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.edge.substrates.container_sandbox import ContainerSandbox
from dsec.errors import ResourceExhaustedError, SpawnError
from dsec.types import Command, Defaults, LayerId, NetworkPolicy, NetworkRule, SandboxSpec

ALLOWED = NetworkPolicy(rules=(NetworkRule(cidr="192.0.2.0/24"),))
SPECS = {
    "as they were made": {},
    "more memory": {"memory_bytes": 3 << 30, "disk_bytes": 1 << 30},
    "less memory": {"memory_bytes": 20 << 20, "disk_bytes": 4 << 20},
    "processor": {"cpu_cores": 0.25, "cpu_weight": 250, "pids_count_max": 19},
    "name": {"hostname": "other-name"},
    "network": {"network": ALLOWED},
    "image": {"defaults": Defaults(env={"A": "b", "PATH": "/bin"}, cwd="/tmp", user="7:8")},
    "all": {
        "memory_bytes": 64 << 20, "disk_bytes": 32 << 20, "cpu_cores": 3.0, "cpu_weight": 900, "pids_count_max": 40,
        "hostname": "x", "network": ALLOWED, "defaults": Defaults(cwd="/var"),
    },
}  # fmt: skip
ASK = """
hostname; pwd; id; env | sort; df -B1 --output=size,itotal,used,iused,target
stat -c '%n %A %u %g %t' /* /dev/* /dev/pts/*
grep -E '^(Cap|NoNewPrivs|Seccomp|Uid|Gid)' /proc/1/status /proc/self/status; cat /proc/self/limits /proc/self/cgroup
cut -d' ' -f5- /proc/self/mountinfo | sed -E 's/(shared|master):[0-9]+//'
"""


@contextlib.asynccontextmanager
async def opened(
    warm_count: int, count_max: int = 8, layers: LayerStore | None = None
) -> AsyncIterator[ContainerSubstrate]:
    config = SubstrateConfig(warm_count=warm_count, sandboxes_count_max=count_max)
    substrate = ContainerSubstrate(config, layers=layers)
    await substrate.open()
    try:
        yield substrate
    finally:
        await substrate.close()


async def filled(substrate: ContainerSubstrate) -> set[int]:
    """The first processes of what is ready, when no more is made."""
    await substrate._warm.filled()
    return {sandbox.host_pid for sandbox in substrate._warm.ready}


def limits(sandbox: ContainerSandbox) -> dict[str, str]:
    """Every file of its cgroups that a limit may be in, by what the kernel says of it."""
    found = cgroup.detect()
    places = cgroup.parents(found, sandbox._config.cgroup_parent)
    read = {}
    for step in cgroup.plan_sandbox(found, sandbox.seat.number, SandboxSpec()).operations:
        path = places[step.hierarchy] / sandbox.seat._seats.spawner.name / step.path
        if step.operation not in (Operation.MKDIR, Operation.CHOWN) and path.exists():
            read[step.path.partition("/")[2]] = path.read_text()
    return read


async def facts(sandbox: ContainerSandbox) -> list[str]:
    """What can be seen of a sandbox from inside and outside, and how much it can write."""
    seen = (await shell(sandbox, ASK)).stdout.data.decode().splitlines()
    written = await sandbox.exec(
        Command(argv=("sh", "-c", "cat /dev/zero > /var/f; stat -c %s /var/f; rm /var/f"), user="0", cwd="/")
    )
    assert b"No space left" in written.stderr.data
    return [*seen, written.stdout.data.decode(), *map(str, sorted(limits(sandbox).items())), repr(sandbox.spec)]


@pytest.mark.parametrize("changes", SPECS.values(), ids=SPECS)
async def test_what_was_made_ahead_is_what_was_asked_for(changes: dict[str, object]) -> None:
    spec = msgspec.structs.replace(SandboxSpec(), **changes)
    async with opened(1) as pool, opened(0) as plain:
        await (await pool.create(SandboxSpec())).destroy()
        ready = await filled(pool)
        attached, fresh = await pool.create(spec), await plain.create(spec)
        assert {attached.host_pid} == ready
        assert await facts(attached) == await facts(fresh)
        assert attached.spec == spec


async def test_what_waits_becomes_one_sandbox_each_and_makes_room() -> None:
    async with opened(2, count_max=3) as substrate:
        first = await substrate.create(SandboxSpec())
        ready = await filled(substrate)
        second = await substrate.create(SandboxSpec(memory_bytes=256 << 20, disk_bytes=64 << 20, network=ALLOWED))
        assert second.host_pid in ready
        assert len({first.id, second.id}) == 2
        await shell(first, "echo first > /tmp/x")
        assert (await shell(second, "cat /tmp/x; hostname")).stdout.data == b"sandbox\n"
        assert len(await filled(substrate)) == 1
        third = await substrate.create(SandboxSpec(hostname="third"))  # the last slot is a waiting one's
        with pytest.raises(ResourceExhaustedError):
            await substrate.create(SandboxSpec())
        for sandbox in (first, second, third):
            await sandbox.destroy()


async def test_one_that_died_while_it_waited_or_cannot_become_what_is_asked_for_is_made_afresh(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fail(_spec: SandboxSpec) -> None:
        raise SpawnError("resize the disk: no")

    async with opened(1) as substrate:
        await (await substrate.create(SandboxSpec())).destroy()
        for spoil in ("death", "refusal"):
            ready = await filled(substrate)
            (waiting,) = substrate._warm.ready
            if spoil == "death":
                await waiting.destroy()
            else:
                monkeypatch.setattr(waiting.seat, "attach", fail)
            made = await substrate.create(SandboxSpec(hostname=spoil))
            assert made.host_pid not in ready
            assert (await shell(made, "hostname")).stdout.data.decode() == f"{spoil}\n"
            assert waiting.id not in substrate._given or substrate._given[waiting.id] is made
            await made.destroy()
        await filled(substrate)
        assert len(substrate._sandboxes) == 1  # what waits


async def test_limits_of_a_sandbox_are_not_those_of_the_one_before_in_its_cgroups() -> None:
    """They stay with the slot, whatever the next one is to have: to end and make them costs most of a create."""

    async def born(substrate: ContainerSubstrate, spec: SandboxSpec) -> tuple[int, dict[str, str]]:
        sandbox = await substrate.create(spec)
        found = sandbox.seat.box.memory.stat().st_ino, limits(sandbox)
        await shell(sandbox, "cat /usr/bin/python3 /dev/zero > /tmp/f; sleep 100 & sleep 100 & sleep 100 &")
        await sandbox.destroy()
        return found

    plain, other = SandboxSpec(), SandboxSpec(memory_bytes=2 << 30, cpu_weight=300, cpu_cores=2, pids_count_max=9)
    small = SandboxSpec(memory_bytes=16 << 20, disk_bytes=8 << 20)
    async with opened(0, count_max=1) as substrate:
        first = await born(substrate, plain)
        assert await born(substrate, other) == (first[0], await limits_afresh(other))
        assert await born(substrate, small) == (first[0], await limits_afresh(small))
        assert await born(substrate, plain) == first


async def limits_afresh(spec: SandboxSpec) -> dict[str, str]:
    async with opened(0) as substrate:
        return limits(await substrate.create(spec))


async def test_another_root_is_made_afresh_and_ahead_once_it_was_asked_for_twice(tmp_path: Path) -> None:
    store = LayerStore(tmp_path / "store")
    await store.open()
    (tmp_path / "root/etc").mkdir(parents=True)
    (tmp_path / "root/etc/motd").write_text("layer\n")
    layered = SandboxSpec(layers=(LayerId(await store.add_directory(tmp_path / "root")),))
    async with opened(1, layers=store) as substrate:
        await (await substrate.create(SandboxSpec())).destroy()
        for hits in (False, False, True):
            ready = await filled(substrate)
            made = await substrate.create(msgspec.structs.replace(layered, hostname="x"))
            assert (made.host_pid in ready) is hits
            assert (await shell(made, "cat /etc/motd; hostname")).stdout.data == b"layer\nx\n"
            await made.destroy()
    store.close()
