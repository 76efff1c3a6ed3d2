"""Processes of the native binary: started without a parent's ties, and watched by pidfd, whoever started them.

A spawner or keeper that an earlier Edge started is no child of this one, so nothing here relies on wait(2);
where the process is our child, its corpse is taken away.

See: dsec/native/main.c.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from dsec.errors import HostUnfitError

_FDS_FIRST = 3
_FDS_ASIDE = 64


class NativeProcess:
    """A process of the native binary, by its pid."""

    def __init__(self, pid: int) -> None:
        """ProcessLookupError if there is no such process."""
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)

    @classmethod
    def start(cls, binary: Path, role: str, fds: Sequence[int], *arguments: str) -> NativeProcess:
        """Start `binary role FD… arguments…` in a session of its own; the fds stay the caller's.  HostUnfitError.

        It has no other descriptor of ours, standard error included: whoever reads that would wait for it.
        """
        aside = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FDS_ASIDE) for fd in fds]
        targets = range(_FDS_FIRST, _FDS_FIRST + len(fds))
        try:
            pid = os.posix_spawn(
                binary,
                [str(binary), role, *map(str, targets), *arguments],
                {},
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                    *((os.POSIX_SPAWN_OPEN, number, "/dev/null", os.O_WRONLY, 0) for number in (1, 2)),
                    *((os.POSIX_SPAWN_DUP2, fd, target) for fd, target in zip(aside, targets, strict=True)),
                ],
                setsid=True,
            )
        except OSError as error:
            raise HostUnfitError(f"{binary} cannot be started: {error}") from error
        finally:
            for fd in aside:
                os.close(fd)
        return cls(pid)

    def kill(self) -> None:
        """SIGKILL; nothing if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def ended(self) -> None:
        """Wait for its end, and forget it: the last call."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._pidfd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._pidfd)
        self.forget()
        self._reap()

    def forget(self) -> None:
        """Stop watching it; safe to call twice."""
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)
