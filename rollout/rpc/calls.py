"""The calls of the protocol over an open service: request message in, reply messages out, no decision made here.

A method for each call of `RolloutService` in the protocol, by its name; it raises our errors, which the
server turns into statuses.

See: proto/rollout/pb/v1/rollout.proto, which says what each call promises.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

import msgspec

from rollout.errors import RequestError, ResultsError
from rollout.events import RolloutEvent, RolloutFinished
from rollout.export.manifest import SideChannel
from rollout.pb.v1 import rollout_pb2 as pb
from rollout.policy import Policy
from rollout.quick import ask
from rollout.record import trajectory_record
from rollout.rpc.asked import check_mask, job_of, sampling_of
from rollout.rpc.follow import follow, replay
from rollout.rpc.listing import Filter, list_rollouts
from rollout.rpc.messages import fill, parts, plain
from rollout.rpc.updates import CHANNELS, Mask, trajectory_parts, updates_of
from rollout.service import RolloutService

NAMED_COUNT_MAX = 5000
"""Rollouts that one message names, however many a call was about."""


class Calls:
    """What the server answers with."""

    def __init__(self, service: RolloutService) -> None:
        """The service is open already."""
        self._service = service
        self._policy = Policy(service)

    async def submit(self, request: pb.SubmitRequest) -> AsyncIterator[pb.Update]:
        """Start a job, or find it, and follow it."""
        job, prompts = await asyncio.to_thread(job_of, request)
        await self._service.submit(job, prompts)
        async with aclosing(self._follow(job.request_id, 0, frozenset(request.return_mask))) as updates:
            async for update in updates:
                yield update

    async def attach(self, request: pb.AttachRequest) -> AsyncIterator[pb.Update]:
        """Follow a job from an event on."""
        mask = frozenset(request.return_mask)
        if (job := self._service.ledger.jobs.get(request.request_id)) is not None:  # else NOT_FOUND says so
            check_mask(mask, job)
        async with aclosing(self._follow(request.request_id, request.from_event, mask)) as updates:
            async for update in updates:
                yield update

    async def _follow(self, request_id: str, from_event: int, mask: Mask) -> AsyncGenerator[pb.Update, None]:
        async with aclosing(follow(self._service, request_id, from_event)) as records:
            async for lsn, told in records:
                for update in await self._updates(lsn, told, mask):
                    yield update

    async def _updates(self, lsn: int, told: Sequence[RolloutEvent], mask: Mask) -> list[pb.Update]:
        """What tells a record; an end is told once its side channels, if they are asked for, lie where it says."""
        ended = [event.rollout_id for event in told if isinstance(event, RolloutFinished)]
        is_known = ended and ended[0] in self._service.ledger.rollouts
        channels = await self._side_channels(ended[0], mask) if is_known else ()
        return updates_of(lsn, told, self._service.ledger, mask, channels)

    async def _side_channels(self, rollout_id: str, mask: Mask) -> tuple[SideChannel, ...]:
        """Of a rollout that has ended, those that are asked for.  ResultsError if they cannot be had."""
        names = {name for field, named in CHANNELS.items() if field in mask for name in named}
        if not names or not self._service.ledger.is_done(rollout_id):
            return ()
        if self._service.exporter is None:
            raise ResultsError(f"the side channels of {rollout_id} come in shards: serve with DSEC_EXPORTS_SHARDS=1")
        channels = await self._service.exporter.side_channels(rollout_id)
        return tuple(channel for channel in channels if channel.name in names)

    async def replay(self, request: pb.ReplayRequest) -> AsyncIterator[pb.Update]:
        """The durable events of one rollout."""
        mask = frozenset(request.return_mask)
        check_mask(mask, self._service.ledger.rollout(request.rollout_id).job)
        async with aclosing(replay(self._service, request.rollout_id, request.from_event)) as records:
            async for lsn, told in records:
                for update in await self._updates(lsn, told, mask):
                    yield update

    async def get(self, request: pb.GetRequest) -> AsyncIterator[pb.Trajectory]:
        """One rollout as it is."""
        mask = frozenset(request.return_mask)
        check_mask(mask, self._service.ledger.rollout(request.rollout_id).job)
        channels = await self._side_channels(request.rollout_id, mask)
        record = trajectory_record(self._service.ledger, request.rollout_id, channels)
        for part in trajectory_parts(record, mask):
            yield part

    async def list(self, request: pb.ListRequest) -> pb.ListResponse:
        """A page of rollouts."""
        wanted = msgspec.convert(plain(request), Filter)
        response = pb.ListResponse()
        version = self._service.engine.info.policy_version
        fill(response, list_rollouts(self._service.ledger, version, wanted, request.page_size, request.page_token))
        return response

    async def cancel(self, request: pb.CancelRequest) -> pb.CancelResponse:
        """End a job."""
        return pb.CancelResponse(cancelled_count=await self._service.cancel(request.request_id))

    async def preempt(self, request: pb.PreemptRequest) -> pb.PreemptResponse:
        """Stop rollouts where they are."""
        wanted, cause = _wanted(request), request.cause or "asked"
        stopped = await self._service.preempt(wanted, request_id=request.request_id, cause=cause)
        return pb.PreemptResponse(rollout_ids=stopped[:NAMED_COUNT_MAX])

    async def resume(self, request: pb.ResumeRequest) -> pb.ResumeResponse:
        """Let rollouts go on."""
        resumed = self._service.resume(_wanted(request), request_id=request.request_id)
        return pb.ResumeResponse(rollout_ids=resumed[:NAMED_COUNT_MAX])

    async def pause_engine(self, request: pb.PauseEngineRequest) -> pb.PauseEngineResponse:
        """Draw no more tokens."""
        await self._service.engine.pause(plain(request).get("mode", "keep"))
        return pb.PauseEngineResponse()

    async def resume_engine(self, request: pb.ResumeEngineRequest) -> pb.ResumeEngineResponse:
        """Draw tokens again."""
        await self._service.engine.resume()
        return pb.ResumeEngineResponse()

    async def update_policy(self, request: pb.UpdatePolicyRequest) -> pb.UpdatePolicyResponse:
        """Draw with other weights."""
        engine, stale = await self._policy.update(request.checkpoint, request.policy_version)
        response = pb.UpdatePolicyResponse(stale_rollout_ids=stale[:NAMED_COUNT_MAX])
        fill(response.engine, engine)
        return response

    async def ack(self, request: pb.AckRequest) -> pb.AckResponse:
        """These records are no longer needed."""
        return pb.AckResponse(acknowledged_count=await self._service.retention.acknowledge(request.rollout_ids))

    async def score_tokens(self, request: pb.ScoreTokensRequest) -> AsyncIterator[pb.ScoreTokensResponse]:
        """Logprobs of given tokens."""
        scored = await self._service.engine.score(
            tuple(request.token_ids),
            top_logprobs_count=request.top_logprobs_count,
            returns_hidden=request.returns_hidden,
        )
        response = pb.ScoreTokensResponse()
        fill(response, scored)
        for part in parts(response):
            yield part

    async def quick_instruction(self, request: pb.QuickInstructionRequest) -> pb.QuickInstructionResponse:
        """Small questions about a context."""
        answers = await ask(
            self._service,
            request.rollout_id,
            [(each.task, each.url) if each.HasField("url") else each.task for each in request.instructions],
            request_id=request.request_id,
            answer_tokens_count_max=request.answer_tokens_count_max,
            sampling=sampling_of(request.sampling),
        )
        response = pb.QuickInstructionResponse()
        fill(response, {"answers": answers})
        return response


def _wanted(request: pb.PreemptRequest | pb.ResumeRequest) -> list[str] | None:
    """The rollouts that are named; None if a job is, or everything.  RequestError if nothing is."""
    target = request.WhichOneof("target")
    if target is None or (target != "rollouts" and not getattr(request, target)):
        raise RequestError("name rollouts, a request_id, or everything")
    return list(request.rollouts.rollout_ids) if target == "rollouts" else None
