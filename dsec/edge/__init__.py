"""The host agent: makes sandboxes, runs commands in them, and logs what ran."""
