"""What a client gets back: records as the service has them, per-token fields as arrays, groups whole or with reasons.

Arrays are `array.array`, which numpy and torch take without a copy (`numpy.asarray`, `torch.frombuffer`).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import msgspec

from rollout.pb.v1 import rollout_pb2 as pb
from rollout.record import TrajectoryRecord
from rollout.rpc.messages import plain


@dataclass(frozen=True)
class Trajectory:
    """One rollout: `record` has every field of docs/formats/trajectory.md."""

    record: TrajectoryRecord

    @property
    def rollout_id(self) -> str:
        """Its id in the log."""
        return self.record.rollout_id

    @property
    def reward(self) -> float | None:
        """None is unset, which is not 0."""
        return self.record.reward.value

    @property
    def finish_reason(self) -> str | None:
        """Why it ended; None: it has not."""
        return self.record.finish_reason

    @cached_property
    def token_ids(self) -> array[int]:
        """u32, the whole context as the model saw it."""
        return array("I", self.record.token_ids)

    @cached_property
    def logprobs(self) -> array[float]:
        """f32 for each token; NaN where the token was not sampled."""
        return array("f", (math.nan if value is None else value for value in self.record.logprobs))

    @cached_property
    def topk(self) -> tuple[array[int], array[int], array[float]]:
        """Offsets (u32, one more than tokens), ids (u32), logprobs (f32); those of token i lie between two offsets."""
        record = self.record
        return array("I", record.topk_offsets), array("I", record.topk_ids), array("f", record.topk_logprobs)

    @cached_property
    def sampling_mask(self) -> tuple[array[int], array[int]]:
        """Offsets and the ids that top-k and top-p kept, as `topk` has them; none where nothing was cut."""
        return array("I", self.record.mask_offsets), array("I", self.record.mask_ids)

    @cached_property
    def loss_mask(self) -> array[int]:
        """u8 for each token: 1 where the model drew it."""
        return array("B", b"".join(bytes([span.trainable]) * span.length for span in self.record.spans))


@dataclass(frozen=True)
class Group:
    """All rollouts of one prompt, by index; None where a member has no record, and `missing_reasons` says why.

    `missing_reasons` also names members that ended without a reward.
    """

    group_id: str
    members: tuple[Trajectory | None, ...]
    missing_reasons: Mapping[int, str] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether every member has a reward."""
        return not self.missing_reasons

    @property
    def trajectories(self) -> tuple[Trajectory, ...]:
        """The members that have ended."""
        return tuple(member for member in self.members if member is not None)

    @property
    def rewards(self) -> tuple[float | None, ...]:
        """By index; None where there is none."""
        return tuple(member.reward if member else None for member in self.members)


@dataclass(frozen=True)
class Update:
    """Something that happened: the `what` of the protocol with its fields; `finished` brings the trajectory.

    `group` is set where this was the last event that its group waited for.
    """

    event: int
    rollout_id: str
    what: str
    fields: Mapping[str, Any]
    trajectory: Trajectory | None = None
    group: Mapping[str, Any] | None = None


def trajectory_of(message: pb.Trajectory) -> Trajectory:
    """The record that a message carries; fields that were not asked for are empty."""
    fields = plain(message, keeps_unset=True)
    fields["logprobs"] = [None if math.isnan(value) else value for value in message.logprobs]
    for call in fields["tool_calls"]:
        call["arguments"] = msgspec.json.decode(call.pop("arguments_json"))
    return Trajectory(msgspec.convert(fields, TrajectoryRecord))


def update_of(message: pb.Update) -> Update:
    """A whole update."""
    what = str(message.WhichOneof("what"))
    return Update(
        event=message.event,
        rollout_id=message.rollout_id,
        what=what,
        fields={} if what == "finished" else plain(getattr(message, what)),
        trajectory=trajectory_of(message.finished) if what == "finished" else None,
        group=plain(message.group_finished) if message.HasField("group_finished") else None,
    )
