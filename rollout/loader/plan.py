"""The plan of an epoch: which rollouts, in which order, packed into which sequence of which rank; from metadata alone.

Nothing is drawn from a generator: the order of a unit is a hash of (seed, epoch, its name), so ranks on
different hosts, with different versions of numpy, and with directories in another order, plan the same.
`Plan.digest` says whether they did.

Invariants:
1. Each rollout is in exactly one sequence, or `verdicts` says why it is in none.
2. No sequence has more than `token_budget` tokens.
3. Every rank has the same number of sequences in a step.

See: docs/formats/shards.md, "Plans".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from enum import IntEnum

import msgspec
import numpy as np

from rollout.errors import RequestError
from rollout.loader.metadata import NO_VERSION, Column, Metadata
from rollout.loader.packing import pack_for_ranks


class Verdict(IntEnum):
    """Why a rollout is not in a plan; the first that holds."""

    CHOSEN = 0
    INFRA_FAILURE = 1
    JUDGE = 2
    FINISH_REASON = 3
    UNREWARDED = 4
    NOTHING_TRAINABLE = 5
    OLD_VERSION = 6
    TOO_LONG = 7
    SMALL_GROUP = 8
    TAIL = 9


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """Which rollouts a plan takes; what is dropped is counted, never silent.

    `finish_reasons` None: any.  `version_min`: the oldest version that a token may be drawn with.  `usable_min`: a
    group with fewer members that pass is dropped; None: one that is not complete.
    """

    finish_reasons: frozenset[str] | None = None
    needs_reward: bool = True
    needs_trainable: bool = True
    keeps_infra_failures: bool = False
    keeps_judges: bool = False
    version_min: int | None = None
    usable_min: int | None = 1


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """How what was taken becomes steps.

    A unit is a group if `whole_groups`, else a rollout; a step has `step_units_count` of them (the last one fewer,
    unless `drops_tail`), its units are in no other step.
    """

    seed: int
    epoch: int
    token_budget: int
    world_size: int = 1
    step_units_count: int = 64
    whole_groups: bool = True
    drops_tail: bool = False


class Plan:
    """What `make_plan` found.  Sequence j of a rank in a step is `sequences(step, rank)[j]`: rows, in order."""

    def __init__(self, layout: Layout, rows: Column, starts: Column, firsts: Column, verdicts: Column) -> None:
        """`rows[starts[s]:starts[s + 1]]` are sequence s; those of step i begin at `firsts[i]`, rank after rank."""
        self.layout = layout
        self.rows, self._starts, self._firsts = rows, starts, firsts
        self.verdicts = verdicts
        """u8, a Verdict for each row of the metadata."""
        self.digest = ""

    def __len__(self) -> int:
        return len(self._firsts) - 1

    def sequences(self, step: int, rank: int) -> list[Column]:
        """The rows of each sequence that a rank computes in a step; IndexError beyond the plan."""
        if not (0 <= step < len(self) and 0 <= rank < self.layout.world_size):
            raise IndexError(f"the plan has {len(self)} steps and {self.layout.world_size} ranks, not ({step}, {rank})")
        first, end = int(self._firsts[step]), int(self._firsts[step + 1])
        each_count = (end - first) // self.layout.world_size
        mine = range(first + rank * each_count, first + (rank + 1) * each_count)
        return [self.rows[self._starts[s] : self._starts[s + 1]] for s in mine]

    @property
    def sequences_count(self) -> int:
        """Of all ranks and steps, those without a rollout not counted."""
        return int(np.count_nonzero(np.diff(self._starts)))

    @property
    def dropped(self) -> dict[Verdict, int]:
        """How many rollouts are in no sequence, by the reason."""
        counts = np.bincount(self.verdicts, minlength=len(Verdict))
        return {verdict: int(counts[verdict]) for verdict in Verdict if verdict and counts[verdict]}


def make_plan(metadata: Metadata, layout: Layout, rules: Rules) -> Plan:
    """Choose, shuffle, cut into steps and pack.  RequestError for a layout that cannot be."""
    for name in ("token_budget", "world_size", "step_units_count"):
        if getattr(layout, name) < 1:
            raise RequestError(f"{name} is {getattr(layout, name)}, must be at least 1")
    verdicts = _judge(metadata, rules, layout.token_budget)
    _drop_small_groups(metadata, rules, verdicts)
    units = _shuffled(metadata, layout, verdicts)
    steps = [units[at : at + layout.step_units_count] for at in range(0, len(units), layout.step_units_count)]
    if layout.drops_tail and steps and len(steps[-1]) < layout.step_units_count:
        verdicts[[row for unit in steps.pop() for row in unit]] = Verdict.TAIL
    rows: list[int] = []
    starts, firsts = [0], [0]
    lengths = metadata.tokens_count.tolist()
    for step in steps:
        members = [row for unit in step for row in unit]
        packed = pack_for_ranks([lengths[row] for row in members], layout.token_budget, layout.world_size)
        for sequence in (each for rank in packed for each in rank):
            rows.extend(members[item] for item in sequence)
            starts.append(len(rows))
        firsts.append(len(starts) - 1)
    plan = Plan(layout, np.array(rows, "i8"), np.array(starts, "i8"), np.array(firsts, "i8"), verdicts)
    plan.digest = _digest(metadata, plan)
    return plan


def _judge(metadata: Metadata, rules: Rules, token_budget: int) -> Column:
    """A verdict for each row by itself."""
    verdicts = np.zeros(len(metadata), "u1")

    def drop(verdict: Verdict, where: Column) -> None:
        verdicts[(verdicts == Verdict.CHOSEN) & where] = verdict

    if not rules.keeps_infra_failures:
        drop(Verdict.INFRA_FAILURE, metadata.is_infra_failure)
    if not rules.keeps_judges:
        drop(Verdict.JUDGE, metadata.is_judge)
    if rules.finish_reasons is not None:
        allowed = [text in rules.finish_reasons for text in metadata.finish_reasons.texts]
        drop(Verdict.FINISH_REASON, ~np.array(allowed, bool)[metadata.finish_reason])
    if rules.needs_reward:
        drop(Verdict.UNREWARDED, np.isnan(metadata.reward))
    if rules.needs_trainable:
        drop(Verdict.NOTHING_TRAINABLE, metadata.trainable_count == 0)
    if rules.version_min is not None:
        drop(
            Verdict.OLD_VERSION,
            (metadata.version_min != NO_VERSION) & (metadata.version_min < rules.version_min),
        )
    drop(Verdict.TOO_LONG, metadata.tokens_count > token_budget)
    return verdicts


def _drop_small_groups(metadata: Metadata, rules: Rules, verdicts: Column) -> None:
    chosen = verdicts == Verdict.CHOSEN
    usable = np.bincount(metadata.group[chosen], minlength=len(metadata.groups.texts))[metadata.group]
    least = metadata.group_size if rules.usable_min is None else rules.usable_min
    verdicts[chosen & (usable < least)] = Verdict.SMALL_GROUP


def _shuffled(metadata: Metadata, layout: Layout, verdicts: Column) -> list[list[int]]:
    """The units of the epoch in its order; members of a group in theirs."""
    units: dict[str, list[int]] = {}
    for row in np.flatnonzero(verdicts == Verdict.CHOSEN).tolist():
        name = metadata.groups.texts[metadata.group[row]] if layout.whole_groups else metadata.name(row)
        units.setdefault(name, []).append(row)
    for members in units.values():
        members.sort(key=lambda row: (int(metadata.group_index[row]), metadata.rollout_ids[row]))
    key = hashlib.sha256(f"{layout.seed}/{layout.epoch}".encode()).digest()

    def order(name: str) -> tuple[bytes, str]:
        return hashlib.blake2b(name.encode(), digest_size=16, key=key).digest(), name

    return [units[name] for name in sorted(units, key=order)]


def _digest(metadata: Metadata, plan: Plan) -> str:
    """Of what every rank must agree on: names and lengths of the rollouts, in their order, and where sequences end."""
    digest = hashlib.sha256(msgspec.json.encode(plan.layout))
    for part in _names(metadata, plan.rows):
        digest.update(part)
    for column in (metadata.tokens_count[plan.rows], plan._starts, plan._firsts):  # noqa: SLF001 - it is being made
        digest.update(column.astype("<i8").tobytes())
    return digest.hexdigest()


def _names(metadata: Metadata, rows: Column) -> Iterable[bytes]:
    return (metadata.name(row).encode() + b"\0" for row in rows.tolist())
