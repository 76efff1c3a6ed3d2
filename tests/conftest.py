"""How every test runs: hypothesis counts examples, not seconds; and cgroups that no other run sweeps or counts."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, settings

from dsec.edge.linux import cgroup

# A loaded machine is no failure: a slow example or slow data says nothing about the system.
settings.register_profile("any-speed", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-speed")

# A shell starts what runs in its background with SIGINT ignored, and all that we start would ignore it too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def descriptors() -> Callable[[], list[str]]:
    """What this process has open, once the garbage has gone: what others left would go in the midst of a test."""

    def list_() -> list[str]:
        gc.collect()
        found = []
        for number in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):  # the one of the listing
                found.append(os.readlink(f"/proc/self/fd/{number}"))
        return found

    return list_


@pytest.fixture(scope="session")
def cgroup_parent() -> Iterator[str]:
    """A cgroup directory of this test session in every hierarchy."""
    found, name = cgroup.detect(), f"dsec_test_{os.getpid()}"
    made = cgroup.parents(found, name)
    if found.unified is not None and found.unified_controllers:
        enabled = " ".join(f"+{controller}" for controller in found.unified_controllers)
        (found.unified / "cgroup.subtree_control").write_text(enabled)
    for path in made:
        path.mkdir()
    yield name
    for path in made:
        cgroup.remove_tree(path)


@pytest.fixture(scope="module")
def own_cgroups(cgroup_parent: str) -> Iterator[None]:
    """For a module that kills makers of sandboxes: nobody beside it sweeps what they leave before it was seen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSEC_EDGE_CGROUP_PARENT", cgroup_parent)
        yield
