"""A rollout's sandbox: which it gets, which network in which phase, and what its tools are."""
