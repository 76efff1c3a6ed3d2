"""Quick Instructions about a rollout's context: small questions, asked in parallel from one prefix.

Each is a prompt of its own: the rollout's tokens up to a place where the instruction may stand, and the
instruction.  So its answer is a rollout too, with the same log and record, and the rollout asked about does not notice:
it may be sampled, wait for a tool, sleep or have ended.  Somebody waits for the answer, which is short: it has the
highest priority, and claims no more of the tokens than its prompt and its answer.

See: toolcall_dsl/quick.py; docs/serving.md, "Quick Instructions".
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from dataclasses import asdict

from dsec.errors import StateError
from rollout.engine import Sampling
from rollout.errors import ConflictError, RequestError
from rollout.generation import Ask, Ended, context_bound, drawn_ids, generate, prompt_length
from rollout.jobs import PRIORITY_MAX, check_length, make_conversation
from rollout.record import QuickAnswer
from rollout.request import Conversation, Job
from rollout.service import RolloutService
from rollout.state import State
from toolcall_dsl import V4, MessageError, Tokenizer
from toolcall_dsl.quick import Instruction, instruction, read_answer, shared_prefix

INSTRUCTIONS_MAX = 16
ANSWER_TOKENS_MAX, ANSWER_TOKENS_COUNT = 512, 64
Question = str | tuple[str, str]
"""A task; `read_url` with the address that it is about."""


async def ask(
    service: RolloutService,
    rollout_id: str,
    questions: Iterable[Question],
    *,
    request_id: str = "",
    answer_tokens_count_max: int = 0,
    sampling: Sampling | None = None,
) -> tuple[QuickAnswer, ...]:
    """The answers to 1 to 16 questions about a rollout's context, drawn in parallel, in the order asked.

    An answer has `answer_tokens_count_max` tokens at most (0: 64).  The same request again gives the same answers,
    whatever the context is by now; without a `request_id` the questions end with their caller, and the log lets go
    of them.  NotFoundError, RequestError, ConflictError, StateError (it cannot stand behind this context), EngineError.
    """
    questions = list(questions)
    asked = [(each, None) if isinstance(each, str) else each for each in questions]
    if not 1 <= len(asked) <= INSTRUCTIONS_MAX:
        raise RequestError(f"instructions: give 1 to {INSTRUCTIONS_MAX}, not {len(asked)}")
    if not 0 <= answer_tokens_count_max <= ANSWER_TOKENS_MAX:
        raise RequestError(f"answer_tokens_count_max is {answer_tokens_count_max}, at most {ANSWER_TOKENS_MAX}")
    bound = context_bound(service)
    for number, (task, url) in enumerate(asked):
        try:
            instruction(task, thinking=False, url=url)  # what there is not, there is behind no context
        except MessageError as error:
            raise RequestError(f"instructions[{number}]: {error}") from error
        check_length(url or "", service.tokenizer, bound, what=f"instructions[{number}]: a url")
    names = [_name(number, rollout_id, *each) for number, each in enumerate(asked)]
    known = service.ledger.jobs.get(request_id)
    if known is not None:
        project, prompts = known.project, _logged(service, known, names)
    else:
        state = service.ledger.rollout(rollout_id)
        project = state.job.project
        prompts = await asyncio.to_thread(_prompts, names, asked, state, service.tokenizer, bound)
    tokens_count = answer_tokens_count_max or ANSWER_TOKENS_COUNT
    wanted = Ask(
        request_id=request_id or f"quick-{secrets.token_hex(12)}",
        prompts=tuple(prompts),
        sampling=sampling or Sampling(),
        tokens_count_max=tokens_count,
        context_tokens_count_max=max(len(prompt.token_ids) for prompt in prompts) + tokens_count,
        project=project,
        priority=PRIORITY_MAX,
        is_named=bool(request_id),
    )
    try:
        async with aclosing(generate(service, wanted)) as pieces:
            ended = {piece.index: piece.state async for piece in pieces if isinstance(piece, Ended)}
    except ConflictError:
        if known is not None or request_id not in service.ledger.jobs:
            raise
        # the same was asked meanwhile, of the context as it was then
        return await ask(
            service,
            rollout_id,
            questions,
            request_id=request_id,
            answer_tokens_count_max=answer_tokens_count_max,
            sampling=sampling,
        )
    return tuple(_answer(task, ended[number], service.tokenizer) for number, (task, _) in enumerate(asked))


def _name(number: int, rollout_id: str, task: str, url: str | None) -> str:
    """Of the prompt: it says which question about whom this is, whatever the context is by now."""
    digest = hashlib.sha256(f"{rollout_id}\0{url or ''}".encode(errors="replace")).hexdigest()
    return f"{number}.{task}.{digest[:16]}"


def _logged(service: RolloutService, known: Job, names: list[str]) -> list[Conversation]:
    """The prompts of a request that was made before, when the rollout's context was shorter.  ConflictError."""
    if [group.task for group in known.groups] != names:
        raise ConflictError(f"request {known.request_id!r} was submitted before with other contents: instructions")
    return [service.ledger.conversations[group.task_digest] for group in known.groups]


def _prompts(
    names: list[str], asked: Sequence[tuple[str, str | None]], state: State, tokenizer: Tokenizer, bound: int
) -> list[Conversation]:
    each_named = zip(names, asked, strict=True)
    return [_prompt(name, task, url, state, tokenizer, bound) for name, (task, url) in each_named]


def _prompt(name: str, task: str, url: str | None, state: State, tokenizer: Tokenizer, bound: int) -> Conversation:
    question = _question(state)
    prefix = shared_prefix(question, tokenizer)
    has_header = len(prefix) < len(question)
    thinking = question[-1] == tokenizer.control(V4.think_open) if has_header else state.job.thinking != "none"
    asked = instruction(task, thinking=thinking, url=url)
    if asked.place == "answer":
        prefix = _answered(asked, state, tokenizer)
    ids = (*prefix, *(token for segment in asked.segments(tokenizer) for token in segment.token_ids))
    if len(ids) >= bound:
        raise StateError(
            f"{task}: {len(ids)} tokens leave no room for an answer about {state.opened.rollout_id}: "
            f"a context holds {bound}"
        )
    return make_conversation(name, token_ids=ids)


def _question(state: State) -> tuple[int, ...]:
    """The context up to where the newest turn begins, or would begin: behind the newest question or tool result."""
    last = state.turns[-1] if state.turns else None
    is_answered = last is not None and last.start + last.length == len(state.token_ids)
    return state.token_ids[: last.start] if last and is_answered else state.token_ids


def _answered(asked: Instruction, state: State, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The context up to the end of the newest whole answer.  StateError."""
    last = state.turns[-1] if state.turns else None
    answered = state.token_ids[: last.start + last.length] if last else ()
    if not answered or answered[-1] != tokenizer.control(V4.eos):
        raise StateError(f"{asked.task}: {state.opened.rollout_id} has no whole answer that it could stand behind")
    return answered


def _answer(task: str, state: State, tokenizer: Tokenizer) -> QuickAnswer:
    drawn = drawn_ids(state)
    return QuickAnswer(
        task=task,
        rollout_id=state.opened.rollout_id,
        prompt_tokens_count=prompt_length(state),
        cached_tokens_count=state.spent[0].cached_tokens_count if state.spent else 0,
        answer_tokens_count=len(drawn),
        **asdict(read_answer(task, drawn, tokenizer)),
    )
