"""What people see in a terminal: the live table of a run, its summary, and a readable trajectory.

Text from a model or a sandbox is hostile: control characters are shown, never sent to the terminal.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import time
from collections import deque
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dsec.terminal import counted, visible
from rollout.commands.summary import SOLVED_REWARD, Summary, TaskRow
from rollout.ledger import Ledger
from rollout.record import TrajectoryRecord
from rollout.service import RolloutService
from rollout.state import Phase

_RATE_WINDOW_S = 3.0
_BAR_WIDTH = 60
_FILE_WIDTH = 160
LINE_INTERVAL_S = 30.0


def make_console() -> Console:
    """The console on stdout; a pipe or a file is as wide as COLUMNS says, and not squeezed into 80 without it."""
    return Console() if sys.stdout.isatty() else Console(width=shutil.get_terminal_size((_FILE_WIDTH, 1)).columns)


def make_table(title: str, *columns: str, texts: tuple[str, ...]) -> Table:
    """A table whose figures keep their place: where there is no room, `texts` are folded."""
    table = Table(title=title, title_justify="left")
    for name in columns:
        if name in texts:
            table.add_column(name, overflow="fold", min_width=8)
        else:
            table.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    return table


class LiveTable:
    """Figures of a running service; keeps a few seconds of history for the token rate."""

    def __init__(self) -> None:
        """Nothing was seen yet."""
        self._seen: deque[tuple[float, int]] = deque()
        self._next_line_s = LINE_INTERVAL_S

    def line(self, service: RolloutService, elapsed_s: float) -> str | None:
        """For a log file: one line every LINE_INTERVAL_S seconds, None in between."""
        if elapsed_s < self._next_line_s:
            return None
        self._next_line_s = elapsed_s + LINE_INTERVAL_S
        counts = summarise_quickly(service.ledger)
        return (
            f"dsec run: {elapsed_s:.0f} s, {counts['done']} of {counts['rollouts']} rollouts done, "
            f"{counts['tokens']} tokens, {counts['solved']} solved, {counts['failed']} infrastructure failures"
        )

    def render(self, service: RolloutService, elapsed_s: float) -> RenderableType:
        """One table: tasks, rollouts, turns, tokens and tokens/s, sandboxes alive, solved; a bar of what is done."""
        summary = summarise_quickly(service.ledger)
        tokens = summary["tokens"]
        now = time.monotonic()
        self._seen.append((now, tokens))
        while len(self._seen) > 2 and now - self._seen[0][0] > _RATE_WINDOW_S:
            self._seen.popleft()
        (then, before), span = self._seen[0], max(now - self._seen[0][0], 1e-9)
        rate = (tokens - before) / span if now > then else 0.0
        names = ("tasks", "done", "turns", "tokens", "tokens/s", "sandboxes", "solved", "failures")
        table = make_table(f"dsec run  {elapsed_s:6.1f} s", *names, texts=())
        table.add_row(
            str(summary["tasks"]),
            f"{summary['done']}/{summary['rollouts']}",
            str(summary["turns"]),
            str(tokens),
            f"{rate:.0f}",
            str(service.sandboxes.count),
            f"[green]{summary['solved']}[/]",
            f"[red]{summary['failed']}[/]" if summary["failed"] else "0",
        )
        done, total = summary["done"], summary["rollouts"]
        bar = ProgressBar(total, done, width=_BAR_WIDTH, complete_style="green", finished_style="green")
        return Group(table, bar)


def summarise_quickly(ledger: Ledger) -> dict[str, int]:
    """The few counts that the live table shows."""
    states = ledger.rollouts.values()
    groups = [group for job in ledger.jobs.values() for group in job.groups]
    return {
        "tasks": len({group.task for group in groups}),
        "rollouts": sum(group.size for group in groups),
        "done": sum(state.phase is Phase.DONE for state in states),
        "turns": sum(len(state.turns) for state in states),
        "tokens": sum(state.sampled_count for state in states),
        "solved": sum(state.judged is not None and state.judged.reward >= SOLVED_REWARD for state in states),
        "failed": sum(state.failure is not None for state in states),
    }


def print_summary(
    console: Console, summary: Summary, directory: Path, program: str, look: str, again: str, *, has_worked: bool = True
) -> None:
    """The end of a run: figures, what was not solved, where results lie, what to try next.

    `look` is the command that shows its trajectories, `again` the one that finishes it.
    """
    share = f" ({summary.solved / summary.finished:.1%})" if 0 < summary.finished == summary.rollouts else ""
    waited = summary.sampling_s + summary.tools_s + summary.log_s
    table = Table.grid(padding=(0, 2))
    table.add_row("solved", f"[bold green]{summary.solved}[/] of {summary.finished} rollouts{share}")
    if summary.finished < summary.rollouts:
        table.add_row("unfinished", f"[yellow]{summary.rollouts - summary.finished}[/] of {summary.rollouts} rollouts")
    means = [row.reward_mean for row in summary.per_task if row.reward_mean is not None]
    table.add_row(
        "reward", f"mean {sum(means) / len(means):.3g} over {counted(len(means), 'task')}" if means else "none yet"
    )
    turns = f"{counted(summary.turns, 'turn')}, {counted(summary.tool_calls, 'tool call')}"
    table.add_row("tokens", f"{summary.tokens} sampled in {turns}")
    already = "" if has_worked else "   (it had ended already: nothing was run now)"
    table.add_row("wall time", f"{summary.wall_s:.1f} s{already}")
    if waited:
        table.add_row(
            "waited for",
            f"sampling {summary.sampling_s / waited:.0%}, tools {summary.tools_s / waited:.0%}, "
            f"log {summary.log_s / waited:.0%}  (of {waited:.1f} rollout-seconds)",
        )
    exact = f"{summary.tokens_regenerated} tokens regenerated, {summary.commands_run_twice} commands run twice"
    table.add_row("exactness", exact)
    if summary.resumes:
        table.add_row(
            "recovery",
            f"{counted(summary.resumes, 'rollout')} resumed: {summary.tokens_replayed} context tokens fed again, "
            f"{summary.commands_replayed} commands (set-up included) applied again and compared",
        )
    if summary.infra_failures:
        who = counted(summary.infra_failures, "rollout")
        failed = f"{who} got no verdict, through no answer of the model; reward unset:"
        table.add_row("[red]failures[/]", Text(failed, style="red"))
        for rollout_id, message in list(summary.infra_failure_messages.items())[:5]:
            table.add_row("", Text(visible(f"{rollout_id}: {message}")))
    table.add_row("results", Text(f"{directory}/summary.json, {directory}/trajectories.arrow, {directory}/wal/"))
    console.print(Panel(table, title="dsec run", title_align="left", expand=False))
    console.print(_tasks_table(summary.per_task))
    example = shlex.quote(next((row.task for row in summary.per_task if row.tokens), summary.per_task[0].task))
    when = "after a kill -9 at any moment: finish the run, nothing sampled or run twice"
    if summary.infra_failures:
        when = "once the cause is mended: finish what failed (a corrected task is another run: give it another --out)"
    console.print(
        Text.assemble(
            ("try next\n", "bold"),
            f"  {look} {example}\n",
            ("    look at a trajectory\n", "dim"),
            f"  {again}\n",
            (f"    {when}\n", "dim"),
            f"  {program} run path/to/your/task --out runs/yours\n",
            ("    run a task of your own (a folder in Harbor's format)", "dim"),
        ),
        soft_wrap=True,  # what may be pasted is one line
    )


def _tasks_table(rows: list[TaskRow]) -> Table:
    """Tasks by family: the name without the numbers at its end."""
    columns = ("family", "solved", "of", "reward", "tokens", "turns", "ended")
    table = make_table("by task family", *columns, texts=("family", "ended"))
    families: dict[str, list[TaskRow]] = {}
    for row in rows:
        families.setdefault(re.sub(r"(-\d+)+$", "", row.task), []).append(row)
    for family, members in sorted(families.items()):
        ended: dict[str, int] = {}
        for row in members:
            for reason, count in row.finish_reasons.items():
                ended[reason] = ended.get(reason, 0) + count
        means = [row.reward_mean for row in members if row.reward_mean is not None]
        if unfinished := sum(row.rollouts - row.finished for row in members):
            ended["unfinished"] = unfinished
        table.add_row(
            visible(family if len(members) > 1 else members[0].task),
            str(sum(row.solved for row in members)),
            str(sum(row.rollouts for row in members)),
            f"{sum(means) / len(means):.2f}" if means else "-",
            str(sum(row.tokens for row in members)),
            str(sum(row.turns for row in members)),
            ", ".join(f"{reason} {count}" for reason, count in sorted(ended.items())),
        )
    return table


def render_overview(records: list[TrajectoryRecord]) -> Table:
    """One line for each rollout."""
    columns = ("rollout", "reward", "ended", "turns", "calls", "tokens", "replayed")
    table = make_table("rollouts", *columns, texts=("rollout", "ended"))
    for record in records:
        table.add_row(
            visible(record.rollout_id),
            _reward(record),
            _ending(record),
            str(len(record.turns)),
            str(len(record.tool_calls)),
            str(record.tokens_sampled),
            str(record.commands_replayed),
        )
    return table


def render_trajectory(record: TrajectoryRecord, instruction: str) -> RenderableType:
    """A trajectory for reading: request, then thinking, calls and results turn by turn, then the reward."""
    parts: list[RenderableType] = [
        Text.assemble(("rollout ", "bold"), visible(record.rollout_id), f"   agent {record.agent}"),
        Panel(Text(visible(instruction)), title="request", title_align="left"),
    ]
    for number, turn in enumerate(record.turns):
        text = Text()
        if turn.reasoning:
            text.append(visible(turn.reasoning) + "\n", style="dim italic")
        if turn.content:
            text.append(visible(turn.content) + "\n")
        if turn.parse_error:
            text.append(visible(turn.parse_error) + "\n", style="red")
        for call in record.tool_calls:
            if call.turn == number:
                arguments = ", ".join(f"{name}={visible(str(value))!r}" for name, value in call.arguments.items())
                text.append(f"{visible(call.name)}({arguments})\n", style="cyan")
                text.append(_indent(visible(call.result)) + "\n", style="yellow" if call.exit else "green")
        text.rstrip()
        title = f"turn {number}  {turn.finish_reason}  {turn.length} tokens"
        parts.append(Panel(text, title=title, title_align="left"))
    for title, output in (("solution", record.solution_output), ("tests", record.verifier_output)):
        if output:
            parts.append(Panel(Text(visible(output)), title=title, title_align="left"))
    parts.append(Text.assemble(("reward ", "bold"), _reward(record), f"   ended {_ending(record)}"))
    if record.infra_failure:
        parts.append(Text(visible(record.infra_failure["message"]), style="red"))
    return Group(*parts)


def _reward(record: TrajectoryRecord) -> str:
    return "unset" if record.reward.value is None else f"{record.reward.value:g}"


def _ending(record: TrajectoryRecord) -> str:
    if record.infra_failure:
        return f"infrastructure: {record.infra_failure['code']}"
    return record.finish_reason or "not finished"


def _indent(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.split("\n"))
