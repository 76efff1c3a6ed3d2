"""Who opens, claims, gives back and makes partitions: examples, and that everybody ends up with a fair share."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rollout.workers.index import Partition, Snapshot, Worker
from rollout.workers.leases import Lease, Plan, plan


def worker(owner: str, lease_s: float = 10.0) -> Worker:
    return Worker(owner, owner, "", lease_s, 0)


def test_what_the_index_gives_is_opened_and_what_it_took_is_let_go_of() -> None:
    snapshot = Snapshot((worker("a"), worker("b")), (Partition("p", 2, "a"), Partition("q", 5, "b")))
    assert plan("a", snapshot, {"q": (4, 0)}) == Plan(open=(Partition("p", 2, "a"),), lose=("q",))
    assert plan("a", snapshot, {"p": (1, 0)}).lose == ("p",)  # ours again, by a lease of which we heard nothing
    assert plan("a", snapshot, {"p": (2, 0)}) == Plan()


def test_a_worker_whose_own_lease_lapsed_takes_nothing_new() -> None:
    snapshot = Snapshot((worker("a", -1.0), worker("b")), (Partition("p", 1, "a"), Partition("q", 0, None)))
    assert plan("a", snapshot, {"p": (1, 3)}) == Plan()


def test_what_the_dead_had_is_claimed_within_the_share() -> None:
    partitions = (Partition("p", 1, "a"), Partition("q", 1, "dead"), Partition("r", 0, None))
    alone = Snapshot((worker("a"), worker("dead", -0.1)), partitions)
    assert plan("a", alone, {"p": (1, 0)}).claim == Partition("q", 1, "dead")
    three = Snapshot((worker("a"), worker("b"), worker("c")), partitions)
    assert plan("a", three, {"p": (1, 0)}).claim is None
    assert plan("b", three, {}).claim == Partition("q", 1, "dead")


def test_who_has_too_much_gives_back_what_has_least_to_do() -> None:
    snapshot = Snapshot((worker("a"), worker("b")), (Partition("p", 1, "a"), Partition("q", 1, "a")))
    assert plan("a", snapshot, {"p": (1, 2), "q": (1, 1)}).release == "q"
    assert plan("b", snapshot, {}) == Plan()  # it gets one, and need not make one


def test_a_worker_makes_a_partition_where_there_are_too_few() -> None:
    assert plan("a", Snapshot((worker("a"),), ()), {}).creates
    assert plan("b", Snapshot((worker("a"), worker("b")), (Partition("p", 1, "a"),)), {}).creates
    assert not plan("a", Snapshot((worker("a"), worker("b")), (Partition("p", 1, "a"),)), {"p": (1, 0)}).creates


@given(
    owners=st.lists(st.sampled_from(["a", "b", "c", "dead", None]), max_size=12),
    living=st.lists(st.sampled_from("abc"), min_size=1, unique=True),
    order=st.randoms(use_true_random=False),
)
def test_workers_that_act_in_any_order_end_with_fair_shares(
    owners: list[str | None], living: list[str], order: object
) -> None:
    partitions = {f"p{n}": Partition(f"p{n}", 1, owner) for n, owner in enumerate(owners)}
    workers = tuple(worker(name, 1.0 if name in living else -1.0) for name in ("a", "b", "c", "dead"))
    for _ in range(100):
        before = dict(partitions)
        for name in order.sample(living, len(living)):  # type: ignore[attr-defined]
            held = {each.name: (each.epoch, 0) for each in partitions.values() if each.owner == name}
            todo = plan(name, Snapshot(workers, tuple(partitions.values())), held)
            if todo.claim is not None:
                partitions[todo.claim.name] = Partition(todo.claim.name, todo.claim.epoch + 1, name)
            if todo.release is not None:
                partitions[todo.release] = Partition(todo.release, partitions[todo.release].epoch, None)
            if todo.creates:
                partitions[f"p{len(partitions)}"] = Partition(f"p{len(partitions)}", 0, None)
        if partitions == before:
            break
    counts = [sum(each.owner == name for each in partitions.values()) for name in living]
    assert sum(counts) == len(partitions) >= len(living)
    assert max(counts) <= -(-len(partitions) // len(living))
    assert min(counts) >= 1


def test_a_lease_counts_from_before_it_was_asked_for() -> None:
    lease = Lease(9.0)
    assert (lease.is_due(0.0), lease.left_s(0.0)) == (True, float("-inf"))
    lease.renewed(100.0)
    assert [lease.is_due(now) for now in (100.0, 102.9, 103.0)] == [False, False, True]
    assert [lease.left_s(now) for now in (100.0, 109.0, 111.0)] == [9.0, 0.0, -2.0]
    lease.renewed(90.0)  # an answer that overtook another
    assert lease.left_s(100.0) == 9.0
