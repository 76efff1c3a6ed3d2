"""The Python client of the rollout service: submit groups, get records back, and never notice a lost connection.

    with RolloutClient("127.0.0.1:7710") as client:
        for group in client.rollouts(["copy-1-000"], group_size=8, sampling=Sampling(temperature=1.0)):
            print(group.rewards)

See: docs/training.md; proto/rollout/pb/v1/rollout.proto.
"""

from rollout.client.aio import AsyncRolloutClient
from rollout.client.blocking import RolloutClient
from rollout.client.values import Group, Trajectory, Update

__all__ = ["AsyncRolloutClient", "Group", "RolloutClient", "Trajectory", "Update"]
