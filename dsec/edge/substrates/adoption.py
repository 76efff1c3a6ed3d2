"""What a dead Edge left with the keeper, sorted: its spawner, its sandboxes, its layers.

Each descriptor has a key that says what it is; a sandbox is whole if its guest's socket and its facts are there.

    spawner/<pid>/<owner cgroup name>     the control socket
    guest/<sandbox id>/<slot>/<host pid>  the guest's socket
    facts/<sandbox id>                    a memory file: its spec
    exec/<sandbox id>/<number>/<what>     a running command's stdin, stdout, stderr, tty
    layer/<number>/<layer id>             the open file of a mounted layer
    network/<sandbox id>                  where its proxy listens (dsec/edge/network)

Another form of these, or of the facts, is another PROTOCOL_VERSION.

See: dsec/edge/keeper.py, dsec/native/protocol.h.
"""

from __future__ import annotations

import contextlib
import os

import msgspec

from dsec.edge.packets import make_memory_file
from dsec.types import SandboxId, SandboxSpec

GUEST_PREFIX = "guest/"


class KeptSandbox(msgspec.Struct):
    """A sandbox of an earlier process; the descriptors are the taker's."""

    id: SandboxId
    slot: int
    host_pid: int
    connection: int
    facts: int
    spec: SandboxSpec
    files: dict[str, int] = {}

    def descriptors(self) -> dict[str, int]:
        """All of them, by their keys."""
        own = {guest_key(self.id, self.slot, self.host_pid): self.connection, facts_key(self.id): self.facts}
        return own | {f"exec/{self.id}/{what}": fd for what, fd in self.files.items()}


class Kept(msgspec.Struct):
    """Everything an earlier process left, each thing with its key where it is not named by what it holds."""

    spawners: dict[str, int] = {}
    sandboxes: list[KeptSandbox] = []
    layers: dict[str, int] = {}
    strays: dict[str, int] = {}


def guest_key(sandbox_id: SandboxId, slot: int, host_pid: int) -> str:
    """Of a guest's socket."""
    return f"{GUEST_PREFIX}{sandbox_id}/{slot}/{host_pid}"


def facts_key(sandbox_id: SandboxId) -> str:
    """Of what must be known of a sandbox."""
    return f"facts/{sandbox_id}"


def spawner_key(pid: int, name: str) -> str:
    """Of a spawner's control socket."""
    return f"spawner/{pid}/{name}"


def parse_spawner_key(key: str) -> tuple[int, str]:
    """The spawner's pid and the name of its cgroups."""
    _, pid, name = key.split("/")
    return int(pid), name


def make_facts(spec: SandboxSpec) -> int:
    """A memory file with the facts; the caller closes it."""
    return make_memory_file("facts", msgspec.json.encode(spec))


def _read_facts(fd: int) -> SandboxSpec | None:
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode(os.pread(fd, os.fstat(fd).st_size, 0), type=SandboxSpec)
    return None


def sort_kept(kept: dict[str, int]) -> Kept:
    """Sort it; what makes no sense, and what belongs to no whole sandbox, is a stray."""
    found = Kept(layers={key: fd for key, fd in kept.items() if key.startswith("layer/")})
    found.spawners = {key: fd for key, fd in kept.items() if key.startswith("spawner/")}
    used = found.layers.keys() | found.spawners.keys()
    files: dict[str, dict[str, int]] = {}
    for key, fd in kept.items():
        if key.startswith("exec/"):
            _, sandbox_id, what = key.split("/", 2)
            files.setdefault(sandbox_id, {})[what] = fd
    for key, fd in kept.items():
        kind, *rest = key.split("/")
        if kind != "guest" or len(rest) != 3 or not (rest[1].isdecimal() and rest[2].isdecimal()):
            continue
        sandbox_id = SandboxId(rest[0])
        facts = kept.get(facts_key(sandbox_id), -1)
        spec = _read_facts(facts) if facts >= 0 else None
        if spec is None:
            continue
        sandbox = KeptSandbox(sandbox_id, int(rest[1]), int(rest[2]), fd, facts, spec, files.get(sandbox_id, {}))
        found.sandboxes.append(sandbox)
        used |= {key, facts_key(sandbox_id), *(f"exec/{sandbox_id}/{what}" for what in sandbox.files)}
    found.strays = {key: fd for key, fd in kept.items() if key not in used}
    return found
