"""Sandboxes: the port, the host agent (Edge) that makes them, and the log of what ran in them."""
