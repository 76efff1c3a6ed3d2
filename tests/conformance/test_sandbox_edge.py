"""Sandboxes of an Edge in the caller's own process behave as those of the host.

What is checked is what lies between: the calls of the port.  What a sandbox is inside does not depend on
who asks, and is checked in test_sandbox_container.py and, behind an Edge, in test_sandbox_remote.py.
"""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from dsec.conformance.check import Check
from dsec.edge.edge_config import EdgeConfig
from dsec.edge.local import EdgeSubstrate
from dsec.edge.main import make_substrate
from dsec.edge.service import Edge
from dsec.testing import SANDBOX_CHECKS

INSIDE = {"archives", "files", "isolation", "network", "resources", "users"}
CALLS = [check for check in SANDBOX_CHECKS if check.run.__module__.rpartition(".")[2] not in INSIDE]

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def substrate(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EdgeSubstrate]:
    directory, config = tmp_path_factory.mktemp("edge"), EdgeConfig(log_sync="os")
    edge = EdgeSubstrate(Edge(directory, await make_substrate("container", directory, config), config))
    await edge.open()
    yield edge
    await edge.close()


@pytest.mark.parametrize("check", CALLS, ids=lambda check: check.name)
async def test_a_sandbox_of_an_edge_in_process_conforms(substrate: EdgeSubstrate, check: Check) -> None:
    await check.run(substrate)
