"""`AsyncRolloutClient`: the calls of the rollout service with our values, over a connection that may break.

A stream that breaks is taken up after the last event that came whole, so a caller sees each event once; what a
killed server had not made durable was never sent.  Requests are idempotent by their `request_id`: a
program that was killed itself asks for the same again and gets the same from the beginning.

See: docs/training.md.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from itertools import groupby
from typing import Any, Self, Unpack

from rollout.client.asking import (
    RECORD,
    FieldName,
    JobOptions,
    Prompt,
    fill_fields,
    ids,
    mask,
    struct_of,
    submit_request,
    target,
)
from rollout.client.connection import Connection, Retry
from rollout.client.values import Group, Trajectory, Update, trajectory_of, update_of
from rollout.engine import EngineInfo, PauseMode, Sampling, Scored
from rollout.errors import RequestError
from rollout.pb.v1 import rollout_pb2 as pb
from rollout.record import QuickAnswer
from rollout.rpc.listing import RolloutSummary, Standing
from rollout.rpc.messages import fill, merge

PATIENCE_S = 600.0


class AsyncRolloutClient:
    """A client of one service; an async context manager.

    Calls raise the errors of `rollout.errors` and `dsec.errors` that the server answered with, and
    UnreachableError once no server answered for `patience_s` seconds.
    """

    def __init__(self, address: str = "", *, token: str = "", patience_s: float = PATIENCE_S) -> None:
        """`address`: HOST:PORT, `tls:HOST:PORT` or `unix:PATH`, or DSEC_ROLLOUT_URL; `token`, or DSEC_ROLLOUT_KEY.

        InvalidArgumentError.
        """
        self._connection = Connection(address, token, patience_s)

    async def __aenter__(self) -> Self:
        """As it is; it connects when it is used."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Hang up."""
        await self.close()

    async def close(self) -> None:
        """Hang up; jobs run on."""
        await self._connection.close()

    async def rollouts(
        self,
        prompts: Iterable[Prompt],
        *,
        group_size: int = 1,
        request_id: str = "",
        fields: Sequence[FieldName] = RECORD,
        **options: Unpack[JobOptions],
    ) -> AsyncGenerator[Group, None]:
        """Groups of a job as they finish, each once and whole, or with the reasons why it is not.

        Without a `request_id` it gets one of its own.  A prompt is the name of a bundled task, a task's
        folder, or a conversation (`rollout.jobs.make_conversation`).
        """
        request = submit_request(request_id or uuid.uuid4().hex, prompts, group_size, fields, options)
        ended: dict[str, Trajectory] = {}
        async with aclosing(self._until_finished(request)) as updates:
            async for update in updates:
                if update.trajectory is not None and not update.trajectory.record.lineage.judged_rollout_id:
                    ended[update.rollout_id] = update.trajectory
                if (group := _prompt_group(update, request)) is not None:
                    yield _group(group, ended)

    async def _until_finished(self, request: pb.SubmitRequest) -> AsyncGenerator[Update, None]:
        """The job's updates until all its groups have finished; of each group the end comes once."""
        left = len(request.tasks) + len(request.bundled_tasks) + len(request.conversations)
        finished: set[str] = set()
        position = _Position(request)
        retry = Retry(self._connection.patience_s)
        while True:
            async with aclosing(self._updates(position.make, position)) as updates:
                async for update in updates:
                    group = _prompt_group(update, request)
                    if group is not None and group["group_id"] in finished:
                        continue  # the service failed a member, and took it up again
                    yield update
                    finished |= {group["group_id"]} if group is not None else set()
                    if len(finished) == left:
                        return
            await retry.wait()  # rollouts were preempted: until somebody lets them go on

    async def submit(
        self,
        prompts: Iterable[Prompt],
        *,
        group_size: int = 1,
        request_id: str = "",
        fields: Sequence[FieldName] = RECORD,
        **options: Unpack[JobOptions],
    ) -> AsyncGenerator[Update, None]:
        """Start a job, or find it, and follow it from its first event until none of its rollouts runs."""
        request = submit_request(request_id or uuid.uuid4().hex, prompts, group_size, fields, options)
        position = _Position(request)
        async with aclosing(self._updates(position.make, position)) as updates:
            async for update in updates:
                yield update

    async def attach(
        self, request_id: str, from_event: int = 0, fields: Sequence[FieldName] = RECORD
    ) -> AsyncGenerator[Update, None]:
        """Follow a job from an event on until none of its rollouts runs."""
        position = _Position(pb.SubmitRequest(request_id=request_id, return_mask=mask(fields)))
        position.next_event, position.is_known = from_event, True
        async with aclosing(self._updates(position.make, position)) as updates:
            async for update in updates:
                yield update

    async def replay(
        self, rollout_id: str, from_event: int = 0, fields: Sequence[FieldName] = RECORD
    ) -> AsyncGenerator[Update, None]:
        """The durable events of one rollout, from an event on, up to now."""
        position = _Position(pb.SubmitRequest(return_mask=mask(fields)))
        position.next_event = from_event

        def make() -> tuple[str, Any]:
            request = pb.ReplayRequest(rollout_id=rollout_id, from_event=position.next_event)
            request.return_mask.extend(position.request.return_mask)
            return "Replay", request

        async with aclosing(self._updates(make, position)) as updates:
            async for update in updates:
                yield update

    async def _updates(self, make: Callable[[], tuple[str, Any]], position: _Position) -> AsyncGenerator[Update, None]:
        """Whole updates, each once, also over connections that break."""
        parts: list[pb.Update] = []
        retry = Retry(self._connection.patience_s)

        def begin() -> tuple[str, Any]:
            parts.clear()  # an event that came in part comes again
            return make()

        async with aclosing(self._connection.stream(begin, retry)) as messages:
            async for message in messages:
                position.is_known = True
                parts.append(message)
                if message.is_last:
                    updates = [update_of(merge(each)) for _, each in groupby(parts, lambda part: part.rollout_id)]
                    parts.clear()
                    position.next_event = message.event + 1
                    for update in updates:
                        yield update

    async def get(self, rollout_id: str, fields: Sequence[FieldName] = RECORD) -> Trajectory:
        """One rollout as it is now."""
        request = pb.GetRequest(rollout_id=rollout_id, return_mask=mask(fields))
        return trajectory_of(merge(await self._connection.call("Get", request)))

    async def list(
        self,
        *,
        request_id: str = "",
        group_id: str = "",
        project: str = "",
        states: Iterable[Standing] = (),
        unacknowledged_only: bool = False,
        page_size: int = 0,
    ) -> AsyncGenerator[RolloutSummary, None]:
        """Rollouts of the service's log in the order of their jobs; pages are asked for as they are needed."""
        request = pb.ListRequest(page_size=page_size)
        fill(request, {"request_id": request_id, "group_id": group_id, "project": project, "states": list(states)})
        request.unacknowledged_only = unacknowledged_only
        while True:
            page = await self._connection.call("List", request)
            for summary in page.rollouts:
                yield struct_of(summary, RolloutSummary)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def cancel(self, request_id: str) -> int:
        """End a job; how many rollouts that ended."""
        reply = await self._connection.call("Cancel", pb.CancelRequest(request_id=request_id))
        return int(reply.cancelled_count)

    async def preempt(
        self,
        *,
        rollout_ids: Sequence[str] | None = None,
        request_id: str | None = None,
        everything: bool = False,
        cause: str = "",
    ) -> tuple[str, ...]:
        """Stop rollouts at a token boundary; whom that stopped."""
        request = target(pb.PreemptRequest(cause=cause), rollout_ids, request_id, everything=everything)
        return tuple((await self._connection.call("Preempt", request)).rollout_ids)

    async def resume(
        self, *, rollout_ids: Sequence[str] | None = None, request_id: str | None = None, everything: bool = False
    ) -> tuple[str, ...]:
        """Let rollouts go on from where they stand; whom that set going."""
        request = target(pb.ResumeRequest(), rollout_ids, request_id, everything=everything)
        return tuple((await self._connection.call("Resume", request)).rollout_ids)

    async def pause_engine(self, mode: PauseMode = "keep") -> None:
        """Draw no more tokens; returns once that is so.  `score_tokens` and `quick` wait until `resume_engine`."""
        request = pb.PauseEngineRequest()
        fill(request, {"mode": mode})
        await self._connection.call("PauseEngine", request)

    async def resume_engine(self) -> None:
        """Draw tokens again."""
        await self._connection.call("ResumeEngine", pb.ResumeEngineRequest())

    async def update_policy(self, checkpoint: str, policy_version: int) -> EngineInfo:
        """Draw with the weights of a checkpoint on the server's host from here on."""
        request = fill_fields(pb.UpdatePolicyRequest(), checkpoint=checkpoint, policy_version=policy_version)
        reply = await self._connection.call("UpdatePolicy", request)
        return struct_of(reply.engine, EngineInfo)  # type: ignore[no-any-return]

    async def ack(self, rollout_ids: Iterable[str]) -> int:
        """Say that these records are stored: the log need not keep them; how many were new."""
        reply = await self._connection.call("Ack", pb.AckRequest(rollout_ids=ids(rollout_ids)))
        return int(reply.acknowledged_count)

    async def score_tokens(
        self, token_ids: Sequence[int], *, top_logprobs_count: int = 0, returns_hidden: bool = False
    ) -> Scored:
        """Logprobs of given tokens under the newest weights, and what the head was given for each if asked for."""
        request = pb.ScoreTokensRequest()
        fill_fields(request, token_ids=token_ids, top_logprobs_count=top_logprobs_count, returns_hidden=returns_hidden)
        reply = merge(await self._connection.call("ScoreTokens", request, draws=True))
        return struct_of(reply, Scored)  # type: ignore[no-any-return]

    async def quick(
        self,
        rollout_id: str,
        tasks: Iterable[str | tuple[str, str]],
        *,
        request_id: str = "",
        answer_tokens_count_max: int = 0,
        sampling: Sampling | None = None,
    ) -> tuple[QuickAnswer, ...]:
        """Ask Quick Instructions about a rollout's context, in parallel; answers in the order asked.

        Under a `request_id` the answers stay in the log, for whoever asks again; without one they are only told.
        """
        request = pb.QuickInstructionRequest(request_id=request_id, rollout_id=rollout_id)
        fill(request, {"answer_tokens_count_max": answer_tokens_count_max, "sampling": sampling})
        if isinstance(tasks, str):
            raise RequestError("tasks: give a list of them, also of one")
        for task in tasks:
            name, url = task if isinstance(task, tuple) else (task, None)
            fill_fields(request.instructions.add(), task=name, url=url)
        reply = await self._connection.call("QuickInstruction", request, retries_engine=True, draws=True)
        return tuple(struct_of(answer, QuickAnswer) for answer in reply.answers)


class _Position:
    """Where a caller stands in a job: not begun, or behind an event."""

    def __init__(self, request: pb.SubmitRequest) -> None:
        self.request = request
        self.next_event = 0
        self.is_known = False
        """Whether the server said that it has the job."""

    def make(self) -> tuple[str, Any]:
        """The call that goes on from here."""
        if not self.is_known:
            return "Submit", self.request
        request = pb.AttachRequest(request_id=self.request.request_id, from_event=self.next_event)
        request.return_mask.extend(self.request.return_mask)
        return "Attach", request


def _prompt_group(update: Update, request: pb.SubmitRequest) -> Mapping[str, Any] | None:
    """The group of a prompt that an update ends; the judges of a rollout are a group, too, and none of these."""
    group = update.group
    return group if group is not None and group["group_id"].rpartition("/")[0] == request.request_id else None


def _group(finished: Any, ended: dict[str, Trajectory]) -> Group:
    members = tuple(ended.pop(rollout_id, None) for rollout_id in finished["rollout_ids"])
    return Group(finished["group_id"], members, finished["missing_reasons"])
