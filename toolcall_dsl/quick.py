"""Quick Instructions as data, for a server that branches them off one shared prefix.

A Quick Instruction asks the model a small question about the conversation, such as which searches
it needs, with one to three control tokens behind a prefix that is in the KV cache already.  So
`query`, `authority` and `domain` run in parallel from one prefix without a new prefill.  A branch
is forked and thrown away: the real turn goes on from the shared prefix with its header.

Invariants:
1. The shared prefix plus the segments of an instruction are the ids that `encode` gives for the
   same conversation with the `task` on its message.

See: docs/formats/toolcall_dsl.md, "Quick Instructions"; technical report, section 5.1.1.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal

from toolcall_dsl.dialect import V4, Dialect
from toolcall_dsl.errors import MessageError
from toolcall_dsl.options import check_dialect, check_switches
from toolcall_dsl.pieces import Control, Piece, Text, segments_of
from toolcall_dsl.render import task_pieces
from toolcall_dsl.tokenizer import Tokenizer
from toolcall_dsl.types import Segment, SpanKind

Action = Literal["search", "answer"]
_ACTIONS: Final[Mapping[str, Action]] = MappingProxyType({"Search": "search", "Answer": "answer"})
"""What `action` is answered with.  Of the other tasks no answers were published: theirs are text."""


@dataclass(frozen=True)
class Instruction:
    """One Quick Instruction.

    `place` says where it may be appended: behind the `question`, where the shared prefix ends
    before the header of the reply, or behind the `answer`, where it ends with the end token.
    """

    task: str
    place: Literal["question", "answer"]
    pieces: tuple[Piece, ...]

    @property
    def text(self) -> str:
        """What the reference encoder writes for it."""
        return "".join(piece.text for piece in self.pieces)

    def segments(self, tokenizer: Tokenizer) -> tuple[Segment, ...]:
        """The tokens to append: 1, but 3 for `action`, and `read_url` brings the address along.

        TokenizerError if the vocabulary lacks one of its control tokens.
        """
        return segments_of(self.pieces, tokenizer)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a branch answered: `text`, and what it says in the field of its task.

    `action` of the task `action`; `queries`, one a line, of `query`; `title` of `title`; `label`, a line, of
    `authority`, `domain` and `read_url`.  What is nothing of that (cut off before its end token, so not
    `is_complete`, is nothing, too) has none of them, and `unread` says why.
    """

    text: str
    is_complete: bool
    action: Action | None = None
    queries: tuple[str, ...] = ()
    title: str | None = None
    label: str | None = None
    unread: str = ""


def instruction(task: str, *, thinking: bool, url: str | None = None, dialect: Dialect = V4) -> Instruction:
    """The instruction of a task; `thinking` is the mode of the conversation.

    `url` is the address that a task with a mark of its own (`read_url`) asks about, required there and
    nowhere else.  MessageError for an unknown task, an address missing or given in vain, OptionError
    for a dialect or a switch that is none.
    """
    check_dialect(dialect)
    check_switches(thinking=thinking)
    if task not in dialect.tasks:
        raise MessageError(f"task: {reprlib.repr(task)} is none of {', '.join(dialect.tasks)} (dialect {dialect.name})")
    mark = dialect.task_marks.get(task)
    if mark is None and url is not None:
        raise MessageError(f"url: task {task!r} takes none")
    if mark is not None and not (url and url.strip()):
        raise MessageError(f"url: task {task!r} needs one{'' if url is None else ', not an empty one'}")
    marked = () if mark is None or url is None else (Control(mark), Text(url, SpanKind.USER))
    place: Literal["question", "answer"] = "answer" if task in dialect.tasks_after_answer else "question"
    return Instruction(task, place, (*marked, *task_pieces(task, dialect, thinking=thinking)))


def shared_prefix(prompt: Sequence[int], tokenizer: Tokenizer, *, dialect: Dialect = V4) -> Sequence[int]:
    """The prompt that branches share: without the header of the reply, if it ends with one.

    That is what instructions with the place `question` are appended to; those with the place
    `answer` are appended to ids that end with the end token, which come back as they are.
    """
    check_dialect(dialect)
    openers = {tokenizer.control(dialect.think_open), tokenizer.control(dialect.think_close)}
    has_header = len(prompt) > 1 and prompt[-1] in openers and prompt[-2] == tokenizer.control(dialect.assistant)
    return prompt[:-2] if has_header else prompt


def read_answer(task: str, token_ids: Sequence[int], tokenizer: Tokenizer, *, dialect: Dialect = V4) -> Answer:
    """What was sampled behind the instruction of a task, up to the end token.  Total: it never raises on ids.

    Any other control token that was sampled stands in the text as it is spelled, and makes it unread.
    """
    check_dialect(dialect)
    ids, end = list(token_ids), tokenizer.control(dialect.eos)
    count = ids.index(end) if end in ids else len(ids)
    answer = Answer(text=tokenizer.decode(ids[:count]), is_complete=count < len(ids))
    if not answer.is_complete:
        return replace(answer, unread="it was cut off before its end")
    if controls := [each for each in ids[:count] if each in tokenizer.control_ids]:
        return replace(answer, unread=f"it holds the control token {tokenizer.decode(controls[:1])}")
    return _read(task, answer)


def _read(task: str, answer: Answer) -> Answer:
    lines = tuple(line.strip() for line in answer.text.splitlines() if line.strip())
    if not lines:
        return replace(answer, unread="it is empty")
    if task == "query":
        return replace(answer, queries=lines)
    if len(lines) > 1:
        return replace(answer, unread=f"it has {len(lines)} lines, must be one")
    if task == "title":
        return replace(answer, title=lines[0])
    if task != "action":
        return replace(answer, label=lines[0])
    if (action := _ACTIONS.get(lines[0])) is None:
        return replace(answer, unread=f"{reprlib.repr(lines[0])} is neither {' nor '.join(_ACTIONS)}")
    return replace(answer, action=action)
