"""A PostgreSQL of one's own, for tests and benchmarks that kill it.

See: rollout/workers/index.py.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

_READY = "ready to accept connections"


class Postgres:
    """A server on a unix socket, run by an unprivileged user, that can be killed and started again."""

    def __init__(self) -> None:
        """Make its files, and start it."""
        self.home = Path(tempfile.mkdtemp(prefix="dsec-postgres-"))
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user is not None:
            shutil.chown(self.home, self._user)
        self._bin = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
        self._run("initdb", "--pgdata", self.home / "data", "--username", "dsec", "--auth", "trust", "--no-sync")
        self._process: subprocess.Popen[str] | None = None
        self.start()

    def _run(self, program: str, *arguments: object) -> None:
        command = [str(self._bin / program), *map(str, arguments)]
        subprocess.run(command, user=self._user, cwd=self.home, check=True, capture_output=True)

    def start(self) -> None:
        """What a killed one leaves running for a moment is waited for."""
        while self._process is None:
            command = [self._bin / "postgres", "-D", self.home / "data", "-k", self.home, "-c", "listen_addresses="]
            process = subprocess.Popen(
                list(map(str, command)), user=self._user, cwd=self.home, text=True, stderr=subprocess.PIPE
            )
            assert process.stderr is not None  # noqa: S101 - a pipe was asked for
            for line in process.stderr:
                if _READY in line:
                    self._process = process
                    break
            else:
                process.communicate()

    def kill(self) -> None:
        """Kill -9."""
        self._stop(signal.SIGKILL)

    def close(self) -> None:
        """Stop it, if it runs, and remove its files."""
        if self._process is not None:
            self._stop(signal.SIGINT)
        shutil.rmtree(self.home)

    def _stop(self, number: signal.Signals) -> None:
        assert self._process is not None  # noqa: S101 - the caller knows that it runs
        self._process.send_signal(number)
        self._process.communicate()
        self._process = None

    def create(self, name: str) -> str:
        """A database, and its URL."""
        self._run("createdb", "--host", self.home, "--username", "dsec", name)
        return f"postgresql://dsec@/{name}?host={self.home}"
