"""The host agent: what one machine needs to make and keep sandboxes."""
