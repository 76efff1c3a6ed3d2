"""What a trainer opens: finished rollouts of one or more directories, planned by metadata, read by mini-batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rollout.errors import NotFoundError
from rollout.export.side_channels import Array, read_channel
from rollout.loader.batch import Batch, make_block
from rollout.loader.columns import read_numbers
from rollout.loader.metadata import Column, Metadata
from rollout.loader.plan import Layout, Plan, Rules, make_plan


class Dataset:
    """The rollouts that were there when it was opened, also while more are written.  Use `Dataset.open`."""

    def __init__(self, metadata: Metadata) -> None:
        """Tokens are read when they are asked for."""
        self.metadata = metadata

    @classmethod
    def open(cls, directories: Path | str | Sequence[Path | str], counts: Sequence[int] | None = None) -> Dataset:
        """Load the metadata of directories of shards whole.

        `counts` (another process's `metadata.counts`) takes no more rollouts of each than that had, so that all see
        the same.  ShardError if one holds no shards, or fewer; RequestError if one is given twice.
        """
        named = [directories] if isinstance(directories, Path | str) else directories
        return cls(Metadata([Path(each) for each in named], counts))

    def __len__(self) -> int:
        return len(self.metadata)

    def plan(
        self,
        *,
        seed: int,
        epoch: int,
        token_budget: int,
        world_size: int = 1,
        step_units_count: int = 64,
        whole_groups: bool = True,
        drops_tail: bool = False,
        rules: Rules | None = None,
    ) -> Plan:
        """The steps of an epoch (`Layout` says what the arguments are); equal in every process.  RequestError."""
        layout = Layout(
            seed=seed,
            epoch=epoch,
            token_budget=token_budget,
            world_size=world_size,
            step_units_count=step_units_count,
            whole_groups=whole_groups,
            drops_tail=drops_tail,
        )
        return make_plan(self.metadata, layout, rules or Rules())

    def batches(self, plan: Plan, rank: int = 0, first_step: int = 0) -> Iterator[Batch]:
        """The mini-batches of one rank, each read when it is asked for and kept for as long as its arrays are.

        Ranks of one node share one copy by a `Node`.  ShardError for a damaged shard.
        """
        for step in range(first_step, len(plan)):
            fd, _ = make_block(self.metadata, plan, step, [rank], "alone")
            try:
                batch = Batch(fd, rank)
            finally:
                os.close(fd)
            yield batch
            del batch

    def topk(self, row: int) -> tuple[Column, Column, Column]:
        """Offsets, one more than tokens, ids and logprobs: token i has those between two offsets.

        NotFoundError if its job did not ask for them, ShardError.
        """
        offsets, ids, logprobs = self._ragged(row, "topk_offsets", "topk_ids", "topk_logprobs")
        return offsets, ids, logprobs

    def sampling_mask(self, row: int) -> tuple[Column, Column]:
        """Offsets and the ids that top-k and top-p kept, as `topk` has them; none where nothing was cut."""
        offsets, ids = self._ragged(row, "mask_offsets", "mask_ids")
        return offsets, ids

    def _ragged(self, row: int, *names: str) -> list[Column]:
        columns = read_numbers(self.metadata, row, names)
        if not len(columns[0]):
            raise NotFoundError(f"{self.metadata.rollout_ids[row]} has no {names[-1]}: its job did not ask for it")
        return columns

    def side_channel(self, row: int, name: str) -> Array:
        """An array of a rollout that is too big for its record, mapped.  NotFoundError, ShardError."""
        for channel in self.metadata.side_channels.get(row, ()):
            if channel.name == name:
                return read_channel(self.metadata.places[self.metadata.place[row]].directory, channel)
        raise NotFoundError(f"{self.metadata.rollout_ids[row]} has no side channel {name!r}")
