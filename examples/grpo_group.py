"""Roll out groups on `dsec serve` and compute GRPO advantages.

python examples/grpo_group.py 127.0.0.1:7710 copy-1-000 sort-1-000

The request id names the job: run it again after a crash of either side, and get the same groups.  A job whose
rollouts are all acknowledged is done with, and so is its id: the next step takes another.
"""

import sys

from rollout.client import RolloutClient
from rollout.engine import Sampling

address, *prompts = sys.argv[1:] or sys.exit(__doc__)
sys.tracebacklimit = 0  # what is wrong with a request is said in a sentence
with RolloutClient(address) as client:
    hot = Sampling(temperature=1.0, seed=7)
    for group in client.rollouts(prompts, group_size=8, request_id="grpo-step-1", sampling=hot):
        usable = [member for member in group.trajectories if member.reward is not None]  # unset is not 0
        mean = sum(member.reward for member in usable) / max(len(usable), 1)
        for member in usable:
            advantage = member.reward - mean
            print(member.rollout_id, f"{advantage:+.2f}", sum(member.loss_mask), "of", len(member.token_ids), "tokens")
        print(group.group_id, f"mean {mean:.2f}", "whole" if group.is_whole else f"missing {group.missing_reasons}")
        client.ack(member.rollout_id for member in group.trajectories)
