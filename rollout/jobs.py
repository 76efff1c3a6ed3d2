"""From what a caller asks to a Job: every bound is checked here, once, for every front end."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

import msgspec

from rollout import context
from rollout.bench.tasks import BUNDLED, Task, load_task, load_tasks
from rollout.engine import EngineInfo, Sampling, check_tokens, check_top_logprobs
from rollout.errors import RequestError, TaskError
from rollout.request import CallableReward, Conversation, Group, Job, JudgeReward, Limits
from toolcall_dsl import DslError, Tokenizer

GROUP_SIZE_MAX = 1024
TEMPERATURE_MIN, TEMPERATURE_MAX = 1e-3, 10.0
PRIORITY_MAX = 1000
RUBRIC_BYTES_MAX = 64 << 10
JUDGES_MAX = 16
MESSAGES_BYTES_MAX = 16 << 20
_PROJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TARGET = re.compile(r"[A-Za-z_][\w.]{0,127}:[A-Za-z_]\w{0,63}")
REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


def load_bundled(names: Sequence[str] = ()) -> list[Task]:
    """Tasks that ship with the package: the named ones, or all.  TaskError names what is unknown."""
    there = sorted(folder.name for folder in BUNDLED.iterdir() if folder.is_dir())
    if unknown := sorted(set(names) - set(there)):
        near = get_close_matches(unknown[0], there) or there[:3]
        raise TaskError(f"no bundled task {', '.join(unknown[:5])}; of {len(there)} there are {', '.join(near)} ...")
    return [load_task(BUNDLED / name) for name in names or there]


def load_any(where: Path | None) -> list[Task]:
    """The tasks that a person names: a folder of tasks, a task's folder, a bundled task, or (None) all bundled."""
    if where is None:
        return load_bundled()
    if not where.exists() and (BUNDLED / where.name).is_dir() and str(where) == where.name:
        return load_bundled([where.name])
    return load_tasks(where)


def make_conversation(name: str, *, messages_json: str = "", token_ids: Sequence[int] = ()) -> Conversation:
    """A prompt without an environment: messages in OpenAI's shape, or tokens, not both.  RequestError."""
    if not REQUEST_ID.fullmatch(name):
        raise RequestError(f"conversation name {name!r}: use 1 to 128 letters, digits, '.', '_', ':' and '-'")
    if not isinstance(messages_json, str):
        raise RequestError(f"conversation {name}: messages_json must be JSON text: give json.dumps(messages)")
    if bool(messages_json) == bool(token_ids):
        raise RequestError(f"conversation {name}: give messages or token_ids, one of them")
    if len(messages_json.encode()) > MESSAGES_BYTES_MAX:
        raise RequestError(f"conversation {name}: more than {MESSAGES_BYTES_MAX} bytes of messages")
    try:
        said = msgspec.json.decode(messages_json or "[]", type=list[dict[str, object]])
    except msgspec.MsgspecError as error:
        raise RequestError(f"conversation {name}: messages must be a JSON list of objects: {error}") from error
    ids = tuple(token_ids)
    if not said and not ids:
        raise RequestError(f"conversation {name}: there are no messages")
    if ids and not 0 <= min(ids) <= max(ids) < 1 << 32:
        raise RequestError(f"conversation {name}: token ids must fit 32 bits without sign")
    digest = hashlib.sha256(msgspec.msgpack.encode((name, said, ids))).hexdigest()
    return Conversation(name=name, digest=digest, messages_json=messages_json or "[]", token_ids=ids)


def make_job(asked: Job, prompts: Sequence[Task | Conversation], *, group_size: int = 1, group_prefix: str = "") -> Job:
    """The job `asked` for, with a group of `group_size` for each prompt, named `group_prefix` + the prompt's name.

    Group names set rollouts of one log apart and key their noise: two jobs that shall draw the same
    must name their groups the same.  RequestError names the field, the value and the bound.
    """
    if not REQUEST_ID.fullmatch(asked.request_id):
        raise RequestError(f"request_id {asked.request_id!r}: use 1 to 128 letters, digits, '.', '_', ':' and '-'")
    if not prompts:
        raise RequestError("a job needs at least one task")
    if not 1 <= group_size <= GROUP_SIZE_MAX:
        raise RequestError(f"group_size is {group_size}, must be 1 to {GROUP_SIZE_MAX}")
    names = [prompt.name for prompt in prompts]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise RequestError(f"task names must differ within a job: {', '.join(twice[:5])}")
    if asked.agent != "model" and any(isinstance(prompt, Conversation) for prompt in prompts):
        raise RequestError(f"agent {asked.agent} works in a task's environment; a conversation has none")
    check_sampling(asked.sampling)
    check_top_logprobs(asked.top_logprobs_count)
    if asked.agent != "model" and (asked.returns or asked.top_logprobs_count):
        raise RequestError(f"agent {asked.agent} draws no tokens: there is no {', '.join(asked.returns) or 'top-k'}")
    _check_limits(asked.limits)
    _check_rules(asked, group_size)
    groups = tuple(
        Group(group_id=group_prefix + each.name, task=each.name, task_digest=each.digest, size=group_size)
        for each in prompts
    )
    return msgspec.structs.replace(asked, groups=groups)


def check_conversations(
    job: Job, prompts: Iterable[Task | Conversation], tokenizer: Tokenizer, engine: EngineInfo
) -> None:
    """RequestError names a conversation that cannot be encoded, or that leaves no room to sample in."""
    for prompt in prompts:
        if isinstance(prompt, Task):
            continue
        try:
            check_length(prompt.messages_json, tokenizer, job.limits.context_tokens_count_max, escaped=2)
            segments = context.conversation_prompt(prompt, tokenizer, job.thinking)
        except DslError as error:
            raise RequestError(f"conversation {prompt.name}: {error}") from error
        count = sum(len(segment.token_ids) for segment in segments)
        if count >= job.limits.context_tokens_count_max:
            raise RequestError(
                f"conversation {prompt.name}: {count} tokens leave no room in {job.limits.context_tokens_count_max}"
            )
        if prompt.token_ids:
            check_tokens(prompt.token_ids, engine)


def check_length(
    text: str, tokenizer: Tokenizer, tokens_count_max: int, escaped: int = 1, *, what: str = "a prompt"
) -> None:
    """RequestError for a text that is too long whatever its tokens are: encoding it would take long.

    `escaped`: for how many of its characters one of the prompt may stand.
    """
    if len(text) > escaped * tokens_count_max * tokenizer.token_bytes_max:
        raise RequestError(f"{what} of {len(text)} characters leaves no room in {tokens_count_max} tokens")


def check_sampling(sampling: Sampling) -> None:
    """RequestError names the parameter that is out of its bounds."""
    if sampling.temperature != 0 and not TEMPERATURE_MIN <= sampling.temperature <= TEMPERATURE_MAX:
        raise RequestError(
            f"temperature is {sampling.temperature}, must be 0 (greedy) or {TEMPERATURE_MIN:g} to {TEMPERATURE_MAX:g}"
        )
    if not 0 < sampling.top_p <= 1:
        raise RequestError(f"top_p is {sampling.top_p}, must be above 0 and at most 1")
    if not 0 <= sampling.top_k < 1 << 32:
        raise RequestError(f"top_k is {sampling.top_k}, must be 0 (all) or more, below 2**32")
    if not 0 <= sampling.seed < 1 << 64:
        raise RequestError(f"seed is {sampling.seed}, must fit 64 bits without sign")


def _check_limits(limits: Limits) -> None:
    for name in ("turns_count_max", "turn_tokens_count_max", "context_tokens_count_max"):
        if getattr(limits, name) < 1:
            raise RequestError(f"{name} is {getattr(limits, name)}, must be 1 or more")
    for name in ("sampled_tokens_count_max", "thinking_tokens_count_max", "wall_clock_s"):
        if not 0 <= getattr(limits, name) < math.inf:
            raise RequestError(f"{name} is {getattr(limits, name)}, must be 0 (no bound) or more")
    if not 0 < limits.tool_timeout_s < math.inf:
        raise RequestError(f"tool_timeout_s is {limits.tool_timeout_s}, must be above 0")


def _check_rules(asked: Job, group_size: int) -> None:
    """What says how a job is shared out, versioned and judged."""
    if not _PROJECT.fullmatch(asked.project):
        raise RequestError(f"project {asked.project!r}: use 1 to 64 letters, digits, '.', '_' and '-'")
    if not -PRIORITY_MAX <= asked.priority <= PRIORITY_MAX:
        raise RequestError(f"priority is {asked.priority}, must be {-PRIORITY_MAX} to {PRIORITY_MAX}")
    if not 0 <= asked.deadline_s < math.inf:
        raise RequestError(f"deadline_s is {asked.deadline_s}, must be 0 (none) or more")
    stop = asked.early_stop
    if stop is not None and not (1 <= stop.min_usable <= group_size and 0 <= stop.grace_s < math.inf):
        raise RequestError(
            f"early_stop: min_usable is {stop.min_usable}, must be 1 to the group's {group_size}; "
            f"grace_s is {stop.grace_s}, must be 0 or more"
        )
    lag = asked.policy.max_lag
    if asked.policy.min_version < 0 or (lag is not None and lag < 0):
        raise RequestError("policy: min_version and max_lag must be 0 or more")
    match asked.reward:
        case CallableReward(target=target) if not _TARGET.fullmatch(target):
            raise RequestError(f"reward callable {target!r}: name it module:function")
        case JudgeReward() as judge:
            if not judge.rubric.strip() or len(judge.rubric.encode()) > RUBRIC_BYTES_MAX:
                raise RequestError(f"reward judge: give a rubric of at most {RUBRIC_BYTES_MAX} bytes")
            if not (1 <= judge.samples_count <= JUDGES_MAX and 1 <= judge.attempts_max <= JUDGES_MAX):
                raise RequestError(f"reward judge: samples_count and attempts_max must be 1 to {JUDGES_MAX}")
            check_sampling(judge.sampling)
