"""What the host lacks is said by name, with the way out."""

import subprocess
import sys
from pathlib import Path

import pytest

from dsec.edge.config import NATIVE_BINARY, SubstrateConfig
from dsec.edge.linux import cgroup, host, skeleton
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.errors import HostUnfitError


def test_this_host_is_fit() -> None:
    findings = host.check_host()
    assert [finding for finding in findings if not (finding.ok or finding.optional)] == []
    assert {"root", "overlayfs", "cgroup2", "python3", "bash"} <= {finding.name for finding in findings}


def test_every_finding_has_a_remedy() -> None:
    assert [finding for finding in host.check_host() if not finding.remedy] == []


def test_terminals_for_all_sandboxes_are_asked_of_the_kernel_and_not_required() -> None:
    config = SubstrateConfig(sandboxes_count_max=2048)
    found = {finding.name: finding for finding in host.check_host(config)}["terminals"]
    most, reserve = (int(Path("/proc/sys/kernel/pty", name).read_text()) for name in ("max", "reserve"))
    needed = 2048 * 64 + reserve
    assert (found.ok, found.optional) == (most >= needed, True)
    assert found.remedy == f"sysctl -w kernel.pty.max={needed}"
    assert f"max={host.TERMINALS_PER_SANDBOX}" in NATIVE_BINARY.with_name("rootfs.c").read_text()


def test_a_processor_without_avx2_is_told_but_does_not_forbid_sandboxes(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx bmi1 bmi2 f16c abm movbe sse4_2\n")
    program = (
        "from dsec.edge.config import SubstrateConfig; from dsec.edge.linux import host\n"
        "host.require_fit_host(SubstrateConfig())\n"
        "print([(finding.name, finding.detail) for finding in host.check_host()"
        " if not (finding.ok or finding.optional)])"
    )
    script = 'mount --bind "$0" /proc/cpuinfo && exec "$@"'
    apart = ["unshare", "-m", "bash", "-c", script, str(cpuinfo), sys.executable, "-c"]
    for machine, expected in (("x86_64", [("cpu", "lacks avx2 fma")]), ("aarch64", [])):
        there = f"import platform\nplatform.machine = lambda: {machine!r}\n{program}"
        told = subprocess.run([*apart, there], capture_output=True, text=True, check=False)
        assert (told.returncode, told.stdout) == (0, f"{expected}\n"), told.stderr


async def test_a_missing_binary_is_named_with_the_way_to_build_it(tmp_path: Path) -> None:
    substrate = ContainerSubstrate(SubstrateConfig(binary_path=tmp_path / "none"))
    with pytest.raises(HostUnfitError, match=r"none; build it with gcc"):
        await substrate.open()


async def test_a_binary_that_cannot_serve_is_an_unfit_host(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(HostUnfitError):
        await ContainerSubstrate(SubstrateConfig(binary_path=broken)).open()
    assert cgroup.sweep() == 0


async def test_a_cgroup_that_cannot_be_made_is_an_unfit_host() -> None:
    with pytest.raises(HostUnfitError, match="cannot make a cgroup"):
        await ContainerSubstrate(SubstrateConfig(cgroup_parent="no/such/group")).open()


def test_the_skeleton_takes_only_links_into_usr_from_the_host(tmp_path: Path) -> None:
    alternatives = tmp_path / "etc/alternatives"
    alternatives.mkdir(parents=True)
    (alternatives / "awk").symlink_to("/usr/bin/mawk")
    (alternatives / "secret").symlink_to("/root/.ssh/id")
    (alternatives / "dotted").symlink_to("/usr/../root/x")
    (alternatives / "file").write_text("secret")
    (tmp_path / "bin").symlink_to("usr/bin")
    entries = {entry.path: entry for entry in skeleton.entries(tmp_path)}
    assert entries["etc/alternatives/awk"].content == "/usr/bin/mawk"
    assert entries["bin"].content == "usr/bin"
    assert not {"etc/alternatives/secret", "etc/alternatives/dotted", "etc/alternatives/file", "sbin"} & set(entries)
    paths = [entry.path for entry in skeleton.entries(tmp_path)]
    assert [
        (index, path) for index, path in enumerate(paths) if str(Path(path).parent) not in {".", *paths[:index]}
    ] == [], "parents first"
