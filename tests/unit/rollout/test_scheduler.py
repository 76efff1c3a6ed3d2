"""The scheduler's table, a case at a time; its laws are in tests/properties/test_scheduler_laws.py."""

from __future__ import annotations

import pytest

from dsec.errors import ResourceExhaustedError
from rollout.errors import RequestError
from rollout.scheduling.claims import Capacity, Claim, Decision, Grant, Preempt, Rules, Start, Yield
from rollout.scheduling.scheduler import Scheduler


def make(ageing_s: float = 100.0, preemptions_count_max: int = 3, **has: int) -> Scheduler:
    capacity = {"slots": 1, "sandboxes": 2, "asleep": 2, "tokens": 100, "queued": 5, "projects": 2} | has
    rules = Rules(ageing_s=ageing_s, credit_tokens=0, preemptions_count_max=preemptions_count_max)
    return Scheduler(Capacity(**capacity), rules)


def claim(*members: str, priority: int = 0, project: str = "p", tokens: int = 10, sandboxes: int = 1) -> Claim:
    return Claim(members=members, project=project, priority=priority, tokens=tokens, sandboxes=sandboxes)


def after(table: Scheduler, *claims: Claim, now: float = 0.0) -> tuple[Decision, ...]:
    for each in claims:
        table.enqueue(each, now)
    return table.decide(now)


def test_groups_start_in_order_of_priority_then_of_age() -> None:
    table = make()
    later = claim("d.0", "d.1")
    assert after(table, claim("a"), claim("b"), claim("c", priority=1), later) == (Start(("c",)), Start(("a",)))
    table.end("a")
    assert table.decide(0) == (Start(("b",)),)
    table.end("c")
    assert table.decide(0) == ()
    table.end("b")
    assert table.decide(0) == (Start(("d.0", "d.1")),)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (claim("g.0", "g.1", "g.2"), "3 rollouts of 'g' need 3 sandboxes and 30 tokens .* has 2 and 100"),
        (claim("g.0", tokens=101, sandboxes=0), "1 rollouts of 'g' need 0 sandboxes and 101 tokens"),
    ],
)
def test_what_can_never_start_is_refused_with_the_numbers(asked: Claim, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        make().check([asked])


def test_a_full_queue_and_too_many_projects_are_refused_for_now() -> None:
    table = make()
    table.check([claim("a.0", "a.1"), claim("b.0", "b.1"), claim("c")])
    after(table, claim("a"), claim("b"))  # both started: the queue is empty again
    with pytest.raises(ResourceExhaustedError, match="0 rollouts are queued, 6 more would exceed 5: submit again when"):
        table.check([claim(str(number)) for number in range(6)])
    with pytest.raises(ResourceExhaustedError, match="2 projects have rollouts here"):
        table.check([claim("x", project="q"), claim("y", project="r")])
    table.end("a")
    table.end("b")
    table.check([claim("x", project="q"), claim("y", project="r")])


def test_what_goes_before_all_that_waits_and_fits_needs_no_place_in_a_full_queue() -> None:
    table = make()
    after(table, claim("a"), claim("b"), *(claim(str(number)) for number in range(5)))
    first = claim("first", priority=1, sandboxes=0)
    for waits in (claim("second", sandboxes=0), claim("large", priority=1)):
        with pytest.raises(ResourceExhaustedError, match="5 rollouts are queued, 1 more"):
            table.check([waits])
    table.check([first])
    assert after(table, first) == (Start(("first",)),)


def test_a_group_that_was_admitted_where_there_was_more_goes_on_one_by_one() -> None:
    table, whole = make(), claim("g.0", "g.1", "g.2")
    assert table.fitting(claim("a", "b")) == [claim("a", "b")]
    assert table.fitting(whole) == [claim("g.0"), claim("g.1"), claim("g.2")]
    with pytest.raises(RequestError, match="need 1 sandboxes and 101 tokens"):
        table.fitting(claim("g.0", "g.1", tokens=101))


def test_a_slot_is_lent_for_a_turn_and_waited_for_in_order_of_age() -> None:
    table = make()
    after(table, claim("a"), claim("b"))
    table.want_slot("b", 5, 0)
    assert table.decide(0) == (Grant("b"),)
    table.want_slot("a", 5, 0)
    assert (table.decide(0), table.slots_held) == ((), 1)
    table.leave_slot("b", 5)
    assert table.decide(0) == (Grant("a"),)
    table.leave_slot("a", 5)
    assert (table.decide(0), table.slots_held) == ((), 0)


def test_a_higher_priority_is_given_the_slot_once_and_an_equal_one_is_not() -> None:
    table = make()
    after(table, claim("low"), claim("high", priority=1))
    table.want_slot("low", 5, 0)
    table.decide(0)
    table.want_slot("high", 5, 0)
    assert table.decide(0) == (Yield("low"),)
    assert table.decide(0) == ()
    table.leave_slot("low", 2)
    table.want_slot("low", 3, 0)
    assert table.decide(0) == (Grant("high"),)


def test_who_waited_long_enough_overtakes_a_higher_priority_and_keeps_its_slot() -> None:
    table = make(ageing_s=100.0)
    after(table, claim("low"), claim("high", priority=1))
    table.want_slot("high", 5, 0)
    table.decide(0)
    table.want_slot("low", 5, 0)
    table.leave_slot("high", 5)
    table.want_slot("high", 5, 250)
    assert table.decide(250) == (Grant("low"),)


def test_as_many_are_preempted_as_make_room_and_no_smaller_one_slips_in() -> None:
    table = make(sandboxes=3)
    after(table, claim("a"), claim("b", priority=-1), claim("c", priority=2))
    decisions = after(table, claim("g.0", "g.1", priority=1), claim("small"))
    assert decisions == (Preempt("b"), Preempt("a"))  # the lowest first
    table.preempted("b", 0)
    assert table.decide(0) == ()
    table.preempted("a", 0)
    assert table.decide(0) == (Start(("g.0", "g.1")),)
    assert table.asleep_count == 2
    for ended in ("g.0", "g.1"):
        table.end(ended)
    assert table.decide(0) == (Start(("a",)), Start(("small",)))
    table.end("small")
    assert table.decide(0) == (Start(("b",)),)
    assert (table.asleep_count, table.sandboxes_held) == (0, 3)


def test_nobody_is_preempted_where_that_would_not_make_room() -> None:
    table = make(asleep=0)
    after(table, claim("a"), claim("b"))
    assert after(table, claim("high", priority=1)) == ()  # their sandboxes would have nowhere to sleep
    roomy = make(sandboxes=9, tokens=20)
    after(roomy, claim("a"), claim("b", priority=1))
    assert after(roomy, claim("high", priority=1, tokens=20)) == ()


def test_a_preempted_rollout_whose_sandbox_could_not_sleep_is_in_nobodys_way() -> None:
    """It holds what a group waits for: it must run, or neither would."""
    table = make(asleep=0, ageing_s=1.0)
    after(table, claim("a"), claim("b"))
    table.stopping("a")
    table.preempted("a", 0, is_aside=True)
    assert after(table, claim("g.0", "g.1", priority=1), now=0) == ()
    table.end("b")
    assert (table.decide(50), table.sandboxes_held) == ((), 1)
    table.bring_back("a", 99)
    assert table.decide(99) == (Start(("a",)),)
    table.end("a")
    assert table.decide(99) == (Start(("g.0", "g.1")),)


def test_a_judge_takes_slots_in_the_name_of_whom_it_judges() -> None:
    table = make(tokens=10)
    after(table, claim("a"))
    table.join("a/judge", "a")
    table.want_slot("a/judge", 5, 0)
    assert table.decide(0) == (Grant("a/judge"),)
    table.leave_slot("a/judge", 5)
    table.end("a/judge")
    assert (table.tokens_held, table.sandboxes_held, table.running_count) == (10, 1, 1)


def test_what_is_withdrawn_or_set_aside_is_not_started_until_it_is_brought_back() -> None:
    table = make(sandboxes=1)
    after(table, claim("a"), claim("b"), claim("c"))
    assert table.set_aside("b") == ("b",)
    assert table.withdraw("c") == ("c",)
    assert (table.set_aside("a"), table.withdraw("a"), table.bring_back("a", 0)) == ((), (), ())
    table.end("a")
    assert (table.decide(0), table.queued_count) == ((), 1)
    assert table.bring_back("b", 0) == ("b",)
    assert table.decide(0) == (Start(("b",)),)
