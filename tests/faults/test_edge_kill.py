"""The process that runs the Edge is killed with SIGKILL over real containers, and the next one goes on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dsec.edge.config import SubstrateConfig
from dsec.edge.service import Edge
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.errors import SandboxLostError, StateError
from dsec.types import Command, ExecResult
from dsec.views import CreateRequest

PROGRAM = """
import asyncio, json, sys
from pathlib import Path
from dsec.edge.config import SubstrateConfig
from dsec.edge.service import Edge
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.types import Command
from dsec.views import CreateRequest

def sh(line, **how):
    return Command(argv=("/bin/sh", "-c", line), env={"PATH": "/usr/bin:/bin"}, timeout_s=600.0, **how)

def say(**facts):
    print(json.dumps(facts), flush=True)

async def main():
    directory = Path(sys.argv[1])
    edge = Edge(directory, ContainerSubstrate(SubstrateConfig(keep_s=20.0), state_dir=directory))
    await edge.open()
%s
    await asyncio.Event().wait()

asyncio.run(main())
"""


def sh(line: str, **how: Any) -> Command:
    return Command(argv=("/bin/sh", "-c", line), env={"PATH": "/usr/bin:/bin"}, timeout_s=600.0, **how)


class Killed:
    """An Edge in a process of its own; `body` runs there and says facts; then it can be killed."""

    def __init__(self, directory: Path, body: str) -> None:
        program = PROGRAM % textwrap.indent(textwrap.dedent(body), "    ")
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, str(directory)], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the Edge ended early"
        self.facts = json.loads(line)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[Any]:
    made: list[Killed] = []

    def make(body: str) -> Killed:
        made.append(Killed(tmp_path, body))
        return made[-1]

    yield make
    for one in made:
        if one.process.returncode is None:
            one.kill()


@asynccontextmanager
async def next_edge(directory: Path) -> AsyncIterator[Edge]:
    edge = Edge(directory, ContainerSubstrate(SubstrateConfig(keep_s=20.0), state_dir=directory))
    await edge.open()
    try:
        yield edge
    finally:
        await edge.close()


def out(result: ExecResult) -> str:
    return result.stdout.data.decode()


async def test_the_next_edge_has_the_same_sandbox_its_files_its_processes_and_its_results(
    killed: Any, tmp_path: Path
) -> None:
    first = killed(
        """
        box = (await edge.create(CreateRequest(request_id="r"))).id
        done = await edge.exec(box, sh("echo text > /root/file; date +%s%N; echo once >> /root/runs"), "done")
        wait = "while ! test -e /root/go; do sleep 0.05; done"
        await edge.start(box, sh(wait + "; echo went; echo once >> /root/runs; exit 7"), "slow")
        pid = await edge.exec(box, sh("sleep 1000 >/dev/null 2>&1 & echo $!"))
        say(box=box, done=done.stdout.data.decode(), pid=pid.stdout.data.decode())
        """
    )
    first.kill()
    box = first.facts["box"]
    async with next_edge(tmp_path) as edge:
        assert [view.id for view in edge.list()] == [box]
        assert (await edge.create(CreateRequest(request_id="r"))).id == box
        again = await edge.exec(box, sh("echo text > /root/file; date +%s%N; echo once >> /root/runs"), "done")
        assert out(again) == first.facts["done"]
        assert out(await edge.exec(box, sh(f"cat /root/file; kill -0 {first.facts['pid'].strip()} && echo alive"))) == (
            "text\nalive\n"
        )
        assert edge.commands(box)[1].state == "running"
        await edge.exec(box, sh("touch /root/go"))
        slow = await edge.wait(box, "slow")
        assert (slow.exit_code, out(slow)) == (7, "went\n")
        assert out(await edge.exec(box, sh("cat /root/runs"))) == "once\nonce\n"


async def test_a_killed_edge_leaves_no_half_made_sandbox_and_cancelled_ones_stay_away(
    killed: Any, tmp_path: Path
) -> None:
    first = killed(
        """
        creates = [asyncio.create_task(edge.create(CreateRequest(request_id=f"r{n}"))) for n in range(40)]
        made = [(await task).id for task in creates[:5]]
        await edge.cancel("r0")
        say(made=made)
        """
    )
    first.kill()
    async with next_edge(tmp_path) as edge:
        living = {view.id for view in edge.list()}
        assert set(first.facts["made"][1:]) <= living
        assert first.facts["made"][0] not in living
        assert living == {sandbox for sandbox in edge._registry.substrate.adopted() if sandbox in living}
        for number, made in enumerate(first.facts["made"][1:], 1):
            assert (await edge.create(CreateRequest(request_id=f"r{number}"))).id == made
        with pytest.raises(StateError):
            await edge.create(CreateRequest(request_id="r0"))


async def test_one_made_ahead_that_was_handed_out_and_not_answered_for_is_none(
    killed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSEC_EDGE_WARM_COUNT", "2")
    first = killed(
        """
        from dsec.types import SandboxSpec
        kept = (await edge.create(CreateRequest())).id
        substrate = edge._registry.substrate
        await substrate._warm.filled()
        create, waited = substrate.create, [box.host_pid for box in substrate._warm.ready]

        async def stand_still(*asked):
            box = await create(*asked)
            say(kept=kept, waited=waited, pid=box.host_pid)
            await asyncio.Event().wait()

        substrate.create = stand_still
        await edge.create(CreateRequest(spec=SandboxSpec(hostname="late", cpu_weight=300)))
        """
    )
    first.kill()
    assert first.facts["pid"] in first.facts["waited"]
    async with next_edge(tmp_path) as edge:
        assert [view.id for view in edge.list()] == [first.facts["kept"]]
        for pid in first.facts["waited"]:
            assert not Path(f"/proc/{pid}").exists()


async def test_a_paused_sandbox_stays_paused_and_wakes_for_the_next_request(killed: Any, tmp_path: Path) -> None:
    first = killed(
        """
        box = (await edge.create(CreateRequest())).id
        await edge.start(box, sh("sleep 0.2; echo slept"), "slow")
        await edge.pause(box)
        say(box=box)
        """
    )
    first.kill()
    box = first.facts["box"]
    async with next_edge(tmp_path) as edge:
        assert edge.get(box).state == "paused"
        assert out(await edge.wait(box, "slow")) == "slept\n"
        assert edge.get(box).state == "running"


async def test_a_second_edge_on_the_directory_is_refused_and_disturbs_nothing(killed: Any, tmp_path: Path) -> None:
    first = killed("say(box=(await edge.create(CreateRequest())).id)")
    with pytest.raises(StateError, match="another Edge"):
        async with next_edge(tmp_path):
            pass
    first.kill()
    async with next_edge(tmp_path) as edge:
        assert (await edge.exec(first.facts["box"], sh("true"))).exit_code == 0


async def test_a_sandbox_whose_first_process_is_killed_is_lost_and_said_so(tmp_path: Path) -> None:
    async with next_edge(tmp_path) as edge:
        box = (await edge.create(CreateRequest())).id
        running = asyncio.create_task(edge.exec(box, sh("sleep 100"), "k"))
        await edge.exec(box, sh("true"))
        live: Any = edge._registry.live[box]
        os.kill(live.sandbox.host_pid, signal.SIGKILL)
        with pytest.raises(SandboxLostError):
            await running
        await edge._registry.settle()
        assert edge.get(box).reason == "lost"
        assert edge.status().used["sandboxes_count"] == 0


async def test_a_sandbox_whose_first_process_is_killed_while_it_is_idle_is_seen_too(tmp_path: Path) -> None:
    async with next_edge(tmp_path) as edge:
        box = (await edge.create(CreateRequest())).id
        live: Any = edge._registry.live[box]
        os.kill(live.sandbox.host_pid, signal.SIGKILL)
        for _ in range(1_000_000):
            if box not in edge._registry.live:
                break
            await asyncio.sleep(0)
        assert edge.get(box).reason == "lost"
