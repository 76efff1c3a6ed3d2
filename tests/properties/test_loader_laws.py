"""Laws of plans and packed mini-batches, over drawn rollouts, groups, budgets and ranks."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.export.shards import ShardWriter
from rollout.export.testing import made_up_record
from rollout.loader import NO_VERSION, Dataset, Rules, Verdict
from rollout.loader.packing import pack, pack_for_ranks, spread
from rollout.record import TrajectoryRecord

LENGTHS = st.lists(st.integers(1, 100), max_size=60)


@given(LENGTHS, st.integers(100, 300))
def test_every_item_is_packed_once_within_the_budget(lengths: list[int], budget: int) -> None:
    bins = pack(lengths, budget)
    assert sorted(item for each in bins for item in each) == list(range(len(lengths)))
    assert [each for each in bins if not (each and sum(lengths[item] for item in each) <= budget)] == []
    least = -(-sum(lengths) // budget)
    assert len(bins) <= 11 / 9 * max(least, _first_fit(lengths, budget)) + 1


@given(LENGTHS, st.integers(100, 300), st.integers(1, 5))
def test_ranks_get_as_many_sequences_and_about_as_many_tokens(lengths: list[int], budget: int, ranks: int) -> None:
    dealt = pack_for_ranks(lengths, budget, ranks)
    assert sorted(item for rank in dealt for each in rank for item in each) == list(range(len(lengths)))
    assert len({len(rank) for rank in dealt}) == 1
    assert len(dealt[0]) == -(-len(pack(lengths, budget)) // ranks)
    loads = [[sum(lengths[item] for item in each) for each in rank] for rank in dealt]
    assert [load for rank in loads for load in rank if load > budget] == []
    if spread(lengths, budget, len(dealt[0]) * ranks) is not None:
        totals = [sum(rank) for rank in loads]
        assert max(totals) - min(totals) <= max(lengths, default=0) * max(1, len(dealt[0]))


def _first_fit(lengths: list[int], budget: int) -> int:
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        at = next((i for i, room in enumerate(rooms) if room >= length), None)
        if at is None:
            rooms.append(budget - length)
        else:
            rooms[at] -= length
    return len(rooms)


@dataclass(frozen=True)
class Asked:
    """A drawn training set and a plan of it."""

    records: list[TrajectoryRecord]
    token_budget: int
    world_size: int
    step_units_count: int
    whole_groups: bool
    usable_min: int | None


@st.composite
def asked(draw: st.DrawFn) -> Asked:
    records = []
    for group in range(draw(st.integers(1, 5))):
        size = draw(st.integers(1, 4))
        for index in range(draw(st.integers(1, size))):
            turns = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 30)), min_size=1, max_size=3))
            reward = draw(st.sampled_from([None, 0.0, 0.5, 1.0]))
            finish = draw(st.sampled_from(["STOP", "STOP", "LENGTH_TURN", None]))
            version = draw(st.integers(0, 3))
            made = made_up_record(
                f"g{group}", index, size=size, turns=tuple(turns), reward=reward, finish_reason=finish, version=version
            )
            records.append(made)
    return Asked(
        records,
        draw(st.integers(40, 150)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
        draw(st.booleans()),
        draw(st.sampled_from([None, 1, 2])),
    )


@contextmanager
def opened(records: list[TrajectoryRecord]) -> Iterator[Dataset]:
    place = Path(tempfile.mkdtemp())
    try:
        with ShardWriter.open(place, rows_max=3) as writer:
            for start in range(0, len(records), 2):
                writer.append(records[start : start + 2])
        yield Dataset.open(place)
    finally:
        shutil.rmtree(place)


@settings(max_examples=60)
@given(asked())
def test_every_token_of_every_chosen_rollout_is_in_one_sequence_and_every_other_has_a_verdict(asked: Asked) -> None:
    with opened(asked.records) as dataset:
        rules = Rules(usable_min=asked.usable_min, version_min=1, finish_reasons=frozenset({"STOP"}))
        plan = dataset.plan(
            seed=1,
            epoch=2,
            token_budget=asked.token_budget,
            world_size=asked.world_size,
            step_units_count=asked.step_units_count,
            whole_groups=asked.whole_groups,
            rules=rules,
        )
        named = {record.rollout_id: record for record in asked.records}
        seen: dict[str, int] = {}
        for rank in range(asked.world_size):
            for batch in dataset.batches(plan, rank):
                assert len(batch.sequences) == len(plan.sequences(batch.step, rank))
                for sequence in batch:
                    assert len(sequence) <= asked.token_budget
                    assert [b - a for a, b in pairwise(sequence.cu_seqlens)] == [m.length for m in sequence.members]
                    for segment, member in enumerate(sequence.members):
                        assert member.rollout_id not in seen
                        seen[member.rollout_id] = batch.step
                        check_member(sequence, segment, named[member.rollout_id])
        verdicts = {name: Verdict(plan.verdicts[row]) for row, name in enumerate(dataset.metadata.rollout_ids)}
        assert verdicts == verdicts_of(asked)
        assert {name for name, verdict in verdicts.items() if verdict is Verdict.CHOSEN} == seen.keys()
        if asked.whole_groups:
            steps = {(name.split(".")[0], step) for name, step in seen.items()}
            assert len(steps) == len({group for group, _ in steps})
        assert sum(plan.dropped.values()) + len(seen) == len(asked.records)


def verdicts_of(asked: Asked) -> dict[str, Verdict]:
    """The rules once more, one rollout at a time."""
    alone = {record.rollout_id: verdict_of(record, asked.token_budget) for record in asked.records}
    for record in asked.records:
        if alone[record.rollout_id] is Verdict.CHOSEN:
            members = [r.rollout_id for r in asked.records if r.group.group_id == record.group.group_id]
            usable = sum(alone[member] in (Verdict.CHOSEN, Verdict.SMALL_GROUP) for member in members)
            if usable < (record.group.size if asked.usable_min is None else asked.usable_min):
                alone[record.rollout_id] = Verdict.SMALL_GROUP
    return alone


def verdict_of(record: TrajectoryRecord, token_budget: int) -> Verdict:
    if record.infra_failure is not None:
        return Verdict.INFRA_FAILURE
    if record.finish_reason != "STOP":
        return Verdict.FINISH_REASON
    if record.reward.value is None:
        return Verdict.UNREWARDED
    if not record.policy_versions:
        return Verdict.NOTHING_TRAINABLE
    if min(run.version for run in record.policy_versions) < 1:
        return Verdict.OLD_VERSION
    return Verdict.TOO_LONG if len(record.token_ids) > token_budget else Verdict.CHOSEN


def check_member(sequence: object, segment: int, record: TrajectoryRecord) -> None:
    member = sequence.members[segment]
    at = slice(member.start, member.start + member.length)
    assert sequence.token_ids[at].tolist() == list(record.token_ids)
    mask = [span.trainable for span in record.spans for _ in range(span.length)]
    assert sequence.loss_mask[at].tolist() == mask
    assert np.array_equal(sequence.logprobs[at], np.array([p or 0.0 for p in record.logprobs], "f4"))
    assert sequence.position_ids[at].tolist() == list(range(member.length))
    assert set(sequence.segment_ids[at].tolist()) == {segment}
    versions = np.full(member.length, NO_VERSION)
    for run in record.policy_versions:
        versions[run.start : run.start + run.length] = run.version
    assert np.array_equal(sequence.versions[at], versions)
    assert not sequence.advantages[at].any()
    assert member.reward == record.reward.value
    assert (member.reward is None) == (record.reward.value is None)


@settings(max_examples=25)
@given(asked(), st.integers(0, 2**70), st.integers(0, 9))
def test_a_plan_is_the_same_wherever_it_is_made_and_another_in_the_next_epoch(
    asked: Asked, seed: int, epoch: int
) -> None:
    def layout(dataset: Dataset, epoch: int) -> object:
        plan = dataset.plan(
            seed=seed, epoch=epoch, token_budget=1000, step_units_count=1, rules=Rules(needs_reward=False)
        )
        return plan.digest, [[s.tolist() for s in plan.sequences(step, 0)] for step in range(len(plan))]

    with opened(asked.records) as dataset:
        plans = [layout(dataset, each) for each in range(epoch, epoch + 40)]
        assert plans[0] == layout(dataset, epoch)
        groups = {r.group.group_id for r in asked.records if r.finish_reason and r.policy_versions}
        orders = {str(order) for _, order in plans}
        assert (len(orders) > 1) == (len(groups) > 1)
        assert len({digest for digest, _ in plans}) == 40
