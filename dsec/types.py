"""Values that cross the sandbox port: what to create, what to run, what came of it.

Frozen structs, so that the same value can be logged, hashed, sent and compared.
Output is bytes; text is a view that a reader makes (`errors="replace"`).

See: docs/architecture.md, "Sandbox".
"""

from __future__ import annotations

from typing import NewType

import msgspec

SandboxId = NewType("SandboxId", str)

EXEC_TIMEOUT_S = 10.0
OUTPUT_BYTES_MAX = 1 << 20
STDIN_BYTES_MAX = 32 << 20


class Output(msgspec.Struct, frozen=True):
    """One stream of a command: the first `head` bytes, the last `tail` bytes, and the count between.

    The whole output was `head` + `dropped_bytes` unknown bytes + `tail`; nothing is dropped
    while the stream fits `Command.output_bytes_max`, and then `tail` is empty.
    """

    head: bytes = b""
    tail: bytes = b""
    dropped_bytes: int = 0

    @property
    def is_truncated(self) -> bool:
        """True if bytes between `head` and `tail` were counted but not kept."""
        return self.dropped_bytes > 0

    @property
    def data(self) -> bytes:
        """What was kept, head then tail."""
        return self.head + self.tail


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """A program to run in a sandbox.

    `argv` is passed to execve as it is (no shell; a name without a slash is looked up on the
    PATH of `env`); `env` is the whole environment; `cwd` must exist; `stdin` (at most
    STDIN_BYTES_MAX bytes) is followed by end of file.  With `merge_stderr` stderr goes to
    stdout in order, and `ExecResult.stderr` stays empty.  `output_bytes_max` bounds each stream.
    With `kill_others` every other process of the sandbox, background ones included, is killed and
    gone before the command starts; where one cannot be ended, the sandbox is lost and nothing runs.
    """

    argv: tuple[str, ...]
    cwd: str = "/"
    env: dict[str, str] = {}
    stdin: bytes = b""
    timeout_s: float = EXEC_TIMEOUT_S
    output_bytes_max: int = OUTPUT_BYTES_MAX
    merge_stderr: bool = False
    kill_others: bool = False


class ExecResult(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a command.

    `exit_code` is 0..255; death by signal n is 128 + n; a program that cannot be found is 127,
    one that cannot be executed 126 (POSIX sh, 2.8.2), with a line on stderr that says why.  126 is
    also the answer where the sandbox's processes leave no room for another (`pids_count_max`):
    what the commands of a sandbox bring about is a result, never a failure of the service.

    With `timed_out` the whole process tree of the command was killed and `exit_code` is 137.
    `oom_killed`: the memory cgroup killed a process while the command ran.
    """

    exit_code: int
    stdout: Output = Output()
    stderr: Output = Output()
    timed_out: bool = False
    oom_killed: bool = False
    duration_s: float = 0.0


class SandboxSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one sandbox; memory and disk in bytes, cpu in cores."""

    memory_bytes: int = 512 << 20
    disk_bytes: int = 384 << 20
    pids_count_max: int = 256
    cpu_cores: float = 1.0
    hostname: str = "sandbox"
