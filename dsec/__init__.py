"""Sandboxes: the port, the host agent (Edge) that makes them, and the log of what ran in them.

`dsec.Sandbox` and `dsec.AsyncSandbox` are the client; they are imported when they are asked for, so that
`import dsec` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsec.client.blocking import Sandbox
    from dsec.client.sandbox import AsyncSandbox

__all__ = ["AsyncSandbox", "Sandbox"]


def __getattr__(name: str) -> object:
    if name == "Sandbox":
        from dsec.client.blocking import Sandbox

        return Sandbox
    if name == "AsyncSandbox":
        from dsec.client.sandbox import AsyncSandbox

        return AsyncSandbox
    raise AttributeError(f"module 'dsec' has no attribute {name!r}")
