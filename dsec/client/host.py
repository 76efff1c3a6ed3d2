"""What an Edge says of its host, and the leases that sandboxes live under."""

from __future__ import annotations

from dsec import messages
from dsec.client.connection import connect
from dsec.pb.v1 import edge_pb2 as pb
from dsec.views import HostView


async def host_view(url: str = "", token: str = "") -> HostView:
    """What the host has, and what of it is used.  UnreachableError."""
    connection = connect(url, token)
    try:
        return messages.host_of(await connection.call("GetHost", pb.GetHostRequest()))
    finally:
        await connection.close()


async def grant_lease(owner: str, epoch: int, ttl_s: float, *, url: str = "", token: str = "") -> None:
    """Grant or renew a lease; a newer epoch ends the sandboxes of older ones.  StateError for an older epoch."""
    connection = connect(url, token)
    try:
        await connection.call("GrantLease", pb.GrantLeaseRequest(owner=owner, epoch=epoch, ttl_s=ttl_s))
    finally:
        await connection.close()


async def end_lease(owner: str, epoch: int, *, url: str = "", token: str = "") -> None:
    """End a lease, and exactly its sandboxes."""
    connection = connect(url, token)
    try:
        await connection.call("EndLease", pb.EndLeaseRequest(owner=owner, epoch=epoch))
    finally:
        await connection.close()
