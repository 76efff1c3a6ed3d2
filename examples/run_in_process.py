"""Roll the model out on two bundled tasks, four times each, in this process (root; no server needed)."""

import asyncio
import sys
from pathlib import Path

from rollout.batch import run_in_process


async def main(directory: Path) -> None:
    """Print each rollout's reward as it ends; run it again and the log answers at once."""
    tasks = ["copy-1-000", "sort-1-000"]
    async for record in run_in_process(directory, tasks, group_size=4, temperature=1.0, seed=7):
        print(record.rollout_id, record.reward.value, len(record.token_ids), "tokens")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/in-process")))
