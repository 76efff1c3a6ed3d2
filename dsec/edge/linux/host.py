"""What this host must have for container sandboxes, and for the decode engine, each lack with its way out.

These are the checks that can be made without side effects, for `dsec doctor` and `open`; what only
trying can tell (idmapped mounts of this file system, for one) is proved by `open` itself.
"""

from __future__ import annotations

import os
import platform
import re
import resource
from collections.abc import Callable
from pathlib import Path

import msgspec

from dsec.edge.config import SubstrateConfig
from dsec.edge.linux import cgroup
from dsec.errors import HostUnfitError

KERNEL_MIN = (5, 19)
TERMINALS_PER_SANDBOX = 64
"""What the devpts of a sandbox is mounted with (dsec/native/rootfs.c)."""
_ENGINE_FLAGS = ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe")  # x86-64-v3, as /proc/cpuinfo has it
_PROGRAMS = {"/usr/bin/python3": "python3", "/usr/bin/bash": "bash", "/usr/bin/tar": "tar", "/usr/bin/env": "coreutils"}


class Finding(msgspec.Struct, frozen=True):
    """One check: what was looked at, whether it is well, what was seen, and what to do if not.

    An `optional` one that is not well takes something away, and leaves the host fit for the rest.
    """

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    optional: bool = False


def _root() -> Finding:
    uid = os.geteuid()
    return Finding("root", uid == 0, f"effective uid {uid}", "run as root (sudo): sandboxes need mounts and cgroups")


def _kernel() -> Finding:
    release = platform.release()
    version = tuple(map(int, re.findall(r"\d+", release)[:2]))
    remedy = "use Linux 5.19 or newer: an overlay over an idmapped base"
    return Finding("kernel", version >= KERNEL_MIN, f"Linux {release}", remedy)


def _overlayfs() -> Finding:
    known = "\toverlay\n" in Path("/proc/filesystems").read_text()
    detail = "registered" if known else "not in /proc/filesystems"
    return Finding("overlayfs", known, detail, "modprobe overlay, or a kernel with CONFIG_OVERLAY_FS")


def _user_namespaces() -> Finding:
    limit = Path("/proc/sys/user/max_user_namespaces")
    count = int(limit.read_text()) if limit.exists() else 0
    detail = f"user.max_user_namespaces is {count}" if limit.exists() else "the kernel has none (CONFIG_USER_NS)"
    return Finding("user namespaces", count > 0, detail, "sysctl -w user.max_user_namespaces=15000")


def _cgroup_tracker(found: cgroup.Hierarchies) -> Finding:
    if found.unified is None:
        remedy = "mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified"
        return Finding("cgroup2", False, "not mounted", remedy)
    writable = os.access(found.unified, os.W_OK)
    detail = f"{found.unified}, {'writable' if writable else 'read only'}"
    return Finding("cgroup2", writable, detail, "mount it read-write (in a container: --privileged --cgroupns=host)")


def _cgroup_limits(found: cgroup.Hierarchies) -> Finding:
    places = {name: found.unified if name in found.unified_controllers else found.v1.get(name) for name in
              cgroup.CONTROLLERS}  # fmt: skip
    usable = {name: place is not None and os.access(place, os.W_OK) for name, place in places.items()}
    detail = ", ".join(f"{name}: {places[name] or 'nowhere'}" for name in cgroup.CONTROLLERS)
    lacking = " ".join(name for name, is_usable in usable.items() if not is_usable)
    remedy = f"mount a writable cgroup (v1 or v2) with the controllers: {lacking}"
    return Finding("cgroup limits", all(usable.values()), detail, remedy)


def _io_weights() -> Finding:
    weighs = cgroup.detect().weighs_io
    detail = "disks are shared by cpu_weight, too" if weighs else "cpu_weight is of processors; disks know no weights"
    remedy = "cgroup2 with the io controller, or the scheduler bfq for the disk (/sys/block/*/queue/scheduler)"
    return Finding("io weights", weighs, detail, remedy, optional=True)


def _terminals(config: SubstrateConfig) -> Finding:
    """All sandboxes share what the kernel does not reserve for the host's own devpts."""
    limits = Path("/proc/sys/kernel/pty")
    most, reserve = (int((limits / name).read_text()) for name in ("max", "reserve"))
    needed = config.sandboxes_count_max * TERMINALS_PER_SANDBOX + reserve
    detail = f"kernel.pty.max is {most}, {config.sandboxes_count_max} sandboxes with all their terminals take {needed}"
    return Finding("terminals", most >= needed, detail, f"sysctl -w kernel.pty.max={needed}", optional=True)


def _merged_usr() -> Finding:
    apart = [f"/{name}" for name in ("bin", "lib", "sbin") if not Path("/", name).is_symlink()]
    detail = f"{' '.join(apart)} not links into /usr" if apart else "/bin, /lib and /sbin are links into /usr"
    return Finding("merged /usr", not apart, detail, "apt-get install usrmerge")


def _programs() -> list[Finding]:
    found = []
    for path, package in _PROGRAMS.items():
        is_there = os.access(path, os.X_OK) and os.path.realpath(path).startswith("/usr/")
        found.append(Finding(package, is_there, path, f"apt-get install {package}"))
    return found


def _binary(config: SubstrateConfig) -> Finding:
    path = config.binary_path
    remedy = "build it with gcc and libc6-dev installed: python setup.py build_ext, or pip install ."
    return Finding("dsec-sandbox", os.access(path, os.X_OK), str(path), remedy)


def _cpu() -> Finding:
    """The decode engine is compiled for x86-64-v3 there (setup.py), and for the plain processor elsewhere."""
    machine = platform.machine()
    if machine != "x86_64":
        return Finding("cpu", True, machine, "none is needed: the decode engine is built for any such processor")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    lacking = [flag for flag in _ENGINE_FLAGS if flag not in flags]
    detail = f"lacks {' '.join(lacking)}" if lacking else "x86-64-v3"
    remedy = (
        "the decode engine needs AVX2 and FMA: use another machine (a virtual one may hide what its host has), or take "
        "-march=x86-64-v3 out of setup.py and build again, for a slower engine"
    )
    return Finding("cpu", not lacking, detail, remedy)


def check_host(config: SubstrateConfig | None = None) -> list[Finding]:
    """Every check, those of the sandboxes first, in the order in which one would mend them.  Changes nothing."""
    config = config or SubstrateConfig()
    return [*_check_substrate(config), _io_weights(), _terminals(config), _cpu()]


def _check_substrate(config: SubstrateConfig) -> list[Finding]:
    simple: tuple[Callable[[], Finding], ...] = (_root, _kernel, _overlayfs, _user_namespaces)
    found = cgroup.detect()
    return [
        *(check() for check in simple),
        _cgroup_tracker(found),
        _cgroup_limits(found),
        _merged_usr(),
        *_programs(),
        _binary(config),
    ]


def require_fit_host(config: SubstrateConfig) -> None:
    """HostUnfitError that lists every failed check of the sandboxes with its remedy."""
    lacking = [finding for finding in _check_substrate(config) if not finding.ok]
    if lacking:
        lines = [f"{finding.name}: {finding.detail}; {finding.remedy}" for finding in lacking]
        raise HostUnfitError("this host cannot run sandboxes:\n  " + "\n  ".join(lines))


def raise_files_limit(count: int) -> None:
    """Let this process have `count` descriptors.  HostUnfitError where the host does not allow it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= count:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, max(count, hard)))
    except (OSError, ValueError) as error:
        raise HostUnfitError(
            f"so many sandboxes need {count} open files, and this process may have {hard}: "
            f"raise its hard limit (ulimit -Hn {count}, LimitNOFILE= of its unit), or lower sandboxes_count_max"
        ) from error
