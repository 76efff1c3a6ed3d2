"""A network policy that cannot be is refused whole: the old one stays, and the sandbox outlives the next start."""

from pathlib import Path

import pytest

from dsec.conformance.check import ENV
from dsec.edge.edge_config import EdgeConfig
from dsec.edge.main import make_substrate
from dsec.edge.service import Edge
from dsec.errors import InvalidArgumentError, StateError
from dsec.types import Command, NetworkPolicy, NetworkRule, SandboxSpec
from dsec.views import CreateRequest

CONFIG = EdgeConfig(sandboxes_count_max=8)
TAKE_PORT = (
    "import socket, time\n"
    "taken = socket.create_server(('127.0.0.1', 3128))\n"
    "print('taken', flush=True)\n"
    "time.sleep(600)\n"
)


async def open_edge(directory: Path) -> Edge:
    edge = Edge(directory, await make_substrate("container", directory, CONFIG), CONFIG)
    await edge.open()
    return edge


async def test_a_refused_policy_changes_nothing_and_costs_no_sandbox(tmp_path: Path) -> None:
    edge = await open_edge(tmp_path)
    sandbox = (await edge.create(CreateRequest(spec=SandboxSpec()))).id
    with pytest.raises(InvalidArgumentError):
        await edge.update_network(sandbox, NetworkPolicy(rules=(NetworkRule(cidr="x/y"),)))
    await edge.start(sandbox, Command(argv=("python3", "-c", TAKE_PORT), env=ENV, timeout_s=600), key="thief")
    assert await edge.read_output(sandbox, "thief", "stdout", 0, 6) == b"taken\n"
    with pytest.raises(StateError):
        await edge.update_network(sandbox, NetworkPolicy(rules=(NetworkRule(host="example.com"),)))
    assert edge.get(sandbox).spec.network == NetworkPolicy()
    await edge.detach()

    edge = await open_edge(tmp_path)
    assert (edge.get(sandbox).state, edge.get(sandbox).reason) == ("running", "")
    assert (await edge.exec(sandbox, Command(argv=("echo", "ok"), env=ENV))).stdout.data == b"ok\n"
    await edge.close()
