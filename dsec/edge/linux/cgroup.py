"""Cgroups of the host: which version offers what, the plan for one sandbox, and the sweep.

A process tree is tracked and killed through cgroup2 on every host (`cgroup.kill`), with or without
controllers there.  Each limit (memory, pids, cpu) is set where the host has that controller: on
cgroup2, or on a v1 hierarchy.  The guest (pid 1) stays outside of all limits: the kernel's OOM
killer can only choose among the commands, and a busy command cannot keep the guest from ending it.

Our directories are named `dsec-<boot>-<pid namespace>-<pid>-<start time>` after the spawner that owns
them, so that anyone can tell a dead owner's leftovers from a living one's sandboxes.

Invariants:
    1. `sweep` never touches a directory whose owner lives, or whose owner it cannot see.

See: dsec/native/protocol.h, docs/threat_model.md.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import time
from pathlib import Path

import msgspec

from dsec.edge.native_wire import CgroupOperation, CgroupPlan, Operation
from dsec.types import SandboxSpec

CONTROLLERS = ("memory", "pids", "cpu")
CPU_PERIOD_US = 100_000  # what a new cgroup has: writing it makes the kernel walk all of them
WEIGHT_DEFAULT = 100
SWEEP_S_MAX = 5.0
FREEZE_S_MAX = 5.0
_OWNER = re.compile(r"dsec-(?P<boot>[0-9a-f]{8})-(?P<pidns>\d+)-(?P<pid>\d+)-(?P<start>\d+)")


class Hierarchies(msgspec.Struct, frozen=True):
    """Mounted cgroup file systems: cgroup2 with the controllers it offers, and v1 mounts by controller.

    `blkio` is the v1 mount that weighs disk access, where a disk's scheduler does (BFQ).
    """

    unified: Path | None
    unified_controllers: frozenset[str]
    v1: dict[str, Path]
    blkio: Path | None = None

    @property
    def missing(self) -> list[str]:
        """Controllers that no hierarchy offers."""
        return [name for name in CONTROLLERS if name not in self.unified_controllers and name not in self.v1]

    @property
    def limit_mounts(self) -> dict[str, Path]:
        """The v1 mounts that carry a limit, in the order of the wire (after cgroup2)."""
        mounts = {name: self.v1[name] for name in CONTROLLERS if name not in self.unified_controllers}
        return mounts if self.blkio is None else {**mounts, "blkio": self.blkio}

    @property
    def weighs_io(self) -> bool:
        """Whether disks are shared by weight; elsewhere `cpu_weight` is of the processors alone."""
        return self.blkio is not None or "io" in self.unified_controllers


def detect(mountinfo: str | None = None) -> Hierarchies:
    """Read what is mounted (`/proc/self/mountinfo`)."""
    text = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    unified: Path | None = None
    v1: dict[str, Path] = {}
    blkio: Path | None = None
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        mount = Path(left.split()[4])
        kind, _, options = right.split(maxsplit=2)
        if kind == "cgroup2" and unified is None:
            unified = mount
        elif kind == "cgroup":
            for name in set(options.split(",")) & set(CONTROLLERS):
                v1.setdefault(name, mount)
            if "blkio" in options.split(",") and _has_bfq():
                blkio = mount
    offered: frozenset[str] = frozenset()
    if unified is not None:
        with contextlib.suppress(OSError):
            offered = frozenset((unified / "cgroup.controllers").read_text().split())
    return Hierarchies(unified, offered & {*CONTROLLERS, "io"}, v1, None if "io" in offered else blkio)


def _has_bfq() -> bool:
    return any("[bfq]" in path.read_text() for path in Path("/sys/block").glob("*/queue/scheduler"))


def parents(found: Hierarchies, cgroup_parent: str) -> list[Path]:
    """The directories below which ours are made: cgroup2's first, then one for each v1 limit.  FileNotFoundError."""
    if found.unified is None:
        raise FileNotFoundError("no cgroup2 file system is mounted")
    return [mount / cgroup_parent for mount in (found.unified, *found.limit_mounts.values())]


def make_owner_directories(found: Hierarchies, cgroup_parent: str, name: str) -> None:
    """Make an owner's directory in each of `parents`, leaving none if one fails.  OSError."""
    enabled = _enabling(found)
    places = parents(found, cgroup_parent)
    try:
        for index, parent in enumerate(places):
            if index == 0 and enabled:
                (parent / "cgroup.subtree_control").write_text(enabled)
            (parent / name).mkdir()
            if index == 0 and enabled:
                (parent / name / "cgroup.subtree_control").write_text(enabled)
    except OSError:
        for parent in places:
            remove_tree(parent / name)
        raise


def _enabling(found: Hierarchies) -> str:
    """What to write to `cgroup.subtree_control`, so that children have limits."""
    return " ".join(f"+{controller}" for controller in sorted(found.unified_controllers))


def plan_sandbox(found: Hierarchies, slot: int, spec: SandboxSpec) -> CgroupPlan:
    """What the spawner makes and writes for the sandbox in `slot`.

    The same files for every spec, so that cgroups which are there become those of another one.  A new group is
    spared what it has already.
    """
    box = f"s{slot}"
    guest, commands = box, box
    steps = [CgroupOperation(Operation.MKDIR, 0, box)]
    if found.unified_controllers:
        guest, commands = f"{box}/g", f"{box}/c"
        steps.append(CgroupOperation(Operation.WRITE, 0, f"{box}/cgroup.subtree_control", _enabling(found)))
        steps += [CgroupOperation(Operation.MKDIR, 0, group) for group in (guest, commands)]
    steps += [CgroupOperation(Operation.CHOWN, 0, path) for path in (box, f"{box}/cgroup.procs")]
    if commands != box:
        steps.append(CgroupOperation(Operation.CHOWN, 0, commands))
    for index, name in enumerate(found.limit_mounts, 1):
        steps.append(CgroupOperation(Operation.MKDIR, index, box))
        steps += _limits_v1(name, index, box, spec)
    steps += _limits_v2(found.unified_controllers, box, commands, spec)
    oom_hierarchy, oom_file = 0, f"{commands}/memory.events"
    if "memory" not in found.unified_controllers:
        oom_hierarchy, oom_file = 1 + list(found.limit_mounts).index("memory"), f"{box}/memory.oom_control"
    return CgroupPlan(guest, commands, oom_hierarchy, oom_file, tuple(steps))


def _limits_v1(controller: str, index: int, box: str, spec: SandboxSpec) -> list[CgroupOperation]:
    if controller == "memory":
        limit = str(spec.memory_bytes)
        both = f"{box}/memory.memsw.limit_in_bytes"  # never below the other: first out of its way
        return [
            CgroupOperation(Operation.RESTORE, index, both, "-1"),
            CgroupOperation(Operation.WRITE, index, f"{box}/memory.limit_in_bytes", limit),
            CgroupOperation(Operation.WRITE_IF_PRESENT, index, both, limit),
        ]
    if controller == "pids":
        return [CgroupOperation(Operation.WRITE, index, f"{box}/pids.max", str(spec.pids_count_max))]
    if controller == "blkio":
        weight = str(min(spec.cpu_weight, 1000))
        return [CgroupOperation(_weighing(spec, Operation.WRITE_IF_PRESENT), index, f"{box}/blkio.bfq.weight", weight)]
    quota, shares = int(spec.cpu_cores * CPU_PERIOD_US), max(2, spec.cpu_weight * 1024 // 100)
    return [
        CgroupOperation(Operation.WRITE, index, f"{box}/cpu.cfs_quota_us", str(quota)),
        CgroupOperation(_weighing(spec, Operation.WRITE), index, f"{box}/cpu.shares", str(shares)),
    ]


def _weighing(spec: SandboxSpec, operation: Operation) -> Operation:
    """How its weight is written: a new group has the default, which is also what a file that is not there means."""
    return Operation.RESTORE if spec.cpu_weight == WEIGHT_DEFAULT else operation


def _limits_v2(offered: frozenset[str], box: str, commands: str, spec: SandboxSpec) -> list[CgroupOperation]:
    """Limits are those of the commands; weights are the box's, whose rivals are the other boxes."""
    quota = f"{int(spec.cpu_cores * CPU_PERIOD_US)} {CPU_PERIOD_US}"
    values = [
        ("memory", Operation.WRITE, f"{commands}/memory.max", str(spec.memory_bytes)),
        ("memory", Operation.WRITE_IF_PRESENT, f"{commands}/memory.swap.max", "0"),
        ("pids", Operation.WRITE, f"{commands}/pids.max", str(spec.pids_count_max)),
        ("cpu", Operation.WRITE, f"{commands}/cpu.max", quota),
        ("cpu", _weighing(spec, Operation.WRITE), f"{box}/cpu.weight", str(spec.cpu_weight)),
        ("io", _weighing(spec, Operation.WRITE_IF_PRESENT), f"{box}/io.weight", f"default {spec.cpu_weight}"),
    ]
    return [CgroupOperation(operation, 0, path, value) for name, operation, path, value in values if name in offered]


# -- pausing -------------------------------------------------------------------------------------


class Box(msgspec.Struct, frozen=True):
    """The cgroups of one sandbox that lives: that of its processes (cgroup2), and that of its memory."""

    tracker: Path
    memory: Path

    def freeze(self) -> bool:
        """Stop every process in it; blocks until all stand still, False if that took longer than FREEZE_S_MAX."""
        (self.tracker / "cgroup.freeze").write_text("1")
        deadline = time.monotonic() + FREEZE_S_MAX
        with open(self.tracker / "cgroup.events") as events:
            changed = select.poll()
            changed.register(events, select.POLLPRI)
            while "frozen 1" not in events.read():
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return False
                changed.poll(left_s * 1000)
                events.seek(0)
        return True

    def thaw(self) -> None:
        """Let every process go on."""
        (self.tracker / "cgroup.freeze").write_text("0")

    def reclaim(self) -> None:
        """Give back to the host what memory can be had again from a file: blocks while the kernel looks for it."""
        for name, request in (("memory.reclaim", "1T"), ("memory.force_empty", "0")):
            with contextlib.suppress(OSError):  # not there, or less was found than asked for
                with open(self.memory / name, "r+") as file:
                    file.write(request)
                return


def box_of(found: Hierarchies, cgroup_parent: str, owner: str, slot: int) -> Box:
    """Where the cgroups of the sandbox in `slot` are."""
    places = dict(zip(("", *found.limit_mounts), parents(found, cgroup_parent), strict=True))
    memory = places.get("memory", places[""])
    return Box(places[""] / owner / f"s{slot}", memory / owner / f"s{slot}")


# -- owners and leftovers ----------------------------------------------------------------------


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]


def _pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def _start_time(pid: int) -> int | None:
    """Clock ticks from boot to the start of `pid`; None if there is no such process, or only its corpse."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def owner_name(pid: int) -> str:
    """The directory name of a process, which no other process ever has."""
    return f"dsec-{_boot_id()}-{_pid_namespace()}-{pid}-{_start_time(pid)}"


def is_leftover(name: str) -> bool:
    """True if `name` is one of ours, its owner would be visible to us, and it is dead."""
    owner = _OWNER.fullmatch(name)
    if owner is None or int(owner["pidns"]) != _pid_namespace():
        return False
    return owner["boot"] != _boot_id() or _start_time(int(owner["pid"])) != int(owner["start"])


def sweep(cgroup_parent: str = "") -> int:
    """Kill and remove what dead owners left in the cgroup hierarchies; how many directories went.

    Blocks for at most SWEEP_S_MAX a directory.  Sandboxes of living processes are not touched.
    """
    found = detect()
    if found.unified is None:
        return 0
    swept = 0
    for parent in parents(found, cgroup_parent):
        for directory in sorted(parent.glob("dsec-*")):
            if is_leftover(directory.name):
                swept += remove_tree(directory)
    return swept


def remove_tree(directory: Path) -> bool:
    """Kill every process below a cgroup directory and remove it; False if that took too long."""
    deadline = time.monotonic() + SWEEP_S_MAX
    while directory.exists() and time.monotonic() < deadline:
        for path, _, _ in os.walk(directory, topdown=False):
            _kill_members(Path(path))
            with contextlib.suppress(OSError):
                os.rmdir(path)
        if directory.exists():
            time.sleep(0.005)
    return not directory.exists()


def _kill_members(directory: Path) -> None:
    try:
        pids = (directory / "cgroup.procs").read_text().split()
    except OSError:
        return
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
