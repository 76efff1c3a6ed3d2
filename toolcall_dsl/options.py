"""What a caller may choose, checked where it comes in.

A misspelled policy must not fall back to the forgiving one, and a word such as "chat" is no switch
that is on: a wrong option is an error at once, before anything is read or written.

See: docs/formats/toolcall_dsl.md.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import get_args

from toolcall_dsl.dialect import DIALECTS, Dialect
from toolcall_dsl.errors import OptionError
from toolcall_dsl.types import Policy

POLICIES: tuple[Policy, ...] = get_args(Policy)
"""The two ways to read a turn."""


def check_policy(policy: object) -> None:
    """OptionError for all but the two policies."""
    if not isinstance(policy, str) or policy not in POLICIES:
        raise OptionError(f"policy: {reprlib.repr(policy)} is none of {', '.join(map(repr, POLICIES))}")


def check_switches(**switches: object) -> None:
    """OptionError for a value that is neither True nor False; words and numbers are refused."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise OptionError(f"{name}: {reprlib.repr(value)} is neither True nor False")


def check_dialect(dialect: object) -> None:
    """OptionError for what is no `Dialect`; a name is told how to become one."""
    if isinstance(dialect, Dialect):
        return
    known = f"DIALECTS[name] has {', '.join(map(repr, DIALECTS))}"
    raise OptionError(f"dialect: {reprlib.repr(dialect)} is no Dialect; {known}")


def check_tools(tools: object) -> None:
    """OptionError for what is not a list of objects; None is no tools."""
    is_list = isinstance(tools, list | tuple) and all(isinstance(tool, Mapping) for tool in tools)
    if tools is not None and not is_list:
        raise OptionError("tools: must be a list of objects, each with a 'function'")
