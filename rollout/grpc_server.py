"""gRPC in front of the rollout service: translation only, no decision is made here.

See: proto/rollout/pb/v1/rollout.proto; dsec/wire.py for the statuses.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from dsec.errors import DsecError
from dsec.wire import status_of
from rollout import events
from rollout.bench.tasks import Task, check_packages, task_from_files
from rollout.engine import Sampling
from rollout.errors import NotFoundError, RequestError, RolloutError
from rollout.events import Event
from rollout.jobs import load_bundled, make_job
from rollout.pb.v1 import rollout_pb2 as pb
from rollout.pb.v1 import rollout_pb2_grpc as pb_grpc
from rollout.record import TrajectoryRecord, trajectory_record
from rollout.request import AgentKind, Job, Limits, Thinking
from rollout.service import RolloutService
from toolcall_dsl import DslError
from wal import WalError
from wal.tokens import TokensAppended

MESSAGE_BYTES_MAX = 128 << 20
STOP_GRACE_S = 1.0
_THINKING: dict[int, Thinking] = {pb.THINKING_UNSPECIFIED: "high", pb.NON_THINK: "none", pb.HIGH: "high", pb.MAX: "max"}
_AGENT: dict[int, AgentKind] = {pb.AGENT_UNSPECIFIED: "model", pb.MODEL: "model", pb.ORACLE: "oracle", pb.NOP: "nop"}
_log = logging.getLogger(__name__)
Context = grpc.aio.ServicerContext[Any, Any]


class RolloutServicer(pb_grpc.RolloutServiceServicer):
    """The three calls."""

    def __init__(self, service: RolloutService) -> None:
        """The service is open already."""
        self._service = service

    async def Submit(self, request: pb.SubmitRequest, context: Context) -> AsyncIterator[pb.Update]:  # noqa: N802 - gRPC's name
        """Start or attach; see the proto."""
        async with _answering(context, "Submit"):
            job, tasks = await asyncio.to_thread(job_of, request)
            await self._service.submit(job, tasks)
            mask = frozenset(request.return_mask)
            async with aclosing(self._service.watch(job.request_id)) as events_from_now:
                for rollout_id in self._ended(job.request_id):
                    yield self._ended_message(rollout_id, mask)
                async for event in events_from_now:
                    if (message := self._update(event, mask)) is not None:
                        yield message

    async def Get(self, request: pb.GetRequest, context: Context) -> pb.Trajectory:  # noqa: N802 - gRPC's name
        """One rollout."""
        async with _answering(context, "Get"):
            if request.rollout_id not in self._service.ledger.rollouts:
                raise NotFoundError(f"no rollout {request.rollout_id!r}")
            return self._trajectory(request.rollout_id, frozenset(request.return_mask))

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelReply:  # noqa: N802 - gRPC's name
        """End a job."""
        async with _answering(context, "Cancel"):
            return pb.CancelReply(cancelled_count=await self._service.cancel(request.request_id))

    def _trajectory(self, rollout_id: str, mask: frozenset[int]) -> pb.Trajectory:
        return trajectory_message(trajectory_record(self._service.ledger, rollout_id), mask)

    def _ended(self, request_id: str) -> list[str]:
        """Rollouts of the job that have ended, or that the service failed, so far."""
        ledger = self._service.ledger
        members = [rollout_id for rollout_id, _, _ in ledger.members(request_id) if rollout_id in ledger.rollouts]
        return [m for m in members if ledger.is_done(m) or ledger.rollouts[m].failure is not None]

    def _ended_message(self, rollout_id: str, mask: frozenset[int]) -> pb.Update:
        failure = self._service.ledger.rollouts[rollout_id].failure
        if failure is not None and not self._service.ledger.is_done(rollout_id):
            return pb.Update(rollout_id=rollout_id, infra_failed=_failure_message(failure))
        return pb.Update(rollout_id=rollout_id, finished=self._trajectory(rollout_id, mask))

    def _update(self, event: Event, mask: frozenset[int]) -> pb.Update | None:
        """The message for a durable event, or None if it is not streamed or was not asked for."""
        ledger = self._service.ledger
        match event:
            case events.RolloutOpened(rollout_id=rollout_id):
                prompt = sum(len(segment.token_ids) for segment in event.prompt)
                task = next(g.task for g in ledger.rollouts[rollout_id].job.groups if g.group_id == event.group_id)
                return pb.Update(rollout_id=rollout_id, opened=pb.Opened(task=task, prompt_tokens_count=prompt))
            case TokensAppended() if pb.TOKENS in mask:
                tokens = pb.Tokens(start=event.start, token_ids=event.token_ids, logprobs=event.logprobs)
                return pb.Update(rollout_id=event.request, tokens=tokens)
            case events.ToolFinished(rollout_id=rollout_id):
                answered = pb.ToolAnswered(
                    call_index=event.call_index,
                    observation=event.observation if pb.TEXT in mask else "",
                    exit_code=event.exit_code,
                )
                return pb.Update(rollout_id=rollout_id, tool_answered=answered)
            case events.Judged(rollout_id=rollout_id):
                judged = pb.Judged(reward=event.reward, components=event.components)
                return pb.Update(rollout_id=rollout_id, judged=judged)
            case events.RolloutFinished(rollout_id=rollout_id):
                return pb.Update(rollout_id=rollout_id, finished=self._trajectory(rollout_id, mask))
            case events.InfraFailed(rollout_id=rollout_id):
                return pb.Update(rollout_id=rollout_id, infra_failed=_failure_message(event))
            case _:
                return None


def _failure_message(failure: events.InfraFailed) -> pb.InfraFailure:
    return pb.InfraFailure(code=failure.code, fault=failure.fault, message=failure.message)


def job_of(request: pb.SubmitRequest) -> tuple[Job, list[Task]]:
    """What a request asks for.  TaskError, RequestError."""
    tasks = [task_from_files(folder.name, dict(folder.files)) for folder in request.tasks]
    if request.bundled_tasks:
        tasks += load_bundled(request.bundled_tasks)
    check_packages(tasks)
    thinking, agent = _THINKING.get(request.thinking), _AGENT.get(request.agent)
    if thinking is None or agent is None:
        raise RequestError(f"thinking {request.thinking} or agent {request.agent} is not known to this server")
    asked, default = request.limits, Limits()
    wanted = Job(
        request_id=request.request_id,
        agent=agent,
        thinking=thinking,
        sampling=Sampling(
            temperature=request.sampling.temperature,
            top_p=request.sampling.top_p or 1.0,
            top_k=request.sampling.top_k,
            seed=request.sampling.seed,
        ),
        limits=Limits(
            turns_count_max=asked.turns_count_max or default.turns_count_max,
            turn_tokens_count_max=asked.turn_tokens_count_max or default.turn_tokens_count_max,
            context_tokens_count_max=asked.context_tokens_count_max or default.context_tokens_count_max,
            tool_timeout_s=asked.tool_timeout_s or default.tool_timeout_s,
        ),
    )
    job = make_job(wanted, tasks, group_size=request.group_size or 1, group_prefix=f"{request.request_id}/")
    return job, tasks


def trajectory_message(record: TrajectoryRecord, mask: Iterable[int]) -> pb.Trajectory:
    """A record as its message; big fields only as far as `mask` asks for them."""
    mask = frozenset(mask)
    message = pb.Trajectory(
        rollout_id=record.rollout_id,
        request_id=record.request_id,
        task=record.task,
        group_id=record.group.group_id,
        group_index=record.group.index,
        group_size=record.group.size,
        reward=record.reward.value,
        reward_components=record.reward.components,
        finish_reason=record.finish_reason or "",
        infra_failure=pb.InfraFailure(**record.infra_failure) if record.infra_failure else None,
        tokens_sampled=record.tokens_sampled,
        tokens_replayed=record.tokens_replayed,
        commands_replayed=record.commands_replayed,
        commands_run_twice=record.commands_run_twice,
        attempt=record.lineage.attempt,
        weights_digest=record.policy_versions[-1].weights_digest if record.policy_versions else "",
        tokenizer_digest=record.encoder.tokenizer_digest,
    )
    for field, fill in _BIG_FIELDS.items():
        if field in mask:
            fill(message, record)
    return message


def _fill_tokens(message: pb.Trajectory, record: TrajectoryRecord) -> None:
    message.token_ids.extend(record.token_ids)
    message.spans.extend(
        pb.Span(start=s.start, length=s.length, kind=s.kind, turn=s.turn, trainable=s.trainable) for s in record.spans
    )


def _fill_logprobs(message: pb.Trajectory, record: TrajectoryRecord) -> None:
    message.logprobs.extend(math.nan if value is None else value for value in record.logprobs)


def _fill_text(message: pb.Trajectory, record: TrajectoryRecord) -> None:
    for turn in record.turns:
        message.turns.add(
            start=turn.start,
            length=turn.length,
            finish_reason=turn.finish_reason,
            reasoning=turn.reasoning,
            content=turn.content,
            parse_error=turn.parse_error or "",
        )
    for call in record.tool_calls:
        message.tool_calls.add(
            call_index=call.call_index,
            turn=call.turn,
            name=call.name,
            arguments_json=call.arguments_json,
            parse_status=call.parse_status,
            exit_code=call.exit,
            timed_out=call.timed_out,
            truncated_bytes=call.truncated_bytes,
            duration_s=call.duration_s,
            result=call.result,
        )


_BIG_FIELDS: dict[int, Callable[[pb.Trajectory, TrajectoryRecord], None]] = {
    pb.TOKENS: _fill_tokens,
    pb.LOGPROBS: _fill_logprobs,
    pb.TEXT: _fill_text,
}


@asynccontextmanager
async def _answering(context: Context, call: str) -> AsyncIterator[None]:
    """Turn what a call raises into its status; what is not an error of ours goes to the log, not to the client."""
    try:
        yield
    except (RolloutError, DsecError, WalError, DslError) as error:
        await context.abort(*status_of(error))
    except Exception:
        _log.exception("%s failed", call)
        await context.abort(grpc.StatusCode.INTERNAL, "internal error; the server's log has it")


class Server:
    """A server that listens."""

    def __init__(self, server: grpc.aio.Server, checks: health.aio.HealthServicer, port: int) -> None:  # type: ignore[name-defined]
        self._server = server
        self._checks = checks
        self.port = port

    async def stop(self) -> None:
        """Say NOT_SERVING, take no more calls, give running ones a second; the log keeps what they watched."""
        await self._checks.enter_graceful_shutdown()
        await self._server.stop(STOP_GRACE_S)


async def start_server(service: RolloutService, address: str) -> Server:
    """Serve an open service at `host:port` (port 0: any) with health and reflection.

    RequestError if the address cannot be bound.
    """
    port_asked = re.fullmatch(r"\S+:(\d{1,5})", address)
    if port_asked is None or int(port_asked[1]) >= 1 << 16:
        raise RequestError(f"cannot listen on {address!r}: give HOST:PORT, with a port from 0 (any) to 65535")
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
        ("grpc.so_reuseport", 0),
    ]
    server = grpc.aio.server(options=options)
    name = pb.DESCRIPTOR.services_by_name["RolloutService"].full_name
    pb_grpc.add_RolloutServiceServicer_to_server(RolloutServicer(service), server)  # type: ignore[no-untyped-call]
    checks = health.aio.HealthServicer()  # type: ignore[attr-defined]  # stub lags behind the package
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((name, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise RequestError(
            f"cannot listen on {address}: the port is in use or the host is not ours; choose another with --listen"
        ) from error
    await server.start()
    for served in ("", name):
        await checks.set(served, health_pb2.HealthCheckResponse.SERVING)
    return Server(server, checks, port)
