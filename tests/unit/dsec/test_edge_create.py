"""Creating and ending: once for each request, or not at all, whatever comes between."""

import asyncio
import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from dsec.edge.history import read_trajectory
from dsec.edge.service import Edge
from dsec.errors import (
    DivergedError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    SandboxLostError,
    SpawnError,
    StateError,
)
from dsec.testing import FakeSandbox, FakeSubstrate
from dsec.types import Command, Composition, Defaults, LayerId, SandboxId, SandboxSpec
from dsec.views import CreateRequest

LS = Command(argv=("ls",))


class HeldSubstrate(FakeSubstrate):
    """Creates wait for the test."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.may_create = asyncio.Event()
        self.asked = asyncio.Event()

    async def create(self, spec: SandboxSpec, sandbox_id: SandboxId | None = None) -> FakeSandbox:
        self.asked.set()
        await self.may_create.wait()
        return await super().create(spec, sandbox_id)


class FailingSubstrate(FakeSubstrate):
    """The first creates fail."""

    failures_count = 1

    async def create(self, spec: SandboxSpec, sandbox_id: SandboxId | None = None) -> FakeSandbox:
        if self.failures_count:
            self.failures_count -= 1
            raise SpawnError("step clone: EAGAIN")
        return await super().create(spec, sandbox_id)


class LoudSubstrate(FakeSubstrate):
    """Its images have something to say."""

    async def composed(self, references: Sequence[str]) -> Composition:
        return Composition(layers=(), defaults=Defaults(env={name: name * 100_000 for name in references}))


async def test_what_images_say_is_bounded_with_the_request_and_not_written_down(hosts: Any) -> None:
    edge = await hosts.edge(LoudSubstrate(hosts.answer, hosts.host))
    lsn = edge._registry.log.lsn
    with pytest.raises(InvalidArgumentError, match="what its images say, has 30"):
        await edge.create(CreateRequest(spec=SandboxSpec(layers=("A", "B", "C"))))
    with pytest.raises(InvalidArgumentError, match="how commands of this sandbox or image run"):
        await edge.create(CreateRequest(spec=SandboxSpec(layers=("AB",))))
    assert edge._registry.log.lsn == lsn
    assert [used for used in edge._registry.admission.used.values() if used] == []
    assert (await edge.create(CreateRequest(spec=SandboxSpec(layers=("A",))))).spec.defaults.env["A"] == "A" * 100_000


async def test_a_sandbox_is_shown_as_it_was_asked_for(hosts: Any) -> None:
    edge = await hosts.edge()
    request = CreateRequest(labels={"job": "a"}, lifetime_s=60.0)
    view = await edge.create(request)
    assert (view.state, view.labels, view.commands_count) == ("running", {"job": "a"}, 0)
    assert view.expires_at_s == view.created_at_s + 60
    assert edge.get(view.id) == view
    assert edge.list() == edge.list({"job": "a"}) == [view]
    assert edge.list({"job": "b"}) == []


async def test_the_same_request_id_gives_the_same_sandbox_also_to_many_at_once(hosts: Any) -> None:
    edge = await hosts.edge()
    views = await asyncio.gather(*(edge.create(CreateRequest(request_id="r")) for _ in range(20)))
    assert len({view.id for view in views}) == len(hosts.host.sandboxes) == 1
    await edge.destroy(views[0].id)
    again = await edge.create(CreateRequest(request_id="r"))
    assert (again.id, again.state, again.reason) == (views[0].id, "ended", "destroyed")


async def test_a_request_id_that_was_used_for_another_request_is_refused(hosts: Any) -> None:
    edge = await hosts.edge()
    await edge.create(CreateRequest(request_id="r"))
    with pytest.raises(DivergedError, match="'r'"):
        await edge.create(CreateRequest(request_id="r", labels={"a": "b"}))
    assert len(hosts.host.sandboxes) == 1


async def test_a_create_that_fails_leaves_nothing_and_its_request_id_may_be_used_again(hosts: Any) -> None:
    edge = await hosts.edge(FailingSubstrate(hosts.script, hosts.host))
    with pytest.raises(SpawnError, match="clone"):
        await edge.create(CreateRequest(request_id="r"))
    used = edge.status().used
    assert [used[name] for name in ("sandboxes_count", "memory_bytes", "pids_count")] == [0, 0, 0]
    assert edge.list() == []
    assert (await edge.create(CreateRequest(request_id="r"))).state == "running"


async def test_a_caller_without_request_id_that_goes_away_leaves_no_sandbox(hosts: Any) -> None:
    substrate = HeldSubstrate(hosts.script, hosts.host)
    edge = await hosts.edge(substrate)
    creating = asyncio.create_task(edge.create(CreateRequest()))
    await substrate.asked.wait()
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating
    await edge._registry.settle()
    assert hosts.host.sandboxes == {}
    assert edge.status().used["sandboxes_count"] == 0


async def test_a_caller_without_request_id_leaves_no_sandbox_in_whichever_turn_of_the_loop_it_goes(hosts: Any) -> None:
    edge = await hosts.edge()
    for turns in itertools.count():
        creating = asyncio.create_task(edge.create(CreateRequest()))
        for _ in range(turns):
            await asyncio.sleep(0)
        if not creating.cancel():
            break
        with pytest.raises(asyncio.CancelledError):
            await creating
        await edge._registry.settle()
        assert hosts.host.sandboxes == {}, turns
    assert turns > 5


async def test_a_caller_with_a_request_id_that_goes_away_finds_its_sandbox_when_it_comes_back(hosts: Any) -> None:
    substrate = HeldSubstrate(hosts.script, hosts.host)
    edge = await hosts.edge(substrate)
    creating = asyncio.create_task(edge.create(CreateRequest(request_id="r")))
    await substrate.asked.wait()
    creating.cancel()
    substrate.may_create.set()
    view = await edge.create(CreateRequest(request_id="r"))
    assert list(hosts.host.sandboxes) == [view.id]


@pytest.mark.parametrize("when", ["before", "during", "after"])
async def test_a_cancelled_request_leaves_nothing_whenever_the_word_comes(hosts: Any, when: str) -> None:
    substrate = HeldSubstrate(hosts.script, hosts.host)
    edge = await hosts.edge(substrate)
    request = CreateRequest(request_id="r")
    if when == "before":
        await edge.cancel("r")
    else:
        creating = asyncio.create_task(edge.create(request))
        await substrate.asked.wait()
        if when == "after":
            substrate.may_create.set()
            view = await creating
        await edge.cancel("r")
        await edge.cancel("r")
        if when == "after":
            assert edge.get(view.id).reason == "cancelled"
        else:
            with pytest.raises(StateError, match="cancelled"):
                await creating
    with pytest.raises(StateError, match="cancelled"):
        await edge.create(request)
    assert hosts.host.sandboxes == {}
    assert edge.status().used["sandboxes_count"] == 0
    await hosts.kill(edge)
    with pytest.raises(StateError, match="cancelled"):
        await (await hosts.edge()).create(request)


async def test_an_ended_sandbox_is_lost_to_commands_and_its_reason_is_shown(hosts: Any) -> None:
    edge = await hosts.edge()
    view = await edge.create(CreateRequest())
    await asyncio.gather(*(edge.destroy(view.id) for _ in range(5)))
    await edge.destroy(view.id)
    assert edge.get(view.id).reason == "destroyed"
    assert edge.list() == []
    for use in (edge.exec(view.id, LS), edge.start(view.id, LS), edge.pause(view.id), edge.snapshot(view.id)):
        with pytest.raises(SandboxLostError, match="destroyed"):
            await use


async def test_a_name_that_is_none_is_not_found(hosts: Any) -> None:
    edge = await hosts.edge()
    for name in ("", "x", "../etc", "\udc80", "a" * 10_000):
        with pytest.raises(NotFoundError):
            edge.get(name)
        with pytest.raises(NotFoundError):
            await edge.exec(name, LS)
        with pytest.raises(NotFoundError):
            await edge.destroy(name)


@pytest.mark.parametrize(
    "request_",
    [
        CreateRequest(spec=SandboxSpec(memory_bytes=1)),
        CreateRequest(request_id="a" * 257),
        CreateRequest(request_id="a\nb"),
        CreateRequest(request_id="\ud800"),
        CreateRequest(labels={"": "x"}),
        CreateRequest(labels={"x": "y" * 257}),
        CreateRequest(labels={str(n): "x" for n in range(65)}),
        CreateRequest(epoch=-1, owner="a"),
        CreateRequest(epoch=3),
        CreateRequest(idle_timeout_s=0.0),
        CreateRequest(lifetime_s=float("nan")),
        CreateRequest(lifetime_s=float("inf")),
        CreateRequest(lifetime_s=-1.0),
        CreateRequest(spec=SandboxSpec(layers=(LayerId("sha256:" + "0" * (1 << 18)),))),
        CreateRequest(spec=SandboxSpec(layers=(LayerId("\ud800"),))),
    ],
)
async def test_a_request_that_cannot_be_is_refused_before_it_is_written_down(
    hosts: Any, request_: CreateRequest
) -> None:
    edge = await hosts.edge()
    lsn = edge._registry.log.lsn
    with pytest.raises(InvalidArgumentError):
        await edge.create(request_)
    assert edge._registry.log.lsn == lsn


async def test_a_closed_edge_destroys_everything_and_a_detached_one_nothing(hosts: Any) -> None:
    edge: Edge = await hosts.edge()
    view = await edge.create(CreateRequest())
    await hosts.kill(edge)
    assert list(hosts.host.sandboxes) == [view.id]
    edge = await hosts.edge()
    await edge.close()
    assert hosts.host.sandboxes == {}
    edge = await hosts.edge()
    assert edge.get(view.id).reason == "destroyed"


async def test_what_ended_long_ago_is_forgotten_and_memory_stays_bounded(hosts: Any) -> None:
    edge = await hosts.edge(ended_count_max=3)
    views = [await edge.create(CreateRequest(request_id=f"r{n}")) for n in range(6)]
    for view in views:
        await edge.exec(view.id, LS, "k")
        await edge.destroy(view.id)
    with pytest.raises(NotFoundError):
        edge.get(views[2].id)
    assert edge.get(views[3].id).reason == "destroyed"
    ledger = edge._registry.ledger
    assert (len(ledger.sandboxes), len(ledger.requests), len(ledger.ended)) == (3, 3, 3)
    with pytest.raises(NotFoundError):
        await anext(edge.trajectory(views[0].id))
    assert [entry.key for entry in read_trajectory(hosts.directory, views[0].id)] == ["k"]


async def test_a_full_house_is_refused_with_its_reason_and_the_next_in_turn_gets_the_room(hosts: Any) -> None:
    edge = await hosts.edge(sandboxes_count_max=1)
    first = await edge.create(CreateRequest())
    waiting = asyncio.create_task(edge.create(CreateRequest()))
    await hosts.until(lambda: edge._registry.admission.waiting_count)
    await edge.destroy(first.id)
    assert (await waiting).state == "running"
    refused = asyncio.create_task(edge.create(CreateRequest()))
    await hosts.until(lambda: edge._registry.admission.waiting_count)
    hosts.clock.advance(3)
    with pytest.raises(ResourceExhaustedError, match=r"sandboxes_count asked 1, used 1 of 1 \(waited 2.0 s\)"):
        await refused


async def test_an_old_journal_loses_the_trajectories_of_ended_sandboxes_and_nothing_else(hosts: Any) -> None:
    small = {"log_bytes_max": 1 << 17, "log_segment_bytes_max": 1 << 16}
    edge = await hosts.edge(**small)
    await edge.grant_lease("job", 7, 10_000.0)
    await edge.grant_lease("gone", 3, 10_000.0)
    await edge.end_lease("gone", 3)
    await edge.cancel("never")
    old = await edge.create(CreateRequest())
    fat = Command(argv=("x",), stdin=bytes(10_000))
    for number in range(30):
        await edge.exec(old.id, fat, f"k{number}")
    assert (await edge._registry.retention.run_pass()).dropped == ()
    await edge.destroy(old.id)
    living = await edge.create(CreateRequest(owner="job", epoch=7, request_id="r"))
    result = await edge.exec(living.id, fat, "mine")
    hosts.clock.advance(61)
    log = hosts.directory / "log"
    await hosts.until(lambda: list(log.glob("*.floor")))
    await edge._registry.settle()
    await hosts.kill(edge)
    assert sum(path.stat().st_size for path in log.glob("*.wal")) < 1 << 19
    edge = await hosts.edge(**small)
    assert edge.list() == [edge.get(living.id)]
    assert await edge.exec(living.id, fat, "mine") == result
    assert (await edge.create(CreateRequest(owner="job", epoch=7, request_id="r"))).id == living.id
    assert edge.get(living.id).created_at_s == living.created_at_s
    with pytest.raises(NotFoundError):
        edge.get(old.id)
    for call in (
        edge.grant_lease("job", 6, 1.0),
        edge.grant_lease("gone", 3, 1.0),
        edge.create(CreateRequest(request_id="never")),
    ):
        with pytest.raises(StateError):
            await call


async def test_a_create_that_is_cancelled_before_it_has_begun_gives_its_promise_back(hosts: Any) -> None:
    edge = await hosts.edge()
    for turns in range(30):
        creating = asyncio.create_task(edge.create(CreateRequest(request_id=f"r{turns}")))
        for _ in range(turns):
            await asyncio.sleep(0)
        await edge.cancel(f"r{turns}")
        with contextlib.suppress(StateError):  # it was faster
            await creating
        assert edge.status().used["sandboxes_count"] == 0, turns
        assert hosts.host.sandboxes == {}, turns
