"""The commands of `dsec` that roll out: `run`, `serve`, `export`; each parses, calls the service, and prints."""
