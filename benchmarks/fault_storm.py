"""Kill everything at random under rollouts, then count what was lost, done twice, left open or left behind.

Two workers share a PostgreSQL and a served Edge, and two clients follow jobs of eight rollouts.  Until these have
ended, or the kills are used up, SIGKILL falls in an order and at moments drawn from the seed: on a worker, with its
engine (half of the time it is back at once under its name, else its lease lapses and the other one goes on), on the
Edge, on one sandbox, on all of them (their spawner), on a client, on PostgreSQL.  Each command of the model takes a
moment, and leaves a line in its sandbox, which the tests count into the reward.  What the service failed
by itself is resumed at the end, as a trainer would.
Everything is then counted from the logs and from what the clients were told, and compared with the same jobs at a
server that nobody disturbs: tokens, rewards, commands.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, aclosing, suppress
from pathlib import Path
from typing import Any

from kill_and_resume import BINARY, DSEC, leftovers_of
from rich.console import Console
from rich.table import Table
from storm_counts import Logs, holes

from dsec.edge.config import NATIVE_BINARY
from rollout.bench.tasks import BUNDLED
from rollout.client import AsyncRolloutClient
from rollout.engine import Sampling
from rollout.record import TrajectoryRecord
from rollout.request import Limits
from rollout.workers.testing import Postgres

EXAMPLE = "example: python benchmarks/fault_storm.py --rollouts 200 --kills 60 --seed 1 --figure storm.svg"
KINDS = ("worker", "edge", "sandbox", "all sandboxes", "client", "postgresql")
TASKS_PER_JOB, GROUP_SIZE = 2, 4
ASKED: dict[str, Any] = {
    "group_size": GROUP_SIZE,
    "sampling": Sampling(temperature=1.0, seed=3),
    "limits": Limits(turns_count_max=6),
}
LEASE_S, KEEP_S, PATIENCE_S = 3.0, 60.0, 120.0
BETWEEN_S = (0.1, 0.8)
AWAY_S_MAX = 0.5
COMMAND_S = 0.2
HOOK = f"""if [ "$PWD" = /app ] && [ -n "$BASH_EXECUTION_STRING" ]; then echo >> /srv/ran; sleep {COMMAND_S}; fi
"""
"""Read by each bash before the model's command: what was applied can be counted inside."""
COUNTING = """bash "${0%/*}/plain.sh"
cd /logs/verifier
printf '{"reward": %s, "commands": %s}' "$(cat reward.txt)" "$(wc -l < /srv/ran)" > reward.json
"""


def make_tasks(folder: Path, count: int) -> list[Path]:
    """Copies of bundled tasks whose sandboxes count the model's commands."""
    bundled = sorted(path for path in BUNDLED.iterdir() if path.is_dir())
    made = []
    for number in range(count):
        task = folder / f"{bundled[number % len(bundled)].name}-{number}"
        shutil.copytree(bundled[number % len(bundled)], task)
        (task / "environment/hook").mkdir()
        (task / "environment/hook/.hook").write_text(HOOK)
        with (task / "environment/Dockerfile").open("a") as dockerfile:
            dockerfile.write("COPY hook/ /srv/\nRUN : > /srv/ran\nENV BASH_ENV=/srv/.hook\n")
        (task / "tests/test.sh").rename(task / "tests/plain.sh")
        (task / "tests/test.sh").write_text(COUNTING)
        made.append(task)
    return made


async def follow(address: str, jobs: dict[str, list[str]], told: Path) -> None:
    """A trainer's program: asks for its jobs, and writes down each group that it is given."""

    async def one(client: AsyncRolloutClient, request_id: str, tasks: list[str]) -> None:
        async with aclosing(client.rollouts(list(map(Path, tasks)), request_id=request_id, **ASKED)) as groups:
            async for group in groups:
                members = [member and [list(member.token_ids), member.finish_reason] for member in group.members]
                said = {"life": os.getpid(), "at_s": time.time(), "group": group.group_id, "members": members}
                with told.open("a") as file:
                    file.write(json.dumps(said | {"missing": dict(group.missing_reasons)}) + "\n")

    async with AsyncRolloutClient(address, patience_s=PATIENCE_S) as client:
        await asyncio.gather(*(one(client, *job) for job in jobs.items()))


class Process:
    """A process that is there again soon after it was killed."""

    def __init__(self, place: Path, *argv: object, **env: object) -> None:
        """It says a line when it is ready; what goes wrong is in `place`."""
        self._argv, self._errors = list(map(str, argv)), place
        self._env = os.environ | {name: str(value) for name, value in env.items()}
        self._back = asyncio.Event()

    @property
    def is_up(self) -> bool:
        """Whether it is ready, or was when it ended by itself."""
        return self._back.is_set()

    async def start(self) -> None:
        """Until it is ready: what it needs may be away just now."""
        while not self.is_up:
            with self._errors.open("ab") as errors:
                self.process = await asyncio.create_subprocess_exec(
                    *self._argv, env=self._env, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
                )
            assert self.process.stdout is not None
            if await self.process.stdout.readline():
                self._back.set()
            else:
                await self.process.wait()

    async def kill(self, away_s: float) -> None:
        """SIGKILL, and start it again."""
        self._back.clear()
        self.process.kill()
        await self.process.wait()
        await asyncio.sleep(away_s)
        await self.start()

    async def follow(self) -> None:
        """Until it ends by itself.  SystemExit if that is a failure."""
        while (code := await self.process.wait()) == -signal.SIGKILL:
            await self._back.wait()
        if code:
            raise SystemExit(f"{self._errors.stem} ended with {code}: {self._errors.read_text()[-2000:]}")

    async def stop(self) -> int:
        """SIGTERM; its exit code."""
        self.process.terminate()
        return await self.process.wait()


class Storm:
    """Everything that runs, and what falls on it."""

    def __init__(self, root: Path, jobs: dict[str, list[str]], kills_count_max: int, seed: int) -> None:
        self.root, self.kills_count_max = root, kills_count_max
        self.dice = random.Random(seed)  # noqa: S311 - moments, not secrets
        self.kills: list[tuple[str, float]] = []
        self.problems: list[str] = []
        self.is_over = False
        self.postgres, self.has_postgres = Postgres(), True
        edge_url, index = f"unix:{root}/edge.sock", self.postgres.create("storm")
        self.edge = Process(
            root / "edge.txt", DSEC, "edge", "serve", "--directory", root / "edge", "--listen", edge_url,
            "--destroy-on-exit", DSEC_EDGE_BINARY_PATH=root / BINARY, DSEC_EDGE_KEEP_S=KEEP_S,
        )  # fmt: skip
        self.addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
        self.workers = [
            Process(
                root / f"{name}.txt", DSEC, "serve", "--root", root / "logs", "--worker-id", name, "--index", index,
                "--edge", edge_url, "--listen", address, "--concurrency", 8,
                DSEC_WORKER_LEASE_TTL_S=LEASE_S, DSEC_LEASE_TTL_S=KEEP_S,
            )
            for name, address in zip("ab", self.addresses, strict=True)
        ]  # fmt: skip
        self.clients = []
        for number, address in enumerate(self.addresses):
            mine = {name: tasks for place, (name, tasks) in enumerate(jobs.items()) if place % 2 == number}
            said = json.dumps([address, mine, str(root / f"told-{number}")])
            self.clients.append(Process(root / f"client-{number}.txt", sys.executable, __file__, "--client", said))

    async def run(self) -> None:
        """The jobs, with all that happens to them; then all is stopped in order."""
        await self.edge.start()
        await asyncio.gather(*(each.start() for each in self.workers))
        await asyncio.gather(*(each.start() for each in self.clients))
        falling = asyncio.create_task(self.fall())
        served = [asyncio.create_task(each.follow()) for each in (*self.workers, self.edge)]
        told = asyncio.gather(*(client.follow() for client in self.clients))
        await asyncio.wait([told, *served], return_when=asyncio.FIRST_COMPLETED)
        self.is_over = True
        await asyncio.gather(told, falling, *(each for each in served if each.done()))
        await self.mend()
        for each in served:
            each.cancel()
        codes = [await worker.stop() for worker in self.workers] + [await self.edge.stop()]
        self.problems += [f"exit codes at the end: {codes}"] if any(codes) else []

    async def fall(self) -> None:
        """Kills, each kind as often as the others; what is away already is left alone."""
        deck: list[str] = []
        async with asyncio.TaskGroup() as away:  # what is away comes back first
            while len(self.kills) < self.kills_count_max:
                await asyncio.sleep(self.dice.uniform(*BETWEEN_S))
                if self.is_over:
                    break
                deck = deck or self.dice.sample(KINDS, len(KINDS))
                if (strike := self.strike(kind := deck.pop(0))) is None:
                    deck.append(kind)
                else:
                    self.kills.append((kind, time.time()))
                    away.create_task(strike)

    def strike(self, kind: str) -> Any:
        """What a kill of that kind does; None if there is nobody to kill."""
        away_s = self.dice.uniform(0, AWAY_S_MAX)
        if kind == "postgresql":
            return self.kill_postgres(away_s) if self.has_postgres else None
        if "sandbox" in kind:
            spawners = [pid for pid, words in self.natives() if words[1:2] == ["spawner"]]
            guests = [pid for spawner in spawners for pid in guests_of(spawner)]
            victims = spawners if kind == "all sandboxes" and guests else guests
            return asyncio.to_thread(kill, self.dice.choice(victims)) if victims else None
        processes = {"worker": self.workers, "edge": [self.edge], "client": self.clients}[kind]
        victims = [each for each in processes if each.is_up and each.process.returncode is None]
        if kind == "worker" and self.dice.random() < 0.5:
            away_s += LEASE_S
        return self.dice.choice(victims).kill(away_s) if victims else None

    def natives(self) -> Iterator[tuple[int, list[str]]]:
        """Processes of the Edge's own binary."""
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                words = entry.read_bytes().decode(errors="replace").split("\0")
                if words[0] == str(self.root / BINARY):
                    yield int(entry.parent.name), words

    async def kill_postgres(self, away_s: float) -> None:
        """SIGKILL for the database, and start it again."""
        self.has_postgres = False
        self.postgres.kill()
        await asyncio.sleep(away_s)
        await asyncio.to_thread(self.postgres.start)
        self.has_postgres = True

    async def mend(self) -> None:
        """Resume what the service failed, as often as it takes; the logs say how often that was."""
        async with AsyncRolloutClient(self.addresses[0], patience_s=PATIENCE_S) as client:
            while jobs := {each.request_id async for each in client.list(states=["failed"])}:
                for job in jobs:
                    await client.resume(request_id=job)
                    _ = [update async for update in client.attach(job)]

    def close(self) -> None:
        """Leave nothing of it, however it ended."""
        for each in (*self.clients, *self.workers, self.edge):
            if each.is_up and each.process.returncode is None:
                each.process.kill()
        for pid, _ in self.natives():
            kill(pid)
        self.postgres.close()


def kill(pid: int) -> None:
    """SIGKILL, if it still is there."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def guests_of(spawner: int) -> list[int]:
    """The first processes of the sandboxes that a spawner made."""
    with suppress(OSError):
        children = Path(f"/proc/{spawner}/task/{spawner}/children").read_text().split()
        return [int(pid) for pid in children]
    return []


def free_ports(count: int) -> list[int]:
    """Ports that nobody has now; a worker comes back to its own."""
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in taken]


async def quiet_run(root: Path, jobs: dict[str, list[str]]) -> dict[str, TrajectoryRecord]:
    """The same jobs at a server that nothing happens to."""
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    server = Process(root / "quiet.txt", DSEC, "serve", "--out", root / "quiet/only", "--listen", address)
    await server.start()
    await follow(address, jobs, root / "quiet-told")
    await server.stop()
    return Logs(root / "quiet").records


def run(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """One quiet run, one storm; the figures of both."""
    shutil.copy(NATIVE_BINARY, root / BINARY)
    tasks = [str(task) for task in make_tasks(root / "tasks", options.rollouts // GROUP_SIZE)]
    jobs = {f"job-{n}": tasks[n : n + TASKS_PER_JOB] for n in range(0, len(tasks), TASKS_PER_JOB)}
    began = time.monotonic()
    quiet = asyncio.run(quiet_run(root, jobs))
    quiet_s = time.monotonic() - began
    storm = Storm(root, jobs, options.kills, options.seed)
    began, began_at_s = time.monotonic(), time.time()
    try:
        asyncio.run(storm.run())
    finally:
        storm.close()
    storm_s, logs = time.monotonic() - began, Logs(root / "logs")
    logs.compare(quiet)
    hole_problems, groups = holes(root, logs.records, GROUP_SIZE)
    left = [f"left: {each}" for each in leftovers_of(root)]
    problems = [*storm.problems, *logs.problems, *hole_problems, *left]
    records = logs.records.values()
    return {
        "seed": options.seed,
        "rollouts": len(records),
        "kills": len(storm.kills),
        "kills_by_kind": {kind: sum(each == kind for each, _ in storm.kills) for kind in KINDS},
        "tokens": sum(each.tokens_sampled for each in records),
        "tokens_drawn_twice": logs.tokens_twice + sum(each.tokens_regenerated for each in records),
        "tokens_prefilled_again": sum(each.tokens_replayed for each in records),
        "commands": logs.commands,
        "commands_run_twice": logs.commands_twice + sum(each.commands_run_twice for each in records),
        "commands_replayed": sum(each.commands_replayed for each in records),
        "attempts_max": max(each.lineage.attempt for each in records),
        "groups_told": len(groups),
        "groups_told_with_reasons": sum(bool(each["missing"]) for each in groups),
        "silent_holes": len(hole_problems),
        "infra_failures_resumed": dict(logs.failures),
        "finish_reasons": Counter(each.finish_reason for each in records),
        "equal_to_quiet": sum(quiet[name].token_ids == each.token_ids for name, each in logs.records.items()),
        "quiet_s": round(quiet_s, 1),
        "storm_s": round(storm_s, 1),
        "problems": problems,
        "at_s": {"kills": [(kind, at_s - began_at_s) for kind, at_s in storm.kills],
                 "groups": [each["at_s"] - began_at_s for each in groups]},
    }  # fmt: skip


def show(figures: dict[str, Any]) -> None:
    """The table."""
    table = Table("", "", title=f"{figures['rollouts']} rollouts, {figures['kills']} kills, seed {figures['seed']}")
    table.columns[1].justify = "right"
    for name, value in figures.items():
        rows = value.items() if isinstance(value, dict) else [("", value)]
        for key, number in rows if name not in ("problems", "at_s") else ():
            table.add_row(f"{name.replace('_', ' ')}{': ' * bool(key)}{key}", str(number))
    console = Console()
    console.print(table)
    for problem in figures["problems"]:
        console.print(problem[:500], markup=False, style="red")


def draw(figures: dict[str, Any], path: Path) -> None:
    """Groups that had ended against time, and every kill."""
    import matplotlib.pyplot as plt

    plot, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    kills, groups = figures["at_s"]["kills"], sorted(figures["at_s"]["groups"])
    for height, kind in enumerate(KINDS):
        moments = [at_s for each, at_s in kills if each == kind]
        axes.plot(moments, [-1.5 * (height + 1)] * len(moments), "x", label=f"kill of {kind}")
    axes.step(groups, range(1, len(groups) + 1), where="post", color="black", label="groups given to clients")
    axes.set(xlabel="s", ylabel="groups", title=f"{figures['rollouts']} rollouts under {figures['kills']} kills")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    plot.savefig(path)


def main() -> int:
    """Run it; exit 1 if anything is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=EXAMPLE)
    parser.add_argument("--rollouts", type=int, default=200, help="in groups of four")
    parser.add_argument("--kills", type=int, default=60, help="at most; fewer if the rollouts end before")
    parser.add_argument("--seed", type=int, default=1, help="of what is killed, and when")
    parser.add_argument("--quick", action="store_true", help="24 rollouts, 9 kills")
    parser.add_argument("--json", action="store_true", help="one JSON object, nothing else")
    parser.add_argument("--figure", type=Path, help="where to draw the picture")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client is not None:
        address, jobs, told = json.loads(options.client)
        print("begun", flush=True)
        asyncio.run(follow(address, jobs, Path(told)))
        return 0
    if options.quick:
        options.rollouts, options.kills = 24, 9
    if options.rollouts < GROUP_SIZE or options.kills < 0:
        parser.error(f"--rollouts must be at least {GROUP_SIZE}, --kills at least 0")
    root = Path(tempfile.mkdtemp(prefix="dsec-storm-"))
    print(f"logs and errors are in {root} until it ends well", file=sys.stderr)
    figures = run(options, root)
    if not figures["problems"]:
        shutil.rmtree(root)
    if options.figure is not None:
        draw(figures, options.figure)
    print(json.dumps(figures)) if options.json else show(figures)
    return 1 if figures["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
