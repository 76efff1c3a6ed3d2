"""What a sandbox costs to make and to end, beside `docker run`, `crun run` and a plain subprocess.

    python benchmarks/create_exec.py [--quick] [--json] [--without docker,crun]

`dsec` and `dsec_warm` are the substrate in this process, `dsec_grpc` and `dsec_grpc_warm` the Python client and an
Edge in a process of its own, which journals.  Contenders take turns in every round, so that a noisy machine is noisy
for all, and nobody's turn begins while another makes sandboxes ahead; compare ratios first, and minima before means.
What the others leave out is in contenders.py: their figures are flattered.
The processor time of a create is that of our processes, spawner, guests and Python together, over cycles of
create and destroy; `KERNEL_FLOOR_MS` is what the system calls alone took, with a network namespace that
was there.  Needs root.

See: docs/threat_model.md for what a sandbox does in that time; exec_latency.py for commands.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import resource
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import TypeVar

from contenders import (
    Contender,
    Figures,
    Result,
    Value,
    contenders,
    edge_process,
    rate,
    ratios,
    render,
    run_apart,
    run_program,
    split,
)

from dsec.client.substrate import RemoteSubstrate
from dsec.edge.config import SubstrateConfig
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.errors import DsecError
from dsec.sandbox import Sandbox, Substrate
from dsec.types import Command, SandboxSpec

T = TypeVar("T")
TRUE = Command(argv=("/bin/true",))
KERNEL_FLOOR_MS = 1.7
WARM_COUNT = 64
SANDBOXES_COUNT_MAX = 512
WARM_UP_S = 1.0
"""Until a pool is full; a full one lacks a sandbox for no longer than:"""
REFILL_S = 0.02
TURNS = 3
MIXED = tuple(
    SandboxSpec(memory_bytes=mib << 20, disk_bytes=mib << 19, cpu_cores=cores, pids_count_max=mib, hostname=f"of-{mib}")
    for mib, cores in ((128, 0.5), (256, 1.0), (512, 2.0), (1024, 4.0))
)
"""No two in a row are alike: what a pool has ready is never quite what is asked for."""
BURST = "burst_create_and_first_exec"


async def open_substrate(warm_count: int = 0) -> ContainerSubstrate:
    """A substrate of this process, with as many sandboxes made ahead."""
    substrate = ContainerSubstrate(SubstrateConfig(sandboxes_count_max=SANDBOXES_COUNT_MAX, warm_count=warm_count))
    await substrate.open()
    return substrate


@contextlib.asynccontextmanager
async def open_remote(warm_count: int = 0) -> AsyncIterator[RemoteSubstrate]:
    """A client of an Edge that is there for nobody else."""
    async with edge_process(sandboxes_count_max=SANDBOXES_COUNT_MAX, warm_count=warm_count) as url:
        remote = RemoteSubstrate(url)
        await remote.open()
        yield remote


@contextlib.asynccontextmanager
async def variants() -> AsyncIterator[dict[str, Substrate]]:
    """The ways to our sandboxes, warmed up; those that make some ahead come last."""
    async with open_remote() as remote, open_remote(WARM_COUNT) as warm_remote:
        found: dict[str, Substrate] = {
            "dsec": await open_substrate(),
            "dsec_grpc": remote,
            "dsec_warm": await open_substrate(WARM_COUNT),
            "dsec_grpc_warm": warm_remote,
        }
        for substrate in found.values():
            await warm_up(substrate)
        yield found
        for substrate in found.values():
            await substrate.close()


async def birth(substrate: Substrate) -> Sandbox:
    """A sandbox whose first command is done."""
    sandbox = await substrate.create(SandboxSpec())
    result = await sandbox.exec(TRUE)
    if result.exit_code != 0:
        raise RuntimeError(f"/bin/true ended with {result.exit_code}")
    return sandbox


async def container_birth(contender: Contender) -> str:
    """The same, of another's container."""
    name = await contender.create()
    await contender.exec(name, "/bin/true")
    return name


async def warm_up(substrate: Substrate) -> None:
    """Make what the first sandboxes would pay for, and let the pool fill, where there is one."""
    await (await birth(substrate)).destroy()
    await asyncio.sleep(WARM_UP_S)


async def end_turn(variant: str, refill_s: float) -> None:
    """Let it make ahead what was taken, so that the next one does not pay for it."""
    if variant.endswith("_warm"):
        await asyncio.sleep(refill_s)


async def take_turns(others: dict[str, Contender], rounds: int, figures: Figures) -> None:
    """One at a time; Docker, which needs a second a round, in every tenth."""
    async with variants() as ours:
        for index in range(rounds):
            for variant, substrate in ours.items():
                sandbox = await figures.time(variant, "create_and_first_exec", birth(substrate))
                await figures.time(variant, "destroy", sandbox.destroy())
                await end_turn(variant, REFILL_S)
            for variant in ("dsec", "dsec_warm"):
                for operation, spec in (("create", SandboxSpec()), ("create_mixed_specs", MIXED[index % len(MIXED)])):
                    sandbox = await figures.time(variant, operation, ours[variant].create(spec))
                    await sandbox.destroy()
                await end_turn(variant, REFILL_S)
            await figures.time("subprocess", "create_and_first_exec", run_program("/bin/true"))
            for name, contender in others.items():
                if name != "docker" or index % 10 == 0:
                    made = await figures.time(name, "create_and_first_exec", container_birth(contender))
                    await figures.time(name, "destroy", contender.destroy(made))


async def burst(
    count: int, in_flight: int, create: Callable[[], Awaitable[T | None]], destroy: Callable[[T], Awaitable[object]]
) -> tuple[float, float]:
    """Creates and destroys a second, of what came to be.  RuntimeError if nothing did."""
    made: list[T] = []

    async def one(_: int) -> None:
        if (born := await create()) is not None:
            made.append(born)

    tried = await rate(count, in_flight, one)
    if not made:
        raise RuntimeError(f"not one of {count} creates at once ended well")
    return tried * len(made) / count, await rate(len(made), in_flight, lambda index: destroy(made[index]))


async def bursts(others: dict[str, Contender], count: int, figures: Figures) -> dict[str, dict[str, Value]]:
    """`count` at once, from asked for to the first command done; others as many at a time as they do best.

    In turns, of which each one's best counts; in the first of them ours make what later ones use again.
    """
    at_first: dict[str, Value] = {}
    found: dict[str, list[tuple[float, float]]] = {}

    async with variants() as ours:
        for _ in range(TURNS):
            for name, substrate in ours.items():
                create = partial(birth_in_burst, name, substrate, figures)
                rates = await burst(count, count, create, lambda sandbox: sandbox.destroy())
                found.setdefault(name, []).append(rates)
                at_first.setdefault(name, rates[0])
                await end_turn(name, WARM_UP_S)
            for name, other in others.items():
                few = max(4, count // (12 if name == "docker" else 4))
                rates = await burst(few, other.creates_in_flight, partial(container_birth, other), other.destroy)
                found.setdefault(name, []).append(rates)
    return {
        "burst_creates_per_s": {name: max(creates for creates, _ in rates) for name, rates in found.items()},
        "burst_creates_per_s_at_first": at_first,
        "burst_destroys_per_s": {name: max(destroys for _, destroys in rates) for name, rates in found.items()},
    }


async def birth_in_burst(name: str, substrate: Substrate, figures: Figures) -> Sandbox | None:
    """One of many; None if it failed, which `figures` counts."""
    with contextlib.suppress(DsecError, RuntimeError):
        return await figures.time(name, BURST, birth(substrate))
    return None


def used_cpu_s() -> float:
    """Of this process and of its children that have ended."""
    parts = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in parts)


async def cpu_ms_of_a_create(count: int, in_flight: int) -> float:
    """Processor time of one create and destroy, everything that opening a substrate costs left out."""

    async def run(cycles: int) -> float:
        before = used_cpu_s()
        substrate = await open_substrate()

        async def cycle(_: int) -> None:
            await (await substrate.create(SandboxSpec())).destroy()

        await rate(cycles, in_flight, cycle)
        await substrate.close()
        return used_cpu_s() - before

    few, many = await run(8), await run(8 + count)
    return (many - few) / count * 1e3


async def measure(rounds: int, burst_count: int, without: str) -> Result:
    """All figures as one object."""
    figures = Figures()
    async with contenders(without=without) as (others, facts):
        await take_turns(others, rounds, figures)
        rates = await bursts(others, burst_count, figures)
    cpu_ms = {f"cpu_ms_a_create_{n}_in_flight": await cpu_ms_of_a_create(burst_count * 4, n) for n in (1, 16)}
    by_operation = figures.summary() | rates
    ours, baselines = split(by_operation)
    share = KERNEL_FLOOR_MS / cpu_ms["cpu_ms_a_create_16_in_flight"]
    ours |= cpu_ms | {"share_of_the_kernel_floor": share}
    return {"figures": ours, "baselines": baselines, "ratios": ratios(by_operation), "facts": facts}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description="Cost of making and ending sandboxes.",
        epilog="example: python benchmarks/create_exec.py --quick --json | python -m json.tool",
    )
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--rounds", type=int, help="rounds of the turn-taking part (40 with --quick, else 200)")
    parser.add_argument("--without", default="", metavar="NAMES", help="contenders to leave out: docker,crun")
    arguments = parser.parse_args()
    run_apart()
    rounds = arguments.rounds or (40 if arguments.quick else 200)
    started = time.monotonic()
    result = asyncio.run(measure(rounds, 100, arguments.without))
    result["facts"]["took"] = f"{time.monotonic() - started:.0f} s"
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        render("create, first exec, destroy", result)


if __name__ == "__main__":
    main()
