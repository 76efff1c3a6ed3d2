"""Rewards from a Python function of the service's own installation.

A caller names a function; the operator's allowlist says which may be named, because it runs in the service's process.
It gets the finished record and returns a number, or several by name with one called `reward`.  What it raises, an
answer that is no finite number, and one that does not come in time are VerifierErrors: an infrastructure failure,
never a reward of 0.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
import threading
from collections.abc import Callable, Mapping

from rollout.errors import RequestError, VerifierError
from rollout.record import TrajectoryRecord
from rollout.request import CallableReward, Job
from rollout.threads import in_thread

VERIFIER_ID = "callable"
CALLS_COUNT_MAX = 16
"""Functions that run at once."""
_places = threading.BoundedSemaphore(CALLS_COUNT_MAX)


def check_allowed(job: Job, allowed: frozenset[str]) -> None:
    """RequestError if the job names a function that this service may not call, or that is not there."""
    if isinstance(job.reward, CallableReward):
        if job.reward.target not in allowed:
            raise RequestError(
                f"reward callable {job.reward.target!r} is not one that this service may call "
                f"({', '.join(sorted(allowed)) or 'none is'}): its operator names them in DSEC_REWARD_CALLABLES"
            )
        _load(job.reward.target)


async def call(target: str, record: TrajectoryRecord, timeout_s: float) -> tuple[float, dict[str, float]]:
    """The reward and its components, from the function in a thread of its own.  VerifierError.

    A function that hangs keeps its thread, and with it one of the CALLS_COUNT_MAX places.
    """
    function = _load(target)

    def work() -> object:
        if not _places.acquire(timeout=timeout_s):
            raise TimeoutError
        try:
            return function(record)
        finally:
            _places.release()

    try:
        async with asyncio.timeout(timeout_s):
            found = await in_thread(work, "reward")
            if inspect.isawaitable(found):
                found = await found
    except TimeoutError as error:
        raise VerifierError(f"{target}: no reward within {timeout_s:g} s") from error
    except (Exception, SystemExit) as error:  # whatever somebody else's code raises
        raise VerifierError(f"{target} raised {type(error).__name__}: {error}") from error
    return _read(target, found)


def _load(target: str) -> Callable[[TrajectoryRecord], object]:
    module, _, name = target.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RequestError(f"reward callable {target!r} cannot be loaded: {error}") from error
    if not callable(function):
        raise RequestError(f"reward callable {target!r} is not callable")
    checked: Callable[[TrajectoryRecord], object] = function
    return checked


def _read(target: str, found: object) -> tuple[float, dict[str, float]]:
    components = dict(found) if isinstance(found, Mapping) else {"reward": found}
    if "reward" not in components:
        raise VerifierError(f'{target}: several numbers and none of them named "reward"')
    read = {}
    for name, number in components.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise VerifierError(f"{target}: {name} is {str(number)[:80]}, not a finite number")
        read[str(name)] = float(number)
    return read["reward"], read
