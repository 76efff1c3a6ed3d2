"""Values that cross the sandbox port: what to create, what to run, what came of it.

Frozen structs, so that the same value can be logged, hashed, sent and compared.
Output is bytes; text is a view that a reader makes (`errors="replace"`).

See: docs/architecture.md, "Sandbox".
"""

from __future__ import annotations

from typing import Literal, NewType

import msgspec

SandboxId = NewType("SandboxId", str)
LayerId = NewType("LayerId", str)
"""`sha256:` and 64 hex digits: the digest of the layer's EROFS file."""

EXEC_TIMEOUT_S = 10.0
OUTPUT_BYTES_MAX = 1 << 20
STDIN_BYTES_MAX = 32 << 20
ARGS_BYTES_MAX = 2_000_000
"""Of argv and env: a quarter of the 8 MiB stack, less what the kernel puts there."""
ARG_BYTES = 9
"""What each of them takes there beside its bytes: a zero byte and a pointer."""
RULES_COUNT_MAX = 256
"""Of a network policy."""
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TOOLBOX = "/.dsec/toolbox"
"""`argv[0]` of the file operations that every substrate provides (dsec/files.py); no such file need exist."""

Stream = Literal["stdout", "stderr"]

Feature = Literal[
    "disk_quota",  # what is written is bounded by `disk_bytes`, in bytes and in files
    "layers",  # layers may be put together in any order
    "network",  # an allowlist of destinations
    "own_mounts",  # no file of the host's is bound into the root
    "snapshot",  # `Sandbox.snapshot`
    "user_namespace",  # root inside is nobody outside, and nobody inside can become pid 1's user
]
"""What a substrate may say that it lacks: differences are stated, not hidden (dsec/conformance)."""


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

    @property
    def total_bytes(self) -> int:
        """How many bytes the command wrote."""
        return len(self.head) + self.dropped_bytes + len(self.tail)


class TtySize(msgspec.Struct, frozen=True):
    """Of a terminal, in characters."""

    rows: int = 24
    columns: int = 80


class Defaults(msgspec.Struct, frozen=True, kw_only=True):
    """What a command of a sandbox gets that it does not say itself; of `env` entry by entry.

    "" is `/` for `cwd` and root for `user`.  PATH, LANG and HOME (`/root`, `/home/NAME`, or `/` for digits) are there
    in any case.
    """

    env: dict[str, str] = {}
    cwd: str = ""
    user: str = ""

    def over(self, lower: Defaults) -> Defaults:
        """What this says, and where it says nothing, what the lower one does."""
        return Defaults(env={**lower.env, **self.env}, cwd=self.cwd or lower.cwd, user=self.user or lower.user)


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """A program to run in a sandbox.

    `argv` is passed to execve as it is (no shell; a name without a slash is looked up on the
    PATH of its environment).  `env`, `cwd` (which must exist) and `user` go before the sandbox's `Defaults`; with
    those they are all that it gets.  `stdin` (at most STDIN_BYTES_MAX bytes) is followed by end of file.  With
    `merge_stderr` stderr goes to stdout in order, and `ExecResult.stderr` stays empty.  `output_bytes_max` bounds
    each stream.  `user` is a name or a uid, and may say a group or a gid after a colon (else it is the account's
    with all its groups, or the uid); names are those of the sandbox's own /etc/passwd and /etc/group, and one that is
    not there is an InvalidArgumentError.
    With `keep_stdin_open` the command reads, after `stdin`, what `Process.write_stdin` sends until
    `close_stdin`.  With `tty` it runs on a terminal of that size: its output is one stream (stdout), and what
    `write_stdin` sends is typed.
    With `kill_others` every other process of the sandbox, background ones included, is killed and
    gone before the command starts; where one cannot be ended, the sandbox is lost and nothing runs.
    """

    argv: tuple[str, ...]
    cwd: str = ""
    env: dict[str, str] = {}
    stdin: bytes = b""
    timeout_s: float = EXEC_TIMEOUT_S
    output_bytes_max: int = OUTPUT_BYTES_MAX
    merge_stderr: bool = False
    kill_others: bool = False
    user: str = ""
    keep_stdin_open: bool = False
    tty: TtySize | None = None


class ExecResult(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a command.

    `exit_code` is 0..255; death by signal n is 128 + n; a program that cannot be found is 127,
    one that cannot be executed 126 (POSIX sh, 2.8.2), with a line on stderr that says why.  126 is
    also the answer where the sandbox's processes leave no room for another (`pids_count_max`):
    what the commands of a sandbox bring about is a result, never a failure of the service.

    With `timed_out` the whole process tree of the command was killed and `exit_code` is 137.
    `oom_killed`: the memory cgroup killed a process while the command ran.
    `duration_s` is the command's own time, from its start to its end (that of its last process, if it was killed):
    pauses do not count, nor does how long nobody was there to hear of the end.  0 if nothing could be started.
    """

    exit_code: int
    stdout: Output = Output()
    stderr: Output = Output()
    timed_out: bool = False
    oom_killed: bool = False
    duration_s: float = 0.0


class Composition(msgspec.Struct, frozen=True, kw_only=True):
    """What images and layers are together: layers over each other, the topmost first, and how commands run there.

    `base` is what the lowest of them needs below it, as in `SandboxSpec`.
    """

    layers: tuple[LayerId, ...]
    base: Literal["host", ""] = ""
    defaults: Defaults = Defaults()


class NetworkRule(msgspec.Struct, frozen=True, kw_only=True):
    """Allowed destinations: a DNS name (`*.` in front: every name below it) or a CIDR, and ports (empty: all)."""

    host: str = ""
    cidr: str = ""
    ports: tuple[int, ...] = ()


class NetworkPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Where a sandbox may connect to; nowhere, if there is no rule."""

    rules: tuple[NetworkRule, ...] = ()


class SandboxSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a sandbox is made of, and its limits; memory and disk in bytes, cpu in cores.

    `layers` lie over each other, the topmost first, over the `base`: the host's own /usr with an empty
    rest (`host`), or nothing (``""``: then the lowest layer is an operating system).  `cpu_weight` is
    the share under contention, 1 to 10,000, as of cgroup2's cpu.weight.  An Edge, which knows images by name, puts
    their `defaults` below those that it was asked for.
    """

    base: Literal["host", ""] = "host"
    layers: tuple[LayerId, ...] = ()
    network: NetworkPolicy = NetworkPolicy()
    defaults: Defaults = Defaults()
    cpu_weight: int = 100

    memory_bytes: int = 512 << 20
    disk_bytes: int = 384 << 20
    pids_count_max: int = 256
    cpu_cores: float = 1.0
    hostname: str = "sandbox"
