"""Which cgroup version carries what, the plan for a sandbox, and whose leftovers are swept."""

import os
from pathlib import Path

import pytest

from dsec.edge.linux import cgroup
from dsec.edge.linux.cgroup import Hierarchies
from dsec.edge.native_wire import Operation
from dsec.types import SandboxSpec

SPEC = SandboxSpec(memory_bytes=100 << 20, disk_bytes=50 << 20, pids_count_max=7, cpu_cores=1.5)
ALL = frozenset({"memory", "pids", "cpu"})


def written(found: Hierarchies) -> dict[tuple[int, str], str]:
    plan = cgroup.plan_sandbox(found, 3, SPEC)
    return {(step.hierarchy, step.path): step.value for step in plan.operations if step.operation != Operation.MKDIR}


def test_the_mounts_of_a_version_1_host_are_found() -> None:
    mountinfo = (
        "30 20 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
        "31 20 0:27 / /sys/fs/cgroup/memory rw,nosuid shared:9 - cgroup cgroup rw,memory\n"
        "32 20 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
        "33 20 0:29 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n"
        "34 20 8:1 / / rw - ext4 /dev/vda rw\n"
    )
    found = cgroup.detect(mountinfo)
    assert found.unified == Path("/sys/fs/cgroup/unified")
    assert found.v1 == {
        "memory": Path("/sys/fs/cgroup/memory"),
        "cpu": Path("/sys/fs/cgroup/cpu,cpuacct"),
        "pids": Path("/sys/fs/cgroup/pids"),
    }


def test_a_host_without_cgroups_lacks_every_controller() -> None:
    found = cgroup.detect("34 20 8:1 / / rw - ext4 /dev/vda rw\n")
    assert found.missing == ["memory", "pids", "cpu"]
    with pytest.raises(FileNotFoundError):
        cgroup.parents(found, "")


def test_version_1_limits_go_to_one_hierarchy_each() -> None:
    v1 = {name: Path("/v1", name) for name in ("memory", "pids", "cpu")}
    found = Hierarchies(Path("/v2"), frozenset(), v1)
    assert written(found) == {
        (0, "s3"): "",
        (0, "s3/cgroup.procs"): "",
        (1, "s3/memory.limit_in_bytes"): "104857600",
        (1, "s3/memory.memsw.limit_in_bytes"): "104857600",
        (2, "s3/pids.max"): "7",
        (3, "s3/cpu.cfs_quota_us"): "150000",
        (3, "s3/cpu.shares"): "1024",
    }
    plan = cgroup.plan_sandbox(found, 3, SPEC)
    assert (plan.guest_group, plan.command_group) == ("s3", "s3")
    assert (plan.oom_hierarchy, plan.oom_file) == (1, "s3/memory.oom_control")


def test_version_2_keeps_the_guest_outside_the_limits() -> None:
    found = Hierarchies(Path("/v2"), ALL, {})
    plan = cgroup.plan_sandbox(found, 3, SPEC)
    assert (plan.guest_group, plan.command_group) == ("s3/g", "s3/c")
    assert (plan.oom_hierarchy, plan.oom_file) == (0, "s3/c/memory.events")
    values = written(found)
    assert values[0, "s3/cgroup.subtree_control"] == "+cpu +memory +pids"
    assert values[0, "s3/c/memory.max"] == "104857600"
    assert values[0, "s3/c/cpu.max"] == "150000 100000"
    assert values[0, "s3/c/pids.max"] == "7"
    assert cgroup.parents(found, "below") == [Path("/v2/below")]


def test_a_host_may_mix_versions() -> None:
    found = Hierarchies(Path("/v2"), frozenset({"pids"}), {"memory": Path("/m"), "cpu": Path("/c"), "pids": Path("/p")})
    assert cgroup.parents(found, "") == [Path("/v2"), Path("/m"), Path("/c")]
    values = written(found)
    assert values[0, "s3/c/pids.max"] == "7"
    assert values[1, "s3/memory.limit_in_bytes"] == "104857600"
    assert values[2, "s3/cpu.cfs_quota_us"] == "150000"


def test_only_the_dead_leave_leftovers() -> None:
    mine = cgroup.owner_name(os.getpid())
    prefix, boot, pidns, pid, start = mine.split("-")
    assert not cgroup.is_leftover(mine)
    assert cgroup.is_leftover(f"{prefix}-{boot}-{pidns}-{pid}-{int(start) - 1}"), "the pid was used again"
    assert cgroup.is_leftover(f"{prefix}-{boot}-{pidns}-{1 << 22}-{start}")
    assert not cgroup.is_leftover(f"{prefix}-{boot}-{int(pidns) + 1}-{1 << 22}-{start}"), "not visible to us"
    assert not cgroup.is_leftover("dsec-notes")


def test_a_swept_cgroup_loses_its_processes(tmp_path: Path) -> None:
    name = cgroup.owner_name(os.getpid())
    cgroup.make_owner_directories(cgroup.detect(), "", name)
    directory, *others = (parent / name for parent in cgroup.parents(cgroup.detect(), ""))
    (directory / "inner").mkdir()
    child = os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "1000")
    (directory / "inner/cgroup.procs").write_text(str(child))
    assert cgroup.remove_tree(directory)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    assert [other for other in others if not cgroup.remove_tree(other)] == []


def test_every_spec_writes_the_same_files_so_that_one_follows_another() -> None:
    v1 = {name: Path("/v1", name) for name in ("memory", "pids", "cpu")}
    for found in (Hierarchies(Path("/v2"), ALL | {"io"}, {}), Hierarchies(Path("/v2"), frozenset(), v1, Path("/b"))):
        steps = [cgroup.plan_sandbox(found, 3, spec).operations for spec in (SandboxSpec(), SandboxSpec(cpu_weight=7))]
        some, others = ([(step.hierarchy, step.path) for step in plan] for plan in steps)
        assert some == others


def test_weights_are_those_of_the_box_and_a_new_one_is_spared_the_default() -> None:
    spec = SandboxSpec(cpu_weight=700)

    def weights(found: Hierarchies, of: SandboxSpec, *, is_new: bool = True) -> dict[str, str]:
        operations = cgroup.plan_sandbox(found, 3, of).operations
        steps = [step for step in operations if not (is_new and step.operation == Operation.RESTORE)]
        return {step.path: step.value for step in steps if "weight" in step.path or "shares" in step.path}

    both = Hierarchies(Path("/v2"), ALL | {"io"}, {})
    assert weights(both, spec) == {"s3/cpu.weight": "700", "s3/io.weight": "default 700"}
    old = Hierarchies(
        Path("/v2"), frozenset(), {name: Path(name) for name in ("memory", "pids", "cpu")}, Path("/blkio")
    )
    assert weights(old, spec) == {"s3/cpu.shares": "7168", "s3/blkio.bfq.weight": "700"}
    assert cgroup.parents(old, "")[-1] == Path("/blkio")
    assert old.weighs_io
    assert not Hierarchies(Path("/v2"), ALL, {}).weighs_io
    assert weights(both, SandboxSpec()) == weights(old, SandboxSpec()) == {}
    assert weights(both, SandboxSpec(), is_new=False) == {"s3/cpu.weight": "100", "s3/io.weight": "default 100"}
    assert weights(old, SandboxSpec(), is_new=False) == {"s3/cpu.shares": "1024", "s3/blkio.bfq.weight": "100"}
    box = cgroup.box_of(old, "", "owner", 3)
    assert (box.tracker, box.memory) == (Path("/v2/owner/s3"), Path("memory/owner/s3"))
    box = cgroup.box_of(both, "below", "owner", 3)
    assert box.tracker == box.memory == Path("/v2/below/owner/s3")
