"""What the Edge is asked for and what it shows: the values that its service, its wire and its clients share.

Frozen structs without behaviour, in a module of their own so that a client needs nothing of `dsec.edge`.
Times are seconds: a moment is the wall clock's, since 1970; a span is a float.

See: dsec/edge/service.py, proto/dsec/pb/v1/edge.proto.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from dsec.types import Command, ExecResult, SandboxId, SandboxSpec


class CreateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A sandbox to make.

    The same `request_id` gives the same sandbox for ever ("": each request its own); `owner` and
    `epoch` name the lease that it lives under ("": none).  It ends after `idle_timeout_s` without a
    command, and `lifetime_s` after it was made (None: never).
    """

    spec: SandboxSpec = SandboxSpec()
    request_id: str = ""
    labels: dict[str, str] = {}
    owner: str = ""
    epoch: int = 0
    idle_timeout_s: float | None = None
    lifetime_s: float | None = None


class SandboxView(msgspec.Struct, frozen=True, kw_only=True):
    """One sandbox as the Edge knows it; `reason` says why it ended ("" while it lives).

    `state` is one of the states of dsec/lifecycle.py.
    """

    id: SandboxId
    state: str
    spec: SandboxSpec
    labels: dict[str, str] = {}
    owner: str = ""
    epoch: int = 0
    created_at_s: float = 0.0
    expires_at_s: float | None = None
    commands_count: int = 0
    reason: str = ""


class CommandView(msgspec.Struct, frozen=True, kw_only=True):
    """One command of a sandbox; `result` is there when it has finished."""

    key: str
    number: int
    command: Command
    state: Literal["running", "finished", "unknown"]
    result: ExecResult | None = None


class ImportOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How an archive becomes an image.

    `name` is the image's ("": as it is named there, or after `source`, the archive's own name); `reference` says which,
    where there are several; `compressed` layers are smaller and take longer to make.
    """

    name: str = ""
    reference: str = ""
    source: str = ""
    compressed: bool = False


class HostView(msgspec.Struct, frozen=True, kw_only=True):
    """An Edge and its host: what is used of each bound (name -> used, total), and the sandboxes by state."""

    used: dict[str, float] = {}
    total: dict[str, float] = {}
    sandboxes: dict[str, int] = {}
