"""Errors of the sandbox service: one root, few leaves, each saying whose fault it was.

The class says what policy needs (`code` goes over the wire and never changes its
meaning; `retryable`; `fault`; `command_started`), the instance carries the facts of
the one case.  A non-zero exit code is a result, never an error.

See: docs/architecture.md, "Errors".
"""

from __future__ import annotations

from typing import ClassVar, Literal

Fault = Literal["caller", "host", "peer", "storage"]
Started = Literal["yes", "no", "unknown"]


class DsecError(Exception):
    """Root of every error that `dsec` raises on purpose."""

    code: ClassVar[str] = "DSEC"
    retryable: ClassVar[bool] = False
    fault: ClassVar[Fault] = "host"
    command_started: ClassVar[Started] = "no"


class InvalidArgumentError(DsecError):
    """The request itself cannot be carried out, now or later: the caller must change it."""

    code = "INVALID_ARGUMENT"
    fault = "caller"


class NotFoundError(DsecError):
    """No such sandbox, command, layer or image: the name is wrong, or its time is over."""

    code = "NOT_FOUND"
    fault = "caller"


class OutOfRangeError(DsecError):
    """Bytes that were asked for by offset were counted but not kept."""

    code = "OUT_OF_RANGE"
    fault = "caller"


class StateError(DsecError):
    """The sandbox's state does not allow this (the lifecycle table), or a newer epoch owns it."""

    code = "FAILED_PRECONDITION"
    fault = "caller"


class HostUnfitError(DsecError):
    """This host lacks what a sandbox needs (root, overlayfs, cgroups, python3 below /usr ...)."""

    code = "HOST_UNFIT"


class ResourceExhaustedError(DsecError):
    """A bound was met (sandboxes, memory, uid ranges, disk): try again when something ended."""

    code = "RESOURCE_EXHAUSTED"
    retryable = True


class SandboxLostError(DsecError):
    """The sandbox died or was destroyed under a caller; a command in flight had started."""

    code = "SANDBOX_LOST"
    retryable = True
    command_started = "unknown"


class OutcomeUnknownError(DsecError):
    """The command started, and nobody can say whether or how it ended; it is never run again by itself."""

    code = "OUTCOME_UNKNOWN"
    command_started = "unknown"


class UnreachableError(DsecError):
    """The Edge does not answer, or the connection broke; the same key or request id asks again."""

    code = "UNREACHABLE"
    retryable = True
    fault = "peer"
    command_started = "unknown"


class SpawnError(DsecError):
    """A step of creating a sandbox failed; the message names the step and the errno."""

    code = "SPAWN_FAILED"
    retryable = True


class DivergedError(DsecError):
    """A replay gave another result than the log, or a used key came with another command."""

    code = "DIVERGED"
    fault = "peer"
    command_started = "yes"
