"""What an Edge must not forget, as records over a log, and the state that they fold to.

The journal of a host is one log of two schemas: this one (what became of sandboxes, leases and
requests) and the trajectory (`dsec/trajectory.py`: what became of their commands).  The Edge holds no
other copy of any of this: it folds each record once it is durable, and a new Edge folds the same log
into the same state.  What ended is kept for a while, so that people see why; its commands stay in
the log alone.

Invariants:
1. Any prefix of a journal folds.
2. A ledger read back equals the one that its writer held.
3. Memory is bounded by what lives, and `ended_count_max` of what ended or was cancelled.

See: docs/formats/edge_journal.md, dsec/lifecycle.py.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import msgspec

from dsec import trajectory
from dsec.lifecycle import EndReason, Happening, State, after
from dsec.trajectory import (
    CommandFinished,
    CommandRefused,
    CommandReplayed,
    CommandStarted,
    CommandUnknown,
    SandboxCreated,
    Trajectory,
    TrajectoryRecord,
)
from dsec.types import LayerId, NetworkPolicy, SandboxId, SandboxSpec
from dsec.views import CreateRequest, SandboxView

KIND = 4
"""Record kind of the Edge's schema in a log."""


class EdgeOpened(msgspec.Struct, frozen=True, tag="edge_opened"):
    """An Edge took over the journal, in this boot of the host; moments are `anchor_s` plus seconds since boot."""

    boot_id: str
    anchor_s: float
    at_s: float


class SandboxRequested(msgspec.Struct, frozen=True, tag="sandbox_requested", kw_only=True):
    """Durable before the substrate is asked.

    `request` is as it was asked, for so many sandboxes; `spec` is what this one is made of; `origin` and
    `origin_key` say which sandbox it goes on from, and after which command.
    """

    sandbox_id: SandboxId
    request: CreateRequest
    spec: SandboxSpec
    at_s: float
    members_count: int = 1
    origin: str = ""
    origin_key: str = ""


class SandboxReady(msgspec.Struct, frozen=True, tag="sandbox_ready"):
    """Durable before anybody learns its id; a group gets ready in one record, so all of it or nothing."""

    sandbox_ids: tuple[SandboxId, ...]
    at_s: float


class SandboxPaused(msgspec.Struct, frozen=True, tag="sandbox_paused"):
    """It is to stand still."""

    sandbox_id: SandboxId
    at_s: float


class SandboxResumed(msgspec.Struct, frozen=True, tag="sandbox_resumed"):
    """It is to go on."""

    sandbox_id: SandboxId
    at_s: float


class SandboxEnded(msgspec.Struct, frozen=True, tag="sandbox_ended"):
    """It is not to be any more; whatever is left of it is destroyed."""

    sandbox_id: SandboxId
    reason: EndReason
    at_s: float
    message: str = ""


class SnapshotTaken(msgspec.Struct, frozen=True, tag="snapshot_taken"):
    """`layer` holds what the sandbox had written.

    `after` is the number of the last command in it, if every command up to that one had ended and
    none was running; else it is None, and the layer is no state between two commands.
    """

    sandbox_id: SandboxId
    layer: LayerId
    after: int | None
    at_s: float


class NetworkUpdated(msgspec.Struct, frozen=True, tag="network_updated"):
    """Where the sandbox may connect to from now on."""

    sandbox_id: SandboxId
    policy: NetworkPolicy
    at_s: float


class NetworkDecided(msgspec.Struct, frozen=True, tag="network_decided", kw_only=True):
    """Whether a connection that the sandbox asked for was allowed, and why; with `is_end`: it ended."""

    sandbox_id: SandboxId
    host: str
    port: int
    address: str
    allowed: bool
    reason: str
    at_s: float
    is_end: bool = False
    sent_bytes: int = 0
    received_bytes: int = 0
    untold_count: int = 0


class LeaseGranted(msgspec.Struct, frozen=True, tag="lease_granted"):
    """Sandboxes under (owner, epoch) may live until then; leases of lower epochs end."""

    owner: str
    epoch: int
    expires_at_s: float


class LeaseEnded(msgspec.Struct, frozen=True, tag="lease_ended"):
    """It was ended, or not renewed."""

    owner: str
    epoch: int
    at_s: float


class RequestCancelled(msgspec.Struct, frozen=True, tag="request_cancelled"):
    """Whatever was or will be made under this request id shall not be."""

    request_id: str
    at_s: float


class StateCarried(msgspec.Struct, frozen=True, tag="state_carried"):
    """What belongs to no sandbox, said again before the records that said it are dropped.

    Leases as (owner, epoch, expires_at_s, is_live); it tells nothing new to who read those records.
    """

    opened: EdgeOpened | None
    leases: tuple[tuple[str, int, float, bool], ...]
    cancelled: tuple[str, ...]


EdgeRecord = (
    EdgeOpened
    | StateCarried
    | SandboxRequested
    | SandboxReady
    | SandboxPaused
    | SandboxResumed
    | SandboxEnded
    | SnapshotTaken
    | NetworkUpdated
    | NetworkDecided
    | LeaseGranted
    | LeaseEnded
    | RequestCancelled
)
SandboxChange = (
    SandboxReady | SandboxPaused | SandboxResumed | SandboxEnded | SnapshotTaken | NetworkUpdated | NetworkDecided
)
JournalRecord = EdgeRecord | TrajectoryRecord
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[EdgeRecord] = msgspec.msgpack.Decoder(EdgeRecord)


def encode(record: JournalRecord) -> tuple[int, bytes]:
    """Kind and payload of a record."""
    if isinstance(record, EdgeRecord):
        return KIND, _encoder.encode(record)
    return trajectory.KIND, trajectory.encode(record)


def decode(kind: int, payload: bytes) -> JournalRecord:
    """Inverse of `encode`; msgspec.DecodeError (a ValueError) for another kind or schema."""
    if kind == KIND:
        return _decoder.decode(payload)
    if kind == trajectory.KIND:
        return trajectory.decode(payload)
    raise msgspec.DecodeError(f"record kind {kind} does not belong into the journal of an Edge")


@dataclass(slots=True)
class Lease:
    """The newest epoch of an owner."""

    epoch: int
    expires_at_s: float
    is_live: bool = True


@dataclass(slots=True)
class Known:
    """Everything durable about one sandbox."""

    requested: SandboxRequested
    first_lsn: int
    spec: SandboxSpec
    trajectory: Trajectory
    state: State = State.CREATING
    ready_at_s: float | None = None
    used_at_s: float = 0.0
    """When something of it last began, ended or was resumed."""
    reason: EndReason | None = None
    message: str = ""
    last_lsn: int = 0
    """Of the newest record about it, those behind its end included."""

    @property
    def id(self) -> SandboxId:
        """Its id."""
        return self.requested.sandbox_id

    @property
    def is_ended(self) -> bool:
        """Whether the journal says that it shall not be."""
        return self.state is State.ENDED

    def view(self, commands_count: int, expires_at_s: float | None) -> SandboxView:
        """As the Edge shows it."""
        request = self.requested.request
        return SandboxView(
            id=self.id,
            state=self.state,
            spec=self.spec,
            labels=request.labels,
            owner=request.owner,
            epoch=request.epoch,
            created_at_s=self.requested.at_s,
            expires_at_s=expires_at_s,
            commands_count=commands_count,
            reason=self.reason or "",
        )


class Ledger:
    """The fold of a journal."""

    def __init__(self, ended_count_max: int) -> None:
        self.sandboxes: dict[SandboxId, Known] = {}
        self.requests: dict[str, list[SandboxId]] = {}
        """Request id -> the sandboxes that were made for it."""
        self.cancelled: dict[str, None] = {}
        self.leases: dict[str, Lease] = {}
        self.ended: dict[SandboxId, None] = {}
        """In the order of their ends."""
        self.opened: EdgeOpened | None = None
        self.lsn = 0
        self._lapsed: dict[str, None] = {}
        self._ended_count_max = ended_count_max

    def apply(self, record: JournalRecord, lsn: int) -> None:
        """Fold one durable record in; one of a sandbox that was forgotten changes nothing."""
        self.lsn = lsn
        match record:
            case EdgeOpened():
                self.opened = record
            case StateCarried():
                self._carry(record)
            case SandboxRequested():
                self._request(record, lsn)
            case SandboxReady():
                for sandbox_id in record.sandbox_ids:
                    self._change(sandbox_id, record)
            case LeaseGranted():
                self.leases[record.owner] = Lease(record.epoch, record.expires_at_s)
                self._lapsed.pop(record.owner, None)
            case LeaseEnded():
                self._end_lease(record)
            case RequestCancelled():
                self.cancelled[record.request_id] = None
                self._bound(self.cancelled)
            case (
                CommandStarted()
                | CommandFinished()
                | CommandRefused()
                | CommandUnknown()
                | CommandReplayed()
                | SandboxCreated()
            ):
                self._command(record, lsn)
            case _:
                self._change(record.sandbox_id, record)

    def lease_of(self, known: Known) -> Lease | None:
        """The lease that a sandbox lives under, if it is live and of its epoch."""
        request = known.requested.request
        lease = self.leases.get(request.owner)
        return lease if lease is not None and lease.is_live and lease.epoch == request.epoch else None

    def carried(self) -> StateCarried:
        """All that would be lost with the beginning of the journal, but for sandboxes that ended."""
        leases = ((owner, lease.epoch, lease.expires_at_s, lease.is_live) for owner, lease in self.leases.items())
        return StateCarried(self.opened, tuple(leases), tuple(self.cancelled))

    def _carry(self, record: StateCarried) -> None:
        self.opened = self.opened or record.opened
        for owner, epoch, expires_at_s, is_live in record.leases:
            if owner not in self.leases:
                self.leases[owner] = Lease(epoch, expires_at_s, is_live)
                self._lapsed.update({} if is_live else {owner: None})
        self.cancelled = dict.fromkeys(record.cancelled) | self.cancelled
        self._bound(self.cancelled)

    def _request(self, record: SandboxRequested, lsn: int) -> None:
        sandbox_id = record.sandbox_id
        folded = Trajectory(sandbox_id, keeps_contents=False, incarnation=1)
        self.sandboxes[sandbox_id] = Known(record, lsn, record.spec, folded, used_at_s=record.at_s, last_lsn=lsn)
        if record.request.request_id:
            self.requests.setdefault(record.request.request_id, []).append(sandbox_id)

    def _command(self, record: TrajectoryRecord, lsn: int) -> None:
        known = self._touched(SandboxId(record.session))
        if known is not None and not known.is_ended:
            known.trajectory.apply(record, lsn)
            if isinstance(record, CommandStarted | CommandFinished | CommandRefused | CommandUnknown):
                known.used_at_s = max(known.used_at_s, record.at_s)

    def _touched(self, sandbox_id: SandboxId) -> Known | None:
        if (known := self.sandboxes.get(sandbox_id)) is not None:
            known.last_lsn = self.lsn
        return known

    def _change(self, sandbox_id: SandboxId, record: SandboxChange) -> None:
        known = self._touched(sandbox_id)
        if known is None or known.is_ended:
            return
        match record:
            case SandboxReady():
                known.state = after(known.state, Happening.READY, known.id)
                known.ready_at_s = known.used_at_s = record.at_s
            case SandboxPaused():
                known.state = after(known.state, Happening.PAUSE, known.id)
            case SandboxResumed():
                known.state = after(known.state, Happening.RESUME, known.id)
                known.used_at_s = record.at_s
            case NetworkUpdated():
                known.spec = msgspec.structs.replace(known.spec, network=record.policy)
            case SandboxEnded():
                known.state = after(after(known.state, Happening.STOP, known.id), Happening.GONE, known.id)
                known.reason, known.message = record.reason, record.message
                self._end(known)

    def _end(self, known: Known) -> None:
        """Keep what people ask about an ended sandbox; let go of the rest, and of the oldest of them."""
        if known.reason is EndReason.FAILED:
            self._release_request(known)
        folded = known.trajectory
        known.trajectory = Trajectory(known.id, keeps_contents=False, incarnation=1, last_number=folded.last_number)
        self.ended[known.id] = None
        for forgotten in self._bound(self.ended):
            self._release_request(self.sandboxes.pop(forgotten))

    def _release_request(self, known: Known) -> None:
        request_id = known.requested.request.request_id
        made = self.requests.get(request_id, [])
        if known.id in made:
            made.remove(known.id)
        if not made:
            self.requests.pop(request_id, None)

    def _end_lease(self, record: LeaseEnded) -> None:
        lease = self.leases.get(record.owner)
        if lease is not None and lease.is_live and lease.epoch == record.epoch:
            lease.is_live = False
            self._lapsed[record.owner] = None
            for owner in self._bound(self._lapsed):
                del self.leases[owner]

    def _bound(self, kept: dict[SandboxId, None] | dict[str, None]) -> list[SandboxId]:
        count = max(0, len(kept) - self._ended_count_max)
        over = [SandboxId(name) for name in itertools.islice(kept, count)]
        for name in over:
            del kept[name]
        return over
