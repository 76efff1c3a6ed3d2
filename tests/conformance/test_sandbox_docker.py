"""Docker's containers behave as every sandbox must, but for what the substrate says that it lacks."""

import asyncio
from collections.abc import AsyncIterator

import docker
import pytest
import pytest_asyncio

from dsec.conformance.check import Check, line, shell
from dsec.conformance.suite import checks_for
from dsec.edge.substrates.docker import DOCKER_LACKS, DockerConfig, DockerSubstrate
from dsec.errors import HostUnfitError, InvalidArgumentError, SandboxLostError
from dsec.types import LayerId, SandboxSpec

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
    await substrate.settled()
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


async def test_nobody_inside_reaches_the_edge_by_the_socket(substrate: DockerSubstrate) -> None:
    sandbox = await substrate.create(SandboxSpec())
    knock = "import socket\ns = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\ns.connect('/.dsec/edge')"
    result = await shell(sandbox, f'python3 -c "{knock}"; echo x > /.dsec/init; rm /.dsec/init; mv /.dsec /x')
    assert b"ConnectionRefusedError" in result.stderr.data
    assert result.exit_code != 0
    assert await line(sandbox, "echo alive") == "alive"
    await sandbox.destroy()


async def test_layers_that_were_not_made_upon_each_other_are_refused(substrate: DockerSubstrate) -> None:
    made: list[LayerId] = []
    for name in ("one", "two"):
        sandbox = await substrate.create(SandboxSpec())
        await line(sandbox, f"echo {name} > /srv/f")
        made.append(await sandbox.snapshot())
        await sandbox.destroy()
    with pytest.raises(InvalidArgumentError, match="not made upon"):
        await substrate.create(SandboxSpec(layers=(made[0], made[1])))


async def test_a_host_without_docker_is_unfit_and_told_what_to_do() -> None:
    with pytest.raises(HostUnfitError, match="start dockerd"):
        await DockerSubstrate(DockerConfig(url="unix:///no/such/socket")).open()
