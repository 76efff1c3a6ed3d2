"""The laws of scheduling, over any order of arrivals, turns, ends and preemptions."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from rollout.scheduling.claims import Capacity, Claim, Grant, Preempt, Rules, Start, Yield
from rollout.scheduling.scheduler import Scheduler
from rollout.scheduling.shares import Shares

SIZES = st.integers(1, 4)


@dataclass
class World:
    """A service that does what it is told; what runs, samples and is to stop, seen from outside."""

    scheduler: Scheduler
    now: float = 0.0
    claims: dict[str, Claim] = field(default_factory=dict)
    running: dict[str, Claim] = field(default_factory=dict)
    wants: set[str] = field(default_factory=set)
    samples: set[str] = field(default_factory=set)
    stops: set[str] = field(default_factory=set)
    yields: set[str] = field(default_factory=set)
    asleep: set[str] = field(default_factory=set)
    begun: set[str] = field(default_factory=set)
    made_room: Counter[str] = field(default_factory=Counter)
    sampled: Counter[str] = field(default_factory=Counter)
    count: int = 0

    def submit(self, size: int, **claim: int | str) -> None:
        self.count += 1
        claim_ = Claim(members=tuple(f"{self.count}.{index}" for index in range(size)), **claim)  # type: ignore[arg-type]
        if self.scheduler.may_fit(claim_):
            self.scheduler.enqueue(claim_, self.now)
            self.claims |= dict.fromkeys(claim_.members, claim_)

    def decide(self) -> None:
        for decision in self.scheduler.decide(self.now):
            match decision:
                case Start(members):
                    first = [member for member in members if member not in self.begun]
                    assert first in ([], list(self.claims[members[0]].members)), "a group starts whole"
                    self.begun.update(members)
                    self.asleep.difference_update(members)
                    self.running |= {member: self.claims[member] for member in members}
                case Grant(rollout_id):
                    self.wants.remove(rollout_id)
                    self.samples.add(rollout_id)
                case Yield(rollout_id):
                    assert rollout_id in self.samples
                    self.yields.add(rollout_id)
                    self.made_room[rollout_id] += 1
                case Preempt(rollout_id):
                    assert rollout_id in self.running
                    self.stops.add(rollout_id)
                    self.made_room[rollout_id] += 1

    def want(self, rollout_id: str, tokens: int) -> None:
        self.scheduler.want_slot(rollout_id, tokens, self.now)
        self.wants.add(rollout_id)

    def leave_slot(self, rollout_id: str, tokens: int) -> None:
        self.scheduler.leave_slot(rollout_id, tokens)
        self.sampled[self.claims[rollout_id].project] += tokens
        for kept in (self.wants, self.samples, self.yields):
            kept.discard(rollout_id)

    def end(self, rollout_id: str) -> None:
        if rollout_id in self.wants | self.samples:
            self.leave_slot(rollout_id, 0)
        self.scheduler.end(rollout_id)
        self.running.pop(rollout_id, None)
        self.stops.discard(rollout_id)

    def stop(self, rollout_id: str, *, is_aside: bool = False) -> None:
        if rollout_id in self.wants | self.samples:
            self.leave_slot(rollout_id, 1)
        self.scheduler.preempted(rollout_id, self.now, is_aside=is_aside)
        del self.running[rollout_id]
        self.stops.discard(rollout_id)
        self.asleep.add(rollout_id)

    def check(self) -> None:
        has, table = self.scheduler.capacity, self.scheduler
        assert len(self.samples) == table.slots_held <= has.slots
        assert sum(claim.tokens for claim in self.running.values()) == table.tokens_held <= has.tokens
        assert sum(claim.sandboxes for claim in self.running.values()) <= table.sandboxes_held <= has.sandboxes
        assert table.asleep_count <= has.asleep
        assert not self.wants or len(self.samples) == has.slots, "a slot is free and somebody waits for it"


def make(**has: int) -> Scheduler:
    capacity = {"slots": 2, "sandboxes": 4, "asleep": 2, "tokens": 40, "queued": 1000, "projects": 10} | has
    rules = Rules(ageing_s=100.0, credit_tokens=20, preemptions_count_max=3, weights={"b": 3.0})
    return Scheduler(Capacity(**capacity), rules)


@given(
    st.randoms(use_true_random=False),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(0, 3),
    st.integers(10, 60),
    st.integers(1, 150),
)
def test_resources_are_never_exceeded_groups_start_whole_and_everything_ends(
    rng: random.Random, slots: int, sandboxes: int, asleep: int, tokens: int, steps: int
) -> None:
    world = World(make(slots=slots, sandboxes=sandboxes, asleep=asleep, tokens=tokens))
    for _ in range(steps):
        world.now += rng.choice((0.0, 1.0, 60.0))
        act(world, rng)
        world.decide()
        world.check()
    for _ in range(100 + 40 * len(world.claims)):  # no more arrivals, nothing is set aside: all must come to its end
        for rollout_id in sorted(world.begun):
            world.scheduler.bring_back(rollout_id, world.now)
        world.now += 60.0
        drain(world)
        world.decide()
        world.check()
    assert world.scheduler.queued_count == world.scheduler.running_count == 0
    assert (world.scheduler.tokens_held, world.scheduler.sandboxes_held, world.scheduler.asleep_count) == (0, 0, 0)
    assert max(world.made_room.values(), default=0) <= 3, "a rollout makes room a bounded number of times"


def act(world: World, rng: random.Random) -> None:
    running = sorted(world.running)
    kind = rng.choice(("submit", "submit", "want", "want", "turn", "turn", "end", "stop", "aside", "back", "withdraw"))
    if kind == "submit":
        world.submit(
            rng.randint(1, 4),
            project=rng.choice("abc"),
            priority=rng.randint(-1, 2),
            tokens=rng.choice((0, 5, 10)),
            sandboxes=rng.randint(0, 1),
        )
    elif kind == "want" and (idle := [r for r in running if r not in world.wants | world.samples]):
        world.want(rng.choice(idle), rng.randint(1, 9))
    elif kind == "turn" and world.samples:
        world.leave_slot(rng.choice(sorted(world.samples)), rng.randint(0, 9))
    elif kind == "end" and running:
        world.end(rng.choice(running))
    elif kind == "stop" and world.stops:
        world.stop(rng.choice(sorted(world.stops)))
    elif kind == "aside" and running:
        rollout_id = rng.choice(running)
        world.scheduler.stopping(rollout_id)
        world.stop(rollout_id, is_aside=True)
    elif kind == "back" and world.asleep:
        world.scheduler.bring_back(rng.choice(sorted(world.asleep)), world.now)
    elif kind == "withdraw" and world.claims:
        world.scheduler.withdraw(rng.choice(sorted(world.claims)))


def drain(world: World) -> None:
    """What was asked to stop stops, and one turn and one end happen."""
    for rollout_id in sorted(world.stops):
        world.stop(rollout_id)
    for rollout_id in sorted(world.yields):
        world.leave_slot(rollout_id, 1)
    if running := sorted(world.running):
        world.end(running[0])


@given(st.randoms(use_true_random=False))
def test_what_fits_is_started_unless_something_older_has_waited_too_long(rng: random.Random) -> None:
    world = World(make())
    for _ in range(60):
        if rng.random() < 0.6:
            world.submit(rng.randint(1, 4), project=rng.choice("ab"), tokens=rng.choice((5, 10)))
        elif world.running:
            world.end(rng.choice(sorted(world.running)))
        world.decide()  # no time passes: nothing is ever due
        free_sandboxes, free_tokens = 4 - world.scheduler.sandboxes_held, 40 - world.scheduler.tokens_held
        for claim in {id(c): c for m, c in world.claims.items() if m not in world.begun}.values():
            tokens, sandboxes = claim.shape
            assert tokens > free_tokens or sandboxes > free_sandboxes, f"{claim} would fit"


@given(st.randoms(use_true_random=False), st.integers(1, 4))
def test_tokens_go_to_projects_by_their_weights_in_any_order_of_arrival(rng: random.Random, slots: int) -> None:
    turn_max = 20
    world = World(make(slots=slots, sandboxes=100, tokens=100_000))
    for _ in range(40):
        world.submit(1, project=rng.choice("ab"), tokens=1)
    for project in "ab":
        for _ in range(slots + 1):
            world.submit(1, project=project, tokens=1)
    world.decide()
    both = Counter[str]()
    for rollout_id in rng.sample(sorted(world.running), len(world.running)):
        world.want(rollout_id, turn_max)  # each always wants more
    for _ in range(400):
        world.decide()
        rollout_id = rng.choice(sorted(world.samples))
        tokens = rng.randint(1, turn_max)
        world.leave_slot(rollout_id, tokens)
        both[world.claims[rollout_id].project] += tokens
        world.want(rollout_id, turn_max)
        apart = abs(both["a"] / 1 - both["b"] / 3)
        assert apart <= (2 * slots + 1) * turn_max * (1 + 1 / 3), f"{both} after equal demand"


@given(st.integers(0, 10_000), st.integers(1, 1000), st.floats(0.1, 10))
def test_a_rest_saves_up_no_more_than_the_credit(busy_tokens: int, credit_tokens: int, weight: float) -> None:
    shares = Shares({"late": weight}, credit_tokens, 10)
    shares.enter("busy")
    for _ in range(20):
        shares.enter("busy")
        shares.leave("busy", busy_tokens)
    shares.enter("late")
    assert shares.time_of("busy") - shares.time_of("late") <= credit_tokens / weight + 1e-6


@given(st.integers(1, 50))
def test_as_many_projects_are_remembered_as_the_bound_says(count: int) -> None:
    shares = Shares({}, 0, 5)
    for number in range(count):
        shares.enter(str(number))
    for number in range(count):
        shares.leave(str(number), number)
    assert len(shares._virtual) <= 5


@given(st.randoms(use_true_random=False), st.integers(-3, 0))
def test_nobody_starves_however_much_comes_that_is_more_urgent_or_smaller(rng: random.Random, priority: int) -> None:
    world = World(make())
    for _ in range(4):
        world.submit(1, project="b", priority=2, tokens=10)
    world.decide()
    world.submit(4, project="a", priority=priority, tokens=10)  # needs the whole machine
    (low,) = {member for member in world.claims if member.endswith(".3")}
    deadline = (2 - priority + 3) * 100.0  # a level each ageing_s, and one of waiting for room
    while low not in world.begun:
        world.now += 5.0
        assert world.now < deadline + 200.0
        world.submit(rng.randint(1, 2), project=rng.choice("bc"), priority=2, tokens=5)
        if running := sorted(world.running):
            world.end(rng.choice(running))
        world.decide()
        world.check()


def test_a_rollout_makes_room_so_often_and_then_no_more() -> None:
    world = World(make(sandboxes=1, slots=1))
    world.submit(1, tokens=10)
    world.decide()
    for _ in range(5):
        world.submit(1, priority=5, tokens=10)
        world.decide()
        for rollout_id in sorted(world.stops):
            world.stop(rollout_id)
        world.decide()
        urgent = [r for r in world.running if r != "1.0"]
        for rollout_id in urgent:
            world.end(rollout_id)
        world.decide()
    assert world.made_room == {"1.0": 3}
    assert "1.0" in world.running
