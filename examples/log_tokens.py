"""Log engine steps of two requests; run it again, or kill it and run it again, and it goes on where it stopped."""

import asyncio
import sys
from pathlib import Path

from wal import GroupCommit, Log, SyncPolicy, read
from wal.fold import TokenFold
from wal.token_log import TokenLog

REQUESTS = ("haiku", "limerick")


async def main(directory: Path) -> None:
    """Decode five more tokens of each request; every token is durable before it is printed."""
    log = Log.open(directory)  # recovered: what was acknowledged before is there
    fold = TokenFold()
    for record in read(directory):
        fold.add(record)
    commit = GroupCommit(log, SyncPolicy.interval(5))
    tokens = TokenLog(commit, fold)
    for request in REQUESTS:
        if request not in fold.streams:
            await tokens.open(request)
    slots = {fold.streams[request].slot: request for request in REQUESTS}
    for _ in range(5):
        sampled = [fold.streams[request].length for request in slots.values()]  # a real engine would sample here
        await tokens.append(list(slots), sampled, [-0.5] * len(slots), policy_version=3)
        print("durable:", dict(zip(slots.values(), sampled, strict=True)))
    await commit.close()
    for request in REQUESTS:
        stream = fold.streams[request]
        print(request, list(stream.token_ids), "policy versions", stream.policy_versions)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tokens")))
