"""What the spawner makes a sandbox of: layers that mean harm, mounts that are counted, networks that are used again."""

import asyncio
import contextlib
import os
import select
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dsec.conformance.check import shell
from dsec.edge.config import SubstrateConfig
from dsec.edge.images.store import LayerStore
from dsec.edge.linux import cgroup
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.errors import InvalidArgumentError, NotFoundError, SpawnError
from dsec.types import LayerId, NetworkPolicy, NetworkRule, SandboxSpec


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[LayerStore]:
    made = LayerStore(tmp_path / "store")
    await made.open()
    yield made
    made.close()


async def layer(store: LayerStore, tmp_path: Path, name: str, files: dict[str, str], links: dict[str, str]) -> LayerId:
    root = tmp_path / name
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)
    for path, target in links.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).symlink_to(target)
    return await store.add_directory(root)


@contextlib.asynccontextmanager
async def opened(**options: object) -> AsyncIterator[ContainerSubstrate]:
    substrate = ContainerSubstrate(**options)  # type: ignore[arg-type]
    await substrate.open()
    try:
        yield substrate
    finally:
        await substrate.close()


def mounts_of(pid: int) -> list[str]:
    """Of layers, below the spawner's root."""
    lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    return [line.split()[4] for line in lines if line.split()[4].startswith("/base/layers/")]


@pytest.mark.parametrize("place", ["dev", "proc", "tmp", "sys"])
@pytest.mark.parametrize("target", ["/", "/base", "/work", "../../base/usr", "/root/tmp"])
async def test_a_layer_cannot_lead_a_mount_elsewhere(
    store: LayerStore, tmp_path: Path, place: str, target: str
) -> None:
    bad = await layer(store, tmp_path, "bad", {"etc/motd": "x"}, {place: target})
    async with opened(layers=store) as substrate:
        with pytest.raises(SpawnError, match="look at /dev, /proc, /sys and /tmp"):
            await substrate.create(SandboxSpec(base="", layers=(bad,)))
        good = await substrate.create(SandboxSpec())
        assert (await shell(good, "echo well")).stdout.data == b"well\n"


async def test_a_layer_above_the_host_adds_and_replaces_and_cannot_hide_usr(store: LayerStore, tmp_path: Path) -> None:
    tools = await layer(
        store,
        tmp_path,
        "tools",
        {"usr/local/bin/tool": "#!/bin/sh\necho tool\n", "etc/passwd": "root:x:0:0:me:/:\n"},
        {},
    )
    (tmp_path / "tools/usr/local/bin/tool").chmod(0o755)
    tools = await store.add_directory(tmp_path / "tools")
    odd = await layer(store, tmp_path, "odd", {"opt/odd": "odd\n"}, {"usr": "/proc"})
    async with opened(layers=store) as substrate:
        sandbox = await substrate.create(SandboxSpec(layers=(odd, tools)))
        result = await shell(
            sandbox, "tool; cat /etc/passwd /opt/odd; stat -c '%F %u' /usr; test -e /bin/bash && id -u"
        )
        assert result.stdout.data == b"tool\nroot:x:0:0:me:/:\nodd\ndirectory 0\n0\n"
        result = await shell(sandbox, "rm -r /usr/local/bin && echo x > /usr/bin/new && ! ls -d /usr/local/bin")
        assert result.exit_code == 0
        disk = Path(f"/proc/{sandbox.host_pid}/fd/6/root")
        assert (disk / "usr/bin/new").read_text() == "x\n"
        assert disk.stat().st_uid == sandbox.seat.first_uid
        other = await substrate.create(SandboxSpec(layers=(odd, tools)))
        assert (await shell(other, "tool; ls /usr/bin/new")).stdout.data == b"tool\n"


async def test_a_layer_is_mounted_once_and_let_go_when_nobody_uses_it(store: LayerStore, tmp_path: Path) -> None:
    layers = tuple([await layer(store, tmp_path, f"l{n}", {f"opt/{n}": str(n)}, {}) for n in range(5)])
    async with opened(config=SubstrateConfig(layer_idle_s=0.0), layers=store) as substrate:
        specs = [SandboxSpec(layers=layers[n:]) for n in range(5)]
        made = await asyncio.gather(*(substrate.create(spec) for spec in specs * 3))
        assert len(mounts_of(substrate.spawner.pid)) == 5
        assert (await shell(made[0], "cat /opt/*")).stdout.data == b"01234"
        for sandbox in made[1:]:
            await sandbox.destroy()
        assert len(mounts_of(substrate.spawner.pid)) == 5
        mounts = substrate.seats.mounts
        await made[0].destroy()
        while mounts._timers or mounts._tasks:
            await asyncio.gather(*mounts._tasks)
            await asyncio.sleep(0)
        assert mounts_of(substrate.spawner.pid) == []
        again = await substrate.create(specs[3])
        assert (await shell(again, "cat /opt/*")).stdout.data == b"34"


async def test_what_is_no_layer_leaves_no_sandbox(store: LayerStore, tmp_path: Path) -> None:
    good = await layer(store, tmp_path, "good", {"opt/x": "x"}, {})
    missing = LayerId("sha256:" + "0" * 64)
    damaged = await layer(store, tmp_path, "damaged", {"opt/y": "y"}, {})
    with store.path(damaged).open("r+b") as file:
        file.write(bytes(8192))
    async with opened(config=SubstrateConfig(sandboxes_count_max=1), layers=store) as substrate:
        with pytest.raises(NotFoundError):
            await substrate.create(SandboxSpec(layers=(good, missing)))
        with pytest.raises(SpawnError, match="mount a layer"):
            await substrate.create(SandboxSpec(layers=(damaged, good)))
        for spec in (SandboxSpec(base=""), SandboxSpec(layers=(good, good)), SandboxSpec(cpu_weight=0)):
            with pytest.raises(InvalidArgumentError):
                await substrate.create(spec)
        sandbox = await substrate.create(SandboxSpec(layers=(good,)))
        assert (await shell(sandbox, "cat /opt/x")).stdout.data == b"x"
    async with opened() as substrate:
        with pytest.raises(NotFoundError):
            await substrate.create(SandboxSpec(layers=(good,)))


async def test_layers_are_adopted_with_their_sandboxes(store: LayerStore, tmp_path: Path) -> None:
    used, unused, fresh = [await layer(store, tmp_path, f"l{n}", {f"opt/{n}": str(n)}, {}) for n in range(3)]
    first = ContainerSubstrate(layers=store, state_dir=tmp_path / "state")
    await first.open()
    sandbox = await first.create(SandboxSpec(layers=(used,)))
    await (await first.create(SandboxSpec(layers=(unused,)))).destroy()
    await first.detach()
    async with opened(config=SubstrateConfig(layer_idle_s=0.0), layers=store, state_dir=tmp_path / "state") as second:
        adopted = second.adopted()[sandbox.id]
        assert (await shell(adopted, "cat /opt/*")).stdout.data == b"0"
        both = await second.create(SandboxSpec(layers=(fresh, used)))
        assert (await shell(both, "cat /opt/*")).stdout.data == b"02"
        mounts = second.seats.mounts
        while mounts._timers or mounts._tasks:
            await asyncio.gather(*mounts._tasks)
            await asyncio.sleep(0)
        assert len(mounts_of(second.spawner.pid)) == 2, "the unused one went"
        keeper = os.pidfd_open(second.keeper.pid)
    assert store._held == {}
    assert select.select([keeper], [], [], 0)[0], "nothing was left for it to keep"
    os.close(keeper)


async def test_a_network_is_used_again_only_when_it_is_clean() -> None:
    async with opened(config=SubstrateConfig(sandboxes_count_max=2)) as substrate:

        async def born(script: str = "true", network: NetworkPolicy | None = None) -> str:
            sandbox = await substrate.create(SandboxSpec(network=network or NetworkPolicy()))
            name = os.readlink(f"/proc/{sandbox.host_pid}/ns/net")
            result = await shell(sandbox, script)
            assert result.exit_code == 0, result.stderr.data
            await sandbox.destroy()
            return name

        await born()  # the one of the proof at `open` goes first
        clean = await born()
        names = [await born() for _ in range(4)]
        assert len({clean, *names}) <= 2, "spare ones are used"
        serve = (
            "python3 -c \"import socket; s = socket.create_server(('127.0.0.1', 80)); c = socket.create_connection("
            "('127.0.0.1', 80)); a, _ = s.accept(); a.close(); c.recv(1); c.close()\""
        )
        for _ in range(6):  # the server closes first: its port stays in TIME_WAIT, and must not be the next one's
            await born(serve)
        allowed = NetworkPolicy(rules=(NetworkRule(cidr="192.0.2.0/24"),))
        had_network = await born(network=allowed)
        assert had_network not in [await born() for _ in range(4)]


async def test_a_frozen_sandbox_can_be_destroyed_and_its_slot_is_not_frozen() -> None:
    async with opened(config=SubstrateConfig(sandboxes_count_max=1)) as substrate:
        sandbox = await substrate.create(SandboxSpec())
        await shell(sandbox, "setsid sh -c 'while :; do :; done' >/dev/null 2>&1 &")
        assert sandbox.seat.box.freeze()
        await sandbox.destroy()
        assert "populated 0" in (sandbox.seat.box.tracker / "cgroup.events").read_text()
        another = await substrate.create(SandboxSpec())
        assert (await shell(another, "pgrep -c sh; echo runs")).stdout.data == b"1\nruns\n"
        assert another.seat.box.freeze()
        another.seat.box.reclaim()
        another.seat.box.thaw()
        assert (await shell(another, "echo thawed")).stdout.data == b"thawed\n"
        assert another.seat.box.freeze()
        os.kill(substrate.spawner.pid, signal.SIGKILL)  # the frozen die, too, and `close` finds nothing


async def test_weights_are_written_where_the_host_has_them() -> None:
    async with opened() as substrate:
        sandbox = await substrate.create(SandboxSpec(cpu_weight=700))
        found = cgroup.detect()
        if "cpu" in found.unified_controllers:
            assert (sandbox.seat.box.tracker / "cpu.weight").read_text() == "700\n"
        else:
            place = found.v1["cpu"] / substrate.spawner.name / f"s{sandbox.seat.number}"
            assert (place / "cpu.shares").read_text() == "7168\n"
