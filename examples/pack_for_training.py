"""Pack finished rollouts for a trainer: whole groups, GRPO advantages, sequences of at most 4,096 tokens.

dsec run --group-size 4 --temperature 1 --out runs/groups     (an advantage needs others of the group)
dsec export runs/groups
python examples/pack_for_training.py runs/groups/shards
"""

import sys
from collections import defaultdict

import numpy as np

from rollout.errors import RolloutError
from rollout.loader import Dataset, Rules

if len(sys.argv) != 2:
    sys.exit(__doc__)
try:
    dataset = Dataset.open(sys.argv[1])  # what `dsec export runs/groups` wrote
except RolloutError as error:
    sys.exit(str(error))
plan = dataset.plan(seed=0, epoch=0, token_budget=4096, step_units_count=4, rules=Rules(usable_min=2))
dropped = ", ".join(f"{count} as {verdict.name}" for verdict, count in plan.dropped.items()) or "none"
print(f"{len(dataset)} rollouts, {plan.sequences_count} sequences, dropped: {dropped}")
if not plan.sequences_count:
    sys.exit(
        "nothing to train on: SMALL_GROUP needs a run with --group-size 2 or more; the others are rules of the plan"
    )
for batch in dataset.batches(plan):  # on several ranks of a node: rollout.loader.Node and attach
    rewards = defaultdict(list)
    for sequence in batch:
        for member in sequence.members:
            rewards[member.group].append(member.reward)
    for sequence in batch:
        for member in sequence.members:
            group = np.array(rewards[member.group])
            tokens = slice(member.start, member.start + member.length)
            sequence.advantages[tokens] = (member.reward - group.mean()) / (group.std() + 1e-6)
        trained = int(sequence.loss_mask.sum())  # a real trainer computes its loss here
        print(
            f"step {batch.step}: {len(sequence)} tokens, {trained} trained, cu_seqlens {sequence.cu_seqlens.tolist()}"
        )
