"""Composition: an Edge of this host, what it is made of, and where it listens."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import msgspec

from dsec.edge.config import DockerConfig, SubstrateConfig
from dsec.edge.edge_config import EdgeConfig
from dsec.edge.grpc_server import Server, start_server
from dsec.edge.images.service import Images
from dsec.edge.images.store import LayerStore
from dsec.edge.service import Edge
from dsec.edge.threads import start_threads
from dsec.errors import InvalidArgumentError
from dsec.listen import Certificate, Listen, make_listen
from dsec.sandbox import Substrate


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What `dsec edge serve` was asked for."""

    directory: Path
    urls: tuple[str, ...]
    token: str = ""
    certificate: Certificate | None = None
    substrate: str = "container"
    destroys_on_exit: bool = False


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """Said once every address is served."""

    urls: list[str]
    directory: str
    adopted: int
    pid: int


async def make_substrate(name: str, directory: Path, config: EdgeConfig) -> Substrate:
    """The substrate of that name, keeping what it needs below `directory`; not open yet."""
    if name == "docker":
        from dsec.edge.substrates.docker import DockerSubstrate

        docker_config = DockerConfig(sandboxes_count_max=config.sandboxes_count_max)
        return DockerSubstrate(docker_config, state_dir=directory)
    from dsec.edge.images.config import ImagesConfig
    from dsec.edge.substrates.container import ContainerSubstrate

    images = ImagesConfig()
    if "directory" not in images.model_fields_set:
        images = images.model_copy(update={"directory": directory / "images"})
    layers = images.store(config.disk_free_bytes_min)
    await layers.open()
    substrate_config = SubstrateConfig(sandboxes_count_max=config.sandboxes_count_max)
    return ContainerSubstrate(substrate_config, layers=layers, state_dir=directory)


def images_of(substrate: Substrate) -> Images | None:
    """What its sandboxes are made of by name, if it has a store of ours."""
    layers = getattr(substrate, "layers", None)
    return Images(layers) if isinstance(layers, LayerStore) else None


async def serve(options: ServeOptions, tell: Callable[[Ready], None], tell_left: Callable[[int], None]) -> None:
    """Serve until SIGINT or SIGTERM.

    `tell_left` hears how many sandboxes live on, after a start that failed too: only a signal ends what an earlier
    Edge has left.  InvalidArgumentError for an address that cannot be, before anything is touched.
    """
    listens = [make_listen(url, options.token, options.certificate) for url in options.urls]
    await start_threads()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        options.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgumentError(f"cannot keep state in {options.directory}: {error.strerror}") from error
    config = EdgeConfig()
    substrate = await make_substrate(options.substrate, options.directory, config)
    edge = Edge(options.directory, substrate, config)
    await edge.open()
    try:
        await _serve(edge, images_of(substrate), listens, options, stop, tell)
        if options.destroys_on_exit:
            await edge.close()
    finally:
        left = len(edge.list())
        await edge.detach()
        tell_left(left)


async def _serve(
    edge: Edge,
    images: Images | None,
    listens: list[Listen],
    options: ServeOptions,
    stop: asyncio.Event,
    tell: Callable[[Ready], None],
) -> None:
    servers: list[Server] = []
    try:
        for listen in listens:
            server = await start_server(edge, listen, images)
            servers.append(server)
        living = len(edge.list({}))
        urls = [server.url for server in servers]
        tell(Ready(urls=urls, directory=str(options.directory), adopted=living, pid=os.getpid()))
        await stop.wait()
    finally:
        await asyncio.gather(*(server.stop() for server in servers))
