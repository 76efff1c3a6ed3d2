"""What a command in a sandbox costs, beside `docker exec`, `crun exec` and a plain subprocess.

    python benchmarks/exec_latency.py [--quick] [--json] [--without docker,crun]

`dsec` is the Python client over gRPC on a unix socket, with an Edge in a process of its own that makes
*started* and *finished* durable; `dsec_in_process` is the substrate in this process, without a log.
Contenders take turns in every round, so that a noisy machine is noisy for all.  Output is
zeros from `head -c`; all of it comes back to this process.  Needs root.

See: create_exec.py for what the sandboxes cost, contenders.py for what the others leave out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

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

from dsec.client.sandbox import AsyncSandbox
from dsec.edge.config import SubstrateConfig
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.types import Command, SandboxSpec

TRUE = ("/bin/true",)
SIZES = {"256_kib": 256 << 10, "16_mib": 16 << 20}
IN_FLIGHT = 16
IN_A_ROW = 20
PAUSE_S = 0.02
Exec = Callable[[tuple[str, ...], int], Awaitable[None]]
"""Run an argv, whose output has so many bytes, to its end."""


def head(count: int) -> tuple[str, ...]:
    """Writes `count` zeros."""
    return ("/usr/bin/head", "-c", str(count), "/dev/zero")


def expect(count: int, length: int) -> None:
    """RuntimeError unless all of the output came."""
    if count != length:
        raise RuntimeError(f"{length} bytes of {count} came back")


def exec_in(contender: Contender, name: str) -> Exec:
    """In a container of another's."""

    async def run(argv: tuple[str, ...], count: int) -> None:
        expect(count, len(await contender.exec(name, *argv)))

    return run


async def exec_subprocess(argv: tuple[str, ...], count: int) -> None:
    """On the host, without a sandbox."""
    expect(count, len(await run_program(*argv)))


@contextlib.asynccontextmanager
async def in_process() -> AsyncIterator[Exec]:
    """The substrate in this process."""
    substrate = ContainerSubstrate(SubstrateConfig(execs_in_flight_max=IN_FLIGHT))
    await substrate.open()
    sandbox = await substrate.create(SandboxSpec())

    async def run(argv: tuple[str, ...], count: int) -> None:
        result = await sandbox.exec(Command(argv=argv, output_bytes_max=max(count, 1)))
        expect(count, len(result.stdout.data))

    yield run
    await substrate.close()


@contextlib.asynccontextmanager
async def over_grpc() -> AsyncIterator[Exec]:
    """The Python client, and an Edge in a process of its own."""
    async with edge_process() as url, await AsyncSandbox.create(url=url) as sandbox:

        async def run(argv: tuple[str, ...], count: int) -> None:
            result = await sandbox.commands.run(argv, output_bytes_max=max(count, 1))
            expect(count, len(result.stdout_bytes))

        yield run


async def take_turns(execs: dict[str, Exec], rounds: int, figures: Figures) -> None:
    """Some commands in a row each, in another order every round, then some with a pause before each.

    Caches and processors cool down in a pause, and what changes threads and processes most feels it most.  Docker
    takes part in every second round, and in no pause.
    """
    order = deque(execs.items())
    for index in range(rounds):
        for name, run in order:
            if name == "docker" and index % 2:
                continue
            for _ in range(IN_A_ROW):
                await figures.time(name, "exec_true", run(TRUE, 0))
            for size, count in SIZES.items():
                await figures.time(name, f"output_{size}", run(head(count), count))
            for _ in range(IN_A_ROW if name != "docker" else 0):
                await asyncio.sleep(PAUSE_S)
                await figures.time(name, "exec_true_after_a_pause", run(TRUE, 0))
        order.rotate()


async def all_at_once(execs: dict[str, Exec], count: int) -> dict[str, dict[str, Value]]:
    """Commands a second, 16 in flight; in three turns, of which each contender's best counts."""
    found: dict[str, list[float]] = {name: [] for name in execs}
    shares = {"docker": 20, "crun": 5}
    for _ in range(3):
        for name, run in execs.items():
            few = max(IN_FLIGHT, count // shares.get(name, 1))
            found[name].append(await rate(few, IN_FLIGHT, lambda _: run(TRUE, 0)))  # noqa: B023
    return {"exec_true_per_s_16_in_flight": {name: max(rates) for name, rates in found.items()}}


async def measure(rounds: int, count: int, without: str) -> Result:
    """All figures as one object."""
    figures = Figures()
    async with contextlib.AsyncExitStack() as stack:
        others, facts = await stack.enter_async_context(contenders(without=without))
        execs: dict[str, Exec] = {
            "dsec": await stack.enter_async_context(over_grpc()),
            "dsec_in_process": await stack.enter_async_context(in_process()),
            "subprocess": exec_subprocess,
        }
        for name, other in others.items():
            made = await other.create()
            stack.push_async_callback(other.destroy, made)
            execs[name] = exec_in(other, made)
        await take_turns(execs, rounds, figures)
        rates = await all_at_once(execs, count)
    by_operation = figures.summary() | rates
    ours, baselines = split(by_operation)
    return {"figures": ours, "baselines": baselines, "ratios": ratios(by_operation), "facts": facts}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description="Cost of commands in a sandbox.",
        epilog="example: python benchmarks/exec_latency.py --quick --json | python -m json.tool",
    )
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--rounds", type=int, help="rounds of the turn-taking part (3 with --quick, else 20)")
    parser.add_argument("--without", default="", metavar="NAMES", help="contenders to leave out: docker,crun")
    arguments = parser.parse_args()
    run_apart()
    rounds = arguments.rounds or (3 if arguments.quick else 20)
    result = asyncio.run(measure(rounds, 400 if arguments.quick else 2000, arguments.without))
    result["facts"]["cores"] = str(os.cpu_count())
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        render("commands", result)


if __name__ == "__main__":
    main()
