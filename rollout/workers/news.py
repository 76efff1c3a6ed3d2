"""What the index has not been told yet of the logs that a worker owns.

Events come in the order of each log; the newest word on a job or a rollout replaces the one before, so what waits
while the database is away is bounded by what the logs hold.

See: rollout/workers/index.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from rollout import events
from rollout.events import Event, PolicyUpdated
from rollout.ledger import Ledger
from rollout.workers.index import Index, RolloutRow
from rollout.workers.partitions import PUBLISHED_COUNT_MAX, row_of


class News:
    """What changed, by partition."""

    def __init__(self, index: Index) -> None:
        """Nothing did."""
        self._index = index
        self._rows: dict[str, RolloutRow] = {}
        self._jobs: dict[str, dict[str, bool]] = {}
        """Partition -> request id -> whether its log holds the job."""
        self._policy: PolicyUpdated | None = None

    @property
    def rows_count(self) -> int:
        """Rollouts that stand otherwise than the index says."""
        return len(self._rows)

    def add(self, partition: str, ledger: Ledger, request_ids: Iterable[str]) -> None:
        """A log was opened; of `request_ids`, which the index has there, it may hold some no longer."""
        jobs = {request_id: request_id in ledger.jobs for request_id in {*ledger.jobs, *request_ids}}
        self._jobs.setdefault(partition, {}).update(jobs)
        self._rows.update((id_, row_of(ledger, partition, id_)) for id_ in ledger.rollouts)
        self._policy = ledger.policy or self._policy

    def observe(self, partition: str, ledger: Ledger, event: Event) -> None:
        """An event is in a log, and folded."""
        match event:
            case events.JobSubmitted():
                self._jobs.setdefault(partition, {})[event.job.request_id] = True
            case PolicyUpdated():
                self._policy = event
            case events.RolloutsAcknowledged(rollout_ids=rollout_ids):
                for request_id in {each.partition("/")[0] for each in rollout_ids} - ledger.jobs.keys():
                    self._jobs.setdefault(partition, {})[request_id] = False
            case (
                events.RolloutOpened(rollout_id=rollout_id)
                | events.RolloutResumed(rollout_id=rollout_id)
                | events.Preempted(rollout_id=rollout_id)
                | events.InfraFailed(rollout_id=rollout_id)
                | events.RolloutFinished(rollout_id=rollout_id)
            ):
                self._rows[rollout_id] = row_of(ledger, partition, rollout_id)

    async def tell_policy(self) -> None:
        """Tell the index the newest weights."""
        if (policy := self._policy) is not None:
            await self._index.set_policy(policy)
            self._policy = None if self._policy is policy else self._policy

    async def tell(self, rows_count_max: int = PUBLISHED_COUNT_MAX) -> None:
        """Tell the index some of it; what it did not take stays to be told."""
        for partition, jobs in list(self._jobs.items()):
            some = dict(islice(jobs.items(), PUBLISHED_COUNT_MAX))
            gone = {request_id for request_id, is_there in some.items() if not is_there}
            for rollout_id in [each.rollout_id for each in self._rows.values() if each.request_id in gone]:
                del self._rows[rollout_id]
            if gone:
                await self._index.forget(partition, gone)
            await self._index.publish(partition, some.keys() - gone, ())
            for request_id, is_there in some.items():
                if jobs.get(request_id) is is_there:  # else it changed meanwhile
                    del jobs[request_id]
            if not jobs:
                del self._jobs[partition]
        await self.tell_policy()
        rows = list(islice(self._rows.values(), rows_count_max))
        if rows:
            await self._index.publish("", (), rows)
        for row in rows:
            if self._rows.get(row.rollout_id) is row:
                del self._rows[row.rollout_id]
