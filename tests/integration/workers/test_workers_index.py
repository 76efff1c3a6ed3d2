"""The index in SQLite and PostgreSQL: what only one can win, leases by its own clock, and what its absence means."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from dsec.errors import UnreachableError
from rollout.errors import RequestError
from rollout.workers.index import Index, Partition, RolloutRow

LONG_S, LAPSED_S = 600.0, -1.0
Open = Callable[[], Any]


@pytest.fixture
async def opened(index_url: str) -> AsyncIterator[Open]:
    """Opens the index as another process would."""
    indexes: list[Index] = []

    async def open_() -> Index:
        index = Index(index_url)
        indexes.append(index)
        await index.open()
        return index

    yield open_
    for index in indexes:
        await index.close()


async def test_many_that_open_a_new_index_at_once_find_one(opened: Open) -> None:
    indexes = await asyncio.gather(*(opened() for _ in range(8)))
    await asyncio.gather(*(index.add_partition("p", 0) for index in indexes))
    assert (await indexes[0].snapshot()).partitions == (Partition("p", 0, None),)


async def test_a_free_partition_is_won_once(opened: Open) -> None:
    indexes = await asyncio.gather(*(opened() for _ in range(6)))
    for number, index in enumerate(indexes):
        await index.join(f"w{number}#1", f"w{number}", "a:1", LONG_S)
    await indexes[0].add_partition("p", 7)
    free = Partition("p", 7, None)
    won = await asyncio.gather(*(index.claim(f"w{n}#1", free) for n, index in enumerate(indexes)))
    assert sum(won) == 1
    assert (await indexes[0].snapshot()).partitions == (Partition("p", 8, f"w{won.index(True)}#1"),)


async def test_only_a_lapsed_lease_is_taken_from_and_only_by_the_living(opened: Open) -> None:
    index = await opened()
    await index.join("a#1", "a", "a:1", LONG_S)
    await index.join("b#1", "b", "b:1", LONG_S)
    await index.add_partition("p", 0)
    assert await index.claim("a#1", Partition("p", 0, None))
    held = Partition("p", 1, "a#1")
    assert not await index.claim("b#1", held)
    await index.renew("a#1", LAPSED_S, 0)
    assert [worker.lease_s > 0 for worker in (await index.snapshot()).workers] == [False, True]
    assert not await index.claim("a#1", held)
    assert not await index.claim("nobody#1", held)
    assert await index.claim("b#1", held)
    assert await index.renew("a#1", LONG_S, 3)  # it lives, and has lost the partition
    assert not await index.claim("a#1", held)
    await index.release("a#1", "p")
    assert (await index.snapshot()).partitions == (Partition("p", 2, "b#1"),)


async def test_a_worker_that_left_owns_nothing_and_one_that_came_back_what_it_had(opened: Open) -> None:
    index = await opened()
    for name in ("p", "q"):
        await index.add_partition(name, 0)
    await index.join("a#1", "a", "a:1", LONG_S)
    assert await index.claim("a#1", Partition("p", 0, None))
    await index.join("a#2", "a", "a:2", LONG_S)
    snapshot = await index.snapshot()
    assert [(worker.owner, worker.address) for worker in snapshot.workers] == [("a#2", "a:2")]
    assert snapshot.partitions == (Partition("p", 1, "a#2"), Partition("q", 0, None))
    assert not await index.renew("a#1", LONG_S, 0)
    await index.leave("a#2")
    snapshot = await index.snapshot()
    assert (snapshot.workers, [each.owner for each in snapshot.partitions]) == ((), [None, None])
    assert not await index.renew("a#2", LONG_S, 0)


async def test_a_request_id_goes_to_one_partition_however_many_place_it(opened: Open) -> None:
    indexes = await asyncio.gather(*(opened() for _ in range(6)))
    placed = await asyncio.gather(*(index.place("job", f"p{n}") for n, index in enumerate(indexes)))
    assert len(set(placed)) == 1
    assert await indexes[0].partition_of("job") == placed[0]
    assert await indexes[0].partition_of("other") is None


async def test_rollouts_are_listed_as_they_were_last_told(opened: Open) -> None:
    index = await opened()
    rows = [RolloutRow(f"job/t.{number}", "job", "p", "t", "RUNNING") for number in range(5)]
    other = RolloutRow("other/t.0", "other", "p", "t", "DONE", "STOP", 0.0)
    await index.publish("p", ["job", "other"], [*rows, other])
    rows[3] = RolloutRow("job/t.3", "job", "p", "t", "DONE", "STOP", 1.0)
    await index.publish("p", ["job"], [rows[3]])
    assert await index.rollouts("job") == rows
    first = await index.rollouts(count_max=4)
    assert first + await index.rollouts(after=first[-1].rollout_id) == [*rows, other]
    assert await index.partition_of("other") == "p"
    await index.publish("q", ["other"], [])  # the log is the truth
    assert await index.partition_of("other") == "q"
    await index.forget_jobs()
    assert (await index.rollouts(), await index.partition_of("job")) == ([], None)


async def test_an_epoch_never_goes_down(opened: Open) -> None:
    index = await opened()
    for epoch in (3, 9, 5):
        await index.add_partition("p", epoch)
    assert (await index.snapshot()).partitions == (Partition("p", 9, None),)


async def test_an_index_of_another_version_is_refused(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    await opened()
    monkeypatch.setattr("rollout.workers.index.VERSION", 2)
    with pytest.raises(RequestError, match="is of version 1, this program's is 2"):
        await opened()


async def test_a_database_that_is_killed_is_unreachable_and_then_there_again(postgres: Any) -> None:
    index = Index(postgres.create("killed"))
    await index.open()
    await index.add_partition("p", 1)
    postgres.kill()
    try:
        with pytest.raises(UnreachableError, match="cannot be used now"):
            await index.snapshot()
    finally:
        postgres.start()
    assert (await index.snapshot()).partitions == (Partition("p", 1, None),)
    await index.close()


@pytest.mark.parametrize("url", ["mysql://host/db", "nothing", "sqlite:///nowhere/at/all/index.db"])
async def test_an_index_that_cannot_be_is_told(url: str) -> None:
    with pytest.raises((RequestError, UnreachableError)) as caught:
        await Index(url).open()
    assert "index" in str(caught.value)
