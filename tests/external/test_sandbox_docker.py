"""Docker's containers behave as every sandbox must, but for what the substrate says that it lacks."""

import asyncio
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import docker
import pytest
import pytest_asyncio

from dsec.conformance.check import Check, line, script, shell
from dsec.conformance.suite import checks_for
from dsec.edge.config import DockerConfig
from dsec.edge.substrates.docker import DOCKER_LACKS, DockerSubstrate
from dsec.edge.substrates.docker_engine import check_docker
from dsec.errors import HostUnfitError, NotFoundError, ResourceExhaustedError, SandboxLostError
from dsec.types import SandboxId, SandboxSpec

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def substrate(docker_url: str) -> AsyncIterator[DockerSubstrate]:
    containers = DockerSubstrate(DockerConfig(url=docker_url))
    await containers.open()
    yield containers
    await containers.close()


def containers_of(url: str) -> list[str]:
    client = docker.APIClient(base_url=url, version="auto")
    try:
        return [container["Names"][0] for container in client.containers(all=True)]
    finally:
        client.close()


@pytest.mark.parametrize("check", checks_for(DOCKER_LACKS), ids=lambda check: check.name)
async def test_a_container_of_docker_conforms(substrate: DockerSubstrate, check: Check) -> None:
    await check.run(substrate)


async def test_a_destroyed_sandbox_leaves_no_container(substrate: DockerSubstrate, docker_url: str) -> None:
    before = containers_of(docker_url)
    sandboxes = await asyncio.gather(*(substrate.create(SandboxSpec()) for _ in range(4)))
    assert len(containers_of(docker_url)) == len(before) + 4
    await asyncio.gather(*(sandbox.destroy() for sandbox in sandboxes))
    assert containers_of(docker_url) == before
    assert list(substrate.directory.iterdir()) == []


async def test_a_cancelled_create_leaves_no_container(substrate: DockerSubstrate, docker_url: str) -> None:
    before = containers_of(docker_url)
    for turns in (1, 3, 10, 30):
        creating = asyncio.create_task(substrate.create(SandboxSpec()))
        for _ in range(turns):
            await asyncio.sleep(0)
        creating.cancel()
        await asyncio.gather(creating, return_exceptions=True)
    await asyncio.gather(*(sandbox.destroy() for sandbox in list(substrate._sandboxes.values())))
    assert containers_of(docker_url) == before


async def test_a_container_that_is_removed_behind_our_back_is_lost(substrate: DockerSubstrate, docker_url: str) -> None:
    sandbox = await substrate.create(SandboxSpec())
    running = asyncio.create_task(shell(sandbox, "sleep 300", timeout_s=600))
    await line(sandbox, "true")
    client = docker.APIClient(base_url=docker_url, version="auto")
    await asyncio.to_thread(client.remove_container, sandbox.name, force=True)
    client.close()
    with pytest.raises(SandboxLostError):
        await running
    with pytest.raises(SandboxLostError):
        await shell(sandbox, "true")
    await sandbox.destroy()


async def test_a_container_that_goes_on_behind_our_back_is_resumed_all_the_same(
    substrate: DockerSubstrate, docker_url: str
) -> None:
    """As after a call that Docker carried out, and whose answer never came."""
    sandbox = await substrate.create(SandboxSpec())
    client = docker.APIClient(base_url=docker_url, version="auto")
    await sandbox.pause()
    await asyncio.to_thread(client.unpause, sandbox.name)
    assert await line(sandbox, "echo on") == "on"
    await asyncio.to_thread(client.pause, sandbox.name)
    with pytest.raises(ResourceExhaustedError):
        await sandbox.pause()
    assert await line(sandbox, "echo on") == "on"
    client.close()
    await sandbox.destroy()


async def test_nobody_inside_reaches_the_edge_by_the_socket(substrate: DockerSubstrate) -> None:
    sandbox = await substrate.create(SandboxSpec())
    knock = "import socket\ns = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\ns.connect('/.dsec/edge')"
    result = await shell(sandbox, f'python3 -c "{knock}"; echo x > /.dsec/init; rm /.dsec/init')
    assert b"ConnectionRefusedError" in result.stderr.data
    assert result.exit_code != 0
    assert await line(sandbox, "echo alive") == "alive"
    await sandbox.destroy()


async def test_a_command_that_kills_its_supervisor_is_still_answered_and_timed(substrate: DockerSubstrate) -> None:
    sandbox = await substrate.create(SandboxSpec())
    result = await shell(sandbox, "kill -9 $PPID; echo still; exit 5")
    assert (result.exit_code, result.stdout.data) == (5, b"still\n")
    result = await shell(sandbox, "kill -9 -1; echo still; exit 6")
    assert (result.exit_code, result.stdout.data) == (6, b"still\n")
    result = await shell(sandbox, "kill -9 $PPID; sleep 300 & sleep 300", timeout_s=1)
    assert result.timed_out
    result = await shell(sandbox, "kill -STOP $PPID; sleep 300 & exit 7", timeout_s=1)
    assert (result.timed_out, result.exit_code) == (True, 137)
    assert await line(sandbox, "pgrep -c sleep || true") == "0"
    await sandbox.destroy()


async def test_a_command_that_kills_its_supervisor_at_its_first_step_runs_once_and_its_end_is_kept(
    substrate: DockerSubstrate,
) -> None:
    sandbox = await substrate.create(SandboxSpec())
    for _ in range(60):
        result = await shell(sandbox, "kill -9 -1; echo still; exit 6")
        assert (result.exit_code, result.stdout.data) == (6, b"still\n")
    await sandbox.destroy()


async def test_an_image_has_a_name_and_says_how_commands_run_but_not_what_docker_does(
    substrate: DockerSubstrate, docker_url: str
) -> None:
    client = docker.APIClient(base_url=docker_url, version="auto")
    name = "dsec-test/tools:1"
    container = client.create_container(substrate._image, ["true"])["Id"]
    changes = ["ENV A=b", "WORKDIR /var", "USER 7", "VOLUME /srv", "HEALTHCHECK CMD touch /tmp/checked"]
    client.commit(container, *name.split(":"), changes=changes)
    client.remove_container(container)
    made = await substrate.composed([name])
    assert (made.base, made.defaults.cwd, made.defaults.user) == ("", "/var", "7")
    assert made.defaults.env["A"] == "b"
    sandbox = await substrate.create(SandboxSpec(base="", layers=made.layers))
    assert await line(sandbox, "echo kept > /srv/f; grep -c ' /srv ' /proc/self/mountinfo || true") == "0"
    layer = await sandbox.snapshot()
    await sandbox.destroy()
    client.tag(layer, "dsec-test/after", "1")
    after = await substrate.composed(["dsec-test/after:1"])
    assert (after.base, after.layers) == ("", (layer, *made.layers))
    sandbox = await substrate.create(SandboxSpec(base="", layers=after.layers))
    assert await line(sandbox, "cat /srv/f") == "kept"
    await sandbox.destroy()
    with pytest.raises(NotFoundError):
        await substrate.composed(["dsec-test/no-such:1"])
    for tag in (name, "dsec-test/after:1"):
        client.remove_image(tag)
    client.close()


async def test_labels_that_are_not_ours_make_no_snapshot_of_an_image(
    substrate: DockerSubstrate, docker_url: str
) -> None:
    client = docker.APIClient(base_url=docker_url, version="auto")
    own = f"sha256:{'a' * 64}"
    labels = [("host", "99"), ("host", "9" * 5000), ("host", "0"), ("host", "\u0661"), ("host", "")]
    labels += [("host evil", "1"), (f"host {own}", "1"), (f"{own}  host", "1"), ("", "1"), (own.upper(), "1")]
    config = [{"Labels": {"dsec.below": below, "dsec.below.count": count}} for below, count in labels]
    config.append({"Labels": {"dsec.below": "host", "dsec.below.count": "1"}, "Healthcheck": {"Test": ["CMD", "true"]}})
    container = client.create_container(substrate._image, ["true"])["Id"]
    for one in config:
        made = client.commit(container, "dsec-test/labels", "1", conf=one)["Id"]
        composed = await substrate.composed(["dsec-test/labels:1"])
        assert (composed.base, composed.layers) == ("", (made,)), one
    for base in ("", "host"):
        async with substrate.layers.image_of(SandboxSpec(base=base, layers=composed.layers)) as image:
            found = await substrate.engine.find_image(image)
        assert found is not None
        assert "Healthcheck" not in found["Config"]
    client.remove_container(container)
    client.remove_image("dsec-test/labels:1")
    client.close()


async def test_layers_make_room_but_for_those_that_are_held_or_used(docker_url: str) -> None:
    small = DockerSubstrate(DockerConfig(url=docker_url, layers_count_max=1))
    await small.open()
    sandbox = await small.create(SandboxSpec())
    with small.holding() as hold:
        first = await sandbox.snapshot()
        second = await sandbox.snapshot()
        await hold([first, second])
        fork = await small.create(SandboxSpec(layers=(second,)))
        third = await sandbox.snapshot()
        await hold([first])
    await sandbox.snapshot()
    with small.holding() as hold:
        await hold([second])  # the fork lives on it
        for gone in (first, third):
            with pytest.raises(NotFoundError):
                await hold([gone])
    await fork.destroy()
    await small.close()


async def test_an_image_is_saved_once_for_all_of_its_layers(substrate: DockerSubstrate, docker_url: str) -> None:
    client = docker.APIClient(base_url=docker_url, version="auto")
    above = substrate._image
    for name in "abc":
        container = client.create_container(above, ["touch", f"/srv/{name}"], network_disabled=True)["Id"]
        client.start(container)
        client.wait(container)
        above = client.commit(container, "dsec-test/layers", "1", changes=["HEALTHCHECK CMD true"])["Id"]
        client.remove_container(container)
    lower = await substrate.create(SandboxSpec())
    await line(lower, "touch /srv/lowest")
    made = await substrate.composed(["dsec-test/layers:1"])
    spec = SandboxSpec(layers=(*made.layers, await lower.snapshot()))
    since = time.time()
    sandbox = await substrate.create(spec)
    assert await line(sandbox, "cd /srv; ls a b c lowest") == "a\nb\nc\nlowest"
    saved = client.events(since=since, until=time.time(), decode=True, filters={"type": "image", "event": "save"})
    assert [event["Actor"]["ID"] for event in saved].count(above) == 1
    await sandbox.destroy()
    await lower.destroy()
    client.remove_image("dsec-test/layers:1")
    client.close()


async def test_what_a_user_named_makes_no_room(docker_url: str) -> None:
    small = DockerSubstrate(DockerConfig(url=docker_url, layers_count_max=1))
    await small.open()
    client = docker.APIClient(base_url=docker_url, version="auto")
    sandbox = await small.create(SandboxSpec())
    named = await sandbox.snapshot()
    client.tag(named, "dsec-test/kept", "1")
    container = client.create_container(named, ["true"])["Id"]
    client.commit(container, "dsec-test/over", "1")  # its label is inherited
    client.remove_container(container)
    unnamed = await sandbox.snapshot()
    for _ in range(3):
        await sandbox.snapshot()
    assert (await small.composed(["dsec-test/kept:1"])).layers == (named,)
    await small.composed(["dsec-test/over:1"])
    with small.holding() as hold, pytest.raises(NotFoundError):
        await hold([unnamed])
    for tag in ("dsec-test/over:1", "dsec-test/kept:1"):
        client.remove_image(tag)
    client.close()
    await small.close()


async def test_a_stack_is_made_where_there_is_no_room_and_is_the_newest_then(docker_url: str) -> None:
    small = DockerSubstrate(DockerConfig(url=docker_url, layers_count_max=2))
    await small.open()
    sandbox = await small.create(SandboxSpec())
    layers = []
    for name in "ab":
        await line(sandbox, f"echo {name} > /srv/{name}")
        layers.append(await sandbox.snapshot())
    spec = SandboxSpec(layers=(layers[1], layers[0]))
    async with small.layers.image_of(spec) as stack:
        for _ in range(3):
            await sandbox.snapshot()
        assert stack.startswith("dsec-stack:")
        made = await small.create(spec)
    assert await line(made, "cat /srv/a /srv/b") == "a\nb"
    await made.destroy()
    async with small.layers.image_of(SandboxSpec(layers=layers)) as other:
        pass
    await sandbox.snapshot()
    assert await small.engine.find_image(stack) is None
    assert await small.engine.find_image(other) is not None
    await small.close()


async def test_a_hole_that_docker_would_write_out_is_refused(substrate: DockerSubstrate) -> None:
    sandbox = await substrate.create(SandboxSpec())
    await line(sandbox, "truncate -s 1T /srv/hole")
    with pytest.raises(ResourceExhaustedError, match="holes included"):
        await sandbox.snapshot()
    await line(sandbox, "truncate -s 1M /srv/hole")
    await sandbox.snapshot()
    await sandbox.destroy()


async def test_the_doctor_says_whose_root_a_containers_root_is(docker_url: str) -> None:
    (finding,) = await asyncio.to_thread(check_docker, DockerConfig(url=docker_url))
    assert (finding.name, finding.optional) == ("docker users", True)
    assert ("this host's root" in finding.detail) == (not finding.ok)
    assert check_docker(DockerConfig(url="unix:///no/such/socket")) == []


COMMAND = "echo one; until [ -e /tmp/go ]; do sleep 0.02; done; echo two"
EDGE = """
import asyncio, os, sys
from pathlib import Path
from dsec.conformance.check import script
from dsec.edge.config import DockerConfig
from dsec.edge.substrates.docker import DockerSubstrate
from dsec.types import SandboxId, SandboxSpec

async def main(command, url, state):
    substrate = DockerSubstrate(DockerConfig(url=url), state_dir=Path(state) if state else None)
    await substrate.open()
    sandbox = await substrate.create(SandboxSpec(), SandboxId("kept"))
    process = await sandbox.start(script(command), 7)
    await process.read_output("stdout", 0, 4)
    print("ready", flush=True)
    await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


async def killed_edge(url: str, state: str) -> int:
    """An Edge that makes a sandbox, starts a command in it, and is killed; its pid."""
    edge = await asyncio.create_subprocess_exec(sys.executable, "-c", EDGE, COMMAND, url, state, stdout=subprocess.PIPE)
    assert edge.stdout is not None
    assert await edge.stdout.readline() == b"ready\n"
    edge.kill()
    await edge.wait()
    return edge.pid


async def test_a_sandbox_lives_on_when_its_edge_is_killed(docker_url: str, tmp_path: Path) -> None:
    await killed_edge(docker_url, str(tmp_path))
    (tmp_path / "spool" / "long-gone").mkdir()
    substrate = DockerSubstrate(DockerConfig(url=docker_url), state_dir=tmp_path)
    await substrate.open()
    try:
        assert [path.name for path in (tmp_path / "spool").iterdir()] == ["kept"]
        sandbox = substrate.adopted()[SandboxId("kept")]
        process = await sandbox.resume_process(7, script(COMMAND))
        assert process is not None
        await line(sandbox, "touch /tmp/go")
        assert (await process.wait()).stdout.data == b"one\ntwo\n"
    finally:
        await substrate.close()
    assert "/dsec-kept" not in containers_of(docker_url)


async def test_a_sandbox_without_a_keeper_ends_with_its_edge(docker_url: str) -> None:
    pid = await killed_edge(docker_url, "")
    client = docker.APIClient(base_url=docker_url, version="auto")
    with contextlib.suppress(docker.errors.NotFound):
        await asyncio.to_thread(client.wait, "dsec-kept", condition="removed")
    client.close()
    assert "/dsec-kept" not in containers_of(docker_url)
    later = DockerSubstrate(DockerConfig(url=docker_url))
    await later.open()
    await later.close()
    assert list(Path(tempfile.gettempdir()).glob(f"dsec-docker-{pid}.*")) == []


async def test_a_host_without_docker_is_unfit_and_told_what_to_do() -> None:
    with pytest.raises(HostUnfitError, match="start dockerd"):
        await DockerSubstrate(DockerConfig(url="unix:///no/such/socket")).open()
