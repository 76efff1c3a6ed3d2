"""Who runs when: what a rollout claims, fair shares of projects, and who gives way to whom."""
