"""What logs say about rollouts that were killed again and again, counted record by record; for `fault_storm.py`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from dsec.trajectory import CommandFinished, CommandRefused, CommandReplayed, CommandStarted
from rollout.events import FinishReason, InfraFailed
from rollout.journal import replay
from rollout.ledger import Ledger
from rollout.main import load_tokenizer
from rollout.record import TrajectoryRecord, trajectory_record
from wal.tokens import TokensAppended


class Logs:
    """What the logs below a root say, counted record by record."""

    def __init__(self, root: Path) -> None:
        self.records: dict[str, TrajectoryRecord] = {}
        self.problems: list[str] = []
        self.tokens_twice = self.commands_twice = self.commands = 0
        self.failures: Counter[str] = Counter()
        for log in sorted(root.glob("*/wal")):
            self._count(log)
            ledger = Ledger.read(log, load_tokenizer())
            for rollout_id in ledger.rollouts:
                if rollout_id in self.records:
                    self.problems.append(f"{rollout_id} is in two logs")
                self.records[rollout_id] = trajectory_record(ledger, rollout_id)

    def _count(self, log: Path) -> None:
        drawn: dict[str, dict[int, int]] = {}
        applied, finished = set[Any](), set[Any]()
        for _, event in replay(log):
            match event:
                case TokensAppended():
                    mine = drawn.setdefault(event.request, {})
                    new = dict(enumerate(event.token_ids, event.start))
                    self.tokens_twice += len(mine.keys() & new.keys())
                    mine |= new
                case CommandStarted() | CommandReplayed():
                    place = (event.session, event.incarnation, event.key)
                    self.commands_twice += place in applied
                    self.commands += place not in applied
                    applied.add(place)
                case CommandRefused():
                    applied.discard((event.session, event.incarnation, event.key))
                case CommandFinished():
                    self.commands_twice += (event.session, event.key) in finished
                    finished.add((event.session, event.key))
                case InfraFailed():
                    self.failures[f"{event.code} ({event.fault})"] += 1

    def compare(self, quiet: dict[str, TrajectoryRecord]) -> None:
        """Say what is not as in a run that nothing happened to."""
        if self.records.keys() != quiet.keys():
            self.problems.append(f"not the same rollouts: {sorted(self.records.keys() ^ quiet.keys())}")
        for name, record in self.records.items():
            calm = quiet.get(name, record)
            for field in ("token_ids", "finish_reason", "reward", "spans"):
                if getattr(record, field) != getattr(calm, field):
                    self.problems.append(f"{name}: {field} is {getattr(record, field)}, was {getattr(calm, field)}")
            if record.wal.digest != calm.wal.digest:
                self.problems.append(f"{name}: the log's digest of what was drawn differs")
            if record.infra_failure or record.finish_reason not in set(FinishReason):
                self.problems.append(f"{name}: ended as {record.finish_reason}, {record.infra_failure}")


def holes(root: Path, records: dict[str, TrajectoryRecord], group_size: int) -> tuple[list[str], list[dict[str, Any]]]:
    """What is wrong with the groups that the clients were given, and these."""
    problems, groups, seen = [], [], set[Any]()
    for line in (line for file in root.glob("told-*") for line in file.read_text().splitlines(keepends=True)):
        if not line.endswith("\n"):
            continue  # a client was killed in the middle of it
        said = json.loads(line)
        groups.append(said)
        if (place := (said["life"], said["group"])) in seen:
            problems.append(f"{said['group']} was given twice to one client")
        seen.add(place)
        if len(said["members"]) != group_size:
            problems.append(f"{said['group']} has {len(said['members'])} members")
        for index, member in enumerate(said["members"]):
            reason, final = said["missing"].get(str(index)), records.get(f"{said['group']}.{index}")
            if member is None and reason in (None, "", "PENDING"):
                problems.append(f"{said['group']}.{index}: a hole without a reason ({reason})")
            if member and final and (member[0], member[1]) != (list(final.token_ids), final.finish_reason):
                problems.append(f"{said['group']}.{index}: a client was given something else")
    missing = {record.group.group_id for record in records.values()} - {each["group"] for each in groups}
    return problems + [f"no client was given {name}" for name in sorted(missing)], groups
