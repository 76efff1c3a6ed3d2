"""What a request of the protocol asks for, as our values; the bounds are checked by `rollout/jobs.py`.

See: proto/rollout/pb/v1/rollout.proto.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from rollout.bench.tasks import Task, check_packages, task_from_files
from rollout.engine import Sampling
from rollout.errors import RequestError
from rollout.jobs import load_bundled, make_conversation, make_job
from rollout.modes import limits_of
from rollout.pb.v1 import rollout_pb2 as pb
from rollout.request import Conversation, Job, Returned, Reward, TestsReward
from rollout.rpc.messages import plain

_JOB_FIELDS = (
    "request_id",
    "priority",
    "deadline_s",
    "agent",
    "thinking",
    "sampling",
    "limits",
    "early_stop",
    "policy",
    "parse_policy",
    "top_logprobs_count",
)
_RETURNED: dict[int, Returned] = {
    pb.FIELD_SAMPLING_MASK: "sampling_mask",
    pb.FIELD_ROUTES: "routes",
    pb.FIELD_HIDDEN: "hidden",
}


def job_of(request: pb.SubmitRequest) -> tuple[Job, list[Task | Conversation]]:
    """The job and its prompts.  TaskError, RequestError."""
    prompts: list[Task | Conversation] = [task_from_files(each.name, dict(each.files)) for each in request.tasks]
    if request.bundled_tasks:
        prompts += load_bundled(request.bundled_tasks)
    check_packages([prompt for prompt in prompts if isinstance(prompt, Task)])
    for asked in request.conversations:
        prompts.append(
            make_conversation(asked.name, messages_json=asked.messages_json, token_ids=asked.tokens.token_ids)
        )
    fields = plain(request)
    given: dict[str, Any] = {name: fields[name] for name in _JOB_FIELDS if name in fields} | {"groups": []}
    if request.project:
        given["project"] = request.project
    returns = tuple(name for field, name in _RETURNED.items() if field in request.return_mask)
    job = msgspec.structs.replace(msgspec.convert(given, Job), reward=reward_of(request.reward), returns=returns)
    if not request.HasField("limits") and not any(each.HasField("tokens") for each in request.conversations):
        job = msgspec.structs.replace(job, limits=limits_of(job.thinking))  # whose header is the mode's
    check_mask(request.return_mask, job)
    return make_job(job, prompts, group_size=request.group_size or 1, group_prefix=f"{request.request_id}/"), prompts


def check_mask(mask: Iterable[int], job: Job) -> None:
    """RequestError for a field that the job did not ask the engine for: it would be empty."""
    given = {field for field, name in _RETURNED.items() if name in job.returns}
    given |= {pb.FIELD_TOPK} if job.top_logprobs_count else set()
    if missing := sorted(set(mask) & {pb.FIELD_TOPK, *_RETURNED} - given):
        names = ", ".join(pb.Field.Name(field) for field in missing)
        raise RequestError(
            f"return_mask: job {job.request_id!r} has no {names}: Submit must name it (FIELD_TOPK: top_logprobs_count)"
        )


def reward_of(asked: pb.Reward) -> Reward:
    """Who judges; the task's tests if nothing is said."""
    kind = asked.WhichOneof("kind")
    if kind is None:
        return TestsReward()
    return msgspec.convert({"type": kind, **plain(getattr(asked, kind))}, Reward)  # type: ignore[no-any-return]


def sampling_of(asked: pb.Sampling) -> Sampling:
    """How tokens are drawn; what is unset, by default."""
    return msgspec.convert(plain(asked), Sampling)
