"""Who runs, who samples, and who makes room: decisions over a table of rollouts.  Pure: time is passed in.

The caller says what happened, then asks `decide`; each decision is in force in the table when it is returned.
There are three resources.  A rollout that was started holds tokens (the bound of its context) and a sandbox
until it ends; an engine slot it holds while it samples and no longer, so a tool that takes an hour costs no
engine anything.  What is queued is a row, not a task.

Who is first is one rule, for starts and for slots alike:

| by | which is |
|---|---|
| level | the priority, and one more for every `ageing_s` in which the class (project, priority) got nothing |
| share | where the project stands (`rollout/scheduling/shares.py`), with what it has under way |
| age | the oldest row; a preempted rollout keeps its number, so it stands at the head of its class |

What does not fit is passed by what does, but for no longer than `ageing_s`: then nothing behind it starts.

A row makes rollouts of a lower level make room for its priority: a slot at the next token boundary (Yield), all but a
sleeping sandbox at the next step (Preempt).  What overtook a higher priority by its age has that level, and a rollout
makes room `preemptions_count_max` times at most: no two push each other out for ever.

Invariants:
1. What is held never exceeds the capacity.
2. A claim starts whole or not at all.
3. No slot is free while somebody waits for one; nothing that fits is queued, but behind a row that is due.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TypeVar

from dsec.errors import ResourceExhaustedError
from rollout.errors import RequestError
from rollout.scheduling.claims import Capacity, Claim, Decision, Grant, Preempt, Rules, Start, Yield
from rollout.scheduling.lines import Class, Lines
from rollout.scheduling.shares import Shares

T = TypeVar("T")


@dataclass(slots=True)
class _Queued:
    claim: Claim
    number: int
    passed_s: float | None = None
    """Since when it is the oldest of its class and does not fit."""
    made_room: bool = False
    """Others were preempted for it."""
    holds_sandbox: bool = False
    """It was preempted and its sandbox counts as one that runs: who waits for that must not stand in its way."""

    @property
    def shape(self) -> tuple[int, int, bool]:
        return (*self.claim.shape, self.holds_sandbox)


@dataclass(slots=True)
class _Row:
    claim: Claim
    """Of this rollout alone."""
    number: int
    level: int
    runs: bool = True
    turn_tokens: int = 0
    """What it is expected to sample in the turn for which it waits or has a slot."""
    slot_level: int = 0
    is_yielding: bool = False
    is_asleep: bool = False
    preemptions_count: int = 0


class Scheduler:
    """The table."""

    def __init__(self, capacity: Capacity, rules: Rules) -> None:
        """Nothing is queued, nothing runs."""
        self.capacity = capacity
        self._rules = rules
        self._shares = Shares(rules.weights, rules.credit_tokens, capacity.projects)
        self._queue: Lines[_Queued] = Lines(rules.ageing_s)
        self._turns: Lines[_Row] = Lines(rules.ageing_s)
        self._queued: dict[str, _Queued] = {}
        self._aside: dict[str, _Queued] = {}
        self._rows: dict[str, _Row] = {}
        self._samplers: dict[str, _Row] = {}
        self._stopping: dict[str, _Row] = {}
        self._rollouts_of: Counter[str] = Counter()
        self._running_tokens_of: Counter[str] = Counter()
        self._turn_tokens_of: Counter[str] = Counter()
        self._last_number = 0
        self._is_changed = False
        self.tokens_held = self.sandboxes_held = self.asleep_count = 0

    @property
    def slots_held(self) -> int:
        """Rollouts that sample."""
        return len(self._samplers)

    @property
    def queued_count(self) -> int:
        """Rollouts that wait to be started, those that were set aside included."""
        return len(self._queued) + len(self._aside)

    @property
    def running_count(self) -> int:
        """Rollouts that were started and hold what they need."""
        return sum(row.runs for row in self._rows.values())

    def is_queued(self, rollout_id: str) -> bool:
        """Whether it waits to be started, or was set aside."""
        return rollout_id in self._queued or rollout_id in self._aside

    def may_fit(self, claim: Claim) -> bool:
        """Whether it fits when nothing else runs."""
        tokens, sandboxes = claim.shape
        return tokens <= self.capacity.tokens and sandboxes <= self.capacity.sandboxes

    def fitting(self, claim: Claim) -> list[Claim]:
        """The claim, or if it does not fit whole (any more) one for each rollout.  RequestError: not even those fit."""
        if self.may_fit(claim):
            return [claim]
        singles = [replace(claim, members=(member,)) for member in claim.members]
        self._check_fit(singles[0])
        return singles

    def check(self, claims: Iterable[Claim]) -> None:
        """Whether these may be queued, or start at once.  RequestError: never; ResourceExhaustedError: not now."""
        claims = list(claims)
        for claim in claims:
            self._check_fit(claim)
        count, lowest = sum(len(claim.members) for claim in claims), min(claim.priority for claim in claims)
        tokens, sandboxes = map(sum, zip(*(claim.shape for claim in claims), strict=True))
        is_first = all(priority < lowest for _, priority in self._queue.classes)
        if self.queued_count + count > self.capacity.queued and not (is_first and self._fits((tokens, sandboxes))):
            raise ResourceExhaustedError(
                f"{self.queued_count} rollouts are queued, {count} more would exceed {self.capacity.queued}: "
                "submit again when some have started"
            )
        if len(self._rollouts_of.keys() | {claim.project for claim in claims}) > self.capacity.projects:
            raise ResourceExhaustedError(
                f"{self.capacity.projects} projects have rollouts here: submit again when one of them is through"
            )

    def _check_fit(self, claim: Claim) -> None:
        if not self.may_fit(claim):
            (tokens, sandboxes), has = claim.shape, self.capacity
            raise RequestError(
                f"a group starts whole: {len(claim.members)} rollouts of {claim.members[0].rpartition('.')[0]!r} need "
                f"{sandboxes} sandboxes and {tokens} tokens of context at once, and this service has {has.sandboxes} "
                f"and {has.tokens}: ask for less, or raise DSEC_SANDBOXES_COUNT_MAX or DSEC_TOKENS_COUNT_MAX"
            )

    def enqueue(self, claim: Claim, now: float) -> None:
        """Queue rollouts that are not known yet."""
        self._put(_Queued(claim, self._last_number + 1), now)
        self._last_number += len(claim.members)
        self._rollouts_of[claim.project] += len(claim.members)

    def set_aside(self, rollout_id: str) -> tuple[str, ...]:
        """Do not start the queued claim of this rollout before `bring_back`; whom that concerns."""
        if (queued := self._queued.get(rollout_id)) is None:
            return ()
        self._take(queued)
        self._aside |= dict.fromkeys(queued.claim.members, queued)
        return queued.claim.members

    def bring_back(self, rollout_id: str, now: float) -> tuple[str, ...]:
        """Queue again, in its old place, what was set aside with this rollout; whom that concerns."""
        if (queued := self._aside.get(rollout_id)) is None:
            return ()
        for member in queued.claim.members:
            del self._aside[member]
        self._put(queued, now)
        return queued.claim.members

    def join(self, rollout_id: str, host_id: str) -> None:
        """A rollout within one that runs, whose claim counts for both (a judge): it may want slots until its `end`."""
        host = self._rows[host_id]
        self._last_number += 1
        claim = replace(host.claim, members=(rollout_id,), tokens=0, sandboxes=0)
        self._rows[rollout_id] = _Row(claim, self._last_number, host.level)
        self._rollouts_of[claim.project] += 1

    def want_slot(self, rollout_id: str, turn_tokens: int, now: float) -> None:
        """A rollout that runs wants to sample up to so many (1 or more) tokens."""
        row = self._rows[rollout_id]
        row.turn_tokens = self._shares.expected(row.claim.project, turn_tokens)
        self._shares.enter(row.claim.project)
        self._turns.put(row.claim.of, (), row.number, row, now)

    def leave_slot(self, rollout_id: str, tokens: int) -> None:
        """It no longer wants or has a slot, and sampled so many tokens."""
        row = self._rows[rollout_id]
        if self._samplers.pop(rollout_id, None) is None:
            self._turns.take(row.claim.of, (), row.number)
        else:
            _add(self._turn_tokens_of, row.claim.project, -row.turn_tokens)
        self._shares.leave(row.claim.project, tokens)
        row.turn_tokens, row.is_yielding = 0, False

    def stopping(self, rollout_id: str) -> None:
        """The caller is preempting it for a reason of its own: nobody else needs to."""
        self._stopping[rollout_id] = self._rows[rollout_id]

    def preempted(self, rollout_id: str, now: float, *, is_aside: bool = False) -> None:
        """It stopped, with no slot: it is queued again in its old place, or set aside.

        Its sandbox sleeps, and counts as asleep if there is room for that, else as one that runs.
        """
        row = self._rows[rollout_id]
        row.runs = False
        self._stopping.pop(rollout_id, None)
        self._hold(row, -1)
        self._is_changed = True
        queued = _Queued(row.claim, row.number)
        if row.claim.sandboxes and self.asleep_count < self.capacity.asleep:
            row.is_asleep = True
            self.sandboxes_held -= 1
            self.asleep_count += 1
        elif row.claim.sandboxes:
            queued = _Queued(replace(row.claim, sandboxes=0), row.number, holds_sandbox=True)
        if is_aside:
            self._aside[rollout_id] = queued
        else:
            self._put(queued, now)

    def end(self, rollout_id: str) -> None:
        """A rollout that was started, and has no slot, ended: whatever it held is free."""
        row = self._rows.pop(rollout_id)
        self._stopping.pop(rollout_id, None)
        if row.runs:
            self._hold(row, -1)
        elif (queued := self._queued.get(rollout_id)) is not None:
            self._take(queued)
        else:
            del self._aside[rollout_id]
        if row.is_asleep:
            self.asleep_count -= 1
        else:
            self.sandboxes_held -= row.claim.sandboxes
        _add(self._rollouts_of, row.claim.project, -1)
        self._is_changed = True

    def withdraw(self, rollout_id: str) -> tuple[str, ...]:
        """Forget the claim of a rollout that was never started; whom that concerns."""
        queued = self._queued.get(rollout_id) or self._aside.get(rollout_id)
        if queued is None or rollout_id in self._rows:
            return ()
        if rollout_id in self._queued:
            self._take(queued)
        for member in queued.claim.members:
            self._aside.pop(member, None)
        _add(self._rollouts_of, queued.claim.project, -len(queued.claim.members))
        self._is_changed = True
        return queued.claim.members

    def decide(self, now: float) -> tuple[Decision, ...]:
        """What follows from all that was told so far."""
        return (*self._grant(now), *self._yield(now), *self._start(now))

    def _grant(self, now: float) -> Iterator[Decision]:
        while self.slots_held < self.capacity.slots and self._turns.classes:
            of = min(self._turns.classes, key=self._place(self._turns, self._turn_tokens_of, now))
            row = self._turns.heads(of)[0]
            row.slot_level = self._risen(self._turns, of, now)
            self._turns.take(of, (), row.number)
            self._turns.serve(of, now)
            (rollout_id,) = row.claim.members
            self._samplers[rollout_id] = row
            self._turn_tokens_of[row.claim.project] += row.turn_tokens
            yield Grant(rollout_id)

    def _yield(self, now: float) -> Iterator[Decision]:
        """As many slots come free as there are waiting rollouts above somebody who samples."""
        if not self._turns.classes:
            return
        stay = [row for name, row in self._samplers.items() if not (row.is_yielding or name in self._stopping)]
        coming = self.slots_held - len(stay)
        highest = max(priority for _, priority in self._turns.classes)
        removable = self._removable((row for row in stay if row.slot_level < highest), lambda row: row.slot_level)
        for of in self._ordered(self._turns, self._turn_tokens_of, now) if removable else ():
            waiting_count = self._turns.count(of)
            waiting_count, coming = max(0, waiting_count - coming), max(0, coming - waiting_count)
            while waiting_count and removable and removable[0].slot_level < of[1]:
                victim = removable.pop(0)
                waiting_count -= 1
                victim.is_yielding = True
                victim.preemptions_count += 1
                yield Yield(victim.claim.members[0])

    def _start(self, now: float) -> Iterator[Decision]:
        while self._is_changed:
            self._is_changed = is_blocked = False
            candidates: list[_Row] | None = None
            for of in self._ordered(self._queue, self._running_tokens_of, now):
                oldest, *others = self._queue.heads(of)
                ready = [queued for queued in (oldest, *others) if self._fits(queued.claim.shape)]
                if oldest not in ready and not is_blocked:
                    oldest.passed_s = now if oldest.passed_s is None else oldest.passed_s
                    if candidates is None:
                        candidates = self._removable(self._stoppable(), lambda row: row.level)
                    yield from self._make_room(oldest, candidates)
                    is_blocked = oldest.made_room or now - oldest.passed_s > self._rules.ageing_s
                if fits := next((queued for queued in ready if queued.holds_sandbox or not is_blocked), None):
                    yield self._begin(fits, now)
                    break

    def _begin(self, queued: _Queued, now: float) -> Start:
        claim, level = queued.claim, self._risen(self._queue, queued.claim.of, now)
        self._take(queued)
        self._queue.serve(claim.of, now)
        self.sandboxes_held += claim.shape[1]
        for number, member in enumerate(claim.members, queued.number):
            row = self._rows.get(member)
            if row is None:
                row = self._rows[member] = _Row(replace(claim, members=(member,)), number, level)
            self.asleep_count -= row.is_asleep
            row.level, row.runs, row.is_asleep = level, True, False
            self._hold(row, 1)
        return Start(claim.members)

    def _make_room(self, queued: _Queued, candidates: list[_Row]) -> Iterator[Decision]:
        """Preempt what is below it, if that, and what is stopping already, is enough for it to fit."""
        tokens = self.tokens_held + queued.claim.shape[0] - self.capacity.tokens
        sandboxes = self.sandboxes_held + queued.claim.shape[1] - self.capacity.sandboxes
        asleep = self.capacity.asleep - self.asleep_count
        below = takewhile(lambda row: row.level < queued.claim.priority, candidates)
        victims: list[_Row] = []
        for row in (*self._stopping.values(), *below):
            if tokens <= 0 and sandboxes <= 0:
                break
            tokens -= row.claim.tokens
            if row.claim.sandboxes and asleep:
                asleep -= 1
                sandboxes -= 1
            victims.append(row)
        if tokens > 0 or sandboxes > 0:
            return
        for victim in victims:
            (rollout_id,) = victim.claim.members
            if rollout_id not in self._stopping:
                self._stopping[rollout_id] = victim
                victim.preemptions_count += 1
                yield Preempt(rollout_id)
        queued.made_room = True

    def _stoppable(self) -> Iterator[_Row]:
        """Who holds something that somebody of a higher priority may want."""
        highest = max(priority for _, priority in self._queue.classes)
        for rollout_id, row in self._rows.items():
            if row.level < highest and row.runs and rollout_id not in self._stopping and any(row.claim.shape):
                yield row

    def _removable(self, rows: Iterable[_Row], level: Callable[[_Row], int]) -> list[_Row]:
        """Who makes room first: the lowest, of the project that had most, the youngest."""
        return sorted(
            (row for row in rows if row.preemptions_count < self._rules.preemptions_count_max),
            key=lambda row: (level(row), -self._shares.time_of(row.claim.project), -row.number),
        )

    def _fits(self, shape: tuple[int, int]) -> bool:
        tokens, sandboxes = self.tokens_held + shape[0], self.sandboxes_held + shape[1]
        return tokens <= self.capacity.tokens and sandboxes <= self.capacity.sandboxes

    def _hold(self, row: _Row, sign: int) -> None:
        self.tokens_held += sign * row.claim.tokens
        _add(self._running_tokens_of, row.claim.project, sign * row.claim.tokens)

    def _put(self, queued: _Queued, now: float) -> None:
        self._queue.put(queued.claim.of, queued.shape, queued.number, queued, now)
        self._queued |= dict.fromkeys(queued.claim.members, queued)
        self._is_changed = True

    def _take(self, queued: _Queued) -> None:
        self._queue.take(queued.claim.of, queued.shape, queued.number)
        for member in queued.claim.members:
            del self._queued[member]
        self._is_changed = True

    def _ordered(self, lines: Lines[T], under_way: Counter[str], now: float) -> list[Class]:
        """Classes in which something waits, first who is first."""
        return sorted(lines.classes, key=self._place(lines, under_way, now))

    def _place(self, lines: Lines[T], under_way: Counter[str], now: float) -> Callable[[Class], tuple[float, ...]]:
        return lambda of: (-lines.level(of, now), self._shares.time_of(of[0], under_way[of[0]]), lines.oldest(of))

    def _risen(self, lines: Lines[T], of: Class, now: float) -> int:
        """The highest priority that it overtakes by its age; its own if none."""
        level = lines.level(of, now)
        return max([of[1], *(other[1] for other in lines.classes if lines.level(other, now) < level)])


def _add(counts: Counter[str], project: str, count: int) -> None:
    counts[project] += count
    if not counts[project]:
        del counts[project]
