"""What a job must be to be taken, beside what it is by itself: the service's bounds, and what the log holds already."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator

from dsec.errors import ResourceExhaustedError
from rollout.bench.tasks import Task, check_networks
from rollout.config import RolloutConfig
from rollout.engine import Engine, EngineInfo
from rollout.errors import ConflictError, RequestError
from rollout.jobs import check_conversations
from rollout.ledger import Ledger
from rollout.request import HEAVY, Conversation, Job, JudgeReward
from rollout.rewards.callables import check_allowed
from rollout.scheduling.claims import Capacity, Claim, Rules
from toolcall_dsl import Tokenizer


def check_same(job: Job, known: Job) -> None:
    """ConflictError if the request id stands for another job."""
    if known != job:
        differing = [name for name in Job.__struct_fields__ if getattr(job, name) != getattr(known, name)]
        raise ConflictError(
            f"request {job.request_id!r} was submitted before with other contents: {', '.join(differing)}"
        )


def check_engine(config: RolloutConfig, engine: EngineInfo, tokenizer: Tokenizer) -> None:
    """RequestError: jobs could be taken whose contexts the engine cannot hold, or whose tokens it does not have."""
    if tokenizer.vocab_count > engine.vocab_count:
        raise RequestError(
            f"the tokenizer has {tokenizer.vocab_count} tokens, and the model of engine {engine.name} "
            f"{engine.vocab_count}: give the folder with the model's own as --tokenizer"
        )
    if config.context_tokens_count_max > engine.context_tokens_max:
        raise RequestError(
            f"DSEC_CONTEXT_TOKENS_COUNT_MAX is {config.context_tokens_count_max}, and a context of the engine "
            f"{engine.name} holds {engine.context_tokens_max} tokens: lower it to that"
        )


def check_new(
    job: Job, tasks: list[Task | Conversation], ledger: Ledger, config: RolloutConfig, engine: Engine
) -> None:
    """RequestError, TaskError: this service will not take the job; ResourceExhaustedError: not now."""
    if job.request_id in ledger.used:
        raise ConflictError(
            f"request_id {job.request_id!r} was another's: its rollouts were all acknowledged, and it is forgotten; "
            "choose a new one"
        )
    if len(ledger.jobs) >= config.jobs_count_max:
        raise ResourceExhaustedError(
            f"the log holds {config.jobs_count_max} jobs that nobody acknowledged: acknowledge what you have (Ack), "
            "and ask again; or raise DSEC_JOBS_COUNT_MAX"
        )
    if sum(group.size for group in job.groups) > config.rollouts_count_max:
        raise RequestError(f"a job may ask for at most {config.rollouts_count_max} rollouts")
    if job.limits.context_tokens_count_max > config.context_tokens_count_max:
        raise RequestError(
            f"context_tokens_count_max is {job.limits.context_tokens_count_max}, "
            f"this service allows {config.context_tokens_count_max}"
        )
    if taken := [group.group_id for group in job.groups if ledger.holds_group(group.group_id)]:
        raise RequestError(f"group ids in use by another job: {', '.join(taken[:5])}")
    if job.returns:
        _check_returns(job, config, engine.info)
    check_conversations(job, tasks, ledger.tokenizer, engine.info)
    check_allowed(job, config.reward_callables)
    check_networks((task for task in tasks if isinstance(task, Task)), config.networks)


def _check_returns(job: Job, config: RolloutConfig, info: EngineInfo) -> None:
    told = {"routes": info.routing is not None, "hidden": info.hidden_dim > 0}
    for name in HEAVY.intersection(job.returns):
        if not told[name]:
            raise RequestError(f"return_mask: engine {info.name} tells no {name}")
        if not config.exports_shards:
            raise RequestError(f"return_mask: {name} come in the files of shards: serve with DSEC_EXPORTS_SHARDS=1")


def claims_of(job: Job, environments: Container[str], is_left: Callable[[str], bool]) -> Iterator[Claim]:
    """What each group of a job needs to start, for those of its members that are left.

    `environments` are the digests of tasks that need a sandbox.  A rollout's judges count into its tokens.
    """
    tokens = 0
    if job.agent == "model":
        contexts = 1 + (job.reward.samples_count if isinstance(job.reward, JudgeReward) else 0)
        tokens = contexts * job.limits.context_tokens_count_max
    for group in job.groups:
        if members := tuple(filter(is_left, group.members)):
            yield Claim(
                members=members,
                project=job.project,
                priority=job.priority,
                tokens=tokens,
                sandboxes=int(group.task_digest in environments),
            )


def capacity_of(config: RolloutConfig) -> Capacity:
    """What the scheduler may give away."""
    return Capacity(
        slots=config.concurrency,
        sandboxes=config.sandboxes_count_max,
        asleep=config.sandboxes_asleep_count_max,
        tokens=config.tokens_count_max,
        queued=config.queued_count_max,
        projects=config.projects_count_max,
    )


def rules_of(config: RolloutConfig) -> Rules:
    """How it gives it away."""
    return Rules(
        ageing_s=config.ageing_s,
        credit_tokens=config.credit_tokens_count_max,
        preemptions_count_max=config.preemptions_count_max,
        weights=config.project_weights,
    )
