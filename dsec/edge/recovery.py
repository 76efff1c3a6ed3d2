"""What a new Edge does with what it finds: the journal says what should be, the substrate what is.

    the journal says      the substrate has it                    it has not
    ready                 taken over, its commands collected      ended: lost
    requested only        destroyed, ended: failed                ended: failed
    cancelled, unleased   destroyed, ended                        ended
    ended, or unknown     destroyed                               nothing

See: docs/architecture.md, "Recovery"; `DurableSandbox.attach` for the commands.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Iterable

from dsec.edge.admission import amounts_of
from dsec.edge.journal import EdgeOpened, Known, NetworkUpdated, SandboxEnded
from dsec.edge.leases import Leases
from dsec.edge.live import LiveSandbox
from dsec.edge.registry import Registry
from dsec.errors import DsecError, ResourceExhaustedError, StateError
from dsec.lifecycle import EndReason, State
from dsec.sandbox import Sandbox
from dsec.types import NetworkPolicy

IN_FLIGHT_MAX = 64
log = logging.getLogger(__name__)


async def recover(registry: Registry, leases: Leases) -> None:
    """Make journal and substrate agree; both are open."""
    ledger, clock = registry.ledger, registry.clock
    is_same_boot = ledger.opened is not None and ledger.opened.boot_id == clock.boot_id
    anchor_s = ledger.opened.anchor_s if ledger.opened and is_same_boot else clock.wall_s() - clock.boot_s()
    await registry.log.append(EdgeOpened(clock.boot_id, anchor_s, anchor_s + clock.boot_s()))
    found = dict(registry.substrate.adopted())
    work: list[Awaitable[None]] = []
    for known in [known for known in ledger.sandboxes.values() if not known.is_ended]:
        sandbox = found.pop(known.id, None)
        work.append(_settle(registry, leases, known, sandbox))
    work += [sandbox.destroy() for sandbox in found.values()]
    await _gather(work)


async def _settle(registry: Registry, leases: Leases, known: Known, sandbox: Sandbox | None) -> None:
    request_id = known.requested.request.request_id
    if request_id in registry.ledger.cancelled:
        reason, why = EndReason.CANCELLED, ""
    elif known.ready_at_s is None:
        reason, why = EndReason.FAILED, "the Edge stopped before it was ready"
    elif sandbox is None:
        reason, why = EndReason.LOST, "it was not there any more when a new Edge looked"
    else:
        live = _adopt(registry, known, sandbox)
        if not leases.covers(live):
            await registry.end(live, EndReason.LEASE_LAPSED, "its lease has ended")
            return
        await _take_over(registry, live)
        return
    if sandbox is not None:
        await sandbox.destroy()
    await registry.log.append(SandboxEnded(known.id, reason, registry.now(), why))


def _adopt(registry: Registry, known: Known, sandbox: Sandbox) -> LiveSandbox:
    asked = amounts_of(known.spec)
    registry.admission.take(asked)
    return registry.adopt(known, sandbox, asked)


async def _take_over(registry: Registry, live: LiveSandbox) -> None:
    """Bring a sandbox to the state that the journal wants, and its commands to their ends."""
    try:
        if live.known.spec.network.rules:
            await _open_way_out(registry, live)
        if live.state is State.PAUSED:
            await _pause_again(live)
        else:
            await live.sandbox.resume()
            await live.durable.attach()
    except DsecError as error:
        await registry.end(live, EndReason.LOST, f"it could not be taken over: {error}")
        return
    registry.watch(live)


async def _open_way_out(registry: Registry, live: LiveSandbox) -> None:
    """Give a sandbox its network again; where it prevents that (it took the port), it goes on without one."""
    try:
        await live.sandbox.update_network(live.known.spec.network)
    except StateError as error:
        log.warning("sandbox %s has no network any more: %s", live.known.id, error)
        await registry.log.append(NetworkUpdated(live.known.id, NetworkPolicy(), registry.now()))


async def _pause_again(live: LiveSandbox) -> None:
    """Its commands are collected when it resumes: at once, if it cannot be stopped."""
    try:
        await live.sandbox.pause()
    except ResourceExhaustedError:
        await live.resume()


async def _gather(work: Iterable[Awaitable[None]]) -> None:
    bound = asyncio.Semaphore(IN_FLIGHT_MAX)

    async def one(piece: Awaitable[None]) -> None:
        async with bound:
            await piece

    await asyncio.gather(*map(one, work))
