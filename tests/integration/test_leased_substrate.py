"""The sandboxes of a job at a served Edge: renewed while it is there, taken up by its next process, or ended."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from dsec.client.leased import LeasedSubstrate
from dsec.edge.edge_config import EdgeConfig
from dsec.edge.grpc_server import start_server
from dsec.edge.service import Edge
from dsec.listen import make_listen
from dsec.testing import FakeClock, FakeSubstrate
from dsec.types import Command, SandboxSpec

TTL_S = 0.3
TRUE = Command(argv=("true",))


class Host:
    """A served Edge on a clock that stands."""

    def __init__(self, directory: Path) -> None:
        self.clock = FakeClock()
        self.url = f"unix:{directory}/edge.sock"
        self.edge = Edge(directory, FakeSubstrate(), EdgeConfig(log_sync="os"), clock=self.clock)

    def job(self, name: str = "job") -> LeasedSubstrate:
        return LeasedSubstrate(self.url, lambda: {"run": name}, TTL_S)

    def expires_at_s(self) -> float:
        """Of the lease that lapses first."""
        return min(lease.expires_at_s for lease in self.edge._registry.ledger.leases.values() if lease.is_live)


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    host = Host(tmp_path)
    await host.edge.open()
    server = await start_server(host.edge, make_listen(host.url, "", None))
    yield host
    await server.stop()
    await host.edge.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - what is waited for is what a user would see, not an event
            await asyncio.sleep(0.002)


async def test_a_job_renews_its_lease_and_ends_with_its_sandboxes(host: Host) -> None:
    job = host.job()
    await job.open()
    await job.create(SandboxSpec())
    for _ in range(3):
        before = host.expires_at_s()
        host.clock.advance(TTL_S / 2)
        await until(lambda before=before: host.expires_at_s() > before)  # type: ignore[misc]
    assert len(host.edge.list({"run": "job"})) == 1
    await job.close()
    await job.close()
    assert host.edge.list() == []


async def test_the_next_process_takes_up_what_the_last_one_left_and_keeps_it(host: Host) -> None:
    first, other = host.job(), host.job("other")
    await first.open()
    sandbox = await first.create(SandboxSpec())
    await first.detach()
    await other.open()
    assert other.adopted() == {}
    second = host.job()
    await second.open()
    (adopted,) = second.adopted().values()
    assert adopted.id == sandbox.id
    host.clock.advance(TTL_S / 2)
    await until(lambda: host.expires_at_s() > host.edge._registry.now() + TTL_S / 2)
    host.clock.advance(TTL_S * 0.9)
    assert (await adopted.exec(TRUE)).exit_code == 0
    await second.close()
    await other.close()
    assert host.edge.list() == []


async def test_what_nobody_renews_ends_and_a_job_that_was_away_begins_anew(host: Host) -> None:
    job = host.job()
    await job.open()
    await job.create(SandboxSpec())
    host.clock.advance(1.5 * TTL_S)
    await until(lambda: host.edge.list() == [])

    made = await job.create(SandboxSpec())
    assert [view.id for view in host.edge.list({"run": "job"})] == [made.id]
    await job.close()
