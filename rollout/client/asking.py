"""Requests of the protocol from what a caller says in Python.

See: rollout/rpc/asked.py, which reads them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

import msgspec

from rollout.engine import Sampling
from rollout.errors import RequestError
from rollout.pb.v1 import rollout_pb2 as pb
from rollout.request import AgentKind, Conversation, EarlyStop, Limits, PolicyRule, Reward, Thinking
from rollout.rpc.messages import fill, plain
from toolcall_dsl import Policy

FieldName = Literal["live_tokens", "tokens", "logprobs", "text", "topk", "sampling_mask", "routes", "hidden"]
RECORD: tuple[FieldName, ...] = ("tokens", "logprobs", "text")
"""Everything that every trajectory has; the last four are only there if the job was submitted with them."""
_SHOWN_MAX = 80
Prompt = str | os.PathLike[str] | Conversation
"""The name of a bundled task; a task's folder; a prompt without an environment."""


class JobOptions(TypedDict, total=False):
    """What a job may ask for beside its prompts (rollout/request.py)."""

    project: str
    priority: int
    deadline_s: float
    agent: AgentKind
    thinking: Thinking
    sampling: Sampling
    limits: Limits
    early_stop: EarlyStop
    policy: PolicyRule
    reward: Reward
    parse_policy: Policy
    top_logprobs_count: int


def submit_request(
    request_id: str, prompts: Iterable[Prompt], group_size: int, fields: Sequence[FieldName], options: JobOptions
) -> pb.SubmitRequest:
    """A job as its message.  RequestError for what is none."""
    request = pb.SubmitRequest(request_id=request_id, return_mask=mask(fields))
    if unknown := sorted(set(options) - JobOptions.__annotations__.keys()):
        raise RequestError(f"a job has no {', '.join(unknown)}" + "".join(map(_hint, unknown)))
    if isinstance(prompts, str | os.PathLike | Conversation):
        raise RequestError("prompts: give a list of them, also of one")
    if group_size == 0:  # which the protocol has for unset
        raise RequestError("group_size is 0, must be 1 or more")
    reward = options.get("reward")
    if not isinstance(reward, Reward | None):
        raise RequestError(f"reward is {reward!r}: give a value of rollout.request, as TestsReward()")
    fill_fields(request, group_size=group_size, **{**options, "reward": None})
    if reward is not None:
        kind = getattr(request.reward, str(reward.__struct_config__.tag))
        kind.SetInParent()
        fill_fields(kind, **msgspec.structs.asdict(reward))
    for prompt in prompts:
        _add_prompt(request, prompt)
    return request


def _hint(unknown: str) -> str:
    for name, kind in (("sampling", Sampling), ("limits", Limits)):
        if unknown in kind.__struct_fields__:
            return f"; say {name}={kind.__name__}({unknown}=...)"
    return ""


def fill_fields(message: Any, **fields: object) -> Any:
    """`message` with these fields.  RequestError names the one that cannot be."""
    for name, value in fields.items():
        try:
            fill(message, {name: value})
        except (TypeError, ValueError, KeyError) as error:
            raise RequestError(f"{name} is {repr(value)[:_SHOWN_MAX]}: it cannot be asked for: {error}") from error
    return message


def ids(rollout_ids: Iterable[str]) -> list[str]:
    """RequestError for an id where many are meant."""
    if isinstance(rollout_ids, str):
        raise RequestError("rollout_ids: give a list of them, also of one")
    return list(rollout_ids)


def _add_prompt(request: pb.SubmitRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.bundled_tasks.append(prompt)
    elif isinstance(prompt, Conversation):
        added = request.conversations.add(name=prompt.name)
        if prompt.token_ids:
            added.tokens.token_ids.extend(prompt.token_ids)
        else:
            added.messages_json = prompt.messages_json
    else:
        folder = Path(prompt).resolve()
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        if not files:
            raise RequestError(f"{prompt}: no task folder")
        request.tasks.add(name=folder.name, files=files)


def mask(fields: Iterable[FieldName]) -> list[Any]:
    """The big fields that are asked for.  RequestError for a name that is none."""
    fields = list(fields)
    if unknown := sorted(set(fields) - set(get_args(FieldName))):
        raise RequestError(f"fields: {', '.join(unknown)}: none of {', '.join(get_args(FieldName))}")
    return [pb.Field.Value(f"FIELD_{name.upper()}") for name in fields]


def target(request: Any, rollout_ids: Sequence[str] | None, request_id: str | None, *, everything: bool) -> Any:
    """`request` for some rollouts, a job or everything.  RequestError unless it is one of them."""
    if sum((rollout_ids is not None, request_id is not None, everything)) != 1:
        raise RequestError("give rollout_ids, request_id or everything, one of them")
    if rollout_ids is not None:
        request.rollouts.SetInParent()
        request.rollouts.rollout_ids.extend(ids(rollout_ids))
    elif request_id is not None:
        request.request_id = request_id
    else:
        request.everything = True
    return request


def struct_of(message: Any, kind: type[Any]) -> Any:
    """The struct that a message carries by field names."""
    return msgspec.convert(plain(message, keeps_unset=True), kind)
