"""The trainer's side: finished rollouts, planned from metadata, packed, read once per node.

    dataset = Dataset.open("runs/main/shards")
    plan = dataset.plan(seed=0, epoch=0, token_budget=8192)
    for batch in dataset.batches(plan):
        for sequence in batch: ...

See: docs/formats/shards.md, docs/training.md.
"""

from rollout.export.side_channels import read_side_channel
from rollout.loader.batch import Batch, Member, PackedSequence
from rollout.loader.dataset import Dataset
from rollout.loader.metadata import NO_VERSION, Metadata
from rollout.loader.node import Node, attach
from rollout.loader.plan import Layout, Plan, Rules, Verdict

__all__ = [
    "NO_VERSION",
    "Batch",
    "Dataset",
    "Layout",
    "Member",
    "Metadata",
    "Node",
    "PackedSequence",
    "Plan",
    "Rules",
    "Verdict",
    "attach",
    "read_side_channel",
]
