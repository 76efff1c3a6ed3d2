"""What was decided about a sandbox's connections, and how it is told: in the Edge's journal, else as lines of a log.

What a client said is in it only as a host in normal form, or as a quoted part of a reason; JSON escapes the rest, so
that no line can be forged from inside.
"""

from __future__ import annotations

import logging

import msgspec

from dsec.types import SandboxId

log = logging.getLogger("dsec.network")


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided about a connection, and again, with `is_end` and its bytes, when an allowed one ended.

    `untold_count` decisions of this sandbox went before it that nobody was told.
    """

    at_s: float
    sandbox_id: SandboxId
    host: str = ""
    port: int = 0
    address: str = ""
    allowed: bool = False
    reason: str = ""
    is_end: bool = False
    sent_bytes: int = 0
    received_bytes: int = 0
    untold_count: int = 0


def log_decision(decision: Decision) -> None:
    """One line of JSON at the level INFO."""
    log.info("%s", msgspec.json.encode(decision).decode())
