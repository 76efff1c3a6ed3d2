"""States on disk, found again by the tokens that they took in: by this process, the next, and others beside it.

A cache and nothing else: what is missing, damaged or of another model is computed again, with the same
result, so nothing is synced, and no failure here is anybody's failure, but that of a directory that can never do.
One thread writes and makes room, and others read, so nobody waits for the disk but the request that is spared a
prefill; all are daemons, so that a disk that hangs keeps no process from its end.

A name says it all: which model, how many tokens, and their digest.  A file is put in place whole, and
read back as `kept_state.py` does it; a checksum is no signature, so the directory is for its user alone.

Invariants:
1. The files of states have at most `bytes_max` bytes as this process last saw them, with what it added; the one
   used longest ago goes first.
See: docs/formats/engine_state.md, "Cached"; docs/adr/0026-states-in-a-tree.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import re
import time
from bisect import insort
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import TypeVar

from rollout.engines.kept_state import TOKEN_BYTES, KeptState, NoStateError, read_state, write_state
from rollout.errors import EngineError, RequestError

TOKENS_MIN = 64
"""A state must spare so many: reading one costs as much as computing a dozen tokens (benchmarks/prefix_reuse.py)."""
_NAME = re.compile(r"([0-9a-f]{16})-([0-9]{1,9})-[0-9a-f]{32}\.kv")
_HALF_WRITTEN = re.compile(r"\.[0-9a-f]{16}-[0-9]{1,9}-[0-9a-f]{32}\.kv\..*")
_HALF_WRITTEN_S_MAX = 600.0
"""After so long nobody writes it any more."""
_FILE_OVERHEAD_BYTES = 4096
_LOOK_S = 2.0
"""What other processes wrote is seen after so long."""
_READ_S_MAX = 1.0
"""A disk that takes longer is slower than computing any context."""
_OPEN_S_MAX, _CLOSE_S_MAX = 10.0, 10.0
"""A disk that takes longer is not waited for, by who starts or by who stops."""
_QUEUED_BYTES_MAX = 64 << 20
_READERS_COUNT = 2

_log = logging.getLogger(__name__)
T = TypeVar("T")


class StateCache:
    """The directory of one engine of this process.  `longest` and `fetch` belong to the event loop."""

    def __init__(self, directory: Path, bytes_max: int, build: str) -> None:
        self._directory = directory
        self._bytes_max = bytes_max
        self._build = build
        self._writer = _Writer()
        self._readers = asyncio.Semaphore(_READERS_COUNT)
        self._sizes: dict[str, int] = {}
        self._counts: dict[str, list[int]] = {}
        """Of each model, the lengths that there are or were."""
        self._lock = Lock()
        self._bytes_held = 0
        self._bytes_queued = 0
        self._seen: tuple[int, float] = (-1, 0.0)
        """The directory's time of change, and when it was looked at."""
        self._late: set[object] = set()
        self._is_failing = self._is_closed = False

    async def open(self) -> None:
        """Make the directory, and find what is there.  RequestError: it cannot be, or is not this user's alone."""
        try:
            async with asyncio.timeout(_OPEN_S_MAX):
                await asyncio.wrap_future(self._writer.submit(self._begin))
        except TimeoutError:
            _log.warning("%s: silent for %g s; states are taken from it when it answers", self._directory, _OPEN_S_MAX)
        except RequestError:
            self._writer.stop()
            raise

    def longest(self, tokens: bytes, weights_digest: str) -> int:
        """Tokens of the longest proper prefix that there is a state of; 0 if there is none worth reading."""
        if time.monotonic() - self._seen[1] > _LOOK_S:
            self._seen = (self._seen[0], time.monotonic())
            self._writer.submit(self._look)
        if self._late:
            return 0
        model, best, taken = self._model(weights_digest), 0, 0
        digest = hashlib.blake2b(digest_size=16)
        with self._lock:
            for count in self._counts.get(model, ()):
                end = count * TOKEN_BYTES
                if end >= len(tokens):
                    break
                digest.update(tokens[taken:end])
                taken = end
                if f"{model}-{count}-{digest.hexdigest()}.kv" in self._sizes:
                    best = count
        return best

    async def fetch(self, tokens: bytes, weights_digest: str) -> KeptState | None:
        """The state of these very tokens; None if it cannot be had, and why is in the log."""
        reading: Future[KeptState | None] = Future()
        try:
            async with asyncio.timeout(_READ_S_MAX), self._readers:
                reading.set_running_or_notify_cancel()
                read = partial(self._read, tokens, weights_digest)
                Thread(target=_carry_out, args=(reading, read), daemon=True).start()
                return await asyncio.wrap_future(reading)
        except TimeoutError:
            if reading.running():
                self._late.add(reading)
                reading.add_done_callback(self._late.discard)
            _log.warning("%s: silent for %g s; contexts are computed again meanwhile", self._directory, _READ_S_MAX)
            return None

    def store(self, state: KeptState) -> None:
        """Have a state written, unless too much waits already; from any thread, at once."""
        size = _size(state)
        with self._lock:
            is_too_much = self._bytes_queued + size > _QUEUED_BYTES_MAX
            self._bytes_queued += 0 if is_too_much else size
        if not is_too_much:
            self._writer.submit(partial(self._write_queued, state))

    async def close(self, states: Iterable[KeptState] = ()) -> None:
        """Write what is queued and these states, and end; a disk that is too slow for that keeps what it has by then.

        Idempotent.
        """
        if self._is_closed:
            return
        self._is_closed = True
        for state in states:
            self._writer.submit(partial(self._write, state))
        written = self._writer.stop()
        try:
            async with asyncio.timeout(_CLOSE_S_MAX):
                await asyncio.wrap_future(written)
        except TimeoutError:
            _log.warning("%s: not all states were written within %g s", self._directory, _CLOSE_S_MAX)

    def _model(self, weights_digest: str) -> str:
        return hashlib.blake2b(f"{self._build}\0{weights_digest}".encode(), digest_size=8).hexdigest()

    def _name(self, tokens: bytes, weights_digest: str) -> str:
        digest = hashlib.blake2b(tokens, digest_size=16).hexdigest()
        return f"{self._model(weights_digest)}-{len(tokens) // TOKEN_BYTES}-{digest}.kv"

    def _read(self, tokens: bytes, weights_digest: str) -> KeptState | None:
        name = self._name(tokens, weights_digest)
        path = self._directory / name
        try:
            state = read_state(path, self._build, weights_digest)
            if state.tokens != tokens or len(state.weights) > 1:
                raise NoStateError("of other tokens")
        except NoStateError as error:
            _log.warning("%s: not used: %s; the context is computed again", path, error)
            self._remove(name)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return state

    def _write_queued(self, state: KeptState) -> None:
        try:
            self._write(state)
        finally:
            with self._lock:
                self._bytes_queued -= _size(state)

    def _write(self, state: KeptState) -> None:
        name, size = self._name(state.tokens, state.weights[0]), _size(state)
        path = self._directory / name
        if state.tokens_count < TOKENS_MIN or size > self._bytes_max:
            return
        try:
            if name in self._sizes:
                os.utime(path)
                return
        except OSError:
            self._remove(name)
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._bytes_held + size > self._bytes_max:
                self._make_room(size)
            write_state(path, state)
            changed_ns = self._directory.stat().st_mtime_ns
        except (OSError, EngineError) as error:
            if not self._is_failing:
                _log.warning("%s: states are not kept on disk, and will be computed again: %s", self._directory, error)
            self._is_failing = True
            return
        self._is_failing = False
        self._seen = (changed_ns, self._seen[1])
        self._add(name, size)

    def _add(self, name: str, size: int) -> None:
        model, count, _ = name.split("-")
        with self._lock:
            self._bytes_held += size - self._sizes.get(name, 0)
            self._sizes[name] = size
            counts = self._counts.setdefault(model, [])
            if int(count) not in counts:
                insort(counts, int(count))

    def _remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            (self._directory / name).unlink()
        with self._lock:
            self._bytes_held -= self._sizes.pop(name, 0)

    def _make_room(self, size: int) -> None:
        """Remove what was used longest ago, a tenth of all at once: looking costs more than removing."""
        files = self._files()
        held = sum(found.st_size for _, found in files)
        goal = max(0, min(self._bytes_max - size, self._bytes_max * 9 // 10))
        for name, found in sorted(files, key=lambda file: file[1].st_mtime_ns):
            if held <= goal:
                break
            self._remove(name)
            held -= found.st_size
        self._list(self._files())

    def _begin(self) -> None:
        """RequestError: the directory cannot be, or others could put there what would be taken for states."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self._directory.stat()
            if not os.access(self._directory, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise RequestError(
                f"cannot keep states in {self._directory}: {error.strerror}; "
                "choose another directory (DSEC_ENGINE_CACHE), or mend that"
            ) from error
        if found.st_mode & 0o022 or found.st_uid != os.geteuid():
            raise RequestError(
                f"states in {self._directory} could be others' (mode {found.st_mode & 0o7777:o}, user {found.st_uid}): "
                "have it writable by this user alone, or choose another directory (DSEC_ENGINE_CACHE)"
            )
        self._look()

    def _look(self) -> None:
        """See what other processes did, and make room if it is too much."""
        try:
            changed_ns = self._directory.stat().st_mtime_ns
            if changed_ns != self._seen[0]:
                self._list(self._files())
                if self._bytes_held > self._bytes_max:
                    self._make_room(0)
        except FileNotFoundError:
            changed_ns = -1
            self._list([])
        except OSError as error:
            changed_ns = -1
            _log.warning("%s: cannot be looked through: %s; no state is taken from it", self._directory, error)
            self._list([])
        self._seen = (changed_ns, time.monotonic())

    def _files(self) -> list[tuple[str, os.stat_result]]:
        """All files of states, of whatever model; what somebody left half written is removed."""
        files = []
        with os.scandir(self._directory) as entries:
            for entry in entries:
                is_state = _NAME.fullmatch(entry.name) is not None
                if not is_state and not _HALF_WRITTEN.fullmatch(entry.name):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    found = entry.stat(follow_symlinks=False)
                    if is_state and entry.is_file(follow_symlinks=False):
                        files.append((entry.name, found))
                    elif not is_state and time.time() - found.st_mtime > _HALF_WRITTEN_S_MAX:
                        os.unlink(entry.path)
        return files

    def _list(self, files: list[tuple[str, os.stat_result]]) -> None:
        """Take what was found for all that there is."""
        counts: dict[str, set[int]] = {}
        for name, _ in files:
            model, count, _ = name.split("-")
            counts.setdefault(model, set()).add(int(count))
        with self._lock:
            self._sizes = {name: found.st_size for name, found in files}
            self._bytes_held = sum(self._sizes.values())
            self._counts = {model: sorted(each) for model, each in counts.items()}


class _Writer:
    """A thread that does one thing after the other."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Future[None], Callable[[], None] | None]] = SimpleQueue()
        Thread(target=self._work, name="state-cache-writer", daemon=True).start()

    def submit(self, call: Callable[[], None]) -> Future[None]:
        """Done when it was called."""
        return self._put(call)

    def stop(self) -> Future[None]:
        """Done when all was; nothing is called that comes later."""
        return self._put(None)

    def _put(self, call: Callable[[], None] | None) -> Future[None]:
        done: Future[None] = Future()
        self._calls.put((done, call))
        return done

    def _work(self) -> None:
        is_over = False
        while not is_over:
            done, call = self._calls.get()
            is_over = call is None
            if done.set_running_or_notify_cancel():
                _carry_out(done, call or (lambda: None))


def _carry_out(done: Future[T], call: Callable[[], T]) -> None:
    """Nobody is above a thread: whoever waits hears of what is raised."""
    try:
        done.set_result(call())
    except BaseException as error:
        done.set_exception(error)


def _size(state: KeptState) -> int:
    """At least the bytes of its file."""
    return len(state.packed) + len(state.tokens) + _FILE_OVERHEAD_BYTES
