"""Processes in masses: orphans that die by the hundred in one sandbox, and a host whose table of processes is full."""

from __future__ import annotations

import asyncio
import os
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsec.client.substrate import RemoteSubstrate
from dsec.conformance.check import ENV, python, shell
from dsec.edge.linux import cgroup
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.errors import ResourceExhaustedError
from dsec.types import Command, NetworkPolicy, NetworkRule, SandboxSpec

KERNEL = tuple(int(part) for part in platform.release().split(".")[:2])
PIDS_COUNT_MAX = 450
ROUNDS, ORPHANS = 8, 500
STORM = f"""
import os

for _ in range({ROUNDS}):
    (ready, told), (may_end, held) = os.pipe(), os.pipe()
    if os.fork() == 0:
        for _ in range({ORPHANS}):
            if os.fork() == 0:
                os.close(held)
                os.write(told, os.getpid().to_bytes(4, "little"))
                os.read(may_end, 1)
                os._exit(0)
        os._exit(0)
    os.wait()
    orphans = [int.from_bytes(os.read(ready, 4), "little") for _ in range({ORPHANS})]
    print(len(set(orphans)))
    for end in (ready, told, may_end, held):
        os.close(end)  # all of them end at once
    while any(os.path.exists("/proc/%d" % pid) for pid in orphans):
        os.sched_yield()
"""
FILL = """
import os, time
is_full = False
while True:
    try:
        if os.fork() == 0:
            time.sleep(1000)
    except OSError:
        if not is_full:
            print("full", flush=True)
        is_full = True
        time.sleep(0.01)
"""
"""Takes every process that there is, says so, and then each one that becomes free."""


async def test_orphans_that_die_by_the_hundred_are_all_reaped_and_their_sandbox_answers() -> None:
    substrate = ContainerSubstrate()
    await substrate.open()
    try:
        sandbox = await substrate.create(SandboxSpec(pids_count_max=ORPHANS + 100, memory_bytes=1 << 30))
        storm = asyncio.create_task(python(sandbox, STORM, timeout_s=300))
        while not storm.done():
            assert (await shell(sandbox, "echo ok-$((6*7))")).stdout.data == b"ok-42\n"
        assert (await storm).split() == [str(ORPHANS)] * ROUNDS
        left = await shell(sandbox, "ls -d /proc/[0-9]* | wc -l")
        assert int(left.stdout.data) <= 4  # pid 1, the shell and its two
    finally:
        await substrate.close()


class SmallHost:
    """`dsec edge serve` in a pid namespace that has so few process ids of its own."""

    def __init__(self, dsec: Any, directory: Path) -> None:
        self.url = f"unix:{directory}/edge.sock"
        serve = ("edge", "serve", "--directory", directory / "state", "--listen", self.url, "--destroy-on-exit")
        script = f"""echo {PIDS_COUNT_MAX} > /proc/sys/kernel/pid_max
            {shlex.join(map(str, (dsec.path, *serve)))} --json & trap "kill $!" TERM; wait; wait"""
        self.process = dsec.start("--pid", "--fork", "--mount-proc", "sh", "-c", script, command="unshare")
        assert self.process.stdout is not None
        assert self.process.stdout.readline(), self.process.communicate()
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        self.first_pid = int(children.read_text())

    def fill(self) -> subprocess.Popen[bytes]:
        """Programs of the host that take all process ids; in a session of their own."""
        enter = ("nsenter", "--target", str(self.first_pid), "--pid", "--", sys.executable, "-c", FILL)
        filler = subprocess.Popen(enter, stdout=subprocess.PIPE, start_new_session=True)
        assert filler.stdout is not None
        assert filler.stdout.readline() == b"full\n"
        return filler

    def stop(self) -> str:
        os.kill(self.first_pid, signal.SIGTERM)
        return str(self.process.communicate(timeout=120)[1])

    def kill(self) -> None:
        """With the first process of a pid namespace all others end."""
        if self.process.poll() is None:
            os.kill(self.first_pid, signal.SIGKILL)
            self.process.communicate()


@pytest.fixture
def host(dsec: Any, tmp_path: Path) -> Iterator[SmallHost]:
    host = SmallHost(dsec, tmp_path)
    yield host
    host.kill()


async def full_table(host: SmallHost, where: str) -> None:
    substrate = RemoteSubstrate(host.url)
    await substrate.open()
    greedy = await substrate.create(SandboxSpec(pids_count_max=2 * PIDS_COUNT_MAX))
    living, *others = [await substrate.create(SandboxSpec()) for _ in range(8)]
    await shell(living, "echo kept > /srv/file")
    echo = await living.start(Command(argv=("cat",), env=ENV, timeout_s=100, keep_stdin_open=True))
    network = NetworkPolicy(rules=(NetworkRule(host="a.example"),))

    if where == "in a sandbox":
        filler = await greedy.start(Command(argv=("python3", "-c", FILL), env=ENV, timeout_s=100))
        assert await filler.read_output("stdout", 0, 5) == b"full\n"
    else:
        outside = await asyncio.to_thread(host.fill)
    with pytest.raises(ResourceExhaustedError, match=r"could not be started \(fork\)"):
        await shell(living, "true")
    with pytest.raises(ResourceExhaustedError, match="no thread for a sandbox's network"):
        await living.update_network(network)
    creates = (substrate.create(SandboxSpec()) for _ in range(10))
    refused = await asyncio.gather(*creates, return_exceptions=True)
    assert [type(error) for error in refused] == [ResourceExhaustedError] * 10, refused
    assert "the host gives no more processes" in str(refused[0])
    await echo.write_stdin(b"still here\n")
    assert await echo.read_output("stdout", 0, 100) == b"still here\n"
    await asyncio.gather(*(sandbox.pause() for sandbox in others))
    await asyncio.gather(*(sandbox.destroy() for sandbox in others))

    if where == "in a sandbox":
        await filler.kill()
        assert (await filler.wait()).exit_code == 137
    else:
        os.killpg(outside.pid, signal.SIGKILL)
        await asyncio.to_thread(outside.communicate)
    fresh = await substrate.create(SandboxSpec(network=network))
    for sandbox in (fresh, greedy, living):
        assert (await shell(sandbox, "echo ok-$((6*7))")).stdout.data == b"ok-42\n"
    await living.update_network(network)
    assert (await shell(living, "cat /srv/file")).stdout.data == b"kept\n"
    await echo.close_stdin()
    assert (await echo.wait()).exit_code == 0
    await substrate.detach()
    assert host.stop() == "dsec: nothing is left\n"


if KERNEL >= (6, 14):  # an older kernel has one pid_max for all pid namespaces: the host's

    @pytest.mark.parametrize("where", ["in a sandbox", "beside the Edge"])
    async def test_a_full_table_of_processes_is_a_refusal_and_what_lives_goes_on(host: SmallHost, where: str) -> None:
        await full_table(host, where)


@pytest.mark.parametrize("room", [1, 4, 15])
def test_an_edge_that_gets_too_few_threads_says_so_and_ends(
    dsec: Any, cgroup_parent: str, tmp_path: Path, room: int
) -> None:
    found = cgroup.detect()
    few = found.limit_mounts.get("pids", found.unified) / cgroup_parent / "few"
    few.mkdir()
    (few / "pids.max").write_text(str(room))
    serve = (dsec.path, "edge", "serve", "--directory", tmp_path / "state", "--listen", f"unix:{tmp_path}/edge.sock")
    process = dsec.start("-c", f'echo $$ > {few}/cgroup.procs && exec "$0" "$@"', *serve, command="sh")
    try:
        err = process.communicate(timeout=120)[1]
    finally:
        cgroup.remove_tree(few)
    assert (process.returncode, f"the host gave {room - 1} of the" in err, "pids.max" in err) == (3, True, True), err
