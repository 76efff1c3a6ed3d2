"""New weights for a server that nobody draws with meanwhile: load, try, announce, label; or all as it was.

While this lasts the label says so, from before the first request is cut: who opens the server then, or begins a
request, in this process or another one, sees that its weights are not those that it knows.  A process that is killed
leaves that label behind, and nobody can tell what the server has: it must be started again.

See: docs/adr/0027-engines-over-http.md.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec

from rollout.engine import Announce, EngineInfo
from rollout.engines.vllm.connection import Connection
from rollout.engines.vllm.facts import Facts, probe, read_label
from rollout.engines.vllm.pauses import Pause
from rollout.engines.vllm.weights import CHANGING, Label, parse_label
from rollout.errors import EngineError, ForeignWeightsError, RolloutError

LOAD_S_MAX = 3600.0


class Change:
    """One change, which is begun, and then carried out or taken back."""

    def __init__(self, connection: Connection, pause: Pause, facts: Facts, info: EngineInfo, folder: Path) -> None:
        """From what `facts` say to what `info` says and `folder` holds; `pause` has begun before it is carried out."""
        self._connection = connection
        self._pause = pause
        self._facts = facts
        self._info = info
        self._folder = folder
        self._label = ""
        """Before the change."""
        self._is_there = False
        """Nothing is to be loaded."""

    async def begin(self) -> None:
        """Put the mark.  EngineError, and nothing changed: somebody else changes the weights, or has.

        Whoever does not hear that it is there, or is cancelled meanwhile, takes it away.
        """
        old, new = self._facts.info, self._info
        self._label = await read_label(self._connection)
        found = parse_label(self._label).policy_version
        if found not in (old.policy_version, new.policy_version):
            raise ForeignWeightsError(f"{self._connection.url}: its weights are version {found}, of which nobody told")
        self._is_there = found == new.policy_version or new.weights_digest == old.weights_digest
        try:
            await self._put(CHANGING + self._label)
        except BaseException:
            with contextlib.suppress(RolloutError):
                await self._put(self._label)
            raise

    async def carry_out(self, announce: Announce | None) -> Facts:
        """What is known of the server from then on.  Raises what `announce` does; EngineError."""
        if not self._is_there:
            await self._load(self._folder)
        await self._try_out()
        if announce is not None:
            await announce(self._info)
        await self._put(str(Label(self._info.policy_version, self._info.weights_digest, str(self._folder))))
        return msgspec.structs.replace(self._facts, info=self._info, folder=self._folder)

    async def take_back(self, cause: BaseException) -> EngineError | None:
        """Have the server load the old weights again; or why nobody may draw with it any more."""
        try:
            if not self._is_there:
                if self._facts.folder is None:
                    raise EngineError("the checkpoint that it had is not known")
                await self._load(self._facts.folder)
            await self._put(self._label)
        except RolloutError as error:
            return EngineError(f"{self._connection.url}: it has no weights any more ({cause}; {error}): start it again")
        return None

    async def _try_out(self) -> None:
        """EngineError where the weights draw no token with a logprob; in a pause, too, which is lifted for that token.

        What others ask for meanwhile nobody gets: the label says that the weights change.
        """
        try:
            async with self._pause.lifted():
                await probe(self._connection, self._info)
        except RolloutError as error:
            its = f"{self._connection.url}: the weights of {self._folder} are refused: {error}"
            if not self._is_there:
                raise EngineError(its) from error
            raise EngineError(
                f"{its}; it had them before, and nothing to put in their place: put others there, or start it again"
            ) from error

    async def _load(self, folder: Path) -> None:
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        await self._connection.post("/collective_rpc", body, call_s_max=LOAD_S_MAX)

    async def _put(self, label: str) -> None:
        await self._connection.post("/update_weight_version", {"new_version": label})
