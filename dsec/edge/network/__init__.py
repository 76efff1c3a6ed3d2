"""The only way out of a sandbox: a proxy in the host agent, and the allowlist that it obeys."""
