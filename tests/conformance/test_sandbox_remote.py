"""Sandboxes behind an Edge and a connection behave as those of the host: the whole way, gRPC to guest."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from dsec.client.substrate import RemoteSubstrate
from dsec.conformance.check import Check
from dsec.edge.edge_config import EdgeConfig
from dsec.edge.grpc_server import start_server
from dsec.edge.main import make_substrate
from dsec.edge.service import Edge
from dsec.listen import make_listen
from dsec.testing import SANDBOX_CHECKS

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def substrate(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RemoteSubstrate]:
    directory = tmp_path_factory.mktemp("edge")
    url, config = f"unix:{directory}/edge.sock", EdgeConfig(log_sync="os")
    edge = Edge(directory, await make_substrate("container", directory, config), config)
    await edge.open()
    server = await start_server(edge, make_listen(url, "", None))
    remote = RemoteSubstrate(url)
    await remote.open()
    yield remote
    await remote.close()
    await server.stop()
    await edge.close()


@pytest.mark.parametrize("check", SANDBOX_CHECKS, ids=lambda check: check.name)
async def test_a_remote_sandbox_conforms(substrate: RemoteSubstrate, check: Check) -> None:
    await check.run(substrate)
