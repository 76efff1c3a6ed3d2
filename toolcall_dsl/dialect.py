"""The wire dialect as data: every literal that the encoder writes and the parser looks for.

Encoder and parser hold no literal of the format themselves, so another dialect is another value
of `Dialect` and never another branch.  Templates are trusted text: a control token spelled in
one is that control token on the wire (the tools section really holds `｜DSML｜` and `<think>`
ids), while the same spelling in anybody's data is ordinary text.

See: docs/formats/toolcall_dsl.md, "Tokens" and "Encoding".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

_MAX_EFFORT = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, "
    "rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)

_TOOLS_HEAD = """## Tools

You have access to a set of tools to help answer the user's question. \
You can invoke tools by writing a "<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. \
For all other types (numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), \
you MUST output your complete reasoning inside <think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""

_TOOLS_TAIL = """

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""


@dataclass(frozen=True)
class Dialect:
    """One wire dialect.  Token fields hold the spelling of one control token each.

    `tasks` maps a Quick Instruction to its token; those in `tasks_after_header` stand behind an
    assistant header, the others directly behind the message.  `effort_prefixes` maps a reasoning
    effort to the text that opens a thinking prompt (an effort that adds nothing maps to "").
    `block_aliases` are other spellings of the block name that the tolerant parser accepts.
    """

    name: str
    bos: str
    eos: str
    user: str
    assistant: str
    think_open: str
    think_close: str
    dsml: str
    latest_reminder: str
    block_name: str
    invoke_name: str
    parameter_name: str
    block_aliases: tuple[str, ...]
    tools_head: str
    tools_tail: str
    response_format_head: str
    effort_prefixes: Mapping[str, str]
    tasks: Mapping[str, str]
    tasks_after_header: frozenset[str]

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Every control token that a template of this dialect can write, each once."""
        own = (self.bos, self.eos, self.user, self.assistant, self.think_open, self.think_close)
        return tuple(dict.fromkeys((*own, self.dsml, self.latest_reminder, *self.tasks.values())))


V4 = Dialect(
    name="v4",
    bos="<｜begin▁of▁sentence｜>",
    eos="<｜end▁of▁sentence｜>",
    user="<｜User｜>",
    assistant="<｜Assistant｜>",
    think_open="<think>",
    think_close="</think>",
    dsml="｜DSML｜",
    latest_reminder="<｜latest_reminder｜>",
    block_name="tool_calls",
    invoke_name="invoke",
    parameter_name="parameter",
    block_aliases=("toolcalls", "tool", "function_calls"),
    tools_head=_TOOLS_HEAD,
    tools_tail=_TOOLS_TAIL,
    response_format_head=("## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"),
    effort_prefixes=MappingProxyType({"high": "", "max": _MAX_EFFORT}),
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
)
