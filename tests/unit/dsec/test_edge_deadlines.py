"""Time: what expires, what a lease covers, what a jump of the clock does not do."""

import asyncio
import math
from typing import Any

import pytest

from dsec.edge.deadlines import STALE_COUNT_MAX, Deadlines
from dsec.errors import InvalidArgumentError, ResourceExhaustedError, StateError
from dsec.testing import FakeClock, FakeSandbox, FakeSubstrate
from dsec.types import Command, ExecResult, SandboxId, SandboxSpec
from dsec.views import CreateRequest

LS = Command(argv=("ls",))


async def settled(edge: Any) -> None:
    """Everything that is due has been looked at and done."""
    for _ in range(5):
        await asyncio.sleep(0)
    await edge._registry.settle()


async def test_a_sandbox_ends_when_its_lifetime_is_over_and_no_earlier(hosts: Any) -> None:
    edge = await hosts.edge()
    view = await edge.create(CreateRequest(lifetime_s=60.0))
    other = await edge.create(CreateRequest())
    hosts.clock.advance(59)
    await settled(edge)
    assert edge.get(view.id).state == "running"
    hosts.clock.advance(1)
    assert await hosts.gone(edge, view.id) == "expired_lifetime"
    assert edge.list() == [other]


async def test_an_idle_sandbox_ends_and_one_at_work_does_not(hosts: Any) -> None:
    may_end = asyncio.Event()

    async def wait(_sandbox: FakeSandbox, _command: Command) -> ExecResult:
        await may_end.wait()
        return ExecResult(exit_code=0)

    hosts.script = wait
    edge = await hosts.edge()
    view = await edge.create(CreateRequest(idle_timeout_s=10.0))
    assert view.expires_at_s == view.created_at_s + 10
    hosts.clock.advance(9)
    await edge.start(view.id, LS, "k")
    assert edge.get(view.id).expires_at_s is None
    for _ in range(5):
        hosts.clock.advance(9)
        await settled(edge)
    may_end.set()
    await edge.wait(view.id, "k")
    hosts.clock.advance(9)
    await settled(edge)
    assert edge.get(view.id).state == "running"
    hosts.clock.advance(1)
    assert await hosts.gone(edge, view.id) == "expired_idle"


async def test_time_in_pause_is_not_idle(hosts: Any) -> None:
    edge = await hosts.edge()
    view = await edge.create(CreateRequest(idle_timeout_s=10.0))
    await edge.pause(view.id)
    hosts.clock.advance(100)
    await settled(edge)
    assert edge.get(view.id).state == "paused"
    await edge.resume(view.id)
    hosts.clock.advance(9)
    await settled(edge)
    assert edge.get(view.id).state == "running"
    hosts.clock.advance(1)
    assert await hosts.gone(edge, view.id) == "expired_idle"


async def test_a_jump_of_the_wall_clock_moves_no_deadline(hosts: Any) -> None:
    edge = await hosts.edge()
    view = await edge.create(CreateRequest(lifetime_s=60.0))
    hosts.clock.wall_time_s += 1_000_000
    hosts.clock.advance(30)
    await settled(edge)
    hosts.clock.wall_time_s -= 3_000_000
    await hosts.kill(edge)
    edge = await hosts.edge()
    assert edge.get(view.id) == view
    hosts.clock.advance(30)
    assert await hosts.gone(edge, view.id) == "expired_lifetime"


async def test_deadlines_go_on_while_no_edge_is_there(hosts: Any) -> None:
    edge = await hosts.edge()
    life, idle, none = [
        await edge.create(request)
        for request in (CreateRequest(lifetime_s=60.0), CreateRequest(idle_timeout_s=50.0), CreateRequest())
    ]
    hosts.clock.advance(30)
    await edge.exec(idle.id, LS)
    await hosts.kill(edge)
    hosts.clock.advance(31)
    edge = await hosts.edge()
    assert await hosts.gone(edge, life.id) == "expired_lifetime"
    assert edge.get(idle.id).state == "running"
    hosts.clock.advance(19)
    assert await hosts.gone(edge, idle.id) == "expired_idle"
    assert edge.list() == [none]


async def test_a_lapsed_lease_ends_exactly_its_sandboxes(hosts: Any) -> None:
    edge = await hosts.edge()
    await edge.grant_lease("job", 1, 10.0)
    await edge.grant_lease("other", 1, 100.0)
    mine = [await edge.create(CreateRequest(owner="job", epoch=1)) for _ in range(3)]
    rest = [await edge.create(CreateRequest(owner="other", epoch=1)), await edge.create(CreateRequest())]
    hosts.clock.advance(9)
    await edge.grant_lease("job", 1, 10.0)
    hosts.clock.advance(9)
    await settled(edge)
    assert len(edge.list()) == 5
    hosts.clock.advance(1)
    assert [await hosts.gone(edge, view.id) for view in mine] == ["lease_lapsed"] * 3
    assert edge.list() == rest
    for call in (edge.grant_lease("job", 1, 10.0), edge.create(CreateRequest(owner="job", epoch=1))):
        with pytest.raises(StateError, match="ended"):
            await call


async def test_a_higher_epoch_ends_the_lower_one_and_is_the_only_one_that_creates(hosts: Any) -> None:
    edge = await hosts.edge()
    await edge.grant_lease("job", 1, 10.0)
    old = await edge.create(CreateRequest(owner="job", epoch=1))
    await edge.grant_lease("job", 2, 10.0)
    assert await hosts.gone(edge, old.id) == "lease_lapsed"
    for call in (
        edge.grant_lease("job", 1, 10.0),
        edge.create(CreateRequest(owner="job", epoch=1)),
        edge.create(CreateRequest(owner="job", epoch=3)),
        edge.create(CreateRequest(owner="nobody", epoch=1)),
    ):
        with pytest.raises(StateError):
            await call
    new = await edge.create(CreateRequest(owner="job", epoch=2))
    await edge.end_lease("job", 1)
    assert edge.list() == [new]
    await hosts.kill(edge)
    edge = await hosts.edge()
    with pytest.raises(StateError, match="not the newest"):
        await edge.create(CreateRequest(owner="job", epoch=1))
    await edge.end_lease("job", 2)
    await edge.end_lease("job", 2)
    assert edge.list() == []
    with pytest.raises(StateError):
        await edge.end_lease("job", 3)


async def test_a_lease_that_ran_out_while_no_edge_was_there_may_be_renewed_for_a_moment(hosts: Any) -> None:
    edge = await hosts.edge()
    await edge.grant_lease("a", 1, 10.0)
    await edge.grant_lease("b", 1, 10.0)
    kept, lapsed = [await edge.create(CreateRequest(owner=owner, epoch=1)) for owner in "ab"]
    await hosts.kill(edge)
    hosts.clock.advance(100)
    edge = await hosts.edge(lease_grace_s=5.0)
    await edge.grant_lease("a", 1, 10.0)
    hosts.clock.advance(5)
    assert await hosts.gone(edge, lapsed.id) == "lease_lapsed"
    assert edge.list() == [kept]


async def test_a_lease_that_ran_out_while_the_edge_stood_still_may_be_renewed_for_a_moment(hosts: Any) -> None:
    edge = await hosts.edge(lease_grace_s=5.0)
    await edge.grant_lease("a", 1, 10.0)
    await edge.grant_lease("b", 1, 10.0)
    kept, lapsed = [await edge.create(CreateRequest(owner=owner, epoch=1)) for owner in "ab"]
    hosts.clock.advance(18)  # from one turn of the loop to the next
    await settled(edge)
    await edge.grant_lease("a", 1, 10.0)  # lay in the socket
    hosts.clock.advance(4)
    await settled(edge)
    assert edge.list() == [kept, lapsed]
    hosts.clock.advance(1)
    assert await hosts.gone(edge, lapsed.id) == "lease_lapsed"
    assert edge.list() == [kept]


async def test_a_create_in_flight_whose_lease_lapses_leaves_nothing(hosts: Any) -> None:
    may_create, asked = asyncio.Event(), asyncio.Event()

    class Slow(FakeSubstrate):
        async def create(self, spec: SandboxSpec, sandbox_id: SandboxId | None = None) -> FakeSandbox:
            asked.set()
            await may_create.wait()
            return await super().create(spec, sandbox_id)

    edge = await hosts.edge(Slow(hosts.script, hosts.host))
    await edge.grant_lease("job", 1, 10.0)
    creating = asyncio.create_task(edge.create(CreateRequest(owner="job", epoch=1, request_id="r")))
    await asked.wait()
    hosts.clock.advance(10)
    await asyncio.sleep(0)
    await hosts.until(lambda: not edge._registry.ledger.leases["job"].is_live)
    may_create.set()
    with pytest.raises(StateError, match="has ended"):
        await creating
    assert hosts.host.sandboxes == {}
    assert edge.status().used["sandboxes_count"] == 0


@pytest.mark.parametrize(
    ("owner", "epoch", "ttl_s"),
    [
        ("", 1, 1.0),
        ("a", -1, 1.0),
        ("a", 1 << 63, 1.0),
        ("a", 1, 0.0),
        ("a", 1, math.nan),
        ("a", 1, 1e9),
        ("a\n", 1, 1.0),
    ],
)
async def test_a_lease_that_cannot_be_is_refused(hosts: Any, owner: str, epoch: int, ttl_s: float) -> None:
    edge = await hosts.edge()
    with pytest.raises(InvalidArgumentError):
        await edge.grant_lease(owner, epoch, ttl_s)


async def test_there_are_only_so_many_leases(hosts: Any) -> None:
    edge = await hosts.edge(leases_count_max=2)
    for owner in "ab":
        await edge.grant_lease(owner, 1, 10.0)
    with pytest.raises(ResourceExhaustedError, match="2 leases"):
        await edge.grant_lease("c", 1, 10.0)
    await edge.grant_lease("a", 2, 10.0)


async def test_forgotten_deadlines_cost_no_memory_and_moved_ones_hold() -> None:
    clock, seen = FakeClock(boot_s=0.0), []
    deadlines = Deadlines(clock, clock.boot_s, seen.append)
    for number in range(10 * STALE_COUNT_MAX):
        deadlines.put(str(number), 1e6 - number)
        deadlines.drop(str(number))
    assert len(deadlines._heap) <= STALE_COUNT_MAX + 1
    deadlines.put("moved", 1.0)
    deadlines.put("moved", 5.0)
    deadlines.put("b", 3.0)
    deadlines.start()
    for _ in range(6):
        clock.advance(1)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    await deadlines.stop()
    assert seen == ["b", "moved"]
