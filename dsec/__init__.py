"""Sandboxes: the port, the host agent (Edge) that makes them, and the log of what ran in them.

`dsec.Sandbox` and `dsec.AsyncSandbox` are the client; they are imported when they are asked for, so that
`import dsec` costs nothing.  `dsec.DsecError` is the root of what they raise.

See: docs/python.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from dsec.errors import (
    DivergedError,
    DsecError,
    HostUnfitError,
    InvalidArgumentError,
    NotFoundError,
    OutcomeUnknownError,
    OutOfRangeError,
    ResourceExhaustedError,
    SandboxLostError,
    SpawnError,
    StateError,
    UnreachableError,
)

if TYPE_CHECKING:
    from dsec.client.blocking import Sandbox
    from dsec.client.commands import CommandFailedError, CommandResult
    from dsec.client.sandbox import AsyncSandbox

__all__ = [
    "AsyncSandbox",
    "CommandFailedError",
    "CommandResult",
    "DivergedError",
    "DsecError",
    "HostUnfitError",
    "InvalidArgumentError",
    "NotFoundError",
    "OutOfRangeError",
    "OutcomeUnknownError",
    "ResourceExhaustedError",
    "Sandbox",
    "SandboxLostError",
    "SpawnError",
    "StateError",
    "UnreachableError",
]
_CLIENT = {
    "AsyncSandbox": "dsec.client.sandbox",
    "CommandFailedError": "dsec.client.commands",
    "CommandResult": "dsec.client.commands",
    "Sandbox": "dsec.client.blocking",
}


def __getattr__(name: str) -> object:
    if name not in _CLIENT:
        raise AttributeError(f"module 'dsec' has no attribute {name!r}")
    return getattr(importlib.import_module(_CLIENT[name]), name)


def __dir__() -> list[str]:
    return __all__
