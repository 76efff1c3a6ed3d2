"""Containers behave as every sandbox must, and show nothing of this host.

Those that outlive their maker are in test_sandbox_remote.py, behind an Edge.
"""

import asyncio
import os
import resource
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from dsec.conformance.check import ENV, Check, shell
from dsec.edge.images.store import LayerStore
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.testing import SANDBOX_CHECKS
from dsec.types import Command, SandboxSpec

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def substrate(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ContainerSubstrate]:
    layers = LayerStore(tmp_path_factory.mktemp("layers"))
    await layers.open()
    containers = ContainerSubstrate(layers=layers)
    await containers.open()
    yield containers
    await containers.close()


@pytest.mark.parametrize("check", SANDBOX_CHECKS, ids=lambda check: check.name)
async def test_a_container_conforms(substrate: ContainerSubstrate, check: Check) -> None:
    await check.run(substrate)


async def test_files_and_environment_of_the_host_stay_outside(substrate: ContainerSubstrate) -> None:
    name = f"canary-{os.getpid()}"
    canaries = [Path(folder, name) for folder in ("/root", "/etc", "/tmp", "/var/tmp", "/home")]
    holder = await asyncio.create_subprocess_exec("/bin/sleep", "600", env={"DSEC_CANARY": name})
    try:
        for canary in canaries:
            canary.write_text(name)
        sandbox = await substrate.create(SandboxSpec())
        result = await shell(
            sandbox,
            f"exec 2>/dev/null; find / -xdev -name '{name}'; cat /proc/*/environ | tr '\\0' '\\n' | grep -a CANARY;"
            f"for up in /proc/1/root /proc/self/root ../../../..; do cat $up/etc/{name} $up/root/{name}; done;"
            f"ln -s /etc/{name} /tmp/link; cat /tmp/link; echo x > /tmp/link; echo end",
        )
        assert result.stdout.data == b"end\n"
        assert Path(f"/etc/{name}").read_text() == name
        await sandbox.destroy()
    finally:
        holder.kill()
        await holder.wait()
        for canary in canaries:
            canary.unlink(missing_ok=True)


async def test_no_namespace_is_shared_with_the_host(substrate: ContainerSubstrate) -> None:
    sandbox = await substrate.create(SandboxSpec())
    kinds = ("pid", "mnt", "net", "ipc", "uts", "user", "cgroup")
    result = await shell(sandbox, f"for kind in {' '.join(kinds)}; do readlink /proc/self/ns/$kind; done")
    inside = result.stdout.data.decode().split()
    outside = [os.readlink(f"/proc/self/ns/{kind}") for kind in kinds]
    assert len(inside) == len(kinds)
    assert not set(inside) & set(outside)
    await sandbox.destroy()


async def test_two_sandboxes_have_different_users_on_the_host(substrate: ContainerSubstrate) -> None:
    sandboxes = [await substrate.create(SandboxSpec()) for _ in range(2)]
    uids = {os.stat(f"/proc/{sandbox.host_pid}").st_uid for sandbox in sandboxes}
    maps = {(await shell(sandbox, "cat /proc/self/uid_map")).stdout.data.split()[1] for sandbox in sandboxes}
    assert len(maps) == len(uids) == 2
    assert min(uids) >= 0x10000000
    for sandbox in sandboxes:
        await sandbox.destroy()


async def test_the_view_inside_does_not_differ_from_sandbox_to_sandbox(substrate: ContainerSubstrate) -> None:
    script = (
        "hostname; cat /proc/self/cgroup /proc/self/mounts; ls -1 / /etc /dev; ls -n /; echo $$; env; ps -eo pid,args"
    )
    views = []
    for _ in range(3):
        sandbox = await substrate.create(SandboxSpec())
        views.append((await shell(sandbox, script.replace("ls -n /", "stat -c '%n %A %u %g' /*"))).stdout.data)
    assert views[0] == views[1] == views[2]
    assert b"dsec" not in views[0]
    for sandbox in list(substrate._sandboxes.values()):
        await sandbox.destroy()


async def test_a_process_has_so_many_descriptors_and_no_more(substrate: ContainerSubstrate) -> None:
    sandbox = await substrate.create(SandboxSpec())
    program = """
import errno, os, resource
def fill():
    fds = []
    try:
        while True: fds.append(os.dup(1))
    except OSError as error:
        print(errno.errorcode[error.errno], fds[-1] + 1)
    os.closerange(3, fds[-1] + 1)
fill()
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
fill()
try: resource.setrlimit(resource.RLIMIT_NOFILE, (hard + 1, hard + 1))
except (OSError, ValueError): print("no more")
"""
    result = await sandbox.exec(Command(argv=("python3", "-c", program), env=ENV))
    _, of_host = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = {65536, min(65536, of_host)}  # less only where the host has less, and lets nobody raise it
    assert result.stdout.data in {b"EMFILE 1024\nEMFILE %d\nno more\n" % hard for hard in allowed}, result
    await sandbox.destroy()
