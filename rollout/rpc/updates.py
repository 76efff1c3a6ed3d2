"""What is told of a rollout: durable events and records as the messages of the protocol.

An update is made of one event and of the ledger, never of when it is asked for: whoever attaches
later is told the same.

See: proto/rollout/pb/v1/rollout.proto, "Update".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet

import msgspec

from rollout import events
from rollout.events import RolloutEvent, rollout_of
from rollout.export.manifest import SideChannel
from rollout.ledger import Ledger
from rollout.pb.v1 import rollout_pb2 as pb
from rollout.record import TrajectoryRecord, trajectory_record
from rollout.request import Group
from rollout.rpc.messages import fill, parts
from wal.tokens import TokensAppended

Mask = AbstractSet[int]
_WHAT: dict[type, str] = {
    events.RolloutOpened: "opened",
    events.RolloutResumed: "resumed",
    events.Preempted: "preempted",
    events.KvBroke: "kv_broke",
    events.SandboxPrepared: "sandbox_prepared",
    events.NetworkSwitched: "network_switched",
    TokensAppended: "tokens",
    events.TokensForced: "forced",
    events.ToolFinished: "tool_answered",
    events.SolutionApplied: "solution_applied",
    events.AgentStopped: "agent_stopped",
    events.Judged: "judged",
    events.RolloutFinished: "finished",
    events.InfraFailed: "infra_failed",
}
"""Event -> the field of `Update` that tells it."""


def updates_of(
    lsn: int, told: Iterable[RolloutEvent], ledger: Ledger, mask: Mask, channels: tuple[SideChannel, ...] = ()
) -> list[pb.Update]:
    """The messages that tell a durable record, an end with its side channels; none if it was not asked for."""
    messages = [message for event in told for message in _updates(lsn, event, ledger, mask, channels)]
    if messages:
        messages[-1].is_last = True
    return messages


def _updates(
    lsn: int, event: RolloutEvent, ledger: Ledger, mask: Mask, channels: tuple[SideChannel, ...]
) -> Iterator[pb.Update]:
    if isinstance(event, events.TopLogprobsFound | events.SideChannelsFound):
        return  # they come with the record
    if isinstance(event, TokensAppended | events.TokensForced) and pb.FIELD_LIVE_TOKENS not in mask:
        return
    rollout_id = rollout_of(event)
    if rollout_id not in ledger.rollouts:
        return  # its job was acknowledged meanwhile, and forgotten
    update = pb.Update(event=lsn, rollout_id=rollout_id)
    if isinstance(event, events.RolloutFinished | events.InfraFailed):
        _add_group(update, ledger)
    if isinstance(event, events.RolloutFinished):
        record = trajectory_record(ledger, rollout_id, channels)
        messages = [
            pb.Update(event=lsn, rollout_id=rollout_id, finished=part) for part in trajectory_parts(record, mask)
        ]
        for message in messages:
            message.finished.group.ClearField("missing_reasons")  # they would be those of now, not of this event
        messages[-1].MergeFrom(update)
    else:
        fill(getattr(update, _WHAT[type(event)]), _told(event, ledger, mask))
        getattr(update, _WHAT[type(event)]).SetInParent()
        messages = [update]
    yield from messages


def _told(event: RolloutEvent, ledger: Ledger, mask: Mask) -> object:
    """What a message says of an event beside what stands in it under the same name."""
    if isinstance(event, events.RolloutOpened):
        opened = msgspec.structs.asdict(event)
        prompt = sum(len(segment.token_ids) for segment in event.prompt)
        return opened | {"task": group_of(ledger, event.rollout_id).task, "prompt_tokens_count": prompt}
    if isinstance(event, events.ToolFinished) and pb.FIELD_TEXT not in mask:
        return msgspec.structs.replace(event, observation="")
    return event


def group_of(ledger: Ledger, rollout_id: str) -> Group:
    """The group that an opened rollout belongs to."""
    state = ledger.rollouts[rollout_id]
    return next(group for group in state.job.groups if group.group_id == state.opened.group_id)


def _add_group(update: pb.Update, ledger: Ledger) -> None:
    """Say that the group is finished, if this event was the last that it waited for."""
    group = group_of(ledger, update.rollout_id)
    ids = [f"{group.group_id}.{index}" for index in range(group.size)]
    if update.rollout_id not in ids or not all(has_stopped(ledger, member) for member in ids):
        return
    if max(ledger.lsns[member][1] for member in ids) == update.event:
        missing = ledger.missing_reasons(group)
        told = {"group_id": group.group_id, "size": group.size, "rollout_ids": ids, "missing_reasons": missing}
        fill(update.group_finished, told)


def has_stopped(ledger: Ledger, rollout_id: str) -> bool:
    """Whether a rollout does not go on by itself: it has ended, or the service failed it."""
    state = ledger.rollouts.get(rollout_id)
    return state is not None and (ledger.is_done(rollout_id) or state.failure is not None)


def trajectory_parts(record: TrajectoryRecord, mask: Mask) -> Iterator[pb.Trajectory]:
    """A record as messages to be merged; big fields only as far as `mask` asks for them."""
    left_out = {name: None for field, names in _BIG_FIELDS.items() if field not in mask for name in names}
    logprobs = [math.nan if value is None else value for value in record.logprobs]
    told = {name: getattr(record, name) for name in record.__struct_fields__} | {"logprobs": logprobs} | left_out
    message = pb.Trajectory()
    fill(message, told)
    yield from parts(message)


CHANNELS: dict[int, tuple[str, ...]] = {
    pb.FIELD_ROUTES: ("routes", "routes_valid", "routes_version"),
    pb.FIELD_HIDDEN: ("hidden",),
}
"""What comes by reference."""
_BIG_FIELDS: dict[int, tuple[str, ...]] = {
    pb.FIELD_TOKENS: ("token_ids", "spans"),
    pb.FIELD_LOGPROBS: ("logprobs",),
    pb.FIELD_TOPK: ("topk_offsets", "topk_ids", "topk_logprobs"),
    pb.FIELD_SAMPLING_MASK: ("mask_offsets", "mask_ids"),
    pb.FIELD_TEXT: ("turns", "tool_calls", "verifier_output", "solution_output"),
}
