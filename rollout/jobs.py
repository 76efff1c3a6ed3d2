"""From what a caller asks to a Job: every bound is checked here, once, for every front end."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from rollout.bench.tasks import BUNDLED, Task, load_task, load_tasks
from rollout.engine import Sampling
from rollout.errors import RequestError, TaskError
from rollout.request import AgentKind, Group, Job, Limits, Thinking

GROUP_SIZE_MAX = 1024
TEMPERATURE_MIN, TEMPERATURE_MAX = 1e-3, 10.0
_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


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


def make_job(
    request_id: str,
    tasks: Sequence[Task],
    *,
    group_size: int = 1,
    agent: AgentKind = "model",
    thinking: Thinking = "high",
    sampling: Sampling | None = None,
    limits: Limits | None = None,
    group_prefix: str = "",
    edge_url: str = "",
) -> Job:
    """A job over `tasks`, one group for each, named `group_prefix` + the task's name.

    Group names set rollouts of one log apart and key their noise: two jobs that shall draw the same
    must name their groups the same.  RequestError names the field, the value and the bound.
    """
    sampling, limits = sampling or Sampling(), limits or Limits()
    if not _REQUEST_ID.fullmatch(request_id):
        raise RequestError(f"request_id {request_id!r}: use 1 to 128 letters, digits, '.', '_', ':' and '-'")
    if not tasks:
        raise RequestError("a job needs at least one task")
    if not 1 <= group_size <= GROUP_SIZE_MAX:
        raise RequestError(f"group_size is {group_size}, must be 1 to {GROUP_SIZE_MAX}")
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
    if min(limits.turns_count_max, limits.turn_tokens_count_max, limits.context_tokens_count_max) < 1:
        raise RequestError("limits must be 1 or more")
    if not (math.isfinite(limits.tool_timeout_s) and limits.tool_timeout_s > 0):
        raise RequestError(f"tool_timeout_s is {limits.tool_timeout_s}, must be above 0")
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise RequestError(f"task names must differ within a job: {', '.join(twice[:5])}")
    groups = tuple(
        Group(group_id=group_prefix + task.name, task=task.name, task_digest=task.digest, size=group_size)
        for task in tasks
    )
    return Job(
        request_id=request_id,
        groups=groups,
        agent=agent,
        thinking=thinking,
        sampling=sampling,
        limits=limits,
        edge_url=edge_url,
    )
