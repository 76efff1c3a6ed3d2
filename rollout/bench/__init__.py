"""Tasks: loading them, and what each needs in its sandbox before the agent starts."""
