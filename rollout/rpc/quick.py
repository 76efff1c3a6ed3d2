"""Quick Instructions about a rollout's context: small questions, asked in parallel from one prefix.

Each is a prompt of its own: the rollout's tokens up to a place where the instruction may stand, and the
instruction.  So its answer is a rollout too, with the same log and record, and the rollout asked about does not notice.

See: toolcall_dsl/quick.py; proto/rollout/pb/v1/rollout.proto, "QuickInstruction".
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import aclosing

from dsec.errors import StateError
from rollout.engine import Sampling
from rollout.errors import ConflictError, NotFoundError, RequestError
from rollout.generation import Ask, Ended, drawn_ids, generate
from rollout.jobs import make_conversation
from rollout.record import QuickAnswer
from rollout.request import Conversation, Job
from rollout.service import RolloutService
from rollout.state import State
from toolcall_dsl import V4, Tokenizer
from toolcall_dsl.quick import Instruction, instruction, read_answer, shared_prefix

INSTRUCTIONS_MAX = 16
ANSWER_TOKENS_MAX, ANSWER_TOKENS_COUNT = 512, 64


async def ask(
    service: RolloutService,
    request_id: str,
    rollout_id: str,
    asked: Sequence[tuple[str, str | None]],
    *,
    answer_tokens_count_max: int = 0,
    sampling: Sampling,
) -> tuple[QuickAnswer, ...]:
    """The answers to instructions (task, and the url that it is about), in the order asked.

    The same request again gives the same answers.  NotFoundError, RequestError, ConflictError,
    MessageError (no such instruction), StateError (it cannot stand behind this context).
    """
    state = service.ledger.rollouts.get(rollout_id)
    if state is None:
        raise NotFoundError(f"no rollout {rollout_id!r}")
    if not 1 <= len(asked) <= INSTRUCTIONS_MAX:
        raise RequestError(f"instructions: give 1 to {INSTRUCTIONS_MAX}, not {len(asked)}")
    if answer_tokens_count_max > ANSWER_TOKENS_MAX:
        raise RequestError(f"answer_tokens_count_max is {answer_tokens_count_max}, at most {ANSWER_TOKENS_MAX}")
    thinking = state.job.thinking != "none"
    instructions = [instruction(task, thinking=thinking, url=url) for task, url in asked]
    names = [_name(number, rollout_id, each) for number, each in enumerate(instructions)]
    known = service.ledger.jobs.get(request_id)
    if known is None:
        prompts = [_prompt(*each, state, service.tokenizer) for each in zip(names, instructions, strict=True)]
    else:
        prompts = _logged(service, known, names)
    wanted = Ask(
        request_id=request_id,
        prompts=tuple(prompts),
        sampling=sampling,
        tokens_count_max=answer_tokens_count_max or ANSWER_TOKENS_COUNT,
        is_named=True,
    )
    ended: dict[int, State] = {}
    async with aclosing(generate(service, wanted)) as pieces:
        async for piece in pieces:
            if isinstance(piece, Ended):
                ended[piece.index] = piece.state
    return tuple(_answer(each.task, ended[number], service.tokenizer) for number, each in enumerate(instructions))


def _name(number: int, rollout_id: str, asked: Instruction) -> str:
    """Of the prompt: it says which question about whom this is, whatever the context is by now."""
    digest = hashlib.sha256(f"{rollout_id}\0{asked.text}".encode()).hexdigest()
    return f"{number}.{asked.task}.{digest[:16]}"


def _logged(service: RolloutService, known: Job, names: list[str]) -> list[Conversation]:
    """The prompts of a request that was made before, when the rollout's context was shorter.  ConflictError."""
    if [group.task for group in known.groups] != names:
        raise ConflictError(f"request {known.request_id!r} was submitted before with other contents: instructions")
    return [service.ledger.conversations[group.task_digest] for group in known.groups]


def _prompt(name: str, asked: Instruction, state: State, tokenizer: Tokenizer) -> Conversation:
    segments = asked.segments(tokenizer)
    ids = (*_prefix(asked, state, tokenizer), *(token for segment in segments for token in segment.token_ids))
    return make_conversation(name, token_ids=ids)


def _prefix(asked: Instruction, state: State, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The context up to where the instruction may stand: behind the newest question, or the newest whole answer."""
    last = state.turns[-1] if state.turns else None
    if asked.place == "answer":
        answered = state.token_ids[: last.start + last.length] if last else ()
        if not answered or answered[-1] != tokenizer.control(V4.eos):
            raise StateError(f"{asked.task}: {state.opened.rollout_id} has no whole answer that it could stand behind")
        return answered
    is_answered = last is not None and last.start + last.length == len(state.token_ids)
    question = state.token_ids[: last.start] if last and is_answered else state.token_ids
    return tuple(shared_prefix(question, tokenizer))


def _answer(task: str, state: State, tokenizer: Tokenizer) -> QuickAnswer:
    answer = read_answer(drawn_ids(state), tokenizer)
    return QuickAnswer(task=task, text=answer.text, is_complete=answer.is_complete, rollout_id=state.opened.rollout_id)
