"""The wire dialects as data: every literal that is written and looked for, and every rule that differs between them.

Encoder and parser hold no literal of the format themselves and ask no dialect for its name, so
another dialect is another value of `Dialect` and never another branch.  Templates are trusted
text: a control token spelled in one is that control token on the wire (the tools section really
holds `｜DSML｜` and `<think>` ids), while the same spelling in anybody's data is ordinary text.

See: docs/formats/toolcall_dsl.md, "Tokens", "Dialects" and "Encoding".
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

_ABSOLUTE_MAXIMUM: Final = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, "
    "rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)

_BEYOND_MAXIMUM: Final = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose "
    "the problem into its most fundamental components, trace every causal chain to its root, and resolve the "
    "underlying cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles and are certain "
    "that no assumption remains unchecked and no error remains undiscovered.\n\n"
)

_BUDGETS: Final[Mapping[str | int, int]] = {
    "low": 50,
    "high": 75,
    "xhigh": 75,
    "max": 100,
    **{budget: budget for budget in range(1, 101)},
}

_TOOLS_TAIL: Final = """

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""


def _tools_head(block: str, invoke: str, parameter: str) -> str:
    return f"""## Tools

You have access to a set of tools to help answer the user's question. \
You can invoke tools by writing a "<｜DSML｜{block}>" block like the following:

<｜DSML｜{block}>
<｜DSML｜{invoke} name="$TOOL_NAME">
<｜DSML｜{parameter} name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜{parameter}>
...
</｜DSML｜{invoke}>
<｜DSML｜{invoke} name="$TOOL_NAME2">
...
</｜DSML｜{invoke}>
</｜DSML｜{block}>

String parameters should be specified as is and set `string="true"`. \
For all other types (numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), \
you MUST output your complete reasoning inside <think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""


@dataclass(frozen=True, eq=False, repr=False)
class Dialect:
    """One wire dialect.  Token fields hold the spelling of one control token each.

    Tokens: `system` stands before every system text and before the effort text ("": no such token).
    `image` stands for an image until a server puts the image's own tokens there; a vocabulary
    may lack it.

    Tags: `block_name`, `invoke_name` and `parameter_name` follow `dsml` in a tag, a leading space
    included.  `block_aliases` are other spellings of the block name that the tolerant parser
    accepts.

    Efforts: `efforts` maps a reasoning effort to the text that opens a thinking prompt (""
    for one that adds nothing); `default_effort` is meant where none is given.

    Quick Instructions: `tasks` maps a task to its token.  Those in `tasks_after_header` stand
    behind an assistant header, those in `tasks_after_answer` ask about an answer, the others
    directly follow the question.  `task_marks` maps a task to a control token that the question
    itself holds.

    Rules: `results_ask` says that a user turn of tool results alone counts as a question when old
    reasoning is dropped; `mid_system_asks` that a system message behind the first turn does, and
    that it gets an assistant header as a question would; `user_fields_kept` that a user message
    keeps its `content_blocks` and that its `tools` keep reasoning alive.  `argument_decodings` is
    how often text is decoded as JSON in search of the object that holds a call's arguments.
    """

    name: str
    bos: str
    eos: str
    system: str
    user: str
    assistant: str
    think_open: str
    think_close: str
    dsml: str
    latest_reminder: str
    image: str
    block_name: str
    invoke_name: str
    parameter_name: str
    block_aliases: tuple[str, ...]
    tools_head: str
    tools_tail: str
    response_format_head: str
    efforts: Mapping[str | int, str]
    default_effort: str
    tasks: Mapping[str, str]
    tasks_after_header: frozenset[str]
    tasks_after_answer: frozenset[str]
    task_marks: Mapping[str, str]
    results_ask: bool
    mid_system_asks: bool
    user_fields_kept: bool
    argument_decodings: int

    def __repr__(self) -> str:
        """Its name; the literals fill pages."""
        return f"<Dialect {self.name}>"

    @functools.cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """Every control token of the vocabulary that a prompt of this dialect can hold, each once."""
        own = (self.bos, self.eos, self.user, self.assistant, self.think_open, self.think_close)
        tasks = (*self.tasks.values(), *self.task_marks.values())
        return tuple(
            token for token in dict.fromkeys((*own, self.dsml, self.latest_reminder, self.system, *tasks)) if token
        )


V4: Final = Dialect(
    name="v4",
    bos="<｜begin▁of▁sentence｜>",
    eos="<｜end▁of▁sentence｜>",
    system="",
    user="<｜User｜>",
    assistant="<｜Assistant｜>",
    think_open="<think>",
    think_close="</think>",
    dsml="｜DSML｜",
    latest_reminder="<｜latest_reminder｜>",
    image="<｜deepseek_image｜>",
    block_name="tool_calls",
    invoke_name="invoke",
    parameter_name="parameter",
    block_aliases=("toolcalls", "tool", "function_calls"),
    tools_head=_tools_head("tool_calls", "invoke", "parameter"),
    tools_tail=_TOOLS_TAIL,
    response_format_head="## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n",
    efforts=MappingProxyType({"high": "", "max": _ABSOLUTE_MAXIMUM}),
    default_effort="high",
    tasks=MappingProxyType(
        {
            "action": "<｜action｜>",
            "query": "<｜query｜>",
            "authority": "<｜authority｜>",
            "domain": "<｜domain｜>",
            "title": "<｜title｜>",
            "read_url": "<｜read_url｜>",
        }
    ),
    tasks_after_header=frozenset({"action"}),
    tasks_after_answer=frozenset({"title"}),
    task_marks=MappingProxyType({"read_url": "<｜extracted_url｜>"}),
    results_ask=True,
    mid_system_asks=False,
    user_fields_kept=False,
    argument_decodings=1,
)
"""The preview encoding of April 2026, the technical report's."""

V4_0731: Final = replace(
    V4,
    name="v4-0731",
    efforts=MappingProxyType({"low": "", "high": _ABSOLUTE_MAXIMUM, "max": _BEYOND_MAXIMUM}),
    default_effort="low",
)
"""The checkpoints 0731 and 0813: another ladder of efforts, all else as in `V4`."""

V4_1: Final = replace(
    V4,
    name="v4.1",
    system="<｜System｜>",
    block_name=" calls",
    invoke_name=" invoke",
    parameter_name=" parameter",
    block_aliases=("calls", "tool_calls", "toolcalls", "tool", "function_calls"),
    tools_head=_tools_head(" calls", " invoke", " parameter"),
    efforts=MappingProxyType(
        {
            effort: f"Reasoning Effort: {budget} "
            "(range 1-100, the higher the value, the more thorough the reasoning)\n\n"
            for effort, budget in _BUDGETS.items()
        }
    ),
    results_ask=False,
    mid_system_asks=True,
    user_fields_kept=True,
    argument_decodings=2,
)
"""V4.1-Flash: a system token, spaced tag names, efforts by number (also any integer from 1 to 100)."""

DIALECTS: Final[Mapping[str, Dialect]] = MappingProxyType({dialect.name: dialect for dialect in (V4, V4_0731, V4_1)})
"""Every dialect by its name."""
