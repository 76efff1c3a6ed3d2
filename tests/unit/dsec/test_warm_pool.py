"""What is made ahead, and of what there is less when something else is asked for."""

from collections import Counter
from typing import ClassVar

import pytest

from dsec.edge.substrates.warm_pool import WarmPool
from dsec.types import LayerId, SandboxSpec


class Box:
    """A sandbox that waits; all that were ever made and ended are counted."""

    made: ClassVar[Counter[str]] = Counter()
    ended: ClassVar[Counter[str]] = Counter()

    def __init__(self, spec: SandboxSpec) -> None:
        self.spec = spec
        self.made[name_of(spec)] += 1

    async def destroy(self) -> None:
        self.ended[name_of(self.spec)] += 1


def name_of(spec: SandboxSpec) -> str:
    return spec.layers[0] if spec.layers else ""


def image(name: str, hostname: str = "sandbox") -> SandboxSpec:
    return SandboxSpec(layers=(LayerId(name),), hostname=hostname)


@pytest.fixture(autouse=True)
def _nothing_was_made() -> None:
    Box.made.clear()
    Box.ended.clear()


def make_pool(count_max: int) -> WarmPool[Box]:
    async def make(spec: SandboxSpec) -> Box:
        return Box(spec)

    return WarmPool(count_max, make)


async def ask(pool: WarmPool[Box], spec: SandboxSpec) -> Box | None:
    with pool.asking():
        pool.ask(spec)
        taken = pool.take(spec)
    await pool.filled()
    return taken


def waiting(pool: WarmPool[Box]) -> Counter[str]:
    return Counter(name_of(box.spec) for box in pool.ready)


async def test_of_each_kind_as_many_wait_as_its_part_of_what_was_asked_for() -> None:
    pool = make_pool(8)
    for name in "aab" * 10:
        await ask(pool, image(name))
    assert waiting(pool) in (Counter(a=6, b=2), Counter(a=5, b=3))


@pytest.mark.parametrize("count_max", [1, 2, 3, 8])
async def test_kinds_that_alternate_do_not_undo_each_other(count_max: int) -> None:
    pool = make_pool(count_max)
    for name in "ab" * 20:
        await ask(pool, image(name))
    settled = Box.ended.total()
    hits = [await ask(pool, image(name)) is not None for name in "ab" * 20]
    assert Box.ended.total() == settled
    assert sum(hits) >= (20 if count_max == 1 else 39)


async def test_one_that_was_asked_for_once_takes_no_place_from_a_series() -> None:
    pool = make_pool(4)
    for name in "aaaaaaaaxaaaaaa":
        await ask(pool, image(name))
    assert waiting(pool) == Counter(a=4)
    assert Box.made["x"] == 0


async def test_what_nobody_asks_for_any_more_makes_room() -> None:
    pool = make_pool(3)
    for name in "a" * 9 + "b" * 5:
        await ask(pool, image(name))
    assert waiting(pool) == Counter(b=3)


async def test_those_made_are_as_the_last_one_was_asked_for() -> None:
    pool = make_pool(2)
    await ask(pool, image("a", "one"))
    taken = await ask(pool, image("a", "two"))
    assert taken is not None
    assert taken.spec.hostname == "one"
    assert [box.spec.hostname for box in pool.ready] == ["one", "two"]


async def test_closing_ends_all_and_makes_no_more() -> None:
    pool = make_pool(2)
    await ask(pool, image("a"))
    assert await pool.evict()
    await pool.close()
    assert pool.ready == ()
    assert not await pool.evict()
    assert await ask(pool, image("a")) is None
    assert Box.made == Box.ended
