"""`RolloutClient`: the same as `AsyncRolloutClient`, for programs without an event loop.

See: dsec/client/loop.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Self, Unpack

from dsec.client.loop import LOOP
from rollout.client.aio import PATIENCE_S, AsyncRolloutClient
from rollout.client.asking import RECORD, FieldName, JobOptions, Prompt
from rollout.client.values import Group, Trajectory, Update
from rollout.engine import EngineInfo, PauseMode, Sampling, Scored
from rollout.record import QuickAnswer
from rollout.rpc.listing import RolloutSummary, Standing


class RolloutClient:
    """A client of one service; a context manager.  Every method is as in `AsyncRolloutClient`."""

    def __init__(self, address: str = "", *, token: str = "", patience_s: float = PATIENCE_S) -> None:
        """As of `AsyncRolloutClient`."""

        async def make() -> AsyncRolloutClient:  # gRPC takes the loop that runs
            return AsyncRolloutClient(address, token=token, patience_s=patience_s)

        self._client = LOOP.run(make())

    def __enter__(self) -> Self:
        """As it is; it connects when it is used."""
        return self

    def __exit__(self, *_: object) -> None:
        """Hang up."""
        self.close()

    def close(self) -> None:
        """Hang up; jobs run on."""
        LOOP.run(self._client.close())

    def rollouts(
        self,
        prompts: Iterable[Prompt],
        *,
        group_size: int = 1,
        request_id: str = "",
        fields: Sequence[FieldName] = RECORD,
        **options: Unpack[JobOptions],
    ) -> Iterator[Group]:
        """Groups of a job as they finish."""
        return LOOP.iterate(
            self._client.rollouts(prompts, group_size=group_size, request_id=request_id, fields=fields, **options)
        )

    def submit(
        self,
        prompts: Iterable[Prompt],
        *,
        group_size: int = 1,
        request_id: str = "",
        fields: Sequence[FieldName] = RECORD,
        **options: Unpack[JobOptions],
    ) -> Iterator[Update]:
        """Start a job, or find it, and follow it."""
        return LOOP.iterate(
            self._client.submit(prompts, group_size=group_size, request_id=request_id, fields=fields, **options)
        )

    def attach(self, request_id: str, from_event: int = 0, fields: Sequence[FieldName] = RECORD) -> Iterator[Update]:
        """Follow a job from an event on."""
        return LOOP.iterate(self._client.attach(request_id, from_event, fields))

    def replay(self, rollout_id: str, from_event: int = 0, fields: Sequence[FieldName] = RECORD) -> Iterator[Update]:
        """The durable events of one rollout."""
        return LOOP.iterate(self._client.replay(rollout_id, from_event, fields))

    def get(self, rollout_id: str, fields: Sequence[FieldName] = RECORD) -> Trajectory:
        """One rollout as it is now."""
        return LOOP.run(self._client.get(rollout_id, fields))

    def list(
        self,
        *,
        request_id: str = "",
        group_id: str = "",
        project: str = "",
        states: Iterable[Standing] = (),
        unacknowledged_only: bool = False,
        page_size: int = 0,
    ) -> Iterator[RolloutSummary]:
        """Rollouts of the service's log."""
        return LOOP.iterate(
            self._client.list(
                request_id=request_id,
                group_id=group_id,
                project=project,
                states=states,
                unacknowledged_only=unacknowledged_only,
                page_size=page_size,
            )
        )

    def cancel(self, request_id: str) -> int:
        """End a job."""
        return LOOP.run(self._client.cancel(request_id))

    def preempt(
        self,
        *,
        rollout_ids: Sequence[str] | None = None,
        request_id: str | None = None,
        everything: bool = False,
        cause: str = "",
    ) -> tuple[str, ...]:
        """Stop rollouts at a token boundary."""
        return LOOP.run(
            self._client.preempt(rollout_ids=rollout_ids, request_id=request_id, everything=everything, cause=cause)
        )

    def resume(
        self, *, rollout_ids: Sequence[str] | None = None, request_id: str | None = None, everything: bool = False
    ) -> tuple[str, ...]:
        """Let rollouts go on."""
        return LOOP.run(self._client.resume(rollout_ids=rollout_ids, request_id=request_id, everything=everything))

    def pause_engine(self, mode: PauseMode = "keep") -> None:
        """Draw no more tokens."""
        LOOP.run(self._client.pause_engine(mode))

    def resume_engine(self) -> None:
        """Draw tokens again."""
        LOOP.run(self._client.resume_engine())

    def update_policy(self, checkpoint: str, policy_version: int) -> EngineInfo:
        """Draw with other weights."""
        return LOOP.run(self._client.update_policy(checkpoint, policy_version))

    def ack(self, rollout_ids: Iterable[str]) -> int:
        """Say that these records are stored."""
        return LOOP.run(self._client.ack(rollout_ids))

    def score_tokens(
        self, token_ids: Sequence[int], *, top_logprobs_count: int = 0, returns_hidden: bool = False
    ) -> Scored:
        """Logprobs of given tokens."""
        asked = self._client.score_tokens(
            token_ids, top_logprobs_count=top_logprobs_count, returns_hidden=returns_hidden
        )
        return LOOP.run(asked)

    def quick(
        self,
        rollout_id: str,
        tasks: Iterable[str | tuple[str, str]],
        *,
        request_id: str = "",
        answer_tokens_count_max: int = 0,
        sampling: Sampling | None = None,
    ) -> tuple[QuickAnswer, ...]:
        """Ask Quick Instructions about a rollout's context."""
        return LOOP.run(
            self._client.quick(
                rollout_id,
                tasks,
                request_id=request_id,
                answer_tokens_count_max=answer_tokens_count_max,
                sampling=sampling,
            )
        )
