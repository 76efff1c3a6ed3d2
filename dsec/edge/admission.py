"""Who may come in: the sums of what sandboxes were promised, against what the host has.

A promise is not a use: memory and process ids are promised several times over, as the config says.
Who finds no room waits for a moment, in the order of arrival, and is then refused with the bound, what was
asked, what is used and what there is; what could never fit is refused at once.

Invariants:
1. What is promised never exceeds a bound, and is given back exactly once.
2. At most `creates_waiting_count_max` wait, each for at most `create_wait_s`.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from pathlib import Path

from dsec.edge.clock import Clock
from dsec.edge.edge_config import EdgeConfig
from dsec.errors import ResourceExhaustedError
from dsec.types import SandboxSpec

Amounts = dict[str, float]
"""Name of a bound -> how much of it."""


def amounts_of(spec: SandboxSpec, count: int = 1) -> Amounts:
    """What `count` such sandboxes are promised."""
    return {
        "sandboxes_count": float(count),
        "memory_bytes": float(count * spec.memory_bytes),
        "pids_count": float(count * spec.pids_count_max),
    }


class Admission:
    """The promises of one host."""

    def __init__(self, directory: Path, config: EdgeConfig, clock: Clock) -> None:
        """`directory` is on the disk that must not run full."""
        self._directory = directory
        self._config = config
        self._clock = clock
        self.total: Amounts = {
            "sandboxes_count": float(config.sandboxes_count_max),
            "memory_bytes": (config.memory_bytes_total or host_memory_bytes()) * config.memory_overcommit,
            "pids_count": (config.pids_count_total or host_pids_count()) * config.pids_overcommit,
        }
        self.used: Amounts = dict.fromkeys(self.total, 0.0)
        self._waiting: deque[tuple[Amounts, asyncio.Event]] = deque()

    @property
    def waiting_count(self) -> int:
        """How many wait for room."""
        return len(self._waiting)

    async def enter(self, asked: Amounts) -> None:
        """Promise these amounts, or raise ResourceExhaustedError.  Give them back with `leave`."""
        for name, amount in asked.items():
            if amount > self.total[name]:
                raise self._refusal(name, asked, "it can never fit")
        self._check_disk()
        if self._waiting or self._missing(asked):
            await self._wait(asked)
        else:
            self.take(asked)

    def take(self, asked: Amounts) -> None:
        """Promise without asking: for what lives already."""
        for name, amount in asked.items():
            self.used[name] += amount

    def leave(self, asked: Amounts) -> None:
        """Take a promise back, and let those in whose turn it is."""
        for name, amount in asked.items():
            self.used[name] -= amount
        self._let_in()

    async def _wait(self, asked: Amounts) -> None:
        name = self._missing(asked) or "sandboxes_count"
        if len(self._waiting) >= self._config.creates_waiting_count_max:
            raise self._refusal(name, asked, f"{len(self._waiting)} wait already")
        may_enter = asyncio.Event()
        place = (asked, may_enter)
        self._waiting.append(place)
        deadline_s = self._clock.boot_s() + self._config.create_wait_s
        try:
            while not may_enter.is_set() and (left_s := deadline_s - self._clock.boot_s()) > 0:
                await self._clock.wait(may_enter, left_s)
            if not may_enter.is_set():
                raise self._refusal(self._missing(asked) or name, asked, f"waited {self._config.create_wait_s} s")
        except BaseException:
            if may_enter.is_set():
                self.leave(asked)
            else:
                self._waiting.remove(place)
                self._let_in()
            raise

    def _let_in(self) -> None:
        while self._waiting and not self._missing(self._waiting[0][0]):
            asked, may_enter = self._waiting.popleft()
            self.take(asked)
            may_enter.set()

    def _missing(self, asked: Amounts) -> str:
        """The first bound that these amounts would exceed now; "" if they fit."""
        return next((name for name, amount in asked.items() if self.used[name] + amount > self.total[name]), "")

    def _check_disk(self) -> None:
        above = free_bytes_above_floor(self._directory, self._config.disk_free_bytes_min)
        if above < 0:
            raise ResourceExhaustedError(
                f"disk of {self._directory}: {-above} bytes less are free than disk_free_bytes_min wants; free some"
            )

    def _refusal(self, name: str, asked: Amounts, why: str) -> ResourceExhaustedError:
        return ResourceExhaustedError(
            f"no room for a sandbox: {name} asked {asked[name]:.0f}, used {self.used[name]:.0f} "
            f"of {self.total[name]:.0f} ({why})"
        )


def free_bytes_above_floor(directory: Path, floor_bytes: int) -> int:
    """How many bytes may be written before fewer than the floor (or a twentieth of the disk) are free; may be < 0."""
    disk = os.statvfs(directory)
    floor = min(floor_bytes, disk.f_blocks * disk.f_frsize // 20)
    return disk.f_bavail * disk.f_frsize - floor


def host_memory_bytes() -> int:
    """Of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def host_pids_count() -> int:
    """How many process ids the kernel gives at most."""
    return int(Path("/proc/sys/kernel/pid_max").read_text(encoding="ascii"))
