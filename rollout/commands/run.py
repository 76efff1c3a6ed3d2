"""Commands for runs: `dsec run`, `show` and `log`."""

from __future__ import annotations

import asyncio
import functools
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import click
import msgspec
from click.core import ParameterSource
from rich.console import Console
from rich.live import Live

import wal
import wal.__main__ as wal_cli
from dsec import trajectory
from dsec.terminal import counted
from rollout import journal, steps
from rollout.batch import REQUEST_ID, Batch, Outcome, edge_of, holds_run, run_batch
from rollout.bench.tasks import Task
from rollout.commands.screen import LiveTable, make_console, print_summary, render_overview, render_trajectory
from rollout.commands.summary import SOLVED_REWARD
from rollout.config import RolloutConfig
from rollout.engine import Sampling
from rollout.errors import JournalError, RequestError
from rollout.jobs import check_sampling, load_any, make_job
from rollout.ledger import Ledger
from rollout.main import load_tokenizer
from rollout.modes import limits_of
from rollout.record import trajectory_record
from rollout.request import AgentKind, Job, Thinking
from rollout.service import RolloutService

_LOGGED_OPTIONS: dict[str, Callable[[Job], object]] = {
    "agent": lambda job: job.agent,
    "group_size": lambda job: job.groups[0].size,
    "seed": lambda job: job.sampling.seed,
    "temperature": lambda job: job.sampling.temperature,
    "thinking": lambda job: job.thinking,
    "turns_max": lambda job: job.limits.turns_count_max,
}
"""Options that a run keeps for its whole life, and where its job has them."""

_NAMED_MAX = 8

RUN_EXAMPLE = """\b
Examples:
  dsec run --out runs/first
  dsec run my/tasks --group-size 8 --temperature 1 --seed 7 --out runs/second
  dsec run --resume --out runs/second
  dsec run --agent oracle --out runs/oracle --json
  dsec run --edge unix:/run/dsec/edge.sock --out runs/shared"""

EDGE_HELP = (
    "Take the sandboxes of a running `dsec edge serve`: unix:PATH, tcp:HOST:PORT or tls:HOST:PORT, the token in "
    "DSEC_API_KEY.  [default: an Edge of its own, in this process]"
)

ENGINE_HELP = (
    "Draw with a vLLM server, http://HOST:PORT, its key in DSEC_ENGINE_KEY; several are one engine (docs/serving.md).  "
    "[default: DSEC_ENGINES, or embedded, the one in this process]"
)
tokenizer_option = click.option(
    "--tokenizer",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder with the tokenizer.json of the model.  [default: DSEC_TOKENIZER, or the embedded one's]",
)

SHOW_EXAMPLE = """\b
Examples:
  dsec show runs/first
  dsec show runs/first bug-1-000
  dsec show runs/first --json | jq .reward.value"""


@click.command(short_help="Roll the model out on tasks.", epilog=RUN_EXAMPLE)
@click.argument("tasks_dir", required=False, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Run directory  [default: runs/TIME]")
@click.option(
    "--resume",
    is_flag=True,
    help="Finish the run that --out holds, with its own tasks and options (or start it, if it holds none).",
)
@click.option(
    "--agent",
    type=click.Choice(["model", "oracle", "nop"]),
    default="model",
    show_default=True,
    help="oracle runs the task's own solution, nop does nothing: a sound task gives them 1 and 0.",
)
@click.option("--group-size", type=click.IntRange(1, 1024), default=1, show_default=True, help="Rollouts of each task.")
@click.option("--concurrency", type=click.IntRange(1, 1024), help="Rollouts at once.  [default: 16]")
@click.option("--edge", "edge_url", metavar="URL", help=EDGE_HELP + " A resume without it takes the run's own.")
@click.option("--engine", "engines", metavar="URL", multiple=True, help=ENGINE_HELP)
@tokenizer_option
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampling; the same seed, the same tokens.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy; else 0.001 to 10.")
@click.option(
    "--thinking",
    type=click.Choice(["none", "high", "max"]),
    default="high",
    show_default=True,
    help="How much the model thinks, and what a turn may spend on it: docs/training.md, Modes.",
)
@click.option(
    "--turns-max", type=click.IntRange(min=1), default=16, show_default=True, help="Model turns of one rollout."
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object, nothing else.")
def run(
    tasks_dir: Path | None,
    out: Path | None,
    resume: bool,
    agent: AgentKind,
    group_size: int,
    concurrency: int | None,
    edge_url: str | None,
    engines: tuple[str, ...],
    tokenizer: Path | None,
    seed: int,
    temperature: float,
    thinking: Thinking,
    turns_max: int,
    as_json: bool,
) -> None:
    """Roll the model out on tasks, each in a sandbox.

    TASKS_DIR is a task folder, a folder of them, or the name of a bundled task; without it all bundled tasks run.

    A task is a folder in Harbor's format (docs/formats/task.md).  Results lie in the run directory:
    summary.json, trajectories.arrow, and the log in wal/.
    """
    if resume and out is None:
        raise RequestError("--resume needs --out: which run shall be finished?")
    if out == Path():
        raise RequestError("--out names no directory of its own (an unset variable?): say for example --out runs/first")
    sampling = _sampling(temperature, seed)
    directory = out or Path("runs") / datetime.now(UTC).strftime("%Y%m%d-%H%M%S")

    if edge_url is None:
        edge_url = edge_of(directory) if resume else ""
    if resume and not holds_run(directory):
        what = f"the tasks of {tasks_dir}" if tasks_dir else "all bundled tasks"
        click.echo(f"dsec: {directory} holds no run yet: it begins now, with {what}", err=True)

    def job_for(tasks: Sequence[Task]) -> Job:
        asked = Job(
            request_id=REQUEST_ID,
            agent=agent,
            thinking=thinking,
            sampling=sampling,
            limits=limits_of(thinking, turns_count_max=turns_max),
            edge_url=edge_url,
        )
        return make_job(asked, tasks, group_size=group_size)

    batch = Batch(
        directory=directory,
        make_job=job_for,
        load_tasks=lambda: load_any(tasks_dir),
        check_logged=lambda job: check_same(click.get_current_context(), directory, job),
        resume=resume,
        config=_bounds(given_knobs(concurrency=concurrency, engines=engines, tokenizer=tokenizer), group_size),
        edge_url=edge_url,
    )
    again = " ".join([_program(), shlex.join(["run", "--resume", "--out", str(directory), *_same(engines, tokenizer)])])
    try:
        outcome = _run_live(batch, as_json=as_json)
    except (wal.StorageError, wal.PoisonedError) as error:
        error.add_note(f"finish with: {again}")
        raise
    look = " ".join([_program(), shlex.join(["show", str(directory), *_same((), tokenizer)])])
    _end(outcome, directory, look, again, as_json=as_json)


def _end(outcome: Outcome, directory: Path, look: str, again: str, *, as_json: bool) -> NoReturn:
    """Print how a run ended, and exit; `look` is the command that shows its rollouts, `again` finishes it."""
    summary, stopped_by = outcome.summary, outcome.stopped_by
    if summary is not None and as_json:
        click.echo(msgspec.json.encode(summary))
    elif summary is not None:
        print_summary(make_console(), summary, directory, _program(), look, again, has_worked=outcome.has_worked)
    if stopped_by is not None:
        way_on = f"; finish with: {again}" if summary is not None else " before it began: nothing has run"
        click.echo(f"stopped by {stopped_by.name}{way_on}", err=True)
        sys.exit(128 + stopped_by)
    sys.exit(1 if summary is not None and summary.infra_failures else 0)


def _same(engines: Sequence[str], tokenizer: Path | None) -> list[str]:
    """The options by which another command means the model of this one."""
    named = ["--tokenizer", str(tokenizer)] if tokenizer is not None else []
    return [*(part for url in engines for part in ("--engine", url)), *named]


def _sampling(temperature: float, seed: int) -> Sampling:
    sampling = Sampling(temperature=temperature, seed=seed)
    try:
        check_sampling(sampling)
    except RequestError as error:
        raise RequestError(f"--{error}") from error  # it begins with the option's name
    return sampling


def given_knobs(**options: Any) -> dict[str, Any]:
    """Those that the command line names."""
    return {name: value for name, value in options.items() if value is not None and value != ()}


def _bounds(given: dict[str, Any], group_size: int) -> RolloutConfig:
    """As the environment says, but for what the command line says; where neither does, as one run needs it."""
    config = RolloutConfig(**given)
    own: dict[str, Any] = {"sandboxes_count_max": max(config.concurrency, group_size), "sandboxes_asleep_count_max": 0}
    return RolloutConfig(**given, **{name: own[name] for name in own.keys() - config.model_fields_set})


def _run_live(batch: Batch, *, as_json: bool) -> Outcome:
    """Run to the end, with a table where a terminal can show one, or a line now and then; nothing beside JSON."""
    console = Console(stderr=True)
    table = LiveTable()
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def draw(service: RolloutService, elapsed_s: float) -> None:
            if as_json:
                return
            if console.is_terminal:
                live.update(table.render(service, elapsed_s), refresh=True)
            elif (line := table.line(service, elapsed_s)) is not None:
                click.echo(line, err=True)

        return asyncio.run(run_batch(batch, draw))


def check_same(ctx: click.Context, directory: Path, job: Job) -> None:
    """RequestError if the command line names a value that differs from the run's own; what it leaves out passes."""
    way_out = f"to finish {directory} leave it out; for another run choose another --out"
    for name, logged_of in _LOGGED_OPTIONS.items():
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            given, logged, option = ctx.params[name], logged_of(job), "--" + name.replace("_", "-")
            if given != logged:
                raise RequestError(f"{option} {given}: {directory} was begun with {option} {logged}; {way_out}")
    folder: Path | None = ctx.params["tasks_dir"]
    if folder is not None:
        given_tasks = {task.name: task.digest for task in load_any(folder)}
        logged_tasks = {group.task: group.task_digest for group in job.groups}
        if names := sorted({name for name, _ in given_tasks.items() ^ logged_tasks.items()}):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise RequestError(
                f"TASKS_DIR {folder}: {directory} was begun with other tasks (different: {names[0]}{more}); {way_out}"
            )


@click.command(short_help="Print trajectories of a run.", epilog=SHOW_EXAMPLE)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("rollout", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line for each rollout.")
@tokenizer_option
def show(directory: Path, rollout: str | None, as_json: bool, tokenizer: Path | None) -> None:
    """Print trajectories of a run: all in a table, or ROLLOUT (an id or a task name) turn by turn."""
    ledger = Ledger.read(log_of(directory), load_tokenizer(tokenizer))
    chosen = sorted(ledger.rollouts) if rollout is None else [_resolve(ledger, rollout)]
    records = [trajectory_record(ledger, rollout_id) for rollout_id in chosen]
    if as_json:
        for record in records:
            click.echo(msgspec.json.encode(record))
    elif rollout is None:
        make_console().print(render_overview(records))
        asked_count = sum(group.size for job in ledger.jobs.values() for group in job.groups)
        begun_count = sum(ledger.asks_for(rollout_id) for rollout_id in ledger.rollouts)
        solved_count = sum((record.reward.value or 0) >= SOLVED_REWARD for record in records)
        click.echo(f"{counted(asked_count, 'rollout')}: {solved_count} solved, {asked_count - begun_count} not begun")
        again = shlex.join(["show", str(directory), "ROLLOUT", *_same((), tokenizer)])
        click.echo(f"one of them, turn by turn: {_program()} {again}")
    else:
        make_console().print(render_trajectory(records[0], ledger.tasks[records[0].task_digest].instruction))


@click.command(
    "log",
    short_help="Print the log of a run, record by record.",
    epilog="\b\nExample:\n  dsec log runs/first | head -20",
)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line for each record.")
@click.option("--verify", is_flag=True, help="Only check the log.")
@click.option("--stats", is_flag=True, help="Only print counts and sizes.")
def log_(directory: Path, as_json: bool, verify: bool, stats: bool) -> None:
    """Print the log of a run, record by record, with offsets; exit 1 on corruption."""
    flags = [flag for flag, is_set in (("--json", as_json), ("--verify", verify), ("--stats", stats)) if is_set]
    ours = {kind: functools.partial(_told, kind) for kind in (journal.KIND, trajectory.KIND, steps.KIND)}
    sys.exit(wal_cli.main([str(log_of(directory)), *flags], decoders=ours))


def _told(kind: int, payload: bytes) -> object:
    """A record for printing.  ValueError, which shows it as undecodable."""
    try:
        return msgspec.to_builtins(journal.decode(kind, payload))
    except JournalError as error:
        raise ValueError(str(error)) from error


def _program() -> str:
    """How this program can be called from here: `dsec` if that is what the PATH finds, else its path."""
    own = Path(sys.argv[0]).absolute()
    found = shutil.which("dsec")
    if found is not None and Path(found).resolve() == own.resolve():
        return "dsec"
    return shlex.quote(os.path.relpath(own) if own.is_relative_to(Path.cwd()) else str(own))


def log_of(directory: Path) -> Path:
    """The log in a run directory.  RequestError if there is none; of a root, it names the runs."""
    log = directory if next(directory.glob("*.wal"), None) else directory / "wal"
    if log.is_dir():
        return log
    if runs := sorted(str(inner.parent) for inner in directory.glob("*/wal")):
        more = f" and {len(runs) - _NAMED_MAX} more" if len(runs) > _NAMED_MAX else ""
        raise RequestError(
            f"{directory} is no run but holds some, give one of them: {', '.join(runs[:_NAMED_MAX])}{more}"
        )
    raise RequestError(f"{directory} holds no run: there is no {log}")


def _resolve(ledger: Ledger, name: str) -> str:
    """The rollout that a person means by `name`: an id, its end, or a task with one rollout."""
    found = [i for i in sorted(ledger.rollouts) if f"/{i}".endswith((f"/{name}", f"/{name}.0"))]
    if len(found) != 1:
        waiting = (each for job in ledger.jobs for each, _, _ in ledger.members(job) if each not in ledger.rollouts)
        if not found and any(f"/{each}".endswith((f"/{name}", f"/{name}.0")) for each in waiting):
            raise RequestError(f"{name!r} has not begun: there is nothing to show yet")
        near = found or get_close_matches(name, ledger.rollouts, n=5, cutoff=0.4) or sorted(ledger.rollouts)
        known = ", ".join(sorted(near[:5]))
        raise RequestError(f"{name!r} names {len(found)} rollouts of this log, not one; there are {known} ...")
    return found[0]
