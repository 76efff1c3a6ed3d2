"""The engine's state of preempted rollouts, in files beside the log.

They are a shortcut: the log holds every token, and a state that is missing, or does not fit, is computed again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path

from rollout.engine import Engine
from rollout.errors import EngineError

SAVE_S_MAX = 60.0
"""For an engine to write what it keeps of a rollout."""
_log = logging.getLogger(__name__)


class KvFiles:
    """Rollout id -> file."""

    def __init__(self, directory: Path, engine: Engine) -> None:
        """The directory is made when it is first needed."""
        self._directory = directory
        self._engine = engine

    async def save(self, rollout_id: str) -> None:
        """Write what the engine keeps of a rollout, and have it forget that."""
        try:
            async with asyncio.timeout(SAVE_S_MAX):
                await asyncio.to_thread(self._directory.mkdir, parents=True, exist_ok=True)
                await self._engine.save(rollout_id, self._path(rollout_id))
        except (EngineError, OSError) as error:  # a TimeoutError is one
            why = str(error) or f"the engine takes more than {SAVE_S_MAX:g} s"
            _log.warning("%s: its state is not saved, and will be computed again: %s", rollout_id, why)
        await self._engine.release(rollout_id)

    def holds(self, rollout_id: str) -> bool:
        """Whether something was saved."""
        return self._path(rollout_id).exists()

    async def restore(self, rollout_id: str) -> bool:
        """Give the engine what was saved, once; whether it took any of it."""
        path = self._path(rollout_id)
        if not path.exists():
            return False
        try:
            return await self._engine.restore(rollout_id, path) > 0
        except EngineError as error:
            _log.warning("%s: its state is not restored, and will be computed again: %s", rollout_id, error)
            return False
        finally:
            _remove(path)

    def keep(self, rollout_ids: Iterable[str]) -> None:
        """Remove all files but those of these rollouts."""
        kept = {self._path(rollout_id) for rollout_id in rollout_ids}
        for path in self._directory.glob("*"):
            if path not in kept:
                _remove(path)

    def drop(self, rollout_id: str) -> None:
        """The rollout will not go on."""
        _remove(self._path(rollout_id))

    def _path(self, rollout_id: str) -> Path:
        return self._directory / hashlib.blake2b(rollout_id.encode(), digest_size=16).hexdigest()


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # one that stays does not fit, or is the state that it says
        path.unlink()
