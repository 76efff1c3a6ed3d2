"""A job from start to end in one process: what `dsec run` does once its command line is read.

The run directory holds everything: `wal/` (the log), and, derived from it, `summary.json` and
`trajectories.arrow`.  A run that was killed is finished by running it again with `resume`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

import wal
from rollout import journal
from rollout.bench.tasks import Task, check_packages, load_task
from rollout.commands.summary import Summary, summarise
from rollout.config import RolloutConfig
from rollout.engine import Sampling
from rollout.errors import RequestError, ResultsError
from rollout.events import JobSubmitted, JobWorked, RolloutFinished
from rollout.jobs import load_bundled, make_job
from rollout.main import holds_edge, make_service
from rollout.modes import limits_of
from rollout.record import TrajectoryRecord, trajectory_record
from rollout.request import Job, Limits, Thinking
from rollout.service import RolloutService
from rollout.stopping import done_before, stop_signal

REQUEST_ID = "run"
SUMMARY, TRAJECTORIES = "summary.json", "trajectories.arrow"
_DRAW_INTERVAL_S = 0.25


@dataclass(frozen=True)
class Batch:
    """What to run: a directory, the job and its tasks for a new run, and whether an old one may go on.

    `check_logged` gets the job of a run that goes on, and raises if the caller asked for another.
    `edge_url` is the Edge whose sandboxes are used ("": one of this process).
    """

    directory: Path
    make_job: Callable[[Sequence[Task]], Job]
    load_tasks: Callable[[], Sequence[Task]]
    check_logged: Callable[[Job], None]
    resume: bool
    config: RolloutConfig
    edge_url: str = ""


@dataclass(frozen=True)
class Outcome:
    """The figures, whether there was anything to do, and the signal that stopped the run early, if one did.

    There are none of a run that was stopped before it began.
    """

    summary: Summary | None
    has_worked: bool
    stopped_by: signal.Signals | None


def holds_run(directory: Path) -> bool:
    """True if there is a log with at least one record.

    RequestError if the place is taken by something else: results whose log is gone, or other files.
    """
    log = directory / "wal"
    if log.is_dir() and next(iter(wal.read(log)), None) is not None:
        return True
    if (directory / SUMMARY).exists():
        raise RequestError(f"{directory} holds results but no log: move them away, or choose another --out")
    if log.is_dir() and any(not wal.is_log_file(path.name) for path in log.iterdir()):
        raise RequestError(f"{log} holds files that are not a log's: choose another --out")
    return False


def edge_of(directory: Path) -> str:
    """The URL of the Edge that the run there was begun with; "" if it has none, or there is no run."""
    if not holds_run(directory):
        return ""
    events = (event for _, event in journal.replay(directory / "wal"))
    return next((event.job.edge_url for event in events if isinstance(event, JobSubmitted)), "")


async def run_batch(batch: Batch, draw: Callable[[RolloutService, float], None]) -> Outcome:
    """Run or resume to the end; `draw(service, seconds)` is called a few times a second.

    SIGINT and SIGTERM stop the run where it is, also while it waits for its engine, with everything that was logged
    kept.
    Raises the typed errors of the rooms below (TaskError, RequestError, HostUnfitError, WalError ...).
    """
    is_begun = holds_run(batch.directory)
    if is_begun and not batch.resume:
        raise RequestError(f"{batch.directory} holds a run already: add --resume to finish it, or choose another --out")
    began = time.monotonic()
    asked = None if is_begun else _ask(batch)
    stopped = stop_signal()  # from here on nothing lives that an end in order would not destroy
    async with make_service(batch.directory, batch.config, batch.edge_url) as service:
        if (logged := service.ledger.jobs.get(REQUEST_ID)) is not None:
            batch.check_logged(logged)
        elif service.ledger.jobs:
            raise RequestError(f"{batch.directory} holds the jobs of a server: resume them with dsec serve")
        has_ended = logged is not None and service.ledger.is_ended(REQUEST_ID) and not holds_edge(batch.directory)
        is_up = has_ended or await done_before(stopped, service.start())
        if logged is None and not is_up:
            return Outcome(None, False, stopped.result())
        if logged is None:  # only now: what a host or an Edge refuses was never begun
            await service.submit(*(asked or _ask(batch)))
        has_worked = service.running_count > 0
        waiting = asyncio.create_task(service.wait(REQUEST_ID))
        ends: list[asyncio.Future[Any]] = [waiting, stopped]
        while not any(end.done() for end in ends):
            draw(service, time.monotonic() - began)
            await asyncio.wait(ends, timeout=_DRAW_INTERVAL_S, return_when=asyncio.FIRST_COMPLETED)
        if stopped.done():
            waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting
        draw(service, time.monotonic() - began)
        if has_worked:
            await service.note(JobWorked(REQUEST_ID, time.monotonic() - began))
        summary = summarise(service.ledger)
    write_results(batch.directory, service, summary)
    return Outcome(summary, has_worked, stopped.result() if stopped.done() else None)


async def run_in_process(
    directory: Path,
    tasks: Sequence[str | Path],
    *,
    group_size: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    thinking: Thinking = "high",
    limits: Limits | None = None,
    config: RolloutConfig | None = None,
    edge_url: str = "",
) -> AsyncGenerator[TrajectoryRecord, None]:
    """Roll out tasks (names of bundled ones, or folders) in this process; yields each rollout that has ended.

    Without `limits` a rollout has the budgets of its mode (`rollout.modes`).
    The log lies in `directory`; asking for the same again there goes on where it stood, and what had
    ended comes at once.  A rollout that the service failed is not yielded: the ledger names it.
    Raises the typed errors of the rooms below, RequestError if the directory holds another request.
    """
    loaded = [load_task(task) if isinstance(task, Path) else load_bundled([task])[0] for task in tasks]
    check_packages(loaded)
    sampling = Sampling(temperature=temperature, seed=seed)
    asked = Job(request_id=REQUEST_ID, sampling=sampling, thinking=thinking, limits=limits or limits_of(thinking))
    job = make_job(asked, loaded, group_size=group_size)
    async with make_service(directory, config or RolloutConfig(), edge_url) as service:
        if service.ledger.jobs:
            await service.submit(job, loaded)  # refuses another request before anything goes on
        await service.start()
        await service.submit(job, loaded)  # only now: what a host or an Edge refuses was never begun
        ended = [member for member, _, _ in service.ledger.members(REQUEST_ID) if service.ledger.is_done(member)]
        async with aclosing(service.watch(REQUEST_ID)) as events:
            for rollout_id in ended:
                yield trajectory_record(service.ledger, rollout_id)
            async for _, event in events:
                if isinstance(event, RolloutFinished):
                    yield trajectory_record(service.ledger, event.rollout_id)
        await service.wait(REQUEST_ID)


def _ask(batch: Batch) -> tuple[Job, Sequence[Task]]:
    """The job of a new run, checked before anything is made on disk."""
    tasks = batch.load_tasks()
    check_packages(tasks)
    return batch.make_job(tasks), tasks


def write_results(directory: Path, service: RolloutService, summary: Summary) -> None:
    """Derive `trajectories.arrow` and `summary.json` from the ledger; each appears whole or not at all.

    ResultsError if the disk does not take them; nothing half written is left.
    """
    records = (trajectory_record(service.ledger, rollout_id) for rollout_id in sorted(service.ledger.rollouts))
    from rollout.export import arrow  # loads pyarrow, which a run does not need before its end

    scratch = directory / f".{SUMMARY}.{os.getpid()}"
    try:
        arrow.write(directory / TRAJECTORIES, records)
        try:
            scratch.write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=1) + b"\n")
            scratch.replace(directory / SUMMARY)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise ResultsError(
            f"cannot write results to {directory}: {error.strerror or error}; the log is whole, run again with --resume"
        ) from error
