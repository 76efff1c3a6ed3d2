"""Rollouts of a log a page at a time, in the order of their jobs.

See: proto/rollout/pb/v1/rollout.proto, "List".
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Literal

import msgspec

from rollout.errors import RequestError
from rollout.ledger import Ledger
from rollout.request import Group, Job

PAGE_SIZE, PAGE_SIZE_MAX = 100, 1000
Standing = Literal["queued", "awaiting_weights", "running", "preempted", "failed", "ended"]


class Filter(msgspec.Struct, frozen=True, kw_only=True):
    """Which rollouts; what is empty filters nothing."""

    request_id: str = ""
    group_id: str = ""
    project: str = ""
    states: AbstractSet[Standing] = frozenset()
    unacknowledged_only: bool = False


class RolloutSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout in short; `last_event` 0: none yet."""

    rollout_id: str
    request_id: str
    project: str
    group_id: str
    group_index: int
    state: Standing
    finish_reason: str | None = None
    reward: float | None = None
    tokens_count: int = 0
    last_event: int = 0
    is_acknowledged: bool = False


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """Some rollouts, and the token of the next page ("": there is none)."""

    rollouts: tuple[RolloutSummary, ...]
    next_page_token: str


def list_rollouts(
    ledger: Ledger, policy_version: int, wanted: Filter, page_size: int = 0, page_token: str = ""
) -> Page:
    """A page, as it is under these weights.  RequestError: a token that this log did not give, a size out of bounds."""
    if page_size > PAGE_SIZE_MAX:
        raise RequestError(f"page_size is {page_size}, must be at most {PAGE_SIZE_MAX}")
    size = page_size or PAGE_SIZE
    found: list[RolloutSummary] = []
    for request_id, nth, rollout_id, group, index in _from(ledger, page_token):
        job = ledger.jobs[request_id]
        if not _may_hold(job, group, wanted):
            continue
        summary = _summary(ledger, policy_version, job, rollout_id, group, index)
        if wanted.states and summary.state not in wanted.states:
            continue
        if wanted.unacknowledged_only and summary.is_acknowledged:
            continue
        if len(found) == size:
            return Page(rollouts=tuple(found), next_page_token=f"{request_id}/{nth}")
        found.append(summary)
    return Page(rollouts=tuple(found), next_page_token="")


def _from(ledger: Ledger, token: str) -> Iterator[tuple[str, int, str, Group, int]]:
    """Members of all jobs, from the one that a token names on: its job and its number there."""
    start_id, _, start = token.partition("/")
    if token and (start_id not in ledger.jobs or not (start.isascii() and start.isdecimal())):
        raise RequestError(f"page_token {token!r}: this log gave no such token, or has let go of its job; begin again")
    has_begun = not token
    for request_id, job in ledger.jobs.items():
        if not has_begun and request_id != start_id:
            continue
        first, nth = 0 if has_begun else int(start), 0
        for group in job.groups:
            for index in range(max(0, first - nth), group.size):
                yield request_id, nth + index, f"{group.group_id}.{index}", group, index
            nth += group.size
        has_begun = True


def _may_hold(job: Job, group: Group, wanted: Filter) -> bool:
    return (
        wanted.request_id in ("", job.request_id)
        and wanted.group_id in ("", group.group_id)
        and wanted.project in ("", job.project)
    )


def _summary(
    ledger: Ledger, policy_version: int, job: Job, rollout_id: str, group: Group, index: int
) -> RolloutSummary:
    state, stands = ledger.rollouts.get(rollout_id), standing(ledger, rollout_id)
    return RolloutSummary(
        rollout_id=rollout_id,
        request_id=job.request_id,
        project=job.project,
        group_id=group.group_id,
        group_index=index,
        state="awaiting_weights" if stands == "queued" and job.policy.min_version > policy_version else stands,
        finish_reason=state.finished.reason.value if state and state.finished else None,
        reward=state.judged.reward if state and state.judged else None,
        tokens_count=state.tokens_count if state else 0,
        last_event=ledger.lsns[rollout_id][1] if state else 0,
        is_acknowledged=rollout_id in ledger.acknowledged,
    )


def standing(ledger: Ledger, rollout_id: str) -> Standing:
    """Where a rollout stands, whatever the weights are."""
    state = ledger.rollouts.get(rollout_id)
    if state is None:
        return "queued"
    if ledger.is_done(rollout_id):
        return "ended"
    if state.failure is not None:
        return "failed"
    return "preempted" if state.preempted is not None else "running"
