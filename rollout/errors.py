"""Errors of the rollout service: one root, few leaves, each saying whose fault it was.

The class says what policy needs (`code` and `fault`; `retryable` is for callers); people read the
message, which names the thing that was wrong and the way out.  An infrastructure failure is always
one of these and never a reward.

See: docs/architecture.md, "Errors".
"""

from __future__ import annotations

from typing import ClassVar

from dsec.errors import Fault


class RolloutError(Exception):
    """Root of every error that `rollout` raises on purpose."""

    code: ClassVar[str] = "ROLLOUT"
    retryable: ClassVar[bool] = False
    fault: ClassVar[Fault] = "host"


class TaskError(RolloutError):
    """A task folder that cannot be used; the message names the folder, the file and the rule."""

    code = "BAD_TASK"
    fault = "caller"


class RequestError(RolloutError):
    """A request or a command line that cannot be carried out."""

    code = "BAD_REQUEST"
    fault = "caller"


class ConflictError(RequestError):
    """A request id that stands for another request already."""

    code = "ALREADY_EXISTS"


class NotFoundError(RolloutError):
    """A job or a rollout that this log does not hold."""

    code = "NOT_FOUND"
    fault = "caller"


class ResultsError(RolloutError):
    """Results could not be written; they are derived, and the log that they come from is whole."""

    code = "RESULTS_UNWRITABLE"
    retryable = True
    fault = "storage"


class ShardError(RolloutError):
    """A shard, its manifest or a side channel is missing or damaged; it is derived, and the log can give it again."""

    code = "SHARD_DAMAGED"
    fault = "storage"


class EngineError(RolloutError):
    """The engine failed or closed while a request ran; logged tokens are kept."""

    code = "ENGINE_ERROR"
    retryable = True
    fault: ClassVar[Fault] = "peer"
    is_absent = False
    """Nobody answered there, who may yet."""


class ForeignWeightsError(EngineError):
    """Somebody else changed an engine's weights: the tokens that it handed over last may be of those."""

    code = "FOREIGN_WEIGHTS"


class PreemptedError(EngineError):
    """A request was ended on purpose at a token boundary; all that was drawn has been handed over."""

    code = "PREEMPTED"
    fault = "host"


class VerifierError(RolloutError):
    """The verifier gave no reward (missing, empty, not finite): an infrastructure failure, not a 0."""

    code = "VERIFIER_ERROR"
    fault = "peer"


class JournalError(RolloutError):
    """The log cannot be used: corrupt, of another run, or made by another model or tokenizer."""

    code = "JOURNAL"
    fault = "storage"


class MachineError(RolloutError):
    """An event that does not fit the state: a bug, or a log that this version cannot read."""

    code = "MACHINE"
    fault = "storage"
